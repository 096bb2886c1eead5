//! Matrix products of bf16 whose epilogues hide behind other products: when `cuda/matmul_pingpong.cu` is the faster
//! kernel, and its launch.

use super::launch_cuda::{CudaKernel, TensorMapPrefetch};
use super::source::Source;
use burn::tensor::DType;

/// `cuda/matmul_pingpong.cu`.
static PINGPONG: Source = Source::new("matmul_pingpong.cu", include_str!("../../cuda/matmul_pingpong.cu"));

/// Columns of a tile.
const WIDTH: usize = 128;

/// How its tensor maps read: with 256 bytes, forms that fetch ahead are 4% slower.
pub(super) const PREFETCH: TensorMapPrefetch = TensorMapPrefetch::B128;

/// What the kernel is compiled for, beside layouts and epilogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    /// Of a tile.
    rows: usize,
    /// Slices of `b` that stay in shared memory, all of k; 0: none stays.
    panel: usize,
    /// Of the ring.
    stages: usize,
    /// Tiles that `a` is fetched to the L2 ahead.
    ahead: usize,
    /// Whether what it reads and writes beside the products are pairs.
    pairs: bool,
}

/// A panel of `b` in shared memory, rows of 64, a ring of eight slices.
const RESIDENT: Form = Form { rows: 64, panel: 8, stages: 8, ahead: 0, pairs: false };

/// The same with twice the buffers for outputs, in the place of half of the ring.
const PAIRED: Form = Form { stages: 4, pairs: true, ..RESIDENT };

/// `a` and `b` both in the ring.
const STREAMED: Form = Form { rows: 128, panel: 0, stages: 5, ahead: 0, pairs: false };

impl Form {
    /// The form for a product `[m, n, k, z]`, `[a, b]` K-major or not, to `out`, where measurements on an H100
    /// speak for it. At 65,536 rows, back to back, `cuda/matmul.cu`'s time before this kernel's:
    ///
    /// | product | us |
    /// |---|---|
    /// | forward, n 1024, k 512 | 122 -> 116 |
    /// | the same with epilogue 1, 3 | 123 -> 120, 163 -> 133 |
    /// | forward, n 512, k 512 and n 512, k 256 | 66.0 -> 63.7, 43.7 -> 41.4 |
    /// | input gradient, n 1024, k 512; n 512, k 512 | 126 -> 118; 68.4 -> 65.5 |
    /// | the same with epilogue 2; n 2048 | 180 -> 150; 341 -> 287 |
    /// | forward and input gradient, n 512, k 1024 | 125 -> 118, 120 -> 114 |
    ///
    /// Widths between these, other epilogues at them, and epilogues 4 and 6, are taken for as fast, and were not timed.
    /// n 256 gains nothing. Nor does an epilogue that goes through registers alone: with 2 at n 2048, 362.
    pub(super) fn choose(
        [m, n, k, z]: [usize; 4],
        [a_k_major, b_k_major]: [bool; 2],
        out: DType,
        epilogue: u8,
    ) -> Option<Self> {
        let long = z == 1 && m * n >= 8192 * 1024 && (512..=2048).contains(&n);
        if !long || !a_k_major || out != DType::BF16 {
            return None;
        }
        let resident = |ahead| Some(Self { ahead, ..RESIDENT });
        match (k, epilogue, b_k_major) {
            (256..=512, 0, true) if n == 512 => resident(if k > 256 { 1 } else { 2 }),
            (256, 0, false) if n == 512 => None,
            (257..=512, 0, false) if n == 512 => resident(1),
            (256..=512, 0, _) | (256..=512, 1, true) => resident(0),
            (256..=512, 2, false) => resident(2),
            (256..=512, 3, true) => resident(2),
            (256..=512, 4, false) => resident(0),
            (256..=512, 6, true) if n <= 1024 => resident(2),
            (513..=2048, 0, _) | (513..=2048, 6, true) if n <= 1024 => Some(STREAMED),
            _ => None,
        }
    }

    /// The form for epilogue 5 and so much of k, whatever the other sizes: it spares a pass over queries and keys.
    pub(super) fn of_heads(k: usize) -> Option<Self> {
        (1..=512).contains(&k).then_some(RESIDENT)
    }

