//! A bus: which device answers at which address.

use std::sync::Arc;

/// What a write did beyond the device itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// The guest asked for the machine to be reset.
    Reset,
    /// The guest asked for the machine to be switched off.
    PowerOff,
}

/// A device on a bus. Offsets are relative to its first address; accesses have any length that a vCPU can make.
pub(crate) trait Device: Send + Sync {
    /// Fills `data` with what is read at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data`, written at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> Effect;
}

/// Devices by address.
#[derive(Default)]
pub(crate) struct Bus {
    slots: Vec<Slot>,
}

struct Slot {
    first: u64,
    length: u64,
    device: Arc<dyn Device>,
}

impl Bus {
    /// Puts `device` at the `length` addresses from `first` on. Where devices overlap, the first one added answers.
    pub(crate) fn add(&mut self, first: u64, length: u64, device: Arc<dyn Device>) {
        self.slots.push(Slot { first, length, device });
    }

    /// A read by the guest. Where nobody answers, all bits are ones.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write by the guest. Where nobody answers, it is lost.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address) {
            Some((offset, device)) => device.write(offset, data),
            None => Effect::None,
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &dyn Device)> {
        self.slots.iter().find_map(|slot| {
            let offset = address.checked_sub(slot.first)?;
            (offset < slot.length).then_some((offset, slot.device.as_ref()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Device for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, _offset: u64, _data: &[u8]) -> Effect {
            Effect::Reset
        }
    }

    #[test]
    fn the_device_at_the_address_answers_and_nobody_else() {
        let mut bus = Bus::default();
        bus.add(0x60, 5, Arc::new(Echo));
        for (address, expected) in [(0x5f, 0xff), (0x60, 0), (0x64, 4), (0x65, 0xff), (u64::MAX, 0xff)] {
            let mut data = [0x55];
            bus.read(address, &mut data);
            assert_eq!(data, [expected], "{address:#x}");
        }
        assert_eq!(bus.write(0x64, &[1]), Effect::Reset);
        assert_eq!(bus.write(0x65, &[1]), Effect::None);
    }
}
