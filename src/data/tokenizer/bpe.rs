//! SentencePiece's byte-pair encoding of normalised text (`bpe_model.cc`, `Model::SampleEncode` without dropout).
//!
//! A text starts as one symbol a character. Of all adjacent pairs whose joined text is a piece, the one of the
//! highest score is merged, the leftmost among equals, until none is left. Texts are never joined here: every way
//! to split a piece in two symbols is known beforehand, so that a merge is one look-up of a pair of numbers.

use super::hash::Seeded;
use super::vocabulary::Vocabulary;
use super::{Piece, PieceKind, SPACE};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// A pair that does not merge; every real entry is smaller.
const NO_MERGE: u64 = u64::MAX;
/// Up to this many symbols the best pair is found by scanning, beyond it with a heap.
const SHORT: usize = 32;

/// Merge rules and the symbols that characters start as.
pub(super) struct Bpe {
    /// `left << 32 | right` to `rank << 32 | merged`; a lower rank merges first, equal scores share a rank.
    merges: HashMap<u64, u64, Seeded>,
    /// First symbol of a character; a character in no piece is absent.
    chars: HashMap<u64, u32, Seeded>,
    /// The same for ASCII.
    ascii: [Option<u32>; 128],
    /// Symbols at and above `first_extra` are characters that occur in pieces without being one.
    extra: Vec<char>,
    first_extra: u32,
    unused: Vec<bool>,
    cut: Cut,
    /// Words that merge to one piece, by [`word_key`], done beforehand: on English 1.45 times as fast with 8,192
    /// pieces, 1.15 times with 1,024.
    words: HashMap<u128, u16, Seeded>,
}

/// Where a text may be cut in words that merge independently: no piece reaches across such a place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cut {
    /// Before every U+2581: it only ever begins a piece.
    EverySpace,
    /// Before a U+2581 that follows something else: pieces hold it only in runs that begin them.
    AfterText,
    /// Nowhere. Also for vocabularies with unused pieces, which split again in the way that was seen last,
    /// wherever in the text.
    Nowhere,
}

impl Bpe {
    /// The rules that `pieces`, indexed by `vocabulary`, spell out.
    pub fn new(pieces: &[Piece], vocabulary: &Vocabulary) -> Self {
        let spelled = |id: &u16| pieces[usize::from(*id)].kind != PieceKind::UserDefined;
        let seed = Seeded::new();
        let first_extra = pieces.len() as u32;
        let mut bpe = Self {
            merges: HashMap::with_hasher(seed),
            chars: HashMap::with_hasher(seed),
            ascii: [None; 128],
            extra: Vec::new(),
            first_extra,
            unused: pieces.iter().map(|piece| piece.kind == PieceKind::Unused).collect(),
            cut: cut_places(pieces),
            words: HashMap::with_hasher(seed),
        };
        // In id order, so that the symbols of extra characters do not depend on a hash.
        let mut ids: Vec<u16> = vocabulary.by_text.values().copied().collect();
        ids.sort_unstable();
        let mut buffer = [0; 4];
        for c in ids.iter().flat_map(|id| pieces[usize::from(*id)].text.chars()) {
            if bpe.chars.contains_key(&u64::from(c)) {
                continue;
            }
            let symbol = match vocabulary.by_text.get(c.encode_utf8(&mut buffer) as &str) {
                Some(&id) => u32::from(id),
                None => {
                    bpe.extra.push(c);
                    first_extra + (bpe.extra.len() - 1) as u32
                }
            };
            bpe.chars.insert(u64::from(c), symbol);
            if c.is_ascii() {
                bpe.ascii[c as usize] = Some(symbol);
            }
        }
        let ranks = ranks(pieces);
        for id in ids.iter().filter(|id| spelled(id)) {
            let text = pieces[usize::from(*id)].text.as_str();
            for (place, _) in text.char_indices().skip(1) {
                let (left, right) = text.split_at(place);
                // A user-defined symbol never merges, so it is no half of anything.
                let half = |half: &str| match vocabulary.by_text.get(half) {
                    Some(id) => spelled(id).then_some(u32::from(*id)),
                    None => bpe.only_char(half),
                };
                if let (Some(left), Some(right)) = (half(left), half(right)) {
                    let merge = u64::from(ranks[usize::from(*id)]) << 32 | u64::from(*id);
                    bpe.merges.insert(pair_key(left, right), merge);
                }
            }
        }
        let mut symbols = Vec::new();
        for id in ids {
            let text = pieces[usize::from(id)].text.as_str();
            let Some(key) = word_key(text) else { continue };
            symbols.clear();
            symbols.extend(text.chars().filter_map(|c| bpe.chars.get(&u64::from(c))));
            if bpe.merge_short(&mut symbols) == 1 && symbols[0] == u32::from(id) {
                bpe.words.insert(key, id);
            }
        }
        bpe
    }

