//! The optimizers' steps on every device: each against a computation in f64 on the host, then whole optimizers.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error that the reference itself makes in the device's precision.
//! Nothing is rounded to bf16 in what is exact: where an op is to round, so does the reference. Errors are shares of the
//! largest value of their tensor.

mod common;

use burn::tensor::{DType, Tensor};
use common::{Random, Worst, affordable, all_pass, download, epsilon, round, targets};
use common::{upload_as as upload, worst};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{DeviceChoice, Job, Precision, Target, guard, run};
use fairway::model::Model;
use fairway::ops::Plain;
use fairway::ops::update::{
    self, AdamConfig, AdamInput, AdamOutput, MomentumConfig, MomentumInput, OrthogonalInput, Updated,
};
use fairway::optim::{OptimizerState, Optimizers, Rounding};
use fairway::recipe::Recipe;

const CPU: burn_ndarray::NdArrayDevice = burn_ndarray::NdArrayDevice::Cpu;

/// The type of master values.
fn master(precision: Precision) -> DType {
    if precision == Precision::F64 { DType::F64 } else { DType::F32 }
}

/// How many tensors to take: `many`, more than one launch takes, where tensors are taken many at a time.
fn count(target: &Target, few: usize, many: usize) -> usize {
    if matches!(target.choice, DeviceChoice::Cuda(_)) { many } else { few }
}

/// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
fn poison<B: Plain>(sizes: impl Iterator<Item = usize>, device: &B::Device) {
    let full = |size| Tensor::<B, 1>::full([size], f32::NAN, (device, DType::F32));
    let poison: Vec<Tensor<B, 1>> = sizes.flat_map(|size| (0..4).map(move |_| size)).map(full).collect();
    drop(poison);
}

/// Numbers that f32 has.
fn numbers(random: &mut Random, count: usize, scale: f64) -> Vec<f64> {
    (0..count).map(|_| round(random.uniform() * scale, Precision::F32)).collect()
}

/// Rows of numbers, one a tensor.
type Rows = Vec<Vec<f64>>;

fn worst_of(got: &Rows, exact: &Rows) -> (usize, Worst) {
    assert_eq!(got.len(), exact.len());
    let of = |(i, (got, exact)): (usize, (&Vec<f64>, &Vec<f64>))| {
        assert_eq!(got.len(), exact.len(), "of tensor {i}");
        let scale = exact.iter().fold(f64::MIN_POSITIVE, |largest, x| largest.max(x.abs()));
        (i, worst(got, exact, got.len().max(1), |_| scale))
    };
    let all = got.iter().zip(exact).enumerate().map(of);
    // A NaN is the worst there is.
    let key = |worst: &Worst| if worst.error.is_nan() { f64::INFINITY } else { worst.error };
    all.max_by(|a, b| key(&a.1).total_cmp(&key(&b.1))).expect("a tensor")
}

/// Whether `got` is within the tolerance; prints the worst element.
fn is_within(what: &str, got: &Rows, reference: &Rows, exact: &Rows, least: f64) -> bool {
    let tolerance = 2.0 * worst_of(reference, exact).1.error.max(least);
    let (tensor, worst) = worst_of(got, exact);
    let share = worst.error / tolerance;
    let differ = got.iter().flatten().zip(reference.iter().flatten()).filter(|(a, b)| a != b).count();
    println!(
        "{what:<42} {:>9.2e} {tolerance:>9.2e} {:>5.0}%  {tensor}[{}]: {:.8e}, expected {:.8e}; {differ} of {} not the reference's{}",
        worst.error,
        100.0 * share,
        worst.column,
        worst.got,
        worst.expected,
        got.iter().map(Vec::len).sum::<usize>(),
        if share <= 1.0 { "" } else { "  FAILED" }
    );
    share <= 1.0
}

/// The least error to allow for, of results in `precision`.
fn least(precision: Precision) -> f64 {
    if precision == Precision::F64 { 64.0 * f64::EPSILON } else { f64::from(f32::EPSILON) }
}

fn assert_same_bits(what: &str, a: &Rows, b: &Rows) {
    let same = a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same && a.len() == b.len(), "{what} differs");
}

