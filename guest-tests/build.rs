//! Builds the bare-metal guests with the same cargo, toolchain and lock file as everything else,
//! into a target directory of their own: the outer cargo holds the lock of the usual one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The only target that the toolchain installs. The guests use nothing of its operating system.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What the guests' image needs: a static ELF file at fixed addresses, by our own linker script.
fn rustflags(script: &Path) -> String {
    let arguments = [
        "-nostartfiles".to_owned(),
        "-nostdlib".to_owned(),
        "-static".to_owned(),
        "-no-pie".to_owned(),
        "-Wl,--build-id=none,-z,norelro,-z,max-page-size=4096".to_owned(),
        format!("-Wl,-T,{}", script.display()),
    ];
    let mut flags = vec!["-Crelocation-model=static".to_owned()];
    flags.extend(
        arguments
            .into_iter()
            .map(|argument| format!("-Clink-arg={argument}")),
    );
    flags.join("\x1f")
}

/// Variables by which the outer cargo, clippy or a coverage tool would steer the inner build.
/// Those that say where things are (CARGO_HOME) and how to share the job slots (CARGO_MAKEFLAGS)
/// stay.
fn leaks(name: &str) -> bool {
    let kept = ["CARGO_HOME", "CARGO_MAKEFLAGS"];
    let steering = ["RUSTFLAGS", "RUSTDOC", "CLIPPY_ARGS", "CLIPPY_CONF_DIR"];
    let prefixes = ["CARGO_", "RUSTC_", "LLVM_PROFILE"];
    let network = [
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTRIES_",
        "CARGO_REGISTRY_",
        "CARGO_SOURCE_",
    ];
    if kept.contains(&name) || network.iter().any(|prefix| name.starts_with(prefix)) {
        return false;
    }
    steering.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

fn path(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable)
        .map(PathBuf::from)
        .ok_or_else(|| format!("cargo did not set {variable}: run this through cargo"))
}

fn build() -> Result<(), String> {
    let here = path("CARGO_MANIFEST_DIR")?;
    let out = path("OUT_DIR")?;
    let guests = here.join("guests");
    let target_dir = out.join("guests");

    // A directory stands for every file below it.
    for input in ["src", "image.ld", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", guests.join(input).display());
    }
    println!(
        "cargo::rerun-if-changed={}",
        here.join("build.rs").display()
    );
    // The profile `guest` and the toolchain are the workspace's.
    for input in ["Cargo.toml", "rust-toolchain.toml"] {
        println!(
            "cargo::rerun-if-changed={}",
            here.join("..").join(input).display()
        );
    }

    let mut cargo = Command::new(path("CARGO")?);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(leaks) {
            cargo.env_remove(&name);
        }
    }
    cargo
        .current_dir(&guests)
        .args([
            "build",
            "--package",
            "guests",
            "--bins",
            "--features",
            "bare-metal",
        ])
        .args([
            "--profile",
            "guest",
            "--target",
            TARGET,
            "--locked",
            "--target-dir",
        ])
        .arg(&target_dir)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            rustflags(&guests.join("image.ld")),
        );
    // Its messages go to standard error, which cargo shows when a build script fails.
    let status = cargo
        .status()
        .map_err(|error| format!("cannot start {cargo:?}: {error}"))?;
    if !status.success() {
        return Err(format!(
            "the build of the bare-metal guests failed ({status}); its messages are below"
        ));
    }
    println!(
        "cargo::rustc-env=GUEST_IMAGES={}",
        target_dir.join(TARGET).join("guest").display()
    );
    Ok(())
}

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error={error}");
            ExitCode::FAILURE
        }
    }
}
