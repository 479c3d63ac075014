//! What can't be opened, and what can't be done with what is open.

use super::*;
use crate::image::Error;
use crate::image::header::lost_cluster;

fn refusal(path: &Path, format: Option<Format>) -> String {
    Image::open(&config(path, format)).unwrap_err().to_string()
}

#[test]
fn files_that_are_no_images_are_refused() {
    let (dir, path) = dir();
    assert!(refusal(&path, None).contains("No such file"));
    assert!(refusal(dir.path(), None).contains("a directory"));
    assert!(refusal(Path::new("/dev/null"), None).contains("a character device"));
    std::fs::write(&path, [b"KDMV".as_slice(), &[0; 1020]].concat()).unwrap();
    assert!(refusal(&path, None).contains("vmdk"));
    assert!(refusal(&path, Some(Format::Qcow2)).contains("not a qcow2 image"));
    open(&path, Format::Raw);
    std::fs::write(&path, b"QFI\xfb\0\0\0\x03").unwrap();
    assert!(refusal(&path, None).contains("qcow2"));
}

/// As long as it may be written it is marked, so that a process that is killed leaves the mark.
#[test]
fn an_image_that_was_not_closed_is_repaired_before_it_is_written() {
    let (dir, path) = dir();
    let image = create(&path, Format::Qcow2, MIB);
    write(&image, 0, &[7; 65_536]);
    image.flush().unwrap();
    let left = dir.path().join("left");
    std::fs::copy(&path, &left).unwrap();
    let config = ImageConfig {
        path: left,
        format: Some(Format::Qcow2),
        readonly: false,
        cache: Cache::Writeback,
    };
    let again = Image::open(&config).unwrap();
    assert_eq!(read(&again, 0, 65_536), [7; 65_536], "it can be read");
    again.lock().unwrap();
    assert_eq!(read(&again, 0, 65_536), [7; 65_536], "it is repaired");
    drop(again);
    // Who only reads it leaves it as it is.
    std::fs::copy(&path, &config.path).unwrap();
    let config = ImageConfig {
        readonly: true,
        ..config
    };
    Image::open(&config).unwrap().lock().unwrap();
    assert!(std::fs::read(&config.path).unwrap() == std::fs::read(&path).unwrap());
    for close in [Image::unlock, |_: &Image| Ok(())] {
        image.lock().unwrap();
        write(&image, 4096, &[8; 512]);
        close(&image).unwrap();
    }
    drop(image);
    let image = Image::open(&ImageConfig {
        path,
        readonly: false,
        ..config
    })
    .unwrap();
    image.lock().unwrap();
    assert_eq!(read(&image, 4096, 512), [8; 512]);
}

#[test]
fn images_of_unknown_features_say_which() {
    let (_dir, path) = dir();
    drop(create(&path, Format::Qcow2, MIB));
    let good = std::fs::read(&path).unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, image).unwrap();
        refusal(&path, None)
    };
    assert!(with(79, &[2]).contains("corrupt"));
    assert!(with(79, &[4]).contains("external data file"));
    assert!(with(79, &[8]).contains("another method than deflate"));
    assert!(with(79, &[16]).contains("extended L2"));
    assert!(with(72, &[0x80]).contains("feature 63"));
    assert!(with(35, &[2]).contains("encrypted"));
    assert!(with(7, &[4]).contains("version 4"));
    assert!(with(24, &u64::to_be_bytes(MIB + 1)).contains("not a multiple of 512"));
    assert!(with(24, &u64::to_be_bytes(1 << 60)).contains("L1 table"));
    std::fs::write(&path, &good[..65_536]).unwrap();
    assert!(refusal(&path, None).contains("truncated"));
    std::fs::write(&path, &good).unwrap();
    open(&path, Format::Qcow2);
}

#[test]
fn lost_data_at_the_end_is_noticed() {
    let (_dir, path) = dir();
    let image = create(&path, Format::Qcow2, 16 * MIB);
    for n in (0..256).rev() {
        write(&image, n * 65_536, &[1; 512]);
        if n % 16 == 0 {
            image.flush().unwrap();
            assert_eq!(lost_cluster(&image.top().unwrap().file).unwrap(), None);
        }
    }
    drop(image);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len - MIB).unwrap();
    let image = lock(&path, Format::Qcow2);
    let lost = lost_cluster(&image.top().unwrap().file).unwrap();
    assert_eq!(lost, Some((len - 1) / 65_536 * 65_536));
}

#[test]
fn a_size_of_half_a_sector_is_rounded_up() {
    let (_dir, path) = dir();
    std::fs::write(&path, [9; 700]).unwrap();
    let image = lock(&path, Format::Raw);
    assert_eq!(image.capacity(), 1024);
    let sector = read(&image, 512, 512);
    assert_eq!(
        (&sector[..188], &sector[188..]),
        ([9; 188].as_slice(), [0; 324].as_slice())
    );
    write(&image, 512, &[8; 512]);
    assert_eq!(read(&image, 512, 512), [8; 512]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1024);
}

