//! The validation loss that a run reached, from what it left: our own folder, or other people's logs and reports.

use crate::error::{Error, Result};
use crate::train::log::Metrics;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// The longest line of a log that is read, and the largest report: other people's logs hold their whole source.
const LONGEST_LINE: u64 = 1 << 20;
const LARGEST_REPORT: u64 = 16 << 20;

/// A final validation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Nats per token.
    pub val_loss: f64,
    /// Bits per byte, where it is known.
    pub val_bpb: Option<f64>,
}

/// The last validation of a run's folder (`metrics.jsonl`); of a `.json` file (as `eval --json` prints, or a
/// `submission.json`) its `val_loss`; of any other file, a log, its last `..._exact val_loss:`, or its last `val_loss:`.
///
/// Errors (input): nothing of the kind in it, or a loss that is not a number.
pub fn read(path: &Path) -> Result<Loss> {
    let found = if path.is_dir() {
        let rows = Metrics::read(&path.join("metrics.jsonl"))?;
        rows.iter().rev().find_map(|row| Some(Loss { val_loss: row.val_loss?, val_bpb: row.val_bpb }))
    } else if path.extension().is_some_and(|extension| extension == "json") {
        of_report(path)?
    } else {
        of_log(path)?
    };
    found.filter(|loss| loss.val_loss.is_finite()).ok_or_else(|| {
        Error::input(
            "no val_loss",
            path.display(),
            "a run that was validated, a report or a log with val_loss",
        )
    })
}

fn of_report(path: &Path) -> Result<Option<Loss>> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LARGEST_REPORT).read_to_end(&mut bytes));
    read.map_err(|error| Error::read(path, &error))?;
    let report: Value = serde_json::from_slice(&bytes).map_err(|error| {
        Error::input(format!("not JSON ({error})"), path.display(), "a report with val_loss")
    })?;
    let number = |key: &str| report.get(key).and_then(Value::as_f64);
    Ok(number("val_loss").map(|val_loss| Loss { val_loss, val_bpb: number("val_bpb") }))
}

fn of_log(path: &Path) -> Result<Option<Loss>> {
    let unreadable = |error| Error::read(path, &error);
    let mut reader = BufReader::new(File::open(path).map_err(unreadable)?);
    let (mut exact, mut last) = (None, None);
    loop {
        let mut line = Vec::new();
        let read = reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line).map_err(unreadable)?;
        if read == 0 {
            return Ok(exact.or(last));
        }
        let line = String::from_utf8_lossy(&line);
        let Some(loss) = of_line(&line) else { continue };
        if line.split_whitespace().next().is_some_and(|name| name.ends_with("_exact")) {
            exact = Some(loss);
        }
        last = Some(loss);
    }
}

/// `... val_loss:2.0727 val_bpb:1.2244 ...`; not a line of source code that prints such.
fn of_line(line: &str) -> Option<Loss> {
    let value = |key: &str| {
        let words = line.split_whitespace();
        words.filter_map(|word| word.strip_prefix(key)).find_map(|text| text.parse::<f64>().ok())
    };
    Some(Loss { val_loss: value("val_loss:")?, val_bpb: value("val_bpb:") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_a_run_left_holds_its_loss() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        let rows = "{\"step\":0,\"val_loss\":6.9,\"val_bpb\":4.1}\n{\"step\":9,\"val_loss\":2.5,\"val_bpb\":1.5}\n\
                    {\"step\":10,\"train_loss\":2.4}\n";
        file("run/metrics.jsonl", rows);
        let loss = read(&dir.path().join("run")).unwrap();
        assert_eq!(loss, Loss { val_loss: 2.5, val_bpb: Some(1.5) });
        // A last validation that is not a number is not passed over for a better one.
        file(
            "diverged/metrics.jsonl",
            &format!("{rows}{{\"step\":11,\"val_loss\":null,\"val_bpb\":null}}\n"),
        );
        assert_eq!(read(&dir.path().join("diverged")).unwrap_err().exit_code(), 2);

        let log = "log0(f\"val_loss:{val_loss:.4f}\")\nstep:5/9 val_loss:2.0606 val_bpb:1.2172 train_time:1ms\n\
                   final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570\n\
                   final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms\n";
        let loss = read(&file("train.log", log)).unwrap();
        assert_eq!(loss, Loss { val_loss: 2.072_699_31, val_bpb: Some(1.224_365_7) });
        let early = read(&file("early.txt", "step:5/9 val_loss:2.0606 val_bpb:1.2172\n")).unwrap();
        assert_eq!(early.val_loss, 2.0606);

        let report = read(&file("eval.json", "{\"val_loss\": 1.25, \"val_bpb\": null}")).unwrap();
        assert_eq!(report, Loss { val_loss: 1.25, val_bpb: None });
        for (name, text) in [
            ("none.log", "nothing\n"),
            ("null.json", "{\"val_loss\": null}"),
            ("broken.json", "{"),
            ("nan.log", "step:5/9 val_loss:2.0606 val_bpb:1.2\nstep:9/9 val_loss:nan val_bpb:nan\n"),
        ] {
            let error = read(&file(name, text)).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(name), "{error}");
        }
        assert_eq!(read(&dir.path().join("absent")).unwrap_err().exit_code(), 2);
    }
}
