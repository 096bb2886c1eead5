//! The exports of the PRs and ours: forms, payload sizes of the full-size models, and what is restored.

use fairway::host::{HostTensor, HostType};
use fairway::quant::exports::PR1607;
use fairway::quant::ternary::{Packing, Ternary};
use fairway::quant::{CONTROL_PATTERNS, Context, Export, QuantTensor, Stats, Storage, quantize_by};
use half::bf16;
use std::collections::HashSet;

fn context(controls: &str, bit_linear: &[&str]) -> Context {
    Context {
        controls: CONTROL_PATTERNS.into_iter().chain(controls.split(',')).map(String::from).collect(),
        bit_linear: bit_linear.iter().map(|name| name.to_string()).collect::<HashSet<_>>(),
        ..Context::default()
    }
}

fn zeros(name: impl Into<String>, shape: &[usize], dtype: HostType) -> HostTensor {
    let bytes = vec![0; shape.iter().product::<usize>() * dtype.size()];
    HostTensor { name: name.into(), shape: shape.to_vec(), dtype, bytes }
}

type Shape<'a> = (&'a str, &'a [usize]);

const BLOCK_1607: [Shape; 3] =
    [("mlp.fc.weight", &[1536, 512]), ("mlp.proj.weight", &[512, 1536]), ("resid_mix", &[2, 512])];

/// PR #1607's full-size model, untrained.
fn mamba3_hinge() -> Vec<HostTensor> {
    let mamba: [Shape; 10] = [
        ("mamba3.mamba3.in_proj.weight", &[2240, 512]),
        ("mamba3.mamba3.out_proj.weight", &[512, 1024]),
        ("mamba3.mamba3.dt_bias", &[16]),
        ("mamba3.mamba3.B_bias", &[16, 1, 64]),
        ("mamba3.mamba3.C_bias", &[16, 1, 64]),
        ("mamba3.mamba3.B_norm.weight", &[64]),
        ("mamba3.mamba3.C_norm.weight", &[64]),
        ("mamba3.mamba3.D", &[16]),
        ("m3_scale", &[512]),
        ("mlp_scale", &[512]),
    ];
    let attention: [Shape; 7] = [
        ("attn.c_q.weight", &[512, 512]),
        ("attn.c_k.weight", &[256, 512]),
        ("attn.c_v.weight", &[256, 512]),
        ("attn.proj.weight", &[512, 512]),
        ("attn.q_gain", &[8]),
        ("attn_scale", &[512]),
        ("mlp_scale", &[512]),
    ];
    let mut tensors = vec![
        zeros("tok_emb.weight", &[1024, 512], HostType::BF16),
        zeros("bigram_hash.table.weight", &[4096, 128], HostType::BF16),
        zeros("bigram_hash.proj.weight", &[512, 128], HostType::F32),
        zeros("smeargate.gate", &[512], HostType::F32),
        zeros("skip_weights", &[1, 4, 512], HostType::F32),
    ];
    for block in 0..8 {
        let own: &[Shape] = if block == 4 { &attention } else { &mamba };
        let shapes = own.iter().chain(&BLOCK_1607);
        tensors.extend(
            shapes.map(|(name, shape)| zeros(format!("blocks.{block}.{name}"), shape, HostType::F32)),
        );
    }
    tensors
}

#[test]
fn the_untrained_mamba3_hinge_has_the_known_payload() {
    let tensors = mamba3_hinge();
    let context =
        context("m3_scale,smeargate,dt_bias,B_bias,C_bias,.D,A_log,ve_layer_scales,ve_shared.scale", &[]);
    let quantized = quantize_by(PR1607, &tensors, &context).unwrap();
    let stats = Stats::of(&quantized);
    assert_eq!((stats.param_count, stats.payload_bytes), (26_216_040, 26_989_856));
    let storage = |name: &str| quantized.iter().find(|q| q.name == name).map(|q| q.storage);
    assert_eq!(storage("tok_emb.weight"), Some(Storage::F16));
    assert_eq!(storage("bigram_hash.table.weight"), Some(Storage::IntRow(6)));
    assert_eq!(storage("bigram_hash.proj.weight"), Some(Storage::F16));
    // Other bits for the MLPs, and no float16 embedding.
    let export = Export::Pr1607 { bits: 6, mlp_bits: 5, search_clip: false, fp16_embed: false };
    let quantized = quantize_by(export, &tensors, &context).unwrap();
    let storage = |name: &str| quantized.iter().find(|q| q.name == name).map(|q| q.storage);
    assert_eq!(storage("tok_emb.weight"), Some(Storage::IntRow(6)));
    assert_eq!(storage("blocks.0.mlp.fc.weight"), Some(Storage::IntRow(5)));
}

