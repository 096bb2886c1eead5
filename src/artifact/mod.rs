//! The artifact: one self-contained file with everything that scoring and sampling need, checked to the last bit.
//!
//! [`container`] is the file's frame, [`codec`] its compressors, [`vocabulary`] and [`tensor_table`] what the sections
//! hold, [`arrange`] how the tensors' bytes lie. `assemble` makes an artifact of a model and a model of an artifact, `fit`
//! fits one into a budget, `budget` counts the bytes against the challenge's cap. Nothing in a file is ever executed, and no
//! length in it is believed before it is checked.

pub mod arrange;
// The fuzz targets compile the readers alone, without models and their tensors (`fuzz/src/lib.rs`).
#[cfg(not(fuzzing))]
pub mod assemble;
#[cfg(not(fuzzing))]
pub mod budget;
pub mod codec;
pub mod container;
#[cfg(not(fuzzing))]
pub mod fit;
pub mod tensor_table;
pub mod vocabulary;
mod wire;

#[cfg(not(fuzzing))]
pub use budget::{Budget, CAP_BYTES};
pub use codec::Codec;
pub use container::{Section, is_artifact};
#[cfg(not(fuzzing))]
pub use fit::{Fitted, Limit, fit};
pub use vocabulary::{ByteTableSection, PieceRow};

use crate::error::{Error, Result};
use crate::files;
use crate::quant::{QuantTensor, Stats};
use arrange::Arrangement;
use container::{Container, Kind, MAX_FILE_BYTES, Sealed};
use std::collections::BTreeMap;
use std::io::{Read, sink};
use std::path::Path;
use wire::{Cursor, put_str, put_varint};

/// The most notes that an artifact can hold.
const MAX_NOTES: usize = 1024;

/// A compressed model, in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Artifact {
    /// The resolved recipe, as TOML.
    pub recipe_toml: String,
    /// The quantisation scheme's name ([`crate::quant::Scheme`]).
    pub quant: String,
    /// Anything else worth keeping, by name (the step that it was trained to, the tokenizer's switches).
    pub notes: BTreeMap<String, String>,
    /// What bits-per-byte needs of the token ids.
    pub byte_table: ByteTableSection,
    /// Which tokenizer the pieces belong to.
    pub tokenizer_kind: String,
    /// The tokenizer's pieces, by id; none for a tokenizer that needs none.
    pub pieces: Vec<PieceRow>,
    /// The weights, in the model's order.
    pub tensors: Vec<QuantTensor>,
}

/// Sizes of an artifact that was packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// The file's size.
    pub bytes: u64,
    /// The tensors' parts before compression, as the systems count them ([`crate::quant::Storage::payload_bytes`]).
    pub payload_bytes: u64,
    /// Bytes in the file, and before compression, of each section.
    pub sections: [(Kind, u64, u64); Kind::ALL.len()],
}

/// One tensor as `inspect` shows it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TensorRow {
    /// The tensor's name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// How it is stored ([`crate::quant::Storage::label`]); a raw tensor's element type.
    pub dtype: String,
    /// Element type and sizes of its scales, as `f16[512]`; none where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scales: Option<String>,
    /// Bytes of its parts before compression, as the systems count them ([`crate::quant::Storage::payload_bytes`]).
    pub bytes: usize,
}

/// What a file is, without its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// The file's size.
    pub bytes: u64,
    /// The tensors' parts before compression, as the systems count them ([`crate::quant::Storage::payload_bytes`]).
    pub payload_bytes: u64,
    /// Elements of all tensors.
    pub params: u64,
    /// The resolved recipe, as TOML.
    pub recipe_toml: String,
    /// The quantisation scheme's name.
    pub quant: String,
    /// Notes by name.
    pub notes: BTreeMap<String, String>,
    /// Which tokenizer it has.
    pub tokenizer_kind: String,
    /// Token ids in the byte table.
    pub vocabulary: usize,
    /// Pieces of the tokenizer.
    pub pieces: usize,
    /// The tensors, in the model's order.
    pub tensors: Vec<TensorRow>,
    /// The file's sections.
    pub sections: [Section; Kind::ALL.len()],
}

impl Artifact {
    /// The file's bytes, the weights compressed by `codec` (the small tables always by brotli, whose built-in
    /// dictionary suits them).
    ///
    /// # Errors
    /// Content that a reader would refuse (columns of different lengths, parts that do not fit a shape, a name used
    /// twice, more than the caps), and a codec that fails.
    pub fn pack(&self, codec: Codec) -> Result<(Vec<u8>, Sizes)> {
        self.pack_arranged(codec, &tensor_table::arrange(&self.tensors, codec)?)
    }

    /// The same with an arrangement for each part ([`tensor_table::arrange`]), half of the work.
    pub fn pack_arranged(&self, codec: Codec, arrangements: &[Arrangement]) -> Result<(Vec<u8>, Sizes)> {
        let place = "the artifact to be written";
        vocabulary::check(&self.byte_table, &self.pieces, place)?;
        let recipe = self.recipe_section();
        read_recipe(&recipe, place)?;
        let vocabulary = vocabulary::encode(&self.byte_table, &self.tokenizer_kind, &self.pieces);
        let tensor_table::Encoded { table, data, cuts } =
            tensor_table::encode_arranged(&self.tensors, arrangements, place)?;
        let sealed = [
            Sealed::pack(Kind::Recipe, Codec::Brotli, &recipe, &[])?,
            Sealed::pack(Kind::Vocabulary, Codec::Brotli, &vocabulary, &[])?,
            Sealed::pack(Kind::TensorTable, Codec::Brotli, &table, &[])?,
            Sealed::pack(Kind::TensorData, codec, &data, &cuts)?,
        ];
        let file = container::seal(&sealed);
        if file.len() as u64 > MAX_FILE_BYTES {
            return Err(Error::input(
                format!("an artifact of {} bytes", file.len()),
                place,
                format!("at most {MAX_FILE_BYTES} bytes"),
            ));
        }
        let sizes = Sizes {
            bytes: file.len() as u64,
            payload_bytes: self.stats().payload_bytes as u64,
            sections: std::array::from_fn(|i| {
                (Kind::ALL[i], sealed[i].stored.len() as u64, u64::from(sealed[i].raw_len))
            }),
        };
        Ok((file, sizes))
    }

