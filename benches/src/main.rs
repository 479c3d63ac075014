//! `ferry bench` as a program of its own, which measures `target/release/ferry`.

use std::path::Path;
use std::process::ExitCode;

use benches::command::{self, Options};
use clap::Parser;

/// Measures Ferry, and QEMU beside it, on this machine
#[derive(Debug, Parser)]
#[command(name = "benches")]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    match command::run(&Cli::parse().options, Path::new("target/release/ferry")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("benches: {err}");
            ExitCode::FAILURE
        }
    }
}
