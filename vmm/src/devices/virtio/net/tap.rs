//! A tap of the host, opened by name: frames with a virtio-net header in front of them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use super::chain::Piece;
use super::link::{self, Link};
use super::vectored;

/// The virtio-net header of a device of version 1: with the number of buffers.
pub(super) const HEADER_BYTES: usize = 12;

const TUN_DEVICE: &str = "/dev/net/tun";

// linux/if_tun.h; libc has them for other systems only.
const IFF_TAP: u16 = 0x0002;
const IFF_PERSIST: u16 = 0x0800;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN: u32 = b'T' as u32;
ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);
ioctl_ior_nr!(TUNGETFEATURES, TUN, 207, libc::c_uint);
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_ior_nr!(TUNGETIFF, TUN, 210, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);

/// What the guest may hand to the host unfinished. Any tap that speaks virtio-net headers takes it.
pub(super) const HOST_FEATURES: u64 =
    bit(VIRTIO_NET_F_CSUM) | bit(VIRTIO_NET_F_HOST_TSO4) | bit(VIRTIO_NET_F_HOST_TSO6) | bit(VIRTIO_NET_F_HOST_ECN);

/// What the host may hand to the guest unfinished: each feature, and what the tap has to be told.
const GUEST_FEATURES: [(u32, u32); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
];

/// All of [`GUEST_FEATURES`].
pub(super) const OFFLOAD_FEATURES: u64 = bit(VIRTIO_NET_F_GUEST_CSUM)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_ECN);

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TapError {
    #[error("cannot open {TUN_DEVICE} (is the kernel's module tun loaded, and may this user open it?)")]
    NoTun(#[source] io::Error),
    #[error("this host has no tap {0}: make it with `ip tuntap add {0} mode tap vnet_hdr` and `ip link set {0} up`")]
    Missing(String),
    #[error("`{0}` is not the name of an interface: 1 to 15 bytes, without `/`, `:`, `%` and spaces")]
    Name(String),
    #[error("{0} is not a tap, it is {1}")]
    NotATap(String, String),
    #[error(
        "tap {0} has several queues: make it again without `multi_queue`, so that no two processes can have it at a time"
    )]
    MultiQueue(String),
    #[error("tap {0} is in use by another process")]
    Busy(String),
    #[error(
        "this user may not open tap {0}: give the tap to the user (`ip tuntap add … user NAME`) or run with CAP_NET_ADMIN"
    )]
    Permission(String),
    #[error("this host's taps have no virtio-net header (IFF_VNET_HDR)")]
    NoHeader,
    #[error("cannot find out about interface {0}")]
    Lookup(String, #[source] io::Error),
    #[error("cannot {what} tap {name}")]
    Os { name: String, what: &'static str, source: io::Error },
}

/// An open tap.
pub(crate) struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens a tap that exists. One that does not is for the host's operator to make: only they know what it belongs to.
    pub(super) fn open(name: &str) -> Result<Self, TapError> {
        let mut request = request(name)?;
        let link = link::find(name)
            .map_err(|error| TapError::Lookup(name.into(), error))?
            .ok_or_else(|| TapError::Missing(name.into()))?;
        check_kind(&link)?;
        let file = open_tun()?;
        let tap = Self { file, name: name.into() };
        request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the argument is an ifreq, which lives through the call.
        check(unsafe { ioctl_with_ref(&tap.file, TUNSETIFF(), &request) }).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy(name.into()),
                Some(libc::EPERM | libc::EACCES) => TapError::Permission(name.into()),
                _ => tap.failed("attach to")(error),
            }
        })?;
        // Had it been removed just now, the kernel would have made another one, which goes away with the descriptor.
        if tap.flags()? & IFF_PERSIST == 0 {
            return Err(TapError::Missing(name.into()));
        }
        let header_bytes = HEADER_BYTES as libc::c_int;
        // SAFETY: the argument is an int, which lives through the call.
        check(unsafe { ioctl_with_ref(&tap.file, TUNSETVNETHDRSZ(), &header_bytes) })
            .map_err(tap.failed("set the size of headers of"))?;
        Ok(tap)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The virtio-net features that rest on the tap. Leaves it without any in use.
    pub(super) fn features(&self) -> Result<u64, TapError> {
        let mut features = HOST_FEATURES;
        let mut flags = 0;
        // In an order in which each needs those before it: segments come with checksums to be filled in.
        for (feature, flag) in GUEST_FEATURES {
            if self.set_offload_flags(flags | flag).is_ok() {
                flags |= flag;
                features |= bit(feature);
            }
        }
        self.set_offloads(0)?;
        Ok(features)
    }

    /// Lets the tap hand out what a driver has accepted with these features, and nothing else.
    pub(super) fn set_offloads(&self, features: u64) -> Result<(), TapError> {
        let accepted = GUEST_FEATURES.iter().filter(|(feature, _)| features & bit(*feature) != 0);
        let flags = accepted.fold(0, |flags, (_, flag)| flags | flag);
        // The kernel refuses what rests on something else that is off, as the driver should have.
        let flags = if flags & TUN_F_CSUM == 0 { 0 } else { flags };
        let flags = if flags & (TUN_F_TSO4 | TUN_F_TSO6) == 0 { flags & TUN_F_CSUM } else { flags };
        self.set_offload_flags(flags).map_err(self.failed("set the offloads of"))
    }

    /// Takes a frame out of the tap, into pieces of guest memory and then `rest`. Returns its length with its header.
    pub(super) fn read(&self, pieces: &[Piece], rest: &mut [u8]) -> io::Result<usize> {
        vectored::read(&self.file, pieces, rest)
    }

    /// Puts a frame with its header into the tap.
    pub(super) fn write(&self, pieces: &[Piece]) -> io::Result<usize> {
        vectored::write(&self.file, pieces)
    }

    /// Puts a finished frame into the tap.
    pub(super) fn write_frame(&self, frame: &[u8]) -> io::Result<()> {
        use std::io::Write;
        let with_header = [&[0; HEADER_BYTES], frame].concat();
        (&self.file).write_all(&with_header)
    }

    /// Throws away what has arrived, up to a limit that no queue of a tap reaches unless it is being filled at the same time.
    pub(super) fn discard_queue(&self) -> usize {
        const MAX_FRAMES: usize = 1 << 16;
        let mut frame = [0; HEADER_BYTES];
        // What is longer than the buffer is thrown away too.
        (0..MAX_FRAMES).take_while(|_| self.read(&[], &mut frame).is_ok()).count()
    }

    fn flags(&self) -> Result<u16, TapError> {
        let mut request = request(&self.name)?;
        // SAFETY: the kernel fills in an ifreq, which lives through the call.
        check(unsafe { ioctl_with_mut_ref(&self.file, TUNGETIFF(), &mut request) })
            .map_err(self.failed("read the flags of"))?;
        // SAFETY: this request answers with flags.
        Ok(unsafe { request.ifr_ifru.ifru_flags } as u16)
    }

    fn set_offload_flags(&self, flags: u32) -> io::Result<()> {
        // SAFETY: this request takes a plain number.
        check(unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), flags.into()) })
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> TapError {
        let name = self.name.clone();
        move |source| TapError::Os { name, what, source }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether this host's taps speak virtio-net headers. Changes nothing.
pub(crate) fn check_host() -> Result<(), TapError> {
    let file = open_tun()?;
    let mut features: libc::c_uint = 0;
    // SAFETY: the kernel fills in an unsigned int, which lives through the call.
    check(unsafe { ioctl_with_mut_ref(&file, TUNGETFEATURES(), &mut features) }).map_err(TapError::NoTun)?;
    if features & u32::from(IFF_VNET_HDR) == 0 { Err(TapError::NoHeader) } else { Ok(()) }
}

/// Whether an interface is a tap that can be opened.
pub(crate) fn check_kind(link: &Link) -> Result<(), TapError> {
    if !link.is_tap {
        return Err(TapError::NotATap(link.name.clone(), link.kind_for_people()));
    }
    if link.multi_queue { Err(TapError::MultiQueue(link.name.clone())) } else { Ok(()) }
}

fn open_tun() -> Result<File, TapError> {
    let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).to_owned();
    options.open(TUN_DEVICE).map_err(TapError::NoTun)
}

