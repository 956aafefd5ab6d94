//! Guest memory as it can be reached from outside: read and altered in another process.

use std::io::{IoSlice, IoSliceMut};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use serde_json::Value;

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;

/// One range of guest RAM and where it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address.
    pub guest_address: u64,
    /// Length.
    pub size_bytes: u64,
    /// Where the process has it.
    pub host_address: u64,
}

/// All guest RAM of a process.
#[derive(Debug, Clone)]
pub struct RemoteMemory {
    pid: Pid,
    regions: Vec<Region>,
}

impl RemoteMemory {
    /// Memory whose regions are known.
    pub fn new(pid: Pid, regions: Vec<Region>) -> Self {
        Self { pid, regions }
    }

    /// The answer of the control command `query-guest-ram`.
    pub fn from_answer(pid: Pid, answer: &Value) -> Result<Self> {
        let list = answer.as_array().context("query-guest-ram did not answer with a list")?;
        let number = |region: &Value, key: &str| {
            region[key].as_u64().with_context(|| format!("query-guest-ram: no number `{key}` in {region}"))
        };
        let regions = list.iter().map(|region| {
            Ok(Region {
                guest_address: number(region, "guest-address")?,
                size_bytes: number(region, "size")?,
                host_address: number(region, "host-address")?,
            })
        });
        Ok(Self { pid, regions: regions.collect::<Result<_>>()? })
    }

    /// The regions.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes of RAM.
    pub fn size_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.size_bytes).sum()
    }

    /// Where the process has the byte at `guest_address`.
    pub fn host_address(&self, guest_address: u64) -> Result<u64> {
        let region = self
            .regions
            .iter()
            .find(|region| (region.guest_address..region.guest_address + region.size_bytes).contains(&guest_address));
        let region = region.with_context(|| format!("{guest_address:#x} is not guest RAM"))?;
        Ok(region.host_address + (guest_address - region.guest_address))
    }

    /// Reads at `guest_address`.
    pub fn read(&self, guest_address: u64, buffer: &mut [u8]) -> Result<()> {
        let remote = [RemoteIoVec { base: self.host_address(guest_address)? as usize, len: buffer.len() }];
        let length = buffer.len();
        let read = process_vm_readv(self.pid, &mut [IoSliceMut::new(buffer)], &remote)
            .with_context(|| format!("cannot read guest memory at {guest_address:#x}"))?;
        ensure!(read == length, "guest memory at {guest_address:#x}: {read} of {length} bytes read");
        Ok(())
    }

    /// Writes at `guest_address`.
    pub fn write(&self, guest_address: u64, bytes: &[u8]) -> Result<()> {
        let remote = [RemoteIoVec { base: self.host_address(guest_address)? as usize, len: bytes.len() }];
        let written = process_vm_writev(self.pid, &[IoSlice::new(bytes)], &remote)
            .with_context(|| format!("cannot write guest memory at {guest_address:#x}"))?;
        ensure!(
            written == bytes.len(),
            "guest memory at {guest_address:#x}: {written} of {} bytes written",
            bytes.len()
        );
        Ok(())
    }

    /// Reads the page at `guest_address`.
    pub fn page(&self, guest_address: u64) -> Result<[u8; PAGE_BYTES]> {
        if !guest_address.is_multiple_of(PAGE_BYTES as u64) {
            bail!("{guest_address:#x} is not the address of a page");
        }
        let mut page = [0; PAGE_BYTES];
        self.read(guest_address, &mut page)?;
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_in_their_region() {
        let low = Region { guest_address: 0, size_bytes: 0xc000_0000, host_address: 0x7000_0000_0000 };
        let high = Region { guest_address: 1 << 32, size_bytes: 1 << 30, host_address: 0x6000_0000_0000 };
        let memory = RemoteMemory::new(Pid::this(), vec![low, high]);
        assert_eq!(memory.host_address(0x1234).unwrap(), 0x7000_0000_1234);
        assert_eq!(memory.host_address((1 << 32) + 8).unwrap(), 0x6000_0000_0008);
        assert!(memory.host_address(0xc000_0000).is_err());
        assert_eq!(memory.size_bytes(), 4 << 30);
    }

    #[test]
    fn memory_is_read_and_written_from_outside() {
        let mut page = vec![0u8; PAGE_BYTES];
        let here = Region { guest_address: 0, size_bytes: PAGE_BYTES as u64, host_address: page.as_mut_ptr() as u64 };
        let memory = RemoteMemory::new(Pid::this(), vec![here]);
        memory.write(100, b"bird").unwrap();
        let mut read = [0; 4];
        memory.read(100, &mut read).unwrap();
        assert_eq!(&read, b"bird");
        assert!(memory.page(100).is_err());
    }
}
