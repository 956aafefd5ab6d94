//! What a page costs on one core before it reaches a socket, and after it has left one: zero test, hash, and each encoding both ways.

// criterion's macros make undocumented public items.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::hint::black_box;
use std::sync::Arc;

use common::{BYTES, Contents, PAGES, changed, layout, pages, quick};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use godwit_core::decoder::Wants;
use godwit_core::destination::receiving::{DestinationPages, ReceivingChannel};
use godwit_core::encoder::{ChannelEncoder, OUTPUT_BYTES, ZstdLevel};
use godwit_core::layout::STRIPE_PAGES;
use godwit_core::table::{Page, PageHasher, PageTable, is_zero};
use godwit_core::view::MemoryView;
use godwit_core::{GuestMemory, PAGE_SIZE};
use vm_memory::GuestAddress;

fn page_work(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page");
    group.throughput(Throughput::Bytes(BYTES as u64));
    let (zero, random) = (pages(Contents::Zero), pages(Contents::Random));
    group.bench_function("zero test of zeros", |bench| bench.iter(|| zero.iter().filter(|page| is_zero(page)).count()));
    group.bench_function("zero test of others", |bench| {
        bench.iter(|| random.iter().filter(|page| is_zero(page)).count())
    });
    let hasher = PageHasher::new(1, true);
    let table = PageTable::new(&layout(BYTES as u64));
    group.bench_function("hash and table", |bench| {
        bench.iter(|| {
            random.iter().enumerate().fold(0u64, |sum, (slot, page)| {
                sum.wrapping_add(table.set(slot, hasher.page(slot as u64, page)).growth)
            })
        });
    });
}

/// Pages, and what was last sent of them, if that is known.
struct Case {
    name: &'static str,
    zstd: Option<ZstdLevel>,
    pages: Vec<Page>,
    bases: Option<Vec<Page>>,
}

fn cases() -> Vec<Case> {
    let plain = |name, contents| Case { name, zstd: None, pages: pages(contents), bases: None };
    let zstd = |name, level| Case { zstd: Some(ZstdLevel(level)), ..plain(name, Contents::Compressible) };
    let bases = pages(Contents::Random);
    let zeros = pages(Contents::Zero);
    let sparse = |name, words| Case { name, zstd: None, pages: changed(&zeros, words), bases: None };
    let built = |name, words| Case { name, zstd: None, pages: changed(&bases, words), bases: Some(bases.clone()) };
    vec![
        plain("zero", Contents::Zero),
        sparse("sparse, 1 word set", 1),
        sparse("sparse, 40 words set", 40),
        plain("raw", Contents::Random),
        zstd("zstd -5", -5),
        zstd("zstd 1", 1),
        zstd("zstd 3", 3),
        built("same", 0),
        built("delta, 1 word changed", 1),
        built("delta, 64 words changed", 64),
        // Longer than what is worth sending: found out, and sent as it is.
        built("delta, all words changed", PAGE_SIZE / 8),
    ]
}

/// Encodes all of them. Bytes come out as a socket would get them.
fn encode(encoder: &mut ChannelEncoder, pages: &[Page], bases: Option<&[Page]>, mut out: impl FnMut(&[u8])) {
    for (stripe, pages) in pages.chunks(STRIPE_PAGES).enumerate() {
        let first = stripe * STRIPE_PAGES;
        encoder.begin_stripe(first as u64);
        for (offset, page) in pages.iter().enumerate() {
            let copy = |copy: &mut Page| *copy = *page;
            black_box(match bases {
                None => encoder.page(offset, copy),
                Some(bases) => encoder.page_with_base(offset, &bases[first + offset], copy),
            });
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

fn stream(case: &Case, bases: Option<&[Page]>, pages: &[Page]) -> Vec<u8> {
    let mut stream = Vec::new();
    encode(&mut ChannelEncoder::new(case.zstd).unwrap(), pages, bases, |bytes| stream.extend_from_slice(bytes));
    stream
}

fn encodings(criterion: &mut Criterion) {
    let cases = cases();
    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Bytes(BYTES as u64));
    for case in &cases {
        let mut encoder = ChannelEncoder::new(case.zstd).unwrap();
        group.bench_function(case.name, |bench| {
            bench.iter(|| {
                encode(&mut encoder, &case.pages, case.bases.as_deref(), |bytes| {
                    black_box(bytes);
                })
            })
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("decode and apply");
    group.throughput(Throughput::Bytes(BYTES as u64));
    // Of pages that are the same nothing arrives.
    for case in cases.iter().filter(|case| case.name != "same") {
        let destination = destination();
        let mut channel = ReceivingChannel::new(&destination, 0, 1).unwrap();
        if let Some(bases) = &case.bases {
            apply(&mut channel, &destination, &stream(case, None, bases));
        }
        let stream = stream(case, case.bases.as_deref(), &case.pages);
        // Applied once more nothing changes: a difference says what words are now.
        group.bench_function(case.name, |bench| bench.iter(|| apply(&mut channel, &destination, &stream)));
    }
}

fn destination() -> DestinationPages {
    let layout = Arc::new(layout((PAGES * PAGE_SIZE) as u64));
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), BYTES)]).unwrap();
    DestinationPages {
        table: PageTable::new(&layout),
        view: MemoryView::new(memory, layout).unwrap(),
        hasher: PageHasher::new(1, true),
    }
}

/// Does with a stream what a receiving thread does.
fn apply(channel: &mut ReceivingChannel, pages: &DestinationPages, mut stream: &[u8]) {
    while !stream.is_empty() {
        let (count, received) = match channel.wants() {
            Wants::Bytes(count) => (count, channel.handle_bytes(pages, &stream[..count])),
            Wants::Pages { slot, pages: run } => {
                let count = run * PAGE_SIZE;
                pages.view.pages(slot, run).copy_from(&stream[..count]);
                (count, channel.handle_pages(pages))
            }
            Wants::Nothing => unreachable!("the stream has no end"),
        };
        black_box(received.unwrap());
        stream = &stream[count..];
    }
}

criterion_group! { name = benches; config = quick(); targets = page_work, encodings }
criterion_main!(benches);
