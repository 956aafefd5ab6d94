//! Which pages of guest memory were ever touched: untouched ones are neither read nor sent.
//!
//! Reading untouched memory would make the kernel provide it. For private anonymous memory the kernel's page map tells
//! (bit 63 present, bit 62 swapped: Documentation/admin-guide/mm/pagemap.rst in the kernel tree); for memory that is
//! backed by a file, SEEK_DATA and SEEK_HOLE do. A page that cannot be judged counts as touched.

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
    regions: Vec<Backing>,
}

enum Backing {
    Anonymous { first_virtual_page: u64 },
    File(FileOffset),
}

impl MappedPages {
    /// For the memory of a machine in this process.
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let regions = memory.iter().map(|region| match region.file_offset() {
            Some(file) => Ok(Backing::File(file.clone())),
            None => {
                let address = region
                    .get_host_address(MemoryRegionAddress(0))
                    .map_err(|error| io::Error::other(format!("guest memory region has no host address: {error}")))?;
                Ok(Backing::Anonymous { first_virtual_page: address as u64 / PAGE_SIZE as u64 })
            }
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
        let touched = match &self.regions[stripe.region] {
            Backing::Anonymous { first_virtual_page } => self.mapped(first_virtual_page + stripe.first_page, stripe),
            Backing::File(file) => with_data(file, stripe),
        };
        touched.unwrap_or_else(|error| {
            tracing::debug!("cannot tell touched pages of frame {}: {error}", stripe.first_frame);
            stripe.all()
        })
    }
}

/// Data found beyond the stripe's end is none of its business.
fn with_data(file: &FileOffset, stripe: &Stripe) -> io::Result<StripeBits> {
    let start = file.start() + stripe.first_page * PAGE_SIZE as u64;
    let end = start + (stripe.pages * PAGE_SIZE) as u64;
    let mut bits = StripeBits::default();
    let mut position = start;
    while position < end {
        let Some(data) = seek(file.file(), position, libc::SEEK_DATA)?.filter(|data| *data < end) else { break };
        let hole = seek(file.file(), data, libc::SEEK_HOLE)?.map_or(end, |hole| hole.min(end));
        for page in (data - start) / PAGE_SIZE as u64..(hole - start).div_ceil(PAGE_SIZE as u64) {
            bits[page as usize / 64] |= 1 << (page % 64);
        }
        position = hole;
    }
    Ok(bits)
}

/// `None`: nothing of the kind up to the end of the file. Moves the file's own position, which nobody else uses.
fn seek(file: &File, from: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: lseek takes no pointer, and the descriptor is open for as long as `file` lives.
    match unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) } {
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
}
