//! A page that was sent before, as what differs: words and their places, as Godwit sends it, against zstd with the old page as prefix.

// criterion's macros make undocumented public items.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::hint::black_box;

use common::{Contents, changed, pages, quick};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use godwit_core::PAGE_SIZE;
use godwit_core::encoder::ChannelEncoder;
use godwit_core::layout::STRIPE_PAGES;
use godwit_core::table::Page;
use zstd::zstd_safe::{CCtx, CParameter};

/// A stripe's worth is enough: the caches are warm in a round, too.
const COUNT: usize = STRIPE_PAGES;

/// The old pages with what is between two of their bytes moved by a few: what a list looks like after an insertion.
fn shifted(bases: &[Page]) -> Vec<Page> {
    let mut pages = bases.to_vec();
    for page in &mut pages {
        page.copy_within(512..2048, 524);
    }
    pages
}

fn words(encoder: &mut ChannelEncoder, pages: &[Page], bases: &[Page]) -> usize {
    encoder.begin_stripe(0);
    for (offset, (page, base)) in pages.iter().zip(bases).enumerate() {
        encoder.page_with_base(offset, base, |copy: &mut Page| *copy = *page);
    }
    encoder.end_stripe();
    let bytes = encoder.bytes().len();
    encoder.clear();
    bytes
}

fn zstd<'b>(context: &mut CCtx<'b>, pages: &[Page], bases: &'b [Page], out: &mut Vec<u8>) -> usize {
    pages
        .iter()
        .zip(bases)
        .map(|(page, base)| {
            // A prefix holds for one frame.
            context.ref_prefix(base).unwrap();
            out.clear();
            context.compress2(out, page).unwrap()
        })
        .sum()
}

fn differences(criterion: &mut Criterion) {
    let bases = &pages(Contents::Random)[..COUNT];
    let texts = &pages(Contents::Compressible)[..COUNT];
    let cases = [
        ("1 word", bases, changed(bases, 1)),
        ("16 words", bases, changed(bases, 16)),
        ("128 words", bases, changed(bases, 128)),
        ("256 words of compressible", texts, changed(texts, 256)),
        ("shifted by 12 bytes", bases, shifted(bases)),
    ];
    let mut group = criterion.benchmark_group("differences");
    group.throughput(Throughput::Bytes((COUNT * PAGE_SIZE) as u64));
    let mut encoder = ChannelEncoder::new(None).unwrap();
    let mut out = Vec::with_capacity(2 * PAGE_SIZE);
    for (name, bases, pages) in &cases {
        let bytes = words(&mut encoder, pages, bases) / COUNT;
        group.bench_function(format!("{name}: words, {bytes} bytes a page"), |bench| {
            bench.iter(|| black_box(words(&mut encoder, pages, bases)))
        });
        for level in [-5, 1] {
            let mut context = CCtx::create();
            context.set_parameter(CParameter::CompressionLevel(level)).unwrap();
            let bytes = zstd(&mut context, pages, bases, &mut out) / COUNT;
            group.bench_function(format!("{name}: zstd {level} with prefix, {bytes} bytes a page"), |bench| {
                bench.iter(|| black_box(zstd(&mut context, pages, bases, &mut out)))
            });
        }
    }
}

criterion_group! { name = benches; config = quick(); targets = differences }
criterion_main!(benches);
