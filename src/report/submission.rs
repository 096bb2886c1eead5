//! The challenge's submission folder (spec/challenge.md section 1): README.md, submission.json, a log for each run, the
//! artifact, and the code.

use super::losses::Loss;
use crate::artifact::budget::{CAP_BYTES, code_bytes, source_files};
use crate::error::{Error, Result};
use crate::eval::statistics::Sample;
use crate::files::write_atomic;
use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The name of the challenge's record of a submission.
pub const RECORD: &str = "submission.json";

/// The artifact's name in the folder.
pub const ARTIFACT: &str = "model.fairway";

/// Who submits what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Author {
    /// Name of the author.
    pub author: String,
    /// Name on GitHub.
    pub github_id: String,
    /// Name of the submission.
    pub name: String,
    /// What it is, in a line.
    pub blurb: String,
}

/// One run of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Its seed.
    pub seed: u64,
    /// Its `train.log`.
    pub log: Vec<u8>,
    /// Its last validation, of the weights before quantisation.
    pub loss: Loss,
}

/// Everything that goes into the folder, but the artifact, which is there already.
#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    /// Who submits what.
    pub author: Author,
    /// The runs, one a seed.
    pub runs: Vec<Run>,
    /// The resolved recipe of the first run.
    pub recipe_toml: String,
    /// The artifact's own score, where it was measured.
    pub scored: Option<Loss>,
    /// The artifact's size.
    pub artifact_bytes: u64,
    /// Its quantisation and codec.
    pub packing: (String, String),
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// Artifact and packed source: what the cap is held against.
    pub bytes_total: u64,
    /// Our packed source.
    pub bytes_code: u64,
    /// Whether the total is at most [`CAP_BYTES`].
    pub under_cap: bool,
    /// The loss that the record states.
    pub loss: Loss,
}

/// Refuses a folder that holds something else than an earlier submission, whole or not.
pub fn check_folder(dir: &Path) -> Result<()> {
    let refuse =
        |what: &str| Err(Error::input(what, dir.display(), "a new folder, or an earlier submission's"));
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return refuse(&format!("cannot read ({error})")),
    };
    let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    let is_begun = || dir.join(ARTIFACT).exists() && names.iter().all(|name| is_own(&name.to_string_lossy()));
    if names.is_empty() || dir.join(RECORD).exists() || is_begun() {
        return Ok(());
    }
    refuse("folder with other files")
}

/// Whether a submission writes a file or folder of that name.
fn is_own(name: &str) -> bool {
    let is_log = name.starts_with("train_seed") && name.ends_with(".log");
    is_log || [ARTIFACT, "source", "recipe.toml", "README.md", RECORD].contains(&name)
}

/// Takes an earlier submission's record away, before anything else in its folder changes: a folder with one is whole.
pub fn begin(dir: &Path) -> Result<()> {
    let record = dir.join(RECORD);
    match fs::remove_file(&record) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::write(&record, &error)),
        _ => Ok(()),
    }
}

impl Submission {
    /// Writes the folder, in which the artifact lies.
    pub fn write(&self, dir: &Path) -> Result<Written> {
        let bytes_code = code_bytes()?;
        let bytes_total = self.artifact_bytes + bytes_code;
        let loss = self.scored.unwrap_or_else(|| self.mean());
        let written = Written { bytes_total, bytes_code, under_cap: bytes_total <= CAP_BYTES, loss };
        let mut logs = Vec::new();
        for run in &self.runs {
            let name = self.log_name(run, &logs);
            write_atomic(&dir.join(&name), &run.log)?;
            logs.push(name);
        }
        for (name, content) in source_files() {
            write_atomic(&dir.join("source").join(name), content)?;
        }
        write_atomic(&dir.join("recipe.toml"), self.recipe_toml.as_bytes())?;
        write_atomic(&dir.join("README.md"), self.readme(&written, &logs).as_bytes())?;
        let record = serde_json::to_vec_pretty(&self.record(&written))
            .map_err(|error| Error::failed(error, RECORD, "a record that JSON can hold"))?;
        // Last: a folder with it is whole.
        write_atomic(&dir.join(RECORD), &record)?;
        Ok(written)
    }

