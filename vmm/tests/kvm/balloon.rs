//! A guest that gives pages back while it moves: the workload guest works on real KVM, and the test plays the driver of its
//! balloon over memory that it does not use.

use std::cell::Cell;
use std::sync::Arc;
use std::thread;

use godwit_core::destination::{DestinationOptions, DestinationOutcome, receive};
use godwit_core::progress::Silent;
use godwit_core::source::{MemoryHandover, OnStall, SourceMigration, SourceOptions, SourceOutcome};
use godwit_core::{GuestMemory, Phase, SourceMachine};
use godwit_transport::{Options, Uri, connect, listen};
use godwit_vmm::config::{BalloonConfig, MachineConfig, MemoryBacking};
use godwit_vmm::{KvmHost, Machine, workload};
use vm_memory::{Bytes, GuestAddress};

use super::guests::{PATIENCE, heartbeats, pause, read_u32, run, wait_until, writer};
use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("balloon::private_memory_is_given_back_while_it_moves", || given_back_while_it_moves(MemoryBacking::Private)),
    ("balloon::a_memfd_is_given_back_while_it_moves", || given_back_while_it_moves(MemoryBacking::Memfd)),
];

/// Memory that the workload guest never touches, in blocks as Linux reports them.
const SPARE: u64 = 128 << 20;
const BLOCK_BYTES: u64 = 2 << 20;
const BLOCK_PAGES: u64 = BLOCK_BYTES / 4096;
/// The rings of the reporting queue.
const RINGS: u64 = 200 << 20;
const AVAILABLE: u64 = RINGS + 0x1000;
const USED: u64 = RINGS + 0x2000;
/// Descriptors in it.
const QUEUE_SIZE: u16 = 32;
/// The balloon's window: the place after the entropy source.
const WINDOW: u64 = 0xd000_1000;
/// The reporting queue, as Linux counts.
const QUEUE: u32 = 2;

/// A driver that reports free pages.
#[derive(Default)]
struct Driver {
    reports: Cell<u16>,
}

impl Driver {
    /// Brings the device into use.
    fn start(machine: &Machine) -> Self {
        let status = WINDOW + 0x70;
        let registers = [
            // Acknowledge, driver, free page reporting and VIRTIO_F_VERSION_1, features agreed on.
            (status, 1),
            (status, 3),
            (WINDOW + 0x24, 0),
            (WINDOW + 0x20, 1 << 5),
            (WINDOW + 0x24, 1),
            (WINDOW + 0x20, 1),
            (status, 11),
            // The queue: its size, the three rings, ready.
            (WINDOW + 0x30, QUEUE),
            (WINDOW + 0x38, u32::from(QUEUE_SIZE)),
            (WINDOW + 0x80, RINGS as u32),
            (WINDOW + 0x90, AVAILABLE as u32),
            (WINDOW + 0xa0, USED as u32),
            (WINDOW + 0x44, 1),
            (status, 15),
        ];
        registers.into_iter().for_each(|(register, value)| machine.write_device_register(register, value));
        Self::default()
    }

    /// Reports blocks as free in one chain, and waits until the device has answered.
    fn report(&self, machine: &Machine, blocks: std::ops::Range<u64>) {
        let memory = machine.memory();
        let last = blocks.end - blocks.start - 1;
        for (index, number) in (0u64..).zip(blocks) {
            // A descriptor: writable; all but the last have a next one.
            let flags: u16 = if index < last { 3 } else { 2 };
            let at = RINGS + 16 * index;
            memory.write_obj(block(number), GuestAddress(at)).unwrap();
            memory.write_obj(BLOCK_BYTES as u32, GuestAddress(at + 8)).unwrap();
            memory.write_obj([flags, index as u16 + 1], GuestAddress(at + 12)).unwrap();
        }
        let slot = u64::from(self.reports.get() % QUEUE_SIZE);
        memory.write_obj(0u16, GuestAddress(AVAILABLE + 4 + 2 * slot)).unwrap();
        self.reports.set(self.reports.get() + 1);
        memory.write_obj(self.reports.get(), GuestAddress(AVAILABLE + 2)).unwrap();
        machine.write_device_register(WINDOW + 0x50, QUEUE);
        let expected = u32::from(self.reports.get());
        wait_until("the report is answered", || read_u32(machine, USED) >> 16 == expected);
    }

    /// Ends, and leaves no trace in memory.
    fn end(self, machine: &Machine) {
        machine.write_device_register(WINDOW + 0x70, 0);
        machine.memory().write_slice(&[0; 0x3000], GuestAddress(RINGS)).unwrap();
    }
}

