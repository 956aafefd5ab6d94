//! What pages cost on the wire and at a core, by what is in them and by how fast the link is.

use serde::{Deserialize, Serialize};

use crate::memory::PAGE_SIZE;
use crate::policy::DATA_PATH_BYTES_PER_S;
use crate::source::is_slow;

/// What an average page costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PageCost {
    /// Bytes on the wire (ρ × 4096).
    pub wire_bytes: f64,
    /// Pages that the data path gets through in a second, whatever the link.
    pub pages_per_s: f64,
}

impl PageCost {
    /// A page that is sent as it is: its bytes and its share of chunk headers.
    pub const RAW: Self =
        Self { wire_bytes: PAGE_SIZE as f64 + 8.0, pages_per_s: DATA_PATH_BYTES_PER_S / PAGE_SIZE as f64 };

    /// How long `pages` of them take on a link.
    pub fn seconds(&self, pages: f64, bytes_per_s: f64) -> f64 {
        (pages * self.wire_bytes / bytes_per_s.max(1.0)).max(pages / self.pages_per_s.max(1e-9))
    }
}

/// What pages cost where they are sent as they are, and on links that are slower than compressing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Encoded {
    /// On a fast link.
    pub plain: PageCost,
    /// On a slow one.
    pub slow: PageCost,
}

impl Encoded {
    /// Pages that always cost the same.
    pub fn always(cost: PageCost) -> Self {
        Self { plain: cost, slow: cost }
    }

    /// On a link of this speed, by the engine's own rule.
    pub fn at(&self, bytes_per_s: f64) -> PageCost {
        match is_slow(Some(bytes_per_s as u64)) {
            true => self.slow,
            false => self.plain,
        }
    }
}

/// What is in a machine's pages.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Contents {
    /// Touched pages, sent for the first time.
    pub first: Encoded,
    /// Dirtied pages, sent again.
    pub again: Encoded,
    /// Dirtied pages, sent again in the pause after rounds over a slow link: if the pause has a fast one, differences are still sent
    /// where there are any, but nothing is compressed.
    pub in_pause: Encoded,
}

impl Contents {
    /// Every page costs the same, whenever it is sent.
    pub fn always(cost: Encoded) -> Self {
        Self { first: cost, again: cost, in_pause: cost }
    }

    /// What a page costs in the pause, with these rates in the rounds and then.
    pub fn in_pause_at(&self, bytes_per_s: f64, switchover_bytes_per_s: f64) -> PageCost {
        match is_slow(Some(bytes_per_s as u64)) {
            true => self.in_pause.at(switchover_bytes_per_s),
            false => self.again.at(switchover_bytes_per_s),
        }
    }

    /// Nothing to be saved anywhere.
    pub fn incompressible() -> Self {
        Self::always(Encoded::always(PageCost::RAW))
    }
}
