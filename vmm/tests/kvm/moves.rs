//! State: out of one machine and into another, and refusing what is not one's own.

use std::time::{Duration, Instant};

use godwit_core::machine::{MachineDescription, SectionVersion};
use godwit_core::memory_files;
use godwit_core::{DestinationHost, DestinationMachine, LoadContext, Section, SourceMachine};
use godwit_vmm::config::{ByteSize, MemoryBacking, SerialTarget};
use godwit_vmm::workload::layout;
use godwit_vmm::{HostOptions, IncomingMachine, KvmHost, Machine, MachineConfig, MachineStatus};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::guests::{
    self, COUNT, config, counter, elf, file, heartbeats, pause, run, wait_for_progress, wait_until, writer,
};
use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("moves::a_guest_goes_on_counting_in_another_machine", a_guest_goes_on_counting_in_another_machine),
    ("moves::the_workload_guest_goes_on_with_1_and_2_vcpus", the_workload_guest_goes_on_with_1_and_2_vcpus),
    ("moves::a_machine_goes_on_and_on", a_machine_goes_on_and_on),
    ("moves::memory_that_is_handed_over_is_its_owners_alone", memory_that_is_handed_over_is_its_owners_alone),
    ("moves::memory_that_is_not_taken_over_is_as_it_was", memory_that_is_not_taken_over_is_as_it_was),
    ("moves::state_that_is_loaded_is_saved_again_the_same", state_that_is_loaded_is_saved_again_the_same),
    ("moves::chips_and_devices_keep_what_the_guest_told_them", chips_and_devices_keep_what_the_guest_told_them),
    ("moves::a_failed_move_leaves_the_source_as_it_was", a_failed_move_leaves_the_source_as_it_was),
    ("moves::a_machine_from_elsewhere_can_reboot", a_machine_from_elsewhere_can_reboot),
    ("moves::a_running_machine_is_not_saved", a_running_machine_is_not_saved),
    ("moves::hostile_sections_are_refused", hostile_sections_are_refused),
    ("moves::every_refusal_is_given_by_name", every_refusal_is_given_by_name),
    ("moves::kvms_clock_goes_on_by_the_true_pause", kvms_clock_goes_on_by_the_true_pause),
    ("moves::a_tsc_never_goes_back", a_tsc_never_goes_back),
    ("moves::figures", figures),
];

/// Takes `source`, which is paused, into a new machine: rehearsal, memory, state.
pub(crate) fn take_in(source: &Machine, host: &mut KvmHost) -> IncomingMachine {
    let description = source.describe().unwrap();
    assert_eq!(host.check(&description, &[]).refusals, Vec::new());
    let mut incoming = host.prepare(&description).unwrap();
    let sections = source.save().unwrap();
    incoming.load(&sections, &LoadContext::default()).unwrap();
    copy_memory(source, &incoming);
    incoming.load(&source.save().unwrap(), &LoadContext::default()).unwrap();
    incoming
}

fn copy_memory(source: &Machine, destination: &IncomingMachine) {
    let memory = destination.memory();
    for region in source.memory().iter() {
        let mut page = [0; 4096];
        for offset in (0..region.len()).step_by(4096) {
            let address = GuestAddress(vm_memory::Address::raw_value(&region.start_addr()) + offset);
            source.memory().read_slice(&mut page, address).unwrap();
            if page != [0; 4096] {
                memory.write_slice(&page, address).unwrap();
            }
        }
    }
}

fn a_guest_goes_on_counting_in_another_machine() {
    let kernel = file(&elf(COUNT));
    let source = run(&config(&kernel));
    wait_for_progress(&source);
    pause(&source);
    let left_at = counter(&source);
    let mut incoming = take_in(&source, &mut KvmHost::default());
    source.stop();
    incoming.start().unwrap();
    let destination = incoming.into_machine();
    assert!(destination.is_running());
    wait_until("it counts on", || counter(&destination) > left_at);
    assert!(counter(&destination).wrapping_sub(left_at) < u32::MAX / 2);
}

