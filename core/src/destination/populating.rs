//! Memory is made ready before the pages for it arrive, on a thread that runs while a core has nothing else to do.
//!
//! Fresh memory costs the data channels a fault for each huge page, and the time to clear it. What is coming is known from the source
//! ([`crate::chunk::Chunk::Coming`]), so no more is made than the guest has.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use super::receiving::DestinationPages;
use crate::decoder::Pages;
use crate::priority::run_when_idle;

/// So many runs of pages may be waiting, whatever a source announces. More are left to those who fill them.
const QUEUE: usize = 4096;

/// Tells which pages come.
#[derive(Clone)]
pub(super) struct Coming(SyncSender<Option<Pages>>);

impl Coming {
    pub(super) fn pages(&self, pages: Pages) {
        // Nothing depends on it.
        let _ = self.0.try_send(Some(pages));
    }
}

/// The thread that makes memory ready. Ends when this is dropped.
pub(super) struct Populating {
    coming: Coming,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Populating {
    /// Starts the thread.
    pub(super) fn start(pages: Arc<DestinationPages>) -> io::Result<Self> {
        let (sender, receiver) = mpsc::sync_channel(QUEUE);
        let over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&over);
        let thread = thread::Builder::new().name("populate".into()).spawn(move || {
            run_when_idle();
            populate(&pages, &receiver, &until);
        })?;
        Ok(Self { coming: Coming(sender), over, thread: Some(thread) })
    }

    /// Where pages are announced.
    pub(super) fn coming(&self) -> Coming {
        self.coming.clone()
    }

    /// Begins nothing more. What has been begun, a huge page at most, may still be under way.
    pub(super) fn stop(&self) {
        self.over.store(true, Ordering::Release);
        // If there is no room for it the thread is not waiting.
        let _ = self.coming.0.try_send(None);
    }
}

impl Drop for Populating {
    /// Nothing is made ready any more once this returns.
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // It returns nothing.
            let _ = thread.join();
        }
    }
}

fn populate(pages: &DestinationPages, coming: &Receiver<Option<Pages>>, over: &AtomicBool) {
    while let Ok(Some(Pages { slot, pages: count, frame })) = coming.recv() {
        if over.load(Ordering::Acquire) {
            return;
        }
        // Whoever filled its first page was quicker.
        if pages.table.entry(slot).is_some() {
            continue;
        }
        if let Err(error) = pages.view.populate(slot, count) {
            tracing::debug!("memory is not made ready ahead, from frame {frame:#x} on: {error}");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use vm_memory::GuestAddress;

    use super::*;
    use crate::layout::{Layout, STRIPE_PAGES, StripeBits};
    use crate::machine::RegionDescription;
    use crate::memory::GuestMemory;
    use crate::table::{PageHasher, PageTable};
    use crate::touched::{MappedPages, TouchedPages};
    use crate::view::MemoryView;

    const STRIPES: usize = 8;

    fn pages() -> (Arc<DestinationPages>, MappedPages) {
        let size = STRIPES * STRIPE_PAGES * 4096;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let layout = Arc::new(Layout::new(&[RegionDescription { guest_address: 0, size_bytes: size as u64 }]).unwrap());
        let mapped = MappedPages::new(&memory).unwrap();
        let pages = DestinationPages {
            table: PageTable::new(&layout),
            view: MemoryView::new(memory, layout).unwrap(),
            hasher: PageHasher::new(1, true),
        };
        (Arc::new(pages), mapped)
    }

    fn stripe(index: usize) -> Pages {
        Pages { frame: (index * STRIPE_PAGES) as u64, slot: index * STRIPE_PAGES, pages: STRIPE_PAGES }
    }

    fn there(pages: &DestinationPages, mapped: &MappedPages, index: usize) -> StripeBits {
        mapped.of(&pages.view.layout().stripe(index))
    }

    fn wait_for(what: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !what() {
            assert!(Instant::now() < deadline, "not made ready");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_is_announced_is_made_ready_and_nothing_else_and_what_stands_there_stays() {
        let (pages, mapped) = pages();
        let populating = Populating::start(Arc::clone(&pages)).unwrap();
        let coming = populating.coming();
        pages.view.write_page(3 * STRIPE_PAGES + 7, &[5; 4096]);
        // One that has arrived needs nothing.
        pages.table.set(5 * STRIPE_PAGES, 1);
        [3, 5, 6].into_iter().for_each(|index| coming.pages(stripe(index)));
        wait_for(|| there(&pages, &mapped, 6) == [u64::MAX; 8]);
        assert_eq!(there(&pages, &mapped, 3), [u64::MAX; 8]);
        for other in [0, 1, 2, 4, 5, 7] {
            assert_eq!(there(&pages, &mapped, other), [0; 8], "stripe {other}");
        }
        let mut page = [1; 4096];
        pages.view.copy_page(&pages.view.layout().stripe(3), 7, &mut page);
        assert_eq!(page, [5; 4096]);
        pages.view.copy_page(&pages.view.layout().stripe(6), 7, &mut page);
        assert_eq!(page, [0; 4096]);
    }

    #[test]
    fn nothing_is_made_ready_once_it_has_ended_however_much_was_announced() {
        let (pages, mapped) = pages();
        let populating = Populating::start(Arc::clone(&pages)).unwrap();
        let coming = populating.coming();
        coming.pages(stripe(0));
        wait_for(|| there(&pages, &mapped, 0) == [u64::MAX; 8]);
        populating.stop();
        coming.pages(stripe(1));
        drop(populating);
        // Nobody hears it, and nobody waits.
        (0..2 * QUEUE).for_each(|_| coming.pages(stripe(2)));
        assert_eq!(there(&pages, &mapped, 1), [0; 8]);
        assert_eq!(there(&pages, &mapped, 2), [0; 8]);
        assert_eq!(Arc::strong_count(&pages), 1, "the thread has ended");
    }
}
