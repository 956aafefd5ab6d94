//! The rate of this machine's time-stamp counter, which is also that of the emulated processors.
//!
//! A host that measures it against emulated timers is off by a part in a thousand, each host by another, and a guest cannot
//! move between hosts whose counters differ and cannot be scaled. So it is measured here and told to all.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_millis(200);

/// Looks at both clocks at once, of which the quickest counts: we may be interrupted between the two.
const LOOKS: u32 = 16;

/// Ticks per millisecond.
pub fn khz() -> u64 {
    let (start_ticks, start) = look();
    thread::sleep(WINDOW);
    let (end_ticks, end) = look();
    let elapsed_ns = end.duration_since(start).as_nanos().max(1);
    (u128::from(end_ticks.saturating_sub(start_ticks)) * 1_000_000 / elapsed_ns) as u64
}

/// The counter and the time at one instant.
fn look() -> (u64, Instant) {
    let once = |_| {
        let before = ticks();
        let now = Instant::now();
        let after = ticks();
        (after.saturating_sub(before), before + after.saturating_sub(before) / 2, now)
    };
    let (_, ticks, now) = (0..LOOKS).map(once).min_by_key(|(length, ..)| *length).unwrap_or((0, 0, Instant::now()));
    (ticks, now)
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and it touches no memory.
    unsafe { _rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree_within_what_kvm_tolerates() {
        let (first, second) = (khz(), khz());
        // KVM's default, in parts per million.
        assert!(first.abs_diff(second) * 1_000_000 <= first * 250, "{first} and {second} kHz");
    }
}
