//! What is demanded of every reader, whatever it is given: no panic, no memory beyond its limit, an error of one line
//! and exit status 2, and of what is accepted, that it can be used and is written back as it was.

use crate::artifact::container::{Kind, MAGIC, Sealed, seal};
use crate::artifact::{Artifact, Codec, PieceRow, tensor_table, vocabulary};
use crate::data::shard::{HEADER_BYTES, Shard};
use crate::data::tokenizer::{Piece, PieceKind, Tokenizer};
use crate::error::Result;
use crate::limits::{with_file, within};
use crate::recipe::{Recipe, keys};
use std::io::Write;
use std::path::Path;

/// What a reader may hold for an input of a few kilobytes: brotli's window is 16 MiB, and what it decompresses to at most
/// [`MOST_RAW`].
const MEMORY: usize = 96 << 20;
/// The most that a section of an unsealed artifact can be declared to hold, in bytes: three bytes hold it.
const MOST_RAW: u32 = 1 << 24;
/// The largest tensor that is dequantised, in elements.
const MOST_ELEMENTS: usize = 1 << 20;

/// Checks the error and drops it.
fn good<T>(result: Result<T>) -> Option<T> {
    let error = match result {
        Ok(value) => return Some(value),
        Err(error) => error,
    };
    let line = error.to_string();
    assert_eq!(error.exit_code(), 2, "{line}");
    assert!(!line.contains(char::is_control), "{line:?}");
    assert!(line.len() < 4096, "{line}");
    None
}

/// An artifact's file from a fuzzer's input, which cannot make checksums true: a file as it is, or, for each section, a byte
/// (codec in the lower half; the highest bit: the bytes are to be compressed), the length after decompression (3 bytes,
/// little-endian, only of bytes that are compressed already), the length here (2 bytes, little-endian), the bytes. The last
/// section has no length: it takes the rest.
pub fn unsealed(input: &[u8]) -> Vec<u8> {
    if input.starts_with(&MAGIC) {
        return input.to_vec();
    }
    let mut rest = input;
    let mut take = |len: usize| {
        let (taken, after) = rest.split_at(len.min(rest.len()));
        rest = after;
        taken
    };
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |number, &byte| number << 8 | u32::from(byte));
    let sections = Kind::ALL.map(|kind| {
        let form = number(take(1)) as u8;
        let declared = if form & 0x80 == 0 { number(take(3)) } else { 0 };
        let len = if kind == Kind::TensorData { usize::MAX } else { number(take(2)) as usize };
        let bytes = take(len);
        if form & 0x80 == 0 {
            return Sealed { kind: kind.id(), codec: form & 0xf, raw_len: declared, stored: bytes.to_vec() };
        }
        Sealed {
            kind: kind.id(),
            codec: Codec::Zlib.id(),
            raw_len: bytes.len() as u32,
            stored: stored(bytes),
        }
    });
    seal(&sections)
}

/// The input from which [`unsealed`] makes a file of these sections; `None` for a section that is too long.
pub fn input_of(sections: &[Sealed]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for section in sections {
        (section.raw_len < MOST_RAW).then_some(())?;
        out.push(section.codec);
        out.extend(&section.raw_len.to_le_bytes()[..3]);
        if section.kind != Kind::TensorData.id() {
            out.extend(u16::try_from(section.stored.len()).ok()?.to_le_bytes());
        }
        out.extend(&section.stored);
    }
    Some(out)
}

/// The input from which [`unsealed`] makes a file of these sections before compression.
pub fn input_of_raw(sections: [&[u8]; Kind::ALL.len()]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for (kind, bytes) in Kind::ALL.iter().zip(sections) {
        out.push(0x80);
        if *kind != Kind::TensorData {
            out.extend(u16::try_from(bytes.len()).ok()?.to_le_bytes());
        }
        out.extend(bytes);
    }
    Some(out)
}

/// A zlib stream that compresses nothing, and so costs nothing.
fn stored(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::none());
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

/// An artifact's file through both readers.
pub fn artifact(file: &[u8]) {
    with_file(file, |path| {
        let inspection = within(MEMORY, || good(Artifact::inspect(path)));
        let artifact = within(MEMORY, || good(Artifact::read(path)));
        let (inspection, artifact) = match (inspection, artifact) {
            (Some(inspection), Some(artifact)) => (inspection, artifact),
            // What no code is written as, only the reader of the weights finds.
            (None | Some(_), None) => return,
            (None, Some(_)) => panic!("inspect refuses what is read"),
        };
        let stats = artifact.stats();
        assert_eq!(inspection.params as usize, stats.param_count);
        assert_eq!(inspection.payload_bytes as usize, stats.payload_bytes);
        for tensor in artifact.tensors.iter().filter(|t| t.shape.iter().product::<usize>() <= MOST_ELEMENTS) {
            if let Some(weights) = good(tensor.dequantize()) {
                assert_eq!(weights.shape, tensor.shape);
            }
        }
        let encoded = tensor_table::encode(&artifact.tensors, "again").expect("what was read can be written");
        let mut data = encoded.data.as_slice();
        let table = tensor_table::decode(&encoded.table, data.len() as u64, "again").expect("written");
        let tensors = table.read_data(|len| {
            let (part, rest) = data.split_at(len as usize);
            data = rest;
            Ok(part.to_vec())
        });
        assert!(tensors.expect("written") == artifact.tensors);
        let words = vocabulary::encode(&artifact.byte_table, &artifact.tokenizer_kind, &artifact.pieces);
        let (byte_table, kind, pieces) = vocabulary::decode(&words, "again").expect("written");
        assert!((byte_table, &kind) == (artifact.byte_table, &artifact.tokenizer_kind));
        assert!(pieces == artifact.pieces);
        let piece = |PieceRow { text, score, kind }: PieceRow| {
            let kind = PieceKind::from_code(kind.into()).expect("checked on reading");
            Piece { text, score, kind }
        };
        let pieces = pieces.into_iter().map(piece).collect();
        if let Some(tokenizer) = good(Tokenizer::from_pieces(&kind, pieces, "hostile")) {
            encodes(&tokenizer, &artifact.recipe_toml);
        }
        if let Some(recipe) = good(Recipe::from_toml(&artifact.recipe_toml, Path::new("hostile"))) {
            is_used(&recipe);
        }
    });
}

