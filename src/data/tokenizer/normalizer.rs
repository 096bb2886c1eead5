//! SentencePiece's normaliser: rewriting rules, spaces, U+2581 (`normalizer.cc`, `Normalizer::Normalize`).

use super::SPACE;
use super::prefix::PrefixSet;
use crate::error::{Error, Result};

/// Bounds that real rule maps stay far below (`nmt_nfkc`: keys of 12 bytes, replacements of 33): with them a
/// damaged or hostile map cannot make a look-up long or a text grow without end.
const MAX_RULE_BYTES: usize = 256;
/// A map's trie and replacements together (`nmt_nfkc`: 240,007).
const MAX_CHARSMAP_BYTES: usize = 4 << 20;

/// What an ASCII byte becomes when the byte after it is ASCII too, or is the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ascii {
    /// Itself.
    Plain,
    /// One space.
    Space,
    /// Whatever the rules say: no short cut.
    Rules,
}

/// A model's normaliser.
pub(super) struct Normalizer {
    rules: Option<CharsMap>,
    ascii: [Ascii; 128],
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Normalizer {
    /// The normaliser of a model file. `user_defined` symbols pass through unchanged.
    pub fn new(
        precompiled_charsmap: &[u8],
        add_dummy_prefix: bool,
        remove_extra_whitespaces: bool,
        escape_whitespaces: bool,
        user_defined: &PrefixSet,
        place: &str,
    ) -> Result<Self> {
        let rules = match precompiled_charsmap {
            [] => None,
            bytes => Some(CharsMap::parse(bytes, place)?),
        };
        let ascii = std::array::from_fn(|byte| {
            let byte = byte as u8;
            if user_defined.starts_with(byte) || rules.as_ref().is_some_and(|r| r.has_ascii_pair(byte)) {
                return Ascii::Rules;
            }
            let rule = rules.as_ref().and_then(|r| r.longest(&[byte]));
            match rule.map_or([byte].as_slice(), |(_, text)| text.as_bytes()) {
                b" " => Ascii::Space,
                text if text == [byte] => Ascii::Plain,
                _ => Ascii::Rules,
            }
        });
        Ok(Self { rules, ascii, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces })
    }

    /// For pieces without a model file: a space becomes U+2581 and nothing else happens.
    pub fn escape_only(user_defined: &PrefixSet) -> Self {
        let ascii = std::array::from_fn(|byte| match byte as u8 {
            byte if user_defined.starts_with(byte) => Ascii::Rules,
            b' ' => Ascii::Space,
            _ => Ascii::Plain,
        });
        Self {
            rules: None,
            ascii,
            add_dummy_prefix: false,
            remove_extra_whitespaces: false,
            escape_whitespaces: true,
        }
    }

    /// The text that the model's pieces spell, with U+2581 for a space if the model escapes spaces.
    pub fn normalize(&self, text: &str, user_defined: &PrefixSet) -> String {
        let input = text.as_bytes();
        let mut at = 0;
        if self.remove_extra_whitespaces {
            while at < input.len() {
                match self.next(text, at, user_defined) {
                    (" ", length) => at += length,
                    _ => break,
                }
            }
        }
        if at == input.len() {
            return String::new();
        }
        let space = if self.escape_whitespaces { SPACE } else { " " };
        // Spaces grow to three bytes; English has one in six.
        let mut out = String::with_capacity((input.len() - at) / 2 * 3 + 16);
        if self.add_dummy_prefix {
            out.push_str(space);
        }
        let mut after_space = self.remove_extra_whitespaces;
        while at < input.len() {
            // The longest run that is its own normal form, at once.
            let start = at;
            while at < input.len() && self.short_cut(input, at) == Ascii::Plain {
                at += 1;
            }
            if at > start {
                out.push_str(&text[start..at]);
                after_space = false;
                continue;
            }
            if self.short_cut(input, at) == Ascii::Space {
                if !after_space {
                    out.push_str(space);
                }
                after_space = self.remove_extra_whitespaces;
                at += 1;
                continue;
            }
            let (mut replaced, length) = self.next(text, at, user_defined);
            at += length;
            while after_space && let Some(rest) = replaced.strip_prefix(' ') {
                replaced = rest;
            }
            if replaced.is_empty() {
                continue;
            }
            for (index, part) in replaced.split(' ').enumerate() {
                if index > 0 {
                    out.push_str(space);
                }
                out.push_str(part);
            }
            after_space = self.remove_extra_whitespaces && replaced.ends_with(' ');
        }
        if self.remove_extra_whitespaces {
            out.truncate(out.trim_end_matches(space).len());
        }
        out
    }

    /// What the byte at `at` becomes where no rule can reach beyond it.
    fn short_cut(&self, input: &[u8], at: usize) -> Ascii {
        match input.get(at + 1) {
            Some(0x80..) => Ascii::Rules,
            _ => self.ascii.get(usize::from(input[at])).copied().unwrap_or(Ascii::Rules),
        }
    }

    /// The replacement of the longest rule (or user-defined symbol, or character) at `at`, and its length in `text`.
    fn next<'a>(&'a self, text: &'a str, at: usize, user_defined: &PrefixSet) -> (&'a str, usize) {
        let input = &text.as_bytes()[at..];
        // Only a damaged rule map can end inside a character; SentencePiece then goes on byte by byte.
        if !text.is_char_boundary(at) {
            return ("\u{fffd}", 1);
        }
        if let Some((length, _)) = user_defined.longest(input) {
            return (&text[at..at + length], length);
        }
        if let Some((length, replacement)) = self.rules.as_ref().and_then(|rules| rules.longest(input)) {
            return (replacement, length);
        }
        let length = match input[0] {
            0..0x80 => 1,
            0x80..0xe0 => 2,
            0xe0..0xf0 => 3,
            0xf0.. => 4,
        };
        (&text[at..at + length], length)
    }
}