fn the_workload_guest_goes_on_with_1_and_2_vcpus() {
    for vcpus in [1, 2] {
        let source = run(&writer(vcpus));
        let beats = || heartbeats(&source, u64::from(vcpus));
        wait_until("it works", || beats().iter().all(|beat| *beat > 3));
        pause(&source);
        let left_at = beats();
        let mut incoming = take_in(&source, &mut KvmHost::default());
        incoming.start().unwrap();
        let destination = incoming.into_machine();
        wait_until("all its vCPUs go on", || {
            heartbeats(&destination, u64::from(vcpus)).iter().zip(&left_at).all(|(now, then)| now > then)
        });
    }
}

fn a_machine_goes_on_and_on() {
    let kernel = file(&elf(COUNT));
    let mut machine = run(&MachineConfig { memory_backing: MemoryBacking::Memfd, vcpus: 2, ..config(&kernel) });
    for _ in 0..3 {
        wait_for_progress(&machine);
        pause(&machine);
        let described = machine.describe().unwrap();
        let incoming = take_in(&machine, &mut KvmHost::default());
        // Held: it is owned but does not run until it is told to.
        let next = incoming.into_machine();
        assert_eq!(next.status(), MachineStatus::Paused);
        assert_eq!(next.describe().unwrap(), described, "it stays the same machine");
        let stood = counter(&next);
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(counter(&next), stood);
        next.resume().unwrap();
        machine = next;
    }
    wait_for_progress(&machine);
}

/// A running machine, and one that is prepared to go on in its memory.
fn prepared_to_hand_over() -> (Machine, IncomingMachine) {
    let kernel = file(&elf(COUNT));
    let source = run(&MachineConfig { memory_backing: MemoryBacking::Memfd, ..config(&kernel) });
    wait_for_progress(&source);
    let mut host = KvmHost::default();
    host.take_memory(memory_files::of(&source.memory()).unwrap()).unwrap();
    let description = source.describe().unwrap();
    assert_eq!(host.check(&description, &[]).refusals, Vec::new());
    let incoming = host.prepare(&description).unwrap();
    (source, incoming)
}

fn all_memory(machine: &Machine) -> Vec<u8> {
    machine.read_memory(0, machine.config().memory.bytes() as usize).unwrap()
}

fn memory_that_is_handed_over_is_its_owners_alone() {
    let (source, mut incoming) = prepared_to_hand_over();
    pause(&source);
    incoming.load(&source.save().unwrap(), &LoadContext::default()).unwrap();
    let (left_at, before) = (counter(&source), all_memory(&source));
    // What is written before it is owned is a copy of the page, and forgotten.
    incoming.memory().write_obj(u64::MAX, GuestAddress(layout::HEADER)).unwrap();
    assert!(all_memory(&source) == before);
    incoming.load(&source.save().unwrap(), &LoadContext::default()).unwrap();
    source.let_go_of_memory().unwrap();
    incoming.own_memory().unwrap();
    incoming.start().unwrap();
    let destination = incoming.into_machine();
    wait_until("it counts on", || counter(&destination) > left_at);
    pause(&destination);
    let (counted, after) = (counter(&destination), all_memory(&destination));
    assert!(counted.wrapping_sub(left_at) < u32::MAX / 2, "it goes on from where it was");
    drop(source);
    assert!(all_memory(&destination) == after, "the source's end changes nothing");
    destination.resume().unwrap();
    wait_until("it counts on", || counter(&destination) > counted);
}

fn memory_that_is_not_taken_over_is_as_it_was() {
    let (source, mut incoming) = prepared_to_hand_over();
    pause(&source);
    let (left_at, before) = (counter(&source), all_memory(&source));
    incoming.load(&source.save().unwrap(), &LoadContext::default()).unwrap();
    source.let_go_of_memory().unwrap();
    drop(incoming);
    source.take_back_memory().unwrap();
    assert!(all_memory(&source) == before);
    source.resume().unwrap();
    wait_until("it counts on", || counter(&source) > left_at);
}