    /// The symbol of a text that is one character of some piece.
    fn only_char(&self, text: &str) -> Option<u32> {
        let mut chars = text.chars();
        match (chars.next(), chars.next()) {
            (Some(c), None) => self.chars.get(&u64::from(c)).copied(),
            _ => None,
        }
    }

    /// Appends the ids of a normalised text.
    pub fn encode_into(&self, text: &str, vocabulary: &Vocabulary, out: &mut Vec<u16>) {
        let mut encoder = Encoder { bpe: self, vocabulary, start: out.len(), out, symbols: Vec::new() };
        if self.cut == Cut::Nowhere {
            encoder.whole(text);
        } else if vocabulary.user_defined.is_empty() {
            encoder.words(text);
        } else {
            let mut rest = text;
            while let Some((before, id, after)) = next_user_defined(rest, vocabulary) {
                encoder.words(before);
                encoder.out.push(id);
                rest = after;
            }
            encoder.words(rest);
        }
    }

    /// `rank << 32 | merged` of a pair, or [`NO_MERGE`].
    fn merge(&self, left: u32, right: u32) -> u64 {
        self.merges.get(&pair_key(left, right)).copied().unwrap_or(NO_MERGE)
    }

    /// Merges `symbols` to the end by scanning for the best pair; leaves how many remain.
    fn merge_short(&self, symbols: &mut [u32]) -> usize {
        let mut pairs = [NO_MERGE; SHORT];
        let mut length = symbols.len();
        for index in 1..length {
            pairs[index - 1] = self.merge(symbols[index - 1], symbols[index]);
        }
        while length > 1 {
            let (mut best, mut at) = (NO_MERGE >> 32, 0);
            for (index, pair) in pairs[..length - 1].iter().enumerate() {
                if pair >> 32 < best {
                    (best, at) = (pair >> 32, index);
                }
            }
            if best == NO_MERGE >> 32 {
                break;
            }
            symbols[at] = pairs[at] as u32;
            symbols.copy_within(at + 2..length, at + 1);
            pairs.copy_within(at + 1..length - 1, at);
            length -= 1;
            if at > 0 {
                pairs[at - 1] = self.merge(symbols[at - 1], symbols[at]);
            }
            if at + 1 < length {
                pairs[at] = self.merge(symbols[at], symbols[at + 1]);
            }
        }
        length
    }

    /// The same with a heap, in time n log n; `seen` is told every pair that could merge, in SentencePiece's order.
    fn merge_long(&self, symbols: &mut Vec<u32>, mut seen: impl FnMut(u32, u32, u32)) {
        /// No neighbour on this side; also the mark of a symbol that was merged away.
        const NONE: usize = usize::MAX;
        let count = symbols.len();
        let mut previous: Vec<usize> = (0..count).map(|index| index.wrapping_sub(1)).collect();
        let mut next: Vec<usize> =
            (1..=count).map(|index| if index == count { NONE } else { index }).collect();
        // By left symbol, the pair as it now is: what an older heap entry says is checked against it.
        let mut pairs = vec![NO_MERGE; count];
        let mut heap = BinaryHeap::new();
        let mut look =
            |left: usize, right: usize, symbols: &[u32], pairs: &mut [u64], heap: &mut BinaryHeap<_>| {
                if left == NONE {
                    return;
                }
                pairs[left] =
                    if right == NONE { NO_MERGE } else { self.merge(symbols[left], symbols[right]) };
                if pairs[left] != NO_MERGE {
                    seen(pairs[left] as u32, symbols[left], symbols[right]);
                    heap.push(Reverse((pairs[left] >> 32, left)));
                }
            };
        for right in 1..count {
            look(right - 1, right, symbols, &mut pairs, &mut heap);
        }
        while let Some(Reverse((rank, left))) = heap.pop() {
            if pairs[left] >> 32 != rank {
                continue;
            }
            let right = next[left];
            symbols[left] = pairs[left] as u32;
            pairs[right] = NO_MERGE;
            next[left] = next[right];
            previous[right] = right;
            if next[right] != NONE {
                previous[next[right]] = left;
            }
            look(previous[left], left, symbols, &mut pairs, &mut heap);
            look(left, next[left], symbols, &mut pairs, &mut heap);
        }
        let mut index = 0;
        symbols.retain(|_| {
            index += 1;
            previous[index - 1] != index - 1
        });
    }
}

/// One call's state.
struct Encoder<'a> {
    bpe: &'a Bpe,
    vocabulary: &'a Vocabulary,
    out: &'a mut Vec<u16>,
    /// Where in `out` this text begins.
    start: usize,
    /// Symbols of the word at hand.
    symbols: Vec<u32>,
}

