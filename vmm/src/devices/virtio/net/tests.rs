//! The device between a driver and taps of a network namespace of their own: root and /dev/net/tun are needed.

mod announcing;
mod driver;
mod hostile;
mod moving;
pub(crate) mod network;
mod opening;
mod traffic;

use super::*;
use std::time::Duration;

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(5);

/// As long as it takes to be sure that something does not come.
const A_WHILE: Duration = Duration::from_millis(60);

fn soon() -> Instant {
    Instant::now() + LIMIT
}

/// Bytes that follow each other without a pattern that a shift would hide.
fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// A frame of this length from one host to another, with contents that nobody understands.
fn frame(to: MacAddress, from: MacAddress, seed: u64, length: usize) -> Vec<u8> {
    [&to.0[..], &from.0, &[0x88, 0xb5], &random(seed, length - 14)].concat()
}
