//! The byte tokenizer: the challenge's byte260, where id = byte + 4 and ids 0 to 3 are pad, bos, eos, unk
//! (spec/challenge.md section 2).

use super::{Piece, PieceKind};

/// Ids before the first byte.
pub(super) const SPECIALS: u16 = 4;

/// The name of the piece that stands for `byte`, as SentencePiece writes it.
pub(super) fn byte_piece(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// The 260 pieces, in id order.
pub(super) fn pieces() -> Vec<Piece> {
    let special = |text: &str, kind| Piece { text: text.into(), score: 0.0, kind };
    let mut pieces = vec![
        special("<pad>", PieceKind::Control),
        special("<s>", PieceKind::Control),
        special("</s>", PieceKind::Control),
        special("<unk>", PieceKind::Unknown),
    ];
    pieces.extend((0..=255).map(|byte| special(&byte_piece(byte), PieceKind::Byte)));
    pieces
}

/// Appends the ids of `text`'s UTF-8 bytes.
pub(super) fn encode_into(text: &str, out: &mut Vec<u16>) {
    out.extend(text.bytes().map(|byte| u16::from(byte) + SPECIALS));
}

/// The bytes that `ids` stand for; specials and ids beyond 259 give nothing.
pub(super) fn decode(ids: &[u16]) -> Vec<u8> {
    ids.iter().filter_map(|id| id.checked_sub(SPECIALS)).filter_map(|byte| u8::try_from(byte).ok()).collect()
}
