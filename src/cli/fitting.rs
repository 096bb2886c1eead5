//! `--codec` and `--budget` of `fairway export`: how an artifact is packed.

use super::export_loss;
use super::source::Source;
use super::{output, progress};
use crate::artifact::assemble::Prepared;
use crate::artifact::budget::code_bytes;
use crate::artifact::fit::{Limit, Pruned, fit};
use crate::artifact::{Artifact, Codec, Sizes};
use crate::backend::Target;
use crate::data::stream::ValTokens;
use crate::error::Result;
use crate::files;
use crate::train::guards;
use std::path::Path;

/// What decides how an artifact is packed.
#[derive(Debug, Clone, Copy)]
pub struct Packing {
    /// The codec, where one is named.
    codec: Option<Codec>,
    /// The most bytes of artifact and code.
    budget: Option<u64>,
}

impl Packing {
    /// What the two flags say.
    pub fn parse(codec: Option<&str>, budget: Option<u64>) -> Result<Self> {
        Ok(Self { codec: codec.map(str::parse).transpose()?, budget })
    }

    /// A codec and no budget.
    pub fn by(codec: Codec) -> Self {
        Self { codec: Some(codec), budget: None }
    }

    /// Packs and writes an artifact of `prepared`, fitted into the budget if there is one.
    pub fn write(self, artifact: Artifact, prepared: &Prepared, out: &Path) -> Result<Written> {
        let Some(budget) = self.budget else {
            let codec = self.codec.unwrap_or(Codec::Brotli);
            let sizes = artifact.write(out, codec)?;
            return Ok(Written { artifact, codec, sizes, fit: None, whole: None });
        };
        let whole = artifact.clone();
        let limit = Limit {
            budget,
            code_bytes: code_bytes()?,
            codec: self.codec,
            live: prepared.params(),
            hessians: prepared.hessians(),
            cost: prepared.cost(),
        };
        let spinner = progress::spinner("fit");
        let fitted = fit(artifact, &limit, &mut |line| {
            spinner.set_message(line.to_owned());
            guards::check_interrupt("the artifact is not written")
        });
        spinner.finish_and_clear();
        let fitted = fitted?;
        files::write_atomic(out, &fitted.file)?;
        let tried = fitted.tried.iter().map(|&(codec, bytes)| Tried { codec: codec.to_string(), bytes });
        let fit = Report { budget, tried: tried.collect(), pruned: fitted.pruned, bpb_cost: None };
        Ok(Written {
            artifact: fitted.artifact,
            codec: fitted.codec,
            sizes: fitted.sizes,
            fit: Some(fit),
            whole: fitted.pruned.map(|_| whole),
        })
    }
}

/// An artifact that was written.
pub struct Written {
    /// The artifact.
    pub artifact: Artifact,
    /// Its codec.
    pub codec: Codec,
    /// Its sizes.
    pub sizes: Sizes,
    /// What fitting did, if there was a budget.
    pub fit: Option<Report>,
    /// The artifact before codes were pruned, if some were.
    pub whole: Option<Artifact>,
}

/// What fitting did.
#[derive(Debug, serde::Serialize)]
pub struct Report {
    /// The most bytes of artifact and code.
    budget: u64,
    /// The size of the artifact under each codec that was tried, nothing pruned.
    tried: Vec<Tried>,
    /// The codes that became 0, if any.
    pruned: Option<Pruned>,
    /// What that cost in bits per byte, if there was data.
    bpb_cost: Option<f64>,
}

/// A codec that was tried.
#[derive(Debug, serde::Serialize)]
struct Tried {
    codec: String,
    bytes: u64,
}

impl Report {
    /// Scores the artifact as it was before codes were pruned; `pruned_bpb` is what it has now.
    pub fn score(
        &mut self,
        whole: &Artifact,
        pruned_bpb: f64,
        text: &ValTokens,
        target: &Target,
    ) -> Result<()> {
        let whole = Source::of_artifact(whole, "none", "the artifact before pruning")?;
        self.bpb_cost = Some(pruned_bpb - export_loss::score(&whole, text, target)?.val_bpb);
        Ok(())
    }

    /// For people.
    pub fn print(&self) {
        let sizes: Vec<String> =
            self.tried.iter().map(|tried| format!("{} {}", tried.codec, tried.bytes)).collect();
        output::line(format!("budget of {} bytes: whole artifact {}", self.budget, sizes.join(", ")));
        let Some(Pruned { codes, candidates, cost }) = self.pruned else {
            return output::line("nothing had to be pruned");
        };
        let share = 100.0 * codes as f64 / candidates.max(1) as f64;
        let bpb = self.bpb_cost.map_or("not measured without --data".into(), |cost| format!("{cost:+.5}"));
        output::line(format!(
            "pruned {codes} of {candidates} codes of +-1 ({share:.2}%); squared error {cost:+.4e}; val_bpb {bpb}"
        ));
    }
}
