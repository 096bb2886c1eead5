//! Artifacts that are cut short, damaged or malicious: always an error of exit status 2, never a panic, never
//! accepted, and never more memory than the caps allow.

mod artifact_common;
mod memory_common;

use artifact_common::{Rng, every_storage, stored};
use fairway::artifact::container::{HEADER_BYTES, Kind, MAX_RAW_BYTES, Sealed, seal};
use fairway::artifact::{Artifact, ByteTableSection, Codec, tensor_table, vocabulary};
use fairway::error::Error;
use fairway::host::HostType;
use fairway::quant::ternary::Packing;
use fairway::quant::{QuantTensor, Storage};
use memory_common::peak_mib;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Writes `file`, and demands that both readers refuse it with one line that names it.
fn refused(path: &Path, file: &[u8], why: &str) -> String {
    std::fs::write(path, file).unwrap();
    let read = Artifact::read(path).err().unwrap_or_else(|| panic!("read took a file with {why}"));
    let inspect = Artifact::inspect(path).err().unwrap_or_else(|| panic!("inspect took a file with {why}"));
    for error in [&read, &inspect] {
        assert_eq!(error.exit_code(), 2, "{why}: {error}");
        let line = error.to_string();
        assert!(line.contains("hostile.fwy") && !line.contains('\n'), "{why}: {line}");
    }
    read.to_string()
}

/// The good file's sections, to be spoilt and sealed again with true checksums.
fn sections(codec: Codec) -> Vec<Sealed> {
    static GOOD: [OnceLock<Vec<Sealed>>; 4] = [const { OnceLock::new() }; 4];
    GOOD[usize::from(codec.id()) - 1].get_or_init(|| pack_sample(codec)).clone()
}

fn pack_sample(codec: Codec) -> Vec<Sealed> {
    let artifact = every_storage();
    let (file, sizes) = artifact.pack(codec).unwrap();
    let mut at = HEADER_BYTES;
    let sections: Vec<Sealed> = sizes
        .sections
        .iter()
        .map(|&(kind, stored, raw)| {
            let start = at;
            at += stored as usize;
            let codec = if kind == Kind::TensorData { codec } else { Codec::Brotli };
            Sealed {
                kind: kind.id(),
                codec: codec.id(),
                raw_len: raw as u32,
                stored: file[start..at].to_vec(),
            }
        })
        .collect();
    assert_eq!(seal(&sections), file);
    sections
}

/// Sections in which the one of a kind is made anew from raw bytes.
fn with_raw(kind: Kind, raw: &[u8]) -> Vec<Sealed> {
    let mut sections = sections(Codec::Zstd);
    sections[usize::from(kind.id()) - 1] = Sealed::pack(kind, Codec::Zstd, raw, &[]).unwrap();
    sections
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("hostile.fwy")
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let place = Place::new();
    for codec in [Codec::Brotli, Codec::Lzma] {
        let sections = sections(codec);
        let file = seal(&sections);
        let mut borders = vec![0, 1, 7, 8, 9, HEADER_BYTES];
        for section in &sections {
            borders.push(borders[borders.len() - 1] + section.stored.len());
        }
        assert_eq!(borders[borders.len() - 1], file.len());
        let mut cuts: Vec<usize> = borders.iter().flat_map(|&b| [b.saturating_sub(1), b, b + 1]).collect();
        cuts.extend(0..HEADER_BYTES);
        cuts.extend((0..200).map(|i| i * file.len() / 200));
        cuts.retain(|&cut| cut < file.len());
        for cut in cuts {
            refused(&place.path(), &file[..cut], &format!("{cut} of {} bytes", file.len()));
        }
        let mut longer = file.clone();
        longer.push(0);
        assert!(refused(&place.path(), &longer, "a byte too many").contains("too long"));
        assert!(
            refused(&place.path(), &[&file[..], &file].concat(), "itself behind it").contains("too long")
        );
    }
}

