//! Newton-Schulz's iteration: how `cuda/newton_schulz_product.cu` is launched where its form of bf16 products fits, and
//! else `cuda/newton_schulz.cu` with the products between its launches.

use super::cuda::Cuda;
use super::cuda_matmul;
use super::launch_cuda::{
    Arguments, CudaKernel, TensorMap, TensorMapSwizzle, float_word, known_element, launch,
};
use super::source::Source;
use super::tensor::{LOAD_BYTES, dense, empty, load_width, tensor};
use crate::ops::MatmulOps;
use crate::ops::newton_schulz::{self, NewtonSchulz, NewtonSchulzOps};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

/// `cuda/newton_schulz.cu`.
static NEWTON_SCHULZ: Source = Source::new("newton_schulz.cu", include_str!("../../cuda/newton_schulz.cu"));

/// `cuda/newton_schulz_product.cu`.
static PRODUCT: Source =
    Source::new("newton_schulz_product.cu", include_str!("../../cuda/newton_schulz_product.cu"));

/// Threads of a block, as the kernels have it.
const THREADS: usize = 256;

/// Blocks that share the sum of squares of a matrix, at most.
const PARTS: usize = 64;

type Buffer = CubeTensor<CudaRuntime>;

impl NewtonSchulzOps for Cuda {
    /// The reference's order, but for tall matrices: they stay as they are, `X^T = a X^T + X^T P^T`; and in bf16 `c` is
    /// multiplied into `A A` after its sums.
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
        if takes(&x) {
            for _ in 0..iteration.steps {
                x = step(&x, [n, rows, columns], iteration.coefficients);
            }
            return tensor(x);
        }
        for _ in 0..iteration.steps {
            let whole: Tensor<Self, 3> = tensor(x.clone());
            let swapped = whole.clone().swap_dims(1, 2);
            let (left, right) = if tall { (swapped, whole.clone()) } else { (whole.clone(), swapped) };
            let mut gram = times(left, right);
            if form.rounds && dtype == DType::F32 {
                // As its other uses find it.
                gram = tensor(form.scaled(&dense(gram), 1.0));
            }
            let square = times(tensor(form.scaled(&dense(gram.clone()), c)), gram.clone());
            let poly: Tensor<Self, 3> = tensor(form.combined(&dense(gram), &dense(square), b));
            let change = if tall { times(whole, poly.swap_dims(1, 2)) } else { times(poly, whole) };
            x = form.combined(&x, &dense(change), a);
        }
        tensor(x)
    }
}

/// Whether the fused products take these matrices: bf16 on compute capability 9.0, in rows that the copy engine reads.
fn takes(x: &Buffer) -> bool {
    let shape = x.meta.shape();
    let aligned = |size: usize| (size * x.elem_size()).is_multiple_of(LOAD_BYTES);
    cuda_matmul::fits(x) && shape[0] <= MOST_MATRICES && aligned(shape[1]) && aligned(shape[2])
}

/// The most matrices of a launch: the grid's second size.
const MOST_MATRICES: usize = 65_535;

/// One step of the iteration in three launches.
fn step(x: &Buffer, [n, rows, columns]: [usize; 3], [a, b, c]: [f64; 3]) -> Buffer {
    let tall = rows > columns;
    let (short, long) = (rows.min(columns), rows.max(columns));
    let of_x = Product { a_k_major: !tall, b_k_major: !tall, symmetric: true, added: false };
    let gram = of_x.launch(x, x, None, [n, short, short, long], [1.0, 0.0]);
    let of_gram = Product { a_k_major: true, b_k_major: true, symmetric: true, added: true };
    let poly = of_gram.launch(&gram, &gram, Some(&gram), [n, short, short, short], [c, b]);
    let change = Product { a_k_major: true, b_k_major: tall, symmetric: false, added: true };
    let (left, right) = if tall { (x, &poly) } else { (&poly, x) };
    change.launch(left, right, Some(x), [n, rows, columns, short], [1.0, a])
}

/// A form of the fused product.
#[derive(Debug, Clone, Copy)]
struct Product {
    a_k_major: bool,
    b_k_major: bool,
    /// Whether the result is symmetric: what lies under its diagonal is not computed.
    symmetric: bool,
    /// Whether something is added.
    added: bool,
}

