//! The commands: a table of names, and for each what it takes and returns.

use std::pin::Pin;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::arguments::Arguments;
use super::migrate;
use crate::control::command::{
    AnnounceChange, AnnounceRequest, CommandError, CommandResult, Control, ErrorClass,
    ShutdownCause,
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
    ("calc-dirty-rate", migrate::calc_dirty_rate),
    ("cancel-vcpu-dirty-limit", migrate::cancel_vcpu_dirty_limit),
    ("cont", |machine, arguments| {
        nothing(arguments, || machine.cont())
    }),
    ("migrate", migrate::migrate),
    ("migrate_cancel", |machine, arguments| {
        nothing(arguments, || machine.migrate_cancel())
    }),
    ("migrate-incoming", migrate::incoming),
    ("migrate-pause", |machine, arguments| {
        nothing(arguments, || machine.migrate_pause())
    }),
    ("migrate-recover", migrate::recover),
    ("migrate-set-capabilities", migrate::set_capabilities),
    ("migrate-set-parameters", migrate::set_parameters),
    ("migrate-start-postcopy", |machine, arguments| {
        nothing(arguments, || machine.migrate_start_postcopy())
    }),
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
    ("query-dirty-rate", |machine, arguments| {
        query(arguments, || machine.dirty_rate())
    }),
    ("query-migrate", |machine, arguments| {
        query(arguments, || machine.migration_info())
    }),
    ("query-migrate-capabilities", |machine, arguments| {
        query(arguments, || machine.capabilities().list())
    }),
    ("query-migrate-parameters", |machine, arguments| {
        query(arguments, || machine.parameters())
    }),
    ("query-name", query_name),
    ("query-status", |machine, arguments| {
        query(arguments, || machine.status())
    }),
    ("query-vcpu-dirty-limit", |machine, arguments| {
        query(arguments, || machine.vcpu_dirty_limits())
    }),
    ("query-version", |_, arguments| {
        query(arguments, super::version)
    }),
    ("quit", quit),
    ("set-vcpu-dirty-limit", migrate::set_vcpu_dirty_limit),
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
    ("x-query-migration-forecast", migrate::forecast),
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

/// A command that takes nothing more and returns nothing.
pub(super) fn nothing(
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

/// `force` is ours: it ends ferry though a guest that has moved ahead of its memory is lost.
fn quit(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let force = arguments.boolean("force")?.unwrap_or(false);
    nothing(arguments, || {
        machine.quit(ShutdownCause::HostQmpQuit, force)
    })
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