fn only(rows: &Rows, keep: impl Fn(usize) -> bool) -> Rows {
    rows.iter().enumerate().filter(|(i, _)| keep(*i)).map(|(_, row)| row.clone()).collect()
}

/// A copy, where there is one, is the value cast; on CUDA there is one wherever bf16 is asked for.
fn check_copy<B: Plain, const D: usize>(updated: Updated<B, D>, precision: Precision) {
    assert!(updated.copy.is_some() || precision != Precision::Bf16, "a copy is made beside the value");
    let Some(copy) = updated.copy else { return };
    assert_eq!(copy.dtype(), precision.dtype());
    let value = download(updated.value).into_iter().map(|value| round(value, precision));
    assert!(download(copy).into_iter().eq(value), "the copy is the value cast");
}

// ---- Adam -----------------------------------------------------------------------------------------------------------

/// One tensor of a step.
struct AdamCase {
    value: Vec<f64>,
    grad: Vec<f64>,
    moments: Option<[Vec<f64>; 2]>,
    config: AdamConfig,
    lr: f64,
    steps: u64,
    bf16: bool,
}

/// Tensors of sizes around packs and blocks.
fn adam_cases(count: usize) -> Vec<AdamCase> {
    const SIZES: [usize; 11] = [1, 3, 4, 5, 255, 1023, 1024, 2047, 2048, 4099, 20_000];
    let mut random = Random(3);
    let case = |i: usize| {
        let size = SIZES[i % SIZES.len()];
        let scale = [1.0, 1e-3, 30.0][i % 3];
        let mut row = |scale: f64| numbers(&mut random, size, scale);
        let (value, grad, m) = (row(1.0), row(scale), row(scale));
        let v = row(scale * scale).into_iter().map(|v| v.abs() + round(1e-3 * scale * scale, Precision::F32));
        let v = v.map(|v| round(v, Precision::F32)).collect();
        AdamCase {
            value,
            grad,
            moments: (i % 4 != 1).then_some([m, v]),
            config: AdamConfig {
                beta1: [0.9, 0.7][i % 2],
                beta2: 0.95,
                eps: [1e-8, 1e-10][i % 2],
                weight_decay: [0.0, 0.1][i / 2 % 2],
            },
            lr: [0.04, 0.6, 0.008][i / 3 % 3],
            steps: [1, 2, 1000][i % 3],
            bf16: i % 5 < 2,
        }
    };
    (0..count).map(case).collect()
}

impl AdamCase {
    fn exact(&self, scale: f64) -> [Vec<f64>; 3] {
        let AdamConfig { beta1, beta2, eps, weight_decay } = self.config;
        let mut new = [Vec::new(), Vec::new(), Vec::new()];
        for (i, (value, grad)) in self.value.iter().zip(&self.grad).enumerate() {
            let g = grad * scale;
            let [m, v] = self.moments.as_ref().map_or([0.0; 2], |moments| [moments[0][i], moments[1][i]]);
            let (m, v) = (beta1 * m + (1.0 - beta1) * g, beta2 * v + (1.0 - beta2) * g * g);
            let m_hat = m / (1.0 - beta1.powi(self.steps as i32));
            let v_hat = v / (1.0 - beta2.powi(self.steps as i32));
            new[0].push(value * (1.0 - self.lr * weight_decay) - self.lr * m_hat / (v_hat.sqrt() + eps));
            new[1].push(m);
            new[2].push(v);
        }
        new
    }

    fn input<B: Plain>(&self, device: &B::Device, precision: Precision) -> AdamInput<B> {
        let row = |values: &Vec<f64>| upload::<B, 1>(values, [values.len()], device, master(precision));
        AdamInput {
            value: row(&self.value),
            grad: row(&self.grad),
            moments: self.moments.as_ref().map(|moments| moments.each_ref().map(row)),
            config: self.config,
            lr: self.lr,
            steps: self.steps,
            bf16: self.bf16,
            copy: (precision.dtype() != master(precision)).then_some(precision.dtype()),
        }
    }
}