#[test]
fn every_bit_of_the_header_and_any_of_the_body_counts() {
    let place = Place::new();
    let file = seal(&sections(Codec::Zstd));
    let mut rng = Rng(11);
    let header = (0..HEADER_BYTES * 8).collect::<Vec<_>>();
    let body = (0..1500).map(|_| HEADER_BYTES * 8 + rng.below((file.len() - HEADER_BYTES) * 8));
    let last = file.len() * 8 - 1;
    for bit in header.into_iter().chain(body).chain([last]) {
        let mut damaged = file.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        refused(&place.path(), &damaged, &format!("bit {bit} flipped"));
    }
}

#[test]
fn what_is_no_artifact_is_refused() {
    let place = Place::new();
    for (file, why) in [(&b""[..], "nothing"), (b"FAIRWAX\x01\x04", "other magic"), (&[0; 4096], "zeros")] {
        assert!(refused(&place.path(), file, why).contains("not an artifact"), "{why}");
    }
    let mut newer = seal(&sections(Codec::Zstd));
    newer[7] = 3;
    assert!(refused(&place.path(), &newer, "a newer format").contains("format 3"));
    for path in [place.dir.path(), &place.dir.path().join("absent")] {
        let error = Artifact::read(path).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
    }
}

#[test]
fn headers_that_lie_under_a_true_checksum_are_refused() {
    let place = Place::new();
    let good = sections(Codec::Zstd);
    let with = |change: &dyn Fn(&mut Vec<Sealed>)| {
        let mut sections = good.clone();
        change(&mut sections);
        seal(&sections)
    };
    let cases = [
        ("no sections", with(&|s| s.clear())),
        ("a section missing", with(&|s| drop(s.pop()))),
        ("a section twice", with(&|s| s.push(s[3].clone()))),
        ("sections exchanged", with(&|s| s.swap(1, 2))),
        ("an unknown kind", with(&|s| s[3].kind = 9)),
        ("codec 0", with(&|s| s[3].codec = 0)),
        ("codec 5", with(&|s| s[0].codec = 5)),
        ("another codec", with(&|s| s[3].codec = Codec::Lzma.id())),
        ("a recipe of 9 MiB", with(&|s| s[0].raw_len = 9 << 20)),
        ("data of 4 GiB", with(&|s| s[3].raw_len = u32::MAX)),
        ("data over the cap", with(&|s| s[3].raw_len = MAX_RAW_BYTES as u32 + 1)),
        ("all sections over the cap", with(&|s| s[3].raw_len = MAX_RAW_BYTES as u32)),
        ("an empty stream", with(&|s| s[3].stored.clear())),
    ];
    for (why, file) in cases {
        refused(&place.path(), &file, why);
    }
}

