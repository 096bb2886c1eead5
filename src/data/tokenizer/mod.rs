//! Tokenizers: SentencePiece BPE models in pure Rust, id for id, and plain bytes.
//!
//! `fixtures/tokenize` and SentencePiece itself (0.2) are the references.

mod bpe;
mod byte;
mod hash;
mod model_file;
mod normalizer;
mod prefix;
mod vocabulary;

use crate::error::{Error, Result};
use bpe::Bpe;
use model_file::ModelFile;
use normalizer::Normalizer;
use sha2::{Digest, Sha256};
use std::fmt;
use std::io::Read;
use std::path::Path;
use vocabulary::Vocabulary;

/// U+2581, which stands for a space in pieces and in normalised text.
const SPACE: &str = "\u{2581}";
/// SentencePiece's default for what the unknown piece decodes to.
const UNK_SURFACE: &str = " \u{2047} ";
/// SentencePiece's default name of the piece that begins a document.
const BOS_PIECE: &str = "<s>";
/// Token ids are 16 bits wide.
const MAX_PIECES: usize = 1 << 16;
/// SentencePiece's trainer makes pieces of at most 16 characters unless told otherwise.
const MAX_PIECE_BYTES: usize = 256;
/// The largest of the challenge's models has 370,952 bytes.
const MAX_MODEL_BYTES: u64 = 32 << 20;

/// What a piece is, with SentencePiece's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PieceKind {
    /// Text that merges made.
    Normal = 1,
    /// Stands for text that no other piece covers.
    Unknown = 2,
    /// Never in a text: begin and end of a document, padding.
    Control = 3,
    /// Matched in a text before any merging.
    UserDefined = 4,
    /// Merged, then split again: never an id of a text.
    Unused = 5,
    /// One byte of a character that is no piece.
    Byte = 6,
}

impl PieceKind {
    /// The kind that SentencePiece numbers `code`.
    pub fn from_code(code: u64) -> Option<Self> {
        Some(match code {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// SentencePiece's number of this kind.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// One entry of a vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Its text, with U+2581 for a space; `<0xNN>` for a byte, a name for a control piece.
    pub text: String,
    /// Pairs that join to a piece of a higher score merge first.
    pub score: f32,
    /// What it is.
    pub kind: PieceKind,
}

/// Turns text into token ids and back. Immutable, so that threads share one by reference or `Arc`.
pub struct Tokenizer {
    pieces: Vec<Piece>,
    bos: u16,
    sha256: Option<String>,
    /// `None`: plain bytes.
    sentencepiece: Option<SentencePiece>,
}

/// What a SentencePiece model adds to its pieces.
struct SentencePiece {
    vocabulary: Vocabulary,
    normalizer: Normalizer,
    bpe: Bpe,
    leading_space: LeadingSpace,
    unk_surface: String,
}

/// What decoding does with U+2581 at the begin of a text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LeadingSpace {
    /// Keeps it: the normaliser adds and removes none.
    Keep,
    /// Drops one, which the normaliser added.
    DropOne,
    /// Drops every one: the normaliser leaves none there.
    DropAll,
}

impl Tokenizer {
    /// The tokenizer that a flag or recipe names: `byte`, or a path to a SentencePiece `.model` file.
    ///
    /// Errors (input): the file cannot be read, is larger than 32 MiB, or is refused by
    /// [`Tokenizer::from_model_bytes`].
    pub fn load(spec: &str) -> Result<Self> {
        if spec == "byte" {
            return Ok(Self::byte());
        }
        let path = Path::new(spec);
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_MODEL_BYTES + 1).read_to_end(&mut bytes))
            .map_err(|error| Error::read(path, &error))?;
        if bytes.len() as u64 > MAX_MODEL_BYTES {
            return Err(Error::input(
                "file too large",
                path.display(),
                "a SentencePiece model of at most 32 MiB",
            ));
        }
        Self::from_model_bytes(&bytes, spec)
    }

    /// The challenge's byte260 tokenizer: id = byte + 4; 0 pad, 1 bos, 2 eos, 3 unk. No normalisation.
    pub fn byte() -> Self {
        Self { pieces: byte::pieces(), bos: 1, sha256: None, sentencepiece: None }
    }

    /// A SentencePiece model (`ModelProto`) of type BPE, as in spec/challenge.md section 2; `place` names it in errors.
    ///
    /// Errors (input): damaged bytes, another model type, options that would change the ids in ways not
    /// implemented here (whitespace as a suffix, a denormaliser), no unknown or no begin-of-document piece,
    /// more than 65,536 pieces.
    pub fn from_model_bytes(bytes: &[u8], place: &str) -> Result<Self> {
        let model = ModelFile::parse(bytes, place)?;
        let vocabulary = Vocabulary::new(&model.pieces, &model.bos_piece, place)?;
        if vocabulary.bytes.is_some() != model.byte_fallback {
            let what = format!("byte_fallback is {} against the pieces", model.byte_fallback);
            return Err(Error::input(what, place, "byte pieces exactly with byte_fallback"));
        }
        let normalizer = Normalizer::new(
            model.precompiled_charsmap,
            model.add_dummy_prefix,
            model.remove_extra_whitespaces,
            model.escape_whitespaces,
            &vocabulary.user_defined,
            place,
        )?;
        let leading_space = match (model.remove_extra_whitespaces, model.add_dummy_prefix) {
            (true, _) => LeadingSpace::DropAll,
            (false, true) => LeadingSpace::DropOne,
            (false, false) => LeadingSpace::Keep,
        };
        let digest = Sha256::digest(bytes);
        let sha256 = Some(digest.iter().map(|byte| format!("{byte:02x}")).collect());
        let unk_surface = model.unk_surface;
        Ok(Self::assemble(model.pieces, vocabulary, normalizer, leading_space, unk_surface, sha256))
    }

