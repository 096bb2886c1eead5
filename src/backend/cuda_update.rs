//! The optimizers' steps over many tensors in few launches: how `cuda/update.cu` is launched.

use super::cuda::Cuda;
use super::launch_cuda::{Arguments, CudaKernel, float_word, known_element, launch};
use super::source::Source;
use super::tensor::{dense, empty, is_aligned, primitive, tensor};
use crate::ops::UpdateOps;
use crate::ops::update::{
    self, AdamInput, AdamOutput, MomentumConfig, MomentumInput, OrthogonalInput, Updated,
};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

/// `cuda/update.cu`.
static UPDATE: Source = Source::new("update.cu", include_str!("../../cuda/update.cu"));

/// Threads of a block, as the kernels have it.
const THREADS: usize = 256;

/// Elements of a block of the sums of squares.
const SQUARES_ELEMENTS: usize = THREADS * 32;

/// Packs of a thread of a kernel, all of them in flight at once: of Adam, which reads four tensors, and of the others.
const ADAM_PACKS: usize = 2;
const PACKS: usize = 4;

/// The most tensors of one launch. cubecl keeps the pointers of 1,024 buffers at a time, so no launch may have more of
/// them; and CUDA, from 12.1 on, takes 32,764 bytes of parameters.
const ADAM_TENSORS: usize = 120;
const MATRICES: usize = 128;
const SQUARES_TENSORS: usize = 512;
const PAIRS: usize = 256;

// Flags of a tensor.
const FRESH: u64 = 1;
const BF16: u64 = 2;
const COPY: u64 = 4;

type Buffer = CubeTensor<CudaRuntime>;

impl UpdateOps for Cuda {
    fn adam_step(inputs: Vec<AdamInput<Self>>, scale: Option<Tensor<Self, 1>>) -> Vec<AdamOutput<Self>> {
        let takes = |input: &AdamInput<Self>| {
            let moments = input.moments.iter().flatten();
            let mut tensors = [&input.value, &input.grad].into_iter().chain(moments);
            tensors.all(is_float)
        };
        if !inputs.iter().all(takes) || !scale.iter().all(is_float) {
            return update::adam_step(inputs, scale);
        }
        let scale = scale.map(dense);
        chunks(inputs, ADAM_TENSORS).flat_map(|inputs| adam(inputs, scale.as_ref())).collect()
    }

    fn momentum_step(
        inputs: Vec<MomentumInput<Self>>,
        config: MomentumConfig,
        scale: Option<Tensor<Self, 1>>,
    ) -> (Vec<Tensor<Self, 2>>, Tensor<Self, 3>) {
        let takes =
            |input: &MomentumInput<Self>| [&input.grad].into_iter().chain(&input.buffer).all(is_float);
        let Some(dims) = inputs.first().map(|input| input.grad.dims()) else {
            return update::momentum_step(inputs, config, scale);
        };
        if !inputs.iter().all(takes) || !scale.iter().all(is_float) || known_element(config.dtype).is_none() {
            return update::momentum_step(inputs, config, scale);
        }
        let scale = scale.map(dense);
        let (count, first) = (inputs.len(), primitive(inputs[0].grad.clone()));
        let updates = empty(&first, [count, dims[0], dims[1]], config.dtype);
        let mut start = 0;
        let mut buffers = Vec::with_capacity(count);
        for inputs in chunks(inputs, MATRICES) {
            let len = inputs.len();
            buffers.extend(momentum(inputs, dims, start, &updates, config, scale.as_ref()));
            start += len;
        }
        (buffers, tensor(updates))
    }

    fn orthogonal_step(
        inputs: Vec<OrthogonalInput<Self>>,
        updates: Tensor<Self, 3>,
        bf16: bool,
    ) -> Vec<Updated<Self, 2>> {
        let takes = inputs.iter().all(|input| is_float(&input.value));
        if !takes || updates.shape().num_elements() == 0 || known_element(updates.dtype()).is_none() {
            return update::orthogonal_step(inputs, updates, bf16);
        }
        let [_, rows, columns] = updates.dims();
        let updates = dense(updates);
        let mut start = 0;
        let mut updated = Vec::with_capacity(inputs.len());
        for inputs in chunks(inputs, MATRICES) {
            let len = inputs.len();
            updated.extend(orthogonal(inputs, [rows, columns], start, &updates, bf16));
            start += len;
        }
        updated
    }

