//! A model as data: what its parts are called, how large they are, and in which order they run.

use super::block::{BlockPlan, MixerPlan};
use super::embed::EmbedPlan;
use super::init::Init;
use super::mlp::MlpPlan;
use super::spec::Spec;
use super::systems;
use super::{HEAD, SKIPS};
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use std::ops::Range;

/// The most parameters a recipe may describe: far over what fits the challenge, far under what a host can hold.
const MOST_PARAMS: u64 = 1_000_000_000;

/// The most visits of blocks in one pass.
const MOST_VISITS: usize = 1 << 16;

/// A skip connection into a visit: `x += weights[row] * output of visit from`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Skip {
    /// The visit whose output is added.
    pub from: usize,
    /// The row of the skip weights.
    pub row: usize,
}

/// One run of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visit {
    /// Which block.
    pub block: usize,
    /// What is added to the stream before it.
    pub skip: Option<Skip>,
    /// The MLP of [`Plan::extra_mlps`] in the place of the block's own; without the value embedding then.
    pub mlp: Option<usize>,
    /// Whether this visit's values are the ones that later attention adds to its own.
    pub gives_values: bool,
}

impl Visit {
    /// A run of a block with nothing else.
    pub fn of(block: usize) -> Self {
        Self { block, skip: None, mlp: None, gives_values: false }
    }
}

/// The rotation of attention's queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopePlan {
    /// Rotated channels of a head.
    pub rotated: usize,
    /// The base of the frequencies.
    pub base: f64,
    /// Sequences longer than this grow the base (NTK), if any do.
    pub grows_from: Option<usize>,
}

impl RopePlan {
    /// The base for a sequence of `len` tokens: `base (len / grows_from)^(r / (r - 2))` beyond that length.
    pub fn base_for(&self, len: usize) -> f64 {
        match self.grows_from {
            Some(from) if len > from && self.rotated > 2 => {
                let rotated = self.rotated as f64;
                self.base * (len as f64 / from as f64).powf(rotated / (rotated - 2.0))
            }
            _ => self.base,
        }
    }
}

/// Heads that predict tokens further ahead, in training only.
#[derive(Debug, Clone, PartialEq)]
pub struct AheadPlan {
    /// The heads' names; head `k` predicts `k + 2` tokens ahead.
    pub heads: Vec<String>,
    /// The weight of their mean loss.
    pub weight: f64,
}

/// Matrices of one shape that the source system keeps in one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Bank {
    /// The tensor's name.
    pub name: String,
    /// The matrices, in order, by their own names.
    pub members: Vec<String>,
}

/// The rows of a matrix that stay float16 where quantisation codes the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProtectedRows {
    /// The matrix's name.
    pub name: String,
    /// Rows of the whole matrix.
    pub rows: usize,
    /// The protected ones: ranges in ascending order, apart from each other.
    pub ranges: Vec<Range<usize>>,
}

/// A whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What is before the blocks.
    pub embed: EmbedPlan,
    /// The blocks.
    pub blocks: Vec<BlockPlan>,
    /// MLPs that take the place of blocks' own in some visits.
    pub extra_mlps: Vec<MlpPlan>,
    /// The visits of one pass.
    pub visits: Vec<Visit>,
    /// The visits once the recurrence is on, where there is one.
    pub recurrent_visits: Option<Vec<Visit>>,
    /// The rotation of attention.
    pub rope: RopePlan,
    /// Logits are capped at this.
    pub softcap: f64,
    /// Whether the output head is a tensor of its own.
    pub untied: bool,
    /// Heads that predict further ahead.
    pub ahead: Option<AheadPlan>,
    /// The epsilon of the norms.
    pub rms_eps: f64,
    /// Every parameter, matrices of banks one by one.
    pub specs: Vec<Spec>,
    /// Which matrices are one tensor for the peers.
    pub banks: Vec<Bank>,
    /// Which rows quantisation leaves in float16, if the recipe asks for it.
    pub protected: Vec<ProtectedRows>,
}

impl Plan {
    /// The model that a recipe describes, which must be a valid one ([`Recipe::validate`]).
    ///
    /// Errors (input): more parameters or visits than any use has.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        recipe.validate()?;
        let plan = systems::plan(recipe);
        let refuse = |what: String, most: u64| {
            Err(Error::input(what, format!("recipe {}", recipe.name), format!("at most {most}")))
        };
        if plan.param_count() > MOST_PARAMS {
            return refuse(format!("{} parameters by its sizes", plan.param_count()), MOST_PARAMS);
        }
        let visits = plan.recurrent_visits.as_ref().unwrap_or(&plan.visits).len().max(plan.visits.len());
        if visits > MOST_VISITS {
            return refuse(format!("{visits} visits of blocks"), MOST_VISITS as u64);
        }
        Ok(plan)
    }

    /// Number of elements of all parameters; saturates on absurd sizes.
    pub fn param_count(&self) -> u64 {
        self.specs.iter().map(Spec::numel).fold(0, u64::saturating_add)
    }

    /// The parameters as the peers have them: banks as one tensor each, where their first matrix stands.
    pub fn layout(&self) -> Vec<(String, Vec<usize>)> {
        let bank_of = |name: &str| self.banks.iter().find(|bank| bank.members.iter().any(|m| m == name));
        let mut layout: Vec<(String, Vec<usize>)> = Vec::new();
        for spec in &self.specs {
            match bank_of(&spec.name) {
                None => layout.push((spec.name.clone(), spec.shape.clone())),
                Some(bank) if layout.iter().any(|(name, _)| *name == bank.name) => {}
                Some(bank) => {
                    layout.push((bank.name.clone(), [&[bank.members.len()], spec.shape.as_slice()].concat()));
                }
            }
        }
        layout
    }

    /// Whether a layer has a state beside attention's keys and values.
    pub fn has_state(&self) -> bool {
        let mut mixers = self.blocks.iter().flat_map(|block| &block.mixers);
        mixers.any(|mixer| !matches!(mixer.part, MixerPlan::Attention(_)))
    }

    /// The visits of a pass, with or without the recurrence.
    pub fn schedule(&self, recurrent: bool) -> &[Visit] {
        match &self.recurrent_visits {
            Some(visits) if recurrent => visits,
            _ => &self.visits,
        }
    }
}

/// A U-Net over `blocks` in order: each visit of the second half takes the output of its mirror image in the first.
pub fn unet(blocks: usize) -> Vec<Visit> {
    let half = blocks / 2;
    let visit = |index: usize| {
        let row = index.checked_sub(half).filter(|row| *row < half);
        Visit { skip: row.map(|row| Skip { from: half - 1 - row, row }), ..Visit::of(index) }
    };
    (0..blocks).map(visit).collect()
}

/// The skip weights of so many rows, in the sizes before `[rows, c]` that the system has.
pub fn skip_spec(outer: &[usize], rows: usize, dim: usize) -> Option<Spec> {
    let shape = [outer, &[rows, dim]].concat();
    (rows > 0).then(|| Spec::new(SKIPS, &shape, Init::Constant(1.0)))
}

/// The untied head.
pub fn head_spec(vocab: usize, dim: usize) -> Spec {
    Spec { casted: true, ..Spec::new(HEAD, &[vocab, dim], Init::Constant(0.0)) }
}