/// Where a block begins.
fn block(number: u64) -> u64 {
    SPARE + number * BLOCK_BYTES
}

fn fill(machine: &Machine, blocks: std::ops::Range<u64>, byte: u8) {
    let contents = vec![byte; BLOCK_BYTES as usize];
    blocks.for_each(|number| machine.memory().write_slice(&contents, GuestAddress(block(number))).unwrap());
}

/// The only byte that a block holds, if it is the only one.
fn holds(memory: &GuestMemory, number: u64) -> Option<u8> {
    let mut contents = vec![0; BLOCK_BYTES as usize];
    memory.read_slice(&mut contents, GuestAddress(block(number))).unwrap();
    contents.iter().all(|byte| *byte == contents[0]).then_some(contents[0])
}

/// Takes one machine in.
fn destination() -> (Uri, thread::JoinHandle<Machine>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let uri: Uri = format!("unix:{}", directory.path().join("socket").display()).parse().unwrap();
    let listener = listen(&uri, Options::default()).unwrap();
    let taken_in = thread::spawn(move || {
        let control = listener.next_control(PATIENCE).unwrap().expect("a peer");
        let (mut host, options) = (KvmHost::default(), DestinationOptions::default());
        match receive(control, &mut listener.incoming_data(), &mut host, &options, Arc::new(Silent)) {
            DestinationOutcome::Owned { machine, .. } => machine.into_machine(),
            DestinationOutcome::Ended(why) | DestinationOutcome::Dropped(why) => panic!("not owned: {why}"),
        }
    });
    (uri, taken_in, directory)
}

fn given_back_while_it_moves(memory_backing: MemoryBacking) {
    let config = MachineConfig { memory_backing, balloon: Some(BalloonConfig::default()), ..writer(1) };
    let source = run(&config);
    wait_until("it works", || heartbeats(&source, 1)[0] > 3);
    let driver = Driver::start(&source);
    fill(&source, 0..15, 7);
    driver.report(&source, 0..1);
    assert_eq!((holds(&source.memory(), 0), holds(&source.memory(), 1)), (Some(0), Some(7)));

    let (uri, taken_in, _directory) = destination();
    let options = SourceOptions {
        // With a link that is said to be slow there are rounds, which come to nothing by themselves.
        switchover_bandwidth_bytes_per_s: Some(1),
        on_stall: OnStall::Force,
        max_rounds: 3,
        pause_before_switchover: true,
        hold_at: Some(Phase::Rounds),
        audit: true,
        memory_handover: MemoryHandover::Off,
        ..SourceOptions::default()
    };
    let dial = connect(&uri, Options::default()).unwrap();
    let migration = SourceMigration::start(Arc::new(source.clone()), dial, options, Arc::new(Silent));
    let wait_for = |phase: Phase| {
        wait_until("the next phase", || {
            assert!(migration.outcome().is_none(), "ended before {phase}: {:?}", migration.outcome());
            migration.progress().phase == Some(phase)
        });
    };
    wait_for(Phase::Rounds);
    // Sent before; then written anew, and given back at once; then used again.
    driver.report(&source, 1..5);
    fill(&source, 20..22, 8);
    driver.report(&source, 20..22);
    driver.report(&source, 5..7);
    fill(&source, 6..7, 9);
    migration.release_hold();
    for number in 7..10 {
        driver.report(&source, number..number + 1);
    }
    wait_for(Phase::PreSwitchover);
    driver.report(&source, 10..12);
    assert!(migration.proceed());
    let outcome = migration.wait();
    let SourceOutcome::Moved(report) = &*outcome else { panic!("{outcome:?}") };
    assert!(report.audit.as_deref().is_some_and(|audit| audit.starts_with("ok: ")), "{:?}", report.audit);
    // All that was given back after it had been sent, of which one block was used again.
    assert!(report.pages.zero >= 10 * BLOCK_PAGES, "{:?}", report.pages);

    let machine = taken_in.join().unwrap();
    let beats = heartbeats(&machine, 1)[0];
    wait_until("it works here", || heartbeats(&machine, 1)[0] > beats);
    let memory = machine.memory();
    for number in 0..24 {
        let expected = match number {
            6 => 9,
            12..15 => 7,
            _ => 0,
        };
        assert_eq!(holds(&memory, number), Some(expected), "block {number}");
    }
    // Reports go on here, and then the whole memory is the workload guest's.
    driver.report(&machine, 12..15);
    assert_eq!(holds(&memory, 13), Some(0));
    driver.report(&machine, 6..7);
    driver.end(&machine);
    pause(&machine);
    workload::check(&memory).unwrap();
}
