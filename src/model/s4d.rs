//! The S4D-Lin mixer: a fixed diagonal state space a channel, complex and time-invariant (spec/pr1994.md section 10).
//!
//! With `dt = softplus(dt_log)`, `A = -exp(A_log) + i A_im`, `a = exp(dt A)` and `b = (a - 1) / A B_proj` (zero-order
//! hold), each channel's `h_t = a h_{t-1} + b u_t` and `y_t = 2 Re(C_proj . h_t) + D_skip u_t`. Run in chunks: within one
//! as a product with the Toeplitz matrix of the kernel `2 Re(C_proj . a^l b)`, between them by the state.

use super::init::Init;
use super::params::Params;
use super::spec::{Linears, Spec};
use super::state::SsmState;
use crate::ops::{Backend, Param, Plain, accumulate_type, reciprocal};
use burn::tensor::{Int, Tensor};

/// Positions of one chunk.
const CHUNK: usize = 32;

/// Names and sizes of one mixer.
#[derive(Debug, Clone, PartialEq)]
pub struct S4dPlan {
    /// What stands before the parameters' names.
    pub prefix: String,
    /// Width of the residual stream, and of the states' inputs.
    pub dim: usize,
    /// Complex states of a channel.
    pub state: usize,
}

impl S4dPlan {
    /// The parameters. B starts at 1, C normal, the output projection at 0; the step sizes as Mamba's.
    pub fn specs(&self) -> Vec<Spec> {
        let Self { prefix, dim, state } = self;
        let spec = |name: &str, shape: &[usize], init| Spec::new(format!("{prefix}.{name}"), shape, init);
        let linears = Linears { casted: true, ..Linears::PLAIN };
        vec![
            spec("A_log", &[*dim, *state], Init::Constant(0.5f32.ln())),
            spec("A_im", &[*dim, *state], Init::PiCount),
            spec("B_proj", &[*dim, *state], Init::Constant(1.0)),
            spec("C_proj", &[*dim, *state], Init::Normal(1.0)),
            spec("D_skip", &[*dim], Init::Constant(1.0)),
            spec("dt_log", &[*dim], Init::StepSize),
            linears.weight(&format!("{prefix}.in_proj"), [*dim, *dim]),
            linears.weight_from(&format!("{prefix}.out_proj"), [*dim, *dim], Init::Constant(0.0)),
        ]
    }
}

/// An S4D-Lin mixer.
#[derive(Debug, Clone)]
pub struct S4d<P: Plain> {
    plan: S4dPlan,
    in_proj: Param<P>,
    out_proj: Param<P>,
    a_log: Param<P>,
    a_im: Param<P>,
    b_proj: Param<P>,
    c_proj: Param<P>,
    skip: Param<P>,
    dt_log: Param<P>,
}

/// A complex tensor.
#[derive(Clone)]
struct Complex<B: Backend, const D: usize> {
    re: Tensor<B, D>,
    im: Tensor<B, D>,
}

impl<B: Backend, const D: usize> Complex<B, D> {
    fn times(self, other: Self) -> Self {
        let re = self.re.clone() * other.re.clone() - self.im.clone() * other.im.clone();
        Self { re, im: self.re * other.im + self.im * other.re }
    }
}

impl<P: Plain> S4d<P> {
    /// The mixer of a plan with the parameters of its names.
    pub fn new(plan: &S4dPlan, params: &Params<P>) -> Self {
        let named = |name: &str| params.named(&format!("{}.{name}", plan.prefix));
        Self {
            in_proj: named("in_proj.weight"),
            out_proj: named("out_proj.weight"),
            a_log: named("A_log"),
            a_im: named("A_im"),
            b_proj: named("B_proj"),
            c_proj: named("C_proj"),
            skip: named("D_skip"),
            dt_log: named("dt_log"),
            plan: plan.clone(),
        }
    }

    /// `x[b t, c]` (normed) to `y[b t, c]`; goes on from `state` and leaves in it what the next call goes on from.
    pub fn forward<B: Backend<Plain = P>>(
        &self,
        x: Tensor<B, 2>,
        batch: usize,
        state: Option<&mut SsmState<B>>,
    ) -> Tensor<B, 2> {
        let S4dPlan { dim, state: size, .. } = self.plan;
        let rows = x.dims()[0];
        let time = rows / batch;
        let dtype = x.dtype();
        let wide = accumulate_type(dtype);
        let u = B::project(x, &self.in_proj);
        // [c, b, t]
        let input = u.clone().cast(wide).reshape([batch, time, dim]).permute([2, 0, 1]);
        let place = (&u.device(), wide);
        let [re, im] = [0, 1].map(|part| SsmState::hidden(&state, part, [dim, batch, size], place));
        let mut hidden = Complex { re, im };
        let chunk = CHUNK.min(time);
        let mut parts = Vec::new();
        // Whole chunks, then what is left.
        for (start, len, chunk) in
            [(0, time / chunk * chunk, chunk), (time / chunk * chunk, time % chunk, time % chunk)]
        {
            if len > 0 {
                let part = input.clone().narrow(2, start, len);
                let (y, after) = self.chunks(part, hidden, chunk);
                parts.push(y);
                hidden = after;
            }
        }
        if let Some(state) = state {
            *state = SsmState::new(None, vec![hidden.re, hidden.im]);
        }
        let y = Tensor::cat(parts, 2).permute([1, 2, 0]).reshape([rows, dim]).cast(dtype);
        let y = y + u * B::weight(&self.skip, [1, dim]);
        B::project(y, &self.out_proj)
    }

