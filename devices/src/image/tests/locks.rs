//! Who may use an image at the same time, and how it changes hands.

use std::process::Stdio;

use super::*;
use crate::image::Error;

#[test]
fn two_writers_exclude_each_other_and_readers_do_not() {
    let (_dir, path) = dir();
    for format in [Format::Raw, Format::Qcow2] {
        drop(create(&path, format, MIB));
        let readonly = ImageConfig {
            readonly: true,
            ..config(&path, Some(format))
        };
        let (first, second) = (lock(&path, format), open(&path, format));
        let error = second.lock().unwrap_err();
        assert!(
            matches!(
                error,
                Error::Locked {
                    permission: "write",
                    ..
                }
            ),
            "{error}"
        );
        assert!(
            error
                .to_string()
                .contains("failed to get \"write\" lock: is another process using"),
            "{error}"
        );
        let reader = Image::open(&readonly).unwrap();
        let error = reader.lock().unwrap_err().to_string();
        assert!(error.contains("shared \"write\" lock"), "{error}");
        first.unlock().unwrap();
        reader.lock().unwrap();
        Image::open(&readonly).unwrap().lock().unwrap();
        second.lock().unwrap_err();
        drop(reader);
        second.lock().unwrap();
        assert!(second.locked() && !first.locked());
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn nothing_is_written_without_the_locks() {
    let (_dir, path) = dir();
    for format in [Format::Raw, Format::Qcow2] {
        drop(create(&path, format, MIB));
        if format == Format::Qcow2 {
            // A feature that is cleared by whoever writes the image.
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[95] |= 2;
            std::fs::write(&path, bytes).unwrap();
        }
        let before = std::fs::read(&path).unwrap();
        let image = open(&path, format);
        for result in [
            image.write_at(&[IoSlice::new(&[1; 512])], 0),
            image.write_zeroes(0, 512, true),
            image.discard(0, 512),
        ] {
            assert!(matches!(result, Err(Error::NotLocked { .. })), "{result:?}");
        }
        image.flush().unwrap();
        image.unlock().unwrap();
        drop(image);
        assert!(std::fs::read(&path).unwrap() == before, "{format}");
        std::fs::remove_file(&path).unwrap();
    }
}

/// A migration: the destination has the image open before the source has stopped writing.
#[test]
fn what_changed_before_the_hand_over_is_seen_after_it() {
    let (_dir, path) = dir();
    for format in [Format::Raw, Format::Qcow2] {
        let source = create(&path, format, 16 * MIB);
        write(&source, 0, &[1; 4096]);
        source.flush().unwrap();
        let destination = open(&path, format);
        assert_eq!(read(&destination, 0, 4096), [1; 4096]);
        assert_eq!(read(&destination, 8 * MIB, 4096), [0; 4096]);
        for round in 2..6u8 {
            // New clusters, new tables, changed ones, freed ones.
            write(&source, u64::from(round) * MIB, &[round; 200_000]);
            write(&source, 0, &[round; 4096]);
            source
                .write_zeroes(MIB * u64::from(round - 1), 65_536, true)
                .unwrap();
            destination.lock().unwrap_err();
            source.unlock().unwrap();
            destination.lock().unwrap();
            assert_eq!(read(&destination, 0, 4096), [round; 4096]);
            assert_eq!(
                read(&destination, u64::from(round) * MIB, 200_000),
                [round; 200_000]
            );
            assert_eq!(
                read(&destination, u64::from(round - 1) * MIB, 65_536),
                [0; 65_536]
            );
            write(&destination, 8 * MIB, &[round; 70_000]);
            // It fails, and the source goes on.
            destination.unlock().unwrap();
            destination.drop_page_cache().unwrap();
            source.lock().unwrap();
            assert_eq!(read(&source, 8 * MIB, 70_000), [round; 70_000]);
        }
        drop((source, destination));
        check(&path, format);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn an_image_that_has_become_another_is_not_taken() {
    let (_dir, path) = dir();
    drop(create(&path, Format::Raw, MIB));
    let image = open(&path, Format::Raw);
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(2 * MIB)
        .unwrap();
    let error = image.lock().unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    // And it is not left locked.
    lock(&path, Format::Raw);
}

#[test]
fn a_backing_file_is_locked_too() {
    let (dir, base) = dir();
    drop(create(&base, Format::Raw, MIB));
    let backing = super::super::NewBacking {
        name: "disk".to_owned(),
        format: Format::Raw,
    };
    let overlay = |name: &str| {
        let path = dir.path().join(name);
        Image::create(&path, Format::Qcow2, MIB, Some(&backing), Cache::Writeback).unwrap()
    };
    // Two guests may have it under them, none may write it.
    let (first, second) = (overlay("first"), overlay("second"));
    let writer = open(&base, Format::Raw);
    writer.lock().unwrap_err();
    first.unlock().unwrap();
    drop(second);
    writer.lock().unwrap();
    first.lock().unwrap_err();
    assert!(!first.locked());
}

#[test]
fn qemu_and_ferry_exclude_each_other() {
    let Some(qemu) = Qemu::find() else { return };
    let (_dir, path) = dir();
    for format in [Format::Raw, Format::Qcow2] {
        let image = create(&path, format, MIB);
        let name = format.to_string();
        let attempt = |flags: &[&str], command: &str| {
            let args = [flags, &["-f", &name, "-c", command, text(&path)]].concat();
            let output = qemu.run("qemu-io", &args);
            let refused = String::from_utf8_lossy(&output.stderr)
                .contains("Is another process using the image");
            assert_eq!(refused, !output.status.success(), "{output:?}");
            !refused
        };
        assert!(!attempt(&[], "write 0 512"));
        // The tool does not mind that a raw image changes while it reads.
        assert_eq!(attempt(&["-r"], "read 0 512"), format == Format::Raw);
        image.unlock().unwrap();
        assert!(attempt(&[], "write 0 512"));
        image.lock().unwrap();
        assert!(!attempt(&[], "write 0 512"));
        drop(image);

        // A reader of ours and one of QEMU's do not mind each other, a writer does.
        let readonly = ImageConfig {
            readonly: true,
            ..config(&path, Some(format))
        };
        let image = Image::open(&readonly).unwrap();
        image.lock().unwrap();
        assert!(attempt(&["-r"], "read 0 512"));
        assert!(!attempt(&[], "write 0 512"));
        drop(image);

        // QEMU holds it until it has read the end of its input.
        let mut holder = Command::new("qemu-io")
            .args(["-f", &name, text(&path)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdout = holder.stdout.take().unwrap();
        let mut said = [0; 1];
        std::io::Read::read_exact(&mut stdout, &mut said).unwrap(); // its prompt
        let image = open(&path, format);
        assert!(matches!(image.lock(), Err(Error::Locked { .. })));
        let reader = Image::open(&readonly).unwrap();
        assert!(matches!(
            reader.lock(),
            Err(Error::Locked { shared: true, .. })
        ));
        drop(holder.stdin.take());
        drop(stdout);
        holder.wait().unwrap();
        image.lock().unwrap();
        drop(image);
        std::fs::remove_file(&path).unwrap();
    }
}
