//! The Mamba-3 SISO mixer: normed B and C, data-dependent rotation and decay, trapezoidal scan, gate
//! (spec/pr1607.md section 2).

use super::init::Init;
use super::params::Params;
use super::plan::ProtectedRows;
use super::spec::{Linears, Spec};
use super::state::SsmState;
use crate::ops::scan::Scan;
use crate::ops::{Backend, Param, Plain, accumulate_type};
use burn::tensor::Tensor;
use std::f64::consts::PI;

/// The slowest decay rate.
const LEAST_RATE: f64 = 1e-4;
/// The epsilon of the norms of B and C.
const NORM_EPS: f64 = 1e-5;

/// Names and sizes of one mixer.
#[derive(Debug, Clone, PartialEq)]
pub struct Mamba3Plan {
    /// What stands before the parameters' names.
    pub prefix: String,
    /// Width of the residual stream.
    pub dim: usize,
    /// Inner width.
    pub inner: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// State size.
    pub state: usize,
    /// Groups of heads that share B and C before their biases.
    pub groups: usize,
    /// Positions that the scan takes at once.
    pub chunk: usize,
}

impl Mamba3Plan {
    fn heads(&self) -> usize {
        self.inner / self.head_dim
    }

    /// Rotation angles: a quarter of the state size, of which they turn one half.
    fn angles(&self) -> usize {
        self.state / 2 / 2
    }

    /// Rows of in_proj: [z | x | B | C | dd_dt | dd_A | trap | angle].
    fn projected(&self) -> usize {
        self.dt_row() + 3 * self.heads() + self.angles()
    }

    /// The first row of B in in_proj.
    fn b_row(&self) -> usize {
        2 * self.inner
    }

    /// The first row of dd_dt in in_proj.
    fn dt_row(&self) -> usize {
        self.b_row() + 2 * self.groups * self.state
    }

    /// The rows of B, and of dd_dt, dd_A and trap, in in_proj: those that PR #1607's `FP16_INPROJ_ROWS` keeps float16
    /// (spec/pr1607.md section 6).
    pub fn protected_rows(&self) -> ProtectedRows {
        let (b, dt) = (self.b_row(), self.dt_row());
        ProtectedRows {
            name: format!("{}.in_proj.weight", self.prefix),
            rows: self.projected(),
            ranges: vec![b..b + self.groups * self.state, dt..dt + 3 * self.heads()],
        }
    }

    /// The parameters.
    pub fn specs(&self, linears: Linears) -> Vec<Spec> {
        let Self { prefix, dim, inner, state, .. } = self;
        let heads = self.heads();
        let one =
            |name: &str, shape: &[usize]| Spec::new(format!("{prefix}.{name}"), shape, Init::Constant(1.0));
        vec![
            Spec::new(format!("{prefix}.dt_bias"), &[heads], Init::StepSize),
            one("B_bias", &[heads, 1, *state]),
            one("C_bias", &[heads, 1, *state]),
            one("D", &[heads]),
            linears.weight(&format!("{prefix}.in_proj"), [self.projected(), *dim]),
            one("B_norm.weight", &[*state]),
            one("C_norm.weight", &[*state]),
            linears.weight(&format!("{prefix}.out_proj"), [*dim, *inner]),
        ]
    }
}

/// A Mamba-3 mixer.
#[derive(Debug, Clone)]
pub struct Mamba3<P: Plain> {
    plan: Mamba3Plan,
    in_proj: Param<P>,
    dt_bias: Param<P>,
    /// Norm weight and bias of B, and of C.
    b: [Param<P>; 2],
    c: [Param<P>; 2],
    skip: Param<P>,
    out_proj: Param<P>,
}

/// What `in_proj` gives, between the projections: `z, x[b, t, h, p]`; `b, c[b, t, g, n]`; `dt, a, trap[b, t, h]`;
/// `angle[b, t, s]`.
#[derive(Debug, Clone)]
pub struct Mamba3Pieces<B: Backend> {
    /// The gate.
    pub z: Tensor<B, 4>,
    /// The values.
    pub x: Tensor<B, 4>,
    /// B before its norm.
    pub b: Tensor<B, 4>,
    /// C before its norm.
    pub c: Tensor<B, 4>,
    /// The step size before its bias and softplus.
    pub dt: Tensor<B, 3>,
    /// The decay rate before softplus.
    pub a: Tensor<B, 3>,
    /// The trapezoid's share before its sigmoid.
    pub trap: Tensor<B, 3>,
    /// The angles before tanh.
    pub angle: Tensor<B, 3>,
}

