//! The command line as people type it.

use super::*;

fn cli(line: &str) -> Result<Cli, String> {
    let args = std::iter::once("ferry")
        .chain(line.split_whitespace())
        .map(OsString::from);
    parse(args).map_err(|error| error.to_string())
}

fn run(line: &str) -> RunOptions {
    match cli(&format!("run {line}")).unwrap().command {
        Command::Run(options) => *options,
        other => panic!("{other:?}"),
    }
}

fn refused(line: &str) -> String {
    cli(line).unwrap_err()
}

#[test]
fn clap_finds_no_fault_with_the_definition() {
    Cli::command().debug_assert();
}

#[test]
fn both_spellings_mean_the_same() {
    let ours = run(
        "--name n --kernel k --initrd i --append a=b --memory 2G --smp 2 \
                    --cpu host,-avx512f --serial file:/s --monitor unix:/m --qmp unix:/q \
                    --qmp unix:/r --incoming tcp:0:4444 --paused --no-reboot --no-shutdown",
    );
    let qemus = run(
        "-name guest=n,debug-threads=on -kernel k -initrd i -append a=b -m size=2G \
                     -smp cpus=2 -cpu host,avx512f=off -serial file:/s \
                     -monitor unix:/m,server,nowait -qmp unix:/q,server=on,wait=off -qmp unix:/r \
                     -incoming tcp:0:4444 -S -no-reboot -no-shutdown -nographic -nodefaults \
                     -enable-kvm -display none -accel kvm",
    );
    assert_eq!(ours, qemus);
    assert_eq!(ours.name.as_deref(), Some("n"));
    assert_eq!(ours.memory.unwrap().size, Some(2 << 30));
    assert_eq!(ours.smp, Some(2));
    assert_eq!(ours.cpu.unwrap().to_string(), "host,-avx512f");
    assert_eq!(ours.serial, Some(SerialBackend::File("/s".into())));
    assert_eq!(ours.qmp.len(), 2);
    assert!(ours.paused && ours.no_reboot && ours.no_shutdown);
}

#[test]
fn a_snapshot_is_enough_to_begin_with() {
    let options = run("-loadvm a");
    assert_eq!(options.loadvm.as_deref(), Some("a"));
    assert_eq!(options, run("--loadvm a"));
}

#[test]
fn what_is_not_given_can_be_told() {
    let options = run("--incoming defer");
    assert_eq!(
        options,
        RunOptions {
            incoming: Some(Incoming::Defer),
            ..RunOptions::default()
        }
    );
}

#[test]
fn a_value_may_look_like_an_option() {
    let args = ["ferry", "run", "-kernel", "-k", "-append", "-m -S --smp"].map(OsString::from);
    let Command::Run(options) = parse(args).unwrap().command else {
        panic!()
    };
    assert_eq!(options.kernel, Some("-k".into()));
    assert_eq!(options.append.as_deref(), Some("-m -S --smp"));
    assert_eq!(run("--kernel k --append=-x").append.as_deref(), Some("-x"));
}

#[test]
fn qemus_forms_of_memory_serial_and_monitor_are_read() {
    let size = |line: &str| run(line).memory.unwrap().size;
    assert_eq!(size("-kernel k -m 512"), Some(512 << 20));
    assert_eq!(size("-kernel k -m 1.5G"), Some(3 << 29));
    let shared = run("-kernel k -serial mon:stdio");
    assert_eq!(shared.serial, Some(SerialBackend::Stdio));
    assert_eq!(shared.monitor, [MonitorSpec::Stdio]);
    assert_eq!(
        run("-kernel k -serial null").serial,
        Some(SerialBackend::None)
    );
    let comma = run("-kernel k -monitor unix:/a,,b,server=on");
    assert_eq!(comma.monitor, [MonitorSpec::Unix("/a,b".into())]);
}

#[test]
fn a_balloon_has_what_is_not_switched_off() {
    let balloon = |line: &str| {
        let options = run(&format!("--kernel k {line}")).balloon.unwrap();
        (
            options.free_page_reporting,
            options.free_page_hint,
            options.deflate_on_oom,
        )
    };
    assert_eq!(balloon("--balloon"), (true, true, true));
    assert_eq!(balloon("--balloon --paused"), (true, true, true));
    assert_eq!(
        balloon("--balloon free-page-hint=off,deflate-on-oom=on"),
        (true, false, true)
    );
    assert_eq!(
        balloon("--balloon=free-page-reporting=off,deflate-on-oom=off"),
        (false, true, false)
    );
    assert_eq!(run("--kernel k").balloon, None);
}

