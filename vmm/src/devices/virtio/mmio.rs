//! The transport of virtio devices: registers in a window of memory (virtio 1.2, section 4.2).
//!
//! ```text
//!   status:  0 ──► ACKNOWLEDGE ──► DRIVER ──► FEATURES_OK ──► DRIVER_OK       (bits are only ever added)
//!            ▲                                                    │
//!            └────────────────── a write of 0 ────────────────────┘
//! ```
//!
//! The registers are the transport's, the queues in use are the device's. Whatever a driver writes in whatever order, the
//! worst that comes of it is a device that wants to be reset.

mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use godwit_core::GuestMemory;
use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use self::registers::{Registers, driver_bits};
pub(crate) use self::state::{OLDEST_VERSION, VERSION, VirtioState};
use super::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::devices::serial::eventfd;
use crate::devices::{Device, Effect};
use crate::error::{VmmError, chain};
use crate::sync::lock;

/// `virt`, first letter first in memory.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const TRANSPORT_VERSION: u32 = 2;
/// Who made the device: `GDWT`.
const VENDOR: u32 = u32::from_le_bytes(*b"GDWT");
/// What is read where there is no shared memory region.
const NO_REGION: u32 = u32::MAX;

/// The features that every device has.
const COMMON_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A virtio device in its window of memory.
pub(crate) struct MmioTransport {
    device: Arc<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    /// What the driver's kicks signal, by queue.
    kicks: Vec<EventFd>,
    inner: Mutex<Inner>,
}

struct Inner {
    registers: Registers,
    /// The device has its queues.
    active: bool,
    /// The machine runs: a device that becomes active may begin.
    open: bool,
}

impl MmioTransport {
    /// `device`, as at power-on, in a machine that does not run yet. It interrupts by `line`.
    pub(crate) fn new(device: Arc<dyn VirtioDevice>, memory: GuestMemory, line: EventFd) -> Result<Self, VmmError> {
        let kicks = device.queue_max_sizes().iter().map(|_| eventfd()).collect::<Result<_, _>>()?;
        let inner = Inner { registers: Registers::new(device.queue_max_sizes()), active: false, open: false };
        Ok(Self { device, memory, interrupt: Arc::new(Interrupt::new(line)), kicks, inner: Mutex::new(inner) })
    }

    /// Lets KVM turn the driver's kicks into signals, for a window at `address`: the vCPU goes on at once.
    pub(crate) fn wire_kicks(&self, vm: &VmFd, address: u64) -> Result<(), VmmError> {
        let notify = IoEventAddress::Mmio(address + u64::from(register::VIRTIO_MMIO_QUEUE_NOTIFY));
        for (queue, kick) in (0u32..).zip(&self.kicks) {
            vm.register_ioevent(kick, &notify, queue)
                .map_err(VmmError::kvm("cannot wire the kicks of a virtio device"))?;
        }
        Ok(())
    }

    /// The features that its driver has accepted: none before they are agreed on.
    pub(crate) fn accepted_features(&self) -> u64 {
        let registers = &lock(&self.inner).registers;
        if registers.status & FEATURES_OK != 0 { registers.driver_features } else { 0 }
    }

    /// Opens the device: it works from now on, and looks into every queue at once. The driver is made to look, too.
    pub(crate) fn resume(&self) {
        let mut inner = lock(&self.inner);
        inner.open = true;
        self.device.resume();
        self.interrupt.raise_again();
    }

    /// Closes it. On an error it is open as before.
    pub(crate) fn pause(&self, until: Instant) -> Result<(), VmmError> {
        let mut inner = lock(&self.inner);
        if inner.active && inner.open {
            self.device.pause(until)?;
        }
        inner.open = false;
        Ok(())
    }

    /// Puts it into the state of power-on: nothing touches guest memory afterwards.
    pub(crate) fn reset(&self) {
        self.reset_device(&mut lock(&self.inner));
    }

    /// Its state while it is closed.
    pub(crate) fn save(&self) -> Result<VirtioState, VmmError> {
        let inner = lock(&self.inner);
        let queues = if inner.active { self.device.queues() } else { Vec::new() };
        VirtioState::save(&self.device, &inner.registers, inner.active, &queues, &self.interrupt)
    }

    /// Takes in state, over whatever was there. The device stays closed. On an error it is as at power-on.
    pub(crate) fn load(&self, state: &VirtioState) -> Result<(), VmmError> {
        let mut inner = lock(&self.inner);
        self.reset_device(&mut inner);
        let result = self.try_load(&mut inner, state);
        if result.is_err() {
            self.reset_device(&mut inner);
        }
        result
    }

    fn try_load(&self, inner: &mut Inner, state: &VirtioState) -> Result<(), VmmError> {
        state.check(&self.device, self.features()).map_err(VmmError::Status)?;
        self.device.load(&state.device)?;
        inner.registers = state.registers();
        self.interrupt.load(state.interrupt_status, state.broken, state.config_generation);
        if state.active {
            self.activate(inner, &state.positions())?;
        }
        Ok(())
    }

    fn features(&self) -> u64 {
        self.device.features() | COMMON_FEATURES
    }

