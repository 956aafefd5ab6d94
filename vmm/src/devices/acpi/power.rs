//! Power control: the registers by which a guest switches itself off or resets itself, and by which it is told that the power
//! button was pressed.
//!
//! | port | read | write |
//! |---|---|---|
//! | +0, sleep control | 0 | sleep type and enable: only S5 (soft off) does something |
//! | +1, sleep status | 0: never woken | nothing |
//! | +2, reset | 0 | [`RESET_VALUE`] resets |
//! | +3, events | what has happened since the last read | nothing |

use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::{Device, Effect};

/// Version of the layout of section `ged`.
pub(crate) const VERSION: u16 = 1;

/// Offsets of the registers.
pub(super) const SLEEP_CONTROL: u16 = 0;
pub(super) const SLEEP_STATUS: u16 = 1;
pub(super) const RESET: u16 = 2;
pub(super) const EVENTS: u16 = 3;

/// What resets the machine when it is written to the reset register.
pub(super) const RESET_VALUE: u8 = 1;

/// The sleep type of S5, as the DSDT's `_S5` says.
pub(super) const S5_TYPE: u8 = 5;

/// In the sleep control register: the sleep type's place, and the bit that makes it happen.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
const SLEEP_ENABLE: u8 = 1 << 5;

/// In the event register: the power button was pressed.
pub(super) const POWER_BUTTON: u8 = 1;

/// Power control.
pub(crate) struct PowerControl {
    events: AtomicU8,
    line: EventFd,
}

/// Its state, version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct PowerState {
    events: u8,
}

impl PowerControl {
    /// Power control that signals events on `line`.
    pub(crate) fn new(line: EventFd) -> Self {
        Self { events: AtomicU8::new(0), line }
    }

    /// Presses the power button.
    pub(crate) fn press_button(&self) {
        self.events.fetch_or(POWER_BUTTON, Ordering::SeqCst);
        self.signal();
    }

    /// Signals again what the guest has not read yet: a signal that was on its way is in nobody's state.
    pub(crate) fn raise_again(&self) {
        if self.events.load(Ordering::SeqCst) != 0 {
            self.signal();
        }
    }

    /// What the guest has not read yet.
    pub(crate) fn save(&self) -> PowerState {
        PowerState { events: self.events.load(Ordering::SeqCst) }
    }

    /// Puts it back. [`PowerControl::raise_again`] makes the guest look.
    pub(crate) fn load(&self, state: PowerState) {
        self.events.store(state.events & POWER_BUTTON, Ordering::SeqCst);
    }

    fn signal(&self) {
        // Fails only if the counter is full: then KVM is going to see a signal anyway.
        let _ = self.line.write(1);
    }
}

impl Device for PowerControl {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(EVENTS), [byte]) = (u16::try_from(offset), data) {
            *byte = self.events.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let soft_off = S5_TYPE << SLEEP_TYPE_SHIFT | SLEEP_ENABLE;
        match (u16::try_from(offset), data) {
            (Ok(SLEEP_CONTROL), [value])
                if value & (SLEEP_TYPE_MASK << SLEEP_TYPE_SHIFT | SLEEP_ENABLE) == soft_off =>
            {
                Effect::PowerOff
            }
            (Ok(RESET), [RESET_VALUE]) => Effect::Reset,
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn power() -> (PowerControl, EventFd) {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        (PowerControl::new(line.try_clone().unwrap()), line)
    }

    fn read(power: &PowerControl, offset: u16) -> u8 {
        let mut data = [0xff];
        power.read(u64::from(offset), &mut data);
        data[0]
    }

    #[test]
    fn the_guest_is_told_of_the_button_once() {
        let (power, line) = power();
        assert_eq!(read(&power, EVENTS), 0);
        power.press_button();
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(read(&power, EVENTS), POWER_BUTTON);
        assert_eq!(read(&power, EVENTS), 0);
        power.raise_again();
        assert!(line.read().is_err(), "nothing is left to tell");
    }

    #[test]
    fn a_press_that_the_guest_has_not_seen_travels() {
        let (source, _) = power();
        source.press_button();
        let (destination, line) = power();
        destination.load(source.save());
        assert!(line.read().is_err(), "not before the guest runs");
        destination.raise_again();
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(read(&destination, EVENTS), POWER_BUTTON);
        destination.load(PowerState { events: 0xff });
        assert_eq!(read(&destination, EVENTS), POWER_BUTTON, "only events that there are");
    }

    #[test]
    fn only_soft_off_and_the_reset_value_do_something() {
        let (power, _) = power();
        for value in 0..=u8::MAX {
            let off = value & 0b0011_1100 == 0x34;
            let expected = if off { Effect::PowerOff } else { Effect::None };
            assert_eq!(power.write(u64::from(SLEEP_CONTROL), &[value]), expected, "{value:#x}");
            let expected = if value == RESET_VALUE { Effect::Reset } else { Effect::None };
            assert_eq!(power.write(u64::from(RESET), &[value]), expected, "{value:#x}");
            assert_eq!(power.write(u64::from(SLEEP_STATUS), &[value]), Effect::None);
        }
        assert_eq!(power.write(u64::from(RESET), &[RESET_VALUE, 0]), Effect::None);
        let mut wide = [0xff; 4];
        power.press_button();
        power.read(u64::from(EVENTS), &mut wide);
        assert_eq!(wide, [0; 4], "an access that is no byte reads nothing");
        assert_eq!(read(&power, EVENTS), POWER_BUTTON);
    }
}
