//! Gated MLPs on Hopper's tensor cores: products whose epilogues are those of `cuda/common/gated.cuh`. A pair is
//! `[m, 2 n]`, the gate's columns first.

use super::cuda::Cuda;
use super::cuda_linear::{Matrix, accumulate, joins, matching, packed};
use super::cuda_matmul::{Factor, choose, fits, kernel, map};
use super::cuda_pingpong::{self, Form};
use super::launch_cuda::{Arguments, TensorMap, element, launch, multiprocessors};
use super::tensor::{empty, has_aligned_rows, primitive, tensor};
use super::views::{columns, side_by_side, sizes};
use crate::ops::mlp::{self as reference, GatedHidden};
use crate::ops::{LinearOps, Param};
use burn::tensor::{DType, Tensor};

/// The gated MLP, without what a backward needs.
pub(super) fn mlp(
    x: Tensor<Cuda, 2>,
    gate: &Param<Cuda>,
    up: &Param<Cuda>,
    last: &Param<Cuda>,
) -> Tensor<Cuda, 2> {
    match gated_rows(&primitive(x.clone()), gate, up, false) {
        Some((activated, _)) => Cuda::project(tensor(activated), last),
        None => reference::gated_forward(x, gate, up, last).0,
    }
}

/// The gated MLP, and what its backward needs.
pub(super) fn mlp_forward(
    x: Tensor<Cuda, 2>,
    gate: &Param<Cuda>,
    up: &Param<Cuda>,
    last: &Param<Cuda>,
) -> (Tensor<Cuda, 2>, GatedHidden<Cuda>) {
    let Some((activated, Some(pair))) = gated_rows(&primitive(x.clone()), gate, up, true) else {
        return reference::gated_forward(x, gate, up, last);
    };
    let width = sizes(&activated)[1];
    let activated = tensor(activated);
    let [gate, up] = [0, width].map(|from| tensor(columns(&pair, from, width)));
    (Cuda::project(activated.clone(), last), GatedHidden { gate, up, activated })
}

/// The backward of the gated MLP.
pub(super) fn mlp_backward(
    x: Tensor<Cuda, 2>,
    hidden: GatedHidden<Cuda>,
    gate: &Param<Cuda>,
    up: &Param<Cuda>,
    last: &Param<Cuda>,
    grad: Tensor<Cuda, 2>,
) -> Tensor<Cuda, 2> {
    let output_grad = matching(grad.clone(), x.dtype());
    let weight = primitive(last.compute::<2>());
    let halves = [&hidden.gate, &hidden.up].map(|half| primitive(half.clone()));
    let pair = side_by_side(&halves.each_ref())
        .filter(|pair| fits(&output_grad) && takes_ungated(&output_grad, &weight, pair));
    let Some(pair) = pair else { return reference::gated_backward(x, hidden, gate, up, last, grad) };
    accumulate(last, &primitive(hidden.activated), &output_grad);
    let both = empty(&pair, sizes(&pair), pair.dtype);
    ungated(&output_grad, &weight, &pair, &both);
    let width = sizes(&both)[1] / 2;
    let grads = [0, width].map(|from| Some(tensor(columns(&both, from, width))));
    Cuda::project_many_backward(x, [gate, up], grads).expect("gradients of both")
}

/// `silu(w_gate x) w_up x` in one product, and `w_gate x` beside `w_up x` if they are to be kept.
fn gated_rows(
    x: &Matrix,
    gate: &Param<Cuda>,
    up: &Param<Cuda>,
    keeps: bool,
) -> Option<(Matrix, Option<Matrix>)> {
    if !fits(x) || gate.shape() != up.shape() || !joins(x, &[gate, up]) {
        return None;
    }
    let weights = packed([gate, up]);
    if !takes_gated(x, &weights) {
        return None;
    }
    let (rows, width) = (sizes(x)[0], gate.shape()[0]);
    let activated = empty(x, [rows, width], x.dtype);
    let pair = keeps.then(|| empty(x, [rows, 2 * width], x.dtype));
    gated(x, &weights, &activated, pair.as_ref());
    Some((activated, pair))
}

/// Whether [`gated`] takes these: rows at multiples of 16 bytes, for the copy engine.
fn takes_gated(x: &Matrix, weights: &Matrix) -> bool {
    [x, weights].into_iter().map(|x| Factor::new(x, true)).all(|x| x.k_major && x.is_aligned())
}

