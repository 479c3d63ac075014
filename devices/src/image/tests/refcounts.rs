//! Images that were not closed properly: their reference counts are repaired, or they stay as they
//! are.

use super::*;
use crate::image::{Error, NewBacking};

const COPIED: u64 = 1 << 63;
const OFFSETS: u64 = 0x00ff_ffff_ffff_fe00;

/// An image in memory, to be damaged.
struct Bytes(Vec<u8>);

impl Bytes {
    fn read(path: &Path) -> Self {
        Bytes(std::fs::read(path).unwrap())
    }

    fn u32(&self, at: u64) -> u32 {
        u32::from_be_bytes(self.0[at as usize..][..4].try_into().unwrap())
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.0[at as usize..][..8].try_into().unwrap())
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn cluster(&self) -> u64 {
        1 << self.u32(20)
    }

    /// Sets the dirty bit, where the version has one.
    fn set_dirty(&mut self) {
        if self.u32(4) == 3 {
            self.0[79] |= 1;
        }
    }

    /// Places of all counts, of which the file has the cluster, with the cluster's number.
    fn counts(&self) -> Vec<(u64, u64)> {
        let (table, per_block) = (self.u64(48), self.cluster() / 2);
        let clusters = (self.0.len() as u64).div_ceil(self.cluster());
        let places = (0..clusters).filter_map(|cluster| {
            let block = self.u64(table + cluster / per_block * 8);
            (block != 0).then(|| (block + cluster % per_block * 2, cluster))
        });
        places.collect()
    }

    /// Places of the L1 entries in use, then of the standard L2 entries under them.
    fn entries(&self) -> (Vec<u64>, Vec<u64>) {
        let (l1, count) = (self.u64(40), u64::from(self.u32(36)));
        let used = |at: &u64| self.u64(*at) & OFFSETS != 0 && self.u64(*at) >> 62 & 1 == 0;
        let l1: Vec<u64> = (0..count).map(|n| l1 + n * 8).filter(used).collect();
        let tables = l1.iter().map(|at| self.u64(*at) & OFFSETS);
        let l2 = tables.flat_map(|table| (0..self.cluster() / 8).map(move |n| table + n * 8));
        let l2 = l2.filter(used).collect();
        (l1, l2)
    }

    /// Makes counts and flags wrong, in a way that a random number says.
    fn damage(&mut self, random: &mut Random) {
        for (at, _) in self.counts() {
            match random.below(4) {
                0 => self.put(at, &[0, 0]),
                1 => self.put(at, &7u16.to_be_bytes()),
                _ => {}
            }
        }
        let (l1, l2) = self.entries();
        for at in l1.into_iter().chain(l2) {
            if random.below(3) == 0 {
                let entry = self.u64(at) ^ COPIED;
                self.put(at, &entry.to_be_bytes());
            }
        }
        self.set_dirty();
    }
}

/// The whole disk, and each snapshot, as QEMU reads them.
fn contents(qemu: &Qemu, dir: &Path, path: &Path, snapshots: &[&str]) -> Vec<Vec<u8>> {
    let raw = dir.join("raw");
    let convert = |more: &[&str]| {
        let args = [&["convert", "-O", "raw"], more, &[text(path), text(&raw)]].concat();
        qemu.img(&args);
        std::fs::read(&raw).unwrap()
    };
    let mut all = vec![convert(&[])];
    all.extend(snapshots.iter().map(|name| convert(&["-l", name])));
    all
}

fn cluster_size(path: &Path) -> u64 {
    Bytes::read(path).cluster()
}

