//! Devices: their listing and choice, the precision of their products, their launchers, and running out of memory.

mod common;

use burn::tensor::{DType, Tensor, TensorData};
use common::{Random, affordable, epsilon, round, targets, worst};
use fairway::backend::launch_cuda::{Arguments, CudaKernel, TensorMap, TensorMapSwizzle, float_word, launch};
use fairway::backend::source::Source;
use fairway::backend::tensor::{dense, empty, tensor};
use fairway::backend::{
    DeviceChoice, Job, Precision, Target, cuda::Cuda, devices, guard, is_out_of_memory, memory_use, resolve,
    run,
};
use fairway::ops::Plain;
use fairway::{Error, Result};
use std::sync::{PoisonError, RwLock};

#[test]
fn a_device_is_parsed_and_printed() {
    for text in ["auto", "cpu", "wgpu", "wgpu:0", "cuda", "cuda:7"] {
        assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
    }
    assert_eq!("wgpu:2".parse(), Ok(DeviceChoice::Wgpu(Some(2))));
    for text in ["", "gpu", "CPU", "cpu:0", "auto:1", "cuda:", "cuda:-1", "cuda:70000", "cuda:0:1", "cuda:x"]
    {
        let error = text.parse::<DeviceChoice>().unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("--device") && error.to_string().contains("wgpu[:N]"), "{error}");
    }
    for (text, dtype) in [("f64", DType::F64), ("f32", DType::F32), ("bf16", DType::BF16)] {
        let precision: Precision = text.parse().unwrap();
        assert_eq!((precision.to_string().as_str(), precision.dtype()), (text, dtype));
    }
    assert!("fp16".parse::<Precision>().unwrap_err().to_string().contains("--precision"));
}

#[test]
fn every_backend_has_a_row_and_a_missing_one_a_reason() {
    let rows = devices();
    for row in &rows {
        println!(
            "{:<4} {:<40} {} {:?} {} {}",
            row.backend, row.name, row.precision, row.memory_bytes, row.usable, row.note
        );
        assert!(!row.name.is_empty() && !row.note.is_empty());
    }
    for backend in ["cpu", "wgpu", "cuda"] {
        assert!(rows.iter().any(|row| row.backend == backend), "no row for {backend}");
    }
    assert!(
        rows[0].backend == "cpu"
            && rows[0].usable
            && rows[0].memory_bytes.is_none_or(|bytes| bytes > 1 << 28)
    );
    assert_eq!(rows, devices(), "a second look gives the same");
}

#[test]
fn what_is_listed_is_what_is_chosen() {
    let rows = devices();
    let usable = |backend| rows.iter().filter(move |row| row.backend == backend && row.usable).count();
    let target = resolve(&DeviceChoice::Auto, None).unwrap();
    println!("auto: {} {} ({})", target.label, target.precision, target.why);
    if usable("cuda") > 0 {
        assert!(matches!(target.choice, DeviceChoice::Cuda(Some(_))) && target.precision == Precision::Bf16);
    } else {
        assert_eq!(target.precision, Precision::F32);
        let software =
            rows.iter().all(|row| row.backend != "wgpu" || !row.usable || row.note.starts_with("software"));
        assert_eq!(target.choice == DeviceChoice::Cpu, software);
        let error = resolve(&DeviceChoice::Cuda(None), None).unwrap_err();
        println!("{error}");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("--device") && error.to_string().contains("here: cpu"), "{error}");
        assert_eq!(error.to_string().lines().count(), 1);
    }
    if usable("wgpu") > 0 {
        assert!(matches!(
            resolve(&DeviceChoice::Wgpu(None), None).unwrap().choice,
            DeviceChoice::Wgpu(Some(_))
        ));
    }
    let error = resolve(&DeviceChoice::Wgpu(Some(999)), None).unwrap_err().to_string();
    assert!(error.starts_with("no device wgpu:999 (there are "), "{error}");
    assert_eq!(resolve(&DeviceChoice::Cpu, Some(Precision::F64)).unwrap().choice, DeviceChoice::Cpu);
}

