//! The residual stream on every device: outputs and all gradients against a computation in f64 on the host.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error that the reference itself makes in the device's precision, at
//! least twice the distance between neighbouring numbers. Errors are shares of the size of what is added up: along a
//! row for rows, over all rows for a parameter's gradient.

mod common;

use burn::tensor::{DType, Int, Tensor, TensorData};
use common::{
    Random, Worst, affordable, all_pass, download, epsilon, repeats, round, targets, upload, worst,
};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target, guard, run};
use fairway::model::Model;
use fairway::ops::stream::{Branch, InputGrads, Inputs, Mix, Norm, OutputGrads, Outputs, Seen, Start};
use fairway::ops::*;
use fairway::recipe::Recipe;

/// Which parts a call has.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// For each branch, whether it has a scale.
    branches: &'static [bool],
    mix: bool,
    norm: Option<Norm>,
    added: bool,
    /// Whether the gradients of `z`, `n` and `t` are there, and a gradient of `x0` from before.
    grads: [bool; 3],
    sum: bool,
}

const BRANCHES: [&[bool]; 5] = [&[true], &[true, true], &[], &[false], &[false, true]];
const NORMS: [Norm; 3] = [
    Norm { eps: rms_norm::EPS, scale: 1.0 },
    Norm { eps: 1e-5, scale: 0.577 },
    Norm { eps: 0.1, scale: 1.0 },
];

/// Every combination; which gradients are there goes round with them.
fn all_forms() -> Vec<Form> {
    let mut forms = Vec::new();
    for branches in BRANCHES {
        for (mix, has_norm, added) in [(1, 1, 0), (1, 1, 1), (1, 0, 0), (1, 0, 1), (0, 1, 0), (0, 0, 0)] {
            let (mix, has_norm, added) = (mix == 1, has_norm == 1, added == 1);
            for part in 0..3 {
                let grads = [part != 1 || !has_norm, has_norm && part != 2, added && part != 2];
                let norm = has_norm.then(|| NORMS[forms.len() % 3]);
                forms.push(Form { branches, mix, norm, added, grads, sum: mix && part == 0 });
            }
        }
    }
    forms
}

/// The forms of a model's blocks.
fn few_forms() -> Vec<Form> {
    let form = |branches, mix, added, sum| {
        let grads = [true, true, added];
        Form { branches, mix, norm: Some(NORMS[1]), added, grads, sum }
    };
    vec![
        form(BRANCHES[1], true, true, true),
        form(BRANCHES[0], true, false, false),
        form(BRANCHES[0], false, false, false),
    ]
}

/// Rows and columns: one lane to whole blocks, vectors and not, groups with several rows each, wider than the kernel.
const SHAPES: [[usize; 2]; 11] = [
    [1, 1],
    [3, 5],
    [1000, 4],
    [70_000, 4],
    [3001, 512],
    [130, 513],
    [90, 1024],
    [9, 2047],
    [40, 4096],
    [5, 4097],
    [1, 512],
];

/// Values that the precision has: rows of different magnitudes, one of zeros; gradients; weights.
struct Case {
    rows: usize,
    columns: usize,
    form: Form,
    x: Vec<f64>,
    y: [Vec<f64>; 2],
    x0: Vec<f64>,
    s: [Vec<f64>; 2],
    m: Vec<f64>,
    /// Of `z`, `n`, `t`, and of `x0` so far.
    grads: [Vec<f64>; 4],
}

impl Case {
    fn new([rows, columns]: [usize; 2], form: Form, precision: Precision, seed: u64) -> Self {
        let mut random = Random(seed);
        let scale = |row: usize| if row == 2 { 0.0 } else { [1.0, 30.0, 1.0, 1e-3, 1e-5][row % 5] };
        let mut values = |rows: usize, scale: &dyn Fn(usize) -> f64| -> Vec<f64> {
            let value = |i| round(random.uniform() * scale(i / columns), precision);
            (0..rows * columns).map(value).collect()
        };
        Self {
            rows,
            columns,
            form,
            x: values(rows, &scale),
            y: [values(rows, &scale), values(rows, &scale)],
            x0: values(rows, &scale),
            // Three rows, of which the second is used.
            s: [values(1, &|_| 1.5), values(3, &|_| 1.5)],
            m: values(2, &|_| 1.5),
            grads: std::array::from_fn(|_| values(rows, &|_| 1.0)),
        }
    }

