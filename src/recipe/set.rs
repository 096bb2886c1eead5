//! TOML and `--set`: how a recipe is read, changed and written.

use super::{BuiltIn, KEYS, Key, Kind, Recipe, Value, builtin};
use crate::error::{Error, Result};
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The key that names the built-in recipe which a file starts from.
const BASE: &str = "base";

/// The largest recipe or environment file that is read, in bytes.
const LARGEST_FILE: u64 = 1 << 20;

/// Reads a small text file, refusing one that is too large before it is in memory.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(LARGEST_FILE + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| Error::read(path, &error))?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(Error::input("file too large", path.display(), format!("at most {LARGEST_FILE} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| Error::input("not a text file", path.display(), "UTF-8 text"))
}

/// The first characters of `text`, for a message.
pub(super) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}

/// The candidate that is most like `name`, whatever its case.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> &'a str {
    let name: String = name.chars().take(100).collect::<String>().to_lowercase();
    let likeness = |candidate: &str| strsim::normalized_damerau_levenshtein(&name, &candidate.to_lowercase());
    candidates.max_by(|a, b| likeness(a).total_cmp(&likeness(b))).unwrap_or_default()
}

fn find_key(name: &str, place: impl Display) -> Result<&'static Key> {
    KEYS.iter().find(|key| key.name == name).ok_or_else(|| {
        let near = nearest(name, KEYS.iter().map(|key| key.name));
        Error::input(
            format!("unknown key {}", excerpt(name)),
            place,
            format!("a recipe key; the nearest is {near}"),
        )
    })
}

/// The value that `text` states for a key of this kind, as flags and environment variables write it.
pub(super) fn parse_text(kind: Kind, text: &str) -> Option<Value> {
    let text = if kind == Kind::Text { text } else { text.trim() };
    match kind {
        Kind::Bool => match text.to_ascii_lowercase().as_str() {
            "1" | "true" => Some(Value::Bool(true)),
            "0" | "false" => Some(Value::Bool(false)),
            _ => None,
        },
        // An empty variable says nothing, where there may be nothing.
        Kind::Int if text.is_empty() => Some(Value::Int(-1)),
        // 524_288 is as good as 524288, in TOML and in Python.
        Kind::Int => text.replace('_', "").parse().ok().map(Value::Int),
        Kind::Float => text.replace('_', "").parse().ok().map(Value::Float),
        Kind::Text => Some(Value::Text(text.into())),
        Kind::List if text.starts_with('[') => {
            let table: toml::Table = format!("v = {text}").parse().ok()?;
            from_toml_value(table.get("v")?)
        }
        Kind::List => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Some(Value::List(items.map(String::from).collect()))
        }
        Kind::Layers => {
            let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
            let items = inner.split(',').map(str::trim).filter(|item| !item.is_empty());
            let mut layers = Vec::new();
            for item in items {
                let (first, last) = layer_range(item)?;
                // Before they are listed: a megabyte of long ranges would be 64 GB.
                (last - first < LONGEST_STACK - layers.len()).then_some(())?;
                layers.extend(first..=last);
            }
            Some(Value::Layers(layers))
        }
    }
}

/// A text that names more layers than any stack has is no list of layers.
const LONGEST_STACK: usize = 1 << 16;

/// One layer, or a range of them, by its first and last: `3`, or `0-11`.
fn layer_range(text: &str) -> Option<(usize, usize)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first <= last).then_some((first, last))
}

/// A TOML value as a key of this kind takes it.
fn of_kind(kind: Kind, value: &toml::Value) -> Option<Value> {
    match (kind, value) {
        (Kind::Layers, toml::Value::Array(items)) => {
            let layer = |item: &toml::Value| usize::try_from(item.as_integer()?).ok();
            items.iter().map(layer).collect::<Option<_>>().map(Value::Layers)
        }
        (Kind::Layers, toml::Value::String(text)) => parse_text(kind, text),
        _ => from_toml_value(value),
    }
}

