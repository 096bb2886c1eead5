//! The feed-forward part of a block.

use super::init::Init;
use super::params::{Params, Spec};
use crate::ops::{Backend, Param, Plain};
use crate::recipe::Recipe;
use burn::tensor::Tensor;

/// `W2 relu(W1 x)^2` (spec/challenge.md section 4).
#[derive(Debug, Clone)]
pub struct Mlp<P: Plain> {
    fc: Param<P>,
    proj: Param<P>,
}

/// The parameters of one MLP.
pub(super) fn layout(recipe: &Recipe, prefix: &str) -> Vec<Spec> {
    let (d, hidden) = (recipe.model_dim, recipe.mlp_dim());
    vec![
        Spec::new(format!("{prefix}.fc.weight"), &[hidden, d], Init::Linear),
        Spec::new(format!("{prefix}.proj.weight"), &[d, hidden], Init::Constant(0.0)),
    ]
}

impl<P: Plain> Mlp<P> {
    pub(super) fn new(params: &Params<P>, prefix: &str) -> Self {
        Self {
            fc: params.named(&format!("{prefix}.fc.weight")),
            proj: params.named(&format!("{prefix}.proj.weight")),
        }
    }

    /// Rows `x[n, c]` (normed) to `y[n, c]`.
    pub(super) fn forward<B: Backend<Plain = P>>(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        B::project(B::relu_squared(B::project(x, &self.fc)), &self.proj)
    }
}
