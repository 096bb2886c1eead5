//! Activations on CUDA: how `cuda/activation.cu` is launched.

use super::cuda::Cuda;
use super::launch_cuda::{Arguments, CudaKernel, element, float_word, known_element, launch_strided};
use super::source::Source;
use super::tensor::{LOAD_BYTES, empty, has_aligned_rows, primitive, tensor};
use super::views::{columns, side_by_side, sizes};
use crate::ops::{ActivationOps, activation as reference};
use burn::tensor::{Tensor, TensorMetadata};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

/// `cuda/activation.cu`.
static ACTIVATION: Source = Source::new("activation.cu", include_str!("../../cuda/activation.cu"));

const THREADS: usize = 256;

impl ActivationOps for Cuda {
    fn leaky_relu_squared(x: Tensor<Self, 2>, slope: f64) -> Tensor<Self, 2> {
        match takes(&[&x]) {
            true => one("leaky_relu_squared_forward", [x], slope),
            false => reference::leaky_relu_squared_forward(x, slope),
        }
    }

    fn leaky_relu_squared_backward(x: Tensor<Self, 2>, slope: f64, grad: Tensor<Self, 2>) -> Tensor<Self, 2> {
        match takes(&[&x, &grad]) {
            true => one("leaky_relu_squared_backward", [x, grad], slope),
            false => reference::leaky_relu_squared_backward(x, slope, grad),
        }
    }

    fn silu_gate<const D: usize>(x: Tensor<Self, D>, gate: Tensor<Self, D>) -> Tensor<Self, D> {
        match takes(&[&x, &gate]) {
            true => one("silu_gate_forward", [x, gate], 0.0),
            false => reference::silu_gate(x, gate),
        }
    }

    fn silu_gate_backward<const D: usize>(
        x: Tensor<Self, D>,
        gate: Tensor<Self, D>,
        grad: Tensor<Self, D>,
    ) -> [Tensor<Self, D>; 2] {
        if !takes(&[&x, &gate, &grad]) {
            return reference::silu_gate_backward(x, gate, grad);
        }
        let [x, gate, grad] = [x, gate, grad].map(primitive);
        let [grad_x, grad_gate] = gradients_of_a_pair(&x, &gate);
        elementwise("silu_gate_backward", &[x, gate, grad], &[&grad_x, &grad_gate], 0.0);
        [grad_x, grad_gate].map(tensor)
    }

    fn silu<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        if takes(&[&x]) { one("silu_forward", [x], 0.0) } else { reference::silu(x) }
    }

    fn silu_backward<const D: usize>(x: Tensor<Self, D>, grad: Tensor<Self, D>) -> Tensor<Self, D> {
        match takes(&[&x, &grad]) {
            true => one("silu_backward", [x, grad], 0.0),
            false => reference::silu_backward(x, grad),
        }
    }

    fn logistic<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        if takes(&[&x]) { one("logistic_forward", [x], 0.0) } else { reference::sigmoid(x) }
    }

    fn logistic_backward<const D: usize>(y: Tensor<Self, D>, grad: Tensor<Self, D>) -> Tensor<Self, D> {
        match takes(&[&y, &grad]) {
            true => one("logistic_backward", [y, grad], 0.0),
            false => reference::logistic_backward(y, grad),
        }
    }

    fn softplus<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        if takes(&[&x]) { one("softplus_forward", [x], 0.0) } else { reference::softplus(x) }
    }

    fn softplus_backward<const D: usize>(x: Tensor<Self, D>, grad: Tensor<Self, D>) -> Tensor<Self, D> {
        match takes(&[&x, &grad]) {
            true => one("softplus_backward", [x, grad], 0.0),
            false => reference::softplus_backward(x, grad),
        }
    }
}

/// Whether the kernels take these: of one size and type, bf16 or f32, not beyond 32 bits.
fn takes<const D: usize>(inputs: &[&Tensor<Cuda, D>]) -> bool {
    let first = inputs[0];
    let elements = first.shape().num_elements();
    known_element(first.dtype()).is_some()
        && elements < 1 << 32
        && inputs.iter().all(|x| x.dtype() == first.dtype() && x.dims() == first.dims())
}

/// A kernel of one output.
fn one<const D: usize, const N: usize>(
    entry: &'static str,
    inputs: [Tensor<Cuda, D>; N],
    slope: f64,
) -> Tensor<Cuda, D> {
    let inputs = inputs.map(primitive);
    let output = empty(&inputs[0], inputs[0].shape(), inputs[0].dtype);
    elementwise(entry, &inputs, &[&output], slope);
    tensor(output)
}

