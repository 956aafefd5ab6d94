//! Booting, and refusing to.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use godwit_core::{Section, SourceMachine};
use godwit_vmm::config::{ByteSize, MemoryBacking, SerialTarget};
use godwit_vmm::{BootOptions, Machine, MachineConfig, MachineEvent, MachineStatus};

use super::guests::{
    self, COUNT, config, counter, elf, file, next, pause, read_u32, run, wait_for_progress, wait_until,
};
use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("boot::a_pvh_image_runs", a_pvh_image_runs),
    ("boot::start_info_describes_memory_command_line_and_initrd", start_info_describes_memory_command_line_and_initrd),
    ("boot::the_workload_guest_starts_all_its_vcpus", the_workload_guest_starts_all_its_vcpus),
    ("boot::every_backing_works", every_backing_works),
    ("boot::what_is_no_kernel_is_refused", what_is_no_kernel_is_refused),
    ("boot::output_reaches_the_serial_port", output_reaches_the_serial_port),
    ("boot::the_keyboard_controller_resets_in_place", the_keyboard_controller_resets_in_place),
    ("boot::a_jump_to_the_bios_in_real_mode_resets_in_place", a_jump_to_the_bios_in_real_mode_resets_in_place),
    ("boot::the_reset_button_boots_again_running_or_paused", the_reset_button_boots_again_running_or_paused),
    ("boot::a_triple_fault_ends_the_machine_with_registers", a_triple_fault_ends_the_machine_with_registers),
    ("boot::a_bzimage_runs_at_its_64_bit_entry", a_bzimage_runs_at_its_64_bit_entry),
    ("boot::a_bzimage_that_does_not_fit_is_refused", a_bzimage_that_does_not_fit_is_refused),
    ("boot::a_client_talks_to_the_serial_port", a_client_talks_to_the_serial_port),
    ("boot::memory_above_4_gib_is_there", memory_above_4_gib_is_there),
];

fn a_pvh_image_runs() {
    let kernel = file(&elf(COUNT));
    let machine = run(&config(&kernel));
    wait_for_progress(&machine);
    assert_eq!(machine.status(), MachineStatus::Running);
    machine.stop();
    assert_eq!(machine.status(), MachineStatus::Stopped);
    machine.stop();
}

fn start_info_describes_memory_command_line_and_initrd() {
    // mov [COUNTER], ebx; jmp $
    let kernel = file(&elf(&[0x89, 0x1d, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xfe]));
    let initrd = file(b"an initial RAM disk");
    let config =
        MachineConfig { initrd: Some(initrd.path().into()), cmdline: "console=ttyS0 quiet".into(), ..config(&kernel) };
    let machine = run(&config);
    wait_until("the guest has stored its start info", || counter(&machine) != 0);
    let start_info = u64::from(counter(&machine));
    let word = |offset| u64::from(read_u32(&machine, start_info + offset));
    assert_eq!(word(0), 0x336e_c578, "magic");
    let cmdline = machine.read_memory(word(24), config.cmdline.len() + 1).unwrap();
    assert_eq!(cmdline, [config.cmdline.as_bytes(), &[0]].concat());
    assert_eq!(word(12), 1, "one module");
    let module = word(16);
    let (address, length) = (u64::from(read_u32(&machine, module)), read_u32(&machine, module + 8) as usize);
    assert_eq!(machine.read_memory(address, length).unwrap(), b"an initial RAM disk");
    assert_eq!(word(48), 3, "low memory, the BIOS area, high memory");
    assert_eq!(memory_map(&machine, word(40), 24), [(0, 0x9_fc00, 1), BIOS_AREA, (1 << 20, 63 << 20, 1)]);
}

/// What the guest has to leave alone below 1 MiB, the way to reboot at ffff:0000 within it: start, size, reserved.
const BIOS_AREA: (u64, u64, u32) = (0x9_fc00, 0x10_0000 - 0x9_fc00, 2);

/// The three ranges of a map of memory in guest memory, as start, size and kind.
fn memory_map(machine: &Machine, address: u64, range_bytes: u64) -> [(u64, u64, u32); 3] {
    [0, 1, 2].map(|number| {
        let bytes = machine.read_memory(address + number * range_bytes, 20).unwrap();
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        (word(0), word(8), u32::from_le_bytes(bytes[16..].try_into().unwrap()))
    })
}

