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
}

impl Form {
    /// The form for a product `[m, n, k, z]`, `[a, b]` K-major or not, to `out`, where measurements on an H100
    /// speak for it. At 65,536 rows, back to back, `cuda/matmul.cu`'s time before this kernel's:
    ///
    /// | product | us |
    /// |---|---|
    /// | forward, n 1024, k 512 | 122 -> 116 |
    /// | the same with epilogue 1, 3 | 123 -> 120, 163 -> 133 |
    /// | forward, n 512, k 512 and n 512, k 256 | 66.0 -> 63.7, 43.7 -> 41.4 |
    /// | input gradient, n 1024, k 512 | 126 -> 118 |
    /// | the same with epilogue 2; n 2048 | 180 -> 150; 341 -> 287 |
    /// | forward and input gradient, n 512, k 1024 | 125 -> 118, 120 -> 114 |
    ///
    /// Widths between these, other epilogues at them, and epilogue 4, are taken for as fast, and were not timed. Others
    /// gain nothing: the input gradient of n 512, k 512, or n 256.
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
        let resident = |ahead| Some(Self { rows: 64, panel: 8, stages: 8, ahead });
        match (k, epilogue, b_k_major) {
            (256..=512, 0, true) if n == 512 => resident(if k > 256 { 1 } else { 2 }),
            (256..=512, 0, false) if n == 512 => None,
            (256..=512, 0, _) | (256..=512, 1, true) => resident(0),
            (256..=512, 2, false) => resident(if n > 1024 { 0 } else { 2 }),
            (256..=512, 3, true) => resident(2),
            (256..=512, 4, false) => resident(0),
            (513..=2048, 0, _) if n <= 1024 => Some(Self { rows: 128, panel: 0, stages: 5, ahead: 0 }),
            _ => None,
        }
    }

    /// The form for epilogue 5 and so much of k, whatever the other sizes: it spares a pass over queries and keys.
    pub(super) fn of_heads(k: usize) -> Option<Self> {
        (1..=512).contains(&k).then_some(Self { rows: 64, panel: 8, stages: 8, ahead: 0 })
    }

    /// The kernel of this form for what else it is compiled with.
    pub(super) fn kernel(self, mut constants: Vec<(&'static str, String)>) -> CudaKernel {
        let Self { rows, panel, stages, ahead } = self;
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
        let staged = self.rows / 64 * (WIDTH / 64) * 2048;
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
        let resident = |ahead| Some(Form { rows: 64, panel: 8, stages: 8, ahead });
        let streamed = Some(Form { rows: 128, panel: 0, stages: 5, ahead: 0 });
        // The baseline's: projections of attention, the squared MLP and its backward, the head's input gradient.
        assert_eq!(forward(1024, 512, 0), resident(0));
        assert_eq!(forward(512, 512, 0), resident(1));
        assert_eq!(forward(1024, 512, 1), resident(0));
        assert_eq!(forward(512, 1024, 0), streamed);
        assert_eq!(input_gradient(1024, 512, 2), resident(2));
        assert_eq!(input_gradient(512, 1024, 0), streamed);
        assert_eq!(input_gradient(512, 512, 0), None);
        // A hidden width of three times the model's, with a slope below zero.
        assert_eq!(forward(1536, 512, 3), resident(2));
        assert_eq!(input_gradient(1536, 512, 4), resident(0));
        assert_eq!(forward(512, 1536, 0), streamed);
        assert_eq!(input_gradient(512, 1536, 0), streamed);
        // Others.
        assert_eq!(forward(512, 256, 0), resident(2));
        assert_eq!(input_gradient(1024, 512, 0), resident(0));
        assert_eq!(input_gradient(2048, 512, 2), resident(0));
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
        for epilogue in 1..=4 {
            assert_eq!((forward(1024, 520, epilogue), input_gradient(1024, 520, epilogue)), (None, None));
        }
    }

    #[test]
    fn the_launch_fits_the_kernel() {
        let (resident, streamed) = (forward(512, 512, 0).unwrap(), forward(512, 1024, 0).unwrap());
        assert_eq!((resident.shared_bytes(), streamed.shared_bytes()), (230_656, 230_544));
        assert_eq!(resident.blocks(ROWS, 1024, 132), 128);
        assert_eq!(resident.blocks(ROWS, 512, 132), 132);
        assert_eq!(streamed.blocks(ROWS, 520, 132), 130);
        assert_eq!(resident.blocks(65, 2048, 132), 32);
        assert_eq!(resident.blocks(ROWS, 2048, 8), 16);
    }

    #[test]
    fn the_compile_check_has_every_form_that_can_be_chosen() {
        let mut chosen = BTreeSet::new();
        for n in (512..=2048).step_by(8) {
            for k in (256..=2048).step_by(8) {
                for (b_k_major, epilogue) in
                    (0..=4).flat_map(|epilogue| [(true, epilogue), (false, epilogue)])
                {
                    let majors = [true, b_k_major];
                    let Some(form) = Form::choose([ROWS, n, k, 1], majors, DType::BF16, epilogue) else {
                        continue;
                    };
                    assert!(form.panel == 0 || k <= 64 * form.panel, "all of k in the panel");
                    let mut constants = vec![
                        ("A_K_MAJOR", "1".to_string()),
                        ("B_K_MAJOR", u8::from(b_k_major).to_string()),
                        ("OUT", "__nv_bfloat16".to_string()),
                        ("EPILOGUE", epilogue.to_string()),
                    ];
                    constants.extend((epilogue > 2).then(|| ("SLOPE", "5e-1f".to_string())));
                    let constants = form.kernel(constants).constants;
                    let variant: BTreeSet<String> =
                        constants.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
                    chosen.insert(variant);
                }
            }
        }
        let checked: BTreeSet<BTreeSet<String>> = PINGPONG
            .text()
            .lines()
            .filter_map(|line| line.strip_prefix("// variant: "))
            // Epilogue 5's are those of its launcher, src/backend/cuda_projected_attention.rs.
            .filter(|variant| !variant.contains("-DEPILOGUE=5"))
            .map(|variant| variant.split_whitespace().map(str::to_string).collect())
            .collect();
        assert_eq!(chosen, checked);
    }
}
