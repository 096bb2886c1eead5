//! The challenge's int8 quantiser, `int8_clean_per_row_v1` (`spec/challenge.md` section 4): a clip at a quantile of
//! the magnitudes, a step of clip / 127, rounding half to even. The arithmetic has the precision and order that PyTorch
//! gives it on the CPU, so that codes are equal.

/// The quantile of the magnitudes at which a row is clipped (the challenge's percentile 99.99984), as the float32
/// that `torch.quantile` makes of it.
pub const CLIP_QUANTILE: f32 = 0.999_998_4;

/// `torch.quantile(values, q)` with linear interpolation: the value at position `q * (n - 1)` of the sorted values,
/// the position in float64, the interpolation in float32. Reorders `values`. 0 for no values.
///
/// That is PyTorch since its pull request 187574 (and what the fixtures were made with); before it, the position was
/// rounded to float32, which moves 2 of the fixture's 148,000 codes by one.
pub fn quantile(values: &mut [f32], q: f32) -> f32 {
    let Some(last) = values.len().checked_sub(1) else { return 0.0 };
    let rank = f64::from(q) * last as f64;
    let (below, above) = (rank as usize, rank.ceil() as usize);
    let weight = (rank - rank.floor()) as f32;
    let (_, &mut low, rest) = values.select_nth_unstable_by(below, f32::total_cmp);
    let high = if above > below { rest.iter().copied().fold(f32::INFINITY, f32::min) } else { low };
    // torch.lerp: interpolates from the nearer end, with one rounding (its CPU and CUDA builds contract to an fma).
    if weight < 0.5 { weight.mul_add(high - low, low) } else { (weight - 1.0).mul_add(high - low, high) }
}

/// Quantises the rows of a matrix, `values` being [rows, cols]: codes [rows, cols] and the float32 scale of each row.
///
/// A row's scale is at least 1 / 127, as the challenge has it: rows whose clip is below 1 all use that step.
pub fn quantize_rows(values: &[f32], cols: usize) -> (Vec<i8>, Vec<f32>) {
    let mut codes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(values.len() / cols.max(1));
    let mut magnitudes = Vec::with_capacity(cols);
    for row in values.chunks_exact(cols.max(1)) {
        magnitudes.clear();
        magnitudes.extend(row.iter().map(|v| v.abs()));
        let clip = quantile(&mut magnitudes, CLIP_QUANTILE);
        let scale = (clip / 127.0).max(1.0 / 127.0);
        codes.extend(row.iter().map(|&v| code(v, clip, scale)));
        scales.push(scale);
    }
    (codes, scales)
}

/// Quantises a tensor of any rank with one scale: codes and the float32 scale (1 if the clip is 0).
pub fn quantize_whole(values: &[f32]) -> (Vec<i8>, f32) {
    let mut magnitudes: Vec<f32> = values.iter().map(|v| v.abs()).collect();
    let clip = quantile(&mut magnitudes, CLIP_QUANTILE);
    let scale = clip / 127.0;
    // A clip so small that the step underflows has nothing to code either.
    let scale = if scale > 0.0 { scale } else { 1.0 };
    (values.iter().map(|&v| code(v, clip, scale)).collect(), scale)
}

fn code(value: f32, clip: f32, scale: f32) -> i8 {
    (value.min(clip).max(-clip) / scale).round_ties_even().clamp(-127.0, 127.0) as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantile_interpolates_between_the_two_neighbours() {
        assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&mut [4.0, 1.0], 0.25), 1.75);
        assert_eq!(quantile(&mut [4.0, 1.0], 0.75), 3.25);
        assert_eq!(quantile(&mut [7.0], 0.9), 7.0);
        assert_eq!(quantile(&mut [], 0.5), 0.0);
        assert_eq!(quantile(&mut [5.0, 9.0, 1.0], 1.0), 9.0);
    }

    #[test]
    fn quantile_equals_a_full_sort_at_every_size() {
        for n in 1..300usize {
            let values: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1009) as f32 / 16.0).collect();
            let mut sorted = values.clone();
            sorted.sort_by(f32::total_cmp);
            for q in [0.0, 0.1, 0.5, 0.9, 0.999, CLIP_QUANTILE, 1.0] {
                let rank = f64::from(q) * (n - 1) as f64;
                let (low, high) = (sorted[rank as usize], sorted[(rank.ceil() as usize).min(n - 1)]);
                let expected = f64::from(low) + (rank - rank.floor()) * f64::from(high - low);
                let got = quantile(&mut values.clone(), q);
                assert!((f64::from(got) - expected).abs() < 1e-4, "n {n} q {q}: {got} against {expected}");
            }
        }
    }

    #[test]
    fn rows_use_the_scale_floor_and_round_half_to_even() {
        // Clip below 1: the step is 1/127 whatever the clip.
        let half = |k: f32| k / 127.0;
        let (codes, scales) =
            quantize_rows(&[half(0.5), half(1.5), half(2.5), half(-0.5), half(-1.5), 0.25], 6);
        assert_eq!(scales, [1.0 / 127.0]);
        assert_eq!(codes, [0, 2, 2, 0, -2, 32]);
        // Clip above 1: the largest magnitude gets code 127.
        let (codes, scales) = quantize_rows(&[2.54, -2.54, 1.27, 0.0], 4);
        assert!((scales[0] - 0.02).abs() < 1e-6);
        assert_eq!((codes[0], codes[1], codes[3]), (127, -127, 0));
    }

    #[test]
    fn an_all_zero_tensor_has_scale_one() {
        assert_eq!(quantize_whole(&[0.0; 4]), (vec![0; 4], 1.0));
        assert_eq!(quantize_whole(&[1e-45, 0.0]), (vec![0; 2], 1.0));
        assert_eq!(quantize_whole(&[]), (vec![], 1.0));
    }
}