fn the_workload_guest_starts_all_its_vcpus() {
    let machine = run(&guests::writer(2));
    let cpus = machine.cpus();
    assert_eq!(cpus.iter().map(|cpu| cpu.index).collect::<Vec<_>>(), [0, 1]);
    assert!(cpus[0].thread_id > 0 && cpus[0].thread_id != cpus[1].thread_id);
    let beats = guests::heartbeats(&machine, 2);
    wait_until("both vCPUs work", || {
        guests::heartbeats(&machine, 2).iter().zip(&beats).all(|(now, before)| now > before)
    });
}

fn every_backing_works() {
    let kernel = file(&elf(COUNT));
    for (memory_backing, kind) in [(MemoryBacking::Private, "private"), (MemoryBacking::Memfd, "memfd")] {
        let machine = run(&MachineConfig { memory_backing, ..config(&kernel) });
        wait_for_progress(&machine);
        let ram = machine.ram();
        assert_eq!((ram.len(), ram[0].kind), (1, kind));
        assert_eq!((ram[0].guest_address, ram[0].size_bytes), (0, 64 << 20));
    }
}

fn what_is_no_kernel_is_refused() {
    let mut no_note = elf(COUNT);
    no_note[0x20c] = b'Y';
    let mut bits_32 = elf(COUNT);
    bits_32[4] = 1;
    let mut beyond_memory = elf(COUNT);
    // Where the first segment goes.
    beyond_memory[64 + 24..64 + 32].copy_from_slice(&(1u64 << 40).to_le_bytes());
    let mut old_bzimage = vec![0; 4096];
    old_bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let cases: [(&[u8], &str); 7] = [
        (b"", "neither"),
        (b"#!/bin/sh\n", "neither"),
        (&elf(COUNT)[..40], "cannot load"),
        (&no_note, "PVH"),
        (&bits_32, "32-bit"),
        (&beyond_memory, "cannot load"),
        (&old_bzimage, "bzImage"),
    ];
    for (contents, expected) in cases {
        let kernel = file(contents);
        let error = Machine::boot(&config(&kernel), &BootOptions::default()).err().expect("refused").to_string();
        assert!(error.contains(expected), "{expected:?} in {error:?}");
        assert!(error.contains(kernel.path().to_str().unwrap()), "{error}");
    }
    let missing = MachineConfig { kernel: Some("/nonexistent/kernel".into()), ..Default::default() };
    let error = Machine::boot(&missing, &BootOptions::default()).err().expect("refused").to_string();
    assert!(error.contains("/nonexistent/kernel"), "{error}");
}

fn output_reaches_the_serial_port() {
    // mov dx, 0x3f8; mov al, 'H'; out dx, al; mov al, 'i'; out dx, al; jmp $
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'H', 0xee, 0xb0, b'i', 0xee, 0xeb, 0xfe];
    let kernel = file(&elf(&code));
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("serial.log");
    let _machine = run(&MachineConfig { serial: SerialTarget::File(log.clone()), ..config(&kernel) });
    wait_until("the guest says Hi", || fs::read(&log).is_ok_and(|text| text == b"Hi"));
}

