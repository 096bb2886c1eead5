//! The index of a folder of fixtures: `index*.json`, each `{"fixtures": {name: entry}}`.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// The largest index file that is read (the peers' own has 0.4 MB).
const LARGEST_INDEX: u64 = 64 << 20;

/// Every fixture that the index files of a folder list, by name.
#[derive(Debug)]
pub(super) struct Index {
    entries: BTreeMap<String, Entry>,
}

impl Index {
    /// Reads every `index*.json` of `dir`.
    ///
    /// Errors (input): no folder, no index, an index that is no JSON of the expected form or lists nothing, a name
    /// in two of them.
    pub fn load(dir: &Path) -> Result<Self> {
        let mut entries = BTreeMap::new();
        for path in index_files(dir)? {
            for (name, entry) in read_index(&path)? {
                if entries.insert(name.clone(), Entry(entry)).is_some() {
                    return Err(Error::input(
                        format!("fixture {name} is listed twice"),
                        path.display(),
                        "each name in one index of the folder",
                    ));
                }
            }
        }
        if entries.is_empty() {
            return Err(Error::input(
                "no fixture is listed",
                dir.display(),
                "at least one in an index*.json",
            ));
        }
        Ok(Self { entries })
    }

    /// The entry of that name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// The entries whose names the glob matches, in the order of their names; all without one.
    ///
    /// Errors (input): the glob matches none.
    pub fn matching(&self, glob: Option<&str>) -> Result<Vec<(&str, &Entry)>> {
        let chosen: Vec<_> = self
            .entries
            .iter()
            .filter(|(name, _)| glob.is_none_or(|glob| glob_matches(glob, name)))
            .map(|(name, entry)| (name.as_str(), entry))
            .collect();
        if chosen.is_empty() {
            let glob = glob.unwrap_or_default();
            return Err(Error::input(
                format!("no fixture is named {glob}"),
                "--only",
                format!("a glob that matches at least one of the {} names", self.entries.len()),
            ));
        }
        Ok(chosen)
    }
}

fn index_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |error| Error::read(dir, &error);
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        if name.to_str().is_some_and(|name| name.starts_with("index") && name.ends_with(".json")) {
            files.push(dir.join(name));
        }
    }
    if files.is_empty() {
        return Err(Error::input("no index", dir.display(), "an index*.json that lists fixtures"));
    }
    files.sort();
    Ok(files)
}

fn read_index(path: &Path) -> Result<Map<String, Value>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LARGEST_INDEX + 1).read_to_end(&mut bytes))
        .map_err(|error| Error::read(path, &error))?;
    if bytes.len() as u64 > LARGEST_INDEX {
        return Err(Error::input("file too large", path.display(), "an index of at most 64 MiB"));
    }
    let index: Value = serde_json::from_slice(&bytes).map_err(|error| {
        Error::input(format!("not JSON ({error})"), path.display(), "an index of fixtures")
    })?;
    let Value::Object(mut index) = index else {
        return Err(Error::input("not a JSON object", path.display(), "an object with the key fixtures"));
    };
    match index.remove("fixtures") {
        Some(Value::Object(fixtures)) => Ok(fixtures),
        _ => Err(Error::input("no object fixtures", path.display(), "fixtures: {name: entry, ...}")),
    }
}

/// Whether `glob` matches all of `name`: `*` stands for any characters, `?` for one.
fn glob_matches(glob: &str, name: &str) -> bool {
    let (glob, name): (Vec<char>, Vec<char>) = (glob.chars().collect(), name.chars().collect());
    let (mut g, mut n) = (0, 0);
    // The last `*`, and the end of what it stands for so far: one character more on each mismatch.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match glob.get(g) {
            Some('*') => {
                star = Some((g, n));
                g += 1;
            }
            Some(&c) if c == '?' || c == name[n] => (g, n) = (g + 1, n + 1),
            _ => {
                let Some((at, end)) = star else { return false };
                star = Some((at, end + 1));
                (g, n) = (at + 1, end + 1);
            }
        }
    }
    glob[g..].iter().all(|c| *c == '*')
}

/// What an index says of one fixture.
#[derive(Debug)]
pub(super) struct Entry(Value);

impl Entry {
    /// What the file holds.
    pub fn kind(&self) -> Result<&str> {
        let kind = self.0.get("kind").and_then(Value::as_str);
        kind.ok_or_else(|| Error::input("no kind", "the entry", "what the fixture holds"))
    }

