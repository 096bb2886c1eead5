//! Fitting an artifact into a budget of bytes: another codec if that is enough, else pruned codes ([`crate::quant::prune`]).
//!
//! How many is searched for where the entropy of the codes says: what it falls by is nearly what a codec saves, and costs
//! nothing to ask, where packing a model near the cap takes brotli half a minute on two cores. Only what was packed decides,
//! so that the file fits to the byte. The search ends within [`SLACK`] of the room: 17.3 MB of Gaussian codes of 6 bits came
//! 58 kB down with two files more, in 80 s in all.

use super::arrange::Arrangement;
use super::{Artifact, Codec, Sizes, tensor_table};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::quant::{Candidates, Cost, Hessians};
use std::collections::BTreeMap;

/// The codecs that are tried where none is asked for, in this order.
pub const CODECS: [Codec; 4] = [Codec::Brotli, Codec::Lzma, Codec::Zstd, Codec::Zlib];

/// The search counts candidates by this share of them: 4,096 steps are about 100 bytes each for a model near the cap.
const STEPS: usize = 4096;

/// The share of the room that may stay empty though fewer pruned codes would do: 4 kB of 16 MB.
pub const SLACK: u64 = 4096;

/// Files that do not fit, before all codes are pruned to see whether any does.
const MISSES: usize = 3;

/// Files after which the search halves what is left.
const PREDICTED: usize = 8;

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
    arrangements: Vec<Arrangement>,
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
    let missed = |least: u64, pruning: &str| {
        let least = least + limit.code_bytes;
        let what = format!("a budget of {} bytes for artifact and code", limit.budget);
        let expected = format!(
            "at least {least}: {codec} {pruning} ({} bytes of it are code; fewer bits would save more)",
            limit.code_bytes
        );
        Error::input(what, "--budget", expected)
    };
    if candidates.is_empty() {
        return Err(missed(sizes.bytes, "has no codes to prune"));
    }
    let step = candidates.len().div_ceil(STEPS);
    let pack = |steps: usize, arrangements: Option<&[Arrangement]>| -> Result<Packed> {
        let count = (steps * step).min(candidates.len());
        let pruned = Artifact {
            tensors: candidates.prune(&artifact.tensors, count),
            notes: note(&artifact, count, candidates.len()),
            ..artifact.clone()
        };
        let arrangements = match arrangements {
            Some(known) => known.to_vec(),
            None => tensor_table::arrange(&pruned.tensors, codec)?,
        };
        let (file, sizes) = pruned.pack_arranged(codec, &arrangements)?;
        progress(&format!("{codec}, {count} of {} codes pruned: {} bytes", candidates.len(), sizes.bytes))?;
        Ok(Packed { count, artifact: pruned, arrangements, file, sizes })
    };
    let savings = candidates.savings(&artifact.tensors, step);
    let packed = search(sizes.bytes, &savings, room, pack)?;
    if packed.sizes.bytes > room {
        let pruning = format!("reaches with all {} codes of +-1 pruned", candidates.len());
        return Err(missed(packed.sizes.bytes.min(sizes.bytes), &pruning));
    }
    let pruned =
        Pruned { codes: packed.count, candidates: candidates.len(), cost: candidates.cost(packed.count) };
    let Packed { artifact, file, sizes, .. } = packed;
    Ok(Fitted { artifact, codec, file, sizes, tried, pruned: Some(pruned) })
}

/// The artifact's notes with what was pruned.
fn note(artifact: &Artifact, count: usize, candidates: usize) -> BTreeMap<String, String> {
    let mut notes = artifact.notes.clone();
    notes.insert("pruned".into(), format!("{count} of {candidates} codes of +-1"));
    notes
}

/// An end of the steps that are searched: what was packed there, in bytes over what is aimed at.
#[derive(Clone, Copy)]
struct End {
    steps: usize,
    excess: f64,
}