/// Whether [`ungated`] takes these.
fn takes_ungated(grad: &Matrix, weight: &Matrix, pair: &Matrix) -> bool {
    let (a, b) = (Factor::new(grad, true), Factor::new(weight, false));
    let n = b.shape[2];
    let pairs = pair.is_contiguous() && has_aligned_rows(pair, n) && sizes(pair)[1] == 2 * n;
    a.k_major && a.is_aligned() && !b.k_major && b.is_aligned() && pairs
}

/// `c[m, n] = silu(g) u`, where `g` and `u` are the products of `x[m, k]` by the two halves of `weights[2 n, k]`; they are
/// written to `pair`, if it is there. All but `x` dense, rows of multiples of 16 bytes.
fn gated(x: &Matrix, weights: &Matrix, c: &Matrix, pair: Option<&Matrix>) {
    let (a, mut b) = (Factor::new(x, true), Factor::new(weights, true));
    let ([_, m, k], [_, both, _]) = (a.shape, b.shape);
    b.shape = [2, both / 2, k];
    let epilogue = if pair.is_some() { 7 } else { 10 };
    multiply([&a, &b], [m, both / 2, k], epilogue, c, pair);
}

/// The gradients of what [`gated`] wrote to `pair`, into `c[m, 2 n]`, from the product of `grad[m, k]` and `weight[k, n]`.
fn ungated(grad: &Matrix, weight: &Matrix, pair: &Matrix, c: &Matrix) {
    let (a, b) = (Factor::new(grad, true), Factor::new(weight, false));
    let ([_, m, k], [_, _, n]) = (a.shape, b.shape);
    multiply([&a, &b], [m, n, k], 8, c, Some(pair));
}

fn multiply([a, b]: [&Factor; 2], [m, n, k]: [usize; 3], epilogue: u8, c: &Matrix, pair: Option<&Matrix>) {
    let forward = epilogue != 8;
    let all = if forward { 2 * n } else { n };
    let multiprocessors = multiprocessors(c);
    let constants = vec![
        ("A_K_MAJOR", "1".to_string()),
        ("B_K_MAJOR", u8::from(forward).to_string()),
        ("OUT", element(DType::BF16).to_string()),
        ("EPILOGUE", epilogue.to_string()),
    ];
    let mut maps = vec![a.map(), b.map(), if forward { written(c, m, n) } else { halves(c, m, n) }];
    maps.extend(pair.map(|pair| halves(pair, m, n)));
    let (kernel, blocks) = match Form::choose_gated([m, n, k], epilogue) {
        Some(form) => {
            maps.iter_mut().for_each(|map| map.prefetch = cuda_pingpong::PREFETCH);
            (form.kernel(constants), form.blocks(m, all, multiprocessors))
        }
        None => {
            // Half of a tile is one of the two.
            let (width, _) = choose(m, all, k, 1, false, multiprocessors);
            let width = if width == 256 { 256 } else { 128 };
            let tiles = m.div_ceil(128) * all.div_ceil(width);
            (kernel(width, constants), tiles.min(multiprocessors))
        }
    };
    let operations = 2.0 * (m * all) as f64 * k as f64;
    let scalars = [m, n, k, 1, 1].map(|size| size as u64);
    let arguments = Arguments { maps: &maps, scalars: &scalars, operations, ..Default::default() };
    launch(kernel, [blocks as u32, 1, 1], arguments);
}

fn written(x: &Matrix, m: usize, n: usize) -> TensorMap<'_> {
    debug_assert!(has_aligned_rows(x, n) && x.is_contiguous(), "an output of whole loads");
    map(x, [1, m, n], [1, 16, 64])
}

/// The halves of `[m, 2 n]`.
fn halves(x: &Matrix, m: usize, n: usize) -> TensorMap<'_> {
    debug_assert!(has_aligned_rows(x, n) && x.is_contiguous(), "a pair of whole loads");
    TensorMap { strides: vec![n, 2 * n, 1], ..map(x, [2, m, n], [1, 16, 64]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_compile_check_has_the_forms_of_both_widths() {
        for width in [128, 256] {
            for (epilogue, b_k_major) in [(7, "1"), (8, "0"), (10, "1")] {
                let own = [("A_K_MAJOR", "1"), ("B_K_MAJOR", b_k_major), ("OUT", "__nv_bfloat16")];
                let mut constants: Vec<_> = own.map(|(name, value)| (name, value.to_string())).into();
                constants.push(("EPILOGUE", epilogue.to_string()));
                let kernel = kernel(width, constants);
                let form: BTreeSet<String> =
                    kernel.constants.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
                let variants = kernel.source.variants();
                let mut variants = variants.map(|line| line.split_whitespace().map(str::to_string).collect());
                assert!(variants.any(|variant: BTreeSet<String>| variant == form), "{form:?}");
            }
        }
    }
}
