//! The workload guest's ELF file with its settings patched in.

use super::config::{Contents, Order, Rate, WriteUnit, WriterConfig};
use super::layout::{self, IMAGE, MAX_IMAGE_PAGES, PAGE_BYTES, RATE_MAX, field};

/// The image as it was built, with empty settings.
static BUILT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/workload-guest.elf"));

/// Where the linker script puts the header page in the file; the image's unchanging pages follow it.
const HEADER_OFFSET: usize = 0x1000;

const _: () = {
    assert!(BUILT.len() >= HEADER_OFFSET + PAGE_BYTES as usize, "the workload guest's image is cut short");
    assert!(word_at(field::MAGIC) == layout::MAGIC, "the workload guest's header page is not where it belongs");
    assert!(IMAGE_PAGES <= MAX_IMAGE_PAGES, "the workload guest's image has more pages than its header has hashes");
    assert!(BUILT.len() >= HEADER_OFFSET + (1 + IMAGE_PAGES) * PAGE_BYTES as usize);
};

/// How many pages of the image never change.
const IMAGE_PAGES: usize = ((word_at(field::TABLES) - IMAGE) / PAGE_BYTES) as usize;

/// A workload guest that does what `config` asks for: a static PVH ELF file for x86-64.
pub fn elf(config: &WriterConfig) -> Vec<u8> {
    let mut elf = BUILT.to_vec();
    let header = &mut elf[HEADER_OFFSET..];
    put_u64(header, field::WORKING_SET_PAGES, config.working_set_bytes.div_ceil(PAGE_BYTES));
    put_u64(header, field::FILL_PAGES, config.fill_bytes.div_ceil(PAGE_BYTES));
    put_u64(header, field::RATE, config.rate.setting());
    put_u64(header, field::SEED, config.seed);
    put_u32(header, field::ORDER, config.order.setting());
    put_u32(header, field::WRITE, config.write.setting());
    put_u32(header, field::CONTENTS, config.contents.setting());
    put_u32(header, field::WRITERS, config.writers);
    for index in 0..IMAGE_PAGES {
        let start = HEADER_OFFSET + (1 + index) * PAGE_BYTES as usize;
        let hash = fnv1a(&BUILT[start..start + PAGE_BYTES as usize]);
        put_u64(header, field::IMAGE_HASHES + index as u64 * 8, hash);
    }
    elf
}

/// 64-bit FNV-1a.
pub(super) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

const fn word_at(offset: u64) -> u64 {
    let mut value = 0;
    let mut byte = 8;
    while byte > 0 {
        byte -= 1;
        value = value << 8 | BUILT[HEADER_OFFSET + offset as usize + byte] as u64;
    }
    value
}

fn put_u64(header: &mut [u8], offset: u64, value: u64) {
    header[offset as usize..][..8].copy_from_slice(&value.to_le_bytes());
}

fn put_u32(header: &mut [u8], offset: u64, value: u32) {
    header[offset as usize..][..4].copy_from_slice(&value.to_le_bytes());
}

impl Rate {
    /// The value of the header page's field.
    pub(super) fn setting(self) -> u64 {
        match self {
            Rate::PagesPerSecond(rate) => rate.min(RATE_MAX - 1),
            Rate::Max => RATE_MAX,
        }
    }

    pub(super) fn from_setting(setting: u64) -> Self {
        if setting == RATE_MAX { Rate::Max } else { Rate::PagesPerSecond(setting) }
    }
}

/// A choice and the values of its field in the header page, in both directions.
macro_rules! settings {
    ($choice:ident, $($variant:ident = $value:expr),+) => {
        impl $choice {
            pub(super) fn setting(self) -> u32 {
                match self { $($choice::$variant => $value),+ }
            }

            pub(super) fn from_setting(setting: u32) -> Option<Self> {
                [$($choice::$variant),+].into_iter().find(|choice| choice.setting() == setting)
            }
        }
    };
}

settings!(Order, Seq = layout::order::SEQ, Random = layout::order::RANDOM, HotCold = layout::order::HOT_COLD);
settings!(WriteUnit, Word = layout::write::WORD, Page = layout::write::PAGE);
settings!(Contents, Random = layout::contents::RANDOM, Compressible = layout::contents::COMPRESSIBLE);