/// Packs as few steps as fit, or nearly ([`SLACK`]); all of them where none do. `savings` are expected of each number of
/// steps; without any the file is `whole` bytes long, more than the room.
///
/// The next number is where a line through both ends over their savings meets the aim (regula falsi; as in the Illinois
/// method an end that stays counts half). As long as nothing fits, a byte of savings is what it last was in a file.
fn search(
    whole: u64,
    savings: &[f64],
    room: u64,
    mut pack: impl FnMut(usize, Option<&[Arrangement]>) -> Result<Packed>,
) -> Result<Packed> {
    let all = savings.len() - 1;
    let slack = room / SLACK;
    let aim = (room - slack / 2) as f64;
    let mut low = End { steps: 0, excess: whole as f64 - aim };
    let mut fitting: Option<(End, Packed)> = None;
    // Bytes of the file for one of savings.
    let mut worth = 1.0;
    let mut last_fits = None;
    for files in 0.. {
        let is_near = |(high, packed): &mut (End, Packed)| {
            high.steps - low.steps <= 1 || room - packed.sizes.bytes <= slack
        };
        if let Some((_, packed)) = fitting.take_if(is_near) {
            return Ok(packed);
        }
        let high = match &fitting {
            Some((high, _)) => {
                worth = (low.excess - high.excess) / (savings[high.steps] - savings[low.steps]);
                high.steps
            }
            None => all + 1,
        };
        let steps = if fitting.is_none() && files == MISSES {
            all
        } else if files < PREDICTED {
            let wanted = savings[low.steps] + low.excess / worth.max(f64::MIN_POSITIVE);
            (low.steps + 1..high).find(|&steps| savings[steps] >= wanted).unwrap_or(high - 1)
        } else {
            low.steps.midpoint(high)
        };
        // Codes of many zeros lose by digits, whose low bits lie apart from the high ones: arranged anew, until a file fits.
        let packed = pack(steps, fitting.as_ref().map(|(_, packed)| packed.arrangements.as_slice()))?;
        let end = End { steps, excess: packed.sizes.bytes as f64 - aim };
        let fits = packed.sizes.bytes <= room;
        let again = last_fits.replace(fits) == Some(fits);
        if fits {
            if again {
                low.excess /= 2.0;
            }
            fitting = Some((end, packed));
            continue;
        }
        match &mut fitting {
            None if steps == all => return Ok(packed),
            None => worth = (low.excess - end.excess) / (savings[steps] - savings[low.steps]),
            Some((high, _)) if again => high.excess /= 2.0,
            Some(_) => {}
        }
        low = end;
    }
    unreachable!("the ends meet")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::{ByteTableSection, Kind};

    /// The numbers of steps that are packed in a search, and the bytes that it ends with.
    fn searched(savings: &[f64], room: u64, bytes: impl Fn(usize) -> u64) -> (Vec<usize>, u64) {
        let byte_table =
            ByteTableSection { base_bytes: vec![], has_leading_space: vec![], is_boundary: vec![] };
        let artifact = Artifact {
            recipe_toml: String::new(),
            quant: String::new(),
            notes: BTreeMap::new(),
            byte_table,
            tokenizer_kind: String::new(),
            pieces: vec![],
            tensors: vec![],
        };
        let mut packed = Vec::new();
        let pack = |steps: usize, _: Option<&[Arrangement]>| {
            packed.push(steps);
            let sections = Kind::ALL.map(|kind| (kind, 0, 0));
            Ok(Packed {
                count: steps,
                artifact: artifact.clone(),
                arrangements: vec![],
                file: vec![],
                sizes: Sizes { bytes: bytes(steps), payload_bytes: 0, sections },
            })
        };
        let found = search(bytes(0), savings, room, pack).unwrap();
        assert_eq!(found.sizes.bytes, bytes(found.count));
        (packed, found.sizes.bytes)
    }

    #[test]
    fn a_search_ends_near_the_room_after_few_files() {
        const WHOLE: u64 = 16_500_000;
        let all = STEPS;
        let share = |steps: usize| steps as f64 / all as f64;
        let savings: Vec<f64> = (0..=all).map(|steps| 2e6 * share(steps)).collect();
        type Saved<'a> = &'a dyn Fn(usize) -> f64;
        let noise = |steps: usize| 3000.0 * ((steps * 7919) % 101) as f64 / 101.0;
        let sizes: [(&str, usize, Saved); 6] = [
            ("as expected", 1, &|steps| 2e6 * share(steps)),
            ("less", 3, &|steps| 1.5e6 * share(steps)),
            ("late", 12, &|steps| 2e6 * share(steps).powi(3)),
            ("early", 12, &|steps| 2e6 * share(steps).sqrt()),
            ("noisy", 12, &|steps| 2e6 * share(steps) + noise(steps)),
            ("at once", 22, &|steps| if steps < 3000 { 0.0 } else { 2e6 }),
        ];
        for (what, most, saved) in sizes {
            let bytes = |steps: usize| WHOLE - if steps == 0 { 0.0 } else { saved(steps) } as u64;
            for room in [WHOLE - 1, WHOLE - 100_000, WHOLE - 500_000, WHOLE - 1_400_000] {
                let (packed, found) = searched(&savings, room, bytes);
                println!("{what}, {room}: {packed:?}, {} bytes free", room - found);
                assert!(found <= room && packed.len() <= most, "{what}, {room}: {packed:?}");
                // A step less does not fit, or was not worth another file.
                let last = (1..=all).find(|steps| bytes(*steps) <= room).unwrap();
                assert!(
                    room - found <= room / SLACK || packed.contains(&(last - 1)) || last == 1,
                    "{packed:?}"
                );
            }
            // What cannot be met ends with all of them.
            let (packed, found) = searched(&savings, WHOLE - 2_100_000, bytes);
            assert!(packed.last() == Some(&all) && found == bytes(all), "{what}: {packed:?}");
            assert!(packed.len() <= MISSES + 1, "{what}: {packed:?}");
        }
        assert_eq!(searched(&[0.0, 5.0], 90, |steps| 100 - 20 * steps as u64), (vec![1], 80));
        assert_eq!(searched(&[0.0, 0.0], 0, |_| 100), (vec![1], 100));
    }
}