fn state_that_is_loaded_is_saved_again_the_same() {
    let source = run(&writer(2));
    wait_until("it works", || heartbeats(&source, 2).iter().all(|beat| *beat > 3));
    pause(&source);
    let sections = source.save().unwrap();
    let kinds: Vec<_> = sections.iter().map(|section| section.kind.as_str()).collect();
    assert_eq!(kinds, ["vcpu/0", "vcpu/1", "irqchip", "pit", "clock", "serial", "ged", "virtio/0"]);
    let described: Vec<_> = source.describe().unwrap().sections;
    let saved: Vec<_> = sections
        .iter()
        .map(|section| SectionVersion { kind: section.kind.clone(), version: section.version })
        .collect();
    assert_eq!(described, saved);
    let machine = take_in(&source, &mut KvmHost::default()).into_machine();
    for (before, after) in sections.iter().zip(machine.save().unwrap()) {
        assert_eq!(before.payload.len(), after.payload.len(), "{}", before.kind);
        // Time goes on, everything else stands still.
        if before.kind != "clock" && before.kind != "pit" {
            assert_eq!(before.payload, after.payload, "{}", before.kind);
        }
    }
}

fn chips_and_devices_keep_what_the_guest_told_them() {
    // A mask for the first PIC, a count for the timer's channel 2 (which raises no interrupt), a scratch value for the serial port; then it counts.
    // mov al, 0x5a; out 0x21, al; mov al, 0xb4; out 0x43, al; mov al, 0x77; out 0x42, al; out 0x42, al;
    // mov dx, 0x3ff; out dx, al
    let told = [
        0xb0, 0x5a, 0xe6, 0x21, 0xb0, 0xb4, 0xe6, 0x43, 0xb0, 0x77, 0xe6, 0x42, 0xe6, 0x42, 0x66, 0xba, 0xff, 0x03,
        0xee,
    ];
    let kernel = file(&elf(&[&told, COUNT].concat()));
    let plain = file(&elf(COUNT));
    let saved = |kernel| {
        let machine = run(&config(kernel));
        wait_for_progress(&machine);
        pause(&machine);
        (machine.save().unwrap(), machine)
    };
    let (before, source) = saved(&kernel);
    let (untold, _) = saved(&plain);
    let after = take_in(&source, &mut KvmHost::default()).into_machine().save().unwrap();
    for kind in ["irqchip", "pit", "serial"] {
        let [before, after, untold] = [&before, &after, &untold].map(|sections| {
            let section = sections.iter().find(|section| section.kind == kind).unwrap();
            // The timer's third channel, 24 bytes each, less the last eight: when it was started.
            if kind == "pit" { &section.payload[8 + 2 * 24..][..16] } else { &section.payload[..] }
        });
        assert!(before == after, "{kind} is not the same");
        assert!(before != untold, "{kind}: the guest has told it nothing");
    }
}

fn a_failed_move_leaves_the_source_as_it_was() {
    let kernel = file(&elf(COUNT));
    let source = run(&config(&kernel));
    wait_for_progress(&source);
    source.dirty_log().start().unwrap();
    pause(&source);
    let incoming = take_in(&source, &mut KvmHost::default());
    drop(incoming);
    source.dirty_log().stop().unwrap();
    source.resume().unwrap();
    wait_for_progress(&source);
}

