//! Power control and a virtio device, used by a guest through real KVM: ports, windows, kicks, interrupt lines.

use godwit_core::{DestinationHost, DestinationMachine, LoadContext, SourceMachine};
use godwit_vmm::{BootOptions, KvmHost, Machine, MachineEvent, MachineStatus};
use vm_memory::{Bytes, GuestAddress};

use super::guests::{self, config, elf, file, next, pause, read_u32, run, wait_until};
use super::moves::take_in;
use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("devices::the_reset_register_resets_in_place", the_reset_register_resets_in_place),
    (
        "devices::a_guest_that_listens_to_its_power_button_powers_off",
        a_guest_that_listens_to_its_power_button_powers_off,
    ),
    ("devices::a_button_that_was_pressed_travels", a_button_that_was_pressed_travels),
    ("devices::a_guest_gets_entropy_here_and_after_a_move", a_guest_gets_entropy_here_and_after_a_move),
    ("devices::the_tables_are_where_a_guest_is_told", the_tables_are_where_a_guest_is_told),
];

/// Unmasks the power button's line and waits for the event; then powers off.
/// mov dword [0xfec00000], 0x22; mov dword [0xfec00010], 0x40; mov dx, 0x603; in al, dx; test al, 1; jz back to the third mov;
/// mov dx, 0x600; mov al, 0x34; out dx, al; jmp $
const LISTEN: &[u8] = &[
    0xc7, 0x05, 0x00, 0x00, 0xc0, 0xfe, 0x22, 0x00, 0x00, 0x00, 0xc7, 0x05, 0x10, 0x00, 0xc0, 0xfe, 0x40, 0x00, 0x00,
    0x00, 0x66, 0xba, 0x03, 0x06, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xfe,
];

fn the_reset_register_resets_in_place() {
    // mov dx, 0x602; mov al, 1; out dx, al; jmp $
    let kernel = file(&elf(&[0x66, 0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xeb, 0xfe]));
    let machine = Machine::boot(&config(&kernel), &BootOptions { start_paused: true }).unwrap();
    let events = machine.events();
    machine.resume().unwrap();
    for _ in 0..3 {
        assert_eq!(next(&events), MachineEvent::Reset);
    }
}

fn a_guest_that_listens_to_its_power_button_powers_off() {
    let deaf = file(&elf(guests::COUNT));
    let machine = run(&config(&deaf));
    guests::wait_for_progress(&machine);
    assert!(!machine.powerdown().unwrap(), "nobody listens");

    let kernel = file(&elf(LISTEN));
    let machine = run(&config(&kernel));
    let events = machine.events();
    wait_until("the guest listens", || machine.powerdown().unwrap());
    assert_eq!(next(&events), MachineEvent::Shutdown { why: "the guest powered off".into() });
    assert_eq!(machine.status(), MachineStatus::Shutdown);
    assert!(machine.powerdown().is_err());
}

fn a_button_that_was_pressed_travels() {
    let kernel = file(&elf(LISTEN));
    let source = run(&config(&kernel));
    // Listening, but not yet told.
    let unmasked = || {
        pause(&source);
        let pressed = source.powerdown().unwrap();
        if !pressed {
            source.resume().unwrap();
        }
        pressed
    };
    wait_until("the guest listens", unmasked);
    let mut incoming = take_in(&source, &mut KvmHost::default());
    incoming.start().unwrap();
    let machine = incoming.into_machine();
    assert!(matches!(next(&machine.events()), MachineEvent::Shutdown { .. }));
}

/// Where the poking guest's list of pokes lies, its queue, and a buffer.
const POKES: u64 = 0x30_0000;
const RINGS: u64 = 0x38_0000;
const AVAIL: u64 = RINGS + 0x100;
const USED: u64 = RINGS + 0x200;
const BUFFER: u64 = 0x39_0000;
/// The window of a machine's only virtio device.
const WINDOW: u64 = 0xd000_0000;

/// Stores words at addresses, as the list says, and waits at its end for more.
/// mov esi, POKES; mov eax, [esi]; test eax, eax; jz to the last mov; mov ebx, [esi + 4]; mov [eax], ebx; add esi, 8; jmp back
const POKE: &[u8] = &[
    0xbe, 0x00, 0x00, 0x30, 0x00, 0x8b, 0x06, 0x85, 0xc0, 0x74, 0xfa, 0x8b, 0x5e, 0x04, 0x89, 0x18, 0x83, 0xc6, 0x08,
    0xeb, 0xf0,
];