impl<P: Plain> Mamba3<P> {
    /// The mixer of a plan with the parameters of its names.
    pub fn new(plan: &Mamba3Plan, params: &Params<P>) -> Self {
        let named = |name: &str| params.named(&format!("{}.{name}", plan.prefix));
        Self {
            in_proj: named("in_proj.weight"),
            dt_bias: named("dt_bias"),
            b: [named("B_norm.weight"), named("B_bias")],
            c: [named("C_norm.weight"), named("C_bias")],
            skip: named("D"),
            out_proj: named("out_proj.weight"),
            plan: plan.clone(),
        }
    }

    /// `x[b t, c]` (normed) to `y[b t, c]`; goes on from `state` and leaves in it what the next call goes on from.
    pub fn forward<B: Backend<Plain = P>>(
        &self,
        x: Tensor<B, 2>,
        batch: usize,
        state: Option<&mut SsmState<B>>,
    ) -> Tensor<B, 2> {
        let Mamba3Plan { inner, head_dim, state: size, groups, .. } = self.plan;
        let (heads, angles) = (self.plan.heads(), self.plan.angles());
        let rows = x.dims()[0];
        let time = rows / batch;
        let projected = B::project(x, &self.in_proj);
        let column = |from: usize, len: usize| projected.clone().narrow(1, from, len);
        let split = |from: usize, parts: usize, size: usize| {
            column(from, parts * size).reshape([batch, time, parts, size])
        };
        let scalars = |from: usize, len: usize| column(from, len).reshape([batch, time, len]);
        let (b, dt) = (self.plan.b_row(), self.plan.dt_row());
        let pieces = Mamba3Pieces {
            z: split(0, heads, head_dim),
            x: split(inner, heads, head_dim),
            b: split(b, groups, size),
            c: split(b + groups * size, groups, size),
            dt: scalars(dt, heads),
            a: scalars(dt + heads, heads),
            trap: scalars(dt + 2 * heads, heads),
            angle: scalars(dt + 3 * heads, angles),
        };
        let y = self.core(pieces, state);
        B::project(y.reshape([rows, inner]), &self.out_proj)
    }