    /// A tokenizer from the pieces that an artifact carries. `kind` is what [`Tokenizer::kind`] said.
    ///
    /// There are no normaliser's rules: text is taken as already normalised, except that a space becomes U+2581.
    /// A begin-of-document piece is the control piece `<s>`.
    ///
    /// Errors (input): an unknown kind, or pieces that are no vocabulary of that kind.
    pub fn from_pieces(kind: &str, pieces: Vec<Piece>, place: &str) -> Result<Self> {
        match kind {
            "byte" if pieces == byte::pieces() => Ok(Self::byte()),
            "byte" => Err(Error::input("other pieces than the byte tokenizer's", place, "its 260 pieces")),
            "sentencepiece" => {
                let vocabulary = Vocabulary::new(&pieces, BOS_PIECE, place)?;
                let normalizer = Normalizer::escape_only(&vocabulary.user_defined);
                let drop_all = LeadingSpace::DropAll;
                Ok(Self::assemble(pieces, vocabulary, normalizer, drop_all, UNK_SURFACE.into(), None))
            }
            _ => Err(Error::input(format!("tokenizer kind {kind:?}"), place, "sentencepiece or byte")),
        }
    }

    fn assemble(
        pieces: Vec<Piece>,
        vocabulary: Vocabulary,
        normalizer: Normalizer,
        leading_space: LeadingSpace,
        unk_surface: String,
        sha256: Option<String>,
    ) -> Self {
        let bpe = Bpe::new(&pieces, &vocabulary);
        let bos = vocabulary.bos;
        let sentencepiece = Some(SentencePiece { vocabulary, normalizer, bpe, leading_space, unk_surface });
        Self { pieces, bos, sha256, sentencepiece }
    }

    /// `sentencepiece` or `byte`.
    pub fn kind(&self) -> &'static str {
        if self.sentencepiece.is_some() { "sentencepiece" } else { "byte" }
    }

    /// The vocabulary in id order; for `byte`, three control pieces, the unknown one and 256 byte pieces.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The id that begins a document.
    pub fn bos(&self) -> u16 {
        self.bos
    }

    /// SHA-256 of the model file in hexadecimal, where there was one.
    pub fn sha256(&self) -> Option<&str> {
        self.sha256.as_deref()
    }

    /// The ids of a text, without a begin-of-document id.
    pub fn encode(&self, text: &str) -> Vec<u16> {
        let mut out = Vec::with_capacity(text.len() / 2);
        self.encode_into(text, &mut out);
        out
    }

    /// Appends the ids of a text to `out`, without a begin-of-document id.
    pub fn encode_into(&self, text: &str, out: &mut Vec<u16>) {
        match &self.sentencepiece {
            None => byte::encode_into(text, out),
            Some(model) => {
                let normalized = model.normalizer.normalize(text, &model.vocabulary.user_defined);
                model.bpe.encode_into(&normalized, &model.vocabulary, out);
            }
        }
    }

    /// The text that [`Tokenizer::encode`] stands for: after the normaliser, U+2581 shown as a space.
    pub fn normalize(&self, text: &str) -> String {
        match &self.sentencepiece {
            None => text.to_owned(),
            Some(model) => {
                model.normalizer.normalize(text, &model.vocabulary.user_defined).replace(SPACE, " ")
            }
        }
    }

    /// The bytes that `ids` stand for, as SentencePiece decodes them but for one thing: byte pieces give their
    /// bytes as they are, also where they form no UTF-8 (SentencePiece puts U+FFFD there).
    ///
    /// Control pieces and ids beyond the vocabulary give nothing; the unknown piece gives the model's surface
    /// for it (` ⁇ `). As in SentencePiece, leading spaces are dropped where the normaliser drops or adds them (all of
    /// the challenge's models): to continue a text, decode prompt and continuation together, or use
    /// [`Tokenizer::decode_piece`].
    pub fn decode(&self, ids: &[u16]) -> Vec<u8> {
        let Some(model) = &self.sentencepiece else { return byte::decode(ids) };
        let mut out = Vec::with_capacity(ids.len() * 4);
        let mut leading = model.leading_space;
        for &id in ids {
            let Some(piece) = self.pieces.get(usize::from(id)) else { continue };
            if !out.is_empty() {
                leading = LeadingSpace::Keep;
            }
            let spelled = !matches!(piece.kind, PieceKind::Control | PieceKind::Unknown | PieceKind::Byte);
            match piece.text.strip_prefix(SPACE) {
                Some(text) if spelled && leading != LeadingSpace::Keep => {
                    if leading == LeadingSpace::DropOne {
                        leading = LeadingSpace::Keep;
                    }
                    out.extend_from_slice(text.replace(SPACE, " ").as_bytes());
                }
                _ => self.piece_into(piece, &mut out),
            }
        }
        out
    }

    /// The bytes that `id` adds in the middle of a text: a leading space is kept.
    pub fn decode_piece(&self, id: u16) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(piece) = self.pieces.get(usize::from(id)) {
            self.piece_into(piece, &mut out);
        }
        out
    }

    fn piece_into(&self, piece: &Piece, out: &mut Vec<u8>) {
        match piece.kind {
            PieceKind::Control => {}
            PieceKind::Unknown => {
                out.extend(self.sentencepiece.iter().flat_map(|model| model.unk_surface.bytes()))
            }
            PieceKind::Byte => {
                out.extend(piece.text.get(3..5).and_then(|hex| u8::from_str_radix(hex, 16).ok()))
            }
            _ => out.extend_from_slice(piece.text.replace(SPACE, " ").as_bytes()),
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({}, {} pieces)", self.kind(), self.pieces.len())
    }
}
