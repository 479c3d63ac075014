//! `ferry`: runs guests, migrates them, shows how, and measures it.

mod cli;
mod demo;
mod monitor;
mod run;

use std::error::Error;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use cli::Command;

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let result = start_logging(&cli.log_filter()).and_then(|()| match &cli.command {
        Command::Run(options) => run::run(options).map_err(Into::into),
        Command::Demo(options) => demo::run(options).map_err(Into::into),
        // It has said itself what went wrong.
        Command::Monitor(options) => Ok(monitor::run(options)),
        Command::Bench(options) => bench(options),
    });
    result.unwrap_or_else(|error| {
        eprintln!("ferry: {error}");
        ExitCode::FAILURE
    })
}

/// Measures the build that is running, unless the options name another.
fn bench(options: &benches::command::Options) -> Result<ExitCode, Box<dyn Error>> {
    let own = std::env::current_exe()
        .map_err(|error| format!("which file is running can't be told: {error}"))?;
    benches::command::run(options, &own)?;
    Ok(ExitCode::SUCCESS)
}

fn start_logging(filter: &str) -> Result<(), Box<dyn Error>> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| format!("the log filter '{filter}' can't be read: {error}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .init();
    Ok(())
}
