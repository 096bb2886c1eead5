//! The residual stream from one normed input to the next, as one op: branches added, the start mixed in, the norm.
//!
//! With rows `[n, c]`, `t = x + sum_i s_i y_i`, `z = m[0] t + m[1] x0` (or `t`), `n = scale / sqrt(mean(z^2) + eps) z`;
//! parameters `s_i[rows, c]` (or `[c]`), of which one row is taken, and `m[2, c]`. The outputs are `z`, and where they
//! are wanted `n` and `t`. What their gradients are is in [`super::residual`] and [`super::rms_norm`], of whose ops the
//! reference is made; a device with a kernel reads and writes each of the tensors once.
//!
//! Every block mixes with one and the same start: [`Start`] adds up what reaches it beside the tape, so that a device
//! adds to the sum in the pass that it makes anyway.

use super::tape::{primitive, record_many, tensor};
use super::{Autodiff, Base, Param, Plain, ResidualOps, RmsNormOps};
use burn::tensor::Tensor;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The most branches of one call.
pub const BRANCHES: usize = 2;

/// What is added to the stream: `s[row] value`.
#[derive(Debug, Clone)]
pub struct Branch<B: Base> {
    /// `y[n, c]`.
    pub value: Tensor<B, 2>,
    /// The parameter and its row; without it the branch is added as it is.
    pub scale: Option<(Param<B::Plain>, usize)>,
}

/// The stream's start, and the gradient that has reached it through mixing.
#[derive(Debug, Clone)]
pub struct Start<B: Base> {
    value: Tensor<B, 2>,
    gradient: Gradient<B::Plain>,
}

/// A sum that the backwards of one tape add to, the later blocks' first.
type Gradient<P> = Arc<Mutex<Option<Tensor<P, 2>>>>;

fn lock<P: Plain>(gradient: &Gradient<P>) -> MutexGuard<'_, Option<Tensor<P, 2>>> {
    // A panic while the lock was held leaves a whole tensor or none.
    gradient.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Base> Start<B> {
    /// A start whose gradient nothing but [`Self::take_gradient`] asks for.
    pub fn new(value: Tensor<B, 2>) -> Self {
        Self { value, gradient: Arc::default() }
    }

    /// `x0[n, c]`.
    pub fn value(&self) -> Tensor<B, 2> {
        self.value.clone()
    }

    /// The same start as `value`, a leaf of another tape, which adds to the same gradient; only
    /// [`Self::take_gradient`] gives it.
    pub fn on<A: Base<Plain = B::Plain>>(&self, value: Tensor<A, 2>) -> Start<A> {
        Start { value, gradient: self.gradient.clone() }
    }

    /// Takes the gradient that mixing has added up, if any has.
    pub fn take_gradient(&self) -> Option<Tensor<B::Plain, 2>> {
        lock(&self.gradient).take()
    }
}

/// Mixing with the start.
#[derive(Debug, Clone)]
pub struct Mix<B: Base> {
    /// `x0`.
    pub start: Start<B>,
    /// `m[2, c]`.
    pub weight: Param<B::Plain>,
}

/// The norm of what comes out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Added to the mean of squares.
    pub eps: f64,
    /// What the normed rows are multiplied by.
    pub scale: f64,
}

/// What comes in.
#[derive(Debug, Clone)]
pub struct Inputs<B: Base> {
    /// The stream `[n, c]`.
    pub x: Tensor<B, 2>,
    /// At most [`BRANCHES`].
    pub branches: Vec<Branch<B>>,
    /// Mixing, if any.
    pub mix: Option<Mix<B>>,
}

/// What comes out.
#[derive(Debug, Clone)]
pub struct Outputs<B: Base> {
    /// The stream after it, `z`.
    pub x: Tensor<B, 2>,
    /// `n`, if it was asked for.
    pub normed: Option<Tensor<B, 2>>,
    /// `t`, the stream before mixing, if it was asked for.
    pub added: Option<Tensor<B, 2>>,
}

/// What a backward needs of the forward.
#[derive(Debug, Clone)]
pub struct Seen<B: Base> {
    /// `t`, or with `adds` the `x` that it is made of again.
    pub x: Tensor<B, 2>,
    /// Whether the branches are yet to be added to `x`.
    pub adds: bool,
    /// The branches.
    pub branches: Vec<Branch<B>>,
    /// Mixing: `x0` and `m`.
    pub mix: Option<(Tensor<B, 2>, Param<B::Plain>)>,
    /// The norm.
    pub norm: Option<Norm>,
}

