//! GPTQ against its definition, column by column with an explicit inverse, and against plain rounding.

use fairway::host::HostTensor;
use fairway::quant::clip::{Coded, Rule, max_code};
use fairway::quant::gptq::{self, Choice, Factor, output_loss, solve};
use fairway::quant::hessian::{DAMP, Hessian};
use fairway::quant::{Context, Export, Storage, losses, quantize_by};

/// Numbers that look Gaussian, from a seed.
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        let (r, angle) = (1.0 - self.uniform(), std::f64::consts::TAU * self.uniform());
        (-2.0 * r.ln()).sqrt() * angle.cos()
    }

    fn weights(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.normal() * 0.3) as f32).collect()
    }
}

/// The Hessian of correlated inputs; the first `dead` channels are never active.
fn hessian(n: usize, rows: usize, dead: usize, seed: u64) -> Vec<f64> {
    let mut noise = Noise(seed);
    let mut sum = Hessian::new(n);
    for _ in 0..rows {
        let common = noise.normal();
        let x: Vec<f64> = (0..n)
            .map(|i| {
                if i < dead { 0.0 } else { (noise.normal() + common) * (0.2 + (i * 7 % n) as f64 / n as f64) }
            })
            .collect();
        sum.add(&x);
    }
    let mut h = sum.finish(4);
    for i in 0..dead {
        h[i * n + i] = 0.0;
    }
    h
}

/// GPTQ as the specification states it (`spec/challenge.md` section 7), one column at a time: Cholesky of H, inverse,
/// upper Cholesky of the inverse.
fn slow(weights: &[f32], n: usize, h: &[f64], steps: &[f64], (least, most): (i8, i8)) -> Vec<i8> {
    let rows = weights.len() / n;
    let mut h: Vec<Vec<f64>> = h.chunks(n).map(<[f64]>::to_vec).collect();
    let dead: Vec<bool> = (0..n).map(|i| h[i][i] == 0.0).collect();
    (0..n).filter(|&i| dead[i]).for_each(|i| h[i][i] = 1.0);
    let damp = 0.01 * (0..n).map(|i| h[i][i]).sum::<f64>() / n as f64;
    (0..n).for_each(|i| h[i][i] += damp);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| h[b][b].total_cmp(&h[a][a]));
    let permuted: Vec<Vec<f64>> = order.iter().map(|&i| order.iter().map(|&j| h[i][j]).collect()).collect();
    let u = transpose(&cholesky(&invert(&permuted)));
    let mut codes = vec![0i8; rows * n];
    for row in 0..rows {
        let mut w: Vec<f64> =
            order.iter().map(|&c| if dead[c] { 0.0 } else { weights[row * n + c].into() }).collect();
        for i in 0..n {
            let q = (w[i] / steps[row]).round_ties_even().clamp(least.into(), most.into());
            let e = (w[i] - q * steps[row]) / u[i][i];
            (i..n).for_each(|j| w[j] -= e * u[i][j]);
            codes[row * n + order[i]] = q as i8;
        }
    }
    codes
}

fn transpose(a: &[Vec<f64>]) -> Vec<Vec<f64>> {
    (0..a.len()).map(|i| a.iter().map(|row| row[i]).collect()).collect()
}

/// The lower factor.
fn cholesky(a: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let n = a.len();
    let mut l = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let sum: f64 = a[i][j] - (0..j).map(|k| l[i][k] * l[j][k]).sum::<f64>();
            l[i][j] = if i == j { sum.sqrt() } else { sum / l[j][j] };
        }
    }
    l
}

/// The inverse of a symmetric positive definite matrix, by Gauss and Jordan.
fn invert(a: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let n = a.len();
    let unit = |i: usize| (0..n).map(move |j| f64::from(u8::from(i == j)));
    let mut rows: Vec<Vec<f64>> =
        a.iter().enumerate().map(|(i, r)| r.iter().copied().chain(unit(i)).collect()).collect();
    for i in 0..n {
        let pivot = rows[i][i];
        rows[i].iter_mut().for_each(|x| *x /= pivot);
        let from = rows[i].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(k, _)| *k != i) {
            let factor = row[i];
            row.iter_mut().zip(&from).for_each(|(x, y)| *x -= factor * y);
        }
    }
    rows.into_iter().map(|row| row[n..].to_vec()).collect()
}

