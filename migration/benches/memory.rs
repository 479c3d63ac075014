//! What is done with every page of the guest: is it zero, its checksum, and the set of dirty pages.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use migration::bitmap::PageBitmap;
use migration::guest_io::GuestPages;
use migration::layout::{GuestRam, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

/// Pages that are gone over at once: more than caches hold.
const PAGES: u64 = 16_384;

/// Pages of a guest of 16 GiB.
const LARGE: u64 = 1 << 22;

/// Memory of which every page differs from zero in that byte, or in none.
fn memory(nonzero: Option<u64>) -> Result<GuestPages, Box<dyn std::error::Error>> {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), (PAGES * PAGE_SIZE) as usize)])?;
    for page in 0..PAGES {
        // Written in any case: memory that was never touched is all one page to the host.
        let at = GuestAddress(page * PAGE_SIZE + nonzero.unwrap_or(0));
        ram.write_obj(u8::from(nonzero.is_some()), at)?;
    }
    Ok(GuestPages::new(ram)?)
}

fn zero_check(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zero check");
    group.throughput(Throughput::Bytes(PAGES * PAGE_SIZE));
    for (name, nonzero) in [
        ("zero", None),
        ("first byte", Some(0)),
        ("last byte", Some(PAGE_SIZE - 1)),
    ] {
        let memory = match memory(nonzero) {
            Ok(memory) => memory,
            Err(error) => unusable(&*error),
        };
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| (0..PAGES).filter(|page| memory.is_zero(*page)).count());
        });
    }
    group.finish();
}

fn crc(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page checksum");
    group.throughput(Throughput::Bytes(PAGES * PAGE_SIZE));
    let memory = match memory(Some(0)) {
        Ok(memory) => memory,
        Err(error) => unusable(&*error),
    };
    group.bench_function("crc32", |bencher| {
        bencher.iter(|| (0..PAGES).fold(0, |all, page| all ^ memory.crc(page)));
    });
    group.finish();
}

fn bitmap(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bitmap of 16 GiB");
    group.throughput(Throughput::Elements(LARGE));
    // Words as KVM gives them: one page in 64, and runs of 32.
    for (name, word) in [("sparse", 1), ("half", 0xffff_ffff)] {
        let words = vec![word; (LARGE / 64) as usize];
        group.bench_function(BenchmarkId::new("harvest", name), |bencher| {
            let mut dirty = PageBitmap::new(LARGE);
            bencher.iter(|| dirty.or_words(0, black_box(&words)));
        });
        let mut dirty = PageBitmap::new(LARGE);
        dirty.or_words(0, &words);
        group.bench_function(BenchmarkId::new("count", name), |bencher| {
            bencher.iter(|| black_box(&dirty).count());
        });
        group.bench_function(BenchmarkId::new("runs", name), |bencher| {
            bencher.iter(|| {
                let runs = black_box(&dirty).runs(0, LARGE, 256);
                runs.map(|run| run.count).sum::<u64>()
            });
        });
    }
    // As a pass does: it protects and sends 2 MiB after the other.
    for (name, set) in [
        ("none", PageBitmap::new(LARGE)),
        ("all", PageBitmap::full(LARGE)),
    ] {
        group.bench_function(
            BenchmarkId::new("runs, 512 pages at a time", name),
            |bencher| {
                bencher.iter(|| {
                    let ranges = (0..LARGE).step_by(512);
                    let runs = ranges.flat_map(|first| black_box(&set).runs(first, 512, 256));
                    runs.map(|run| run.count).sum::<u64>()
                });
            },
        );
    }
    let empty = PageBitmap::new(LARGE);
    group.bench_function("next of none", |bencher| {
        bencher.iter(|| black_box(&empty).next_set(0));
    });
    group.finish();
}

/// There is nothing to measure without memory.
#[expect(clippy::panic, reason = "a benchmark has nobody to return an error to")]
fn unusable(error: &dyn std::error::Error) -> ! {
    panic!("memory for the benchmark: {error}")
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    zero_check(&mut criterion);
    crc(&mut criterion);
    bitmap(&mut criterion);
    criterion.final_summary();
}
