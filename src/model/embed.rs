//! From token ids to the residual stream: the token embedding, hashed pairs and triples, the smear gate, the norm; and
//! the value embedding.

use super::EMBEDDING;
use super::init::Init;
use super::params::Params;
use super::spec::{Linears, Spec};
use crate::ops::hash::{self, Hash};
use crate::ops::{Backend, Param, Plain};
use burn::tensor::{Int, Tensor};

/// The table of hashed tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct HashPlan {
    /// What stands before the parameters' names.
    pub prefix: &'static str,
    /// The table's name after the prefix.
    pub table: &'static str,
    /// Which hash.
    pub hash: Hash,
    /// Adds the hash of three tokens to that of two.
    pub triples: bool,
    /// Rows of the table.
    pub buckets: usize,
    /// Width of the table.
    pub width: usize,
    /// Whether a scale multiplies the result.
    pub scaled: bool,
}

/// The mix of each position's embedding with the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SmearPlan {
    /// Before the norm: `g x + (1 - g) previous`, the gate at 3 (spec/pr1607.md).
    BeforeNorm,
    /// After the norm: `(1 - g) x + g previous`, the gate at 0 (spec/pr1382.md).
    AfterNorm,
}

impl SmearPlan {
    fn name(self) -> &'static str {
        match self {
            Self::BeforeNorm => "smeargate.gate",
            Self::AfterNorm => "smear.gate",
        }
    }
}

/// What is added to the values of some attention layers.
#[derive(Debug, Clone, PartialEq)]
pub struct ValueEmbeddingPlan {
    /// Width of the table.
    pub width: usize,
    /// Width of the values.
    pub values: usize,
    /// Layers that have a scale for it.
    pub layers: usize,
}

/// What is before the blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbedPlan {
    /// Token ids.
    pub vocab: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Standard deviation of the initial embedding.
    pub std: f32,
    /// The table of hashed tokens.
    pub hash: Option<HashPlan>,
    /// The smear gate.
    pub smear: Option<SmearPlan>,
    /// The value embedding.
    pub values: Option<ValueEmbeddingPlan>,
    /// The epsilon of the norm.
    pub rms_eps: f64,
}

impl EmbedPlan {
    /// The token embedding.
    pub fn token_spec(&self) -> Spec {
        Spec::new(EMBEDDING, &[self.vocab, self.dim], Init::Normal(self.std)).in_bf16()
    }

    /// The hashed table's parameters; without a projection where the table has the stream's width.
    pub fn hash_specs(&self, linears: Linears, table: Init, proj: Init) -> Vec<Spec> {
        let Some(plan) = &self.hash else { return Vec::new() };
        let prefix = plan.prefix;
        let table_name = format!("{prefix}.{}.weight", plan.table);
        let mut specs = vec![Spec::new(table_name, &[plan.buckets, plan.width], table).in_bf16()];
        if plan.has_projection(self.dim) {
            specs.push(linears.weight_from(&format!("{prefix}.proj"), [self.dim, plan.width], proj));
        }
        if plan.scaled {
            specs.push(Spec::new(format!("{prefix}.scale"), &[], Init::Constant(0.05)));
        }
        specs
    }

    /// The smear gate's parameter.
    pub fn smear_specs(&self) -> Vec<Spec> {
        let start = |smear| if smear == SmearPlan::BeforeNorm { 3.0 } else { 0.0 };
        let spec = |smear: SmearPlan| Spec::new(smear.name(), &[self.dim], Init::Constant(start(smear)));
        self.smear.map(spec).into_iter().collect()
    }

    /// The value embedding's parameters; without a projection where the table has the values' width.
    pub fn value_specs(&self, linears: Linears, proj: Init) -> Vec<Spec> {
        let Some(plan) = &self.values else { return Vec::new() };
        let table = Spec::new("ve_shared.embed.weight", &[self.vocab, plan.width], Init::Normal(0.01));
        let mut specs = vec![table.in_bf16()];
        if plan.width != plan.values {
            specs.push(linears.weight_from("ve_shared.proj", [plan.values, plan.width], proj));
        }
        specs.push(Spec::new("ve_shared.scale", &[], Init::Constant(0.1)));
        let scale = |layer| Spec::new(format!("ve_layer_scales.{layer}"), &[1], Init::Constant(1.0));
        specs.extend((0..plan.layers).map(scale));
        specs
    }
}

