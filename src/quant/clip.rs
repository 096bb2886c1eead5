//! Per-row integers of 2 to 8 bits: where a row is clipped decides its step, and a search over quantiles of the
//! magnitudes decides where it is clipped. Each system has its own rule; the arithmetic of the two peers' rules has the
//! precision and order that PyTorch gives it on the CPU, so that codes and scales are equal.
//!
//! | rule | step | codes are made with | clip candidates | the winner |
//! |---|---|---|---|---|
//! | challenge, PR #1607 without search | clip / max, at least 1 / max | the float32 step, weights clipped first | one quantile | - |
//! | PR #1607 (`spec/pr1607.md` section 6) | the same | the same | 7 quantiles | least squared error of the whole tensor |
//! | PR #1382 (`spec/pr1382.md` section 7) | the same, rounded to float16 | the stored step | 5 quantiles | the same |
//! | ours | clip / max, rounded to float16 | the stored step | fractions of the largest magnitude | least squared error, row by row |
//!
//! The floor of 1 / max makes most rows of a trained model share one coarse step (weights of 0.03 to 0.1 against a step
//! of 0.032 at 6 bits), so our own rule has none.

use super::quantile::{CLIP_QUANTILE, quantile_sorted};
use half::f16;
use rayon::prelude::*;

/// The bit widths that integer codes can have.
pub const BITS: std::ops::RangeInclusive<u32> = 2..=8;

/// The quantiles that PR #1382 tries, and both PRs' GPTQ.
pub const QUANTILES_1382: [f32; 5] = [0.999, 0.9995, 0.9999, 0.999_99, 1.0];

/// The quantiles that PR #1607 tries.
pub const QUANTILES_1607: [f32; 7] = [0.999, 0.9995, 0.9999, 0.999_95, 0.999_99, 0.999_999, 1.0];

/// The largest code of symmetric codes of `bits` bits: 31 for 6.
pub fn max_code(bits: u32) -> i8 {
    debug_assert!(BITS.contains(&bits), "{bits} bits");
    ((1u32 << (bits.clamp(2, 8) - 1)) - 1) as i8
}

/// Candidates of our own rule: what fraction of a row's largest magnitude to clip at. The fewer the levels, the more
/// a narrower range gains (for a Gaussian row the best clip falls from 4 standard deviations at 8 bits to 1.2 at 2).
pub fn fractions(bits: u32) -> [f32; 6] {
    match bits {
        2 => [0.6, 0.5, 0.42, 0.36, 0.3, 0.25],
        3 => [0.9, 0.8, 0.7, 0.6, 0.5, 0.42],
        4 => [1.0, 0.9, 0.8, 0.7, 0.6, 0.5],
        5 => [1.0, 0.93, 0.86, 0.79, 0.72, 0.65],
        _ => [1.0, 0.96, 0.92, 0.88, 0.82, 0.75],
    }
}

/// A rule for the steps of rows and their codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// The challenge's, for any bit width: one quantile, no search.
    Challenge,
    /// PR #1607's search.
    Pr1607,
    /// PR #1382's search.
    Pr1382,
    /// Ours: no floor, row by row.
    Own,
}

/// A matrix in integer codes: `codes` is `[rows, cols]`, `scales` `[rows]`, or one scale for a tensor of any rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Coded {
    /// Codes.
    pub codes: Vec<i8>,
    /// The stored step of each row. Rules that keep it as float16 give values that float16 holds exactly, except that
    /// of the challenge and PR #1607, who round after coding: that is left to whoever stores it.
    pub scales: Vec<f32>,
}

