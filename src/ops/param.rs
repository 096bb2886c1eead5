//! Parameters: a master value, the copy that the ops compute with, and a gradient that accumulates in place.

use super::tape::{primitive, rooted, tensor};
use super::update::Updated;
use super::weight_form::{self, WeightForm};
use super::{Autodiff, Base, Plain};
use burn::tensor::{DType, Tensor, TensorMetadata};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Primitive<B> = <B as burn::tensor::backend::BackendTypes>::FloatTensorPrimitive;

struct State<B: Plain> {
    value: Primitive<B>,
    compute: Computing<B>,
    form: WeightForm,
    /// Of the computing copy.
    grad: Option<Primitive<B>>,
}

/// A computing copy.
struct Computing<B: Plain> {
    tensor: Primitive<B>,
    /// No other has had this number.
    version: u64,
}

impl<B: Plain> Computing<B> {
    fn new(tensor: Primitive<B>) -> Self {
        static VERSIONS: AtomicU64 = AtomicU64::new(0);
        Self { tensor, version: VERSIONS.fetch_add(1, Ordering::Relaxed) }
    }
}

/// What was made of the computing copies of these versions.
struct Joint<B: Plain> {
    versions: Vec<u64>,
    made: Primitive<B>,
}

struct Inner<B: Plain> {
    name: String,
    shape: Vec<usize>,
    compute_type: DType,
    trainable: AtomicBool,
    watched: AtomicBool,
    state: Mutex<State<B>>,
    /// The sum of x^T x over the inputs x that a watched weight was applied to.
    gram: Mutex<Option<Primitive<B>>>,
    /// Of this parameter with others after it.
    joint: Mutex<Option<Joint<B>>>,
}

/// A named parameter on a device; a clone is another handle to the same one.
///
/// The master value and the gradient are f32 (f64 where the model computes in f64). The copy that ops compute with has
/// the activations' type and is made once for each new value; it may be a quantised form of it ([`WeightForm`]).
///
/// What the backwards accumulate is the gradient of the computing copy; every reader is given that of the master value.
pub struct Param<B: Plain>(Arc<Inner<B>>);

impl<B: Plain> Clone for Param<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Plain> fmt::Debug for Param<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Param({} {:?})", self.0.name, self.0.shape)
    }
}

fn flatten<B: Plain>(value: Primitive<B>) -> Tensor<B, 1> {
    let elements = value.shape().num_elements();
    tensor(B::float_reshape(value, [elements].into()))
}

impl<B: Plain> Param<B> {
    /// A parameter of the given master value; ops compute with a copy of type `compute_type`.
    pub fn new<const D: usize>(name: impl Into<String>, value: Tensor<B, D>, compute_type: DType) -> Self {
        let shape = value.dims().to_vec();
        let elements: usize = shape.iter().product();
        Self::of_shape(name, &shape, value.reshape([elements]), compute_type)
    }

    /// A parameter of any shape, a scalar's `[]` included, from one row of all elements.
    pub fn of_shape(
        name: impl Into<String>,
        shape: &[usize],
        flat: Tensor<B, 1>,
        compute_type: DType,
    ) -> Self {
        let param = Inner {
            name: name.into(),
            shape: shape.to_vec(),
            compute_type,
            trainable: AtomicBool::new(true),
            watched: AtomicBool::new(false),
            gram: Mutex::new(None),
            state: Mutex::new(State {
                value: primitive(flat.clone()),
                compute: Computing::new(primitive(flat.clone())),
                form: WeightForm::Full,
                grad: None,
            }),
            joint: Mutex::new(None),
        };
        let param = Self(Arc::new(param));
        param.set_flat(flat);
        param
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        // A panic while the lock was held leaves whole tensors behind: every write below is one assignment.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The peers' own name of the parameter (spec files).
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.0.shape.iter().product()
    }

    /// The sizes that the tensors have: a scalar is held as `[1]`.
    fn held(&self) -> Vec<usize> {
        if self.0.shape.is_empty() { vec![1] } else { self.0.shape.clone() }
    }

    fn is_matrix(&self) -> bool {
        self.0.shape.len() == 2
    }