#[test]
fn the_untrained_ternary_loop_has_the_known_payload() {
    let linears: [Shape; 9] = [
        ("attn.c_q.weight", &[512, 512]),
        ("attn.c_k.weight", &[256, 512]),
        ("attn.c_v.weight", &[256, 512]),
        ("attn.proj.weight", &[512, 512]),
        ("s4d.in_proj.weight", &[2192, 512]),
        ("s4d.out_proj.weight", &[512, 1024]),
        ("mlp.w_gate.weight", &[4096, 512]),
        ("mlp.w_up.weight", &[4096, 512]),
        ("mlp.w_down.weight", &[512, 4096]),
    ];
    let others: [Shape; 12] = [
        ("attn.q_gain", &[8]),
        ("s4d.conv1d.weight", &[1024, 1, 4]),
        ("s4d.conv1d.bias", &[1024]),
        ("s4d.A_log", &[16]),
        ("s4d.D_skip", &[1024]),
        ("s4d.dt_bias", &[16]),
        ("s4d._B_const", &[64]),
        ("s4d._C_const", &[64]),
        ("s4d_scale", &[512]),
        ("attn_scale", &[512]),
        ("mlp_scale", &[512]),
        ("resid_mix", &[2, 512]),
    ];
    let mut tensors = vec![zeros("tok_emb.weight", &[1024, 512], HostType::BF16)];
    let mut bit_linear = Vec::new();
    for block in 0..7 {
        for (name, shape) in linears {
            bit_linear.push(format!("blocks.{block}.{name}"));
            tensors.push(zeros(format!("blocks.{block}.{name}"), shape, HostType::BF16));
        }
        tensors.extend(
            others.map(|(name, shape)| zeros(format!("blocks.{block}.{name}"), shape, HostType::F32)),
        );
    }
    let names: Vec<&str> = bit_linear.iter().map(String::as_str).collect();
    let context = context("A_log,A_im,B_proj,C_proj,dt_log,D_skip,dt_bias,delta_bias,conv1d", &names);
    let quantized = quantize_by(Export::Pr1994, &tensors, &context).unwrap();
    let stats = Stats::of(&quantized);
    assert_eq!((stats.param_count, stats.payload_bytes), (61_657_752, 16_033_632));
    assert_eq!(stats.num_float_tensors, 1);
    // Five trits a byte: a fifth less of the matrices, each filled up to whole bytes.
    let dense = quantize_by(Export::OwnTernary(Packing::FiveTrits), &tensors, &context).unwrap();
    let of = |tensors: &[QuantTensor]| -> usize {
        tensors
            .iter()
            .filter(|q| matches!(q.storage, Storage::Ternary(_)))
            .map(QuantTensor::payload_bytes)
            .sum()
    };
    assert_eq!((of(&quantized), of(&dense)), (15_267_840, 12_214_300));
}

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 20_011) as f32 / 90_000.0 - 0.11).collect()
}

#[test]
fn bit_linear_weights_come_back_as_the_function_that_the_layer_computes() {
    let weights = ramp(24 * 17);
    let rounded: Vec<u8> = weights.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    let tensor = HostTensor { name: "w".into(), shape: vec![24, 17], dtype: HostType::BF16, bytes: rounded };
    let live = Ternary::bit_linear(&tensor.to_f32());
    for export in
        [Export::Pr1994, Export::OwnTernary(Packing::TwoBits), Export::OwnTernary(Packing::FiveTrits)]
    {
        let stored = quantize_by(export, std::slice::from_ref(&tensor), &context("", &["w"])).unwrap();
        let back = stored[0].dequantize().unwrap().to_f32();
        assert!(back.iter().all(|&v| bf16::from_f32(v).to_f32() == v), "{export:?}");
        let again = Ternary::bit_linear(&back);
        assert_eq!(again.codes, live.codes, "{export:?}");
        assert!((again.gamma / live.gamma - 1.0).abs() < 0.004, "{export:?}");
    }
    // Without its name among the BitLinear ones it is a small tensor.
    let stored = quantize_by(Export::Pr1994, std::slice::from_ref(&tensor), &context("", &[])).unwrap();
    assert_eq!(stored[0].storage, Storage::F16);
}

