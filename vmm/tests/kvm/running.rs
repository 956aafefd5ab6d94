//! Pausing, resuming, throttling, and the dirty log.

use std::thread;
use std::time::{Duration, Instant};

use godwit_core::SourceMachine;
use godwit_core::machine::Hold;
use godwit_vmm::config::ByteSize;
use godwit_vmm::workload::{Rate, WriterConfig};
use godwit_vmm::{BootOptions, Machine, MachineConfig, MachineStatus};
use vm_memory::{Bytes, GuestAddress};

use super::guests::{
    self, COUNT, COUNTER, config, counter, elf, file, heartbeats, pause, read_u32, run, wait_for_progress, wait_until,
    writer,
};
use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("running::a_paused_machine_stands_still_and_goes_on", a_paused_machine_stands_still_and_goes_on),
    ("running::pausing_is_quick_and_no_kick_is_lost", pausing_is_quick_and_no_kick_is_lost),
    ("running::a_halted_guest_can_be_paused", a_halted_guest_can_be_paused),
    ("running::a_throttled_guest_gets_its_share", a_throttled_guest_gets_its_share),
    ("running::a_vcpu_that_only_reads_is_left_alone", a_vcpu_that_only_reads_is_left_alone),
    ("running::the_dirty_log_finds_exactly_what_was_written", the_dirty_log_finds_exactly_what_was_written),
    ("running::the_dirty_log_ends_with_the_region", the_dirty_log_ends_with_the_region),
    ("running::a_dropped_machine_leaves_nothing_behind", a_dropped_machine_leaves_nothing_behind),
];

fn a_paused_machine_stands_still_and_goes_on() {
    let kernel = file(&elf(COUNT));
    let machine = Machine::boot(&config(&kernel), &BootOptions { start_paused: true }).unwrap();
    assert!(!machine.is_running());
    thread::sleep(Duration::from_millis(20));
    assert_eq!(counter(&machine), 0, "started paused");
    machine.resume().unwrap();
    for _ in 0..3 {
        wait_for_progress(&machine);
        pause(&machine);
        pause(&machine);
        assert_eq!(machine.status(), MachineStatus::Paused);
        let stood = counter(&machine);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(counter(&machine), stood);
        machine.resume().unwrap();
        machine.resume().unwrap();
    }
}

fn pausing_is_quick_and_no_kick_is_lost() {
    let machine = run(&writer(2));
    wait_until("it works", || heartbeats(&machine, 2).iter().all(|beat| *beat > 0));
    let mut times = Vec::new();
    for round in 0..500u64 {
        // At ever different moments of the guest's life.
        thread::sleep(Duration::from_micros(round % 7 * 100));
        let start = Instant::now();
        pause(&machine);
        times.push(start.elapsed());
        machine.resume().unwrap();
    }
    times.sort();
    println!("pause of 2 vCPUs: median {:?}, largest {:?}", times[times.len() / 2], times[times.len() - 1]);
    assert!(times[times.len() / 2] < Duration::from_millis(2), "median {:?}", times[times.len() / 2]);
}

fn a_halted_guest_can_be_paused() {
    // cli; hlt; jmp $-2
    let kernel = file(&elf(&[0xfa, 0xf4, 0xeb, 0xfd]));
    let machine = run(&config(&kernel));
    thread::sleep(Duration::from_millis(20));
    pause(&machine);
    machine.save().unwrap();
    machine.resume().unwrap();
}

fn a_throttled_guest_gets_its_share() {
    let kernel = file(&elf(COUNT));
    let machine = run(&config(&kernel));
    let thread_id = machine.cpus()[0].thread_id;
    // The share of a CPU that the vCPU's thread has, and how often it sleeps of its own will. On a busy host the share is
    // smaller than it may be, but never larger; and a vCPU that is not throttled never sleeps while its guest counts.
    let look = || {
        let (start, time, sleeps) = (Instant::now(), cpu_time(thread_id), sleeps(thread_id));
        thread::sleep(Duration::from_millis(300));
        let share = (cpu_time(thread_id) - time).as_secs_f64() / start.elapsed().as_secs_f64();
        (share, self::sleeps(thread_id) - sleeps)
    };
    wait_until("the guest is not held back", || look().1 <= 2);
    machine.throttle(Hold::to(0.1));
    wait_until("the guest has little of a CPU", || matches!(look(), (share, 5..) if share < 0.3));
    wait_for_progress(&machine);
    // While it rests it can be paused, and the throttle's end is felt.
    pause(&machine);
    machine.resume().unwrap();
    wait_until("it is still throttled", || matches!(look(), (share, 5..) if share < 0.3));
    machine.throttle(Hold::NONE);
    wait_until("the guest is not held back any more", || look().1 <= 2);
    wait_for_progress(&machine);
}

