//! What a mixer carries from one call to the next.

use super::attention::KeyValueCache;
use crate::ops::Backend;
use burn::tensor::{DType, Tensor};

/// What a state space layer carries: the last inputs of its convolution, and its hidden states.
#[derive(Debug, Clone)]
pub struct SsmState<B: Backend> {
    history: Option<Tensor<B, 3>>,
    hidden: Vec<Tensor<B, 3>>,
}

impl<B: Backend> Default for SsmState<B> {
    fn default() -> Self {
        Self { history: None, hidden: Vec::new() }
    }
}

impl<B: Backend> SsmState<B> {
    /// The state after a call.
    pub(super) fn new(history: Option<Tensor<B, 3>>, hidden: Vec<Tensor<B, 3>>) -> Self {
        Self { history, hidden }
    }

    /// The inputs before the first one, `[b, k - 1, c]`, of the type of `like`; zeros at a sequence's start.
    pub(super) fn history(state: &Option<&mut Self>, shape: [usize; 3], like: &Tensor<B, 3>) -> Tensor<B, 3> {
        let seen = state.as_ref().and_then(|state| state.history.clone());
        seen.unwrap_or_else(|| Tensor::zeros(shape, (&like.device(), like.dtype())))
    }

    /// A hidden state by its number; zeros at a sequence's start.
    pub(super) fn hidden(
        state: &Option<&mut Self>,
        index: usize,
        shape: [usize; 3],
        (device, dtype): (&B::Device, DType),
    ) -> Tensor<B, 3> {
        let seen = state.as_ref().and_then(|state| state.hidden.get(index).cloned());
        seen.unwrap_or_else(|| Tensor::zeros(shape, (device, dtype)))
    }

    /// A hidden state by its number, if the sequence has begun.
    pub(super) fn seen(state: &Option<&mut Self>, index: usize) -> Option<Tensor<B, 3>> {
        state.as_ref().and_then(|state| state.hidden.get(index).cloned())
    }
}

/// What the mixers of one visit of a block carry.
#[derive(Debug, Clone)]
pub struct BlockState<B: Backend> {
    /// Of attention.
    pub(super) attention: KeyValueCache<B>,
    /// Of the state space layer.
    pub(super) ssm: SsmState<B>,
}

impl<B: Backend> Default for BlockState<B> {
    fn default() -> Self {
        Self { attention: KeyValueCache::default(), ssm: SsmState::default() }
    }
}
