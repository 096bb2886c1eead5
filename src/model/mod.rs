//! The models: one definition for training, evaluation and sampling, on every device.
//!
//! A recipe becomes a [`plan::Plan`] (the parts, their names and sizes, the order in which they run), a plan becomes a
//! [`Model`] on a device.

pub mod attention;
pub mod block;
pub mod embed;
mod grams;
pub mod init;
pub mod mamba1;
pub mod mamba2;
pub mod mamba3;
pub mod mlp;
pub mod params;
pub mod plan;
mod recompute;
pub mod s4d;
pub mod spec;
pub mod state;
mod stream;
mod systems;

use crate::error::Result;
use crate::ops::rope::RopeTable;
use crate::ops::stream::Start;
use crate::ops::weight_form::WeightForm;
use crate::ops::{Backend, Param, Plain, accumulate_type};
use crate::recipe::{PR1382, Recipe};
use attention::KeyValueCache;
use block::{Block, BlockInputs};
use burn::tensor::{DType, Int, Tensor, TensorData};
use embed::{Embed, EmbedState};
use mlp::Mlp;
use params::Params;
use plan::{Plan, RopePlan, Visit};
use state::BlockState;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use stream::Stream;

/// The name of the token embedding.
pub const EMBEDDING: &str = "tok_emb.weight";

/// The name of the weights on the skips from the first half of the blocks to the second.
pub const SKIPS: &str = "skip_weights";

/// The name of an untied output head.
pub const HEAD: &str = "lm_head.weight";

/// What the names of the heads that predict further ahead begin with.
pub const AHEAD: &str = "mtp_heads.";

/// The names and shapes of the parameters of the recipe's model, as the peers have them.
pub fn layout(recipe: &Recipe) -> Result<Vec<(String, Vec<usize>)>> {
    Ok(Plan::of(recipe)?.layout())
}

/// Number of parameters of the recipe's model.
pub fn param_count(recipe: &Recipe) -> Result<u64> {
    Ok(Plan::of(recipe)?.param_count())
}

/// Refuses a recipe that describes no model: keys out of bounds or at odds, or a model too large for any host.
pub fn check(recipe: &Recipe) -> Result<()> {
    Plan::of(recipe).map(drop)
}

/// Token ids `[batch, time]` on a device.
pub fn ids_tensor<P: Plain>(ids: &[u16], time: usize, device: &P::Device) -> Tensor<P, 2, Int> {
    let values: Vec<i32> = ids.iter().map(|id| i32::from(*id)).collect();
    Tensor::from_data(TensorData::new(values, [ids.len() / time, time]), device)
}

/// State that a model carries from one call to the next: what its layers have seen of the sequence so far.
#[derive(Debug, Clone)]
pub struct Cache<B: Backend> {
    embed: EmbedState<B>,
    visits: Vec<BlockState<B>>,
    /// Of the window that attention sees.
    positions: usize,
    length: usize,
    /// Of the whole sequence.
    seen: usize,
}

impl<B: Backend> Cache<B> {
    /// Positions seen so far, by attention.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Begins a new window of at most the same length: the embedding and the state space layers go on from what they
    /// have seen, attention and its positions start anew.
    pub fn next_window(&mut self) {
        self.positions = 0;
        self.visits.iter_mut().for_each(|visit| visit.attention = KeyValueCache::default());
    }
}

/// What sees each visit's block and output, in order of execution.
pub type Trace<'a, B> = &'a mut dyn FnMut(&str, Tensor<B, 2>);

/// A model on a device.
#[derive(Debug)]
pub struct Model<P: Plain> {
    plan: Plan,
    params: Params<P>,
    embed: Embed<P>,
    blocks: Vec<Block<P>>,
    extra_mlps: Vec<Mlp<P>>,
    skips: Option<Param<P>>,
    lm_head: Option<Param<P>>,
    ahead: Vec<Param<P>>,
    recurrent: AtomicBool,
    late_form: WeightForm,
    late_quantised: AtomicBool,
    rope: Mutex<Option<RopeCache<P>>>,
    compute_type: DType,
    device: P::Device,
}