#[test]
fn requests_beyond_the_end_and_to_what_is_readonly_fail() {
    let (_dir, path) = dir();
    for format in [Format::Raw, Format::Qcow2] {
        drop(create(&path, format, MIB));
        let image = lock(&path, format);
        for (offset, len) in [
            (MIB, 1),
            (MIB - 511, 512),
            (u64::MAX, 2),
            (u64::MAX - 511, 512),
        ] {
            let mut bytes = vec![0; len];
            let error = image
                .read_at(&mut [IoSliceMut::new(&mut bytes)], offset)
                .unwrap_err();
            assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
            let error = image.write_at(&[IoSlice::new(&bytes)], offset).unwrap_err();
            assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
            image.discard(offset, len as u64).unwrap_err();
            image.write_zeroes(offset, len as u64, true).unwrap_err();
            image.extent(offset, len as u64, Scope::Chain).unwrap_err();
        }
        assert!(read(&image, MIB, 0).is_empty());
        drop(image);

        let readonly = ImageConfig {
            readonly: true,
            ..config(&path, Some(format))
        };
        let image = Image::open(&readonly).unwrap();
        image.lock().unwrap();
        let before = std::fs::read(&path).unwrap();
        for result in [
            image.write_at(&[IoSlice::new(&[1; 512])], 0),
            image.write_zeroes(0, 512, true),
            image.write_zeroes(0, 512, false),
            image.discard(0, 512),
        ] {
            assert!(matches!(result, Err(Error::ReadOnly { .. })), "{result:?}");
        }
        image.flush().unwrap();
        image.unlock().unwrap();
        drop(image);
        assert!(std::fs::read(&path).unwrap() == before);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_guessed_raw_disk_does_not_become_another_format() {
    let (_dir, path) = dir();
    drop(create(&path, Format::Raw, MIB));
    let image = Image::open(&config(&path, None)).unwrap();
    image.lock().unwrap();
    let header = [b"QFI\xfb".as_slice(), &[1; 1532]].concat();
    let refused = |bufs: &[&[u8]], offset| {
        let bufs: Vec<_> = bufs.iter().map(|buf| IoSlice::new(buf)).collect();
        let error = image.write_at(&bufs, offset).unwrap_err();
        assert!(
            matches!(
                error,
                Error::ForeignHeader {
                    format: "qcow2",
                    ..
                }
            ),
            "{error}"
        );
    };
    refused(&[&header], 0);
    refused(&[&header[..1], &header[1..3], &header[3..600]], 0);
    assert_eq!(read(&image, 0, 2048), [0; 2048]);
    // In two steps it is no better.
    write(&image, 0, b"QFI");
    refused(&[b"\xfb"], 3);
    // All else is written, across the sector too.
    image
        .write_at(&[IoSlice::new(b"abc"), IoSlice::new(&[7; 1021])], 510)
        .unwrap();
    assert_eq!(read(&image, 508, 6), *b"\0\0abc\x07");
    assert_eq!(read(&image, 1533, 2), [7, 0]);
    write(&image, 512, &header);
    drop(image);
    // Who says raw means it.
    write(&lock(&path, Format::Raw), 0, &header);
}

#[test]
fn more_buffers_than_a_system_call_takes_are_split() {
    let (_dir, path) = dir();
    for format in [Format::Raw, Format::Qcow2] {
        let image = create(&path, format, 4 * MIB);
        let bytes: Vec<u8> = (0..3000u32 * 512).map(|n| (n / 512) as u8).collect();
        let bufs: Vec<_> = bytes.chunks(512).map(IoSlice::new).collect();
        image.write_at(&bufs, 512).unwrap();
        let mut back = vec![0xff; bytes.len()];
        let mut bufs: Vec<_> = back.chunks_mut(512).map(IoSliceMut::new).collect();
        image.read_at(&mut bufs, 512).unwrap();
        assert!(back == bytes);
        drop(image);
        std::fs::remove_file(&path).unwrap();
    }
}

/// A block device over a file, taken away at the end.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Option<Loop> {
        let output = Command::new("losetup")
            .args(["-f", "--show", text(path)])
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8(output.stdout).unwrap();
                Some(Loop(name.trim().to_owned()))
            }
            _ => {
                guest_tests::driver::skip("cannot make a loop device; needs root and losetup");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).output();
    }
}

#[test]
fn a_block_device_is_a_raw_disk() {
    let (_dir, path) = dir();
    drop(create(&path, Format::Raw, 4 * MIB));
    let Some(device) = Loop::over(&path) else {
        return;
    };
    for cache in [Cache::Writeback, Cache::None] {
        let image = Image::open(&ImageConfig {
            cache,
            ..config(Path::new(&device.0), Some(Format::Raw))
        });
        let image = image.unwrap();
        assert_eq!(image.capacity(), 4 * MIB);
        image.lock().unwrap();
        write(&image, 512, &[1; 200_000]);
        write(&image, 4 * MIB - 512, &[2; 512]);
        // Aligned and unaligned to its sectors.
        image.write_zeroes(65_536, 65_536, true).unwrap();
        image.write_zeroes(1000, 3, false).unwrap();
        image.discard(4 * MIB - 8192, 4096).unwrap();
        image.flush().unwrap();
        assert_eq!(read(&image, 999, 5), [1, 0, 0, 0, 1]);
        assert_eq!(read(&image, 65_535, 65_538)[1..65_537], [0; 65_536]);
        assert_eq!(read(&image, 4 * MIB - 512, 512), [2; 512]);
        assert_eq!(
            extents(&image, Scope::Chain),
            [(ExtentKind::Data, 0, 4 * MIB)]
        );
    }
}
