//! Setting up channels, and moving memory through them, beside what the bare libraries do in the same run.
//!
//! `throughput` moves 256 MiB into populated memory and waits until all of it is there. Compare `tcp` with `raw-tcp`
//! and `quic` with `raw-quinn`, which has the same windows, packet sizes and buffers.

// criterion's macros make undocumented public items.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::hint::black_box;
use std::thread;
use std::time::Duration;

use common::quick;
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use godwit_benches::raw::{BLOCK_BYTES, RawQuinn, RawTcp};
use godwit_core::{Channel, IncomingData, SessionToken};
use godwit_transport::{Listener, Options, Uri, connect, listen};
use vm_memory::{MmapRegion, VolatileMemory};

const MOVED_BYTES: usize = 256 << 20;
const LIMIT: Duration = Duration::from_secs(30);
const TOKEN: SessionToken = SessionToken([1; 16]);

fn uris(directory: &tempfile::TempDir) -> [(&'static str, Uri); 3] {
    let unix = Uri::Unix(directory.path().join("bench.sock"));
    [("tcp", "tcp://127.0.0.1:0".parse().unwrap()), ("unix", unix), ("quic", "quic://127.0.0.1:0".parse().unwrap())]
}

fn data_channel(uri: &Uri) -> (Listener, Channel, Channel) {
    let listener = listen(uri, Options::default()).unwrap();
    let mut incoming = listener.incoming_data();
    incoming.expect(TOKEN);
    let dial = connect(listener.uri(), Options::default()).unwrap();
    // As in a move: what it tells of the link rules how others are opened.
    let _control = dial.control(LIMIT).unwrap();
    let dialled = dial.data(TOKEN, 0, LIMIT).unwrap();
    let (_, accepted) = incoming.accept(LIMIT).unwrap();
    (listener, dialled, accepted)
}

fn set_up(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let mut group = criterion.benchmark_group("set-up");
    for (name, uri) in uris(&directory) {
        let listener = listen(&uri, Options::default()).unwrap();
        let dial = connect(listener.uri(), Options::default()).unwrap();
        // What is measured ends when both ends have the channel; hanging up spares the close its good manners.
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let dialled = dial.control(LIMIT).unwrap();
                let accepted = listener.next_control(LIMIT).unwrap().unwrap();
                dialled.hang_up.hang_up();
                accepted.hang_up.hang_up();
            });
        });
    }
    group.finish();
}

fn throughput(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let source = vec![0x5a_u8; MOVED_BYTES];
    let memory = MmapRegion::<()>::new(MOVED_BYTES).unwrap();
    memory.get_slice(0, MOVED_BYTES).unwrap().copy_from(&vec![1_u8; MOVED_BYTES][..]);

    let mut group = criterion.benchmark_group("throughput");
    group.throughput(Throughput::Bytes(MOVED_BYTES as u64)).sampling_mode(SamplingMode::Flat).sample_size(15);
    let into = memory.get_slice(0, MOVED_BYTES).unwrap();
    let mut raw_tcp = RawTcp::new().unwrap();
    group.bench_function("raw-tcp", |bencher| bencher.iter(|| raw_tcp.transfer(&source, &into).unwrap()));
    let mut raw_quinn = RawQuinn::new().unwrap();
    group.bench_function("raw-quinn", |bencher| bencher.iter(|| raw_quinn.transfer(&source, &into).unwrap()));
    for (name, uri) in uris(&directory) {
        let (_listener, mut dialled, mut accepted) = data_channel(&uri);
        group.bench_function(name, |bencher| {
            bencher.iter(|| transfer(&mut dialled, &mut accepted, &source, &memory));
        });
    }
    group.finish();
}

fn transfer(dialled: &mut Channel, accepted: &mut Channel, source: &[u8], memory: &MmapRegion<()>) {
    thread::scope(|scope| {
        scope.spawn(|| source.chunks(BLOCK_BYTES).for_each(|block| dialled.writer.write_all(block).unwrap()));
        let mut done = 0;
        while done < source.len() {
            let mut block = memory.get_slice(done, BLOCK_BYTES.min(source.len() - done)).unwrap();
            done += accepted.reader.read_volatile(&mut block).unwrap();
        }
    });
    black_box(memory);
}

criterion_group! { name = benches; config = quick(); targets = set_up, throughput }
criterion_main!(benches);
