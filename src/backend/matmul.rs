//! Matrix products on both GPU backends, through cubek's kernels.
//!
//! The kernels are named one by one: choosing through cubek's (or Burn's) own list of strategies would compile some
//! forty kinds of them, for every backend, into this crate.

use super::tensor::{empty, primitive, tensor};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::{launch_naive, launch_tiling};
use cubek::matmul::routines::simple::SimpleAlgorithm;
use cubek::matmul::routines::simple_unit::SimpleUnitAlgorithm;
use cubek::std::InputBinding;

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

type Setup<T = ()> = std::result::Result<T, String>;

/// The factors as cubek takes them, with the types to compute in: inputs as they are, sums in f32.
fn bindings<R: CubeRuntime>(
    a: &CubeTensor<R>,
    b: &CubeTensor<R>,
    c: &CubeTensor<R>,
) -> (InputBinding<R>, InputBinding<R>, MatmulElems) {
    let input = a.dtype.into();
    let types = MatmulGlobalElems { lhs: input, rhs: input, out: c.dtype.into() };
    let binding = |tensor: &CubeTensor<R>| InputBinding::new(tensor.clone().binding(), input);
    (binding(a), binding(b), MatmulElems::from_globals(&types))
}

/// With tensor cores. For f32 they would round the factors to TF32's 10 bits.
fn with_tensor_cores<R: CubeRuntime>(a: &CubeTensor<R>, b: &CubeTensor<R>, c: &CubeTensor<R>) -> Setup {
    let (lhs, rhs, mut types) = bindings(a, b, c);
    let strategy = Default::default();
    launch_tiling::launch_ref::<R, SimpleAlgorithm>(
        &c.client,
        lhs,
        rhs,
        c.clone().binding(),
        &strategy,
        &mut types,
    )
    .map_err(|e| format!("{e:?}"))
}

/// In tiles, by ordinary multiply-adds of the inputs' own type.
fn in_tiles<R: CubeRuntime>(a: &CubeTensor<R>, b: &CubeTensor<R>, c: &CubeTensor<R>) -> Setup {
    let (lhs, rhs, mut types) = bindings(a, b, c);
    let strategy = Default::default();
    launch_tiling::launch_ref::<R, SimpleUnitAlgorithm>(
        &c.client,
        lhs,
        rhs,
        c.clone().binding(),
        &strategy,
        &mut types,
    )
    .map_err(|e| format!("{e:?}"))
}

/// One element a thread: takes every shape.
fn naive<R: CubeRuntime>(a: &CubeTensor<R>, b: &CubeTensor<R>, c: &CubeTensor<R>) -> Setup {
    let (lhs, rhs, types) = bindings(a, b, c);
    launch_naive::launch_ref(&c.client, lhs, rhs, c.clone().binding(), &types).map_err(|e| format!("{e:?}"))
}

/// The product in the inputs' own precision.
pub(super) fn product<R: CubeRuntime>(a: &CubeTensor<R>, b: &CubeTensor<R>, c: &CubeTensor<R>) {
    let done = in_tiles(a, b, c).or_else(|_| naive(a, b, c));
    done.unwrap_or_else(|error| panic!("no kernel for a product to {:?}: {error}", c.meta.shape()));
}

/// The product by tensor cores where the inputs are 16 bits wide, else as [`product`].
pub(super) fn mixed_product<R: CubeRuntime>(a: &CubeTensor<R>, b: &CubeTensor<R>, c: &CubeTensor<R>) {
    let fits = matches!(a.dtype, DType::BF16 | DType::F16);
    if !fits || with_tensor_cores(a, b, c).is_err() {
        product(a, b, c);
    }
}
