//! The header page, from inside.

use core::sync::atomic::{AtomicU32, AtomicU64};

use super::layout::{HEADER, VCPU_LINE_BYTES, field, line};

/// The u64 at `offset` of the header page.
#[inline(always)]
pub fn u64_at(offset: u64) -> &'static AtomicU64 {
    // SAFETY: callers pass offsets of the layout: aligned, in the header page, which is always mapped.
    unsafe { &*((HEADER + offset) as *const AtomicU64) }
}

/// The u32 at `offset` of the header page.
#[inline(always)]
pub fn u32_at(offset: u64) -> &'static AtomicU32 {
    // SAFETY: as above.
    unsafe { &*((HEADER + offset) as *const AtomicU32) }
}

/// Offset of the line of vCPU `vcpu`.
#[inline(always)]
pub const fn vcpu_line(vcpu: u64) -> u64 {
    field::VCPU_LINES + vcpu * VCPU_LINE_BYTES
}

/// A counter of this vCPU's own line, which only it writes.
pub struct Counter {
    cell: &'static AtomicU64,
    value: u64,
}

impl Counter {
    /// The vCPU's heartbeat.
    pub fn heartbeat(vcpu: u64) -> Self {
        Self { cell: u64_at(vcpu_line(vcpu) + line::HEARTBEAT), value: 0 }
    }

    /// The vCPU's count of page writes.
    pub fn writes(vcpu: u64) -> Self {
        Self { cell: u64_at(vcpu_line(vcpu) + line::WRITES), value: 0 }
    }

    /// What it stands at.
    #[inline(always)]
    pub fn value(&self) -> u64 {
        self.value
    }

    /// Counts one, after all stores before it.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.value += 1;
        self.cell.store(self.value, core::sync::atomic::Ordering::Release);
    }
}