    fn reset_device(&self, inner: &mut Inner) {
        self.device.reset();
        self.interrupt.reset();
        inner.registers = Registers::new(self.device.queue_max_sizes());
        inner.active = false;
    }

    fn write_status(&self, inner: &mut Inner, value: u32) {
        if value == 0 {
            self.reset_device(inner);
            return;
        }
        let before = inner.registers.status;
        let mut value = driver_bits(value);
        if before & !value != 0 {
            // Bits are only ever added.
            return;
        }
        if value & FEATURES_OK != 0 && before & FEATURES_OK == 0 && !self.accepts(inner.registers.driver_features) {
            value &= !FEATURES_OK;
        }
        if value & FEATURES_OK == 0 {
            value &= !DRIVER_OK;
        }
        inner.registers.status = value;
        if value & !before & DRIVER_OK != 0 {
            self.driver_is_ready(inner);
        }
    }

    /// Whether a driver can work with these features.
    fn accepts(&self, features: u64) -> bool {
        features & !self.features() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn driver_is_ready(&self, inner: &mut Inner) {
        match self.activate(inner, &[]) {
            Ok(()) if inner.open => self.device.resume(),
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(
                    "virtio device of kind {} cannot be used by its driver: {}",
                    self.device.kind(),
                    chain(&error)
                );
                self.interrupt.device_broken();
            }
        }
    }

    /// Gives the device its queues; `positions` says how far each of them had come, none for queues that are new.
    fn activate(&self, inner: &mut Inner, positions: &[(u16, u16)]) -> Result<(), VmmError> {
        let features = inner.registers.driver_features;
        let mut queues = Vec::with_capacity(self.kicks.len());
        for (index, (registers, kick)) in inner.registers.queues.iter().zip(&self.kicks).enumerate() {
            if !registers.ready {
                queues.push(None);
                continue;
            }
            let (next_avail, next_used) = positions.get(index).copied().unwrap_or_default();
            let state = QueueState {
                max_size: registers.max_size,
                size: registers.size,
                ready: true,
                desc_table: registers.desc_table,
                avail_ring: registers.avail_ring,
                used_ring: registers.used_ring,
                event_idx_enabled: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
                next_avail,
                next_used,
            };
            let queue = Queue::try_from(state)
                .map_err(|error| VmmError::Status(format!("queue {index} cannot be used: {error}")))?;
            if !queue.is_valid(&self.memory) {
                return Err(VmmError::Status(format!("queue {index} does not lie in guest memory")));
            }
            let kick = kick.try_clone().map_err(VmmError::os("cannot duplicate an eventfd"))?;
            queues.push(Some(ActiveQueue { queue, kick }));
        }
        let interrupt = Arc::clone(&self.interrupt);
        self.device.activate(Activation { memory: self.memory.clone(), features, queues, interrupt })?;
        inner.active = true;
        Ok(())
    }

    fn read_register(&self, offset: u32) -> u32 {
        let inner = lock(&self.inner);
        let registers = &inner.registers;
        match offset {
            register::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            register::VIRTIO_MMIO_VERSION => TRANSPORT_VERSION,
            register::VIRTIO_MMIO_DEVICE_ID => self.device.kind(),
            register::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            register::VIRTIO_MMIO_DEVICE_FEATURES => registers.device_features(self.features()),
            register::VIRTIO_MMIO_QUEUE_NUM_MAX => registers.queue().map_or(0, |queue| u32::from(queue.max_size)),
            register::VIRTIO_MMIO_QUEUE_READY => registers.queue().map_or(0, |queue| u32::from(queue.ready)),
            register::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            register::VIRTIO_MMIO_STATUS if self.interrupt.is_broken() => registers.status | NEEDS_RESET,
            register::VIRTIO_MMIO_STATUS => registers.status,
            register::VIRTIO_MMIO_SHM_LEN_LOW..=register::VIRTIO_MMIO_SHM_BASE_HIGH => NO_REGION,
            register::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        let mut inner = lock(&self.inner);
        match offset {
            register::VIRTIO_MMIO_QUEUE_NOTIFY => self.kick(value),
            register::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::VIRTIO_MMIO_STATUS => self.write_status(&mut inner, value),
            _ => inner.registers.write(offset, value),
        }
    }

    /// A kick that KVM did not turn into a signal: by a driver that writes it in an unusual way.
    fn kick(&self, queue: u32) {
        if let Some(kick) = self.kicks.get(queue as usize) {
            // Fails only if the counter is full: then the device is going to look anyway.
            let _ = kick.write(1);
        }
    }
}

impl Device for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(u64::from(register::VIRTIO_MMIO_CONFIG)) {
            self.device.read_config(offset, data);
        } else if let (Some(offset), Ok(data)) = (aligned(offset), <&mut [u8; 4]>::try_from(data)) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        // No device has configuration that a driver may write.
        if let (Some(offset), Ok(data)) = (aligned(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
        Effect::None
    }
}

/// The offset of a register.
fn aligned(offset: u64) -> Option<u32> {
    u32::try_from(offset).ok().filter(|offset| offset.is_multiple_of(4) && *offset < register::VIRTIO_MMIO_CONFIG)
}
