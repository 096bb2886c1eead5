//! Hessians of linear layers: what GPTQ weighs its errors by (`spec/challenge.md` section 7).
//!
//! H = (1 / sequences) sum of x^T x over every position of the layer's input, plus 0.01 max(mean diagonal, 1e-6) on the
//! diagonal. A layer that runs several times in a forward pass adds each of its runs.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

/// The share of the mean diagonal that collecting adds to the diagonal, and that [`super::gptq`] adds again.
pub const DAMP: f64 = 0.01;

/// Rows that are widened to float64 at a time.
const ROWS: usize = 1024;

/// The sum of x^T x so far.
#[derive(Debug, Clone)]
pub struct Hessian {
    size: usize,
    sum: Vec<f64>,
}

impl Hessian {
    /// For inputs of `size` channels.
    pub fn new(size: usize) -> Self {
        Self { size, sum: vec![0.0; size * size] }
    }

    /// Channels.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Adds every row of `inputs[rows, size]`; sums in float64.
    pub fn add<T: Copy + Into<f64>>(&mut self, inputs: &[T]) {
        let n = self.size;
        if n == 0 {
            return;
        }
        let mut wide = Vec::with_capacity(ROWS.min(inputs.len() / n) * n);
        for rows in inputs.chunks(ROWS * n) {
            wide.clear();
            wide.extend(rows.iter().map(|&x| x.into()));
            let x = MatRef::from_row_major_slice(&wide, rows.len() / n, n);
            let sum = MatMut::from_column_major_slice_mut(&mut self.sum, n, n);
            matmul(sum, Accum::Add, x.transpose(), x, 1.0, Par::Seq);
        }
    }

    /// Adds the sum x^T x of a device, [size, size].
    pub fn add_product<T: Copy + Into<f64>>(&mut self, product: &[T]) {
        for (sum, &x) in self.sum.iter_mut().zip(product) {
            *sum += x.into();
        }
    }

    /// The damped mean over `sequences` sequences, [size, size].
    pub fn finish(self, sequences: usize) -> Vec<f64> {
        let n = self.size;
        let share = 1.0 / sequences.max(1) as f64;
        let mut h = self.sum;
        h.iter_mut().for_each(|x| *x *= share);
        // Products of floats summed in blocks: the two halves agree but for the last bits.
        for i in 0..n {
            for j in 0..i {
                let mean = 0.5 * (h[i * n + j] + h[j * n + i]);
                (h[i * n + j], h[j * n + i]) = (mean, mean);
            }
        }
        let damp = DAMP * mean_diagonal(&h, n).max(1e-6);
        (0..n).for_each(|i| h[i * n + i] += damp);
        h
    }
}

/// The mean of the diagonal of `h[n, n]`.
pub(super) fn mean_diagonal(h: &[f64], n: usize) -> f64 {
    (0..n).map(|i| h[i * n + i]).sum::<f64>() / n.max(1) as f64
}

/// E H of `error[rows, n]` and `hessian[n, n]`, on one thread: callers run tensors in parallel, and the bits must not depend
/// on what is free beside.
pub(super) fn times(error: &[f64], hessian: &[f64], n: usize) -> Mat<f64> {
    let rows = error.len() / n.max(1);
    let mut product = Mat::zeros(rows, n);
    let error = MatRef::from_row_major_slice(error, rows, n);
    let hessian = MatRef::from_row_major_slice(hessian, n, n);
    matmul(product.as_mut(), Accum::Replace, error, hessian, 1.0, Par::Seq);
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hessian_is_the_damped_mean_of_outer_products() {
        let n = 5;
        let x: Vec<f32> = (0..n * 2500).map(|i| ((i * 7919) % 211) as f32 / 50.0 - 2.0).collect();
        let mut hessian = Hessian::new(n);
        hessian.add(&x[..n * 7]);
        hessian.add(&x[n * 7..]);
        let h = hessian.finish(4);
        let mut expected = vec![0.0f64; n * n];
        for row in x.chunks(n) {
            for i in 0..n {
                for j in 0..n {
                    expected[i * n + j] += f64::from(row[i]) * f64::from(row[j]) / 4.0;
                }
            }
        }
        let mean = mean_diagonal(&expected, n);
        for i in 0..n {
            expected[i * n + i] += 0.01 * mean;
        }
        for (got, expected) in h.iter().zip(&expected) {
            assert!((got - expected).abs() < 1e-9 * mean, "{got} {expected}");
        }
        // Nothing seen: only the least damping.
        assert_eq!(Hessian::new(2).finish(1), [1e-8, 0.0, 0.0, 1e-8]);
    }
}
