//! GPTQ with the full Hessian: a matrix is coded column by column, and what a column's rounding leaves is made up for by
//! the columns that follow (Frantar et al. 2022; `spec/challenge.md` section 7).
//!
//! With H^-1 = U^T U, U upper triangular, for each column i in order: q_i = clamp(round(w_i / s)), e = (w_i - q_i s) /
//! U_ii, and w_j -= e U_ij for every j > i. The loss (w - q s) H (w - q s)^T of a row is then the sum of its e^2.
//!
//! Everything is float64: the factor must be (float32's Cholesky fails on the Hessians of trained layers), and the updates
//! are so that codes do not depend on how they are blocked. U comes from one Cholesky factor of H in reversed order and its
//! inverse, with no inverse of H: reversed twice, H = R R^T with R upper, and U = R^-1.
//!
//! Rows are independent, so that they run in tasks of `TASK_ROWS`, each with all clip candidates of its rows side by side
//! (a lane is one row under one candidate): the columns of a block update each other lane by lane, and the rest of the
//! matrix by one product a block. Sums over rows are taken in the order of the rows, so that results do not depend on threads.

use super::clip::{Coded, Rule, first_least, max_code, sorted_magnitudes, stored_steps};
use super::hessian::{DAMP, times};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Columns that update each other one by one before the rest is updated.
const BLOCK: usize = 128;
/// Columns of a block that update each other one by one before the rest of the block is.
const PANEL: usize = 32;
/// Rows of one task.
const TASK_ROWS: usize = 64;

/// What GPTQ needs of a Hessian: the order of the columns, and U.
#[derive(Debug)]
pub struct Factor {
    order: Vec<usize>,
    dead: Vec<bool>,
    /// U, [n, n] column-major in `order`.
    upper: Mat<f64>,
}

impl Factor {
    /// Of `hessian[n, n]`: columns that were never active are left out, `damp` of the mean diagonal is added, columns
    /// are put in the order of falling diagonal if `by_activity`. None if it is not positive definite even so.
    pub fn new(hessian: &[f64], n: usize, damp: f64, by_activity: bool) -> Option<Self> {
        if hessian.len() != n * n || hessian.iter().any(|x| !x.is_finite()) {
            return None;
        }
        let dead: Vec<bool> = (0..n).map(|i| hessian[i * n + i] == 0.0).collect();
        let mut diagonal: Vec<f64> = (0..n).map(|i| if dead[i] { 1.0 } else { hessian[i * n + i] }).collect();
        let damp = damp * diagonal.iter().sum::<f64>() / n.max(1) as f64;
        diagonal.iter_mut().for_each(|x| *x += damp);
        let mut order: Vec<usize> = (0..n).collect();
        if by_activity {
            order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
        }
        // Reversed: its lower factor, reversed again, is the upper one.
        let at = |i: usize| order[n - 1 - i];
        let entry = |i: usize, j: usize| if i == j { diagonal[at(i)] } else { hessian[at(i) * n + at(j)] };
        let mut factor = Mat::from_fn(n, n, entry);
        let scratch = cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
        let mut memory = MemBuffer::try_new(scratch).ok()?;
        let stack = MemStack::new(&mut memory);
        cholesky_in_place(factor.as_mut(), Default::default(), Par::Seq, stack, Default::default()).ok()?;
        let mut inverse = Mat::zeros(n, n);
        invert_lower_triangular(inverse.as_mut(), factor.as_ref(), Par::Seq);
        let upper = Mat::from_fn(n, n, |i, j| if i <= j { inverse[(n - 1 - i, n - 1 - j)] } else { 0.0 });
        let sound = (0..n).all(|i| upper[(i, i)].is_finite() && upper[(i, i)] > 0.0);
        sound.then_some(Self { order, dead, upper })
    }

    /// Columns.
    pub fn size(&self) -> usize {
        self.order.len()
    }
}

/// Which of a row's candidate steps is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// One candidate for the whole matrix, that of the least plain squared error (both PRs).
    Matrix,
    /// For each row the candidate of the least loss under the Hessian (ours).
    Row,
}

/// A matrix that was coded.
#[derive(Debug, Clone, PartialEq)]
pub struct Solved {
    /// Codes [rows, cols].
    pub codes: Vec<i8>,
    /// The step of each row.
    pub scales: Vec<f64>,
    /// The sum over rows of (w - q s) H (w - q s)^T, H damped.
    pub loss: f64,
}

