//! Launching a WGSL kernel from its source on burn-wgpu's tensors.
//!
//! A kernel is an entry point of a file in `wgsl/`. Its storage bindings are `@group(0)`, numbered from 0 in call
//! order and all `read_write` (tensors share pooled buffers, and wgpu forbids mixing access modes on one buffer). The
//! scalars are one uniform struct of 4-byte words at the binding after them. An entry point uses every binding that
//! it is called with, and no other.
//!
//! Placeholders `{{ name }}` are replaced before compiling. Each set of their values is a kernel of its own, compiled
//! once, so they are for what takes few values (types, workgroup shapes); what varies from call to call is a scalar.

use super::source::Source;
use burn_cubecl::template::SourceTemplate;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::StorageType;
use cubecl::prelude::{CompiledKernel, CubePrimitive, KernelId, KernelMetadata};
use cubecl::server::{KernelArguments, MetadataBindingInfo};
use cubecl::wgpu::{AutoCompiler, WgpuRuntime};
use cubecl::{CompilationError, Compiler, CubeCount, CubeDim, CubeTask, ExecutionMode};

/// Workgroups along one dimension of a dispatch: the least that WebGPU allows, and what most devices allow.
const MAX_WORKGROUPS: u32 = 65_535;

/// A kernel: an entry point of a source, with its placeholders' values.
#[derive(Debug, Clone)]
pub struct WgslKernel {
    /// The file.
    pub source: &'static Source,
    /// The function marked `@compute`.
    pub entry: &'static str,
    /// Threads of a workgroup; also the placeholder `{{ workgroup }}`.
    pub workgroup: u32,
    /// The other placeholders' values.
    pub constants: Vec<(&'static str, String)>,
}

impl WgslKernel {
    /// The WGSL text that is compiled.
    pub fn text(&self) -> String {
        let template =
            SourceTemplate::new(self.source.text()).register("workgroup", self.workgroup.to_string());
        let constants = self.constants.iter();
        constants.fold(template, |t, (name, value)| t.register(*name, value.as_str())).complete()
    }
}

/// What tells one compiled kernel from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Identity {
    file: &'static str,
    entry: &'static str,
    hash: u128,
    constants: Vec<(&'static str, String)>,
}

struct Task(WgslKernel);

impl Task {
    fn block(&self) -> CubeDim {
        CubeDim::new_1d(self.0.workgroup)
    }
}

impl KernelMetadata for Task {
    fn name(&self) -> &'static str {
        self.0.entry
    }

    fn id(&self) -> KernelId {
        let WgslKernel { source, entry, constants, .. } = &self.0;
        let identity =
            Identity { file: source.name(), entry, hash: source.hash(), constants: constants.clone() };
        KernelId::new::<Self>().cube_dim(self.block()).info(identity)
    }

    fn address_type(&self) -> StorageType {
        u32::as_type_native_unchecked().storage_type()
    }
}

impl CubeTask<AutoCompiler> for Task {
    fn compile(
        &self,
        _: &mut AutoCompiler,
        _: &<AutoCompiler as Compiler>::CompilationOptions,
        _: ExecutionMode,
        _: StorageType,
    ) -> Result<CompiledKernel<AutoCompiler>, CompilationError> {
        Ok(CompiledKernel {
            entrypoint_name: self.0.entry.to_string(),
            debug_name: Some(self.0.source.name()),
            source: self.0.text(),
            repr: None,
            cube_dim: self.block(),
            debug_info: None,
        })
    }
}

/// Queues a kernel on the device (and stream) of its first buffer.
///
/// `workgroups` are laid out over x, then y: a kernel computes its number as `id.y * count.x + id.x` and ignores those
/// past the end. The buffers are dense tensors on one device ([`super::tensor::dense`]). Errors of the launch and the
/// kernel's compilation come up at the next synchronisation ([`super::guard()`] turns them into one line).
pub fn launch(kernel: WgslKernel, workgroups: u64, buffers: &[&CubeTensor<WgpuRuntime>], scalars: &[u32]) {
    debug_assert!(buffers.iter().all(|b| b.is_contiguous()), "{}", kernel.entry);
    launch_strided(kernel, workgroups, buffers, scalars);
}

/// [`launch`] with buffers of any layout, for kernels that are told the strides.
pub fn launch_strided(
    kernel: WgslKernel,
    workgroups: u64,
    buffers: &[&CubeTensor<WgpuRuntime>],
    scalars: &[u32],
) {
    let Some(first) = buffers.first().filter(|_| workgroups > 0) else { return };
    debug_assert!(buffers.iter().all(|b| b.device == first.device), "{}", kernel.entry);
    let bindings = buffers.iter().map(|buffer| buffer.handle.clone().binding()).collect();
    // Uniform structs are sized in 16 bytes.
    let mut words = scalars.to_vec();
    words.resize(words.len().next_multiple_of(4), 0);
    let words = words.chunks_exact(2).map(|pair| u64::from(pair[1]) << 32 | u64::from(pair[0]));
    let arguments =
        KernelArguments::new().with_buffers(bindings).with_info(MetadataBindingInfo::custom(words.collect()));
    let [x, y] = grid(workgroups);
    first.client.launch(Box::new(Task(kernel)), CubeCount::Static(x, y, 1), arguments);
}

/// The smallest grid of at least `workgroups` whose sides are allowed everywhere.
fn grid(workgroups: u64) -> [u32; 2] {
    let max = u64::from(MAX_WORKGROUPS);
    let y = workgroups.div_ceil(max);
    assert!(y <= max, "{workgroups} workgroups are more than a dispatch can have");
    let x = workgroups.div_ceil(y.max(1));
    [x as u32, y as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_covers_its_workgroups_within_the_limit() {
        assert_eq!(grid(1), [1, 1]);
        assert_eq!(grid(65_535), [65_535, 1]);
        assert_eq!(grid(65_536), [32_768, 2]);
        for workgroups in [65_537, 1 << 20, 4_294_836_225] {
            let [x, y] = grid(workgroups).map(u64::from);
            assert!(x <= 65_535 && y <= 65_535 && x * y >= workgroups && (x * y - workgroups) < y);
        }
    }

    #[test]
    fn a_kernel_is_told_apart_by_entry_constants_and_source() {
        static A: Source = Source::new("a.wgsl", "{{ n }} {{ workgroup }}");
        static B: Source = Source::new("a.wgsl", "{{ n }} {{ workgroup }} ");
        let kernel = |source, entry, n: u32| WgslKernel {
            source,
            entry,
            workgroup: 64,
            constants: vec![("n", n.to_string())],
        };
        let id = |kernel| Task(kernel).id();
        let a = id(kernel(&A, "f", 1));
        assert!(a == id(kernel(&A, "f", 1)));
        assert!(a != id(kernel(&A, "g", 1)));
        assert!(a != id(kernel(&A, "f", 2)));
        assert!(a != id(kernel(&B, "f", 1)));
        assert_eq!(kernel(&A, "f", 7).text().trim_end(), "7 64");
    }
}
