//! The control queue: what the driver tells the device (virtio 1.2, section 5.1.6.5).

use godwit_core::GuestMemory;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{QueueError, copy_in, copy_out};
use super::serve::serve;
use crate::devices::virtio::Interrupt;

/// Commands that are carried out in one go, before others get their turn.
const BURST_COMMANDS: usize = 16;

/// The longest command that is known: class, command, 64 bits.
const MAX_COMMAND_BYTES: usize = 10;

/// What a driver can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// It has seen that it is to announce itself.
    Announced,
    /// It wants these offloads and no others from now on.
    SetOffloads(u64),
}

impl Command {
    /// None for what is not known, which the driver is told.
    fn read(bytes: &[u8]) -> Option<Self> {
        let (&[class, command], data) = bytes.split_first_chunk()?;
        match (u32::from(class), u32::from(command)) {
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => Some(Self::Announced),
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                Some(Self::SetOffloads(u64::from_le_bytes(data.try_into().ok()?)))
            }
            _ => None,
        }
    }
}

/// The control queue.
pub(super) struct Control {
    queue: Queue,
    kick: EventFd,
}

impl Control {
    pub(super) fn new(queue: Queue, kick: EventFd) -> Self {
        Self { queue, kick }
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Carries out what there is by `obey`, which says whether it could. Whether there is more.
    pub(super) fn run(
        &mut self,
        memory: &GuestMemory,
        interrupt: &Interrupt,
        mut obey: impl FnMut(Command) -> bool,
    ) -> Result<bool, QueueError> {
        serve(&mut self.queue, memory, BURST_COMMANDS, interrupt, |chain| {
            let mut bytes = [0; MAX_COMMAND_BYTES];
            let length = copy_out(&chain.readable, 0, &mut bytes)?;
            let obeyed = Command::read(&bytes[..length]).is_some_and(&mut obey);
            let answer = if obeyed { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            if copy_in(&chain.writable, 0, &[answer as u8])? == 0 {
                return Err(QueueError::Shape("no room for the answer in the control queue"));
            }
            Ok(1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_apart() {
        assert_eq!(Command::read(&[3, 0]), Some(Command::Announced));
        assert_eq!(Command::read(&[5, 0, 0x82, 1, 0, 0, 0, 0, 0, 0]), Some(Command::SetOffloads(0x182)));
        for unknown in [&[][..], &[3], &[3, 1], &[0, 0, 1], &[5, 0], &[5, 0, 1, 2, 3], &[4, 0, 1, 0], &[9, 9]] {
            assert_eq!(Command::read(unknown), None, "{unknown:?}");
        }
    }
}
