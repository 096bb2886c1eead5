//! What optimizers do with every element of many tensors: Adam, momentum, the step along an orthogonal update, the
//! gradient's norm, averages.
//!
//! Each op takes a list, so that a device can take all of it in few launches. A state that
//! nobody else holds may be overwritten by the new one; nothing else is.

use super::{Autodiff, MatmulOps, Plain, accumulate_type, reciprocal, reduce};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

/// Rounds to bf16's 8 significant bits, ties to even, in the tensor's own type: f32, f64, or bf16 itself.
///
/// In plain arithmetic, so that devices without a bf16 type do exactly the same. The largest power of two `u` in `x` is
/// `q - (1 - 2^-p) q` with `q = (2^(p-1) + 1) x` for `p` significant bits (Rump, Ogita, Oishi: Accurate floating-point
/// summation, 2008); adding and taking away `1.5 u 2^(p-8)` then leaves `x` on multiples of `u/128`. Veltkamp's split is
/// shorter but breaks some ties the other way. For magnitudes from 2^-126 to 2^104; larger ones end as NaN.
pub fn round_bf16<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let bits = match x.dtype() {
        DType::F64 => 53,
        DType::F32 => 24,
        _ => return x,
    };
    let q = x.clone().mul_scalar(2f64.powi(bits - 1) + 1.0);
    let unit = q.clone() - q.mul_scalar(1.0 - 2f64.powi(-bits));
    let shift = unit.mul_scalar(1.5 * 2f64.powi(bits - 8));
    (x + shift.clone()) - shift
}

fn kept<B: Backend, const D: usize>(x: Tensor<B, D>, bf16: bool) -> Tensor<B, D> {
    if bf16 { round_bf16(x) } else { x }
}

/// A parameter's new value.
#[derive(Debug, Clone)]
pub struct Updated<B: Backend, const D: usize> {
    /// The master value.
    pub value: Tensor<B, D>,
    /// Its cast to the type that was asked for, where the op has made it beside the value.
    pub copy: Option<Tensor<B, D>>,
}

/// Adam's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay (AdamW); 0 for plain Adam.
    pub weight_decay: f64,
}

impl AdamConfig {
    /// `lr / (1 - b1^t)` and `1 - b2^t`.
    pub fn corrections(&self, lr: f64, steps: u64) -> [f64; 2] {
        let steps = steps as i32;
        [lr / (1.0 - self.beta1.powi(steps)), 1.0 - self.beta2.powi(steps)]
    }
}

/// One tensor of an Adam step.
#[derive(Debug, Clone)]
pub struct AdamInput<B: Backend> {
    /// The value.
    pub value: Tensor<B, 1>,
    /// Its gradient.
    pub grad: Tensor<B, 1>,
    /// Both moments; zeros if absent.
    pub moments: Option<[Tensor<B, 1>; 2]>,
    /// The constants.
    pub config: AdamConfig,
    /// The learning rate.
    pub lr: f64,
    /// This step's number, from 1.
    pub steps: u64,
    /// Rounds the moments and the value to bf16.
    pub bf16: bool,
    /// The type of a copy of the new value, if one is wanted.
    pub copy: Option<DType>,
}

/// What an Adam step makes of a tensor.
#[derive(Debug, Clone)]
pub struct AdamOutput<B: Backend> {
    /// The new value.
    pub updated: Updated<B, 1>,
    /// The new moments.
    pub moments: [Tensor<B, 1>; 2],
}

/// One matrix of a momentum step.
#[derive(Debug, Clone)]
pub struct MomentumInput<B: Backend> {
    /// The gradient.
    pub grad: Tensor<B, 2>,
    /// The momentum so far; zeros if absent.
    pub buffer: Option<Tensor<B, 2>>,
    /// Rounds gradient, momentum and update to bf16.
    pub bf16: bool,
}

/// How momenta become updates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MomentumConfig {
    /// What is kept of the momentum.
    pub momentum: f64,
    /// Looks ahead by the new momentum; else the momentum is the update.
    pub nesterov: bool,
    /// The updates' type.
    pub dtype: DType,
}

