//! Softcapped cross-entropy on NVIDIA GPUs: how the products of the head and `cuda/cross_entropy.cu` follow each other.
//!
//! The logits are made chunk by chunk, and read while they are in the L2. The backward makes them again, keeps their
//! gradients for a group of some chunks, in the activations' type, and then multiplies these by the head and the hidden
//! rows: products of full length. No tensor has more than [`GRADIENTS`] elements of logits.

use super::cuda::{Cuda, product};
use super::cuda_linear::added;
use super::cuda_matmul::{self, Epilogue};
use super::launch_cuda::{Arguments, CudaKernel, element, float_word, known_element, launch};
use super::source::Source;
use super::tensor::{dense, dense_int, empty, load_width, primitive, tensor};
use super::views::{rows, transposed};
use crate::ops::cross_entropy::softcap;
use crate::ops::{CrossEntropyOps, MatmulOps, Param, cross_entropy};
use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use std::ops::Range;

/// `cuda/cross_entropy.cu`.
static CROSS_ENTROPY: Source = Source::new("cross_entropy.cu", include_str!("../../cuda/cross_entropy.cu"));

/// Logits of a chunk, in f32: 32 MB of an H100's L2 of 50 MB.
const LOGITS: usize = 1 << 23;

/// Gradients of logits of a group of chunks: 64 MB of bf16.
const GRADIENTS: usize = 1 << 25;

impl CrossEntropyOps for Cuda {
    const LOGIT_ELEMENTS: usize = 1 << 26;

    fn capped_logits(h: Tensor<Self, 2>, w: &Param<Self>, cap: Option<f64>) -> Tensor<Self, 2> {
        let (rows, weight) = (primitive(h.clone()), w.compute::<2>());
        let Some(cap) = cap.filter(|_| cuda_matmul::fits(&rows)) else {
            return softcap(Self::matmul_as(h, weight.transpose(), DType::F32), cap);
        };
        let logits = empty(&rows, [h.dims()[0], weight.dims()[0]], DType::F32);
        let weight = primitive(weight.transpose());
        cuda_matmul::product_with(&rows, &weight, &logits, Epilogue::Softcap(cap));
        tensor(logits)
    }

    fn cross_entropy(
        h: Tensor<Self, 2>,
        w: &Param<Self>,
        targets: Tensor<Self, 1, Int>,
        cap: Option<f64>,
    ) -> Tensor<Self, 1> {
        Self::cross_entropy_and_lse(h, w, targets, cap).0
    }

    fn cross_entropy_and_lse(
        h: Tensor<Self, 2>,
        w: &Param<Self>,
        targets: Tensor<Self, 1, Int>,
        cap: Option<f64>,
    ) -> (Tensor<Self, 1>, Option<Tensor<Self, 1>>) {
        let weight = w.compute();
        if !takes(&h, &weight, &targets) {
            return (cross_entropy::forward(h, weight, targets, cap), None);
        }
        let head = Head::new(h, weight, targets, cap);
        let nll = empty(&head.h, [head.rows], DType::F32);
        let lse = empty(&head.h, [head.rows], DType::F32);
        for chunk in head.chunks() {
            let logits = head.logits(&chunk);
            head.launch("cross_entropy_forward", &[&logits, &head.targets, &nll, &lse], &chunk, 0);
        }
        (tensor(nll), Some(tensor(lse)))
    }

    fn cross_entropy_backward(
        h: Tensor<Self, 2>,
        w: &Param<Self>,
        targets: Tensor<Self, 1, Int>,
        cap: Option<f64>,
        lse: Option<Tensor<Self, 1>>,
        grad: Tensor<Self, 1>,
    ) -> Tensor<Self, 2> {
        let (weight, is_trainable) = (w.compute(), w.is_trainable());
        if !takes(&h, &weight, &targets) {
            let mut accumulate = |part| w.accumulate::<2>(part);
            let accumulate = is_trainable.then_some::<&mut dyn FnMut(Tensor<Self, 2>)>(&mut accumulate);
            return cross_entropy::backward(h, weight, targets, cap, grad, accumulate);
        }
        let lse = lse.or_else(|| Self::cross_entropy_and_lse(h.clone(), w, targets.clone(), cap).1);
        let lse = dense(lse.expect("a forward that gives it wherever this backward is taken"));
        let grad = dense(grad.cast(DType::F32));
        let head = Head::new(h, weight, targets, cap);
        let grad_h = empty(&head.h, [head.rows, head.columns], head.h.dtype);
        let mut grad_w = None;
        for group in head.groups() {
            let grad_logits = empty(&head.h, [group.len(), head.vocab], head.h.dtype);
            for chunk in head.chunks_of(group.clone()) {
                let logits = head.logits(&chunk);
                let buffers = [&logits, &head.targets, &lse, &grad, &grad_logits];
                head.launch("cross_entropy_backward", &buffers, &chunk, group.start);
            }
            product(&grad_logits, &head.w, &rows(&grad_h, group.start, group.len()));
            if is_trainable {
                // The sum is this call's own, which nothing else holds.
                let sum = added(grad_w.take(), &rows(&head.h, group.start, group.len()), &grad_logits);
                grad_w = Some(sum);
            }
        }
        if let Some(grad_w) = grad_w {
            w.accumulate::<2>(tensor(grad_w));
        }
        tensor(grad_h)
    }
}