fn adam_rows<B: Plain>(outputs: Vec<AdamOutput<B>>) -> [Rows; 3] {
    let mut rows = [Vec::new(), Vec::new(), Vec::new()];
    for AdamOutput { updated, moments: [m, v] } in outputs {
        for (rows, new) in rows.iter_mut().zip([updated.value, m, v]) {
            rows.push(download(new));
        }
    }
    rows
}

struct AdamAgainstTheHost;

impl Job for AdamAgainstTheHost {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        println!("\n{} {precision}", target.label);
        let cases = adam_cases(count(target, 31, 131));
        if !affordable(cases.iter().map(|case| case.value.len()).sum()) {
            return Ok(true);
        }
        let mut good = true;
        for scale in [None, Some(0.37f32)] {
            let factor = scale.map_or(1.0, f64::from);
            let factors =
                |device: &B::Device| scale.map(|_| upload::<B, 1>(&[factor], [1], device, master(precision)));
            let inputs: Vec<AdamInput<B>> = cases.iter().map(|case| case.input(device, precision)).collect();
            poison::<B>(cases.iter().map(|case| case.value.len()), device);
            let outputs = B::adam_step(inputs.clone(), factors(device));
            let got = adam_rows(outputs.clone());
            outputs.into_iter().for_each(|output| check_copy(output.updated, precision));
            let inputs_of_reference =
                cases.iter().map(|case| case.input::<Cpu>(&CPU, Precision::F32)).collect();
            let factor_of_reference = scale.map(|_| upload::<Cpu, 1>(&[factor], [1], &CPU, DType::F32));
            let reference = adam_rows(update::adam_step::<Cpu>(inputs_of_reference, factor_of_reference));
            let exact: Vec<[Vec<f64>; 3]> = cases.iter().map(|case| case.exact(factor)).collect();
            for (part, name) in ["value", "m", "v"].into_iter().enumerate() {
                let exact: Rows = exact.iter().map(|new| new[part].clone()).collect();
                for bf16 in [false, true] {
                    let of = |rows: &Rows| only(rows, |i| cases[i].bf16 == bf16);
                    // The f32 reference is no measure of f64 but where both round to bf16.
                    let exact = of(&exact);
                    let reference = if precision == Precision::F64 && !bf16 {
                        exact.clone()
                    } else {
                        of(&reference[part])
                    };
                    let what = format!("adam {name}, bf16 {bf16}, scale {factor:.2}");
                    good &= is_within(&what, &of(&got[part]), &reference, &exact, least(precision));
                }
            }
            let again = adam_rows(B::adam_step(inputs, factors(device)));
            for (a, b) in again.iter().zip(&got) {
                assert_same_bits("a repeated Adam step", a, b);
            }
        }
        assert!(B::adam_step(Vec::new(), None).is_empty());
        Ok(good)
    }
}

// ---- Muon -----------------------------------------------------------------------------------------------------------

/// Number (on CUDA of the first 100 more, more than one launch takes), rows, columns: odd and whole packs, several
/// blocks, the last full or not.
const MATRICES: [[usize; 3]; 5] = [[50, 3, 5], [4, 16, 24], [3, 65, 33], [2, 96, 128], [3, 65, 64]];

struct MuonAgainstTheHost;

impl Job for MuonAgainstTheHost {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        println!("\n{} {}", target.label, target.precision);
        let mut good = true;
        for (number, [few, rows, columns]) in MATRICES.into_iter().enumerate() {
            let shape = [if number == 0 { count(target, few, few + 100) } else { few }, rows, columns];
            if !affordable(shape.iter().product()) {
                continue;
            }
            for nesterov in [true, false] {
                good &= momentum::<B>(shape, nesterov, number as u64, device, target.precision);
            }
            good &= orthogonal::<B>(shape, number as u64, device, target.precision);
        }
        Ok(good)
    }
}