    fn clip_factor(grads: Vec<Tensor<Self, 1>>, clip: f64) -> Tensor<Self, 1> {
        if grads.is_empty() || !grads.iter().all(is_float) {
            return update::clip_factor(grads, clip);
        }
        let grads: Vec<Buffer> = grads.into_iter().map(dense).collect();
        let blocks = |grad: &Buffer| grad.meta.num_elements().div_ceil(SQUARES_ELEMENTS);
        let count: usize = grads.iter().map(blocks).sum();
        let sums = empty(&grads[0], [count], DType::F32);
        let mut start = 0;
        for grads in chunks(grads, SQUARES_TENSORS) {
            let mut words = vec![start as u64];
            let mut first = 0;
            for grad in &grads {
                words.extend([grad.meta.num_elements() as u64, first as u64]);
                first += blocks(grad);
            }
            let tensors: Vec<&Buffer> = grads.iter().collect();
            let buffers: Vec<&Buffer> = [&sums].into_iter().chain(tensors.iter().copied()).collect();
            let kernel = many("update_squares", "SQUARES", None, [width(&tensors), 0], grads.len());
            launch(kernel, [first as u32, 1, 1], arguments(&buffers, &words));
            start += first;
        }
        let factor = empty(&sums, [1], DType::F32);
        let constants = vec![("PART", "CLIP".to_string()), ("WIDTH", "1".to_string())];
        let kernel =
            CudaKernel { source: &UPDATE, entry: "update_clip", constants, block: 1024, shared_bytes: 0 };
        launch(kernel, [1, 1, 1], arguments(&[&sums, &factor], &[count as u64, float_word(clip as f32)]));
        tensor(factor)
    }

    fn blend(pairs: Vec<[Tensor<Self, 1>; 2]>, weights: [f64; 2]) -> Vec<Tensor<Self, 1>> {
        if !pairs.iter().flatten().all(is_float) {
            return update::blend(pairs, weights);
        }
        chunks(pairs, PAIRS).flat_map(|pairs| blend(pairs, weights)).collect()
    }
}

fn adam(inputs: Vec<AdamInput<Cuda>>, scale: Option<&Buffer>) -> Vec<AdamOutput<Cuda>> {
    struct Tensors {
        value: Buffer,
        grad: Buffer,
        moments: Option<[Buffer; 2]>,
        new: [Buffer; 3],
        copy: Option<Buffer>,
    }
    let mut words = vec![u64::from(scale.is_some())];
    let mut tensors = Vec::with_capacity(inputs.len());
    let mut inputs_of = Vec::with_capacity(inputs.len());
    for input in inputs {
        let (config, lr) = (input.config, input.lr);
        let [size, second] = config.corrections(lr, input.steps);
        let copy = wanted(input.copy);
        let flags = flags(input.moments.is_none(), input.bf16, copy);
        inputs_of.push([
            flags,
            pair(config.beta1, 1.0 - config.beta1),
            pair(config.beta2, 1.0 - config.beta2),
            pair(size, 1.0 - lr * config.weight_decay),
            pair(second, config.eps),
        ]);
        let (value, grad) = (dense(input.value), dense(input.grad));
        let shape = [value.meta.num_elements()];
        let copy = copy.then(|| empty(&value, shape, DType::BF16));
        let moments = input.moments.map(|m| m.map(dense));
        let [m, v] = match &moments {
            Some([m, v]) => [replacing(m), replacing(v)],
            None => [None, None],
        };
        let new = [None, m, v].map(|place| place.unwrap_or_else(|| empty(&value, shape, DType::F32)));
        tensors.push(Tensors { grad, moments, new, copy, value });
    }
    let inputs: Vec<[&Buffer; 4]> = tensors
        .iter()
        .map(|t| {
            let [m, v] = t.moments.as_ref().map_or([&t.value; 2], |[m, v]| [m, v]);
            [&t.value, &t.grad, m, v]
        })
        .collect();
    let width = width(&inputs.concat());
    let mut first = 0;
    for (t, rates) in tensors.iter().zip(inputs_of) {
        let elements = t.value.meta.num_elements();
        words.extend([elements as u64, first as u64]);
        words.extend(rates);
        first += elements.div_ceil(THREADS * width * ADAM_PACKS);
    }
    let mut buffers = vec![scale.unwrap_or(&tensors[0].value)];
    for (t, inputs) in tensors.iter().zip(&inputs) {
        buffers.extend(inputs);
        buffers.extend(&t.new);
        buffers.push(t.copy.as_ref().unwrap_or(&t.new[0]));
    }
    let kernel = many("update_adam", "ADAM", None, [width, ADAM_PACKS], tensors.len());
    launch(kernel, [first as u32, 1, 1], arguments(&buffers, &words));
    let output = |Tensors { new: [value, m, v], copy, .. }| AdamOutput {
        updated: Updated { value: tensor(value), copy: copy.map(tensor) },
        moments: [tensor(m), tensor(v)],
    };
    tensors.into_iter().map(output).collect()
}

