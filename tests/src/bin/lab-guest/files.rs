//! What is written to the disk and read back from it, and what is written to memory and freed.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use godwit_tests::scenario::record::{self, RECORD_BYTES};
use nix::time::{ClockId, clock_gettime};

/// Records are not written faster than this.
const RECORD_PERIOD: Duration = Duration::from_millis(20);

/// Size of the file whose contents follow from a seed.
const CONTENTS_BYTES: usize = 1 << 20;

/// The two files.
pub(crate) struct Files {
    /// For one writer at a time.
    records: Mutex<File>,
    contents: PathBuf,
}

impl Files {
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let records = OpenOptions::new().create(true).append(true).open(directory.join("records"))?;
        // A new file's name has to last as well.
        File::open(directory)?.sync_all()?;
        Ok(Self { records: Mutex::new(records), contents: directory.join("contents") })
    }

    /// Writes records and tells each number once it is on the disk, until the client goes.
    pub(crate) fn write_records(&self, mut client: &TcpStream) -> io::Result<()> {
        let mut file = match self.records.try_lock() {
            Ok(file) => file,
            Err(TryLockError::WouldBlock) => return client.write_all(b"error: records are being written already\n"),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        let mut number = file.metadata()?.len() / RECORD_BYTES as u64;
        loop {
            let begun = Instant::now();
            number += 1;
            let written_ns = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?).as_nanos() as u64;
            if let Err(error) = file.write_all(&record::encode(number, written_ns)).and_then(|()| file.sync_all()) {
                client.write_all(format!("error: record {number}: {error}\n").as_bytes())?;
                return Err(error);
            }
            client.write_all(format!("{number}\n").as_bytes())?;
            thread::sleep(RECORD_PERIOD.saturating_sub(begun.elapsed()));
        }
    }

    /// Writes the file anew, in place.
    pub(crate) fn write_contents(&self, seed: &str) -> io::Result<()> {
        let mut file = OpenOptions::new().create(true).write(true).truncate(false).open(&self.contents)?;
        let is_new = file.metadata()?.len() == 0;
        file.write_all(&contents(seed)?)?;
        file.sync_all()?;
        if is_new {
            // Where it lies stands in the journal only, and who reads the disk from outside does not look there.
            nix::unistd::sync();
        }
        Ok(())
    }

    /// Reads the file from the disk and compares it.
    pub(crate) fn check_contents(&self, seed: &str) -> io::Result<()> {
        let expected = contents(seed)?;
        std::fs::write("/proc/sys/vm/drop_caches", "3")?;
        let mut found = Vec::new();
        File::open(&self.contents)?.read_to_end(&mut found)?;
        if found.len() != expected.len() {
            return Err(io::Error::other(format!("{} bytes instead of {}", found.len(), expected.len())));
        }
        match found.iter().zip(&expected).position(|(found, expected)| found != expected) {
            Some(offset) => Err(io::Error::other(format!("the contents differ at byte {offset}"))),
            None => Ok(()),
        }
    }
}

/// A file in memory.
const IN_MEMORY: &str = "/dev/shm/lab";

/// Fills a file in memory with contents that cannot be compressed, so many MiB of them, and removes it.
pub(crate) fn use_memory(mib: &str) -> io::Result<()> {
    let mib: u64 = mib.parse().map_err(|_| io::Error::other(format!("`{mib}` is not a number of MiB")))?;
    let mut file = File::create(IN_MEMORY)?;
    let written = (1..=mib).try_for_each(|seed| file.write_all(&contents(&seed.to_string())?));
    std::fs::remove_file(IN_MEMORY)?;
    written
}

/// Contents that follow from a seed (xorshift64*).
fn contents(seed: &str) -> io::Result<Vec<u8>> {
    let seed: u64 = seed.parse().map_err(|_| io::Error::other(format!("`{seed}` is not a seed")))?;
    let mut state = seed | 1 << 63;
    let mut bytes = Vec::with_capacity(CONTENTS_BYTES);
    while bytes.len() < CONTENTS_BYTES {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_follow_from_their_seed() {
        assert_eq!(contents("1").unwrap().len(), CONTENTS_BYTES);
        assert_eq!(contents("1").unwrap(), contents("1").unwrap());
        assert_ne!(contents("1").unwrap(), contents("2").unwrap());
        assert!(contents("one").is_err());
    }
}