/// Codes `weights[rows, cols]` with codes from `least` to `most`; `steps[rows][candidates]` are the steps to try.
///
/// # Panics
/// Sizes that do not fit together: a mistake of the caller.
pub fn solve<T: Copy + Into<f64> + Sync>(
    weights: &[T],
    factor: &Factor,
    steps: &[Vec<f64>],
    (least, most): (i8, i8),
    choice: Choice,
) -> Solved {
    let (n, rows) = (factor.size(), steps.len());
    let candidates = steps.first().map_or(0, Vec::len);
    assert!(weights.len() == rows * n && steps.iter().all(|s| s.len() == candidates), "sizes");
    if n == 0 || rows == 0 {
        return Solved { codes: Vec::new(), scales: Vec::new(), loss: 0.0 };
    }
    let range = (f64::from(least), f64::from(most));
    let tasks: Vec<Task> = weights
        .par_chunks(TASK_ROWS * n)
        .zip(steps.par_chunks(TASK_ROWS))
        .map(|(weights, steps)| Task::run(weights, factor, steps, range))
        .collect();
    let whole = (choice == Choice::Matrix).then(|| {
        let sum = |c: usize| tasks.iter().flat_map(|t| &t.errors).skip(c).step_by(candidates).sum();
        first_least(&(0..candidates).map(sum).collect::<Vec<f64>>())
    });
    let mut solved = Solved { codes: vec![0; rows * n], scales: Vec::with_capacity(rows), loss: 0.0 };
    for (row, steps) in steps.iter().enumerate() {
        let (task, row_of_task) = (&tasks[row / TASK_ROWS], row % TASK_ROWS);
        let losses = &task.losses[row_of_task * candidates..][..candidates];
        let chosen = whole.unwrap_or_else(|| first_least(losses));
        solved.scales.push(steps[chosen]);
        solved.loss += losses[chosen];
        let lanes = task.losses.len();
        let lane = row_of_task * candidates + chosen;
        for (i, &column) in factor.order.iter().enumerate() {
            solved.codes[row * n + column] = task.codes[i * lanes + lane];
        }
    }
    solved
}

/// Some rows under all of their candidates; lane = row x candidates + candidate.
struct Task {
    /// [columns in order][lanes].
    codes: Vec<i8>,
    /// The loss of each lane.
    losses: Vec<f64>,
    /// The plain squared error of each lane.
    errors: Vec<f64>,
}

impl Task {
    fn run<T: Copy + Into<f64>>(
        weights: &[T],
        factor: &Factor,
        steps: &[Vec<f64>],
        (least, most): (f64, f64),
    ) -> Self {
        let n = factor.size();
        let steps_of_lanes: Vec<f64> = steps.concat();
        let lanes = steps_of_lanes.len();
        let candidates = lanes / steps.len();
        let original = |column: usize, row: usize| -> f64 {
            if factor.dead[column] { 0.0 } else { weights[row * n + column].into() }
        };
        // Column-major: a column's lanes lie together.
        let mut w = vec![0.0f64; n * lanes];
        for (column, lanes) in factor.order.iter().zip(w.chunks_exact_mut(lanes)) {
            for (row, lanes) in lanes.chunks_exact_mut(candidates).enumerate() {
                lanes.fill(original(*column, row));
            }
        }
        let mut codes = vec![0i8; n * lanes];
        let mut left = vec![0.0f64; BLOCK.min(n) * lanes];
        let (mut losses, mut errors) = (vec![0.0f64; lanes], vec![0.0f64; lanes]);
        for block in (0..n).step_by(BLOCK) {
            let block_end = (block + BLOCK).min(n);
            for panel in (block..block_end).step_by(PANEL) {
                let end = (panel + PANEL).min(block_end);
                for i in panel..end {
                    let (done, rest) = w.split_at_mut((i + 1) * lanes);
                    let column = &mut done[i * lanes..];
                    let e = &mut left[(i - block) * lanes..][..lanes];
                    let diagonal = factor.upper[(i, i)];
                    code_column(
                        column,
                        e,
                        &mut codes[i * lanes..][..lanes],
                        &steps_of_lanes,
                        diagonal,
                        (least, most),
                    );
                    losses.iter_mut().zip(&*e).for_each(|(loss, e)| *loss += e * e);
                    for (j, later) in (i + 1..end).zip(rest.chunks_exact_mut(lanes)) {
                        let u = factor.upper[(i, j)];
                        later.iter_mut().zip(&*e).for_each(|(w, e)| *w -= e * u);
                    }
                }
                update(&mut w, lanes, &left[(panel - block) * lanes..], factor, panel..end, end..block_end);
            }
            update(&mut w, lanes, &left, factor, block..block_end, block_end..n);
        }
        for (i, &column) in factor.order.iter().enumerate() {
            for (lane, error) in errors.iter_mut().enumerate() {
                let restored = f64::from(codes[i * lanes + lane]) * steps_of_lanes[lane];
                *error += (original(column, lane / candidates) - restored).powi(2);
            }
        }
        Self { codes, losses, errors }
    }
}

