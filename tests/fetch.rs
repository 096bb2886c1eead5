//! Fetching from a hub, which here is a small HTTP server on the loopback: it redirects to another address for large
//! files, knows byte ranges, and on demand cuts connections, ignores ranges and sends other bytes than it lists.

use fairway::data::fetch::{FetchOptions, FetchReport, fetch};
use fairway::data::folder::Split;
use fairway::data::quiet;
use fairway::data::shard::ShardWriter;
use fairway::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const MANIFEST: &str = r#"{"version": "1", "datasets": [
    {"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024", "path": "datasets/fineweb10B_sp1024",
     "stats": {"files_total": 4, "files_train": 3, "files_val": 1}},
    {"name": "fineweb10B_byte260", "tokenizer_name": "none", "stats": {"files_train": 1, "files_val": 1}},
    {"name": "fineweb10B_sp512", "tokenizer_name": "outside", "stats": {"files_train": 1, "files_val": 1}},
    {"name": "fineweb10B_sp2048", "tokenizer_name": "none", "stats": null}],
  "tokenizers": [
    {"name": "sp_bpe_1024", "vocab_size": 1024, "model_path": "tokenizers/fineweb_1024_bpe.model",
     "vocab_path": "tokenizers/fineweb_1024_bpe.vocab"},
    {"name": "outside", "model_path": "../../outside.model"}]}"#;
const TRAIN: [&str; 3] = [
    "root/datasets/fineweb10B_sp1024/fineweb_train_000000.bin",
    "root/datasets/fineweb10B_sp1024/fineweb_train_000001.bin",
    "root/datasets/fineweb10B_sp1024/fineweb_train_000002.bin",
];

/// What the server has, and how it behaves.
#[derive(Default)]
struct State {
    /// What the repository lists.
    files: HashMap<String, Vec<u8>>,
    /// What is sent instead.
    sent: HashMap<String, Vec<u8>>,
    /// Files whose next transfer of content ends after so many bytes.
    cut: HashMap<String, usize>,
    /// Files whose ranges are ignored.
    whole: HashSet<String>,
    /// Answer redirects without saying where to.
    nowhere: bool,
    /// File and first byte of each transfer of content.
    transfers: Vec<(String, usize)>,
}