/// SentencePiece's `precompiled_charsmap`: a double-array trie (Darts-clone's units) of byte strings, whose
/// values are offsets into NUL-ended replacements. The longest rule wins.
///
/// The crate `spm_precompiled` reads the same format, but looks up whole grapheme clusters, takes the shortest rule,
/// drops the rest of the cluster and indexes unchecked: U+FB01 U+0301 loses its accent, U+304B U+3099 is not
/// composed, and a damaged map panics. SentencePiece does none of these.
struct CharsMap {
    units: Vec<u32>,
    replacements: String,
}

impl CharsMap {
    /// Layout: `u32` bytes of the trie, its `u32` units, the replacements; little-endian.
    fn parse(bytes: &[u8], place: &str) -> Result<Self> {
        let bad = |what: &str| {
            Error::input(
                format!("bad normaliser rules ({what})"),
                place,
                "a SentencePiece precompiled_charsmap",
            )
        };
        if bytes.len() > MAX_CHARSMAP_BYTES {
            return Err(bad("larger than 4 MiB"));
        }
        let (length, rest) = bytes.split_first_chunk().ok_or_else(|| bad("cut short"))?;
        let length = u32::from_le_bytes(*length) as usize;
        if length == 0 || !length.is_multiple_of(4) {
            return Err(bad("the trie is not whole units"));
        }
        let (trie, replacements) = rest.split_at_checked(length).ok_or_else(|| bad("cut short"))?;
        let replacements = std::str::from_utf8(replacements).map_err(|_| bad("not UTF-8"))?;
        if replacements.split('\0').any(|text| text.len() > MAX_RULE_BYTES) {
            return Err(bad("a replacement of more than 256 bytes"));
        }
        let units = trie.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
        Ok(Self { units, replacements: replacements.to_owned() })
    }

    /// Length and replacement of the longest rule that `text` begins with.
    fn longest(&self, text: &[u8]) -> Option<(usize, &str)> {
        let mut found = None;
        let mut node = self.root();
        for (index, &byte) in text.iter().enumerate().take(MAX_RULE_BYTES) {
            let Some((child, leaf)) = self.child(node, byte) else { break };
            node = child;
            if leaf {
                found = self.units.get(node as usize).map(|unit| (index + 1, unit & 0x7fff_ffff));
            }
        }
        let (length, offset) = found?;
        let replacement = self.replacements.get(offset as usize..)?;
        Some((length, replacement.split('\0').next().unwrap_or_default()))
    }

    /// Whether some rule begins with `byte` and then an ASCII byte.
    fn has_ascii_pair(&self, byte: u8) -> bool {
        self.child(self.root(), byte)
            .is_some_and(|(node, _)| (0..0x80).any(|next| self.child(node, next).is_some()))
    }

    fn root(&self) -> u32 {
        self.units.first().map_or(0, |&unit| offset(unit))
    }

