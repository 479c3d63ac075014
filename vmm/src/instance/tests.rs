//! The commands on migrations, as a process without a guest answers them.

use migration::uri::Uri;

use super::*;
use crate::console::SerialBackend;
use crate::control::command::{
    Control, MigrateRequest, MigrationCapability, MigrationCapabilityStatus, StorageCopy,
};
use crate::kvm::tests::kvm_or_skip;

fn instance() -> Option<Instance> {
    let console = Console::open(&SerialBackend::None, false).unwrap();
    let kvm = kvm_or_skip()?;
    Some(Instance::new(
        Settings::default(),
        kvm,
        Arc::new(console),
        None,
    ))
}

fn postcopy(state: bool) -> [MigrationCapabilityStatus; 1] {
    [MigrationCapabilityStatus {
        capability: MigrationCapability::PostcopyRam,
        state,
    }]
}

fn uri(text: &str) -> Uri {
    text.parse().unwrap()
}

#[test]
fn postcopy_is_steered_only_while_there_is_one() {
    let Some(instance) = instance() else { return };
    let start = || instance.migrate_start_postcopy().unwrap_err().desc;
    assert_eq!(
        start(),
        "Enable postcopy with migrate_set_capability before the start of migration"
    );
    instance.set_capabilities(&postcopy(true)).unwrap();
    assert_eq!(
        start(),
        "Postcopy must be started after migration has been started"
    );
    assert!(
        instance
            .migrate_pause()
            .unwrap_err()
            .desc
            .contains("only supported during postcopy-active")
    );
    let resume = instance.migrate(MigrateRequest {
        address: uri("tcp:127.0.0.1:1"),
        resume: true,
        copy: StorageCopy::None,
    });
    assert_eq!(
        resume.unwrap_err().desc,
        "Cannot resume if there is no paused migration"
    );
    assert_eq!(
        instance
            .migrate_recover(uri("tcp:127.0.0.1:0"))
            .unwrap_err()
            .desc,
        "Migrate recover can only be run when postcopy is paused"
    );
    // Nothing would be lost.
    instance.quit(ShutdownCause::HostQmpQuit, false).unwrap();
}

#[test]
fn a_process_that_listens_can_still_be_told_of_postcopy_but_not_for_a_file() {
    let Some(instance) = instance() else { return };
    instance.wait_for_guest(None, false).unwrap();
    instance.set_capabilities(&postcopy(true)).unwrap();
    let file = instance.migrate_incoming(uri("file:/nonexistent"), false);
    let error = file.unwrap_err().desc;
    assert!(error.contains("postcopy-ram"), "{error}");
    instance
        .migrate_incoming(uri("tcp:127.0.0.1:0"), false)
        .unwrap();
    instance.set_capabilities(&postcopy(false)).unwrap();
    instance.shut_down();
}
