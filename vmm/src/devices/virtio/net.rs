//! The virtio network device (virtio 1.2, section 5.1) over a tap of the host.
//!
//! | module | what |
//! |---|---|
//! | `tap`, `link` | the host's side: opening a tap, asking the kernel about interfaces |
//! | `pump` | the thread that moves frames, and the gate that stops it |
//! | `receive`, `transmit`, `control`, `serve` | the queues |
//! | `chain`, `used`, `vectored` | descriptor chains as pieces of guest memory, and system calls on those |
//! | `vlan`, `statement`, `learn` | which addresses the guest has in which VLAN, learned from its frames |
//! | `announce` | the frames that say where it is now |
//! | `state` | what travels when the machine moves |
//!
//! What arrives while the device is closed stays in the tap's queue, which the kernel bounds. When a driver becomes ready, or a
//! machine's state is loaded, the queue is emptied first: it may hold what was flooded to this host while the guest ran on another
//! one, and got it there.

mod announce;
mod chain;
mod control;
mod learn;
pub(crate) mod link;
mod mac;
mod pump;
mod receive;
mod serve;
mod state;
mod statement;
pub(crate) mod tap;
#[cfg(test)]
pub(crate) mod tests;
mod transmit;
mod used;
mod vectored;
mod vlan;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use godwit_core::codec;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueState;

use self::control::{Command, Control};
use self::learn::AddressBook;
use self::link::Port;
pub(crate) use self::mac::MacAddress;
use self::pump::{Engine, Pump};
use self::receive::Receiver;
use self::state::State;
pub(crate) use self::state::from_version_1;
use self::tap::{HOST_FEATURES, OFFLOAD_FEATURES, Tap, TapError};
use self::transmit::Transmitter;
use super::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::config::NetConfig;
use crate::error::{VmmError, chain};
use crate::preflight::net::TapPort;
use crate::sync::lock;

/// Descriptors in the queues for what arrives, for what is sent, and for control.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// What the device offers whatever the tap can do.
const OWN_FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A network interface of a machine.
pub(crate) struct Net {
    shared: Arc<Shared>,
    active: Mutex<Option<Active>>,
}

/// A device whose driver is ready.
struct Active {
    pump: Pump,
    interrupt: Arc<Interrupt>,
    features: u64,
}

/// What the device and its thread have in common.
struct Shared {
    id: String,
    mac: MacAddress,
    tap: Tap,
    /// What the tap makes possible.
    tap_features: u64,
    book: Mutex<AddressBook>,
    /// Whether the driver has been asked to announce the guest and has not said yet that it has heard.
    announce_pending: AtomicBool,
    /// What the driver has accepted of [`OFFLOAD_FEATURES`], and of that what it wants now.
    offloads: Mutex<Option<u64>>,
    accepted: AtomicU64,
}

/// Opens the interface's tap, which has to support the features in `needed`: those that the driver of a machine that comes in has
/// accepted.
pub(crate) fn open(config: &NetConfig, needed: u64) -> Result<Arc<Net>, VmmError> {
    let failed = |reason: String| VmmError::Status(format!("network interface {}: {reason}", config.id));
    let mac: MacAddress = config.mac.parse().map_err(|error| failed(chain(&error)))?;
    let open = || -> Result<(Tap, u64), TapError> {
        let tap = Tap::open(&config.tap)?;
        let features = tap.features()?;
        Ok((tap, features))
    };
    let (tap, tap_features) = open().map_err(|error: TapError| failed(chain(&error)))?;
    let lacking = needed & (OFFLOAD_FEATURES | HOST_FEATURES) & !tap_features;
    if lacking != 0 {
        let text = format!("tap {} lacks what the guest's driver uses: {}", config.tap, tap::feature_names(lacking));
        return Err(failed(text));
    }
    let shared = Arc::new(Shared {
        id: config.id.clone(),
        mac,
        tap,
        tap_features,
        book: Mutex::new(AddressBook::new(mac)),
        announce_pending: AtomicBool::new(false),
        offloads: Mutex::new(None),
        accepted: AtomicU64::new(0),
    });
    Ok(Arc::new(Net { shared, active: Mutex::new(None) }))
}

impl Net {
    /// The interface's name in the machine's definition.
    pub(crate) fn id(&self) -> &str {
        &self.shared.id
    }

    /// What its tap is connected to now.
    pub(crate) fn port(&self) -> TapPort {
        let name = self.shared.tap.name();
        match Port::find(name) {
            Ok(Some(port)) => TapPort::from(&port),
            // It does not stop a machine from moving that its tap has been taken away.
            Ok(None) => TapPort::default(),
            Err(error) => {
                tracing::warn!("network interface {}: cannot find out about tap {name}: {error}", self.shared.id);
                TapPort::default()
            }
        }
    }

    /// Tells the network that the machine is here, with one round of frames, and returns how many there were. Does nothing while the
    /// device is closed.
    pub(crate) fn announce(&self) -> io::Result<usize> {
        let active = lock(&self.active);
        if active.as_ref().is_some_and(|active| !active.pump.is_open()) {
            return Ok(0);
        }
        let presences = lock(&self.shared.book).presences(Instant::now());
        let frames: Vec<_> =
            presences.iter().flat_map(|presence| announce::frames(self.shared.mac, presence)).collect();
        for frame in &frames {
            self.shared.tap.write_frame(frame)?;
        }
        Ok(frames.len())
    }

