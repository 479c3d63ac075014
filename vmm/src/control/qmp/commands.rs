//! The commands: a table of names, and for each what it takes and returns.

use std::pin::Pin;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::arguments::Arguments;
use crate::control::command::{
    AnnounceChange, AnnounceRequest, CommandError, CommandResult, Control, ErrorClass,
    MigrateRequest, MigrationCapabilityStatus, ParameterChange, ShutdownCause, StorageCopy, Uri,
};
use crate::control::monitor::{self, Detached};

type Handler = fn(&Arc<dyn Control>, Arguments) -> CommandResult<Value>;

/// The command that carries out a line of the monitor's. It may begin something that its client
/// waits for.
const HUMAN_MONITOR_COMMAND: &str = "human-monitor-command";

/// What a command led to.
pub enum Execution {
    /// It is done.
    Done(CommandResult<Value>),
    /// It is soon: this is the answer.
    Working(Pin<Box<dyn Future<Output = CommandResult<Value>> + Send>>),
}

/// Every command but `qmp_capabilities`, which only opens a session, and
/// [`HUMAN_MONITOR_COMMAND`].
const COMMANDS: &[(&str, Handler)] = &[
    ("balloon", balloon),
    ("announce-self", announce_self),
    ("cont", |machine, arguments| {
        nothing(arguments, || machine.cont())
    }),
    ("migrate", migrate),
    ("migrate_cancel", |machine, arguments| {
        nothing(arguments, || machine.migrate_cancel())
    }),
    ("migrate-incoming", migrate_incoming),
    ("migrate-set-capabilities", migrate_set_capabilities),
    ("migrate-set-parameters", migrate_set_parameters),
    ("query-balloon", |machine, arguments| {
        arguments.finish()?;
        let info = machine.balloon()?;
        serde_json::to_value(info).map_err(|error| CommandError::generic(error.to_string()))
    }),
    ("query-block", |machine, arguments| {
        query(arguments, || machine.disks())
    }),
    ("query-commands", query_commands),
    ("query-cpus-fast", query_cpus_fast),
    ("query-migrate", |machine, arguments| {
        query(arguments, || machine.migration_info())
    }),
    ("query-migrate-capabilities", |machine, arguments| {
        query(arguments, || machine.capabilities())
    }),
    ("query-migrate-parameters", |machine, arguments| {
        query(arguments, || machine.parameters())
    }),
    ("query-name", query_name),
    ("query-status", |machine, arguments| {
        query(arguments, || machine.status())
    }),
    ("query-version", |_, arguments| {
        query(arguments, super::version)
    }),
    ("quit", |machine, arguments| {
        nothing(arguments, || {
            machine.quit(ShutdownCause::HostQmpQuit);
            Ok(())
        })
    }),
    ("set_link", set_link),
    ("stop", |machine, arguments| {
        nothing(arguments, || machine.stop())
    }),
    ("system_powerdown", |machine, arguments| {
        nothing(arguments, || machine.system_powerdown())
    }),
    ("system_reset", |machine, arguments| {
        nothing(arguments, || machine.system_reset())
    }),
];

/// Carries a command out.
pub fn execute(machine: &Arc<dyn Control>, name: &str, arguments: Arguments) -> Execution {
    if name == HUMAN_MONITOR_COMMAND {
        return human_monitor_command(machine, arguments)
            .unwrap_or_else(|error| Execution::Done(Err(error)));
    }
    Execution::Done(match COMMANDS.iter().find(|(known, _)| *known == name) {
        Some((_, handler)) => handler(machine, arguments),
        None => Err(CommandError::new(
            ErrorClass::CommandNotFound,
            format!("The command {name} has not been found"),
        )),
    })
}

/// A command that takes nothing and returns nothing.
fn nothing(
    arguments: Arguments,
    action: impl FnOnce() -> CommandResult<()>,
) -> CommandResult<Value> {
    arguments.finish()?;
    action()?;
    Ok(json!({}))
}

/// A command that takes nothing and returns something.
fn query<T: Serialize>(arguments: Arguments, get: impl FnOnce() -> T) -> CommandResult<Value> {
    arguments.finish()?;
    serde_json::to_value(get()).map_err(|error| CommandError::generic(error.to_string()))
}

