//! Parameters: a master value, the copy that the ops compute with, and a gradient that accumulates in place.

use super::Plain;
use super::tape::{primitive, tensor};
use burn::tensor::{DType, Tensor, TensorMetadata};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Primitive<B> = <B as burn::tensor::backend::BackendTypes>::FloatTensorPrimitive;

struct State<B: Plain> {
    value: Primitive<B>,
    compute: Primitive<B>,
    grad: Option<Primitive<B>>,
}

struct Inner<B: Plain> {
    name: String,
    shape: Vec<usize>,
    compute_type: DType,
    trainable: AtomicBool,
    state: Mutex<State<B>>,
}

/// A named parameter on a device; a clone is another handle to the same one.
///
/// The master value and the gradient are f32 (f64 where the model computes in f64). The copy that ops compute with has
/// the activations' type and is made once for each new value.
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

fn cast<B: Plain, const D: usize>(value: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    value.cast(dtype)
}

fn flatten<B: Plain>(value: Primitive<B>) -> Tensor<B, 1> {
    let elements = value.shape().num_elements();
    tensor(B::float_reshape(value, [elements].into()))
}

impl<B: Plain> Param<B> {
    /// A parameter of the given master value; ops compute with a copy of type `compute_type`.
    pub fn new<const D: usize>(name: impl Into<String>, value: Tensor<B, D>, compute_type: DType) -> Self {
        let shape = value.dims().to_vec();
        let compute = primitive(cast(value.clone(), compute_type));
        let state = State { value: primitive(value), compute, grad: None };
        Self(Arc::new(Inner {
            name: name.into(),
            shape,
            compute_type,
            trainable: AtomicBool::new(true),
            state: Mutex::new(state),
        }))
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

    /// The master value. `D` must be the parameter's rank.
    pub fn value<const D: usize>(&self) -> Tensor<B, D> {
        tensor(self.state().value.clone())
    }

    /// The copy that ops compute with.
    pub fn compute<const D: usize>(&self) -> Tensor<B, D> {
        tensor(self.state().compute.clone())
    }

    /// The computing copy as rows: `[n]` becomes `[1, n]`, a matrix stays.
    pub fn compute_rows(&self) -> Tensor<B, 2> {
        if self.0.shape.len() == 2 {
            return self.compute();
        }
        let columns = self.numel();
        self.compute::<1>().reshape([1, columns])
    }

    /// The master value as one row of all elements.
    pub fn flat(&self) -> Tensor<B, 1> {
        flatten(self.state().value.clone())
    }

    /// The accumulated gradient as one row of all elements.
    pub fn flat_grad(&self) -> Option<Tensor<B, 1>> {
        self.state().grad.clone().map(flatten)
    }

    /// Takes the accumulated gradient as one row of all elements and leaves none.
    pub fn take_flat_grad(&self) -> Option<Tensor<B, 1>> {
        self.state().grad.take().map(flatten)
    }

    /// Replaces the master value by one row of all elements and refreshes the computing copy.
    pub fn set_flat(&self, value: Tensor<B, 1>) {
        assert_eq!(value.dims(), [self.numel()], "a new value of another size for {}", self.name());
        let compute = primitive(cast(value.clone(), self.0.compute_type));
        let shape = || self.0.shape.clone().into();
        let mut state = self.state();
        state.value = B::float_reshape(primitive(value), shape());
        state.compute = B::float_reshape(compute, shape());
    }

    /// The type of the master value, the gradient and the optimizers' state.
    pub fn master_type(&self) -> DType {
        self.state().value.dtype()
    }

    /// Replaces the master value and refreshes the computing copy.
    pub fn set<const D: usize>(&self, value: Tensor<B, D>) {
        assert_eq!(value.dims().as_slice(), self.shape(), "a new value of another shape for {}", self.name());
        let compute = primitive(cast(value.clone(), self.0.compute_type));
        let mut state = self.state();
        state.value = primitive(value);
        state.compute = compute;
    }

    /// Whether a backward adds to the gradient (a frozen parameter's is neither computed nor kept).
    pub fn is_trainable(&self) -> bool {
        self.0.trainable.load(Ordering::Relaxed)
    }

    /// Freezes the parameter, or lets it train again.
    pub fn set_trainable(&self, trainable: bool) {
        self.0.trainable.store(trainable, Ordering::Relaxed);
    }

    /// The accumulated gradient, if any backward has reached the parameter.
    pub fn grad<const D: usize>(&self) -> Option<Tensor<B, D>> {
        self.state().grad.clone().map(tensor)
    }

    /// Takes the accumulated gradient and leaves none.
    pub fn take_grad<const D: usize>(&self) -> Option<Tensor<B, D>> {
        self.state().grad.take().map(tensor)
    }

    /// Drops the accumulated gradient.
    pub fn clear_grad(&self) {
        self.state().grad = None;
    }

    /// Adds `grad` into the gradient buffer, in the master value's type; in place where the buffer is not shared.
    pub fn accumulate<const D: usize>(&self, grad: Tensor<B, D>) {
        let mut state = self.state();
        let grad = cast(grad, tensor::<B, D>(state.value.clone()).dtype());
        let sum = match state.grad.take() {
            Some(sum) => tensor::<B, D>(sum) + grad,
            None => grad,
        };
        state.grad = Some(primitive(sum));
    }

    /// Adds `grad` (`[rows.len(), n]`) into rows of the gradient buffer; a vector `[n]` has the one row 0.
    pub fn accumulate_rows(&self, rows: Range<usize>, grad: Tensor<B, 2>) {
        match *self.shape() {
            [columns] => self.accumulate::<1>(grad.reshape([columns])),
            [all, columns] if rows.len() == all => self.accumulate::<2>(grad.reshape([all, columns])),
            [all, columns] => {
                let mut state = self.state();
                let value: Tensor<B, 2> = tensor(state.value.clone());
                let sum: Tensor<B, 2> = match state.grad.take() {
                    Some(sum) => tensor(sum),
                    None => Tensor::zeros([all, columns], (&value.device(), value.dtype())),
                };
                let grad = sum.clone().slice([rows.clone(), 0..columns]) + cast(grad, value.dtype());
                state.grad = Some(primitive(sum.slice_assign([rows, 0..columns], grad)));
            }
            _ => unreachable!("rows of a parameter of rank {}", self.shape().len()),
        }
    }
}
