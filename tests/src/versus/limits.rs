//! What the machine itself allows, measured in the same run: nobody can be faster than that.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use godwit_benches::raw::{RawQuinn, RawTcp};
use godwit_vmm::config::MemoryBacking;
use godwit_vmm::guest_memory;
use serde::Serialize;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

/// How much is moved for each figure.
const BYTES: usize = 1 << 30;

/// The best of so many counts: what disturbs only slows.
const ROUNDS: usize = 3;

/// Bytes per second.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Limits {
    /// From one part of memory to another.
    pub memcpy_bytes_per_s: f64,
    /// Over loopback TCP into memory that nobody has touched, of the kind that guests have.
    pub tcp_fresh_bytes_per_s: f64,
    /// The same into memory that is there already.
    pub tcp_populated_bytes_per_s: f64,
    /// By quinn over loopback, one connection with one stream, into memory that is there already.
    pub quinn_bytes_per_s: f64,
}

/// Measures all of them.
pub fn measure() -> Result<Limits> {
    let source = vec![0x5a_u8; BYTES];
    let mut tcp = RawTcp::new().context("loopback TCP")?;
    let mut quinn = RawQuinn::new().context("loopback QUIC")?;
    let mut fresh = 0.0_f64;
    let mut memory = guest_memory(BYTES as u64, MemoryBacking::Private, false)?;
    for _ in 0..ROUNDS {
        memory = guest_memory(BYTES as u64, MemoryBacking::Private, false)?;
        fresh = fresh.max(bytes_per_s(1, || Ok(tcp.transfer(&source, &slice(&memory)?)?))?);
    }
    let into = slice(&memory)?;
    Ok(Limits {
        memcpy_bytes_per_s: bytes_per_s(ROUNDS, || {
            into.copy_from(&source[..]);
            Ok(())
        })?,
        tcp_fresh_bytes_per_s: fresh,
        tcp_populated_bytes_per_s: bytes_per_s(ROUNDS, || Ok(tcp.transfer(&source, &into)?))?,
        quinn_bytes_per_s: bytes_per_s(ROUNDS, || Ok(quinn.transfer(&source, &into)?))?,
    })
}

fn slice(memory: &godwit_core::GuestMemory) -> Result<VolatileSlice<'_, impl vm_memory::bitmap::BitmapSlice>> {
    Ok(memory.get_slice(GuestAddress(0), BYTES)?)
}

fn bytes_per_s(rounds: usize, mut move_all: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = 0.0_f64;
    for _ in 0..rounds {
        let began = Instant::now();
        move_all()?;
        best = best.max(BYTES as f64 / began.elapsed().as_secs_f64());
        black_box(&mut best);
    }
    Ok(best)
}
