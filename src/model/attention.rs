//! The attention mixer: projections, q/k norm, RoPE, gain, causal GQA, output projection.

use super::init::Init;
use super::params::{Params, Spec};
use crate::ops::rope::RopeTable;
use crate::ops::{Backend, Param, Plain};
use crate::recipe::Recipe;
use burn::tensor::Tensor;

/// Keys and values of the positions that one layer has seen, `[b, t, g, d]` each.
#[derive(Debug, Clone)]
pub struct KeyValueCache<B: Backend> {
    seen: Option<[Tensor<B, 4>; 2]>,
}

impl<B: Backend> Default for KeyValueCache<B> {
    fn default() -> Self {
        Self { seen: None }
    }
}

impl<B: Backend> KeyValueCache<B> {
    /// Appends the new positions and returns all keys and values.
    fn extend(&mut self, k: Tensor<B, 4>, v: Tensor<B, 4>) -> [Tensor<B, 4>; 2] {
        let all = match self.seen.take() {
            Some([keys, values]) => [Tensor::cat(vec![keys, k], 1), Tensor::cat(vec![values, v], 1)],
            None => [k, v],
        };
        self.seen = Some(all.clone());
        all
    }
}

/// Attention of one block (spec/challenge.md section 4).
#[derive(Debug, Clone)]
pub struct Attention<P: Plain> {
    heads: usize,
    groups: usize,
    head_dim: usize,
    c_q: Param<P>,
    c_k: Param<P>,
    c_v: Param<P>,
    proj: Param<P>,
    q_gain: Param<P>,
    rms_eps: f64,
}

/// The parameters of one attention mixer.
pub(super) fn layout(recipe: &Recipe, prefix: &str) -> Vec<Spec> {
    let (d, kv) = (recipe.model_dim, recipe.kv_dim());
    let gain = Init::Constant(recipe.qk_gain_init as f32);
    vec![
        Spec::new(format!("{prefix}.c_q.weight"), &[d, d], Init::Linear),
        Spec::new(format!("{prefix}.c_k.weight"), &[kv, d], Init::Linear),
        Spec::new(format!("{prefix}.c_v.weight"), &[kv, d], Init::Linear),
        Spec::new(format!("{prefix}.proj.weight"), &[d, d], Init::Constant(0.0)),
        Spec::new(format!("{prefix}.q_gain"), &[recipe.num_heads], gain),
    ]
}

impl<P: Plain> Attention<P> {
    pub(super) fn new(recipe: &Recipe, params: &Params<P>, prefix: &str) -> Self {
        Self {
            heads: recipe.num_heads,
            groups: recipe.num_kv_heads,
            head_dim: recipe.head_dim(),
            c_q: params.named(&format!("{prefix}.c_q.weight")),
            c_k: params.named(&format!("{prefix}.c_k.weight")),
            c_v: params.named(&format!("{prefix}.c_v.weight")),
            proj: params.named(&format!("{prefix}.proj.weight")),
            q_gain: params.named(&format!("{prefix}.q_gain")),
            rms_eps: recipe.rms_eps,
        }
    }

    /// `x[b t, c]` (normed) to `y[b t, c]`; `rope` holds the rows of these `t` positions.
    pub(super) fn forward<B: Backend<Plain = P>>(
        &self,
        x: Tensor<B, 2>,
        batch: usize,
        rope: &RopeTable<P>,
        cache: Option<&mut KeyValueCache<B>>,
    ) -> Tensor<B, 2> {
        let rows = x.dims()[0];
        let time = rows / batch;
        let split = |y: Tensor<B, 2>, heads| y.reshape([batch, time, heads, self.head_dim]);
        let rotated = |y: Tensor<B, 2>, heads: usize| {
            let y = B::rms_norm(y.reshape([rows * heads, self.head_dim]), self.rms_eps);
            B::rope(y.reshape([batch, time, heads, self.head_dim]), rope)
        };
        let q = rotated(B::project(x.clone(), &self.c_q), self.heads);
        let q = B::head_gain(q, &self.q_gain);
        let mut k = rotated(B::project(x.clone(), &self.c_k), self.groups);
        let mut v = split(B::project(x, &self.c_v), self.groups);
        if let Some(cache) = cache {
            [k, v] = cache.extend(k, v);
        }
        let y = B::causal_attention(q, k, v, 1.0 / (self.head_dim as f64).sqrt());
        B::project(y.reshape([rows, self.heads * self.head_dim]), &self.proj)
    }
}
