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
                draw(&mut rng, n, Uniform::new(-bound, bound).ok())
            }
        }
    }
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
    }
}
