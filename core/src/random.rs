//! Random numbers.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;

/// A number that differs from move to move, from the keys that the standard library seeds its hash maps with.
pub fn number() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Bytes that nobody can guess.
pub fn secret<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}
