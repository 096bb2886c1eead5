//! Hashes of neighbouring tokens to the rows of a table (spec/pr1607.md and spec/pr1382.md section 2).
//!
//! On every device in 32-bit integers: no product leaves their range, and the one hash that the peers compute in wrapping
//! 32-bit arithmetic is wrapped explicitly where the device's integers are wider.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};

/// Tokens before a position that its hash depends on.
pub const REACH: usize = 2;

/// Which hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// `(92821 previous + own) mod n`; the token before the first is 0.
    Product,
    /// `((36313 own) xor (27191 previous)) mod (n - 1)`, and with the token before that `xor (51497 that)`, in wrapping
    /// 32-bit integers; positions without enough tokens before them take row `n - 1`.
    Xor,
}

impl Hash {
    /// The row of each of `ids[b, t]`, of which `start` positions came before, the last of them in `before`.
    pub fn buckets<B: Backend>(
        self,
        ids: Tensor<B, 2, Int>,
        before: Option<Tensor<B, 2, Int>>,
        start: usize,
        buckets: usize,
        triple: bool,
    ) -> Tensor<B, 2, Int> {
        let time = ids.dims()[1];
        let known = before.as_ref().map_or(0, |before| before.dims()[1]);
        let all = match before {
            Some(before) => Tensor::cat(vec![before, ids], 1),
            None => ids,
        };
        let rows = match self {
            Self::Product => product(all, buckets),
            Self::Xor => xor(all, start - known, buckets, triple),
        };
        rows.narrow(1, known, time)
    }
}

/// `ids` that many places later, zeros in the first ones.
fn shifted<B: Backend>(ids: &Tensor<B, 2, Int>, places: usize) -> Tensor<B, 2, Int> {
    let [batch, time] = ids.dims();
    let places = places.min(time);
    let zeros = Tensor::zeros([batch, places], &ids.device());
    if places == time {
        return zeros;
    }
    Tensor::cat(vec![zeros, ids.clone().narrow(1, 0, time - places)], 1)
}

fn product<B: Backend>(ids: Tensor<B, 2, Int>, buckets: usize) -> Tensor<B, 2, Int> {
    let n = buckets as i64;
    let previous = shifted(&ids, 1);
    // 92821 p mod n from the two bytes of p: (92821 high mod n) 256 + 92821 low stays below 2^31 for n up to 2^22.
    let high = previous.clone().div_scalar(256);
    let low = previous - high.clone().mul_scalar(256);
    let high = modulo(modulo(high.mul_scalar(92_821), n).mul_scalar(256), n);
    modulo(high + low.mul_scalar(92_821) + ids, n)
}

/// `x mod n` with the sign of `x`, by a whole-number division: GPUs take Burn's remainder through f32, which from 2^24 on
/// gives -1 or `n` for some multiples' neighbours.
fn modulo<B: Backend>(x: Tensor<B, 2, Int>, n: i64) -> Tensor<B, 2, Int> {
    let whole = x.clone().div_scalar(n).mul_scalar(n);
    x - whole
}

/// The value that 32-bit arithmetic has for a product.
fn wrapped<B: Backend>(x: Tensor<B, 2, Int>) -> Tensor<B, 2, Int> {
    if x.dtype().size() == 4 {
        return x;
    }
    (x.add_scalar(1i64 << 31)).remainder_scalar(1i64 << 32).sub_scalar(1i64 << 31)
}

fn xor<B: Backend>(ids: Tensor<B, 2, Int>, first: usize, buckets: usize, triple: bool) -> Tensor<B, 2, Int> {
    let [batch, time] = ids.dims();
    // A table of one row has no row for hashes: every position takes the only one.
    let n = (buckets as i64 - 1).max(1);
    let term = |places: usize, factor: i64| {
        let ids = if places == 0 { ids.clone() } else { shifted(&ids, places) };
        wrapped(ids.mul_scalar(factor))
    };
    let mut hash = term(0, 36_313).bitwise_xor(term(1, 27_191));
    if triple {
        hash = hash.bitwise_xor(term(2, 51_497));
    }
    let hash = modulo(modulo(hash, n).add_scalar(n), n);
    let needed = if triple { 2usize } else { 1 };
    let lacking = needed.saturating_sub(first).min(time);
    if lacking == 0 {
        return hash;
    }
    let last = Tensor::full([batch, lacking], buckets as i64 - 1, &ids.device());
    if lacking == time {
        return last;
    }
    Tensor::cat(vec![last, hash.narrow(1, lacking, time - lacking)], 1)
}
