//! Rotary position embedding, half-split pairing (spec/challenge.md section 4).
//!
//! Of each head's `d` channels the first `r` are rotated: with `h = r/2`, for `i < h` the pair `(a, b) = (x[i], x[i+h])`
//! becomes `(a cos + b sin, -a sin + b cos)` at the angle `position * base^(-2i/r)`; channels from `r` on pass.
//! Layout `[batch, time, heads, d]`; tables `[time, r/2]`.

use super::tape::unary;
use super::{Autodiff, Base, Plain};
use burn::tensor::{DType, Tensor, TensorData};

/// Cosines and sines of the rotation angles for a range of positions.
#[derive(Debug, Clone)]
pub struct RopeTable<B: Plain> {
    /// `[positions, r/2]`
    pub cos: Tensor<B, 2>,
    /// `[positions, r/2]`
    pub sin: Tensor<B, 2>,
}

impl<B: Plain> RopeTable<B> {
    /// The table for positions `start..start + len`, `rotated` channels (even) and the given base.
    pub fn new(
        start: usize,
        len: usize,
        rotated: usize,
        base: f64,
        device: &B::Device,
        dtype: DType,
    ) -> Self {
        let half = rotated / 2;
        let angles: Vec<f64> = (start..start + len)
            .flat_map(|position| {
                (0..half).map(move |i| position as f64 * base.powf(-2.0 * i as f64 / rotated as f64))
            })
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values = angles.iter().map(|angle| f(*angle)).collect();
            host_tensor::<B>(values, [len, half], device, dtype)
        };
        Self { cos: table(f64::cos), sin: table(f64::sin) }
    }

    /// The table's rows `start..start + len`.
    pub fn range(&self, start: usize, len: usize) -> Self {
        Self { cos: self.cos.clone().narrow(0, start, len), sin: self.sin.clone().narrow(0, start, len) }
    }

    /// The cosines and sines in the type `dtype`.
    fn cast(&self, dtype: DType) -> [Tensor<B, 2>; 2] {
        let cast = |x: &Tensor<B, 2>| if x.dtype() == dtype { x.clone() } else { x.clone().cast(dtype) };
        [cast(&self.cos), cast(&self.sin)]
    }

    /// Channels that rotate.
    pub fn rotated(&self) -> usize {
        2 * self.cos.dims()[1]
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.cos.dims()[0]
    }

    /// Whether there are no positions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn host_tensor<B: Plain>(
    values: Vec<f64>,
    shape: [usize; 2],
    device: &B::Device,
    dtype: DType,
) -> Tensor<B, 2> {
    if dtype == DType::F64 {
        return Tensor::from_data(TensorData::new(values, shape), (device, DType::F64));
    }
    let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
    let table: Tensor<B, 2> = Tensor::from_data(TensorData::new(values, shape), (device, DType::F32));
    table.cast(dtype)
}

/// Rotary position embedding, forward and backward.
pub trait RopeOps: Base {
    /// Rotates `x[b, t, h, d]` by the table of its `t` positions.
    fn rope(x: Tensor<Self, 4>, table: &RopeTable<Self::Plain>) -> Tensor<Self, 4> {
        let [cos, sin] = table.cast(x.dtype());
        rotate(x, Self::lift(cos), Self::lift(sin))
    }

    /// The gradient of `x`: the rotation the other way.
    fn rope_backward(grad: Tensor<Self, 4>, table: &RopeTable<Self::Plain>) -> Tensor<Self, 4> {
        let [cos, sin] = table.cast(grad.dtype());
        rotate(grad, Self::lift(cos), Self::lift(sin).neg())
    }
}

impl<B: Plain> RopeOps for Autodiff<B> {
    fn rope(x: Tensor<Self, 4>, table: &RopeTable<B>) -> Tensor<Self, 4> {
        let kept = table.clone();
        unary(x, |x| B::rope(x, table), move |_, grad| B::rope_backward(grad, &kept))
    }
}

/// The reference: rotates pairs of `x[b, t, h, d]` by `cos[t, r/2]`, `sin[t, r/2]`.
pub fn rotate<B: burn::tensor::backend::Backend>(
    x: Tensor<B, 4>,
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
) -> Tensor<B, 4> {
    let size = x.dims()[3];
    let [time, half] = cos.dims();
    let (cos, sin) = (cos.reshape([1, time, 1, half]), sin.reshape([1, time, 1, half]));
    let a = x.clone().narrow(3, 0, half);
    let b = x.clone().narrow(3, half, half);
    let mut parts = vec![a.clone() * cos.clone() + b.clone() * sin.clone(), b * cos - a * sin];
    if 2 * half < size {
        parts.push(x.narrow(3, 2 * half, size - 2 * half));
    }
    Tensor::cat(parts, 3)
}