fn momentum<B: Plain>(
    [count, rows, columns]: [usize; 3],
    nesterov: bool,
    seed: u64,
    device: &B::Device,
    precision: Precision,
) -> bool {
    let mut random = Random(seed);
    let (scale, mu) = (0.37f32, 0.95);
    let mut all =
        |_: usize| [numbers(&mut random, rows * columns, 1.0), numbers(&mut random, rows * columns, 5.0)];
    let values: Vec<[Vec<f64>; 2]> = (0..count).map(&mut all).collect();
    let (is_bf16, is_fresh) = (|i: usize| i % 3 == 1, |i: usize| i % 4 == 2);
    let mut exact = [Vec::new(), Vec::new()];
    for (i, [grad, old]) in values.iter().enumerate() {
        let kept = if is_fresh(i) { 0.0 } else { mu };
        let g: Vec<f64> = grad.iter().map(|g| g * f64::from(scale)).collect();
        let buffer: Vec<f64> = g.iter().zip(old).map(|(g, old)| kept * old + g).collect();
        exact[1].push(match nesterov {
            true => g.iter().zip(&buffer).map(|(g, buffer)| g + mu * buffer).collect(),
            false => buffer.clone(),
        });
        exact[0].push(buffer);
    }
    fn inputs<B: Plain>(
        values: &[[Vec<f64>; 2]],
        dims: [usize; 2],
        [is_bf16, is_fresh]: [&dyn Fn(usize) -> bool; 2],
        device: &B::Device,
        dtype: DType,
    ) -> Vec<MomentumInput<B>> {
        let input = |(i, [grad, old]): (usize, &[Vec<f64>; 2])| MomentumInput {
            grad: upload(grad, dims, device, dtype),
            buffer: (!is_fresh(i)).then(|| upload(old, dims, device, dtype)),
            bf16: is_bf16(i),
        };
        values.iter().enumerate().map(input).collect()
    }
    fn found<B: Plain>((buffers, updates): (Vec<Tensor<B, 2>>, Tensor<B, 3>)) -> [Rows; 2] {
        let [count, rows, columns] = updates.dims();
        let updates: Rows = download(updates).chunks(rows * columns).map(<[f64]>::to_vec).collect();
        assert_eq!((buffers.len(), updates.len()), (count, count));
        [buffers.into_iter().map(download).collect(), updates]
    }
    let config = MomentumConfig { momentum: mu, nesterov, dtype: precision.dtype() };
    let flags: [&dyn Fn(usize) -> bool; 2] = [&is_bf16, &is_fresh];
    let on_device = inputs::<B>(&values, [rows, columns], flags, device, master(precision));
    let factor = || Some(upload::<B, 1>(&[f64::from(scale)], [1], device, master(precision)));
    poison::<B>([rows * columns, count * rows * columns].into_iter().cycle().take(8), device);
    let got = found(B::momentum_step(on_device.clone(), config, factor()));
    let of_reference = inputs::<Cpu>(&values, [rows, columns], flags, &CPU, DType::F32);
    let factor_of_reference = Some(upload::<Cpu, 1>(&[f64::from(scale)], [1], &CPU, DType::F32));
    let config_of_reference = MomentumConfig { dtype: DType::F32, ..config };
    let mut reference = found(update::momentum_step(of_reference, config_of_reference, factor_of_reference));
    if precision == Precision::Bf16 {
        reference[1].iter_mut().flatten().for_each(|x| *x = round(*x, precision));
    }
    let mut good = true;
    for (part, name) in ["momentum", "update"].into_iter().enumerate() {
        for bf16 in [false, true] {
            let of = |rows: &Rows| only(rows, |i| is_bf16(i) == bf16);
            let exact = of(&exact[part]);
            let reference =
                if precision == Precision::F64 && !bf16 { exact.clone() } else { of(&reference[part]) };
            let what = format!("{name} {count}x{rows}x{columns}, bf16 {bf16}, Nesterov {nesterov}");
            good &= is_within(&what, &of(&got[part]), &reference, &exact, least(precision));
        }
    }
    let again = found(B::momentum_step(on_device, config, factor()));
    again.iter().zip(&got).for_each(|(a, b)| assert_same_bits("a repeated momentum step", a, b));
    good
}