/// Running out of memory is for one test alone.
static MEMORY: RwLock<()> = RwLock::new(());

/// Runs a job on a device in a guard, beside others.
fn beside_others<J: Job>(target: &Target, job: J) -> Result<J::Output> {
    let _shared = MEMORY.read().unwrap_or_else(PoisonError::into_inner);
    guard(target, || run(target, job))
}

fn values(count: usize, precision: Precision, seed: u64) -> Vec<f64> {
    let mut random = Random(seed);
    (0..count).map(|_| round(random.uniform(), precision)).collect()
}

fn upload<B: Plain>(values: &[f64], shape: [usize; 2], device: &B::Device, dtype: DType) -> Tensor<B, 2> {
    if dtype == DType::F64 {
        return Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, dtype));
    }
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    Tensor::<B, 2>::from_data(TensorData::new(values, shape), (device, DType::F32)).cast(dtype)
}

fn download<B: Plain>(tensor: Tensor<B, 2>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Products against f64: a factor rounded to fewer bits on the way (TF32 has 10) would show.
struct Products;

impl Job for Products {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let precision = target.precision;
        let dtype = precision.dtype();
        println!("\n{} {precision}", target.label);
        for [m, k, n] in [[1, 1, 1], [3, 5, 7], [64, 96, 128], [100, 1000, 37], [256, 512, 320], [1, 300, 64]]
        {
            if !affordable(m * k * n) {
                continue;
            }
            let (left, right) = (values(m * k, precision, 1), values(k * n, precision, 2));
            let mut exact = vec![0.0; m * n];
            for (row, out) in exact.chunks_mut(n).enumerate() {
                for (i, x) in left[row * k..][..k].iter().enumerate() {
                    out.iter_mut().zip(&right[i * n..][..n]).for_each(|(o, w)| *o += x * w);
                }
            }
            let a = upload::<B>(&left, [m, k], device, dtype);
            let b = upload::<B>(&right, [k, n], device, dtype);
            let turned = |x: &[f64], rows: usize, columns: usize| {
                let turned: Vec<f64> =
                    (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect();
                upload::<B>(&turned, [columns, rows], device, dtype).transpose()
            };
            let (a_turned, b_turned) = (turned(&left, m, k), turned(&right, k, n));
            let layouts = [
                ("nn", a.clone(), b.clone()),
                ("nt", a.clone(), b_turned.clone()),
                ("tn", a_turned, b.clone()),
            ];
            // The sum of k products of numbers below 1, each sum rounded to f32 (f64 for f64).
            let sums = if precision == Precision::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
            for (layout, a, b) in layouts {
                let outputs: &[DType] =
                    if precision == Precision::Bf16 { &[DType::F32, DType::BF16] } else { &[dtype] };
                for &out in outputs {
                    let c = B::matmul_as(a.clone(), b.clone(), out);
                    assert_eq!((c.dims(), c.dtype()), ([m, n], out));
                    let worst = worst(&download(c), &exact, n, |_| (k as f64).sqrt());
                    let last = if out == DType::BF16 { epsilon(Precision::Bf16) } else { 0.0 };
                    let tolerance = (2.0 * (k as f64).sqrt() + 4.0) * sums + last;
                    println!(
                        "{:>12} {layout} as {out:?}: error {:.2e}, {:.0}% of the tolerance",
                        format!("{m}x{k}x{n}"),
                        worst.error,
                        100.0 * worst.error / tolerance
                    );
                    assert!(worst.error <= tolerance, "{worst:?}");
                }
            }
        }
        Ok(())
    }
}

#[test]
fn products_keep_the_precision_of_their_inputs() {
    for target in targets() {
        beside_others(&target, Products).unwrap();
    }
}

/// Products of batches, as attention has them.
struct Batches;

impl Job for Batches {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let dtype = target.precision.dtype();
        let (batch, heads, m, k, n) = (2, 3, 17, 64, 33);
        let x = upload::<B>(
            &values(batch * heads * m * k, target.precision, 1),
            [batch * heads * m, k],
            device,
            dtype,
        );
        let w = upload::<B>(
            &values(batch * heads * n * k, target.precision, 2),
            [batch * heads * n, k],
            device,
            dtype,
        );
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        let (x4, w4) = (x.clone().reshape([batch, heads, m, k]), w.clone().reshape([batch, heads, n, k]));
        let all = download::<B>(B::matmul_as(x4, w4.transpose(), wide).reshape([batch * heads * m, n]));
        for i in 0..batch * heads {
            let one = B::matmul_as(
                x.clone().slice([i * m..(i + 1) * m, 0..k]),
                w.clone().slice([i * n..(i + 1) * n, 0..k]).transpose(),
                wide,
            );
            let worst = worst(&all[i * m * n..][..m * n], &download(one), n, |_| 8.0);
            assert!(worst.error < 8.0 * f64::from(f32::EPSILON), "{} {i}: {worst:?}", target.label);
        }
        Ok(())
    }
}

