//! Writes each target's seeds and dictionary.
//!
//! `seeds FOLDER` fills `FOLDER/artifact`, `shard`, `tokenizer` and `recipe`, and writes `FOLDER/artifact.dict` and so on.
//! `seeds --seal INPUT FILE` writes the artifact that the target of that name makes of an input, to be kept as a regression
//! test.

use fairway_fuzz::artifact::container::{Kind, Sealed, seal};
use fairway_fuzz::artifact::{Artifact, ByteTableSection, Codec, PieceRow, tensor_table, vocabulary};
use fairway_fuzz::data::shard::ShardWriter;
use fairway_fuzz::data::tokenizer::Tokenizer;
use fairway_fuzz::host::{HostTensor, HostType};
use fairway_fuzz::hostile::{input_of, input_of_raw, unsealed};
use fairway_fuzz::limits::with_file;
use fairway_fuzz::quant::ternary::Packing;
use fairway_fuzz::quant::{QuantTensor, Storage};
use fairway_fuzz::recipe::{Limit, Recipe, SYSTEMS, builtin, keys};
use std::fs;
use std::io::Result;
use std::path::Path;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, input, file] = arguments.as_slice()
        && flag == "--seal"
    {
        return fs::write(file, unsealed(&fs::read(input)?));
    }
    let folder = Path::new(arguments.last().map_or("fuzz/corpus", String::as_str));
    let targets = [
        ("artifact", artifacts(), artifact_words()),
        ("shard", shards()?, shard_words()),
        ("tokenizer", tokenizers(), tokenizer_words()),
        ("recipe", recipes(), recipe_words()),
    ];
    for (target, seeds, words) in targets {
        let place = folder.join(target);
        fs::create_dir_all(&place)?;
        for (index, seed) in seeds.iter().enumerate() {
            fs::write(place.join(format!("seed-{index:02}")), seed)?;
        }
        let quoted = |word: &Vec<u8>| {
            let bytes: String = word.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("\"{bytes}\"\n")
        };
        fs::write(folder.join(format!("{target}.dict")), words.iter().map(quoted).collect::<String>())?;
        println!("{}: {} seeds, {} words", place.display(), seeds.len(), words.len());
    }
    Ok(())
}

/// Every storage, in shapes that leave the last byte of a packing half full; with content that follows from an index.
fn tensors() -> Vec<QuantTensor> {
    let ints = (2..=7).flat_map(|bits| [Storage::IntRow(bits), Storage::IntTensor(bits)]);
    let others = [
        Storage::Raw,
        Storage::F32,
        Storage::F16,
        Storage::Int8Row,
        Storage::Int8Tensor,
        Storage::Ternary(Packing::TwoBits),
        Storage::Ternary(Packing::FiveTrits),
    ];
    let originals = [HostType::F32, HostType::BF16, HostType::F16, HostType::F64];
    let tensor = |(index, storage): (usize, Storage)| {
        let (shape, original) = ([3, 7], originals[index % originals.len()]);
        let name = format!("blocks.{index}.weight");
        let specs = storage.parts(original, &shape, &name, "seeds").expect("a good shape");
        let part = |spec: fairway_fuzz::quant::PartSpec| {
            let bytes = match (storage, spec.name) {
                (Storage::Ternary(packing), "codes") => {
                    packing.pack(&(0..21).map(|i| i % 3 - 1).collect::<Vec<i8>>())
                }
                (_, "codes") => (0..spec.bytes as i32).map(|i| ((i % 3 - 1) as i8).cast_unsigned()).collect(),
                _ => {
                    let one: &[u8] = match spec.dtype {
                        HostType::F64 => &[0, 0, 0, 0, 0, 0, 0xf0, 0x3f],
                        HostType::F32 => &[0, 0, 0x80, 0x3f],
                        HostType::BF16 => &[0x80, 0x3f],
                        _ => &[0, 0x3c],
                    };
                    one.repeat(spec.bytes / one.len())
                }
            };
            HostTensor { name: spec.name.into(), shape: spec.shape, dtype: spec.dtype, bytes }
        };
        let parts = specs.into_iter().map(part).collect();
        QuantTensor { name, shape: shape.to_vec(), original, storage, parts }
    };
    let mut tensors: Vec<QuantTensor> = others.into_iter().chain(ints).enumerate().map(tensor).collect();
    let integer = |name: &str, shape: &[usize], dtype: HostType, bytes: &[u8]| QuantTensor {
        name: name.into(),
        shape: shape.to_vec(),
        original: dtype,
        storage: Storage::Raw,
        parts: vec![HostTensor {
            name: "values".into(),
            shape: shape.to_vec(),
            dtype,
            bytes: bytes.to_vec(),
        }],
    };
    tensors.push(integer("steps", &[], HostType::I64, &[1; 8]));
    tensors.push(integer("empty", &[0, 4], HostType::U8, &[]));
    tensors
}