fn restored(coded: &Coded, n: usize) -> Vec<f32> {
    let rows = coded.codes.chunks(n).zip(&coded.scales);
    rows.flat_map(|(row, &scale)| row.iter().map(move |&code| f32::from(code) * scale)).collect()
}

#[test]
fn codes_equal_the_definition_at_every_size() {
    // Sizes around the blocks of 128 columns, the panels of 32, and the tasks of 64 rows.
    for (rows, n, dead) in
        [(1, 1, 0), (3, 2, 1), (5, 31, 0), (70, 33, 2), (2, 127, 0), (130, 129, 3), (9, 300, 0)]
    {
        let h = hessian(n, 3 * n + 5, dead, n as u64);
        let w = Noise(rows as u64 * 1000 + n as u64).weights(rows * n);
        let factor = Factor::new(&h, n, DAMP, true).unwrap();
        for (least, most) in [(-31, 31), (-8, 7), (-1, 1)] {
            let steps: Vec<f64> =
                (0..rows).map(|r| 0.8 / f64::from(most) * (1.0 + r as f64 * 0.01)).collect();
            let expected = slow(&w, n, &h, &steps, (least, most));
            let one: Vec<Vec<f64>> = steps.iter().map(|&s| vec![s]).collect();
            let got = solve(&w, &factor, &one, (least, most), Choice::Matrix);
            assert_eq!(got.codes, expected, "{rows} x {n}, codes to {most}");
            assert_eq!(got.scales, steps);
            // Among others, which are worse by far, each row keeps the same step. (With 3 levels nothing at all can be better, and
            // in rows of few columns equal.)
            if n < 31 || most == 1 {
                continue;
            }
            let among = |s: f64| vec![s * 300.0, s, s * 200.0];
            let many: Vec<Vec<f64>> = steps.iter().map(|&s| among(s)).collect();
            for choice in [Choice::Matrix, Choice::Row] {
                let again = solve(&w, &factor, &many, (least, most), choice);
                assert_eq!(again.codes, got.codes, "{rows} x {n}, {choice:?}");
                assert_eq!(again.scales, steps);
            }
        }
    }
}

#[test]
fn the_loss_is_that_of_the_damped_hessian() {
    let (rows, n) = (20, 90);
    let h = hessian(n, 300, 0, 3);
    let w = Noise(8).weights(rows * n);
    let factor = Factor::new(&h, n, DAMP, true).unwrap();
    let steps = vec![vec![0.05]; rows];
    let solved = solve(&w, &factor, &steps, (-31, 31), Choice::Row);
    let mut damped = h.clone();
    let damp = 0.01 * (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
    (0..n).for_each(|i| damped[i * n + i] += damp);
    let scales = solved.scales.iter().map(|&s| s as f32).collect();
    let expected = output_loss(&w, &restored(&Coded { codes: solved.codes, scales }, n), &damped);
    assert!((solved.loss / expected - 1.0).abs() < 1e-5, "{} against {expected}", solved.loss);
}

#[test]
fn gptq_beats_rounding_and_ours_beats_the_prs_at_every_width() {
    let (rows, n) = (96, 200);
    let h = hessian(n, 600, 0, 5);
    // Weights as small as a trained model's, which the PRs' floor of the step is coarse for.
    let w: Vec<f32> = Noise(6).weights(rows * n).iter().map(|w| w * 0.25).collect();
    let loss = |coded: &Coded| output_loss(&w, &restored(coded, n), &h);
    for bits in 2..=8 {
        let solved = [Rule::Own, Rule::Pr1382].map(|rule| gptq::rows(&w, n, &h, bits, rule).unwrap());
        // Symmetric codes: two's complement's least is none of them. Ours take up the whole range.
        let most = max_code(bits);
        assert!(solved.iter().all(|coded| coded.codes.iter().all(|code| (-most..=most).contains(code))));
        assert!([-most, most].iter().all(|code| solved[0].codes.contains(code)), "{bits} bits");
        let [own, pr] = solved.each_ref().map(&loss);
        let rounded = [Rule::Own, Rule::Pr1382].map(|rule| loss(&rule.rows(&w, n, bits)));
        println!(
            "{bits} bits: ours {own:.3e} (rounded {:.3e}), PR {pr:.3e} (rounded {:.3e})",
            rounded[0], rounded[1]
        );
        assert!(own < 0.7 * rounded[0] && pr <= rounded[1], "{bits} bits");
        assert!(own < 0.5 * pr, "{bits} bits: {own} against {pr}");
    }
}

#[test]
fn the_same_bits_come_from_any_number_of_threads() {
    let (rows, n) = (200, 140);
    let h = hessian(n, 300, 0, 5);
    let w = Noise(6).weights(rows * n);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| [Rule::Own, Rule::Pr1382].map(|rule| gptq::rows(&w, n, &h, 4, rule).unwrap()))
    };
    let one = run(1);
    assert_eq!(one, run(4));
    assert_eq!(one, run(3));
}

