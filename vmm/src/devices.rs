//! The devices of a machine, on two buses: ports and memory.
//!
//! | module | what |
//! |---|---|
//! | `layout` | where they are |
//! | `bus` | which of them answers at an address |
//! | `serial`, `console` | a serial port, and what it is connected to |
//! | `i8042` | as much of a keyboard controller as a reset takes |
//! | `acpi` | the tables by which a guest finds everything, and power control |
//! | `virtio` | disks, network interfaces, the entropy source, the balloon, and their transport |

pub(crate) mod acpi;
mod bus;
mod console;
mod i8042;
pub(crate) mod layout;
pub(crate) mod serial;
pub(crate) mod virtio;

use std::sync::Arc;
use std::time::Instant;

use godwit_core::GuestMemory;
use kvm_ioctls::VmFd;

use self::acpi::power::{PowerControl, PowerState};
pub(crate) use self::bus::{Bus, Device, Effect};
use self::i8042::KeyboardController;
use self::layout::{COM1, DeviceLayout, KEYBOARD_CONTROLLER, POWER_PORTS, WINDOW_BYTES};
use self::serial::{SerialPort, SerialState, eventfd};
use self::virtio::VirtioDevice;
use self::virtio::balloon::Balloon;
use self::virtio::block::{self, Block, CacheMode};
use self::virtio::mmio::{MmioTransport, VirtioState};
use self::virtio::net::{self, Net};
use self::virtio::rng::Rng;
use crate::config::MachineConfig;
use crate::disks::Company;
use crate::error::{VmmError, chain};

/// All devices of a machine that live in this process.
pub(crate) struct Devices {
    ports: Bus,
    mmio: Bus,
    serial: Arc<SerialPort>,
    power: Arc<PowerControl>,
    virtio: Vec<Arc<MmioTransport>>,
    disks: Vec<Arc<Block>>,
    nets: Vec<Arc<Net>>,
}

/// The state of a machine's devices.
pub(crate) struct DevicesState {
    pub(crate) serial: SerialState,
    pub(crate) power: PowerState,
    /// By place in the layout.
    pub(crate) virtio: Vec<VirtioState>,
}

impl Devices {
    /// Builds the devices of a machine, puts them where `layout` says, and wires them to its interrupt controllers.
    /// `accepted`: for a machine that comes in from elsewhere, the features that its drivers use, by place.
    pub(crate) fn new(
        vm: &VmFd,
        memory: &GuestMemory,
        layout: &DeviceLayout,
        config: &MachineConfig,
        accepted: Option<&[u64]>,
    ) -> Result<Self, VmmError> {
        let (mut ports, mut mmio) = (Bus::default(), Bus::default());
        let (com1, com1_ports, com1_line) = COM1;
        let serial = Arc::new(SerialPort::new(vm, com1_line, &config.serial)?);
        ports.add(u64::from(com1), u64::from(com1_ports), serial.clone());
        let (keyboard, keyboard_ports) = KEYBOARD_CONTROLLER;
        ports.add(u64::from(keyboard), u64::from(keyboard_ports), Arc::new(KeyboardController));
        let line = |line| {
            let event = eventfd()?;
            vm.register_irqfd(&event, line).map_err(VmmError::kvm(format!("cannot wire interrupt line {line}")))?;
            Ok::<_, VmmError>(event)
        };
        let power = Arc::new(PowerControl::new(line(layout.event_line)?));
        ports.add(u64::from(layout.power_port), u64::from(POWER_PORTS), power.clone());
        let mut transports = Vec::with_capacity(layout.virtio.len());
        let company = if accepted.is_some() { Company::Source } else { Company::Nobody };
        let disks = open_disks(config, company)?;
        let nets = open_nets(config, accepted.unwrap_or_default())?;
        let balloon = config.balloon.map(Balloon::new);
        for (device, place) in in_order(&disks, &nets, balloon).zip(&layout.virtio) {
            let transport = Arc::new(MmioTransport::new(device, memory.clone(), line(place.line)?)?);
            transport.wire_kicks(vm, place.address)?;
            mmio.add(place.address, WINDOW_BYTES, transport.clone());
            transports.push(transport);
        }
        Ok(Self { ports, mmio, serial, power, virtio: transports, disks, nets })
    }