fn damaged_and_repaired(options: &str, snapshots: &[&str], backing: bool) {
    let Some(qemu) = Qemu::find() else { return };
    let (dir, path) = dir();
    let base = dir.path().join("base");
    drop(create(&base, Format::Raw, 4 * MIB));
    qemu.io(&base, Format::Raw, &["write -P 9 0 4M"]);
    let under = ["-b", text(&base), "-F", "raw"];
    let under = if backing { under.as_slice() } else { &[] };
    let args = ["create", "-q", "-f", "qcow2", "-o", options];
    qemu.img(&[args.as_slice(), under, &[text(&path), "4M"]].concat());
    // Compressed clusters are written as wholes.
    let compressed = format!(
        "write -c -P 1 0 {}",
        (512u64 << 10).max(cluster_size(&path))
    );
    let write = [&compressed, "write -P 2 1M 300k", "write -z 2M 1M"];
    qemu.io(&path, Format::Qcow2, &write);
    for (n, name) in snapshots.iter().enumerate() {
        qemu.img(&["snapshot", "-c", name, text(&path)]);
        let write = format!("write -P {} {}k 100k", 0x10 + n, 900 + 150 * n);
        let compressed = format!("write -c -P 5 {}k 128k", 3072 + 128 * n);
        qemu.io(&path, Format::Qcow2, &[&write, &compressed]);
    }
    qemu.check(&path);
    let expected = contents(&qemu, dir.path(), &path, snapshots);
    let good = std::fs::read(&path).unwrap();

    let mut random = Random(0x5eed_0010);
    for round in 0..8 {
        let mut bytes = Bytes(good.clone());
        bytes.damage(&mut random);
        std::fs::write(&path, &bytes.0).unwrap();
        let image = lock(&path, Format::Qcow2);
        let found = contents(&qemu, dir.path(), &copy(&path), snapshots);
        assert!(found == expected, "{options}: round {round}");
        // And it can be written: what a snapshot has stays.
        write_all(&image, round);
        drop(image);
        qemu.check(&path);
        let found = contents(&qemu, dir.path(), &path, snapshots);
        assert!(found[1..] == expected[1..], "{options}: round {round}");
        assert!(found[0] == vec![round; 4 << 20], "{options}: round {round}");
    }
}

fn write_all(image: &Image, byte: u8) {
    write(image, 0, &vec![byte; 4 << 20]);
}

/// A copy without a mark, for QEMU: the original is locked.
fn copy(path: &Path) -> PathBuf {
    let mut bytes = std::fs::read(path).unwrap();
    if bytes[7] == 3 {
        bytes[79] &= !1;
    }
    let copy = path.with_extension("copy");
    std::fs::write(&copy, bytes).unwrap();
    copy
}

#[test]
fn wrong_counts_and_flags_are_put_right() {
    damaged_and_repaired("cluster_size=64k", &[], false);
    damaged_and_repaired("cluster_size=4k", &[], true);
    damaged_and_repaired("cluster_size=2M", &[], false);
}

#[test]
fn internal_snapshots_keep_their_clusters() {
    damaged_and_repaired("cluster_size=64k", &["a", "b", "c"], true);
    damaged_and_repaired("cluster_size=512", &["a", "b"], false);
}

#[test]
fn version_2_is_counted_without_a_mark() {
    damaged_and_repaired("compat=0.10", &["a"], true);
}

/// imago writes new tables at once, but their counts with the next flush.
#[test]
fn an_image_killed_before_its_first_flush_is_repaired() {
    let Some(qemu) = Qemu::find() else { return };
    for options in ["compat=1.1", "compat=0.10"] {
        let (_dir, path) = dir();
        let args = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu.img(&[args.as_slice(), &[text(&path), "2G"]].concat());
        let image = lock(&path, Format::Qcow2);
        // An L2 table for each 512 MiB.
        for n in 0..4 {
            write(&image, n * 512 * MIB, &[7; 70_000]);
        }
        let left = path.with_extension("left");
        std::fs::copy(&path, &left).unwrap();
        let check = qemu.run("qemu-img", &["check", text(&left)]);
        assert!(!check.status.success(), "{options}: nothing to repair");
        let again = lock(&left, Format::Qcow2);
        write(&again, MIB, &[8; 70_000]);
        drop(again);
        qemu.check(&left);
        // The flush brings everything.
        image.flush().unwrap();
        std::fs::copy(&path, &left).unwrap();
        let again = lock(&left, Format::Qcow2);
        assert_eq!(read(&again, 512 * MIB, 70_000), [7; 70_000]);
        drop(again);
        qemu.check(&left);
    }
}

