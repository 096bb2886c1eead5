//! Newton-Schulz's iteration: how `cuda/newton_schulz.cu` is launched, and the products between its launches.

use super::cuda::Cuda;
use super::launch_cuda::{Arguments, CudaKernel, float_word, launch};
use super::source::Source;
use super::tensor::{dense, empty, load_width, tensor};
use crate::ops::MatmulOps;
use crate::ops::newton_schulz::{self, NewtonSchulz, NewtonSchulzOps};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

/// `cuda/newton_schulz.cu`.
static NEWTON_SCHULZ: Source = Source::new("newton_schulz.cu", include_str!("../../cuda/newton_schulz.cu"));

/// Threads of a block, as the kernels have it.
const THREADS: usize = 256;

/// Blocks that share the sum of squares of a matrix, at most.
const PARTS: usize = 64;

type Buffer = CubeTensor<CudaRuntime>;

impl NewtonSchulzOps for Cuda {
    /// The reference's order, but for tall matrices: they stay as they are, `X^T = a X^T + X^T P^T`.
    fn newton_schulz(g: Tensor<Self, 3>, iteration: NewtonSchulz) -> Tensor<Self, 3> {
        let [n, rows, columns] = g.dims();
        if n == 0 {
            return g;
        }
        let Some(form) = Form::of(g.dtype(), iteration, rows * columns) else {
            return newton_schulz::reference(g, iteration);
        };
        let dtype = g.dtype();
        let [a, b, c] = iteration.coefficients;
        let times = |x: Tensor<Self, 3>, y: Tensor<Self, 3>| Self::matmul_as(x, y, dtype);
        let tall = rows > columns;
        let mut x = form.normalised(dense(g), [n, rows, columns], iteration.eps);
        for _ in 0..iteration.steps {
            let whole: Tensor<Self, 3> = tensor(x.clone());
            let swapped = whole.clone().swap_dims(1, 2);
            let (left, right) = if tall { (swapped, whole.clone()) } else { (whole.clone(), swapped) };
            let gram = times(left, right);
            let square = times(tensor(form.scaled(&dense(gram.clone()), c)), gram.clone());
            let poly: Tensor<Self, 3> = tensor(form.combined(&dense(gram), &dense(square), b));
            let change = if tall { times(whole, poly.swap_dims(1, 2)) } else { times(poly, whole) };
            x = form.combined(&x, &dense(change), a);
        }
        tensor(x)
    }
}

/// What the kernels are compiled for.
struct Form {
    element: &'static str,
    rounds: bool,
}

impl Form {
    fn of(dtype: DType, iteration: NewtonSchulz, elements: usize) -> Option<Self> {
        match dtype {
            _ if elements == 0 => None,
            DType::BF16 => Some(Self { element: "__nv_bfloat16", rounds: true }),
            DType::F32 => Some(Self { element: "float", rounds: iteration.bf16 }),
            _ => None,
        }
    }

    /// Each matrix divided by its Frobenius norm plus `eps`.
    fn normalised(&self, x: Buffer, shape: [usize; 3], eps: f64) -> Buffer {
        let [n, rows, columns] = shape;
        let elements = rows * columns;
        let width = load_width(&[&x], elements);
        let parts = elements.div_ceil(THREADS * width).min(PARTS);
        let sums = empty(&x, [n, parts], DType::F32);
        let y = empty(&x, shape, x.dtype);
        let scalars = [elements as u64, parts as u64, float_word(eps as f32)];
        self.launch("newton_schulz_squares", width, [parts, n], &[&x, &sums], scalars);
        let blocks = elements.div_ceil(THREADS * width);
        self.launch("newton_schulz_normalise", width, [blocks, n], &[&x, &sums, &y], scalars);
        y
    }

    /// `w x`.
    fn scaled(&self, x: &Buffer, w: f64) -> Buffer {
        self.elementwise("newton_schulz_scale", &[x], w)
    }

    /// `w x + v`.
    fn combined(&self, x: &Buffer, v: &Buffer, w: f64) -> Buffer {
        self.elementwise("newton_schulz_combine", &[x, v], w)
    }

    fn elementwise(&self, entry: &'static str, inputs: &[&Buffer], w: f64) -> Buffer {
        let x = inputs[0];
        let y = empty(x, x.meta.shape().clone(), x.dtype);
        // Of all elements as one row, whose last pack need not be whole: only where it starts counts.
        let width = load_width(inputs, 16);
        let elements = x.meta.num_elements();
        let buffers: Vec<&Buffer> = inputs.iter().copied().chain([&y]).collect();
        let scalars = [elements as u64, 1, float_word(w as f32)];
        self.launch(entry, width, [elements.div_ceil(THREADS * width), 1], &buffers, scalars);
        y
    }

    fn launch(
        &self,
        entry: &'static str,
        width: usize,
        [x, y]: [usize; 2],
        buffers: &[&Buffer],
        scalars: [u64; 3],
    ) {
        let constants = vec![
            ("ELEMENT", self.element.to_string()),
            ("ROUNDS", u8::from(self.rounds).to_string()),
            ("WIDTH", width.to_string()),
        ];
        let kernel =
            CudaKernel { source: &NEWTON_SCHULZ, entry, constants, block: THREADS as u32, shared_bytes: 0 };
        let arguments = Arguments { buffers, scalars: &scalars, ..Default::default() };
        launch(kernel, [x as u32, y as u32, 1], arguments);
    }
}
