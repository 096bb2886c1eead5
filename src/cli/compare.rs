//! `fairway compare`.

use super::output;
use crate::error::{Error, Result};
use crate::eval::statistics::{Comparison, RECORD_NATS, RECORD_P, Sample};
use crate::report::losses;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Compare the validation losses of runs over seeds: Welch's t-test and the challenge's record rule
#[derive(clap::Args)]
#[command(after_help = "Example: fairway compare runs/a/seed-* --against runs/b/seed-*\n\n\
    RUN is a run's folder (its last validation), a .json report with val_loss, or a log with val_loss lines.\n\
    t and p are of equal means, two-sided. A record is better by at least 0.005 nats, and p_record, the one-sided\n\
    probability of such losses from a smaller improvement, is below 0.01.")]
pub struct Args {
    /// The runs, one a seed
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The runs that they are compared with
    #[arg(long, required = true, num_args = 1.., value_name = "RUN")]
    against: Vec<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let (runs, against) = (read("RUN", &args.runs)?, read("--against", &args.against)?);
    let found = Comparison::of(&runs, &against);
    if found.t.is_nan() {
        output::warn("no t-test: each side takes at least two runs, and not all of one loss");
    } else if found.t.is_infinite() {
        output::warn("all runs of each side have one loss: without any spread the test leaves no doubt");
    }
    if args.json {
        return output::json(&serde_json::json!({
            "mean": found.runs.mean,
            "std": found.runs.std,
            "count": found.runs.count,
            "against_mean": found.against.mean,
            "against_std": found.against.std,
            "against_count": found.against.count,
            "t": found.t,
            "degrees": found.degrees,
            "p": found.p,
            "p_record": found.p_record,
            "delta_nats": found.delta_nats,
            "record": found.is_record(),
        }));
    }
    let row = |name: &str, sample: &Sample| {
        let number = |value: f64| if value.is_finite() { format!("{value:.6}") } else { "-".into() };
        vec![name.to_string(), sample.count.to_string(), number(sample.mean), number(sample.std)]
    };
    output::table(
        &["runs", "count", "mean nats", "std"],
        &[row("these", &found.runs), row("against", &found.against)],
    );
    output::line(format!(
        "delta_nats:{:.6} t:{:.3} degrees:{:.2} p:{:.3e} p_record:{:.3e}",
        found.delta_nats, found.t, found.degrees, found.p, found.p_record
    ));
    let verdict = if found.is_record() { "a record" } else { "no record" };
    output::line(format!("{verdict}: the rule is at least {RECORD_NATS} nats better, at p < {RECORD_P}"));
    Ok(())
}

/// The losses of one side. A run that is named twice would narrow its spread.
fn read(side: &str, paths: &[PathBuf]) -> Result<Vec<f64>> {
    let mut places = BTreeSet::new();
    for path in paths {
        if path.canonicalize().is_ok_and(|place| !places.insert(place)) {
            return Err(Error::input(
                format!("{} twice", path.display()),
                side,
                "different runs, one a seed",
            ));
        }
    }
    paths.iter().map(|path| losses::read(path).map(|loss| loss.val_loss)).collect()
}