/// A shard's file.
pub fn shard(file: &[u8]) {
    with_file(file, |path| {
        within(MEMORY, || {
            let Some(shard) = good(Shard::open(path)) else { return };
            let tokens = shard.tokens();
            assert_eq!(HEADER_BYTES + 2 * tokens.len(), file.len());
            let bytes =
                file[HEADER_BYTES..].chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
            assert!(tokens.iter().copied().eq(bytes));
            assert_eq!(shard.file_bytes(), file);
            for vocab in [1, 260, 1024, 1 << 16] {
                let fits = tokens.iter().all(|id| usize::from(*id) < vocab);
                assert_eq!(good(shard.check_vocab(vocab)).is_some(), fits);
            }
            assert_eq!(shard.count(1), tokens.iter().filter(|id| **id == 1).count() as u64);
        });
    });
}

/// A tokenizer's model file.
pub fn tokenizer(file: &[u8]) {
    within(MEMORY, || {
        let Some(tokenizer) = good(Tokenizer::from_model_bytes(file, "hostile.model")) else { return };
        // Texts of its own pieces, and whatever else the file holds.
        let mut text: String = tokenizer.pieces().iter().take(64).map(|piece| piece.text.as_str()).collect();
        text.push_str(&String::from_utf8_lossy(&file[..file.len().min(2048)]));
        encodes(&tokenizer, &text);
        encodes(
            &tokenizer,
            "  The cat\u{a0}sat\t\u{2581}on\u{2581}\u{2581} the \u{fb01}\u{301} mat. \u{1f408}\r\n ",
        );
        encodes(&tokenizer, "");
    });
}

/// A tokenizer's ids are its own, and it decodes any.
fn encodes(tokenizer: &Tokenizer, text: &str) {
    let ids = tokenizer.encode(text);
    assert!(ids.iter().all(|id| usize::from(*id) < tokenizer.vocab_size()));
    let _ = tokenizer.decode(&ids);
    let _ = tokenizer.normalize(text);
    let all: Vec<u16> = (0..tokenizer.vocab_size().min(1 << 10) as u16).chain([u16::MAX]).collect();
    let _ = tokenizer.decode(&all);
    all.iter().for_each(|id| drop(tokenizer.decode_piece(*id)));
    assert!(usize::from(tokenizer.bos()) < tokenizer.vocab_size());
}

/// A recipe's file, as TOML, as a file of environment names, and each of its lines as `--set` takes it.
pub fn recipe(file: &[u8]) {
    within(MEMORY, || {
        let read = with_file(file, |path| {
            let mut recipe = Recipe::default();
            let read = good(recipe.apply_env_file(path)).is_some();
            if recipe != Recipe::default() {
                assert!(read, "changed by a file that it refuses");
                is_used(&recipe);
            }
            std::fs::read_to_string(path)
        });
        let Ok(text) = read else { return };
        if let Some(recipe) = good(Recipe::from_toml(&text, Path::new("hostile.toml"))) {
            is_used(&recipe);
        }
        let mut recipe = Recipe::default();
        // Few, as each that names no key is compared with every key.
        for line in text.lines().take(4) {
            let before = recipe.clone();
            if good(recipe.set(line)).is_none() {
                assert!(recipe == before, "changed by a value that it refuses");
            }
        }
        if recipe != Recipe::default() {
            is_used(&recipe);
        }
    });
}

/// A recipe that was read is written and read again as it was, and what follows from a valid one can be asked.
fn is_used(recipe: &Recipe) {
    let text = recipe.to_toml();
    let again = Recipe::from_toml(&text, Path::new("again.toml")).expect("what was written is read");
    assert!(again == *recipe, "{text}");
    for key in keys() {
        assert!(key.admits(&key.value(recipe)), "{}", key.name);
    }
    if good(recipe.validate()).is_none() {
        return;
    }
    assert!(recipe.head_dim() >= 2 && recipe.mlp_dim() > 0 && recipe.span_tokens() > 0);
    assert!(recipe.val_batch_tokens() > 0 && recipe.val_seq_len() > 0 && recipe.kv_dim() > 0);
    assert!(recipe.attention_layers().iter().all(|layer| *layer < recipe.num_layers));
    let mut settled = recipe.clone();
    settled.settle_recurrence(3);
    assert_eq!(recipe.recurs_at(2), settled.recurs_at(0));
    let _ = (recipe.muon_decay(), recipe.adam_decay(), recipe.token_lr(), recipe.wallclock_cap());
}
