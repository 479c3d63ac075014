//! What QEMU wrote is read here, and the other way round.

use super::*;

/// Patterns at aligned and unaligned places, of sizes around those of clusters.
const PATTERNS: [(u64, usize, u8); 6] = [
    (0, 512, 0x11),
    (65_536 - 512, 1024, 0x22),
    (3 * MIB + 512, 200 * 512, 0x33),
    (5 * MIB, 65_536, 0x44),
    (8 * MIB - 512, 512, 0x55),
    (6 * MIB + 4096, 4096, 0x66),
];

fn written_here_is_read_by_qemu(format: Format, cache: Cache) {
    let Some(qemu) = Qemu::find() else { return };
    let (dir, path) = dir();
    let image = Image::create(&path, format, 8 * MIB, None, cache).unwrap();
    for (offset, len, byte) in PATTERNS {
        write(&image, offset, &vec![byte; len]);
    }
    drop(image);
    if format == Format::Qcow2 {
        qemu.check(&path);
    }
    let expected = dir.path().join("expected");
    std::fs::File::create(&expected)
        .unwrap()
        .set_len(8 * MIB)
        .unwrap();
    let commands: Vec<String> = PATTERNS
        .iter()
        .map(|(offset, len, byte)| format!("write -P {byte} {offset} {len}"))
        .collect();
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu.io(&expected, Format::Raw, &commands);
    let format = format.to_string();
    qemu.img(&[
        "compare",
        "-f",
        &format,
        "-F",
        "raw",
        text(&path),
        text(&expected),
    ]);
}

#[test]
fn raw_is_read_by_qemu() {
    written_here_is_read_by_qemu(Format::Raw, Cache::Writeback);
}

#[test]
fn qcow2_is_read_by_qemu() {
    written_here_is_read_by_qemu(Format::Qcow2, Cache::Writeback);
}

#[test]
fn direct_is_read_by_qemu() {
    let (_dir, path) = dir();
    match Image::create(&path, Format::Raw, MIB, None, Cache::None) {
        Err(super::super::Error::Direct { .. }) => {
            guest_tests::driver::skip(
                "the temporary directory's file system has no O_DIRECT; set TMPDIR",
            );
        }
        image => {
            image.unwrap();
            written_here_is_read_by_qemu(Format::Raw, Cache::None);
            written_here_is_read_by_qemu(Format::Qcow2, Cache::None);
        }
    }
}

#[test]
fn written_by_qemu_is_read_here() {
    let Some(qemu) = Qemu::find() else { return };
    for options in [
        "cluster_size=512",
        "cluster_size=64k",
        "cluster_size=2M,refcount_bits=64",
        "compat=0.10",
    ] {
        let (_dir, path) = dir();
        qemu.img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            text(&path),
            "8M",
        ]);
        let mut commands = vec!["write -c -P 0x77 2M 2M".to_owned()];
        let patterns = PATTERNS
            .iter()
            .map(|(at, len, byte)| format!("write -P {byte} {at} {len}"));
        commands.extend(patterns);
        commands.push("write -z 5M 32k".to_owned());
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu.io(&path, Format::Qcow2, &commands);
        let image = Image::open(&config(&path, None)).unwrap();
        assert_eq!(image.format(), Format::Qcow2);
        let mut expected = vec![0; 8 << 20];
        expected[2 << 20..4 << 20].fill(0x77);
        for (offset, len, byte) in PATTERNS {
            expected[offset as usize..][..len].fill(byte);
        }
        expected[5 << 20..][..32 << 10].fill(0);
        assert!(read(&image, 0, 8 << 20) == expected, "{options}");
        // And goes on being an image that QEMU can use.
        image.lock().unwrap();
        write(&image, 2 * MIB + 512, &[1; 4096]);
        image.discard(3 * MIB, MIB).unwrap();
        image.write_zeroes(8 * MIB - 1024, 1024, true).unwrap();
        assert_eq!(read(&image, 8 * MIB - 1024, 1024), [0; 1024]);
        assert_eq!(read(&image, 2 * MIB, 512), [0x77; 512]);
        assert_eq!(read(&image, 2 * MIB + 512, 4096), [1; 4096]);
        drop(image);
        qemu.check(&path);
        qemu.io(
            &path,
            Format::Qcow2,
            &["read -P 0x77 2M 512", "read -P 1 2097664 4096"],
        );
    }
}

#[test]
fn extents_are_those_of_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    for format in [Format::Raw, Format::Qcow2] {
        let (_dir, path) = dir();
        let image = create(&path, format, 16 * MIB);
        write(&image, 0, &[1; 65_536]);
        write(&image, 3 * MIB, &[2; 4 << 16]);
        image.write_zeroes(3 * MIB + 65_536, 65_536, true).unwrap();
        write(&image, 16 * MIB - 65_536, &[3; 65_536]);
        image.flush().unwrap();
        let found = extents(&image, Scope::Chain);
        assert_eq!(found, extents(&image, Scope::Image));
        drop(image);
        let map = qemu.img(&[
            "map",
            "-f",
            &format.to_string(),
            "--output=json",
            text(&path),
        ]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let mut expected: Vec<(ExtentKind, u64, u64)> = Vec::new();
        for entry in map.as_array().unwrap() {
            let (start, len) = (
                entry["start"].as_u64().unwrap(),
                entry["length"].as_u64().unwrap(),
            );
            let kind = if entry["zero"] == true {
                ExtentKind::Zero
            } else {
                ExtentKind::Data
            };
            match expected.last_mut().filter(|last| last.0 == kind) {
                Some(last) => last.2 += len,
                None => expected.push((kind, start, len)),
            }
        }
        assert_eq!(found, expected);
        assert_eq!(found.len(), 7, "{found:?}");
    }
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    for format in [Format::Raw, Format::Qcow2] {
        let (_dir, path) = dir();
        let image = create(&path, format, 64 * MIB);
        write(&image, 0, &vec![7; 32 << 20]);
        image.flush().unwrap();
        let full = image.allocated().unwrap();
        image.discard(0, 24 * MIB).unwrap();
        image.write_zeroes(24 * MIB, 4 * MIB, true).unwrap();
        image.flush().unwrap();
        let left = image.allocated().unwrap();
        assert!(
            full >= 32 * MIB && left < 8 * MIB,
            "{format}: {full} then {left}"
        );
        assert_eq!(read(&image, 28 * MIB - 512, 1024)[..512], [0; 512]);
        assert_eq!(read(&image, 28 * MIB - 512, 1024)[512..], [7; 512]);
        // Zeroes that keep their space.
        image.write_zeroes(28 * MIB, MIB, false).unwrap();
        assert_eq!(read(&image, 28 * MIB, 1 << 20), vec![0; 1 << 20]);
        image.flush().unwrap();
        assert!(image.allocated().unwrap() >= left, "{format}");
    }
}