#[test]
fn streams_longer_or_shorter_than_declared_are_refused() {
    let place = Place::new();
    for (name, codec) in Codec::ALL {
        // Arranged without measuring, so that the lying tables below are arranged alike.
        let mut good = sections(codec);
        let plain = tensor_table::encode(&every_storage().tensors, "test").unwrap();
        good[2] = Sealed::pack(Kind::TensorTable, Codec::Brotli, &plain.table, &[]).unwrap();
        good[3] = Sealed::pack(Kind::TensorData, codec, &plain.data, &plain.cuts).unwrap();
        std::fs::write(place.path(), seal(&good)).unwrap();
        assert_eq!(Artifact::read(&place.path()).unwrap(), every_storage());
        let raw_len = good[3].raw_len;
        let table = |delta: i64| {
            // A table that agrees with the lie, so that only the stream itself can give it away.
            let mut artifact = every_storage();
            let tensor = artifact.tensors.iter_mut().find(|tensor| tensor.name == "conv.weight").unwrap();
            let codes = &mut tensor.parts[0];
            let len = (codes.bytes.len() as i64 + delta) as usize;
            codes.bytes.resize(len, 0);
            (tensor.shape, codes.shape) = (vec![len, 1, 1], vec![len, 1, 1]);
            let encoded = tensor_table::encode(&artifact.tensors, "test").unwrap();
            Sealed::pack(Kind::TensorTable, Codec::Brotli, &encoded.table, &[]).unwrap()
        };
        for delta in [-1000i64, -1, 1, 1000] {
            let mut lie = good.clone();
            lie[2] = table(delta);
            lie[3].raw_len = (i64::from(raw_len) + delta) as u32;
            let line = refused(&place.path(), &seal(&lie), &format!("{name} declared {delta} bytes off"));
            assert!(line.contains("does not decompress"), "{line}");
        }
        for extra in [&[0u8][..], &[0xff], &[0; 70_000]] {
            let mut lie = good.clone();
            lie[3].stored.extend_from_slice(extra);
            refused(&place.path(), &seal(&lie), &format!("{} bytes behind the {name} stream", extra.len()));
        }
        let mut twice = good.clone();
        twice[3].stored.extend_from_slice(&good[3].stored);
        refused(&place.path(), &seal(&twice), &format!("two {name} streams"));
        for part in 0..100 {
            let mut cut = good.clone();
            let len = cut[3].stored.len() * part / 100;
            cut[3].stored.truncate(len);
            refused(&place.path(), &seal(&cut), &format!("{part} % of the {name} stream"));
        }
        // Under a true header: each section ends where it begins, and a byte before its end.
        for section in 0..4 {
            for keep in [0, good[section].stored.len() - 1] {
                let mut cut = good.clone();
                cut[section].stored.truncate(keep);
                let line =
                    refused(&place.path(), &seal(&cut), &format!("{keep} bytes of {name} section {section}"));
                assert!(line.contains("does not decompress"), "{line}");
            }
        }
    }
}

#[test]
fn tables_cut_anywhere_are_refused() {
    let place = Place::new();
    let artifact = every_storage();
    let encoded = tensor_table::encode(&artifact.tensors, "test").unwrap();
    for len in 0..encoded.table.len() {
        let error = tensor_table::decode(&encoded.table[..len], encoded.data.len() as u64, "x").unwrap_err();
        assert_eq!(error.exit_code(), 2, "{len}: {error}");
    }
    let words = vocabulary::encode(&artifact.byte_table, &artifact.tokenizer_kind, &artifact.pieces);
    for len in 0..words.len() {
        let error = vocabulary::decode(&words[..len], "x").unwrap_err();
        assert_eq!(error.exit_code(), 2, "{len}: {error}");
    }
    let recipe = &sections(Codec::Zstd)[0];
    let recipe = Codec::Brotli.decompress(&recipe.stored, recipe.raw_len.into()).unwrap();
    for len in (0..4).chain((4..recipe.len()).step_by(50)).chain(recipe.len() - 30..recipe.len()) {
        let file = seal(&with_raw(Kind::Recipe, &recipe[..len]));
        refused(&place.path(), &file, &format!("{len} bytes of the recipe"));
    }
}