fn pieces() -> Vec<PieceRow> {
    let special = [("<pad>", 3), ("<s>", 3), ("</s>", 3), ("<unk>", 2), ("[X]", 4)];
    let words = ["▁t", "▁a", "in", "he", "the", "▁the", "é", "▁", "t", "h", "e", "a", "n", "i"];
    let special = special.iter().map(|&(text, kind)| PieceRow { text: text.into(), score: 0.0, kind });
    let words = words.iter().enumerate().map(|(rank, text)| PieceRow {
        text: (*text).into(),
        score: -(rank as f32),
        kind: 1,
    });
    special.chain(words).collect()
}

fn byte_table(pieces: &[PieceRow]) -> ByteTableSection {
    let text = |piece: &PieceRow| matches!(piece.kind, 1 | 4);
    ByteTableSection {
        base_bytes: pieces
            .iter()
            .map(|p| if text(p) { p.text.trim_start_matches('▁').len() as u16 } else { 0 })
            .collect(),
        has_leading_space: pieces.iter().map(|p| text(p) && p.text.starts_with('▁')).collect(),
        is_boundary: pieces.iter().map(|p| !text(p)).collect(),
    }
}

/// Whole models, compressed by each codec and not at all, and one for each storage by itself.
fn artifacts() -> Vec<Vec<u8>> {
    let string = |text: &str| {
        let mut bytes = vec![text.len() as u8 | 0x80, (text.len() >> 7) as u8];
        bytes.extend(text.bytes());
        bytes
    };
    let recipe = |toml: &str| [string(toml), string("int6"), vec![1], string("step"), string("100")].concat();
    let small = recipe("name = \"tiny\"\nnum_layers = 2\nmodel_dim = 64\nnum_heads = 2\nnum_kv_heads = 1\n");
    let whole = recipe(&Recipe::default().to_toml());
    let words = pieces();
    let sentencepiece = vocabulary::encode(&byte_table(&words), "sentencepiece", &words);
    let fractions: Vec<PieceRow> =
        words.iter().cloned().map(|p| PieceRow { score: p.score / 3.0, ..p }).collect();
    let fractions = vocabulary::encode(&byte_table(&fractions), "sentencepiece", &fractions);
    let table = ByteTableSection {
        base_bytes: vec![1; 260],
        has_leading_space: vec![false; 260],
        is_boundary: vec![false; 260],
    };
    let bytes = vocabulary::encode(&table, "byte", &[]);

    let mut seeds = Vec::new();
    let all = tensors();
    let encode = |tensors: &[QuantTensor]| tensor_table::encode(tensors, "seeds").expect("good tensors");
    let encoded = encode(&all);
    for (recipe, vocabulary) in [(&small, &sentencepiece), (&small, &fractions), (&whole, &bytes)] {
        seeds.extend(input_of_raw([recipe, vocabulary, &encoded.table, &encoded.data]));
    }
    for tensor in all.chunks(1) {
        let encoded = encode(tensor);
        seeds.extend(input_of_raw([&[0, 0, 0], &[0, 0, 0, 0], &encoded.table, &encoded.data]));
    }
    for (_, codec) in Codec::ALL {
        let sections = [
            (Kind::Recipe, &small),
            (Kind::Vocabulary, &sentencepiece),
            (Kind::TensorTable, &encoded.table),
            (Kind::TensorData, &encoded.data),
        ]
        .map(|(kind, raw)| Sealed::pack(kind, codec, raw, &[]).expect("a codec that works"));
        seeds.extend(input_of(&sections));
        seeds.push(seal(&sections));
    }
    for (index, seed) in seeds.iter().enumerate() {
        let artifact = with_file(&unsealed(seed), Artifact::read);
        artifact.unwrap_or_else(|error| panic!("artifact {index}: {error}"));
    }
    seeds
}