    /// The master value. `D` must be the parameter's rank (1 for a scalar).
    pub fn value<const D: usize>(&self) -> Tensor<B, D> {
        tensor(self.state().value.clone())
    }

    /// The copy that ops compute with. `D` must be the parameter's rank (1 for a scalar).
    pub fn compute<const D: usize>(&self) -> Tensor<B, D> {
        tensor(self.state().compute.tensor.clone())
    }

    /// The computing copy as rows of the last size: `[n]` becomes `[1, n]`, `[1, m, n]` becomes `[m, n]`.
    pub fn compute_rows(&self) -> Tensor<B, 2> {
        let columns = self.0.shape.last().copied().unwrap_or(1);
        let rows = self.numel() / columns;
        tensor(B::float_reshape(self.state().compute.tensor.clone(), [rows, columns].into()))
    }

    /// What `make` makes of the computing copies of several parameters, kept until one of them has a new copy.
    pub fn joint<const N: usize>(
        params: [&Self; N],
        make: impl FnOnce([Primitive<B>; N]) -> Primitive<B>,
    ) -> Primitive<B> {
        let read = params.map(|param| {
            let state = param.state();
            (state.compute.version, state.compute.tensor.clone())
        });
        let versions = read.each_ref().map(|(version, _)| *version);
        let mut joint = params[0].0.joint.lock().unwrap_or_else(PoisonError::into_inner);
        match &*joint {
            Some(joint) if joint.versions == versions => joint.made.clone(),
            _ => {
                let made = make(read.map(|(_, compute)| compute));
                *joint = Some(Joint { versions: versions.to_vec(), made: made.clone() });
                made
            }
        }
    }

    /// The master value as one row of all elements.
    pub fn flat(&self) -> Tensor<B, 1> {
        flatten(self.state().value.clone())
    }

    /// The accumulated gradient as one row of all elements.
    pub fn flat_grad(&self) -> Option<Tensor<B, 1>> {
        let (grad, value, form) = {
            let state = self.state();
            (state.grad.clone()?, state.value.clone(), state.form)
        };
        Some(self.master_grad(grad, value, form))
    }

    /// The gradient of the master value from that of the computing copy.
    fn master_grad(&self, grad: Primitive<B>, value: Primitive<B>, form: WeightForm) -> Tensor<B, 1> {
        if !self.is_matrix() || form == WeightForm::Full {
            return flatten(grad);
        }
        let grad = weight_form::gradient(tensor::<B, 2>(value), tensor::<B, 2>(grad), form);
        flatten(primitive(grad))
    }

    /// Takes the accumulated gradient as one row of all elements and leaves none.
    pub fn take_flat_grad(&self) -> Option<Tensor<B, 1>> {
        let grad = self.flat_grad();
        self.clear_grad();
        grad
    }

    /// Replaces the master value by one row of all elements and refreshes the computing copy.
    pub fn set_flat(&self, value: Tensor<B, 1>) {
        assert_eq!(value.dims(), [self.numel()], "a new value of another size for {}", self.name());
        let held = self.held();
        let form = self.state().form;
        let value = B::float_reshape(primitive(value), held.into());
        let compute = self.copy_of(value.clone(), form);
        let mut state = self.state();
        state.value = value;
        state.compute = Computing::new(compute);
    }

    /// The type of the computing copy where that is a cast of the master value: not where it is the value itself, or a
    /// quantised form of it.
    pub fn copy_type(&self) -> Option<DType> {
        let state = self.state();
        let is_cast = !self.is_matrix() || state.form == WeightForm::Full;
        (is_cast && state.value.dtype() != self.0.compute_type).then_some(self.0.compute_type)
    }

    /// Replaces the master value, and the computing copy by the one that came with it, if any did.
    pub fn set_updated<const D: usize>(&self, updated: Updated<B, D>) {
        let Updated { value, copy } = updated;
        let copy = copy.filter(|copy| self.copy_type() == Some(copy.dtype()));
        let Some(copy) = copy else { return self.set_flat(flatten(primitive(value))) };
        let held = self.held();
        assert_eq!(
            value.shape().num_elements(),
            self.numel(),
            "a new value of another size for {}",
            self.name()
        );
        let mut state = self.state();
        state.value = B::float_reshape(primitive(value), held.clone().into());
        state.compute = Computing::new(B::float_reshape(primitive(copy), held.into()));
    }

