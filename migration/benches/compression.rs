//! Compressing pages, and making them whole again: for each method, of memory that gains and that
//! doesn't.

use std::hint::black_box;

use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, measurement::WallTime};
use guest_tests::dirtier::Data;
use guest_tests::page;
use migration::compression::{
    BLOCK_PAGES, Compressor, Decompressor, MAX_BLOCK, Setting, ZstdLevel,
};

/// Blocks that are gone over at once: 16 MiB of pages, more than caches hold.
const BLOCKS: u64 = 256;

fn blocks(data: Data) -> Vec<Vec<u8>> {
    let mut words = [0; 512];
    let block = |block| {
        let mut bytes = Vec::with_capacity(MAX_BLOCK);
        for number in block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES {
            page::write(&mut words, data, number, 1);
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
        bytes
    };
    (0..BLOCKS).map(block).collect()
}

fn both_ways(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    setting: Setting,
    blocks: &[Vec<u8>],
) {
    let Ok(Some(mut compressor)) = Compressor::new(setting) else {
        return;
    };
    let Some(method) = setting.method() else {
        return;
    };
    let mut out = Vec::with_capacity(MAX_BLOCK);
    group.bench_function(BenchmarkId::new("compress", name), |bencher| {
        bencher.iter(|| {
            for block in blocks {
                out.clear();
                black_box(compressor.compress(block, &mut out));
            }
        });
    });
    let compressed: Vec<Vec<u8>> = blocks
        .iter()
        .map(|block| {
            let mut out = Vec::new();
            compressor.compress(block, &mut out);
            out
        })
        .collect();
    let mut decompressor = Decompressor::default();
    let mut whole = vec![0; MAX_BLOCK];
    group.bench_function(BenchmarkId::new("decompress", name), |bencher| {
        bencher.iter(|| {
            for data in &compressed {
                let _ = black_box(decompressor.decompress(method, data, &mut whole));
            }
        });
    });
}

fn compression(criterion: &mut Criterion) {
    for (data, name) in [(Data::Text, "text"), (Data::Random, "random")] {
        let blocks = blocks(data);
        let mut group = criterion.benchmark_group(format!("{name} in blocks of 64 KiB"));
        group.throughput(Throughput::Bytes(BLOCKS * MAX_BLOCK as u64));
        both_ways(&mut group, "lz4", Setting::Lz4, &blocks);
        for level in [1, 3] {
            let Ok(level) = ZstdLevel::new(level) else {
                continue;
            };
            let name = format!("zstd {}", level.get());
            both_ways(&mut group, &name, Setting::Zstd(level), &blocks);
        }
        group.finish();
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    compression(&mut criterion);
    criterion.final_summary();
}
