//! QEMU's spelling of the options of `ferry run`, brought into our own.

use std::ffi::{OsStr, OsString};

/// What becomes of an option of QEMU's.
#[derive(Clone, Copy)]
enum Meaning {
    /// An option of ours, with a value.
    Value(&'static str),
    /// An option of ours, without one.
    Flag(&'static str),
    /// How ferry is anyway; without a value.
    Given,
    /// How ferry is anyway, if the value is one of these.
    GivenIf(&'static [&'static str]),
}

use Meaning::{Flag, Given, GivenIf, Value};

const OPTIONS: &[(&str, Meaning)] = &[
    ("name", Value("--name")),
    ("kernel", Value("--kernel")),
    ("initrd", Value("--initrd")),
    ("append", Value("--append")),
    ("m", Value("--memory")),
    ("memory", Value("--memory")),
    ("smp", Value("--smp")),
    ("cpu", Value("--cpu")),
    ("serial", Value("--serial")),
    ("console", Value("--console")),
    ("monitor", Value("--monitor")),
    ("qmp", Value("--qmp")),
    ("incoming", Value("--incoming")),
    ("loadvm", Value("--loadvm")),
    ("drive", Value("--disk")),
    ("log", Value("--log")),
    ("S", Flag("--paused")),
    ("paused", Flag("--paused")),
    ("no-reboot", Flag("--no-reboot")),
    ("no-shutdown", Flag("--no-shutdown")),
    ("enable-kvm", Given),
    ("nodefaults", Given),
    ("no-user-config", Given),
    ("nographic", Given),
    ("display", GivenIf(&["none"])),
    ("vga", GivenIf(&["none"])),
    ("accel", GivenIf(&["kvm"])),
];

/// Rewrites the arguments of `ferry run`; leaves all others. A value is tied to its option
/// (`--append=-x`), so that it may begin with a dash.
pub(super) fn translate(args: impl IntoIterator<Item = OsString>) -> Result<Vec<OsString>, String> {
    let mut args = args.into_iter();
    let mut translated: Vec<OsString> = args.by_ref().take(1).collect();
    // Only options can stand before the subcommand, and one of them has a value.
    for arg in args.by_ref() {
        let ends =
            !arg.as_encoded_bytes().starts_with(b"-") && translated.last() != Some(&"--log".into());
        let run = ends && arg == "run";
        translated.push(arg);
        if ends {
            if !run {
                translated.extend(args);
                return Ok(translated);
            }
            break;
        }
    }
    while let Some(arg) = args.next() {
        let Some((_, meaning)) = option(&arg) else {
            // clap would see single letters, and perhaps -h among them.
            if matches!(arg.as_encoded_bytes(), [b'-', letter, _, ..] if *letter != b'-') {
                return Err(format!(
                    "unknown option {} (ferry run --help lists those there are)",
                    arg.display()
                ));
            }
            translated.push(arg);
            continue;
        };
        let mut value = || {
            args.next()
                .ok_or_else(|| format!("a value is required behind {}", arg.display()))
        };
        match meaning {
            // Serial port and monitor on one terminal, in one option.
            Value("--serial") => {
                let value = value()?;
                if value == "mon:stdio" {
                    translated.extend(["--serial=stdio".into(), "--monitor=stdio".into()]);
                } else {
                    translated.push(tie("--serial", &value));
                }
            }
            Value(ours) => {
                let value = value()?;
                translated.push(tie(ours, &value));
            }
            Flag(ours) => translated.push(ours.into()),
            Given => {}
            GivenIf(values) => {
                let value = value()?;
                if !values.iter().any(|known| value == **known) {
                    return Err(format!(
                        "{} {}: ferry only has {}",
                        arg.display(),
                        value.display(),
                        values.join(", ")
                    ));
                }
            }
        }
    }
    Ok(translated)
}

/// An option with one dash or two and without `=`.
fn option(arg: &OsStr) -> Option<(&'static str, Meaning)> {
    let arg = arg.to_str()?;
    let name = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    OPTIONS.iter().find(|(known, _)| *known == name).copied()
}

fn tie(option: &str, value: &OsStr) -> OsString {
    let mut tied = OsString::from(option);
    tied.push("=");
    tied.push(value);
    tied
}