/// Codes one column: `column` in, its codes and errors e = (w - q s) / diagonal out.
fn code_column(
    column: &mut [f64],
    e: &mut [f64],
    codes: &mut [i8],
    steps: &[f64],
    diagonal: f64,
    (least, most): (f64, f64),
) {
    for (((w, e), code), &step) in column.iter().zip(e.iter_mut()).zip(codes.iter_mut()).zip(steps) {
        // A step of 0 is that of a row of zeros: 0 / 0 becomes code 0.
        let q = if step > 0.0 { round_even((w / step).clamp(least, most)) } else { 0.0 };
        *e = (w - q * step) / diagonal;
        *code = q as i8;
    }
}

/// As [`super::clip::round_even`], in float64.
fn round_even(x: f64) -> f64 {
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    (x + SHIFT) - SHIFT
}

/// w[to] -= left x U[from, to], `left` holding the errors of the columns `from`.
fn update(
    w: &mut [f64],
    lanes: usize,
    left: &[f64],
    factor: &Factor,
    from: std::ops::Range<usize>,
    to: std::ops::Range<usize>,
) {
    if to.is_empty() {
        return;
    }
    let (depth, width) = (from.len(), to.len());
    let left = MatRef::from_column_major_slice(&left[..depth * lanes], lanes, depth);
    let upper = factor.upper.as_ref().submatrix(from.start, to.start, depth, width);
    let w = MatMut::from_column_major_slice_mut(&mut w[to.start * lanes..to.end * lanes], lanes, width);
    matmul(w, Accum::Add, left, upper, -1.0, Par::Seq);
}

/// Codes a matrix `weights[rows, cols]` in symmetric codes of `bits` bits by the rule that `rule` is for searches: both PRs'
/// GPTQ with its floors, or ours. None if the Hessian cannot be factored.
pub fn rows(weights: &[f32], cols: usize, hessian: &[f64], bits: u32, rule: Rule) -> Option<Coded> {
    let factor = Factor::new(hessian, cols, DAMP, true)?;
    let most = max_code(bits);
    let steps: Vec<Vec<f64>> = weights
        .par_chunks(cols.max(1))
        .map(|row| {
            let magnitudes = sorted_magnitudes(row);
            match rule {
                Rule::Own => rule.steps(bits, &magnitudes).into_iter().map(|(step, _)| step.into()).collect(),
                _ => stored_steps(bits, &magnitudes).map(f64::from).collect(),
            }
        })
        .collect();
    let choice = if rule == Rule::Own { Choice::Row } else { Choice::Matrix };
    let solved = solve(weights, &factor, &steps, (-most, most), choice);
    Some(Coded { codes: solved.codes, scales: solved.scales.iter().map(|&s| s as f32).collect() })
}

/// The loss (w - r) H (w - r)^T summed over the rows of two matrices [rows, n], `hessian` as it was collected: what
/// restored weights cost a layer's output. Not damped a second time.
pub fn output_loss(weights: &[f32], restored: &[f32], hessian: &[f64]) -> f64 {
    let n = hessian.len().isqrt();
    if n == 0 {
        return 0.0;
    }
    let error: Vec<f64> = weights.iter().zip(restored).map(|(w, r)| f64::from(*w) - f64::from(*r)).collect();
    let product = times(&error, hessian, n);
    let of_row = |(i, row): (usize, &[f64])| -> f64 {
        row.iter().enumerate().map(|(j, error)| error * product[(i, j)]).sum()
    };
    error.chunks(n).enumerate().map(of_row).sum()
}
