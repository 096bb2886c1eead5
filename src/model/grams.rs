//! What a model's linear layers are given: the sums that Hessians are made of.

use super::Model;
use super::params::to_host;
use crate::error::Result;
use crate::host::HostTensor;
use crate::ops::Plain;
use burn::tensor::Tensor;

impl<P: Plain> Model<P> {
    /// Sums up the inputs of the linear layers of whose weights `wanted` says so, given the name and the number of inputs; of no
    /// others, and what was summed before is dropped. A layer that runs several times in a forward pass adds each of its
    /// runs.
    pub fn watch_inputs(&self, wanted: impl Fn(&str, usize) -> bool) {
        for param in self.params().iter() {
            if let &[_, inputs] = param.shape() {
                param.set_watched(wanted(param.name(), inputs));
                param.take_gram();
            }
        }
    }

    /// Adds rows that [`Self::hidden`] gave to the sum over the head's inputs, if the head's weight is watched: the head runs where
    /// their losses or logits are asked for, and is observed here only.
    pub fn observe_head(&self, hidden: Tensor<P, 2>) {
        if self.head().is_watched() {
            self.head().observe(hidden);
        }
    }

    /// Takes the sums x^T x over the inputs x that each linear layer was given, `[i, i]`, under the names of the weights.
    pub fn take_grams(&self) -> Result<Vec<HostTensor>> {
        let mut grams = Vec::new();
        for param in self.params().iter() {
            if let Some(gram) = param.take_gram() {
                let [rows, columns] = gram.dims();
                grams.push(to_host(param.name(), &[rows, columns], gram.reshape([rows * columns]))?);
            }
        }
        Ok(grams)
    }
}
