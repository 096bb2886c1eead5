//! Linear layers on CUDA: weight gradients added in place, several projections of one input as one product, and the
//! squared MLP with its activation in the products' epilogues.

use super::cuda::{Cuda, product, product_added, product_with};
use super::cuda_gated;
use super::cuda_matmul::{self, Epilogue};
use super::launch_cuda::{Arguments, CudaKernel, known_element, launch_strided};
use super::source::Source;
use super::tensor::{LOAD_BYTES, dense, empty, has_aligned_rows, is_aligned, primitive, tensor};
use super::views::{columns, one_under_the_other, pitch, rows, side_by_side, sizes, transposed};
use crate::ops::linear::{self, backward_one_by_one};
use crate::ops::mlp::{self, GatedHidden, Hidden};
use crate::ops::{LinearOps, MlpOps, Param};
use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{DType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cubecl::zspace::metadata::Metadata;

pub(super) type Matrix = CubeTensor<CudaRuntime>;

impl LinearOps for Cuda {
    const JOINS_PROJECTIONS: bool = true;

    fn project_backward(x: Tensor<Self, 2>, w: &Param<Self>, grad: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let grad = matching(grad, x.dtype());
        let x = primitive(x);
        let weight = primitive(w.compute::<2>());
        accumulate(w, &x, &grad);
        let grad_x = empty(&x, sizes(&x), x.dtype);
        product(&grad, &weight, &grad_x);
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

    fn project_added_forward(
        x: Tensor<Self, 2>,
        w: &Param<Self>,
        e: Tensor<Self, 2>,
        scale: Option<(&Param<Self>, usize)>,
    ) -> (Tensor<Self, 2>, Option<Tensor<Self, 2>>) {
        let rows = primitive(x.clone());
        if !cuda_matmul::fits(&rows) || e.dtype() != rows.dtype || w.is_watched() {
            return linear::added_forward(x, w, e, scale);
        }
        let scale = scale.map(|(scale, row)| primitive(scale.compute_rows().narrow(0, row, 1)));
        let (weight, e) = (transposed(&primitive(w.compute::<2>())), dense(e));
        let y = empty(&e, sizes(&e), e.dtype);
        product_with(&rows, &weight, &y, Epilogue::Added(&e, scale.as_ref()));
        (tensor(y), None)
    }

    fn project_added_backward(
        x: Tensor<Self, 2>,
        product: Option<Tensor<Self, 2>>,
        w: &Param<Self>,
        scale: Option<(&Param<Self>, usize)>,
        grad: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        match scale {
            Some((scale, row)) if product.is_none() && cuda_matmul::fits(&primitive(x.clone())) => {
                scaled_backward(x, w, scale, row, grad)
            }
            scale => linear::added_backward(x, product, w, scale, grad),
        }
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
        if !fuses(&rows) || inner.is_watched() {
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
        if !fuses(&primitive(x.clone())) {
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

    fn gated_mlp(
        x: Tensor<Self, 2>,
        gate: &Param<Self>,
        up: &Param<Self>,
        last: &Param<Self>,
    ) -> Tensor<Self, 2> {
        cuda_gated::mlp(x, gate, up, last)
    }

    fn gated_mlp_forward(
        x: Tensor<Self, 2>,
        gate: &Param<Self>,
        up: &Param<Self>,
        last: &Param<Self>,
    ) -> (Tensor<Self, 2>, GatedHidden<Self>) {
        cuda_gated::mlp_forward(x, gate, up, last)
    }

    fn gated_mlp_backward(
        x: Tensor<Self, 2>,
        hidden: GatedHidden<Self>,
        gate: &Param<Self>,
        up: &Param<Self>,
        last: &Param<Self>,
        grad: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        cuda_gated::mlp_backward(x, hidden, gate, up, last, grad)
    }
}

/// The backward of `e + s w x` without a pass over its rows: with `g = gy^T x`, the gradient of a weight's row is its
/// scale times that row of `g`, that of the scale the row's product with the weight's, and `gx = gy (s w)`.
fn scaled_backward(
    x: Tensor<Cuda, 2>,
    w: &Param<Cuda>,
    scale: &Param<Cuda>,
    row: usize,
    grad: Tensor<Cuda, 2>,
) -> Tensor<Cuda, 2> {
    let x = primitive(x);
    let grad = matching(grad, x.dtype);
    let weight = w.compute::<2>().cast(DType::F32);
    let outputs = weight.dims()[0];
    let s = scale.compute_rows().narrow(0, row, 1).cast(DType::F32).reshape([outputs, 1]);
    if w.is_trainable() || scale.is_trainable() {
        let unscaled: Tensor<Cuda, 2> = tensor(added(None, &x, &grad));
        if scale.is_trainable() {
            let sums = (weight.clone() * unscaled.clone()).sum_dim(1).reshape([1, outputs]);
            scale.accumulate_rows(row..row + 1, sums);
        }
        if w.is_trainable() {
            w.accumulate(unscaled * s.clone());
        }
    }
    let scaled = primitive((weight * s).cast(x.dtype));
    let grad_x = empty(&x, sizes(&x), x.dtype);
    product(&grad, &scaled, &grad_x);
    tensor(grad_x)
}

/// A gradient in the type of what it is the gradient of.
pub(super) fn matching(grad: Tensor<Cuda, 2>, dtype: DType) -> Matrix {
    primitive(if grad.dtype() == dtype { grad } else { grad.cast(dtype) })
}

/// Whether products with this factor have epilogues, and sums in place.
fn fuses(x: &Matrix) -> bool {
    known_element(x.dtype).is_some() && x.meta.shape().iter().all(|size| *size > 0)
}

/// Adds `grad^T x` to a weight's gradient: in place, where there is one that nobody else holds.
pub(super) fn accumulate(w: &Param<Cuda>, x: &Matrix, grad: &Matrix) {
    if w.is_trainable() {
        Param::accumulate_with([w], |[sum]| [added(sum, x, grad)]);
    }
}

/// The sum and `grad^T x`, f32.
pub(super) fn added(sum: Option<Matrix>, x: &Matrix, grad: &Matrix) -> Matrix {
    let grad = transposed(grad);
    let shape = [sizes(&grad)[0], sizes(x)[1]];
    match sum {
        Some(sum) if fuses(x) && is_addable(&sum) => {
            product_added(&grad, x, &sum);
            sum
        }
        sum => {
            let fresh = empty(x, shape, DType::F32);
            product(&grad, x, &fresh);
            match sum {
                Some(sum) => Cuda::float_add(sum, fresh),
                None => fresh,
            }
        }
    }
}

/// Whether a kernel may add to a gradient where it is.
pub(super) fn is_addable(sum: &Matrix) -> bool {
    sum.dtype == DType::F32 && sum.can_mut() && sum.is_contiguous() && is_aligned(sum)
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

/// Whether projections of `x` by these weights are one product: each part of it at a whole number of loads.
pub(super) fn joins<const N: usize>(x: &Matrix, weights: &[&Param<Cuda>; N]) -> bool {
    let distinct = (1..N).all(|i| weights[..i].iter().all(|other| !weights[i].is(other)));
    // A watched weight sums up its inputs in the plain projection.
    let watched = weights.iter().any(|w| w.is_watched());
    let aligned = weights.iter().all(|w| (w.shape()[0] * x.elem_size()).is_multiple_of(LOAD_BYTES));
    (2..=MOST_SOURCES).contains(&N) && distinct && !watched && aligned && fuses(x)
}

/// The weights one under the other, `[sum o, i]`: made once for each new value of one of them.
pub(super) fn packed<const N: usize>(weights: [&Param<Cuda>; N]) -> Matrix {
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
        let grad = grad.map(|grad| if pitch(&grad).is_some() { grad } else { into_contiguous(grad) });
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
    let stride = |part: &Matrix| pitch(part).expect("rows of consecutive elements");
    let aligned = parts.iter().all(|(part, width)| {
        let whole = |elements: usize| (elements * size).is_multiple_of(LOAD_BYTES);
        let placed = |part: &Matrix| has_aligned_rows(part, stride(part));
        whole(*width) && part.as_ref().is_none_or(placed)
    });
    let (unit, each) = match size {
        _ if aligned => ("uint4", LOAD_BYTES / size),
        2 => ("ushort1", 1),
        4 => ("uint1", 1),
        _ => panic!("matrices of {:?} to pack", like.dtype),
    };
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
