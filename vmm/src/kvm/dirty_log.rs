//! KVM's dirty bitmap, as the engine uses it: manual protection, everything dirty at the start.

use std::sync::{Arc, Mutex};

use godwit_core::{DirtyLog, GuestMemory, MachineError, PAGE_SIZE};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::ioctls::{clear_dirty_log, get_dirty_log};
use super::vm::Vm;
use crate::error::VmmError;
use crate::sync::lock;

/// The dirty log of a VM's memory slots (slot n is region n).
pub(crate) struct KvmDirtyLog {
    vm: Arc<Vm>,
    memory: GuestMemory,
    logging: Mutex<bool>,
    regions: Vec<Region>,
}

struct Region {
    pages: u64,
    /// KVM overwrites what it is given, and a harvest must only add.
    scratch: Mutex<Vec<u64>>,
}

impl KvmDirtyLog {
    /// The log of `vm`, whose slots are the regions of `memory`.
    pub(crate) fn new(vm: Arc<Vm>, memory: GuestMemory) -> Self {
        let regions = memory
            .iter()
            .map(|region| Region { pages: region.len() / PAGE_SIZE as u64, scratch: Mutex::new(Vec::new()) })
            .collect();
        Self { vm, memory, logging: Mutex::new(false), regions }
    }

    fn region(&self, region: usize) -> Result<&Region, MachineError> {
        self.regions.get(region).ok_or_else(|| MachineError::new(format!("there is no RAM region {region}")))
    }

    fn switch(&self, on: bool) -> Result<(), MachineError> {
        let mut logging = lock(&self.logging);
        if *logging != on {
            self.vm.set_memory(&self.memory, on)?;
            *logging = on;
        }
        Ok(())
    }
}

impl DirtyLog for KvmDirtyLog {
    fn start(&self) -> Result<(), MachineError> {
        // A log that somebody left on has lost its first state: begin afresh.
        self.switch(false)?;
        self.switch(true)
    }

    fn stop(&self) -> Result<(), MachineError> {
        self.switch(false)
    }

    fn harvest(&self, region: usize, words: &mut [u64]) -> Result<(), MachineError> {
        let Region { pages, scratch } = self.region(region)?;
        let mut scratch = lock(scratch);
        scratch.resize(pages.div_ceil(64) as usize, 0);
        get_dirty_log(self.vm.fd(), region as u32, *pages, &mut scratch)
            .map_err(VmmError::kvm(format!("cannot read the dirty log of region {region}")))?;
        // In an idle round nothing is set, and nothing is written.
        for (word, dirty) in words.iter_mut().zip(scratch.iter()).filter(|(_, dirty)| **dirty != 0) {
            *word |= dirty;
        }
        Ok(())
    }

    fn clear(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), MachineError> {
        let pages = clear_extent(self.region(region)?.pages, first_page, words.len())
            .ok_or_else(|| MachineError::new(format!("cannot clear the dirty log from page {first_page} on")))?;
        if words.iter().all(|word| *word == 0) {
            return Ok(());
        }
        clear_dirty_log(self.vm.fd(), region as u32, first_page, pages, words)
            .map_err(VmmError::kvm(format!("cannot clear the dirty log of region {region} at page {first_page}")))?;
        Ok(())
    }
}

/// How many pages a clear covers that begins at `first_page` and has `words` words of bits. KVM wants both multiples of 64,
/// except for an end that is the slot's own.
fn clear_extent(region_pages: u64, first_page: u64, words: usize) -> Option<u32> {
    if !first_page.is_multiple_of(64) || first_page >= region_pages {
        return None;
    }
    let asked = (words as u64).checked_mul(64)?;
    u32::try_from(asked.min(region_pages - first_page)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_clear_ends_with_the_region() {
        assert_eq!(clear_extent(1000, 0, 8), Some(512));
        assert_eq!(clear_extent(1000, 960, 1), Some(40));
        assert_eq!(clear_extent(1000, 960, 9), Some(40));
        assert_eq!(clear_extent(1000, 1, 1), None);
        assert_eq!(clear_extent(1000, 1024, 1), None);
    }

    proptest! {
        #[test]
        fn a_clear_keeps_to_the_rules_of_kvm(region_pages in 1u64..1 << 30, first in 0u64..1 << 24, words in 1usize..4096) {
            if let Some(pages) = clear_extent(region_pages, first * 64, words) {
                let end = first * 64 + u64::from(pages);
                prop_assert!(end <= region_pages);
                prop_assert!(pages % 64 == 0 || end == region_pages);
            }
        }
    }
}