#[test]
fn what_is_wrong_is_named() {
    for (line, part) in [
        ("run", "there is nothing to run"),
        ("run --kernel k --memory 8M", "at least 16 MiB"),
        ("run --kernel k -m 1G,slots=2", "'slots=2' is not supported"),
        ("run --kernel k -m lots", "'lots' is not a size"),
        ("run --kernel k --smp 0", "from 1 to 254"),
        (
            "run --kernel k -smp 2,sockets=2",
            "'sockets=2' is not supported",
        ),
        (
            "run --kernel k --cpu haswell",
            "unknown CPU model 'haswell'",
        ),
        (
            "run --kernel k --serial tcp::1",
            "expected stdio, file:PATH",
        ),
        ("run --kernel k --serial file:", "the path is missing"),
        ("run --kernel k --qmp tcp:h:1", "expected unix:PATH or none"),
        ("run --kernel k --qmp unix:/q,server=off", "ferry listens"),
        (
            "run --kernel k --qmp unix:/q,wait=on",
            "does not wait for a client",
        ),
        (
            "run --kernel k --qmp unix:/a --monitor unix:/a",
            "more than one socket",
        ),
        (
            "run --kernel k --balloon free-page-reporting=maybe",
            "'free-page-reporting' is on or off, not 'maybe'",
        ),
        (
            "run --kernel k --balloon size=1G",
            "'size' is not known: expected free-page-reporting",
        ),
        (
            "run --kernel k --console tcp::1",
            "expected stdio, file:PATH",
        ),
        (
            "run --kernel k --console stdio --serial stdio",
            "can't both be on stdio",
        ),
        (
            "run --kernel k --console unix:/a --qmp unix:/a",
            "more than one socket",
        ),
        (
            "run --kernel k --monitor stdio --monitor stdio",
            "more than once",
        ),
        ("run --kernel k --net user", "expected tap,ifname=NAME"),
        ("run --kernel k --net tap", "the tap's name is missing"),
        ("run --kernel k --net tap,ifname=", "'ifname' needs a value"),
        (
            "run --kernel k --net tap,ifname=t,mac=1",
            "'1' is no MAC address",
        ),
        (
            "run --kernel k --net tap,ifname=t,queues=2",
            "'queues=2' is not known",
        ),
        (
            "run --kernel k --net tap,ifname=t,id=net1 --net tap,ifname=u",
            "have the id net1",
        ),
        ("run --incoming tcp:h", "has no valid port"),
        ("run --incoming defer --loadvm a", "cannot be used with"),
        ("run --incoming deferred", "or defer"),
        ("run -kernel", "a value is required behind -kernel"),
        ("run --kernel k -display gtk", "ferry only has none"),
        ("run --kernel k -hda disk", "unknown option -hda"),
        ("runn", "unrecognized subcommand"),
        ("demo --downtime-limit soon", "expected milliseconds"),
    ] {
        let error = refused(line);
        assert!(error.contains(part), "{line}: {error}");
    }
}

#[test]
fn network_cards_are_read_in_their_order() {
    let nets = run(
        "--kernel k --net tap,ifname=vm,mac=52:54:00:00:00:01,id=lan \
         --net tap,ifname=tap%d,script=no,downscript=no",
    )
    .net;
    let [lan, other] = &nets[..] else {
        panic!("{nets:?}")
    };
    assert_eq!((&*lan.ifname, lan.id_at(0)), ("vm", "lan".to_owned()));
    assert_eq!(lan.mac.unwrap().to_string(), "52:54:00:00:00:01");
    assert_eq!(
        (&*other.ifname, other.id_at(1)),
        ("tap%d", "net1".to_owned())
    );
    assert_eq!(other.mac, None);
}

#[test]
fn a_monitor_command_is_left_as_it_is() {
    let Command::Monitor(options) = cli("monitor /s migrate -d tcp:h:1 -m").unwrap().command else {
        panic!();
    };
    assert_eq!(options.socket, PathBuf::from("/s"));
    assert_eq!(options.command, ["migrate", "-d", "tcp:h:1", "-m"]);
}

#[test]
fn the_log_filter_is_read_anywhere() {
    assert_eq!(
        cli("--log debug run --kernel k").unwrap().log_filter(),
        "debug"
    );
    assert_eq!(cli("run -kernel k -log info").unwrap().log_filter(), "info");
    assert_eq!(cli("--log run run -kernel k").unwrap().log_filter(), "run");
}

#[test]
fn the_demo_needs_no_arguments() {
    let Command::Demo(options) = cli("demo").unwrap().command else {
        panic!()
    };
    assert_eq!(options.memory, 1 << 30);
    assert_eq!(options.downtime_limit, Duration::from_millis(30));
    assert_eq!(options.dirty_rate, 20_000);
}

#[test]
fn help_and_version_are_there() {
    assert!(refused("--version").starts_with("ferry "));
    let help = refused("run --help");
    for heading in ["Guest:", "Connections:", "Behaviour:"] {
        assert!(help.contains(heading), "{help}");
    }
}

#[test]
fn the_benchmark_takes_its_own_options() {
    let cli = cli("--log debug bench suite --runs 2 --scenario idle --html r.html").unwrap();
    assert!(matches!(cli.command, Command::Bench(_)));
    assert_eq!(cli.log.as_deref(), Some("debug"));
    assert!(refused("bench suite --scenario fast").contains("idle, busy"));
}
