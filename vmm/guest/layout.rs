//! Where things lie: the image in guest-physical memory and the fields of its header page.
//!
//! Compiled into the guest and into the library, so that the two cannot disagree. The table in
//! `docs/workload-guest.md` repeats it for people.

/// Bytes in a page.
pub const PAGE_BYTES: u64 = 4096;

/// Below this address lies what the firmware or the VMM booted the guest from; the guest zeroes it.
pub const LOW_MEMORY_END: u64 = 0x10_0000;

/// Where application processors start (a real-mode address): the one low page that is not zero.
pub const TRAMPOLINE: u64 = 0x8000;

/// The header page.
pub const HEADER: u64 = 0x10_0000;

/// First of the pages that never change.
pub const IMAGE: u64 = HEADER + PAGE_BYTES;

/// `GodwitWG` in ASCII, first letter first in memory.
pub const MAGIC: u64 = u64::from_le_bytes(*b"GodwitWG");

/// Version of this layout and of the write rules.
pub const LAYOUT_VERSION: u32 = 1;

/// vCPUs that the header page has room for; further ones are halted.
pub const MAX_VCPUS: usize = 32;

/// Ranges of RAM that the header page has room for.
pub const MAX_RANGES: usize = 8;

/// Pages of the image that the header page has room for hashes of.
pub const MAX_IMAGE_PAGES: usize = 16;

/// Bytes of stack per vCPU.
pub const STACK_BYTES: u64 = 1024;

/// Bytes at the bottom of each stack that are never used; a deeper stack would show here.
pub const STACK_UNUSED_BYTES: u64 = 256;

/// GiB of addresses that the image's own page tables map.
pub const STATIC_GIB: u64 = 4;

/// GiB of addresses that can be mapped.
pub const MAX_GIB: u64 = 512;

/// Bits of an entry that points to a table: present, writable, user, accessed, dirty.
pub const TABLE_FLAGS: u64 = 0x67;

/// Bits of an entry that maps 2 MiB: the same, and large.
pub const LARGE_PAGE_FLAGS: u64 = 0xe7;

/// The rate that stands for "as fast as possible".
pub const RATE_MAX: u64 = u64::MAX;

/// Offsets of the header page's fields.
pub mod field {
    /// u64: [`super::MAGIC`].
    pub const MAGIC: u64 = 0x000;
    /// u32: [`super::LAYOUT_VERSION`].
    pub const LAYOUT_VERSION: u64 = 0x008;
    /// u32: one of [`super::status`].
    pub const STATUS: u64 = 0x00c;
    /// u64: address of the page tables, where the image's unchanging pages end.
    pub const TABLES: u64 = 0x010;
    /// u64: first address of the stacks.
    pub const STACKS: u64 = 0x018;
    /// u64: first address above the image: more page tables begin here.
    pub const IMAGE_END: u64 = 0x020;
    /// u64: address of the trampoline's original in the image.
    pub const TRAMPOLINE_SOURCE: u64 = 0x028;
    /// u64: the trampoline's length in bytes.
    pub const TRAMPOLINE_BYTES: u64 = 0x030;

    /// u64, setting: pages of the working set.
    pub const WORKING_SET_PAGES: u64 = 0x040;
    /// u64, setting: pages filled at boot.
    pub const FILL_PAGES: u64 = 0x048;
    /// u64, setting: pages written per second by all vCPUs together, or [`super::RATE_MAX`].
    pub const RATE: u64 = 0x050;
    /// u64, setting: the seed.
    pub const SEED: u64 = 0x058;
    /// u32, setting: one of [`super::order`].
    pub const ORDER: u64 = 0x060;
    /// u32, setting: one of [`super::write`].
    pub const WRITE: u64 = 0x064;
    /// u32, setting: one of [`super::contents`].
    pub const CONTENTS: u64 = 0x068;
    /// u32, setting: vCPUs that write, the first so many; 0 for all.
    pub const WRITERS: u64 = 0x06c;