    fn mean(&self) -> Loss {
        let of = |value: &dyn Fn(&Run) -> Option<f64>| {
            let values: Vec<f64> = self.runs.iter().filter_map(value).collect();
            (values.len() == self.runs.len()).then(|| Sample::of(&values).mean)
        };
        Loss {
            val_loss: of(&|run| Some(run.loss.val_loss)).unwrap_or(f64::NAN),
            val_bpb: of(&|run| run.loss.val_bpb),
        }
    }

    /// `train_seed1337.log`; further runs of one seed have a number behind it.
    fn log_name(&self, run: &Run, taken: &[String]) -> String {
        let plain = format!("train_seed{}.log", run.seed);
        if !taken.contains(&plain) {
            return plain;
        }
        let numbered = |n: usize| format!("train_seed{}_{n}.log", run.seed);
        (2..).map(numbered).find(|name| !taken.contains(name)).unwrap_or(plain)
    }

    fn record(&self, written: &Written) -> serde_json::Value {
        let Author { author, github_id, name, blurb } = &self.author;
        serde_json::json!({
            "author": author,
            "github_id": github_id,
            "name": name,
            "blurb": blurb,
            "date": today(),
            "val_loss": written.loss.val_loss,
            "val_bpb": written.loss.val_bpb,
            "bytes_total": written.bytes_total,
            "bytes_code": written.bytes_code,
            "bytes_model": self.artifact_bytes,
            "scored": if self.scored.is_some() { "the artifact" } else { "the mean of the runs before quantisation" },
            "seeds": self.runs.iter().map(|run| serde_json::json!({
                "seed": run.seed,
                "val_loss": run.loss.val_loss,
                "val_bpb": run.loss.val_bpb,
            })).collect::<Vec<_>>(),
        })
    }

    fn readme(&self, written: &Written, logs: &[String]) -> String {
        let Author { author, github_id, name, blurb } = &self.author;
        let losses: Vec<f64> = self.runs.iter().map(|run| run.loss.val_loss).collect();
        let sample = Sample::of(&losses);
        let shown = |value: Option<f64>, decimals: usize| {
            value.filter(|value| value.is_finite()).map_or("-".into(), |value| format!("{value:.decimals$}"))
        };
        let mut text = format!("# {name}\n\n{blurb}\n\n{author} ({github_id})\n\n");
        let what = if self.scored.is_some() { "artifact, reloaded" } else { "runs, before quantisation" };
        let _ = write!(
            text,
            "| what | value |\n|---|---|\n| val_bpb ({what}) | {} |\n| val_loss ({what}) | {} |\n\
             | artifact bytes | {} |\n| code bytes (packed source) | {} |\n| total bytes (cap {CAP_BYTES}) | {} |\n\n",
            shown(written.loss.val_bpb, 8),
            shown(Some(written.loss.val_loss), 8),
            self.artifact_bytes,
            written.bytes_code,
            written.bytes_total
        );
        text.push_str("| seed | val_loss | val_bpb | log |\n|---|---|---|---|\n");
        for (run, log) in self.runs.iter().zip(logs) {
            let (loss, bpb) = (shown(Some(run.loss.val_loss), 6), shown(run.loss.val_bpb, 6));
            let _ = writeln!(text, "| {} | {loss} | {bpb} | `{log}` |", run.seed);
        }
        let (quant, codec) = &self.packing;
        let _ = write!(
            text,
            "\nOver {} seeds before quantisation: mean {} nats, standard deviation {}.\n\n\
             Trained with `recipe.toml` by the program in `source/`:\n\n```\n\
             fairway train recipe.toml --data DIR --seed SEED --out RUN\n\
             fairway export RUN --quant {quant} --codec {codec} --out {ARTIFACT}\n\
             fairway eval {ARTIFACT} --data DIR\n```\n",
            sample.count,
            shown(Some(sample.mean), 6),
            shown(Some(sample.std), 6)
        );
        text
    }
}

/// Today's date in UTC, `2026-04-30`.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    date(seconds / 86_400)
}

