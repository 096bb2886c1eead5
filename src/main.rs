//! The `fairway` program: parse, run, exit status.

use std::process::ExitCode;

fn main() -> ExitCode {
    fairway::cli::main()
}
