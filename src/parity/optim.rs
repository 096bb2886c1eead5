//! `optim.*`: some steps of one optimizer on one tensor.

use super::case::Case;
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::ops::{Param, Plain};
use crate::optim::adam::{Adam, AdamConfig};
use crate::optim::muon::{Muon, MuonConfig, MuonParam, NewtonSchulz};
use burn::tensor::Tensor;

/// The names of a series of steps: a start `p0`, gradients `grad0, grad1, ...` and results `p1, p2, ...`.
struct Series {
    start: String,
    grads: String,
    results: String,
}

impl Series {
    /// `in.p0`, `in.grad0, ...`, `out.p1, ...`.
    fn plain() -> Self {
        Self { start: "in.p0".into(), grads: "in.grad".into(), results: "out.p".into() }
    }

    /// `NAME.p0`, `NAME.grad0, ...`, `NAME.p1, ...`.
    fn named(name: &str) -> Self {
        Self { start: format!("{name}.p0"), grads: format!("{name}.grad"), results: format!("{name}.p") }
    }

    /// Steps through the gradients that the file holds.
    fn run<P: Plain, const D: usize>(
        &self,
        case: &mut Case<'_, P>,
        param: &Param<P>,
        shape: &[usize],
        mut step: impl FnMut(),
    ) -> Result<()> {
        let mut taken = 0;
        while case.tensors.peek(&format!("{}{taken}", self.grads)).is_some() {
            let grad = format!("{}{taken}", self.grads);
            case.expect_shape(&grad, shape)?;
            param.accumulate(case.flat(&grad)?.0.reshape(param.value::<D>().dims()));
            step();
            taken += 1;
            case.give(&format!("{}{taken}", self.results), shape, Some(param.flat()))?;
        }
        if taken == 0 {
            return Err(Error::input(
                format!("no tensor {}0", self.grads),
                "the file",
                "a gradient for each step",
            ));
        }
        Ok(())
    }
}

/// AdamW on a tensor of any rank, as one row of its elements.
pub(super) fn adamw<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["lr", "betas", "eps", "weight_decay"])?;
    let Some(&[beta1, beta2]) = config.numbers("betas")?.as_deref() else {
        return Err(Error::input("betas", "config", "two numbers"));
    };
    let lr = config.needed("lr")?;
    let config = AdamConfig {
        beta1,
        beta2,
        eps: config.needed("eps")?,
        weight_decay: config.number("weight_decay")?.unwrap_or(0.0),
    };
    let (value, shape) = case.flat("in.p0")?;
    let param = Param::new("p", value, case.dtype);
    let mut adam = Adam::new(vec![(param.clone(), false)], lr, config);
    Series::plain().run::<P, 1>(case, &param, &shape, || adam.step(1.0, None))
}

/// Muon on one matrix (`in.*`, `out.*`) or on several by name (`NAME.p0`, ...), which may also hold Newton-Schulz alone.
pub(super) fn muon<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["dtype", "lr", "momentum", "nesterov", "scale", "steps", "wd"])?;
    config.formula("scale", "sqrt(max(1,rows/cols))")?;
    let lr = config.needed("lr")?;
    let momentum = config.needed("momentum")?;
    let newton_schulz = iteration(case)?;
    let config = MuonConfig {
        newton_schulz,
        nesterov: config.flag("nesterov", true)?,
        weight_decay: config.number("wd")?.unwrap_or(0.0),
        dtype: case.dtype,
        shards: 1,
    };
    let names = case.tensors.iter().filter_map(|(name, _)| name.strip_suffix(".p0"));
    let names: Vec<String> = names.map(String::from).collect();
    if names.is_empty() {
        return Err(Error::input("no tensor in.p0", "the file", "a matrix to start from"));
    }
    for name in names {
        let series = if name == "in" { Series::plain() } else { Series::named(&name) };
        let param = Param::new("p", case.float::<2>(&series.start)?, case.dtype);
        let matrix =
            MuonParam { param: param.clone(), lrs: vec![lr], bf16: false, bf16_state: false, whole: true };
        let mut muon = Muon::new(vec![matrix], config);
        let shape = param.shape().to_vec();
        series.run::<P, 2>(case, &param, &shape, || muon.step(1.0, momentum, None))?;
        let input = format!("{name}.ns_in");
        if case.tensors.peek(&input).is_some() {
            give_orthogonal(case, &input, &format!("{name}.ns_out"), newton_schulz)?;
        }
    }
    Ok(())
}

