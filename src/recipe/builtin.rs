//! The recipes that are compiled in, one file each under `examples/recipes/`.

use super::Recipe;
use crate::error::Result;
use std::path::Path;

/// A recipe that is compiled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuiltIn {
    /// Its name.
    pub name: &'static str,
    /// Its other names.
    pub aliases: &'static [&'static str],
    /// Its TOML file: what differs from the defaults.
    pub toml: &'static str,
}

static BUILT_IN: &[BuiltIn] = &[
    BuiltIn { name: "tiny", aliases: &[], toml: include_str!("../../examples/recipes/tiny.toml") },
    BuiltIn { name: "baseline", aliases: &[], toml: include_str!("../../examples/recipes/baseline.toml") },
    BuiltIn {
        name: "ternary-loop",
        aliases: &["pr1994"],
        toml: include_str!("../../examples/recipes/ternary-loop.toml"),
    },
    BuiltIn {
        name: "mamba3-hinge",
        aliases: &["pr1607"],
        toml: include_str!("../../examples/recipes/mamba3-hinge.toml"),
    },
    BuiltIn {
        name: "mamba1-unet",
        aliases: &["pr1382"],
        toml: include_str!("../../examples/recipes/mamba1-unet.toml"),
    },
];

/// The built-in recipes.
pub fn builtin() -> &'static [BuiltIn] {
    BUILT_IN
}

impl BuiltIn {
    /// The built-in recipe of this name or alias, if there is one.
    pub fn find(name: &str) -> Option<&'static Self> {
        BUILT_IN.iter().find(|b| b.name == name || b.aliases.contains(&name))
    }

    /// The recipe itself.
    pub fn recipe(&self) -> Result<Recipe> {
        Recipe::from_toml(self.toml, Path::new(self.name))
    }
}