#[test]
fn products_of_batches_are_those_of_their_parts() {
    for target in targets() {
        beside_others(&target, Batches).unwrap();
    }
}

/// Asks for more than a device can have: 1 TiB, in pieces of 1 GiB.
struct TooMuch;

const PIECES: usize = 1 << 10;
const SIDE: usize = 1 << 14;

impl Job for TooMuch {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, _: &Target) -> Result<()> {
        let mut kept = Vec::new();
        for _ in 0..PIECES {
            kept.push(Tensor::<B, 2>::zeros([SIDE, SIDE], (device, DType::F32)));
            let last = kept.last().expect("just pushed").clone();
            let corner = download(last.slice([0..1, 0..1]));
            if corner != [0.0] {
                return Err(Error::failed("memory that was not to be had was used", "test", "an error"));
            }
        }
        Ok(())
    }
}

#[test]
fn running_out_of_memory_is_one_line_that_can_be_recognised() {
    for target in targets() {
        if target.choice == DeviceChoice::Cpu || target.precision == Precision::Bf16 {
            continue;
        }
        if matches!(target.choice, DeviceChoice::Wgpu(_)) && !target.label.contains("llvmpipe") {
            println!("skipped: {}: a desktop's memory is left alone", target.label);
            continue;
        }
        // Nor beside other processes on one device, and with a tool that calls a refused allocation an error.
        if !affordable(PIECES * SIDE * SIDE) {
            continue;
        }
        let _alone = MEMORY.write().unwrap_or_else(PoisonError::into_inner);
        let error = guard(&target, || run(&target, TooMuch)).unwrap_err();
        println!("{error}");
        assert!(is_out_of_memory(&error), "{error}");
        assert_eq!((error.exit_code(), error.to_string().lines().count()), (1, 1));
        assert!(error.to_string().contains(&target.label), "{error}");
        release(&target);
        // The device goes on.
        guard(&target, || run(&target, Small)).unwrap();
    }
}

fn release(target: &Target) {
    if let DeviceChoice::Cuda(Some(index)) = target.choice {
        use cubecl::Runtime;
        cubecl::cuda::CudaRuntime::client(&cubecl::cuda::CudaDevice::new(index)).memory_cleanup();
    }
}

struct Small;

impl Job for Small {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let kept = Tensor::<B, 2>::ones([512, 512], (device, DType::F32));
        assert_eq!(download(kept.clone().slice([0..1, 0..1])), [1.0]);
        let used = memory_use(target).expect("a device that tells its memory");
        println!("{}: {used:?}", target.label);
        assert!(used.in_use >= 1 << 20 && used.reserved >= used.in_use, "{used:?}");
        Ok(())
    }
}

