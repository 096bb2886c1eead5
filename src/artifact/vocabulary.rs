//! The artifact's vocabulary section: the byte table that bits-per-byte needs, and the tokenizer's pieces.
//!
//! Laid out in columns, which compress better than rows: kind of the tokenizer; numbers of ids and of pieces; the
//! pieces' kinds, scores and texts; bytes of each id, leading-space flags, boundary flags, all three as differences from
//! what the piece of that id suggests, so that a byte table that follows from its pieces costs next to nothing. With
//! brotli the official sp1024 vocabulary takes 1.8 kB, one of 8,192 pieces 21.5 kB.

use super::wire::{Cursor, put_bits, put_signed, put_str, put_varint};
use crate::error::{Error, Result};

/// The most token ids a vocabulary can have: shards hold 16-bit ids.
pub const MAX_VOCABULARY: usize = 1 << 16;

/// Scores as whole numbers, each less its predecessor (BPE: the rank, so that nearly all are -1).
const SCORES_RANKS: u8 = 0;
/// Scores as the bytes of float32, all lowest bytes first.
const SCORES_PLANES: u8 = 1;

/// What bits-per-byte needs to know of each token id (`spec/challenge.md` section 3); all columns have one entry an
/// id of the model's vocabulary.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ByteTableSection {
    /// Bytes of text that the id stands for, a leading space not counted.
    pub base_bytes: Vec<u16>,
    /// Whether the id's text begins with a space.
    pub has_leading_space: Vec<bool>,
    /// Whether the id is no text at all (control, unknown, unused), so that a following leading space is not counted.
    pub is_boundary: Vec<bool>,
}

/// One piece of the tokenizer, its id being its position.
#[derive(Debug, Clone, PartialEq)]
pub struct PieceRow {
    /// The piece as the tokenizer's model writes it (U+2581 for a space).
    pub text: String,
    /// Merge rank or log-probability, higher first. The sign of a zero is not kept.
    pub score: f32,
    /// SentencePiece's type: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub kind: u8,
}

/// Checks what both a writer and a reader must hold to.
pub fn check(table: &ByteTableSection, pieces: &[PieceRow], place: &str) -> Result<()> {
    let ids = table.base_bytes.len();
    let bad = |what: String, expected: String| Err(Error::input(what, place, expected));
    if table.has_leading_space.len() != ids || table.is_boundary.len() != ids {
        let lengths = (ids, table.has_leading_space.len(), table.is_boundary.len());
        return bad(format!("byte table has columns of {lengths:?}"), "columns of one length".into());
    }
    if ids > MAX_VOCABULARY || pieces.len() > ids {
        return bad(
            format!("{} pieces and a byte table of {ids} ids", pieces.len()),
            format!("no more pieces than ids, and at most {MAX_VOCABULARY} ids"),
        );
    }
    for (id, piece) in pieces.iter().enumerate() {
        if !piece.score.is_finite() || !(1..=6).contains(&piece.kind) {
            return bad(
                format!("piece {id} has score {} and kind {}", piece.score, piece.kind),
                "a finite score and a kind from 1 to 6".into(),
            );
        }
    }
    Ok(())
}

/// Ends a piece's text: a byte that no UTF-8 text has.
const TEXT_END: u8 = 0xff;

/// Bytes, leading space and boundary of an id as the usual rules have them for its piece. Only a prediction: the
/// section says where the byte table differs.
fn predicted(piece: Option<&PieceRow>) -> (u16, bool, bool) {
    match piece {
        Some(PieceRow { kind: 6, .. }) => (1, false, false),
        Some(PieceRow { kind: 1 | 4, text, .. }) => {
            let stripped = text.strip_prefix(SPACE);
            (stripped.unwrap_or(text).len() as u16, stripped.is_some(), false)
        }
        _ => (0, false, true),
    }
}

/// SentencePiece's mark for a space.
const SPACE: char = '\u{2581}';

/// Texts with the mark and the space itself exchanged: brotli's dictionary has words after a space.
fn exchange_spaces(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            SPACE => ' ',
            ' ' => SPACE,
            c => c,
        })
        .collect()
}