fn orthogonal<B: Plain>(
    [count, rows, columns]: [usize; 3],
    seed: u64,
    device: &B::Device,
    precision: Precision,
) -> bool {
    let mut random = Random(seed);
    let elements = rows * columns;
    let values: Rows = (0..count).map(|_| numbers(&mut random, elements, 1.0)).collect();
    let updates: Vec<f64> = numbers(&mut random, count * elements, 1.0);
    let updates: Vec<f64> = updates.into_iter().map(|x| round(x, precision)).collect();
    let is_bf16 = |i: usize| i % 3 == 1;
    let (lr, weight_decay) = (|i: usize| [0.04, 0.3][i % 2], |i: usize| [0.0, 0.2][i / 2 % 2]);
    let ratio = (rows as f64 / columns as f64).max(1.0).sqrt();
    let exact = |i: usize| -> Vec<f64> {
        let update = &updates[i * elements..][..elements];
        let decay = 1.0 - lr(i) * weight_decay(i);
        values[i].iter().zip(update).map(|(value, update)| value * decay - lr(i) * ratio * update).collect()
    };
    let exact: Rows = (0..count).map(exact).collect();
    fn inputs<B: Plain>(
        values: &Rows,
        dims: [usize; 2],
        rates: [&dyn Fn(usize) -> f64; 2],
        is_bf16: impl Fn(usize) -> bool,
        device: &B::Device,
        precision: Precision,
    ) -> Vec<OrthogonalInput<B>> {
        let input = |(i, value): (usize, &Vec<f64>)| OrthogonalInput {
            value: upload(value, dims, device, master(precision)),
            lr: rates[0](i),
            weight_decay: rates[1](i),
            bf16: is_bf16(i),
            copy: (precision.dtype() != master(precision)).then_some(precision.dtype()),
        };
        values.iter().enumerate().map(input).collect()
    }
    let rates: [&dyn Fn(usize) -> f64; 2] = [&lr, &weight_decay];
    let dims = [rows, columns];
    let mut good = true;
    for rounds in [false, true] {
        let on_device = inputs::<B>(&values, dims, rates, is_bf16, device, precision);
        let stacked = upload::<B, 3>(&updates, [count, rows, columns], device, precision.dtype());
        poison::<B>([elements].into_iter().cycle().take(8), device);
        let updated = B::orthogonal_step(on_device.clone(), stacked.clone(), rounds);
        let got: Rows = updated.iter().map(|updated| download(updated.value.clone())).collect();
        updated.into_iter().for_each(|updated| check_copy(updated, precision));
        let of_reference = inputs::<Cpu>(&values, dims, rates, is_bf16, &CPU, Precision::F32);
        let stacked_of_reference = upload::<Cpu, 3>(&updates, [count, rows, columns], &CPU, DType::F32);
        let reference = update::orthogonal_step(of_reference, stacked_of_reference, rounds);
        let reference: Rows = reference.into_iter().map(|updated| download(updated.value)).collect();
        for bf16 in [false, true] {
            let of = |rows: &Rows| only(rows, |i| is_bf16(i) == bf16);
            let exact = of(&exact);
            let is_plain = precision == Precision::F64 && !bf16 && !rounds;
            let reference = if is_plain { exact.clone() } else { of(&reference) };
            let what = format!("orthogonal {count}x{rows}x{columns}, bf16 {bf16} {rounds}");
            good &= is_within(&what, &of(&got), &reference, &exact, least(precision));
        }
        let again = B::orthogonal_step(on_device, stacked, rounds);
        let again = again.into_iter().map(|updated| download(updated.value)).collect();
        assert_same_bits("a repeated orthogonal step", &again, &got);
    }
    good
}

// ---- norms and averages ---------------------------------------------------------------------------------------------

struct ListsAgainstTheHost;