fn momentum(
    inputs: Vec<MomentumInput<Cuda>>,
    [rows, columns]: [usize; 2],
    start: usize,
    updates: &Buffer,
    config: MomentumConfig,
    scale: Option<&Buffer>,
) -> Vec<Tensor<Cuda, 2>> {
    let elements = rows * columns;
    let mut words = vec![
        elements as u64,
        start as u64,
        u64::from(scale.is_some()),
        u64::from(config.nesterov),
        float_word(config.momentum as f32),
    ];
    words.extend(inputs.iter().map(|input| flags(input.buffer.is_none(), input.bf16, false)));
    let tensors: Vec<(Buffer, Option<Buffer>, Buffer)> = inputs
        .into_iter()
        .map(|input| {
            assert_eq!(input.grad.dims(), [rows, columns], "matrices of one shape");
            let grad = dense(input.grad);
            let buffer = input.buffer.map(dense);
            let new = buffer.as_ref().and_then(replacing);
            let new = new.unwrap_or_else(|| empty(&grad, [rows, columns], DType::F32));
            (grad, buffer, new)
        })
        .collect();
    let old: Vec<&Buffer> =
        tensors.iter().flat_map(|(grad, buffer, _)| [Some(grad), buffer.as_ref()]).flatten().collect();
    let width = if elements.is_multiple_of(4) { width(&old) } else { 1 };
    let mut buffers = vec![scale.unwrap_or(&tensors[0].0), updates];
    for (grad, buffer, new) in &tensors {
        buffers.extend([grad, buffer.as_ref().unwrap_or(grad), new]);
    }
    let kernel =
        many("update_momentum", "MOMENTUM", known_element(updates.dtype), [width, PACKS], tensors.len());
    let grid = [elements.div_ceil(THREADS * width * PACKS) as u32, tensors.len() as u32, 1];
    launch(kernel, grid, arguments(&buffers, &words));
    tensors.into_iter().map(|(_, _, new)| tensor(new)).collect()
}

