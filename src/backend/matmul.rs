//! Matrix products on both GPU backends: from Burn's tensors to the kernels and back.
//!
//! None of Burn's own: they are slower, may round f32 factors to TF32, and their many kinds, instantiated in this crate
//! for each backend, were more than half of what it took to compile.

use super::tensor::{empty, primitive, tensor};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};

/// Computes `c = a b` over the last two dimensions, into a dense `c`.
pub(super) type Product<R> = fn(&CubeTensor<R>, &CubeTensor<R>, &CubeTensor<R>);

/// `a b` over the last two dimensions as `out`, by `product`.
pub(super) fn matmul<R, F, I, B, const D: usize>(
    a: Tensor<CubeBackend<R, F, I, B>, D>,
    b: Tensor<CubeBackend<R, F, I, B>, D>,
    out: DType,
    product: Product<R>,
) -> Tensor<CubeBackend<R, F, I, B>, D>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    B: BoolElement,
{
    let (mut shape, other) = (a.dims(), b.dims());
    assert_eq!(a.dtype(), b.dtype(), "the factors of a product have one type");
    assert!(shape[D - 1] == other[D - 2], "a product of {shape:?} and {other:?}");
    shape[D - 1] = other[D - 1];
    for (size, other) in shape.iter_mut().zip(other).take(D - 2) {
        *size = (*size).max(other);
    }
    let (a, b) = (primitive(a), primitive(b));
    let c = empty(&a, shape, out);
    product(&a, &b, &c);
    tensor(c)
}
