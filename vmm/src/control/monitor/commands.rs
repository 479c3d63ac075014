//! The monitor's commands: a table of names, help and what they do.

use super::info;
use super::line::Words;
use super::migrate;
use super::session::Session;
use crate::control::command::{AnnounceRequest, CommandError, ShutdownCause, Work};
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
        names: &["calc_dirty_rate"],
        parameters: "[-b] seconds [samples]",
        help: "measure how much the guest writes: by as many pages of a GiB, or by the dirty log (-b)",
        completion: Completion::None,
        run: migrate::calc_dirty_rate,
    },
    Command {
        names: &["cancel_vcpu_dirty_limit"],
        parameters: "[index]",
        help: "let a vCPU, or all of them, write what they like again",
        completion: Completion::None,
        run: migrate::cancel_vcpu_dirty_limit,
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
        parameters: "[-d] [-r] [-b] [-i] uri",
        help: "migrate the guest to tcp:HOST:PORT or unix:PATH, or save it to file:PATH (-d: do not \
               wait for the end; -r: go on with a migration that is paused in post-copy; -b: copy \
               the disks; -i: copy what they hold above their backing files); Ctrl-C while \
               waiting cancels",
        completion: Completion::Address,
        run: migrate::start,
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
        run: migrate::incoming,
    },
    Command {
        names: &["migrate_pause"],
        parameters: "",
        help: "break the connection of a migration in post-copy, at either side",
        completion: Completion::None,
        run: |session, words| {
            words.finish()?;
            session.machine().migrate_pause()?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["migrate_recover"],
        parameters: "uri",
        help: "at the destination of a migration that is paused in post-copy: wait for its \
               source, which follows with migrate -r",
        completion: Completion::Address,
        run: migrate::recover,
    },
    Command {
        names: &["migrate_set_capability"],
        parameters: "capability on|off",
        help: "switch a migration capability on or off",
        completion: Completion::Capabilities,
        run: migrate::set_capability,
    },
    Command {
        names: &["migrate_set_downtime"],
        parameters: "seconds",
        help: "set how long a migration may stop the guest, in seconds (0.03) or with a unit \
               (30ms)",
        completion: Completion::None,
        run: migrate::set_downtime,
    },
    Command {
        names: &["migrate_set_parameter"],
        parameters: "parameter value",
        help: "set a migration parameter: max-bandwidth, max-postcopy-bandwidth and \
               avail-switchover-bandwidth in MiB/s or with a unit (10G), downtime-limit, \
               multifd-channels (1 to 255), multifd-compression (none, lz4, zstd), multifd-zstd-level (1 to 20), \
               xbzrle-cache-size in bytes or with a unit (64M), x-postcopy-after-time and announce-initial, -max and -step in milliseconds, \
               announce-rounds, x-postcopy-after-rounds, and x-postcopy-no-convergence on or off",
        completion: Completion::Parameters,
        run: migrate::set_parameter,
    },
    Command {
        names: &["migrate_set_speed"],
        parameters: "value",
        help: "limit what a migration may send, in MiB/s or with a unit (10G); 0 is no limit",
        completion: Completion::None,
        run: migrate::set_speed,
    },
    Command {
        names: &["migrate_start_postcopy"],
        parameters: "",
        help: "hand the guest over as soon as possible; its memory follows (see the \
               capability postcopy-ram)",
        completion: Completion::None,
        run: |session, words| {
            words.finish()?;
            session.machine().migrate_start_postcopy()?;
            Ok(Reply::nothing())
        },
    },
    Command {
        names: &["quit", "q"],
        parameters: "[-f]",
        help: "end ferry, and the guest with it (-f: even a guest that has moved ahead of its \
               memory)",
        completion: Completion::None,
        run: |session, mut words| {
            let force = words.options("f")?.contains('f');
            words.finish()?;
            session.machine().quit(ShutdownCause::HostQmpQuit, force)?;
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
        names: &["set_vcpu_dirty_limit"],
        parameters: "rate [index]",
        help: "limit what a vCPU, or each of them, may write to, in MB a second; 0 is no limit \
               (info vcpu_dirty_limit shows the limits)",
        completion: Completion::None,
        run: migrate::set_vcpu_dirty_limit,
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

pub(super) fn on_or_off(text: &str) -> Result<bool, Failure> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(Failure::usage("expected 'on' or 'off'")),
    }
}