#[test]
fn codes_and_scales_that_no_quantiser_writes_are_refused() {
    let place = Place::new();
    let alone = |tensor: &QuantTensor| Artifact {
        recipe_toml: String::new(),
        quant: "int6".into(),
        notes: [].into(),
        byte_table: ByteTableSection::default(),
        tokenizer_kind: "byte".into(),
        pieces: vec![],
        tensors: vec![tensor.clone()],
    };
    let refused = |tensor: &QuantTensor, expected: &str| {
        alone(tensor).write(&place.path(), Codec::Zlib).unwrap();
        let read = Artifact::read(&place.path()).unwrap();
        assert_eq!(&read.tensors[0], tensor);
        let error = read.tensors[0].dequantize().unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains(expected), "{}: {error}", tensor.name);
    };
    let mut rng = Rng(3);
    let mut with = |storage: Storage, part: usize, at: usize, bytes: &[u8]| {
        // 22 codes: the last byte of either packing is filled up.
        let mut tensor = stored(&mut rng, storage, HostType::F32, &[2, 11]);
        assert!(tensor.dequantize().is_ok());
        tensor.parts[part].bytes[at..at + bytes.len()].copy_from_slice(bytes);
        tensor
    };
    for bits in 2..=7u8 {
        let beyond = 1i8 << (bits - 1);
        for storage in [Storage::IntRow(bits), Storage::IntTensor(bits)] {
            for code in [beyond, -beyond - 1, i8::MAX, i8::MIN] {
                refused(&with(storage, 0, 7, &[code.cast_unsigned()]), &format!("has a code {code}"));
            }
            // The smallest code of so many bits is one.
            assert!(with(storage, 0, 7, &[(-beyond).cast_unsigned()]).dequantize().is_ok());
        }
    }
    for (packing, bytes) in [
        // A digit 3 in each place; filling that is not empty.
        (Packing::TwoBits, [0b11, 0b1100, 0b11_0000, 0b1100_0000].map(|byte| (0, byte)).to_vec()),
        (Packing::TwoBits, vec![(5, 0b1_0000), (5, 0b100_0000)]),
        (Packing::FiveTrits, vec![(0, 243), (0, 255), (4, 9), (4, 162)]),
    ] {
        for (at, byte) in bytes {
            refused(&with(Storage::Ternary(packing), 0, at, &[byte]), "pack no ternary codes");
        }
    }
    let half = [0x7c00u16, 0xfc00, 0x7e00, 0x7c01].map(|bits| bits.to_le_bytes());
    let single = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN].map(f32::to_le_bytes);
    // The last is finite where it is stored and not where it is used.
    let double = [f64::INFINITY, f64::NAN, 1e39].map(f64::to_le_bytes);
    for scale in half {
        for storage in (2..=7).map(Storage::IntRow).chain([Storage::Int8Row]) {
            refused(&with(storage, 1, 2, &scale), "a scale that is not finite");
        }
    }
    for scale in single {
        for storage in (2..=7).map(Storage::IntTensor).chain([Storage::Int8Tensor]) {
            refused(&with(storage, 1, 0, &scale), "a scale that is not finite");
        }
    }
    for scale in double {
        for packing in [Packing::TwoBits, Packing::FiveTrits] {
            refused(&with(Storage::Ternary(packing), 1, 0, &scale), "a scale that is not finite");
        }
    }
    // Finite scales whose products are not, and values that are not.
    for storage in (3..=7).map(Storage::IntTensor).chain([Storage::Int8Tensor]) {
        refused(&with(storage, 1, 0, &3.4e38f32.to_le_bytes()), "restores to");
    }
    for packing in [Packing::TwoBits, Packing::FiveTrits] {
        refused(&with(Storage::Ternary(packing), 1, 0, &3.4e38f64.to_le_bytes()), "restores to");
    }
    refused(&with(Storage::F32, 0, 4, &f32::NAN.to_le_bytes()), "restores to NaN at element 1");
    refused(&with(Storage::F16, 0, 4, &half[1]), "restores to -inf at element 2");
}

