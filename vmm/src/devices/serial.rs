//! The serial port: a 16550 with an interrupt, connected to a console.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState as UartState, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::console::{Console, Output};
use super::{Device, Effect};
use crate::config::SerialTarget;
use crate::error::VmmError;
use crate::sync::lock;

/// Version of the layout of section `serial`.
pub(crate) const VERSION: u16 = 1;

type Uart = Serial<Interrupt, Wake, Output>;

/// A serial port.
pub(crate) struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    interrupt: EventFd,
    console: Console,
}

impl SerialPort {
    /// A serial port that raises `line` and is connected to `target`.
    pub(crate) fn new(vm: &VmFd, line: u32, target: &SerialTarget) -> Result<Self, VmmError> {
        let interrupt = eventfd()?;
        vm.register_irqfd(&interrupt, line).map_err(VmmError::kvm("cannot wire the serial port's interrupt"))?;
        let console = Console::open(target)?;
        let trigger = Interrupt(clone(&interrupt)?);
        let uart = Serial::with_events(trigger, Wake(clone(console.wake())?), console.output());
        let uart = Arc::new(Mutex::new(uart));
        console.feed(Arc::new(UartInput(Arc::clone(&uart))))?;
        Ok(Self { uart, interrupt, console })
    }

    /// Whether input from outside reaches the port. Once this has returned false, none does.
    pub(crate) fn accept_input(&self, accept: bool) {
        self.console.accept_input(accept);
    }

    /// Ends the console's thread.
    pub(crate) fn stop(&self) {
        self.console.stop();
    }

    /// Its registers and what it has received but the guest has not read.
    pub(crate) fn save(&self) -> SerialState {
        lock(&self.uart).state().into()
    }

    /// Puts them back, and raises the interrupt again if the state says that one is pending: the signal that was on its way
    /// is in nobody's state.
    pub(crate) fn load(&self, state: &SerialState) -> Result<(), VmmError> {
        let trigger = Interrupt(clone(&self.interrupt)?);
        let wake = Wake(clone(self.console.wake())?);
        let uart = Serial::from_state(&state.into(), trigger, wake, self.console.output())
            .map_err(|error| VmmError::state("serial", error.to_string()))?;
        *lock(&self.uart) = uart;
        Ok(())
    }
}

impl Device for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = lock(&self.uart);
        // Registers are bytes; a wider access reads one register and zeros.
        data.fill(0);
        if let (Ok(offset), Some(byte)) = (u8::try_from(offset), data.first_mut()) {
            *byte = uart.read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let mut uart = lock(&self.uart);
        for byte in data {
            // More than one byte is a string written to one port (rep outsb).
            if let Err(error) = u8::try_from(offset).map(|offset| uart.write(offset, *byte)) {
                tracing::debug!("serial port: {error}");
            }
        }
        Effect::None
    }
}

/// Where a console puts what it receives.
pub(super) struct UartInput(Arc<Mutex<Uart>>);

impl UartInput {
    /// How many bytes fit in now.
    pub(super) fn room(&self) -> usize {
        lock(&self.0).fifo_capacity()
    }

    /// Receives bytes; those that do not fit in are lost, as on a real line.
    pub(super) fn receive(&self, bytes: &[u8]) {
        if let Err(error) = lock(&self.0).enqueue_raw_bytes(bytes) {
            tracing::debug!("serial port: {error}");
        }
    }
}

/// The state of a serial port, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SerialState {
    baud_divisor: u16,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

impl Default for SerialState {
    fn default() -> Self {
        UartState::default().into()
    }
}

impl From<UartState> for SerialState {
    fn from(uart: UartState) -> Self {
        Self {
            baud_divisor: u16::from_le_bytes([uart.baud_divisor_low, uart.baud_divisor_high]),
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            received: uart.in_buffer,
        }
    }
}

impl From<&SerialState> for UartState {
    fn from(state: &SerialState) -> Self {
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor.to_le_bytes();
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        }
    }
}

/// The port's interrupt line: an eventfd that KVM turns into an edge.
pub(crate) struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Wakes the console when the guest has read all that was received.
pub(crate) struct Wake(EventFd);

impl SerialEvents for Wake {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // Fails only if the counter is full: then the console is going to wake up anyway.
        let _ = self.0.write(1);
    }
}

/// A non-blocking eventfd.
pub(super) fn eventfd() -> Result<EventFd, VmmError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VmmError::os("cannot create an eventfd"))
}

fn clone(event: &EventFd) -> Result<EventFd, VmmError> {
    event.try_clone().map_err(VmmError::os("cannot duplicate an eventfd"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_state_survives_the_way_through_the_uart(
            registers: [u8; 7], baud_divisor: u16, received in prop::collection::vec(any::<u8>(), 0..64)
        ) {
            let [interrupt_enable, interrupt_identification, line_control, line_status, modem_control, modem_status, scratch]
                = registers;
            let state = SerialState {
                baud_divisor, interrupt_enable, interrupt_identification, line_control, line_status, modem_control,
                modem_status, scratch, received,
            };
            let line = Interrupt(eventfd().unwrap());
            let uart = Serial::from_state(&(&state).into(), line, Wake(eventfd().unwrap()), io::sink()).unwrap();
            prop_assert_eq!(SerialState::from(uart.state()), state);
        }
    }
}