impl Job for ListsAgainstTheHost {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        const SIZES: [usize; 7] = [1, 7, 1024, 8191, 8192, 8193, 40_000];
        let (precision, dtype) = (target.precision, master(target.precision));
        println!("\n{} {precision}", target.label);
        let mut random = Random(11);
        let mut good = true;
        // One tensor, and more than a launch takes, small ones too; a norm above and below the clip, and none at all.
        let many = count(target, 100, 520);
        let all = usize::MAX;
        for (count, scale, most) in
            [(1, 1.0, all), (many, 1e-2, all), (100, 1e-5, all), (7, 0.0, all), (many, 1e-2, 1024)]
        {
            // The last one's numbers are of its own.
            let random = if most < all { &mut Random(12) } else { &mut random };
            let size = |i: usize| SIZES[i % SIZES.len()].min(most);
            let rows: Rows = (0..count).map(|i| numbers(random, size(i), scale)).collect();
            if !affordable(rows.iter().map(Vec::len).sum()) {
                continue;
            }
            // Row by row: of one sum of so many terms the host's own rounding would be seen in f64.
            let squares = |row: &Vec<f64>| {
                row.chunks(256).map(|part| part.iter().map(|x| x * x).sum::<f64>()).sum::<f64>()
            };
            let norm = rows.iter().map(squares).sum::<f64>().sqrt();
            let exact = vec![vec![(0.3 / (norm + 1e-6)).min(1.0)]];
            let grads = |device: &B::Device| -> Vec<Tensor<B, 1>> {
                rows.iter().map(|row| upload(row, [row.len()], device, dtype)).collect()
            };
            let uploaded = grads(device);
            poison::<B>([1, 16, 64, 256].into_iter(), device);
            let got = vec![download(B::clip_factor(uploaded.clone(), 0.3))];
            let of_reference = rows.iter().map(|row| upload(row, [row.len()], &CPU, DType::F32)).collect();
            let reference = match precision {
                Precision::F64 => exact.clone(),
                _ => vec![download(update::clip_factor::<Cpu>(of_reference, 0.3))],
            };
            // One number: the reference's own error may be nothing by luck.
            let least = 4.0 * least(precision);
            good &= is_within(&format!("clip of {count}, norm {norm:.1e}"), &got, &reference, &exact, least);
            let again = vec![download(B::clip_factor(uploaded, 0.3))];
            assert_same_bits("a repeated norm", &again, &got);
        }
        for weights in [[0.997, 1.0 - 0.997], [1.0, 1.0]] {
            let pairs_count = count(target, 60, 270);
            let mut rows = |_| -> Rows {
                (0..pairs_count).map(|i| numbers(&mut random, SIZES[i % SIZES.len()], 1.0)).collect()
            };
            let (a, b) = (rows(0), rows(1));
            if !affordable(a.iter().map(Vec::len).sum()) {
                continue;
            }
            let [p, q] = weights;
            let exact: Rows = a
                .iter()
                .zip(&b)
                .map(|(a, b)| a.iter().zip(b).map(|(a, b)| p * a + q * b).collect())
                .collect();
            fn pairs<B: Plain>(
                a: &Rows,
                b: &Rows,
                device: &B::Device,
                dtype: DType,
            ) -> Vec<[Tensor<B, 1>; 2]> {
                let pair = |(a, b): (&Vec<f64>, &Vec<f64>)| {
                    [a, b].map(|row| upload(row, [row.len()], device, dtype))
                };
                a.iter().zip(b).map(pair).collect()
            }
            let uploaded = pairs::<B>(&a, &b, device, dtype);
            poison::<B>(SIZES.into_iter(), device);
            let blended =
                |pairs: Vec<[Tensor<B, 1>; 2]>| B::blend(pairs, weights).into_iter().map(download).collect();
            let got: Rows = blended(uploaded.clone());
            let reference = update::blend(pairs::<Cpu>(&a, &b, &CPU, DType::F32), weights);
            let reference = match precision {
                Precision::F64 => exact.clone(),
                _ => reference.into_iter().map(download).collect(),
            };
            good &=
                is_within(&format!("blend by {p} and {q:.3}"), &got, &reference, &exact, least(precision));
            assert_same_bits("a repeated blend", &blended(uploaded), &got);
        }
        assert!(B::blend(Vec::new(), [1.0, 1.0]).is_empty());
        Ok(good)
    }
}

#[test]
fn adam_agrees_with_the_host_on_every_device() {
    all_pass(|| AdamAgainstTheHost);
}

#[test]
fn muon_s_steps_agree_with_the_host_on_every_device() {
    all_pass(|| MuonAgainstTheHost);
}

#[test]
fn norms_and_averages_agree_with_the_host_on_every_device() {
    all_pass(|| ListsAgainstTheHost);
}

