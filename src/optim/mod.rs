//! Optimizers, their groups and their schedules.

pub mod adam;
pub mod muon;
pub mod schedule;

use crate::model::{EMBEDDING, HEAD, Model};
use crate::ops::{Param, Plain, accumulate_type, reciprocal, reduce};
use crate::recipe::Recipe;
use adam::{Adam, AdamConfig};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use muon::{Muon, MuonConfig, NewtonSchulz};

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

/// What stands before a parameter's name in the names of its rows of state.
pub const STATE_PREFIXES: [&str; 3] = ["adam.m.", "adam.v.", "muon.momentum."];

/// The optimizers' state, by name, as rows with a step count each.
pub struct OptimizerState<P: Plain> {
    rows: Vec<(String, Tensor<P, 1>, u64)>,
}

impl<P: Plain> Default for OptimizerState<P> {
    fn default() -> Self {
        Self { rows: Vec::new() }
    }
}

impl<P: Plain> OptimizerState<P> {
    /// Adds a row.
    pub fn push(&mut self, name: String, row: Tensor<P, 1>, steps: u64) {
        self.rows.push((name, row, steps));
    }

    /// Every row: name, values, step count.
    pub fn rows(&self) -> &[(String, Tensor<P, 1>, u64)] {
        &self.rows
    }

    fn take(&mut self, name: &str) -> Option<(Tensor<P, 1>, u64)> {
        let index = self.rows.iter().position(|row| row.0 == name)?;
        let (_, row, steps) = self.rows.swap_remove(index);
        Some((row, steps))
    }
}

/// Which optimizer a parameter of the challenge's model belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Adam at the embedding's rate.
    Embedding,
    /// Adam at the head's rate.
    Head,
    /// Muon: the blocks' matrices.
    Matrix,
    /// Adam at the scalars' rate: vectors, and what the control patterns name.
    Scalar,
}

/// The group of a parameter by its name and rank (spec/challenge.md section 4).
pub fn group_of(recipe: &Recipe, name: &str, rank: usize) -> Group {
    let control = recipe.control_tensor_name_patterns.iter().any(|pattern| name.contains(pattern.as_str()));
    match name {
        EMBEDDING => Group::Embedding,
        HEAD => Group::Head,
        _ if rank == 2 && !control && name.starts_with("blocks.") => Group::Matrix,
        _ => Group::Scalar,
    }
}

/// All optimizers of a run.
pub struct Optimizers<P: Plain> {
    adams: Vec<Adam<P>>,
    muon: Muon<P>,
    clip: f64,
    params: Vec<Param<P>>,
}

impl<P: Plain> Optimizers<P> {
    /// The groups of the recipe over the model's parameters. As the challenge is written, Newton-Schulz is in bf16.
    pub fn new(recipe: &Recipe, model: &Model<P>) -> Self {
        let iteration = NewtonSchulz { bf16: recipe.as_written, ..NewtonSchulz::default() };
        Self::with_newton_schulz(recipe, model, iteration)
    }

    /// The same with another Newton-Schulz iteration, but for its number of steps, which is the recipe's.
    pub fn with_newton_schulz(recipe: &Recipe, model: &Model<P>, iteration: NewtonSchulz) -> Self {
        let config = AdamConfig {
            beta1: recipe.beta1,
            beta2: recipe.beta2,
            eps: recipe.adam_eps,
            weight_decay: 0.0,
            bf16: false,
        };
        let of = |group| {
            let in_group = |param: &&Param<P>| group_of(recipe, param.name(), param.shape().len()) == group;
            model.params().iter().filter(in_group).cloned().collect::<Vec<_>>()
        };
        let adams = vec![
            Adam::new(
                of(Group::Embedding),
                recipe.token_lr(),
                AdamConfig { bf16: recipe.as_written, ..config },
            ),
            Adam::new(of(Group::Head), recipe.head_lr, config),
            Adam::new(of(Group::Scalar), recipe.scalar_lr, config),
        ];
        let muon = MuonConfig {
            newton_schulz: NewtonSchulz { steps: recipe.muon_backend_steps, ..iteration },
            nesterov: true,
            weight_decay: 0.0,
            dtype: model.compute_type(),
        };
        Self {
            adams,
            muon: Muon::new(of(Group::Matrix), recipe.matrix_lr, muon),
            clip: recipe.grad_clip_norm,
            params: model.params().iter().cloned().collect(),
        }
    }

    /// One update of every parameter from its accumulated gradient, which is taken.
    pub fn step(&mut self, lr_mul: f64, muon_momentum: f64) {
        let scale = self.clip_scale();
        for adam in &mut self.adams {
            adam.step(lr_mul, scale.clone());
        }
        self.muon.step(lr_mul, muon_momentum, scale);
    }

    /// What the next step multiplies every gradient by: `min(1, clip / (norm + 1e-6))` over all of them, as torch clips.
    /// None where nothing clips.
    pub fn clip_scale(&self) -> Option<Tensor<P, 1>> {
        if self.clip <= 0.0 {
            return None;
        }
        let squares = self.params.iter().filter_map(|param| {
            let grad = param.flat_grad()?;
            let grad = grad.clone().cast(accumulate_type(grad.dtype()));
            Some(reduce::sum(grad.clone() * grad))
        });
        let squares: Vec<Tensor<P, 1>> = squares.collect();
        if squares.is_empty() {
            return None;
        }
        let norm = reduce::sum(Tensor::cat(squares, 0)).sqrt();
        Some(reciprocal(norm.add_scalar(1e-6)).mul_scalar(self.clip).clamp_max(1.0))
    }

    /// The whole state.
    pub fn state(&self) -> OptimizerState<P> {
        let mut state = OptimizerState::default();
        self.adams.iter().for_each(|adam| adam.state(&mut state));
        self.muon.state(&mut state);
        state
    }

    /// Sets the whole state; what is missing in it starts anew.
    pub fn restore(&mut self, mut state: OptimizerState<P>) {
        self.adams.iter_mut().for_each(|adam| adam.restore(&mut state));
        self.muon.restore(&mut state);
    }
}
