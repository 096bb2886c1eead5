//! One block: residual mix with the input stream, mixers, MLP.

use super::attention::{Attention, AttentionInputs, AttentionPlan};
use super::init::Init;
use super::mamba1::{Mamba1, Mamba1Plan};
use super::mamba2::{Mamba2, Mamba2Plan};
use super::mamba3::{Mamba3, Mamba3Plan};
use super::mlp::{Mlp, MlpPlan};
use super::params::Params;
use super::s4d::{S4d, S4dPlan};
use super::spec::Spec;
use super::state::BlockState;
use super::stream::Stream;
use crate::ops::rope::RopeTable;
use crate::ops::stream::Start;
use crate::ops::{Backend, Param, Plain};
use burn::tensor::Tensor;

/// What mixes positions.
#[derive(Debug, Clone, PartialEq)]
pub enum MixerPlan {
    /// Causal attention.
    Attention(AttentionPlan),
    /// Mamba-1.
    Mamba1(Mamba1Plan),
    /// Mamba-2.
    Mamba2(Mamba2Plan),
    /// Mamba-3.
    Mamba3(Mamba3Plan),
    /// S4D-Lin.
    S4d(S4dPlan),
}

/// A mixer or an MLP, and the name of its scale for each channel.
#[derive(Debug, Clone, PartialEq)]
pub struct Branch<T> {
    /// What is added.
    pub part: T,
    /// The parameter `[c]` that it is multiplied by; 1 without.
    pub scale: Option<String>,
}

/// A block as data.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockPlan {
    /// The peers' name of the block (spec files).
    pub name: String,
    /// The parameter `[2, c]` that mixes the stream with its start.
    pub mix: Option<String>,
    /// What mixes positions: all from one normed input, at most one of them attention and one a state space layer.
    pub mixers: Vec<Branch<MixerPlan>>,
    /// What mixes channels.
    pub mlp: Option<Branch<MlpPlan>>,
    /// Whether the MLP takes the mixers' input instead of what they made of it.
    pub parallel: bool,
    /// Multiplies every normed input.
    pub norm_scale: f64,
    /// Gates the block's whole change: the name of the gate.
    pub gate: Option<String>,
    /// The value embedding's scale that attention gets.
    pub value_layer: Option<usize>,
    /// Computes the block again in the backward pass.
    pub checkpoint: bool,
}

impl BlockPlan {
    /// Whether attention is among the mixers.
    pub fn has_attention(&self) -> bool {
        self.mixers.iter().any(|mixer| matches!(mixer.part, MixerPlan::Attention(_)))
    }

    /// The scales, the mix and the gate.
    pub fn own_specs(&self, dim: usize) -> Vec<Spec> {
        let scales =
            self.mixers.iter().map(|mixer| &mixer.scale).chain(self.mlp.iter().map(|mlp| &mlp.scale));
        let one = |name: &String| Spec::new(name, &[dim], Init::Constant(1.0));
        let mut specs: Vec<Spec> = scales.flatten().map(one).collect();
        specs.extend(self.mix.iter().map(|name| Spec::new(name, &[2, dim], Init::FirstRowOne)));
        if let Some(gate) = &self.gate {
            specs.push(Spec::new(format!("{gate}.weight"), &[1, dim], Init::Constant(0.0)));
            specs.push(Spec::new(format!("{gate}.bias"), &[1], Init::Constant(2.0)));
        }
        specs
    }
}

#[derive(Debug, Clone)]
enum Mixer<P: Plain> {
    Attention(Attention<P>),
    Mamba1(Mamba1<P>),
    Mamba2(Mamba2<P>),
    Mamba3(Mamba3<P>),
    S4d(S4d<P>),
}

impl<P: Plain> Mixer<P> {
    fn new(plan: &MixerPlan, params: &Params<P>) -> Self {
        match plan {
            MixerPlan::Attention(plan) => Self::Attention(Attention::new(plan, params)),
            MixerPlan::Mamba1(plan) => Self::Mamba1(Mamba1::new(plan, params)),
            MixerPlan::Mamba2(plan) => Self::Mamba2(Mamba2::new(plan, params)),
            MixerPlan::Mamba3(plan) => Self::Mamba3(Mamba3::new(plan, params)),
            MixerPlan::S4d(plan) => Self::S4d(S4d::new(plan, params)),
        }
    }
}

