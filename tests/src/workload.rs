//! The workload guest as it looks from outside: how to ask for it, and where its heartbeat is.

use std::fs;
use std::io::IoSliceMut;

use godwit_vmm::workload::layout::{self, field, line};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::sampler::Target;

/// A machine with the workload guest, as options of the sender.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Size of RAM.
    pub memory: &'static str,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// How much is filled at boot.
    pub fill: &'static str,
    /// How much is rewritten.
    pub working_set: &'static str,
    /// Pages per second, or `max`.
    pub rate: &'static str,
    /// `seq`, `random` or `hot-cold`.
    pub order: &'static str,
    /// `word` or `page`.
    pub write: &'static str,
    /// `random` or `compressible`.
    pub contents: &'static str,
    /// What all contents derive from.
    pub seed: u64,
}

impl Default for Workload {
    /// A small machine that works hard.
    fn default() -> Self {
        Self {
            memory: "256M",
            vcpus: 1,
            fill: "128M",
            working_set: "64M",
            rate: "20000",
            order: "seq",
            write: "word",
            contents: "random",
            seed: 1,
        }
    }
}

impl Workload {
    /// A small machine that moves in a fraction of a second, for tests of what happens around a move.
    pub const SMALL: Self = Self {
        memory: "128M",
        vcpus: 1,
        fill: "32M",
        working_set: "16M",
        rate: "10000",
        order: "random",
        write: "word",
        contents: "random",
        seed: 23,
    };

    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        pages(self.memory)
    }

    /// Pages of the working set.
    pub fn working_set_pages(&self) -> u64 {
        pages(self.working_set)
    }

    /// The options.
    pub fn arguments(&self) -> Vec<String> {
        let pairs = [
            ("--memory", self.memory),
            ("--guest", "writer"),
            ("--guest-fill", self.fill),
            ("--guest-working-set", self.working_set),
            ("--guest-rate", self.rate),
            ("--guest-order", self.order),
            ("--guest-write", self.write),
            ("--guest-contents", self.contents),
        ];
        let numbers = [("--vcpus", self.vcpus as u64), ("--guest-seed", self.seed)];
        let texts = pairs.map(|(name, value)| [name.to_owned(), value.to_owned()]);
        let numbers = numbers.map(|(name, value)| [name.to_owned(), value.to_string()]);
        texts.into_iter().chain(numbers).flatten().collect()
    }
}

/// A size in pages.
fn pages(size: &str) -> u64 {
    let (number, unit) = size.split_at(size.len() - 1);
    let unit_pages = if unit == "G" { 1 << 18 } else { 1 << 8 };
    number.parse::<u64>().unwrap_or(0) * unit_pages
}

/// Where a process keeps the heartbeats, if its header page is at `header_address` there.
pub fn heartbeats(pid: Pid, header_address: u64, vcpus: usize) -> Target {
    Target {
        pid,
        address: header_address + field::VCPU_LINES + line::HEARTBEAT,
        stride_bytes: layout::VCPU_LINE_BYTES as usize,
        vcpus,
    }
}

/// The counters of page writes that belong to these heartbeats.
pub fn writes(heartbeats: Target) -> Target {
    Target { address: heartbeats.address - line::HEARTBEAT + line::WRITES, ..heartbeats }
}

/// Finds the guest's header page in a process that does not say where its guest RAM is (another VMM, or a receiver
/// while memory still arrives): at the right distance from the start of a large mapping, and known by its magic.
pub fn find_header(pid: Pid) -> Option<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    maps.lines().filter_map(large_mapping).map(|start| start + layout::HEADER).find(|&address| {
        let mut magic = [0; 8];
        let remote = RemoteIoVec { base: address as usize, len: magic.len() };
        let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut magic)], &[remote]);
        read == Ok(magic.len()) && u64::from_le_bytes(magic) == layout::MAGIC
    })
}

/// The start of a mapping that is writable and large enough to be guest RAM.
fn large_mapping(line: &str) -> Option<u64> {
    const SMALLEST_RAM_BYTES: u64 = 16 << 20;
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    (rest.starts_with("rw") && end - start >= SMALLEST_RAM_BYTES).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_in_pages() {
        let pages = |memory| Workload { memory, ..Workload::default() }.pages();
        assert_eq!((pages("256M"), pages("6G")), (65_536, 1_572_864));
    }

    #[test]
    fn only_large_writable_mappings_can_be_ram() {
        assert_eq!(large_mapping("7f0000000000-7f0040000000 rw-p 00000000 00:00 0 "), Some(0x7f00_0000_0000));
        assert_eq!(large_mapping("7f0000000000-7f0040000000 r--p 00000000 00:00 0 "), None);
        assert_eq!(large_mapping("7f0000000000-7f0000100000 rw-p 00000000 00:00 0 "), None);
        assert_eq!(large_mapping("nonsense"), None);
    }
}
