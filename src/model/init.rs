//! Initial weights, drawn on the host so that every device starts from the same bits.
//!
//! A tensor's values depend on the seed and its own name only, not on what was drawn before it.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal, Uniform};
use sha2::{Digest, Sha256};

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All elements the same.
    Constant(f32),
    /// `[2, c]`: a row of ones, a row of zeros (the residual mix).
    FirstRowOne,
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
    /// Uniform in `(-a, a)` with `a = 1/sqrt(in)`, `in` the last size (PyTorch's default for a linear layer).
    Linear,
    /// Uniform in `(-a, a)`.
    Uniform(f32),
    /// Orthonormal rows or columns, whichever are fewer: the Q of a normal matrix's QR with R's diagonal positive.
    Orthogonal,
    /// `softplus^-1(dt)` for `dt` log-uniform in `[0.001, 0.1]`, at least 0.0001 (Mamba's step sizes).
    StepSize,
    /// `ln(1), ln(2), ...` along the last size (Mamba-1's A).
    LogCount,
    /// `0, pi, 2 pi, ...` along the last size (S4D-Lin's imaginary part).
    PiCount,
}

/// The generator of a name under a seed.
pub fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    let digest = Sha256::digest(name.as_bytes());
    let mut stream = [0; 8];
    stream.copy_from_slice(&digest[..8]);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::from_le_bytes(stream));
    rng
}

impl Init {
    /// The values of a tensor of this shape.
    pub fn values(self, seed: u64, name: &str, shape: &[usize]) -> Vec<f32> {
        let n = shape.iter().product();
        let mut rng = generator(seed, name);
        match self {
            Self::Constant(value) => vec![value; n],
            Self::FirstRowOne => (0..n).map(|i| if i < n / 2 { 1.0 } else { 0.0 }).collect(),
            Self::Normal(std) => draw(&mut rng, n, Normal::new(0.0, std).ok()),
            Self::Linear => {
                let bound = 1.0 / (shape.last().copied().unwrap_or(1) as f32).sqrt();
                Self::Uniform(bound).values(seed, name, shape)
            }
            Self::Uniform(bound) => draw(&mut rng, n, Uniform::new(-bound, bound).ok()),
            Self::Orthogonal => {
                let columns = shape.last().copied().unwrap_or(1);
                let normal = draw(&mut rng, n, Normal::new(0.0, 1.0).ok());
                orthonormal(&normal, n / columns.max(1), columns)
            }
            Self::StepSize => {
                let (low, high) = (0.001f64.ln(), 0.1f64.ln());
                let logs = draw(&mut rng, n, Uniform::new(low as f32, high as f32).ok());
                let step = |log: f32| f64::from(log).exp().max(1e-4);
                // ln(e^dt - 1), without losing digits for small dt.
                logs.into_iter().map(|log| step(log).exp_m1().ln() as f32).collect()
            }
            Self::LogCount => along(n, shape, |i| (i as f64 + 1.0).ln()),
            Self::PiCount => along(n, shape, |i| std::f64::consts::PI * i as f64),
        }
    }
}

/// `f` of the position along the last size, for each of `n` elements.
fn along(n: usize, shape: &[usize], f: impl Fn(usize) -> f64) -> Vec<f32> {
    let columns = shape.last().copied().unwrap_or(1).max(1);
    (0..n).map(|i| f(i % columns) as f32).collect()
}

/// The orthogonal factor of a matrix `[rows, columns]` (of its transpose where it has fewer rows), R's diagonal positive.
///
/// Gram-Schmidt in f64, each vector twice: as orthogonal as Householder's to the last f32 digit.
fn orthonormal(normal: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let wide = rows < columns;
    let (count, length) = if wide { (rows, columns) } else { (columns, rows) };
    let at = |vector: usize, i: usize| if wide { vector * columns + i } else { i * columns + vector };
    let mut basis: Vec<Vec<f64>> = Vec::with_capacity(count);
    for vector in 0..count {
        let mut v: Vec<f64> = (0..length).map(|i| f64::from(normal[at(vector, i)])).collect();
        for _ in 0..2 {
            for other in &basis {
                let dot = dot(other, &v);
                v.iter_mut().zip(other).for_each(|(v, other)| *v -= dot * other);
            }
        }
        let norm = dot(&v, &v).sqrt();
        v.iter_mut().for_each(|v| *v /= norm);
        basis.push(v);
    }
    let mut values = vec![0.0; normal.len()];
    for (vector, v) in basis.iter().enumerate() {
        v.iter().enumerate().for_each(|(i, v)| values[at(vector, i)] = *v as f32);
    }
    values
}

/// The product of two vectors, in eight sums: one would wait for itself at every term.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0; 8];
    for (a, b) in a.zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f64>() + rest
}

/// `n` draws; zeros where the distribution has no spread to draw from.
fn draw(rng: &mut impl Rng, n: usize, distribution: Option<impl Distribution<f32>>) -> Vec<f32> {
    match distribution {
        Some(distribution) => distribution.sample_iter(rng).take(n).collect(),
        None => vec![0.0; n],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_depend_on_seed_and_name_and_have_the_spread_asked_for() {
        let draw = |seed, name| Init::Normal(0.005).values(seed, name, &[100, 100]);
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
        let values = draw(1337, "tok_emb.weight");
        let mean = values.iter().sum::<f32>() / 1e4;
        let std = (values.iter().map(|v| v * v).sum::<f32>() / 1e4).sqrt();
        assert!(mean.abs() < 2e-4 && (std - 0.005).abs() < 2e-4, "mean {mean}, std {std}");
        let uniform = Init::Linear.values(1, "w", &[64, 256]);
        let most = uniform.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(most < 1.0 / 16.0 && most > 0.99 / 16.0, "{most}");
        assert_eq!(Init::FirstRowOne.values(1, "m", &[2, 2]), [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(Init::LogCount.values(1, "a", &[2, 3])[3..], [0.0, 2.0f32.ln(), 3.0f32.ln()]);
        assert_eq!(Init::PiCount.values(1, "a", &[1, 2]), [0.0, std::f32::consts::PI]);
        let steps = Init::StepSize.values(3, "dt_bias", &[10_000]);
        let steps: Vec<f64> = steps.iter().map(|v| f64::from(*v).exp().ln_1p()).collect();
        assert!(steps.iter().all(|dt| (0.000_999..0.100_1).contains(dt)));
        let middle = steps.iter().filter(|dt| **dt < 0.01).count();
        assert!((4_700..5_300).contains(&middle), "{middle} of 10000 below the geometric mean");
    }

    #[test]
    fn orthogonal_matrices_have_orthonormal_rows_or_columns() {
        for [rows, columns] in [[1, 1], [5, 5], [40, 17], [17, 40]] {
            let w = Init::Orthogonal.values(7, "w", &[rows, columns]);
            let short = rows.min(columns);
            let vector = |i: usize, k: usize| {
                f64::from(if rows < columns { w[i * columns + k] } else { w[k * columns + i] })
            };
            for (i, j) in (0..short).flat_map(|i| (0..short).map(move |j| (i, j))) {
                let dot: f64 = (0..rows.max(columns)).map(|k| vector(i, k) * vector(j, k)).sum();
                assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-6, "{rows}x{columns} {i} {j}: {dot}");
            }
        }
    }
}