#[test]
fn our_exports_code_matrices_and_tables() {
    let n = 300 * 300;
    let tensors = [
        HostTensor::from_f32("blocks.0.mlp.fc.weight", &[300, 300], &ramp(n)),
        HostTensor::from_f32("tok_emb.weight", &[300, 300], &ramp(n)),
        HostTensor::from_f32("bigram.table", &[300, 300], &ramp(n)),
        HostTensor::from_f32("q_gain", &[2], &[1.5, 1.5]),
        HostTensor::from_f32("conv", &[30, 3, 1000], &ramp(n)),
        zeros("ids", &[3], HostType::I64),
    ];
    let error = |stored: &QuantTensor, live: &HostTensor| {
        let back = stored.dequantize().unwrap().to_f32();
        let squares = live.to_f32().iter().zip(&back).map(|(w, b)| f64::from(w - b).powi(2)).sum::<f64>();
        (squares / n as f64).sqrt()
    };
    for bits in 2..=8u8 {
        let stored = quantize_by(Export::Own { bits: bits.into() }, &tensors, &context("", &[])).unwrap();
        let matrix = if bits == 8 { Storage::Int8Row } else { Storage::IntRow(bits) };
        let expected =
            [matrix, Storage::Int8Row, Storage::Int8Row, Storage::F32, Storage::Int8Tensor, Storage::Raw];
        assert_eq!(stored.iter().map(|q| q.storage).collect::<Vec<_>>(), expected);
        assert_eq!(stored[0].storage.label(), format!("int{bits}/row"));
        // Uniform in -0.11 to 0.11: steps of 0.22 / levels, and an error of a step over the root of 12.
        let step = 0.22 / (f64::from(1u32 << bits) - 2.0);
        let found = error(&stored[0], &tensors[0]);
        assert!(
            found < 1.1 * step / 12f64.sqrt() && found > 0.6 * step / 12f64.sqrt(),
            "{bits}: {found} {step}"
        );
        assert!(error(&stored[1], &tensors[1]) < 0.0003 && error(&stored[4], &tensors[4]) < 0.0003);
    }
    let stored = quantize_by(Export::OwnTernary(Packing::TwoBits), &tensors, &context("", &[])).unwrap();
    assert_eq!(stored[0].storage, Storage::Ternary(Packing::TwoBits));
    assert_eq!(stored[0].payload_bytes(), n / 4);
    assert!(error(&stored[0], &tensors[0]) < 0.037, "a third of the range over the root of 12 is the least");
    for bits in [0, 1, 9, 33] {
        assert_eq!(
            quantize_by(Export::Own { bits }, &tensors, &context("", &[])).unwrap_err().exit_code(),
            2
        );
    }
}

#[test]
fn gptq_of_pr1607_is_coded_again_and_that_of_pr1382_is_not() {
    let (rows, n) = (256, 300);
    let weights: Vec<f32> = ramp(rows * n).iter().map(|w| w * 9.0).collect();
    let tensor = HostTensor::from_f32("mamba_blocks.0.in_proj.weight", &[rows, n], &weights);
    let mut hessian = vec![0.2; n * n];
    (0..n).for_each(|i| hessian[i * n + i] = 1.0 + (i % 7) as f64);
    let context = Context { hessians: [(tensor.name.clone(), hessian)].into(), ..context("", &[]) };
    let run = |export| quantize_by(export, std::slice::from_ref(&tensor), &context).unwrap().remove(0);
    let (first, second) = (run(Export::Pr1382), run(PR1607));
    // The second round rounds restored weights, which lie on a grid already: only rows that it clips elsewhere change.
    let once = first.dequantize().unwrap();
    let bare = Context { hessians: Default::default(), ..context.clone() };
    let again = quantize_by(PR1607, std::slice::from_ref(&once), &bare).unwrap().remove(0);
    assert_eq!(second.parts, again.parts);
    let plain = quantize_by(PR1607, std::slice::from_ref(&tensor), &bare).unwrap().remove(0);
    assert_ne!(second.parts, plain.parts);
}

