//! The int8 quantiser against the challenge's own exporter (fixture `chal_int8_roundtrip`) and its known sizes.

use fairway::host::{HostTensor, HostType};
use fairway::quant::quantile::CLIP_QUANTILE;
use fairway::quant::{CONTROL_PATTERNS, QuantTensor, Scheme, Stats, Storage, quantize};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::path::{Path, PathBuf};

fn controls() -> Vec<String> {
    CONTROL_PATTERNS.map(String::from).to_vec()
}

fn int8(tensors: &[HostTensor]) -> Vec<QuantTensor> {
    quantize(Scheme::Int8, tensors, &controls()).unwrap()
}

fn tensor(name: &str, shape: &[usize], dtype: HostType, bytes: Vec<u8>) -> HostTensor {
    HostTensor { name: name.into(), shape: shape.to_vec(), dtype, bytes }
}

fn fixture(name: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = std::env::var_os("FAIRWAY_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
    [root.join("tests/fixtures"), shared.join("fixtures")]
        .into_iter()
        .map(|dir| dir.join(name))
        .find(|path| path.exists())
}

#[test]
fn codes_scales_and_sizes_equal_the_challenges() {
    let Some(path) = fixture("chal_int8_roundtrip.safetensors") else {
        println!(
            "skipped: chal_int8_roundtrip.safetensors is neither in tests/fixtures nor in shared/fixtures"
        );
        return;
    };
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let load = |name: &str| {
        let view = file.tensor(name).unwrap();
        let dtype = match view.dtype() {
            Dtype::F32 => HostType::F32,
            Dtype::F16 => HostType::F16,
            Dtype::I8 => HostType::I8,
            other => panic!("{name} is {other:?}"),
        };
        tensor(name, view.shape(), dtype, view.data().to_vec())
    };
    let names = ["a.weight", "b.weight", "c.bias", "x.q_gain"];
    let inputs = names.map(|name| HostTensor { name: name.into(), ..load(&format!("in.{name}")) });
    let quantized = int8(&inputs);

    let stored = quantized.iter().map(|q| (q.name.as_str(), q.storage)).collect::<Vec<_>>();
    let storages = [Storage::Int8Row, Storage::F16, Storage::Int8Tensor, Storage::F32];
    assert_eq!(stored, names.into_iter().zip(storages).collect::<Vec<_>>());
    for q in &quantized {
        let expected: Vec<HostTensor> = match q.storage {
            Storage::Int8Row | Storage::Int8Tensor => {
                vec![load(&format!("quantized.{}", q.name)), load(&format!("scales.{}", q.name))]
            }
            _ => vec![load(&format!("passthrough.{}", q.name))],
        };
        assert_eq!(q.parts.len(), expected.len());
        for (part, expected) in q.parts.iter().zip(&expected) {
            assert_eq!(
                (part.dtype, &part.shape),
                (expected.dtype, &expected.shape),
                "{} {}",
                q.name,
                part.name
            );
            let differ = part.bytes.iter().zip(&expected.bytes).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{} {}", q.name, part.name);
        }
        let back = load(&format!("back.{}", q.name));
        assert_eq!(q.dequantize().unwrap().bytes, back.bytes, "{}", q.name);
    }
    let expected = Stats {
        param_count: 148_068,
        num_tensors: 4,
        num_float_tensors: 2,
        num_nonfloat_tensors: 0,
        baseline_tensor_bytes: 592_272,
        payload_bytes: 148_748,
    };
    assert_eq!(Stats::of(&quantized), expected);
}

#[test]
fn the_untrained_baseline_has_the_known_payload() {
    let zeros = |name: String, shape: &[usize], dtype: HostType| {
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.size()];
        tensor(&name, shape, dtype, bytes)
    };
    let block: [(&str, &[usize]); 10] = [
        ("attn.c_q.weight", &[512, 512]),
        ("attn.c_k.weight", &[256, 512]),
        ("attn.c_v.weight", &[256, 512]),
        ("attn.proj.weight", &[512, 512]),
        ("attn.q_gain", &[8]),
        ("mlp.fc.weight", &[1024, 512]),
        ("mlp.proj.weight", &[512, 1024]),
        ("attn_scale", &[512]),
        ("mlp_scale", &[512]),
        ("resid_mix", &[2, 512]),
    ];
    let mut tensors = vec![
        zeros("tok_emb.weight".into(), &[1024, 512], HostType::BF16),
        zeros("skip_weights".into(), &[4, 512], HostType::F32),
    ];
    for layer in 0..9 {
        tensors
            .extend(block.map(|(name, shape)| zeros(format!("blocks.{layer}.{name}"), shape, HostType::F32)));
    }
    let stats = Stats::of(&int8(&tensors));
    assert_eq!(stats.param_count, 17_059_912);
    assert_eq!(stats.payload_bytes, 17_178_912);
    assert_eq!(stats.num_float_tensors, 55);
}

