//! The residual stream between blocks: what is to be added to it waits, so that it is added in one pass with the mix
//! and the norm after it.

use crate::ops::stream::{BRANCHES, Branch, Inputs, Mix, Norm, Start};
use crate::ops::{Backend, Param};
use burn::tensor::Tensor;

/// The stream `[n, c]`, with branches and a mix that are not in it yet.
#[derive(Debug, Clone)]
pub(super) struct Stream<B: Backend> {
    x: Tensor<B, 2>,
    branches: Vec<Branch<B>>,
    mix: Option<Mix<B>>,
    /// Whether the value before the mix is wanted.
    keeps: bool,
    kept: Option<Tensor<B, 2>>,
}

impl<B: Backend> Stream<B> {
    pub(super) fn new(x: Tensor<B, 2>) -> Self {
        Self { x, branches: Vec::new(), mix: None, keeps: false, kept: None }
    }

    /// `x += scale[row] y`.
    pub(super) fn push(&mut self, value: Tensor<B, 2>, scale: Option<(&Param<B::Plain>, usize)>) {
        if self.mix.is_some() || self.keeps || self.branches.len() == BRANCHES {
            self.resolve(None);
        }
        let scale = scale.map(|(scale, row)| (scale.clone(), row));
        self.branches.push(Branch { value, scale });
    }

    /// `x = m[0] x + m[1] x0`.
    pub(super) fn mix(&mut self, start: &Start<B>, weight: &Param<B::Plain>) {
        if self.mix.is_some() {
            self.resolve(None);
        }
        self.mix = Some(Mix { start: start.clone(), weight: weight.clone() });
    }

    /// Asks for the stream as it is now; [`Self::kept`] gives it.
    pub(super) fn keep(&mut self) {
        if self.mix.is_some() {
            self.resolve(None);
        }
        self.keeps = true;
    }

    /// What the last [`Self::keep`] asked for.
    pub(super) fn kept(&mut self) -> Tensor<B, 2> {
        if self.keeps {
            self.resolve(None);
        }
        self.kept.take().unwrap_or_else(|| self.value())
    }

    /// The stream with everything in it.
    pub(super) fn value(&mut self) -> Tensor<B, 2> {
        self.resolve(None);
        self.x.clone()
    }

    /// `scale rms_norm(x)` of the stream with everything in it.
    pub(super) fn normed(&mut self, eps: f64, scale: f64) -> Tensor<B, 2> {
        self.resolve(Some(Norm { eps, scale })).expect("a norm was asked for")
    }

    fn resolve(&mut self, norm: Option<Norm>) -> Option<Tensor<B, 2>> {
        let keeps = std::mem::take(&mut self.keeps);
        let branches = std::mem::take(&mut self.branches);
        let mix = self.mix.take();
        if branches.is_empty() && mix.is_none() && norm.is_none() {
            if keeps {
                self.kept = Some(self.x.clone());
            }
            return None;
        }
        let outputs = B::stream(Inputs { x: self.x.clone(), branches, mix }, norm, keeps);
        self.x = outputs.x;
        self.kept = outputs.added.or(self.kept.take());
        outputs.normed
    }
}