/// One matrix of a step along an orthogonal update.
#[derive(Debug, Clone)]
pub struct OrthogonalInput<B: Backend> {
    /// The value.
    pub value: Tensor<B, 2>,
    /// The learning rate.
    pub lr: f64,
    /// Decoupled weight decay; 0 for none.
    pub weight_decay: f64,
    /// Rounds the value to bf16.
    pub bf16: bool,
    /// The type of a copy of the new value, if one is wanted.
    pub copy: Option<DType>,
}

impl<B: Backend> OrthogonalInput<B> {
    /// `sqrt(max(1, rows / columns))`, the factor of the update.
    pub fn ratio([rows, columns]: [usize; 2]) -> f64 {
        (rows as f64 / columns as f64).max(1.0).sqrt()
    }
}

/// The optimizers' steps over many tensors. Gradients are multiplied by `scale[1]` first, where there is one.
pub trait UpdateOps: MatmulOps {
    /// Adam with torch's semantics (spec/challenge.md section 7):
    ///
    /// `m = b1 m + (1-b1) g`, `v = b2 v + (1-b2) g^2`,
    /// `w = (1 - lr wd) w - lr (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)`.
    fn adam_step(inputs: Vec<AdamInput<Self>>, scale: Option<Tensor<Self, 1>>) -> Vec<AdamOutput<Self>> {
        adam_step(inputs, scale)
    }

    /// `buffer = mu buffer + g` of matrices of one shape, and the updates `g + mu buffer` (or `buffer`) as
    /// `[n, rows, columns]`.
    fn momentum_step(
        inputs: Vec<MomentumInput<Self>>,
        config: MomentumConfig,
        scale: Option<Tensor<Self, 1>>,
    ) -> (Vec<Tensor<Self, 2>>, Tensor<Self, 3>) {
        momentum_step(inputs, config, scale)
    }

    /// `w = (1 - lr wd) w - lr (sqrt(max(1, rows/columns)) u)` with `u[i]` of `[n, rows, columns]` for the i-th matrix;
    /// `bf16` rounds what is in the outer parentheses to bf16.
    fn orthogonal_step(
        inputs: Vec<OrthogonalInput<Self>>,
        updates: Tensor<Self, 3>,
        bf16: bool,
    ) -> Vec<Updated<Self, 2>> {
        orthogonal_step(inputs, updates, bf16)
    }

    /// What clips the gradients to the norm `clip`: `min(1, clip / (norm + 1e-6))` over all of them, as torch clips.
    fn clip_factor(grads: Vec<Tensor<Self, 1>>, clip: f64) -> Tensor<Self, 1> {
        clip_factor(grads, clip)
    }

    /// `p a + q b` of each pair.
    fn blend(pairs: Vec<[Tensor<Self, 1>; 2]>, weights: [f64; 2]) -> Vec<Tensor<Self, 1>> {
        blend(pairs, weights)
    }
}

impl<B: Plain> UpdateOps for Autodiff<B> {}

fn scaled<B: Backend, const D: usize>(grad: Tensor<B, D>, scale: &Option<Tensor<B, 1>>) -> Tensor<B, D> {
    match scale {
        Some(scale) => grad * scale.clone().reshape([1; D]),
        None => grad,
    }
}