    /// The scale of a branch at a column.
    fn scale(&self, branch: usize, column: usize) -> f64 {
        match self.form.branches.get(branch) {
            None => 0.0,
            Some(false) => 1.0,
            Some(true) => self.s[branch][branch * self.columns + column],
        }
    }

    /// What the composition of plain ops gives, each intermediate result rounded by `r`.
    fn composed(&self, r: &dyn Fn(f64) -> f64) -> Results {
        let (columns, form) = (self.columns, self.form);
        let (mut t, mut z, mut size_z) = (self.x.clone(), Vec::new(), vec![0.0f64; self.rows]);
        let mut size_t = vec![0.0f64; self.rows];
        for i in 0..t.len() {
            let (row, column) = (i / columns, i % columns);
            let mut size = t[i].abs();
            for branch in 0..form.branches.len() {
                let part = r(self.y[branch][i] * self.scale(branch, column));
                t[i] = r(t[i] + part);
                size += part.abs();
            }
            size_t[row] = size_t[row].max(size);
            z.push(t[i]);
            if form.mix {
                let parts = [r(t[i] * self.m[column]), r(self.x0[i] * self.m[columns + column])];
                z[i] = r(parts[0] + parts[1]);
                size = size * self.m[column].abs() + parts[1].abs();
            }
            size_z[row] = size_z[row].max(size);
        }
        let norm = form.norm.unwrap_or(Norm { eps: 1.0, scale: 0.0 });
        let mean = |row: usize, f: &dyn Fn(usize) -> f64| {
            (row * columns..(row + 1) * columns).map(f).sum::<f64>() / columns as f64
        };
        let inverse: Vec<f64> =
            (0..self.rows).map(|row| 1.0 / (mean(row, &|i| z[i] * z[i]) + norm.eps).sqrt()).collect();
        let rounded_scaled = |x: f64| if norm.scale == 1.0 { x } else { r(x * norm.scale) };
        let n: Vec<f64> =
            z.iter().enumerate().map(|(i, z)| rounded_scaled(r(z * inverse[i / columns]))).collect();
        let size_n: Vec<f64> = (0..self.rows).map(|row| inverse[row] * size_z[row] * norm.scale).collect();

        let given = |which: usize, i: usize| if form.grads[which] { self.grads[which][i] } else { 0.0 };
        let mut found = Gradients::new(self);
        for row in 0..self.rows {
            let scale = inverse[row];
            let own = |i: usize| rounded_scaled(given(1, i));
            let projection = mean(row, &|i| z[i] * own(i));
            let mut size_gz: f64 = 0.0;
            for i in row * columns..(row + 1) * columns {
                size_gz = size_gz.max(given(0, i).abs() + scale * own(i).abs());
            }
            for i in row * columns..(row + 1) * columns {
                let column = i % columns;
                let through = r(own(i) * scale - z[i] * scale.powi(3) * projection);
                let gz = if form.grads[0] { r(given(0, i) + through) } else { through };
                let (mut gt, mut size_gt) = (gz, size_gz);
                if form.mix {
                    found.m[column] += r(t[i] * gz);
                    found.m[columns + column] += r(self.x0[i] * gz);
                    found.size_m[column] += size_t[row] * size_gz;
                    found.size_m[columns + column] += self.x0[i].abs() * size_gz;
                    let part = r(gz * self.m[columns + column]);
                    let sum = if form.sum { self.grads[3][i] } else { 0.0 };
                    found.x0[i] = r(part + sum);
                    found.size_x0[row] =
                        found.size_x0[row].max(size_gz * self.m[columns + column].abs() + sum.abs());
                    gt = r(gz * self.m[column]);
                    size_gt = size_gz * self.m[column].abs();
                }
                if form.grads[2] {
                    gt = r(gt + given(2, i));
                    size_gt += given(2, i).abs();
                }
                found.x[i] = gt;
                found.size_x[row] = found.size_x[row].max(size_gt);
                for branch in 0..form.branches.len() {
                    let s = self.scale(branch, column);
                    found.y[branch][i] = r(gt * s);
                    found.size_y[branch][row] = found.size_y[branch][row].max(size_gt * s.abs());
                    if form.branches[branch] {
                        found.s[branch][branch * columns + column] += r(self.y[branch][i] * gt);
                        found.size_s[branch][branch * columns + column] += self.y[branch][i].abs() * size_gt;
                    }
                }
            }
        }
        let mut results = Results(vec![("z", z, columns, size_z)]);
        let mut push = |has, name, values, size: Vec<f64>, columns| {
            if has {
                results.0.push((name, values, columns, size));
            }
        };
        push(form.norm.is_some(), "n", n, size_n, columns);
        push(form.added, "t", t, size_t, columns);
        push(true, "grad x", found.x, found.size_x, columns);
        let [y0, y1] = found.y;
        let [size_0, size_1] = found.size_y;
        push(!form.branches.is_empty(), "grad y0", y0, size_0, columns);
        push(form.branches.len() > 1, "grad y1", y1, size_1, columns);
        push(form.mix, "grad x0", found.x0, found.size_x0, columns);
        push(form.mix, "grad m", found.m, found.size_m, 1);
        let [s0, s1] = found.s;
        let [size_0, size_1] = found.size_s;
        push(form.branches.first() == Some(&true), "grad s0", s0, size_0, 1);
        push(form.branches.get(1) == Some(&true), "grad s1", s1, size_1, 1);
        results
    }
}

