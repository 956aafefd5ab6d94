//! The whole engine, both ends with their threads, over a transport that stays in the process; and its pacing.
//!
//! A move of 64 MiB of random contents into fresh memory, of a machine that stands still: what remains is the engine's own work, from the
//! handshake to *running*, and the first touch of the destination's memory.

// criterion's macros make undocumented public items.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod link;
#[path = "../../../core/examples/toy_vmm.rs"]
#[allow(dead_code)]
mod toy_vmm;

use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::quick;
use criterion::{BatchSize, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use godwit_core::destination::{DestinationOptions, DestinationOutcome, receive};
use godwit_core::pacer::Pacer;
use godwit_core::progress::Silent;
use godwit_core::source::{Compression, SourceMigration, SourceOptions, SourceOutcome};
use godwit_core::{GuestMemory, SourceMachine};
use toy_vmm::{MEMORY_BYTES, ToyHost, ToyMachine};
use vm_memory::{Bytes, GuestAddress};

const LIMIT: Duration = Duration::from_secs(30);

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

/// A machine that stands still, full of random contents.
fn machine() -> Arc<ToyMachine> {
    let machine = ToyMachine::new().unwrap();
    let memory: GuestMemory = SourceMachine::memory(&machine);
    let mut contents = vec![0; MEMORY_BYTES];
    fastrand::Rng::with_seed(1).fill(&mut contents);
    memory.write_slice(&contents, GuestAddress(0)).unwrap();
    Arc::new(machine)
}

/// Moves the machine and gives what arrived, so that taking it down is not measured.
fn move_it(machine: &Arc<ToyMachine>, options: SourceOptions) -> ToyMachine {
    let (dial, control, mut data) = link::link();
    let destination = thread::spawn(move || {
        let control = control.recv_timeout(LIMIT).unwrap();
        receive(control, &mut data, &mut ToyHost, &DestinationOptions::default(), Arc::new(Silent))
    });
    let outcome = SourceMigration::start(Arc::clone(machine) as _, dial, options, Arc::new(Silent)).wait();
    assert!(matches!(&*outcome, SourceOutcome::Moved(_)), "{outcome:?}");
    match destination.join().unwrap() {
        DestinationOutcome::Owned { machine, .. } => machine,
        DestinationOutcome::Ended(why) | DestinationOutcome::Dropped(why) => panic!("{why}"),
    }
}

fn moves(criterion: &mut Criterion) {
    let machine = machine();
    let mut group = criterion.benchmark_group("engine");
    group.throughput(Throughput::Bytes(MEMORY_BYTES as u64)).sampling_mode(SamplingMode::Flat);
    for (name, channels, verify) in
        [("1 channel", 1, true), ("1 channel, not verified", 1, false), ("4 channels", 4, true)]
    {
        let options = SourceOptions { channels, verify, compression: Compression::None, ..SourceOptions::default() };
        group.bench_function(name, |bench| {
            bench.iter_batched(|| options.clone(), |options| move_it(&machine, options), BatchSize::PerIteration);
        });
    }
}

criterion_group! { name = benches; config = quick(); targets = pacing, moves }
criterion_main!(benches);
