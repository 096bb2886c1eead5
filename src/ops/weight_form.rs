//! Quantised forms of a weight, with straight-through gradients: what the ops compute with in a matrix's place.
//!
//! A form maps the master `w[o, i]` to the weight that is used, once for each new value; the gradient `g` of what is used
//! becomes that of `w`. Both in f32 (f64 for f64). Rounding is to the nearest, ties to even.

use super::{accumulate_type, magnitude, reciprocal, reduce};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

/// How a weight is used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum WeightForm {
    /// As it is.
    Full,
    /// `c t` with `c = max(mean |w|, 1e-8)` and `t = clamp(round(w / c), -1, 1)` (spec/pr1994.md section 3). The
    /// gradient is `c g + sign(w) sum(g t) / n`: `c` is not detached (its term ends where the clamp at 1e-8 holds).
    BitLinear,
    /// The same value with `c >= 1e-5` (spec/pr1607.md, the ternary variant), straight through `w / c`: the gradient is
    /// `g + sign(w) sum(g (t - w / c)) / n`. The variant's division of the activations by their largest magnitude is
    /// undone after the product, so it is no more than another rounding and is left out.
    ScaledTernary,
    /// Whole multiples, from `low` to `high`, of a step for each row: `max(max |row| / high, floor)`. The gradient is `g`.
    FakeInt {
        /// The least code.
        low: i32,
        /// The largest code.
        high: i32,
        /// The least step.
        floor: f64,
    },
}

impl WeightForm {
    /// The training-time int6 of PR #1607 (`bits` 6): codes from -31 to 31, steps of at least 1/31.
    pub fn fake_int_symmetric(bits: usize) -> Self {
        let high = (1 << (bits - 1)) - 1;
        Self::FakeInt { low: -high, high, floor: 1.0 / f64::from(high) }
    }

    /// The training-time int6 of PR #1382: codes from -32 to 31, steps of at least 1/31.
    pub fn fake_int6_asymmetric() -> Self {
        Self::FakeInt { low: -32, high: 31, floor: 1.0 / 31.0 }
    }
}

/// `max(mean |w|, floor)` as `[1, 1]`.
fn mean_magnitude<B: Backend>(w: &Tensor<B, 2>, floor: f64) -> Tensor<B, 2> {
    let [rows, columns] = w.dims();
    let sum = reduce::sum_all(magnitude(w.clone())).reshape([1, 1]);
    sum.mul_scalar(1.0 / (rows * columns) as f64).clamp_min(floor)
}

fn wide<B: Backend>(x: Tensor<B, 2>) -> (Tensor<B, 2>, DType) {
    let dtype = x.dtype();
    (x.cast(accumulate_type(dtype)), dtype)
}

fn floor_of(form: WeightForm) -> f64 {
    if form == WeightForm::BitLinear { 1e-8 } else { 1e-5 }
}

/// The weight that is used in `w`'s place.
pub fn apply<B: Backend>(w: Tensor<B, 2>, form: WeightForm) -> Tensor<B, 2> {
    let (w, dtype) = wide(w);
    let used = match form {
        WeightForm::Full => w,
        WeightForm::BitLinear | WeightForm::ScaledTernary => {
            let scale = mean_magnitude(&w, floor_of(form));
            ternary(w, scale.clone()) * scale
        }
        WeightForm::FakeInt { low, high, floor } => {
            let step = magnitude(w.clone()).max_dim(1).mul_scalar(1.0 / f64::from(high)).clamp_min(floor);
            (w / step.clone()).round().clamp(low, high) * step
        }
    };
    used.cast(dtype)
}

/// The codes -1, 0, 1 of `w` for a scale `[1, 1]`.
pub fn ternary<B: Backend>(w: Tensor<B, 2>, scale: Tensor<B, 2>) -> Tensor<B, 2> {
    (w / scale).round().clamp(-1, 1)
}

/// The gradient of `w` from that of what is used in its place.
pub fn gradient<B: Backend>(w: Tensor<B, 2>, grad: Tensor<B, 2>, form: WeightForm) -> Tensor<B, 2> {
    if matches!(form, WeightForm::Full | WeightForm::FakeInt { .. }) {
        return grad;
    }
    let (w, _) = wide(w);
    let (grad, dtype) = wide(grad);
    let [rows, columns] = w.dims();
    let floor = floor_of(form);
    let scale = mean_magnitude(&w, floor);
    let codes = ternary(w.clone(), scale.clone());
    // The mean's part is there only where the mean, and not the floor, is the scale.
    let is_mean = mean_magnitude(&w, 0.0).greater_elem(floor).float().cast(w.dtype());
    let (direct, by_scale) = match form {
        WeightForm::BitLinear => (grad.clone() * scale, grad * codes),
        _ => (grad.clone(), grad * (codes - w.clone() * reciprocal(scale))),
    };
    let sum = reduce::sum_all(by_scale).reshape([1, 1]).mul_scalar(1.0 / (rows * columns) as f64);
    (direct + w.sign() * (sum * is_mean)).cast(dtype)
}
