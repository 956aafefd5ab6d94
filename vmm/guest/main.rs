//! The workload guest: a bare-metal image that rewrites memory at a chosen rate.
//!
//! Booted by the PVH protocol, it runs at CPL 3 on every vCPU. `docs/workload-guest.md` says what it does
//! to memory; `entry.s` is the part that needs privilege.

#![no_std]
#![no_main]

mod boot;
mod clock;
mod frames;
mod header;
#[allow(dead_code, reason = "the library uses the rest")]
mod layout;
#[allow(dead_code, reason = "the library uses the rest")]
mod rules;
mod writer;

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use clock::{BATCH, Budget, Clock, MAX_PACED_RATE};
use header::{Counter, u32_at, u64_at};
use layout::{RATE_MAX, field, status, write};
use rules::{Sequence, WordRule, page_key, share, writers};

core::arch::global_asm!(
    include_str!("entry.s"),
    LAYOUT_VERSION = const layout::LAYOUT_VERSION,
    TABLES_FIELD = const field::TABLES,
    STACKS_FIELD = const field::STACKS,
    IMAGE_END_FIELD = const field::IMAGE_END,
    TRAMPOLINE_FIELD = const field::TRAMPOLINE_SOURCE,
    TRAMPOLINE_BYTES_FIELD = const field::TRAMPOLINE_BYTES,
    HEADER = const layout::HEADER,
    STATUS = const field::STATUS,
    START_INFO = const field::START_INFO,
    ARRIVED = const field::ARRIVED,
    VCPU_LINES = const field::VCPU_LINES,
    VCPU_LINE_BYTES = const layout::VCPU_LINE_BYTES,
    PVCLOCK = const layout::line::PVCLOCK,
    MAX_VCPUS = const layout::MAX_VCPUS,
    TRAMPOLINE_PAGE = const layout::TRAMPOLINE,
    STACK_BYTES = const layout::STACK_BYTES,
    STATIC_GIB = const layout::STATIC_GIB,
    TABLE_FLAGS = const layout::TABLE_FLAGS,
    LARGE_PAGE_FLAGS = const layout::LARGE_PAGE_FLAGS,
    FIND_MEMORY = sym boot::find_memory,
    GUEST_MAIN = sym guest_main,
    options(att_syntax)
);

/// Where every vCPU arrives at CPL 3.
extern "C" fn guest_main(vcpu: u64) -> ! {
    let mut clock = Clock::new(vcpu);
    let mut heartbeat = Counter::heartbeat(vcpu);
    let Some(rule) = WordRule::new(u32_at(field::CONTENTS).load(Relaxed)) else { stop(status::BAD_SETTING) };
    if vcpu == 0 {
        boot::add_tables();
        boot::clear_low_memory();
        boot::start_others(&mut clock);
        boot::fill(rule, &mut heartbeat);
        boot::begin(&mut clock, &mut heartbeat);
    } else {
        boot::fill(rule, &mut heartbeat);
        while u32_at(field::STATUS).load(Acquire) == status::BOOTING {
            core::hint::spin_loop();
            heartbeat.advance();
        }
    }
    match u32_at(field::WRITE).load(Relaxed) {
        write::WORD => work(vcpu, clock, heartbeat, rule, writer::write_word),
        write::PAGE => work(vcpu, clock, heartbeat, rule, writer::write_page),
        _ => stop(status::BAD_SETTING),
    }
}

/// Writes pages for ever, at the rate that the header page says at each moment.
#[inline(always)]
fn work(
    vcpu: u64,
    mut clock: Clock,
    mut heartbeat: Counter,
    rule: WordRule,
    write: unsafe fn(*mut u64, WordRule, u64),
) -> ! {
    let seed = u64_at(field::SEED).load(Relaxed);
    let vcpus = u64::from(u32_at(field::VCPUS).load(Relaxed));
    let writers = writers(u32_at(field::WRITERS).load(Relaxed), vcpus);
    let (first, pages) = share(u64_at(field::WORKING_SET_PAGES).load(Relaxed), vcpu, writers);
    let Some(sequence) = Sequence::new(u32_at(field::ORDER).load(Relaxed), seed, vcpu, pages) else {
        stop(status::BAD_SETTING)
    };
    let mut writes = Counter::writes(vcpu);
    let mut budget = Budget::new();
    loop {
        let elapsed_ns = clock.elapsed_ns();
        let due = match u64_at(field::RATE).load(Relaxed) {
            _ if pages == 0 => 0,
            RATE_MAX => {
                budget.clear();
                BATCH
            }
            rate => budget.take(elapsed_ns, share(rate.min(MAX_PACED_RATE), vcpu, writers).1),
        };
        for _ in 0..due {
            let frame = first + sequence.page(writes.value());
            // SAFETY: the frame lies in RAM above the image, in the part that only this vCPU writes.
            unsafe { write(frames::address(frame), rule, page_key(seed, frame)) };
            writes.advance();
            heartbeat.advance();
        }
        if due == 0 {
            core::hint::spin_loop();
            heartbeat.advance();
        }
    }
}

/// Says in the header page why this vCPU does nothing more. At CPL 3 it cannot be halted.
fn stop(status: u32) -> ! {
    u32_at(field::STATUS).store(status, Release);
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    stop(status::PANIC)
}