/// The gradients of the outputs, of those that anything has used.
#[derive(Debug, Clone)]
pub struct OutputGrads<B: Base> {
    /// Of `z`.
    pub x: Option<Tensor<B, 2>>,
    /// Of `n`.
    pub normed: Option<Tensor<B, 2>>,
    /// Of `t`.
    pub added: Option<Tensor<B, 2>>,
}

/// The gradients of the inputs; those of the parameters are in their buffers.
#[derive(Debug, Clone)]
pub struct InputGrads<B: Base> {
    /// Of `x`.
    pub x: Tensor<B, 2>,
    /// Of each branch's `y`.
    pub branches: Vec<Tensor<B, 2>>,
    /// Of `x0`, with mixing: added to what was given.
    pub start: Option<Tensor<B, 2>>,
}

/// The residual stream and its norm, forward and backward.
pub trait StreamOps: Base + ResidualOps + RmsNormOps {
    /// `z`, and where they are wanted `n` (`norm`) and `t` (`added`).
    fn stream(inputs: Inputs<Self>, norm: Option<Norm>, added: bool) -> Outputs<Self> {
        forward(inputs, norm, added)
    }

    /// The inputs' gradients from those of the outputs; `start` is the gradient of `x0` so far.
    fn stream_backward(
        seen: Seen<Self>,
        grads: OutputGrads<Self>,
        start: Option<Tensor<Self, 2>>,
    ) -> InputGrads<Self> {
        backward(seen, grads, start)
    }

    /// The stream's beginning at `x`: the stream, and the start that blocks mix with. (Used through the start alone, a
    /// tape gets the mixing's gradient in one piece.)
    fn stream_start(x: Tensor<Self, 2>) -> (Tensor<Self, 2>, Start<Self>) {
        (x.clone(), Start::new(x))
    }
}

/// The reference forward.
pub fn forward<B: Base + ResidualOps + RmsNormOps>(
    inputs: Inputs<B>,
    norm: Option<Norm>,
    added: bool,
) -> Outputs<B> {
    let Inputs { x, branches, mix } = inputs;
    let t = add(x, &branches);
    let added = added.then(|| t.clone());
    let x = match &mix {
        Some(mix) => B::residual_mix(t, mix.start.value(), &mix.weight),
        None => t,
    };
    let normed = norm.map(|norm| scaled(B::rms_norm(x.clone(), norm.eps), norm.scale));
    Outputs { x, normed, added }
}

/// The reference backward.
pub fn backward<B: Base + ResidualOps + RmsNormOps>(
    seen: Seen<B>,
    grads: OutputGrads<B>,
    start: Option<Tensor<B, 2>>,
) -> InputGrads<B> {
    let Seen { x, adds, branches, mix, norm } = seen;
    let t = if adds { add(x, &branches) } else { x };
    let through = match (norm, grads.normed) {
        (Some(norm), Some(grad)) => {
            let x = match &mix {
                Some((x0, weight)) => B::residual_mix(t.clone(), x0.clone(), weight),
                None => t.clone(),
            };
            Some(B::rms_norm_backward(x, scaled(grad, norm.scale), norm.eps))
        }
        _ => None,
    };
    let grad = plus(grads.x, through);
    let (grad, start) = match mix {
        Some((x0, weight)) => {
            let grad = grad.unwrap_or_else(|| t.zeros_like());
            let [grad, grad_start] = B::residual_mix_backward(t.clone(), x0, &weight, grad);
            (Some(grad), plus(Some(grad_start), start))
        }
        None => (grad, None),
    };
    let grad = plus(grad, grads.added).unwrap_or_else(|| t.zeros_like());
    // From the last one that was added to the first.
    let mut of_branches: Vec<_> = branches
        .into_iter()
        .rev()
        .map(|branch| match &branch.scale {
            Some((scale, row)) => B::scaled_add_backward(branch.value, scale, *row, grad.clone()),
            None => grad.clone(),
        })
        .collect();
    of_branches.reverse();
    InputGrads { x: grad, branches: of_branches, start }
}

fn add<B: Base + ResidualOps>(x: Tensor<B, 2>, branches: &[Branch<B>]) -> Tensor<B, 2> {
    assert!(branches.len() <= BRANCHES, "{} branches, expected at most {BRANCHES}", branches.len());
    branches.iter().fold(x, |x, branch| match &branch.scale {
        Some((scale, row)) => B::scaled_add(x, branch.value.clone(), scale, *row),
        None => x + branch.value.clone(),
    })
}

fn scaled<B: Base>(x: Tensor<B, 2>, scale: f64) -> Tensor<B, 2> {
    if scale == 1.0 { x } else { x.mul_scalar(scale) }
}

fn plus<B: Base>(a: Option<Tensor<B, 2>>, b: Option<Tensor<B, 2>>) -> Option<Tensor<B, 2>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}

