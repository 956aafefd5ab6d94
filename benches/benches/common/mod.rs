//! What the benches share: how long they measure, memory of a size, pages of a kind.

// Each bench uses a part of it.
#![allow(dead_code)]

use std::time::Duration;

use criterion::Criterion;
use godwit_core::PAGE_SIZE;
use godwit_core::layout::{Layout, STRIPE_PAGES};
use godwit_core::machine::RegionDescription;
use godwit_core::table::Page;

/// What is encoded and hashed at a time: more than a cache holds.
pub const PAGES: usize = 16 * STRIPE_PAGES;
pub const BYTES: usize = PAGES * PAGE_SIZE;

/// All benches together take a few minutes.
pub fn quick() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
}

/// Memory of one region.
pub fn layout(bytes: u64) -> Layout {
    Layout::new(&[RegionDescription { guest_address: 0, size_bytes: bytes }]).unwrap()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    Zero,
    Random,
    /// About 4:1.
    Compressible,
}

/// [`PAGES`] pages of one kind.
pub fn pages(contents: Contents) -> Vec<Page> {
    let mut random = fastrand::Rng::with_seed(1);
    let mut pages = vec![[0; PAGE_SIZE]; PAGES];
    let random_bytes_in_a_word = match contents {
        Contents::Zero => 0,
        Contents::Random => 8,
        Contents::Compressible => 2,
    };
    for word in pages.as_flattened_mut().chunks_exact_mut(8) {
        random.fill(&mut word[..random_bytes_in_a_word]);
    }
    pages
}

/// The same pages, each with this many words changed, spread evenly.
pub fn changed(pages: &[Page], words: usize) -> Vec<Page> {
    let mut pages = pages.to_vec();
    for page in &mut pages {
        for word in 0..words {
            page[word * PAGE_SIZE / words] ^= 0xff;
        }
    }
    pages
}
