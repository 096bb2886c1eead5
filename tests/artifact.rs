//! Artifacts that are good: written, read back bit for bit, inspected, counted.

mod artifact_common;

use artifact_common::{Rng, sample, vocabulary};
use fairway::artifact::assemble::layout;
use fairway::artifact::budget::{code_bytes, shipped_bytes, source_files};
use fairway::artifact::container::Kind;
use fairway::artifact::{Artifact, Budget, ByteTableSection, Codec, PieceRow, Sizes, is_artifact};
use fairway::data::tokenizer::Tokenizer;
use fairway::files;
use fairway::host::HostTensor;
use fairway::model;
use fairway::quant::ternary::Packing;
use fairway::quant::{
    CONTROL_PATTERNS, Context, Export, QuantTensor, Scheme, Storage, quantize, quantize_by,
};
use fairway::recipe::{PR1382, Recipe};
use half::f16;
use std::path::Path;

#[test]
fn every_codec_gives_back_every_bit() {
    let dir = tempfile::tempdir().unwrap();
    let artifact = sample();
    for (name, codec) in Codec::ALL {
        let path = dir.path().join(name);
        let sizes = artifact.write(&path, codec).unwrap();
        assert_eq!(Artifact::read(&path).unwrap(), artifact, "{name}");
        assert_eq!(sizes.bytes, std::fs::metadata(&path).unwrap().len());
        assert_eq!(sizes.payload_bytes as usize, artifact.stats().payload_bytes);
        // The same content gives the same file.
        assert_eq!(artifact.pack(codec).unwrap().0, std::fs::read(&path).unwrap());
        assert!(is_artifact(&path));
        assert_eq!(name.parse::<Codec>().unwrap(), codec);
        assert_eq!(codec.to_string(), name);
    }
    assert!(!is_artifact(dir.path()));
    assert!(!is_artifact(&dir.path().join("absent")));
    let error = "gzip".parse::<Codec>().unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("brotli, lzma, zstd, zlib, xz9"), "{error}");
}

#[test]
fn inspect_shows_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.fwy");
    let artifact = sample();
    let sizes = artifact.write(&path, Codec::Zstd).unwrap();
    let seen = Artifact::inspect(&path).unwrap();
    assert_eq!((seen.bytes, seen.payload_bytes), (sizes.bytes, sizes.payload_bytes));
    assert_eq!(seen.params as usize, artifact.stats().param_count);
    assert_eq!((seen.recipe_toml.as_str(), seen.quant.as_str()), (artifact.recipe_toml.as_str(), "int8"));
    assert_eq!(seen.notes, artifact.notes);
    assert_eq!((seen.vocabulary, seen.pieces), (269, 267));
    let codecs: Vec<Codec> = seen.sections.iter().map(|section| section.codec).collect();
    assert_eq!(codecs, [Codec::Brotli, Codec::Brotli, Codec::Brotli, Codec::Zstd]);
    let row = |name: &str| seen.tensors.iter().find(|row| row.name == name).unwrap();
    let brief = |name: &str| (row(name).shape.clone(), row(name).dtype.as_str(), row(name).bytes);
    assert_eq!(brief("tok_emb.weight"), (vec![257, 256], "int8/row", 257 * 256 + 2 * 257));
    assert_eq!(brief("conv.weight"), (vec![2, 200, 200], "int8/tensor", 80_004));
    assert_eq!(brief("blocks.1.attn_scale"), (vec![8], "f32", 32));
    assert_eq!(brief("blocks.1.small.weight"), (vec![8, 8], "f16", 128));
    assert_eq!(brief("steps"), (vec![], "i64", 8));
    assert_eq!(seen.tensors.iter().map(|row| row.bytes as u64).sum::<u64>(), sizes.payload_bytes);
    let names: Vec<&str> = artifact.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(seen.tensors.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), names);
}