fn orthogonal(
    inputs: Vec<OrthogonalInput<Cuda>>,
    [rows, columns]: [usize; 2],
    start: usize,
    updates: &Buffer,
    bf16: bool,
) -> Vec<Updated<Cuda, 2>> {
    let elements = rows * columns;
    let ratio = OrthogonalInput::<Cuda>::ratio([rows, columns]);
    let mut words = vec![elements as u64, start as u64, float_word(ratio as f32), u64::from(bf16)];
    let tensors: Vec<(Buffer, Buffer, Option<Buffer>)> = inputs
        .into_iter()
        .map(|input| {
            assert_eq!(input.value.dims(), [rows, columns], "matrices of the updates' shape");
            let copy = wanted(input.copy);
            let rate = pair(input.lr, 1.0 - input.lr * input.weight_decay);
            words.extend([rate, flags(false, input.bf16, copy)]);
            let value = dense(input.value);
            let new = empty(&value, [rows, columns], DType::F32);
            let copy = copy.then(|| empty(&value, [rows, columns], DType::BF16));
            (value, new, copy)
        })
        .collect();
    let old: Vec<&Buffer> = tensors.iter().map(|(value, ..)| value).chain([updates]).collect();
    let width = if elements.is_multiple_of(4) { width(&old) } else { 1 };
    let mut buffers = vec![updates];
    for (value, new, copy) in &tensors {
        buffers.extend([value, new, copy.as_ref().unwrap_or(new)]);
    }
    let kernel =
        many("update_orthogonal", "ORTHOGONAL", known_element(updates.dtype), [width, PACKS], tensors.len());
    let grid = [elements.div_ceil(THREADS * width * PACKS) as u32, tensors.len() as u32, 1];
    launch(kernel, grid, arguments(&buffers, &words));
    let output = |(_, value, copy): (_, Buffer, Option<Buffer>)| Updated {
        value: tensor(value),
        copy: copy.map(tensor),
    };
    tensors.into_iter().map(output).collect()
}

fn blend(pairs: Vec<[Tensor<Cuda, 1>; 2]>, [p, q]: [f64; 2]) -> Vec<Tensor<Cuda, 1>> {
    let pairs: Vec<[Buffer; 2]> = pairs.into_iter().map(|pair| pair.map(dense)).collect();
    let width = width(&pairs.iter().flatten().collect::<Vec<_>>());
    let new: Vec<Buffer> = pairs.iter().map(|[a, _]| empty(a, [a.meta.num_elements()], DType::F32)).collect();
    let mut words = vec![pair(p, q)];
    let mut first = 0;
    for y in &new {
        let elements = y.meta.num_elements();
        words.extend([elements as u64, first as u64]);
        first += elements.div_ceil(THREADS * width * PACKS);
    }
    let buffers: Vec<&Buffer> = pairs.iter().zip(&new).flat_map(|([a, b], y)| [a, b, y]).collect();
    let kernel = many("update_blend", "BLEND", None, [width, PACKS], new.len());
    launch(kernel, [first as u32, 1, 1], arguments(&buffers, &words));
    new.into_iter().map(tensor).collect()
}

/// A kernel over `count` tensors, `width` elements a pack, so many packs a thread (none said where it is 0).
fn many(
    entry: &'static str,
    part: &str,
    element: Option<&str>,
    [width, packs]: [usize; 2],
    count: usize,
) -> CudaKernel {
    let mut constants = vec![
        ("PART", part.to_string()),
        ("WIDTH", width.to_string()),
        ("COUNT", count.to_string()),
        ("TENSORS", (0..count).map(|tensor| format!("EACH({tensor})")).collect()),
    ];
    constants.extend((packs > 0).then(|| ("PACKS", packs.to_string())));
    constants.extend(element.map(|element| ("ELEMENT", element.to_string())));
    CudaKernel { source: &UPDATE, entry, constants, block: THREADS as u32, shared_bytes: 0 }
}

fn arguments<'a>(buffers: &'a [&'a Buffer], scalars: &'a [u64]) -> Arguments<'a> {
    Arguments { buffers, scalars, ..Default::default() }
}

/// As few lists of at most `most` as hold all, of like length.
fn chunks<T>(all: Vec<T>, most: usize) -> impl Iterator<Item = Vec<T>> {
    let lists = all.len().div_ceil(most).max(1);
    let length = all.len().div_ceil(lists);
    let mut left = all.into_iter();
    std::iter::from_fn(move || Some(left.by_ref().take(length).collect::<Vec<T>>()).filter(|l| !l.is_empty()))
}

/// The place of a state, for what replaces it, where nobody else holds it: each thread reads its elements before it
/// writes them.
fn replacing(state: &Buffer) -> Option<Buffer> {
    state.can_mut().then(|| state.clone())
}