/// A block on a device.
#[derive(Debug, Clone)]
pub struct Block<P: Plain> {
    mix: Option<Param<P>>,
    mixers: Vec<Branch<Mixer<P>>>,
    scales: Vec<Option<Param<P>>>,
    mlp: Option<(Mlp<P>, Option<Param<P>>)>,
    gate: Option<[Param<P>; 2]>,
    parallel: bool,
    norm_scale: f64,
    rms_eps: f64,
}

/// What a block gets beside the stream.
#[derive(Debug, Clone)]
pub struct BlockInputs<'a, B: Backend> {
    /// The stream's start, `[b t, c]`.
    pub x0: &'a Start<B>,
    /// Sequences.
    pub batch: usize,
    /// The rotation of the positions.
    pub rope: &'a RopeTable<B::Plain>,
    /// Added to the values of attention.
    pub value_embedding: Option<Tensor<B, 2>>,
    /// The first values of the stack.
    pub first_values: Option<Tensor<B, 4>>,
}

impl<P: Plain> Block<P> {
    /// The block of a plan with the parameters of its names.
    pub fn new(plan: &BlockPlan, params: &Params<P>, rms_eps: f64) -> Self {
        let scale = |name: &Option<String>| name.as_ref().map(|name| params.named(name));
        let mixer = |branch: &Branch<MixerPlan>| Branch {
            part: Mixer::new(&branch.part, params),
            scale: branch.scale.clone(),
        };
        let gate = |gate: &String| ["weight", "bias"].map(|part| params.named(&format!("{gate}.{part}")));
        Self {
            mix: scale(&plan.mix),
            mixers: plan.mixers.iter().map(mixer).collect(),
            scales: plan.mixers.iter().map(|mixer| scale(&mixer.scale)).collect(),
            mlp: plan.mlp.as_ref().map(|mlp| (Mlp::new(&mlp.part, params), scale(&mlp.scale))),
            gate: plan.gate.as_ref().map(gate),
            parallel: plan.parallel,
            norm_scale: plan.norm_scale,
            rms_eps,
        }
    }

    /// Takes the rows `[b t, c]` of the stream through the block: `x = m0 x + m1 x0; x += s mixer(rms(x)) ...;
    /// x += s mlp(rms(x))`; gives the values of its attention. `mlp` takes the place of the block's own.
    pub(super) fn forward<B: Backend<Plain = P>>(
        &self,
        stream: &mut Stream<B>,
        inputs: BlockInputs<'_, B>,
        mlp: Option<&Mlp<P>>,
        state: Option<&mut BlockState<B>>,
    ) -> Option<Tensor<B, 4>> {
        let BlockInputs { x0, batch, rope, value_embedding, first_values } = inputs;
        if let Some(mix) = &self.mix {
            stream.mix(x0, mix);
        }
        let (mut kv, mut ssm) = match state {
            Some(state) => (Some(&mut state.attention), Some(&mut state.ssm)),
            None => (None, None),
        };
        let normed = stream.normed(self.rms_eps, self.norm_scale);
        let start = self.gate.as_ref().map(|_| stream.value());
        let mut values = None;
        for (mixer, scale) in self.mixers.iter().zip(&self.scales) {
            let n = normed.clone();
            let y = match &mixer.part {
                Mixer::Attention(attention) => {
                    let inputs = AttentionInputs {
                        batch,
                        rope,
                        value_embedding: value_embedding.clone(),
                        first_values: first_values.clone(),
                    };
                    let (y, first) = attention.forward(n, inputs, kv.take());
                    values = first;
                    y
                }
                Mixer::Mamba1(mamba) => mamba.forward(n, batch, ssm.take()),
                Mixer::Mamba2(mamba) => mamba.forward(n, batch, ssm.take()),
                Mixer::Mamba3(mamba) => mamba.forward(n, batch, ssm.take()),
                Mixer::S4d(s4d) => s4d.forward(n, batch, ssm.take()),
            };
            stream.push(y, scale.as_ref().map(|scale| (scale, 0)));
        }
        if let Some((own, scale)) = &self.mlp {
            let n = if self.parallel { normed } else { stream.normed(self.rms_eps, self.norm_scale) };
            stream.push(mlp.unwrap_or(own).forward(n), scale.as_ref().map(|scale| (scale, 0)));
        }
        if let (Some([weight, bias]), Some(start)) = (&self.gate, start) {
            let columns = start.dims()[1];
            // The gate sees its input as a constant.
            let seen = B::lift(B::lower(start.clone())) * B::weight(weight, [1, columns]);
            let gate = B::logistic(seen.sum_dim(1) + B::weight(bias, [1, 1]));
            let gated = start.clone() + (stream.value() - start) * gate;
            stream.replace(gated);
        }
        values
    }
}