    /// Packs and writes the file; an older file stays until the new one is complete.
    pub fn write(&self, path: &Path, codec: Codec) -> Result<Sizes> {
        let (file, sizes) = self.pack(codec)?;
        files::write_atomic(path, &file)?;
        Ok(sizes)
    }

    /// Reads a file, every checksum verified first.
    ///
    /// # Errors
    /// Exit status 2 for whatever is wrong with the bytes; memory stays below twice [`container::MAX_RAW_BYTES`] and
    /// a decoder's window, and near what the file really holds.
    pub fn read(path: &Path) -> Result<Self> {
        let (container, head) = Head::open(path)?;
        let Head { recipe, byte_table, tokenizer_kind, pieces, table } = head;
        let mut data = container.stream(Kind::TensorData)?;
        let tensors = table.read_data(|len| {
            data.read_vec(len).map_err(|error| container.broken(Kind::TensorData, &error))
        })?;
        data.finish().map_err(|error| container.broken(Kind::TensorData, &error))?;
        let Recipe { recipe_toml, quant, notes } = recipe;
        Ok(Self { recipe_toml, quant, notes, byte_table, tokenizer_kind, pieces, tensors })
    }

    /// Reads all of a file but keeps no weights: verifies every checksum, and that the data decompresses to what the
    /// table says. Stays below 512 MiB of memory whatever the file holds.
    pub fn inspect(path: &Path) -> Result<Inspection> {
        let (container, head) = Head::open(path)?;
        let mut data = container.stream(Kind::TensorData)?;
        let data_bytes = container.section(Kind::TensorData).raw_len;
        std::io::copy(&mut data.by_ref().take(data_bytes), &mut sink())
            .and_then(|len| if len == data_bytes { data.finish() } else { Err(codec::short()) })
            .map_err(|error| container.broken(Kind::TensorData, &error))?;
        let tensors: Vec<TensorRow> = head
            .table
            .entries
            .iter()
            .map(|entry| TensorRow {
                name: entry.name.clone(),
                shape: entry.shape.clone(),
                dtype: entry.dtype_label(),
                scales: entry.scales_label(),
                bytes: entry.payload_bytes(),
            })
            .collect();
        Ok(Inspection {
            bytes: container.bytes,
            payload_bytes: head.table.entries.iter().map(|entry| entry.payload_bytes() as u64).sum(),
            params: head.table.entries.iter().map(|entry| entry.numel() as u64).sum(),
            recipe_toml: head.recipe.recipe_toml,
            quant: head.recipe.quant,
            notes: head.recipe.notes,
            tokenizer_kind: head.tokenizer_kind,
            vocabulary: head.byte_table.base_bytes.len(),
            pieces: head.pieces.len(),
            tensors,
            sections: container.sections,
        })
    }

    /// What the challenge's exporter counts.
    pub fn stats(&self) -> Stats {
        Stats::of(&self.tensors)
    }

    fn recipe_section(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_str(&mut out, &self.recipe_toml);
        put_str(&mut out, &self.quant);
        put_varint(&mut out, self.notes.len() as u64);
        for (name, note) in &self.notes {
            put_str(&mut out, name);
            put_str(&mut out, note);
        }
        out
    }
}

struct Recipe {
    recipe_toml: String,
    quant: String,
    notes: BTreeMap<String, String>,
}

fn read_recipe(bytes: &[u8], place: &str) -> Result<Recipe> {
    let mut cursor = Cursor::new(bytes, "recipe", place);
    let recipe_toml = cursor.str("recipe")?.to_owned();
    let quant = cursor.str("quantisation")?;
    let quant = cursor.line("quantisation", quant)?.to_owned();
    let count = cursor.count("notes", MAX_NOTES)?;
    let mut notes = BTreeMap::new();
    for _ in 0..count {
        let name = cursor.str("name of a note")?.to_owned();
        let note = cursor.str("note")?.to_owned();
        if let Some(name) = notes.insert(name.clone(), note).map(|_| name) {
            return Err(cursor.bad(format!("two notes named {name}"), "names that differ"));
        }
    }
    cursor.finish()?;
    Ok(Recipe { recipe_toml, quant, notes })
}

/// Everything but the tensors' data.
struct Head {
    recipe: Recipe,
    byte_table: ByteTableSection,
    tokenizer_kind: String,
    pieces: Vec<PieceRow>,
    table: tensor_table::TensorTable,
}

impl Head {
    fn open(path: &Path) -> Result<(Container, Self)> {
        let container = Container::open(path)?;
        let place = path.display().to_string();
        let recipe = read_recipe(&container.table(Kind::Recipe)?, &place)?;
        let (byte_table, tokenizer_kind, pieces) =
            vocabulary::decode(&container.table(Kind::Vocabulary)?, &place)?;
        let data_len = container.section(Kind::TensorData).raw_len;
        let table = tensor_table::decode(&container.table(Kind::TensorTable)?, data_len, &place)?;
        Ok((container, Self { recipe, byte_table, tokenizer_kind, pieces, table }))
    }
}