/// The section's bytes before compression.
pub fn encode(table: &ByteTableSection, tokenizer_kind: &str, pieces: &[PieceRow]) -> Vec<u8> {
    let mut out = Vec::new();
    put_str(&mut out, tokenizer_kind);
    put_varint(&mut out, table.base_bytes.len() as u64);
    put_varint(&mut out, pieces.len() as u64);
    out.extend(pieces.iter().map(|piece| piece.kind));
    put_scores(&mut out, pieces);
    for piece in pieces {
        out.extend(exchange_spaces(&piece.text).bytes());
        out.push(TEXT_END);
    }
    let predictions: Vec<_> = (0..table.base_bytes.len()).map(|id| predicted(pieces.get(id))).collect();
    for (&bytes, predicted) in table.base_bytes.iter().zip(&predictions) {
        put_signed(&mut out, i64::from(bytes) - i64::from(predicted.0));
    }
    let differ = |flags: &[bool], predicted: fn(&(u16, bool, bool)) -> bool| -> Vec<bool> {
        flags.iter().zip(&predictions).map(|(&flag, p)| flag ^ predicted(p)).collect()
    };
    put_bits(&mut out, &differ(&table.has_leading_space, |p| p.1));
    put_bits(&mut out, &differ(&table.is_boundary, |p| p.2));
    out
}

fn put_scores(out: &mut Vec<u8>, pieces: &[PieceRow]) {
    if pieces.iter().all(|piece| (piece.score as i32) as f32 == piece.score) {
        out.push(SCORES_RANKS);
        let mut previous = 0;
        for piece in pieces {
            let rank = i64::from(piece.score as i32);
            put_signed(out, rank - previous);
            previous = rank;
        }
    } else {
        out.push(SCORES_PLANES);
        for plane in 0..4 {
            out.extend(pieces.iter().map(|piece| piece.score.to_le_bytes()[plane]));
        }
    }
}

fn read_scores(cursor: &mut Cursor, count: usize) -> Result<Vec<f32>> {
    match cursor.byte()? {
        SCORES_RANKS => {
            let mut rank = 0i64;
            let mut scores = Vec::with_capacity(count);
            for _ in 0..count {
                rank = rank.saturating_add(cursor.signed("score")?);
                scores.push(rank as f32);
            }
            Ok(scores)
        }
        SCORES_PLANES => {
            let planes = cursor.take(count * 4)?;
            Ok((0..count)
                .map(|i| f32::from_le_bytes(std::array::from_fn(|plane| planes[plane * count + i])))
                .collect())
        }
        other => Err(cursor.bad(format!("scores of form {other}"), "form 0 or 1")),
    }
}

/// Reads the section: byte table, kind of the tokenizer, pieces. `place` is the file, for messages.
pub fn decode(bytes: &[u8], place: &str) -> Result<(ByteTableSection, String, Vec<PieceRow>)> {
    let mut cursor = Cursor::new(bytes, "vocabulary", place);
    let tokenizer_kind = cursor.str("kind of the tokenizer")?.to_owned();
    let ids = cursor.count("token ids", MAX_VOCABULARY)?;
    let count = cursor.count("pieces", MAX_VOCABULARY)?;
    let kinds = cursor.take(count)?;
    let scores = read_scores(&mut cursor, count)?;
    let mut pieces = Vec::with_capacity(count);
    for (score, &kind) in scores.into_iter().zip(kinds) {
        let text = cursor.take_until(TEXT_END)?;
        pieces.push(PieceRow { text: exchange_spaces(cursor.utf8("piece", text)?), score, kind });
    }
    let predictions: Vec<_> = (0..ids).map(|id| predicted(pieces.get(id))).collect();
    let mut table = ByteTableSection::default();
    for predicted in &predictions {
        let bytes = i64::from(predicted.0).saturating_add(cursor.signed("bytes of an id")?);
        table.base_bytes.push(
            u16::try_from(bytes).map_err(|_| {
                cursor.bad(format!("an id of {bytes} bytes"), format!("at most {}", u16::MAX))
            })?,
        );
    }
    let flags = |differ: Vec<bool>, predicted: fn(&(u16, bool, bool)) -> bool| -> Vec<bool> {
        differ.iter().zip(&predictions).map(|(&differs, p)| differs ^ predicted(p)).collect()
    };
    table.has_leading_space = flags(cursor.bits(ids)?, |p| p.1);
    table.is_boundary = flags(cursor.bits(ids)?, |p| p.2);
    cursor.finish()?;
    check(&table, &pieces, place)?;
    Ok((table, tokenizer_kind, pieces))
}