    /// Devices reached by port I/O.
    pub(crate) fn ports(&self) -> &Bus {
        &self.ports
    }

    /// Devices reached by memory access.
    pub(crate) fn mmio(&self) -> &Bus {
        &self.mmio
    }

    /// The disks, in the order of the machine's definition.
    pub(crate) fn disks(&self) -> &[Arc<Block>] {
        &self.disks
    }

    /// The network interfaces, in the order of the machine's definition.
    pub(crate) fn nets(&self) -> &[Arc<Net>] {
        &self.nets
    }

    /// The features that drivers have accepted, by place.
    pub(crate) fn accepted_features(&self) -> Vec<u64> {
        self.virtio.iter().map(|transport| transport.accepted_features()).collect()
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        self.power.press_button();
    }

    /// Opens the devices: they work, and take input in from outside. What was on its way when they were closed, or when their
    /// state was saved, is looked for.
    pub(crate) fn resume(&self) {
        for transport in &self.virtio {
            transport.resume();
        }
        self.power.raise_again();
        self.serial.accept_input(true);
    }

    /// Closes them: what they are at is completed, input from outside stays outside, and after this no device changes by
    /// itself or touches guest memory. On an error they are open as before.
    pub(crate) fn pause(&self, until: Instant) -> Result<(), VmmError> {
        pause_all(&self.virtio, until)?;
        self.serial.accept_input(false);
        Ok(())
    }

    /// Puts them into the state of power-on. Guest memory is not touched afterwards until a driver asks for it.
    pub(crate) fn reset(&self) -> Result<(), VmmError> {
        for transport in &self.virtio {
            transport.reset();
        }
        self.power.load(PowerState::default());
        self.serial.load(&SerialState::default())
    }

    /// Their state while they are closed.
    pub(crate) fn save(&self) -> Result<DevicesState, VmmError> {
        let save = |(slot, transport): (usize, &Arc<MmioTransport>)| {
            transport.save().map_err(|error| VmmError::state(virtio_kind(slot), chain(&error)))
        };
        Ok(DevicesState {
            serial: self.serial.save(),
            power: self.power.save(),
            virtio: self.virtio.iter().enumerate().map(save).collect::<Result<_, _>>()?,
        })
    }

    /// Takes state in, over whatever was there. They stay closed.
    pub(crate) fn load(&self, state: &DevicesState) -> Result<(), VmmError> {
        for (slot, (transport, state)) in self.virtio.iter().zip(&state.virtio).enumerate() {
            transport.load(state).map_err(|error| VmmError::state(virtio_kind(slot), chain(&error)))?;
        }
        self.power.load(state.power);
        self.serial.load(&state.serial)
    }

    /// Ends what devices do in the background. Others may have the disks then.
    pub(crate) fn stop(&self) {
        for transport in &self.virtio {
            transport.reset();
        }
        self.disks.iter().for_each(|disk| disk.let_go());
        self.serial.stop();
    }
}

/// Closes all of them, or none.
fn pause_all(transports: &[Arc<MmioTransport>], until: Instant) -> Result<(), VmmError> {
    for (done, transport) in transports.iter().enumerate() {
        if let Err(error) = transport.pause(until) {
            transports[..done].iter().for_each(|transport| transport.resume());
            return Err(error);
        }
    }
    Ok(())
}

