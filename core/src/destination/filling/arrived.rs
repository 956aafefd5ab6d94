//! A page that has come over a channel of post-copy: nothing is put in place that is not what was sent.

use super::super::receiving::DestinationPages;
use crate::postcopy::Record;
use crate::table::Page;

/// Why a page is not put in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadPage {
    /// There is no such page.
    #[error("a page came for frame {0:#x}, which is no RAM")]
    NoRam(u64),
    /// It has changed on the way.
    #[error("the page that came for frame {0:#x} is not what was sent")]
    Hash(u64),
}

/// Where the page of this header belongs, if it is what was sent. `contents`: none for zeros.
pub fn place_of(pages: &DestinationPages, record: &Record, contents: Option<&Page>) -> Result<usize, BadPage> {
    let Record { frame, entry, .. } = *record;
    let right = match contents {
        Some(page) => pages.hasher.page(frame, page),
        None => pages.hasher.zero(frame),
    };
    let slot = pages.view.layout().slot_of(frame, 1).ok_or(BadPage::NoRam(frame))?;
    match entry == right {
        true => Ok(slot),
        false => Err(BadPage::Hash(frame)),
    }
}
