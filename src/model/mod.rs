//! The models: one definition for training, evaluation and sampling, on every device.

pub mod attention;
pub mod block;
pub mod init;
pub mod mlp;
pub mod params;

use crate::error::Result;
use crate::ops::cross_entropy::softcap;
use crate::ops::rope::RopeTable;
use crate::ops::{Backend, Param, Plain, accumulate_type};
use crate::recipe::Recipe;
use attention::KeyValueCache;
use block::Block;
use burn::tensor::{DType, Int, Tensor};
use init::Init;
use params::{Params, Spec};
use std::sync::{Mutex, PoisonError};

/// The name of the token embedding.
pub const EMBEDDING: &str = "tok_emb.weight";

/// The name of the weights on the skips from the first half of the blocks to the second.
pub const SKIPS: &str = "skip_weights";

/// The name of an untied output head.
pub const HEAD: &str = "lm_head.weight";

/// The parameters of the recipe's model, in the order of the source system's own module.
pub fn layout(recipe: &Recipe) -> Vec<Spec> {
    let (vocab, d, layers) = (recipe.vocab_size, recipe.model_dim, recipe.num_layers);
    let spread = if recipe.tie_embeddings { recipe.tied_embed_init_std as f32 } else { 1.0 };
    let mut specs = vec![Spec::new(EMBEDDING, &[vocab, d], Init::Normal(spread))];
    if layers > 1 {
        specs.push(Spec::new(SKIPS, &[recipe.num_encoder_layers(), d], Init::Constant(1.0)));
    }
    specs.extend((0..layers).flat_map(|index| block::layout(recipe, index)));
    if !recipe.tie_embeddings {
        specs.push(Spec::new(HEAD, &[vocab, d], Init::Constant(0.0)));
    }
    specs
}

/// State that a model carries from one call to the next: what its layers have seen of the sequence so far.
#[derive(Debug, Clone)]
pub struct Cache<B: Backend> {
    layers: Vec<KeyValueCache<B>>,
    positions: usize,
}

impl<B: Backend> Cache<B> {
    /// Positions seen so far.
    pub fn positions(&self) -> usize {
        self.positions
    }
}

/// The challenge's model (spec/challenge.md section 4) on a device.
#[derive(Debug)]
pub struct Model<P: Plain> {
    params: Params<P>,
    tok_emb: Param<P>,
    skip_weights: Option<Param<P>>,
    blocks: Vec<Block<P>>,
    lm_head: Option<Param<P>>,
    softcap: Option<f64>,
    rms_eps: f64,
    head_dim: usize,
    rope_base: f64,
    rope: Mutex<Option<RopeTable<P>>>,
    compute_type: DType,
    device: P::Device,
}

impl<P: Plain> Model<P> {
    /// A model at its initial weights; activations have the type `compute_type`.
    pub fn new(recipe: &Recipe, device: &P::Device, compute_type: DType) -> Result<Self> {
        recipe.validate()?;
        let params = Params::init(&layout(recipe), recipe, device, compute_type);
        Ok(Self {
            tok_emb: params.named(EMBEDDING),
            skip_weights: params.get(SKIPS).cloned(),
            blocks: (0..recipe.num_layers).map(|index| Block::new(recipe, &params, index)).collect(),
            lm_head: params.get(HEAD).cloned(),
            params,
            softcap: (recipe.logit_softcap > 0.0).then_some(recipe.logit_softcap),
            rms_eps: recipe.rms_eps,
            head_dim: recipe.head_dim(),
            rope_base: recipe.rope_base,
            rope: Mutex::new(None),
            compute_type,
            device: device.clone(),
        })
    }

    /// The parameters.
    pub fn params(&self) -> &Params<P> {
        &self.params
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.tok_emb.shape()[0]
    }

    /// The device that the model lives on.
    pub fn device(&self) -> &P::Device {
        &self.device
    }

    /// The type of the activations.
    pub fn compute_type(&self) -> DType {
        self.compute_type
    }

    /// An empty state for a new sequence.
    pub fn cache<B: Backend<Plain = P>>(&self) -> Cache<B> {
        Cache { layers: self.blocks.iter().map(|_| KeyValueCache::default()).collect(), positions: 0 }
    }

    /// Hidden rows `[b t, c]` after the final norm for `ids[b, t]`.
    ///
    /// With a cache the call goes on after the positions that it has seen, and adds these to it. `trace` is given
    /// each block's output in order of execution.
    pub fn hidden<B: Backend<Plain = P>>(
        &self,
        ids: Tensor<B, 2, Int>,
        mut cache: Option<&mut Cache<B>>,
        mut trace: Option<&mut dyn FnMut(Tensor<B, 2>)>,
    ) -> Tensor<B, 2> {
        let [batch, time] = ids.dims();
        let start = cache.as_ref().map_or(0, |cache| cache.positions);
        let rope = self.rope(start, time);
        let x0 = B::rms_norm(B::embed(ids.reshape([batch * time]), &self.tok_emb), self.rms_eps);
        let mut x = x0.clone();
        let mut skips = Vec::new();
        let encoders = self.blocks.len() / 2;
        for (index, block) in self.blocks.iter().enumerate() {
            if index >= encoders
                && let (Some(skip), Some(weights)) = (skips.pop(), &self.skip_weights)
            {
                x = B::scaled_add(x, skip, weights, index - encoders);
            }
            let layer = cache.as_mut().map(|cache| &mut cache.layers[index]);
            x = block.forward(x, x0.clone(), batch, &rope, layer);
            if let Some(trace) = trace.as_mut() {
                trace(x.clone());
            }
            if index < encoders {
                skips.push(x.clone());
            }
        }
        if let Some(cache) = cache {
            cache.positions += time;
        }
        B::rms_norm(x, self.rms_eps)
    }

    /// The loss in nats of each target `[b t]`, for `ids[b, t]` and `targets[b, t]`.
    pub fn nll<B: Backend<Plain = P>>(
        &self,
        ids: Tensor<B, 2, Int>,
        targets: Tensor<B, 2, Int>,
    ) -> Tensor<B, 1> {
        let [batch, time] = ids.dims();
        let hidden = self.hidden(ids, None, None);
        B::cross_entropy(hidden, self.head(), targets.reshape([batch * time]), self.softcap)
    }

    /// Logits `[n, v]` of hidden rows `[n, c]`, in f32 (f64 where the model computes in f64).
    pub fn logits<B: Backend<Plain = P>>(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        let dtype = accumulate_type(hidden.dtype());
        let w = B::lift(self.head().compute::<2>());
        softcap(B::matmul_as(hidden, w.transpose(), dtype), self.softcap)
    }

    fn head(&self) -> &Param<P> {
        self.lm_head.as_ref().unwrap_or(&self.tok_emb)
    }

    /// The rotation of positions `start..start + len`, from a table that grows by doubling.
    fn rope(&self, start: usize, len: usize) -> RopeTable<P> {
        let mut table = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        let end = start + len;
        if table.as_ref().is_none_or(|table| table.len() < end) {
            let size = end.next_power_of_two();
            *table =
                Some(RopeTable::new(0, size, self.head_dim, self.rope_base, &self.device, self.compute_type));
        }
        table.as_ref().map(|table| table.range(start, len)).expect("the table was just made")
    }
}