// ---- layouts --------------------------------------------------------------------------------------------------------

struct Views;

impl Job for Views {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let dtype = master(target.precision);
        let epsilon = epsilon(if dtype == DType::F64 { Precision::F64 } else { Precision::F32 });
        let mut random = Random(5);
        let x: Tensor<B, 1> = upload(&numbers(&mut random, 3000, 1.0), [3000], device, dtype);
        let matrix = x.clone().reshape([50, 60]);
        // From an offset that no whole pack starts at.
        let view = |from: usize| x.clone().narrow(0, from, 1001);
        let dense = |from: usize| upload::<B, 1>(&download(view(from)), [1001], device, dtype);
        let close = |what: &str, got: Vec<f64>, expected: Vec<f64>| {
            let worst = worst(&got, &expected, got.len(), |_| 1.0);
            assert!(worst.error <= 8.0 * epsilon, "{what} on {}: {worst:?}", target.label);
        };
        let adam = |[value, grad, m, v]: [Tensor<B, 1>; 4]| {
            let config = AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 };
            let moments = Some([m, v.clone() * v + 0.1]);
            let input =
                AdamInput { value, grad, moments, config, lr: 0.1, steps: 3, bf16: false, copy: None };
            download(B::adam_step(vec![input], None).remove(0).updated.value)
        };
        close("adam", adam([1, 2, 5, 7].map(view)), adam([1, 2, 5, 7].map(dense)));
        close(
            "clip",
            download(B::clip_factor(vec![view(3)], 0.1)),
            download(B::clip_factor(vec![dense(3)], 0.1)),
        );
        let blend = |pair: [Tensor<B, 1>; 2]| download(B::blend(vec![pair], [0.5, 0.25]).remove(0));
        close("blend", blend([view(1), view(2)]), blend([dense(1), dense(2)]));
        let momentum = |grad: Tensor<B, 2>, buffer: Tensor<B, 2>| {
            let config = MomentumConfig { momentum: 0.9, nesterov: true, dtype };
            let input = MomentumInput { grad, buffer: Some(buffer), bf16: false };
            download(B::momentum_step(vec![input], config, None).1)
        };
        let views = [matrix.clone().transpose().slice([1..41, 0..50]), matrix.clone().slice([3..43, 1..51])];
        let [a, b] =
            views.each_ref().map(|view| upload::<B, 2>(&download(view.clone()), [40, 50], device, dtype));
        let [grad, buffer] = views.clone();
        close("momentum", momentum(grad, buffer), momentum(a.clone(), b.clone()));
        let orthogonal = |value: Tensor<B, 2>, updates: Tensor<B, 2>| {
            let input = OrthogonalInput { value, lr: 0.1, weight_decay: 0.0, bf16: false, copy: None };
            download(B::orthogonal_step(vec![input], updates.unsqueeze(), false).remove(0).value)
        };
        let [value, updates] = views;
        close("orthogonal", orthogonal(value, updates), orthogonal(a, b));
        Ok(())
    }
}

#[test]
fn any_layout_of_the_inputs_gives_the_same() {
    for target in targets() {
        guard(&target, || run(&target, Views)).unwrap();
    }
}

// ---- whole optimizers -----------------------------------------------------------------------------------------------

/// A model in training on made-up gradients.
struct Training<B: Plain> {
    model: Model<B>,
    optimizers: Optimizers<B>,
}

fn recipe() -> Recipe {
    let mut recipe = Recipe::load("tiny").unwrap();
    let sets = [
        "model_dim=64",
        "num_layers=3",
        "num_heads=4",
        "num_kv_heads=2",
        "grad_clip_norm=3",
        "tied_embed_lr=0.02",
    ];
    sets.iter().for_each(|set| recipe.set(set).unwrap());
    recipe
}

impl<B: Plain> Training<B> {
    fn new(rounding: Rounding, device: &B::Device, dtype: DType) -> Self {
        let model = Model::new(&recipe(), device, dtype).unwrap();
        let optimizers = Optimizers::with_rounding(&recipe(), &model, rounding);
        Self { model, optimizers }
    }