#[test]
fn packed_codes_by_columns_stay_packed() {
    let place = Place::new();
    // Twenty million codes in 4 MiB, and their scale.
    let (packed, five_trits, columns) = (4 << 20, 7, 3);
    let table = table(&["a"], &[(1, five_trits, &[4096, 5120])], &[0, 1], &[columns, 0]);
    let mut sections = with_raw(Kind::TensorTable, &table);
    let mut data = vec![0u8; packed + 8];
    let mut write = |data: &[u8]| {
        sections[3] = Sealed::pack(Kind::TensorData, Codec::Zstd, data, &[]).unwrap();
        std::fs::write(place.path(), seal(&sections)).unwrap();
    };
    write(&data);
    let (read, peak) = peak_mib(|| Artifact::read(&place.path()).unwrap());
    assert_eq!(read.tensors[0].payload_bytes(), packed);
    assert!(peak <= 16, "{peak} MiB");
    // A byte that packs no codes: only who reads the weights finds it.
    data[7] = 243;
    write(&data);
    let error = Artifact::read(&place.path()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let line = error.to_string();
    assert!(line.contains("tensor a") && line.contains("hostile.fwy"), "{line}");
    Artifact::inspect(&place.path()).unwrap();
}

/// Very many zeros in very few bytes, made at the codec's fast settings.
fn bomb(codec: Codec, zeros: &[u8]) -> Vec<u8> {
    match codec {
        Codec::Brotli => {
            let params = brotli::enc::BrotliEncoderParams { quality: 3, lgwin: 24, ..Default::default() };
            let mut stream = Vec::new();
            brotli::BrotliCompress(&mut &zeros[..], &mut stream, &params).unwrap();
            stream
        }
        Codec::Zstd => zstd::bulk::compress(zeros, 1).unwrap(),
        codec => codec.compress(zeros).unwrap(),
    }
}

#[test]
fn zip_bombs_stay_small() {
    let place = Place::new();
    let zeros = vec![0u8; 32 << 20];
    for (name, codec) in Codec::ALL {
        let bomb = bomb(codec, &zeros);
        assert!(bomb.len() < 40_000, "{name}: {}", bomb.len());
        // As data, against a table of the sample's tensors; as each small table.
        for section in 0..4 {
            let mut sections = sections(codec);
            sections[section].codec = codec.id();
            sections[section].stored.clone_from(&bomb);
            let file = seal(&sections);
            let why = format!("{name} bomb in section {section}");
            let (_, peak) = peak_mib(|| refused(&place.path(), &file, &why));
            // Brotli's own window is up to 16 MiB.
            assert!(peak <= 20, "{why}: {peak} MiB");
        }
        // Through the codec alone: 1,000 bytes were promised.
        let (result, peak) = peak_mib(|| codec.decompress(&bomb, 1000));
        assert!(result.is_err() && peak <= 20, "{name}: {peak} MiB");
        // A gigabyte promised, little there.
        let small = codec.compress(&zeros[..1 << 20]).unwrap();
        let (result, peak) = peak_mib(|| codec.decompress(&small, 1 << 30));
        assert!(result.is_err() && peak <= 20, "{name}: {peak} MiB");
    }
}

#[test]
fn inspect_of_a_huge_honest_file_stays_small() {
    let place = Place::new();
    let size = 96usize << 20;
    let mut artifact = every_storage();
    artifact.tensors.truncate(1);
    let tensor = &mut artifact.tensors[0];
    tensor.shape = vec![size / 256, 256];
    tensor.parts[0].shape.clone_from(&tensor.shape);
    tensor.parts[0].bytes = vec![0; size];
    tensor.parts[1].shape = vec![size / 256];
    tensor.parts[1].bytes = vec![0; size / 128];
    artifact.write(&place.path(), Codec::Zlib).unwrap();
    let (inspection, peak) = peak_mib(|| Artifact::inspect(&place.path()).unwrap());
    assert_eq!(inspection.params as usize, size);
    assert!(peak <= 20, "{peak} MiB");
    let (read, peak) = peak_mib(|| Artifact::read(&place.path()).unwrap());
    assert_eq!(read.tensors[0].payload_bytes(), size + size / 128);
    assert!(peak <= 200, "{peak} MiB for {} MiB of weights", size >> 20);
}

#[test]
fn windows_beyond_the_limit_are_refused() {
    // Zstandard: a frame whose header asks for a window of 2^30 bytes, then one raw block of 5.
    let frame = |window_log: u8| {
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (window_log - 10) << 3, (5 << 3) | 1, 0, 0];
        frame.extend(b"fives");
        frame
    };
    assert_eq!(Codec::Zstd.decompress(&frame(27), 5).unwrap(), b"fives");
    for window_log in [28, 30, 41] {
        let error = Codec::Zstd.decompress(&frame(window_log), 5).unwrap_err();
        assert!(error.to_string().contains("zstd"), "{error}");
    }
    // Brotli: the large-window extension.
    let params =
        brotli::enc::BrotliEncoderParams { quality: 5, large_window: true, lgwin: 30, ..Default::default() };
    let mut stream = Vec::new();
    brotli::BrotliCompress(&mut &b"fives"[..], &mut stream, &params).unwrap();
    assert!(Codec::Brotli.decompress(&stream, 5).is_err());
}