/// Newton-Schulz on `in.G[rows, columns]`: `out.X`, and its singular values `out.svals` in falling order.
pub(super) fn newton_schulz<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["coef", "dtype", "eps", "steps"])?;
    let mut newton_schulz = iteration(case)?;
    if let Some(coefficients) = config.numbers("coef")? {
        let three = coefficients.try_into();
        newton_schulz.coefficients = three.map_err(|_| Error::input("coef", "config", "three numbers"))?;
    }
    newton_schulz.eps = config.number("eps")?.unwrap_or(newton_schulz.eps);
    let x = give_orthogonal(case, "in.G", "out.X", newton_schulz)?;
    if let [rows, columns] = *x.shape.as_slice()
        && case.expects("out.svals", &[rows.min(columns)])
    {
        let values = singular_values(x.to_f64(), rows, columns);
        case.give_host(HostTensor::from_f64("out.svals", &[values.len()], &values));
    }
    Ok(())
}

/// The iteration with an entry's number of steps, in bf16 where the entry says that the peer's was.
fn iteration<P: Plain>(case: &Case<'_, P>) -> Result<NewtonSchulz> {
    let standard = NewtonSchulz { bf16: case.entry.says("bfloat16"), ..NewtonSchulz::default() };
    let steps = case.entry.section("config")?.count("steps")?.unwrap_or(standard.steps);
    if steps > 100 {
        return Err(Error::input(format!("steps = {steps}"), "config", "at most 100"));
    }
    Ok(NewtonSchulz { steps, ..standard })
}

fn give_orthogonal<P: Plain>(
    case: &mut Case<'_, P>,
    input: &str,
    output: &str,
    newton_schulz: NewtonSchulz,
) -> Result<HostTensor> {
    let g: Tensor<P, 2> = case.float(input)?;
    let [rows, columns] = g.dims();
    let x = newton_schulz.apply(g.reshape([1, rows, columns])).reshape([rows * columns]);
    let host = crate::model::params::to_host(output, &[rows, columns], x)?;
    case.give_host(host.clone());
    Ok(host)
}

/// The singular values of a matrix in falling order, by one-sided Jacobi rotations of its rows or columns.
fn singular_values(matrix: Vec<f64>, rows: usize, columns: usize) -> Vec<f64> {
    let (count, length) = (rows.min(columns), rows.max(columns));
    let at = |vector: usize, i: usize| match rows < columns {
        true => matrix[vector * columns + i],
        false => matrix[i * columns + vector],
    };
    let mut vectors: Vec<Vec<f64>> =
        (0..count).map(|vector| (0..length).map(|i| at(vector, i)).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    // Converges quadratically: some ten sweeps for any matrix that is finite.
    for _ in 0..40 {
        let mut rotated = false;
        for i in 0..count {
            for j in i + 1..count {
                let (a, b) = (dot(&vectors[i], &vectors[i]), dot(&vectors[j], &vectors[j]));
                let c = dot(&vectors[i], &vectors[j]);
                if c.abs() <= 1e-15 * (a * b).sqrt() || c == 0.0 {
                    continue;
                }
                rotated = true;
                let zeta = (b - a) / (2.0 * c);
                let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cos = 1.0 / tangent.hypot(1.0);
                let sin = cos * tangent;
                let (head, tail) = vectors.split_at_mut(j);
                for (x, y) in head[i].iter_mut().zip(&mut tail[0]) {
                    (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
                }
            }
        }
        if !rotated {
            break;
        }
    }
    let mut values: Vec<f64> = vectors.iter().map(|vector| dot(vector, vector).sqrt()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn singular_values_of_known_matrices() {
        assert_eq!(singular_values(vec![0.0, 3.0, -4.0, 0.0], 2, 2), [4.0, 3.0]);
        // Rank one: |u| |v|.
        let values = singular_values(vec![1.0, 2.0, 2.0, 2.0, 4.0, 4.0], 2, 3);
        assert!((values[0] - 45f64.sqrt()).abs() < 1e-12 && values[1].abs() < 1e-7, "{values:?}");
        let tall = singular_values(vec![1.0, 2.0, 2.0, 4.0, 2.0, 4.0], 3, 2);
        assert!((tall[0] - values[0]).abs() < 1e-12);
        // Squares add up to the squared Frobenius norm, products to the determinant.
        let values = singular_values(vec![2.0, 1.0, 0.5, -1.0, 3.0, 2.0, 0.0, 1.0, 4.0], 3, 3);
        let squares: f64 = values.iter().map(|v| v * v).sum();
        assert!((squares - 36.25).abs() < 1e-12);
        assert!((values.iter().product::<f64>() - 23.5).abs() < 1e-12, "{values:?}");
    }
}