#[test]
fn small_tensors_pass_through_by_name_and_type() {
    let tensors = [
        HostTensor::from_f32("blocks.0.attn_scale", &[3], &[0.1, 0.2, 0.3]),
        HostTensor::from_f32("other", &[2], &[0.1, -2.0]),
        tensor("half.weight", &[1], HostType::F16, f16::from_f32(0.1).to_le_bytes().to_vec()),
        tensor("brain.weight", &[1], HostType::BF16, bf16::from_f32(0.1).to_le_bytes().to_vec()),
        tensor("brain.q_gain", &[1], HostType::BF16, bf16::from_f32(0.1).to_le_bytes().to_vec()),
        HostTensor::from_f64("double", &[1], &[0.1]),
        tensor("ids", &[2], HostType::I64, [5i64, -1].iter().flat_map(|v| v.to_le_bytes()).collect()),
        HostTensor::from_f32("empty", &[0, 4], &[]),
        HostTensor::from_f32("scalar", &[], &[7.0]),
    ];
    let q = int8(&tensors);
    let storages: Vec<Storage> = q.iter().map(|q| q.storage).collect();
    use Storage::{F16, F32, Raw};
    assert_eq!(storages, [F32, F16, Raw, F16, F32, Raw, Raw, F16, F16]);
    let values = |i: usize| q[i].dequantize().unwrap().to_f32();
    assert_eq!(values(0), [0.1, 0.2, 0.3]);
    assert_eq!(values(1), [f16::from_f32(0.1).to_f32(), -2.0]);
    // 0.1 in bfloat16 is exact in float16.
    assert_eq!(values(3), [bf16::from_f32(0.1).to_f32()]);
    assert_eq!(values(6), [5.0, -1.0]);
    assert_eq!(q[6].payload_bytes(), 16);
    assert_eq!((values(7), values(8)), (vec![], vec![7.0]));
    assert_eq!(Stats::of(&q).num_nonfloat_tensors, 1);
}

#[test]
fn the_limit_of_65536_elements_is_inclusive() {
    let make = |n: usize| int8(&[HostTensor::from_f32("w", &[n], &vec![0.5; n])])[0].storage;
    assert_eq!(make(65_536), Storage::F16);
    assert_eq!(make(65_537), Storage::Int8Tensor);
    let shaped = |shape: &[usize]| {
        let n = shape.iter().product();
        int8(&[HostTensor::from_f32("attn_scale", shape, &vec![0.5; n])])[0].storage
    };
    assert_eq!(shaped(&[257, 256]), Storage::Int8Row);
    assert_eq!(shaped(&[3, 200, 200]), Storage::Int8Tensor);
}