#[derive(Debug)]
struct RopeCache<P: Plain> {
    base: f64,
    table: RopeTable<P>,
}

impl<P: Plain> Model<P> {
    /// A model at its initial weights; activations have the type `compute_type`. Its recurrence is on where it begins
    /// with the first step.
    pub fn new(recipe: &Recipe, device: &P::Device, compute_type: DType) -> Result<Self> {
        let plan = Plan::of(recipe)?;
        let params = Params::init(&plan, recipe, device, compute_type);
        let late_form = match recipe.system.as_str() {
            PR1382 => WeightForm::fake_int6_asymmetric(),
            _ => WeightForm::fake_int_symmetric(recipe.quant_bits),
        };
        Ok(Self {
            embed: Embed::new(&plan.embed, &params),
            blocks: plan.blocks.iter().map(|block| Block::new(block, &params, plan.rms_eps)).collect(),
            extra_mlps: plan.extra_mlps.iter().map(|mlp| Mlp::new(mlp, &params)).collect(),
            skips: params.get(SKIPS).cloned(),
            lm_head: params.get(HEAD).cloned(),
            ahead: plan.ahead.iter().flat_map(|ahead| &ahead.heads).map(|name| params.named(name)).collect(),
            recurrent: AtomicBool::new(recipe.recurs_at(0)),
            late_form,
            late_quantised: AtomicBool::new(false),
            rope: Mutex::new(None),
            params,
            plan,
            compute_type,
            device: device.clone(),
        })
    }

    /// The parameters.
    pub fn params(&self) -> &Params<P> {
        &self.params
    }

