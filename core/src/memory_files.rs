//! Guest memory handed over as the files behind it, instead of being sent.
//!
//! Where both ends are on one host, and RAM is made of sealed memfds, the destination can map the very memory that the guest has
//! used at the source. The source offers the files in preflight and passes their descriptors on over a unix socket. Nothing is
//! sent, so there is nothing to hash: what is checked is that each file is the one that was offered, and that it reaches as far as
//! the region does (invariant 4).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{SealFlags, fcntl_get_seals};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::machine::RegionDescription;
use crate::memory::{GuestMemory, PAGE_SIZE};

/// The most files that may come with one message.
pub const MAX_FILES: usize = 8;
/// Another one after every boot of a host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// One region of guest RAM and the file behind it.
#[derive(Debug)]
pub struct MemoryFile {
    /// Where it lies in the guest.
    pub region: RegionDescription,
    /// A sealed memfd.
    pub file: File,
    /// The byte of the file at which the region begins.
    pub offset: u64,
}

/// What a source offers to hand over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryOffer {
    /// Which boot of which host it is on.
    pub boot_id: String,
    /// All of guest RAM, in ascending order; the descriptors come in the same order.
    pub regions: Vec<OfferedRegion>,
}

/// One region and how to know the file behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedRegion {
    /// Where it lies in the guest.
    pub region: RegionDescription,
    /// The file's device.
    pub device: u64,
    /// The file's inode.
    pub inode: u64,
    /// The byte of the file at which the region begins.
    pub offset: u64,
}

/// The files behind a machine's memory, or why it cannot be handed over.
pub fn of(memory: &GuestMemory) -> Result<Vec<MemoryFile>, String> {
    let mut files = Vec::new();
    for region in memory.iter() {
        let GuestAddress(guest_address) = region.start_addr();
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let behind =
            region.file_offset().filter(|_| shared).ok_or("it is private to the process that runs the machine")?;
        check_seals(behind.file())?;
        let file =
            behind.file().try_clone().map_err(|error| format!("the file behind it cannot be opened again: {error}"))?;
        let region = RegionDescription { guest_address, size_bytes: region.len() };
        files.push(MemoryFile { region, file, offset: behind.start() });
    }
    match files.len() {
        0..=MAX_FILES => Ok(files),
        many => Err(format!("it has {many} regions, {MAX_FILES} can be handed over")),
    }
}

impl MemoryOffer {
    /// An offer of these files.
    pub fn new(files: &[MemoryFile]) -> io::Result<Self> {
        let offered = |file: &MemoryFile| {
            let metadata = file.file.metadata()?;
            let (device, inode) = (metadata.dev(), metadata.ino());
            Ok(OfferedRegion { region: file.region, device, inode, offset: file.offset })
        };
        Ok(Self { boot_id: boot_id()?, regions: files.iter().map(offered).collect::<io::Result<_>>()? })
    }

    /// Checks what has come with the offer, at the destination: the files that it speaks of, or why they are not.
    pub fn accept(&self, descriptors: Vec<OwnedFd>) -> Result<Vec<MemoryFile>, String> {
        let here = boot_id().map_err(|error| error.to_string())?;
        if self.boot_id != here {
            return Err("the receiver is on another host: memory can be handed over on one host only".into());
        }
        if descriptors.is_empty() && !self.regions.is_empty() {
            return Err("no file descriptors came through the socket: something forwards it, instead of the receiver \
                        listening there itself"
                .into());
        }
        if descriptors.len() != self.regions.len() {
            return Err(format!("{} files came for {} regions of memory", descriptors.len(), self.regions.len()));
        }
        let files = self.regions.iter().zip(descriptors);
        let files: Vec<_> = files.map(|(offered, file)| offered.accept(file.into())).collect::<Result<_, _>>()?;
        match overlapping(&self.regions) {
            true => Err("two regions of memory lie in the same part of one file".into()),
            false => Ok(files),
        }
    }

    /// Whether these are the regions of a machine, all of them.
    pub fn covers(&self, memory: &[RegionDescription]) -> bool {
        self.regions.iter().map(|offered| &offered.region).eq(memory)
    }
}

impl OfferedRegion {
    fn accept(&self, file: File) -> Result<MemoryFile, String> {
        let metadata = file.metadata().map_err(|error| format!("a file that came cannot be looked at: {error}"))?;
        let at = self.region.guest_address;
        if (metadata.dev(), metadata.ino()) != (self.device, self.inode) {
            return Err(format!("the file that came for memory at {at:#x} is not the one that was offered"));
        }
        check_seals(&file)?;
        let end = self.offset.checked_add(self.region.size_bytes);
        if !self.offset.is_multiple_of(PAGE_SIZE as u64) || end.is_none_or(|end| end > metadata.len()) {
            return Err(format!("the file that came for memory at {at:#x} does not reach as far as the region"));
        }
        Ok(MemoryFile { region: self.region, file, offset: self.offset })
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.region.size_bytes)
    }
}