    /// The entry's own keys.
    pub fn top(&self) -> Section<'_> {
        Section { path: "entry", map: self.0.as_object() }
    }

    /// An object among the entry's keys; one that is absent or null has no keys.
    pub fn section(&self, path: &'static str) -> Result<Section<'_>> {
        self.top().inner(path)
    }

    /// Whether the `dtype` or a note of the entry or of its config says `words`: how the peer computed is in no other key.
    pub fn says(&self, words: &str) -> bool {
        let config = self.0.get("config").and_then(Value::as_object);
        let keys = self.0.as_object().into_iter().chain(config).flatten();
        let mut texts = keys.filter(|(key, _)| *key == "dtype" || key.starts_with("note"));
        texts.any(|(_, text)| text.as_str().is_some_and(|text| text.contains(words)))
    }

    /// A tolerance that the entry must hold.
    pub fn bound(&self, key: &str) -> Result<f64> {
        let bound = self.top().needed(key)?;
        if bound < 0.0 {
            return Err(Error::input(format!("{key} = {bound}"), "entry", "a number from 0"));
        }
        Ok(bound)
    }

    /// The tensors that the file should hold, with their shapes where the index says them.
    pub fn tensors(&self) -> Result<impl Iterator<Item = (&str, Option<Vec<usize>>)>> {
        let shape = |value: &Value| -> Option<Vec<usize>> {
            let sizes = value.get(1)?.as_array()?.iter();
            sizes.map(|size| size.as_u64().and_then(|size| size.try_into().ok())).collect()
        };
        let section = self.section("tensors")?;
        Ok(section.iter().map(move |(name, value)| (name, shape(value))))
    }
}

/// An object of the entry; errors name its keys. A key that is null counts as absent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Section<'a> {
    path: &'static str,
    map: Option<&'a Map<String, Value>>,
}

impl<'a> Section<'a> {
    /// Every key that is there and its value.
    pub fn iter(self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let keys = self.map.into_iter().flatten();
        keys.map(|(key, value)| (key.as_str(), value)).filter(|(_, value)| !value.is_null())
    }

    /// The value of a key.
    pub fn get(self, key: &str) -> Option<&'a Value> {
        self.map.and_then(|map| map.get(key)).filter(|value| !value.is_null())
    }

    /// An object among the keys; one that is absent has no keys.
    pub fn inner(self, key: &'static str) -> Result<Self> {
        match self.get(key) {
            None => Ok(Self { path: key, map: None }),
            Some(Value::Object(map)) => Ok(Self { path: key, map: Some(map) }),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// Refuses keys outside `known`: an option that is not understood would give other numbers. Notes are let through.
    pub fn only(self, known: &[&str]) -> Result<()> {
        let unknown = self.iter().find(|(key, _)| !known.contains(key) && !key.starts_with("note"));
        unknown.map_or(Ok(()), |(key, _)| {
            Err(Error::input(
                format!("unknown key {key}"),
                self.path,
                format!("keys among {}", known.join(", ")),
            ))
        })
    }

    fn wrong(self, key: &str, expected: &str) -> Error {
        let what = match self.get(key) {
            Some(value) => format!("{key} = {}", value.to_string().chars().take(60).collect::<String>()),
            None => format!("no {key}"),
        };
        Error::input(what, self.path, expected)
    }

    /// A finite number, if the key is there.
    pub fn number(self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.wrong(key, "a finite number"))
    }

    /// A finite number that must be there.
    pub fn needed(self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| self.wrong(key, "a finite number"))
    }

    /// A whole number from 0, if the key is there.
    pub fn count(self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let count = value.as_u64().and_then(|count| count.try_into().ok());
        count.map(Some).ok_or_else(|| self.wrong(key, "a whole number from 0"))
    }

    /// Whether a flag is set, `default` where the key is absent.
    pub fn flag(self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false"))
    }

    /// A text, if the key is there.
    pub fn text(self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a text"))
    }

    /// Refuses any other text than `known` for a key that names the one formula there is.
    pub fn formula(self, key: &str, known: &str) -> Result<()> {
        match self.text(key)? {
            Some(text) if text != known => Err(self.wrong(key, known)),
            _ => Ok(()),
        }
    }

    /// A list of finite numbers, if the key is there.
    pub fn numbers(self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        list.map(Some).ok_or_else(|| self.wrong(key, "a list of numbers"))
    }

    /// A list of texts, if the key is there.
    pub fn texts(self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        list.map(Some).ok_or_else(|| self.wrong(key, "a list of texts"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_names() {
        for (glob, name) in [
            ("*", ""),
            ("*", "abc"),
            ("abc", "abc"),
            ("a?c", "abc"),
            ("a*c", "ac"),
            ("a*c", "abbc"),
            ("*b*b*", "abcb"),
            ("tr_*_f64", "tr_chal_train5_f64"),
            ("a**", "a"),
            ("?é", "xé"),
        ] {
            assert!(glob_matches(glob, name), "{glob} {name}");
        }
        for (glob, name) in [
            ("", "a"),
            ("a", "ab"),
            ("?", ""),
            ("a?c", "ac"),
            ("*b", "abc"),
            ("tr_*_f64", "tr_chal_f64_x"),
            ("A", "a"),
        ] {
            assert!(!glob_matches(glob, name), "{glob} {name}");
        }
        // Quadratic at worst, never exponential.
        assert!(!glob_matches(&"*a".repeat(200), &"b".repeat(2000)));
    }
}