    /// The model as data.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.plan.embed.vocab
    }

    /// The device that the model lives on.
    pub fn device(&self) -> &P::Device {
        &self.device
    }

    /// The type of the activations.
    pub fn compute_type(&self) -> DType {
        self.compute_type
    }

    /// Turns the recurrence on or off, if the model has one.
    pub fn set_recurrent(&self, on: bool) {
        self.recurrent.store(on, Ordering::Relaxed);
    }

    /// Whether the recurrence is on.
    pub fn is_recurrent(&self) -> bool {
        self.plan.recurrent_visits.is_some() && self.recurrent.load(Ordering::Relaxed)
    }

    /// Quantises the linear weights that the source system quantises late in training, or gives them their own form back.
    pub fn set_late_quantised(&self, on: bool) {
        if self.late_quantised.swap(on, Ordering::Relaxed) == on {
            return;
        }
        let by_size = self.late_form != WeightForm::fake_int6_asymmetric();
        for spec in self.plan.specs.iter().filter(|spec| spec.casted && !(by_size && spec.numel() <= 65_536))
        {
            let form = if on { self.late_form } else { spec.form };
            self.params.named(&spec.name).set_form(form);
        }
    }

    /// Whether those weights are quantised.
    pub fn is_late_quantised(&self) -> bool {
        self.late_quantised.load(Ordering::Relaxed)
    }

    fn visits(&self) -> &[Visit] {
        self.plan.schedule(self.is_recurrent())
    }

    /// An empty state for a new sequence of at most `length` tokens. Where the rotation depends on a sequence's length,
    /// steps equal the full forward of `length` tokens.
    pub fn cache<B: Backend<Plain = P>>(&self, length: usize) -> Cache<B> {
        let visits = self.visits().iter().map(|_| BlockState::default()).collect();
        Cache { embed: EmbedState::default(), visits, positions: 0, length, seen: 0 }
    }

    /// Hidden rows `[b t, c]` after the final norm for `ids[b, t]`.
    ///
    /// With a cache the call goes on after the positions that it has seen, and adds these to it. `trace` is given
    /// each visit's block and output in order of execution.
    pub fn hidden<B: Backend<Plain = P>>(
        &self,
        ids: Tensor<B, 2, Int>,
        mut cache: Option<&mut Cache<B>>,
        mut trace: Option<Trace<'_, B>>,
    ) -> Tensor<B, 2> {
        let [rows, time] = ids.dims();
        let start = cache.as_ref().map_or(0, |cache| cache.positions);
        let length = cache.as_ref().map_or(time, |cache| cache.length.max(start + time));
        let values = self.embed.values(ids.clone());
        let seen = cache.as_ref().map_or(0, |cache| cache.seen);
        let embedded = self.embed.forward(ids, seen, cache.as_mut().map(|cache| &mut cache.embed));
        let (x, x0) = B::stream_start(embedded);
        let flow = Flow { batch: rows, rope: self.rope(start, time, length), values, x0 };
        let visits = self.visits();
        let mut stream = Stream::new(x);
        let mut kept: Vec<Option<Tensor<B, 2>>> = vec![None; visits.len()];
        // The visit whose output comes with the next one's norm.
        let mut keeps = None;
        let mut first_values = None;
        for (index, visit) in visits.iter().enumerate() {
            if let Some(at) = keeps.take_if(|_| visit.skip.is_some()) {
                kept[at] = Some(stream.kept());
            }
            let skip = visit.skip.and_then(|skip| kept[skip.from].take());
            let state = cache.as_mut().map(|cache| &mut cache.visits[index]);
            let values = self.visit(visit, &mut stream, skip, &flow, first_values.clone(), state);
            if let Some(at) = keeps.take() {
                kept[at] = Some(stream.kept());
            }
            if visit.gives_values {
                first_values = values;
            }
            if let Some(trace) = trace.as_mut() {
                trace(&self.plan.blocks[visit.block].name, stream.value());
            }
            if is_taken(visits, index) {
                stream.keep();
                keeps = Some(index);
            }
        }
        if let Some(cache) = cache {
            cache.positions += time;
            cache.seen += time;
        }
        stream.normed(self.plan.rms_eps, 1.0)
    }

    /// One visit: the skip, then the block; the values of its attention.
    fn visit<B: Backend<Plain = P>>(
        &self,
        visit: &Visit,
        stream: &mut Stream<B>,
        skip: Option<Tensor<B, 2>>,
        flow: &Flow<B>,
        first_values: Option<Tensor<B, 4>>,
        state: Option<&mut BlockState<B>>,
    ) -> Option<Tensor<B, 4>> {
        if let (Some(from), Some(weights), Some(skip)) = (skip, &self.skips, visit.skip) {
            stream.push(from, Some((weights, skip.row)));
        }
        // A visit with another MLP is without the value embedding.
        let layer = self.plan.blocks[visit.block].value_layer.filter(|_| visit.mlp.is_none());
        let value_embedding = match (&flow.values, layer) {
            (Some(values), Some(layer)) => Some(self.embed.scaled_values(values.clone(), layer)),
            _ => None,
        };
        let inputs =
            BlockInputs { x0: &flow.x0, batch: flow.batch, rope: &flow.rope, value_embedding, first_values };
        let mlp = visit.mlp.map(|index| &self.extra_mlps[index]);
        self.blocks[visit.block].forward(stream, inputs, mlp, state)
    }

    /// The loss in nats of each target `[b t]`, for `ids[b, t]` and `targets[b, t]`.
    pub fn nll<B: Backend<Plain = P>>(
        &self,
        ids: Tensor<B, 2, Int>,
        targets: Tensor<B, 2, Int>,
    ) -> Tensor<B, 1> {
        let hidden = self.hidden(ids, None, None);
        self.nll_of(hidden, targets)
    }

    /// The loss in nats of each of `targets` (as many as rows) for hidden rows `[n, c]`, logits divided by `temperature`.
    ///
    /// `z / t = (cap / t) tanh((h / t) w^T / (cap / t))`: rows and cap are divided, so that it is any device's own op.
    pub fn nll_at<B: Backend<Plain = P>>(
        &self,
        hidden: Tensor<B, 2>,
        targets: Tensor<B, 2, Int>,
        temperature: f64,
    ) -> Tensor<B, 1> {
        if temperature == 1.0 {
            return self.nll_of(hidden, targets);
        }
        let rows = hidden.dims()[0];
        let hidden = hidden.mul_scalar(1.0 / temperature);
        let cap = self.plan.softcap / temperature;
        B::cross_entropy(hidden, self.head(), targets.reshape([rows]), Some(cap))
    }

    fn nll_of<B: Backend<Plain = P>>(
        &self,
        hidden: Tensor<B, 2>,
        targets: Tensor<B, 2, Int>,
    ) -> Tensor<B, 1> {
        let rows = hidden.dims()[0];
        B::cross_entropy(hidden, self.head(), targets.reshape([rows]), Some(self.plan.softcap))
    }

    /// What training minimises: the loss in nats of each target, times `share`, summed as `[1]`; with the heads that
    /// predict further ahead their mean loss beside it, by its weight.
    fn objective_of<B: Backend<Plain = P>>(
        &self,
        hidden: Tensor<B, 2>,
        targets: Tensor<B, 2, Int>,
        share: &Tensor<P, 1>,
    ) -> Tensor<B, 1> {
        let [batch, time] = targets.dims();
        let columns = hidden.dims()[1];
        let share: Tensor<B, 1> = B::lift(share.clone());
        let mut sum = B::total(self.nll_of(hidden.clone(), targets.clone()) * share.clone());
        let weight =
            self.plan.ahead.as_ref().map_or(0.0, |ahead| ahead.weight) / self.ahead.len().max(1) as f64;
        for (index, head) in self.ahead.iter().enumerate() {
            let seen = time.saturating_sub(index + 1);
            if seen == 0 || weight == 0.0 {
                continue;
            }
            let rows = hidden.clone().reshape([batch, time, columns]).narrow(1, 0, seen);
            let targets = targets.clone().narrow(1, index + 1, seen).reshape([batch * seen]);
            let rows = rows.reshape([batch * seen, columns]);
            let nll = B::cross_entropy(rows, head, targets, Some(self.plan.softcap));
            // A mean over fewer positions.
            sum = sum + B::total(nll * share.clone()).mul_scalar(weight * time as f64 / seen as f64);
        }
        sum
    }

    /// Logits `[n, v]` of hidden rows `[n, c]`, in f32 (f64 where the model computes in f64).
    pub fn logits<B: Backend<Plain = P>>(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        B::capped_logits(hidden, self.head(), Some(self.plan.softcap))
    }

    fn head(&self) -> &Param<P> {
        self.lm_head.as_ref().unwrap_or(self.embed.tokens())
    }

    /// The rotation of positions `start..start + len` of a sequence of `whole`, from a table that grows by doubling.
    fn rope(&self, start: usize, len: usize, whole: usize) -> RopeTable<P> {
        let RopePlan { rotated, .. } = self.plan.rope;
        let base = self.plan.rope.base_for(whole);
        let mut cache = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        let end = start + len;
        if cache.as_ref().is_none_or(|cache| cache.base != base || cache.table.len() < end) {
            let size = end.next_power_of_two();
            let dtype = accumulate_type(self.compute_type);
            let table = RopeTable::new(0, size, rotated, base, &self.device, dtype);
            *cache = Some(RopeCache { base, table });
        }
        cache.as_ref().map(|cache| cache.table.range(start, len)).expect("the table was just made")
    }
}

/// What every visit of one pass gets.
#[derive(Debug, Clone)]
struct Flow<B: Backend> {
    batch: usize,
    rope: RopeTable<B::Plain>,
    values: Option<Tensor<B, 2>>,
    x0: Start<B>,
}

/// Whether a later visit takes this one's output.
fn is_taken(visits: &[Visit], index: usize) -> bool {
    visits[index + 1..].iter().any(|visit| visit.skip.is_some_and(|skip| skip.from == index))
}
