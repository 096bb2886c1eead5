//! What a recipe key is: its type, its bounds, its names, and the macro that declares all keys in one table.

use super::table::Recipe;

/// The value of a key, whatever file, flag or variable it came from.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A truth value.
    Bool(bool),
    /// A whole number, wide enough for every integer field.
    Int(i128),
    /// A number.
    Float(f64),
    /// A text.
    Text(String),
    /// A list of texts.
    List(Vec<String>),
    /// A list of layers by their numbers.
    Layers(Vec<usize>),
}

/// The type of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Int,
    /// A number; whole ones are accepted too.
    Float,
    /// A text.
    Text,
    /// A list of texts; comma-separated in flags and variables.
    List,
    /// Layers by their numbers from 0: an array in TOML; in texts comma-separated numbers and ranges, as `0-11,15`.
    Layers,
}

/// The values that a key accepts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// Both truth values.
    Any,
    /// Whole numbers from the first to the second.
    Int(i128, i128),
    /// Finite numbers from the first to the second.
    Within(f64, f64),
    /// Finite numbers above zero, up to this one.
    Positive(f64),
    /// Numbers in `[0, 1)`.
    Fraction,
    /// Texts of at most so many characters, without control characters.
    Text(usize),
    /// Exactly these texts.
    OneOf(&'static [&'static str]),
    /// At most so many texts, none of them empty, none over 100 characters.
    List(usize),
    /// Different layers among the first so many, in ascending order.
    Layers(usize),
    /// Nothing (an empty text, or -1), or a whole number up to this one.
    OrNothing(i128),
}

/// The longest text in a list, in characters.
const LONGEST_ITEM: usize = 100;

fn is_line(text: &str, longest: usize) -> bool {
    // Bytes first: no need to walk a text that is far too long.
    text.len() <= longest * 4 && text.chars().count() <= longest && !text.chars().any(char::is_control)
}

impl Limit {
    /// Whether `value` is of the right type and within the bounds.
    fn admits(self, value: &Value) -> bool {
        match (self, value) {
            (Self::Any, Value::Bool(_)) => true,
            (Self::Int(low, high), Value::Int(v)) => (low..=high).contains(v),
            (Self::Within(low, high), Value::Float(v)) => (low..=high).contains(v),
            (Self::Positive(high), Value::Float(v)) => *v > 0.0 && *v <= high,
            (Self::Fraction, Value::Float(v)) => (0.0..1.0).contains(v),
            (Self::Text(longest), Value::Text(v)) => is_line(v, longest),
            (Self::OneOf(names), Value::Text(v)) => names.contains(&v.as_str()),
            (Self::List(longest), Value::List(v)) => {
                v.len() <= longest && v.iter().all(|item| !item.is_empty() && is_line(item, LONGEST_ITEM))
            }
            (Self::Layers(count), Value::Layers(v)) => {
                v.is_sorted_by(|a, b| a < b) && v.last().is_none_or(|last| *last < count)
            }
            (Self::OrNothing(high), Value::Int(v)) => (-1..=high).contains(v),
            _ => false,
        }
    }

    fn expected(self) -> String {
        match self {
            Self::Any => "true or false".into(),
            Self::Int(low, high) => format!("an integer from {low} to {high}"),
            Self::Within(low, high) => format!("a number from {low} to {high}"),
            Self::Positive(high) => format!("a number above 0, at most {high}"),
            Self::Fraction => "a number from 0 to below 1".into(),
            Self::Text(longest) => format!("a text of one line, at most {longest} characters"),
            Self::OneOf(names) => format!("one of {}", names.join(", ")),
            Self::List(longest) => {
                format!("a list of at most {longest} texts of 1 to {LONGEST_ITEM} characters")
            }
            Self::Layers(count) => format!("different layers from 0 to {}, ascending", count - 1),
            Self::OrNothing(high) => format!("nothing, or an integer from 0 to {high}"),
        }
    }
}

/// One key of the recipe: everything that TOML, `--set`, the environment, help and validation derive from.
pub struct Key {
    /// The key in TOML and `--set`.
    pub name: &'static str,
    /// The challenge's environment name, if it has one.
    pub env: Option<&'static str>,
    /// What it means, in one line.
    pub doc: &'static str,
    /// The type of its value.
    pub kind: Kind,
    /// The values it accepts.
    pub limit: Limit,
    /// The systems in which it means something.
    pub scope: Scope,
    pub(super) get: fn(&Recipe) -> Value,
    pub(super) put: fn(&mut Recipe, Value) -> Option<()>,
}

