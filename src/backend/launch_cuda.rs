//! Launching a CUDA C++ kernel from its source on burn-cuda's tensors, on Burn's own stream and memory pool.
//!
//! A kernel is an `extern "C" __global__` function of a file in `cuda/`, compiled at run time by NVRTC for the device
//! at hand (`sm_90a` on Hopper, no other options). Its parameters are, in this order:
//!
//! 1. one `const __grid_constant__ CUtensorMap` (any 128-byte, 64-byte-aligned struct) per tensor map,
//! 2. a pointer to each tensor map's buffer,
//! 3. a pointer to each buffer, in call order,
//! 4. the scalars, if there are any: one `const __grid_constant__` struct of 64-bit words.
//!
//! The launch constants become `#define`s in front of the source. Each set of their values is a kernel of its own,
//! compiled once, so they are for what takes few values; what varies from call to call is a scalar.

use super::source::Source;
use super::{profile, views};
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::{CudaCompiler, CudaRuntime};
use cubecl::ir::StorageType;
use cubecl::prelude::{
    CompiledKernel, CubePrimitive, KernelId, KernelMetadata, OobFill, TensorMapFormat, TensorMapInterleave,
    TiledArgs,
};
use cubecl::server::{KernelArguments, MetadataBindingInfo, TensorMapBinding, TensorMapMeta};
use cubecl::zspace::metadata::Metadata;
use cubecl::{CompilationError, Compiler, CubeCount, CubeDim, CubeTask, ExecutionMode};
use cubecl_cpp::shared::{Body, ComputeKernel, Elem, Flags, Item, SharedMemory};
use std::fmt::Write;

/// Tensors of a launch that a profile's row names.
const NAMED_TENSORS: usize = 8;

pub use cubecl::prelude::{TensorMapPrefetch, TensorMapSwizzle};

/// A kernel: an entry point of a source, with its launch constants.
#[derive(Debug, Clone)]
pub struct CudaKernel {
    /// The file.
    pub source: &'static Source,
    /// The `extern "C" __global__` function.
    pub entry: &'static str,
    /// What the source finds `#define`d.
    pub constants: Vec<(&'static str, String)>,
    /// Threads of a block, in x.
    pub block: u32,
    /// Bytes of dynamic shared memory (`extern __shared__`), beyond 48 KB too.
    pub shared_bytes: usize,
}

impl CudaKernel {
    /// The CUDA C++ text that is compiled.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.constants {
            let _ = writeln!(text, "#define {name} {value}");
        }
        let _ = writeln!(text, "#line 1 \"{}\"", self.source.name());
        text + &self.source.text_of(self.entry)
    }
}

/// What tells one compiled kernel from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Identity {
    file: &'static str,
    entry: &'static str,
    hash: u128,
    constants: Vec<(&'static str, String)>,
    shared_bytes: usize,
}

struct Task(CudaKernel);

impl Task {
    fn block(&self) -> CubeDim {
        CubeDim::new_1d(self.0.block)
    }
}

impl KernelMetadata for Task {
    fn name(&self) -> &'static str {
        self.0.entry
    }

    fn id(&self) -> KernelId {
        let CudaKernel { source, entry, constants, shared_bytes, .. } = &self.0;
        let identity = Identity {
            file: source.name(),
            entry,
            hash: source.hash(),
            constants: constants.clone(),
            shared_bytes: *shared_bytes,
        };
        KernelId::new::<Self>().cube_dim(self.block()).info(identity)
    }

    fn address_type(&self) -> StorageType {
        u32::as_type_native_unchecked().storage_type()
    }
}

impl CubeTask<CudaCompiler> for Task {
    fn compile(
        &self,
        _: &mut CudaCompiler,
        _: &<CudaCompiler as Compiler>::CompilationOptions,
        _: ExecutionMode,
        _: StorageType,
    ) -> Result<CompiledKernel<CudaCompiler>, CompilationError> {
        // cubecl reads the dynamic shared memory off its own representation of a kernel: one that holds nothing else.
        let word = Item::scalar(Elem::U32, true);
        let length = self.0.shared_bytes.div_ceil(4);
        let shared = SharedMemory::Array { index: 0, item: word, length, align: 1024, offset: 0 };
        let body = Body {
            instructions: Vec::new(),
            shared_memories: if length > 0 { vec![shared] } else { Vec::new() },
            pipelines: Vec::new(),
            barriers: Vec::new(),
            const_arrays: Vec::new(),
            local_arrays: Vec::new(),
            info_by_ptr: false,
            has_dynamic_meta: false,
            address_type: word,
        };
        let representation = ComputeKernel {
            tensor_maps: Vec::new(),
            buffers: Vec::new(),
            scalars: Vec::new(),
            info: Default::default(),
            meta_static_len: 0,
            body,
            cube_dim: self.block(),
            cluster_dim: None,
            extensions: Vec::new(),
            flags: Flags::default(),
            items: Default::default(),
            kernel_name: self.0.entry.to_string(),
        };
        Ok(CompiledKernel {
            entrypoint_name: self.0.entry.to_string(),
            debug_name: Some(self.0.source.name()),
            source: self.0.text(),
            repr: Some(representation),
            cube_dim: self.block(),
            debug_info: None,
        })
    }
}