impl<B: Plain> StreamOps for Autodiff<B> {
    fn stream(inputs: Inputs<Self>, norm: Option<Norm>, added: bool) -> Outputs<Self> {
        let Inputs { x, branches, mix } = inputs;
        if branches.is_empty() && mix.is_none() && norm.is_none() {
            return Outputs { added: added.then(|| x.clone()), x, normed: None };
        }
        // Without mixing, what is there before it is what comes out.
        let apart = added && mix.is_some();
        let x = primitive(x);
        let values: Vec<_> = branches.iter().map(|branch| primitive(branch.value.clone())).collect();
        let x0 = mix.as_ref().map(|mix| primitive(mix.start.value()));
        let plain = Inputs::<B> {
            x: tensor(x.primitive.clone()),
            branches: branches
                .into_iter()
                .map(|branch| Branch { value: branch.value.inner(), scale: branch.scale })
                .collect(),
            mix: mix.map(|mix| Mix { start: mix.start.on(mix.start.value().inner()), weight: mix.weight }),
        };
        let outputs = B::stream(plain.clone(), norm, apart);
        let (kept, adds) = match (&plain.mix, &outputs.added) {
            (None, _) => (outputs.x.clone(), false),
            (Some(_), Some(added)) => (added.clone(), false),
            (Some(_), None) => (plain.x.clone(), !plain.branches.is_empty()),
        };
        let gradient = plain.mix.as_ref().map(|mix| mix.start.gradient.clone());
        let has_branches = plain.branches.len();
        let seen = Seen {
            x: kept,
            adds,
            branches: plain.branches,
            mix: plain.mix.map(|mix| (mix.start.value, mix.weight)),
            norm,
        };
        let backward = move |grads: OutputGrads<B>| {
            let mut sum = gradient.as_ref().map(lock);
            let so_far = sum.as_mut().and_then(|sum| sum.take());
            let first = so_far.is_none();
            let grads = B::stream_backward(seen.clone(), grads, so_far);
            // The tape's own gradient of the start is only a sign that there is one.
            let sign = grads.start.clone().filter(|_| first).map(primitive);
            if let Some(sum) = sum.as_mut() {
                **sum = grads.start;
            }
            let mut branches = grads.branches.into_iter().map(primitive);
            [Some(primitive(grads.x)), branches.next(), branches.next(), sign]
        };
        let constant = || primitive(Tensor::<Self, 2>::from_inner(tensor(x.primitive.clone())));
        let mut values = values.into_iter();
        assert!(has_branches <= BRANCHES, "{has_branches} branches, expected at most {BRANCHES}");
        let [y0, y1] = [(); BRANCHES].map(|()| values.next().unwrap_or_else(constant));
        let x0 = x0.unwrap_or_else(constant);
        let parents = [x.clone(), y0, y1, x0];
        let Outputs { x: z, normed, added: t } = outputs;
        let of = |x, normed, added| OutputGrads {
            x: Option::map(x, tensor),
            normed: Option::map(normed, tensor),
            added: Option::map(added, tensor),
        };
        let [z, normed, t] = match (normed.map(primitive), t.map(primitive)) {
            (None, None) => {
                let [z] = record_many(parents, [primitive(z)], move |[x]| backward(of(x, None, None)));
                [Some(z), None, None]
            }
            (Some(n), None) => {
                let outputs = [primitive(z), n];
                let [z, n] = record_many(parents, outputs, move |[x, n]| backward(of(x, n, None)));
                [Some(z), Some(n), None]
            }
            (None, Some(t)) => {
                let outputs = [primitive(z), t];
                let [z, t] = record_many(parents, outputs, move |[x, t]| backward(of(x, None, t)));
                [Some(z), None, Some(t)]
            }
            (Some(n), Some(t)) => {
                let outputs = [primitive(z), n, t];
                record_many(parents, outputs, move |[x, n, t]| backward(of(x, n, t))).map(Some)
            }
        };
        let x: Tensor<Self, 2> = tensor(z.expect("every form has this output"));
        let t = t.map(tensor).or_else(|| added.then(|| x.clone()));
        Outputs { x, normed: normed.map(tensor), added: t }
    }

    fn stream_start(x: Tensor<Self, 2>) -> (Tensor<Self, 2>, Start<Self>) {
        let x = primitive(x);
        let value = x.primitive.clone();
        let gradient: Gradient<B> = Arc::default();
        let mixed = gradient.clone();
        let [x, x0] = record_many([x], [value.clone(), value], move |[grad, _]| {
            [plus(grad.map(tensor::<B, 2>), lock(&mixed).take()).map(primitive)]
        });
        (tensor(x), Start { value: tensor(x0), gradient })
    }
}
