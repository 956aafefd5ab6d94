//! The devices of a machine, on two buses: ports and memory.
//!
//! A device is a [`Device`] on a bus and a pair of saved state and version. This version has what a machine needs to talk and
//! to reboot: a serial port and the reset line of the keyboard controller.

mod bus;
mod console;
mod i8042;
pub(crate) mod serial;
pub(crate) mod virtio;

use std::sync::Arc;

use kvm_ioctls::VmFd;

pub(crate) use bus::{Bus, Device, Effect};
use i8042::KeyboardController;
use serial::SerialPort;

use crate::config::SerialTarget;
use crate::error::VmmError;

/// COM1: first port, number of ports, interrupt line.
const COM1: (u64, u64, u32) = (0x3f8, 8, 4);

/// The keyboard controller's ports: 0x60 to 0x64.
const KEYBOARD_CONTROLLER: (u64, u64) = (0x60, 5);

/// All devices of a machine that live in this process.
pub(crate) struct Devices {
    ports: Bus,
    mmio: Bus,
    serial: Arc<SerialPort>,
}

impl Devices {
    /// Builds the devices of a machine and wires them to its interrupt controllers.
    pub(crate) fn new(vm: &VmFd, serial: &SerialTarget) -> Result<Self, VmmError> {
        let (com1, com1_ports, com1_line) = COM1;
        let (keyboard, keyboard_ports) = KEYBOARD_CONTROLLER;
        let serial = Arc::new(SerialPort::new(vm, com1_line, serial)?);
        let mut ports = Bus::default();
        ports.add(com1, com1_ports, serial.clone());
        ports.add(keyboard, keyboard_ports, Arc::new(KeyboardController));
        Ok(Self { ports, mmio: Bus::default(), serial })
    }

    /// Devices reached by port I/O.
    pub(crate) fn ports(&self) -> &Bus {
        &self.ports
    }

    /// Devices reached by memory access.
    pub(crate) fn mmio(&self) -> &Bus {
        &self.mmio
    }

    /// The first serial port.
    pub(crate) fn serial(&self) -> &SerialPort {
        &self.serial
    }

    /// Lets devices take input in from outside.
    pub(crate) fn resume(&self) {
        self.serial.accept_input(true);
    }

    /// Input from outside stays outside: after this, no device changes by itself.
    pub(crate) fn pause(&self) {
        self.serial.accept_input(false);
    }

    /// Ends what devices do in the background.
    pub(crate) fn stop(&self) {
        self.serial.stop();
    }
}