/// Whether the kernels take these.
fn takes(h: &Tensor<Cuda, 2>, w: &Tensor<Cuda, 2>, targets: &Tensor<Cuda, 1, Int>) -> bool {
    let ([rows, columns], [vocab, _]) = (h.dims(), w.dims());
    known_element(h.dtype()).is_some()
        && w.dtype() == h.dtype()
        && targets.dtype() == DType::I32
        && rows > 0
        && columns > 0
        && (1..1 << 30).contains(&vocab)
}

/// The head's operands, dense.
struct Head {
    h: CubeTensor<CudaRuntime>,
    w: CubeTensor<CudaRuntime>,
    targets: CubeTensor<CudaRuntime>,
    rows: usize,
    columns: usize,
    vocab: usize,
    cap: Option<f64>,
}

impl Head {
    fn new(h: Tensor<Cuda, 2>, w: Tensor<Cuda, 2>, targets: Tensor<Cuda, 1, Int>, cap: Option<f64>) -> Self {
        let ([rows, columns], [vocab, _]) = (h.dims(), w.dims());
        assert_eq!(targets.dims(), [rows], "a target for each row");
        Self { h: dense(h), w: dense(w), targets: dense_int(targets), rows, columns, vocab, cap }
    }

    fn chunks(&self) -> impl Iterator<Item = Range<usize>> {
        self.chunks_of(0..self.rows)
    }

    fn chunks_of(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        ranges(rows, chunk_rows(self.vocab))
    }

    fn groups(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        ranges(0..self.rows, chunk_rows(self.vocab) * (GRADIENTS / LOGITS))
    }

    /// The products of some rows and the head.
    fn logits(&self, chunk: &Range<usize>) -> CubeTensor<CudaRuntime> {
        let logits = empty(&self.h, [chunk.len(), self.vocab], DType::F32);
        product(&rows(&self.h, chunk.start, chunk.len()), &transposed(&self.w), &logits);
        logits
    }

    /// Queues a kernel on the logits of a chunk, the first of `buffers`; the rows of its gradients begin at `group`.
    fn launch(
        &self,
        entry: &'static str,
        buffers: &[&CubeTensor<CudaRuntime>],
        chunk: &Range<usize>,
        group: usize,
    ) {
        let (width, lanes) = (load_width(&buffers[..1], self.vocab), lanes(self.vocab));
        let constants = vec![
            ("ELEMENT", element(self.h.dtype).to_string()),
            ("WIDTH", width.to_string()),
            ("LANES", lanes.to_string()),
            ("CAPPED", u8::from(self.cap.is_some()).to_string()),
        ];
        let kernel =
            CudaKernel { source: &CROSS_ENTROPY, entry, constants, block: THREADS as u32, shared_bytes: 0 };
        let cap = self.cap.unwrap_or(1.0);
        let [first, count, vocab, to] =
            [chunk.start, chunk.len(), self.vocab, chunk.start - group].map(|n| n as u64);
        let scalars = [first, count, vocab, to, float_word(cap as f32), float_word((1.0 / cap) as f32)];
        let blocks = chunk.len().div_ceil(THREADS / lanes) as u32;
        launch(kernel, [blocks, 1, 1], Arguments { buffers, scalars: &scalars, ..Default::default() });
    }
}

/// Threads of a block.
const THREADS: usize = 256;

/// Threads that share a row.
fn lanes(vocab: usize) -> usize {
    if vocab <= 2048 { 32 } else { THREADS }
}

/// Rows of a chunk: whole tiles of the product.
fn chunk_rows(vocab: usize) -> usize {
    let rows = (LOGITS / vocab).max(1);
    if rows > 128 { rows / 128 * 128 } else { rows }
}

/// A range in pieces of `step`.
fn ranges(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(step).map(move |start| start..(start + step).min(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_whole_chunks_and_cover_the_rows() {
        for (all, vocab) in [(1, 2), (33_000, 1024), (65_536, 1024), (9000, 8192), (5, 1 << 24)] {
            let step = chunk_rows(vocab);
            assert!(step * vocab <= LOGITS.max(vocab), "{vocab}: {step}");
            let mut next = 0;
            for group in ranges(0..all, step * (GRADIENTS / LOGITS)) {
                for chunk in ranges(group.clone(), step) {
                    assert!(chunk.start == next && chunk.end > next && chunk.end <= group.end);
                    next = chunk.end;
                }
            }
            assert_eq!(next, all, "{vocab}");
        }
        assert_eq!((chunk_rows(1024), chunk_rows(8192), chunk_rows(1000)), (8192, 1024, 8320));
    }

    #[test]
    fn the_compile_check_tries_the_forms_of_common_vocabularies() {
        for (element, vocab, width, capped) in
            [("__nv_bfloat16", 1024, 4, 1), ("__nv_bfloat16", 8192, 4, 1), ("float", 1024, 4, 0)]
        {
            let lanes = lanes(vocab);
            let variant = format!("-DELEMENT={element} -DWIDTH={width} -DLANES={lanes} -DCAPPED={capped}");
            assert!(CROSS_ENTROPY.variants().any(|line| line == variant), "{variant}");
        }
    }
}
