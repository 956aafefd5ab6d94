//! Where a machine's devices are: windows of addresses, ports and interrupt lines.
//!
//! A machine's layout is decided when it is booted and travels with it: its guest has read it from the ACPI tables.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::memory::GAP_START;

/// COM1: first port, number of ports, interrupt line.
pub(crate) const COM1: (u16, u16, u32) = (0x3f8, 8, 4);

/// The keyboard controller's ports: 0x60 to 0x64.
pub(crate) const KEYBOARD_CONTROLLER: (u16, u16) = (0x60, 5);

/// Where KVM's I/O APIC and LAPICs are. They belong to the platform, not to a machine's layout.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// The LAPIC of each vCPU, as seen by that vCPU.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// Bytes in a virtio device's window.
pub(crate) const WINDOW_BYTES: u64 = 4096;

/// The first virtio device's window.
const FIRST_WINDOW: u64 = 0xd000_0000;

/// The lines of virtio devices: those that only the I/O APIC has, then those below 16 that no PC device uses for sure.
const VIRTIO_LINES: [u32; 16] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 14, 15];

/// The line of the event device: where a PC's ACPI controller has its own.
const EVENT_LINE: u32 = 9;

/// The first port of power control, clear of what PCs have.
const POWER_PORT: u16 = 0x600;

/// The number of its ports.
pub(crate) const POWER_PORTS: u16 = 4;

/// The most virtio devices that a machine can have.
pub(crate) const MAX_VIRTIO_DEVICES: usize = VIRTIO_LINES.len();

/// Where a virtio device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VirtioPlace {
    /// The first address of its window.
    pub(crate) address: u64,
    /// Its interrupt line.
    pub(crate) line: u32,
}

/// Where a machine's devices are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceLayout {
    /// The virtio devices: disks, network interfaces, the entropy source, the balloon.
    pub(crate) virtio: Vec<VirtioPlace>,
    /// The first port of power control.
    pub(crate) power_port: u16,
    /// The interrupt line of the event device.
    pub(crate) event_line: u32,
}

impl DeviceLayout {
    /// The layout of a new machine. More than [`MAX_VIRTIO_DEVICES`] devices have no place.
    pub(crate) fn new(virtio_devices: usize) -> Self {
        let addresses = (FIRST_WINDOW..).step_by(WINDOW_BYTES as usize);
        let places = addresses.zip(VIRTIO_LINES).map(|(address, line)| VirtioPlace { address, line });
        Self { virtio: places.take(virtio_devices).collect(), power_port: POWER_PORT, event_line: EVENT_LINE }
    }

    /// Whether a machine with so many virtio devices can be laid out like this: nothing lies on top of anything else.
    pub(crate) fn check(&self, virtio_devices: usize) -> Result<(), String> {
        if self.virtio.len() != virtio_devices {
            return Err(format!("places for {} virtio devices, it has {virtio_devices}", self.virtio.len()));
        }
        let mut addresses = BTreeSet::new();
        for VirtioPlace { address, .. } in &self.virtio {
            let in_gap = (GAP_START..u64::from(IO_APIC)).contains(address) && address.is_multiple_of(WINDOW_BYTES);
            if !in_gap || !addresses.insert(*address) {
                return Err(format!("no virtio device can be at {address:#x}"));
            }
        }
        let mut lines = BTreeSet::from([COM1.2]);
        for line in self.virtio.iter().map(|place| place.line).chain([self.event_line]) {
            if !(line == EVENT_LINE || VIRTIO_LINES.contains(&line)) || !lines.insert(line) {
                return Err(format!("no device can have interrupt line {line}"));
            }
        }
        let (com1, com1_ports, _) = COM1;
        let (keyboard, keyboard_ports) = KEYBOARD_CONTROLLER;
        let end = self.power_port.checked_add(POWER_PORTS);
        let clear = |first: u16, count: u16| end.is_some_and(|end| end <= first) || self.power_port >= first + count;
        if end.is_none() || !clear(com1, com1_ports) || !clear(keyboard, keyboard_ports) {
            return Err(format!("power control cannot be at port {:#x}", self.power_port));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_of_ours_is_sound() {
        for devices in 0..=MAX_VIRTIO_DEVICES {
            assert_eq!(DeviceLayout::new(devices).check(devices), Ok(()));
        }
        assert!(DeviceLayout::new(MAX_VIRTIO_DEVICES + 1).check(MAX_VIRTIO_DEVICES + 1).is_err());
    }

    #[test]
    fn what_lies_on_top_of_something_else_is_refused() {
        let refused = |change: &dyn Fn(&mut DeviceLayout)| {
            let mut layout = DeviceLayout::new(3);
            change(&mut layout);
            layout.check(3).expect_err("refused")
        };
        assert!(refused(&|layout| layout.virtio.truncate(2)).contains("2 virtio devices"));
        assert!(refused(&|layout| layout.virtio[1].address = layout.virtio[0].address).contains("0xd0000000"));
        assert!(refused(&|layout| layout.virtio[1].address = 0x1000).contains("0x1000"));
        assert!(refused(&|layout| layout.virtio[1].address = u64::from(IO_APIC)).contains("0xfec00000"));
        assert!(refused(&|layout| layout.virtio[1].address += 4).contains("0xd0001004"));
        assert!(refused(&|layout| layout.virtio[1].line = layout.virtio[0].line).contains("line 16"));
        assert!(refused(&|layout| layout.virtio[1].line = 4).contains("line 4"));
        assert!(refused(&|layout| layout.virtio[1].line = 24).contains("line 24"));
        assert!(refused(&|layout| layout.event_line = 16).contains("line 16"));
        for port in [0x3f5, 0x3ff, 0x5d, 0x64, 0xfffd] {
            assert!(refused(&|layout| layout.power_port = port).contains("power control"), "{port:#x}");
        }
        let mut layout = DeviceLayout::new(3);
        layout.power_port = 0x400;
        assert_eq!(layout.check(3), Ok(()));
    }
}
