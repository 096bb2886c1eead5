//! The residual stream on NVIDIA GPUs: how `cuda/stream.cu` is launched.

use super::cuda::{Cuda, Spread};
use super::launch_cuda::{
    Arguments, CudaKernel, element, float_word, known_element, launch, multiprocessors,
};
use super::source::Source;
use super::tensor::{dense, empty, load_width, tensor};
use crate::ops::stream::{BRANCHES, Branch, InputGrads, Inputs, Norm, OutputGrads, Outputs, Seen};
use crate::ops::{Param, StreamOps, stream};
use burn::tensor::{DType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

/// `cuda/stream.cu`.
static STREAM: Source = Source::new("stream.cu", include_str!("../../cuda/stream.cu"));

/// The most threads of a row.
const MOST_LANES: usize = 512;

// The kernel's flags.
const HAS_SCALE: u64 = 1;
const HAS_T: u64 = 4;
const HAS_Z: u64 = 8;
const HAS_G1: u64 = 16;
const HAS_X0: u64 = 32;
const HAS_SUM: u64 = 64;
const HAS_SLOT: u64 = 128;

type Primitive = CubeTensor<CudaRuntime>;

impl StreamOps for Cuda {
    fn stream(inputs: Inputs<Self>, norm: Option<Norm>, added: bool) -> Outputs<Self> {
        if inputs.x.dims()[0] == 0 {
            let x = inputs.x;
            return Outputs { normed: norm.map(|_| x.clone()), added: added.then(|| x.clone()), x };
        }
        let mix = inputs.mix.as_ref().map(|mix| (mix.start.value(), mix.weight.clone()));
        let changes = mix.is_some() || !inputs.branches.is_empty();
        let works = changes || norm.is_some();
        let operands = works.then(|| Operands::new(&inputs.x, &inputs.branches, &mix)).flatten();
        let Some(operands) = operands else { return stream::forward(inputs, norm, added) };
        let x = operands.buffers[0].clone();
        let output = |has: bool| has.then(|| empty(&x, operands.shape(), x.dtype));
        // Without mixing, what is there before it is what comes out.
        let (t, z, n) = (output(added && mix.is_some()), output(changes), output(norm.is_some()));
        let mut buffers = operands.buffers.to_vec();
        buffers.extend([&t, &z, &n].map(|output| output.as_ref().unwrap_or(&x).clone()));
        let Some(spread) = operands.spread(&buffers) else { return stream::forward(inputs, norm, added) };
        let flags = flag(HAS_T, t.is_some()) | flag(HAS_Z, z.is_some());
        let kernel = operands.kernel("stream_forward", 1, spread, norm.is_some());
        let groups = spread.threads() / spread.lanes;
        let blocks = operands.rows.div_ceil(groups).min(16 * operands.multiprocessors());
        operands.launch(kernel, blocks, &buffers, norm, flags);
        let x = z.map_or(inputs.x, tensor);
        let added = added.then(|| t.map_or_else(|| x.clone(), tensor));
        Outputs { x, normed: n.map(tensor), added }
    }

    fn stream_backward(
        seen: Seen<Self>,
        grads: OutputGrads<Self>,
        start: Option<Tensor<Self, 2>>,
    ) -> InputGrads<Self> {
        let norm = seen.norm.filter(|_| grads.normed.is_some());
        let works =
            norm.is_some() || seen.mix.is_some() || seen.branches.iter().any(|branch| branch.scale.is_some());
        let operands = works.then(|| Operands::new(&seen.x, &seen.branches, &seen.mix)).flatten();
        let Some(operands) = operands else { return stream::backward(seen, grads, start) };
        let x = operands.buffers[0].clone();
        // The gradients that come in; without mixing, that of what was before it is one of what came out.
        let given = [&grads.x, &grads.normed, &grads.added, &start];
        let [of_z, of_n, of_t, sum] = given.map(|grad| grad.clone().map(|grad| dense(grad.cast(x.dtype))));
        let is_apart = seen.mix.is_some() || of_t.is_none();
        let output = |has: bool| has.then(|| empty(&x, operands.shape(), x.dtype));
        let has_scale = [0, 1].map(|i| seen.branches.get(i).is_some_and(|branch| branch.scale.is_some()));
        let of_x = empty(&x, operands.shape(), x.dtype);
        let of_branches = has_scale.map(output);
        let of_x0 = output(seen.mix.is_some());
        let mut buffers = operands.buffers.to_vec();
        buffers.extend([&of_z, &of_n, &of_t, &sum].map(|grad| grad.as_ref().unwrap_or(&x).clone()));
        buffers.push(of_x.clone());
        buffers.extend(
            [&of_branches[0], &of_branches[1], &of_x0].map(|grad| grad.as_ref().unwrap_or(&x).clone()),
        );
        let spread = operands.spread(&buffers).filter(|_| is_apart);
        let Some(spread) = spread else { return stream::backward(seen, grads, start) };

        let targets = operands.targets(&seen);
        let slots = 2 * usize::from(operands.mixes) + operands.branches;
        let groups = spread.threads() / spread.lanes;
        // As many as run at once: each leaves one row of partial sums.
        let most = (512 / spread.threads()).max(1) * operands.multiprocessors();
        let blocks = operands.rows.div_ceil(groups).min(most);
        let partials = match targets.is_empty() {
            true => x.clone(),
            false => empty(&x, [blocks, slots, operands.columns], DType::F32),
        };
        buffers.push(partials.clone());
        let mut flags = flag(HAS_T, !seen.adds)
            | flag(HAS_Z, of_z.is_some())
            | flag(HAS_G1, of_t.is_some())
            | flag(HAS_X0, of_x0.is_some())
            | flag(HAS_SUM, sum.is_some());
        for target in &targets {
            flags |= HAS_SLOT << target.slot;
        }
        let kernel = operands.kernel("stream_backward", 2, spread, norm.is_some());
        operands.launch(kernel, blocks, &buffers, norm, flags);
        for target in targets {
            target.add(&partials, blocks, slots, operands.columns);
        }
        let of_branches = of_branches.into_iter().take(operands.branches);
        let branches = of_branches.map(|grad| tensor(grad.unwrap_or_else(|| of_x.clone()))).collect();
        InputGrads { x: tensor(of_x), branches, start: of_x0.map(tensor) }
    }
}

fn flag(flag: u64, on: bool) -> u64 {
    if on { flag } else { 0 }
}

/// What both passes read.
struct Operands {
    /// `x`, `y_0`, `y_1`, `x0`, the scales' parameters, `m`; `x` in the place of what there is not.
    buffers: [Primitive; 7],
    rows: usize,
    columns: usize,
    branches: usize,
    mixes: bool,
    /// The scales' flags and their rows' places.
    scale_flags: u64,
    scale_starts: [u64; BRANCHES],
}

impl Operands {
    /// The operands of a call that the kernel may take: rows of one type that it has, and weights of that type.
    fn new(
        x: &Tensor<Cuda, 2>,
        branches: &[Branch<Cuda>],
        mix: &Option<(Tensor<Cuda, 2>, Param<Cuda>)>,
    ) -> Option<Self> {
        let [rows, columns] = x.dims();
        let dtype = x.dtype();
        let values = branches.iter().map(|branch| &branch.value).chain(mix.iter().map(|(x0, _)| x0));
        let mut alike = values.map(|value| value.dims() == [rows, columns] && value.dtype() == dtype);
        let fits = known_element(dtype).is_some()
            && rows > 0
            && columns > 0
            && branches.len() <= BRANCHES
            && alike.all(|alike| alike);
        if !fits {
            return None;
        }
        let weight = |param: &Param<Cuda>| {
            let rows = dense(param.compute_rows());
            let takes = rows.dtype == dtype && param.master_type() == DType::F32;
            (takes && param.shape().last() == Some(&columns)).then_some(rows)
        };
        let x = dense(x.clone());
        let mut buffers = [(); 7].map(|()| x.clone());
        let (mut scale_flags, mut scale_starts) = (0, [0; BRANCHES]);
        for (index, branch) in branches.iter().enumerate() {
            buffers[1 + index] = dense(branch.value.clone());
            if let Some((scale, row)) = &branch.scale {
                buffers[4 + index] = weight(scale)?;
                scale_flags |= HAS_SCALE << index;
                scale_starts[index] = (row * columns) as u64;
            }
        }
        if let Some((x0, param)) = mix {
            buffers[3] = dense(x0.clone());
            buffers[6] = weight(param).filter(|rows| rows.meta.num_elements() == 2 * columns)?;
        }
        let (branches, mixes) = (branches.len(), mix.is_some());
        Some(Self { buffers, rows, columns, branches, mixes, scale_flags, scale_starts })
    }

    fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    fn multiprocessors(&self) -> usize {
        multiprocessors(&self.buffers[0])
    }

    /// How a row of the buffers is spread, if it fits.
    fn spread(&self, buffers: &[Primitive]) -> Option<Spread> {
        let buffers: Vec<&Primitive> = buffers.iter().collect();
        spread(self.columns, load_width(&buffers, self.columns))
    }

    fn kernel(&self, entry: &'static str, pass: u32, spread: Spread, norms: bool) -> CudaKernel {
        let constants = vec![
            ("PASS", pass.to_string()),
            ("ELEMENT", element(self.buffers[0].dtype).to_string()),
            ("WIDTH", spread.width.to_string()),
            ("LANES", spread.lanes.to_string()),
            ("CHUNKS", spread.chunks.to_string()),
            ("BRANCHES", self.branches.to_string()),
            ("MIX", u8::from(self.mixes).to_string()),
            ("NORM", u8::from(norms).to_string()),
        ];
        CudaKernel { source: &STREAM, entry, constants, block: spread.threads() as u32, shared_bytes: 0 }
    }

    fn launch(
        &self,
        kernel: CudaKernel,
        blocks: usize,
        buffers: &[Primitive],
        norm: Option<Norm>,
        flags: u64,
    ) {
        let norm = norm.unwrap_or(Norm { eps: 0.0, scale: 1.0 });
        let scalars = [
            self.rows as u64,
            self.columns as u64,
            float_word(norm.eps as f32),
            float_word(norm.scale as f32),
            self.scale_flags | flags,
            self.scale_starts[0],
            self.scale_starts[1],
        ];
        let buffers: Vec<&Primitive> = buffers.iter().collect();
        let arguments = Arguments { buffers: &buffers, scalars: &scalars, ..Default::default() };
        launch(kernel, [blocks as u32, 1, 1], arguments);
    }

    /// The parameters that train, and the slots of their sums.
    fn targets(&self, seen: &Seen<Cuda>) -> Vec<Target> {
        let mut targets = Vec::with_capacity(1 + BRANCHES);
        if let Some((_, weight)) = &seen.mix {
            targets.push(Target { param: weight.clone(), slot: 0, row: 0, rows: 2 });
        }
        let first = 2 * usize::from(self.mixes);
        for (index, branch) in seen.branches.iter().enumerate() {
            if let Some((scale, row)) = &branch.scale {
                targets.push(Target { param: scale.clone(), slot: first + index, row: *row, rows: 1 });
            }
        }
        targets.retain(|target| target.param.is_trainable());
        targets
    }
}

/// One lane loads 16 bytes of each tensor at once, or up to four elements where rows are not aligned: more, beside the
/// column sums, would spill.
fn spread(columns: usize, width: usize) -> Option<Spread> {
    let spread = Spread::of(columns, width, if width > 1 { 1 } else { 4 });
    (spread.lanes <= MOST_LANES).then_some(spread)
}

/// Rows of a parameter whose gradients are in the partial sums from a slot on.
struct Target {
    param: Param<Cuda>,
    slot: usize,
    row: usize,
    rows: usize,
}

impl Target {
    /// Adds the sums over all blocks to the parameter's gradient.
    fn add(&self, partials: &Primitive, blocks: usize, slots: usize, columns: usize) {
        let elements = self.param.numel();
        Param::accumulate_with([&self.param], |[old]| {
            let old = old.map(into_contiguous);
            let grad = empty(partials, self.param.shape().to_vec(), DType::F32);
            let scalars = [
                blocks,
                slots * columns,
                self.slot * columns,
                self.row * columns,
                self.rows * columns,
                elements,
                usize::from(old.is_some()),
            ];
            let one = |name| (name, "1".to_string());
            let mut constants = vec![("PASS", "4".to_string()), ("ELEMENT", element(DType::F32).to_string())];
            constants.extend(["WIDTH", "LANES", "CHUNKS", "BRANCHES", "MIX", "NORM"].map(one));
            let kernel =
                CudaKernel { source: &STREAM, entry: "stream_sum", constants, block: 512, shared_bytes: 0 };
            let buffers = [partials, old.as_ref().unwrap_or(partials), &grad];
            let scalars = scalars.map(|word| word as u64);
            let arguments = Arguments { buffers: &buffers, scalars: &scalars, ..Default::default() };
            launch(kernel, [elements.div_ceil(32) as u32, 1, 1], arguments);
            [grad]
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_covers_the_row_within_the_kernel_s_bounds() {
        for width in [1, 4, 8] {
            for columns in (1..=8192usize).filter(|c| c.is_multiple_of(width)) {
                let most = MOST_LANES * if width > 1 { width } else { 4 };
                let Some(spread) = spread(columns, width) else {
                    assert!(columns > most, "{columns} {width}");
                    continue;
                };
                assert!(spread.lanes * spread.chunks * width >= columns, "{columns} {spread:?}");
                // Each group of several warps has a barrier of its own, beside the block's.
                assert!(spread.lanes <= 32 || spread.threads() / spread.lanes < 16);
                assert!(spread.threads() <= 512 && spread.threads().is_multiple_of(spread.lanes));
            }
        }
        assert_eq!(spread(512, 8), Some(Spread { width: 8, lanes: 64, chunks: 1 }));
        assert_eq!(spread(513, 1), Some(Spread { width: 1, lanes: 256, chunks: 4 }));
        assert_eq!(spread(4097, 1), None);
    }

    #[test]
    fn the_compile_check_tries_the_largest_forms() {
        let variants: Vec<&str> = STREAM.variants().collect();
        for (element, size) in [("__nv_bfloat16", 2), ("float", 4)] {
            for (columns, width) in
                [(512, 16 / size), (MOST_LANES * 16 / size, 16 / size), (MOST_LANES * 4, 1)]
            {
                let Spread { width, lanes, chunks } = spread(columns, width).expect("a row that fits");
                let form = format!("-DELEMENT={element} -DWIDTH={width} -DLANES={lanes} -DCHUNKS={chunks}");
                let form = format!("{form} -DBRANCHES=2 -DMIX=1 -DNORM=1");
                assert!(variants.contains(&form.as_str()), "{form} is not among {variants:?}");
            }
        }
    }
}
