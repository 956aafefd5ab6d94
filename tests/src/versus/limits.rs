//! What the machine itself allows, measured in the same run: nobody can be faster than that. A guest that runs takes a core meanwhile, so what its
//! case allows is measured beside it.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use godwit_benches::raw::{RawQuinn, RawTcp};
use godwit_core::GuestMemory;
use godwit_vmm::config::MemoryBacking;
use godwit_vmm::guest_memory;
use serde::Serialize;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

/// How much is moved for each figure.
const BYTES: usize = 1 << 30;

/// No more than this is moved beside a guest: what it takes is a rate, and memory is in one piece up to 3 GiB.
const MOST_BYTES: usize = 2 << 30;

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

/// Measures all of them, with nothing else on the machine.
pub fn measure() -> Result<Limits> {
    let source = vec![0x5a_u8; BYTES];
    let mut tcp = RawTcp::new().context("loopback TCP")?;
    let mut quinn = RawQuinn::new().context("loopback QUIC")?;
    let (fresh, memory) = into_fresh_memory(&mut tcp, &source)?;
    let into = slice(&memory, BYTES)?;
    let bytes_per_s = |rounds, move_all: &mut dyn FnMut() -> Result<()>| bytes_per_s(BYTES, rounds, move_all);
    Ok(Limits {
        memcpy_bytes_per_s: bytes_per_s(ROUNDS, &mut || {
            into.copy_from(&source[..]);
            Ok(())
        })?,
        tcp_fresh_bytes_per_s: fresh,
        tcp_populated_bytes_per_s: bytes_per_s(ROUNDS, &mut || Ok(tcp.transfer(&source, &into)?))?,
        quinn_bytes_per_s: bytes_per_s(ROUNDS, &mut || Ok(quinn.transfer(&source, &into)?))?,
    })
}

/// What TCP takes, bytes per second: so many bytes, or 2 GiB if that is less, over loopback into memory that nobody has touched, whatever else runs.
pub fn fresh_tcp(bytes: usize) -> Result<f64> {
    let mut tcp = RawTcp::new().context("loopback TCP")?;
    Ok(into_fresh_memory(&mut tcp, &vec![0x5a_u8; bytes.min(MOST_BYTES)])?.0)
}

/// The best of some, and the memory that the last has filled.
fn into_fresh_memory(tcp: &mut RawTcp, source: &[u8]) -> Result<(f64, GuestMemory)> {
    let fresh = || guest_memory(source.len() as u64, MemoryBacking::Private, false);
    let (mut best, mut memory) = (0.0_f64, fresh()?);
    for _ in 0..ROUNDS {
        memory = fresh()?;
        let into = slice(&memory, source.len())?;
        best = best.max(bytes_per_s(source.len(), 1, &mut || Ok(tcp.transfer(source, &into)?))?);
    }
    Ok((best, memory))
}

fn slice(memory: &GuestMemory, bytes: usize) -> Result<VolatileSlice<'_, impl vm_memory::bitmap::BitmapSlice>> {
    Ok(memory.get_slice(GuestAddress(0), bytes)?)
}

fn bytes_per_s(bytes: usize, rounds: usize, move_all: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let mut best = 0.0_f64;
    for _ in 0..rounds {
        let began = Instant::now();
        move_all()?;
        best = best.max(bytes as f64 / began.elapsed().as_secs_f64());
        black_box(&mut best);
    }
    Ok(best)
}