fn from_toml_value(value: &toml::Value) -> Option<Value> {
    match value {
        toml::Value::Boolean(v) => Some(Value::Bool(*v)),
        toml::Value::Integer(v) => Some(Value::Int((*v).into())),
        toml::Value::Float(v) => Some(Value::Float(*v)),
        toml::Value::String(v) => Some(Value::Text(v.clone())),
        toml::Value::Array(v) => {
            v.iter().map(|item| item.as_str().map(String::from)).collect::<Option<_>>().map(Value::List)
        }
        toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}

pub(super) fn to_toml_text(value: Value) -> String {
    let text = |v: String| toml::Value::String(v);
    match value {
        Value::Bool(v) => v.to_string(),
        Value::Int(v) => v.to_string(),
        // The shortest digits that read back as the same float; TOML spells nan and inf small.
        Value::Float(v) => format!("{v:?}").to_lowercase(),
        Value::Text(v) => text(v).to_string(),
        Value::List(v) => toml::Value::Array(v.into_iter().map(text).collect()).to_string(),
        Value::Layers(v) => format!("{v:?}"),
    }
}

impl Recipe {
    /// Sets one key, or says what it expects; `shown` is the value as the user wrote it.
    fn put(&mut self, key: &Key, value: Option<Value>, shown: &str, place: impl Display) -> Result<()> {
        // In the challenge the int8 list defaults to the control list, so it follows until it is set apart.
        let follows = key.name == "control_tensor_name_patterns"
            && self.control_tensor_name_patterns == self.int8_keep_float_fp32_name_patterns;
        value.and_then(|value| key.assign(self, value)).ok_or_else(|| {
            Error::input(format!("{} = {}", key.name, excerpt(shown)), place, key.expected())
        })?;
        if follows {
            self.int8_keep_float_fp32_name_patterns = self.control_tensor_name_patterns.clone();
        }
        Ok(())
    }

    /// Sets one key from a text, as flags and environment variables write it.
    pub(super) fn put_text(&mut self, key: &Key, text: &str, place: impl Display) -> Result<()> {
        self.put(key, parse_text(key.kind, text), text, place)
    }

    /// Applies one `--set key=value`. Lists are comma-separated, or a TOML array.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let Some((name, value)) = assignment.split_once('=') else {
            return Err(Error::input(format!("no = in {}", excerpt(assignment)), "--set", "key=value"));
        };
        let key = find_key(name.trim(), "--set")?;
        self.put_text(key, value, "--set")
    }

    /// Reads a recipe that states what differs from the defaults, or from the built-in recipe that its key `base` names.
    /// A recipe without a name takes its file's.
    ///
    /// Keys are checked one by one; [`Recipe::validate`] checks them together, after the last change.
    pub fn from_toml(text: &str, place: &Path) -> Result<Self> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| {
                1 + text.as_bytes().iter().take(span.start).filter(|byte| **byte == b'\n').count()
            });
            Error::input(
                format!("not TOML ({})", error.message()),
                format!("{} line {line}", place.display()),
                "lines of key = value",
            )
        })?;
        for name in table.keys().filter(|name| *name != BASE) {
            find_key(name, place.display())?;
        }
        let base = match table.get(BASE) {
            None => Self::default(),
            Some(value) => {
                value.as_str().and_then(BuiltIn::find).map(BuiltIn::recipe).unwrap_or_else(|| {
                    let names: Vec<_> = builtin().iter().map(|built_in| built_in.name).collect();
                    let what = format!("{BASE} = {}", excerpt(&value.to_string()));
                    Err(Error::input(what, place.display(), format!("one of {}", names.join(", "))))
                })?
            }
        };
        let stem = place.file_stem().unwrap_or_default().to_string_lossy();
        let name = stem.chars().filter(|c| !c.is_control()).take(100).collect();
        let mut recipe = Self { name, summary: String::new(), ..base };
        // In the table's order, so that a list which follows another is set after it.
        for key in KEYS {
            if let Some(value) = table.get(key.name) {
                recipe.put(key, of_kind(key.kind, value), &value.to_string(), place.display())?;
            }
        }
        Ok(recipe)
    }

    /// The recipe of a built-in name or alias, else of the TOML file at that path.
    pub fn load(name_or_path: &str) -> Result<Self> {
        if let Some(built_in) = BuiltIn::find(name_or_path) {
            return built_in.recipe();
        }
        let path = Path::new(name_or_path);
        let is_toml = path.extension().is_some_and(|extension| extension == "toml");
        if is_toml || path.is_file() {
            return Self::from_toml(&read_text(path)?, path);
        }
        let names: Vec<_> = builtin().iter().flat_map(|b| [&[b.name], b.aliases].concat()).collect();
        Err(Error::input(
            "unknown recipe",
            excerpt(name_or_path),
            format!("one of {}, or the path of a .toml file", names.join(", ")),
        ))
    }

    /// The complete recipe as TOML, each key of its system with what it means; reading it back gives an equal recipe.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        for key in KEYS.iter().filter(|key| key.scope.holds(&self.system) || !key.is_default(self)) {
            let setting = format!("{} = {}", key.name, to_toml_text(key.value(self)));
            text.push_str(&format!("{setting:<46} # {}\n", key.doc));
        }
        text
    }
}
