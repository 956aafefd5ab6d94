//! A driver that programs the registers, and one that has gone mad.

use std::time::Duration;

use godwit_core::bitmap::PageBits;
use godwit_core::codec;
use proptest::prelude::*;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER, VIRTIO_CONFIG_S_FAILED as FAILED,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::*;
use crate::devices::virtio::rng::Rng;

/// Where the queue lies: descriptors, available ring, used ring. And where its buffers do.
const RINGS: u64 = 0x4000;
const AVAIL: u64 = RINGS + 0x100;
const USED: u64 = RINGS + 0x200;
const BUFFERS: u64 = 0x1_0000;
const BUFFER_BYTES: u32 = 300;

const QUEUE_SIZE: u16 = 8;
const PATIENCE: Duration = Duration::from_secs(10);

/// A driver of an entropy source.
struct Machine {
    transport: MmioTransport,
    memory: GuestMemory,
    line: EventFd,
}

impl Machine {
    /// One that runs.
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        Self::with_memory(memory)
    }

    fn with_memory(memory: GuestMemory) -> Self {
        let line = eventfd().unwrap();
        let device: Arc<dyn VirtioDevice> = Arc::new(Rng::default());
        let transport = MmioTransport::new(device, memory.clone(), line.try_clone().unwrap()).unwrap();
        transport.resume();
        Self { transport, memory, line }
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u32, value: u32) {
        assert_eq!(self.transport.write(u64::from(register), &value.to_le_bytes()), Effect::None);
    }

    fn add_status(&self, bits: u32) -> u32 {
        self.write(VIRTIO_MMIO_STATUS, self.read(VIRTIO_MMIO_STATUS) | bits);
        self.read(VIRTIO_MMIO_STATUS)
    }

    fn accept(&self, features: u64) -> bool {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.add_status(FEATURES_OK) & FEATURES_OK != 0
    }

    /// Everything up to DRIVER_OK; the status then.
    fn start(&self) -> u32 {
        assert!(self.accept(1 << VIRTIO_F_VERSION_1));
        self.set_queue(RINGS);
        self.add_status(DRIVER_OK)
    }

    fn set_queue(&self, rings: u64) {
        let [desc, avail, used] = [RINGS, AVAIL, USED].map(|at| at - RINGS + rings);
        self.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        assert_eq!(self.read(VIRTIO_MMIO_QUEUE_READY), 0);
        self.write(VIRTIO_MMIO_QUEUE_NUM, u32::from(QUEUE_SIZE));
        for (low, high, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, desc),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, avail),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, used),
        ] {
            self.write(low, address as u32);
            self.write(high, (address >> 32) as u32);
        }
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(self.read(VIRTIO_MMIO_QUEUE_READY), 1);
    }

    /// Puts the request number `number` into the queue: a buffer of its own.
    fn offer(&self, number: u16) {
        let slot = number % QUEUE_SIZE;
        let buffer = BUFFERS + u64::from(slot) * 4096;
        let descriptor = Descriptor::new(buffer, BUFFER_BYTES, VRING_DESC_F_WRITE as u16, 0);
        self.memory.write_obj(RawDescriptor::from(descriptor), GuestAddress(RINGS + u64::from(slot) * 16)).unwrap();
        self.memory.write_obj(slot, GuestAddress(AVAIL + 4 + 2 * u64::from(slot))).unwrap();
        self.memory.write_obj(number.wrapping_add(1), GuestAddress(AVAIL + 2)).unwrap();
    }

    fn kick(&self) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }

    fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// Waits until so many requests have been answered and the driver has been told.
    fn wait_for(&self, answered: u16) {
        let until = Instant::now() + PATIENCE;
        while self.used_index() != answered || self.read(VIRTIO_MMIO_INTERRUPT_STATUS) & 1 == 0 {
            assert!(Instant::now() < until, "{} requests answered, not {answered}", self.used_index());
            std::thread::sleep(Duration::from_millis(1));
        }
        self.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(self.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }

    fn request(&self, number: u16) {
        self.offer(number);
        self.kick();
        self.wait_for(number.wrapping_add(1));
    }

    fn buffer(&self, number: u16) -> Vec<u8> {
        let mut bytes = vec![0; BUFFER_BYTES as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(BUFFERS + u64::from(number % QUEUE_SIZE) * 4096)).unwrap();
        bytes
    }

    fn pause(&self) {
        self.transport.pause(Instant::now() + PATIENCE).unwrap();
    }

    /// As it travels.
    fn saved(&self) -> VirtioState {
        codec::decode(&codec::encode(&self.transport.save().unwrap()).unwrap()).unwrap()
    }
}

fn forget_writes(memory: &GuestMemory) {
    for region in memory.iter() {
        let mapping: &MmapRegion<PageBits> = region;
        mapping.bitmap().clear();
    }
}

fn is_dirty(memory: &GuestMemory, address: u64) -> bool {
    let region = memory.iter().next().unwrap();
    region.bitmap().dirty_at(address as usize)
}

