//! The Mamba-1 mixer: projections, causal convolution, selective scan, gate (spec/pr1382.md section 2).

use super::init::Init;
use super::params::Params;
use super::spec::{Linears, Spec};
use super::state::SsmState;
use crate::ops::conv::next_history;
use crate::ops::selective_scan::SelectiveScan;
use crate::ops::{Backend, Param, Plain, accumulate_type};
use burn::tensor::Tensor;

/// Names and sizes of one mixer.
#[derive(Debug, Clone, PartialEq)]
pub struct Mamba1Plan {
    /// What stands before the parameters' names.
    pub prefix: String,
    /// Width of the residual stream.
    pub dim: usize,
    /// Inner width.
    pub inner: usize,
    /// State size of each channel.
    pub state: usize,
    /// Taps of the convolution.
    pub taps: usize,
    /// Width from which the step sizes are projected.
    pub dt_rank: usize,
}

/// Both sizes are at least 64: where PR #1382 starts a linear layer orthogonally.
pub(super) fn both_from_64(shape: [usize; 2]) -> bool {
    shape.iter().all(|size| *size >= 64)
}

impl Mamba1Plan {
    /// The parameters, `orthogonal` where the source system's rule starts matrices so.
    pub fn specs(&self, orthogonal: bool) -> Vec<Spec> {
        let Self { prefix, dim, inner, state, taps, dt_rank } = self;
        let plain = Linears { orthogonal: orthogonal.then_some(both_from_64), ..Linears::PLAIN };
        let casted = Linears { casted: true, ..plain };
        let small = |name: &str, shape: [usize; 2], own: Init| {
            let init = if plain.start(shape) == Init::Orthogonal { Init::Orthogonal } else { own };
            plain.weight_from(&format!("{prefix}.{name}"), shape, init).in_bf16()
        };
        let fan_in = 1.0 / (*taps as f32).sqrt();
        vec![
            Spec::new(format!("{prefix}.A_log"), &[*inner, *state], Init::LogCount).in_bf16(),
            Spec::new(format!("{prefix}.D"), &[*inner], Init::Constant(1.0)),
            casted.weight(&format!("{prefix}.in_proj"), [2 * inner + state + dt_rank, *dim]),
            small("c_proj", [*state, *dim], Init::Normal(0.01)),
            Spec::new(format!("{prefix}.conv1d.weight"), &[*inner, 1, *taps], Init::Uniform(fan_in))
                .in_bf16(),
            Spec::new(format!("{prefix}.conv1d.bias"), &[*inner], Init::Uniform(fan_in)),
            small("dt_proj", [*inner, *dt_rank], Init::Linear),
            Spec::new(format!("{prefix}.dt_proj.bias"), &[*inner], Init::StepSize),
            casted.weight(&format!("{prefix}.out_proj"), [*dim, *inner]),
        ]
    }
}

/// A Mamba-1 mixer.
#[derive(Debug, Clone)]
pub struct Mamba1<P: Plain> {
    plan: Mamba1Plan,
    in_proj: Param<P>,
    c_proj: Param<P>,
    conv: [Param<P>; 2],
    dt_proj: [Param<P>; 2],
    a_log: Param<P>,
    skip: Param<P>,
    out_proj: Param<P>,
}

impl<P: Plain> Mamba1<P> {
    /// The mixer of a plan with the parameters of its names.
    pub fn new(plan: &Mamba1Plan, params: &Params<P>) -> Self {
        let named = |name: &str| params.named(&format!("{}.{name}", plan.prefix));
        Self {
            in_proj: named("in_proj.weight"),
            c_proj: named("c_proj.weight"),
            conv: [named("conv1d.weight"), named("conv1d.bias")],
            dt_proj: [named("dt_proj.weight"), named("dt_proj.bias")],
            a_log: named("A_log"),
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
        let Mamba1Plan { inner, state: size, taps, dt_rank, .. } = self.plan;
        let rows = x.dims()[0];
        let time = rows / batch;
        let wide = accumulate_type(x.dtype());
        let projected = B::project(x.clone(), &self.in_proj);
        let u = projected.clone().narrow(1, 0, inner);
        let z = projected.clone().narrow(1, inner, inner);
        let b = projected.clone().narrow(1, 2 * inner, size);
        let dt = projected.narrow(1, 2 * inner + size, dt_rank);
        let c = B::project(x, &self.c_proj);

        let u = u.reshape([batch, time, inner]);
        let history = SsmState::history(&state, [batch, taps - 1, inner], &u);
        let next = state.is_some().then(|| next_history(u.clone(), history.clone()));
        let u = B::causal_conv(u, history, &self.conv[0], Some(&self.conv[1]), true);

        let dt = B::project(dt, &self.dt_proj[0]).cast(wide) + B::master(&self.dt_proj[1], [1, inner]);
        let delta = B::softplus(dt).reshape([batch, time, inner]);
        let scan = SelectiveScan {
            u: u.clone(),
            delta,
            a: B::master(&self.a_log, [inner, size]).exp().neg(),
            b: b.reshape([batch, time, size]),
            c: c.reshape([batch, time, size]),
            state: SsmState::hidden(&state, 0, [batch, inner, size], (&u.device(), wide)),
        };
        let (y, hidden) = scan.run(state.is_some());
        if let (Some(state), Some(history), Some(hidden)) = (state, next, hidden) {
            *state = SsmState::new(Some(history), vec![hidden]);
        }
        let y = y.reshape([rows, inner]) + u.reshape([rows, inner]) * B::weight(&self.skip, [1, inner]);
        B::project(B::silu_gate(y, z), &self.out_proj)
    }
}
