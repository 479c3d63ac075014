//! Images over other images.

use super::*;
use crate::image::{Error, NewBacking};

fn overlay(path: &Path, name: &str, format: Format, capacity: u64) -> Image {
    let backing = NewBacking {
        name: name.to_owned(),
        format,
    };
    Image::create(
        path,
        Format::Qcow2,
        capacity,
        Some(&backing),
        Cache::Writeback,
    )
    .unwrap()
}

#[test]
fn an_overlay_reads_through_and_leaves_its_backing_file_alone() {
    for format in [Format::Raw, Format::Qcow2] {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base"), dir.path().join("top"));
        let image = create(&base, format, 4 * MIB);
        write(&image, 0, &[0xaa; 3 * 65_536]);
        drop(image);
        let before = std::fs::read(&base).unwrap();

        // Larger than its backing file: zeroes after that.
        let image = overlay(&top, "base", format, 8 * MIB);
        write(&image, 65_536 + 512, &[0xbb; 512]);
        assert_eq!(read(&image, 65_536, 512), [0xaa; 512]);
        assert_eq!(read(&image, 65_536 + 512, 1024)[..512], [0xbb; 512]);
        assert_eq!(read(&image, 65_536 + 512, 1024)[512..], [0xaa; 512]);
        assert_eq!(read(&image, 4 * MIB - 512, 1024), [0; 1024]);
        image.write_zeroes(2 * 65_536, 65_536, true).unwrap();
        assert_eq!(read(&image, 2 * 65_536, 65_536), [0; 65_536]);
        image.flush().unwrap();

        let own = extents(&image, Scope::Image);
        assert_eq!(
            own[..3],
            [
                (ExtentKind::Absent, 0, 65_536),
                (ExtentKind::Data, 65_536, 65_536),
                (ExtentKind::Zero, 2 * 65_536, 65_536),
            ]
        );
        let all = extents(&image, Scope::Chain);
        assert_eq!(
            all,
            [
                (ExtentKind::Data, 0, 2 * 65_536),
                (ExtentKind::Zero, 2 * 65_536, 8 * MIB - 2 * 65_536)
            ]
        );

        let backing = image.backing().unwrap().unwrap();
        assert_eq!(
            (backing.name.as_str(), &backing.path, backing.format),
            ("base", &base, format)
        );
        drop(image);
        assert!(
            std::fs::read(&base).unwrap() == before,
            "the backing file was written"
        );
        if let Some(qemu) = Qemu::find_for("in part: ") {
            qemu.check(&top);
            qemu.io(
                &top,
                Format::Qcow2,
                &[
                    "read -P 0xaa 0 64k",
                    "read -P 0xbb 66048 512",
                    "read -P 0 128k 64k",
                ],
            );
        }
    }
}

#[test]
fn a_chain_of_qemu_is_read_relative_to_each_image() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("lower")).unwrap();
    qemu.img(&["create", "-q", "-f", "raw", text(&at("lower/base")), "2M"]);
    qemu.io(&at("lower/base"), Format::Raw, &["write -P 1 0 2M"]);
    for (name, backing, format) in [("lower/mid", "base", "raw"), ("top", "lower/mid", "qcow2")] {
        qemu.img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            backing,
            "-F",
            format,
            text(&at(name)),
        ]);
    }
    qemu.io(&at("lower/mid"), Format::Qcow2, &["write -P 2 64k 64k"]);
    let image = lock(&at("top"), Format::Qcow2);
    write(&image, 512, &[3; 512]);
    assert_eq!(read(&image, 0, 512), [1; 512]);
    assert_eq!(read(&image, 512, 512), [3; 512]);
    assert_eq!(read(&image, 65_536, 512), [2; 512]);
    drop(image);
    qemu.check(&at("top"));
    qemu.io(
        &at("top"),
        Format::Qcow2,
        &["read -P 1 1k 63k", "read -P 3 512 512", "read -P 2 64k 64k"],
    );
}

#[test]
fn an_unrecorded_format_is_never_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base"), dir.path().join("top"));
    drop(create(&base, Format::Raw, MIB));
    drop(overlay(&top, "base", Format::Raw, MIB));
    // The extension that says "raw" becomes one that nobody knows.
    let mut bytes = std::fs::read(&top).unwrap();
    let extension = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes
        .windows(4)
        .position(|window| window == extension)
        .unwrap();
    bytes[at] = 0;
    std::fs::write(&top, bytes).unwrap();
    open(&top, Format::Qcow2);
    // A guest writes a header into its raw disk.
    std::fs::write(
        &base,
        [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 1016]].concat(),
    )
    .unwrap();
    let error = Image::open(&config(&top, None)).unwrap_err();
    assert!(matches!(error, Error::Backing { .. }), "{error}");
    assert!(
        error.to_string().contains("looks like a qcow2 image"),
        "{error}"
    );
}

#[test]
fn chains_that_loop_or_lead_elsewhere_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    drop(create(&dir.path().join("base"), Format::Qcow2, MIB));
    drop(overlay(&top, "base", Format::Qcow2, MIB));
    std::fs::copy(&top, dir.path().join("base")).unwrap();
    let error = Image::open(&config(&top, None)).unwrap_err().to_string();
    assert!(error.contains("loops"), "{error}");

    for name in ["nbd://localhost/x", "json:{}", "ssh:x"] {
        let path = dir.path().join("other");
        let backing = NewBacking {
            name: name.to_owned(),
            format: Format::Raw,
        };
        let error =
            Image::create(&path, Format::Qcow2, MIB, Some(&backing), Cache::Writeback).unwrap_err();
        assert!(error.to_string().contains("only files"), "{error}");
        assert!(!path.exists(), "a failed creation left {name}");
    }
    std::fs::remove_file(dir.path().join("base")).unwrap();
    let error = Image::open(&config(&top, None)).unwrap_err().to_string();
    assert!(
        error.contains("its backing file") && error.contains("No such file"),
        "{error}"
    );
}

#[test]
fn fingerprints_tell_contents_apart_whatever_the_format() {
    let dir = tempfile::tempdir().unwrap();
    for capacity in [2 * MIB, 40 * MIB] {
        let mut prints = Vec::new();
        for (n, format) in [Format::Raw, Format::Qcow2, Format::Raw]
            .into_iter()
            .enumerate()
        {
            let image = create(
                &dir.path().join(format!("{capacity}-{n}")),
                format,
                capacity,
            );
            write(&image, MIB, &[n as u8 / 2; 512]);
            prints.push(image.fingerprint().unwrap());
        }
        assert_eq!(prints[0], prints[1]);
        assert_ne!(prints[0], prints[2]);
        assert_eq!(
            (prints[0].whole, prints[0].capacity),
            (capacity < 16 * MIB, capacity)
        );
    }
}
