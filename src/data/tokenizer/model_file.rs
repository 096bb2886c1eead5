//! Reading a SentencePiece `.model` file: a protocol-buffer `ModelProto`, read by hand and bounded everywhere.
//!
//! Only what decides encoding and decoding is kept. Whatever else a file asks for that would change its ids
//! (another model type, whitespace as a suffix, a denormaliser) is refused.

use super::{MAX_PIECE_BYTES, MAX_PIECES, Piece, PieceKind};
use crate::error::{Error, Result};

/// SentencePiece's number for byte-pair encoding in `TrainerSpec.model_type` (1 unigram, 3 word, 4 char).
const MODEL_TYPE_BPE: u64 = 2;

/// The parts of a `ModelProto` that encoding and decoding need.
pub(super) struct ModelFile<'a> {
    /// Pieces in id order.
    pub pieces: Vec<Piece>,
    /// The normaliser's compiled rules; empty for none.
    pub precompiled_charsmap: &'a [u8],
    /// A space is put before the text.
    pub add_dummy_prefix: bool,
    /// Leading, trailing and repeated spaces are dropped.
    pub remove_extra_whitespaces: bool,
    /// A space becomes U+2581.
    pub escape_whitespaces: bool,
    /// A character outside the vocabulary becomes its UTF-8 bytes.
    pub byte_fallback: bool,
    /// What the unknown piece decodes to.
    pub unk_surface: String,
    /// Name of the piece that begins a document.
    pub bos_piece: String,
}