/// Numbers at the edges of a varint, codecs, storages and what else a section knows.
fn artifact_words() -> Vec<Vec<u8>> {
    let mut words: Vec<Vec<u8>> = vec![
        b"FAIRWAY\x01\x04".to_vec(),
        b"sentencepiece".to_vec(),
        b"byte".to_vec(),
        "▁".into(),
        vec![0x80],
        vec![0xff; 9],
        vec![0x80, 0x80, 0x80, 0x80, 8],
        vec![0xff, 0xff, 0xff, 0xff, 7],
        vec![0x80, 0x80, 1],
        vec![0, 0, 0xc0, 0x7f],
        vec![0, 0x7c],
    ];
    words.extend((1..=4).chain([5, 6, 7]).chain(12..=17).chain(22..=27).map(|number| vec![number, number]));
    words
}

fn shard_words() -> Vec<Vec<u8>> {
    [20_240_520i32, 1, -1, 0, i32::MAX, i32::MIN].map(|word| word.to_le_bytes().to_vec()).into()
}

/// Tags of the fields that are read, each with a short content.
fn tokenizer_words() -> Vec<Vec<u8>> {
    let mut words: Vec<Vec<u8>> = ["▁", "<unk>", "<s>", "<0x00>", "<0xFF>", "[X]"].map(Into::into).into();
    words.extend((1..=6).map(|kind| vec![0x18, kind]));
    words.extend([0x10, 0x18, 0x20, 0x28].into_iter().flat_map(|tag| [vec![tag, 0], vec![tag, 1]]));
    words.extend([
        vec![0x98, 2, 1],
        vec![0xc0, 1, 1],
        vec![0xe2, 2, 1, b'x'],
        vec![0xf2, 2, 1, b'x'],
        vec![0x0a, 5, 0x0a, 3, b'a', b'b', b'c'],
        vec![0x12, 2, 0x18, 2],
        vec![0x1a, 0],
        vec![0x2a, 0],
        vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
    ]);
    words
}

fn shards() -> Result<Vec<Vec<u8>>> {
    let path = std::env::temp_dir().join(format!("fairway-seed-{}", std::process::id()));
    let some: Vec<u16> = (0..300).map(|i| i * 37).collect();
    let mut seeds = Vec::new();
    for tokens in [&[1][..], &[1, 258, 65535], &[1, 259, 260, 1023, 1024], &some] {
        let mut writer = ShardWriter::create(&path).expect("a place for temporary files");
        writer.push(tokens).expect("few tokens");
        writer.finish().expect("a place for temporary files");
        seeds.push(fs::read(&path)?);
    }
    fs::remove_file(&path)?;
    Ok(seeds)
}

/// A field of a protocol-buffer message that holds bytes.
fn field(number: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2, body.len() as u8 | 0x80, (body.len() >> 7) as u8];
    bytes.extend(body);
    bytes
}

/// Models with and without byte pieces, with unused and user-defined pieces, and with a normaliser's rules.
fn tokenizers() -> Vec<Vec<u8>> {
    // `é` (c3 a9) to `e`: a double array of four blocks, most of it empty.
    let mut units = vec![0u32; 1024];
    let link = |label: u32, from: u32, to: u32, leaf: u32| label | leaf << 8 | (from ^ to) << 10;
    units[0] = link(0, 0, 256, 0);
    units[256 ^ 0xc3] = link(0xc3, 256 ^ 0xc3, 512, 0);
    units[512 ^ 0xa9] = link(0xa9, 512 ^ 0xa9, 768, 1);
    units[768] = 0x8000_0000 | 2;
    let mut rules = (4 * units.len() as u32).to_le_bytes().to_vec();
    rules.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
    rules.extend(b"x\0e\0");
    // The same in one block, short enough for a fuzzer to play with: `a` to `b`.
    let mut units = vec![0u32; 128];
    units[0] = link(0, 0, 1, 0);
    units[1 ^ 0x61] = link(0x61, 1 ^ 0x61, 2, 1);
    units[2] = 0x8000_0000 | 2;
    let mut short = (4 * units.len() as u32).to_le_bytes().to_vec();
    short.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
    short.extend("x\0b\0 c\0\0".bytes());

    let model = |byte_pieces: bool, unused: u8, rules: &[u8], switches: [u8; 3]| {
        let mut pieces = pieces();
        if unused > 0 {
            pieces[9].kind = unused;
            pieces.push(PieceRow { text: "[X][X]".into(), score: 0.0, kind: 4 });
        }
        if byte_pieces {
            let byte = |byte| PieceRow { text: format!("<0x{byte:02X}>"), score: 0.0, kind: 6 };
            pieces.extend((0..256).map(byte));
        }
        let mut file = Vec::new();
        for piece in pieces {
            let score = [&[0x15][..], &piece.score.to_le_bytes()].concat();
            file.extend(field(1, &[field(1, piece.text.as_bytes()), score, vec![0x18, piece.kind]].concat()));
        }
        file.extend(field(2, &[0x18, 2, 0x98, 2, byte_pieces.into()]));
        let mut normalizer = vec![0x18, switches[0], 0x20, switches[1], 0x28, switches[2]];
        if !rules.is_empty() {
            normalizer.extend(field(2, rules));
        }
        file.extend(field(3, &normalizer));
        file
    };
    let seeds = vec![
        model(false, 0, &[], [0, 1, 1]),
        model(false, 5, &[], [1, 0, 1]),
        model(false, 4, &[], [1, 1, 0]),
        model(true, 0, &[], [1, 1, 1]),
        model(true, 5, &short, [1, 1, 1]),
        model(false, 0, &short, [0, 0, 1]),
        model(false, 0, &rules, [1, 1, 1]),
    ];
    for (index, seed) in seeds.iter().enumerate() {
        Tokenizer::from_model_bytes(seed, "seed").unwrap_or_else(|error| panic!("{index}: {error}"));
    }
    seeds
}

