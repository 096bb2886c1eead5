//! The challenge's published shards and tokenizers, fetched from its dataset repository into the local layout of
//! `spec/challenge.md` section 2: `OUT/datasets/fineweb10B_<variant>/`, `OUT/tokenizers/`, `OUT/manifest.json`.

use super::Progress;
use super::folder::Split;
use super::hub::{Hub, Remote, clean};
use super::shard::{HEADER_BYTES, MAX_TOKENS, Shard, ShardReport, digest_shards};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// The challenge's repository, unless an option or [`REPO_ENV`] names another.
pub const DEFAULT_REPO: &str = "willdepueoai/parameter-golf";
/// The folder in the repository that everything lies in, unless an option or [`PREFIX_ENV`] names another.
pub const DEFAULT_PREFIX: &str = "datasets";
/// Environment name of the repository.
pub const REPO_ENV: &str = "MATCHED_FINEWEB_REPO_ID";
/// Environment name of the folder in the repository.
pub const PREFIX_ENV: &str = "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX";
/// Train shards unless told otherwise: the challenge's 8 billion tokens.
pub const DEFAULT_TRAIN_SHARDS: usize = 80;

/// Files that are downloaded at a time.
const AT_ONCE: usize = 4;
/// More than any manifest or tokenizer has.
const MAX_SMALL_FILE: u64 = 256 << 20;
/// More shards than any export has.
const MAX_SHARDS: u64 = 100_000;

/// What to fetch.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// `sp1024`, `byte260`, ...: the dataset is `fineweb10B_<variant>`.
    pub variant: String,
    /// The first so many train shards; 0 fetches validation alone, which is always fetched whole.
    pub train_shards: usize,
    /// Use the `manifest.json` that `out` holds instead of fetching it.
    pub skip_manifest: bool,
    /// The folder that gets `datasets`, `tokenizers` and `manifest.json`.
    pub out: PathBuf,
    /// Repository, `owner/name`; `None`: [`REPO_ENV`], else [`DEFAULT_REPO`].
    pub repo: Option<String>,
    /// Folder in the repository; `None`: [`PREFIX_ENV`], else [`DEFAULT_PREFIX`].
    pub prefix: Option<String>,
    /// The hub's URL; `None`: `HF_ENDPOINT`, else the hub client's own default.
    pub endpoint: Option<String>,
    /// Wait before a failed request is sent again; doubled for each further attempt in a row.
    pub retry_wait: Duration,
}

impl FetchOptions {
    /// The challenge's data of a variant, into `out`.
    pub fn new(variant: &str, out: PathBuf) -> Self {
        Self {
            variant: variant.to_string(),
            train_shards: DEFAULT_TRAIN_SHARDS,
            skip_manifest: false,
            out,
            repo: None,
            prefix: None,
            endpoint: None,
            retry_wait: Duration::from_millis(500),
        }
    }
}

/// What is there now.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FetchReport {
    /// The folder of the shards: what `--data` takes.
    pub dataset: PathBuf,
    /// The tokenizer's files: the model among them is what `--tokenizer` takes.
    pub tokenizer_files: Vec<PathBuf>,
    /// Files that were downloaded.
    pub downloaded: usize,
    /// Files that were there already, and right.
    pub kept: usize,
    /// Documents: the tokens that are BOS.
    pub docs: u64,
    /// Tokens of the fetched shards.
    pub tokens: u64,
    /// The fetched shards in the order of their names.
    pub shards: Vec<ShardReport>,
    /// SHA-256 of the fetched shards, one behind the other in that order.
    pub sha256: String,
}

#[derive(Deserialize)]
struct Manifest {
    datasets: Vec<Dataset>,
    #[serde(default)]
    tokenizers: Vec<TokenizerFiles>,
}

#[derive(Deserialize)]
struct Dataset {
    name: String,
    tokenizer_name: Option<String>,
    stats: Option<Stats>,
}

#[derive(Deserialize)]
struct Stats {
    files_train: u64,
    files_val: u64,
}

#[derive(Deserialize)]
struct TokenizerFiles {
    name: Option<String>,
    model_path: Option<String>,
    vocab_path: Option<String>,
    path: Option<String>,
}

/// A file to fetch.
struct Item {
    remote: String,
    place: PathBuf,
    /// Vocabulary size that the ids of a shard must be below, where known; `None`: no shard.
    shard: Option<usize>,
}

