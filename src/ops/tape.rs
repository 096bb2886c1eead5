//! The glue between the fused ops and Burn's differentiation: one node type for all of them.

use super::update::round_bf16;
use super::{Autodiff, Base, Plain};
use burn::tensor::{Shape, Tensor, TensorMetadata, TensorPrimitive};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::NoCheckpointing;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// A float tensor of any rank, as Burn's backends hold it.
type Primitive<B> = <B as burn::tensor::backend::BackendTypes>::FloatTensorPrimitive;

/// From the output's gradient to one gradient per parent; none where nothing is to be added to a parent's.
type Step<B, const N: usize> = dyn Fn(Primitive<B>) -> [Option<Primitive<B>>; N] + Send + Sync;

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
            if let (Some(parent), Some(grad)) = (parent, grad) {
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
    tensor(node(parents, primitive(output), move |grad| backward(tensor(grad)).map(Some)))
}

thread_local! {
    static ROUNDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `forward` with the output of every op that it records, and the gradients that the op's backward will give,
/// rounded to bf16: the error that a reference itself makes in bf16, on devices without that type (DESIGN.md, parity
/// rule). Ops of several parts are on the tape part by part. Gradients of parameters add up unrounded.
pub fn rounded<T>(forward: impl FnOnce() -> T) -> T {
    struct Restored(bool);
    impl Drop for Restored {
        fn drop(&mut self) {
            ROUNDED.set(self.0);
        }
    }
    let restored = Restored(ROUNDED.replace(true));
    let result = forward();
    drop(restored);
    result
}

/// Whether [`rounded`] runs: ops of several parts then leave the tape to these.
pub(super) fn rounds() -> bool {
    ROUNDED.get()
}

/// The value as an op leaves it.
fn kept<B: Plain>(x: Primitive<B>, rounds: bool) -> Primitive<B> {
    if !rounds {
        return x;
    }
    let shape = x.shape();
    let flat = B::float_reshape(x, Shape::new([shape.num_elements()]));
    B::float_reshape(primitive(round_bf16(tensor::<B, 1>(flat))), shape)
}

fn node<B: Plain, const N: usize>(
    parents: [Primitive<Autodiff<B>>; N],
    output: Primitive<B>,
    backward: impl Fn(Primitive<B>) -> [Option<Primitive<B>>; N] + Send + Sync + 'static,
) -> Primitive<Autodiff<B>> {
    let rounds = rounds();
    let output = kept::<B>(output, rounds);
    let backward = move |grad| backward(grad).map(|grad| Some(kept::<B>(grad?, rounds)));
    let nodes = parents.each_ref().map(|parent| parent.node.clone());
    let prepared =
        <Node as Backward<B, N>>::prepare::<NoCheckpointing>(Node, nodes).compute_bound().stateful();
    match prepared {
        OpsKind::Tracked(prep) => prep.finish(Closure(Arc::new(backward)), output),
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

/// Records several `outputs` as computed together from `parents`: `backward` is called once, with the gradient of each
/// output that anything has used.
///
/// Each output is a node under one hub, which the tape reaches after all of them: they leave their gradients beside the
/// tape, and the first of them calls the hub.
pub(super) fn record_many<B: Plain, const N: usize, const M: usize>(
    parents: [Primitive<Autodiff<B>>; N],
    outputs: [Primitive<B>; M],
    backward: impl Fn([Option<Primitive<B>>; M]) -> [Option<Primitive<B>>; N] + Send + Sync + 'static,
) -> [Primitive<Autodiff<B>>; M] {
    let grads: Arc<Mutex<[Option<Primitive<B>>; M]>> = Arc::new(Mutex::new(std::array::from_fn(|_| None)));
    let left = grads.clone();
    // The hub's own output and gradient are never looked at.
    let hub = node(parents, outputs[0].clone(), move |call| {
        drop(call);
        let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
        backward(left.each_mut().map(Option::take))
    });
    let mut index = 0;
    outputs.map(|output| {
        let (place, grads) = (index, grads.clone());
        index += 1;
        node([hub.clone()], output, move |grad| {
            let mut grads = grads.lock().unwrap_or_else(PoisonError::into_inner);
            let first = grads.iter().all(Option::is_none);
            grads[place] = Some(grad.clone());
            [first.then_some(grad)]
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use burn::tensor::TensorData;

    type Tracked = Tensor<Autodiff<Cpu>, 1>;

    /// `(2 x, 3 x)`, whose backward counts its calls and the gradients that it gets.
    fn twice_and_thrice(x: Tracked, seen: Arc<Mutex<Vec<[bool; 2]>>>) -> [Tracked; 2] {
        let x = primitive(x);
        let plain: Tensor<Cpu, 1> = tensor(x.primitive.clone());
        let outputs = [2.0, 3.0].map(|factor| primitive(plain.clone().mul_scalar(factor)));
        record_many([x], outputs, move |grads: [Option<Primitive<Cpu>>; 2]| {
            seen.lock().unwrap().push(grads.each_ref().map(Option::is_some));
            let parts = grads
                .into_iter()
                .zip([2.0, 3.0])
                .filter_map(|(grad, factor)| Some(tensor::<Cpu, 1>(grad?).mul_scalar(factor)));
            [parts.reduce(|a, b| a + b).map(primitive)]
        })
        .map(tensor)
    }

    fn gradient(loss: impl Fn([Tracked; 2], Tracked) -> Tracked) -> (Vec<f64>, Vec<[bool; 2]>) {
        let device = Default::default();
        let leaf = Tensor::<Cpu, 1>::from_data(TensorData::new(vec![1.0f32, -2.0], [2]), &device);
        let x = Tracked::from_inner(leaf).require_grad();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let outputs = twice_and_thrice(x.clone(), seen.clone());
        let grads = loss(outputs, x.clone()).sum().backward();
        let grad = x.grad(&grads).unwrap().into_data().iter::<f64>().collect();
        let seen = seen.lock().unwrap().clone();
        (grad, seen)
    }

    #[test]
    fn outputs_recorded_together_have_one_backward() {
        // Both; both and the input; one; one that the other follows from.
        assert_eq!(gradient(|[a, b], _| a * b), (vec![12.0, -24.0], vec![[true, true]]));
        assert_eq!(gradient(|[a, b], x| a * x + b), (vec![4.0 + 3.0, -8.0 + 3.0], vec![[true, true]]));
        assert_eq!(gradient(|[_, b], _| b.clone() * b), (vec![18.0, -36.0], vec![[false, true]]));
        assert_eq!(gradient(|[a, _], _| a), (vec![2.0, 2.0], vec![[true, false]]));
    }

    #[test]
    fn outputs_and_gradients_are_rounded_where_that_is_asked_for() {
        // 0.3 and 2 in bf16's 8 bits: 0.30078125; the gradient 0.7 as 0.69921875.
        let device = Default::default();
        let values = |x: Tensor<Cpu, 2>| x.into_data().iter::<f64>().collect::<Vec<_>>();
        let run = || {
            let leaf = Tensor::<Cpu, 2>::from_data(TensorData::new(vec![0.3f32, 2.0], [2, 1]), &device);
            let x = Tensor::<Autodiff<Cpu>, 2>::from_inner(leaf).require_grad();
            let y = unary(x.clone(), |x| x, |_, grad| grad);
            let grads = y.clone().mul_scalar(0.7).sum().backward();
            (values(y.inner()), values(x.grad(&grads).unwrap()))
        };
        let (y, grad) = rounded(run);
        assert_eq!((y, grad), (vec![0.30078125, 2.0], vec![0.69921875; 2]));
        let (y, grad) = run();
        assert_eq!((y[0] as f32, grad[1] as f32), (0.3, 0.7));
    }

    #[test]
    fn outputs_of_constants_are_constants() {
        let device = Default::default();
        let x = Tracked::from_inner(Tensor::<Cpu, 1>::ones([2], &device));
        let [a, b] = twice_and_thrice(x, Arc::default());
        assert!(!a.is_require_grad() && !b.is_require_grad());
        assert_eq!(b.into_data().iter::<f64>().collect::<Vec<_>>(), [3.0, 3.0]);
    }
}