#[test]
fn a_hessian_that_cannot_be_factored_leaves_the_search() {
    let n = 257;
    let w = Noise(1).weights(n * 256);
    let tensor = HostTensor::from_f32("blocks.0.mlp.fc.weight", &[256, n], &w);
    let mut broken = vec![0.0; n * n];
    (0..n).for_each(|i| broken[i * n + i] = 1.0);
    (broken[1], broken[n]) = (5.0, 5.0);
    assert!(Factor::new(&broken, n, DAMP, true).is_none());
    broken[7] = f64::NAN;
    assert!(Factor::new(&broken, n, DAMP, true).is_none());
    let plain = quantize_by(Export::Pr1382, std::slice::from_ref(&tensor), &Context::default()).unwrap();
    let with = |hessian: Vec<f64>| {
        let hessians = [(tensor.name.clone(), hessian)].into();
        quantize_by(
            Export::Pr1382,
            std::slice::from_ref(&tensor),
            &Context { hessians, ..Context::default() },
        )
    };
    assert_eq!(with(broken).unwrap(), plain);
    let error = with(vec![1.0; 9]).unwrap_err();
    assert!(error.to_string().contains("blocks.0.mlp.fc.weight") && error.exit_code() == 2);
    let good = with(hessian(n, 500, 0, 2)).unwrap();
    assert_eq!(good[0].storage, Storage::IntRow(6));
    assert_ne!(good, plain);
}

#[test]
fn losses_are_told_for_each_tensor() {
    let n = 300;
    let h = hessian(n, 500, 0, 4);
    let live = [
        HostTensor::from_f32("blocks.0.mlp.fc.weight", &[256, n], &Noise(1).weights(256 * n)),
        HostTensor::from_f32("blocks.0.attn_scale", &[3], &[0.1, 0.2, 0.3]),
        HostTensor::from_f32("blocks.0.mlp.proj.weight", &[256, n], &vec![0.0; 256 * n]),
    ];
    let hessians = [(live[0].name.clone(), h)].into();
    let context = Context { controls: vec!["attn_scale".into()], hessians, ..Context::default() };
    let of = |bits: u32| {
        let stored = quantize_by(Export::Own { bits }, &live, &context).unwrap();
        losses(&live, &stored, &context.hessians).unwrap()
    };
    let (six, four) = (of(6), of(4));
    assert_eq!(six.iter().map(|loss| loss.storage).collect::<Vec<_>>(), ["int6/row", "f32", "int6/row"]);
    // A step of 2 x 3 sigma / 62 leaves about step / sqrt(12): 3 % of sigma, and four times as much with a quarter of the levels.
    assert!(six[0].relative > 0.02 && six[0].relative < 0.05, "{:?}", six[0]);
    assert!(four[0].relative > 3.0 * six[0].relative);
    assert!(six[0].relative_output.unwrap() < six[0].relative);
    assert_eq!((six[1].relative, six[1].mean_squared, six[1].relative_output), (0.0, 0.0, None));
    assert_eq!((six[2].relative, six[2].relative_output), (0.0, None));
}