#[test]
fn a_row_is_clipped_at_the_interpolated_quantile() {
    // Magnitudes 0, 1, ... 69,999 in shuffled order with alternating signs: the clip follows by arithmetic.
    let n = 70_000usize;
    let values: Vec<f32> =
        (0..n).map(|i| ((i * 39_119) % n) as f32 * if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let q = &int8(&[HostTensor::from_f32("w", &[1, n], &values)])[0];
    let clip = f64::from(CLIP_QUANTILE) * (n - 1) as f64;
    assert!(clip < (n - 1) as f64 - 0.1);
    let scale = q.parts[1].to_f64()[0];
    assert!((scale / (clip / 127.0) - 1.0).abs() < 1.0 / 2048.0, "{scale}");
    let step = (clip / 127.0) as f32;
    for (value, code) in values.iter().zip(q.parts[0].to_f32()) {
        assert_eq!(code, (value / step).round_ties_even().clamp(-127.0, 127.0));
    }
}

#[test]
fn dequantised_weights_are_within_half_a_step_and_in_the_original_type() {
    let n = 300 * 300;
    let values: Vec<f32> = (0..n).map(|i| ((i * 7919) % 20_011) as f32 / 5000.0 - 2.0).collect();
    let brain: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    let tensors =
        [HostTensor::from_f32("w", &[300, 300], &values), tensor("e", &[300, 300], HostType::BF16, brain)];
    let q = int8(&tensors);
    let back = q[0].dequantize().unwrap().to_f32();
    let worst = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Half a step of 2/127, and the float16 rounding of the scale times code 127.
    assert!(worst <= 0.5 * 2.01 / 127.0 + 2.0 / 2048.0, "{worst}");
    assert!(worst > 0.4 * 2.0 / 127.0, "a worst case of {worst} says that nothing was rounded");
    let back = q[1].dequantize().unwrap().to_f32();
    assert!(back.iter().all(|&v| bf16::from_f32(v).to_f32() == v));
}

#[test]
fn fp16_keeps_controls_in_float32() {
    let n = 70_000;
    let tensors = [
        HostTensor::from_f32("w", &[n], &vec![0.1; n]),
        HostTensor::from_f32("q_gain", &[1], &[0.1]),
        tensor("i", &[1], HostType::U8, vec![9]),
    ];
    let q = quantize("fp16".parse().unwrap(), &tensors, &controls()).unwrap();
    assert_eq!(q.iter().map(|q| q.storage).collect::<Vec<_>>(), [Storage::F16, Storage::F32, Storage::Raw]);
    assert_eq!(q[0].dequantize().unwrap().to_f32()[0], f16::from_f32(0.1).to_f32());
}

#[test]
fn what_cannot_be_quantised_is_an_error_that_names_the_tensor() {
    let big = |value: f32| {
        let mut values = vec![0.0; 70_000];
        values[69_999] = value;
        HostTensor::from_f32("blocks.0.w", &[700, 100], &values)
    };
    let good = HostTensor::from_f32("blocks.0.w", &[1], &[1.0]);
    let cases: [(&str, Vec<HostTensor>); 7] = [
        ("NaN", vec![big(f32::NAN)]),
        ("inf", vec![big(f32::INFINITY)]),
        ("inf", vec![HostTensor::from_f32("blocks.0.w", &[1], &[f32::INFINITY])]),
        ("65,520", vec![HostTensor::from_f32("blocks.0.w", &[1], &[70_000.0])]),
        ("two tensors", vec![good.clone(), good]),
        ("3 bytes", vec![tensor("blocks.0.w", &[1], HostType::F32, vec![0; 3])]),
        ("fits in memory", vec![tensor("blocks.0.w", &[usize::MAX, 2], HostType::F32, vec![])]),
    ];
    for (expected, tensors) in cases {
        let error = quantize(Scheme::Int8, &tensors, &controls()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let line = error.to_string();
        assert!(line.contains("blocks.0.w") && line.contains(expected), "{line}");
    }
    let error = "int9".parse::<Scheme>().unwrap_err().to_string();
    assert!(error.contains("--quant") && error.contains("fp16, intN"), "{error}");
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let n = 70_000;
    let good = &int8(&[HostTensor::from_f32("w", &[700, 100], &vec![0.5; n])])[0];
    let spoil = |change: &dyn Fn(&mut QuantTensor)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad.dequantize().unwrap_err()
    };
    let errors = [
        spoil(&|q| q.shape = vec![700, 101]),
        spoil(&|q| q.shape = vec![7, 100, 100]),
        spoil(&|q| q.storage = Storage::Int8Tensor),
        spoil(&|q| q.original = HostType::I8),
        spoil(&|q| q.parts.truncate(1)),
        spoil(&|q| q.parts[0].bytes.truncate(69_999)),
        spoil(&|q| q.parts[1].bytes[1] = 0x7c),
    ];
    for error in errors {
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains('w'));
    }
}