impl HashPlan {
    /// Whether the table is projected to the stream's width `dim`.
    pub fn has_projection(&self, dim: usize) -> bool {
        // PR #1607 always projects.
        self.hash == Hash::Product || self.width != dim
    }
}

/// What the embedding carries from one call to the next: the last tokens, and the last row before the smear gate.
#[derive(Debug, Clone)]
pub struct EmbedState<B: Backend> {
    ids: Option<Tensor<B, 2, Int>>,
    row: Option<Tensor<B, 3>>,
}

impl<B: Backend> Default for EmbedState<B> {
    fn default() -> Self {
        Self { ids: None, row: None }
    }
}

#[derive(Debug, Clone)]
struct HashTable<P: Plain> {
    plan: HashPlan,
    table: Param<P>,
    proj: Option<Param<P>>,
    scale: Option<Param<P>>,
}

#[derive(Debug, Clone)]
struct ValueEmbedding<P: Plain> {
    table: Param<P>,
    proj: Option<Param<P>>,
    scale: Param<P>,
    layer_scales: Vec<Param<P>>,
}

/// What is before the blocks, on a device.
#[derive(Debug)]
pub struct Embed<P: Plain> {
    tokens: Param<P>,
    hash: Option<HashTable<P>>,
    smear: Option<(SmearPlan, Param<P>)>,
    values: Option<ValueEmbedding<P>>,
    rms_eps: f64,
}

impl<P: Plain> Embed<P> {
    /// The embedding of a plan with the parameters of its names.
    pub fn new(plan: &EmbedPlan, params: &Params<P>) -> Self {
        let values = |values: &ValueEmbeddingPlan| ValueEmbedding {
            table: params.named("ve_shared.embed.weight"),
            proj: (values.width != values.values).then(|| params.named("ve_shared.proj.weight")),
            scale: params.named("ve_shared.scale"),
            layer_scales: (0..values.layers).map(|i| params.named(&format!("ve_layer_scales.{i}"))).collect(),
        };
        Self {
            tokens: params.named(EMBEDDING),
            hash: plan.hash.as_ref().map(|hash| HashTable::new(hash, plan.dim, params)),
            smear: plan.smear.map(|smear| (smear, params.named(smear.name()))),
            values: plan.values.as_ref().map(values),
            rms_eps: plan.rms_eps,
        }
    }

    /// What a plan's hashed table adds to the stream for `ids[b, t]`, with the parameters of its names: `[b t, c]`.
    ///
    /// Panics without a hashed table in the plan.
    pub fn hashed<B: Backend<Plain = P>>(
        plan: &EmbedPlan,
        params: &Params<P>,
        ids: Tensor<B, 2, Int>,
    ) -> Tensor<B, 2> {
        let hash = plan.hash.as_ref().expect("a plan with a hashed table");
        HashTable::new(hash, plan.dim, params).forward(ids, None, 0)
    }

    /// The token embedding.
    pub fn tokens(&self) -> &Param<P> {
        &self.tokens
    }

    /// The residual stream's start `[b t, c]` for `ids[b, t]`, of which `start` positions came before.
    pub fn forward<B: Backend<Plain = P>>(
        &self,
        ids: Tensor<B, 2, Int>,
        start: usize,
        mut state: Option<&mut EmbedState<B>>,
    ) -> Tensor<B, 2> {
        let [batch, time] = ids.dims();
        let mut x = B::embed(ids.clone().reshape([batch * time]), &self.tokens);
        if let Some(table) = &self.hash {
            let before = state.as_ref().and_then(|state| state.ids.clone());
            x = x + table.forward(ids.clone(), before, start);
        }
        if let Some((SmearPlan::BeforeNorm, gate)) = &self.smear {
            x = smear(x, gate, batch, true, state.as_mut().map(|state| &mut state.row));
        }
        let mut x = B::rms_norm(x, self.rms_eps);
        if let Some((SmearPlan::AfterNorm, gate)) = &self.smear {
            x = smear(x, gate, batch, false, state.as_mut().map(|state| &mut state.row));
        }
        if let Some(state) = state {
            let all = match state.ids.take() {
                Some(before) => Tensor::cat(vec![before, ids], 1),
                None => ids,
            };
            let (seen, kept) = (all.dims()[1], all.dims()[1].min(hash::REACH));
            state.ids = Some(all.narrow(1, seen - kept, kept));
        }
        x
    }

