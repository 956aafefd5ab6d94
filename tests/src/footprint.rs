//! How much memory a process takes, and how much of that is its guest's.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use nix::unistd::Pid;

use crate::guest_memory::{PAGE_BYTES, RemoteMemory};

/// What the kernel takes guest RAM from where it can.
const UNIT_BYTES: u64 = 2 << 20;

/// The most that a process ever had resident.
pub fn peak_bytes(pid: Pid) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| path.clone())?;
    kibibytes(&status, "VmHWM:").with_context(|| format!("{path} has no VmHWM"))
}

/// What is resident of a process's guest RAM.
pub fn guest_bytes(pid: Pid, memory: &RemoteMemory) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let maps = fs::read_to_string(&path).context(path)?;
    Ok(resident_within(&maps, memory))
}

/// Guest RAM in units of 2 MiB of which any page was touched.
pub fn touched_bytes(pid: Pid, memory: &RemoteMemory) -> Result<u64> {
    const PAGES: u64 = UNIT_BYTES / PAGE_BYTES as u64;
    let map = File::open(format!("/proc/{pid}/pagemap")).context("the page map")?;
    let mut touched = 0;
    for region in memory.regions() {
        let first = region.host_address / PAGE_BYTES as u64;
        let pages = region.size_bytes / PAGE_BYTES as u64;
        for unit in (0..pages).step_by(PAGES as usize) {
            let mut entries = vec![0; (pages - unit).min(PAGES) as usize * 8];
            map.read_exact_at(&mut entries, (first + unit) * 8).context("the page map")?;
            // Present, or swapped out: the two highest bits of an entry.
            let any = entries.chunks_exact(8).any(|entry| entry[7] >> 6 != 0);
            touched += if any { UNIT_BYTES } else { 0 };
        }
    }
    Ok(touched)
}

/// The number after `key` at the start of a line, in kibibytes there.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn resident_within(maps: &str, memory: &RemoteMemory) -> u64 {
    let (mut inside, mut resident) = (false, 0);
    for line in maps.lines() {
        if let Some((start, end)) = line.split(' ').next().and_then(bounds) {
            inside = memory
                .regions()
                .iter()
                .any(|region| region.host_address <= start && end <= region.host_address + region.size_bytes);
        } else if inside {
            resident += kibibytes(line, "Rss:").unwrap_or_default();
        }
    }
    resident
}

fn bounds(text: &str) -> Option<(u64, u64)> {
    let (start, end) = text.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_memory::Region;

    #[test]
    fn only_mappings_inside_of_guest_ram_count() {
        let maps = "1000-3000 rw-p 00000000 00:00 0\nSize: 8 kB\nRss:                   4 kB\n\
                    3000-4000 rw-p 00000000 00:00 0 [heap]\nRss: 4 kB\n\
                    8000-9000 rw-p 00000000 00:00 0\nRss: 8 kB\n";
        let region = |host_address, size_bytes| Region { guest_address: 0, size_bytes, host_address };
        let memory = RemoteMemory::new(Pid::this(), vec![region(0x1000, 0x2000), region(0x8000, 0x1000)]);
        assert_eq!(resident_within(maps, &memory), 12 << 10);
    }

    #[test]
    fn memory_that_is_touched_is_seen() {
        let unit = UNIT_BYTES as usize;
        let mut bytes: Vec<u8> = Vec::with_capacity(4 * unit);
        let host_address = (bytes.as_ptr() as u64).next_multiple_of(UNIT_BYTES);
        let region = Region { guest_address: 0, size_bytes: 2 * UNIT_BYTES, host_address };
        let memory = RemoteMemory::new(Pid::this(), vec![region]);
        assert_eq!(touched_bytes(Pid::this(), &memory).unwrap(), 0);
        let offset = (host_address - bytes.as_ptr() as u64) as usize + unit + 5;
        bytes.spare_capacity_mut()[offset].write(1);
        assert_eq!(touched_bytes(Pid::this(), &memory).unwrap(), UNIT_BYTES);
        assert!(peak_bytes(Pid::this()).unwrap() > 1 << 20);
    }
}