/// A tensor table by hand: names, then (element type, storage, sizes) of each, then the order and arrangements.
fn table(names: &[&str], tensors: &[(u8, u8, &[u64])], order: &[i8], arrangements: &[u8]) -> Vec<u8> {
    let mut out = vec![names.len() as u8];
    names.iter().for_each(|name| out.extend(format!("{name}\n").bytes()));
    out.extend(tensors.iter().map(|t| t.0));
    out.extend(tensors.iter().map(|t| t.1));
    out.extend(tensors.iter().map(|t| t.2.len() as u8));
    for &size in tensors.iter().flat_map(|t| t.2) {
        let mut size = size;
        while size >= 0x80 {
            out.push(size as u8 | 0x80);
            size >>= 7;
        }
        out.push(size as u8);
    }
    out.extend(order.iter().map(|&delta| ((delta << 1) ^ (delta >> 7)).cast_unsigned()));
    out.extend(arrangements);
    out
}

#[test]
fn tables_of_impossible_tensors_are_refused() {
    const BIG: u64 = 1 << 31;
    const F32: u8 = 1;
    const I8: u8 = 5;
    // Storages: 1 raw, 2 f32, 3 f16, 4 int8/row, 5 int8/tensor.
    let two: &[(u8, u8, &[u64])] = &[(F32, 2, &[2]), (F32, 3, &[4])];
    let decode = |bytes: &[u8], len: u64| tensor_table::decode(bytes, len, "hostile.fwy").map(|_| ());
    decode(&table(&["a", "b"], two, &[1, -1], &[1, 1]), 16).unwrap();
    decode(&table(&["a"], &[(F32, 4, &[3, 5])], &[0, 1], &[0, 1]), 21).unwrap();
    let cases: Vec<(&str, Vec<u8>, u64)> = vec![
        ("two tensors named a", table(&["a", "a"], two, &[0, 1], &[1, 1]), 16),
        ("placed twice", table(&["a", "b"], two, &[0, 0], &[1, 1]), 16),
        ("placed twice", table(&["a", "b"], two, &[1, 0], &[1, 1]), 16),
        ("part 2 placed", table(&["a", "b"], two, &[0, 2], &[1, 1]), 16),
        ("part -1 placed", table(&["a", "b"], two, &[-1, 1], &[1, 1]), 16),
        ("tensors of 16 bytes", table(&["a", "b"], two, &[0, 1], &[1, 1]), 15),
        ("tensors of 16 bytes", table(&["a", "b"], two, &[0, 1], &[1, 1]), 17),
        ("early", table(&["a", "b"], two, &[0, 1], &[1]), 16),
        ("behind its end", table(&["a", "b"], two, &[0, 1], &[1, 1, 1]), 16),
        ("arrangement 2", table(&["a", "b"], two, &[0, 1], &[1, 2]), 16),
        ("element type 0", table(&["a"], &[(0, 2, &[2])], &[0], &[0]), 8),
        ("element type 9", table(&["a"], &[(9, 2, &[2])], &[0], &[0]), 8),
        ("storage 0", table(&["a"], &[(F32, 0, &[2])], &[0], &[0]), 8),
        ("storage 200", table(&["a"], &[(F32, 200, &[2])], &[0], &[0]), 8),
        ("two dimensions", table(&["a"], &[(F32, 4, &[2, 2, 2])], &[0, 1], &[0, 0]), 12),
        ("a float tensor", table(&["a"], &[(I8, 4, &[2, 2])], &[0, 1], &[0, 0]), 8),
        ("9 dimensions", table(&["a"], &[(F32, 2, &[1; 9])], &[0], &[0]), 4),
        ("fits in memory", table(&["a"], &[(F32, 2, &[BIG, BIG, BIG])], &[0], &[0]), 4),
        ("fits in memory", table(&["a"], &[(F32, 2, &[BIG, BIG, BIG, 0])], &[0], &[0]), 4),
        ("at most 2147483648", table(&["a"], &[(F32, 2, &[BIG + 1])], &[0], &[0]), 4),
        ("at most 2147483648", table(&["a"], &[(F32, 2, &[u64::MAX])], &[0], &[0]), 4),
        ("tensors of 4294967296 bytes", table(&["a"], &[(F32, 4, &[BIG, 0])], &[0, 1], &[0, 0]), 0),
        // Ternary codes, and integers of fewer bits.
        (
            "tensors of 1152921504606846984 bytes",
            table(&["a"], &[(F32, 6, &[BIG, BIG])], &[0, 1], &[0, 0]),
            8,
        ),
        ("tensors of 922337203685477589 bytes", table(&["a"], &[(F32, 7, &[BIG, BIG])], &[0, 1], &[0, 0]), 8),
        (
            "tensors of 4611686018427387908 bytes",
            table(&["a"], &[(F32, 22, &[BIG, BIG])], &[0, 1], &[0, 0]),
            4,
        ),
        (
            "tensors of 18446744073709551615 bytes",
            table(&["a", "b", "c", "d", "e"], &[(F32, 27, &[BIG, BIG][..]); 5], &[0, 1], &[0, 0]),
            4,
        ),
        ("control characters", table(&["a\tb"], &[(F32, 2, &[1])], &[0], &[0]), 4),
        ("not UTF-8", b"\x01\xff\n\x01\x02\x00\x00\x00".to_vec(), 4),
        ("within a line", b"\x01aaa".to_vec(), 4),
        ("at most 16384", b"\xff\xff\x03aaa".to_vec(), 4),
        ("not a number", [0xff; 12].to_vec(), 4),
        ("early", vec![], 0),
    ];
    for (expected, bytes, len) in cases {
        let error = decode(&bytes, len).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "{error} without {expected:?}");
    }
    let refuses = |tensor: (u8, u8, &[u64]), expected: &str| {
        let error = decode(&table(&["a"], &[tensor], &[0, 1], &[0, 0]), 8).unwrap_err();
        assert!(error.to_string().contains(expected), "{tensor:?}: {error} without {expected:?}");
    };
    for storage in [6, 7].into_iter().chain(12..=17).chain(22..=27) {
        refuses((I8, storage, &[2, 2]), "a float tensor");
        refuses((F32, storage, &[2; 9]), "9 dimensions");
        refuses(
            (F32, storage, &[BIG, BIG, BIG]),
            if (12..=17).contains(&storage) { "two dimensions" } else { "fits in memory" },
        );
    }
    for storage in (8..12).chain(18..22).chain([0, 28, 32, 255]) {
        refuses((F32, storage, &[2, 2]), &format!("storage {storage}"));
    }
    // The same through a file: sizes that no data backs.
    let place = Place::new();
    let huge = table(&["a"], &[(F32, 2, &[1 << 28])], &[0], &[0]);
    let mut sections = with_raw(Kind::TensorTable, &huge);
    sections[3].raw_len = 1 << 30;
    refused(&place.path(), &seal(&sections), "raw lengths over the cap");
    let large = table(&["a"], &[(F32, 2, &[1 << 27])], &[0], &[0]);
    let mut sections = with_raw(Kind::TensorTable, &large);
    sections[3].raw_len = 1 << 29;
    let (_, peak) = peak_mib(|| refused(&place.path(), &seal(&sections), "512 MiB that are not there"));
    assert!(peak <= 20, "{peak} MiB");
}

