use super::*;
use proptest::prelude::*;

const SETTINGS: [Setting; 4] = [
    Setting::Lz4,
    Setting::Zstd(ZstdLevel(1)),
    Setting::Zstd(ZstdLevel(3)),
    Setting::Zstd(ZstdLevel(20)),
];

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Words of a few letters, some of them often.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(len + 10);
    for byte in noise(seed, len) {
        let word = u64::from(byte.min(100)).wrapping_mul(0x1234_5678_9abc_def1);
        text.extend(word.to_le_bytes().map(|byte| b'a' + byte % 26));
        text.push(b' ');
        if text.len() >= len {
            break;
        }
    }
    text.truncate(len);
    text
}

fn compressor(setting: Setting) -> Compressor {
    Compressor::new(setting).unwrap().unwrap()
}

fn there_and_back(compressor: &mut Compressor, block: &[u8]) -> usize {
    let mut data = vec![1, 2, 3];
    let len = compressor.compress(block, &mut data);
    assert_eq!(data.len(), 3 + len);
    assert!(len <= block.len());
    let mut back = vec![0xee; block.len()];
    Decompressor::default()
        .decompress(
            compressor.setting().method().unwrap(),
            &data[3..],
            &mut back,
        )
        .unwrap();
    assert!(back == block);
    len
}

#[test]
fn blocks_come_back_whatever_their_length_and_contents() {
    for setting in SETTINGS {
        let mut compressor = compressor(setting);
        for pages in 1..=BLOCK_PAGES as usize {
            let len = pages * PAGE_SIZE as usize;
            assert!(there_and_back(&mut compressor, &text(1, len)) < len / 2);
            assert!(there_and_back(&mut compressor, &vec![7; len]) < len / 50);
            // What doesn't get shorter is left as it is.
            assert_eq!(there_and_back(&mut compressor, &noise(1, len)), len);
        }
    }
}

#[test]
fn nothing_is_prepared_when_it_is_off() {
    assert!(Compressor::new(Setting::Off).unwrap().is_none());
    assert_eq!(Setting::default(), Setting::Off);
}

#[test]
fn levels_and_codes_are_in_range() {
    for (level, fits) in [(0, false), (1, true), (20, true), (21, false), (257, false)] {
        assert_eq!(ZstdLevel::new(level).is_ok(), fits, "{level}");
    }
    assert_eq!(ZstdLevel::default().get(), 1);
    for code in 0..=255 {
        match Method::from_code(code) {
            Some(method) => assert_eq!(method.code(), code),
            None => assert!(!matches!(code, 1 | 2)),
        }
    }
}

/// A peer's block says by itself how long it gets; that is not believed.
#[test]
fn a_block_of_another_length_is_refused() {
    let mut decompressor = Decompressor::default();
    for setting in SETTINGS {
        let method = setting.method().unwrap();
        let mut data = vec![];
        compressor(setting).compress(&text(2, 8192), &mut data);
        for expected in [0, 1, 4096, 8191, 8193, 65536] {
            let mut block = vec![0; expected];
            let error = decompressor.decompress(method, &data, &mut block);
            assert!(error.is_err(), "{setting:?} as {expected} bytes");
        }
        // And what follows a bad block is none the worse for it.
        let mut block = vec![0; 8192];
        decompressor.decompress(method, &data, &mut block).unwrap();
        assert!(block == text(2, 8192));
    }
}

/// 64 MiB of zeroes in a few KiB: nothing is written past the block.
#[test]
fn a_bomb_is_refused() {
    let zeroes = vec![0; 64 << 20];
    let bombs = [
        (Method::Lz4, lz4_flex::block::compress(&zeroes)),
        (Method::Zstd, zstd::bulk::compress(&zeroes, 19).unwrap()),
    ];
    for (method, bomb) in bombs {
        let mut block = vec![0; MAX_BLOCK];
        let error = Decompressor::default()
            .decompress(method, &bomb, &mut block)
            .unwrap_err();
        let expected = matches!(
            (method, &error),
            (
                Method::Lz4,
                DecompressError::Lz4 {
                    expected: MAX_BLOCK,
                    ..
                }
            ) | (
                Method::Zstd,
                DecompressError::Zstd {
                    expected: MAX_BLOCK,
                    ..
                }
            )
        );
        assert!(expected, "{error}");
    }
}

/// A frame that asks for a window of 128 MiB to be kept is decoded without one.
#[test]
fn no_window_is_allocated_for_a_peer() {
    use zstd::zstd_safe::CParameter;
    let mut zstd = zstd::bulk::Compressor::new(1).unwrap();
    zstd.set_parameter(CParameter::WindowLog(27)).unwrap();
    zstd.set_parameter(CParameter::ContentSizeFlag(false))
        .unwrap();
    let data = zstd.compress(&text(3, 4096)).unwrap();
    let mut block = vec![0; 4096];
    Decompressor::default()
        .decompress(Method::Zstd, &data, &mut block)
        .unwrap();
    assert!(block == text(3, 4096));
}

proptest! {
    #[test]
    fn anything_may_come(
        data in prop::collection::vec(any::<u8>(), 0..300),
        zstd in any::<bool>(),
        pages in 1..=16usize,
    ) {
        let method = if zstd { Method::Zstd } else { Method::Lz4 };
        let mut block = vec![0; pages * 4096];
        let _ = Decompressor::default().decompress(method, &data, &mut block);
    }

    #[test]
    fn damage_is_refused_or_seen_by_the_checksum(
        which in 0..4usize,
        at in any::<prop::sample::Index>(),
        flip in 1..=255u8,
        cut in any::<bool>(),
    ) {
        let setting = SETTINGS[which];
        let original = text(4, 3 * 4096);
        let mut data = vec![];
        compressor(setting).compress(&original, &mut data);
        let at = at.index(data.len());
        if cut {
            data.truncate(at);
        } else {
            data[at] ^= flip;
        }
        let mut block = vec![0; original.len()];
        let method = setting.method().unwrap();
        if Decompressor::default().decompress(method, &data, &mut block).is_ok() && block != original {
            prop_assert_ne!(crc32fast::hash(&block), crc32fast::hash(&original));
        }
    }
}
