//! `fairway devices`.

use super::output;
use crate::backend::{self, DeviceInfo};
use crate::error::Result;

/// List the devices found, and why one is missing
#[derive(clap::Args)]
#[command(after_help = "Example: fairway devices")]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let devices = backend::devices();
    if args.json {
        let row = |device: &DeviceInfo| {
            serde_json::json!({
                "name": device.name,
                "backend": device.backend,
                "precision": device.precision.to_string(),
                "memory_bytes": device.memory_bytes,
                "usable": device.usable,
                "note": device.note,
            })
        };
        let rows: Vec<_> = devices.iter().map(row).collect();
        return output::json(&serde_json::json!({ "devices": rows }));
    }
    let memory = |bytes: Option<u64>| match bytes {
        Some(bytes) => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
        None => "-".to_string(),
    };
    let row = |device: &DeviceInfo| {
        vec![
            device.backend.to_string(),
            device.name.clone(),
            if device.usable { "yes" } else { "no" }.to_string(),
            device.precision.to_string(),
            memory(device.memory_bytes),
            device.note.clone(),
        ]
    };
    let rows: Vec<_> = devices.iter().map(row).collect();
    output::table(&["backend", "name", "usable", "precision", "memory", "note"], &rows);
    Ok(())
}