#[test]
fn impossible_vocabularies_and_recipes_are_refused() {
    let decode = |bytes: &[u8]| vocabulary::decode(bytes, "hostile.fwy").map(|_| ());
    // Kind "b", 2 ids, 1 piece of kind 1, score 0 as a rank, text "x"; base bytes; flags.
    let good = [1, b'b', 2, 1, 1, 0, 0, b'x', 0xff, 0, 0, 0, 0];
    decode(&good).unwrap();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.to_vec();
        bytes[at] = byte;
        bytes
    };
    let cases = [
        ("not UTF-8", with(1, 0xff)),
        ("in 12 bytes", with(0, 13)),
        ("ids", with(2, 120)),
        ("no more pieces", [&[1, b'b', 0, 1, 1, 0, 0, b'x', 0xff, 0, 0][..9]].concat()),
        ("kind 0", with(4, 0)),
        ("kind 7", with(4, 7)),
        ("form 2", with(5, 2)),
        ("NaN", vec![1, b'b', 1, 1, 1, 1, 0, 0, 0xc0, 0x7f, b'x', 0xff, 0, 0, 0]),
        ("not UTF-8", with(7, 0x80)),
        ("within a line", with(8, b'y')),
        ("an id of", with(9, 3)),
        ("behind its end", [&good[..], &[0]].concat()),
        ("early", good[..12].to_vec()),
    ];
    for (expected, bytes) in cases {
        let error = decode(&bytes).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "{error} without {expected:?}");
    }
    let place = Place::new();
    let recipes: [(&str, &[u8]); 6] = [
        ("200 recipe in 0 bytes", &[200, 1]),
        ("not UTF-8", &[1, 0xff, 0, 0]),
        ("no control characters", &[0, 2, b'a', 0x1b, 0]),
        ("behind its end", &[0, 0, 0, 0]),
        ("two notes named a", &[0, 0, 2, 1, b'a', 0, 1, b'a', 0]),
        ("120 notes in 0 bytes", &[0, 0, 120]),
    ];
    for (expected, raw) in recipes {
        let line = refused(&place.path(), &seal(&with_raw(Kind::Recipe, raw)), expected);
        assert!(line.contains(expected), "{line} without {expected:?}");
    }
}

