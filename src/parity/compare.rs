//! The comparison of one result with its expected tensor.

use crate::host::HostTensor;

/// How far a result may be from what is expected.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Tolerance {
    /// The largest absolute error over the largest absolute value of the expected tensor; 0 asks for equality.
    Relative(f64),
    /// The largest absolute error.
    Absolute(f64),
    /// The number of elements that are not equal.
    Differing(f64),
}

impl Tolerance {
    /// The bound.
    pub fn bound(self) -> f64 {
        match self {
            Self::Relative(bound) | Self::Absolute(bound) | Self::Differing(bound) => bound,
        }
    }
}

/// What a comparison found.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Finding {
    /// The error in the tolerance's own measure, where both tensors have one.
    pub error: Option<f64>,
    /// Whether it is within the tolerance.
    pub ok: bool,
    /// Where and why not.
    pub note: Option<String>,
}

impl Finding {
    fn refused(note: String) -> Self {
        Self { error: None, ok: false, note: Some(note) }
    }
}

/// Compares a result with what is expected. A tensor of zeros is measured absolutely; one element may have any rank.
pub(super) fn compare(got: &HostTensor, expected: &HostTensor, tolerance: Tolerance) -> Finding {
    let single = got.numel() == 1 && expected.numel() == 1;
    if got.shape != expected.shape && !single {
        return Finding::refused(format!(
            "the result has shape {:?}, expected {:?}",
            got.shape, expected.shape
        ));
    }
    let (values, wanted) = (got.to_f64(), expected.to_f64());
    if let Some(at) = wanted.iter().position(|value| !value.is_finite()) {
        let at = position(at, &expected.shape);
        return Finding::refused(format!("the fixture itself holds a number that is not finite at {at:?}"));
    }
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        let found = position(at, &got.shape);
        return Finding::refused(format!("the result holds {} at {found:?}", values[at]));
    }
    let (mut worst, mut differing) = ((0, 0.0), 0);
    for (at, (value, wanted)) in values.iter().zip(&wanted).enumerate() {
        let error = (value - wanted).abs();
        differing += usize::from(error > 0.0);
        if error > worst.1 {
            worst = (at, error);
        }
    }
    let largest = wanted.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    let error = match tolerance {
        Tolerance::Relative(_) if largest > 0.0 => worst.1 / largest,
        Tolerance::Differing(_) => differing as f64,
        _ => worst.1,
    };
    let ok = error <= tolerance.bound();
    let note = (!ok).then(|| {
        let at = position(worst.0, &expected.shape);
        format!("worst at {at:?}: {:e}, expected {:e}", values[worst.0], wanted[worst.0])
    });
    Finding { error: Some(error), ok, note }
}

/// The indices of an element in a tensor of this shape.
fn position(mut element: usize, shape: &[usize]) -> Vec<usize> {
    let mut indices: Vec<usize> = shape
        .iter()
        .rev()
        .map(|size| {
            let index = element % size.max(&1);
            element /= size.max(&1);
            index
        })
        .collect();
    indices.reverse();
    indices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(values: &[f64]) -> HostTensor {
        HostTensor::from_f64("x", &[values.len()], values)
    }

    #[test]
    fn the_error_is_relative_to_the_largest_expected_value() {
        let found = compare(&host(&[1.0, -4.1]), &host(&[1.0, -4.0]), Tolerance::Relative(0.03));
        assert!((found.error.unwrap() - 0.025).abs() < 1e-12 && found.ok);
        let found = compare(&host(&[1.0, -4.1]), &host(&[1.0, -4.0]), Tolerance::Relative(0.02));
        assert!(!found.ok && found.note.unwrap().starts_with("worst at [1]: -4.1e0, expected -4e0"));
        let found = compare(&host(&[1.0, -4.1]), &host(&[1.0, -4.0]), Tolerance::Absolute(0.05));
        assert!((found.error.unwrap() - 0.1).abs() < 1e-12 && !found.ok);
        assert!(compare(&host(&[2.0]), &host(&[2.0]), Tolerance::Relative(0.0)).ok);
        assert!(!compare(&host(&[2.0 + 1e-15]), &host(&[2.0]), Tolerance::Relative(0.0)).ok);
        let found = compare(&host(&[2.0, 3.0, 4.0]), &host(&[2.0, 9.0, 5.0]), Tolerance::Differing(2.0));
        assert!(found.error == Some(2.0) && found.ok);
        assert!(!compare(&host(&[2.0, 3.0]), &host(&[2.0, 4.0]), Tolerance::Differing(0.5)).ok);
        // Against zeros the error is absolute.
        assert_eq!(compare(&host(&[1e-3]), &host(&[0.0]), Tolerance::Relative(0.1)).error, Some(1e-3));
    }

    #[test]
    fn what_cannot_be_compared_fails_with_the_reason() {
        let infinite = Tolerance::Relative(f64::MAX);
        for (got, expected, reason) in [
            (host(&[1.0, f64::NAN]), host(&[1.0, 1.0]), "the result holds NaN at [1]"),
            (host(&[f64::INFINITY]), host(&[f64::INFINITY]), "the fixture itself holds a number"),
            (host(&[1.0]), host(&[1.0, 1.0]), "the result has shape [1], expected [2]"),
        ] {
            let found = compare(&got, &expected, infinite);
            assert!(!found.ok && found.error.is_none());
            assert!(found.note.as_ref().unwrap().starts_with(reason), "{found:?}");
        }
        let scalar = HostTensor::from_f64("x", &[], &[1.0]);
        assert!(compare(&scalar, &host(&[1.0]), Tolerance::Relative(0.0)).ok);
        assert_eq!(position(5, &[2, 3]), [1, 2]);
    }
}