/// A tensor that the copy engine (TMA) reads or writes in boxes.
#[derive(Debug)]
pub struct TensorMap<'a> {
    /// What holds the elements; the map begins at its first.
    pub tensor: &'a CubeTensor<CudaRuntime>,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// From one element to the next along each size, in elements: multiples of 16 bytes, but for the last, which is 1.
    pub strides: Vec<usize>,
    /// Sizes of a box, at most 256 each; a row of it takes at most the swizzle's span.
    pub tile: Vec<usize>,
    /// How a box lies in shared memory.
    pub swizzle: TensorMapSwizzle,
    /// What a read fetches to the L2 at once.
    pub prefetch: TensorMapPrefetch,
}

impl<'a> TensorMap<'a> {
    /// A map over a dense tensor: its elements, in order, in the given sizes.
    pub fn dense(
        tensor: &'a CubeTensor<CudaRuntime>,
        shape: &[usize],
        tile: &[usize],
        swizzle: TensorMapSwizzle,
    ) -> Self {
        let strides = (1..=shape.len()).map(|from| shape[from..].iter().product()).collect();
        Self {
            tensor,
            shape: shape.to_vec(),
            strides,
            tile: tile.to_vec(),
            swizzle,
            prefetch: TensorMapPrefetch::B256,
        }
    }

    fn binding(&self) -> TensorMapBinding {
        let elements: usize = self.shape.iter().product();
        assert_eq!(elements, self.tensor.meta.num_elements(), "a tensor map over all of its tensor");
        assert_eq!(self.shape.len(), self.tile.len(), "a box of the tensor's rank");
        let (last, outer) = self.strides.split_last().expect("a tensor map has sizes");
        let aligned = |stride: &usize| (stride * self.tensor.elem_size()).is_multiple_of(16);
        assert!(
            *last == 1 && outer.iter().all(aligned),
            "a tensor map's strides {:?}, expected multiples of 16 bytes",
            self.strides
        );
        let meta = TensorMapMeta {
            format: TensorMapFormat::Tiled(TiledArgs { tile_size: self.tile.clone().into() }),
            metadata: Metadata::new(self.shape.clone(), self.strides.clone()),
            elem_stride: vec![1usize; self.shape.len()].into(),
            interleave: TensorMapInterleave::None,
            swizzle: self.swizzle,
            prefetch: self.prefetch,
            oob_fill: OobFill::Zero,
            storage_ty: self.tensor.dtype.into(),
        };
        TensorMapBinding { binding: self.tensor.handle.clone().binding(), map: meta }
    }
}

/// What a kernel is called with; see the module for the order of its parameters.
#[derive(Debug, Default)]
pub struct Arguments<'a> {
    /// The tensor maps.
    pub maps: &'a [TensorMap<'a>],
    /// The buffers: dense tensors ([`super::tensor::dense`]).
    pub buffers: &'a [&'a CubeTensor<CudaRuntime>],
    /// The words of the scalars' struct: integers, or [`float_word`].
    pub scalars: &'a [u64],
    /// Arithmetic operations, where they and not the bytes bound the time: for profiles.
    pub operations: f64,
}

/// What the kernels call an element type, if they have it.
pub fn known_element(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::BF16 => Some("__nv_bfloat16"),
        DType::F32 => Some("float"),
        _ => None,
    }
}

/// [`known_element`] of a type that the kernels have.
pub fn element(dtype: DType) -> &'static str {
    known_element(dtype).unwrap_or_else(|| panic!("elements of {dtype:?}, expected bf16 or f32"))
}

/// The multiprocessors of the tensor's device.
pub fn multiprocessors(x: &CubeTensor<CudaRuntime>) -> usize {
    x.client.properties().hardware.num_streaming_multiprocessors.unwrap_or(132) as usize
}

/// A float as a word of the scalars' struct: its bits in the lower half.
pub fn float_word(value: f32) -> u64 {
    u64::from(value.to_bits())
}