/// The date of a day since 1970-01-01, in years that begin with March, so that a leap day ends one.
fn date(days: u64) -> String {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = year + 400 * era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_dates() {
        for (days, expected) in [
            (0, "1970-01-01"),
            (59, "1970-03-01"),
            (789, "1972-02-29"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_573, "2026-04-30"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date(days), expected);
        }
    }

    fn submission() -> Submission {
        let run = |seed: u64, val_loss: f64| Run {
            seed,
            log: format!("seed:{seed}\n").into_bytes(),
            loss: Loss { val_loss, val_bpb: Some(val_loss / 2.0) },
        };
        Submission {
            author: Author {
                author: "A".into(),
                github_id: "a".into(),
                name: "N".into(),
                blurb: "What it is".into(),
            },
            runs: vec![run(1, 2.0), run(2, 2.5), run(1, 3.0)],
            recipe_toml: "system = \"challenge\"\n".into(),
            scored: None,
            artifact_bytes: 1000,
            packing: ("gptq-int6".into(), "lzma".into()),
        }
    }

    #[test]
    fn the_folder_has_what_the_challenge_asks_for() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut submission = submission();
        let written = submission.write(&out).unwrap();
        assert_eq!(written.bytes_total, written.bytes_code + 1000);
        assert_eq!(written.loss, Loss { val_loss: 2.5, val_bpb: Some(1.25) });
        let read = |name: &str| fs::read_to_string(out.join(name)).unwrap();
        let record: serde_json::Value = serde_json::from_str(&read(RECORD)).unwrap();
        for key in [
            "author",
            "github_id",
            "name",
            "blurb",
            "date",
            "val_loss",
            "val_bpb",
            "bytes_total",
            "bytes_code",
        ] {
            assert!(!record[key].is_null(), "{key}: {record}");
        }
        assert_eq!(record["val_loss"], 2.5);
        assert_eq!(record["seeds"][1]["seed"], 2);
        for (log, text) in [("train_seed1.log", "seed:1\n"), ("train_seed2.log", "seed:2\n")] {
            assert_eq!(read(log), text);
        }
        assert_eq!(read("train_seed1_2.log"), "seed:1\n");
        assert!(read("README.md").contains("| 2 | 2.500000 | 1.250000 | `train_seed2.log` |"));
        assert!(read("README.md").contains("\nfairway export RUN --quant gptq-int6 --codec lzma --out "));
        assert!(read("README.md").contains("mean 2.500000 nats, standard deviation 0.500000"));
        assert_eq!(
            source_files().len(),
            source_files().iter().filter(|(name, _)| !read(&format!("source/{name}")).is_empty()).count()
        );

        submission.scored = Some(Loss { val_loss: 2.25, val_bpb: Some(1.2) });
        let scored = submission.write(&out).unwrap();
        assert_eq!(scored.loss.val_loss, 2.25);
        assert!(read("README.md").contains("val_bpb (artifact, reloaded) | 1.20000000"));
    }

    #[test]
    fn a_folder_with_a_record_is_whole_and_one_without_may_be_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        assert!(begin(&out).is_ok());
        write_atomic(&out.join(ARTIFACT), b"packed").unwrap();
        assert!(check_folder(&out).is_ok());
        submission().write(&out).unwrap();
        assert!(out.join(RECORD).exists());
        begin(&out).unwrap();
        assert!(!out.join(RECORD).exists() && check_folder(&out).is_ok());
        // A run's folder has an artifact too, among other files.
        fs::write(out.join("metrics.jsonl"), "").unwrap();
        assert_eq!(check_folder(&out).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_folder_of_other_files_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check_folder(&dir.path().join("new")).is_ok() && check_folder(dir.path()).is_ok());
        fs::write(dir.path().join("thesis.txt"), "years of work").unwrap();
        for other in [dir.path(), &dir.path().join("thesis.txt")] {
            assert_eq!(check_folder(other).unwrap_err().exit_code(), 2);
        }
        fs::write(dir.path().join(RECORD), "{}").unwrap();
        assert!(check_folder(dir.path()).is_ok());
    }
}
