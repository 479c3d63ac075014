//! Broken and malicious qcow2 files: an error or data, but no panic, no endless loop, and no
//! allocation that the file does not pay for.

use super::*;
use crate::image::NewBacking;

/// Uses what of it can be used.
fn exercise(path: &Path) {
    let Ok(image) = Image::open(&config(path, Some(Format::Qcow2))) else {
        return;
    };
    let capacity = image.capacity();
    let mut bytes = vec![0; 4096];
    let places = [
        0,
        4096,
        65_536 - 512,
        MIB,
        (capacity / 2) & !511,
        capacity.saturating_sub(4096),
    ];
    for offset in places {
        let _ = image.read_at(&mut [IoSliceMut::new(&mut bytes)], offset);
        let _ = image.extent(
            offset,
            4096.min(capacity.saturating_sub(offset)),
            Scope::Image,
        );
    }
    if image.lock().is_err() {
        return;
    }
    for offset in places {
        let _ = image.write_at(&[IoSlice::new(&bytes)], offset);
        let _ = image.discard(offset, 4096);
    }
    let _ = image.write_zeroes(0, capacity.min(MIB), true);
    let _ = image.flush();
    let _ = image.unlock();
}

/// Changes a few bytes of the header and of the beginnings of the first clusters, where the
/// tables are, and uses what comes of it.
fn mutate(path: &Path, cluster: u64, seed: u64, times: u32) {
    let good = std::fs::read(path).unwrap();
    let mut random = Random(seed);
    for n in 0..times {
        let mut bytes = good.clone();
        for _ in 0..1 + random.below(3) {
            let at = match random.below(3) {
                0 => random.below(160),
                1 => random.below(8) * cluster + random.below(32),
                _ => random.below(8) * cluster + random.below(16) * 8,
            };
            let value = match random.below(4) {
                0 => 0xff,
                1 => 0x80,
                2 => 1 << random.below(8),
                _ => random.next() as u8,
            };
            if let Some(byte) = bytes.get_mut(at as usize) {
                *byte = value;
            }
        }
        if n % 16 == 0 {
            bytes.truncate(random.below(good.len() as u64) as usize);
        }
        std::fs::write(path, &bytes).unwrap();
        exercise(path);
    }
}

#[test]
fn mutated_images_are_survived() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base"), dir.path().join("disk"));
    drop(create(&base, Format::Raw, MIB));
    let backing = NewBacking {
        name: "base".to_owned(),
        format: Format::Raw,
    };
    let image = Image::create(
        &path,
        Format::Qcow2,
        2 * MIB,
        Some(&backing),
        Cache::Writeback,
    );
    write(&image.unwrap(), 0, &[1; 70_000]);
    mutate(&path, 65_536, 0x5eed_0001, 1500);
}

#[test]
fn mutated_images_of_qemu_are_survived() {
    let Some(qemu) = Qemu::find() else { return };
    let (_dir, path) = dir();
    for (seed, options, cluster) in [
        (0x5eed_0002, "cluster_size=512", 512),
        (0x5eed_0003, "compat=0.10", 65_536),
        (0x5eed_0004, "cluster_size=4k,refcount_bits=1", 4096),
    ] {
        let args = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu.img(&[args.as_slice(), &[text(&path), "2M"]].concat());
        let commands = ["write -c -P 1 0 128k", "write -P 2 1M 64k", "flush"];
        qemu.io(&path, Format::Qcow2, &commands);
        mutate(&path, cluster, seed, 500);
    }
}
