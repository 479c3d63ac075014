//! The monitor's commands: a table of names, help and what they do.

use super::info;
use super::line::Words;
use super::session::Session;
use crate::control::command::{
    AnnounceRequest, CommandError, MigrateRequest, MigrationCapabilityStatus, ParameterChange,
    ShutdownCause, StorageCopy, Uri, Work,
};
use crate::control::size::parse_size;

/// A command.
pub struct Command {
    /// Its name, then shorter ones.
    pub names: &'static [&'static str],
    /// What it takes, for `help`.
    pub parameters: &'static str,
    /// What it does, for `help`.
    pub help: &'static str,
    /// What may be typed behind it.
    pub completion: Completion,
    /// Does it.
    pub run: fn(&mut Session, Words) -> Result<Reply, Failure>,
}

/// What a command's parameters can be completed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Nothing.
    None,
    /// The names of commands.
    Commands,
    /// What `info` shows.
    Topics,
    /// The beginnings of a migration's address.
    Address,
    /// The names of migration parameters.
    Parameters,
    /// A migration capability, then on or off.
    Capabilities,
}

/// What a command answers.
#[derive(Debug)]
pub enum Reply {
    /// Text: whole lines.
    Text(String),
    /// A migration has begun, and the person waits for it.
    Migrating,
    /// Something has begun that is soon over, and the person waits for it.
    Working(Work),
}

impl Reply {
    /// Nothing to say.
    pub fn nothing() -> Self {
        Self::Text(String::new())
    }
}

/// Why a command was not carried out.
#[derive(Debug)]
pub enum Failure {
    /// It was written wrongly.
    Usage(String),
    /// There is no such thing.
    Unknown(String),
    /// The machine refused it.
    Command(CommandError),
}

impl Failure {
    /// It was written wrongly.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }
}

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Self {
        Self::Command(error)
    }
}

