//! The glue between the fused ops and Burn's differentiation: one node type for all of them.

use super::{Autodiff, Base, Plain};
use burn::tensor::{Tensor, TensorPrimitive};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::NoCheckpointing;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use std::fmt;
use std::sync::Arc;

/// A float tensor of any rank, as Burn's backends hold it.
type Primitive<B> = <B as burn::tensor::backend::BackendTypes>::FloatTensorPrimitive;

/// From the output's gradient to one gradient per parent.
type Step<B, const N: usize> = dyn Fn(Primitive<B>) -> [Primitive<B>; N] + Send + Sync;

struct Closure<B: Plain, const N: usize>(Arc<Step<B, N>>);

impl<B: Plain, const N: usize> Clone for Closure<B, N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Plain, const N: usize> fmt::Debug for Closure<B, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("backward")
    }
}

#[derive(Debug)]
struct Node;

impl<B: Plain, const N: usize> Backward<B, N> for Node {
    type State = Closure<B, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let grads_of_parents = (ops.state.0)(grad);
        for (parent, grad) in ops.parents.into_iter().zip(grads_of_parents) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

/// A tracked tensor's primitive.
pub(super) fn primitive<B: Base, const D: usize>(tensor: Tensor<B, D>) -> Primitive<B> {
    tensor.into_primitive().tensor()
}

/// A primitive as a tensor of rank `D`.
pub(super) fn tensor<B: Base, const D: usize>(primitive: Primitive<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// Records `output` as computed from `parents`, with `backward` giving the parents' gradients from the output's.
pub(super) fn record<B: Plain, const O: usize, const N: usize>(
    parents: [Primitive<Autodiff<B>>; N],
    output: Tensor<B, O>,
    backward: impl Fn(Tensor<B, O>) -> [Primitive<B>; N] + Send + Sync + 'static,
) -> Tensor<Autodiff<B>, O> {
    let output = primitive(output);
    let nodes = parents.each_ref().map(|parent| parent.node.clone());
    let prepared =
        <Node as Backward<B, N>>::prepare::<NoCheckpointing>(Node, nodes).compute_bound().stateful();
    tensor(match prepared {
        OpsKind::Tracked(prep) => prep.finish(Closure(Arc::new(move |grad| backward(tensor(grad)))), output),
        OpsKind::UnTracked(prep) => prep.finish(output),
    })
}

/// An op of one tracked input: `forward` on the plain value, `backward(input, output gradient)`.
pub(super) fn unary<B: Plain, const I: usize, const O: usize>(
    x: Tensor<Autodiff<B>, I>,
    forward: impl FnOnce(Tensor<B, I>) -> Tensor<B, O>,
    backward: impl Fn(Tensor<B, I>, Tensor<B, O>) -> Tensor<B, I> + Send + Sync + 'static,
) -> Tensor<Autodiff<B>, O> {
    let x = primitive(x);
    let input: Tensor<B, I> = tensor(x.primitive.clone());
    let output = forward(input.clone());
    record([x], output, move |grad| [primitive(backward(input.clone(), grad))])
}

/// An op whose inputs are not tracked but whose weights have gradients (an embedding) hangs on a leaf of its own.
pub(super) fn rooted<B: Plain, const O: usize>(
    output: Tensor<B, O>,
    backward: impl Fn(Tensor<B, O>) + Send + Sync + 'static,
) -> Tensor<Autodiff<B>, O> {
    let leaf = Tensor::<B, 1>::zeros([1], (&output.device(), output.dtype()));
    let anchor = Tensor::<Autodiff<B>, 1>::from_inner(leaf.clone()).require_grad();
    record([primitive(anchor)], output, move |grad| {
        backward(grad);
        [primitive(leaf.clone())]
    })
}
