//! Linear layers on CUDA: weight gradients added in place, several projections of one input as one product, and the
//! squared MLP with its activation in the products' epilogues.

use super::cuda::Cuda;
use super::cuda_matmul::{Epilogue, product, product_added, product_with, takes_factor};
use super::launch_cuda::{Arguments, CudaKernel, launch_strided};
use super::source::Source;
use super::tensor::{LOAD_BYTES, empty, primitive, tensor};
use super::views::{columns, one_under_the_other, rows, side_by_side};
use crate::ops::linear::backward_one_by_one;
use crate::ops::mlp::{self, Hidden};
use crate::ops::{LinearOps, MlpOps, Param};
use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{DType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cubecl::zspace::metadata::Metadata;

type Matrix = CubeTensor<CudaRuntime>;

impl LinearOps for Cuda {
    const JOINS_PROJECTIONS: bool = true;

    fn project_backward(x: Tensor<Self, 2>, w: &Param<Self>, grad: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let grad = matching(grad, x.dtype());
        let x = primitive(x);
        let weight = primitive(w.compute::<2>());
        accumulate(w, &x, &grad);
        let grad_x = empty(&x, sizes(&x), x.dtype);
        any_product(&grad, &weight, &grad_x);
        tensor(grad_x)
    }

    fn project_many<const N: usize>(x: Tensor<Self, 2>, weights: [&Param<Self>; N]) -> [Tensor<Self, 2>; N] {
        let x = primitive(x);
        if !joins(&x, &weights) {
            return weights.map(|w| Self::project(tensor(x.clone()), w));
        }
        let packed = packed(weights);
        let y = empty(&x, [sizes(&x)[0], sizes(&packed)[0]], x.dtype);
        product(&x, &transposed(&packed), &y);
        let mut from = 0;
        weights.map(|w| {
            let width = w.shape()[0];
            from += width;
            tensor(columns(&y, from - width, width))
        })
    }

    fn project_many_backward<const N: usize>(
        x: Tensor<Self, 2>,
        weights: [&Param<Self>; N],
        grads: [Option<Tensor<Self, 2>>; N],
    ) -> Option<Tensor<Self, 2>> {
        let input = primitive(x.clone());
        if !joins(&input, &weights) || grads.iter().all(Option::is_none) {
            return backward_one_by_one(x, weights, grads);
        }
        let x = input;
        let grads = grads.map(|grad| grad.map(|grad| matching(grad, x.dtype)));
        let there = grads.each_ref().map(Option::is_some);
        let grad = beside(&x, grads, weights.map(|w| w.shape()[0]));
        let packed = packed(weights);
        if there.iter().all(|there| *there) && weights.iter().all(|w| w.is_trainable()) {
            accumulate_all(weights, &x, &grad);
        } else {
            let mut from = 0;
            for (w, there) in weights.into_iter().zip(there) {
                let width = w.shape()[0];
                if there {
                    accumulate(w, &x, &columns(&grad, from, width));
                }
                from += width;
            }
        }
        let grad_x = empty(&x, sizes(&x), x.dtype);
        product(&grad, &packed, &grad_x);
        Some(tensor(grad_x))
    }
}

impl MlpOps for Cuda {
    fn squared_mlp_forward(
        x: Tensor<Self, 2>,
        inner: &Param<Self>,
        last: &Param<Self>,
        slope: f64,
    ) -> (Tensor<Self, 2>, Hidden<Self>) {
        let rows = primitive(x.clone());
        if !takes_factor(&rows) || inner.is_watched() {
            return mlp::forward(x, inner, last, slope);
        }
        let weight = transposed(&primitive(inner.compute::<2>()));
        let hidden = || empty(&rows, [sizes(&rows)[0], inner.shape()[0]], rows.dtype);
        let activated = hidden();
        let before = (slope != 0.0).then(hidden);
        let epilogue = match &before {
            Some(before) => Epilogue::LeakySquared(slope, before),
            None => Epilogue::Squared,
        };
        product_with(&rows, &weight, &activated, epilogue);
        let activated = tensor(activated);
        (Self::project(activated.clone(), last), Hidden { before: before.map(tensor), activated })
    }

    fn squared_mlp_backward(
        x: Tensor<Self, 2>,
        hidden: Hidden<Self>,
        inner: &Param<Self>,
        last: &Param<Self>,
        slope: f64,
        grad: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        if !takes_factor(&primitive(x.clone())) {
            return mlp::backward(x, hidden, inner, last, slope, grad);
        }
        let grad = matching(grad, x.dtype());
        let (activated, before) = (primitive(hidden.activated), hidden.before.map(primitive));
        accumulate(last, &activated, &grad);
        let epilogue = match &before {
            Some(before) => Epilogue::LeakySquaredBackward(slope, before),
            None => Epilogue::SquaredBackward(&activated),
        };
        let grad_hidden = empty(&activated, sizes(&activated), activated.dtype);
        product_with(&grad, &primitive(last.compute::<2>()), &grad_hidden, epilogue);
        Self::project_backward(x, inner, tensor(grad_hidden))
    }
}

fn sizes(x: &Matrix) -> [usize; 2] {
    [x.meta.shape()[0], x.meta.shape()[1]]
}

/// A gradient in the type of what it is the gradient of.
fn matching(grad: Tensor<Cuda, 2>, dtype: DType) -> Matrix {
    primitive(if grad.dtype() == dtype { grad } else { grad.cast(dtype) })
}

fn transposed(x: &Matrix) -> Matrix {
    let [rows, columns] = sizes(x);
    let strides = [x.meta.strides()[1], x.meta.strides()[0]];
    CubeTensor { meta: Box::new(Metadata::new([columns, rows], strides)), ..x.clone() }
}

/// `c = a b` of any type.
fn any_product(a: &Matrix, b: &Matrix, c: &Matrix) {
    super::cuda::product(a, b, c);
}

/// Adds `grad^T x` to a weight's gradient: in place, where there is one that nobody else holds.
fn accumulate(w: &Param<Cuda>, x: &Matrix, grad: &Matrix) {
    if w.is_trainable() {
        Param::accumulate_with([w], |[sum]| [added(sum, x, grad)]);
    }
}

/// The sum and `grad^T x`, f32.
fn added(sum: Option<Matrix>, x: &Matrix, grad: &Matrix) -> Matrix {
    let grad = transposed(grad);
    let shape = [sizes(&grad)[0], sizes(x)[1]];
    match sum {
        Some(sum) if takes_factor(x) && is_addable(&sum) => {
            product_added(&grad, x, &sum);
            sum
        }
        sum => {
            let fresh = empty(x, shape, DType::F32);
            any_product(&grad, x, &fresh);
            match sum {
                Some(sum) => Cuda::float_add(sum, fresh),
                None => fresh,
            }
        }
    }
}

/// Whether a kernel may add to a gradient where it is.
fn is_addable(sum: &Matrix) -> bool {
    let aligned = sum.handle.offset_start.unwrap_or(0).is_multiple_of(LOAD_BYTES as u64);
    sum.dtype == DType::F32 && sum.can_mut() && sum.is_contiguous() && aligned
}

/// [`accumulate`] for several weights: `grad` has the gradients of their outputs side by side. Their gradients are rows
/// of one matrix from the first time on.
fn accumulate_all<const N: usize>(weights: [&Param<Cuda>; N], x: &Matrix, grad: &Matrix) {
    let split = |whole: &Matrix| {
        let mut from = 0;
        weights.map(|w| {
            let count = w.shape()[0];
            from += count;
            rows(whole, from - count, count)
        })
    };
    Param::accumulate_with(weights, |sums| {
        let parts: Option<Vec<&Matrix>> = sums.iter().map(Option::as_ref).collect();
        if let Some(whole) = parts.and_then(|parts| one_under_the_other(&parts)) {
            // Only with its parts gone can the whole be nobody else's.
            drop(sums);
            return split(&added(Some(whole), x, grad));
        }
        let mut sums = sums.into_iter();
        split(&added(None, x, grad)).map(|fresh| match sums.next().flatten() {
            Some(sum) => Cuda::float_add(sum, fresh),
            None => fresh,
        })
    });
}

/// Whether projections of `x` by these weights are one product: on the tensor cores, each part of it at a whole number of
/// loads.
fn joins<const N: usize>(x: &Matrix, weights: &[&Param<Cuda>; N]) -> bool {
    let distinct = (1..N).all(|i| weights[..i].iter().all(|other| !weights[i].is(other)));
    // A watched weight sums up its inputs in the plain projection.
    let watched = weights.iter().any(|w| w.is_watched());
    let aligned = weights.iter().all(|w| (w.shape()[0] * x.elem_size()).is_multiple_of(LOAD_BYTES));
    (2..=MOST_SOURCES).contains(&N) && distinct && !watched && aligned && takes_factor(x)
}

/// The weights one under the other, `[sum o, i]`: made once for each new value of one of them.
fn packed<const N: usize>(weights: [&Param<Cuda>; N]) -> Matrix {
    let columns = weights[0].shape()[1];
    Param::joint(weights, |weights| {
        let parts = weights.map(|w| {
            let width = w.meta.num_elements();
            let row = into_contiguous(w);
            (Some(CubeTensor { meta: Box::new(Metadata::new([1, width], [width, 1])), ..row }), width)
        });
        let row = pack(&parts);
        let shape = [sizes(&row)[1] / columns, columns];
        CubeTensor { meta: Box::new(Metadata::new(shape, [columns, 1])), ..row }
    })
}

/// Gradients side by side, zeros for those that are missing: as they lie, if they do so already.
fn beside<const N: usize>(like: &Matrix, grads: [Option<Matrix>; N], widths: [usize; N]) -> Matrix {
    let all: Option<Vec<&Matrix>> = grads.iter().map(Option::as_ref).collect();
    if let Some(whole) = all.and_then(|all| side_by_side(&all)) {
        return whole;
    }
    let mut widths = widths.into_iter();
    let parts = grads.map(|grad| {
        let grad = grad.map(|grad| {
            let consecutive = grad.meta.strides()[1] == 1 || sizes(&grad)[1] == 1;
            if consecutive { grad } else { into_contiguous(grad) }
        });
        (grad, widths.next().unwrap_or_default())
    });
    debug_assert!(parts.iter().flat_map(|(grad, _)| grad).all(|grad| sizes(grad)[0] == sizes(like)[0]));
    pack(&parts)
}

/// `cuda/linear.cu`.
static LINEAR: Source = Source::new("linear.cu", include_str!("../../cuda/linear.cu"));

/// Matrices that one launch packs.
const MOST_SOURCES: usize = 4;

/// Matrices of as many rows and these widths side by side, zeros for those that are missing. At least one is there; the
/// elements of a row are consecutive.
fn pack<const N: usize>(parts: &[(Option<Matrix>, usize); N]) -> Matrix {
    let like = parts.iter().find_map(|(part, _)| part.as_ref()).expect("a matrix to pack");
    let rows = sizes(like)[0];
    let width: usize = parts.iter().map(|(_, width)| width).sum();
    let packed = empty(like, [rows, width], like.dtype);
    let size = like.elem_size();
    // The stride of a single row is never used.
    let stride = |part: &Matrix| if rows == 1 { sizes(part)[1] } else { part.meta.strides()[0] };
    let aligned = parts.iter().all(|(part, width)| {
        let whole = |elements: usize| (elements * size).is_multiple_of(LOAD_BYTES);
        let placed = |part: &Matrix| {
            whole(stride(part)) && part.handle.offset_start.unwrap_or(0).is_multiple_of(LOAD_BYTES as u64)
        };
        whole(*width) && part.as_ref().is_none_or(placed)
    });
    assert_eq!(size, 2, "matrices of bf16");
    let (unit, each) = if aligned { ("uint4", LOAD_BYTES / size) } else { ("ushort1", 1) };
    let units = rows * width / each;
    assert!(units < 1 << 32, "a packed matrix of fewer than 2^32 units");
    let mut scalars = vec![rows as u64, (width / each) as u64];
    for (part, width) in parts {
        let stride = part.as_ref().map_or(0, stride);
        scalars.extend([width / each, stride / each, usize::from(part.is_some())].map(|word| word as u64));
    }
    let mut buffers: Vec<&Matrix> = parts.iter().map(|(part, _)| part.as_ref().unwrap_or(&packed)).collect();
    buffers.push(&packed);
    let constants = vec![("UNIT", unit.to_string()), ("SOURCES", N.to_string())];
    let kernel = CudaKernel { source: &LINEAR, entry: "pack", constants, block: 256, shared_bytes: 0 };
    let arguments = Arguments { buffers: &buffers, scalars: &scalars, ..Default::default() };
    launch_strided(kernel, [units.div_ceil(256) as u32, 1, 1], arguments);
    packed
}