/// Whether the kernels take a tensor.
fn is_float<const D: usize>(x: &Tensor<Cuda, D>) -> bool {
    x.dtype() == DType::F32 && x.shape().num_elements() > 0
}

/// Whether the kernel makes the copy that is asked for.
fn wanted(copy: Option<DType>) -> bool {
    copy == Some(DType::BF16)
}

fn flags(fresh: bool, bf16: bool, copy: bool) -> u64 {
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    flag(fresh, FRESH) | flag(bf16, BF16) | flag(copy, COPY)
}

/// Two floats in a word, the first in the lower half.
fn pair(first: f64, second: f64) -> u64 {
    float_word(first as f32) | float_word(second as f32) << 32
}

/// Elements of one load: 4 where every tensor starts at a multiple of their size. What is freshly made does.
fn width(tensors: &[&Buffer]) -> usize {
    if tensors.iter().all(|tensor| is_aligned(tensor)) { 4 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_all_in_order_and_differ_little() {
        for (count, most) in [(0, 4), (1, 4), (4, 4), (5, 4), (21, 24), (25, 24), (97, 48)] {
            let lists: Vec<Vec<usize>> = chunks((0..count).collect(), most).collect();
            assert_eq!(lists.concat(), (0..count).collect::<Vec<_>>());
            assert_eq!(lists.len(), count.div_ceil(most));
            assert!(lists.iter().all(|list| (1..=most).contains(&list.len())), "{count}: {lists:?}");
        }
    }

    #[test]
    fn the_parameters_of_a_launch_fit() {
        // Buffers, a pointer each, and words of the scalars: of all tensors together, and of each.
        for (tensors, [buffers, words], [own_buffers, own_words]) in [
            (ADAM_TENSORS, [1, 1], [8, 7]),
            (MATRICES, [2, 5], [3, 1]),
            (MATRICES, [1, 4], [3, 2]),
            (SQUARES_TENSORS, [1, 1], [1, 2]),
            (PAIRS, [0, 1], [3, 2]),
        ] {
            let buffers = buffers + tensors * own_buffers;
            assert!(buffers <= 1024, "{buffers} buffers of {tensors} tensors");
            assert!(8 * (buffers + words + tensors * own_words) <= 32_764, "{tensors} of {own_words}");
        }
    }

    #[test]
    fn the_compile_check_tries_each_kernel_with_and_without_packs() {
        let sorted = |words: Vec<String>| {
            let mut words = words;
            words.sort();
            words
        };
        let variants: Vec<Vec<String>> =
            UPDATE.variants().map(|line| sorted(line.split(' ').map(String::from).collect())).collect();
        for (entry, part, element, sizes, count) in [
            ("update_adam", "ADAM", None, [4, ADAM_PACKS], 3),
            ("update_adam", "ADAM", None, [1, ADAM_PACKS], 1),
            ("update_momentum", "MOMENTUM", known_element(DType::BF16), [4, PACKS], 2),
            ("update_momentum", "MOMENTUM", known_element(DType::F32), [1, PACKS], 1),
            ("update_orthogonal", "ORTHOGONAL", known_element(DType::BF16), [4, PACKS], 2),
            ("update_orthogonal", "ORTHOGONAL", known_element(DType::F32), [1, PACKS], 1),
            ("update_squares", "SQUARES", None, [4, 0], 2),
            ("update_squares", "SQUARES", None, [1, 0], 1),
            ("update_blend", "BLEND", None, [4, PACKS], 2),
            ("update_blend", "BLEND", None, [1, PACKS], 1),
        ] {
            let kernel = many(entry, part, element, sizes, count);
            let form =
                sorted(kernel.constants.iter().map(|(name, value)| format!("-D{name}={value}")).collect());
            assert!(variants.contains(&form), "{form:?} is not among {variants:?}");
            assert!(UPDATE.text().contains(&format!("    {entry}(")), "{entry}");
        }
    }

    #[test]
    fn floats_lie_in_the_halves_of_a_word() {
        assert_eq!(pair(1.0, -2.0), 0xc000_0000_3f80_0000);
        assert_eq!(flags(true, false, true), FRESH | COPY);
    }
}