#[test]
fn the_memory_in_use_is_told() {
    if !cfg!(target_os = "linux") {
        println!("skipped: cpu: the process's memory is told on Linux alone");
        return;
    }
    for target in targets() {
        beside_others(&target, Small).unwrap();
    }
}

/// Reverses blocks of bf16 through dynamic shared memory, and scales them.
static REVERSE: Source = Source::new(
    "reverse.cu",
    r#"
#include <cuda_bf16.h>
struct Scalars { unsigned long long count, scale; };
extern "C" __global__ void reverse(const __nv_bfloat16 *x, __nv_bfloat16 *y, const __grid_constant__ Scalars s) {
    extern __shared__ __align__(1024) unsigned char bytes[];
    __nv_bfloat16 *block = reinterpret_cast<__nv_bfloat16 *>(bytes);
    const size_t first = (size_t)blockIdx.x * s.count;
    for (int i = threadIdx.x; i < s.count; i += THREADS) block[i] = x[first + i];
    __syncthreads();
    const float scale = __uint_as_float((unsigned)s.scale);
    for (int i = threadIdx.x; i < s.count; i += THREADS)
        y[first + i] = __float2bfloat16(scale * __bfloat162float(block[s.count - 1 - i]));
}
"#,
);

/// Copies a tile of a bf16 matrix through the copy engine, one block a tile.
static TILES: Source = Source::new(
    "tiles.cu",
    r#"
#include <cuda_bf16.h>
struct alignas(64) Map { unsigned long long words[16]; };
struct Scalars { unsigned long long columns; };
extern "C" __global__ void tiles(const __grid_constant__ Map map, const __nv_bfloat16 *, __nv_bfloat16 *y,
                                 const __grid_constant__ Scalars s) {
    extern __shared__ __align__(1024) unsigned char bytes[];
    __shared__ __align__(8) unsigned long long barrier;
    const unsigned tile = (unsigned)__cvta_generic_to_shared(bytes);
    const unsigned bar = (unsigned)__cvta_generic_to_shared(&barrier);
    const int row = blockIdx.y * ROWS, column = blockIdx.x * COLUMNS;
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(bar));
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(ROWS * COLUMNS * 2) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                     :: "r"(tile), "l"(&map), "r"(bar), "r"(column), "r"(row) : "memory");
    }
    __syncthreads();
    unsigned done = 0;
    while (!done)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(bar) : "memory");
    // The 128-byte swizzle exchanges 16-byte pieces of a row of eight by the row's number.
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += blockDim.x) {
        const int r = i / COLUMNS, c = i % COLUMNS;
        const int piece = (c / 8) ^ (SWIZZLED ? r % 8 : 0);
        y[(size_t)(row + r) * s.columns + column + c] =
            reinterpret_cast<const __nv_bfloat16 *>(bytes)[r * COLUMNS + piece * 8 + c % 8];
    }
}
"#,
);

/// A numbered CUDA device, or a line that says why there is none.
fn cuda_target() -> Option<Target> {
    resolve(&DeviceChoice::Cuda(None), None).map_err(|error| println!("skipped: cuda: {error}")).ok()
}

/// On CUDA alone; the other backends never come to it.
struct Launchers;

impl Job for Launchers {
    type Output = ();

    fn run<B: Plain>(self, _: &B::Device, target: &Target) -> Result<()> {
        let DeviceChoice::Cuda(Some(index)) = target.choice else { return Ok(()) };
        let device = cubecl::cuda::CudaDevice::new(index);
        shared_memory_and_scalars(&device);
        tensor_maps(&device);
        Ok(())
    }
}