/// Every command, by name.
pub const COMMANDS: &[Command] = &[
    Command {
        names: &["announce_self"],
        parameters: "[name,...]",
        help: "tell the network where the guest is, for all of its cards or for those named",
        completion: Completion::None,
        run: |session, mut words| {
            let names = words.optional();
            words.finish()?;
            session.machine().announce_self(AnnounceRequest {
                interfaces: names.map(|names| names.split(',').map(str::to_owned).collect()),
                ..Default::default()
            })?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["balloon"],
        parameters: "value",
        help: "ask the guest to have that much memory, in MiB or with a unit (1G)",
        completion: Completion::None,
        run: |session, mut words| {
            let word = words.required()?;
            words.finish()?;
            let bytes = parse_size(&word, 1 << 20)
                .map_err(|error| CommandError::generic(error.to_string()))?;
            session.machine().set_balloon(bytes)?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["cont", "c"],
        parameters: "",
        help: "run the guest, or run it on",
        completion: Completion::None,
        run: |session, words| {
            words.finish()?;
            session.machine().cont()?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["cpu"],
        parameters: "index",
        help: "choose the vCPU that info registers shows",
        completion: Completion::None,
        run: |session, mut words| {
            let word = words.required()?;
            words.finish()?;
            let index = word
                .parse()
                .map_err(|_| Failure::usage(format!("'{word}' is not a number")))?;
            session.select_cpu(index)?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["delvm"],
        parameters: "tag",
        help: "delete a snapshot of the guest and its disks",
        completion: Completion::None,
        run: |session, mut words| {
            let tag = words.required()?;
            words.finish()?;
            Ok(Reply::Working(session.machine().delete_snapshot(&tag)?))
        },
    },
    Command {
        names: &["help", "?"],
        parameters: "[command]",
        help: "show all commands, or one",
        completion: Completion::Commands,
        run: help,
    },
    Command {
        names: &["info"],
        parameters: "topic",
        help: "show something about the machine (help info lists the topics)",
        completion: Completion::Topics,
        run: info::run,
    },
    Command {
        names: &["loadvm"],
        parameters: "tag",
        help: "put the guest and its disks back to a snapshot",
        completion: Completion::None,
        run: |session, mut words| {
            let tag = words.required()?;
            words.finish()?;
            Ok(Reply::Working(session.machine().load_snapshot(&tag)?))
        },
    },
    Command {
        names: &["migrate"],
        parameters: "[-d] [-b] [-i] uri",
        help: "migrate the guest to tcp:HOST:PORT or unix:PATH, or save it to file:PATH (-d: do not \
               wait for the end; -b: copy the disks; -i: copy what they hold above their backing \
               files); Ctrl-C while waiting cancels",
        completion: Completion::Address,
        run: |session, mut words| {
            let options = words.options("dbi")?;
            let detach = options.contains('d');
            let uri = words.required()?;
            words.finish()?;
            session.machine().migrate(MigrateRequest {
                address: uri.parse::<Uri>().map_err(CommandError::from)?,
                copy: StorageCopy::of(options.contains('b'), options.contains('i')),
            })?;
            Ok(if detach {
                Reply::nothing()
            } else {
                Reply::Migrating
            })
        },
    },
    Command {
        names: &["migrate_cancel"],
        parameters: "",
        help: "cancel the migration under way; the guest runs on here",
        completion: Completion::None,
        run: |session, words| {
            words.finish()?;
            session.machine().migrate_cancel()?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["migrate_incoming"],
        parameters: "uri",
        help: "wait for a guest on tcp:HOST:PORT or unix:PATH, or load it from file:PATH, after \
               --incoming defer",
        completion: Completion::Address,
        run: |session, mut words| {
            let uri = words.required()?;
            words.finish()?;
            session
                .machine()
                .migrate_incoming(uri.parse::<Uri>().map_err(CommandError::from)?, true)?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["migrate_set_capability"],
        parameters: "capability on|off",
        help: "switch a migration capability on or off",
        completion: Completion::Capabilities,
        run: |session, mut words| {
            let capability = words.required()?;
            let state = on_or_off(&words.required()?)?;
            words.finish()?;
            session
                .machine()
                .change_capabilities(&[MigrationCapabilityStatus { capability, state }])?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["migrate_set_downtime"],
        parameters: "seconds",
        help: "set how long a migration may stop the guest, in seconds (0.03) or with a unit \
               (30ms)",
        completion: Completion::None,
        run: |session, mut words| {
            let word = words.required()?;
            words.finish()?;
            let downtime_limit = Some(parse_seconds(&word)?);
            change(
                session,
                ParameterChange {
                    downtime_limit,
                    ..Default::default()
                },
            )
        },
    },
    Command {
        names: &["migrate_set_parameter"],
        parameters: "parameter value",
        help: "set a migration parameter: max-bandwidth and avail-switchover-bandwidth in MiB/s \
               or with a unit (10G), downtime-limit in milliseconds, announce-rounds, and \
               announce-initial, -max and -step in milliseconds",
        completion: Completion::Parameters,
        run: |session, mut words| {
            let name = words.required()?;
            let value = words.required()?;
            words.finish()?;
            let mut set = ParameterChange::default();
            match name.as_str() {
                "max-bandwidth" => set.max_bandwidth = Some(bandwidth(&value)?),
                "avail-switchover-bandwidth" => {
                    set.avail_switchover_bandwidth = Some(bandwidth(&value)?);
                }
                "downtime-limit" => set.downtime_limit = Some(milliseconds(&value)?),
                _ => match set.announce.value_mut(&name) {
                    Some(to) => *to = Some(whole(&value)?),
                    None => {
                        let desc = format!("invalid parameter value: {name}");
                        return Err(CommandError::generic(desc).into());
                    }
                },
            }
            change(session, set)
        },
    },
    Command {
        names: &["migrate_set_speed"],
        parameters: "value",
        help: "limit what a migration may send, in MiB/s or with a unit (10G); 0 is no limit",
        completion: Completion::None,
        run: |session, mut words| {
            let value = words.required()?;
            words.finish()?;
            let max_bandwidth = Some(bandwidth(&value)?);
            change(
                session,
                ParameterChange {
                    max_bandwidth,
                    ..Default::default()
                },
            )
        },
    },
    Command {
        names: &["quit", "q"],
        parameters: "",
        help: "end ferry, and the guest with it",
        completion: Completion::None,
        run: |session, words| {
            words.finish()?;
            session.machine().quit(ShutdownCause::HostQmpQuit);
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["savevm"],
        parameters: "[tag]",
        help: "save the guest with its disks as a snapshot, in place of one of that name; without \
               a name one is made of the time",
        completion: Completion::None,
        run: |session, mut words| {
            let tag = words.optional();
            words.finish()?;
            Ok(Reply::Working(session.machine().save_snapshot(tag)?))
        },
    },
    Command {
        names: &["set_link"],
        parameters: "name on|off",
        help: "plug the cable of a network card in or out (info network lists the cards)",
        completion: Completion::None,
        run: |session, mut words| {
            let name = words.required()?;
            let up = on_or_off(&words.required()?)?;
            words.finish()?;
            session.machine().set_link(&name, up)?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["stop", "s"],
        parameters: "",
        help: "stop the guest; cont runs it on",
        completion: Completion::None,
        run: |session, words| {
            words.finish()?;
            session.machine().stop()?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["system_powerdown"],
        parameters: "",
        help: "press the power button: the guest decides what follows",
        completion: Completion::None,
        run: |session, words| {
            words.finish()?;
            session.machine().system_powerdown()?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["system_reset"],
        parameters: "",
        help: "reset the machine",
        completion: Completion::None,
        run: |session, words| {
            words.finish()?;
            session.machine().system_reset()?;
            Ok(Reply::nothing())
        },
    },
];

/// The migration parameters that `migrate_set_parameter` knows.
pub const PARAMETERS: [&str; 7] = [
    "announce-initial",
    "announce-max",
    "announce-rounds",
    "announce-step",
    "avail-switchover-bandwidth",
    "downtime-limit",
    "max-bandwidth",
];

/// The command of that name.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS
        .iter()
        .find(|command| command.names.contains(&name))
}

fn help(_: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let describe = |command: &Command| {
        let names = command.names.join("|");
        let space = if command.parameters.is_empty() {
            ""
        } else {
            " "
        };
        format!("{names}{space}{} -- {}\n", command.parameters, command.help)
    };
    let Some(name) = words.optional() else {
        return Ok(Reply::Text(COMMANDS.iter().map(describe).collect()));
    };
    words.finish()?;
    match find(&name) {
        Some(command) if command.completion == Completion::Topics => Ok(Reply::Text(info::help())),
        Some(command) => Ok(Reply::Text(describe(command))),
        None => Err(Failure::Unknown(name)),
    }
}

fn change(session: &Session, change: ParameterChange) -> Result<Reply, Failure> {
    session.machine().change_parameters(change)?;
    Ok(Reply::nothing())
}

/// Bytes a second; a bare number is MiB a second.
fn bandwidth(text: &str) -> Result<u64, Failure> {
    parse_size(text, 1 << 20).map_err(|error| CommandError::generic(error.to_string()).into())
}

fn on_or_off(text: &str) -> Result<bool, Failure> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(Failure::usage("expected 'on' or 'off'")),
    }
}

fn whole(text: &str) -> Result<u64, Failure> {
    text.parse().map_err(|_| {
        let desc = format!("'{text}' is not a whole number");
        CommandError::generic(desc).into()
    })
}

fn milliseconds(text: &str) -> Result<u64, Failure> {
    text.parse().map_err(|_| {
        let desc = format!("'{text}' is not a whole number of milliseconds");
        CommandError::generic(desc).into()
    })
}

/// Reads seconds, or a time with its unit, as milliseconds.
fn parse_seconds(text: &str) -> Result<u64, Failure> {
    let (number, factor) = [("ms", 1.0), ("us", 1e-3), ("ns", 1e-6), ("s", 1e3)]
        .into_iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))
        .unwrap_or((text, 1e3));
    match number.parse::<f64>() {
        // The limit itself is checked where all parameters are; this is what the type holds.
        Ok(value) if value >= 0.0 && value * factor < 1e15 => Ok((value * factor).round() as u64),
        _ => Err(CommandError::generic(format!("'{text}' is not a time in seconds")).into()),
    }
}
