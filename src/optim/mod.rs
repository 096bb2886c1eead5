//! Optimizers, their groups and their schedules, and the step of a model in training.

pub mod adam;
pub mod averages;
pub mod muon;
pub mod schedule;
pub mod sgd;
pub mod step;

use crate::model::spec::Spec;
use crate::model::{AHEAD, EMBEDDING, HEAD, Model};
pub use crate::ops::update::round_bf16;
use crate::ops::{Param, Plain};
use crate::recipe::{PR1382, PR1607, PR1994, Recipe};
use adam::{Adam, AdamConfig};
use burn::tensor::Tensor;
use muon::{Muon, MuonConfig, MuonParam, NewtonSchulz};

/// What stands before a parameter's name in the names of its rows of state; averages have a number after theirs.
const STATE_PREFIXES: [&str; 4] = ["adam.m.", "adam.v.", "muon.momentum.", "muon.momentum2."];

/// The parameter of which a row of state of that name is, and the number of an average's row.
pub fn state_of(name: &str) -> Option<(&str, usize)> {
    if let Some(rest) = name.strip_prefix(averages::STATE_PREFIX) {
        let (number, param) = rest.split_once('.')?;
        return Some((param, number.parse().ok()?));
    }
    STATE_PREFIXES.iter().find_map(|prefix| Some((name.strip_prefix(prefix)?, 0)))
}

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

    /// Takes a row by its name.
    pub(super) fn take(&mut self, name: &str) -> Option<(Tensor<P, 1>, u64)> {
        let index = self.rows.iter().position(|row| row.0 == name)?;
        let (_, row, steps) = self.rows.swap_remove(index);
        Some((row, steps))
    }
}

/// Which optimizer a parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Adam at the token embedding's rate.
    Embedding,
    /// Adam at the head's rate.
    Head,
    /// Muon: the blocks' matrices.
    Matrix,
    /// Muon: PR #1382's Mamba matrices.
    MambaMatrix,
    /// Adam at the scalars' rate: vectors, and what the control patterns name.
    Scalar,
    /// None: never trained.
    Nothing,
}

/// The group of a parameter by its name and rank, as the source system deals them out (spec files, on optimisation).
pub fn group_of(recipe: &Recipe, name: &str, rank: usize) -> Group {
    let control = recipe.control_tensor_name_patterns.iter().any(|pattern| name.contains(pattern.as_str()));
    let matrix = rank == 2 && !control;
    match name {
        EMBEDDING => return Group::Embedding,
        HEAD => return Group::Head,
        _ => {}
    }
    match recipe.system.as_str() {
        PR1994 if rank == 2 && name.starts_with("bigram_hash.") => Group::Matrix,
        PR1607 if name == "ve_shared.embed.weight" => Group::Embedding,
        PR1607 if matches!(name, "bigram_hash.proj.weight" | "ve_shared.proj.weight") => Group::Matrix,
        // The source puts the extra MLPs in no optimizer.
        PR1607 if name.starts_with("recur_mlps.") => {
            if recipe.as_written {
                Group::Nothing
            } else {
                Group::Matrix
            }
        }
        PR1382 => match name {
            "bigram.embed.weight" | "ve_shared.embed.weight" => Group::Embedding,
            _ if rank == 2 && name.starts_with("mamba_blocks.") && !name.ends_with(".A_log") => {
                Group::MambaMatrix
            }
            _ if name.starts_with(AHEAD) => Group::Matrix,
            _ if rank == 2 && (name.contains(".attn.c_") || name.ends_with(".attn.proj.weight")) => {
                Group::Matrix
            }
            _ if rank == 2 && name.contains(".mlp.") => Group::Matrix,
            _ => Group::Scalar,
        },
        _ if matrix && name.starts_with("blocks.") => Group::Matrix,
        _ => Group::Scalar,
    }
}

/// What is rounded to bfloat16 in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounding {
    /// Newton-Schulz's intermediates.
    pub newton_schulz: bool,
    /// The parameters, gradients and optimizer state that the source system keeps so.
    pub storage: bool,
}