impl<'a> ModelFile<'a> {
    /// Reads `bytes`; `place` names the file in errors.
    pub fn parse(bytes: &'a [u8], place: &str) -> Result<Self> {
        // The defaults are those of SentencePiece's own message definition.
        let mut model = ModelFile {
            pieces: Vec::new(),
            precompiled_charsmap: &[],
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
            byte_fallback: false,
            unk_surface: super::UNK_SURFACE.into(),
            bos_piece: super::BOS_PIECE.into(),
        };
        let mut model_type = 1;
        let mut fields = Fields { rest: bytes, all: bytes, place };
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => {
                    if model.pieces.len() == MAX_PIECES {
                        return Err(Error::input(
                            format!("more than {MAX_PIECES} pieces"),
                            place,
                            "token ids that fit 16 bits",
                        ));
                    }
                    model.pieces.push(piece(&fields, value)?);
                }
                2 => model.trainer(fields.message(value)?, &mut model_type)?,
                3 => model.normalizer(fields.message(value)?)?,
                5 => refuse_denormalizer(fields.message(value)?)?,
                _ => {}
            }
        }
        if model_type != MODEL_TYPE_BPE {
            let what = format!("SentencePiece model type {model_type}");
            return Err(Error::input(what, place, format!("type {MODEL_TYPE_BPE} (BPE)")));
        }
        Ok(model)
    }

    /// Reads a `TrainerSpec`.
    fn trainer(&mut self, mut fields: Fields<'a, '_>, model_type: &mut u64) -> Result<()> {
        while let Some((number, value)) = fields.next()? {
            match number {
                3 => *model_type = fields.varint_of(value)?,
                24 if fields.varint_of(value)? != 0 => {
                    return Err(Error::input(
                        "a model with whitespace as a suffix",
                        fields.place,
                        "treat_whitespace_as_suffix = false",
                    ));
                }
                35 => self.byte_fallback = fields.varint_of(value)? != 0,
                44 => self.unk_surface = fields.short_text(value)?,
                46 => self.bos_piece = fields.short_text(value)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads a `NormalizerSpec`.
    fn normalizer(&mut self, mut fields: Fields<'a, '_>) -> Result<()> {
        while let Some((number, value)) = fields.next()? {
            match number {
                2 => self.precompiled_charsmap = fields.bytes_of(value)?,
                3 => self.add_dummy_prefix = fields.varint_of(value)? != 0,
                4 => self.remove_extra_whitespaces = fields.varint_of(value)? != 0,
                5 => self.escape_whitespaces = fields.varint_of(value)? != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

/// Reads a `ModelProto.SentencePiece`.
fn piece(parent: &Fields<'_, '_>, value: Value<'_>) -> Result<Piece> {
    let mut fields = parent.message(value)?;
    let mut piece = Piece { text: String::new(), score: 0.0, kind: PieceKind::Normal };
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, value) => piece.text = fields.short_text(value)?,
            (2, Value::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (2, _) => return Err(fields.damaged("a score that is not a 32-bit float")),
            (3, value) => {
                let code = fields.varint_of(value)?;
                piece.kind =
                    PieceKind::from_code(code).ok_or_else(|| fields.damaged("an unknown piece type"))?;
            }
            _ => {}
        }
    }
    Ok(piece)
}

/// A denormaliser with rules would change what ids decode to: none of the challenge's models has one.
fn refuse_denormalizer(mut fields: Fields<'_, '_>) -> Result<()> {
    while let Some((number, value)) = fields.next()? {
        if number == 2 && !fields.bytes_of(value)?.is_empty() {
            return Err(Error::input("a model with a denormaliser", fields.place, "none"));
        }
    }
    Ok(())
}

/// One field's content, by wire type.
#[derive(Clone, Copy)]
enum Value<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// The fields of one message, in file order.
struct Fields<'a, 'p> {
    /// What is not read yet.
    rest: &'a [u8],
    /// The whole message, so that an error can say where in it.
    all: &'a [u8],
    place: &'p str,
}

impl<'a, 'p> Fields<'a, 'p> {
    /// The next field's number and content, or `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Value::Fixed32(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            _ => return Err(self.damaged("an unknown wire type")),
        };
        Ok(Some((tag >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.damaged("a number of more than 64 bits"))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let taken = usize::try_from(length).ok().and_then(|length| self.rest.split_at_checked(length));
        let (taken, rest) = taken.ok_or_else(|| self.damaged("cut short"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn varint_of(&self, value: Value<'_>) -> Result<u64> {
        match value {
            Value::Varint(value) => Ok(value),
            _ => Err(self.damaged("a field of the wrong type")),
        }
    }

    fn bytes_of<'v>(&self, value: Value<'v>) -> Result<&'v [u8]> {
        match value {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(self.damaged("a field of the wrong type")),
        }
    }

    fn message<'v>(&self, value: Value<'v>) -> Result<Fields<'v, 'p>> {
        let all = self.bytes_of(value)?;
        Ok(Fields { rest: all, all, place: self.place })
    }

    fn short_text(&self, value: Value<'_>) -> Result<String> {
        let bytes = self.bytes_of(value)?;
        if bytes.len() > MAX_PIECE_BYTES {
            let what = format!("a piece of {} bytes", bytes.len());
            return Err(Error::input(what, self.place, format!("at most {MAX_PIECE_BYTES}")));
        }
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.damaged("a piece that is not UTF-8")),
        }
    }

    fn damaged(&self, what: &str) -> Error {
        let at = self.all.len() - self.rest.len();
        let what = format!("{what}, at byte {at} of a message of {}", self.all.len());
        Error::input(what, self.place, "a SentencePiece model file")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field `number` of wire type 2.
    fn message(number: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2, body.len() as u8];
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn fields_are_read_in_any_order_and_unknown_ones_skipped() {
        let mut piece = message(1, "▁a".as_bytes());
        piece.extend_from_slice(&[2 << 3 | 5]);
        piece.extend_from_slice(&(-1.5f32).to_le_bytes());
        piece.extend_from_slice(&[9 << 3, 0x96, 1, 10 << 3 | 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut file = message(2, &[3 << 3, 2, 35 << 3 & 0x7f | 0x80, 2, 1]);
        file.extend(message(1, &piece));
        file.extend(message(3, &[3 << 3, 0]));
        let model = ModelFile::parse(&file, "x").unwrap();
        assert_eq!(model.pieces, [Piece { text: "▁a".into(), score: -1.5, kind: PieceKind::Normal }]);
        assert!(model.byte_fallback && !model.add_dummy_prefix && model.escape_whitespaces);
    }

    #[test]
    fn what_would_change_the_ids_is_refused_by_name() {
        let says = |bytes: &[u8]| match ModelFile::parse(bytes, "m.model") {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(says(&[]), "SentencePiece model type 1, m.model, expected type 2 (BPE)");
        assert!(says(&message(2, &[0xc0, 1, 1])).contains("whitespace as a suffix"));
        assert!(says(&message(5, &message(2, b"x"))).contains("denormaliser"));
        assert!(says(&message(1, &[3 << 3, 7])).contains("unknown piece type"));
        assert!(says(&message(1, &[2 << 3, 7])).contains("32-bit float"));
        assert!(says(&message(1, &message(1, &[0xff]))).contains("not UTF-8"));
        assert!(says(&[1 << 3 | 2, 5, 0]).contains("cut short, at byte 2 of a message of 3"));
        assert!(
            says(&[1 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1])
                .contains("cut short")
        );
        assert!(says(&[0xff; 11]).contains("more than 64 bits"));
        assert!(says(&[1 << 3 | 3]).contains("wire type"));
    }
}
