//! What commands print: text for people, or one JSON object; warnings and errors on stderr, a line each.

use crate::error::{Error, Result};
use serde::Serializer;
use std::io::Write;
use std::path::Path;

/// Prints a line on stdout. A closed pipe (`| head`) ends the output, not the work.
pub fn line(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Prints without a line end, at once.
pub fn part(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Prints one JSON object; numbers that are not finite become null.
pub fn json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_value(value)
        .map_err(|error| Error::failed(error, "--json", "a report that JSON can hold"))?;
    line(text);
    Ok(())
}

/// A path as JSON text: a name that is not UTF-8 is no reason to lose a report.
pub fn path<S: Serializer>(path: &Path, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// A warning on stderr.
pub fn warn(text: &str) {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let _ = writeln!(std::io::stderr().lock(), "warning: {text}");
}

/// The last line of a failed command, on stderr.
pub fn error_line(error: &Error) {
    let _ = writeln!(std::io::stderr().lock(), "error: {error}");
}

/// A table with aligned columns: numbers to the right, text to the left.
pub fn table(header: &[&str], rows: &[Vec<String>]) {
    let columns = header.len();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let is_number = |cell: &str| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    let print = |cells: Vec<&str>| {
        let cells = cells.iter().enumerate().map(|(column, cell)| {
            let width = widths[column];
            if is_number(cell) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        line(cells.collect::<Vec<_>>().join("  ").trim_end());
    };
    print(header.to_vec());
    for row in rows {
        print(row.iter().map(String::as_str).collect());
    }
}
