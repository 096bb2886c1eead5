//! `fairway inspect`.

use super::{output, source};
use crate::artifact::Artifact;
use crate::artifact::assemble::{layout, parse_recipe};
use crate::error::{Error, Result};
use crate::model;
use crate::recipe::Recipe;
use crate::train::run::RunInspection;
use crate::train::tensors_file::{Entry, expect_params};
use std::fs;
use std::path::Path;

/// Show what a recipe, a run or an artifact is; opens no GPU
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  fairway inspect baseline\n  fairway inspect model.fairway")]
pub struct Args {
    /// A recipe's name or TOML file, the folder of a run, or an artifact
    what: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Row {
    name: String,
    shape: Vec<usize>,
    dtype: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    scales: Option<String>,
    bytes: usize,
}

struct Report {
    params: u64,
    tensors: Vec<Row>,
    recipe: Recipe,
    quant: Option<String>,
    bytes: Option<u64>,
    /// What else an artifact says of itself, a line each.
    notes: Vec<String>,
}

pub fn run(args: Args) -> Result<()> {
    let path = Path::new(&args.what);
    let report = if source::is_artifact(path) {
        of_artifact(path)?
    } else if path.is_dir() {
        of_run(path)?
    } else {
        let recipe = load_recipe(&args.what, path)?;
        let rows = model::layout(&recipe)?.into_iter().map(|(name, shape)| {
            let bytes = 4 * shape.iter().product::<usize>();
            Row { name, shape, dtype: "F32".into(), scales: None, bytes }
        });
        let params = model::param_count(&recipe)?;
        Report { params, tensors: rows.collect(), quant: None, bytes: None, notes: Vec::new(), recipe }
    };
    if args.json {
        return output::json(&serde_json::json!({
            "params": report.params,
            "tensors": report.tensors,
            "recipe": report.recipe,
            "quant": report.quant,
            "bytes": report.bytes,
        }));
    }
    let cells = |row: &Row| {
        let scales = row.scales.clone().unwrap_or_else(|| "-".into());
        vec![row.name.clone(), format!("{:?}", row.shape), row.dtype.clone(), scales, row.bytes.to_string()]
    };
    let rows: Vec<_> = report.tensors.iter().map(cells).collect();
    output::line(report.recipe.to_toml());
    output::table(&["tensor", "shape", "type", "scales", "bytes"], &rows);
    output::line(format!("parameters: {}", report.params));
    if let (Some(quant), Some(bytes)) = (report.quant, report.bytes) {
        output::line(format!("quantisation: {quant}; file: {bytes} bytes"));
    }
    report.notes.iter().for_each(output::line);
    Ok(())
}

/// A recipe; of a file that cannot be one the error says what else it could have been.
fn load_recipe(what: &str, path: &Path) -> Result<Recipe> {
    if fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == 0) {
        return Err(Error::input("empty file", path.display(), "an artifact, a run or a recipe"));
    }
    let is_toml = path.extension().is_some_and(|extension| extension == "toml");
    Recipe::load(what).map_err(|error| match error {
        Error::Input { what, place, .. } if path.is_file() && !is_toml => Error::input(
            format!("neither an artifact nor a recipe ({what})"),
            place,
            "an artifact, a run or a recipe",
        ),
        other => other,
    })
}

fn of_artifact(path: &Path) -> Result<Report> {
    let found = Artifact::inspect(path)?;
    let place = path.display().to_string();
    let recipe = parse_recipe(&found.recipe_toml, &place)?;
    let layout = layout(&recipe, &found.tensors, &place)?;
    let tensors: Vec<_> = layout.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
    expect_params(&recipe, &tensors, &place)?;
    let row = |row: crate::artifact::TensorRow| Row {
        name: row.name,
        shape: row.shape,
        dtype: row.dtype,
        scales: row.scales,
        bytes: row.bytes,
    };
    // A file can say anything: no control character of it reaches a terminal.
    let note = |(name, note): (String, String)| format!("{name}: {note}").replace(char::is_control, " ");
    let [.., data] = &found.sections;
    let codec = ("codec".to_owned(), data.codec.to_string());
    let notes = std::iter::once(codec).chain(found.notes).map(note).collect();
    Ok(Report {
        params: found.params,
        tensors: found.tensors.into_iter().map(row).collect(),
        recipe,
        quant: Some(found.quant),
        bytes: Some(found.bytes),
        notes,
    })
}

fn of_run(path: &Path) -> Result<Report> {
    let run = RunInspection::of(path, &mut |line| output::warn(line))?;
    let row = |Entry { name, shape, dtype, bytes, .. }| Row {
        name,
        shape,
        dtype: format!("{dtype:?}"),
        scales: None,
        bytes,
    };
    let tensors: Vec<Row> = run.tensors.into_iter().map(row).collect();
    Ok(Report {
        params: model::param_count(&run.recipe)?,
        tensors,
        recipe: run.recipe,
        quant: Some("none".into()),
        bytes: Some(run.bytes),
        notes: Vec::new(),
    })
}
