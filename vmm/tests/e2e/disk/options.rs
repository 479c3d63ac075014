//! A destination whose disks are not the guest's.

use devices::image::{Cache, Format, Image};

use super::{CAPACITY, busy, drive, finish, incoming, new_image, run, wait_progress};
use crate::harness::{require_kvm, scratch};

#[test]
fn what_differs_is_named_and_the_source_runs_on() {
    require_kvm!();
    let dir = scratch();
    let path = new_image(dir.path(), "disk", Format::Raw);
    let larger = dir.path().join("larger");
    Image::create(&larger, Format::Raw, 2 * CAPACITY, None, Cache::Writeback).unwrap();
    let qcow2 = new_image(dir.path(), "qcow2", Format::Qcow2);
    let mut source = run(
        dir.path(),
        "src",
        busy(),
        &[drive(&path, ",format=raw,id=root,serial=S1")],
    );
    let good = drive(&path, ",format=raw,id=root");
    let places: [(Vec<String>, &[&str]); 7] = [
        (vec![], &["\"root\"", "none of that name"]),
        (
            vec![drive(&path, ",format=raw")],
            &["\"root\"", "\"disk0\"", "no such disk"],
        ),
        (
            vec![drive(&larger, ",format=raw,id=root")],
            &["root", "33554432", "67108864"],
        ),
        (
            vec![drive(&path, ",format=raw,id=root,readonly=on")],
            &["\"root\"", "read-only at the destination"],
        ),
        (
            vec![drive(&path, ",format=raw,id=root,serial=S2")],
            &["\"root\"", "\"S2\"", "\"S1\""],
        ),
        (
            vec![good.clone(), drive(&qcow2, ",id=more")],
            &["\"more\"", "no such disk"],
        ),
        (
            vec![drive(&dir.path().join("absent"), ",id=root")],
            &["'root'", "absent"],
        ),
    ];
    for (index, (drives, words)) in places.iter().enumerate() {
        let (mut destination, uri) = incoming(dir.path(), &format!("d{index}"), drives);
        source.migrate(&uri);
        let info = source.wait_migrated("failed");
        let reason = info["error-desc"].as_str().unwrap();
        for word in *words {
            assert!(reason.contains(word), "no {word:?} in: {reason}");
        }
        assert_eq!(source.status(), "running");
        let (success, output) = destination.wait_exit();
        assert!(!success, "{output}");
    }
    wait_progress(&source, 50);
    let destination = super::hop(source, dir.path(), "last", &[good]);
    wait_progress(&destination, 50);
    finish(destination, &[&path]);
}