/// Whoever maps a file that another process can shrink is killed when it does (SIGBUS).
fn check_seals(file: &File) -> Result<(), String> {
    match fcntl_get_seals(file.as_fd()) {
        Ok(seals) if seals.contains(SealFlags::SHRINK) => Ok(()),
        Ok(_) => Err("the file behind it could be shrunk: it is not sealed against that".into()),
        Err(_) => Err("the file behind it is no memfd".into()),
    }
}

fn overlapping(regions: &[OfferedRegion]) -> bool {
    let meet = |one: &OfferedRegion, other: &OfferedRegion| {
        (one.device, one.inode) == (other.device, other.inode) && one.offset < other.end() && other.offset < one.end()
    };
    (1..regions.len()).any(|index| regions[..index].iter().any(|earlier| meet(earlier, &regions[index])))
}

fn boot_id() -> io::Result<String> {
    let text = fs::read_to_string(BOOT_ID)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot tell which host this is: {BOOT_ID}: {error}")))?;
    Ok(text.trim().into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{FileOffset, GuestRegionMmap};

    use super::*;

    const SIZE: u64 = 2 << 20;

    fn memfd(seals: SealFlags) -> File {
        let file = File::from(memfd_create("test", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap());
        file.set_len(2 * SIZE).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        file
    }

    fn memory(file: Option<File>, flags: i32) -> GuestMemory {
        let builder =
            MmapRegionBuilder::new_with_bitmap(SIZE as usize, vm_memory::bitmap::NewBitmap::with_len(SIZE as usize))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags);
        let builder = match file {
            Some(file) => builder.with_file_offset(FileOffset::new(file, SIZE)),
            None => builder,
        };
        let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap();
        GuestMemory::from_regions(vec![region]).unwrap()
    }

    fn offered() -> (MemoryOffer, Vec<OwnedFd>) {
        let files = of(&memory(Some(memfd(SealFlags::SHRINK)), libc::MAP_SHARED)).unwrap();
        (MemoryOffer::new(&files).unwrap(), files.into_iter().map(|file| file.file.into()).collect())
    }

    #[test]
    fn only_memory_that_others_can_map_is_offered() {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        assert!(of(&memory(None, anonymous)).unwrap_err().contains("private"));
        assert!(of(&memory(Some(memfd(SealFlags::SHRINK)), libc::MAP_PRIVATE)).unwrap_err().contains("private"));
        assert!(of(&memory(Some(memfd(SealFlags::GROW)), libc::MAP_SHARED)).unwrap_err().contains("shrunk"));
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * SIZE).unwrap();
        assert!(of(&memory(Some(file), libc::MAP_SHARED)).unwrap_err().contains("no memfd"));
    }

    #[test]
    fn what_was_offered_is_accepted() {
        let (offer, descriptors) = offered();
        let files = offer.accept(descriptors).unwrap();
        assert_eq!((files[0].offset, files[0].region.size_bytes), (SIZE, SIZE));
        assert!(offer.covers(&[files[0].region]));
        assert!(!offer.covers(&[]) && !offer.covers(&[RegionDescription { guest_address: 4096, size_bytes: SIZE }]));
    }

    #[test]
    fn invariant_4_another_file_is_refused() {
        let (offer, _) = offered();
        let (_, descriptors) = offered();
        assert!(offer.accept(descriptors).unwrap_err().contains("not the one"));
    }

    #[test]
    fn invariant_5_what_could_end_this_process_or_reach_elsewhere_is_refused() {
        let why = |change: fn(&mut MemoryOffer)| {
            let (mut offer, descriptors) = offered();
            change(&mut offer);
            offer.accept(descriptors).unwrap_err()
        };
        assert!(why(|offer| offer.boot_id = "another".into()).contains("another host"));
        assert!(why(|offer| offer.regions[0].offset = SIZE + 4096).contains("as far as"));
        assert!(why(|offer| offer.regions[0].offset = 7).contains("as far as"));
        assert!(why(|offer| offer.regions[0].offset = u64::MAX - 4095).contains("as far as"));
        assert!(why(|offer| offer.regions[0].region.size_bytes = u64::MAX).contains("as far as"));
        assert!(why(|offer| offer.regions.clear()).contains("1 files came for 0"));
        let (offer, _) = offered();
        assert!(offer.accept(Vec::new()).unwrap_err().contains("forwards"));
        let unsealed = memfd(SealFlags::GROW);
        let metadata = unsealed.metadata().unwrap();
        let (mut offer, _) = offered();
        (offer.regions[0].device, offer.regions[0].inode) = (metadata.dev(), metadata.ino());
        assert!(offer.accept(vec![unsealed.into()]).unwrap_err().contains("shrunk"));
    }

    proptest! {
        #[test]
        fn regions_in_one_file_never_share_a_byte(one in 0u64..6, length in 1u64..4, other in 0u64..6, same: bool) {
            let region = |offset: u64, inode| OfferedRegion {
                region: RegionDescription { guest_address: 0, size_bytes: length * 4096 },
                device: 1,
                inode,
                offset: offset * 4096,
            };
            let shared = same && one.abs_diff(other) < length;
            prop_assert_eq!(overlapping(&[region(one, 7), region(other, if same { 7 } else { 8 })]), shared);
        }
    }
}
