//! Ways to reach a guest's memory: from inside its VMM, from a dump of it, and from another process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A range of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// First guest-physical address.
    pub guest_address: u64,
    /// Length in bytes.
    pub size_bytes: u64,
}

/// Guest memory that can be read, also while the guest runs.
pub trait GuestRead: Sync {
    /// All RAM, in ascending order.
    fn ranges(&self) -> Vec<GuestRange>;

    /// Fills `buffer` from `guest_address` on. An aligned word is read at once, not byte by byte.
    fn read(&self, guest_address: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// Guest memory that can be written too.
pub trait GuestWrite: GuestRead {
    /// Writes `bytes` from `guest_address` on.
    fn write(&self, guest_address: u64, bytes: &[u8]) -> io::Result<()>;
}

impl<B: Bitmap + Sync + Send + 'static> GuestRead for GuestMemoryMmap<B> {
    fn ranges(&self) -> Vec<GuestRange> {
        let range = |region: &vm_memory::GuestRegionMmap<B>| GuestRange {
            guest_address: region.start_addr().raw_value(),
            size_bytes: region.len(),
        };
        self.iter().map(range).collect()
    }

    fn read(&self, guest_address: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_slice(buffer, GuestAddress(guest_address)).map_err(io::Error::other)
    }
}

impl<B: Bitmap + Sync + Send + 'static> GuestWrite for GuestMemoryMmap<B> {
    fn write(&self, guest_address: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_slice(bytes, GuestAddress(guest_address)).map_err(io::Error::other)
    }
}

/// Guest memory that lies in a file: a dump, or the memory of a VMM's process.
#[derive(Debug)]
pub struct FileMemory {
    file: File,
    parts: Vec<Part>,
}

/// Where a range of RAM lies in the file.
#[derive(Debug)]
struct Part {
    range: GuestRange,
    offset: u64,
}

impl FileMemory {
    /// A dump that holds guest memory from `guest_address` on, as QMP's `pmemsave` writes it.
    pub fn dump(path: &Path, guest_address: u64) -> io::Result<Self> {
        let file = File::open(path)?;
        let size_bytes = file.metadata()?.len();
        Ok(Self { file, parts: vec![Part { range: GuestRange { guest_address, size_bytes }, offset: 0 }] })
    }

    /// A dump of several ranges of RAM, one after the other.
    pub fn dump_of_ranges(path: &Path, ranges: &[GuestRange]) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut offset = 0;
        let mut parts = Vec::new();
        for range in ranges {
            parts.push(Part { range: *range, offset });
            offset += range.size_bytes;
        }
        if file.metadata()?.len() != offset {
            return Err(io::Error::other(format!("the dump does not have the {offset} bytes of the ranges given")));
        }
        Ok(Self { file, parts })
    }

    /// The memory of the VMM with process id `pid`, which maps each range at the host virtual address beside it.
    /// The caller must be allowed to trace that process.
    pub fn process(pid: u32, ranges: &[(GuestRange, u64)]) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        let parts = ranges.iter().map(|(range, host_address)| Part { range: *range, offset: *host_address }).collect();
        Ok(Self { file, parts })
    }

    /// Where `length` bytes from `guest_address` on lie in the file.
    fn offset(&self, guest_address: u64, length: usize) -> io::Result<u64> {
        for Part { range, offset } in &self.parts {
            let Some(within) = guest_address.checked_sub(range.guest_address) else { continue };
            if within.checked_add(length as u64).is_some_and(|end| end <= range.size_bytes) {
                return Ok(offset + within);
            }
        }
        Err(io::Error::other(format!("{length} bytes at guest address {guest_address:#x} are not in one range of RAM")))
    }
}

impl GuestRead for FileMemory {
    fn ranges(&self) -> Vec<GuestRange> {
        self.parts.iter().map(|part| part.range).collect()
    }

    fn read(&self, guest_address: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, self.offset(guest_address, buffer.len())?)
    }
}

impl GuestWrite for FileMemory {
    fn write(&self, guest_address: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.offset(guest_address, bytes.len())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: GuestRange = GuestRange { guest_address: 4 << 30, size_bytes: 8192 };

    #[test]
    fn another_process_is_read_and_written_at_guest_addresses() {
        let mut memory = vec![0u8; 8192];
        memory[4096] = 7;
        let host_address = memory.as_mut_ptr() as u64;
        let process = FileMemory::process(std::process::id(), &[(RANGE, host_address)]).unwrap();
        let mut found = [0; 2];
        process.read(RANGE.guest_address + 4096, &mut found).unwrap();
        assert_eq!(found, [7, 0]);
        process.write(RANGE.guest_address + 4097, &[9]).unwrap();
        process.read(RANGE.guest_address + 4096, &mut found).unwrap();
        assert_eq!(found, [7, 9]);
    }

    #[test]
    fn a_dump_answers_for_its_ranges_only() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [[1u8; 4096], [2; 4096], [3; 4096]].concat()).unwrap();
        let low = GuestRange { guest_address: 0, size_bytes: 4096 };
        let dump = FileMemory::dump_of_ranges(file.path(), &[low, RANGE]).unwrap();
        assert_eq!(dump.ranges(), [low, RANGE]);
        let byte = |address| {
            let mut byte = [0];
            dump.read(address, &mut byte).map(|()| byte[0]).ok()
        };
        assert_eq!([byte(0), byte(4096), byte(RANGE.guest_address + 4096)], [Some(1), None, Some(3)]);
        assert_eq!([byte(RANGE.guest_address - 1), byte(RANGE.guest_address + 8192), byte(u64::MAX)], [None; 3]);
        assert!(dump.read(4095, &mut [0; 2]).is_err());
        assert!(FileMemory::dump_of_ranges(file.path(), &[low]).is_err());
    }

    #[test]
    fn memory_of_this_process_is_read_and_written() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(RANGE.guest_address), 8192)]).unwrap();
        assert_eq!(GuestRead::ranges(&memory), [RANGE]);
        GuestWrite::write(&memory, RANGE.guest_address + 8, &5u64.to_le_bytes()).unwrap();
        let mut word = [0; 8];
        GuestRead::read(&memory, RANGE.guest_address + 8, &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), 5);
        assert!(GuestRead::read(&memory, 0, &mut word).is_err());
    }
}
