//! How much time passes, and how many pages are due.
//!
//! Only differences of the TSC count, scaled by what KVM's clock says a tick is worth. A jump (the vCPU was
//! stopped, or goes on under another host's TSC) is bounded in both directions, so it is never caught up with.

use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use super::header::{u32_at, vcpu_line};
use super::layout::line;

/// Longest time between two readings that counts.
const MAX_ELAPSED_NS: u64 = 20_000_000;

/// Most ticks between two readings that count: keeps the arithmetic within 64 bits.
const MAX_ELAPSED_TICKS: u64 = (1 << 28) - 1;

/// Without KVM's clock a tick is taken to be half a nanosecond (2 GHz).
const FALLBACK_SCALE: Scale = Scale { multiplier: 1 << 31, shift: 0 };

/// A tick's worth, as in `pvclock_vcpu_time_info`: ns = (ticks << shift) · multiplier / 2^32.
#[derive(Clone, Copy)]
struct Scale {
    multiplier: u32,
    shift: i8,
}

/// One vCPU's clock.
pub struct Clock {
    pvclock: u64,
    scale: Scale,
    last_tsc: u64,
    fraction: u64,
}

impl Clock {
    /// The clock of vCPU `vcpu`, starting now.
    pub fn new(vcpu: u64) -> Self {
        let mut clock =
            Self { pvclock: vcpu_line(vcpu) + line::PVCLOCK, scale: FALLBACK_SCALE, last_tsc: 0, fraction: 0 };
        clock.elapsed_ns();
        clock
    }

    /// Nanoseconds since the last call, at most [`MAX_ELAPSED_NS`]. Fractions are carried over.
    #[inline(always)]
    pub fn elapsed_ns(&mut self) -> u64 {
        self.read_scale();
        // SAFETY: every x86-64 CPU has these, and CR4.TSD is clear.
        let now = unsafe {
            _mm_lfence();
            _rdtsc()
        };
        let ticks = now.wrapping_sub(self.last_tsc);
        self.last_tsc = now;
        // A TSC that went backwards is a huge difference here.
        let ticks = if ticks > 1 << 63 { 0 } else { ticks.min(MAX_ELAPSED_TICKS) };
        let scaled = if self.scale.shift >= 0 {
            (ticks << self.scale.shift) * u64::from(self.scale.multiplier)
        } else {
            (ticks * u64::from(self.scale.multiplier)) >> -self.scale.shift
        };
        let total = scaled + self.fraction;
        self.fraction = total & 0xffff_ffff;
        (total >> 32).min(MAX_ELAPSED_NS)
    }

    /// Takes over the scale from KVM's clock unless it is absent or being changed at this moment.
    #[inline(always)]
    fn read_scale(&mut self) {
        // pvclock_vcpu_time_info: u32 version at 0, u32 tsc_to_system_mul at 24, i8 tsc_shift at 28.
        let version = u32_at(self.pvclock).load(Acquire);
        let multiplier = u32_at(self.pvclock + 24).load(Acquire);
        let shift = u32_at(self.pvclock + 28).load(Acquire) as i8;
        let settled = version == u32_at(self.pvclock).load(Relaxed) && version != 0 && version & 1 == 0;
        if settled && multiplier != 0 && (-31..=3).contains(&shift) {
            self.scale = Scale { multiplier, shift };
        }
    }
}

/// Waits until `ns` nanoseconds have been seen to pass, calling `meanwhile` over and over.
pub fn wait(clock: &mut Clock, ns: u64, mut meanwhile: impl FnMut()) {
    let mut left = ns;
    while left > 0 {
        core::hint::spin_loop();
        meanwhile();
        left = left.saturating_sub(clock.elapsed_ns());
    }
}

/// Page writes that are due.
pub struct Budget {
    /// In nanoseconds × pages per second: a page is 10^9 of these.
    credit: u64,
}

/// One page write.
const PAGE_CREDIT: u64 = 1_000_000_000;

/// Rates above this are more than any vCPU can do; keeps the arithmetic within 64 bits.
pub const MAX_PACED_RATE: u64 = 1_000_000_000;

/// Most writes handed out at once: the heartbeat and changes of the rate wait for no longer.
pub const BATCH: u64 = 16;

impl Budget {
    /// Nothing is due.
    pub fn new() -> Self {
        Self { credit: 0 }
    }

    /// Takes note of the time that passed, and hands out what is due at `rate` pages per second (at most
    /// [`MAX_PACED_RATE`]).
    #[inline(always)]
    pub fn take(&mut self, elapsed_ns: u64, rate: u64) -> u64 {
        // What could not be written in the bounded time is forgotten too.
        let bound = MAX_ELAPSED_NS * rate + PAGE_CREDIT;
        self.credit = (self.credit + elapsed_ns * rate).min(bound);
        if self.credit < PAGE_CREDIT {
            return 0;
        }
        let due = if self.credit < 2 * PAGE_CREDIT { 1 } else { (self.credit / PAGE_CREDIT).min(BATCH) };
        self.credit -= due * PAGE_CREDIT;
        due
    }

    /// Forgets what is due.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.credit = 0;
    }
}