/// Fetches the validation split, the first train shards and the tokenizer of a variant, as the manifest lists them.
///
/// An interrupted run continues where it was when it is called again. Files that are there and right are kept. Each
/// file is checked before it takes its place: size, SHA-256 where the hub gives it, and a shard's format and ids.
pub fn fetch(options: &FetchOptions, progress: Progress) -> Result<FetchReport> {
    let from_env = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let repo = options.repo.clone().or_else(|| from_env(REPO_ENV)).unwrap_or_else(|| DEFAULT_REPO.into());
    let prefix =
        options.prefix.clone().or_else(|| from_env(PREFIX_ENV)).unwrap_or_else(|| DEFAULT_PREFIX.into());
    let prefix = prefix.trim_matches('/');
    check_path(&repo, REPO_ENV)?;
    check_path(prefix, PREFIX_ENV)?;
    check_path(&options.variant, "--variant")?;
    let cache = options.out.join(".fetch");
    let hub = Hub::open(&repo, options.endpoint.as_deref(), &cache, options.retry_wait)?;

    let manifest_place = options.out.join("manifest.json");
    let mut downloaded = 0;
    let mut kept = 0;
    if !options.skip_manifest {
        let remote = hub.look_up(&format!("{prefix}/manifest.json"))?;
        check_size(&remote, MAX_SMALL_FILE)?;
        let parses = |path: &Path| read_manifest(path).map(drop);
        match hub.fetch(&remote, &manifest_place, &parses, &|_| progress(0, 0))? {
            true => downloaded += 1,
            false => kept += 1,
        }
    }
    let manifest = read_manifest(&manifest_place)?;
    let items = plan(&manifest, options, prefix, &manifest_place)?;

    // All files are looked up before the first is downloaded: one that is missing shows at once.
    let remotes = Mutex::new(Vec::new());
    for_each_at_once(items.len(), &|index, _| {
        let remote = hub.look_up(&items[index].remote)?;
        let limit = match items[index].shard {
            Some(_) => HEADER_BYTES as u64 + 2 * MAX_TOKENS,
            None => MAX_SMALL_FILE,
        };
        check_size(&remote, limit)?;
        remotes.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((index, remote));
        progress(0, 0)
    })?;
    let mut remotes = remotes.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    remotes.sort_by_key(|(index, _)| *index);
    let total = remotes.iter().map(|(_, remote)| remote.size).sum();
    let done: Vec<AtomicU64> = items.iter().map(|_| AtomicU64::new(0)).collect();
    let fresh = AtomicUsize::new(0);
    for_each_at_once(items.len(), &|index, stop| {
        let (item, remote) = (&items[index], &remotes[index].1);
        let check = |path: &Path| match item.shard {
            Some(vocab) => Shard::open(path)?.check_vocab(vocab),
            None => Ok(()),
        };
        let report = |bytes| {
            done[index].store(bytes, Ordering::Relaxed);
            stop()?;
            progress(done.iter().map(|bytes| bytes.load(Ordering::Relaxed)).sum(), total)
        };
        if hub.fetch(remote, &item.place, &check, &report)? {
            fresh.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    })?;
    let fresh = fresh.into_inner();
    downloaded += fresh;
    kept += items.len() - fresh;
    clean(&cache);
    report(options, &items, downloaded, kept)
}

fn report(options: &FetchOptions, items: &[Item], downloaded: usize, kept: usize) -> Result<FetchReport> {
    let (shards, others): (Vec<&Item>, Vec<&Item>) = items.iter().partition(|item| item.shard.is_some());
    let mut paths: Vec<PathBuf> = shards.iter().map(|item| item.place.clone()).collect();
    paths.sort();
    let (shards, sha256) = digest_shards(&paths)?;
    // BOS is 1 in every variant.
    let docs = paths.iter().map(|path| Ok(Shard::open(path)?.count(1))).sum::<Result<u64>>()?;
    Ok(FetchReport {
        dataset: dataset_dir(options),
        tokenizer_files: others.iter().map(|item| item.place.clone()).collect(),
        downloaded,
        kept,
        docs,
        tokens: shards.iter().map(|shard| shard.tokens).sum(),
        shards,
        sha256,
    })
}

fn dataset_dir(options: &FetchOptions) -> PathBuf {
    options.out.join("datasets").join(dataset_name(options))
}

fn dataset_name(options: &FetchOptions) -> String {
    format!("fineweb10B_{}", options.variant)
}

/// The files of a variant, in the order in which they are fetched: validation, tokenizer, train.
fn plan(manifest: &Manifest, options: &FetchOptions, prefix: &str, place: &Path) -> Result<Vec<Item>> {
    let name = dataset_name(options);
    let bad = |what: String, expected: &str| Error::input(what, place.display(), expected);
    let Some(dataset) = manifest.datasets.iter().find(|dataset| dataset.name == name) else {
        let known: Vec<&str> =
            manifest.datasets.iter().filter_map(|dataset| dataset.name.strip_prefix("fineweb10B_")).collect();
        return Err(Error::input(
            format!("variant {} is not in {}", options.variant, place.display()),
            "--variant",
            format!("one of: {}", known.join(", ")),
        ));
    };
    let Some(stats) = &dataset.stats else {
        return Err(bad(format!("dataset {name} has no stats"), "stats with files_train and files_val"));
    };
    if stats.files_val == 0 || stats.files_val > MAX_SHARDS || stats.files_train > MAX_SHARDS {
        let what =
            format!("dataset {name} has {} val and {} train files", stats.files_val, stats.files_train);
        return Err(bad(what, "1 to 100000 val and at most 100000 train files"));
    }
    if options.train_shards as u64 > stats.files_train {
        return Err(Error::input(
            format!("{} train shards of {}", options.train_shards, options.variant),
            "--train-shards",
            format!("at most {}, which the manifest lists", stats.files_train),
        ));
    }
    let vocab = variant_vocab(&options.variant);
    let folder = dataset_dir(options);
    let shard = |split: Split, index: usize| {
        let file = split.shard_name(index);
        Item {
            remote: format!("{prefix}/datasets/{name}/{file}"),
            place: folder.join(file),
            shard: Some(vocab),
        }
    };
    let mut items: Vec<Item> = (0..stats.files_val as usize).map(|index| shard(Split::Val, index)).collect();
    let tokenizer =
        manifest.tokenizers.iter().find(|entry| entry.name.is_some() && entry.name == dataset.tokenizer_name);
    let paths = match tokenizer {
        Some(entry) => [&entry.model_path, &entry.vocab_path, &entry.path],
        None => return Err(bad(format!("tokenizer of {name} is not listed"), "an entry under tokenizers")),
    };
    for path in paths.into_iter().flatten() {
        check_path(path, &place.display().to_string())?;
        let file = path.rsplit('/').next().unwrap_or(path);
        items.push(Item {
            remote: format!("{prefix}/{path}"),
            place: options.out.join("tokenizers").join(file),
            shard: None,
        });
    }
    items.extend((0..options.train_shards).map(|index| shard(Split::Train, index)));
    Ok(items)
}

/// The number that a variant's name ends in bounds its ids; without one any id is possible.
fn variant_vocab(variant: &str) -> usize {
    let digits = variant.trim_start_matches(|c: char| !c.is_ascii_digit());
    digits.parse().ok().filter(|vocab| *vocab > 0).unwrap_or(1 << 16)
}

/// Names from the manifest and the environment become URLs and local paths: only plain relative ones are taken.
fn check_path(path: &str, place: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let good = |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(plain);
    if path.len() <= 512 && path.split('/').all(good) {
        return Ok(());
    }
    let shown: String = path.chars().take(80).collect();
    Err(Error::input(format!("path {shown:?}"), place, "names of letters, digits, . - _ separated by /"))
}

fn check_size(remote: &Remote, limit: u64) -> Result<()> {
    if remote.size <= limit {
        return Ok(());
    }
    Err(Error::failed(format!("file of {} bytes", remote.size), &remote.name, format!("at most {limit}")))
}

fn read_manifest(path: &Path) -> Result<Manifest> {
    let read_error = |error| Error::read(path, &error);
    let bytes = std::fs::metadata(path).map_err(read_error)?.len();
    if bytes > MAX_SMALL_FILE {
        let limit = format!("at most {MAX_SMALL_FILE}");
        return Err(Error::input(format!("manifest of {bytes} bytes"), path.display(), limit));
    }
    let text = std::fs::read(path).map_err(read_error)?;
    serde_json::from_slice(&text).map_err(|error| {
        let expected = "the challenge's manifest.json (datasets, tokenizers)";
        Error::input(format!("bad manifest ({error})"), path.display(), expected)
    })
}

/// Returns the error that the work is to stop with, once there is one.
type Stop<'a> = &'a dyn Fn() -> Result<()>;

/// Does `work` for each index, some at a time. The first error stops the others, at the latest where they call the
/// function that they are given, and is returned.
fn for_each_at_once(count: usize, work: &(dyn Fn(usize, Stop) -> Result<()> + Sync)) -> Result<()> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let lock = || failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let stop = || lock().clone().map_or(Ok(()), Err);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(count) {
            scope.spawn(|| {
                while stop().is_ok() {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    if let Err(error) = work(index, &stop) {
                        lock().get_or_insert(error);
                    }
                }
            });
        }
    });
    stop()
}