    /// `u[c, b, t]`, `t` a multiple of `chunk`, from the state `[c, b, n]`: the outputs, and the state after them.
    fn chunks<B: Backend<Plain = P>>(
        &self,
        u: Tensor<B, 3>,
        mut hidden: Complex<B, 3>,
        chunk: usize,
    ) -> (Tensor<B, 3>, Complex<B, 3>) {
        let [dim, batch, time] = u.dims();
        let (count, size, dtype) = (time / chunk, self.plan.state, u.dtype());
        let param = |param: &Param<P>| B::master::<2>(param, [dim, size]);
        let dt = B::softplus(B::master::<2>(&self.dt_log, [dim, 1]));
        let (rate, turn) = (param(&self.a_log).exp().neg(), param(&self.a_im));

        // a^l for l from 0 to chunk: [c, n, chunk + 1].
        let powers = Tensor::<B, 1, Int>::arange(0..chunk as i64 + 1, &u.device()).float().cast(dtype);
        let powers = powers.reshape([1, 1, chunk + 1]);
        let scaled = |x: &Tensor<B, 2>| (x.clone() * dt.clone()).reshape([dim, size, 1]) * powers.clone();
        let (length, angle) = (scaled(&rate).exp(), scaled(&turn));
        let power = Complex { re: length.clone() * angle.clone().cos(), im: length * angle.sin() };
        let cut = |from: usize, len: usize| Complex {
            re: power.re.clone().narrow(2, from, len),
            im: power.im.clone().narrow(2, from, len),
        };

        // b = (a - 1) / A B, as (a - 1) conj(A) / |A|^2 B.
        let one = cut(1, 1);
        let (re, im) = (one.re.reshape([dim, size]).sub_scalar(1.0), one.im.reshape([dim, size]));
        let square = rate.clone() * rate.clone() + turn.clone() * turn.clone();
        let b = Complex { re, im }.times(Complex { re: rate, im: turn.neg() });
        let factor = param(&self.b_proj) * reciprocal(square);
        let b = Complex { re: b.re * factor.clone(), im: b.im * factor };
        let c = param(&self.c_proj).mul_scalar(2.0);
        let column = |x: &Complex<B, 2>| Complex {
            re: x.re.clone().reshape([dim, size, 1]),
            im: x.im.clone().reshape([dim, size, 1]),
        };

        // Within a chunk: y[c, b k, i] = sum over j <= i of kernel[c, i - j] u[c, b k, j].
        let weighted = Complex { re: c.clone() * b.re.clone(), im: c.clone() * b.im.clone() };
        let kernel = column(&weighted).times(cut(0, chunk)).re.sum_dim(1).reshape([dim, chunk]);
        let toeplitz = B::matmul_as(kernel, lags::<B>(chunk, &u), dtype).reshape([dim, chunk, chunk]);
        let pieces = u.reshape([dim, batch * count, chunk]);
        let within = B::matmul_as(pieces.clone(), toeplitz, dtype).reshape([dim, batch, count, chunk]);

        // What a chunk adds to the state: sum over j of a^(chunk - 1 - j) b u_j.
        let adds = column(&b).times(cut(0, chunk));
        let add = |x: Tensor<B, 3>| {
            let x = x.flip([2]).swap_dims(1, 2);
            B::matmul_as(pieces.clone(), x, dtype).reshape([dim, batch, count, size])
        };
        let (add_re, add_im) = (add(adds.re), add(adds.im));
        let whole = cut(chunk, 1);
        let whole = Complex { re: whole.re.reshape([dim, 1, size]), im: whole.im.reshape([dim, 1, size]) };

        // What the state adds to a chunk: Re(C a^(i + 1) h).
        let seen = cut(1, chunk);
        let c = c.reshape([dim, size, 1]);
        let (seen_re, seen_im) = (seen.re * c.clone(), seen.im * c);
        let mut parts = Vec::with_capacity(count);
        for index in 0..count {
            let from_state = B::matmul_as(hidden.re.clone(), seen_re.clone(), dtype)
                - B::matmul_as(hidden.im.clone(), seen_im.clone(), dtype);
            parts.push(within.clone().narrow(2, index, 1).reshape([dim, batch, chunk]) + from_state);
            let part = |x: &Tensor<B, 4>| x.clone().narrow(2, index, 1).reshape([dim, batch, size]);
            let moved = hidden.times(whole.clone());
            hidden = Complex { re: moved.re + part(&add_re), im: moved.im + part(&add_im) };
        }
        (Tensor::cat(parts, 2), hidden)
    }
}

/// `[l, j i]`: one where `i - j = l`; a kernel times it is the transpose of its Toeplitz matrix.
fn lags<B: Backend>(chunk: usize, like: &Tensor<B, 3>) -> Tensor<B, 2> {
    let number = Tensor::<B, 1, Int>::arange(0..chunk as i64, &like.device());
    let lag = number.clone().reshape([1, chunk]).expand([chunk, chunk])
        - number.clone().reshape([chunk, 1]).expand([chunk, chunk]);
    let lag = lag.reshape([1, chunk * chunk]).expand([chunk, chunk * chunk]);
    let number = number.reshape([chunk, 1]).expand([chunk, chunk * chunk]);
    lag.equal(number).float().cast(like.dtype())
}
