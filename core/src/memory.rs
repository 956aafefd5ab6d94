//! Guest memory as the engine sees it.

use crate::bitmap::PageBits;

/// Bytes in a page: what KVM's dirty log counts on x86-64, whatever the host's own page sizes.
pub const PAGE_SIZE: usize = 4096;

/// Guest RAM: a set of mapped regions, each with a bitmap of the pages that the VMM itself wrote.
///
/// KVM's dirty log does not see writes made by the VMM (virtio rings, disk and tap reads). They mark this
/// bitmap after the data has landed, and the engine merges it into every harvest. Cloning is cheap.
pub type GuestMemory = vm_memory::GuestMemoryMmap<PageBits>;
