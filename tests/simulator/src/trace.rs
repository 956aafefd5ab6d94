//! What has happened: always as a hash, by which two runs of a seed are compared, and for a person as text.

use std::fmt::{Arguments, Write};
use std::time::Duration;

use twox_hash::XxHash3_64;

/// The steps of one seed.
pub struct Trace {
    hash: u64,
    steps: u64,
    print: bool,
    line: String,
}

impl Trace {
    /// Nothing has happened yet. `print`: every step goes to stdout.
    pub fn new(print: bool) -> Self {
        Self { hash: 0, steps: 0, print, line: String::new() }
    }

    /// Something happens.
    pub fn step(&mut self, now: Duration, what: Arguments<'_>) {
        self.line.clear();
        // Writing to a string does not fail.
        let _ = write!(self.line, "{:>13.6}  {what}", now.as_secs_f64());
        if self.print {
            println!("{}", self.line);
        }
        self.hash = XxHash3_64::oneshot_with_seed(self.hash, self.line.as_bytes());
        self.steps += 1;
    }

    /// Something too small for a line happens: it counts, and is part of the hash.
    pub fn small_step(&mut self, now: Duration, what: u64) {
        let step = (now.as_nanos() as u64 ^ what.rotate_left(40)).to_le_bytes();
        self.hash = XxHash3_64::oneshot_with_seed(self.hash, &step);
        self.steps += 1;
    }

    /// The same for the same seed.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// How many.
    pub fn steps(&self) -> u64 {
        self.steps
    }
}
