//! The attention mixer: projections, q/k norm, RoPE, gain, causal GQA, output projection; and the options of the
//! hybrids.

use super::init::Init;
use super::params::Params;
use super::spec::{Linears, Spec};
use crate::ops::attention::Mask;
use crate::ops::qk_norm::QkNorm;
use crate::ops::rope::RopeTable;
use crate::ops::{Backend, Param, Plain};
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

/// Names, sizes and options of one mixer.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionPlan {
    /// What stands before the parameters' names.
    pub prefix: String,
    /// Width of the residual stream.
    pub dim: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and of values.
    pub groups: usize,
    /// The gain's start.
    pub gain: f32,
    /// The epsilon of the norms of q and k.
    pub rms_eps: f64,
    /// SiLU on the values (spec/pr1607.md).
    pub silu_values: bool,
    /// Removes from the output what lies along the position's own value (spec/pr1382.md).
    pub exclude_self: bool,
    /// Gates each head's output by the mixer's input.
    pub gated: bool,
    /// Adds the first values of the stack.
    pub value_residual: bool,
}

impl AttentionPlan {
    fn head_dim(&self) -> usize {
        self.dim / self.heads
    }

    /// The parameters; the output projection starts at 0.
    pub fn specs(&self, linears: Linears) -> Vec<Spec> {
        let Self { prefix, dim, heads, groups, .. } = self;
        let kv = groups * self.head_dim();
        let weight =
            |name: &str, outputs: usize| linears.weight(&format!("{prefix}.{name}"), [outputs, *dim]);
        let constant = |name: &str, shape: &[usize], value: f32| {
            Spec::new(format!("{prefix}.{name}"), shape, Init::Constant(value))
        };
        let mut specs = vec![
            weight("c_q", *dim),
            weight("c_k", kv),
            weight("c_v", kv),
            linears.weight_from(&format!("{prefix}.proj"), [*dim, *dim], Init::Constant(0.0)),
            constant("q_gain", &[*heads], self.gain),
        ];
        if self.gated {
            specs.push(constant("attn_gate.weight", &[*heads, *dim], 0.0));
            specs.push(constant("attn_gate.bias", &[*heads], 4.0));
        }
        if self.value_residual {
            specs.push(constant("vrl_alpha", &[1], 0.0));
        }
        specs
    }
}

/// Attention of one block (spec/challenge.md section 4).
#[derive(Debug, Clone)]
pub struct Attention<P: Plain> {
    plan: AttentionPlan,
    c_q: Param<P>,
    c_k: Param<P>,
    c_v: Param<P>,
    proj: Param<P>,
    q_gain: Param<P>,
    gate: Option<[Param<P>; 2]>,
    residual: Option<Param<P>>,
}

/// What attention gets beside its input.
#[derive(Debug, Clone)]
pub struct AttentionInputs<'a, B: Backend> {
    /// Sequences.
    pub batch: usize,
    /// The rotation of the positions; channels past its width do not rotate.
    pub rope: &'a RopeTable<B::Plain>,
    /// Added to the values: `[b t, g d]`.
    pub value_embedding: Option<Tensor<B, 2>>,
    /// The first values of the stack: `[b, t, g, d]`.
    pub first_values: Option<Tensor<B, 4>>,
}

impl<P: Plain> Attention<P> {
    /// The mixer of a plan with the parameters of its names.
    pub fn new(plan: &AttentionPlan, params: &Params<P>) -> Self {
        let named = |name: &str| params.named(&format!("{}.{name}", plan.prefix));
        Self {
            c_q: named("c_q.weight"),
            c_k: named("c_k.weight"),
            c_v: named("c_v.weight"),
            proj: named("proj.weight"),
            q_gain: named("q_gain"),
            gate: plan.gated.then(|| [named("attn_gate.weight"), named("attn_gate.bias")]),
            residual: plan.value_residual.then(|| named("vrl_alpha")),
            plan: plan.clone(),
        }
    }

    /// `x[b t, c]` (normed) to `y[b t, c]`, and the values before the residual and SiLU where the plan has a value residual;
    /// the rotation holds the rows of these `t` positions.
    pub fn forward<B: Backend<Plain = P>>(
        &self,
        x: Tensor<B, 2>,
        inputs: AttentionInputs<'_, B>,
        cache: Option<&mut KeyValueCache<B>>,
    ) -> (Tensor<B, 2>, Option<Tensor<B, 4>>) {
        let AttentionPlan { heads, groups, rms_eps, silu_values, exclude_self, value_residual, .. } =
            self.plan;
        let head_dim = self.plan.head_dim();
        let rows = x.dims()[0];
        let (batch, time) = (inputs.batch, rows / inputs.batch);
        let split = |y: Tensor<B, 2>, heads| y.reshape([batch, time, heads, head_dim]);
        let weights = [&self.c_q, &self.c_k, &self.c_v];
        let how = QkNorm {
            batch,
            heads,
            groups,
            rope: inputs.rope.clone(),
            gain: Some(self.q_gain.clone()),
            eps: rms_eps,
        };
        let scale = 1.0 / (head_dim as f64).sqrt();
        let values_as_projected =
            inputs.value_embedding.is_none() && !(silu_values || exclude_self || value_residual);
        if cache.is_none() && values_as_projected {
            let y = B::projected_attention(x.clone(), weights, &how, &Mask::causal(), scale);
            return (self.gated_output(x, y), None);
        }
        let [q, k, mut v] = B::project_many(x.clone(), weights);
        if let Some(embedding) = inputs.value_embedding {
            v = v + embedding;
        }
        let first = value_residual.then(|| split(v.clone(), groups));
        if let (Some(alpha), Some(values)) = (&self.residual, inputs.first_values) {
            v = v + values.reshape(k.dims()) * B::logistic(B::weight(alpha, [1, 1]));
        }
        if silu_values {
            v = B::silu(v);
        }
        let own = v.clone();
        let mut y = match cache {
            None => B::normed_attention(q, k, v, &how, &Mask::causal(), scale),
            Some(cache) => {
                let [q, k] = B::qk_norm(q, k, &how);
                let [k, v] = cache.extend(k, split(v, groups));
                B::causal_attention(q, k, v, scale)
            }
        };
        if exclude_self {
            y = B::exclude_self(y, split(own, groups));
        }
        (self.gated_output(x, y), first)
    }

    /// The gate by the mixer's input `x[b t, c]`, if there is one, and the output projection of `y[b, t, h, d]`.
    fn gated_output<B: Backend<Plain = P>>(&self, x: Tensor<B, 2>, mut y: Tensor<B, 4>) -> Tensor<B, 2> {
        let [batch, time, heads, head_dim] = y.dims();
        if let Some([weight, bias]) = &self.gate {
            let gate = B::project(x, weight) + B::weight(bias, [1, heads]);
            y = y * B::logistic(gate).reshape([batch, time, heads, 1]);
        }
        B::project(y.reshape([batch * time, heads * head_dim]), &self.proj)
    }
}