    /// The computing copy of a master value.
    fn copy_of(&self, value: Primitive<B>, form: WeightForm) -> Primitive<B> {
        let value = match form {
            form if form != WeightForm::Full && self.is_matrix() => {
                primitive(weight_form::apply(tensor::<B, 2>(value), form))
            }
            _ => value,
        };
        if value.dtype() == self.0.compute_type {
            return value;
        }
        let shape = value.shape();
        B::float_reshape(primitive(flatten::<B>(value).cast(self.0.compute_type)), shape)
    }

    /// The form of the computing copy.
    pub fn form(&self) -> WeightForm {
        self.state().form
    }

    /// Changes the form of the computing copy. Only matrices have other forms than the full one.
    pub fn set_form(&self, form: WeightForm) {
        if self.is_matrix() && self.form() != form {
            let compute = self.copy_of(self.state().value.clone(), form);
            let mut state = self.state();
            state.form = form;
            state.compute = Computing::new(compute);
        }
    }

    /// Uninitialised memory of the value's size.
    pub fn reserve(&self) -> Tensor<B, 1> {
        let value = self.flat();
        Tensor::empty([self.numel()], (&value.device(), value.dtype()))
    }

    /// The type of the master value, the gradient and the optimizers' state.
    pub fn master_type(&self) -> DType {
        self.state().value.dtype()
    }

    /// Replaces the master value and refreshes the computing copy.
    pub fn set<const D: usize>(&self, value: Tensor<B, D>) {
        assert_eq!(value.dims().as_slice(), self.held(), "a new value of another shape for {}", self.name());
        self.set_flat(flatten(primitive(value)));
    }

    /// Whether a backward adds to the gradient (a frozen parameter's is neither computed nor kept).
    pub fn is_trainable(&self) -> bool {
        self.0.trainable.load(Ordering::Relaxed)
    }

    /// Freezes the parameter, or lets it train again.
    pub fn set_trainable(&self, trainable: bool) {
        self.0.trainable.store(trainable, Ordering::Relaxed);
    }

    /// Whether the inputs of a linear layer with this weight are summed up ([`Self::observe`]).
    pub fn is_watched(&self) -> bool {
        self.0.watched.load(Ordering::Relaxed)
    }

    /// Begins to sum up the inputs of a linear layer with this weight, or ends it.
    pub fn set_watched(&self, watched: bool) {
        self.0.watched.store(watched, Ordering::Relaxed);
    }

    /// Adds x^T x of inputs `x[n, i]` to the sum, in f32 (f64 for f64): what calibration reads ([`Self::take_gram`]).
    pub fn observe(&self, x: Tensor<B, 2>) {
        let wide = super::accumulate_type(x.dtype());
        let product = B::matmul_as(x.clone().transpose(), x, wide);
        let mut gram = self.0.gram.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = match gram.take() {
            Some(sum) => tensor::<B, 2>(sum) + product,
            None => product,
        };
        *gram = Some(primitive(sum));
    }

    /// Takes the sum over the inputs seen, `[i, i]`, and leaves none.
    pub fn take_gram(&self) -> Option<Tensor<B, 2>> {
        self.0.gram.lock().unwrap_or_else(PoisonError::into_inner).take().map(tensor)
    }

    /// The accumulated gradient, if any backward has reached the parameter. `D` must be the parameter's rank.
    pub fn grad<const D: usize>(&self) -> Option<Tensor<B, D>> {
        self.flat_grad().map(|grad| tensor(B::float_reshape(primitive(grad), self.held().into())))
    }

    /// Takes the accumulated gradient and leaves none. `D` must be the parameter's rank.
    pub fn take_grad<const D: usize>(&self) -> Option<Tensor<B, D>> {
        let grad = self.grad();
        self.clear_grad();
        grad
    }

    /// Drops the accumulated gradient.
    pub fn clear_grad(&self) {
        self.state().grad = None;
    }