impl Rounding {
    /// Everything that the source system rounds, if the recipe does as it is written; nothing else.
    pub fn of(recipe: &Recipe) -> Self {
        Self { newton_schulz: recipe.as_written, storage: recipe.as_written }
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
    /// The groups of the recipe over the model's parameters.
    pub fn new(recipe: &Recipe, model: &Model<P>) -> Self {
        Self::with_rounding(recipe, model, Rounding::of(recipe))
    }

    /// The same with another rounding than the recipe's.
    pub fn with_rounding(recipe: &Recipe, model: &Model<P>, rounding: Rounding) -> Self {
        let plain =
            AdamConfig { beta1: recipe.beta1, beta2: recipe.beta2, eps: recipe.adam_eps, weight_decay: 0.0 };
        let decayed = AdamConfig { weight_decay: recipe.adam_decay(), ..plain };
        let specs = &model.plan().specs;
        let of = |groups: &'static [Group]| {
            let in_groups = |spec: &&Spec| groups.contains(&group_of(recipe, &spec.name, spec.shape.len()));
            let param =
                |spec: &Spec| Some((model.params().get(&spec.name)?.clone(), spec.bf16 && rounding.storage));
            specs.iter().filter(in_groups).filter_map(param).collect::<Vec<_>>()
        };
        let adams = vec![
            Adam::new(of(&[Group::Embedding]), recipe.token_lr(), decayed),
            Adam::new(of(&[Group::Head]), recipe.head_lr, plain),
            Adam::new(of(&[Group::Scalar]), recipe.scalar_lr, decayed),
        ];
        let pr1382 = recipe.system == PR1382;
        let matrix = |(param, bf16): (Param<P>, bool)| {
            let own = match group_of(recipe, param.name(), 2) {
                Group::MambaMatrix => recipe.mamba_matrix_lr,
                _ => recipe.matrix_lr,
            };
            MuonParam {
                // The source's loop over its two groups runs over all matrices each time.
                lrs: if pr1382 && recipe.as_written {
                    vec![recipe.matrix_lr, recipe.mamba_matrix_lr]
                } else {
                    vec![own]
                },
                bf16,
                // PR #1382's Muon takes gradients and momentum to bfloat16, as it does what it orthogonalises.
                bf16_state: bf16 || (pr1382 && rounding.newton_schulz),
                whole: model.params().bank_of(param.name()).is_some(),
                param,
            }
        };
        let config = MuonConfig {
            newton_schulz: NewtonSchulz {
                steps: recipe.muon_backend_steps,
                bf16: rounding.newton_schulz,
                ..NewtonSchulz::default()
            },
            nesterov: true,
            weight_decay: recipe.muon_decay(),
            dtype: model.compute_type(),
            shards: if pr1382 && recipe.as_written { recipe.muon_shards } else { 1 },
        };
        let matrices = of(&[Group::Matrix, Group::MambaMatrix]).into_iter().map(matrix).collect();
        Self {
            adams,
            muon: Muon::new(matrices, config),
            clip: recipe.grad_clip_norm,
            params: model.params().iter().cloned().collect(),
        }
    }

    /// One update of every parameter from its accumulated gradient, which is taken.
    pub fn step(&mut self, lr_mul: f64, muon_momentum: f64) {
        let scale = self.clip_scale();
        Adam::step_all(&mut self.adams, lr_mul, scale.clone());
        self.muon.step(lr_mul, muon_momentum, scale);
        // Of parameters that are in no group.
        self.params.iter().for_each(Param::clear_grad);
    }

    /// What the next step multiplies every gradient by: `min(1, clip / (norm + 1e-6))` over all of them, as torch clips.
    /// None where nothing clips.
    pub fn clip_scale(&self) -> Option<Tensor<P, 1>> {
        if self.clip <= 0.0 {
            return None;
        }
        let grads: Vec<Tensor<P, 1>> = self.params.iter().filter_map(Param::flat_grad).collect();
        (!grads.is_empty()).then(|| P::clip_factor(grads, self.clip))
    }

    /// The whole state.
    pub fn state(&self) -> OptimizerState<P> {
        let mut state = OptimizerState::default();
        self.adams.iter().for_each(|adam| adam.state(&mut state));
        self.muon.state(&mut state);
        state
    }

    /// Memory of the size of the state that does not exist yet: held through the first forward and backward, it lets a
    /// device's pools grow at once to what all later steps need.
    pub fn reserve(&self) -> Vec<Tensor<P, 1>> {
        let mut places = Vec::new();
        self.adams.iter().for_each(|adam| adam.reserve(&mut places));
        self.muon.reserve(&mut places);
        places
    }

    /// Sets the whole state; what is missing in it starts anew.
    pub fn restore(&mut self, state: &mut OptimizerState<P>) {
        self.adams.iter_mut().for_each(|adam| adam.restore(state));
        self.muon.restore(state);
    }
}
