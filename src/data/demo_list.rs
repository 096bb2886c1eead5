//! Choosing the crates of the demo corpus: a maintainer's tool that writes `demo_crates.txt`.

use super::demo::{CrateText, DemoList, PinnedCrate, corpus_sha256, find_crate, read_crate, split};
use crate::error::{Error, Result};
use crate::files;
use rayon::prelude::*;
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::Command;

/// Crates whose own text is shorter are not worth a line of the list.
const MIN_CRATE_BYTES: usize = 20_000;
/// Every target that this program is meant for: a listed crate is in the build of each.
const TARGETS: [&str; 3] = ["x86_64-unknown-linux-gnu", "aarch64-apple-darwin", "x86_64-pc-windows-msvc"];

/// Name and version of a registry crate.
type Package = (String, String);

/// Writes the list of crates anew, to `list`: those that the `Cargo.lock` of `manifest_dir` pins, that a build on
/// and for each target unpacks (as `cargo tree` and `cargo metadata` say), and that have enough text; of several
/// versions of a crate the newest. `from` is as in [`DemoOptions`](super::demo::DemoOptions). Returns the list.
///
/// For maintainers, after `Cargo.lock` or the rules for prose changed:
/// `FAIRWAY_WRITE_DEMO_LIST=1 cargo test --release --test demo_corpus write_list`.
pub fn write_list(manifest_dir: &Path, from: Option<&Path>, list: &Path) -> Result<DemoList> {
    let mut common: Option<HashSet<Package>> = None;
    for target in TARGETS {
        let here = compiled(manifest_dir, target)?;
        let here: HashSet<Package> = here.intersection(&native(manifest_dir, target)?).cloned().collect();
        common = Some(match common {
            Some(common) => common.intersection(&here).cloned().collect(),
            None => here,
        });
    }
    let mut packages: Vec<Package> = common.unwrap_or_default().into_iter().collect();
    let newness = |version: &str| -> Vec<u64> {
        version.split(['.', '-', '+']).map(|part| part.parse().unwrap_or(0)).collect()
    };
    packages.sort_by_key(|(name, version)| (name.clone(), std::cmp::Reverse(newness(version))));
    packages.dedup_by(|older, newest| older.0 == newest.0);
    let read = |(name, version): &Package| {
        let text = read_crate(&find_crate(&format!("{name}-{version}"), from)?)?;
        Ok((PinnedCrate { name: name.clone(), version: version.clone(), sha256: text.sha256() }, text))
    };
    let texts: Vec<Result<(PinnedCrate, CrateText)>> = packages.par_iter().map(read).collect();
    let texts: Vec<(PinnedCrate, CrateText)> = texts.into_iter().collect::<Result<_>>()?;
    let long = texts.into_iter().filter(|(_, text)| text.bytes() >= MIN_CRATE_BYTES);
    let (crates, texts): (Vec<PinnedCrate>, Vec<CrateText>) = long.unzip();
    let result = DemoList { corpus: corpus_sha256(&split(texts)), crates };
    files::write_atomic(list, result.render().as_bytes())?;
    Ok(result)
}

/// What a build for `target` compiles. Cargo takes the machine that this runs on as the one that builds, so that
/// build scripts' dependencies are those of this machine.
fn compiled(manifest_dir: &Path, target: &str) -> Result<HashSet<Package>> {
    let text = cargo(
        manifest_dir,
        &["tree", "--target", target, "--edges", "normal,build", "--prefix", "none", "--format", "{p}"],
    )?;
    let packages = text.lines().filter_map(|line| {
        // `name v1.2.3`, then `(proc-macro)`, `(*)`, or for a crate from elsewhere its place.
        let mut words = line.split_whitespace();
        let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
        let elsewhere = words.any(|word| word != "(proc-macro)" && word != "(*)");
        (!elsewhere).then(|| (name.to_string(), version.to_string()))
    });
    Ok(packages.collect())
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<MetaPackage>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct MetaPackage {
    id: String,
    name: String,
    version: String,
}

#[derive(Deserialize)]
struct Resolve {
    root: String,
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dep>,
}

#[derive(Deserialize)]
struct Dep {
    pkg: String,
    dep_kinds: Vec<DepKind>,
}

#[derive(Deserialize)]
struct DepKind {
    kind: Option<String>,
}

/// What a build on a machine of kind `target` may need: every dependency, a build script's too, is chosen for that
/// machine, but by features that are perhaps not all active.
fn native(manifest_dir: &Path, target: &str) -> Result<HashSet<Package>> {
    let text = cargo(manifest_dir, &["metadata", "--format-version", "1", "--filter-platform", target])?;
    let metadata: Metadata = serde_json::from_str(&text)
        .map_err(|error| Error::failed(error, "cargo metadata", "its documented JSON"))?;
    let nodes: HashMap<&str, &Node> =
        metadata.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let (mut reached, mut open) = (HashSet::new(), vec![metadata.resolve.root.as_str()]);
    while let Some(id) = open.pop() {
        if !reached.insert(id) {
            continue;
        }
        let is_built = |dep: &&Dep| dep.dep_kinds.iter().any(|kind| kind.kind.as_deref() != Some("dev"));
        let deps = nodes.get(id).into_iter().flat_map(|node| &node.deps);
        open.extend(deps.filter(is_built).map(|dep| dep.pkg.as_str()));
    }
    let packages = metadata.packages.iter().filter(|package| reached.contains(package.id.as_str()));
    Ok(packages.map(|package| (package.name.clone(), package.version.clone())).collect())
}

/// What a cargo command says, without a network and without changing the lock file.
fn cargo(manifest_dir: &Path, args: &[&str]) -> Result<String> {
    let failed = |what: String| {
        let what = format!("cargo {} failed ({what})", args.first().copied().unwrap_or_default());
        Error::failed(what, manifest_dir.display(), "a current Cargo.lock, and `cargo fetch` done")
    };
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(args)
        .args(["--offline", "--locked"])
        .current_dir(manifest_dir)
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_string()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