#[test]
fn codes_of_every_width_and_packing_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.fwy");
    let mut rng = Rng(9);
    let live = [rng.tensor("w", &[256, 260], 0.0, 0.5), rng.tensor("cube", &[2, 200, 200], 0.0, 0.5)];
    let hessian = (0..260 * 260).map(|at| if at % 261 == 0 { 2.0 } else { 0.5 }).collect();
    let context = Context { hessians: [("w".to_owned(), hessian)].into(), ..Context::default() };
    let widths = (2..=8).map(|bits| {
        (bits, Export::Pr1607 { bits, mlp_bits: 0, search_clip: false, fp16_embed: false }, &live[..])
    });
    // By GPTQ without floors: codes that take up all of their bits.
    let solved = (2..=8).map(|bits| (10 + bits, Export::Own { bits }, &live[..1]));
    let packings = [Packing::TwoBits, Packing::FiveTrits];
    let packed =
        packings.into_iter().zip(9..).map(|(packing, i)| (i, Export::OwnTernary(packing), &live[..1]));
    let mut artifact = sample();
    for (number, export, live) in widths.chain(solved).chain(packed) {
        let quantized = quantize_by(export, live, &context).unwrap();
        let named = quantized.into_iter().map(|q| QuantTensor { name: format!("{number}.{}", q.name), ..q });
        artifact.tensors.extend(named);
    }
    for (name, codec) in Codec::ALL {
        artifact.write(&path, codec).unwrap();
        assert_eq!(Artifact::read(&path).unwrap(), artifact, "{name}");
    }
    let sizes = artifact.write(&path, Codec::Zlib).unwrap();
    let read = Artifact::read(&path).unwrap();
    let seen = Artifact::inspect(&path).unwrap();
    let dtype = |name: &str| seen.tensors.iter().find(|row| row.name == name).unwrap().dtype.as_str();
    assert_eq!(["2.w", "7.w", "18.w"].map(dtype), ["int2/row", "int7/row", "int8/row"]);
    assert_eq!(["5.cube", "9.w", "10.w"].map(dtype), ["int5/tensor", "ternary/2bit", "ternary/5trit"]);
    let scales = |name: &str| seen.tensors.iter().find(|row| row.name == name).unwrap().scales.clone();
    let rows = read.tensors.iter().find(|tensor| tensor.name == "2.w").unwrap().shape[0];
    assert_eq!(scales("2.w"), Some(format!("f16[{rows}]")));
    assert_eq!(["5.cube", "9.w"].map(scales), ["f32[]", "f64[]"].map(|label| Some(label.to_string())));
    let payload = artifact.stats().payload_bytes as u64;
    assert_eq!((sizes.payload_bytes, seen.payload_bytes), (payload, payload));
    assert_eq!(seen.tensors.iter().map(|row| row.bytes as u64).sum::<u64>(), payload);
    // Zlib takes codes of few bits as digits: two of 3 or 4 bits a byte, and so on.
    assert!(sizes.sections[3].2 < payload, "{} of {payload}", sizes.sections[3].2);
    for (tensor, number) in read.tensors.iter().rev().zip([10, 9]) {
        assert_eq!(tensor.name, format!("{number}.w"));
        assert_eq!(tensor.payload_bytes(), [256 * 260 / 4, 256 * 260 / 5][number - 9]);
        assert!(tensor.dequantize().is_ok());
    }
}

/// An artifact with nothing in it but what the test sets.
fn bare() -> Artifact {
    Artifact {
        recipe_toml: String::new(),
        quant: "int8".into(),
        notes: Default::default(),
        byte_table: ByteTableSection::default(),
        tokenizer_kind: "byte".into(),
        pieces: vec![],
        tensors: vec![],
    }
}

fn there_and_back(artifact: &Artifact) -> Artifact {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    artifact.write(&path, Codec::Brotli).unwrap();
    Artifact::read(&path).unwrap()
}