impl Product {
    /// Along a side of a tile, and of a box of the copy engine.
    const TILE: usize = 128;
    const BOX: usize = 64;

    fn kernel(self) -> CudaKernel {
        let constants = vec![
            ("A_K_MAJOR", self.a_k_major),
            ("B_K_MAJOR", self.b_k_major),
            ("SYMMETRIC", self.symmetric),
            ("HAS_E", self.added),
        ];
        let constants = constants.into_iter().map(|(name, on)| (name, u8::from(on).to_string())).collect();
        let entry = "newton_schulz_product";
        let shared_bytes = 1024 + 3 * (4 * 8192 + 16);
        CudaKernel { source: &PRODUCT, entry, constants, block: 288, shared_bytes }
    }

    /// Tiles of an `[m, n]` result.
    fn tiles(self, m: usize, n: usize) -> usize {
        let [rows, columns] = [m, n].map(|size| size.div_ceil(Self::TILE));
        if self.symmetric { rows * (rows + 1) / 2 } else { rows * columns }
    }

    /// `factor a b^T + weight e` of matrices `[z, m, n, k]`; `factors` are factor and weight.
    fn launch(
        self,
        a: &Buffer,
        b: &Buffer,
        e: Option<&Buffer>,
        [z, m, n, k]: [usize; 4],
        factors: [f64; 2],
    ) -> Buffer {
        debug_assert!(self.added == e.is_some() && (m == n || !self.symmetric));
        let y = empty(a, [z, m, n], a.dtype);
        fn map(x: &Buffer, shape: [usize; 3]) -> TensorMap<'_> {
            let tile = [1, Product::BOX, Product::BOX];
            TensorMap::dense(x, &shape, &tile, TensorMapSwizzle::B128)
        }
        let sizes = |rows: usize, k_major: bool| if k_major { [z, rows, k] } else { [z, k, rows] };
        let mut maps =
            vec![map(a, sizes(m, self.a_k_major)), map(b, sizes(n, self.b_k_major)), map(&y, [z, m, n])];
        maps.extend(e.map(|e| map(e, [z, m, n])));
        let [factor, weight] = factors.map(|x| float_word(x as f32));
        let scalars = [m as u64, n as u64, k as u64, factor | weight << 32];
        let computed = if self.symmetric { m * (m + 1) / 2 } else { m * n };
        let operations = 2.0 * computed as f64 * (k * z) as f64;
        let grid = [self.tiles(m, n) as u32, z as u32, 1];
        let arguments = Arguments { maps: &maps, scalars: &scalars, operations, ..Default::default() };
        launch(self.kernel(), grid, arguments);
        y
    }
}

/// What the kernels are compiled for.
struct Form {
    element: &'static str,
    rounds: bool,
}

impl Form {
    fn of(dtype: DType, iteration: NewtonSchulz, elements: usize) -> Option<Self> {
        let element = known_element(dtype).filter(|_| elements > 0)?;
        Some(Self { element, rounds: dtype == DType::BF16 || iteration.bf16 })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compile_check_tries_the_forms_of_a_step() {
        let forms: Vec<&str> = PRODUCT.variants().collect();
        let mut tried = Vec::new();
        for tall in [false, true] {
            tried.push(Product { a_k_major: !tall, b_k_major: !tall, symmetric: true, added: false });
            tried.push(Product { a_k_major: true, b_k_major: true, symmetric: true, added: true });
            tried.push(Product { a_k_major: true, b_k_major: tall, symmetric: false, added: true });
        }
        for product in tried {
            let kernel = product.kernel();
            let constants = kernel.constants.iter().map(|(name, value)| format!("-D{name}={value}"));
            let form = constants.collect::<Vec<_>>().join(" ");
            assert!(forms.contains(&form.as_str()), "{form} is not among {forms:?}");
        }
        assert!(PRODUCT.text().contains("    newton_schulz_product("));
    }

    #[test]
    fn a_symmetric_result_has_the_tiles_down_to_its_diagonal() {
        let product = Product { a_k_major: true, b_k_major: true, symmetric: true, added: false };
        assert_eq!([1, 128, 129, 512].map(|m| product.tiles(m, m)), [1, 1, 3, 10]);
        let all = Product { symmetric: false, ..product };
        assert_eq!(all.tiles(512, 1000), 32);
    }
}