#[test]
fn random_damage_under_true_checksums_never_panics() {
    let mut rng = Rng(99);
    let artifact = every_storage();
    let encoded = tensor_table::encode(&artifact.tensors, "test").unwrap();
    let words = vocabulary::encode(&artifact.byte_table, &artifact.tokenizer_kind, &artifact.pieces);
    let mut damage = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        for _ in 0..1 + rng.below(4) {
            let at = rng.below(bytes.len());
            match rng.below(5) {
                0 => bytes[at] ^= 1 << rng.below(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][rng.below(5)],
                2 => bytes.truncate(at.max(1)),
                3 => bytes.insert(at, rng.below(256) as u8),
                _ => drop(bytes.remove(at)),
            }
            if bytes.is_empty() {
                bytes.push(0);
            }
        }
        bytes
    };
    let mut refusals = 0;
    let mut note = |result: Result<(), Error>| {
        refusals += usize::from(result.is_err_and(|error| {
            assert_eq!(error.exit_code(), 2);
            true
        }));
    };
    for _ in 0..20_000 {
        note(tensor_table::decode(&damage(&encoded.table), encoded.data.len() as u64, "x").map(|_| ()));
        note(vocabulary::decode(&damage(&words), "x").map(|_| ()));
    }
    // Damage to a name, a score or a text can make another table that is as good.
    assert!(refusals > 20_000, "{refusals}");

    let text: Vec<u8> =
        encoded.table.iter().copied().chain(words).chain((0..2000).map(|i| (i % 7) as u8)).collect();
    for (name, codec) in Codec::ALL {
        let stream = codec.compress(&text).unwrap();
        let mut refusals = 0;
        for _ in 0..4000 {
            match codec.decompress(&damage(&stream), text.len() as u64) {
                Ok(raw) => assert_eq!(raw.len(), text.len(), "{name}"),
                Err(_) => refusals += 1,
            }
        }
        assert!(refusals > 2000, "{name}: {refusals}");
    }
}