struct Server {
    state: Arc<Mutex<State>>,
    port: u16,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || {
                    // A client that went away is its own business.
                    let _ = answer(stream, port, &shared);
                });
            }
        });
        Self { state, port }
    }

    /// A server with the challenge's layout under `root`: one val shard, three train shards, a tokenizer.
    fn with_dataset() -> Self {
        let server = Self::start();
        server.list("root/manifest.json", MANIFEST.into());
        server.list("root/tokenizers/fineweb_1024_bpe.model", b"model".to_vec());
        server.list("root/tokenizers/fineweb_1024_bpe.vocab", b"vocab".to_vec());
        server.list("root/datasets/fineweb10B_sp1024/fineweb_val_000000.bin", shard(0, 100));
        for (index, name) in TRAIN.iter().enumerate() {
            server.list(name, shard(index + 1, 200_000));
        }
        server
    }

    fn list(&self, name: &str, content: Vec<u8>) {
        self.change(|state| state.files.insert(name.to_string(), content));
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    /// First bytes of the transfers of that file so far.
    fn transfers(&self, name: &str) -> Vec<usize> {
        let of_name = |transfer: &&(String, usize)| transfer.0 == name;
        self.change(|state| state.transfers.iter().filter(of_name).map(|transfer| transfer.1).collect())
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

/// Answers one request.
fn answer(mut stream: TcpStream, port: u16, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut range = None;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("range: bytes=") {
            range = value.trim().split_once('-').map(|(from, to)| (from.parse().unwrap(), to.parse().ok()));
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let head = request.starts_with("HEAD");
    let (status, headers, body) = respond(path, range, port, &mut state.lock().unwrap());
    let length = body.1.unwrap_or(body.0.len());
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n")?;
    if !head {
        stream.write_all(&body.0)?;
    }
    Ok(())
}

/// Status, headers, and the body with the length that is announced if it is another.
type Response = (&'static str, String, (Vec<u8>, Option<usize>));

fn respond(path: &str, range: Option<(usize, Option<usize>)>, port: u16, state: &mut State) -> Response {
    let missing = || ("404 Not Found", String::new(), (b"no".to_vec(), None));
    // A repository that was renamed: a relative redirect.
    if let Some(rest) = path.strip_prefix("/datasets/old/name/") {
        let to = format!("Location: /datasets/owner/name/{rest}\r\n");
        return ("307 Temporary Redirect", to, (vec![], None));
    }
    let listed = path.strip_prefix("/datasets/owner/name/resolve/main/");
    let Some(name) = listed.or(path.strip_prefix("/cdn/")) else { return missing() };
    let Some(content) = state.files.get(name) else { return missing() };
    let small = name.ends_with(".json") || name.ends_with(".vocab");
    let mut headers = "X-Repo-Commit: 0123456789abcdef\r\n".to_string();
    if listed.is_some() && !small {
        let sha256: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        headers +=
            &format!("X-Linked-Etag: \"{sha256}\"\r\nX-Linked-Size: {}\r\nETag: \"x\"\r\n", content.len());
        if !state.nowhere {
            headers += &format!("Location: http://127.0.0.1:{port}/cdn/{name}\r\n");
        }
        return ("302 Found", headers, (vec![], None));
    }
    headers += &format!("ETag: \"{:040x}\"\r\n", content.len());
    let content = state.sent.get(name).unwrap_or(content).clone();
    let (from, to) = range.unwrap_or((0, None));
    let end = to.map_or(content.len(), |to| content.len().min(to + 1));
    // One byte is asked for to learn the size.
    if range != Some((0, Some(0))) {
        state.transfers.push((name.to_string(), from));
        if state.whole.contains(name) {
            return ("200 OK", headers, (content, None));
        }
    }
    if from >= content.len() {
        return ("416 Range Not Satisfiable", headers, (vec![], None));
    }
    headers += &format!("Content-Range: bytes {from}-{}/{}\r\n", end - 1, content.len());
    let mut body = content[from..end].to_vec();
    let announced = body.len();
    if range != Some((0, Some(0)))
        && let Some(cut) = state.cut.remove(name)
    {
        body.truncate(cut);
    }
    ("206 Partial Content", headers, (body, Some(announced)))
}

/// A shard's bytes: BOS every 100 tokens, ids below 1024.
fn shard(seed: usize, tokens: usize) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard");
    let mut writer = ShardWriter::create(&path).unwrap();
    let token =
        |index: usize| if index.is_multiple_of(100) { 1 } else { (4 + (index * 31 + seed) % 1020) as u16 };
    writer.push(&(0..tokens).map(token).collect::<Vec<_>>()).unwrap();
    writer.finish().unwrap();
    fs::read(&path).unwrap()
}

struct Case {
    server: Server,
    dir: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        Self { server: Server::with_dataset(), dir: tempfile::tempdir().unwrap() }
    }

    fn options(&self, train_shards: usize) -> FetchOptions {
        FetchOptions {
            train_shards,
            repo: Some("owner/name".into()),
            prefix: Some("root".into()),
            endpoint: Some(self.server.endpoint()),
            retry_wait: Duration::from_millis(1),
            ..FetchOptions::new("sp1024", self.dir.path().to_path_buf())
        }
    }

    fn fetch(&self, train_shards: usize) -> Result<FetchReport> {
        fetch(&self.options(train_shards), &quiet)
    }

    fn place(&self, split: Split, index: usize) -> PathBuf {
        self.dir.path().join("datasets/fineweb10B_sp1024").join(split.shard_name(index))
    }

    fn assert_same(&self, index: usize) {
        let listed = self.server.change(|state| state.files[TRAIN[index]].clone());
        assert_eq!(fs::read(self.place(Split::Train, index)).unwrap(), listed);
    }
}

#[test]
fn the_local_layout_is_the_challenges() {
    let case = Case::new();
    let report = case.fetch(2).unwrap();
    let root = case.dir.path();
    assert_eq!(report.dataset, root.join("datasets/fineweb10B_sp1024"));
    assert_eq!(fs::read(root.join("manifest.json")).unwrap(), MANIFEST.as_bytes());
    assert_eq!(fs::read(root.join("tokenizers/fineweb_1024_bpe.model")).unwrap(), b"model");
    assert_eq!(report.tokenizer_files.len(), 2);
    case.assert_same(0);
    case.assert_same(1);
    assert!(!case.place(Split::Train, 2).exists());
    assert_eq!((report.downloaded, report.kept, report.shards.len()), (6, 0, 3));
    assert_eq!((report.tokens, report.docs), (400_100, 4001));
    let mut names: Vec<_> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["datasets", "manifest.json", "tokenizers"]);

    // Again, with one more shard: only that is downloaded. One that was damaged meanwhile is replaced.
    let mut damaged = fs::read(case.place(Split::Train, 0)).unwrap();
    damaged[5000] ^= 1;
    fs::write(case.place(Split::Train, 0), damaged).unwrap();
    let report = case.fetch(3).unwrap();
    // The manifest and the vocabulary have no checksum on the hub, so they are not known to be right.
    assert_eq!((report.downloaded, report.kept), (4, 3));
    assert_eq!(case.server.transfers(TRAIN[1]).len(), 1);
    case.assert_same(0);
    case.assert_same(2);

    // A manifest that is there is enough, and validation alone may be fetched.
    case.server.change(|state| state.files.remove("root/manifest.json"));
    let report = fetch(&FetchOptions { skip_manifest: true, ..case.options(0) }, &quiet).unwrap();
    assert_eq!((report.downloaded, report.kept, report.tokens), (1, 2, 100));
}

#[test]
fn a_renamed_repository_is_followed() {
    let case = Case::new();
    let options = FetchOptions { repo: Some("old/name".into()), ..case.options(1) };
    assert_eq!(fetch(&options, &quiet).unwrap().tokens, 200_100);
}

#[test]
fn a_cut_connection_is_continued_where_it_was() {
    let case = Case::new();
    case.server.change(|state| state.cut.insert(TRAIN[0].into(), 150_000));
    let report = case.fetch(1).unwrap();
    assert_eq!(report.downloaded, 5);
    assert_eq!(case.server.transfers(TRAIN[0]), [0, 150_000]);
    case.assert_same(0);
}

#[test]
fn a_stopped_fetch_continues_when_called_again() {
    let case = Case::new();
    // More than the connection's buffers hold, so that it is stopped on the way.
    case.server.list(TRAIN[0], shard(9, 4_000_000));
    let stop = |done: u64, total: u64| match done > 1_000_000 && total > 8_000_000 {
        true => Err(Error::Interrupted { place: "download".into() }),
        false => Ok(()),
    };
    let error = fetch(&case.options(1), &stop).unwrap_err();
    assert_eq!(error.exit_code(), 130, "{error}");
    assert!(!case.place(Split::Train, 0).exists());
    let report = case.fetch(1).unwrap();
    assert_eq!(report.tokens, 4_000_100);
    let transfers = case.server.transfers(TRAIN[0]);
    assert!(transfers.len() == 2 && transfers[1] > 900_000, "{transfers:?}");
    case.assert_same(0);
}

#[test]
fn a_part_that_does_not_fit_is_fetched_anew() {
    for (whole, part) in [(false, vec![9_u8; 5000]), (false, vec![9; 1_000_000]), (true, vec![0; 5000])] {
        let case = Case::new();
        if whole {
            case.server.change(|state| state.whole.insert(TRAIN[0].into()));
        }
        let content = case.server.change(|state| state.files[TRAIN[0]].clone());
        let sha256: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        let blobs = case.dir.path().join(".fetch/datasets--owner--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{sha256}.part")), part).unwrap();
        case.fetch(1).unwrap();
        case.assert_same(0);
    }
}

