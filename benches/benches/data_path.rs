//! The parts of the data path, each on one core: what a page costs before it reaches a socket, and after it has left one.

// criterion's macros make undocumented public items.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use godwit_core::decoder::{ChannelDecoder, Wants};
use godwit_core::encoder::{ChannelEncoder, OUTPUT_BYTES, ZstdLevel};
use godwit_core::layout::Layout;
use godwit_core::machine::RegionDescription;
use godwit_core::pacer::Pacer;
use godwit_core::pending::{Harvester, Pending};
use godwit_core::table::{Page, PageHasher, PageTable, is_zero};
use godwit_core::{DirtyLog, GuestMemory, MachineError, PAGE_SIZE};
use vm_memory::GuestAddress;

const STRIPES: usize = 16;
const PAGES: usize = STRIPES * 512;
const GIB: u64 = 1 << 30;

fn layout(bytes: u64) -> Layout {
    Layout::new(&[RegionDescription { guest_address: 0, size_bytes: bytes }]).unwrap()
}

/// Pages of one kind: `zero`, `random`, or `compressible` (about 4:1).
fn pages(kind: &str) -> Vec<Page> {
    let mut x = 1u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let mut pages = vec![[0; PAGE_SIZE]; PAGES];
    for word in pages.as_flattened_mut().chunks_exact_mut(8) {
        match kind {
            "random" => word.copy_from_slice(&next().to_le_bytes()),
            "compressible" => word[..2].copy_from_slice(&next().to_le_bytes()[..2]),
            _ => {}
        }
    }
    pages
}

fn encode(encoder: &mut ChannelEncoder, pages: &[Page], mut out: impl FnMut(&[u8])) {
    for (stripe, pages) in pages.chunks(512).enumerate() {
        encoder.begin_stripe(stripe as u64 * 512);
        for (offset, page) in pages.iter().enumerate() {
            black_box(encoder.page(offset, |copy| *copy = *page));
            if encoder.output_bytes() >= OUTPUT_BYTES {
                out(encoder.bytes());
                encoder.clear();
            }
        }
        encoder.end_stripe();
    }
    out(encoder.bytes());
    encoder.clear();
}

fn page_work(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page");
    group.throughput(Throughput::Bytes((PAGES * PAGE_SIZE) as u64));
    let (zero, random) = (pages("zero"), pages("random"));
    group.bench_function("zero test of zeros", |bench| bench.iter(|| zero.iter().filter(|page| is_zero(page)).count()));
    group.bench_function("zero test of others", |bench| {
        bench.iter(|| random.iter().filter(|page| is_zero(page)).count())
    });
    let hasher = PageHasher::new(1, true);
    let layout = layout((PAGES * PAGE_SIZE) as u64);
    let table = PageTable::new(&layout);
    group.bench_function("hash and table", |bench| {
        bench.iter(|| {
            random.iter().enumerate().fold(0u64, |sum, (slot, page)| {
                sum.wrapping_add(table.set(slot, hasher.page(slot as u64, page)).growth)
            })
        });
    });
}

fn encodings(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Bytes((PAGES * PAGE_SIZE) as u64));
    group.measurement_time(Duration::from_secs(3));
    for (name, kind, zstd) in
        [("zero", "zero", None), ("raw", "random", None), ("zstd 1", "compressible", Some(ZstdLevel(1)))]
    {
        let pages = pages(kind);
        let mut encoder = ChannelEncoder::new(zstd).unwrap();
        group.bench_function(name, |bench| {
            bench.iter(|| {
                encode(&mut encoder, &pages, |bytes| {
                    black_box(bytes);
                })
            })
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Bytes((PAGES * PAGE_SIZE) as u64));
    group.measurement_time(Duration::from_secs(3));
    let layout = layout((PAGES * PAGE_SIZE) as u64);
    for (name, kind, zstd) in
        [("zero", "zero", None), ("raw, headers only", "random", None), ("zstd 1", "compressible", Some(ZstdLevel(1)))]
    {
        let mut stream = Vec::new();
        encode(&mut ChannelEncoder::new(zstd).unwrap(), &pages(kind), |bytes| stream.extend_from_slice(bytes));
        group.bench_function(name, |bench| {
            bench.iter(|| {
                let mut decoder = ChannelDecoder::new(Arc::new(layout.clone()), 0, 1).unwrap();
                let mut rest = &stream[..];
                while !rest.is_empty() {
                    match decoder.wants() {
                        Wants::Bytes(count) => {
                            black_box(decoder.handle_bytes(&rest[..count]).unwrap());
                            rest = &rest[count..];
                        }
                        Wants::Pages { pages, .. } => {
                            black_box(decoder.handle_pages().unwrap());
                            rest = &rest[pages * PAGE_SIZE..];
                        }
                        Wants::Nothing => break,
                    }
                }
            });
        });
    }
}

/// A log in which every n-th page is dirty.
struct Sparse(u64);

impl DirtyLog for Sparse {
    fn start(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn stop(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn harvest(&self, _: usize, words: &mut [u64]) -> Result<(), MachineError> {
        words.iter_mut().for_each(|word| *word |= self.0);
        Ok(())
    }
    fn clear(&self, _: usize, _: u64, _: &[u64]) -> Result<(), MachineError> {
        Ok(())
    }
}

fn take_all(layout: &Layout, pending: &Pending) {
    for stripe in 0..layout.stripes() {
        black_box(pending.take(stripe));
    }
}

fn bitmaps(criterion: &mut Criterion) {
    let layout = layout(GIB);
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), GIB as usize)]).unwrap();
    let pending = Pending::new(&layout);
    let mut harvester = Harvester::new(&layout);
    let mut group = criterion.benchmark_group("harvest of 1 GiB");
    for (name, word) in [("idle", 0), ("1 in 64 dirty", 1), ("all dirty", u64::MAX)] {
        group.bench_function(name, |bench| {
            bench.iter_batched(
                || take_all(&layout, &pending),
                |()| harvester.harvest(&layout, &Sparse(word), &memory, &pending).unwrap(),
                BatchSize::PerIteration,
            );
        });
    }
    group.bench_function("count and take, all dirty", |bench| {
        bench.iter_batched(
            || pending.fill(&layout),
            |()| {
                black_box(pending.count());
                take_all(&layout, &pending);
            },
            BatchSize::PerIteration,
        );
    });
}

fn pacing(criterion: &mut Criterion) {
    let mut pacer = Pacer::new(Some(125_000_000));
    let mut now = Duration::ZERO;
    criterion.bench_function("pacing of one write", |bench| {
        bench.iter(|| {
            now += pacer.delay(now);
            pacer.charge(now, black_box(100_000));
        });
    });
}

criterion_group!(benches, page_work, encodings, bitmaps, pacing);
criterion_main!(benches);
