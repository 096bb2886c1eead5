//! One file of a hub's dataset repository: looked up, downloaded where the last attempt was cut off, checked, and
//! only then put in its place.

use super::shard::hex;
use crate::error::{Error, Result};
use crate::files;
use hf_hub::api::Progress as HubProgress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Attempts in a row that bring no further byte before a download is given up.
const ATTEMPTS: u32 = 5;

/// A file of at most this size is downloaded again where the hub gives no SHA-256 to check the one that is there by.
const SMALL: u64 = 16 << 20;

/// A dataset repository on a hub.
pub(super) struct Hub {
    api: Api,
    repo: Repo,
    id: String,
    /// Unfinished downloads lie here, in the hub client's own layout.
    cache: Cache,
    /// Wait before the second attempt; doubled for each further one.
    first_wait: Duration,
}

/// A file of the repository, as the hub describes it.
#[derive(Debug)]
pub(super) struct Remote {
    /// Path in the repository.
    pub name: String,
    /// Bytes of the file.
    pub size: u64,
    /// Identifies the content: its SHA-256 for large files, else a hash that the hub alone computes.
    etag: String,
}

impl Remote {
    /// The content's SHA-256, where the hub gives it.
    fn sha256(&self) -> Option<&str> {
        let is_sha256 = self.etag.len() == 64 && self.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_sha256.then_some(self.etag.as_str())
    }

    /// Whether `path` has this size and, where that is known, this content.
    fn is(&self, path: &Path) -> bool {
        length(path) == Some(self.size)
            && self
                .sha256()
                .is_none_or(|known| file_sha256(path).is_ok_and(|own| own.eq_ignore_ascii_case(known)))
    }
}

/// Thrown through the hub client, which cannot be stopped otherwise, when the caller wants no more.
struct Stopped(Error);

struct Watch<'a> {
    done: u64,
    report: &'a dyn Fn(u64) -> Result<()>,
}

impl HubProgress for Watch<'_> {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.done = 0;
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        if let Err(error) = (self.report)(self.done) {
            // Unlike a panic this prints nothing; `Hub::call` catches it.
            resume_unwind(Box::new(Stopped(error)));
        }
    }

    fn finish(&mut self) {}
}

impl Hub {
    /// A dataset repository at `endpoint` (`None`: the client's own default, which `HF_ENDPOINT` changes).
    /// Unfinished downloads are kept under `cache`.
    pub fn open(id: &str, endpoint: Option<&str>, cache: &Path, first_wait: Duration) -> Result<Self> {
        // The client's default looks for a home folder and panics without one.
        let mut builder = if std::env::var_os("HF_HOME").is_some() || std::env::home_dir().is_some() {
            ApiBuilder::from_env()
        } else {
            ApiBuilder::from_cache(Cache::new(cache.to_path_buf()))
        };
        let from_env = std::env::var("HF_ENDPOINT").ok();
        if let Some(endpoint) = endpoint.or(from_env.as_deref()) {
            if !(endpoint.starts_with("http://") || endpoint.starts_with("https://")) {
                let expected = "a URL that begins with http:// or https://";
                return Err(Error::input(format!("hub endpoint {endpoint}"), "HF_ENDPOINT", expected));
            }
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
        }
        let api =
            builder.with_cache_dir(cache.to_path_buf()).with_progress(false).build().map_err(|error| {
                Error::failed(format!("no hub client ({error})"), id, "a usable endpoint")
            })?;
        let repo = Repo::new(id.to_string(), RepoType::Dataset);
        Ok(Self { api, repo, id: id.to_string(), cache: Cache::new(cache.to_path_buf()), first_wait })
    }

    /// Asks the hub for a file's size and identity. A file that is not there is bad input.
    pub fn look_up(&self, name: &str) -> Result<Remote> {
        let url = self.api.repo(self.repo.clone()).url(name);
        let mut attempt = 0;
        let meta = loop {
            match self.call(name, || self.api.metadata(&url))? {
                Ok(meta) => break meta,
                Err(error) if is_refusal(&error) => {
                    return Err(Error::input(
                        format!("the hub does not give the file ({error})"),
                        self.place(name),
                        "a file of the repository",
                    ));
                }
                Err(error) => self.wait(name, &mut attempt, &error)?,
            }
        };
        // The client uses it as a file name.
        let etag = meta.etag().to_string();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if etag.is_empty() || etag.len() > 128 || !etag.bytes().all(plain) {
            let expected = "letters, digits, - and _";
            return Err(Error::failed(format!("the hub gives ETag {etag}"), self.place(name), expected));
        }
        Ok(Remote { name: name.to_string(), size: meta.size() as u64, etag })
    }

