//! Random requests of several threads, against a copy in memory.

use super::*;

const THREADS: u64 = 4;
const PART: u64 = 3 * MIB;

/// Each thread has parts of its own, interleaved in pieces that share clusters with the others'.
const STRIPE: u64 = 24 << 10;

/// Where byte `at` of a thread's data is on the disk.
fn place(thread: u64, at: u64) -> (u64, u64) {
    let (stripe, within) = (at / STRIPE, at % STRIPE);
    (
        (stripe * THREADS + thread) * STRIPE + within,
        STRIPE - within,
    )
}

fn hammer(image: &Image, thread: u64, align: u64, requests: u32) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (thread + 1));
    let mut model = vec![0u8; PART as usize];
    for _ in 0..requests {
        let at = random.below(PART / align) * align;
        let (offset, room) = place(thread, at);
        let most = if random.below(8) == 0 { 48 } else { 8 };
        let len = (1 + random.below(most)) * align;
        let len = len.min(room).min(PART - at);
        let mine = &mut model[at as usize..(at + len) as usize];
        match random.below(12) {
            0..5 => {
                let byte = random.next() as u8;
                mine.fill(byte);
                mine[0] = byte ^ 0xff;
                let (a, b) = mine.split_at(random.below(len) as usize);
                image
                    .write_at(&[IoSlice::new(a), IoSlice::new(b)], offset)
                    .unwrap();
            }
            5 => {
                mine.fill(0);
                image
                    .write_zeroes(offset, len, random.below(2) == 0)
                    .unwrap();
            }
            6 => {
                // What it reads as is anyone's guess, so it is written again.
                image.discard(offset, len).unwrap();
                image.write_at(&[IoSlice::new(mine)], offset).unwrap();
            }
            7 if random.below(32) == 0 => image.flush().unwrap(),
            _ => {
                let mut bytes = vec![0xee; len as usize];
                let (a, b) = bytes.split_at_mut(random.below(len) as usize);
                image
                    .read_at(&mut [IoSliceMut::new(a), IoSliceMut::new(b)], offset)
                    .unwrap();
                assert!(bytes == *mine, "thread {thread}: {len} bytes at {offset}");
            }
        }
    }
    model
}

fn run(format: Format, cache: Cache, align: u64, requests: u32) {
    let (_dir, path) = dir();
    let image = match Image::create(&path, format, THREADS * PART, None, cache) {
        Err(super::super::Error::Direct { .. }) => {
            let reason = "the temporary directory's file system has no O_DIRECT; set TMPDIR";
            return guest_tests::driver::skip(reason);
        }
        image => image.unwrap(),
    };
    let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let image = &image;
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || hammer(image, thread, align, requests)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let verify = |image: &Image| {
        for (thread, model) in models.iter().enumerate() {
            for at in (0..PART).step_by(STRIPE as usize) {
                let (offset, _) = place(thread as u64, at);
                let expected = &model[at as usize..(at + STRIPE) as usize];
                assert!(
                    read(image, offset, STRIPE as usize) == expected,
                    "thread {thread} at {offset}"
                );
            }
        }
    };
    verify(&image);
    drop(image);
    verify(&open(&path, format));
    check(&path, format);
}

#[test]
fn raw_requests_of_many_threads() {
    run(Format::Raw, Cache::Writeback, 512, 4000);
    run(Format::Raw, Cache::Writeback, 1, 4000);
}

#[test]
fn qcow2_requests_of_many_threads() {
    run(Format::Qcow2, Cache::Writeback, 512, 4000);
    run(Format::Qcow2, Cache::Writeback, 1, 4000);
}

#[test]
fn direct_requests_of_many_threads() {
    run(Format::Raw, Cache::None, 512, 1500);
    run(Format::Raw, Cache::None, 1, 400);
    run(Format::Qcow2, Cache::None, 512, 1500);
}

/// Whole clusters are given back by some threads while others take them: nobody sees what the one
/// before has left.
#[test]
fn clusters_that_change_hands_are_empty() {
    const CLUSTER: u64 = 64 << 10;
    const SECTORS: u64 = CLUSTER / 512;
    let (_dir, path) = dir();
    let image = create(&path, Format::Qcow2, 32 * MIB);
    // Each sector is zero or says which one it is.
    let verify = |at: u64, bytes: &[u8]| {
        for (sector, bytes) in (at / 512 + 1..).zip(bytes.chunks(512)) {
            let found = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert!(found == 0 || found == sector, "{found} in {sector}");
        }
    };
    let hammer = |thread: u64| {
        let mut random = Random(0x51ed_270b_1f83_d9ab ^ (thread + 1));
        for _ in 0..10_000 {
            let cluster = random.below(image.capacity() / CLUSTER / THREADS) * THREADS + thread;
            let sectors = 1 + random.below(32);
            let at = cluster * CLUSTER + random.below(SECTORS - sectors) * 512;
            match random.below(12) {
                0..6 => {
                    let marks = (at / 512 + 1..).take(sectors as usize);
                    let data: Vec<u8> = marks
                        .flat_map(|mark| [mark.to_le_bytes(); 64].concat())
                        .collect();
                    write(&image, at, &data);
                }
                6 => image.discard(cluster * CLUSTER, CLUSTER).unwrap(),
                7 => image
                    .write_zeroes(cluster * CLUSTER, CLUSTER, random.below(2) == 0)
                    .unwrap(),
                8 if random.below(64) == 0 => image.flush().unwrap(),
                _ => verify(at, &read(&image, at, sectors as usize * 512)),
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let hammer = &hammer;
            scope.spawn(move || hammer(thread));
        }
    });
    drop(image);
    let image = open(&path, Format::Qcow2);
    verify(0, &read(&image, 0, 32 * MIB as usize));
    check(&path, Format::Qcow2);
}

/// Zeroes and data come to one cluster at the same time, from two threads.
#[test]
fn zeroes_leave_their_neighbours_alone() {
    let (_dir, path) = dir();
    let image = create(&path, Format::Qcow2, 128 * MIB);
    let clusters = image.capacity() / 65_536;
    let turn = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..clusters {
                turn.wait();
                image.write_zeroes(n * 65_536, 4096, n % 2 == 0).unwrap();
            }
        });
        for n in 0..clusters {
            turn.wait();
            write(&image, n * 65_536 + 4096, &[1; 512]);
        }
    });
    for n in 0..clusters {
        let found = read(&image, n * 65_536, 4096 + 512);
        assert_eq!((found[0], found[4096]), (0, 1), "cluster {n}");
    }
}