/// The reference of [`UpdateOps::adam_step`].
pub fn adam_step<B: Backend>(inputs: Vec<AdamInput<B>>, scale: Option<Tensor<B, 1>>) -> Vec<AdamOutput<B>> {
    let step = |input: AdamInput<B>| {
        let AdamConfig { beta1, beta2, eps, weight_decay } = input.config;
        let keep = |x: Tensor<B, 1>| kept(x, input.bf16);
        let grad = scaled(input.grad, &scale);
        let square = grad.clone() * grad.clone();
        let [m, v] = match input.moments {
            Some([m, v]) => [
                m.mul_scalar(beta1) + grad.mul_scalar(1.0 - beta1),
                v.mul_scalar(beta2) + square.mul_scalar(1.0 - beta2),
            ],
            None => [grad.mul_scalar(1.0 - beta1), square.mul_scalar(1.0 - beta2)],
        };
        let [m, v] = [keep(m), keep(v)];
        let [size, second] = input.config.corrections(input.lr, input.steps);
        let root = v.clone().div_scalar(second).sqrt().add_scalar(eps);
        let mut value = input.value;
        if weight_decay != 0.0 {
            value = value.mul_scalar(1.0 - input.lr * weight_decay);
        }
        let value = keep(value - m.clone().mul_scalar(size) / root);
        AdamOutput { updated: Updated { value, copy: None }, moments: [m, v] }
    };
    inputs.into_iter().map(step).collect()
}

/// The reference of [`UpdateOps::momentum_step`].
pub fn momentum_step<B: Backend>(
    inputs: Vec<MomentumInput<B>>,
    config: MomentumConfig,
    scale: Option<Tensor<B, 1>>,
) -> (Vec<Tensor<B, 2>>, Tensor<B, 3>) {
    let MomentumConfig { momentum, nesterov, dtype } = config;
    let step = |MomentumInput { grad, buffer, bf16 }: MomentumInput<B>| {
        let grad = kept(scaled(grad, &scale), bf16);
        let buffer = match buffer {
            Some(buffer) => buffer.mul_scalar(momentum) + grad.clone(),
            None => grad.clone(),
        };
        let buffer = kept(buffer, bf16);
        let update = match nesterov {
            true => kept(grad + buffer.clone().mul_scalar(momentum), bf16),
            false => buffer.clone(),
        };
        (buffer, update)
    };
    let (buffers, updates): (Vec<_>, Vec<_>) = inputs.into_iter().map(step).unzip();
    (buffers, Tensor::stack::<3>(updates, 0).cast(dtype))
}

/// The reference of [`UpdateOps::orthogonal_step`].
pub fn orthogonal_step<B: Backend>(
    inputs: Vec<OrthogonalInput<B>>,
    updates: Tensor<B, 3>,
    bf16: bool,
) -> Vec<Updated<B, 2>> {
    let [_, rows, columns] = updates.dims();
    let ratio = OrthogonalInput::<B>::ratio([rows, columns]);
    let step = |(index, input): (usize, OrthogonalInput<B>)| {
        let mut value = input.value;
        let update = updates.clone().narrow(0, index, 1).reshape([rows, columns]).cast(value.dtype());
        let update = kept(update.mul_scalar(ratio), bf16);
        if input.weight_decay != 0.0 {
            value = value.mul_scalar(1.0 - input.lr * input.weight_decay);
        }
        Updated { value: kept(value - update.mul_scalar(input.lr), input.bf16), copy: None }
    };
    inputs.into_iter().enumerate().map(step).collect()
}

/// The reference of [`UpdateOps::clip_factor`].
pub fn clip_factor<B: Backend>(grads: Vec<Tensor<B, 1>>, clip: f64) -> Tensor<B, 1> {
    let square = |grad: Tensor<B, 1>| {
        let dtype = accumulate_type(grad.dtype());
        let grad = grad.cast(dtype);
        reduce::sum(grad.clone() * grad)
    };
    let squares = grads.into_iter().map(square).collect();
    let norm = reduce::sum(Tensor::cat(squares, 0)).sqrt();
    reciprocal(norm.add_scalar(1e-6)).mul_scalar(clip).clamp_max(1.0)
}

/// The reference of [`UpdateOps::blend`].
pub fn blend<B: Backend>(pairs: Vec<[Tensor<B, 1>; 2]>, weights: [f64; 2]) -> Vec<Tensor<B, 1>> {
    let [p, q] = weights;
    pairs.into_iter().map(|[a, b]| a.mul_scalar(p) + b.mul_scalar(q)).collect()
}