fn a_machine_from_elsewhere_can_reboot() {
    // If COUNTER is not 7, stays; else resets. mov eax, [COUNTER]; cmp al, 7; jne to the start; mov al, 0xfe; out 0x64, al
    let code = [0xa1, 0x00, 0x00, 0x20, 0x00, 0x3c, 0x07, 0x75, 0xf7, 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
    let kernel = file(&elf(&code));
    let folder = kernel.path().parent().unwrap().to_owned();
    for (boot_file_dirs, allowed) in [(vec![folder], true), (Vec::new(), false)] {
        let source = run(&config(&kernel));
        pause(&source);
        let mut host = KvmHost::new(HostOptions { boot_file_dirs, ..Default::default() });
        let mut incoming = take_in(&source, &mut host);
        incoming.start().unwrap();
        let machine = incoming.into_machine();
        let events = machine.events();
        machine.memory().write_obj(7u32, GuestAddress(guests::COUNTER)).unwrap();
        let event = guests::next(&events);
        assert_eq!(event == godwit_vmm::MachineEvent::Reset, allowed, "{event:?}");
        assert_eq!(machine.is_running(), allowed);
        if allowed {
            assert_eq!(counter(&machine), 0, "memory is as at power-on");
        }
    }
}

fn a_running_machine_is_not_saved() {
    let kernel = file(&elf(COUNT));
    let machine = run(&config(&kernel));
    let error = machine.save().unwrap_err().to_string();
    assert!(error.contains("running"), "{error}");
    wait_for_progress(&machine);
}

fn hostile_sections_are_refused() {
    let kernel = file(&elf(COUNT));
    let source = run(&MachineConfig { vcpus: 2, ..config(&kernel) });
    wait_for_progress(&source);
    pause(&source);
    let good = source.save().unwrap();
    let mut incoming = KvmHost::default().prepare(&source.describe().unwrap()).unwrap();
    assert!(incoming.start().is_err(), "nothing has been loaded yet");
    let mut refused = |what: &str, change: &dyn Fn(&mut Vec<Section>)| {
        let mut sections = good.clone();
        change(&mut sections);
        let error = incoming.load(&sections, &LoadContext::default()).expect_err(what).to_string();
        assert!(incoming.start().is_err(), "{what}: must not start");
        error
    };
    let swap = |sections: &mut Vec<Section>, a: usize, b: usize| {
        let payload = sections[a].payload.clone();
        sections[a].payload = sections[b].payload.clone();
        sections[b].payload = payload;
    };
    assert!(refused("nothing", &|sections| sections.clear()).contains("vcpu/0"));
    assert!(refused("a vCPU less", &|sections| drop(sections.remove(1))).contains("vcpu/1"));
    assert!(refused("a section twice", &|sections| sections.push(sections[3].clone())).contains("pit"));
    assert!(refused("unknown kind", &|sections| sections[5].kind = "tpm".into()).contains("tpm"));
    assert!(refused("unknown version", &|sections| sections[4].version = 2).contains("clock"));
    assert!(refused("empty payload", &|sections| sections[0].payload.clear()).contains("vcpu/0"));
    assert!(refused("trailing bytes", &|sections| sections[2].payload.push(0)).contains("irqchip"));
    assert!(refused("swapped", &|sections| swap(sections, 2, 3)).contains("irqchip"));
    for section in 0..good.len() {
        let whole = good[section].payload.len();
        for length in [1, 7, whole / 2, whole - 1].into_iter().filter(|length| *length < whole) {
            let error = refused("cut short", &|sections| sections[section].payload.truncate(length));
            assert!(error.contains(&good[section].kind), "{error}");
        }
    }
    // Damage anywhere is refused or harmless, and never more than that.
    let mut state = 1u64;
    for _ in 0..300 {
        let mut sections = good.clone();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let payload = &mut sections[(state >> 60) as usize % good.len()].payload;
        let at = (state >> 16) as usize % payload.len();
        payload[at] ^= 1 << (state >> 56 & 7);
        let _ = incoming.load(&sections, &LoadContext { clock_offset_ns: state as i64 });
    }
    // The machine is still good for the real state.
    copy_memory(&source, &incoming);
    incoming.load(&good, &LoadContext::default()).unwrap();
    incoming.start().unwrap();
    wait_for_progress(&incoming.into_machine());
}

fn every_refusal_is_given_by_name() {
    let machine = run(&writer(2));
    let description = machine.describe().unwrap();
    let reasons = |options: HostOptions, description: &MachineDescription| {
        KvmHost::new(options).check(description, &[]).refusals.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let has = |reasons: &[String], expected: &str| {
        assert!(reasons.iter().any(|reason| reason.contains(expected)), "{expected:?} in {reasons:?}");
    };
    assert_eq!(reasons(HostOptions::default(), &description), Vec::<String>::new());

    let mut odd = description.clone();
    odd.sections[0].version = 99;
    odd.sections.push(SectionVersion { kind: "gpu".into(), version: 1 });
    let options = HostOptions {
        serial: SerialTarget::Unix("/nonexistent/socket".into()),
        mask_cpu_features: vec!["clwb".into(), "x2apic".into()],
        pretend_tsc_khz: Some(1_000_000),
        ..Default::default()
    };
    let reasons_for_odd = reasons(options, &odd);
    for expected in [
        "clwb (leaf 0x7 ebx bit 24)",
        "x2apic (leaf 0x1 ecx bit 21)",
        "tsc: the guest's TSC runs at",
        "section vcpu/0 has version 99",
        "no section \"gpu\"",
        "/nonexistent/socket",
    ] {
        has(&reasons_for_odd, expected);
    }

    let huge = MachineConfig { memory: ByteSize(4 << 40), ..writer(1) };
    let small = run(&writer(1)).describe().unwrap();
    let text = String::from_utf8_lossy(&small.vmm).into_owned();
    assert!(text.contains("memory = \"256M\""), "{text}");
    // The same description with another size, as a machine of that size would give it.
    let vmm = replace(&small.vmm, b"memory = \"256M\"", b"memory = \"4T\"  ");
    let memory = vec![
        godwit_core::machine::RegionDescription { guest_address: 0, size_bytes: 3 << 30 },
        godwit_core::machine::RegionDescription { guest_address: 4 << 30, size_bytes: huge.memory.bytes() - (3 << 30) },
    ];
    has(
        &reasons(HostOptions::default(), &MachineDescription { vmm, memory, ..small.clone() }),
        "4T of available memory",
    );
    let unknown_key = replace(&small.vmm, b"memory = \"256M\"", b"memoryx= \"256M\"");
    has(&reasons(HostOptions::default(), &MachineDescription { vmm: unknown_key, ..small.clone() }), "memoryx");
    has(&reasons(HostOptions::default(), &MachineDescription { vmm: vec![1, 2], ..small }), "cannot read");
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    [&bytes[..at], to, &bytes[at + to.len()..]].concat()
}

fn kvms_clock_goes_on_by_the_true_pause() {
    let source = run(&writer(1));
    wait_until("it works", || heartbeats(&source, 1)[0] > 3);
    pause(&source);
    // `system_time` of the structure that KVM keeps up to date in guest memory.
    let address = layout::HEADER + layout::field::VCPU_LINES + layout::line::PVCLOCK + 16;
    let system_time = |machine: &Machine| {
        Duration::from_nanos(u64::from_le_bytes(machine.read_memory(address, 8).unwrap().try_into().unwrap()))
    };
    let left_at = system_time(&source);
    assert!(left_at > Duration::ZERO);
    let sections = source.save().unwrap();
    let paused = Instant::now();
    let mut incoming = KvmHost::default().prepare(&source.describe().unwrap()).unwrap();
    copy_memory(&source, &incoming);
    // As if this host's clock were an hour behind the source's: an hour more has passed than its clock says.
    let hour = Duration::from_secs(3600);
    incoming.load(&sections, &LoadContext { clock_offset_ns: -3_600_000_000_000 }).unwrap();
    incoming.start().unwrap();
    let destination = incoming.into_machine();
    wait_until("KVM has updated the clock", || system_time(&destination) > left_at);
    // What KVM wrote at the source is from a little before it was saved.
    let advanced = system_time(&destination) - left_at;
    let slack = Duration::from_secs(5);
    assert!(advanced >= hour && advanced < hour + paused.elapsed() + slack, "{advanced:?}");
}

fn a_tsc_never_goes_back() {
    // rdtsc; mov [COUNTER], eax; mov [COUNTER + 4], edx; jmp to the start
    let code = [0x0f, 0x31, 0xa3, 0x00, 0x00, 0x20, 0x00, 0x89, 0x15, 0x04, 0x00, 0x20, 0x00, 0xeb, 0xf1];
    let kernel = file(&elf(&code));
    let source = run(&config(&kernel));
    wait_for_progress(&source);
    pause(&source);
    let tsc = |machine: &Machine| {
        let bytes = machine.read_memory(guests::COUNTER, 8).unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap())
    };
    let left_at = tsc(&source);
    let mut sections = source.save().unwrap();
    let mut incoming = KvmHost::default().prepare(&source.describe().unwrap()).unwrap();
    copy_memory(&source, &incoming);
    incoming.load(&sections, &LoadContext::default()).unwrap();

    // The same guest from a host that has been up for a very long time. The TSC is the third word of its section.
    let clock = sections.iter_mut().find(|section| section.kind == "clock").unwrap();
    let far_ahead = 1u64 << 60;
    clock.payload[16..24].copy_from_slice(&far_ahead.to_le_bytes());
    match incoming.load(&sections, &LoadContext::default()) {
        Ok(()) => {
            incoming.start().unwrap();
            let destination = incoming.into_machine();
            wait_until("its time goes on", || tsc(&destination) != left_at);
            assert!(tsc(&destination) >= far_ahead);
        }
        // Where KVM leaves guests the host's own TSC, this move must not take place.
        Err(error) => assert!(error.to_string().contains("go back"), "{error}"),
    }

    let sections = source.save().unwrap();
    let mut incoming = KvmHost::default().prepare(&source.describe().unwrap()).unwrap();
    copy_memory(&source, &incoming);
    incoming.load(&sections, &LoadContext::default()).unwrap();
    incoming.start().unwrap();
    let destination = incoming.into_machine();
    wait_until("its time goes on", || tsc(&destination) != left_at);
    assert!(tsc(&destination) > left_at);
}

/// Not a judgement but a measurement: what a move costs inside the machine.
fn figures() {
    for vcpus in [1, 2] {
        let source = run(&writer(vcpus));
        wait_until("it works", || heartbeats(&source, u64::from(vcpus)).iter().all(|beat| *beat > 3));
        let time = |what: &str, body: &mut dyn FnMut()| {
            let start = Instant::now();
            body();
            println!("{vcpus} vCPUs: {what} {:?}", start.elapsed());
        };
        time("pause", &mut || pause(&source));
        let mut sections = Vec::new();
        for _ in 0..3 {
            time("save", &mut || sections = source.save().unwrap());
        }
        println!("{vcpus} vCPUs: state {} bytes", sections.iter().map(|s| s.payload.len()).sum::<usize>());
        let description = source.describe().unwrap();
        let mut host = KvmHost::default();
        time("check", &mut || assert!(host.check(&description, &[]).refusals.is_empty()));
        let mut incoming = None;
        time("prepare", &mut || incoming = Some(host.prepare(&description).unwrap()));
        let mut incoming = incoming.unwrap();
        for _ in 0..3 {
            time("load", &mut || incoming.load(&sections, &LoadContext::default()).unwrap());
        }
        copy_memory(&source, &incoming);
        time("start", &mut || incoming.start().unwrap());
        let moved = incoming.into_machine();
        for _ in 0..3 {
            time("pause", &mut || pause(&moved));
            time("resume", &mut || moved.resume().unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