/// Tensors for the gradients of a gated pair. Where the two are the halves of one matrix, gate first (the projections of
/// one input), so are their gradients: then they are one operand of the projections' backward as they lie.
fn gradients_of_a_pair(
    x: &CubeTensor<CudaRuntime>,
    gate: &CubeTensor<CudaRuntime>,
) -> [CubeTensor<CudaRuntime>; 2] {
    if let Some(whole) = side_by_side(&[gate, x]) {
        let ([rows, width], [_, all]) = (sizes(gate), sizes(&whole));
        if all == 2 * width && (width * x.elem_size()).is_multiple_of(LOAD_BYTES) {
            let both = empty(x, [rows, all], x.dtype);
            return [columns(&both, width, width), columns(&both, 0, width)];
        }
    }
    [x, gate].map(|like| empty(like, like.shape(), like.dtype))
}

/// The elements of one row, and from one row to the next, of a tensor of rows of consecutive elements; one row for a
/// dense tensor.
fn row(sizes: &[usize], strides: &[usize]) -> Option<(usize, usize)> {
    let mut columns = 1;
    let mut outer = sizes.iter().zip(strides).rev().filter(|(size, _)| **size != 1).peekable();
    while let Some((size, _)) = outer.next_if(|(_, stride)| **stride == columns) {
        columns *= size;
    }
    let Some((_, first)) = outer.peek().copied() else { return Some((columns, columns)) };
    let mut expected = *first;
    for (size, stride) in outer {
        if *stride != expected {
            return None;
        }
        expected *= size;
    }
    (*first >= columns).then_some((columns, *first))
}

fn row_of(x: &CubeTensor<CudaRuntime>) -> Option<(usize, usize)> {
    let sizes: Vec<usize> = x.meta.shape().iter().copied().collect();
    let strides: Vec<usize> = x.meta.strides().iter().copied().collect();
    row(&sizes, &strides)
}

/// Launches a kernel on tensors of one size and type. Inputs of other layouts than rows are copied first.
fn elementwise(
    entry: &'static str,
    inputs: &[CubeTensor<CudaRuntime>],
    outputs: &[&CubeTensor<CudaRuntime>],
    slope: f64,
) {
    let elements = outputs[0].meta.num_elements();
    if elements == 0 {
        return;
    }
    // The rows of what is not dense; an output of rows has those of its inputs.
    let all = || inputs.iter().chain(outputs.iter().copied());
    let columns =
        all().filter_map(row_of).map(|(columns, _)| columns).find(|c| *c < elements).unwrap_or(elements);
    let fits =
        |x: &CubeTensor<CudaRuntime>| row_of(x).is_some_and(|(own, _)| own == columns || own == elements);
    let inputs: Vec<CubeTensor<CudaRuntime>> =
        inputs.iter().map(|x| if fits(x) { x.clone() } else { into_contiguous(x.clone()) }).collect();
    debug_assert!(outputs.iter().all(|y| fits(y)), "{entry}: outputs of other rows");
    let tensors: Vec<&CubeTensor<CudaRuntime>> = inputs.iter().chain(outputs.iter().copied()).collect();
    let stride = |x: &CubeTensor<CudaRuntime>| match row_of(x) {
        Some((own, stride)) if own == columns => stride,
        _ => columns,
    };
    let size = outputs[0].elem_size();
    let aligned =
        (columns * size).is_multiple_of(LOAD_BYTES) && tensors.iter().all(|x| has_aligned_rows(x, stride(x)));
    let width = if aligned { LOAD_BYTES / size } else { 1 };

    let packs = elements / width;
    let mut scalars = [0; 8];
    (scalars[0], scalars[1]) = (packs as u64, (columns / width) as u64);
    for (place, x) in scalars[2..7].iter_mut().zip(&tensors) {
        *place = (stride(x) / width) as u64;
    }
    scalars[7] = float_word(slope as f32);
    let constants = vec![("ELEMENT", element(outputs[0].dtype).to_string()), ("WIDTH", width.to_string())];
    let kernel = CudaKernel { source: &ACTIVATION, entry, constants, block: THREADS as u32, shared_bytes: 0 };
    let each = if inputs.len() > 2 { THREADS } else { 2 * THREADS };
    let arguments = Arguments { buffers: &tensors, scalars: &scalars, ..Default::default() };
    launch_strided(kernel, [packs.div_ceil(each) as u32, 1, 1], arguments);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_in_strides() {
        assert_eq!(row(&[2, 3, 4], &[12, 4, 1]), Some((24, 24)));
        assert_eq!(row(&[6, 4], &[10, 1]), Some((4, 10)));
        assert_eq!(row(&[2, 3, 4], &[30, 10, 1]), Some((4, 10)));
        assert_eq!(row(&[2, 3, 2, 2], &[30, 10, 2, 1]), Some((4, 10)));
        assert_eq!(row(&[1, 4], &[10, 1]), Some((4, 4)));
        assert_eq!(row(&[3, 1, 4], &[8, 4, 1]), Some((4, 8)));
        assert_eq!(row(&[3, 1], &[7, 1]), Some((1, 7)));
        assert_eq!(row(&[2, 3, 4], &[40, 10, 1]), None);
        assert_eq!(row(&[3, 4], &[1, 3]), None);
        assert_eq!(row(&[3, 4], &[0, 1]), None);
        assert_eq!(row(&[1, 1], &[5, 1]), Some((1, 1)));
    }
}