#[test]
fn one_column_one_row_zeros_and_constants_are_coded() {
    let n = 70_000;
    let named = |name: &str, shape: &[usize], values: &[f32]| {
        HostTensor::from_f32(format!("blocks.0.mlp.{name}.weight"), shape, values)
    };
    let tensors = [
        named("column", &[n, 1], &ramp(n)),
        named("row", &[1, n], &ramp(n)),
        named("constant", &[700, 100], &vec![-0.25; n]),
        named("zeros", &[700, 100], &vec![0.0; n]),
    ];
    let context = Context { hessians: [(tensors[0].name.clone(), vec![3.0])].into(), ..context("", &[]) };
    let own = (2..=8).map(|bits| Export::Own { bits });
    let others = [
        Export::Challenge,
        PR1607,
        Export::Pr1382,
        Export::OwnTernary(Packing::TwoBits),
        Export::OwnTernary(Packing::FiveTrits),
    ];
    for export in own.chain(others) {
        let stored = quantize_by(export, &tensors, &context).unwrap();
        assert!(stored.iter().all(|tensor| tensor.storage.is_coded()), "{export:?}");
        let back: Vec<Vec<f32>> = stored.iter().map(|tensor| tensor.dequantize().unwrap().to_f32()).collect();
        assert!(back[2].iter().all(|&w| w == back[2][0] && w < 0.0), "{export:?}: {}", back[2][0]);
        assert!(back[3].iter().all(|&w| w == 0.0), "{export:?}");
        if export == (Export::Own { bits: 8 }) {
            for (live, back) in tensors.iter().zip(&back) {
                let worst = live.to_f32().iter().zip(back).map(|(w, b)| (w - b).abs()).fold(0.0, f32::max);
                assert!(worst < 0.001, "{}: {worst}", live.name);
            }
        }
    }
}

#[test]
fn stored_parts_that_no_quantiser_makes_are_refused() {
    let tensors = [
        HostTensor::from_f32("a", &[256, 300], &ramp(256 * 300)),
        HostTensor::from_f32("b", &[16, 5], &ramp(80)),
    ];
    let int6 = quantize_by(Export::Own { bits: 6 }, &tensors, &context("", &[])).unwrap().remove(0);
    let ternary = quantize_by(Export::Pr1994, &tensors, &context("", &["b"])).unwrap().remove(1);
    assert!(int6.dequantize().is_ok() && ternary.dequantize().is_ok());
    let spoil = |good: &QuantTensor, change: &dyn Fn(&mut QuantTensor)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad.dequantize().unwrap_err()
    };
    let errors = [
        spoil(&int6, &|q| q.parts[0].bytes[5] = 32),
        spoil(&int6, &|q| q.parts[0].bytes[5] = (-33i8).cast_unsigned()),
        spoil(&int6, &|q| q.storage = Storage::IntRow(5)),
        spoil(&int6, &|q| q.storage = Storage::IntRow(8)),
        spoil(&int6, &|q| q.storage = Storage::IntRow(1)),
        spoil(&int6, &|q| q.storage = Storage::Ternary(Packing::TwoBits)),
        spoil(&ternary, &|q| q.parts[0].bytes[0] = 0xff),
        spoil(&ternary, &|q| q.storage = Storage::Ternary(Packing::FiveTrits)),
        spoil(&ternary, &|q| q.parts[1] = HostTensor::from_f64("scales", &[], &[f64::NAN])),
        spoil(&ternary, &|q| q.shape = vec![16, 6]),
        spoil(&ternary, &|q| q.shape = vec![usize::MAX, 2]),
    ];
    for error in errors {
        assert_eq!(error.exit_code(), 2, "{error}");
    }
    // -32 is a code of 6 bits: other systems clamp to it.
    let mut least = int6.clone();
    least.parts[0].bytes[5] = (-32i8).cast_unsigned();
    assert!(least.dequantize().is_ok());
}
