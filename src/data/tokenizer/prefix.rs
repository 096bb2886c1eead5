//! The longest of a set of strings that a text begins with: how SentencePiece finds user-defined symbols.

use std::collections::HashMap;

/// A trie over bytes. A look-up costs at most the longest symbol's length, whatever the symbols.
#[derive(Default)]
pub(super) struct PrefixSet {
    /// Child of a node by byte; node 0 is the root.
    children: HashMap<(u32, u8), u32>,
    /// By node: the id of the symbol that ends there.
    ends: Vec<Option<u16>>,
    /// Symbols begin with these bytes: nearly every position of a text is dismissed by this alone.
    first: Option<Box<[bool; 256]>>,
}

impl PrefixSet {
    /// The set of `symbols`, each with its id; none is empty.
    pub fn new<'a>(symbols: impl Iterator<Item = (&'a str, u16)>) -> Self {
        let mut set = Self { ends: vec![None], ..Self::default() };
        for (text, id) in symbols {
            let mut node = 0;
            for &byte in text.as_bytes() {
                let fresh = set.ends.len() as u32;
                node = *set.children.entry((node, byte)).or_insert(fresh);
                if node == fresh {
                    set.ends.push(None);
                }
            }
            set.ends[node as usize] = Some(id);
            set.first.get_or_insert_with(|| Box::new([false; 256]))[usize::from(text.as_bytes()[0])] = true;
        }
        set
    }

    /// Whether there are no symbols.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// Whether a symbol begins with `byte`.
    pub fn starts_with(&self, byte: u8) -> bool {
        self.first.as_ref().is_some_and(|first| first[usize::from(byte)])
    }

    /// Length in bytes and id of the longest symbol that `text` begins with.
    pub fn longest(&self, text: &[u8]) -> Option<(usize, u16)> {
        if !self.starts_with(*text.first()?) {
            return None;
        }
        let (mut node, mut found) = (0, None);
        for (index, &byte) in text.iter().enumerate() {
            match self.children.get(&(node, byte)) {
                Some(&child) => node = child,
                None => break,
            }
            if let Some(id) = self.ends[node as usize] {
                found = Some((index + 1, id));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_symbol_wins() {
        let set = PrefixSet::new([("ab", 1), ("a", 2), ("abcd", 3)].into_iter());
        assert_eq!(set.longest(b"abc"), Some((2, 1)));
        assert_eq!(set.longest(b"abcde"), Some((4, 3)));
        assert_eq!(set.longest(b"ac"), Some((1, 2)));
        assert_eq!(set.longest(b"ba"), None);
        assert_eq!(set.longest(b""), None);
        assert!(PrefixSet::new(std::iter::empty()).is_empty());
    }
}
