//! Guests of a few instructions, and machines that run them.

use std::io::Write;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use godwit_core::SourceMachine;
use godwit_vmm::config::{ByteSize, GuestKind, MachineConfig};
use godwit_vmm::workload::{WriterConfig, layout};
use godwit_vmm::{BootOptions, Machine, MachineEvent};
use tempfile::NamedTempFile;

/// Where the guests' code lies.
pub(crate) const CODE: u32 = 0x10_0000;

/// Where the counting guests count.
pub(crate) const COUNTER: u64 = 0x20_0000;

/// How long anything may take in a test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// `inc dword [COUNTER]`, for ever.
pub(crate) const COUNT: &[u8] = &[0xff, 0x05, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf8];

/// A PVH ELF image of 32-bit code.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    const CODE_OFFSET: u64 = 0x1000;
    const NOTE_OFFSET: u64 = 0x200;
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(CODE.to_le_bytes());

    let mut image = Vec::new();
    image.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // An executable for x86-64, version 1.
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry, program headers, no section headers, no flags, sizes and counts.
    for word in [u64::from(CODE), 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let mut program_header = |kind: u32, offset: u64, address: u64, size: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for word in [offset, address, address, size, size, 4] {
            image.extend(word.to_le_bytes());
        }
    };
    program_header(1, CODE_OFFSET, u64::from(CODE), code.len() as u64);
    program_header(4, NOTE_OFFSET, 0, note.len() as u64);
    image.resize(NOTE_OFFSET as usize, 0);
    image.extend(note);
    image.resize(CODE_OFFSET as usize, 0);
    image.extend(code);
    image
}

/// A file with this in it.
pub(crate) fn file(contents: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(contents).unwrap();
    file
}

/// A machine of 64 MiB for `kernel`.
pub(crate) fn config(kernel: &NamedTempFile) -> MachineConfig {
    MachineConfig { memory: ByteSize(64 << 20), kernel: Some(kernel.path().into()), ..Default::default() }
}

/// A machine of 256 MiB that runs the workload guest.
pub(crate) fn writer(vcpus: u32) -> MachineConfig {
    let writer = WriterConfig { working_set_bytes: 16 << 20, fill_bytes: 32 << 20, ..Default::default() };
    MachineConfig {
        memory: ByteSize(256 << 20),
        guest: Some(GuestKind::Writer),
        writer: Some(writer),
        vcpus,
        ..Default::default()
    }
}

/// Boots and runs.
pub(crate) fn run(config: &MachineConfig) -> Machine {
    Machine::boot(config, &BootOptions::default()).unwrap()
}

/// The counting guests' counter.
pub(crate) fn counter(machine: &Machine) -> u32 {
    read_u32(machine, COUNTER)
}

/// A word of guest memory.
pub(crate) fn read_u32(machine: &Machine, address: u64) -> u32 {
    u32::from_le_bytes(machine.read_memory(address, 4).unwrap().try_into().unwrap())
}

/// Waits until `condition` holds.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until the counter has moved on from where it is now.
pub(crate) fn wait_for_progress(machine: &Machine) {
    let before = counter(machine);
    wait_until("the guest counts", || counter(machine) != before);
}

/// The next event.
pub(crate) fn next(events: &Receiver<MachineEvent>) -> MachineEvent {
    events.recv_timeout(PATIENCE).expect("an event")
}

/// Pauses.
pub(crate) fn pause(machine: &Machine) {
    machine.pause(Duration::from_secs(5)).unwrap();
}

/// The workload guest's heartbeats.
pub(crate) fn heartbeats(machine: &Machine, vcpus: u64) -> Vec<u64> {
    let address =
        |vcpu| layout::HEADER + layout::field::VCPU_LINES + vcpu * layout::VCPU_LINE_BYTES + layout::line::HEARTBEAT;
    let beat = |vcpu| u64::from_le_bytes(machine.read_memory(address(vcpu), 8).unwrap().try_into().unwrap());
    (0..vcpus).map(beat).collect()
}