    /// The state after `byte`, and whether a rule ends there (its value is then the unit at that state).
    fn child(&self, node: u32, byte: u8) -> Option<(u32, bool)> {
        let at = node ^ u32::from(byte);
        let unit = *self.units.get(at as usize)?;
        // A leaf has bit 31 set and so matches no label.
        (unit & 0x8000_00ff == u32::from(byte)).then(|| (at ^ offset(unit), unit >> 8 & 1 == 1))
    }
}

/// Distance (by exclusive or) from a unit to its children.
fn offset(unit: u32) -> u32 {
    (unit >> 10) << ((unit & 1 << 9) >> 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(dummy: bool, remove: bool, escape: bool, user: &PrefixSet) -> Normalizer {
        Normalizer::new(&[], dummy, remove, escape, user, "x").unwrap()
    }

    #[test]
    fn spaces_follow_the_three_switches() {
        let none = PrefixSet::default();
        let spaces = |dummy, remove, escape| plain(dummy, remove, escape, &none).normalize("  a  b ", &none);
        assert_eq!(spaces(false, true, true), "a▁b");
        assert_eq!(spaces(true, true, true), "▁a▁b");
        assert_eq!(spaces(false, false, true), "▁▁a▁▁b▁");
        assert_eq!(spaces(true, false, false), "   a  b ");
        assert_eq!(spaces(false, true, false), "a b");
        // A text of nothing but spaces gets no prefix either; a written U+2581 at the end goes like a space.
        assert_eq!(plain(true, true, true, &none).normalize("   ", &none), "");
        assert_eq!(plain(true, false, true, &none).normalize("", &none), "");
        assert_eq!(plain(false, true, true, &none).normalize("▁a▁ ▁", &none), "▁a");
    }

    #[test]
    fn user_defined_symbols_pass_unchanged() {
        let user = PrefixSet::new([("<a  b>", 7), ("a", 8)].into_iter());
        assert_eq!(plain(false, true, true, &user).normalize("x <a  b>  a", &user), "x▁<a▁▁b>▁a");
    }

    /// A map with one rule, `é` (c3 a9) to `e`: root block 0, then the state after c3, the one after a9, its value.
    fn one_rule() -> Vec<u8> {
        let mut units = vec![0u32; 1024];
        let link = |label: u32, from: u32, to: u32, leaf: u32| label | leaf << 8 | (from ^ to) << 10;
        units[0] = link(0, 0, 256, 0);
        units[256 ^ 0xc3] = link(0xc3, 256 ^ 0xc3, 512, 0);
        units[512 ^ 0xa9] = link(0xa9, 512 ^ 0xa9, 768, 1);
        units[768] = 0x8000_0000 | 2;
        let mut bytes = (4096u32).to_le_bytes().to_vec();
        bytes.extend(units.iter().flat_map(|u| u.to_le_bytes()));
        bytes.extend_from_slice(b"x\0e\0");
        bytes
    }

    #[test]
    fn rules_are_found_in_the_trie_and_bad_maps_refused() {
        let none = PrefixSet::default();
        let map = one_rule();
        let normalizer = Normalizer::new(&map, false, true, true, &none, "x").unwrap();
        assert_eq!(normalizer.normalize("café è", &none), "cafe▁è");
        let refused = |bytes: &[u8]| Normalizer::new(bytes, false, true, true, &none, "x").is_err();
        assert!(
            refused(&map[..3])
                && refused(&map[..4000])
                && refused(&[0; 8])
                && refused(&[3, 0, 0, 0, 1, 2, 3])
        );
        assert!(refused(&[map.as_slice(), &[0xff]].concat()));
        assert!(refused(&[map.as_slice(), &[b'x'; 257]].concat()));
        assert!(refused(&vec![0; MAX_CHARSMAP_BYTES + 1]));
    }

    #[test]
    fn a_map_of_noise_neither_panics_nor_loops() {
        let none = PrefixSet::default();
        let mut state = 1u32;
        for _ in 0..200 {
            let mut map = one_rule();
            for byte in &mut map[4..4100] {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
            let normalizer = Normalizer::new(&map, true, false, true, &none, "x").unwrap();
            let text: String = (1..0x3000).step_by(7).filter_map(char::from_u32).collect();
            assert!(normalizer.normalize(&text, &none).len() <= text.len() * MAX_RULE_BYTES);
        }
    }
}
