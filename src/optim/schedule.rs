//! Learning-rate multiplier and Muon momentum over a run (spec/challenge.md section 4).

use crate::recipe::{PR1382, PR1607, Recipe};

/// The factor on every learning rate at `step` (completed steps), `elapsed_ms` of training so far.
///
/// The first `lr_warmup_steps` rise linearly. Without a wallclock cap the last `warmdown_iters` of `iterations` fall to
/// zero. With one, the fall starts when the remaining time is what `warmdown_iters` steps take at the average so far.
/// It is linear, or half a cosine.
pub fn lr_multiplier(recipe: &Recipe, step: usize, elapsed_ms: f64) -> f64 {
    if step < recipe.lr_warmup_steps {
        return (step + 1) as f64 / recipe.lr_warmup_steps as f64;
    }
    let left = warmdown_left(recipe, step, elapsed_ms);
    if recipe.warmdown_shape == "cosine" && left < 1.0 {
        return 0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left)).cos());
    }
    left
}

/// How much of the warm-down is left: 1 before it, 0 at the end.
fn warmdown_left(recipe: &Recipe, step: usize, elapsed_ms: f64) -> f64 {
    let warmdown = recipe.warmdown_iters;
    if warmdown == 0 {
        return 1.0;
    }
    if recipe.max_wallclock_seconds <= 0.0 {
        let start = recipe.iterations.saturating_sub(warmdown);
        if (start..recipe.iterations).contains(&step) {
            return (recipe.iterations - step) as f64 / warmdown as f64;
        }
        return 1.0;
    }
    let step_ms = elapsed_ms / step.max(1) as f64;
    let warmdown_ms = warmdown as f64 * step_ms;
    let remaining = (recipe.max_wallclock_seconds * 1000.0 - elapsed_ms).max(0.0);
    if remaining <= warmdown_ms { remaining / warmdown_ms.max(1e-9) } else { 1.0 }
}

/// Whether a step at the multiplier `lr_mul` trains with quantised weights, `elapsed_ms` of training so far.
pub fn is_quantised(recipe: &Recipe, lr_mul: f64, elapsed_ms: f64) -> bool {
    let cap = recipe.max_wallclock_seconds * 1000.0;
    match recipe.system.as_str() {
        PR1607 => {
            let by_clock =
                recipe.qat_start_frac > 0.0 && cap > 0.0 && elapsed_ms / cap >= recipe.qat_start_frac;
            by_clock || lr_mul < recipe.late_qat_threshold
        }
        PR1382 => recipe.qat_enabled || lr_mul < recipe.late_qat_threshold,
        _ => false,
    }
}

/// Muon's momentum at `step`: linear from its start to its end over the warm-up steps.
pub fn muon_momentum(recipe: &Recipe, step: usize) -> f64 {
    let warmup = recipe.muon_momentum_warmup_steps;
    let part = if warmup == 0 { 1.0 } else { (step as f64 / warmup as f64).min(1.0) };
    (1.0 - part) * recipe.muon_momentum_warmup_start + part * recipe.muon_momentum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(iterations: usize, warmdown_iters: usize, max_wallclock_seconds: f64) -> Recipe {
        Recipe { iterations, warmdown_iters, max_wallclock_seconds, ..Recipe::default() }
    }

    #[test]
    fn steps_warm_down_over_the_last_iterations() {
        let recipe = recipe(6, 3, 0.0);
        let muls: Vec<f64> = (0..7).map(|step| lr_multiplier(&recipe, step, 1e9)).collect();
        assert_eq!(muls, [1.0, 1.0, 1.0, 1.0, 2.0 / 3.0, 1.0 / 3.0, 1.0]);
    }

    #[test]
    fn the_wallclock_warms_down_when_the_rest_is_what_the_warmdown_takes() {
        let recipe = recipe(20_000, 100, 10.0);
        assert_eq!(lr_multiplier(&recipe, 0, 0.0), 1.0);
        // 20 ms a step: the warm-down takes 2 s, so it starts at 8 s.
        assert_eq!(lr_multiplier(&recipe, 399, 7980.0), 1.0);
        assert!((lr_multiplier(&recipe, 450, 9000.0) - 0.5).abs() < 1e-12);
        assert_eq!(lr_multiplier(&recipe, 510, 10_200.0), 0.0);
    }

    #[test]
    fn the_warm_up_rises_linearly_and_the_cosine_falls_by_half_a_wave() {
        let warm = Recipe { lr_warmup_steps: 4, ..recipe(100, 0, 0.0) };
        let muls: Vec<f64> = (0..5).map(|step| lr_multiplier(&warm, step, 0.0)).collect();
        assert_eq!(muls, [0.25, 0.5, 0.75, 1.0, 1.0]);
        let cosine = Recipe { warmdown_shape: "cosine".into(), ..recipe(8, 4, 0.0) };
        let muls: Vec<f64> = (3..8).map(|step| lr_multiplier(&cosine, step, 0.0)).collect();
        let wave = |left: f64| 0.5 * (1.0 - (std::f64::consts::PI * left).cos());
        for (mul, left) in muls.iter().zip([1.0, 1.0, 0.75, 0.5, 0.25]) {
            assert!((mul - wave(left)).abs() < 1e-12, "{mul} at {left}");
        }
        // PR #1607's run: 3,500 steps of warm-down in 1,000 steps begin below full rate.
        assert!((lr_multiplier(&recipe(1000, 3500, 0.0), 0, 0.0) - 1000.0 / 3500.0).abs() < 1e-12);
    }

    #[test]
    fn weights_are_quantised_late_by_rate_or_by_clock() {
        let late = Recipe { system: PR1607.into(), ..recipe(1000, 3500, 0.0) };
        let first = (0..1000).find(|step| is_quantised(&late, lr_multiplier(&late, *step, 0.0), 0.0));
        assert_eq!(first, Some(476), "spec/pr1607.md section 5");
        let clock = Recipe { qat_start_frac: 0.5, max_wallclock_seconds: 10.0, ..late };
        assert!(!is_quantised(&clock, 1.0, 4999.0) && is_quantised(&clock, 1.0, 5000.0));
        assert!(!is_quantised(&Recipe::default(), 0.0, 1e9));
        let always = Recipe { system: PR1382.into(), qat_enabled: true, ..Recipe::default() };
        assert!(is_quantised(&always, 1.0, 0.0));
    }

    #[test]
    fn momentum_rises_linearly_and_stays() {
        let recipe = Recipe { muon_momentum_warmup_steps: 4, ..Recipe::default() };
        let expected = [0.85, 0.875, 0.9, 0.925, 0.95, 0.95];
        for (step, expected) in expected.into_iter().enumerate() {
            assert!((muon_momentum(&recipe, step) - expected).abs() < 1e-12, "step {step}");
        }
    }
}