fn a_vcpu_that_only_reads_is_left_alone() {
    let one_writes = WriterConfig { rate: Rate::Max, writers: 1, ..WriterConfig::default() };
    let machine = run(&MachineConfig { writer: Some(one_writes), ..writer(2) });
    let [writes, reads] = [0, 1].map(|cpu| machine.cpus()[cpu].thread_id);
    wait_until("it works", || heartbeats(&machine, 2).iter().all(|beat| *beat > 1000));
    machine.dirty_log().start().unwrap();
    let mut words = vec![0; (256 << 20) / 4096 / 64];
    // What was written is protected again, as in a move: that is how those that write are known.
    let mut slept = |time: Duration| {
        let (until, before) = (Instant::now() + time, [writes, reads].map(sleeps));
        while Instant::now() < until {
            machine.dirty_log().harvest(0, &mut words).unwrap();
            machine.dirty_log().clear(0, 0, &words).unwrap();
            words.fill(0);
            thread::sleep(Duration::from_millis(10));
        }
        [sleeps(writes) - before[0], sleeps(reads) - before[1]]
    };
    machine.throttle(Hold::to(0.2));
    // A vCPU that is not throttled never sleeps.
    let until = Instant::now() + guests::PATIENCE;
    while !matches!(slept(Duration::from_millis(300)), [writer, reader] if writer >= 5 && reader <= 2) {
        assert!(Instant::now() < until, "who writes is not told from who reads");
    }
    machine.throttle(Hold::NONE);
    machine.dirty_log().stop().unwrap();
}

/// How often a thread of this process has gone to sleep of its own will.
fn sleeps(thread_id: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/self/task/{thread_id}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

/// How long a thread of this process has been on a CPU.
fn cpu_time(thread_id: i32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread_id}/stat")).unwrap();
    // User and system time, in hundredths of a second, counted from behind the name.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

fn the_dirty_log_finds_exactly_what_was_written() {
    // Counts in COUNTER, and in the page whose address is in COUNTER + 4.
    // mov eax, [COUNTER + 4]; inc dword [eax]; inc dword [COUNTER]; jmp to the start
    let code = [0xa1, 0x04, 0x00, 0x20, 0x00, 0xff, 0x00, 0xff, 0x05, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf1];
    let kernel = file(&elf(&code));
    let machine = Machine::boot(&config(&kernel), &BootOptions { start_paused: true }).unwrap();
    let memory = machine.memory();
    let steer = |page: u32| {
        memory.write_obj(page * 4096, GuestAddress(COUNTER + 4)).unwrap();
        wait_until("the guest writes there", || {
            let before = read_u32(&machine, u64::from(page) * 4096);
            before != 0 && read_u32(&machine, u64::from(page) * 4096) != before
        });
    };
    let log = machine.dirty_log();
    let pages = (64 << 20) / 4096;
    let mut words = vec![0; pages / 64];
    log.start().unwrap();
    machine.resume().unwrap();
    steer(0x1000);
    log.harvest(0, &mut words).unwrap();
    assert!(words.iter().all(|word| *word == u64::MAX), "everything is dirty at the start");
    // Cleared in stripes, as the engine does.
    for stripe in 0..pages / 512 {
        log.clear(0, stripe as u64 * 512, &words[stripe * 8..][..8]).unwrap();
    }
    for page in [0x1000u32, 0x1fff, 0x3fff] {
        steer(page);
        pause(&machine);
        let mut words = vec![0; pages / 64];
        log.harvest(0, &mut words).unwrap();
        let dirty: Vec<_> = (0..pages).filter(|page| words[page / 64] & 1 << (page % 64) != 0).collect();
        assert!(dirty.contains(&(page as usize)), "{page:#x} in {dirty:x?}");
        assert!(dirty.contains(&(COUNTER as usize / 4096)), "{dirty:x?}");
        assert!(dirty.len() <= 3, "{dirty:x?}");
        // A harvest only adds.
        let mut more = vec![1 << 63; words.len()];
        log.harvest(0, &mut more).unwrap();
        assert!(more.iter().zip(&words).all(|(more, words)| *more == words | 1 << 63));
        for (word, bits) in words.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            log.clear(0, word as u64 * 64, &[*bits]).unwrap();
        }
        machine.resume().unwrap();
    }
    log.stop().unwrap();
    log.stop().unwrap();
}

fn the_dirty_log_ends_with_the_region() {
    let kernel = file(&elf(COUNT));
    // A number of pages that is no multiple of 64.
    let machine = run(&MachineConfig { memory: ByteSize((8 << 20) + 5 * 4096), ..config(&kernel) });
    wait_for_progress(&machine);
    let log = machine.dirty_log();
    log.start().unwrap();
    let mut words = vec![0; 2053usize.div_ceil(64)];
    log.harvest(0, &mut words).unwrap();
    assert_eq!(words[32], 0b11111);
    log.clear(0, 2048, &words[32..]).unwrap();
    let mut words = vec![0; words.len()];
    log.harvest(0, &mut words).unwrap();
    assert_eq!(words[32], 0);
    assert_eq!(words[31], u64::MAX);
    assert!(log.clear(0, 1, &[1]).is_err());
    assert!(log.clear(0, 2112, &[1]).is_err());
    assert!(log.harvest(1, &mut words).is_err());
}

fn a_dropped_machine_leaves_nothing_behind() {
    let entries = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let kernel = file(&elf(COUNT));
    // What the process keeps for good comes with the first machine.
    drop(run(&guests::writer(2)));
    let before = (entries("fd"), entries("task"));
    for _ in 0..3 {
        let machine = run(&config(&kernel));
        let memory = machine.memory();
        wait_for_progress(&machine);
        drop(machine);
        // Memory that somebody still holds stays readable.
        assert!(memory.read_obj::<u32>(GuestAddress(COUNTER)).unwrap() > 0);
    }
    // The kernel lists a thread for a moment longer than it can be waited for.
    wait_until("files and threads are gone", || (entries("fd"), entries("task")) == before);
}