    /// Asks the guest to announce what only it knows, if its driver understands that.
    pub(crate) fn ask_guest_to_announce(&self) {
        let active = lock(&self.active);
        let Some(active) = active.as_ref().filter(|active| active.pump.is_open()) else { return };
        if active.features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0 {
            self.shared.announce_pending.store(true, Ordering::SeqCst);
            active.interrupt.config_changed();
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        OWN_FEATURES | self.shared.tap_features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let pending = self.shared.announce_pending.load(Ordering::SeqCst);
        let status = VIRTIO_NET_S_LINK_UP | if pending { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let mut space = [0; 8];
        space[..6].copy_from_slice(&self.shared.mac.0);
        space[6..].copy_from_slice(&(status as u16).to_le_bytes());
        data.fill(0);
        let from = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn activate(&self, activation: Activation) -> Result<(), VmmError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let mut active = lock(&self.active);
        // Ends the thread of the one before.
        *active = None;
        self.shared.use_features(features)?;
        let dropped = self.shared.tap.discard_queue();
        tracing::debug!("network interface {}: {dropped} frames that came too early dropped", self.shared.id);
        let mut queues = queues.into_iter();
        let mut next = || queues.next().flatten();
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let engine = Engine {
            shared: Arc::clone(&self.shared),
            memory,
            interrupt: Arc::clone(&interrupt),
            receiver: next().map(|ActiveQueue { queue, kick }| Receiver::new(queue, kick, mergeable)),
            transmitter: next().map(|ActiveQueue { queue, kick }| Transmitter::new(queue, kick)),
            control: next().map(|ActiveQueue { queue, kick }| Control::new(queue, kick)),
            broken: interrupt.is_broken(),
        };
        *active = Some(Active { pump: Pump::start(engine)?, interrupt, features });
        Ok(())
    }

    fn resume(&self) {
        if let Some(active) = lock(&self.active).as_ref() {
            active.pump.open();
        }
    }

    fn pause(&self, _until: Instant) -> Result<(), VmmError> {
        // Nothing that the thread does waits for anything, and it does little at a time.
        if let Some(active) = lock(&self.active).as_ref() {
            active.pump.close();
        }
        Ok(())
    }

    fn queues(&self) -> Vec<QueueState> {
        lock(&self.active).as_ref().map(|active| active.pump.queues()).unwrap_or_default()
    }

    fn reset(&self) {
        *lock(&self.active) = None;
        self.shared.reset();
    }

    fn save(&self) -> Result<Vec<u8>, VmmError> {
        let state = State {
            book: lock(&self.shared.book).save(Instant::now()),
            announce_pending: self.shared.announce_pending.load(Ordering::SeqCst),
            offloads: *lock(&self.shared.offloads),
        };
        codec::encode(&state)
            .map_err(|source| VmmError::Codec { what: "cannot encode a network interface's state", source })
    }

    fn load(&self, state: &[u8]) -> Result<(), VmmError> {
        let failed = |reason: String| VmmError::state(format!("net/{}", self.shared.id), reason);
        let state: State = codec::decode(state).map_err(|error| failed(error.to_string()))?;
        lock(&self.shared.book).load(&state.book, Instant::now()).map_err(failed)?;
        self.shared.announce_pending.store(state.announce_pending, Ordering::SeqCst);
        *lock(&self.shared.offloads) = state.offloads;
        Ok(())
    }
}

impl Shared {
    /// The driver has accepted these features, or had when its state was saved.
    fn use_features(&self, features: u64) -> Result<(), VmmError> {
        let accepted = features & OFFLOAD_FEATURES;
        self.accepted.store(accepted, Ordering::SeqCst);
        let mut offloads = lock(&self.offloads);
        let wanted = offloads.unwrap_or(accepted);
        if wanted & !accepted != 0 {
            let reason = format!("offloads {wanted:#x}, of which only {accepted:#x} have been agreed on");
            return Err(VmmError::state(format!("net/{}", self.id), reason));
        }
        *offloads = Some(wanted);
        self.tap
            .set_offloads(wanted)
            .map_err(|error| VmmError::Status(format!("network interface {}: {}", self.id, chain(&error))))
    }

    /// Does what the driver asks for, if that is possible.
    fn obey(&self, command: Command) -> bool {
        match command {
            Command::Announced => {
                self.announce_pending.store(false, Ordering::SeqCst);
                true
            }
            Command::SetOffloads(wanted) => {
                let possible = wanted & !self.accepted.load(Ordering::SeqCst) == 0;
                let done = possible && self.tap.set_offloads(wanted).is_ok();
                if done {
                    *lock(&self.offloads) = Some(wanted);
                }
                done
            }
        }
    }

    fn reset(&self) {
        lock(&self.book).clear();
        self.announce_pending.store(false, Ordering::SeqCst);
        *lock(&self.offloads) = None;
        self.accepted.store(0, Ordering::SeqCst);
        if let Err(error) = self.tap.set_offloads(0) {
            tracing::warn!("network interface {}: {}", self.id, chain(&error));
        }
    }
}
