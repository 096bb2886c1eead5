//! Projections of queries, keys and values whose epilogue norms, rotates and scales queries and keys: how
//! `cuda/matmul_pingpong.cu` is launched with epilogue 5 (`cuda/common/epilogue_qk_norm.cuh`). bf16 on Hopper, heads of 32,
//! 64 or 128 channels; anything else is the projections' and the norm's own kernels, one after the other.

use super::cuda::Cuda;
use super::cuda_linear::{Matrix, joins, packed};
use super::cuda_matmul::fits;
use super::cuda_pingpong::{Form, PREFETCH};
use super::launch_cuda::{
    Arguments, CudaKernel, TensorMap, TensorMapSwizzle, element, float_word, launch_strided, multiprocessors,
};
use super::tensor::{aligned, begins_at, copied, dense, empty, primitive, tensor};
use super::views::{columns, pitch};
use crate::ops::projected_attention::{self, Heads};
use crate::ops::qk_norm::QkNorm;
use crate::ops::{Param, ProjectedAttentionOps};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::zspace::metadata::Metadata;

impl ProjectedAttentionOps for Cuda {
    fn project_heads(x: Tensor<Self, 2>, weights: [&Param<Self>; 3], how: &QkNorm<Self>) -> Heads<Self> {
        match Call::new(&x, &weights, how) {
            Some(call) => call.run(weights),
            None => projected_attention::project_heads(x, weights, how),
        }
    }
}

/// Sizes of a call that the kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    tokens: usize,
    time: usize,
    /// Of the mixer's input.
    width: usize,
    heads: usize,
    groups: usize,
    /// Channels of a head, and pairs of them that rotate.
    size: usize,
    half: usize,
}

impl Shape {
    /// `outputs` are those of the three weights.
    fn new<B: crate::ops::Plain>(
        [tokens, width]: [usize; 2],
        outputs: [usize; 3],
        how: &QkNorm<B>,
    ) -> Option<Self> {
        let (heads, groups, half) = (how.heads, how.groups, how.rope.rotated() / 2);
        let size = outputs[0] / heads.max(1);
        let shape = Self { tokens, time: tokens / how.batch.max(1), width, heads, groups, size, half };
        let fits = matches!(size, 32 | 64 | 128)
            && outputs == [heads * size, groups * size, groups * size]
            && groups > 0
            && half.is_multiple_of(8)
            && 2 * half <= size
            && shape.time > 0
            && tokens == how.batch * shape.time
            && (half == 0 || how.rope.len() >= shape.time)
            // Whole loads, and 32-bit numbers of rows.
            && width.is_multiple_of(8)
            && tokens < 1 << 31;
        fits.then_some(shape)
    }

    /// Columns of queries and keys, and of all.
    fn columns(self) -> [usize; 2] {
        [(self.heads + self.groups) * self.size, (self.heads + 2 * self.groups) * self.size]
    }

    fn kernel(self, form: Form, gain: bool) -> CudaKernel {
        let mut constants = vec![
            ("A_K_MAJOR", "1".to_string()),
            ("B_K_MAJOR", "1".to_string()),
            ("OUT", element(DType::BF16).to_string()),
            ("EPILOGUE", "5".to_string()),
        ];
        let own = [("HEAD", self.size), ("HALF", self.half), ("GAIN", usize::from(gain))];
        constants.extend(own.map(|(name, value)| (name, value.to_string())));
        form.kernel(constants)
    }
}

/// A call that the kernel takes.
struct Call {
    shape: Shape,
    form: Form,
    eps: f32,
    x: Matrix,
    /// Cosines and sines; none where nothing rotates.
    tables: Option<[Matrix; 2]>,
    gain: Option<CubeTensor<cubecl::cuda::CudaRuntime>>,
}