    /// The form for a product `[m, n, k]` of a gated pair, `n` columns of each of the two: forward (epilogue 7, or 10
    /// without the pair) or backward (8). Not timed: as epilogues 3, 1 and 2 had it.
    pub(super) fn choose_gated([m, n, k]: [usize; 3], epilogue: u8) -> Option<Self> {
        let long = m * n >= 8192 * 512 && (256..=4096).contains(&n) && (256..=512).contains(&k);
        match epilogue {
            _ if !long => None,
            7 => Some(Self { ahead: 2, ..RESIDENT }),
            8 => Some(PAIRED),
            _ => Some(RESIDENT),
        }
    }

    /// The kernel of this form for what else it is compiled with.
    pub(super) fn kernel(self, mut constants: Vec<(&'static str, String)>) -> CudaKernel {
        let Self { rows, panel, stages, ahead, .. } = self;
        let own = [("ROWS", rows), ("TILE_N", WIDTH), ("PANEL", panel), ("STAGES", stages), ("AHEAD", ahead)];
        constants.extend(own.map(|(name, value)| (name, value.to_string())));
        CudaKernel {
            source: &PINGPONG,
            entry: "matmul_pingpong",
            constants,
            block: 384,
            shared_bytes: self.shared_bytes(),
        }
    }

    /// `SHARED_BYTES` of the kernel, for an output of bf16.
    fn shared_bytes(self) -> usize {
        let b_slice = WIDTH / 64 * 8192;
        let slice = self.rows / 64 * 8192 + if self.panel > 0 { 0 } else { b_slice };
        let staged = self.rows / 64 * (WIDTH / 64) * 2048 * if self.pairs { 2 } else { 1 };
        1024 + self.panel * (b_slice + 8) + self.stages * (slice + 16) + 8 * (staged + 8)
    }

    /// The same number of blocks for each panel of `b`, at most one a multiprocessor: more would have nothing to do.
    pub(super) fn blocks(self, m: usize, n: usize, multiprocessors: usize) -> usize {
        let panels = n.div_ceil(WIDTH);
        panels * (multiprocessors / panels).clamp(1, m.div_ceil(self.rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const ROWS: usize = 65_536;

    fn forward(n: usize, k: usize, epilogue: u8) -> Option<Form> {
        Form::choose([ROWS, n, k, 1], [true, true], DType::BF16, epilogue)
    }

    fn input_gradient(n: usize, k: usize, epilogue: u8) -> Option<Form> {
        Form::choose([ROWS, n, k, 1], [true, false], DType::BF16, epilogue)
    }

    #[test]
    fn the_form_is_the_one_measured_for_the_shape() {
        let resident = |ahead| Some(Form { ahead, ..RESIDENT });
        let streamed = Some(STREAMED);
        // The baseline's: projections of attention, the squared MLP and its backward, the head's input gradient.
        assert_eq!(forward(1024, 512, 0), resident(0));
        assert_eq!(forward(512, 512, 0), resident(1));
        assert_eq!(forward(1024, 512, 1), resident(0));
        assert_eq!(forward(512, 1024, 0), streamed);
        assert_eq!(input_gradient(1024, 512, 2), resident(2));
        assert_eq!(input_gradient(512, 1024, 0), streamed);
        assert_eq!(input_gradient(512, 512, 0), resident(1));
        // A hidden width of three times the model's, with a slope below zero.
        assert_eq!(forward(1536, 512, 3), resident(2));
        assert_eq!(input_gradient(1536, 512, 4), resident(0));
        assert_eq!(forward(512, 1536, 0), streamed);
        assert_eq!(input_gradient(512, 1536, 0), streamed);
        // Others.
        assert_eq!(forward(512, 256, 0), resident(2));
        assert_eq!(input_gradient(1024, 512, 0), resident(0));
        assert_eq!(input_gradient(2048, 512, 2), resident(2));
        assert_eq!(input_gradient(512, 256, 0), None);
        // A projection that is added to the stream.
        assert_eq!(forward(512, 512, 6), resident(2));
        assert_eq!(forward(512, 1024, 6), streamed);
        // The gated MLP of eight times the model's width, and its backward.
        assert_eq!(Form::choose_gated([32_768, 4096, 512], 7), resident(2));
        assert_eq!(Form::choose_gated([32_768, 4096, 512], 10), resident(0));
        assert_eq!(Form::choose_gated([32_768, 4096, 512], 8), Some(PAIRED));
    }

    #[test]
    fn everything_else_stays_with_the_other_kernel() {
        let choose = |sizes, majors, out| Form::choose(sizes, majors, out, 0);
        let (both, bf16) = ([true, true], DType::BF16);
        assert!(choose([8192, 1024, 512, 1], both, bf16).is_some());
        assert_eq!(choose([8191, 1024, 512, 1], both, bf16), None);
        assert_eq!(choose([8192, 1024, 512, 2], both, bf16), None);
        assert_eq!(choose([8192, 1024, 512, 1], both, DType::F32), None);
        assert_eq!(choose([8192, 1024, 512, 1], [false, true], bf16), None);
        for (n, k) in [(504, 512), (2056, 512), (1024, 248), (1032, 520), (512, 2056)] {
            assert_eq!((forward(n, k, 0), input_gradient(n, k, 0)), (None, None), "{n} {k}");
        }
        for sizes in [[8191, 512, 512], [65_536, 248, 512], [8192, 4104, 512], [65_536, 512, 520]] {
            assert!([7, 8, 10].iter().all(|epilogue| Form::choose_gated(sizes, *epilogue).is_none()));
        }
        for epilogue in 1..=4 {
            assert_eq!((forward(1024, 520, epilogue), input_gradient(1024, 520, epilogue)), (None, None));
        }
    }

    #[test]
    fn the_launch_fits_the_kernel() {
        let (resident, streamed) = (forward(512, 512, 0).unwrap(), forward(512, 1024, 0).unwrap());
        assert_eq!((resident.shared_bytes(), streamed.shared_bytes()), (230_656, 230_544));
        assert_eq!(PAIRED.shared_bytes(), 230_592);
        assert_eq!(resident.blocks(ROWS, 1024, 132), 128);
        assert_eq!(resident.blocks(ROWS, 512, 132), 132);
        assert_eq!(streamed.blocks(ROWS, 520, 132), 130);
        assert_eq!(resident.blocks(65, 2048, 132), 32);
        assert_eq!(resident.blocks(ROWS, 2048, 8), 16);
    }

    #[test]
    fn the_compile_check_has_every_form_that_can_be_chosen() {
        let mut chosen = BTreeSet::new();
        let mut add = |form: Option<Form>, k: usize, b_k_major: bool, epilogue: u8| {
            let Some(form) = form else { return };
            assert!(form.panel == 0 || k <= 64 * form.panel, "all of k in the panel");
            let mut constants = vec![
                ("A_K_MAJOR", "1".to_string()),
                ("B_K_MAJOR", u8::from(b_k_major).to_string()),
                ("OUT", "__nv_bfloat16".to_string()),
                ("EPILOGUE", epilogue.to_string()),
            ];
            constants.extend([3, 4].contains(&epilogue).then(|| ("SLOPE", "5e-1f".to_string())));
            constants.extend((epilogue == 6).then(|| ("SCALE", "__nv_bfloat16".to_string())));
            let constants = form.kernel(constants).constants;
            let variant: BTreeSet<String> =
                constants.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
            chosen.insert(variant);
        };
        for n in (256..=4096).step_by(8) {
            for k in (256..=2048).step_by(8) {
                for (epilogue, b_k_major) in [(7, true), (8, false), (10, true)] {
                    add(Form::choose_gated([ROWS, n, k], epilogue), k, b_k_major, epilogue);
                }
                for (epilogue, b_k_major) in (0..=6).flat_map(|number| [(number, true), (number, false)]) {
                    let form = Form::choose([ROWS, n, k, 1], [true, b_k_major], DType::BF16, epilogue);
                    add(form, k, b_k_major, epilogue);
                }
            }
        }
        let checked: BTreeSet<BTreeSet<String>> = PINGPONG
            .variants()
            // Epilogue 5's are those of its launcher, src/backend/cuda_projected_attention.rs.
            .filter(|variant| !variant.contains("-DEPILOGUE=5"))
            .map(|variant| variant.split_whitespace().map(str::to_string).collect())
            .collect();
        assert_eq!(chosen, checked);
    }
}