/// Queues a kernel of `grid` blocks on the device (and stream) of its first tensor.
///
/// Errors of the launch and the kernel's compilation come up at the next synchronisation ([`super::guard()`] turns
/// them into one line).
pub fn launch(kernel: CudaKernel, grid: [u32; 3], arguments: Arguments) {
    debug_assert!(arguments.buffers.iter().all(|tensor| tensor.is_contiguous()), "{}", kernel.entry);
    launch_strided(kernel, grid, arguments);
}

/// Bytes of the tensors, one that is there twice counted once.
fn distinct_bytes<'a>(tensors: impl Iterator<Item = &'a CubeTensor<CudaRuntime>>) -> f64 {
    let mut seen = Vec::new();
    let mut bytes = 0;
    for tensor in tensors {
        let place = (views::memory(&tensor.handle), tensor.handle.offset_start);
        if !seen.contains(&place) {
            seen.push(place);
            bytes += tensor.meta.num_elements() * tensor.elem_size();
        }
    }
    bytes as f64
}

/// [`launch`] with buffers of any layout, for kernels that are told the strides.
pub fn launch_strided(kernel: CudaKernel, grid: [u32; 3], arguments: Arguments) {
    let Arguments { maps, buffers, scalars, operations } = arguments;
    let tensors = || maps.iter().map(|map| map.tensor).chain(buffers.iter().copied());
    let Some(first) = tensors().next().filter(|_| !grid.contains(&0)) else { return };
    debug_assert!(tensors().all(|t| t.device == first.device), "{}", kernel.entry);
    let shape = |t: &CubeTensor<CudaRuntime>| format!("{:?}", t.meta.shape().iter().collect::<Vec<_>>());
    let shapes = || {
        let left_out = tensors().count().saturating_sub(NAMED_TENSORS);
        let more = (left_out > 0).then(|| format!("and {left_out} more"));
        tensors().take(NAMED_TENSORS).map(shape).chain(more).collect::<Vec<_>>().join(" ")
    };
    profile::note(kernel.entry, shapes, || distinct_bytes(tensors()), operations);
    // With nothing "dynamic" after them, all words arrive as one struct by value.
    let words = MetadataBindingInfo::new(scalars.to_vec(), scalars.len());
    let bindings = KernelArguments::new()
        .with_tensor_maps(maps.iter().map(TensorMap::binding).collect())
        .with_buffers(buffers.iter().map(|buffer| buffer.handle.clone().binding()).collect())
        .with_info(words);
    first.client.launch(Box::new(Task(kernel)), CubeCount::Static(grid[0], grid[1], grid[2]), bindings);
}

#[cfg(test)]
mod tests {
    use super::*;

    static A: Source = Source::new("a.cu", "body");
    static B: Source = Source::new("a.cu", "other body");

    fn kernel(source: &'static Source) -> CudaKernel {
        CudaKernel { source, entry: "f", constants: vec![("N", "1".into())], block: 64, shared_bytes: 0 }
    }

    #[test]
    fn the_text_has_the_constants_in_front_and_keeps_its_line_numbers() {
        assert_eq!(kernel(&A).text(), "#define N 1\n#line 1 \"a.cu\"\nbody\n");
    }

    #[test]
    fn a_kernel_is_told_apart_by_source_entry_constants_block_and_shared_memory() {
        let id = |change: &dyn Fn(&mut CudaKernel)| {
            let mut changed = kernel(&A);
            change(&mut changed);
            Task(changed).id()
        };
        let same = id(&|_| ());
        assert!(same == Task(kernel(&A)).id());
        assert!(same != id(&|k| k.source = &B));
        assert!(same != id(&|k| k.entry = "g"));
        assert!(same != id(&|k| k.constants[0].1 = "2".into()));
        assert!(same != id(&|k| k.block = 128));
        assert!(same != id(&|k| k.shared_bytes = 1024));
        assert_ne!(same.stable_hash(), id(&|k| k.source = &B).stable_hash());
    }

    #[test]
    fn the_dynamic_shared_memory_is_the_one_asked_for() {
        for bytes in [0, 4, 98_304] {
            let task = Task(CudaKernel { shared_bytes: bytes, ..kernel(&A) });
            let options = Default::default();
            let address = task.address_type();
            let compiled = task.compile(&mut Default::default(), &options, ExecutionMode::Checked, address);
            let compiled = compiled.unwrap();
            assert_eq!(compiled.repr.unwrap().shared_memory_size(), bytes);
            assert_eq!(compiled.entrypoint_name, "f");
        }
    }
}