impl Key {
    /// The value that `recipe` has for this key.
    pub fn value(&self, recipe: &Recipe) -> Value {
        (self.get)(recipe)
    }

    /// Whether `recipe` has the default of this key.
    pub fn is_default(&self, recipe: &Recipe) -> bool {
        (self.get)(recipe) == (self.get)(&Recipe::default())
    }

    /// What a value must be, in words: its type and bounds.
    pub fn expected(&self) -> String {
        self.limit.expected()
    }

    /// Whether this key accepts `value`.
    pub fn admits(&self, value: &Value) -> bool {
        self.limit.admits(value)
    }

    /// Sets the key in `recipe`; `None`, with `recipe` unchanged, when the value is not admitted.
    pub(super) fn assign(&self, recipe: &mut Recipe, value: Value) -> Option<()> {
        let value = match (self.kind, value) {
            (Kind::Float, Value::Int(v)) => Value::Float(v as f64),
            (_, value) => value,
        };
        if !self.admits(&value) {
            return None;
        }
        (self.put)(recipe, value)
    }
}

/// The systems that know a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope(&'static [&'static str]);

impl Scope {
    /// Every system.
    pub(super) const ALL: Self = Self(&super::SYSTEMS);
    /// These.
    pub(super) const fn of(systems: &'static [&'static str]) -> Self {
        Self(systems)
    }

    /// Whether the key means something in that system.
    pub fn holds(self, system: &str) -> bool {
        self.0.contains(&system)
    }

    /// The systems' names.
    pub fn names(self) -> String {
        self.0.join(", ")
    }
}

/// A field type of the recipe.
pub(super) trait Knob: Sized {
    const KIND: Kind;
    fn to_value(&self) -> Value;
    fn from_value(value: Value) -> Option<Self>;
}

macro_rules! knob {
    ($($type:ty, $kind:ident, $to:expr, $from:expr;)+) => { $(
        impl Knob for $type {
            const KIND: Kind = Kind::$kind;
            fn to_value(&self) -> Value {
                let to: fn(&$type) -> _ = $to;
                Value::$kind(to(self))
            }
            fn from_value(value: Value) -> Option<Self> {
                let Value::$kind(v) = value else { return None };
                let from: fn(_) -> Option<$type> = $from;
                from(v)
            }
        }
    )+ };
}

knob! {
    bool, Bool, |v| *v, Some;
    usize, Int, |v| *v as i128, |v: i128| v.try_into().ok();
    u64, Int, |v| i128::from(*v), |v: i128| v.try_into().ok();
    f64, Float, |v| *v, Some;
    String, Text, String::clone, Some;
    Vec<String>, List, Vec::clone, Some;
    Vec<usize>, Layers, Vec::clone, Some;
    Option<usize>, Int, |v| v.map_or(-1, |v| v as i128), |v: i128| if v < 0 { Some(None) } else { v.try_into().ok().map(Some) };
}

/// Declares [`Recipe`], its defaults and its key table from rows of
/// `/// doc` and `key: type = default, environment name, limit;`, grouped by the systems that know them.
macro_rules! knobs {
    ($($scope:expr => { $($(#[doc = $doc:literal])+ $key:ident: $type:ty = $default:expr, $env:expr, $limit:expr;)+ })+) => {
        /// Every knob of a run, flat. A key is the lower case of the challenge's environment name where it has one
        /// (spec/challenge.md section 4); the defaults are the challenge's baseline.
        ///
        /// Fields may be written directly: call [`Recipe::validate`] after the last change.
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Recipe {
            $($($(#[doc = $doc])+ pub $key: $type,)+)+
        }

        impl Default for Recipe {
            fn default() -> Self {
                Self { $($($key: $default,)+)+ }
            }
        }

        pub(super) static KEYS: &[Key] = &[$($(Key {
            name: stringify!($key),
            env: $env,
            doc: concat!($($doc),+).trim_ascii(),
            kind: <$type as Knob>::KIND,
            limit: $limit,
            scope: $scope,
            get: |recipe| Knob::to_value(&recipe.$key),
            put: |recipe, value| {
                recipe.$key = Knob::from_value(value)?;
                Some(())
            },
        },)+)+];
    };
}
pub(super) use knobs;
