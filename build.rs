//! Two facts about the build that the program reports: the sources that it was made of (their packed size counts
//! against the challenge's cap) and the commit.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the program consists of: folders of sources that are compiled in, and single files.
const SOURCES: [&str; 6] = ["Cargo.toml", "build.rs", "src", "wgsl", "cuda", "examples/recipes"];

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(std::env::var("OUT_DIR")?);

    let mut names = Vec::new();
    for source in SOURCES {
        if root.join(source).exists() {
            println!("cargo:rerun-if-changed={source}");
            collect(&root, source, &mut names)?;
        }
    }
    // Sorted, so that the same sources give the same bytes on every file system.
    names.sort();
    let mut joined = Vec::new();
    for name in names {
        let content = fs::read(root.join(&name))?;
        joined.extend(format!("{name}\n{}\n", content.len()).bytes());
        joined.extend(content);
    }
    fs::write(out.join("sources.bin"), joined)?;

    println!("cargo:rerun-if-env-changed=FAIRWAY_COMMIT");
    let commit = std::env::var("FAIRWAY_COMMIT").ok().filter(|c| !c.is_empty()).or_else(|| git_commit(&root));
    println!("cargo:rustc-env=FAIRWAY_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    Ok(())
}

/// Adds the files at `name` (a file, or a folder with all below it), with `/` between folders. Hidden files are an
/// editor's or the system's, not ours.
fn collect(root: &Path, name: &str, names: &mut Vec<String>) -> Result<(), Box<dyn Error>> {
    let path = root.join(name);
    if path.is_dir() {
        for entry in fs::read_dir(&path)? {
            let file_name = entry?.file_name();
            let file_name = file_name.to_str().ok_or("a source file whose name is not UTF-8")?;
            if !file_name.starts_with('.') {
                collect(root, &format!("{name}/{file_name}"), names)?;
            }
        }
    } else {
        names.push(name.to_owned());
    }
    Ok(())
}

/// The commit that is checked out, or none outside a checkout of this crate.
fn git_commit(root: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").arg("-C").arg(root).args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !text.is_empty()).then_some(text)
    };
    // An unpacked crate may lie within somebody else's checkout: that commit would say nothing about it.
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    // HEAD changes when another branch is checked out, its log with every commit.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) =
            git(&["rev-parse", "--git-path", file]).map(|p| root.join(p)).filter(|p| p.exists())
        {
            println!("cargo:rerun-if-changed={}", path.display());
        }
    }
    git(&["rev-parse", "--short", "HEAD"])
}
