//! A first pass over real sockets, beside what bare TCP and bare quinn take for the same bytes into memory prepared in the same way.
//!
//! The machine stands still and is full of random contents. Its time counts from the first page until the destination is ready to run it:
//! everything has been hashed at both ends by then, unless the move is not verified, and the hashes compared.

// criterion's macros make undocumented public items.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "../../core/examples/toy_vmm.rs"]
#[allow(dead_code)]
mod toy_vmm;

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::quick;
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use godwit_benches::raw::{RawQuinn, RawTcp};
use godwit_core::destination::{DestinationOptions, DestinationOutcome, receive};
use godwit_core::phase::Phase;
use godwit_core::progress::{Event, Observer, Silent};
use godwit_core::source::{Compression, SourceMigration, SourceOptions, SourceOutcome};
use godwit_core::{GuestMemory, SourceMachine};
use godwit_transport::{Options, connect, listen};
use toy_vmm::{MEMORY_BYTES, ToyHost, ToyMachine};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

const LIMIT: Duration = Duration::from_secs(30);

/// When the phases of a move began.
#[derive(Default)]
struct Phases(Mutex<Vec<(Phase, Instant)>>);

impl Phases {
    fn between(&self, from: Phase, until: Phase) -> Duration {
        let phases = self.0.lock().unwrap();
        let began = |wanted| phases.iter().find(|(phase, _)| *phase == wanted).unwrap().1;
        began(until) - began(from)
    }
}

impl Observer for Phases {
    fn event(&self, event: Event) {
        if let Event::Phase { phase } = event {
            self.0.lock().unwrap().push((phase, Instant::now()));
        }
    }
}

fn contents() -> Vec<u8> {
    let mut contents = vec![0; MEMORY_BYTES];
    fastrand::Rng::with_seed(1).fill(&mut contents);
    contents
}

/// A machine that stands still.
fn machine() -> Arc<ToyMachine> {
    let machine = ToyMachine::new().unwrap();
    let memory: GuestMemory = SourceMachine::memory(&machine);
    memory.write_slice(&contents(), GuestAddress(0)).unwrap();
    Arc::new(machine)
}

/// Moves the machine, over a scheme of transport.
fn move_it(machine: &Arc<ToyMachine>, scheme: &str, verify: bool) -> Duration {
    let listener = listen(&format!("{scheme}://127.0.0.1:0").parse().unwrap(), Options::default()).unwrap();
    let dial = connect(listener.uri(), Options::default()).unwrap();
    let destination = thread::spawn(move || {
        let control = listener.next_control(LIMIT).unwrap().unwrap();
        receive(control, &mut listener.incoming_data(), &mut ToyHost, &DestinationOptions::default(), Arc::new(Silent))
    });
    let options = SourceOptions { channels: 3, verify, compression: Compression::None, ..SourceOptions::default() };
    let phases = Arc::new(Phases::default());
    let outcome = SourceMigration::start(Arc::clone(machine) as _, dial, options, Arc::clone(&phases) as _).wait();
    assert!(matches!(&*outcome, SourceOutcome::Moved(_)), "{outcome:?}");
    assert!(matches!(destination.join().unwrap(), DestinationOutcome::Owned { .. }));
    phases.between(Phase::FirstPass, Phase::Commit)
}

/// Times `transfer` into memory that nobody has touched.
fn into_fresh_memory(mut transfer: impl FnMut(&VolatileSlice<'_, ()>)) -> Duration {
    let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
    let slice = memory.get_slice(GuestAddress(0), MEMORY_BYTES).unwrap();
    let began = Instant::now();
    transfer(&slice);
    began.elapsed()
}

fn first_pass(criterion: &mut Criterion) {
    let (machine, contents) = (machine(), contents());
    let mut group = criterion.benchmark_group("first pass");
    group.throughput(Throughput::Bytes(MEMORY_BYTES as u64)).sampling_mode(SamplingMode::Flat).sample_size(15);
    let mut measure = |name: &str, one: &mut dyn FnMut() -> Duration| {
        group.bench_function(name, |bench| bench.iter_custom(|times| (0..times).map(|_| one()).sum()));
    };
    let mut tcp = RawTcp::new().unwrap();
    measure("raw-tcp", &mut || into_fresh_memory(|memory| tcp.transfer(&contents, memory).unwrap()));
    measure("tcp", &mut || move_it(&machine, "tcp", true));
    measure("tcp, not verified", &mut || move_it(&machine, "tcp", false));
    let mut quinn = RawQuinn::new().unwrap();
    measure("raw-quinn", &mut || into_fresh_memory(|memory| quinn.transfer(&contents, memory).unwrap()));
    measure("quic", &mut || move_it(&machine, "quic", true));
}

criterion_group! { name = benches; config = quick(); targets = first_pass }
criterion_main!(benches);