/// Whether an interface can be called that.
pub(crate) fn is_interface_name(name: &str) -> bool {
    // The kernel would take `%` for a pattern, and make a tap that fits it.
    let is_plain = name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    !name.is_empty() && name.len() < libc::IFNAMSIZ && is_plain
}

/// A request about the interface of this name.
fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let mut request =
        libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } };
    if !is_interface_name(name) {
        return Err(TapError::Name(name.into()));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Features by name, for people.
pub(super) fn feature_names(features: u64) -> String {
    const NAMES: [(u32, &str); 8] = [
        (VIRTIO_NET_F_CSUM, "CSUM"),
        (VIRTIO_NET_F_GUEST_CSUM, "GUEST_CSUM"),
        (VIRTIO_NET_F_GUEST_TSO4, "GUEST_TSO4"),
        (VIRTIO_NET_F_GUEST_TSO6, "GUEST_TSO6"),
        (VIRTIO_NET_F_GUEST_ECN, "GUEST_ECN"),
        (VIRTIO_NET_F_HOST_TSO4, "HOST_TSO4"),
        (VIRTIO_NET_F_HOST_TSO6, "HOST_TSO6"),
        (VIRTIO_NET_F_HOST_ECN, "HOST_ECN"),
    ];
    let named = NAMES.iter().filter(|(feature, _)| features & bit(*feature) != 0);
    named.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}
