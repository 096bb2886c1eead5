//! Matrix products on every device: factors that lie in every way, sizes around the kernels' tiles, one and many parts
//! of k, against f64 on the host.
//!
//! The rows of one factor and the columns of the other repeat with periods that share no factor with a tile's sizes, so
//! that the host multiplies few of many.
//!
//! Tolerance (DESIGN.md, parity rule): the factors are exact, so a reference rounds the output, and the f32 sums: of k
//! products of random signs, each partial sum rounded (bf16's are on tensor cores, which truncate). Errors are shares of
//! sqrt(k). TF32 factors would be off by about 1e-4.

mod common;

use burn::tensor::{DType, Tensor};
use common::{Random, affordable, all_pass, download, epsilon, round, same, upload_as, worst};
use fairway::Result;
use fairway::backend::{DeviceChoice, Job, Precision, Target};
use fairway::ops::{Plain, accumulate_type};

/// Different rows of the left factor, and columns of the right one.
const PERIODS: [usize; 2] = [17, 19];

/// Elements on either side of a factor that is columns of a wider matrix: Burn makes a view of those.
const BESIDE: usize = 256;

/// How a factor `[z, outer, k]` lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    /// Neighbours along k.
    AlongK,
    /// Neighbours along the outer size.
    AlongOuter,
    /// As columns of a wider matrix, NaN beside them.
    AlongKWithin,
    AlongOuterWithin,
    /// The matrices' rows turn by turn.
    Between,
    /// Neighbours along z: a matrix' elements are apart.
    Apart,
    /// The same matrix throughout.
    Shared,
}

use Layout::*;

/// What the rows (of k) of a factor hold.
struct Rows {
    rows: Vec<Vec<f64>>,
    /// Of the first row, from one matrix to the next.
    shift: usize,
}

impl Rows {
    fn random(side: usize, k: usize, precision: Precision) -> Self {
        let mut random = Random(7 + side as u64);
        let mut row = || (0..k).map(|_| round(random.uniform(), precision)).collect();
        Self { rows: (0..PERIODS[side]).map(|_| row()).collect(), shift: [5, 3][side] }
    }

    fn index(&self, z: usize, outer: usize) -> usize {
        (outer + z * self.shift) % self.rows.len()
    }

    /// `[z, outer, k]` on a device.
    fn upload<B: Plain>(
        &self,
        layout: Layout,
        [z, outer, k]: [usize; 3],
        device: &B::Device,
        dtype: DType,
    ) -> Tensor<B, 3> {
        let row = |z: usize, o: usize| self.rows[self.index(z, o)].as_slice();
        let each = |[x, y, w]: [usize; 3], value: &dyn Fn(usize, usize, usize) -> f64| {
            let mut values = Vec::with_capacity(x * y * w);
            for i in 0..x {
                for j in 0..y {
                    values.extend((0..w).map(|l| value(i, j, l)));
                }
            }
            upload_as::<B, 3>(&values, [x, y, w], device, dtype)
        };
        let within = |size: usize, at: usize| at.checked_sub(BESIDE).filter(|at| *at < size);
        match layout {
            AlongK => each([z, outer, k], &|z, o, k| row(z, o)[k]),
            Shared => each([1, outer, k], &|_, o, k| row(0, o)[k]),
            AlongOuter => each([z, k, outer], &|z, k, o| row(z, o)[k]).swap_dims(1, 2),
            AlongKWithin => {
                let value = |z, o, at| within(k, at).map_or(f64::NAN, |k| row(z, o)[k]);
                each([z, outer, k + 2 * BESIDE], &value).narrow(2, BESIDE, k)
            }
            AlongOuterWithin => {
                let value = |z, k: usize, at| within(outer, at).map_or(f64::NAN, |o| row(z, o)[k]);
                each([z, k, outer + 2 * BESIDE], &value).narrow(2, BESIDE, outer).swap_dims(1, 2)
            }
            Between => each([outer, z, k], &|o, z, k| row(z, o)[k]).swap_dims(0, 1),
            Apart => each([outer, k, z], &|o, k, z| row(z, o)[k]).permute([2, 0, 1]),
        }
    }
}

/// Both factors of a product.
struct Factors {
    sides: [Rows; 2],
    /// Of each row of the first with each of the second.
    products: Vec<Vec<f64>>,
}

impl Factors {
    fn random(k: usize, precision: Precision) -> Self {
        let sides = [0, 1].map(|side| Rows::random(side, k, precision));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
        let products =
            sides[0].rows.iter().map(|a| sides[1].rows.iter().map(|b| dot(a, b)).collect()).collect();
        Self { sides, products }
    }

