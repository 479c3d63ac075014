//! A host that runs out of space.

use super::*;

/// A small file system, taken away at the end.
pub(crate) struct Small(pub(crate) tempfile::TempDir);

impl Small {
    pub(crate) fn mount(size: &str) -> Option<Small> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "none", text(dir.path())])
            .output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Small(dir));
        }
        guest_tests::driver::skip("cannot mount a small tmpfs; needs root");
        None
    }

    fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        let output = Command::new("mount")
            .args(["-o", &options, text(self.0.path())])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).output();
    }
}

#[test]
fn a_full_host_is_told_and_once_there_is_room_the_image_goes_on() {
    for format in [Format::Raw, Format::Qcow2] {
        let Some(small) = Small::mount("4m") else {
            return;
        };
        let path = small.0.path().join("disk");
        let image = create(&path, format, 16 * MIB);
        let mut offset = 0;
        let error = loop {
            let bytes = vec![1 + (offset / 65_536) as u8; 65_536];
            match image.write_at(&[IoSlice::new(&bytes)], offset) {
                Ok(()) => offset += 65_536,
                Err(error) => break error,
            }
        };
        assert!(error.is_no_space(), "{error}");
        assert!(
            error
                .to_string()
                .contains(&format!("cannot write 65536 bytes at {offset}")),
            "{error}"
        );
        // A table may find no room either.
        if let Err(error) = image.flush() {
            assert!(error.is_no_space(), "{error}");
        }
        // What has been written is there, and with room the rest is too.
        small.resize("32m");
        while offset < 12 * MIB {
            write(&image, offset, &vec![1 + (offset / 65_536) as u8; 65_536]);
            offset += 65_536;
        }
        image.flush().unwrap();
        drop(image);
        let image = lock(&path, format);
        for n in 0..offset / 65_536 {
            assert_eq!(
                read(&image, n * 65_536, 65_536),
                vec![1 + n as u8; 65_536],
                "{format} {n}"
            );
        }
        drop(image);
        check(&path, format);
    }
}

#[test]
fn creating_an_image_without_room_fails_and_leaves_nothing() {
    let Some(small) = Small::mount("64k") else {
        return;
    };
    let path = small.0.path().join("disk");
    let error = Image::create(&path, Format::Qcow2, MIB, None, Cache::Writeback).unwrap_err();
    assert!(error.is_no_space(), "{error}");
    assert!(!path.exists());
}
