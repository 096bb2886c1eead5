//! What the launchers of both GPU backends need of Burn's tensors: dense primitives, outputs, load widths.

use burn::tensor::{DType, Int, Shape, Tensor, TensorPrimitive};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, kernel};

/// Bytes of the widest load of one thread.
pub const LOAD_BYTES: usize = 16;

/// The tensor's primitive, copied to a dense row-major buffer if it is not one already.
///
/// Burn's layouts vary: views, transposes, expansions, and on CUDA rows padded for alignment.
pub fn dense<R, F, I, B, const D: usize>(tensor: Tensor<CubeBackend<R, F, I, B>, D>) -> CubeTensor<R>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    B: BoolElement,
{
    kernel::into_contiguous(primitive(tensor))
}

/// [`dense`] of integers.
pub fn dense_int<R, F, I, B, const D: usize>(tensor: Tensor<CubeBackend<R, F, I, B>, D, Int>) -> CubeTensor<R>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    B: BoolElement,
{
    kernel::into_contiguous(tensor.into_primitive())
}

/// A dense copy: it begins where the memory pool's pieces do, which is at a multiple of [`LOAD_BYTES`].
pub fn copied<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let (client, device, dtype) = (x.client.clone(), x.device.clone(), x.dtype);
    let copy = cubecl::std::tensor::into_contiguous(&client, x.binding(), dtype.into());
    CubeTensor::new(client, copy.handle, *copy.metadata, device, dtype)
}

/// The tensor, or a copy of it if it does not begin where [`copied`] ones do.
pub fn aligned<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    if is_aligned(&x) { x } else { copied(x) }
}

/// Whether the tensor begins at a multiple of [`LOAD_BYTES`].
pub fn is_aligned<R: CubeRuntime>(x: &CubeTensor<R>) -> bool {
    begins_at(x, LOAD_BYTES)
}

/// Whether the tensor begins at a multiple of so many bytes.
pub fn begins_at<R: CubeRuntime>(x: &CubeTensor<R>, bytes: usize) -> bool {
    x.handle.offset_start.unwrap_or(0).is_multiple_of(bytes as u64)
}

/// Whether rows of so many elements, one after the other from the tensor's start on, each begin at a multiple of
/// [`LOAD_BYTES`].
pub fn has_aligned_rows<R: CubeRuntime>(x: &CubeTensor<R>, columns: usize) -> bool {
    is_aligned(x) && (columns * x.elem_size()).is_multiple_of(LOAD_BYTES)
}

/// The tensor's primitive in whatever layout it has.
pub fn primitive<R, F, I, B, const D: usize>(tensor: Tensor<CubeBackend<R, F, I, B>, D>) -> CubeTensor<R>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    B: BoolElement,
{
    tensor.into_primitive().tensor()
}

/// A primitive as a tensor of rank `D`.
pub fn tensor<R, F, I, B, const D: usize>(primitive: CubeTensor<R>) -> Tensor<CubeBackend<R, F, I, B>, D>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    B: BoolElement,
{
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// An uninitialised dense tensor on the device (and stream) of `like`.
pub fn empty<R: CubeRuntime>(like: &CubeTensor<R>, shape: impl Into<Shape>, dtype: DType) -> CubeTensor<R> {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), dtype)
}

/// Elements that one thread may load at once from rows of `columns` elements of all the given dense tensors: as many
/// as fill [`LOAD_BYTES`] where every row starts at a multiple of that, else 1.
pub fn load_width<R: CubeRuntime>(tensors: &[&CubeTensor<R>], columns: usize) -> usize {
    let aligned = tensors.iter().all(|tensor| has_aligned_rows(tensor, columns));
    let widest = tensors.iter().map(|tensor| tensor.elem_size()).max().unwrap_or(LOAD_BYTES);
    if aligned { LOAD_BYTES / widest } else { 1 }
}
