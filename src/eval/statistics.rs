//! Comparing runs over seeds: Welch's t-test and the challenge's record rule (spec/challenge.md section 1).

use statrs::distribution::{ContinuousCDF, StudentsT};

/// The least improvement of a record, in nats per token.
pub const RECORD_NATS: f64 = 0.005;

/// The level at which it must be shown.
pub const RECORD_P: f64 = 0.01;

/// Mean and standard deviation of a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Values.
    pub count: usize,
    /// Their mean; NaN of none.
    pub mean: f64,
    /// Their standard deviation, over `count - 1`; NaN of fewer than two.
    pub std: f64,
}

impl Sample {
    /// Of these values.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean) * (value - mean)).sum();
        // Of fewer than two values it is unknown, not zero.
        let std = if values.len() < 2 { f64::NAN } else { (squares / (n - 1.0)).sqrt() };
        Self { count: values.len(), mean, std }
    }

    /// The variance of the mean.
    fn error(&self) -> f64 {
        self.std * self.std / self.count as f64
    }
}

/// Runs against those that they should beat. Losses are in nats per token, lower is better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// The runs.
    pub runs: Sample,
    /// Those that they are compared with.
    pub against: Sample,
    /// `runs.mean - against.mean`: below 0 the runs are better.
    pub delta_nats: f64,
    /// Welch's t of equal means; NaN where either side has fewer than two values.
    pub t: f64,
    /// Its degrees of freedom, by Welch and Satterthwaite.
    pub degrees: f64,
    /// The two-sided probability of such a t from equal means.
    pub p: f64,
    /// The one-sided probability of such losses from an improvement of less than [`RECORD_NATS`].
    pub p_record: f64,
}

impl Comparison {
    /// Compares the losses of both.
    pub fn of(runs: &[f64], against: &[f64]) -> Self {
        let (runs, against) = (Sample::of(runs), Sample::of(against));
        let delta_nats = runs.mean - against.mean;
        let (a, b) = (runs.error(), against.error());
        let error = (a + b).sqrt();
        let squares = |error: f64, sample: &Sample| error * error / (sample.count as f64 - 1.0);
        let degrees = (a + b) * (a + b) / (squares(a, &runs) + squares(b, &against));
        let t = delta_nats / error;
        let below = |t: f64| probability_below(t, degrees, error);
        let p = 2.0 * below(-t.abs());
        let p_record = below((delta_nats + RECORD_NATS) / error);
        Self { runs, against, delta_nats, t, degrees, p, p_record }
    }

    /// Whether the challenge takes it for a record: better by at least [`RECORD_NATS`], and that shown at [`RECORD_P`].
    pub fn is_record(&self) -> bool {
        -self.delta_nats >= RECORD_NATS && self.p_record < RECORD_P
    }
}

/// `P(T < t)` of Student's distribution. Samples without any spread leave no doubt.
fn probability_below(t: f64, degrees: f64, error: f64) -> f64 {
    if error == 0.0 {
        return match t {
            t if t < 0.0 => 0.0,
            t if t > 0.0 => 1.0,
            // 0 / 0: the same means.
            _ => 0.5,
        };
    }
    match StudentsT::new(0.0, 1.0, degrees) {
        Ok(student) if !t.is_nan() => student.cdf(t),
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * b.abs().max(1e-9)
    }

    #[test]
    fn known_tables_of_students_distribution() {
        // Two samples of equal size and spread: 2 (n - 1) degrees; t of 95 %, two-sided, at 4 degrees is 2.776.
        let error = (2.0f64 / 3.0).sqrt();
        let shift = 2.776_445_105_197_793 * error;
        let found = Comparison::of(&[-1.0 + shift, shift, 1.0 + shift], &[-1.0, 0.0, 1.0]);
        assert!(close(found.degrees, 4.0) && close(found.t, 2.776_445_105_197_793), "{found:?}");
        assert!((found.p - 0.05).abs() < 1e-9, "{found:?}");
        assert!(!found.is_record());
        // One degree of freedom on one side only: the distribution's tail is 1/2 - atan(t)/pi.
        let found = Comparison::of(&[0.0, 2.0], &[5.0, 5.0]);
        assert!(close(found.degrees, 1.0) && close(found.t, -4.0));
        assert!(close(found.p, 1.0 - 2.0 / std::f64::consts::PI * 4f64.atan()), "{found:?}");
    }

    #[test]
    fn welch_weighs_the_two_spreads() {
        // Worked by hand: variances 2.5 and 10, means 3 and 6.
        let found = Comparison::of(&[1.0, 2.0, 3.0, 4.0, 5.0], &[2.0, 4.0, 6.0, 8.0, 10.0]);
        assert!(close(found.runs.std, 2.5f64.sqrt()) && close(found.against.std, 10f64.sqrt()));
        assert!(close(found.t, -3.0 / 2.5f64.sqrt()));
        assert!(close(found.degrees, 2.5 * 2.5 / (0.25 / 4.0 + 4.0 / 4.0)));
        assert!(close(found.delta_nats, -3.0));
        assert!(found.p > 0.05 && found.p < 0.15, "{found:?}");
    }

    #[test]
    fn a_record_is_better_by_the_margin_and_shown_to_be() {
        let against = [1.8828, 1.8816, 1.8822];
        let shifted = |by: f64| against.map(|loss| loss - by);
        // Far over the margin for this spread.
        assert!(Comparison::of(&shifted(0.01), &against).is_record());
        // Means differ for certain, but not by 0.005.
        let close_by = Comparison::of(&shifted(0.004), &against);
        assert!(close_by.p < 0.01 && !close_by.is_record(), "{close_by:?}");
        // Over the margin, but by less than this spread shows.
        let barely = Comparison::of(&shifted(0.0052), &against);
        assert!(barely.p < 0.01 && barely.p_record > 0.01 && !barely.is_record(), "{barely:?}");
        // Worse is no record, however sure.
        assert!(!Comparison::of(&shifted(-0.01), &against).is_record());
        // A spread as wide as the difference shows nothing.
        assert!(!Comparison::of(&[1.86, 1.88, 1.87], &against).is_record());
    }

    #[test]
    fn single_runs_have_no_spread_and_equal_ones_no_doubt() {
        let single = Comparison::of(&[1.0], &[1.1, 1.2]);
        assert!(single.t.is_nan() && single.p.is_nan() && single.p_record.is_nan() && !single.is_record());
        assert!(single.runs.std.is_nan() && close(single.delta_nats, -0.15));
        let same = Comparison::of(&[1.0, 1.0], &[1.0, 1.0]);
        assert_eq!((same.p, same.delta_nats), (1.0, 0.0));
        assert!(!same.is_record());
        let certain = Comparison::of(&[1.0, 1.0], &[1.25, 1.25]);
        assert_eq!((certain.p, certain.p_record), (0.0, 0.0));
        assert!(certain.is_record());
    }
}
