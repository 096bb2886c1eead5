//! Small models as artifacts, for the artifact's tests.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use fairway::artifact::{Artifact, ByteTableSection, PieceRow};
use fairway::host::{HostTensor, HostType};
use fairway::quant::ternary::Packing;
use fairway::quant::{CONTROL_PATTERNS, QuantTensor, Scheme, Storage, quantize};

/// A seeded generator (xorshift64*), so that every run tests the same.
pub struct Rng(pub u64);

impl Rng {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// An integer below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// A standard normal number.
    pub fn normal(&mut self) -> f32 {
        let unit = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let (a, b) = (unit(self.bits()), unit(self.bits()));
        ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    }

    /// A float32 tensor of independent normal numbers.
    pub fn tensor(&mut self, name: &str, shape: &[usize], mean: f32, std: f32) -> HostTensor {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| mean + std * self.normal()).collect();
        HostTensor::from_f32(name, shape, &values)
    }
}

/// The vocabulary of a toy tokenizer: 4 specials, 256 byte pieces, a few words, and two padding ids.
pub fn vocabulary() -> (ByteTableSection, Vec<PieceRow>) {
    let special = ["<pad>", "<s>", "</s>", "<unk>"].map(|text| (text.to_owned(), 0.0, 3));
    let bytes = (0..256).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6));
    let words = ["▁t", "▁a", "in", "he", "▁ a", "é\n", "\0"];
    let words = words.iter().enumerate().map(|(rank, text)| ((*text).to_owned(), -(rank as f32), 1));
    let mut pieces: Vec<PieceRow> = special
        .into_iter()
        .chain(bytes)
        .chain(words)
        .map(|(text, score, kind)| PieceRow { text, score, kind })
        .collect();
    pieces[3].kind = 2;
    let ids = pieces.len() + 2;
    let mut table = ByteTableSection {
        base_bytes: vec![0; ids],
        has_leading_space: vec![false; ids],
        is_boundary: vec![false; ids],
    };
    for id in 0..ids {
        match pieces.get(id) {
            Some(PieceRow { kind: 6, .. }) => table.base_bytes[id] = 1,
            Some(PieceRow { kind: 1, text, .. }) => {
                table.has_leading_space[id] = text.starts_with('▁');
                table.base_bytes[id] = text.trim_start_matches('▁').len() as u16;
            }
            _ => table.is_boundary[id] = true,
        }
    }
    (table, pieces)
}

/// An artifact of the challenge's own export: int8 codes, kept floats, integers, shapes of all sorts.
pub fn sample() -> Artifact {
    let mut rng = Rng(7);
    let mut tensors = vec![
        rng.tensor("tok_emb.weight", &[257, 256], 0.0, 0.02),
        rng.tensor("skip_weights", &[2, 8], 1.0, 0.1),
    ];
    for layer in 0..2 {
        tensors.push(rng.tensor(&format!("blocks.{layer}.attn_scale"), &[8], 1.0, 0.1));
        tensors.push(rng.tensor(&format!("blocks.{layer}.mlp.fc.weight"), &[256, 260], 0.0, 0.5));
        tensors.push(rng.tensor(&format!("blocks.{layer}.small.weight"), &[8, 8], 0.0, 0.5));
    }
    tensors.push(rng.tensor("conv.weight", &[2, 200, 200], 0.0, 0.1));
    tensors.push(HostTensor::from_f64("double", &[3], &[1.0, -2.5, 1e-300]));
    tensors.push(HostTensor {
        name: "steps".into(),
        shape: vec![],
        dtype: HostType::I64,
        bytes: 1234i64.to_le_bytes().to_vec(),
    });
    tensors.push(HostTensor::from_f32("empty", &[0, 4], &[]));
    let (byte_table, pieces) = vocabulary();
    Artifact {
        recipe_toml: "name = \"tiny\"\nd_model = 256\n".repeat(20),
        quant: "int8".into(),
        notes: [("step".to_owned(), "100".to_owned()), ("é".to_owned(), String::new())].into(),
        byte_table,
        tokenizer_kind: "sentencepiece".into(),
        pieces,
        tensors: quantize(Scheme::Int8, &tensors, &CONTROL_PATTERNS.map(String::from)).unwrap(),
    }
}

/// A tensor stored in a form, with codes that the form has and scales of 0.5 to 1.
pub fn stored(rng: &mut Rng, storage: Storage, original: HostType, shape: &[usize]) -> QuantTensor {
    let name = format!("{}.{}x{}", storage.label().replace('/', "."), shape[0], shape[1]);
    let parts = storage.parts(original, shape, &name, "test").unwrap().into_iter().map(|spec| {
        let limit: usize = match storage {
            Storage::IntRow(bits) | Storage::IntTensor(bits) => 1 << (bits - 1),
            _ => 128,
        };
        let count = spec.bytes / spec.dtype.size();
        let bytes = match (storage, spec.name) {
            (Storage::Ternary(packing), "codes") => {
                let codes: Vec<i8> = (0..shape.iter().product()).map(|_| rng.below(3) as i8 - 1).collect();
                packing.pack(&codes)
            }
            (_, "codes") => (0..count).map(|_| (rng.below(2 * limit) as i32 - limit as i32) as u8).collect(),
            _ => {
                let values = (0..count).map(|_| 0.5 + rng.below(1 << 10) as f64 / 2048.0);
                values.flat_map(|value| little_endian(value, spec.dtype)).collect()
            }
        };
        HostTensor { name: spec.name.into(), shape: spec.shape, dtype: spec.dtype, bytes }
    });
    QuantTensor { parts: parts.collect(), name, shape: shape.to_vec(), original, storage }
}

/// A number between 0.5 and 1 with at most 10 bits, as bytes of a float type.
fn little_endian(value: f64, dtype: HostType) -> Vec<u8> {
    match dtype {
        HostType::F64 => value.to_le_bytes().to_vec(),
        HostType::F32 => (value as f32).to_le_bytes().to_vec(),
        // The exponent of 0.5, and the bits behind the leading one.
        HostType::F16 => (14u16 << 10 | ((value - 0.5) * 2048.0) as u16).to_le_bytes().to_vec(),
        dtype => panic!("no scale is of {dtype:?}"),
    }
}

/// The [`sample`], and a matrix in each other storage.
pub fn every_storage() -> Artifact {
    let mut rng = Rng(17);
    let mut artifact = sample();
    let originals = [HostType::F32, HostType::BF16, HostType::F16, HostType::F64];
    let packings = [Packing::TwoBits, Packing::FiveTrits].map(Storage::Ternary);
    let storages = (2..=7).flat_map(|bits| [Storage::IntRow(bits), Storage::IntTensor(bits)]).chain(packings);
    for (storage, original) in storages.zip(originals.into_iter().cycle()) {
        artifact.tensors.push(stored(&mut rng, storage, original, &[6, 37]));
    }
    artifact
}
