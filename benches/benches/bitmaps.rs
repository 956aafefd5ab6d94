//! Work on dirty bits, on one core: harvests and visits, at several densities, and of memory so large that little else matters.

// criterion's macros make undocumented public items.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::hint::black_box;

use common::{layout, quick};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use godwit_core::layout::Layout;
use godwit_core::pending::{Harvester, Pending};
use godwit_core::{DirtyLog, GuestMemory, MachineError};
use vm_memory::{Bytes, GuestAddress};

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// A log as the kernel keeps it: copied out whole, whatever is set in it.
struct Log(Vec<u64>);

impl Log {
    /// In every 64 pages so many are dirty; in every 512, with less than one in 64.
    fn new(layout: &Layout, dirty: Dirty) -> Self {
        let words = layout.stripes() * 8;
        Self((0..words).map(|index| if index % dirty.every_words == 0 { dirty.word } else { 0 }).collect())
    }
}

impl DirtyLog for Log {
    fn start(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn stop(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn harvest(&self, _: usize, words: &mut [u64]) -> Result<(), MachineError> {
        words.iter_mut().zip(&self.0).for_each(|(word, dirty)| *word |= dirty);
        Ok(())
    }
    fn clear(&self, _: usize, _: u64, _: &[u64]) -> Result<(), MachineError> {
        Ok(())
    }
}

/// Every so many words of the log this one.
#[derive(Clone, Copy)]
struct Dirty {
    every_words: usize,
    word: u64,
}

const DENSITIES: [(&str, Dirty); 5] = [
    ("idle", Dirty { every_words: 1, word: 0 }),
    ("1 in 4096 dirty", Dirty { every_words: 64, word: 1 }),
    ("1 in 64 dirty", Dirty { every_words: 1, word: 1 }),
    ("half dirty", Dirty { every_words: 1, word: 0x5555_5555_5555_5555 }),
    ("all dirty", Dirty { every_words: 1, word: u64::MAX }),
];

/// Takes all that is pending, as the worker of an only channel does.
fn visit_all(pending: &Pending) {
    let mut from = 0;
    while let Some(stripe) = pending.next(from, 1) {
        black_box(pending.take(stripe));
        from = stripe + 1;
    }
}

fn one_gib(criterion: &mut Criterion) {
    let layout = layout(GIB);
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), GIB as usize)]).unwrap();
    let pending = Pending::new(&layout);
    let mut harvester = Harvester::new(&layout);
    let mut group = criterion.benchmark_group("1 GiB");
    for (name, dirty) in DENSITIES {
        let log = Log::new(&layout, dirty);
        group.bench_function(format!("harvest, {name}"), |bench| {
            bench.iter_batched(
                || visit_all(&pending),
                |()| harvester.harvest(&layout, &log, &memory, &pending).unwrap(),
                BatchSize::PerIteration,
            );
        });
        group.bench_function(format!("count and visit, {name}"), |bench| {
            bench.iter_batched(
                || harvester.harvest(&layout, &log, &memory, &pending).unwrap(),
                |_| {
                    black_box(pending.count());
                    visit_all(&pending);
                },
                BatchSize::PerIteration,
            );
        });
    }
}

/// All that a round without a dirty page does to bits, but for the kernel's own copy of the log; and one with a few.
fn rounds_of_a_tebibyte(criterion: &mut Criterion) {
    let layout = layout(TIB);
    // Nobody touches it: only its bitmap takes up memory.
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), TIB as usize)]).unwrap();
    let pending = Pending::new(&layout);
    let mut harvester = Harvester::new(&layout);
    let log = Log::new(&layout, Dirty { every_words: 1, word: 0 });
    let mut group = criterion.benchmark_group("round over 1 TiB");
    for (name, vmm_writes) in [("idle", 0u64), ("1000 pages written by devices", 1000)] {
        group.bench_function(name, |bench| {
            bench.iter_batched(
                || (0..vmm_writes).for_each(|page| memory.write_obj(0u8, GuestAddress(page << 29)).unwrap()),
                |()| {
                    visit_all(&pending);
                    let added = harvester.harvest(&layout, &log, &memory, &pending).unwrap();
                    black_box((added, pending.count()))
                },
                BatchSize::PerIteration,
            );
        });
    }
}

criterion_group! { name = benches; config = quick(); targets = one_gib, rounds_of_a_tebibyte }
criterion_main!(benches);