    /// `[z, m, n]`, where those of `layouts` that are shared have the first matrix only.
    fn exact(&self, [z, m, n]: [usize; 3], layouts: [Layout; 2]) -> Vec<f64> {
        let mut exact = Vec::with_capacity(z * m * n);
        for z in 0..z {
            let [za, zb] = layouts.map(|layout| if layout == Shared { 0 } else { z });
            for i in 0..m {
                let products = &self.products[self.sides[0].index(za, i)];
                exact.extend((0..n).map(|j| products[self.sides[1].index(zb, j)]));
            }
        }
        exact
    }
}

/// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
fn poison<B: Plain>(elements: usize, device: &B::Device, dtype: DType) {
    let types = [dtype, accumulate_type(dtype)];
    let poison: Vec<Tensor<B, 1>> =
        (0..4).map(|i| Tensor::full([elements], f32::NAN, (device, types[i % 2]))).collect();
    drop(poison);
}

fn is_cuda(target: &Target) -> bool {
    matches!(target.choice, DeviceChoice::Cuda(_))
}

/// Whether `got` is within the tolerance of a product of k terms.
fn agrees(what: &str, got: &[f64], exact: &[f64], [n, k]: [usize; 2], out: DType, target: &Target) -> bool {
    let precision = target.precision;
    let unit = if precision == Precision::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
    let each = if precision == Precision::Bf16 { 4.0 } else { 2.0 };
    let last = if out == DType::BF16 { epsilon(Precision::Bf16) } else { 0.0 };
    let tolerance = (each * (k as f64).sqrt() + 4.0) * unit + last;
    assert_eq!(got.len(), exact.len(), "{what}");
    let found = worst(got, exact, n, |_| (k as f64).sqrt());
    let within = found.error <= tolerance;
    println!(
        "{what:>52} as {out:?}: error {:.2e} of {tolerance:.2e}, {:>3.0}%{}",
        found.error,
        100.0 * found.error / tolerance,
        if within { String::new() } else { format!("  FAILED {found:?}") }
    );
    within
}

/// `[z, m, k, n]`, small ones: for every device.
const SMALL: [[usize; 4]; 8] = [
    [1, 1, 1, 1],
    [1, 3, 5, 7],
    [1, 70, 1, 50],
    [1, 65, 16, 63],
    [1, 64, 17, 132],
    [1, 1, 300, 20],
    [1, 20, 36, 1],
    [3, 17, 64, 33],
];

/// For CUDA, whose kernel without tensor cores (`cuda/matmul_exact.cu`) takes those of f32; the tiles are an H100's.
const LARGE: [[usize; 4]; 16] = [
    [1, 2047, 301, 2045],  // 128 x 128, nothing at a multiple of 16 bytes
    [1, 2036, 308, 2044],  // the same, all of it
    [1, 16_500, 96, 516],  // more tiles than fit at once
    [1, 50_001, 76, 60],   // 128 x 64
    [1, 60, 75, 50_002],   // 64 x 128
    [1, 500, 8004, 1000],  // 128 x 128, some parts of k
    [1, 70, 40_001, 90],   // 128 x 64, many
    [1, 516, 20_004, 260], // the same, some
    [1, 130, 5003, 127],   // 64 x 64, parts of no whole pack
    [5, 300, 200, 260],
    // Few multiply-adds: several tiles with tails, some parts of k; more tiles than fit at once (of `cuda/matmul.cu` 192
    // and 128 columns wide), and tiles of 256; 128 x 128 of f32.
    [1, 140, 72, 264],
    [1, 16, 4168, 24],
    [1, 8, 8, 34_056],
    [1, 34_056, 8, 8],
    [1, 8, 8, 33_000],
    [1, 1401, 1, 1533],
];

struct Products;

