//! `torch.quantile` on the CPU, bit for bit.

/// The quantile of the magnitudes at which a row is clipped (the challenge's percentile 99.99984), as the float32
/// that `torch.quantile` makes of it.
pub const CLIP_QUANTILE: f32 = 0.999_998_4;

/// `torch.quantile(values, q)` of ascending values, with linear interpolation: the value at position `q * (n - 1)`, the
/// position in float64, the interpolation in float32. 0 for no values.
///
/// That is PyTorch since its pull request 187574 (and what the fixtures were made with); before it, the position was
/// rounded to float32, which moves 2 of the fixture's 148,000 codes by one.
pub fn quantile_sorted(values: &[f32], q: f32) -> f32 {
    let Some(last) = values.len().checked_sub(1) else { return 0.0 };
    let rank = f64::from(q) * last as f64;
    let (low, high) = (values[rank as usize], values[rank.ceil() as usize]);
    interpolate(low, high, (rank - rank.floor()) as f32)
}

/// torch.lerp: interpolates from the nearer end, with one rounding (its CPU and CUDA builds contract to an fma).
fn interpolate(low: f32, high: f32, weight: f32) -> f32 {
    if weight < 0.5 { weight.mul_add(high - low, low) } else { (weight - 1.0).mul_add(high - low, high) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantile_interpolates_between_the_two_neighbours() {
        assert_eq!(quantile_sorted(&[1.0, 2.0, 3.0], 0.5), 2.0);
        assert_eq!(quantile_sorted(&[1.0, 4.0], 0.25), 1.75);
        assert_eq!(quantile_sorted(&[1.0, 4.0], 0.75), 3.25);
        assert_eq!(quantile_sorted(&[7.0], 0.9), 7.0);
        assert_eq!(quantile_sorted(&[], 0.5), 0.0);
        assert_eq!(quantile_sorted(&[1.0, 5.0, 9.0], 1.0), 9.0);
    }

    #[test]
    fn quantile_is_near_that_of_float64_at_every_size() {
        for n in 1..300usize {
            let mut sorted: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1009) as f32 / 16.0).collect();
            sorted.sort_by(f32::total_cmp);
            for q in [0.0, 0.1, 0.5, 0.9, 0.999, CLIP_QUANTILE, 1.0] {
                let rank = f64::from(q) * (n - 1) as f64;
                let (low, high) = (sorted[rank as usize], sorted[(rank.ceil() as usize).min(n - 1)]);
                let expected = f64::from(low) + (rank - rank.floor()) * f64::from(high - low);
                let got = quantile_sorted(&sorted, q);
                assert!((f64::from(got) - expected).abs() < 1e-4, "n {n} q {q}: {got} against {expected}");
            }
        }
    }
}