fn the_keyboard_controller_resets_in_place() {
    // A guest that counts its boots in memory would be fooled by a reset that leaves memory as it was: this one leaves a mark
    // first and resets only if there is none on the serial port's scratch register.
    // mov dword [COUNTER], 7; mov al, 0xfe; out 0x64, al; jmp $
    let code = [0xc7, 0x05, 0x00, 0x00, 0x20, 0x00, 7, 0, 0, 0, 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
    let kernel = file(&elf(&code));
    let machine = Machine::boot(&config(&kernel), &BootOptions { start_paused: true }).unwrap();
    let events = machine.events();
    machine.resume().unwrap();
    for _ in 0..3 {
        assert_eq!(next(&events), MachineEvent::Reset);
    }
    // It goes on counting if it is given other code to boot.
    fs::write(kernel.path(), elf(COUNT)).unwrap();
    wait_until("the guest runs what it was booted with", || {
        let before = counter(&machine);
        before > 7 && counter(&machine) > before
    });
    assert_eq!(machine.status(), MachineStatus::Running);
    // Without its kernel it cannot boot again, and says so.
    fs::write(kernel.path(), elf(&code)).unwrap();
    let doomed = run(&config(&kernel));
    let events = doomed.events();
    drop(kernel);
    let end = std::iter::repeat_with(|| next(&events)).find(|event| *event != MachineEvent::Reset);
    let Some(MachineEvent::Fault { text }) = end else { panic!("{end:?}") };
    assert!(text.contains("asked for a reboot"), "{text}");
    assert_eq!(doomed.status(), MachineStatus::Faulted);
}

/// Leaves protected mode and jumps to ffff:0000, as Linux does to have a BIOS reboot the machine:
/// lgdt [CODE + 0x30]; jmp 8:0xe; in 16-bit code: mov eax, cr0; and al, 0xfe; mov cr0, eax; jmp 0xffff:0. Then the descriptors of
/// 16-bit code at CODE and of nothing, and where they lie.
const JUMP_TO_BIOS: &[u8] = &[
    0x0f, 0x01, 0x15, 0x30, 0x00, 0x10, 0x00, 0xea, 0x0e, 0x00, 0x00, 0x00, 0x08, 0x00, 0x0f, 0x20, 0xc0, 0x24, 0xfe,
    0x0f, 0x22, 0xc0, 0xea, 0x00, 0x00, 0xff, 0xff, 0x90, 0x90, 0x90, 0x90, 0x90, //
    0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0x00, 0x00, 0x10, 0x9b, 0x00, 0x00, //
    0x0f, 0x00, 0x20, 0x00, 0x10, 0x00,
];

fn a_jump_to_the_bios_in_real_mode_resets_in_place() {
    let kernel = file(&elf(JUMP_TO_BIOS));
    let machine = Machine::boot(&config(&kernel), &BootOptions { start_paused: true }).unwrap();
    let events = machine.events();
    machine.resume().unwrap();
    // A reset clears memory: what does it has to be there again each time.
    for _ in 0..3 {
        assert_eq!(next(&events), MachineEvent::Reset);
    }
    fs::write(kernel.path(), elf(COUNT)).unwrap();
    wait_until("the guest runs what it was booted with", || {
        let before = counter(&machine);
        before > 7 && counter(&machine) > before
    });
    assert_eq!(machine.status(), MachineStatus::Running);
}

fn the_reset_button_boots_again_running_or_paused() {
    let kernel = file(&elf(COUNT));
    let machine = run(&config(&kernel));
    let events = machine.events();
    wait_until("the guest counts", || counter(&machine) > 0);
    machine.reset().unwrap();
    assert_eq!(next(&events), MachineEvent::Reset);
    wait_until("it counts again", || counter(&machine) > 0);
    machine.pause(guests::PATIENCE).unwrap();
    machine.reset().unwrap();
    assert_eq!(next(&events), MachineEvent::Reset);
    assert_eq!((machine.status(), counter(&machine)), (MachineStatus::Paused, 0), "paused at the very start");
    machine.resume().unwrap();
    wait_until("it counts once more", || counter(&machine) > 0);
    machine.stop();
    assert!(machine.reset().is_err());
}

fn a_triple_fault_ends_the_machine_with_registers() {
    // mov ecx, 0x1234abcd; ud2, with no interrupt table.
    let kernel = file(&elf(&[0xb9, 0xcd, 0xab, 0x34, 0x12, 0x0f, 0x0b]));
    let machine = run(&config(&kernel));
    let events = machine.events();
    let text = match next(&events) {
        MachineEvent::Shutdown { why } => why,
        MachineEvent::Fault { text } => text,
        MachineEvent::Reset => panic!("a reset"),
    };
    assert!(text.contains("vCPU 0") && text.contains("rcx 0x1234abcd"), "{text}");
    assert!(matches!(machine.status(), MachineStatus::Shutdown | MachineStatus::Faulted));
    assert!(machine.resume().is_err());
    assert!(machine.pause(guests::PATIENCE).is_err());
    // Told again to those who come late.
    assert!(machine.events().try_recv().is_ok());
}

/// A bzImage with this 64-bit code.
fn bzimage(code: &[u8], init_size: u32) -> Vec<u8> {
    let mut image = vec![0; 2 * 512 + 0x200];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    // Loaded high; where to.
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x37ff_ffffu32.to_le_bytes());
    // A 64-bit entry point.
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x10_0000u64.to_le_bytes());
    put(0x260, &init_size.to_le_bytes());
    image.extend(code);
    image
}

