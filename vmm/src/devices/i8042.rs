//! As much of a keyboard controller as a guest needs to reboot: its reset line. No keyboard is attached.

use super::{Device, Effect};

const COMMAND: u64 = 4;
const PULSE_RESET_LINE: u8 = 0xfe;

pub(super) struct KeyboardController;

impl Device for KeyboardController {
    /// Status: nothing to read, ready for a command. Data: nothing.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if offset == COMMAND && data == [PULSE_RESET_LINE] { Effect::Reset } else { Effect::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        assert_eq!(KeyboardController.write(COMMAND, &[PULSE_RESET_LINE]), Effect::Reset);
        assert_eq!(KeyboardController.write(COMMAND, &[0xd1]), Effect::None);
        assert_eq!(KeyboardController.write(0, &[PULSE_RESET_LINE]), Effect::None);
    }
}
