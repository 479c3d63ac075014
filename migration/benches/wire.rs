//! What is done with every frame: its header and its body, at both ends.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use migration::frame::{Header, Kind, MAX_PAGES};
use migration::layout::PAGE_SIZE;
use migration::message::{AddressRun, decode_pages, decode_zero, encode_pages, encode_zero};

/// Pages of a frame.
const PAGES: u64 = MAX_PAGES;

fn header(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame header");
    let header = Header {
        kind: Kind::Pages,
        sequence: 7,
        body_len: 2064,
        payload_len: (PAGES * PAGE_SIZE) as u32,
        body_crc: 0x1234_5678,
    };
    let bytes = header.encode();
    group.bench_function("encode", |bencher| {
        bencher.iter(|| black_box(&header).encode())
    });
    group.bench_function("decode", |bencher| {
        bencher.iter(|| Header::decode(black_box(&bytes)))
    });
    group.finish();
}

/// `count` runs of so many pages, with gaps.
fn runs(count: u64, pages: u64) -> Vec<AddressRun> {
    let address = |run| run * 2 * pages * PAGE_SIZE;
    (0..count)
        .map(|run| AddressRun {
            address: address(run),
            pages,
        })
        .collect()
}

fn pages(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pages body");
    group.throughput(Throughput::Elements(PAGES));
    let crcs: Vec<u32> = (0..PAGES as u32).collect();
    let payload = (PAGES * PAGE_SIZE) as u32;
    for (name, runs) in [
        ("one run", runs(1, PAGES)),
        ("single pages", runs(PAGES, 1)),
    ] {
        let mut body = Vec::new();
        group.bench_function(format!("encode, {name}"), |bencher| {
            bencher.iter(|| encode_pages(black_box(&runs), &crcs, &mut body));
        });
        encode_pages(&runs, &crcs, &mut body);
        let (mut found, mut sums) = (Vec::new(), Vec::new());
        group.bench_function(format!("decode, {name}"), |bencher| {
            bencher.iter(|| decode_pages(black_box(&body), payload, true, &mut found, &mut sums));
        });
        group.bench_function(format!("checksum, {name}"), |bencher| {
            bencher.iter(|| crc32fast::hash(black_box(&body)));
        });
    }
    group.finish();
}

fn zero(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zero body");
    let runs = runs(PAGES, 3);
    group.throughput(Throughput::Elements(PAGES));
    let mut body = Vec::new();
    group.bench_function("encode", |bencher| {
        bencher.iter(|| encode_zero(black_box(&runs), &mut body));
    });
    encode_zero(&runs, &mut body);
    let mut found = Vec::new();
    group.bench_function("decode", |bencher| {
        bencher.iter(|| decode_zero(black_box(&body), &mut found));
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    header(&mut criterion);
    pages(&mut criterion);
    zero(&mut criterion);
    criterion.final_summary();
}
