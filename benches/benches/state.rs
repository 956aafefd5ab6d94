//! State out of a real KVM machine and into another one: what every pause contains. Needs /dev/kvm.

// criterion's macros make undocumented public items.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::quick;
use criterion::{Criterion, criterion_group, criterion_main};
use godwit_core::{DestinationHost, DestinationMachine, LoadContext, SourceMachine};
use godwit_vmm::config::{ByteSize, GuestKind};
use godwit_vmm::workload::{Header, WriterConfig};
use godwit_vmm::{BootOptions, KvmHost, Machine, MachineConfig};

const LIMIT: Duration = Duration::from_secs(20);

/// A machine whose guest has been at work.
fn machine(vcpus: u32) -> Machine {
    let writer = WriterConfig { working_set_bytes: 8 << 20, fill_bytes: 16 << 20, ..WriterConfig::default() };
    let config = MachineConfig {
        memory: ByteSize(128 << 20),
        guest: Some(GuestKind::Writer),
        writer: Some(writer),
        vcpus,
        ..MachineConfig::default()
    };
    let machine = Machine::boot(&config, &BootOptions::default()).unwrap();
    let works = || {
        let memory = machine.memory();
        let page = Header::new(&memory).and_then(|header| header.snapshot());
        page.is_ok_and(|page| page.heartbeats().iter().all(|beat| *beat > 3))
    };
    let until = Instant::now() + LIMIT;
    while !works() {
        assert!(Instant::now() < until, "the guest does not work");
        thread::sleep(Duration::from_millis(1));
    }
    machine
}

fn state(criterion: &mut Criterion) {
    if !std::path::Path::new("/dev/kvm").exists() {
        eprintln!("/dev/kvm is missing: nothing is measured");
        return;
    }
    for vcpus in [1, 4] {
        let machine = machine(vcpus);
        let mut group = criterion.benchmark_group(format!("machine with {vcpus} vCPUs"));
        group.bench_function("pause and resume", |bench| {
            bench.iter(|| {
                machine.pause(LIMIT).unwrap();
                machine.resume().unwrap();
            })
        });
        machine.pause(LIMIT).unwrap();
        group.bench_function("save", |bench| bench.iter(|| machine.save().unwrap()));
        let sections = machine.save().unwrap();
        let mut incoming = KvmHost::default().prepare(&machine.describe().unwrap()).unwrap();
        group.bench_function("load", |bench| bench.iter(|| incoming.load(&sections, &LoadContext::default()).unwrap()));
    }
}

criterion_group! { name = benches; config = quick(); targets = state }
criterion_main!(benches);
