//! `fairway data`: corpora and shards.

use super::{args, output, progress};
use crate::data::demo::{self, DemoOptions};
use crate::data::fetch::{self, DEFAULT_TRAIN_SHARDS, FetchOptions};
use crate::data::pack::{self, DEFAULT_SHARD_TOKENS, PackOptions, PackReport};
use crate::data::verify::{self, VerifyOptions};
use crate::error::Result;
use clap::Subcommand;
use std::path::PathBuf;

/// Make, fetch and check corpora and shards
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  fairway data demo --out data/demo\n  \
    fairway data pack docs.jsonl --tokenizer fineweb_1024_bpe.model --out data/mine\n  \
    fairway data fetch --variant sp1024 --train-shards 10 --out data\n  \
    fairway data verify data/mine")]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Build the demo corpus from the documentation of the pinned crates
    #[command(after_help = "Example: fairway data demo --out data/demo")]
    Demo {
        /// Folder for the shards [default: the cache folder]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// `byte`, or a SentencePiece .model file
        #[arg(long, value_name = "FILE|byte", default_value = "byte")]
        tokenizer: String,
        /// A folder with the crates' sources [default: cargo's registry]
        #[arg(long, value_name = "DIR")]
        from: Option<PathBuf>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Pack JSONL (a `text` field; .gz too) or plain text (a document a file) into shards
    #[command(
        after_help = "Example: fairway data pack docs.jsonl --tokenizer byte --out data/mine --val-docs 100"
    )]
    Pack {
        /// The texts, in order
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// `byte`, or a SentencePiece .model file
        #[arg(long, value_name = "FILE|byte")]
        tokenizer: String,
        /// Folder for the shards
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// First documents kept for validation; 0 puts all in train shards [default: 50000, at most a tenth of them]
        #[arg(long, allow_hyphen_values = true, value_name = "N")]
        val_docs: Option<u64>,
        /// Tokens of a full shard
        #[arg(long, allow_hyphen_values = true, value_name = "N", default_value_t = DEFAULT_SHARD_TOKENS)]
        shard_tokens: u64,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Fetch the challenge's shards and tokenizer from its hub repository; resumes, checks every file
    #[command(after_help = "Example: fairway data fetch --variant sp1024 --train-shards 10 --out data")]
    Fetch {
        /// Which dataset: sp1024, byte260, ...
        #[arg(long, value_name = "NAME", default_value = "sp1024")]
        variant: String,
        /// First train shards to fetch (validation is always fetched whole)
        #[arg(long, allow_hyphen_values = true, value_name = "N", default_value_t = DEFAULT_TRAIN_SHARDS)]
        train_shards: usize,
        /// Use the manifest.json that is there
        #[arg(long)]
        skip_manifest: bool,
        /// Folder that gets datasets/, tokenizers/ and manifest.json
        #[arg(long, value_name = "DIR", default_value = "data")]
        out: PathBuf,
        /// Repository OWNER/NAME [default: MATCHED_FINEWEB_REPO_ID or the challenge's]
        #[arg(long, value_name = "REPO")]
        repo: Option<String>,
        /// The hub's URL [default: HF_ENDPOINT or the hub client's own]
        #[arg(long, value_name = "URL")]
        endpoint: Option<String>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Check shards: format, ids, record, and against the texts that they were packed from
    #[command(after_help = "Example: fairway data verify data/mine --text docs.jsonl --tokenizer byte")]
    Verify {
        /// Folder of shards, or one shard
        data: PathBuf,
        /// The texts, in order, to encode again and compare
        #[arg(long = "text", value_name = "FILE", num_args = 1..)]
        files: Vec<PathBuf>,
        /// `byte`, or a SentencePiece .model file, for the byte count and --text
        #[arg(long, value_name = "FILE|byte")]
        tokenizer: Option<String>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

pub fn run(args: Args) -> Result<()> {
    match args.action {
        Action::Demo { out, tokenizer, from, json } => {
            let out = out.unwrap_or_else(args::demo_dir);
            let options = DemoOptions { out, tokenizer, from };
            packed(&demo::build(&options, &progress::callback("demo corpus"))?, json)
        }
        Action::Pack { files, tokenizer, out, val_docs, shard_tokens, json } => {
            let options = PackOptions { files, tokenizer, out, val_docs, shard_tokens };
            packed(&pack::pack(&options, &progress::callback("pack"))?, json)
        }
        Action::Fetch { variant, train_shards, skip_manifest, out, repo, endpoint, json } => {
            let defaults = FetchOptions::new(&variant, out);
            let options = FetchOptions { train_shards, skip_manifest, repo, endpoint, ..defaults };
            let report = fetch::fetch(&options, &progress::callback("fetch"))?;
            if json {
                return output::json(&report);
            }
            output::line(format!("{} files fetched, {} kept", report.downloaded, report.kept));
            summary(report.docs, report.tokens, None, &report.sha256);
            output::line(format!("--data {}", report.dataset.display()));
            let models =
                report.tokenizer_files.iter().filter(|f| f.extension().is_some_and(|e| e == "model"));
            models.for_each(|model| output::line(format!("--tokenizer {}", model.display())));
            Ok(())
        }
        Action::Verify { data, files, tokenizer, json } => {
            let options = VerifyOptions { data, files, tokenizer };
            let report = verify::verify(&options, &progress::callback("verify"))?;
            if json {
                return output::json(&report);
            }
            let rows: Vec<_> = report
                .shards
                .iter()
                .map(|s| vec![s.file.clone(), s.tokens.to_string(), s.sha256.clone()])
                .collect();
            output::table(&["shard", "tokens", "sha256"], &rows);
            summary(report.docs, report.tokens, report.bytes, &report.sha256);
            if let Some(bytes) = report.raw_bytes {
                output::line(format!("every token equals that of the {bytes} bytes of text"));
            }
            Ok(())
        }
    }
}

fn packed(report: &PackReport, json: bool) -> Result<()> {
    if json {
        return output::json(report);
    }
    summary(report.docs, report.tokens, Some(report.bytes), &report.sha256);
    let shards = report.shards.len();
    output::line(format!("{shards} shards, {} of {} documents for validation", report.val_docs, report.docs));
    output::line(format!("{} UTF-8 bytes before encoding; {}", report.raw_bytes, report.out.display()));
    Ok(())
}

fn summary(docs: u64, tokens: u64, bytes: Option<u64>, sha256: &str) {
    let bytes = bytes.map_or("-".into(), |bytes| bytes.to_string());
    output::line(format!("docs:{docs} tokens:{tokens} bytes:{bytes} sha256:{sha256}"));
}