#[test]
fn a_whole_part_needs_no_transfer() {
    let case = Case::new();
    let content = case.server.change(|state| state.files[TRAIN[0]].clone());
    let sha256: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    let blobs = case.dir.path().join(".fetch/datasets--owner--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{sha256}.part")), content).unwrap();
    case.fetch(1).unwrap();
    assert!(case.server.transfers(TRAIN[0]).is_empty());
    case.assert_same(0);
}

#[test]
fn other_content_than_listed_is_refused() {
    let case = Case::new();
    case.fetch(1).unwrap();
    let older = fs::read(case.place(Split::Train, 0)).unwrap();
    // The hub lists a new shard, but other bytes of that size arrive.
    let fresh = shard(7, 200_000);
    let mut wrong = fresh.clone();
    wrong[2000] ^= 1;
    case.server.list(TRAIN[0], fresh);
    case.server.change(|state| state.sent.insert(TRAIN[0].into(), wrong));
    let error = case.fetch(1).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    let line = error.to_string();
    assert!(line.starts_with("downloaded file is not the one") && line.contains(TRAIN[0]), "{line}");
    assert_eq!(fs::read(case.place(Split::Train, 0)).unwrap(), older);

    // Listed and sent alike, but no shard, or one of another vocabulary.
    let mut other = shard(1, 500);
    other[1025] = 0xff;
    for (bad, message) in [(b"no shard".to_vec(), "shard of 8 bytes"), (other, "token id 65281 at token 0")] {
        let case = Case::new();
        case.server.list(TRAIN[0], bad);
        let error = case.fetch(1).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains(message) && error.to_string().contains(TRAIN[0]), "{error}");
        assert!(!case.place(Split::Train, 0).exists());
    }
}