#[test]
fn vocabularies_of_all_sorts_come_back() {
    let (table, pieces) = vocabulary();
    let log_probabilities =
        pieces.iter().enumerate().map(|(i, p)| PieceRow { score: -(i as f32).sqrt(), ..p.clone() }).collect();
    let odd_table = ByteTableSection {
        base_bytes: (0..300).map(|i| if i % 7 == 0 { u16::MAX } else { i }).collect(),
        has_leading_space: (0..300).map(|i| i % 3 == 0).collect(),
        is_boundary: (0..300).map(|i| i % 5 == 0).collect(),
    };
    let extreme = [f32::MAX, f32::MIN, 1e-45, 16_777_216.0, -0.0].map(|score| PieceRow {
        text: " ▁ ".into(),
        score,
        kind: 4,
    });
    let cases = [
        bare(),
        Artifact { byte_table: table.clone(), ..bare() },
        Artifact { byte_table: table.clone(), pieces: log_probabilities, ..bare() },
        Artifact { byte_table: odd_table, pieces, ..bare() },
        Artifact { byte_table: table, pieces: extreme.to_vec(), ..bare() },
    ];
    for artifact in cases {
        assert_eq!(there_and_back(&artifact), artifact);
    }
}

#[test]
fn a_byte_table_that_follows_from_its_pieces_is_nearly_free() {
    let (byte_table, pieces) = vocabulary();
    let size = |artifact: Artifact| artifact.pack(Codec::Brotli).unwrap().1.sections[1].1;
    let mut altered = byte_table.clone();
    let mut rng = Rng(5);
    altered.base_bytes.iter_mut().for_each(|bytes| *bytes = rng.below(8) as u16);
    let follows = size(Artifact { byte_table, pieces: pieces.clone(), ..bare() });
    let unrelated = size(Artifact { byte_table: altered, pieces, ..bare() });
    assert!(follows + 80 < unrelated, "{follows} against {unrelated}");
}

/// Gaussian weights whose rows keep their full range, as a trained model's do: about 1 MB of codes in four roles.
fn gaussian(spread: f32) -> Vec<QuantTensor> {
    let mut rng = Rng(88);
    let mut tensors = Vec::new();
    for layer in 0..2 {
        for (role, shape, std) in [
            ("attn.c_q.weight", [256, 512], 0.4),
            ("attn.proj.weight", [256, 512], 0.7),
            ("mlp.fc.weight", [256, 512], 0.9),
            ("mlp.proj.weight", [512, 256], 0.5),
        ] {
            tensors.push(rng.tensor(&format!("blocks.{layer}.{role}"), &shape, 0.0, std * spread));
        }
        tensors.push(rng.tensor(&format!("blocks.{layer}.attn_scale"), &[512], 1.0, 0.2));
    }
    quantize(Scheme::Int8, &tensors, &CONTROL_PATTERNS.map(String::from)).unwrap()
}

/// Bytes that a perfect coder of independent symbols would need for the codes of each tensor.
fn entropy_bytes(tensors: &[QuantTensor]) -> f64 {
    let bits = |codes: &[u8]| -> f64 {
        let mut counts = [0u32; 256];
        codes.iter().for_each(|&code| counts[usize::from(code)] += 1);
        let n = codes.len() as f64;
        counts.iter().filter(|&&c| c > 0).map(|&c| f64::from(c) * (n / f64::from(c)).log2()).sum()
    };
    let codes = tensors.iter().filter(|t| t.storage == Storage::Int8Row).map(|t| bits(&t.parts[0].bytes));
    codes.sum::<f64>() / 8.0
}

