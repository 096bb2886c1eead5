//! The feed-forward part of a block.

use super::init::Init;
use super::params::Params;
use super::spec::{Linears, Spec};
use crate::ops::{Backend, Param, Plain};
use burn::tensor::Tensor;

/// Which function.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MlpForm {
    /// `W2 leaky_relu(W1 x)^2` with this slope below zero; `relu^2` at 0.
    Squared(f64),
    /// `W_down (silu(W_gate x) W_up x)`.
    SwiGlu,
}

/// Names and sizes of one MLP.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpPlan {
    /// What stands before the parameters' names.
    pub prefix: String,
    /// Width of the residual stream.
    pub dim: usize,
    /// Hidden width.
    pub hidden: usize,
    /// Which function.
    pub form: MlpForm,
}

impl MlpPlan {
    /// The parameters; the last projection starts at 0.
    pub fn specs(&self, linears: Linears) -> Vec<Spec> {
        let Self { prefix, dim, hidden, form } = self;
        let inner = |name: &str| linears.weight(&format!("{prefix}.{name}"), [*hidden, *dim]);
        let last = |name: &str| {
            linears.weight_from(&format!("{prefix}.{name}"), [*dim, *hidden], Init::Constant(0.0))
        };
        match form {
            MlpForm::Squared(_) => vec![inner("fc"), last("proj")],
            MlpForm::SwiGlu => vec![inner("w_gate"), inner("w_up"), last("w_down")],
        }
    }
}

/// An MLP.
#[derive(Debug, Clone)]
pub struct Mlp<P: Plain> {
    form: MlpForm,
    inner: Param<P>,
    up: Option<Param<P>>,
    last: Param<P>,
}

impl<P: Plain> Mlp<P> {
    /// The MLP of a plan with the parameters of its names.
    pub fn new(plan: &MlpPlan, params: &Params<P>) -> Self {
        let named = |name: &str| params.named(&format!("{}.{name}.weight", plan.prefix));
        match plan.form {
            MlpForm::Squared(_) => {
                Self { form: plan.form, inner: named("fc"), up: None, last: named("proj") }
            }
            MlpForm::SwiGlu => Self {
                form: plan.form,
                inner: named("w_gate"),
                up: Some(named("w_up")),
                last: named("w_down"),
            },
        }
    }

    /// Rows `x[n, c]` (normed) to `y[n, c]`.
    pub fn forward<B: Backend<Plain = P>>(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        if let Some(up) = &self.up {
            return B::gated_mlp(x, &self.inner, up, &self.last);
        }
        let slope = match self.form {
            MlpForm::Squared(slope) => slope,
            MlpForm::SwiGlu => unreachable!("a gated MLP has two inner projections"),
        };
        B::squared_mlp(x, &self.inner, &self.last, slope)
    }
}