/// The order in which virtio devices have their places: disks, network interfaces, the entropy source, the balloon.
fn in_order(
    disks: &[Arc<Block>],
    nets: &[Arc<Net>],
    balloon: Option<Balloon>,
) -> impl Iterator<Item = Arc<dyn VirtioDevice>> {
    let disks = disks.iter().cloned().map(|disk| disk as Arc<dyn VirtioDevice>);
    let nets = nets.iter().cloned().map(|net| net as Arc<dyn VirtioDevice>);
    let balloon = balloon.map(|balloon| Arc::new(balloon) as Arc<dyn VirtioDevice>);
    disks.chain(nets).chain([Arc::new(Rng::default()) as _]).chain(balloon)
}

fn open_disks(config: &MachineConfig, company: Company) -> Result<Vec<Arc<Block>>, VmmError> {
    // A queue for each vCPU: part of what the guest sees, and therefore the same wherever the machine moves.
    let queues = u16::try_from(config.vcpus).unwrap_or(u16::MAX);
    let cache = CacheMode::of(config.unsafe_cache);
    config.disks.iter().map(|disk| block::open(disk, cache, queues, company)).collect()
}

fn open_nets(config: &MachineConfig, accepted: &[u64]) -> Result<Vec<Arc<Net>>, VmmError> {
    let accepted = |index: usize| accepted.get(config.disks.len() + index).copied().unwrap_or(0);
    config.nets.iter().enumerate().map(|(index, net)| net::open(net, accepted(index))).collect()
}

/// How sections of virtio devices are called.
const VIRTIO: &str = "virtio/";

/// The section of the virtio device in this place.
pub(crate) fn virtio_kind(slot: usize) -> String {
    format!("{VIRTIO}{slot}")
}

/// Whether a section is that of a virtio device.
pub(crate) fn is_virtio_kind(kind: &str) -> bool {
    kind.starts_with(VIRTIO)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use virtio_queue::QueueState;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::devices::virtio::Activation;

    /// A device without queues that may refuse to be closed.
    #[derive(Default)]
    struct Stubborn {
        refuses: bool,
        open: AtomicBool,
    }

    impl VirtioDevice for Stubborn {
        fn kind(&self) -> u32 {
            42
        }

        fn features(&self) -> u64 {
            0
        }

        fn queue_max_sizes(&self) -> &[u16] {
            &[]
        }

        fn read_config(&self, _offset: u64, data: &mut [u8]) {
            data.fill(0);
        }

        fn activate(&self, _activation: Activation) -> Result<(), VmmError> {
            Ok(())
        }

        fn resume(&self) {
            self.open.store(true, Ordering::SeqCst);
        }

        fn pause(&self, _until: Instant) -> Result<(), VmmError> {
            if self.refuses {
                return Err(VmmError::Status("its storage does not answer".into()));
            }
            self.open.store(false, Ordering::SeqCst);
            Ok(())
        }

        fn queues(&self) -> Vec<QueueState> {
            Vec::new()
        }

        fn reset(&self) {}

        fn save(&self) -> Result<Vec<u8>, VmmError> {
            Ok(Vec::new())
        }

        fn load(&self, _state: &[u8]) -> Result<(), VmmError> {
            Ok(())
        }
    }

    #[test]
    fn all_devices_are_closed_or_none() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        for refuses in [false, true] {
            let devices = [false, refuses, false].map(|refuses| Arc::new(Stubborn { refuses, ..Default::default() }));
            let transports = devices.clone().map(|device| {
                let transport = MmioTransport::new(device, memory.clone(), eventfd().unwrap()).unwrap();
                transport.resume();
                // Its driver: version 1, ready.
                for (register, value) in [(0x70u64, 3u32), (0x24, 1), (0x20, 1), (0x70, 11), (0x70, 15)] {
                    transport.write(register, &value.to_le_bytes());
                }
                Arc::new(transport)
            });
            assert_eq!(pause_all(&transports, Instant::now()).is_err(), refuses);
            let open = devices.each_ref().map(|device| device.open.load(Ordering::SeqCst));
            assert_eq!(open, [refuses; 3]);
        }
    }
}