impl Call {
    fn new(x: &Tensor<Cuda, 2>, weights: &[&Param<Cuda>; 3], how: &QkNorm<Cuda>) -> Option<Self> {
        let shape = Shape::new(x.dims(), weights.map(|w| w.shape()[0]), how)?;
        let form = Form::of_heads(shape.width)?;
        let gain = how.gain.as_ref().map(|gain| gain.compute::<1>());
        let rows = primitive(x.clone());
        let is_bf16 = gain.as_ref().is_none_or(|gain| gain.dtype() == DType::BF16);
        if !is_bf16 || !fits(&rows) || !joins(&rows, weights) {
            return None;
        }
        let x = aligned(dense(x.clone()));
        let tables = (shape.half > 0).then(|| [&how.rope.cos, &how.rope.sin].map(table));
        let tables = match tables {
            // Rows of both are as far apart.
            Some(tables) if pitch(&tables[0]) != pitch(&tables[1]) => Some(tables.map(copied)),
            tables => tables,
        };
        Some(Self { shape, form, eps: how.eps as f32, x, tables, gain: gain.map(dense) })
    }

    fn run(self, weights: [&Param<Cuda>; 3]) -> Heads<Cuda> {
        let Self { shape, form, x, tables, gain, .. } = &self;
        let Shape { tokens, time, width, heads, groups, size, .. } = *shape;
        let [normed_columns, all_columns] = shape.columns();
        let packed = packed(weights);
        let [raw, normed] =
            [all_columns, normed_columns].map(|columns| empty(x, [tokens, columns], DType::BF16));
        let map = |tensor, columns: usize, rows: usize, tile: usize| TensorMap {
            prefetch: PREFETCH,
            ..TensorMap::dense(tensor, &[1, rows, columns], &[1, tile, 64], TensorMapSwizzle::B128)
        };
        let maps = [
            map(x, width, tokens, 64),
            map(&packed, width, all_columns, 64),
            map(&raw, all_columns, tokens, 16),
            map(&normed, normed_columns, tokens, 16),
        ];
        // Where nothing rotates the tables are never read.
        let [cosines, sines] = match tables {
            Some([cosines, sines]) => [cosines, sines],
            None => [x; 2],
        };
        let table_row = tables.as_ref().and_then(|[cosines, _]| pitch(cosines)).unwrap_or(0);
        let buffers: Vec<&Matrix> = [cosines, sines].into_iter().chain(gain).collect();
        let mut scalars = [tokens, all_columns, width, 1, 1].map(|size| size as u64).to_vec();
        scalars.extend([heads, normed_columns, time, table_row].map(|size| size as u64));
        scalars.push(float_word(self.eps));
        let operations = 2.0 * (tokens * all_columns) as f64 * width as f64;
        let blocks = form.blocks(tokens, all_columns, multiprocessors(x));
        let arguments = Arguments { maps: &maps, buffers: &buffers, scalars: &scalars, operations };
        launch_strided(shape.kernel(*form, gain.is_some()), [blocks as u32, 1, 1], arguments);
        drop(maps);

        let [of_q, of_k] = [heads, groups].map(|heads| heads * size);
        let heads_of = |from: usize, heads: usize| {
            let rows = columns(&normed, from, heads * size);
            let strides = [time * normed_columns, normed_columns, size, 1];
            let meta = Metadata::new([tokens / time, time, heads, size], strides);
            tensor(CubeTensor { meta: Box::new(meta), ..rows })
        };
        Heads {
            before: [columns(&raw, 0, of_q), columns(&raw, of_q, of_k)].map(tensor),
            normed: [heads_of(0, heads), heads_of(of_q, groups)],
            values: tensor(columns(&raw, of_q + of_k, of_k)),
        }
    }
}

