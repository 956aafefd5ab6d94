//! Serving a queue chain by chain, in bursts: what sending frames and obeying commands have in common.

use godwit_core::GuestMemory;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::chain::{Chain, QueueError};
use crate::devices::virtio::Interrupt;

/// Deals with the chains that there are, `burst` at most, before others get their turn. `deal` returns how many bytes it has written
/// into a chain, which then is the driver's again. Whether there is more.
pub(super) fn serve(
    queue: &mut Queue,
    memory: &GuestMemory,
    burst: usize,
    interrupt: &Interrupt,
    mut deal: impl FnMut(&Chain) -> Result<u32, QueueError>,
) -> Result<bool, QueueError> {
    let mut done = 0;
    queue.disable_notification(memory)?;
    while done < burst {
        let Some(descriptors) = queue.iter(memory)?.next() else {
            if queue.enable_notification(memory)? {
                continue;
            }
            break;
        };
        let chain = Chain::read(memory, descriptors, queue.size())?;
        let written = deal(&chain)?;
        queue.add_used(memory, chain.head, written)?;
        done += 1;
    }
    if done > 0 && queue.needs_notification(memory)? {
        interrupt.used_buffers();
    }
    Ok(done == burst)
}
