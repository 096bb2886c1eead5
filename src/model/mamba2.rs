//! The Mamba-2 mixer: projection, causal convolution, scan with one decay a head, gate.
//!
//! Three forms: PR #1994's with full selectivity, its "kill" form whose step, B and C are constants (then the scan is
//! exactly a one-pole filter a channel, spec/pr1994.md section 2), and the official layer (state-spaces/mamba, the
//! Mamba-2 paper), which convolves B and C too and norms the gated output.

use super::init::Init;
use super::params::Params;
use super::spec::{Linears, Spec};
use super::state::SsmState;
use crate::ops::conv::next_history;
use crate::ops::one_pole::OnePole;
use crate::ops::scan::Scan;
use crate::ops::{Backend, Param, Plain, accumulate_type};
use burn::tensor::Tensor;

/// The epsilon of the official layer's gated norm.
const GATED_NORM_EPS: f64 = 1e-5;

/// Which of the three forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mamba2Form {
    /// PR #1994's with full selectivity: one group, convolution of x alone, a skip for each channel, no norm.
    Selective,
    /// PR #1994's with constants in the place of dt, B and C.
    Kill,
    /// The official layer; heads in this many groups, the norm over the channels of this many groups.
    Official {
        /// Groups of heads that share B and C.
        groups: usize,
        /// Groups of channels that are normed apart.
        norm_groups: usize,
    },
}

/// Names and sizes of one mixer.
#[derive(Debug, Clone, PartialEq)]
pub struct Mamba2Plan {
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
    /// Taps of the convolution.
    pub taps: usize,
    /// Positions that the scan takes at once.
    pub chunk: usize,
    /// Leaves the scan out.
    pub skip_scan: bool,
    /// Which of the forms.
    pub form: Mamba2Form,
}

impl Mamba2Plan {
    fn heads(&self) -> usize {
        self.inner / self.head_dim
    }

    fn groups(&self) -> usize {
        match self.form {
            Mamba2Form::Official { groups, .. } => groups,
            _ => 1,
        }
    }

    fn is_official(&self) -> bool {
        matches!(self.form, Mamba2Form::Official { .. })
    }

    /// Channels that the convolution takes.
    fn convolved(&self) -> usize {
        if self.is_official() { self.inner + 2 * self.groups() * self.state } else { self.inner }
    }

    /// The parameters.
    pub fn specs(&self, linears: Linears) -> Vec<Spec> {
        let Self { prefix, dim, inner, state, taps, .. } = self;
        let (heads, convolved) = (self.heads(), self.convolved());
        let spec = |name: &str, shape: &[usize], init| Spec::new(format!("{prefix}.{name}"), shape, init);
        let fan_in = Init::Uniform(1.0 / (*taps as f32).sqrt());
        let skip = if self.is_official() { ("D", heads) } else { ("D_skip", *inner) };
        let mut specs = vec![
            spec("A_log", &[heads], Init::Constant(0.0)),
            spec(skip.0, &[skip.1], Init::Constant(1.0)),
            spec("dt_bias", &[heads], Init::StepSize),
        ];
        if self.form == Mamba2Form::Kill {
            let start = Init::Normal(1.0 / (*state as f32).sqrt());
            specs.push(spec("_B_const", &[*state], start));
            specs.push(spec("_C_const", &[*state], start));
        }
        let projected = 2 * inner + 2 * self.groups() * state + heads;
        specs.push(linears.weight(&format!("{prefix}.in_proj"), [projected, *dim]));
        specs.push(spec("conv1d.weight", &[convolved, 1, *taps], fan_in));
        specs.push(spec("conv1d.bias", &[convolved], fan_in));
        if self.is_official() {
            specs.push(spec("norm.weight", &[*inner], Init::Constant(1.0)));
        }
        let out = linears.weight_from(&format!("{prefix}.out_proj"), [*dim, *inner], Init::Constant(0.0));
        specs.push(out);
        specs
    }
}

/// A Mamba-2 mixer.
#[derive(Debug, Clone)]
pub struct Mamba2<P: Plain> {
    plan: Mamba2Plan,
    in_proj: Param<P>,
    conv: [Param<P>; 2],
    a_log: Param<P>,
    dt_bias: Param<P>,
    skip: Param<P>,
    /// The constant B and C.
    constants: Option<[Param<P>; 2]>,
    norm: Option<Param<P>>,
    out_proj: Param<P>,
}