/// Cosines or sines in f32, each row at a multiple of what a thread loads at once: two of them.
fn table(x: &Tensor<Cuda, 2>) -> Matrix {
    let x = primitive(if x.dtype() == DType::F32 { x.clone() } else { x.clone().cast(DType::F32) });
    let in_pairs = pitch(&x).is_some_and(|pitch| pitch.is_multiple_of(2)) && begins_at(&x, 8);
    if in_pairs { x } else { copied(x) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::ops::rope::RopeTable;
    use std::collections::BTreeSet;

    fn how(batch: usize, heads: usize, groups: usize, [positions, half]: [usize; 2]) -> QkNorm<Cpu> {
        let table = Tensor::<Cpu, 2>::zeros([positions, half], &Default::default());
        let rope = RopeTable { cos: table.clone(), sin: table };
        QkNorm { batch, heads, groups, rope, gain: None, eps: 1e-6 }
    }

    #[test]
    fn heads_of_a_tile_whose_partners_a_thread_holds_are_taken() {
        let shape = Shape::new([200, 512], [512, 256, 256], &how(2, 8, 4, [100, 32]));
        let expected = Shape { tokens: 200, time: 100, width: 512, heads: 8, groups: 4, size: 64, half: 32 };
        assert_eq!(shape, Some(expected));
        assert_eq!(expected.columns(), [768, 1024]);
        for (outputs, heads, groups, half) in [
            ([96, 32, 32], 3, 1, 16),
            ([128, 128, 128], 1, 1, 64),
            ([192, 64, 64], 3, 1, 8),
            ([64; 3], 1, 1, 0),
        ] {
            assert!(Shape::new([7, 64], outputs, &how(7, heads, groups, [1, half])).is_some(), "{outputs:?}");
        }
        let none = |sizes, outputs, how: QkNorm<Cpu>| assert_eq!(Shape::new(sizes, outputs, &how), None);
        // Heads of other sizes, values of another width, pairs over several threads, positions that are not there, tokens
        // that are no whole sequences, rows between loads.
        none([8, 64], [80, 40, 40], how(1, 2, 1, [8, 0]));
        none([8, 64], [256, 256, 256], how(1, 1, 1, [8, 0]));
        none([8, 64], [128, 64, 128], how(1, 2, 1, [8, 32]));
        none([8, 64], [128, 64, 64], how(1, 2, 1, [8, 12]));
        none([8, 64], [128, 64, 64], how(1, 2, 1, [7, 32]));
        none([8, 64], [128, 64, 64], how(3, 2, 1, [8, 32]));
        none([8, 68], [128, 64, 64], how(1, 2, 1, [8, 32]));
        none([0, 64], [128, 64, 64], how(0, 2, 1, [8, 32]));
        assert_eq!((Form::of_heads(520), Form::of_heads(512).is_some()), (None, true));
    }

    #[test]
    fn the_compile_check_tries_the_forms_of_common_heads() {
        let variant = |kernel: &CudaKernel| -> BTreeSet<String> {
            kernel.constants.iter().map(|(name, value)| format!("-D{name}={value}")).collect()
        };
        let form = Form::of_heads(512).unwrap();
        let kernels = [
            (64, 32, true),
            (64, 32, false),
            (64, 8, true),
            (64, 0, true),
            (32, 16, true),
            (128, 64, true),
            (128, 64, false),
        ]
        .map(|(size, half, gain)| {
            let outputs = [8 * size, 4 * size, 4 * size];
            let shape = Shape::new([64, 512], outputs, &how(1, 8, 4, [64, half])).unwrap();
            shape.kernel(form, gain)
        });
        let expected: BTreeSet<BTreeSet<String>> = kernels.iter().map(variant).collect();
        let source = kernels[0].source;
        let checked: BTreeSet<BTreeSet<String>> = source
            .variants()
            .filter(|variant| variant.contains("-DEPILOGUE=5"))
            .map(|variant| variant.split_whitespace().map(str::to_string).collect())
            .collect();
        assert_eq!(checked, expected);
        assert!(source.text().contains("struct HeadScalars"), "the epilogue is pasted in");
    }
}
