//! The checks that every list of pieces passes, and where to find a piece by its text.

use super::prefix::PrefixSet;
use super::{MAX_PIECE_BYTES, MAX_PIECES, Piece, PieceKind, byte};
use crate::error::{Error, Result};
use std::collections::HashMap;

/// Pieces by text, and the ids with a role of their own.
pub(super) struct Vocabulary {
    /// Ids of the pieces that text can spell (normal, user-defined, unused).
    pub by_text: HashMap<String, u16>,
    /// User-defined symbols: found in a text before anything else.
    pub user_defined: PrefixSet,
    /// The unknown piece.
    pub unk: u16,
    /// The piece that begins a document.
    pub bos: u16,
    /// By byte, its piece's id, where the model has byte pieces.
    pub bytes: Option<Box<[u16; 256]>>,
}

impl Vocabulary {
    /// Checks `pieces` as SentencePiece does on loading, and that no text could spell a control piece.
    pub fn new(pieces: &[Piece], bos_piece: &str, place: &str) -> Result<Self> {
        if pieces.is_empty() || pieces.len() > MAX_PIECES {
            let what = format!("{} pieces", pieces.len());
            return Err(Error::input(what, place, format!("1 to {MAX_PIECES}")));
        }
        let mut ids = HashMap::with_capacity(pieces.len());
        let mut bytes = vec![None; 256];
        let (mut unk, mut bos) = (None, None);
        for (id, piece) in pieces.iter().enumerate() {
            let bad =
                |what: &str, expected: &str| Err(Error::input(format!("piece {id} {what}"), place, expected));
            let text = piece.text.as_str();
            if text.is_empty() || text.len() > MAX_PIECE_BYTES {
                return bad("is empty or too long", "1 to 256 bytes");
            }
            if !piece.score.is_finite() {
                return bad("has a score that is not finite", "a number");
            }
            let id = id as u16;
            if ids.insert(text.to_owned(), id).is_some() {
                return bad("repeats an earlier one", "each piece once");
            }
            match piece.kind {
                PieceKind::Unknown if unk.replace(id).is_some() => {
                    return bad("is a second unknown piece", "one");
                }
                PieceKind::Control if text.chars().nth(1).is_none() => {
                    return bad("is a control piece of one character", "a name that no character spells");
                }
                PieceKind::Control if text == bos_piece => bos = Some(id),
                PieceKind::Byte => match (0..=255).find(|&b| byte::byte_piece(b) == text) {
                    Some(b) => bytes[usize::from(b)] = Some(id),
                    None => return bad("is a byte piece of another name", "<0x00> to <0xFF>"),
                },
                _ => {}
            }
        }
        let missing = |what: String| Error::input("a piece is missing", place, what);
        let unk = unk.ok_or_else(|| missing("one piece of type 2 (unknown)".into()))?;
        let bos =
            bos.ok_or_else(|| missing(format!("a control piece {bos_piece:?} that begins a document")))?;
        let found = bytes.iter().flatten().count();
        if found != 0 && found != 256 {
            return Err(missing(format!("all 256 byte pieces or none, found {found}")));
        }
        let bytes = (found == 256).then(|| Box::new(std::array::from_fn(|b| bytes[b].unwrap_or(unk))));
        ids.retain(|_, id| spelled(pieces[usize::from(*id)].kind));
        let user_defined =
            pieces.iter().enumerate().filter(|(_, piece)| piece.kind == PieceKind::UserDefined);
        let user_defined = PrefixSet::new(user_defined.map(|(id, piece)| (piece.text.as_str(), id as u16)));
        Ok(Self { by_text: ids, user_defined, unk, bos, bytes })
    }
}

/// Whether a text's characters may be merged into a piece of this kind.
fn spelled(kind: PieceKind) -> bool {
    matches!(kind, PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused)
}
