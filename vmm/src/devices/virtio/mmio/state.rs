//! The state of a virtio device as it travels: registers, queues, interrupt, and what the device adds.

use std::sync::Arc;

use godwit_core::codec::{self, CodecError};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_queue::QueueState;

use super::registers::{DRIVER_BITS, QueueRegisters, Registers};
use super::{Interrupt, VirtioDevice};
use crate::devices::virtio::net;
use crate::error::VmmError;

/// Version of the layout of section `virtio/N`, which includes what devices add. Version 2: network interfaces know VLANs.
pub(crate) const VERSION: u16 = 2;

/// The oldest version that is still read.
pub(crate) const OLDEST_VERSION: u16 = 1;

/// The most bytes that a device may add: far more than any has.
const MAX_DEVICE_BYTES: usize = 1 << 20;

/// The state of a virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VirtioState {
    /// What kind of device it is (VIRTIO_ID_…).
    kind: u32,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<SavedQueue>,
    /// Whether the device has its queues.
    pub(super) active: bool,
    pub(super) interrupt_status: u32,
    /// Whether the device wants to be reset.
    pub(super) broken: bool,
    pub(super) config_generation: u32,
    /// What only the device understands.
    pub(super) device: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    registers: QueueRegisters,
    next_avail: u16,
    next_used: u16,
}

impl VirtioState {
    /// Reads the section, as of a version from [`OLDEST_VERSION`] to [`VERSION`].
    pub(crate) fn decode(version: u16, payload: &[u8]) -> Result<Self, CodecError> {
        let mut state: Self = codec::decode(payload)?;
        if version == 1 && state.kind == VIRTIO_ID_NET {
            state.device = net::from_version_1(&state.device)?;
        }
        Ok(state)
    }

    /// The state of a closed device. `in_use`: its queues as they stand, if it is active.
    pub(super) fn save(
        device: &Arc<dyn VirtioDevice>,
        registers: &Registers,
        active: bool,
        in_use: &[QueueState],
        interrupt: &Interrupt,
    ) -> Result<Self, VmmError> {
        if active && in_use.len() != registers.queues.len() {
            let (told, there) = (in_use.len(), registers.queues.len());
            return Err(VmmError::Status(format!("the device told of {told} queues, it has {there}")));
        }
        let queues = registers.queues.iter().enumerate().map(|(index, registers)| {
            let state = in_use.get(index).filter(|_| registers.ready);
            let (next_avail, next_used) = state.map_or((0, 0), |state| (state.next_avail, state.next_used));
            SavedQueue { registers: *registers, next_avail, next_used }
        });
        Ok(Self {
            kind: device.kind(),
            status: registers.status,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            queues: queues.collect(),
            active,
            interrupt_status: interrupt.status(),
            broken: interrupt.is_broken(),
            config_generation: interrupt.config_generation(),
            device: device.save()?,
        })
    }

    /// Whether this can be the state of `device`, which offers `features`. The queues are checked when they are used.
    pub(super) fn check(&self, device: &Arc<dyn VirtioDevice>, features: u64) -> Result<(), String> {
        if self.kind != device.kind() {
            return Err(format!("a virtio device of kind {}, here it is one of kind {}", self.kind, device.kind()));
        }
        if !self.queues.iter().map(|queue| queue.registers.max_size).eq(device.queue_max_sizes().iter().copied()) {
            return Err("its queues are not those that the device has here".into());
        }
        if self.status & !DRIVER_BITS != 0 {
            return Err(format!("its status {:#x} has bits that there are not", self.status));
        }
        let agreed = self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        let lacking = self.driver_features & !features;
        if agreed && lacking != 0 {
            return Err(format!("its driver uses features that the device does not have here: {lacking:#x}"));
        }
        let modern = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if self.active && !(agreed && modern && self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0) {
            return Err("it is in use without a driver that is ready".into());
        }
        if self.device.len() > MAX_DEVICE_BYTES {
            return Err(format!("{} bytes are more than any device has", self.device.len()));
        }
        Ok(())
    }

    pub(super) fn registers(&self) -> Registers {
        Registers {
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(|queue| queue.registers).collect(),
        }
    }

    /// How far each queue has come: in the available and in the used ring.
    pub(super) fn positions(&self) -> Vec<(u16, u16)> {
        self.queues.iter().map(|queue| (queue.next_avail, queue.next_used)).collect()
    }
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

    use super::*;

    #[test]
    fn version_1_of_a_network_interface_is_brought_up_to_date() {
        let state = |kind, device: &[u8]| VirtioState {
            kind,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: Vec::new(),
            active: false,
            interrupt_status: 0,
            broken: false,
            config_generation: 0,
            device: device.into(),
        };
        let read = |version, kind, device: &[u8]| {
            VirtioState::decode(version, &codec::encode(&state(kind, device)).unwrap()).map(|state| state.device)
        };
        // No router, no addresses, nothing pending, no offloads.
        let old = [0; 11];
        assert_eq!(read(1, VIRTIO_ID_NET, &old).unwrap(), net::from_version_1(&old).unwrap());
        assert!(read(1, VIRTIO_ID_NET, &old[1..]).is_err());
        assert_eq!(read(2, VIRTIO_ID_NET, &old).unwrap(), old);
        assert_eq!(read(1, VIRTIO_ID_BLOCK, &old).unwrap(), old);
    }
}