/// Makes the guest store words.
fn poke(machine: &Machine, done: &mut u64, pokes: &[(u64, u32)]) {
    for (address, value) in pokes {
        let at = POKES + *done * 8;
        machine.memory().write_obj(*value, GuestAddress(at + 4)).unwrap();
        machine.memory().write_obj(*address as u32, GuestAddress(at)).unwrap();
        *done += 1;
    }
}

fn offer(machine: &Machine, number: u16) {
    let memory = machine.memory();
    // A descriptor: address, length, writable, no next one.
    memory.write_obj(BUFFER, GuestAddress(RINGS)).unwrap();
    memory.write_obj([64u32, 2], GuestAddress(RINGS + 8)).unwrap();
    memory.write_obj(0u16, GuestAddress(AVAIL + 4 + 2 * u64::from(number % 8))).unwrap();
    memory.write_obj(number + 1, GuestAddress(AVAIL + 2)).unwrap();
}

fn used(machine: &Machine) -> u32 {
    read_u32(machine, USED) >> 16
}

fn a_guest_gets_entropy_here_and_after_a_move() {
    let kernel = file(&elf(POKE));
    let source = run(&config(&kernel));
    let mut done = 0;
    let status = WINDOW + 0x70;
    let setup = [
        // Acknowledge, driver, VIRTIO_F_VERSION_1, features agreed on.
        (status, 1),
        (status, 3),
        (WINDOW + 0x24, 1),
        (WINDOW + 0x20, 1),
        (status, 11),
        // Eight descriptors, the three rings, ready.
        (WINDOW + 0x38, 8),
        (WINDOW + 0x80, RINGS as u32),
        (WINDOW + 0x90, AVAIL as u32),
        (WINDOW + 0xa0, USED as u32),
        (WINDOW + 0x44, 1),
        (status, 15),
    ];
    poke(&source, &mut done, &setup);
    let kick = [(WINDOW + 0x50, 0)];
    for number in 0..20 {
        offer(&source, number);
        poke(&source, &mut done, &kick);
        wait_until("the request is answered", || used(&source) == u32::from(number) + 1);
    }
    assert_ne!(source.read_memory(BUFFER, 64).unwrap(), [0; 64]);

    // One more is under way when it moves; its kick is in nobody's state.
    pause(&source);
    offer(&source, 20);
    let mut incoming = take_in(&source, &mut KvmHost::default());
    incoming.start().unwrap();
    let machine = incoming.into_machine();
    wait_until("what was under way is answered", || used(&machine) == 21);
    offer(&machine, 21);
    poke(&machine, &mut done, &kick);
    wait_until("the guest's kicks arrive", || used(&machine) == 22);
    // The source did nothing with it while it was paused, and goes on if the move fails.
    assert_eq!(used(&source), 20);
    source.resume().unwrap();
    wait_until("it is answered here", || used(&source) == 21);

    // The state that has been loaded is closed until it is owned.
    pause(&machine);
    offer(&machine, 22);
    let description = machine.describe().unwrap();
    let mut incoming = KvmHost::default().prepare(&description).unwrap();
    for _ in 0..3 {
        incoming.load(&machine.save().unwrap(), &LoadContext::default()).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(incoming.memory().read_obj::<u32>(GuestAddress(USED)).unwrap(), 0);

    // A reset takes the queue away.
    source.reset().unwrap();
    offer(&source, 0);
    let mut done = 0;
    poke(&source, &mut done, &kick);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(used(&source), 0);
    poke(&source, &mut done, &setup);
    wait_until("its driver starts anew", || used(&source) == 1);
}

fn the_tables_are_where_a_guest_is_told() {
    // mov [COUNTER], ebx; jmp $
    let kernel = file(&elf(&[0x89, 0x1d, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xfe]));
    let machine = run(&config(&kernel));
    wait_until("the guest has stored its start info", || guests::counter(&machine) != 0);
    let start_info = u64::from(guests::counter(&machine));
    let rsdp = u64::from(read_u32(&machine, start_info + 32));
    assert_eq!(machine.read_memory(rsdp, 8).unwrap(), b"RSD PTR ");
    let xsdt = u64::from(read_u32(&machine, rsdp + 24));
    assert_eq!(machine.read_memory(xsdt, 4).unwrap(), b"XSDT");
}
