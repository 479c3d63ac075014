//! `ferry`: the command line's entry.

mod cli;
mod monitor;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::parse(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match &cli.command {
        cli::Command::Monitor(options) => monitor::run(options),
        cli::Command::Run(_) | cli::Command::Demo(_) => {
            eprintln!("ferry: not built yet (log filter {})", cli.log_filter());
            ExitCode::FAILURE
        }
    }
}