fn balloon(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let value = arguments.unsigned("value")?;
    let value = arguments.required("value", value)?;
    nothing(arguments, || machine.set_balloon(value))
}

fn query_commands(_: &Arc<dyn Control>, arguments: Arguments) -> CommandResult<Value> {
    let names = COMMANDS
        .iter()
        .map(|(name, _)| *name)
        .chain([HUMAN_MONITOR_COMMAND, "qmp_capabilities"]);
    query(arguments, || {
        names
            .map(|name| json!({ "name": name }))
            .collect::<Vec<_>>()
    })
}

fn query_name(machine: &Arc<dyn Control>, arguments: Arguments) -> CommandResult<Value> {
    query(arguments, || match machine.name() {
        Some(name) => json!({ "name": name }),
        None => json!({}),
    })
}

fn query_cpus_fast(machine: &Arc<dyn Control>, arguments: Arguments) -> CommandResult<Value> {
    let cpus = || {
        let cpu = |cpu: crate::control::command::CpuInfo| {
            json!({
                "cpu-index": cpu.index,
                "qom-path": format!("/machine/cpu[{}]", cpu.index),
                "thread-id": cpu.thread_id,
                "props": { "socket-id": 0, "core-id": cpu.index, "thread-id": 0 },
                "target": "x86_64",
            })
        };
        machine.cpus().into_iter().map(cpu).collect::<Vec<_>>()
    };
    query(arguments, cpus)
}

fn human_monitor_command(
    machine: &Arc<dyn Control>,
    mut arguments: Arguments,
) -> CommandResult<Execution> {
    let line = arguments.string("command-line")?;
    let cpu = arguments.unsigned("cpu-index")?;
    let line = arguments.required("command-line", line)?;
    arguments.finish()?;
    let mut session = monitor::Session::new(Arc::clone(machine));
    if let Some(cpu) = cpu {
        session.select_cpu(cpu).map_err(|_| {
            CommandError::generic("Parameter 'cpu-index' expects a CPU number".to_owned())
        })?;
    }
    Ok(match session.execute_detached(&line) {
        Detached::Done(text) => Execution::Done(Ok(Value::String(text))),
        Detached::Working => Execution::Working(Box::pin(async move {
            Ok(Value::String(session.finished().await))
        })),
    })
}

fn migrate(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let uri = arguments.string("uri")?;
    let channels = arguments.objects("channels")?;
    // How QEMU's older clients ask for disks to be copied as well.
    let full = arguments.boolean("blk")? == Some(true);
    let incremental = arguments.boolean("inc")? == Some(true);
    let copy = StorageCopy::of(full, incremental);
    // Ignored, as in QEMU: over QMP a migration always goes on in the background.
    arguments.boolean("detach")?;
    if arguments.boolean("resume")? == Some(true) {
        return Err(CommandError::generic(
            "Cannot resume if there is no paused migration",
        ));
    }
    let address = address(&arguments, uri, channels)?;
    nothing(arguments, || {
        machine.migrate(MigrateRequest { address, copy })
    })
}

fn migrate_incoming(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let uri = arguments.string("uri")?;
    let channels = arguments.objects("channels")?;
    let exit_on_error = arguments.boolean("exit-on-error")?.unwrap_or(true);
    let address = address(&arguments, uri, channels)?;
    nothing(arguments, || {
        machine.migrate_incoming(address, exit_on_error)
    })
}

/// The address of a migration, from one of the two ways to give it.
fn address(
    arguments: &Arguments,
    uri: Option<String>,
    channels: Option<Vec<Arguments>>,
) -> CommandResult<Uri> {
    match (uri, channels) {
        (Some(_), Some(_)) => Err(CommandError::generic(
            "'uri' and 'channels' are mutually exclusive: exactly one of the two must be present",
        )),
        (uri, None) => Ok(arguments.required("uri", uri)?.parse::<Uri>()?),
        (None, Some(channels)) => match <[Arguments; 1]>::try_from(channels) {
            Ok([channel]) => main_channel(channel),
            Err(channels) => Err(CommandError::generic(format!(
                "Parameter 'channels' expects one channel, of type main, got {}",
                channels.len()
            ))),
        },
    }
}