/// Rounds to the nearest integer, halves to even. Only for magnitudes below 2^22, as codes are: adding and taking off
/// 1.5 x 2^23 leaves no bit for a fraction (and, unlike the library's function, is two vector instructions).
pub(super) fn round_even(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

/// The code of a weight; 0 where the step is 0 (of a row of zeros, or of weights that float16 has no step for).
fn code(weight: f32, step: f32, most: f32) -> i8 {
    // Bounds are integers, so that clamping first gives the same code.
    if step > 0.0 { round_even((weight / step).clamp(-most, most)) as i8 } else { 0 }
}

impl Rule {
    /// The candidate steps of one row, `magnitudes` sorted ascending, and for each where weights are clipped first.
    pub(super) fn steps(self, bits: u32, magnitudes: &[f32]) -> Vec<(f32, f32)> {
        let most = f32::from(max_code(bits));
        let floored = |clip: f32| (clip / most).max(1.0 / most);
        let at = |q: f32| quantile_sorted(magnitudes, q);
        match self {
            Self::Challenge => {
                let clip = at(CLIP_QUANTILE);
                vec![(floored(clip), clip)]
            }
            Self::Pr1607 => QUANTILES_1607.iter().map(|&q| at(q)).map(|clip| (floored(clip), clip)).collect(),
            Self::Pr1382 => stored_steps(bits, magnitudes).map(|step| (step, f32::INFINITY)).collect(),
            Self::Own => {
                let largest = magnitudes.last().copied().unwrap_or_default();
                let step = |fraction: f32| half_step(fraction * largest / most);
                fractions(bits).iter().map(|&fraction| (step(fraction), f32::INFINITY)).collect()
            }
        }
    }

    /// Codes a matrix `values[rows, cols]` of finite weights.
    pub fn rows(self, values: &[f32], cols: usize, bits: u32) -> Coded {
        let most = f32::from(max_code(bits));
        if cols == 0 || values.is_empty() {
            return Coded { codes: Vec::new(), scales: Vec::new() };
        }
        let steps: Vec<Vec<(f32, f32)>> =
            values.par_chunks(cols).map(|row| self.steps(bits, &sorted_magnitudes(row))).collect();
        // The squared error of each row under each of its candidates; sums in a fixed order.
        let errors: Vec<Vec<f64>> = values
            .par_chunks(cols)
            .zip(&steps)
            .map(|(row, steps)| {
                if steps.len() == 1 {
                    return vec![0.0];
                }
                steps.iter().map(|&(step, clip)| squared_error(row, step, clip, most)).collect()
            })
            .collect();
        let candidates = steps.first().map_or(0, Vec::len);
        let whole = (self != Self::Own).then(|| {
            let sums: Vec<f64> = (0..candidates).map(|c| errors.iter().map(|row| row[c]).sum()).collect();
            first_least(&sums)
        });
        let chosen: Vec<(f32, f32)> = steps
            .iter()
            .zip(&errors)
            .map(|(steps, errors)| steps[whole.unwrap_or_else(|| first_least(errors))])
            .collect();
        let mut codes = vec![0i8; values.len()];
        codes.par_chunks_mut(cols).zip(values.par_chunks(cols)).zip(&chosen).for_each(
            |((codes, row), &(step, clip))| {
                for (out, &weight) in codes.iter_mut().zip(row) {
                    *out = code(weight.min(clip).max(-clip), step, most);
                }
            },
        );
        Coded { codes, scales: chosen.into_iter().map(|(step, _)| step).collect() }
    }

    /// Codes a tensor of any rank with one step, which has no floor (1 for a tensor of zeros). PR #1382 takes the
    /// largest magnitude and keeps the step as float16.
    pub fn whole(self, values: &[f32], bits: u32) -> Coded {
        let most = f32::from(max_code(bits));
        let magnitudes = sorted_magnitudes(values);
        let at = |q: f32| quantile_sorted(&magnitudes, q);
        let plain = |clip: f32| (if clip / most > 0.0 { clip / most } else { 1.0 }, clip);
        let steps: Vec<(f32, f32)> = match self {
            Self::Challenge => vec![plain(at(CLIP_QUANTILE))],
            Self::Pr1607 => QUANTILES_1607.iter().map(|&q| plain(at(q))).collect(),
            Self::Pr1382 => vec![(f16::from_f32(plain(at(1.0)).0).to_f32(), f32::INFINITY)],
            Self::Own => self.steps(bits, &magnitudes),
        };
        let errors: Vec<f64> =
            steps.iter().map(|&(step, clip)| squared_error(values, step, clip, most)).collect();
        let (step, clip) = steps[first_least(&errors)];
        let codes = values.iter().map(|&weight| code(weight.min(clip).max(-clip), step, most)).collect();
        Coded { codes, scales: vec![step] }
    }
}

/// The steps for [`QUANTILES_1382`], at least 1 / max, as float16 stores them.
pub(super) fn stored_steps(bits: u32, magnitudes: &[f32]) -> impl Iterator<Item = f32> {
    let most = f32::from(max_code(bits));
    QUANTILES_1382.iter().map(move |&q| half_step((quantile_sorted(magnitudes, q) / most).max(1.0 / most)))
}

/// A step as float16 holds it; a step beyond its range stays out of it, for the caller to refuse.
pub(super) fn half_step(step: f32) -> f32 {
    f16::from_f32(step).to_f32()
}

pub(super) fn sorted_magnitudes(values: &[f32]) -> Vec<f32> {
    let mut magnitudes: Vec<f32> = values.iter().map(|v| v.abs()).collect();
    magnitudes.sort_unstable_by(f32::total_cmp);
    magnitudes
}

/// The sum over a row of (w - code x step)^2, its terms in float32 as PyTorch has them, summed in float64.
fn squared_error(row: &[f32], step: f32, clip: f32, most: f32) -> f64 {
    let term = |weight: f32| {
        let code = f32::from(code(weight.min(clip).max(-clip), step, most));
        let error = weight - code * step;
        error * error
    };
    row.iter().map(|&weight| f64::from(term(weight))).sum()
}

/// The place of the least value, the first of equal ones.
pub(super) fn first_least(values: &[f64]) -> usize {
    let mut best = 0;
    for (at, value) in values.iter().enumerate() {
        if *value < values[best] {
            best = at;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gaussian enough: sums of four uniform numbers.
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..n).map(|_| uniform() + uniform() + uniform() + uniform()).collect()
    }

    #[test]
    fn rounding_is_half_to_even() {
        for x in [-127.0f32, -2.5, -1.5, -0.5, -0.49, 0.0, 0.5, 0.51, 1.5, 2.5, 126.5, 127.0] {
            assert_eq!(round_even(x), x.round_ties_even(), "{x}");
        }
        for n in 0..100_000 {
            let x = n as f32 * 0.002_57 - 128.0;
            assert_eq!(round_even(x), x.round_ties_even(), "{x}");
        }
    }

    #[test]
    fn the_floor_makes_small_rows_share_one_step() {
        let values = noise(64 * 8, 1).iter().map(|v| v * 0.03).collect::<Vec<_>>();
        for rule in [Rule::Challenge, Rule::Pr1607, Rule::Pr1382] {
            let coded = rule.rows(&values, 64, 6);
            let floor = if rule == Rule::Pr1382 { half_step(1.0 / 31.0) } else { 1.0 / 31.0 };
            assert!(coded.scales.iter().all(|&s| s == floor), "{rule:?} {:?}", coded.scales);
            assert!(coded.codes.iter().all(|c| c.abs() <= 2), "{rule:?}");
        }
        let coded = Rule::Own.rows(&values, 64, 6);
        assert!(coded.scales.iter().all(|&s| s > 0.0 && s < 0.004));
        assert!(coded.codes.iter().any(|c| c.abs() == 31));
    }

    #[test]
    fn our_rule_beats_plain_rounding_at_every_width() {
        let values = noise(512 * 16, 2);
        let error = |coded: &Coded| -> f64 {
            let back = coded.codes.chunks(512).zip(&coded.scales);
            let back = back.flat_map(|(row, &s)| row.iter().map(move |&c| f32::from(c) * s));
            values.iter().zip(back).map(|(w, b)| f64::from(w - b).powi(2)).sum()
        };
        let mut last = f64::INFINITY;
        for bits in BITS {
            let most = f32::from(max_code(bits));
            let ours = error(&Rule::Own.rows(&values, 512, bits));
            let scales: Vec<f32> = values
                .chunks(512)
                .map(|row| half_step(row.iter().fold(0.0f32, |m, v| m.max(v.abs())) / most))
                .collect();
            let codes = values.iter().enumerate().map(|(i, &v)| code(v, scales[i / 512], most)).collect();
            let plain = error(&Coded { codes, scales });
            assert!(ours <= plain, "{bits} bits: {ours} against {plain}");
            assert!(bits > 4 || ours < 0.8 * plain, "{bits} bits: {ours} against {plain}");
            assert!(ours < 0.5 * last, "{bits} bits: {ours} after {last}");
            last = ours;
        }
    }

    #[test]
    fn rows_of_zeros_and_empty_ones_are_coded() {
        for rule in [Rule::Challenge, Rule::Pr1607, Rule::Pr1382, Rule::Own] {
            let coded = rule.rows(&[0.0; 6], 3, 4);
            assert_eq!(coded.codes, [0; 6], "{rule:?}");
            assert_eq!(coded.scales.len(), 2);
            assert!(coded.scales.iter().all(|s| s.is_finite()));
            assert!(rule.rows(&[], 3, 4).codes.is_empty());
            assert!(rule.rows(&[], 0, 4).scales.is_empty());
            assert_eq!(rule.whole(&[0.0; 2], 6).codes, [0; 2]);
            assert_eq!(rule.whole(&[], 6).scales.len(), 1);
        }
    }

    #[test]
    fn rows_too_small_for_a_step_are_zeros() {
        // 1e-8 / 127 is below float16's least number, 6e-8; 1e-4 / 127 is above it.
        let coded = Rule::Own.rows(&[1e-8, -1e-8, 1e-4, -1e-4], 2, 8);
        assert_eq!((&coded.codes[..2], coded.scales[0]), (&[0, 0][..], 0.0));
        assert!(coded.scales[1] > 0.0 && coded.codes[2] > 100 && coded.codes[3] < -100, "{coded:?}");
        let coded = Rule::Own.whole(&[1e-8, -1e-8], 8);
        assert_eq!((coded.codes, coded.scales), (vec![0, 0], vec![0.0]));
    }

    fn rows8(values: &[f32], cols: usize) -> (Vec<i8>, Vec<f32>) {
        let Coded { codes, scales } = Rule::Challenge.rows(values, cols, 8);
        (codes, scales)
    }

    fn whole8(values: &[f32]) -> (Vec<i8>, f32) {
        let Coded { codes, scales } = Rule::Challenge.whole(values, 8);
        (codes, scales[0])
    }

    #[test]
    fn rows_use_the_scale_floor_and_round_half_to_even() {
        // Clip below 1: the step is 1/127 whatever the clip.
        let half = |k: f32| k / 127.0;
        let (codes, scales) = rows8(&[half(0.5), half(1.5), half(2.5), half(-0.5), half(-1.5), 0.25], 6);
        assert_eq!(scales, [1.0 / 127.0]);
        assert_eq!(codes, [0, 2, 2, 0, -2, 32]);
        // Clip above 1: the largest magnitude gets code 127.
        let (codes, scales) = rows8(&[2.54, -2.54, 1.27, 0.0], 4);
        assert!((scales[0] - 0.02).abs() < 1e-6);
        assert_eq!((codes[0], codes[1], codes[3]), (127, -127, 0));
    }

    #[test]
    fn an_all_zero_tensor_has_scale_one() {
        assert_eq!(whole8(&[0.0; 4]), (vec![0; 4], 1.0));
        assert_eq!(whole8(&[1e-45, 0.0]), (vec![0; 2], 1.0));
        assert_eq!(whole8(&[]), (vec![], 1.0));
    }
}