impl Job for Products {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let dtype = precision.dtype();
        println!("\n{} {precision}", target.label);
        let large = if is_cuda(target) { &LARGE[..] } else { &[] };
        let mut good = true;
        for [z, m, k, n] in SMALL.iter().chain(large).copied() {
            if !affordable(z * m * k * n) {
                continue;
            }
            let factors = Factors::random(k, precision);
            let exact = factors.exact([z, m, n], [AlongK, AlongK]);
            let outputs: &[DType] =
                if precision == Precision::Bf16 { &[DType::F32, DType::BF16] } else { &[dtype] };
            let mut first: Option<Vec<f64>> = None;
            for layouts in [
                [AlongK, AlongOuter],
                [AlongK, AlongK],
                [AlongOuter, AlongOuter],
                [AlongOuter, AlongK],
                [AlongKWithin, AlongOuterWithin],
                [AlongOuterWithin, AlongKWithin],
            ] {
                let [a, b] = [(0, m), (1, n)].map(|(side, outer)| {
                    factors.sides[side].upload::<B>(layouts[side], [z, outer, k], device, dtype)
                });
                let b = b.swap_dims(1, 2);
                for &out in outputs {
                    let product = || {
                        poison::<B>(z * m * n, device, dtype);
                        let c = B::matmul_as(a.clone(), b.clone(), out);
                        assert_eq!((c.dims(), c.dtype()), ([z, m, n], out));
                        download(c)
                    };
                    let got = product();
                    let what = format!("{z}x{m}x{k}x{n} {layouts:?}");
                    good &= agrees(&what, &got, &exact, [n, k], out, target);
                    assert!(same(&product(), &got), "{what}: other bits");
                    // Without tensor cores a sum's order follows from the sizes alone.
                    if is_cuda(target) && precision == Precision::F32 {
                        let first = first.get_or_insert_with(|| got.clone());
                        assert!(same(first, &got), "{what}: other bits than those of the first layout");
                    }
                }
            }
        }
        Ok(good)
    }
}

#[test]
fn products_agree_with_the_host() {
    all_pass(|| Products);
}

/// Products of batches with factors that are shared, spread out, or turned: on CUDA, those of bf16 with a shared factor
/// are the kernel's without tensor cores too.
struct Batches;

impl Job for Batches {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let dtype = precision.dtype();
        println!("\nbatches, {} {precision}", target.label);
        let mut cases = vec![[3, 5, 4, 9], [2, 66, 35, 18], [4, 64, 64, 68]];
        if is_cuda(target) {
            cases.extend([
                [3, 300, 203, 130],
                [4, 260, 512, 260],
                [2, 40, 9001, 36],
                [36, 260, 40, 772],
                [3, 72, 40, 136],
            ]);
        }
        let mut good = true;
        for [z, m, k, n] in cases {
            if !affordable(z * m * k * n) {
                continue;
            }
            let factors = Factors::random(k, precision);
            for layouts in [
                [Shared, AlongOuter],
                [AlongK, Shared],
                [AlongOuter, Shared],
                [Between, Between],
                [Apart, AlongOuter],
                [AlongK, Apart],
                [Apart, Shared],
            ] {
                let exact = factors.exact([z, m, n], layouts);
                let [a, b] = [(0, m), (1, n)].map(|(side, outer)| {
                    factors.sides[side].upload::<B>(layouts[side], [z, outer, k], device, dtype)
                });
                let b = b.swap_dims(1, 2);
                let outputs: &[DType] =
                    if precision == Precision::Bf16 { &[DType::F32, DType::BF16] } else { &[dtype] };
                for &out in outputs {
                    let product = || {
                        poison::<B>(z * m * n, device, dtype);
                        download(B::matmul_as(a.clone(), b.clone(), out))
                    };
                    let got = product();
                    let what = format!("{z}x{m}x{k}x{n} {layouts:?}");
                    good &= agrees(&what, &got, &exact, [n, k], out, target);
                    assert!(same(&product(), &got), "{what}: other bits");
                }
            }

            // Outer sizes that were swapped have no one stride.
            let matrices = |side: usize, outer: usize| {
                let x = factors.sides[side].upload::<B>(AlongK, [6, outer, k], device, dtype);
                x.reshape([3, 2, outer, k]).swap_dims(0, 1)
            };
            let a = matrices(0, m);
            let b = factors.sides[1].upload::<B>(AlongK, [6, n, k], device, dtype).reshape([2, 3, n, k]);
            let got = download(B::matmul_as(a, b.swap_dims(2, 3), accumulate_type(dtype)));
            let mut exact = Vec::new();
            for z in 0..6 {
                let other = z % 3 * 2 + z / 3; // of a
                for i in 0..m {
                    let products = &factors.products[factors.sides[0].index(other, i)];
                    exact.extend((0..n).map(|j| products[factors.sides[1].index(z, j)]));
                }
            }
            let what = format!("6x{m}x{k}x{n} swapped");
            good &= agrees(&what, &got, &exact, [n, k], accumulate_type(dtype), target);
        }
        Ok(good)
    }
}

#[test]
fn products_of_batches_agree_with_the_host() {
    all_pass(|| Batches);
}