    /// One update; some parameters get no gradient in it, and stay.
    fn step(&mut self, step: usize) {
        let mut unreached = Vec::new();
        for (i, param) in self.model.params().iter().enumerate() {
            let mut random = Random((step * 1000 + i) as u64);
            let grad = numbers(&mut random, param.numel(), [1.0, 1e-2][i % 2]);
            if (step + i).is_multiple_of(5) {
                unreached.push((param.clone(), download(param.flat())));
            } else {
                let device = param.flat().device();
                param.accumulate_flat(upload::<B, 1>(&grad, [grad.len()], &device, param.master_type()));
            }
        }
        self.optimizers.step(1.0 - 0.1 * step as f64, 0.85 + 0.01 * step as f64);
        for (param, before) in unreached {
            assert_eq!(download(param.flat()), before, "{} got no gradient", param.name());
        }
        assert!(self.model.params().iter().all(|param| param.flat_grad().is_none()), "gradients are taken");
    }

    fn values(&self) -> Rows {
        self.model.params().iter().map(|param| download(param.flat())).collect()
    }

    /// The state and values through host memory in a training of its own.
    fn again(&self, rounding: Rounding, device: &B::Device, dtype: DType) -> Self {
        let mut again = Self::new(rounding, device, dtype);
        again.model.params().load(&self.model.params().to_host().unwrap(), "the weights").unwrap();
        let mut state = OptimizerState::default();
        for (name, row, steps) in self.optimizers.state().rows() {
            let dtype = row.dtype();
            let row = upload::<B, 1>(&download(row.clone()), row.dims(), device, dtype);
            state.push(name.clone(), row, *steps);
        }
        again.optimizers.restore(&mut state);
        assert!(state.rows().is_empty(), "every row is of some parameter");
        again
    }
}

const STEPS: usize = 4;

fn trained(rounding: Rounding, dtype: DType) -> Rows {
    let mut training = Training::<Cpu>::new(rounding, &CPU, dtype);
    (0..STEPS).for_each(|step| training.step(step));
    training.values()
}

struct WholeOptimizers;

impl Job for WholeOptimizers {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let (precision, dtype) = (target.precision, target.precision.dtype());
        println!("\n{} {precision}", target.label);
        let none = Rounding { newton_schulz: false, storage: false };
        let mut good = true;
        for rounding in [none, Rounding { newton_schulz: true, storage: true }] {
            let mut training = Training::<B>::new(rounding, device, dtype);
            let start = training.values();
            let mut restored = None;
            for step in 0..STEPS {
                if step == 2 {
                    restored = Some(training.again(rounding, device, dtype));
                }
                training.step(step);
            }
            let got = training.values();
            let mut restored = restored.expect("there are more than two steps");
            (2..STEPS).for_each(|step| restored.step(step));
            assert_same_bits("a training from restored state", &restored.values(), &got);
            for param in training.model.params().iter() {
                let copy = download(param.compute_rows());
                let cast = download(param.flat()).into_iter().map(|value| round(value, precision));
                assert!(copy.into_iter().eq(cast), "{} computes with another value", param.name());
            }
            // How far each value has moved, as a share of the furthest of its parameter.
            let moved = |rows: &Rows| -> Rows {
                let one = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| a - b).collect();
                rows.iter().zip(&start).map(one).collect()
            };
            let exact = moved(&trained(none, DType::F64));
            // In bf16 Newton-Schulz rounds whether it is to or not.
            let newton_schulz = rounding.newton_schulz || precision == Precision::Bf16;
            let reference = match precision {
                Precision::F64 if rounding == none => exact.clone(),
                _ => moved(&trained(Rounding { newton_schulz, ..rounding }, DType::F32)),
            };
            let what = format!("{STEPS} steps, {rounding:?}").replace("Rounding ", "");
            // Newton-Schulz makes small singular values, and what they err by, some hundred times larger.
            good &= is_within(&what, &moved(&got), &reference, &exact, 4.0 * least(precision));
        }
        Ok(good)
    }
}

#[test]
fn whole_optimizers_agree_and_restored_state_goes_on_to_the_bit() {
    all_pass(|| WholeOptimizers);
}
