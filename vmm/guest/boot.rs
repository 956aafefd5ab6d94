//! What the boot processor does before anybody writes: learn what RAM there is, leave low memory as zeros,
//! start the other vCPUs, and share out the fill.

use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use super::clock::{Clock, wait};
use super::header::{Counter, u32_at, u64_at};
use super::layout::{
    LARGE_PAGE_FLAGS, LOW_MEMORY_END, MAX_GIB, MAX_RANGES, PAGE_BYTES, STATIC_GIB, TABLE_FLAGS, TRAMPOLINE, field,
    status,
};
use super::rules::{PAGE_WORDS, WordRule, page_key};
use super::{frames, writer};

/// `hvm_start_info`: its magic, and the offsets of the fields used here.
const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u64 = 4;
const START_INFO_MEMMAP: u64 = 40;
const START_INFO_MEMMAP_ENTRIES: u64 = 48;
const MEMMAP_ENTRY_BYTES: u64 = 24;
const MEMMAP_TYPE_RAM: u32 = 1;

/// Local APIC registers.
const LAPIC: u64 = 0xfee0_0000;
const LAPIC_SPURIOUS: u64 = 0xf0;
const LAPIC_ICR: u64 = 0x300;
const ICR_INIT_OTHERS: u32 = 0x000c_4500;
const ICR_STARTUP_OTHERS: u32 = 0x000c_4600 | (TRAMPOLINE >> 12) as u32;

/// When for so long no vCPU has arrived, all are here.
const ARRIVAL_QUIET_NS: u64 = 100_000_000;

/// Set in the arrived field when nobody is waited for any more.
const ARRIVED_SEALED: u32 = 1 << 31;

/// Pages that a vCPU takes at a time to fill.
const FILL_CHUNK_PAGES: u64 = 128;

fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the first 4 GiB are mapped, which is where these are; reading what is not RAM gives some value.
    unsafe { read_volatile(address as *const T) }
}

fn write(address: u64, value: u64) {
    // SAFETY: callers write RAM that belongs to them.
    unsafe { write_volatile(address as *mut u64, value) };
}

/// Writes the ranges of RAM above the image into the header page and compares them with the settings.
///
/// Runs at CPL 0, where each instruction may cost a microsecond: short, and no floating-point registers.
pub extern "C" fn find_memory() -> u32 {
    match try_find_memory() {
        Ok(()) => 0,
        Err(status) => status,
    }
}

fn try_find_memory() -> Result<(), u32> {
    let start_info = u64_at(field::START_INFO).load(Relaxed);
    let entries: u32 = read(start_info + START_INFO_MEMMAP_ENTRIES);
    if read::<u32>(start_info) != START_INFO_MAGIC || read::<u32>(start_info + START_INFO_VERSION) == 0 || entries == 0
    {
        return Err(status::NO_MEMORY_MAP);
    }
    let map: u64 = read(start_info + START_INFO_MEMMAP);
    let mut above = u64_at(field::IMAGE_END).load(Relaxed);
    // Page tables for what lies above the first 4 GiB take the first pages above the image.
    let mapped_gib = highest_ram(map, entries).div_ceil(1 << 30).max(STATIC_GIB);
    if mapped_gib > MAX_GIB {
        return Err(status::MEMORY_MAP_TOO_LARGE);
    }
    u64_at(field::MAPPED_GIB).store(mapped_gib, Relaxed);
    let tables_bytes = (mapped_gib - STATIC_GIB) * PAGE_BYTES;
    match next_ram(map, entries, above) {
        Some((start, end)) if start == above && end - start >= tables_bytes => above += tables_bytes,
        _ => return Err(status::DOES_NOT_FIT),
    }
    // Entries may come in any order: take the lowest that lies above what was taken, until none is left.
    let mut frames = 0;
    let mut count = 0;
    while let Some((start, end)) = next_ram(map, entries, above) {
        if count == MAX_RANGES as u64 {
            return Err(status::MEMORY_MAP_TOO_LARGE);
        }
        let pages = (end - start) / PAGE_BYTES;
        u64_at(field::RANGES + count * 16).store(start, Relaxed);
        u64_at(field::RANGES + count * 16 + 8).store(pages, Relaxed);
        count += 1;
        frames += pages;
        above = end;
    }
    u32_at(field::RANGE_COUNT).store(count as u32, Relaxed);
    u64_at(field::FRAMES).store(frames, Relaxed);
    let asked = u64_at(field::WORKING_SET_PAGES).load(Relaxed).max(u64_at(field::FILL_PAGES).load(Relaxed));
    if asked > frames { Err(status::DOES_NOT_FIT) } else { Ok(()) }
}

/// Maps what lies above the first [`STATIC_GIB`] GiB, by tables just above the image.
pub fn add_tables() {
    let pointers = u64_at(field::TABLES).load(Relaxed) + PAGE_BYTES;
    let mut table = u64_at(field::IMAGE_END).load(Relaxed);
    for gib in STATIC_GIB..u64_at(field::MAPPED_GIB).load(Relaxed) {
        for entry in 0..512 {
            write(table + entry * 8, (gib << 30) + (entry << 21) + LARGE_PAGE_FLAGS);
        }
        write(pointers + gib * 8, table + TABLE_FLAGS);
        table += PAGE_BYTES;
    }
}