#[test]
fn what_can_t_be_repaired_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    write(&create(&path, Format::Qcow2, 8 * MIB), 0, &[1; 200_000]);
    let good = std::fs::read(&path).unwrap();
    let refused = |why: &str, change: &dyn Fn(&mut Bytes)| {
        let mut bytes = Bytes(good.clone());
        bytes.set_dirty();
        change(&mut bytes);
        std::fs::write(&path, &bytes.0).unwrap();
        let image = open(&path, Format::Qcow2);
        let error = image.lock().unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{why}: {error}");
        let error = error.to_string();
        assert!(error.contains(why), "{why}: {error}");
        assert!(error.contains("repair it with `qemu-img check -r all`"));
        assert!(!image.locked());
        drop(image);
        assert!(Bytes::read(&path).0 == bytes.0, "{why}: it was written");
    };
    let entry = |n: usize, to: u64| {
        move |bytes: &mut Bytes| {
            let at = bytes.entries().1[n];
            bytes.put(at, &to.to_be_bytes());
        }
    };
    refused("beyond the end", &entry(0, COPIED | 1 << 40));
    refused("for metadata and for data", &entry(0, COPIED | 0x1_0000));
    refused("is not valid", &entry(0, COPIED | 0x1_0200));
    refused("is not valid", &entry(0, COPIED | 0x2_0000 | 1 << 60));
    refused("for an L2 table and for data", &|bytes| {
        // An L2 table where data is.
        let (l1, l2) = bytes.entries();
        let data = bytes.u64(l2[0]);
        bytes.put(l1[0], &data.to_be_bytes());
        let table = bytes.cluster() as usize;
        let zero = vec![0; table];
        bytes.put(data & OFFSETS, &zero);
        bytes.put(data & OFFSETS, &data.to_be_bytes());
    });
    refused("no refcount block", &|bytes| {
        let table = bytes.u64(48);
        bytes.put(table, &[0; 8]);
    });
    refused("not of 16 bits", &|bytes| {
        bytes.put(96, &5u32.to_be_bytes())
    });
    refused("0x23852875", &|bytes| {
        let at = u64::from(bytes.u32(100));
        bytes.put(at, &[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]);
    });
    refused("a snapshot at", &|bytes| {
        bytes.put(60, &1u32.to_be_bytes());
        bytes.put(64, &(1u64 << 40).to_be_bytes());
    });
    refused("65537 snapshots", &|bytes| {
        bytes.put(60, &65_537u32.to_be_bytes());
    });
}

/// Random bytes in the tables and the header of a dirty image: it is repaired, or refused and as it
/// was.
#[test]
fn mutated_dirty_images_are_survived() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base"), dir.path().join("disk"));
    drop(create(&base, Format::Raw, 2 * MIB));
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
    write(&image.unwrap(), 0, &[1; 200_000]);
    mutate(&path, 0x5eed_0011, 1500);
}

#[test]
fn mutated_dirty_images_of_qemu_are_survived() {
    let Some(qemu) = Qemu::find() else { return };
    let (_dir, path) = dir();
    for (seed, options) in [
        (0x5eed_0012, "cluster_size=512"),
        (0x5eed_0013, "compat=0.10"),
        (0x5eed_0014, "cluster_size=4k"),
    ] {
        let args = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu.img(&[args.as_slice(), &[text(&path), "2M"]].concat());
        let commands = ["write -c -P 1 0 128k", "write -P 2 1M 64k"];
        qemu.io(&path, Format::Qcow2, &commands);
        qemu.img(&["snapshot", "-c", "a", text(&path)]);
        qemu.io(&path, Format::Qcow2, &["write -P 3 1M 32k"]);
        mutate(&path, seed, 600);
    }
}

fn mutate(path: &Path, seed: u64, times: u32) {
    let mut good = Bytes::read(path);
    good.set_dirty();
    let good = good;
    let (l1, l2) = good.entries();
    let counts = good.counts();
    let mut random = Random(seed);
    let (mut repaired, mut refused) = (0, 0);
    for _ in 0..times {
        let mut bytes = Bytes(good.0.clone());
        for _ in 0..1 + random.below(3) {
            let any = |random: &mut Random, places: &[u64]| {
                places[random.below(places.len() as u64) as usize]
            };
            let at = match random.below(6) {
                0 => random.below(160),
                1 => any(&mut random, &l1) + random.below(8),
                2 => any(&mut random, &l2) + random.below(8),
                3 => good.u64(48) + random.below(16),
                4 => good.u64(64) + random.below(64),
                _ => counts[random.below(counts.len() as u64) as usize].0,
            };
            let value = match random.below(4) {
                0 => 0xff,
                1 => 0x80,
                2 => 1 << random.below(8),
                _ => random.next() as u8,
            };
            bytes.put(at.min(good.0.len() as u64 - 1), &[value]);
        }
        std::fs::write(path, &bytes.0).unwrap();
        let Ok(image) = Image::open(&config(path, Some(Format::Qcow2))) else {
            continue;
        };
        match image.lock() {
            Ok(()) => {
                repaired += 1;
                let _ = image.write_at(&[IoSlice::new(&[7; 4096])], 4096);
            }
            Err(error) => {
                refused += 1;
                drop(image);
                assert!(
                    Bytes::read(path).0 == bytes.0,
                    "{error}: but it was written"
                );
            }
        }
    }
    assert!(repaired > times / 10, "{repaired} were repaired");
    assert!(
        good.u32(4) == 2 || refused > times / 10,
        "{refused} were refused"
    );
}
