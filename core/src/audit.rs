//! The audit: the stopped source's memory against the table of what was last sent (invariant 4).
//!
//! The comparison of the two ends' tables cannot find a lost dirty bit, since both agree on the stale page. Hashing the
//! source's memory itself, once it has stopped, can.

use crate::layout::set_bits;
use crate::memory::PAGE_SIZE;
use crate::source::SourcePages;
use crate::table::is_zero;

/// One line: `ok: N pages`, or how many differ and the first that does.
pub fn memory_against_table(pages: &SourcePages) -> String {
    let SourcePages { view, table, hasher, .. } = pages;
    let layout = view.layout();
    let (mut checked, mut differing, mut first) = (0u64, 0u64, None);
    let mut page = [0; PAGE_SIZE];
    for index in 0..layout.stripes() {
        let stripe = layout.stripe(index);
        for offset in set_bits(&stripe.all()) {
            view.copy_page(&stripe, offset, &mut page);
            let frame = stripe.first_frame + offset as u64;
            let right = match table.entry(stripe.first_slot + offset) {
                None => is_zero(&page),
                Some(entry) if is_zero(&page) => entry == hasher.zero(frame),
                Some(entry) => entry == hasher.page(frame, &page),
            };
            checked += 1;
            if !right {
                differing += 1;
                first.get_or_insert(frame);
            }
        }
    }
    match first {
        None => format!("ok: {checked} pages"),
        Some(frame) => format!(
            "FAILED: {differing} of {checked} pages are not as they were last sent, the first is frame {frame:#x}"
        ),
    }
}