fn a_bzimage_runs_at_its_64_bit_entry() {
    // mov [COUNTER], rsi; inc dword [COUNTER + 8]; jmp to the last one
    let code = [0x48, 0x89, 0x34, 0x25, 0x00, 0x00, 0x20, 0x00, 0xff, 0x04, 0x25, 0x08, 0x00, 0x20, 0x00, 0xeb, 0xf7];
    let kernel = file(&bzimage(&code, 1 << 20));
    let initrd = file(b"an initial RAM disk");
    let config = MachineConfig { initrd: Some(initrd.path().into()), cmdline: "quiet".into(), ..config(&kernel) };
    let machine = run(&config);
    wait_until("the guest counts", || read_u32(&machine, guests::COUNTER + 8) > 10);
    let params = u64::from(counter(&machine));
    assert_eq!(machine.read_memory(params + 0x202, 4).unwrap(), b"HdrS");
    assert_eq!(machine.read_memory(u64::from(read_u32(&machine, params + 0x228)), 6).unwrap(), b"quiet\0");
    let (ramdisk, size) = (read_u32(&machine, params + 0x218), read_u32(&machine, params + 0x21c));
    assert_eq!(machine.read_memory(u64::from(ramdisk), size as usize).unwrap(), b"an initial RAM disk");
    assert_eq!(machine.read_memory(params + 0x1e8, 1).unwrap(), [3], "ranges of memory");
    assert_eq!(memory_map(&machine, params + 0x2d0, 20)[1], BIOS_AREA);
}

fn a_bzimage_that_does_not_fit_is_refused() {
    let kernel = file(&bzimage(&[0xeb, 0xfe], 1 << 30));
    let error = Machine::boot(&config(&kernel), &BootOptions::default()).err().expect("refused").to_string();
    assert!(error.contains("needs memory up to"), "{error}");
}

fn a_client_talks_to_the_serial_port() {
    // Echoes each byte, one higher.
    // mov dx, 0x3fd; in al, dx; test al, 1; jz $-3; mov dx, 0x3f8; in al, dx; inc al; out dx, al; jmp to the start
    let code = [
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xfe, 0xc0, 0xee, 0xeb,
        0xed,
    ];
    let kernel = file(&elf(&code));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial");
    for target in [SerialTarget::Unix(path.clone()), SerialTarget::Pty(path.clone())] {
        let is_socket = matches!(target, SerialTarget::Unix(_));
        let machine = run(&MachineConfig { serial: target, ..config(&kernel) });
        let clients = if is_socket { 2 } else { 1 };
        for _ in 0..clients {
            let mut client = connect(&path, is_socket);
            // More than the port's buffer holds.
            let sent: Vec<u8> = (0..200).collect();
            client.write_all(&sent).unwrap();
            let mut received = vec![0; sent.len()];
            client.read_exact(&mut received).unwrap();
            assert!(received.iter().zip(&sent).all(|(received, sent)| *received == sent + 1), "{received:?}");
            // A paused machine takes nothing in.
            pause(&machine);
            client.write_all(b"z").unwrap();
            let before = machine.save().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            let serial =
                |sections: Vec<Section>| sections.into_iter().find(|section| section.kind == "serial").unwrap();
            assert_eq!(serial(before), serial(machine.save().unwrap()));
            machine.resume().unwrap();
            let mut late = [0];
            client.read_exact(&mut late).unwrap();
            assert_eq!(&late, b"{");
        }
        drop(machine);
        assert!(fs::symlink_metadata(&path).is_err(), "the path is gone with the machine");
    }
}

/// A client of the serial port that gives up after a while.
fn connect(path: &Path, is_socket: bool) -> Box<dyn ReadWrite> {
    if is_socket {
        let client = UnixStream::connect(path).unwrap();
        client.set_read_timeout(Some(guests::PATIENCE)).unwrap();
        return Box::new(client);
    }
    Box::new(fs::OpenOptions::new().read(true).write(true).open(path).unwrap())
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

fn memory_above_4_gib_is_there() {
    let kernel = file(&elf(COUNT));
    let machine = run(&MachineConfig { memory: ByteSize(8 << 30), ..config(&kernel) });
    wait_for_progress(&machine);
    let regions: Vec<_> = machine.ram().iter().map(|ram| (ram.guest_address, ram.size_bytes)).collect();
    assert_eq!(regions, [(0, 3 << 30), (4 << 30, 5 << 30)]);
    assert_eq!(machine.read_memory((9 << 30) - 1, 1).unwrap(), [0]);
    assert!(machine.read_memory((3 << 30) - 1, 2).is_err());
    assert!(machine.read_memory(9 << 30, 1).is_err());
}