impl Encoder<'_> {
    /// Encodes a text without user-defined symbols, a word at a time.
    fn words(&mut self, text: &str) {
        let bytes = text.as_bytes();
        let mut start = 0;
        for at in 1..bytes.len() {
            if bytes[at] == SPACE.as_bytes()[0]
                && bytes[at..].starts_with(SPACE.as_bytes())
                && (self.bpe.cut == Cut::EverySpace || !bytes[start..at].ends_with(SPACE.as_bytes()))
            {
                self.word(&text[start..at]);
                start = at;
            }
        }
        self.word(&text[start..]);
    }

    fn word(&mut self, word: &str) {
        if let Some(&id) = word_key(word).and_then(|key| self.bpe.words.get(&key)) {
            self.out.push(id);
            return;
        }
        let mut symbols = std::mem::take(&mut self.symbols);
        symbols.clear();
        self.characters(word, &mut symbols);
        if symbols.len() <= SHORT {
            let left = self.bpe.merge_short(&mut symbols);
            symbols.truncate(left);
        } else {
            self.bpe.merge_long(&mut symbols, |_, _, _| ());
        }
        for &symbol in &symbols {
            self.emit(symbol);
        }
        self.symbols = symbols;
    }

    /// Encodes a text as one sequence, with unused pieces split again into what they were last seen merged from.
    fn whole(&mut self, text: &str) {
        let mut symbols = Vec::new();
        let mut rest = text;
        while let Some((before, id, after)) = next_user_defined(rest, self.vocabulary) {
            self.characters(before, &mut symbols);
            symbols.push(id.into());
            rest = after;
        }
        self.characters(rest, &mut symbols);
        let unused = &self.bpe.unused;
        let is_unused = |symbol: u32| unused.get(symbol as usize).copied().unwrap_or(false);
        let mut halves = HashMap::new();
        self.bpe.merge_long(&mut symbols, |merged, left, right| {
            if is_unused(merged) {
                halves.insert(merged, (left, right));
            }
        });
        let mut stack = Vec::new();
        for symbol in symbols {
            stack.push(symbol);
            while let Some(symbol) = stack.pop() {
                match halves.get(&symbol) {
                    Some(&(left, right)) => stack.extend([right, left]),
                    None => self.emit(symbol),
                }
            }
        }
    }

    /// The symbols that `text` starts as.
    fn characters(&self, text: &str, symbols: &mut Vec<u32>) {
        for c in text.chars() {
            let symbol = match self.bpe.ascii.get(c as usize) {
                Some(&symbol) => symbol,
                None => self.bpe.chars.get(&u64::from(c)).copied(),
            };
            match symbol {
                Some(symbol) => symbols.push(symbol),
                // No piece holds this character, so that it cannot merge: its ids stand at once.
                None => self.unknown(c, |id| symbols.push(id.into())),
            }
        }
    }

    /// The ids of a character that is no piece: its bytes', or the unknown piece.
    fn unknown(&self, c: char, mut push: impl FnMut(u16)) {
        match &self.vocabulary.bytes {
            Some(bytes) => c.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| push(bytes[usize::from(byte)])),
            None => push(self.vocabulary.unk),
        }
    }

    /// Appends a final symbol's ids; a run of unknown characters is one unknown piece.
    fn emit(&mut self, symbol: u32) {
        let unk = self.vocabulary.unk;
        let from = self.out.len();
        match symbol.checked_sub(self.bpe.first_extra) {
            None => self.out.push(symbol as u16),
            Some(extra) => {
                let mut ids = [0; 4];
                let mut count = 0;
                self.unknown(self.bpe.extra[extra as usize], |id| {
                    ids[count] = id;
                    count += 1;
                });
                self.out.extend_from_slice(&ids[..count]);
            }
        }
        if from > self.start && self.out[from] == unk && self.out[from - 1] == unk {
            self.out.truncate(from);
        }
    }
}

/// The first user-defined symbol of a text, with what is before and after it.
fn next_user_defined<'t>(text: &'t str, vocabulary: &Vocabulary) -> Option<(&'t str, u16, &'t str)> {
    if vocabulary.user_defined.is_empty() {
        return None;
    }
    let bytes = text.as_bytes();
    (0..bytes.len()).find_map(|at| {
        let (length, id) = vocabulary.user_defined.longest(&bytes[at..])?;
        Some((&text[..at], id, &text[at + length..]))
    })
}

/// Order of merging by piece: 0 for the highest score, equal for equal scores.
fn ranks(pieces: &[Piece]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_by(|&a, &b| pieces[b].score.total_cmp(&pieces[a].score));
    let mut ranks = vec![0; pieces.len()];
    for (index, pair) in order.windows(2).enumerate() {
        // By value: 0 and -0 are equal scores.
        let same = pieces[pair[0]].score == pieces[pair[1]].score;
        ranks[pair[1]] = if same { ranks[pair[0]] } else { index as u32 + 1 };
    }
    ranks
}

