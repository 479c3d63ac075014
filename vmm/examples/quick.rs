#![allow(missing_docs)]
use std::sync::Arc;
use vmm::console::{Console, SerialBackend};
use vmm::instance::*;
use vmm::machine::{BootFiles, config::Given};
fn main() {
    tracing_subscriber::fmt().with_env_filter("debug").with_writer(std::io::stderr).init();
    let mut args = std::env::args().skip(1);
    let (mut kernel, mut qmp, mut serial, mut incoming, mut given) = (None, None, SerialBackend::None, None, Given::default());
    while let Some(a) = args.next() {
        let mut v = || args.next().unwrap();
        match a.as_str() {
            "run" => {}
            "--kernel" => kernel = Some(v()),
            "--append" => given.command_line = Some(v()),
            "--memory" => given.memory = Some(v().trim_end_matches('M').parse::<u64>().unwrap() << 20),
            "--smp" => given.vcpus = Some(v().parse().unwrap()),
            "--qmp" => qmp = Some(v()),
            "--serial" => { let s = v(); serial = match s.strip_prefix("unix:") { Some(p) => SerialBackend::Unix(p.into()), None => SerialBackend::Stdio } }
            "--incoming" => incoming = Some(v()),
            _ => { v(); }
        }
    }
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    rt.block_on(async {
        let console = Arc::new(Console::open(&serial, false).unwrap());
        let kvm = vmm::kvm::Kvm::open().unwrap();
        let instance = Instance::new(Settings { given, ..Settings::default() }, kvm, console);
        let _qmp = qmp.map(|q| vmm::control::qmp::server::listen(q.trim_start_matches("unix:").as_ref(), Arc::new(instance.clone())).unwrap());
        match incoming { Some(uri) => instance.wait_for_guest(Some(&uri.parse().unwrap()), true).unwrap(),
            None => instance.boot(BootFiles { kernel: std::fs::File::open(kernel.unwrap()).unwrap(), initrd: None }).unwrap() }
        tokio::select! { e = instance.ended() => eprintln!("{e:?}"), _ = instance.serve_guest_events() => {} }
        instance.shut_down();
    });
}