#[test]
fn a_driver_finds_an_entropy_source() {
    let machine = Machine::new();
    assert_eq!(machine.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(machine.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(machine.read(VIRTIO_MMIO_DEVICE_ID), VIRTIO_ID_RNG);
    assert_eq!(machine.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    assert_eq!(machine.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    machine.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(machine.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "there is no second queue");
    let features = [0, 1, 2].map(|select| {
        machine.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        machine.read(VIRTIO_MMIO_DEVICE_FEATURES)
    });
    assert_eq!(features, [1 << VIRTIO_RING_F_EVENT_IDX, 1, 0]);
    let mut wide = [0xff; 8];
    machine.transport.read(0, &mut wide);
    assert_eq!(wide, [0; 8], "registers are read four bytes at a time");
    machine.transport.read(u64::MAX, &mut wide);
    assert_eq!(wide, [0; 8]);
}

#[test]
fn features_are_agreed_on_only_if_they_make_sense() {
    let machine = Machine::new();
    let version_1 = 1 << VIRTIO_F_VERSION_1;
    assert!(machine.accept(version_1));
    assert!(machine.accept(version_1 | 1 << VIRTIO_RING_F_EVENT_IDX));
    assert!(!machine.accept(0), "a driver from before virtio 1");
    assert!(!machine.accept(version_1 | 1), "a feature that was not offered");
    machine.set_queue(RINGS);
    assert_eq!(machine.add_status(DRIVER_OK) & DRIVER_OK, 0, "not without features");
    // Agreed is agreed.
    assert!(machine.accept(version_1));
    machine.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    let status = machine.read(VIRTIO_MMIO_STATUS);
    machine.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    assert_eq!(machine.read(VIRTIO_MMIO_STATUS), status, "bits are only ever added");
    assert_eq!(machine.add_status(DRIVER_OK | FAILED | NEEDS_RESET), status | DRIVER_OK | FAILED);
}

#[test]
fn requests_are_answered_and_what_was_written_is_marked() {
    let machine = Machine::new();
    assert_eq!(machine.start(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    // More often than the queue is long.
    for number in 0..3 * QUEUE_SIZE {
        forget_writes(&machine.memory);
        machine.offer(number);
        forget_writes(&machine.memory);
        machine.kick();
        machine.wait_for(number + 1);
        let buffer = BUFFERS + u64::from(number % QUEUE_SIZE) * 4096;
        assert!(is_dirty(&machine.memory, buffer), "the buffer");
        assert!(is_dirty(&machine.memory, USED), "the used ring");
        assert!(!is_dirty(&machine.memory, buffer + 4096), "nothing else");
        let bytes = machine.buffer(number);
        assert!(bytes.iter().filter(|byte| **byte == 0).count() < bytes.len() / 4, "{bytes:?}");
        let used = USED + 4 + 8 * u64::from(number % QUEUE_SIZE);
        assert_eq!(machine.memory.read_obj::<u32>(GuestAddress(used + 4)).unwrap(), BUFFER_BYTES);
    }
    assert!(machine.line.read().unwrap() > 0, "the line was raised");
    // A reset gives everything back.
    machine.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(machine.read(VIRTIO_MMIO_QUEUE_READY), 0);
    machine.offer(24);
    machine.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.used_index(), 24);
}

#[test]
fn a_closed_device_does_nothing_and_then_everything() {
    let machine = Machine::new();
    machine.start();
    machine.request(0);
    machine.pause();
    machine.offer(1);
    machine.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.used_index(), 1);
    machine.transport.resume();
    machine.wait_for(2);
    // What was offered without a kick that anybody remembers is found as well.
    machine.pause();
    machine.offer(2);
    machine.transport.resume();
    machine.wait_for(3);
    // A driver that becomes ready while the machine is paused (by a single step of a debugger, say) waits.
    machine.write(VIRTIO_MMIO_STATUS, 0);
    machine.pause();
    machine.memory.write_obj(0u32, GuestAddress(USED)).unwrap();
    machine.start();
    machine.offer(0);
    machine.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.used_index(), 0);
    machine.transport.resume();
    machine.wait_for(1);
}

#[test]
fn a_device_goes_on_in_another_machine() {
    let source = Machine::new();
    source.start();
    for number in 0..QUEUE_SIZE + 3 {
        source.request(number);
    }
    source.pause();
    source.offer(QUEUE_SIZE + 3);
    // As if its last interrupt had not been looked at yet.
    source.transport.interrupt.used_buffers();
    let rehearsed = source.saved();
    let state = source.saved();
    assert_eq!(rehearsed, state);

    let destination = Machine::new();
    destination.pause();
    destination.transport.load(&rehearsed).unwrap();
    assert_eq!(destination.saved(), state);
    let mut memory = vec![0; 1 << 20];
    source.memory.read_slice(&mut memory, GuestAddress(0)).unwrap();
    destination.memory.write_slice(&memory, GuestAddress(0)).unwrap();
    destination.transport.load(&state).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(destination.used_index(), QUEUE_SIZE + 3, "closed until it is owned");
    assert!(destination.line.read().is_err(), "and silent");
    destination.transport.resume();
    destination.wait_for(QUEUE_SIZE + 4);
    assert!(destination.line.read().is_ok());
    destination.request(QUEUE_SIZE + 4);

    // The source, if the move fails.
    source.transport.resume();
    source.wait_for(QUEUE_SIZE + 4);
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let source = Machine::new();
    source.start();
    source.pause();
    let good = source.saved();
    let destination = Machine::new();
    destination.pause();
    let bytes = codec::encode(&good).unwrap();
    let fresh = Machine::new().saved();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            let Ok(state) = codec::decode::<VirtioState>(&damaged) else { continue };
            if destination.transport.load(&state).is_err() {
                assert_eq!(destination.saved(), fresh, "as at power-on");
            }
        }
    }
    let refused = |what: &str, change: &dyn Fn(&mut VirtioState)| {
        let mut state = good.clone();
        change(&mut state);
        let error = destination.transport.load(&state).expect_err(what);
        chain(&error)
    };
    assert!(refused("bytes", &|state| state.device.push(1)).contains("no state of its own"));
    assert!(refused("bytes", &|state| state.device = vec![0; 2 << 20]).contains("more than any device"));
    destination.transport.load(&good).unwrap();
    destination.transport.resume();
    destination.request(0);
}

#[test]
fn a_queue_that_cannot_be_used_makes_the_device_want_a_reset() {
    let machine = Machine::new();
    let beyond = |rings| {
        assert!(machine.accept(1 << VIRTIO_F_VERSION_1));
        machine.set_queue(rings);
        machine.add_status(DRIVER_OK)
    };
    for rings in [1 << 20, (1 << 20) - 64, RINGS + 1, u64::MAX - 0xffff] {
        assert_ne!(beyond(rings) & NEEDS_RESET, 0, "{rings:#x}");
        assert_eq!(machine.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
        // It travels like that, and goes on as soon as it was reset.
        machine.pause();
        let state = machine.saved();
        machine.transport.load(&state).unwrap();
        assert_eq!(machine.saved(), state);
        machine.transport.resume();
        assert_ne!(machine.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0, "{rings:#x}");
    }
    for size in [0, 3, 128, 1 << 16 | 8] {
        assert!(machine.accept(1 << VIRTIO_F_VERSION_1));
        machine.write(VIRTIO_MMIO_QUEUE_NUM, size);
        machine.write(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_ne!(machine.add_status(DRIVER_OK) & NEEDS_RESET, 0, "{size}");
    }
    // A ring that runs ahead of itself.
    machine.start();
    machine.memory.write_obj(QUEUE_SIZE + 1, GuestAddress(AVAIL + 2)).unwrap();
    machine.kick();
    let until = Instant::now() + PATIENCE;
    while machine.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET == 0 {
        assert!(Instant::now() < until, "the device does not notice");
    }
    machine.memory.write_obj(0u16, GuestAddress(AVAIL + 2)).unwrap();
    assert_eq!(machine.start() & NEEDS_RESET, 0);
    machine.request(0);
}

#[test]
fn a_change_of_configuration_shows_in_the_generation() {
    let machine = Machine::new();
    let before = machine.read(VIRTIO_MMIO_CONFIG_GENERATION);
    machine.transport.interrupt.config_changed();
    assert_ne!(machine.read(VIRTIO_MMIO_CONFIG_GENERATION), before);
}

/// One access: the offset, the bytes, whether it writes.
fn access() -> impl Strategy<Value = (u64, Vec<u8>, bool)> {
    let register = prop_oneof![
        (0..0x40u64).prop_map(|word| word * 4),
        Just(u64::from(VIRTIO_MMIO_STATUS)),
        Just(u64::from(VIRTIO_MMIO_QUEUE_READY)),
        0..0x200u64,
        any::<u64>(),
    ];
    let word =
        prop_oneof![any::<u32>(), 0..16u32, Just(RINGS as u32), Just(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)];
    let bytes = prop_oneof![4 => word.prop_map(|word| word.to_le_bytes().to_vec()), 1 => prop::collection::vec(any::<u8>(), 0..9)];
    (register, bytes, any::<bool>())
}

proptest! {
    #[test]
    fn a_mad_driver_does_no_harm(accesses in prop::collection::vec(access(), 0..200), junk: u64) {
        let machine = Machine::new();
        let mut state = junk;
        for address in (0..1 << 16).step_by(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            machine.memory.write_obj(state, GuestAddress(address)).unwrap();
        }
        for (step, (offset, mut bytes, write)) in accesses.into_iter().enumerate() {
            match write {
                true => drop(machine.transport.write(offset, &bytes)),
                false => machine.transport.read(offset, &mut bytes),
            }
            if step % 16 == 15 {
                machine.pause();
                let state = machine.saved();
                machine.transport.load(&state).unwrap();
                machine.transport.resume();
            }
        }
        // It is as good as new after a reset.
        machine.write(VIRTIO_MMIO_STATUS, 0);
        machine.memory.write_slice(&[0; 0x4000], GuestAddress(RINGS)).unwrap();
        machine.start();
        machine.request(0);
    }
}
