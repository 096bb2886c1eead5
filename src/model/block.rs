//! One block: residual mix with the input stream, attention branch, MLP branch.

use super::attention::{self, Attention, KeyValueCache};
use super::init::Init;
use super::mlp::{self, Mlp};
use super::params::{Params, Spec};
use crate::ops::rope::RopeTable;
use crate::ops::{Backend, Param, Plain};
use crate::recipe::Recipe;
use burn::tensor::Tensor;

/// A block of the challenge's model (spec/challenge.md section 4).
#[derive(Debug, Clone)]
pub struct Block<P: Plain> {
    attn: Attention<P>,
    mlp: Mlp<P>,
    attn_scale: Param<P>,
    mlp_scale: Param<P>,
    resid_mix: Param<P>,
    rms_eps: f64,
}

/// The parameters of block `index`.
pub(super) fn layout(recipe: &Recipe, index: usize) -> Vec<Spec> {
    let d = recipe.model_dim;
    let prefix = format!("blocks.{index}");
    let mut specs = vec![
        Spec::new(format!("{prefix}.attn_scale"), &[d], Init::Constant(1.0)),
        Spec::new(format!("{prefix}.mlp_scale"), &[d], Init::Constant(1.0)),
        Spec::new(format!("{prefix}.resid_mix"), &[2, d], Init::FirstRowOne),
    ];
    specs.extend(attention::layout(recipe, &format!("{prefix}.attn")));
    specs.extend(mlp::layout(recipe, &format!("{prefix}.mlp")));
    specs
}

impl<P: Plain> Block<P> {
    pub(super) fn new(recipe: &Recipe, params: &Params<P>, index: usize) -> Self {
        let prefix = format!("blocks.{index}");
        Self {
            attn: Attention::new(recipe, params, &format!("{prefix}.attn")),
            mlp: Mlp::new(params, &format!("{prefix}.mlp")),
            attn_scale: params.named(&format!("{prefix}.attn_scale")),
            mlp_scale: params.named(&format!("{prefix}.mlp_scale")),
            resid_mix: params.named(&format!("{prefix}.resid_mix")),
            rms_eps: recipe.rms_eps,
        }
    }

    /// `x = m0 x + m1 x0; x += s_a attn(rms(x)); x += s_m mlp(rms(x))` over rows `[b t, c]`.
    pub(super) fn forward<B: Backend<Plain = P>>(
        &self,
        x: Tensor<B, 2>,
        x0: Tensor<B, 2>,
        batch: usize,
        rope: &RopeTable<P>,
        cache: Option<&mut KeyValueCache<B>>,
    ) -> Tensor<B, 2> {
        let x = B::residual_mix(x, x0, &self.resid_mix);
        let branch = self.attn.forward(B::rms_norm(x.clone(), self.rms_eps), batch, rope, cache);
        let x = B::scaled_add(x, branch, &self.attn_scale, 0);
        let branch = self.mlp.forward(B::rms_norm(x.clone(), self.rms_eps));
        B::scaled_add(x, branch, &self.mlp_scale, 0)
    }
}