/// Where the highest RAM ends.
fn highest_ram(map: u64, entries: u32) -> u64 {
    (0..u64::from(entries)).filter_map(|index| ram(map, index)).map(|(_, end)| end).max().unwrap_or(0)
}

/// The lowest whole pages of RAM at or above `above`.
fn next_ram(map: u64, entries: u32, above: u64) -> Option<(u64, u64)> {
    let mut lowest: Option<(u64, u64)> = None;
    for (address, end) in (0..u64::from(entries)).filter_map(|index| ram(map, index)) {
        let start = address.max(above);
        if start < end && lowest.is_none_or(|(first, _)| start < first) {
            lowest = Some((start, end));
        }
    }
    lowest
}

/// The whole pages of an entry of the memory map, if it is RAM.
fn ram(map: u64, index: u64) -> Option<(u64, u64)> {
    let entry = map + index * MEMMAP_ENTRY_BYTES;
    if read::<u32>(entry + 16) != MEMMAP_TYPE_RAM {
        return None;
    }
    let address: u64 = read(entry);
    let end = address.saturating_add(read(entry + 8)) & !(PAGE_BYTES - 1);
    Some((address.saturating_add(PAGE_BYTES - 1) & !(PAGE_BYTES - 1), end))
}

/// Zeros low memory (what the guest was booted with lies there) and notes which of its pages are ROM.
pub fn clear_low_memory() {
    for page in 0..LOW_MEMORY_END / PAGE_BYTES {
        let first = (page * PAGE_BYTES) as *mut u64;
        // SAFETY: low memory is mapped, and nothing of the guest lies in it.
        let rom = unsafe {
            let inverse = !read_volatile(first);
            write_volatile(first, inverse);
            read_volatile(first) != inverse
        };
        if rom {
            u64_at(field::LOW_ROM + page / 64 * 8).fetch_or(1 << (page % 64), Relaxed);
            continue;
        }
        for word in 0..PAGE_WORDS {
            // SAFETY: as above.
            unsafe { write_volatile(first.add(word), 0) };
        }
    }
}

/// Makes every other vCPU run the trampoline.
pub fn start_others(clock: &mut Clock) {
    let source = u64_at(field::TRAMPOLINE_SOURCE).load(Relaxed);
    for byte in 0..u64_at(field::TRAMPOLINE_BYTES).load(Relaxed) {
        // SAFETY: the trampoline is shorter than the page that was just cleared for it.
        unsafe { write_volatile((TRAMPOLINE + byte) as *mut u8, read(source + byte)) };
    }
    u32_at(field::ARRIVED).store(1, Release);
    let lapic = |register: u64, value: u32| {
        // SAFETY: the local APIC's registers, mapped like all else.
        unsafe { write_volatile((LAPIC + register) as *mut u32, value) };
    };
    lapic(LAPIC_SPURIOUS, 0x1ff);
    lapic(LAPIC_ICR, ICR_INIT_OTHERS);
    wait(clock, 1_000_000, || ());
    for _ in 0..2 {
        lapic(LAPIC_ICR, ICR_STARTUP_OTHERS);
        wait(clock, 200_000, || ());
    }
}

/// Takes part in the fill until all of it has been taken.
pub fn fill(rule: WordRule, heartbeat: &mut Counter) {
    let seed = u64_at(field::SEED).load(Relaxed);
    let pages = u64_at(field::FILL_PAGES).load(Relaxed);
    loop {
        let first = u64_at(field::FILL_NEXT).fetch_add(FILL_CHUNK_PAGES, AcqRel);
        if first >= pages {
            return;
        }
        let end = pages.min(first + FILL_CHUNK_PAGES);
        for frame in first..end {
            // SAFETY: the frame lies in RAM above the image, and this vCPU alone has taken it.
            unsafe { writer::fill(frames::address(frame), rule, page_key(seed, frame)) };
            heartbeat.advance();
        }
        u64_at(field::FILLED).fetch_add(end - first, AcqRel);
    }
}

/// Waits until nobody arrives any more and the fill is done, then lets all vCPUs begin.
pub fn begin(clock: &mut Clock, heartbeat: &mut Counter) {
    let mut arrived = 0;
    loop {
        let now = u32_at(field::ARRIVED).load(Acquire);
        if now == arrived {
            break;
        }
        arrived = now;
        wait(clock, ARRIVAL_QUIET_NS, || heartbeat.advance());
    }
    let pages = u64_at(field::FILL_PAGES).load(Relaxed);
    while u64_at(field::FILLED).load(Acquire) < pages {
        core::hint::spin_loop();
        heartbeat.advance();
    }
    let arrived = u32_at(field::ARRIVED).fetch_or(ARRIVED_SEALED, AcqRel);
    u32_at(field::VCPUS).store(arrived.min(super::layout::MAX_VCPUS as u32), Relaxed);
    u32_at(field::STATUS).store(status::RUNNING, Release);
}
