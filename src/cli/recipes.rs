//! `fairway recipes`.

use super::output;
use crate::error::Result;
use crate::recipe::builtin;

/// List the built-in recipes
#[derive(clap::Args)]
#[command(after_help = "Example: fairway recipes --json")]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Row {
    name: String,
    aliases: Vec<String>,
    params: u64,
    summary: String,
}

pub fn run(args: Args) -> Result<()> {
    let rows: Result<Vec<Row>> = builtin()
        .iter()
        .map(|built_in| {
            let recipe = built_in.recipe()?;
            Ok(Row {
                name: built_in.name.to_string(),
                aliases: built_in.aliases.iter().map(|alias| alias.to_string()).collect(),
                params: crate::model::param_count(&recipe)?,
                summary: recipe.summary,
            })
        })
        .collect();
    let rows = rows?;
    if args.json {
        return output::json(&serde_json::json!({ "recipes": rows }));
    }
    let cells = |row: &Row| vec![row.name.clone(), row.params.to_string(), row.summary.clone()];
    output::table(&["recipe", "parameters", "summary"], &rows.iter().map(cells).collect::<Vec<_>>());
    Ok(())
}
