//! Learning-rate multiplier and Muon momentum over a run (spec/challenge.md section 4).

use crate::recipe::Recipe;

/// The factor on every learning rate at `step` (completed steps), `elapsed_ms` of training so far.
///
/// Without a wallclock cap the last `warmdown_iters` of `iterations` fall linearly to zero. With one, the fall starts
/// when the remaining time is what `warmdown_iters` steps take at the average so far.
pub fn lr_multiplier(recipe: &Recipe, step: usize, elapsed_ms: f64) -> f64 {
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
    fn momentum_rises_linearly_and_stays() {
        let recipe = Recipe { muon_momentum_warmup_steps: 4, ..Recipe::default() };
        let expected = [0.85, 0.875, 0.9, 0.925, 0.95, 0.95];
        for (step, expected) in expected.into_iter().enumerate() {
            assert!((muon_momentum(&recipe, step) - expected).abs() < 1e-12, "step {step}");
        }
    }
}