/// QAPI's `MigrationChannel` (since QEMU 8.2), brought into the form of a URI.
fn main_channel(mut channel: Arguments) -> CommandResult<Uri> {
    let kind = channel.string("channel-type")?;
    let kind = channel.required("channel-type", kind)?;
    if kind != "main" {
        return Err(channel.not_accepted("channel-type", &kind));
    }
    let addr = channel.object("addr")?;
    let mut addr = channel.required("addr", addr)?;
    channel.finish()?;

    let transport = addr.string("transport")?;
    let transport = addr.required("transport", transport)?;
    if transport == "file" {
        let filename = addr.string("filename")?;
        let filename = addr.required("filename", filename)?;
        let offset = addr.unsigned("offset")?;
        if offset.is_some_and(|offset| offset != 0) {
            return Err(CommandError::generic(
                "an 'offset' other than 0 is not supported: a snapshot is a file of its own",
            ));
        }
        addr.finish()?;
        return Ok(format!("file:{filename}").parse::<Uri>()?);
    }
    if transport != "socket" {
        return Err(addr.not_accepted("transport", &transport));
    }
    let kind = addr.string("type")?;
    let kind = addr.required("type", kind)?;
    let mut string = |name| {
        let value = addr.string(name)?;
        addr.required(name, value)
    };
    let uri = match kind.as_str() {
        "inet" => {
            let (host, port) = (string("host")?, string("port")?);
            if host.contains(':') {
                format!("tcp:[{host}]:{port}")
            } else {
                format!("tcp:{host}:{port}")
            }
        }
        "unix" => format!("unix:{}", string("path")?),
        _ => return Err(addr.not_accepted("type", &kind)),
    };
    addr.finish()?;
    Ok(uri.parse::<Uri>()?)
}

fn migrate_set_parameters(
    machine: &Arc<dyn Control>,
    mut arguments: Arguments,
) -> CommandResult<Value> {
    let change = ParameterChange {
        max_bandwidth: arguments.unsigned("max-bandwidth")?,
        avail_switchover_bandwidth: arguments.unsigned("avail-switchover-bandwidth")?,
        downtime_limit: arguments.unsigned("downtime-limit")?,
        announce: AnnounceChange {
            initial: arguments.unsigned("announce-initial")?,
            max: arguments.unsigned("announce-max")?,
            rounds: arguments.unsigned("announce-rounds")?,
            step: arguments.unsigned("announce-step")?,
        },
    };
    nothing(arguments, || machine.change_parameters(change))
}

fn set_link(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let name = arguments.string("name")?;
    let name = arguments.required("name", name)?;
    let up = arguments.boolean("up")?;
    let up = arguments.required("up", up)?;
    nothing(arguments, || machine.set_link(&name, up))
}

/// Unlike in QEMU the parameters can be left out, and there is one announcement at a time.
fn announce_self(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let request = AnnounceRequest {
        how: AnnounceChange {
            initial: arguments.unsigned("initial")?,
            max: arguments.unsigned("max")?,
            rounds: arguments.unsigned("rounds")?,
            step: arguments.unsigned("step")?,
        },
        interfaces: arguments.strings("interfaces")?,
    };
    nothing(arguments, || machine.announce_self(request))
}

fn migrate_set_capabilities(
    machine: &Arc<dyn Control>,
    mut arguments: Arguments,
) -> CommandResult<Value> {
    let entries = arguments.objects("capabilities")?;
    let entries = arguments.required("capabilities", entries)?;
    let mut changes = Vec::with_capacity(entries.len());
    for mut entry in entries {
        let capability = entry.string("capability")?;
        let capability = entry.required("capability", capability)?;
        let state = entry.boolean("state")?;
        let state = entry.required("state", state)?;
        entry.finish()?;
        changes.push(MigrationCapabilityStatus { capability, state });
    }
    nothing(arguments, || machine.change_capabilities(&changes))
}