#[test]
fn what_cannot_be_fetched_is_one_line() {
    let case = Case::new();
    let good = case.options(1);
    let name = |name: &str| Some(name.to_string());
    let cases = [
        (FetchOptions { variant: "sp77".into(), ..good.clone() }, 2, "variant sp77 is not in"),
        (FetchOptions { variant: "../x".into(), ..good.clone() }, 2, "path \"../x\", --variant"),
        (
            FetchOptions { variant: "sp2048".into(), ..good.clone() },
            2,
            "dataset fineweb10B_sp2048 has no stats",
        ),
        (
            FetchOptions { variant: "byte260".into(), ..good.clone() },
            2,
            "tokenizer of fineweb10B_byte260 is not",
        ),
        (FetchOptions { variant: "sp512".into(), ..good.clone() }, 2, "path \"../../outside.model\""),
        (FetchOptions { train_shards: 4, ..good.clone() }, 2, "4 train shards of sp1024, --train-shards"),
        (FetchOptions { repo: name("owner/none"), ..good.clone() }, 2, "the hub does not give the file"),
        (FetchOptions { repo: name("owner/na me"), ..good.clone() }, 2, "path \"owner/na me\""),
        (FetchOptions { prefix: name("/.."), ..good.clone() }, 2, "path \"..\""),
        (FetchOptions { endpoint: name("ftp://x"), ..good.clone() }, 2, "hub endpoint ftp://x"),
        // Nothing listens on port 1.
        (FetchOptions { endpoint: name("http://127.0.0.1:1"), ..good.clone() }, 1, "download failed 5 times"),
    ];
    for (options, code, message) in cases {
        let error = fetch(&options, &quiet).unwrap_err();
        assert!(error.exit_code() == code && error.to_string().starts_with(message), "{error}");
    }
    let nowhere = tempfile::tempdir().unwrap();
    let skip = FetchOptions { skip_manifest: true, out: nowhere.path().to_path_buf(), ..good.clone() };
    assert!(fetch(&skip, &quiet).unwrap_err().to_string().contains("manifest.json"));

    // A file of the manifest that the hub has not is told before anything is downloaded.
    case.server.change(|state| (state.files.remove(TRAIN[1]), state.transfers.clear()));
    let error = case.fetch(3).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains(TRAIN[1]), "{error}");
    let of_manifest = |transfer: &(String, usize)| transfer.0 == "root/manifest.json";
    assert!(case.server.change(|state| state.transfers.iter().all(of_manifest)));
    case.server.change(|state| state.nowhere = true);
    let error = case.fetch(1).unwrap_err();
    assert!(error.exit_code() == 1 && error.to_string().starts_with("the hub client gave up"), "{error}");
    case.server.list("root/manifest.json", b"{\"datasets\": 3}".to_vec());
    let error = case.fetch(1).unwrap_err();
    assert!(error.exit_code() == 1 && error.to_string().contains("bad manifest"), "{error}");
}

/// The repository, its folder and the hub are taken from the environment where no option names them. Environment
/// variables belong to a process: the test runs itself in another one.
#[test]
fn the_environment_names_the_repository() {
    const OUT: &str = "FAIRWAY_TEST_FETCH_OUT";
    if let Some(out) = std::env::var_os(OUT) {
        let options = FetchOptions { train_shards: 1, ..FetchOptions::new("sp1024", out.into()) };
        assert_eq!(fetch(&options, &quiet).unwrap().tokens, 200_100);
        return;
    }
    let case = Case::new();
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_environment_names_the_repository"])
        .env(OUT, ".")
        .current_dir(case.dir.path())
        .env("HF_ENDPOINT", case.server.endpoint())
        .env("MATCHED_FINEWEB_REPO_ID", "owner/name")
        .env("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "root")
        .status()
        .unwrap();
    assert!(status.success());
    case.assert_same(0);
}