fn shared_memory_and_scalars(device: &cubecl::cuda::CudaDevice) {
    let (blocks, count) = (5, 48 * 1024);
    let x = values(blocks * count, Precision::Bf16, 1);
    let input = dense(upload::<Cuda>(&x, [blocks, count], device, DType::BF16));
    let output = empty(&input, [blocks, count], DType::BF16);
    let kernel = CudaKernel {
        source: &REVERSE,
        entry: "reverse",
        constants: vec![("THREADS", "512".into())],
        block: 512,
        shared_bytes: 2 * count,
    };
    let scalars = [count as u64, float_word(2.0)];
    let arguments = Arguments { buffers: &[&input, &output], scalars: &scalars, ..Default::default() };
    launch(kernel, [blocks as u32, 1, 1], arguments);
    let got = download::<Cuda>(tensor(output));
    let expected = x.chunks(count).flat_map(|block| block.iter().rev().map(|v| 2.0 * v));
    assert!(got.into_iter().eq(expected), "96 KB of shared memory and two scalars");
}

fn tensor_maps(device: &cubecl::cuda::CudaDevice) {
    let (rows, columns) = (256, 192);
    let x = values(rows * columns, Precision::Bf16, 3);
    let input = dense(upload::<Cuda>(&x, [rows, columns], device, DType::BF16));
    for (tile, swizzle) in [([64, 64], TensorMapSwizzle::B128), ([32, 96], TensorMapSwizzle::None)] {
        let output = empty(&input, [rows, columns], DType::BF16);
        let swizzled = u8::from(swizzle == TensorMapSwizzle::B128);
        let kernel = CudaKernel {
            source: &TILES,
            entry: "tiles",
            constants: vec![
                ("ROWS", tile[0].to_string()),
                ("COLUMNS", tile[1].to_string()),
                ("SWIZZLED", swizzled.to_string()),
            ],
            block: 128,
            shared_bytes: 2 * tile[0] * tile[1],
        };
        let map = TensorMap::dense(&input, &[rows, columns], &tile, swizzle);
        let arguments =
            Arguments { maps: &[map], buffers: &[&output], scalars: &[columns as u64], ..Default::default() };
        launch(kernel, [(columns / tile[1]) as u32, (rows / tile[0]) as u32, 1], arguments);
        assert!(download::<Cuda>(tensor(output)) == x, "tiles of {tile:?}, {swizzle:?}");
    }
}

#[test]
fn cuda_kernels_get_shared_memory_scalars_and_tensor_maps() {
    if let Some(target) = cuda_target() {
        beside_others(&target, Launchers).unwrap();
    }
}

static BROKEN: Source =
    Source::new("broken.cu", "extern \"C\" __global__ void broken(float *x) { x[0] = y; }\n");

struct Broken;

impl Job for Broken {
    type Output = ();

    fn run<B: Plain>(self, _: &B::Device, target: &Target) -> Result<()> {
        let DeviceChoice::Cuda(Some(index)) = target.choice else { return Ok(()) };
        let device = cubecl::cuda::CudaDevice::new(index);
        let x = dense(Tensor::<Cuda, 2>::zeros([1, 1], &device));
        let kernel = CudaKernel {
            source: &BROKEN,
            entry: "broken",
            constants: Vec::new(),
            block: 32,
            shared_bytes: 0,
        };
        launch(kernel, [1, 1, 1], Arguments { buffers: &[&x], ..Default::default() });
        Ok(())
    }
}

#[test]
fn a_cuda_kernel_that_does_not_compile_is_one_line() {
    let Some(target) = cuda_target() else { return };
    let error = beside_others(&target, Broken).unwrap_err().to_string();
    println!("{error}");
    assert!(error.contains("broken.cu(1)") && error.lines().count() == 1 && error.len() < 700, "{error}");
}

#[test]
fn a_failed_job_keeps_its_own_error() {
    struct Fails;
    impl Job for Fails {
        type Output = ();
        fn run<B: Plain>(self, _: &B::Device, _: &Target) -> Result<()> {
            Err(Error::input("its own", "place", "other"))
        }
    }
    for target in targets() {
        let error = beside_others(&target, Fails).unwrap_err();
        assert_eq!(error, Error::input("its own", "place", "other"));
    }
}
