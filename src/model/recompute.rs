//! Training's forward and backward: as one tape, or block by block with the activations computed again (activation
//! checkpointing), for which only each visit's input is kept.

use super::stream::Stream;
use super::{Flow, Model, is_taken};
use crate::ops::stream::Start;
use crate::ops::{Autodiff, Plain};
use burn::tensor::{Int, Tensor};

impl<P: Plain> Model<P> {
    /// Adds to the parameters' gradients those of the batch's objective: the loss in nats of each of `targets[b, t]`
    /// given `ids[b, t]`, times `share`, summed. Gives that sum, `[1]`.
    pub fn accumulate(
        &self,
        ids: Tensor<P, 2, Int>,
        targets: Tensor<P, 2, Int>,
        share: &Tensor<P, 1>,
    ) -> Tensor<P, 1> {
        let checkpointed = self.visits().iter().any(|visit| self.plan.blocks[visit.block].checkpoint);
        if checkpointed {
            return self.accumulate_again(ids, targets, share);
        }
        let hidden = self.hidden::<Autodiff<P>>(Tensor::from_inner(ids), None, None);
        let sum = self.objective_of(hidden, Tensor::from_inner(targets), share);
        let value = sum.clone().inner();
        sum.backward();
        value
    }

    /// [`Self::accumulate`], where blocks with checkpointing are run twice: without a tape, then, from the last to the
    /// first, with one of their own. What lies between two of them shares a tape with the block after it.
    fn accumulate_again(
        &self,
        ids: Tensor<P, 2, Int>,
        targets: Tensor<P, 2, Int>,
        share: &Tensor<P, 1>,
    ) -> Tensor<P, 1> {
        let [batch, time] = ids.dims();
        let visits = self.visits();
        let rope = self.rope(0, time, time);

        // Without a tape: each visit's input, and what later visits take of it.
        let flow = Flow {
            batch,
            rope: rope.clone(),
            values: self.embed.values::<P>(ids.clone()),
            x0: Start::new(self.embed.forward::<P>(ids.clone(), 0, None)),
        };
        let mut inputs = Vec::with_capacity(visits.len());
        let mut outputs: Vec<Option<Tensor<P, 2>>> = vec![None; visits.len()];
        let mut first_values: Option<Tensor<P, 4>> = None;
        let mut values_at = None;
        let mut x = flow.x0.value();
        for (index, visit) in visits.iter().enumerate() {
            inputs.push(x.clone());
            let skip = visit.skip.and_then(|skip| outputs[skip.from].clone());
            let mut stream = Stream::new(x);
            let values = self.visit(visit, &mut stream, skip, &flow, first_values.clone(), None);
            x = stream.value();
            if visit.gives_values {
                (first_values, values_at) = (values, Some(index));
            }
            if is_taken(visits, index) {
                outputs[index] = Some(x.clone());
            }
        }

        // The head's tape gives the gradient of the last output.
        let leaf = tracked(x);
        let hidden = <Autodiff<P> as crate::ops::RmsNormOps>::rms_norm(leaf.clone(), self.plan.rms_eps);
        let sum = self.objective_of(hidden, Tensor::from_inner(targets), share);
        let value = sum.clone().inner();
        let grads = sum.backward();
        let mut grad = leaf.grad(&grads);

        let mut grad_embedding: Option<Tensor<P, 2>> = None;
        let mut grad_values: Option<Tensor<P, 4>> = None;
        let mut grad_outputs: Vec<Option<Tensor<P, 2>>> = vec![None; visits.len()];
        for (index, visit) in visits.iter().enumerate().rev() {
            let grad_y = plus(grad.take(), grad_outputs[index].take());
            let x = tracked(inputs.pop().expect("one input a visit"));
            let taped = Flow::<Autodiff<P>> {
                batch,
                rope: rope.clone(),
                values: flow.values.clone().map(tracked),
                x0: flow.x0.on(tracked(flow.x0.value())),
            };
            let skip = visit.skip.and_then(|skip| outputs[skip.from].clone()).map(tracked);
            let after = values_at.is_some_and(|at| at < index);
            let seen = first_values.clone().filter(|_| after).map(tracked);
            let mut stream = Stream::new(x.clone());
            let values = self.visit(visit, &mut stream, skip.clone(), &taped, seen.clone(), None);
            let mut sum = grad_y.map(|grad| dot(stream.value(), grad));
            if values_at == Some(index)
                && let (Some(values), Some(grad)) = (values, grad_values.take())
            {
                let part = dot(values, grad);
                sum = Some(match sum {
                    Some(sum) => sum + part,
                    None => part,
                });
            }
            let Some(sum) = sum else { continue };
            let grads = sum.backward();
            grad = x.grad(&grads);
            grad_embedding = plus(grad_embedding, taped.values.and_then(|values| values.grad(&grads)));
            grad_values = plus(grad_values, seen.and_then(|seen| seen.grad(&grads)));
            if let (Some(skip), Some(from)) = (skip, visit.skip) {
                let own = grad_outputs[from.from].take();
                grad_outputs[from.from] = plus(own, skip.grad(&grads));
            }
        }

        // The embedding's tape, from the gradients of the stream's start and of the value embedding.
        let ids = Tensor::<Autodiff<P>, 2, Int>::from_inner(ids);
        if let Some(grad) = plus(grad, flow.x0.take_gradient()) {
            dot(self.embed.forward::<Autodiff<P>>(ids.clone(), 0, None), grad).backward();
        }
        if let (Some(values), Some(grad)) = (self.embed.values::<Autodiff<P>>(ids), grad_embedding) {
            dot(values, grad).backward();
        }
        value
    }
}

fn tracked<P: Plain, const D: usize>(x: Tensor<P, D>) -> Tensor<Autodiff<P>, D> {
    Tensor::from_inner(x).require_grad()
}

/// `sum(y grad)`: what hands `grad` to a tape whose end is `y`.
fn dot<P: Plain, const D: usize>(y: Tensor<Autodiff<P>, D>, grad: Tensor<P, D>) -> Tensor<Autodiff<P>, 1> {
    let elements: usize = y.dims().iter().product();
    crate::ops::reduce::sum((y * Tensor::from_inner(grad)).reshape([elements]))
}

fn plus<P: Plain, const D: usize>(a: Option<Tensor<P, D>>, b: Option<Tensor<P, D>>) -> Option<Tensor<P, D>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}