    /// Makes `place` be the file. Returns whether it had to be downloaded: one that is there already and has the
    /// size and the SHA-256 that the hub gives, and passes `check`, is kept. `report` is told of the bytes that
    /// are there; an error from it stops the download, which a later call continues.
    pub fn fetch(
        &self,
        remote: &Remote,
        place: &Path,
        check: &dyn Fn(&Path) -> Result<()>,
        report: &dyn Fn(u64) -> Result<()>,
    ) -> Result<bool> {
        let checkable = remote.sha256().is_some() || remote.size > SMALL;
        if checkable && remote.is(place) && check(place).is_ok() {
            report(remote.size)?;
            return Ok(false);
        }
        let blob = self.cache.repo(self.repo.clone()).blob_path(&remote.etag);
        let part = blob.with_extension("part");
        // What an earlier run left may be of another state of the repository: only a download that began here is
        // believed to show what the hub has.
        let mut resumed = length(&part).is_some();
        let mut attempt = 0;
        loop {
            let before = length(&part).unwrap_or(0);
            let result = self.continue_download(remote, &part, report)?;
            let arrived = length(&part).unwrap_or(0);
            if arrived > before {
                attempt = 0;
            }
            match result {
                Err(error) if is_refusal(&error) => {
                    let what = format!("the hub does not give the file ({error})");
                    return Err(Error::failed(what, self.place(&remote.name), "a file of the repository"));
                }
                Err(error) => {
                    resumed |= arrived > 0;
                    self.wait(&remote.name, &mut attempt, &error)?;
                    continue;
                }
                Ok(()) if arrived < remote.size => {
                    resumed |= arrived > 0;
                    let error = io::Error::from(io::ErrorKind::UnexpectedEof);
                    self.wait(&remote.name, &mut attempt, &error.into())?;
                    continue;
                }
                Ok(()) => {}
            }
            let accepted = self.accept(remote, &part, check);
            match accepted {
                Ok(()) => {
                    move_into_place(&part, place)?;
                    return Ok(true);
                }
                Err(error) => {
                    fs::remove_file(&part).map_err(|error| Error::write(&part, &error))?;
                    if !resumed {
                        return Err(error);
                    }
                    resumed = false;
                }
            }
        }
    }

    /// Lets the client append what is missing to `part`.
    fn continue_download(
        &self,
        remote: &Remote,
        part: &Path,
        report: &dyn Fn(u64) -> Result<()>,
    ) -> Result<Result<(), ApiError>> {
        match length(part) {
            // The client asks for the bytes behind the end and is refused.
            Some(length) if length == remote.size => return Ok(Ok(())),
            Some(length) if length > remote.size => {
                fs::remove_file(part).map_err(|error| Error::write(part, &error))?;
            }
            _ => {}
        }
        let watch = Watch { done: 0, report };
        let repo = self.api.repo(self.repo.clone());
        let pointer = match self.call(&remote.name, || repo.download_with_progress(&remote.name, watch))? {
            Ok(pointer) => pointer,
            Err(error) => return Ok(Err(error)),
        };
        // The client links its snapshot to the finished blob, finished or not. Undo both: a link without its blob
        // would be in the way of a later attempt.
        let moved = fs::canonicalize(&pointer).and_then(|blob| fs::rename(blob, part));
        moved.map_err(|error| Error::write(part, &error))?;
        let _ = fs::remove_file(&pointer);
        Ok(Ok(()))
    }

    fn accept(&self, remote: &Remote, part: &Path, check: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
        if !remote.is(part) {
            let expected = match remote.sha256() {
                Some(sha256) => format!("{} bytes with SHA-256 {sha256}", remote.size),
                None => format!("{} bytes", remote.size),
            };
            let what = "downloaded file is not the one that the hub lists";
            return Err(Error::failed(what, self.place(&remote.name), expected));
        }
        check(part).map_err(|error| {
            let what = format!("downloaded file is bad ({error})");
            Error::failed(what, self.place(&remote.name), "a file of the challenge's format")
        })
    }

    /// Calls the client, which panics on some answers that no hub should give.
    fn call<T>(&self, name: &str, work: impl FnOnce() -> Result<T, ApiError>) -> Result<Result<T, ApiError>> {
        catch_unwind(AssertUnwindSafe(work)).map_err(|panic| match panic.downcast::<Stopped>() {
            Ok(stopped) => stopped.0,
            Err(_) => Error::failed("the hub client gave up on the hub's answer", self.place(name), "a hub"),
        })
    }

    /// Waits before the next attempt; after too many the error is final.
    fn wait(&self, name: &str, attempt: &mut u32, error: &ApiError) -> Result<()> {
        *attempt += 1;
        if *attempt >= ATTEMPTS {
            return Err(Error::failed(
                format!("download failed {ATTEMPTS} times in a row ({error})"),
                self.place(name),
                "a connection to the hub (the same command continues the download)",
            ));
        }
        std::thread::sleep(self.first_wait * (1 << (*attempt - 1)));
        Ok(())
    }

    fn place(&self, name: &str) -> String {
        format!("{}/{name}", self.id)
    }
}

/// Whether the hub refused the request itself: asking again would not help.
fn is_refusal(error: &ApiError) -> bool {
    // The client does not export its transport's error type.
    matches!(error, ApiError::RequestError(inner) if inner.to_string().starts_with("http status: 4"))
}

fn length(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|meta| meta.len())
}

fn file_sha256(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hex(&hasher.finalize()))
}

fn move_into_place(from: &Path, place: &Path) -> Result<()> {
    let renamed = (|| {
        fs::create_dir_all(place.parent().unwrap_or(Path::new(".")))?;
        OpenOptions::new().write(true).open(from)?.sync_all()?;
        fs::rename(from, place)
    })();
    match renamed {
        // The place may be a link to another disk.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            files::write_atomic_with(place, |writer| io::copy(&mut File::open(from)?, writer).map(drop))?;
            fs::remove_file(from).map_err(|error| Error::write(from, &error))
        }
        other => other.map_err(|error| Error::write(place, &error)),
    }
}

/// Removes the client's folder of unfinished downloads.
pub(super) fn clean(cache: &PathBuf) {
    let _ = fs::remove_dir_all(cache);
}