#[test]
fn codecs_come_near_the_entropy_of_gaussian_codes() {
    println!("| weights | payload | entropy of codes | brotli | lzma | zstd | zlib | xz9 |");
    println!("|---|---|---|---|---|---|---|---|");
    for (weights, spread, limits) in [
        ("full range", 1.0, [1.015, 1.025, 1.02, 1.02, 1.025]),
        ("at the scale floor", 0.1, [1.03, 1.06, 1.04, 1.2, 1.06]),
    ] {
        let artifact = Artifact { tensors: gaussian(spread), ..bare() };
        let (payload, entropy) = (artifact.stats().payload_bytes, entropy_bytes(&artifact.tensors));
        let sizes = Codec::ALL.map(|(_, codec)| artifact.pack(codec).unwrap().1.bytes);
        println!(
            "| {weights} | {payload} | {entropy:.0} | {} | {} | {} | {} | {} |",
            sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
        );
        for (size, limit) in sizes.into_iter().zip(limits) {
            assert!((size as f64) < entropy * limit, "{size} of {entropy} at a limit of {limit}");
            assert!(size as f64 > entropy, "{size} is below the entropy {entropy}");
        }
        assert!(sizes[0] == *sizes.iter().min().unwrap(), "brotli, the default, is the smallest");
    }
}

#[test]
fn a_failed_write_leaves_the_older_artifact() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.fwy");
    let older = bare();
    older.write(&path, Codec::Zlib).unwrap();
    // The unfinished file cannot be created: a folder is in its place.
    std::fs::create_dir(files::beside(&path)).unwrap();
    let error = sample().write(&path, Codec::Zlib).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("model.fwy"), "{error}");
    assert_eq!(Artifact::read(&path).unwrap(), older);
    // A folder that is a file.
    let error = older.write(&path.join("below"), Codec::Zlib).unwrap_err();
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn content_that_no_reader_would_take_is_not_written() {
    let good = sample();
    let (_, pieces) = vocabulary();
    let with = |change: &dyn Fn(&mut Artifact)| {
        let mut artifact = good.clone();
        change(&mut artifact);
        artifact.pack(Codec::Zstd).unwrap_err()
    };
    let errors = [
        ("columns", with(&|a| a.byte_table.is_boundary.truncate(3))),
        ("no more pieces", with(&|a| a.byte_table = ByteTableSection::default())),
        ("kind 9", with(&|a| a.pieces[5].kind = 9)),
        ("score NaN", with(&|a| a.pieces[5].score = f32::NAN)),
        ("no more pieces", with(&|a| (0..9).for_each(|_| a.pieces.extend(pieces.clone())))),
        ("parts", with(&|a| a.tensors[0].parts.truncate(1))),
        ("two tensors", with(&|a| a.tensors[1] = a.tensors[0].clone())),
        ("control characters", with(&|a| a.tensors[0].name = "a\nb".into())),
        ("control characters", with(&|a| a.quant = "int8\u{1b}[2J".into())),
        (
            "9 dimensions",
            with(&|a| {
                let wide = HostTensor::from_f32("wide", &[1; 9], &[1.0]);
                a.tensors.extend(quantize(Scheme::Int8, &[wide], &[]).unwrap());
            }),
        ),
        ("at most 1024", with(&|a| a.notes.extend((0..2000).map(|i| (i.to_string(), String::new()))))),
        ("at most 8388608", with(&|a| a.recipe_toml = "x".repeat(9 << 20))),
    ];
    for (expected, error) in errors {
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "{error} without {expected}");
    }
}

