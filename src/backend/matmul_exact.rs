//! Matrix products without tensor cores, on both GPU backends: how their factors lie, and how `wgsl/matmul.wgsl` is
//! launched (`cuda/matmul_exact.cu`: [`super::cuda_matmul_exact`]). The factors are read by their strides: transposed
//! and expanded ones need no copy.

use super::launch_wgsl;
use super::source::Source;
use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::wgpu::WgpuRuntime;

/// `wgsl/matmul.wgsl`.
static WGSL: Source = Source::new("matmul.wgsl", include_str!("../../wgsl/matmul.wgsl"));

/// Rows and columns of a workgroup's tile.
const TILE: usize = 64;

/// The sizes of a product, and the strides of its factors in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) z: usize,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Along z, m and k.
    pub(super) a: [usize; 3],
    /// Along z, k and n.
    pub(super) b: [usize; 3],
}

impl Layout {
    /// The layout of `a[.., m, k] b[.., k, n]`, the outer sizes flattened to one; nothing where a factor's outer sizes
    /// have no common stride.
    fn of(a: (&[usize], &[usize]), b: (&[usize], &[usize]), c: &[usize]) -> Option<Self> {
        let outer = c.len() - 2;
        let factor = |(sizes, strides): (&[usize], &[usize])| {
            let z = outer_stride(&sizes[..outer], &strides[..outer], &c[..outer])?;
            Some([z, strides[outer], strides[outer + 1]])
        };
        Some(Self {
            z: c[..outer].iter().product(),
            m: c[outer],
            n: c[outer + 1],
            k: a.0[outer + 1],
            a: factor(a)?,
            b: factor(b)?,
        })
    }

    fn tiles(&self) -> usize {
        self.z * self.m.div_ceil(TILE) * self.n.div_ceil(TILE)
    }
}

/// The one stride of outer sizes taken as one, where they have it; 0 where a factor is the same for all of them.
fn outer_stride(sizes: &[usize], strides: &[usize], whole: &[usize]) -> Option<usize> {
    // A size of one may be spread over the whole.
    if sizes.iter().zip(strides).all(|(size, stride)| *size == 1 || *stride == 0) {
        return Some(0);
    }
    if sizes != whole {
        return None;
    }
    let mut inner: Option<(usize, usize)> = None;
    for (size, stride) in sizes.iter().zip(strides).rev().filter(|(size, _)| **size > 1) {
        match inner {
            Some((step, span)) if *stride == step * span => inner = Some((step, span * size)),
            Some(_) => return None,
            None => inner = Some((*stride, *size)),
        }
    }
    inner.map(|(step, _)| step)
}

fn layout<R: CubeRuntime>(a: &CubeTensor<R>, b: &CubeTensor<R>, c: &CubeTensor<R>) -> Option<Layout> {
    let lists = |x: &CubeTensor<R>| -> (Vec<usize>, Vec<usize>) {
        (x.meta.shape().iter().copied().collect(), x.meta.strides().iter().copied().collect())
    };
    let ((a, a_strides), (b, b_strides), (c, _)) = (lists(a), lists(b), lists(c));
    Layout::of((&a, &a_strides), (&b, &b_strides), &c)
}

/// The factors and their layout, copied where they must be.
pub(super) fn prepared<R: CubeRuntime>(
    a: &CubeTensor<R>,
    b: &CubeTensor<R>,
    c: &CubeTensor<R>,
) -> (CubeTensor<R>, CubeTensor<R>, Layout) {
    if let Some(layout) = layout(a, b, c) {
        return (a.clone(), b.clone(), layout);
    }
    let [a, b] = [a, b].map(|x| burn_cubecl::kernel::into_contiguous(x.clone()));
    let layout = layout(&a, &b, c).unwrap_or_else(|| {
        panic!("a product of {:?} and {:?} to {:?}", a.meta.shape(), b.meta.shape(), c.meta.shape())
    });
    (a, b, layout)
}

/// `c = a b` over the last two sizes in f32, into a dense `c`.
pub(super) fn wgpu(a: &CubeTensor<WgpuRuntime>, b: &CubeTensor<WgpuRuntime>, c: &CubeTensor<WgpuRuntime>) {
    assert!([a, b, c].iter().all(|x| x.dtype == DType::F32), "a product in f32");
    let (a, b, layout) = prepared(a, b, c);
    let Layout { z, m, n, k, a: of_a, b: of_b } = layout;
    let sizes = [m, n, k, z, of_a[0], of_a[1], of_a[2], of_b[0], of_b[1], of_b[2]];
    let scalars = sizes.map(|size| u32::try_from(size).expect("tensors of less than 2^32 elements"));
    let kernel = wgsl_variant(of_a[2] == 1, of_b[1] == 1);
    launch_wgsl::launch_strided(kernel, layout.tiles() as u64, &[&a, &b, c], &scalars);
}

/// The kernel for factors that neighbouring threads read along k, or along the other size.
pub(super) fn wgsl_variant(a_k_fast: bool, b_k_fast: bool) -> launch_wgsl::WgslKernel {
    let place = |k_fast: bool| {
        let text =
            if k_fast { "vec2<u32>(at / DEPTH, at % DEPTH)" } else { "vec2<u32>(at % TILE, at / TILE)" };
        text.to_string()
    };
    launch_wgsl::WgslKernel {
        source: &WGSL,
        entry: "matmul",
        workgroup: 256,
        constants: vec![("a_place", place(a_k_fast)), ("b_place", place(b_k_fast))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_taken_as_they_are() {
        let layout = Layout::of((&[3, 4], &[4, 1]), (&[4, 5], &[1, 4]), &[3, 5]).unwrap();
        assert_eq!(layout, Layout { z: 1, m: 3, n: 5, k: 4, a: [0, 4, 1], b: [0, 1, 4] });
        // A batch, of which one factor is the same throughout.
        let a: (&[usize], &[usize]) = (&[2, 6, 3, 4], &[72, 12, 4, 1]);
        let layout = Layout::of(a, (&[1, 1, 4, 5], &[20, 20, 5, 1]), &[2, 6, 3, 5]).unwrap();
        assert_eq!((layout.z, layout.a, layout.b), (12, [12, 4, 1], [0, 5, 1]));
        // Outer sizes that are swapped have no one stride.
        assert_eq!(Layout::of((&[2, 6, 3, 4], &[12, 24, 4, 1]), a, &[2, 6, 3, 4]), None);
        assert_eq!(outer_stride(&[2, 1, 3], &[30, 7, 10], &[2, 1, 3]), Some(10));
        assert_eq!(outer_stride(&[2, 3], &[30, 11], &[2, 3]), None);
    }
}
