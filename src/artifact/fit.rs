//! Fitting an artifact into a budget of bytes: another codec if that is enough, else pruned codes
//! ([`crate::quant::prune`]), as few as a search by [`STEPS`] steps finds.

use super::{Artifact, Codec, Sizes};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::quant::{Candidates, Cost, Hessians};
use std::collections::BTreeMap;

/// The codecs that are tried where none is asked for, in this order.
pub const CODECS: [Codec; 4] = [Codec::Brotli, Codec::Lzma, Codec::Zstd, Codec::Zlib];

/// The search counts candidates by this share of them: 4,096 steps are about 100 bytes each for a model near the cap.
pub const STEPS: usize = 4096;

/// What is to fit, and what decides how.
#[derive(Debug, Clone, Copy)]
pub struct Limit<'a> {
    /// The most bytes of artifact and code together.
    pub budget: u64,
    /// Bytes of the code ([`super::budget::code_bytes`]).
    pub code_bytes: u64,
    /// The codec, or none for the first of [`CODECS`] under which it fits, and else the smallest.
    pub codec: Option<Codec>,
    /// The weights that the artifact's codes were made of, by their names.
    pub live: &'a [HostTensor],
    /// Hessians by the names of the weights.
    pub hessians: &'a Hessians,
    /// By what codes are pruned.
    pub cost: Cost,
}

/// What was pruned.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Pruned {
    /// Codes that became 0.
    pub codes: usize,
    /// Codes of +-1 that there were.
    pub candidates: usize,
    /// The search's step: with so many codes less it would not fit.
    pub step: usize,
    /// The sum of their costs ([`Cost`]), as predicted one by one.
    pub cost: f64,
}

/// An artifact that fits.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    /// The artifact, pruned if need be.
    pub artifact: Artifact,
    /// Its codec.
    pub codec: Codec,
    /// The file's bytes.
    pub file: Vec<u8>,
    /// The file's sizes.
    pub sizes: Sizes,
    /// The size of the file without pruning under each codec that was tried.
    pub tried: Vec<(Codec, u64)>,
    /// What was pruned, if anything.
    pub pruned: Option<Pruned>,
}

/// A file that was packed.
struct Packed {
    count: usize,
    artifact: Artifact,
    file: Vec<u8>,
    sizes: Sizes,
}

/// Fits `artifact`. `progress` is told what was packed (a line for people); an error that it returns stops the work.
///
/// # Errors
/// A budget that cannot be met, with what can be; those of [`Artifact::pack`] and [`Candidates::of`].
pub fn fit(
    artifact: Artifact,
    limit: &Limit,
    progress: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Fitted> {
    let room = limit.budget.saturating_sub(limit.code_bytes);
    let all = CODECS.to_vec();
    let mut tried = Vec::new();
    let mut best: Option<(Codec, Vec<u8>, Sizes)> = None;
    for codec in limit.codec.map_or(all, |codec| vec![codec]) {
        let (file, sizes) = artifact.pack(codec)?;
        progress(&format!("{codec}: {} bytes", sizes.bytes))?;
        tried.push((codec, sizes.bytes));
        let fits = sizes.bytes <= room;
        if best.as_ref().is_none_or(|(.., least)| sizes.bytes < least.bytes) {
            best = Some((codec, file, sizes));
        }
        if fits {
            break;
        }
    }
    let Some((codec, file, sizes)) = best else { unreachable!("at least one codec is tried") };
    if sizes.bytes <= room {
        return Ok(Fitted { artifact, codec, file, sizes, tried, pruned: None });
    }

    let candidates = Candidates::of(limit.live, &artifact.tensors, limit.hessians, limit.cost)?;
    let step = candidates.len().div_ceil(STEPS).max(1);
    let mut pack = |count: usize| -> Result<Packed> {
        let pruned = Artifact {
            tensors: candidates.prune(&artifact.tensors, count),
            notes: note(&artifact, count, candidates.len()),
            ..artifact.clone()
        };
        // Arranged anew: codes of many zeros lose by digits, whose low bits lie apart from the high ones.
        let (file, sizes) = pruned.pack(codec)?;
        progress(&format!("{codec}, {count} of {} codes pruned: {} bytes", candidates.len(), sizes.bytes))?;
        Ok(Packed { count, artifact: pruned, file, sizes })
    };
    let most = pack(candidates.len())?;
    if most.sizes.bytes > room {
        let reached = most.sizes.bytes.min(sizes.bytes) + limit.code_bytes;
        let pruning = match candidates.len() {
            0 => "has no codes to prune".to_owned(),
            all => format!("reaches with all {all} codes of +-1 pruned"),
        };
        return Err(Error::input(
            format!("a budget of {} bytes for artifact and code", limit.budget),
            "--budget",
            format!(
                "at least {reached}: {codec} {pruning} ({} bytes of it are code; fewer bits would save more)",
                limit.code_bytes
            ),
        ));
    }
    let fitted = search(sizes.bytes, most, step, room, &mut pack)?;
    let pruned = Pruned {
        codes: fitted.count,
        candidates: candidates.len(),
        step,
        cost: candidates.cost(fitted.count),
    };
    let Packed { artifact, file, sizes, .. } = fitted;
    Ok(Fitted { artifact, codec, file, sizes, tried, pruned: Some(pruned) })
}

/// The artifact's notes with what was pruned.
fn note(artifact: &Artifact, count: usize, candidates: usize) -> BTreeMap<String, String> {
    let mut notes = artifact.notes.clone();
    notes.insert("pruned".into(), format!("{count} of {candidates} codes of +-1"));
    notes
}

/// Fewer codes, of which `step` less do not fit: nothing pruned, `whole` bytes long, does not, `most` does. The next count
/// is where a line between the two meets the room, or half way where that does not close in.
fn search(
    whole: u64,
    most: Packed,
    step: usize,
    room: u64,
    pack: &mut dyn FnMut(usize) -> Result<Packed>,
) -> Result<Packed> {
    // In steps; the last one may be a part of one.
    let (mut low, mut low_bytes) = (0, whole);
    let mut high = most.count.div_ceil(step);
    let mut best = most;
    let mut halve = false;
    while high - low > 1 {
        let span = high - low;
        let share = (low_bytes - room) as f64 / (low_bytes - best.sizes.bytes).max(1) as f64;
        // A little beyond, so that both ends move.
        let ahead = (share * span as f64).ceil() as usize + usize::from(span > 64) * span / 64;
        let next = if halve { low + span / 2 } else { low + ahead.clamp(1, span - 1) };
        let packed = pack((next * step).min(best.count))?;
        if packed.sizes.bytes <= room {
            (high, best) = (next, packed);
        } else {
            (low, low_bytes) = (next, packed.sizes.bytes);
        }
        halve = (high - low) * 2 > span;
    }
    Ok(best)
}