impl<P: Plain> Mamba2<P> {
    /// The mixer of a plan with the parameters of its names.
    pub fn new(plan: &Mamba2Plan, params: &Params<P>) -> Self {
        let named = |name: &str| params.named(&format!("{}.{name}", plan.prefix));
        let official = plan.is_official();
        Self {
            in_proj: named("in_proj.weight"),
            conv: [named("conv1d.weight"), named("conv1d.bias")],
            a_log: named("A_log"),
            dt_bias: named("dt_bias"),
            skip: named(if official { "D" } else { "D_skip" }),
            constants: (plan.form == Mamba2Form::Kill).then(|| [named("_B_const"), named("_C_const")]),
            norm: official.then(|| named("norm.weight")),
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
        let plan = &self.plan;
        let (inner, size, heads, groups) = (plan.inner, plan.state, plan.heads(), plan.groups());
        let (rows, width) = (x.dims()[0], groups * size);
        let time = rows / batch;
        let wide = accumulate_type(x.dtype());
        let projected = B::project(x, &self.in_proj);
        let column = |from: usize, len: usize| projected.clone().narrow(1, from, len);

        // The official layer has the gate first, then what it convolves.
        let convolved = plan.convolved();
        let (z, input) = match plan.is_official() {
            true => (column(0, inner), column(inner, convolved)),
            false => (column(inner, inner), column(0, inner)),
        };
        let input = input.reshape([batch, time, convolved]);
        let history = SsmState::history(&state, [batch, plan.taps - 1, convolved], &input);
        let next = state.is_some().then(|| next_history(input.clone(), history.clone()));
        let input = B::causal_conv(input, history, &self.conv[0], Some(&self.conv[1]), true);
        let u = input.clone().narrow(2, 0, inner).reshape([batch, time, heads, plan.head_dim]);

        let hidden_shape = [batch, inner, if self.constants.is_some() { 1 } else { size }];
        let hidden = SsmState::hidden(&state, 0, hidden_shape, (&u.device(), wide));
        let carry = state.is_some();
        let (y, hidden) = if plan.skip_scan {
            (None, carry.then_some(hidden))
        } else if let Some([b, c]) = &self.constants {
            let (y, hidden) = self.filter(u.clone(), [b, c], hidden, carry);
            (Some(y), hidden)
        } else {
            let [b, c] = match plan.is_official() {
                true => [inner, inner + width].map(|from| input.clone().narrow(2, from, width)),
                false => [2 * inner, 2 * inner + width]
                    .map(|from| column(from, width).reshape([batch, time, width])),
            };
            let dt = column(2 * inner + 2 * width, heads).cast(wide) + B::master(&self.dt_bias, [1, heads]);
            let dt = B::softplus(dt).reshape([batch, time, heads]);
            let a = B::master(&self.a_log, [1, 1, heads]).exp().neg();
            let scan = Scan {
                q: c.reshape([batch, time, groups, size]),
                k: b.reshape([batch, time, groups, size]),
                v: u.clone(),
                log_decay: dt.clone() * a,
                weight: dt.clone(),
                diagonal: dt,
                state: hidden.reshape([batch, heads, plan.head_dim, size]),
            };
            let (y, hidden) = scan.run(plan.chunk, carry);
            (Some(y), hidden.map(|hidden| hidden.reshape(hidden_shape)))
        };
        if let (Some(state), Some(history), Some(hidden)) = (state, next, hidden) {
            *state = SsmState::new(Some(history), vec![hidden]);
        }

        // A skip for each head, or for each channel.
        let skip = match plan.is_official() {
            true => B::weight(&self.skip, [1, 1, heads, 1]),
            false => B::weight(&self.skip, [1, 1, heads, plan.head_dim]),
        };
        let skipped = u * skip;
        let y = match y {
            Some(y) => y + skipped,
            None => skipped,
        };
        let y = B::silu_gate(y.reshape([rows, inner]), z);
        let y = match &self.norm {
            Some(weight) => self.gated_norm(y, weight),
            None => y,
        };
        B::project(y, &self.out_proj)
    }

    /// The scan with constant step, B and C: `y = softplus(dt_bias) (B.C) s`, `s` the one-pole filter of `u`.
    fn filter<B: Backend<Plain = P>>(
        &self,
        u: Tensor<B, 4>,
        [b, c]: [&Param<P>; 2],
        hidden: Tensor<B, 3>,
        carry: bool,
    ) -> (Tensor<B, 4>, Option<Tensor<B, 3>>) {
        let [batch, _, heads, head_dim] = u.dims();
        let (dtype, size) = (u.dtype(), self.plan.state);
        let step = B::softplus(B::master::<1>(&self.dt_bias, [heads]));
        let log_decay = B::master::<1>(&self.a_log, [heads]).exp().neg() * step.clone();
        let state = hidden.reshape([batch, heads, head_dim]);
        let (filtered, hidden) = OnePole { u, log_decay, state }.run(self.plan.chunk, carry);
        let dot = (B::master::<2>(b, [1, size]) * B::master::<2>(c, [1, size])).sum_dim(1).reshape([1]);
        let gain = (step * dot).reshape([1, 1, heads, 1]).cast(dtype);
        (filtered * gain, hidden.map(|hidden| hidden.reshape([batch, heads * head_dim, 1])))
    }

    /// `rms_norm(y) w`, each group of channels apart.
    fn gated_norm<B: Backend<Plain = P>>(&self, y: Tensor<B, 2>, weight: &Param<P>) -> Tensor<B, 2> {
        let [rows, inner] = y.dims();
        let groups = match self.plan.form {
            Mamba2Form::Official { norm_groups, .. } => norm_groups,
            _ => 1,
        };
        let y = B::rms_norm(y.reshape([rows * groups, inner / groups]), GATED_NORM_EPS);
        y.reshape([rows, inner]) * B::weight(weight, [1, inner])
    }
}
