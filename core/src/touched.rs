//! Which pages of guest memory were ever touched, and not given back since: untouched ones are neither read nor sent.
//!
//! Reading untouched memory would make the kernel provide it. For private anonymous memory the kernel's page map tells
//! (bit 63 present, bit 62 swapped: Documentation/admin-guide/mm/pagemap.rst in the kernel tree). Memory that is backed by a
//! file can be there without being mapped: of pages that the page map does not have, SEEK_DATA tells. (SEEK_HOLE would tell
//! more at a time, and look through all data up to the next hole for it, again for every stripe.) A page that cannot be judged
//! counts as touched.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::layout::{STRIPE_PAGES, Stripe, StripeBits};
use crate::memory::{GuestMemory, PAGE_SIZE};

const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

/// Tells touched pages from untouched ones.
pub trait TouchedPages: Send + Sync {
    /// The touched pages of a stripe. An untouched one reads as zeros.
    fn of(&self, stripe: &Stripe) -> StripeBits;
}

/// For memory that is mapped in this process: asks the kernel.
pub struct MappedPages {
    page_map: File,
    regions: Vec<Mapping>,
}

struct Mapping {
    first_virtual_page: u64,
    /// `None`: private anonymous memory.
    file: Option<FileOffset>,
}

impl MappedPages {
    /// For the memory of a machine in this process.
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let regions = memory.iter().map(|region| {
            let address = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|error| io::Error::other(format!("guest memory region has no host address: {error}")))?;
            let file = region.file_offset().cloned();
            Ok(Mapping { first_virtual_page: address as u64 / PAGE_SIZE as u64, file })
        });
        Ok(Self { regions: regions.collect::<io::Result<_>>()?, page_map: File::open("/proc/self/pagemap")? })
    }

    fn mapped(&self, first_virtual_page: u64, stripe: &Stripe) -> io::Result<StripeBits> {
        let mut buffer = [0; STRIPE_PAGES * 8];
        let entries = &mut buffer[..stripe.pages * 8];
        self.page_map.read_exact_at(entries, first_virtual_page * 8)?;
        let mut bits = StripeBits::default();
        for (page, entry) in entries.chunks_exact(8).enumerate() {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(entry);
            if u64::from_ne_bytes(bytes) & PRESENT_OR_SWAPPED != 0 {
                bits[page / 64] |= 1 << (page % 64);
            }
        }
        Ok(bits)
    }
}

impl TouchedPages for MappedPages {
    fn of(&self, stripe: &Stripe) -> StripeBits {
        let Mapping { first_virtual_page, file } = &self.regions[stripe.region];
        let touched = self.mapped(first_virtual_page + stripe.first_page, stripe).and_then(|mut bits| {
            if let Some(file) = file {
                add_unmapped(file, stripe, &mut bits)?;
            }
            Ok(bits)
        });
        touched.unwrap_or_else(|error| {
            tracing::debug!("cannot tell touched pages of frame {}: {error}", stripe.first_frame);
            stripe.all()
        })
    }
}

/// Adds the pages that are in the file though they are not mapped.
fn add_unmapped(file: &FileOffset, stripe: &Stripe, bits: &mut StripeBits) -> io::Result<()> {
    let start = file.start() + stripe.first_page * PAGE_SIZE as u64;
    let mut page = 0;
    while page < stripe.pages {
        if bits[page / 64] >> (page % 64) & 1 == 0 {
            let Some(data) = next_data(file.file(), start + (page * PAGE_SIZE) as u64)? else { break };
            page = ((data - start) / PAGE_SIZE as u64) as usize;
            // Data found beyond the stripe's end is none of its business.
            if page >= stripe.pages {
                break;
            }
            bits[page / 64] |= 1 << (page % 64);
        }
        page += 1;
    }
    Ok(())
}

/// Where data begins at or after a place; `None`: nowhere up to the end of the file. Moves the file's own position, which nobody
/// else uses.
fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    // SAFETY: lseek takes no pointer, and the descriptor is open for as long as `file` lives.
    match unsafe { libc::lseek(file.as_raw_fd(), from as i64, libc::SEEK_DATA) } {
        -1 => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
        position => Ok(Some(position as u64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Layout, set_bits};
    use crate::machine::RegionDescription;
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: usize = 4 << 20;

    fn check(memory: &GuestMemory) {
        let layout = Layout::new(&[RegionDescription { guest_address: 0, size_bytes: SIZE as u64 }]).unwrap();
        let touched = MappedPages::new(memory).unwrap();
        let of = |stripe| set_bits(&touched.of(&layout.stripe(stripe))).collect::<Vec<_>>();
        assert_eq!((of(0), of(1)), (vec![], vec![]));
        for page in [0u64, 7, 511, 513] {
            memory.write_obj(0u64, GuestAddress(page * 4096)).unwrap();
        }
        assert_eq!((of(0), of(1)), (vec![0, 7, 511], vec![1]), "also pages that were only written with zeros");
    }

    #[test]
    fn finds_touched_pages_of_anonymous_memory() {
        check(&GuestMemory::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap());
    }

    #[test]
    fn finds_touched_pages_of_memory_backed_by_a_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE as u64).unwrap();
        let range = (GuestAddress(0), SIZE, Some(FileOffset::new(file, 0)));
        check(&GuestMemory::from_ranges_with_files([range]).unwrap());
    }

    #[test]
    fn finds_pages_of_a_file_that_this_process_has_not_mapped_and_forgets_what_was_punched_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE as u64).unwrap();
        for page in [3u64, 4, 300, 600] {
            file.write_all_at(&[1], page * 4096).unwrap();
        }
        let range = (GuestAddress(0), SIZE, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
        let memory = GuestMemory::from_ranges_with_files([range]).unwrap();
        let layout = Layout::new(&[RegionDescription { guest_address: 0, size_bytes: SIZE as u64 }]).unwrap();
        let touched = MappedPages::new(&memory).unwrap();
        let of = |stripe| set_bits(&touched.of(&layout.stripe(stripe))).collect::<Vec<_>>();
        assert_eq!((of(0), of(1)), (vec![3, 4, 300], vec![88]));
        // One of them is mapped as well, and others are.
        memory.write_obj(1u64, GuestAddress(4 * 4096)).unwrap();
        memory.write_obj(1u64, GuestAddress(511 * 4096)).unwrap();
        assert_eq!(of(0), [3, 4, 300, 511]);
        // SAFETY: the range lies in the mapping, whose contents nobody else looks at.
        let punched = unsafe {
            let address = memory.get_host_address(GuestAddress(4 * 4096)).unwrap();
            libc::madvise(address.cast(), 400 * 4096, libc::MADV_REMOVE)
        };
        assert_eq!(punched, 0);
        assert_eq!((of(0), of(1)), (vec![3, 511], vec![88]));
    }
}