#[test]
fn matrices_of_banks_come_back_as_the_model_has_them() {
    let recipe = Recipe {
        system: PR1382.into(),
        as_written: false,
        vocab_size: 260,
        num_layers: 5,
        mamba_layers: vec![0, 1, 4],
        model_dim: 24,
        num_heads: 4,
        num_kv_heads: 2,
        rope_dims: 4,
        mamba_d_state: 3,
        bigram_vocab_size: 29,
        bigram_dim: 8,
        mlp_type: "leaky_relu2".into(),
        ..Recipe::default()
    };
    let shapes = model::layout(&recipe).unwrap();
    assert!(shapes.iter().any(|(name, _)| name == "qo_bank"));
    let mut rng = Rng(6);
    let params: Vec<HostTensor> =
        shapes.iter().map(|(name, shape)| rng.tensor(name, shape, 0.0, 0.1)).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.fwy");
    // The challenge's int8 knows no banks; under the others their matrices are tensors of their own.
    for (scheme, is_split) in [(Scheme::Int8, false), (Scheme::Int(6), true), (Scheme::Ternary, true)] {
        let mut artifact = Artifact::assemble(&recipe, &Tokenizer::byte(), &params, scheme).unwrap();
        artifact.write(&path, Codec::Zlib).unwrap();
        let seen = Artifact::inspect(&path).unwrap();
        assert_eq!(seen.tensors.iter().any(|row| row.name == "blocks.0.attn.c_q.weight"), is_split);
        assert_eq!(layout(&recipe, &seen.tensors, "here").unwrap(), shapes, "{scheme}");
        let contents = Artifact::read(&path).unwrap().contents("here").unwrap();
        let read: Vec<_> = contents.params.into_iter().map(|param| (param.name, param.shape)).collect();
        assert_eq!(read, shapes, "{scheme}");
        // What is wrong with a weight names the file.
        let half = artifact.tensors.iter_mut().find(|tensor| tensor.storage == Storage::F16).unwrap();
        half.parts[0].bytes[..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
        let line = artifact.contents("here").unwrap_err().to_string();
        assert!(line.ends_with(", here, expected finite weights"), "{line}");
    }
}

#[test]
fn the_budget_adds_up() {
    let sizes = |bytes| Sizes { bytes, payload_bytes: 17_178_912, sections: [(Kind::Recipe, 0, 0); 4] };
    let code = code_bytes().unwrap();
    let shipped = shipped_bytes().unwrap();
    let at_cap = Budget::of(&sizes(16_000_000 - code)).unwrap();
    assert_eq!((at_cap.bytes_code, at_cap.bytes_code_all, at_cap.bytes_total), (code, shipped, 16_000_000));
    assert_eq!((at_cap.payload_bytes, at_cap.under_cap), (17_178_912, true));
    assert!(!Budget::of(&sizes(16_000_001 - code)).unwrap().under_cap);
    assert_eq!(shipped, std::fs::metadata(std::env::current_exe().unwrap()).unwrap().len());
    assert!(shipped > code);
}

#[test]
fn the_counted_source_is_the_source() {
    let files = source_files();
    let total: usize = files.iter().map(|(_, content)| content.len()).sum();
    let code = code_bytes().unwrap();
    println!("source: {} files, {total} bytes, packed {code}", files.len());
    assert!(code > 1000 && (code as usize) < total / 2);
    assert!(files.is_sorted_by(|(a, _), (b, _)| a < b));
    // What is counted is all of it: names and lengths on lines, then the contents, in one brotli stream.
    let line = |(name, content): &(&str, &[u8])| format!("{name}\n{}\n", content.len()).into_bytes();
    let joined: Vec<u8> = files.iter().flat_map(|file| [&line(file)[..], file.1].concat()).collect();
    let packed = Codec::Brotli.compress(&joined).unwrap();
    assert_eq!(packed.len() as u64, code);
    assert_eq!(Codec::Brotli.decompress(&packed, joined.len() as u64).unwrap(), joined);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in ["Cargo.toml", "build.rs", "src/error.rs", "src/quant/clip.rs", "src/artifact/budget.rs"] {
        let content = files.iter().find(|(file, _)| *file == name).map(|(_, content)| *content);
        assert_eq!(content, Some(&std::fs::read(root.join(name)).unwrap()[..]), "{name}");
    }
    // Nothing that is compiled in is left out.
    let mut folders = ["src", "wgsl", "cuda", "examples/recipes"].map(|folder| root.join(folder)).to_vec();
    let mut on_disk = 2;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_string_lossy().starts_with('.') {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                assert!(
                    files.iter().any(|(name, _)| root.join(name) == path),
                    "{} is not counted",
                    path.display()
                );
                on_disk += 1;
            }
        }
    }
    assert_eq!(files.len(), on_disk);
}