    /// What is added to the values of attention, before a layer's scale: `[b t, g d]` for `ids[b, t]`.
    pub fn values<B: Backend<Plain = P>>(&self, ids: Tensor<B, 2, Int>) -> Option<Tensor<B, 2>> {
        let values = self.values.as_ref()?;
        let rows = ids.dims().iter().product::<usize>();
        let mut x = B::embed(ids.reshape([rows]), &values.table);
        if let Some(proj) = &values.proj {
            x = B::project(x, proj);
        }
        Some(x * B::weight(&values.scale, [1, 1]))
    }

    /// The same with the scale of a layer of the value embedding.
    pub fn scaled_values<B: Backend<Plain = P>>(&self, values: Tensor<B, 2>, layer: usize) -> Tensor<B, 2> {
        match self.values.as_ref().and_then(|values| values.layer_scales.get(layer)) {
            Some(scale) => values * B::weight(scale, [1, 1]),
            None => values,
        }
    }
}

impl<P: Plain> HashTable<P> {
    fn new(plan: &HashPlan, dim: usize, params: &Params<P>) -> Self {
        let named = |name: &str| params.named(&format!("{}.{name}", plan.prefix));
        Self {
            table: named(&format!("{}.weight", plan.table)),
            proj: plan.has_projection(dim).then(|| named("proj.weight")),
            scale: plan.scaled.then(|| named("scale")),
            plan: plan.clone(),
        }
    }

    fn forward<B: Backend<Plain = P>>(
        &self,
        ids: Tensor<B, 2, Int>,
        before: Option<Tensor<B, 2, Int>>,
        start: usize,
    ) -> Tensor<B, 2> {
        let rows = ids.dims().iter().product::<usize>();
        let HashPlan { hash, triples, buckets, .. } = self.plan;
        let looked_up = |triple: bool| {
            let buckets = hash.buckets::<B>(ids.clone(), before.clone(), start, buckets, triple);
            B::embed(buckets.reshape([rows]), &self.table)
        };
        let mut x = looked_up(false);
        if triples {
            x = x + looked_up(true);
        }
        if let Some(proj) = &self.proj {
            x = B::project(x, proj);
        }
        match &self.scale {
            Some(scale) => x * B::weight(scale, [1, 1]),
            None => x,
        }
    }
}

/// Mixes rows `x[b t, c]` with the ones before them (zeros before the first, or `last`): the gate on the row itself if
/// `own`, else on the one before.
pub fn smear<P: Plain, B: Backend<Plain = P>>(
    x: Tensor<B, 2>,
    gate: &Param<P>,
    batch: usize,
    own: bool,
    last: Option<&mut Option<Tensor<B, 3>>>,
) -> Tensor<B, 2> {
    let [rows, columns] = x.dims();
    let time = rows / batch;
    let rows_of = x.clone().reshape([batch, time, columns]);
    let seen = last.as_ref().and_then(|last| (*last).clone());
    let mut previous =
        vec![seen.unwrap_or_else(|| Tensor::zeros([batch, 1, columns], (&x.device(), x.dtype())))];
    if time > 1 {
        previous.push(rows_of.clone().narrow(1, 0, time - 1));
    }
    if let Some(last) = last {
        *last = Some(rows_of.narrow(1, time - 1, 1));
    }
    let previous = Tensor::cat(previous, 1).reshape([rows, columns]);
    let gate = B::logistic(B::weight(gate, [1, columns]));
    let rest = gate.clone().neg().add_scalar(1.0);
    if own { x * gate + previous * rest } else { x * rest + previous * gate }
}