struct Gradients {
    x: Vec<f64>,
    y: [Vec<f64>; 2],
    x0: Vec<f64>,
    m: Vec<f64>,
    s: [Vec<f64>; 2],
    size_x: Vec<f64>,
    size_y: [Vec<f64>; 2],
    size_x0: Vec<f64>,
    size_m: Vec<f64>,
    size_s: [Vec<f64>; 2],
}

impl Gradients {
    fn new(case: &Case) -> Self {
        let zeros = |size: usize| vec![0.0; size];
        let (rows, columns, elements) = (case.rows, case.columns, case.rows * case.columns);
        Self {
            x: zeros(elements),
            y: [zeros(elements), zeros(elements)],
            x0: zeros(elements),
            m: zeros(2 * columns),
            s: [zeros(columns), zeros(3 * columns)],
            size_x: zeros(rows),
            size_y: [zeros(rows), zeros(rows)],
            size_x0: zeros(rows),
            size_m: zeros(2 * columns),
            size_s: [zeros(columns), zeros(3 * columns)],
        }
    }
}

/// Name, values, columns of a row, and the size of what each row is added up from.
#[derive(Debug)]
struct Results(Vec<(&'static str, Vec<f64>, usize, Vec<f64>)>);

impl Results {
    /// The worst element of each of `got` against these.
    fn worst(&self, got: &[(&'static str, Vec<f64>)]) -> Vec<(&'static str, Worst)> {
        assert_eq!(got.len(), self.0.len());
        let each = self.0.iter().zip(got).map(|((name, exact, columns, size), (of, got))| {
            assert_eq!((name, exact.len()), (of, got.len()));
            (*name, worst(got, exact, *columns, |row| size[row].max(f64::MIN_POSITIVE)))
        });
        each.collect()
    }
}

/// A case on a device.
struct Uploaded<B: Plain> {
    inputs: Inputs<B>,
    grads: OutputGrads<B>,
    sum: Option<Tensor<B, 2>>,
    form: Form,
    params: Vec<Param<B>>,
}

impl<B: Plain> Uploaded<B> {
    fn new(case: &Case, device: &B::Device, precision: Precision) -> Self {
        let (form, shape) = (case.form, [case.rows, case.columns]);
        let rows = |values: &[f64]| upload::<B, 2>(values, shape, device, precision);
        let master = if precision == Precision::F64 { Precision::F64 } else { Precision::F32 };
        let mut params = Vec::new();
        let mut param = |name: &str, values: &[f64], shape: &[usize]| {
            let flat = upload::<B, 1>(values, [values.len()], device, master);
            params.push(Param::of_shape(name, shape, flat, precision.dtype()));
            params[params.len() - 1].clone()
        };
        let c = case.columns;
        let mix =
            form.mix.then(|| Mix { start: Start::new(rows(&case.x0)), weight: param("m", &case.m, &[2, c]) });
        let shapes: [&[usize]; 2] = [&[c], &[3, c]];
        let mut branch = |(index, has): (usize, &bool)| Branch {
            value: rows(&case.y[index]),
            scale: has.then(|| (param("s", &case.s[index], shapes[index]), index)),
        };
        let inputs = Inputs {
            x: rows(&case.x),
            branches: form.branches.iter().enumerate().map(&mut branch).collect(),
            mix,
        };
        let given = |which: usize| form.grads[which].then(|| rows(&case.grads[which]));
        let grads = OutputGrads { x: given(0), normed: given(1), added: given(2) };
        let sum = form.sum.then(|| rows(&case.grads[3]));
        Self { inputs, grads, sum, form, params }
    }

    fn seen(&self, outputs: &Outputs<B>) -> Seen<B> {
        let Inputs { x, branches, mix } = self.inputs.clone();
        let (x, adds) = match (&mix, &outputs.added) {
            (None, _) => (outputs.x.clone(), false),
            (Some(_), Some(added)) => (added.clone(), false),
            (Some(_), None) => (x, !branches.is_empty()),
        };
        let mix = mix.map(|mix| (mix.start.value(), mix.weight));
        Seen { x, adds, branches, mix, norm: self.form.norm }
    }

    fn run(
        &self,
        forward: impl Fn(Inputs<B>, Option<Norm>, bool) -> Outputs<B>,
        backward: impl Fn(Seen<B>, OutputGrads<B>, Option<Tensor<B, 2>>) -> InputGrads<B>,
    ) -> Vec<(&'static str, Vec<f64>)> {
        let outputs = forward(self.inputs.clone(), self.form.norm, self.form.added);
        let grads = backward(self.seen(&outputs), self.grads.clone(), self.sum.clone());
        let mut results = vec![("z", download(outputs.x))];
        results.extend(outputs.normed.map(|n| ("n", download(n))));
        results.extend(outputs.added.map(|t| ("t", download(t))));
        results.push(("grad x", download(grads.x)));
        results.extend(["grad y0", "grad y1"].into_iter().zip(grads.branches.into_iter().map(download)));
        results.extend(grads.start.map(|grad| ("grad x0", download(grad))));
        let names = [
            self.form.mix.then_some("grad m"),
            (self.form.branches.first() == Some(&true)).then_some("grad s0"),
            (self.form.branches.get(1) == Some(&true)).then_some("grad s1"),
        ];
        let grads = self.params.iter().map(|param| download(param.flat_grad().expect("a gradient")));
        results.extend(names.into_iter().flatten().zip(grads));
        results
    }

    fn clear(&self) {
        self.params.iter().for_each(Param::clear_grad);
    }
}

/// The largest errors of the reference in the precision over cases of the shape: many where it has few rows.
fn reference_errors(
    [rows, columns]: [usize; 2],
    form: Form,
    precision: Precision,
) -> Vec<(&'static str, f64)> {
    let seeds = (256 / rows).clamp(1, 64) as u64;
    let cases = (0..seeds).map(|seed| Case::new([rows, columns], form, precision, 700 + seed));
    let largest = |a: Vec<(&'static str, f64)>, b: Vec<(&'static str, f64)>| {
        a.into_iter().zip(b).map(|((name, a), (_, b))| (name, a.max(b))).collect()
    };
    let mut errors =
        cases.map(|case| errors_of(&case, precision)).reduce(largest).expect("at least one case");
    // Over few rows the errors of a sum's terms do not average out.
    let of_terms = errors.iter().find(|(name, _)| *name == "grad x").map_or(0.0, |(_, error)| *error);
    for (_, error) in errors.iter_mut().filter(|(name, _)| rows < 64 && is_sum(name)) {
        *error = error.max(of_terms);
    }
    errors
}

/// Whether it is a sum over rows.
fn is_sum(name: &str) -> bool {
    ["grad m", "grad s0", "grad s1"].contains(&name)
}

fn errors_of(case: &Case, precision: Precision) -> Vec<(&'static str, f64)> {
    let exact = case.composed(&|x| x);
    let found = match precision {
        // Against which the host's own f64 is no better a measure.
        Precision::F64 => return exact.0.iter().map(|(name, ..)| (*name, 64.0 * f64::EPSILON)).collect(),
        Precision::F32 => {
            let uploaded = Uploaded::<Cpu>::new(case, &burn_ndarray::NdArrayDevice::Cpu, Precision::F32);
            uploaded.run(stream::forward, stream::backward)
        }
        Precision::Bf16 => {
            let rounded = case.composed(&|x| round(x, precision));
            rounded.0.into_iter().map(|(name, values, ..)| (name, values)).collect()
        }
    };
    // Sums of the parameters' gradients are in f32 and average their terms' errors.
    let least = |name: &str| epsilon(if is_sum(name) { Precision::F32 } else { precision });
    let errors = exact.worst(&found).into_iter();
    errors.map(|(name, worst)| (name, worst.error.max(least(name)))).collect()
}

/// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
fn poison<B: Plain>(shape: [usize; 2], device: &B::Device, precision: Precision) {
    let poison: Vec<Tensor<B, 2>> =
        (0..6).map(|_| Tensor::full(shape, f32::NAN, (device, precision.dtype()))).collect();
    drop(poison);
}

struct AgainstTheHost;

impl Job for AgainstTheHost {
    /// Whether all were within their tolerance.
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        println!("\n{} {precision}: the worst element of each output and gradient", target.label);
        let few = SHAPES.into_iter().flat_map(|shape| few_forms().into_iter().map(move |form| (shape, form)));
        let all = [[37, 512], [6, 3]];
        let all = all.into_iter().flat_map(|shape| all_forms().into_iter().map(move |form| (shape, form)));
        let mut good = true;
        for (number, (shape, form)) in few.chain(all).enumerate() {
            if !affordable(shape[0] * shape[1]) {
                continue;
            }
            let case = Case::new(shape, form, precision, number as u64);
            let exact = case.composed(&|x| x);
            let tolerances = reference_errors(shape, form, precision);
            let uploaded = Uploaded::<B>::new(&case, device, precision);
            poison::<B>(shape, device, precision);
            let found = uploaded.run(B::stream, B::stream_backward);
            let mut shown = (0.0, String::new());
            for ((name, worst), (of, error)) in exact.worst(&found).into_iter().zip(tolerances) {
                assert_eq!(name, of);
                let share = worst.error / (2.0 * error);
                let within = share <= 1.0;
                good &= within;
                if share > shown.0 || !within {
                    let line = format!(
                        "{name:<8} {:>9.2e} of {:>9.2e} {:>4.0}%  [{}, {}]: {:.8e}, expected {:.8e}{}",
                        worst.error,
                        2.0 * error,
                        100.0 * share,
                        worst.row,
                        worst.column,
                        worst.got,
                        worst.expected,
                        if within { "" } else { "  FAILED" }
                    );
                    if !within {
                        println!("{shape:?} {form:?}\n  {line}");
                    }
                    shown = (share, line);
                }
            }
            println!("{:>12} {:>3}  {}", format!("{}x{}", shape[0], shape[1]), number, shown.1);
            // Again, to the bit; and once more on top of the gradients that are there.
            for _ in 0..repeats() {
                uploaded.clear();
                let again = uploaded.run(B::stream, B::stream_backward);
                for ((name, a), (_, b)) in again.iter().zip(&found) {
                    let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{shape:?} {form:?}: {name} differs");
                }
            }
            let twice = uploaded.run(B::stream, B::stream_backward);
            for ((name, a), (_, b)) in twice.iter().zip(&found) {
                let factor = if ["grad m", "grad s0", "grad s1"].contains(name) { 2.0 } else { 1.0 };
                let same = a.iter().zip(b).all(|(a, b)| *a == factor * b);
                assert!(same, "{shape:?} {form:?}: {name} does not add up");
            }
        }
        Ok(good)
    }
}

#[test]
fn every_device_agrees_with_the_host() {
    all_pass(|| AgainstTheHost);
}

struct Views;

impl Job for Views {
    type Output = ();

    /// Views, and parameters whose rows are not aligned, give what dense tensors give.
    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let precision = target.precision;
        let case = Case::new([40, 128], few_forms()[0], precision, 1);
        let mut uploaded = Uploaded::<B>::new(&case, device, precision);
        for columns in [0..128, 3..98] {
            let cut = |x: Tensor<B, 2>| x.slice([8..31, columns.clone()]);
            let dense = |x: Tensor<B, 2>| {
                let dims = x.dims();
                upload::<B, 2>(&download(x), dims, device, precision)
            };
            let mut results = Vec::new();
            for is_dense in [false, true] {
                let form = |x: Tensor<B, 2>| if is_dense { dense(cut(x)) } else { cut(x) };
                let mut inputs = uploaded.inputs.clone();
                let narrow = |param: &Param<B>, rows: usize| {
                    let value = param.value::<2>().slice([0..rows, columns.clone()]);
                    Param::new("w", value, precision.dtype())
                };
                inputs.x = form(inputs.x);
                inputs.branches.remove(0);
                for branch in &mut inputs.branches {
                    branch.value = form(branch.value.clone());
                    branch.scale = branch.scale.as_ref().map(|(param, row)| (narrow(param, 3), *row));
                }
                let mix = inputs.mix.take().expect("a mix");
                inputs.mix =
                    Some(Mix { start: Start::new(form(mix.start.value())), weight: narrow(&mix.weight, 2) });
                let outputs = B::stream(inputs.clone(), uploaded.form.norm, false);
                let seen = Seen {
                    x: inputs.x.clone(),
                    adds: true,
                    branches: inputs.branches.clone(),
                    mix: inputs.mix.map(|mix| (mix.start.value(), mix.weight)),
                    norm: uploaded.form.norm,
                };
                let grads = OutputGrads {
                    x: uploaded.grads.x.clone().map(form),
                    normed: uploaded.grads.normed.clone().map(form),
                    added: None,
                };
                let grads = B::stream_backward(seen, grads, None);
                results.push([outputs.x, outputs.normed.expect("n"), grads.x, grads.start.expect("x0")]);
            }
            let [view, dense]: [_; 2] = results.try_into().expect("two");
            for (view, dense) in view.into_iter().zip(dense) {
                let width = dense.dims()[1];
                let (view, dense) = (download(view), download(dense));
                let largest = |row: &[f64]| row.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
                let size: Vec<f64> = dense.chunks(width).map(largest).collect();
                // Not to the bit: Burn sums a view in another order on the CPU.
                let worst = worst(&view, &dense, width, |row| size[row]);
                assert!(worst.error <= 8.0 * epsilon(precision), "{} {precision}: {worst:?}", target.label);
            }
        }
        // No rows.
        uploaded.inputs.branches.clear();
        uploaded.inputs.x = Tensor::empty([0, 128], (device, precision.dtype()));
        uploaded.inputs.mix = None;
        let none = B::stream(uploaded.inputs.clone(), uploaded.form.norm, true);
        assert_eq!(none.normed.expect("n").dims(), [0, 128]);
        Ok(())
    }
}

#[test]
fn any_layout_of_the_inputs_gives_the_same() {
    for target in targets() {
        guard(&target, || run(&target, Views)).unwrap();
    }
}

/// A stack of blocks on a tape with a U-Net skip, written once with the op and once with the ops that it is made of:
/// `[leaf's gradient, mixes' gradients, scales' gradients]`.
fn stack<B: Plain>(device: &B::Device, precision: Precision, fused: bool, blocks: usize) -> Vec<Vec<f64>> {
    type T<B> = Autodiff<B>;
    let (rows, columns) = (33, 64);
    let mut random = Random(5);
    let mut values = |size: usize, scale: f64| -> Vec<f64> {
        (0..size).map(|_| round(scale * random.uniform(), precision)).collect()
    };
    let leaf = upload::<B, 2>(&values(rows * columns, 1.0), [rows, columns], device, precision);
    let leaf = Tensor::<T<B>, 2>::from_inner(leaf).require_grad();
    let weight = upload::<B, 2>(&values(rows * columns, 1.0), [rows, columns], device, precision);
    let weight = Tensor::<T<B>, 2>::from_inner(weight);
    let master = if precision == Precision::F64 { Precision::F64 } else { Precision::F32 };
    let mut param = |rows: usize| {
        let value = upload::<B, 2>(&values(rows * columns, 1.0), [rows, columns], device, master);
        Param::<B>::new("w", value, precision.dtype())
    };
    let mixes: Vec<Param<B>> = (0..blocks).map(|_| param(2)).collect();
    let scales = param(blocks);
    let skips = param(1);
    let norm = Norm { eps: 1e-5, scale: 0.7 };
    let mixer = |n: Tensor<T<B>, 2>| n.clone() * n * weight.clone();

    let (mut x, start) = T::<B>::stream_start(leaf.clone());
    let mut branches: Vec<Branch<T<B>>> = Vec::new();
    let mut kept = None;
    for (block, mix) in mixes.iter().enumerate() {
        let n = if fused {
            let mix = Some(Mix { start: start.clone(), weight: mix.clone() });
            let added = block == 1;
            let inputs = Inputs { x, branches: std::mem::take(&mut branches), mix };
            let outputs = T::<B>::stream(inputs, Some(norm), added);
            x = outputs.x;
            kept = outputs.added.or(kept);
            outputs.normed.expect("n")
        } else {
            for Branch { value, scale } in branches.drain(..) {
                let (scale, row) = scale.expect("a scale");
                x = T::<B>::scaled_add(x, value, &scale, row);
            }
            if block == 1 {
                kept = Some(x.clone());
            }
            x = T::<B>::residual_mix(x, leaf.clone(), mix);
            T::<B>::rms_norm(x.clone(), norm.eps).mul_scalar(norm.scale)
        };
        branches.push(Branch { value: mixer(n), scale: Some((scales.clone(), block)) });
        if block == 2
            && let Some(kept) = kept.take()
        {
            branches.push(Branch { value: kept, scale: Some((skips.clone(), 0)) });
        }
    }
    let last = T::<B>::stream(Inputs { x, branches, mix: None }, Some(norm), false).normed.expect("n");
    let grads = (last * weight).sum().backward();
    let params = mixes.iter().chain([&scales, &skips]);
    let mut found = vec![download(leaf.grad(&grads).expect("a gradient of the start"))];
    found.extend(params.filter_map(|param| param.flat_grad()).map(download));
    found
}

#[test]
fn a_stack_on_the_tape_is_that_of_the_ops_it_is_made_of() {
    for blocks in [1, 4] {
        let device = burn_ndarray::NdArrayDevice::Cpu;
        let [fused, plain] = [true, false].map(|fused| stack::<Cpu>(&device, Precision::F64, fused, blocks));
        assert_eq!(fused.len(), plain.len());
        assert!(fused.len() >= 2 + blocks);
        for (index, (a, b)) in fused.iter().zip(&plain).enumerate() {
            let size = b.iter().fold(0.0f64, |size, v| size.max(v.abs()));
            let worst = worst(a, b, a.len(), |_| size);
            assert!(worst.error < 1e-13, "gradient {index} of {blocks} blocks: {worst:?}");
        }
    }
}

struct Stack;

impl Job for Stack {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let fused = stack::<B>(device, target.precision, true, 4);
        assert_eq!(fused, stack::<B>(device, target.precision, true, 4), "{}", target.label);
        let plain = stack::<B>(device, target.precision, false, 4);
        for (index, (a, b)) in fused.iter().zip(&plain).enumerate() {
            let size = b.iter().fold(0.0f64, |size, v| size.max(v.abs()));
            let worst = worst(a, b, a.len(), |_| size);
            // Both round after each of some ten ops.
            let bound = 10.0 * epsilon(target.precision);
            assert!(
                worst.error < bound,
                "gradient {index} on {} {}: {worst:?}",
                target.label,
                target.precision
            );
        }
        Ok(())
    }
}

#[test]
fn a_stack_is_the_same_on_every_device() {
    for target in targets() {
        guard(&target, || run(&target, Stack)).unwrap();
    }
}

#[test]
fn a_traced_model_computes_what_it_computes_in_one_go() {
    // With a trace every block's output is resolved; without, it waits for the next block's norm.
    let device = burn_ndarray::NdArrayDevice::Cpu;
    for name in ["baseline", "ternary-loop", "mamba3-hinge", "mamba1-unet"] {
        let recipe = Recipe::load(name).expect("a built-in recipe");
        let model = Model::<Cpu>::new(&recipe, &device, DType::F32).expect("a model");
        let mut random = Random(3);
        for param in model.params().iter() {
            let values: Vec<f64> = (0..param.numel()).map(|_| 0.05 * random.uniform()).collect();
            let start = param.flat();
            param.set_flat(start + upload::<Cpu, 1>(&values, [values.len()], &device, Precision::F32));
        }
        let ids: Vec<i64> = (0..6).map(|i| (i * 37) % recipe.vocab_size as i64).collect();
        let ids = Tensor::<Cpu, 2, Int>::from_data(TensorData::new(ids, [1, 6]), &device);
        let whole = download(model.hidden::<Cpu>(ids.clone(), None, None));
        let mut outputs = 0;
        let mut trace = |_: &str, _: Tensor<Cpu, 2>| outputs += 1;
        let traced = download(model.hidden::<Cpu>(ids, None, Some(&mut trace)));
        assert!(outputs > 0 && whole.iter().all(|v| v.is_finite()), "{name}");
        assert!(whole == traced, "{name}: {outputs} blocks");
    }
}