/// The built-in recipes, each system's defaults in full, and their keys as `--set` and as environment names.
fn recipes() -> Vec<Vec<u8>> {
    let mut seeds: Vec<String> = builtin().iter().map(|built_in| built_in.toml.to_owned()).collect();
    for system in SYSTEMS {
        let recipe = Recipe { system: system.into(), ..Recipe::default() };
        // Without the meanings, which are most of it and all comment.
        let lines = recipe.to_toml();
        seeds.push(
            lines
                .lines()
                .map(|line| format!("{}\n", line.split(" # ").next().unwrap_or(line).trim()))
                .collect(),
        );
    }
    let recipe = Recipe::default();
    let mut environment = String::from("# as a launcher writes it\nexport DATA_PATH='./data' \\\n");
    for key in keys().iter().filter(|key| key.scope.holds(&recipe.system)) {
        if let Some(name) = key.env {
            environment.push_str(&format!("{name}=\"{}\"\n", text(key.value(&recipe))));
        }
    }
    seeds.push(environment);
    seeds.push(
        "base = \"pr1607\"\nrecur_layers = \"0-3,5\"\nattn_placement = \"1,2\"\nmodel_dim = 1_28\n".into(),
    );
    seeds.push(
        "recur_layers=0-3,5\ncontrol_tensor_name_patterns=[\"a\", 'b']\nmuon_momentum=0.9\nseed=1_0\n".into(),
    );
    for (index, seed) in seeds[..builtin().len() + SYSTEMS.len()].iter().enumerate() {
        let recipe = Recipe::from_toml(seed, Path::new("seed.toml"));
        recipe.unwrap_or_else(|error| panic!("recipe {index}: {error}"));
    }
    seeds.into_iter().map(String::into_bytes).collect()
}

/// Keys, environment names, the values of choices, and TOML's own words.
fn recipe_words() -> Vec<Vec<u8>> {
    let mut words: Vec<String> = keys().iter().map(|key| format!("\n{} = ", key.name)).collect();
    words.extend(keys().iter().filter_map(|key| key.env).map(|name| format!("\n{name}=")));
    for key in keys() {
        if let Limit::OneOf(values) = key.limit {
            words.extend(values.iter().map(|value| format!("\"{value}\"")));
        }
    }
    words.extend(builtin().iter().map(|built_in| format!("base = \"{}\"\n", built_in.name)));
    let other = [
        "true",
        "false",
        "inf",
        "-inf",
        "nan",
        "-1",
        "0x7fffffffffffffff",
        "9223372036854775808",
        "1e308",
        "1e-308",
        "0-65535",
        "0-11,15",
        "[[a]]",
        "[a.b]",
        "'''",
        "\"\"\"",
        "\\u0000",
        "\\U0010ffff",
        "1979-05-27T07:32:00Z",
        "{a = 1}",
        "export ",
        "\\\n",
        "$",
        "\r\n",
        "\u{feff}",
    ];
    words.extend(other.map(String::from));
    words.sort();
    words.dedup();
    words.into_iter().map(String::into_bytes).collect()
}

fn text(value: fairway_fuzz::recipe::Value) -> String {
    use fairway_fuzz::recipe::Value::{Bool, Float, Int, Layers, List, Text};
    match value {
        Bool(v) => v.to_string(),
        Int(v) => v.to_string(),
        Float(v) => v.to_string(),
        Text(v) => v,
        List(v) => v.join(","),
        Layers(v) => v.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
    }
}