    /// Adds the computing copy's gradient into the buffer, in the master value's type; in place where the buffer is
    /// not shared.
    pub fn accumulate<const D: usize>(&self, grad: Tensor<B, D>) {
        self.accumulate_flat(flatten(primitive(grad)));
    }

    /// [`Self::accumulate`] of one row of all elements.
    pub fn accumulate_flat(&self, grad: Tensor<B, 1>) {
        assert_eq!(grad.dims(), [self.numel()], "a gradient of another size for {}", self.name());
        let held = self.held();
        let mut state = self.state();
        let grad = grad.cast(state.value.dtype());
        let sum = match state.grad.take() {
            Some(sum) => flatten::<B>(sum) + grad,
            None => grad,
        };
        state.grad = Some(B::float_reshape(primitive(sum), held.into()));
    }

    /// Lets `add` add into the gradient buffers of one parameter, or of several different ones at once: it is given those
    /// that there are, no other reference to them kept here, and gives them all back, in the parameters' sizes and the
    /// master values' type. For kernels that add in the pass that they make anyway.
    pub fn accumulate_with<const N: usize>(
        params: [&Self; N],
        add: impl FnOnce([Option<Primitive<B>>; N]) -> [Primitive<B>; N],
    ) {
        let sums = add(params.map(|param| param.state().grad.take()));
        for (param, sum) in params.into_iter().zip(sums) {
            debug_assert_eq!(sum.shape().num_elements(), param.numel(), "a gradient of {}", param.name());
            param.state().grad = Some(sum);
        }
    }

    /// Whether both are the same parameter.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Adds `grad` (`[rows.len(), n]`) into rows of the gradient buffer, rows as [`Self::compute_rows`] has them.
    pub fn accumulate_rows(&self, rows: Range<usize>, grad: Tensor<B, 2>) {
        let columns = self.0.shape.last().copied().unwrap_or(1);
        let all = self.numel() / columns;
        if rows.len() == all {
            return self.accumulate(grad);
        }
        let held = self.held();
        let mut state = self.state();
        let dtype = state.value.dtype();
        let sum: Tensor<B, 2> = match state.grad.take() {
            Some(sum) => tensor(B::float_reshape(sum, [all, columns].into())),
            None => Tensor::zeros([all, columns], (&grad.device(), dtype)),
        };
        let grad = sum.clone().slice([rows.clone(), 0..columns]) + grad.cast(dtype);
        let sum = sum.slice_assign([rows, 0..columns], grad);
        state.grad = Some(B::float_reshape(primitive(sum), held.into()));
    }
}

/// Parameters as tensors of an expression, for what is composed of Burn's ops.
pub trait ParamOps: Base {
    /// The computing copy in the given sizes.
    fn weight<const D: usize>(param: &Param<Self::Plain>, dims: [usize; D]) -> Tensor<Self, D> {
        Self::lift(flatten::<Self::Plain>(param.state().compute.tensor.clone()).reshape(dims))
    }

    /// The master value (f32, or f64 where the model computes in f64) in the given sizes. Of a full form only.
    fn master<const D: usize>(param: &Param<Self::Plain>, dims: [usize; D]) -> Tensor<Self, D> {
        Self::lift(flatten::<Self::Plain>(param.state().value.clone()).reshape(dims))
    }
}

impl<B: Plain> ParamOps for Autodiff<B> {
    fn weight<const D: usize>(param: &Param<B>, dims: [usize; D]) -> Tensor<Self, D> {
        hung(param, B::weight(param, dims))
    }

    fn master<const D: usize>(param: &Param<B>, dims: [usize; D]) -> Tensor<Self, D> {
        hung(param, B::master(param, dims))
    }
}

/// A parameter's value whose gradient goes to the parameter's buffer.
fn hung<B: Plain, const D: usize>(param: &Param<B>, value: Tensor<B, D>) -> Tensor<Autodiff<B>, D> {
    if !param.is_trainable() {
        return Tensor::from_inner(value);
    }
    let param = param.clone();
    rooted(value, move |grad| param.accumulate(grad))
}