    /// u32: vCPUs at work.
    pub const VCPUS: u64 = 0x080;
    /// u32: ranges of RAM in [`RANGES`].
    pub const RANGE_COUNT: u64 = 0x084;
    /// u64: frames, that is pages in all ranges of RAM.
    pub const FRAMES: u64 = 0x088;
    /// u64: address of the PVH start information that the guest was booted with.
    pub const START_INFO: u64 = 0x090;
    /// u64: GiB of addresses that are mapped.
    pub const MAPPED_GIB: u64 = 0x0b0;
    /// u32: vCPUs that arrived; the top bit is set when no more are waited for.
    pub const ARRIVED: u64 = 0x098;
    /// u64: next page to be filled.
    pub const FILL_NEXT: u64 = 0x0a0;
    /// u64: pages filled so far.
    pub const FILLED: u64 = 0x0a8;
    /// 4 × u64: a bit for each page of low memory that cannot be written (ROM).
    pub const LOW_ROM: u64 = 0x0c0;
    /// [`super::MAX_RANGES`] × (u64 address, u64 pages): RAM above the image, ascending.
    pub const RANGES: u64 = 0x100;
    /// [`super::MAX_IMAGE_PAGES`] × u64: FNV-1a of each unchanging page.
    pub const IMAGE_HASHES: u64 = 0x180;
    /// First byte behind the last field before the vCPUs' lines.
    pub const COMMON_END: u64 = 0x200;

    /// [`super::MAX_VCPUS`] lines of [`super::VCPU_LINE_BYTES`].
    pub const VCPU_LINES: u64 = 0x800;
}

/// Bytes of one vCPU's line in the header page: a cache line.
pub const VCPU_LINE_BYTES: u64 = 64;

/// Offsets in a vCPU's line.
pub mod line {
    /// u64: heartbeat.
    pub const HEARTBEAT: u64 = 0x00;
    /// u64: pages written.
    pub const WRITES: u64 = 0x08;
    /// 32 bytes: KVM's `pvclock_vcpu_time_info`, written by the hypervisor.
    pub const PVCLOCK: u64 = 0x20;
    /// Length of the pvclock area.
    pub const PVCLOCK_BYTES: u64 = 32;
}

/// Values of the status field. Those from [`status::FIRST_ERROR`] on mean that the guest has stopped.
pub mod status {
    /// Loaded, not yet writing.
    pub const BOOTING: u32 = 0;
    /// Writing.
    pub const RUNNING: u32 = 1;
    /// The first of the errors.
    pub const FIRST_ERROR: u32 = 0x100;
    /// Working set or fill are larger than the RAM above the image.
    pub const DOES_NOT_FIT: u32 = 0x100;
    /// Not booted by the PVH protocol with a memory map.
    pub const NO_MEMORY_MAP: u32 = 0x101;
    /// More ranges of RAM than the header page holds, or RAM above [`super::MAX_GIB`].
    pub const MEMORY_MAP_TOO_LARGE: u32 = 0x102;
    /// A setting has a value that this layout version does not know.
    pub const BAD_SETTING: u32 = 0x103;
    /// The guest's code panicked.
    pub const PANIC: u32 = 0x104;
}

/// Values of the order setting.
pub mod order {
    /// First page to last, then again.
    pub const SEQ: u32 = 1;
    /// Uniformly at random.
    pub const RANDOM: u32 = 2;
    /// 90 % of the writes to the first 10 % of the pages.
    pub const HOT_COLD: u32 = 3;
}

/// Values of the write setting.
pub mod write {
    /// One word of the page.
    pub const WORD: u32 = 1;
    /// All words of the page.
    pub const PAGE: u32 = 2;
}

/// Values of the contents setting.
pub mod contents {
    /// Incompressible.
    pub const RANDOM: u32 = 1;
    /// Compressible.
    pub const COMPRESSIBLE: u32 = 2;
}