/// Where the vocabulary allows a text to be cut.
fn cut_places(pieces: &[Piece]) -> Cut {
    let mut cut = Cut::EverySpace;
    for piece in pieces {
        if piece.kind == PieceKind::Unused {
            return Cut::Nowhere;
        }
        if piece.kind == PieceKind::Normal {
            if piece.text.trim_start_matches(SPACE).contains(SPACE) {
                return Cut::Nowhere;
            }
            if piece.text.matches(SPACE).count() > 1 {
                cut = Cut::AfterText;
            }
        }
    }
    cut
}

/// A word of up to 16 bytes as a number, filled up with a byte that UTF-8 never holds.
fn word_key(word: &str) -> Option<u128> {
    let mut key = [0xff; 16];
    key.get_mut(..word.len())?.copy_from_slice(word.as_bytes());
    Some(u128::from_le_bytes(key))
}

fn pair_key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bpe(texts: &[(&str, f32)]) -> (Vec<Piece>, Bpe, Vocabulary) {
        let piece = |text: &str, score, kind| Piece { text: text.into(), score, kind };
        let mut pieces = vec![piece("<unk>", 0.0, PieceKind::Unknown), piece("<s>", 0.0, PieceKind::Control)];
        pieces.extend(texts.iter().map(|&(text, score)| piece(text, score, PieceKind::Normal)));
        let vocabulary = Vocabulary::new(&pieces, "<s>", "x").unwrap();
        let bpe = Bpe::new(&pieces, &vocabulary);
        (pieces, bpe, vocabulary)
    }

    #[test]
    fn scanning_and_heap_merge_alike() {
        // Many equal scores, overlapping pieces, a character (c) that is no piece.
        let texts = ["a", "b", "aa", "ab", "ba", "aab", "abc", "bca", "abab", "aaaa"];
        let scored: Vec<(&str, f32)> =
            texts.iter().enumerate().map(|(i, t)| (*t, -((i % 3) as f32))).collect();
        let (_, bpe, vocabulary) = bpe(&scored);
        let mut state = 1u32;
        let mut merged = 0;
        for _ in 0..2000 {
            let word: String = (0..SHORT)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    ['a', 'a', 'b', 'c'][(state >> 30) as usize]
                })
                .collect();
            let mut symbols = Vec::new();
            let encoder = Encoder {
                bpe: &bpe,
                vocabulary: &vocabulary,
                out: &mut Vec::new(),
                start: 0,
                symbols: vec![],
            };
            encoder.characters(&word, &mut symbols);
            let mut short = symbols.clone();
            let length = bpe.merge_short(&mut short);
            bpe.merge_long(&mut symbols, |_, _, _| ());
            assert_eq!(short[..length], symbols, "{word}");
            merged += SHORT - length;
        }
        assert!(merged > 2000 * SHORT / 4);
    }

    #[test]
    fn a_text_is_cut_only_where_no_piece_reaches_across() {
        assert_eq!(bpe(&[("a", 0.0), ("▁a", 0.0), ("▁", 0.0)]).1.cut, Cut::EverySpace);
        assert_eq!(bpe(&[("a", 0.0), ("▁▁", 0.0), ("▁▁a", 0.0)]).1.cut, Cut::AfterText);
        assert_eq!(bpe(&[("a▁", 0.0)]).1.cut, Cut::Nowhere);
        let mut pieces = bpe(&[("a", 0.0)]).0;
        pieces[2].kind = PieceKind::Unused;
        assert_eq!(cut_places(&pieces), Cut::Nowhere);
    }

    #[test]
    fn equal_scores_share_a_rank() {
        let (pieces, ..) = bpe(&[("a", -2.0), ("b", 3.0), ("c", -2.0), ("d", -0.0)]);
        assert_eq!(ranks(&pieces), [1, 1, 4, 0, 4, 1]);
    }

    #[test]
    fn only_words_that_merge_to_their_own_piece_are_kept_whole() {
        // "bc" merges before "ab", so that "abc" is never reached from a, bc.
        let (_, bpe, _) =
            bpe(&[("a", -9.0), ("b", -9.0), ("c", -9.0), ("bc", -1.0), ("ab", -2.0), ("abd", -3.0)]);
        let whole = |word: &str| bpe.words.get(&word_key(word).unwrap()).copied();
        assert_eq!(
            (whole("a"), whole("bc"), whole("ab"), whole("abd")),
            (Some(2), Some(5), Some(6), Some(7))
        );
        assert_eq!((whole("abc"), whole("d")), (None, None));
        assert_eq!(word_key("0123456789abcdefg"), None);
    }
}
