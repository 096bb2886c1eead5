//! The one error type of the library, and the exit status that it stands for.

use std::fmt;
use std::path::Path;

/// A result of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The longest line that an error prints, in characters.
const LONGEST: usize = 600;

/// What went wrong, where, and what was expected: always one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// Bad usage or bad input: a flag, a recipe key, a file's content. Exit status 2.
    Input {
        /// What is wrong.
        what: String,
        /// The file, flag or key that it is about.
        place: String,
        /// What was expected instead.
        expected: String,
    },
    /// The run itself failed (no space, a loss that is not finite, a lost device). Exit status 1.
    Failed {
        /// What failed.
        what: String,
        /// The file, device or step that it happened at.
        place: String,
        /// What was expected, or what to do.
        expected: String,
    },
    /// The user asked to stop (Ctrl-C). Exit status 130.
    Interrupted {
        /// Where the work was left.
        place: String,
    },
}

impl Error {
    /// Bad usage or input.
    pub fn input(what: impl fmt::Display, place: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Self::Input { what: what.to_string(), place: place.to_string(), expected: expected.to_string() }
    }

    /// A run that failed.
    pub fn failed(what: impl fmt::Display, place: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Self::Failed { what: what.to_string(), place: place.to_string(), expected: expected.to_string() }
    }

    /// A run that diverged; `step` made what is not finite.
    pub fn diverged(what: impl fmt::Display, step: usize) -> Self {
        let expected =
            "finite numbers (go on from the last checkpoint, or start anew with lower learning rates)";
        Self::failed(what, format!("step {step}"), expected)
    }

    /// A file that cannot be read: bad input.
    pub fn read(path: &Path, error: &std::io::Error) -> Self {
        Self::input(format!("cannot read ({error})"), path.display(), "a readable file")
    }

    /// A file that cannot be written: a failed run.
    pub fn write(path: &Path, error: &std::io::Error) -> Self {
        Self::failed(format!("cannot write ({error})"), path.display(), "a writable place with enough space")
    }

    /// The process exit status that this error stands for (`CLI.md`'s contract).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input { .. } => 2,
            Self::Failed { .. } => 1,
            Self::Interrupted { .. } => 130,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = match self {
            Self::Input { what, place, expected } | Self::Failed { what, place, expected } => {
                format!("{what}, {place}, expected {expected}")
            }
            Self::Interrupted { place } => format!("interrupted, {place}, expected to be resumed"),
        };
        // One line that can be read, whatever a file name or a library's message holds.
        let mut characters = line.chars();
        let line: String =
            characters.by_ref().take(LONGEST).map(|c| if c.is_control() { ' ' } else { c }).collect();
        let rest = if characters.next().is_some() { "..." } else { "" };
        write!(f, "{line}{rest}")
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_its_three_parts() {
        let error = Error::input("bad\nmagic", "a\tb.bin", "20240520");
        assert_eq!(error.to_string(), "bad magic, a b.bin, expected 20240520");
        assert_eq!(error.exit_code(), 2);
        assert_eq!(Error::failed("x", "y", "z").exit_code(), 1);
        assert_eq!(Error::Interrupted { place: "step 3".into() }.exit_code(), 130);
    }
}
