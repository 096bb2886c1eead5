//! The command line: one file a subcommand; it parses, calls the library and prints.

mod args;
mod bench;
mod calibration;
mod compare;
mod data;
mod demo;
mod devices;
mod eval;
mod eval_method;
mod export;
mod export_loss;
mod fitting;
mod inspect;
mod output;
mod parity;
mod progress;
mod recipes;
mod sample;
mod source;
mod submission;
mod train;

use crate::error::{Error, Result};
use crate::train::guards;
use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Trains, compresses and scores the best language model that fits in 16,000,000 bytes.
#[derive(Parser)]
#[command(
    name = "fairway",
    version = concat!(env!("CARGO_PKG_VERSION"), " (", env!("FAIRWAY_COMMIT"), ")"),
    arg_required_else_help = true,
    after_help = "Example: fairway demo --minutes 1"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Train(Box<train::Args>),
    Export(export::Args),
    Eval(eval::Args),
    Sample(sample::Args),
    Inspect(inspect::Args),
    Recipes(recipes::Args),
    Data(data::Args),
    Devices(devices::Args),
    Parity(parity::Args),
    Bench(bench::Args),
    Compare(compare::Args),
    Submission(submission::Args),
}

/// Parses the process's arguments, runs the command and returns the exit status: 0 done, 1 failed, 2 bad usage or
/// input, 130 interrupted.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => return fail(&usage_error(&error)),
        Err(help) => {
            // A closed pipe is no reason to fail.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
    };
    catch_interrupts();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Demo(args) => demo::run(args),
        Command::Train(args) => train::run(*args),
        Command::Export(args) => export::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Sample(args) => sample::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Recipes(args) => recipes::run(args),
        Command::Data(args) => data::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Submission(args) => submission::run(args),
        Command::Parity(args) => return parity::run(args),
    }?;
    guards::check_interrupt("after the last step of the command")?;
    Ok(ExitCode::SUCCESS)
}

fn fail(error: &Error) -> ExitCode {
    output::error_line(error);
    ExitCode::from(error.exit_code())
}

/// clap's several lines as one of ours.
fn usage_error(error: &clap::Error) -> Error {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Error::input("no command", "command line", "one of the commands that `fairway --help` lists");
    }
    let text = error.render().to_string();
    let is_said = |line: &&str| !line.is_empty() && !line.starts_with("For more information");
    let lines = || text.lines().map(str::trim).filter(is_said);
    let what: Vec<&str> = lines().take_while(|line| !line.starts_with("Usage:")).collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let usage = lines().find_map(|line| line.strip_prefix("Usage: ")).unwrap_or("fairway --help");
    Error::input(what, "command line", format!("usage: {usage}"))
}

/// The first Ctrl-C asks the work to finish its step, save and stop; the second exits at once.
fn catch_interrupts() {
    // `timeout` signals its child and then the child's group: two signals that were meant as one.
    const AT_ONCE: Duration = Duration::from_millis(50);
    let mut first: Option<Instant> = None;
    let caught = ctrlc::set_handler(move || {
        if let Some(first) = first {
            if first.elapsed() < AT_ONCE {
                return;
            }
            let place = "the work since the last checkpoint is lost".to_string();
            output::error_line(&Error::Interrupted { place });
            std::process::exit(130);
        }
        first = Some(Instant::now());
        guards::interrupt();
        output::warn("interrupted: finishing the step; press Ctrl-C again to exit at once");
    });
    if let Err(error) = caught {
        output::warn(&format!("Ctrl-C will stop without saving ({error})"));
    }
}
