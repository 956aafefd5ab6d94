//! Where frames lie.

use core::sync::atomic::Ordering::Relaxed;

use super::header::{u32_at, u64_at};
use super::layout::{PAGE_BYTES, field};

/// The address of a frame: frames count through the ranges of RAM in the header page.
#[inline(always)]
pub fn address(frame: u64) -> *mut u64 {
    let count = u64::from(u32_at(field::RANGE_COUNT).load(Relaxed));
    let mut left = frame;
    let mut range = field::RANGES;
    for _ in 1..count {
        let pages = u64_at(range + 8).load(Relaxed);
        if left < pages {
            break;
        }
        left -= pages;
        range += 16;
    }
    (u64_at(range).load(Relaxed) + left * PAGE_BYTES) as *mut u64
}