    /// What is between the projections: the gated output `y[b, t, h, p]`.
    ///
    /// The trapezoid `h_t = a_t h_{t-1} + (1 - l_t) dt_t a_t v_{t-1} k_{t-1}^T + l_t dt_t v_t k_t^T` is a scan in which
    /// position `s` has the weight `l_s dt_s + (1 - l_{s+1}) dt_{s+1}` (nothing after the last) and `l_t dt_t` on the
    /// diagonal; a sequence that goes on adds the last position's second half to the state.
    pub fn core<B: Backend<Plain = P>>(
        &self,
        pieces: Mamba3Pieces<B>,
        state: Option<&mut SsmState<B>>,
    ) -> Tensor<B, 4> {
        let Mamba3Pieces { z, x, b, c, dt, a, trap, angle } = pieces;
        let [batch, time, heads, head_dim] = x.dims();
        let size = self.plan.state;
        let (dtype, wide) = (x.dtype(), accumulate_type(x.dtype()));
        let place = (&x.device(), wide);

        let dt = B::softplus(dt.cast(wide) + B::master(&self.dt_bias, [1, 1, heads]));
        let rate = B::softplus(a.cast(wide)).neg().clamp_max(-LEAST_RATE);
        let share = B::logistic(trap.cast(wide));
        let diagonal = share.clone() * dt.clone();
        let second = dt.clone() - diagonal.clone();

        // One angle for all heads, made the heads' own by their step sizes.
        let angles = angle.dims()[2];
        let step = angle.cast(wide).tanh().mul_scalar(PI).reshape([batch, time, 1, angles])
            * dt.clone().reshape([batch, time, heads, 1]);
        let start = SsmState::hidden(&state, 3, [batch, heads, angles], place);
        let turned = B::running_angle(
            step.reshape([batch, time, heads * angles]),
            start.reshape([batch, heads * angles]),
        );
        let table = turned.clone().reshape([batch, time, heads, angles]);
        let (cos, sin) = (table.clone().cos(), table.sin());
        let k = rotate(self.headed(b, &self.b), &cos, &sin);
        let q = rotate(self.headed(c, &self.c), &cos, &sin);

        let mut hidden = SsmState::hidden(&state, 0, [batch, heads, head_dim * size], place)
            .reshape([batch, heads, head_dim, size]);
        if let (Some(last_k), Some(last_v)) = (SsmState::seen(&state, 1), SsmState::seen(&state, 2)) {
            let factor = second.clone().narrow(1, 0, 1).reshape([batch, heads, 1, 1]);
            let last_v = last_v.reshape([batch, heads, head_dim, 1]);
            hidden = hidden + last_v * last_k.reshape([batch, heads, 1, size]) * factor;
        }
        let after = Tensor::zeros([batch, 1, heads], place);
        let after = match time {
            1 => after,
            _ => Tensor::cat(vec![second.narrow(1, 1, time - 1), after], 1),
        };
        let scan = Scan {
            q: q.cast(dtype),
            k: k.clone().cast(dtype),
            v: x.clone(),
            log_decay: rate * dt,
            weight: diagonal.clone() + after,
            diagonal,
            state: hidden,
        };
        let (y, hidden) = scan.run(self.plan.chunk, state.is_some());
        if let (Some(state), Some(hidden)) = (state, hidden) {
            let last = |x: Tensor<B, 4>, size: usize| x.narrow(1, time - 1, 1).reshape([batch, heads, size]);
            let angle = turned.narrow(1, time - 1, 1).reshape([batch, heads, angles]);
            let hidden = hidden.reshape([batch, heads, head_dim * size]);
            let values = last(x.clone().cast(wide), head_dim);
            *state = SsmState::new(None, vec![hidden, last(k, size), values, angle]);
        }
        let y = y + x * B::weight(&self.skip, [1, 1, heads, 1]);
        B::silu_gate(y, z)
    }

    /// `rms_norm(x) w + bias` of groups `x[b, t, g, n]` for each head, in f32 (f64 for f64): `[b, t, h, n]`.
    fn headed<B: Backend<Plain = P>>(&self, x: Tensor<B, 4>, [weight, bias]: &[Param<P>; 2]) -> Tensor<B, 4> {
        let [batch, time, groups, size] = x.dims();
        let heads = self.plan.heads();
        let wide = accumulate_type(x.dtype());
        let x = x.cast(wide).reshape([batch * time * groups, size]);
        let x = B::rms_norm(x, NORM_EPS) * B::master(weight, [1, size]);
        let x = x.reshape([batch, time, groups, 1, size]);
        let bias = B::master(bias, [1, 1, groups, heads / groups, size]);
        (x + bias).reshape([batch, time, heads, size])
    }
}

/// Rotates neighbouring pairs of the first `2 s` channels of `x[b, t, h, n]` by `cos, sin[b, t, h, s]`:
/// `(a, b) -> (a cos - b sin, a sin + b cos)`.
fn rotate<B: Backend>(x: Tensor<B, 4>, cos: &Tensor<B, 4>, sin: &Tensor<B, 4>) -> Tensor<B, 4> {
    let [batch, time, heads, size] = x.dims();
    let pairs = cos.dims()[3];
    let turned = x.clone().narrow(3, 0, 2 * pairs).reshape([batch, time, heads, pairs, 2]);
    let part = |index: usize| turned.clone().narrow(4, index, 1).reshape([batch, time, heads, pairs]);
    let (a, b) = (part(0), part(1));
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = a * sin.clone() + b * cos.clone();
    let turned = Tensor::cat(vec![first.unsqueeze_dim::<5>(4), second.unsqueeze_dim(4)], 4);
    let turned = turned.reshape([batch, time, heads, 2 * pairs]);
    if 2 * pairs == size {
        return turned;
    }
    Tensor::cat(vec![turned, x.narrow(3, 2 * pairs, size - 2 * pairs)], 3)
}
