//! Disks, network interfaces and the memory balloon.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, invalid};
use crate::devices::layout::MAX_VIRTIO_DEVICES;
use crate::devices::virtio::net::MacAddress;

/// The most disks and network interfaces, taken together: an entropy source needs a place, too, and a balloon if there is one.
pub const MAX_DEVICES: usize = MAX_VIRTIO_DEVICES - 1;

/// The longest id: what the guest is told of a disk.
const MAX_ID_BYTES: usize = 20;

/// The longest name of a host's interface (IFNAMSIZ, less the final zero).
const MAX_TAP_BYTES: usize = 15;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name, unique among the machine's disks.
    pub id: String,
    /// Image file or block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub readonly: bool,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name, unique among the machine's interfaces.
    pub id: String,
    /// The host's tap device.
    pub tap: String,
    /// The guest's hardware address.
    pub mac: String,
}

/// A memory balloon: the guest's way of saying which pages it does not use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// Whether the guest is to report free pages by itself.
    pub free_page_reporting: bool,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self { free_page_reporting: true }
    }
}

/// Whether a machine can have these.
pub(super) fn validate(
    disks: &[DiskConfig],
    nets: &[NetConfig],
    balloon: Option<BalloonConfig>,
) -> Result<(), ConfigError> {
    let (count, most) = (disks.len() + nets.len(), MAX_DEVICES - usize::from(balloon.is_some()));
    if count > most {
        let with = if balloon.is_some() { "a machine with a balloon" } else { "a machine" };
        let reason = format!("{count} disks and network interfaces; {with} has at most {most} together");
        return Err(invalid(if nets.is_empty() { "disk" } else { "net" }, reason));
    }
    validate_disks(disks)?;
    validate_nets(nets)
}

fn validate_disks(disks: &[DiskConfig]) -> Result<(), ConfigError> {
    validate_ids("disk", disks.iter().map(|disk| disk.id.as_str()))?;
    for (index, disk) in disks.iter().enumerate() {
        if disk.path.as_os_str().is_empty() || disk.path.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(invalid("disk", format!("`{}` needs a path", disk.id)));
        }
        let same = disks[..index].iter().find(|other| other.path == disk.path && !(other.readonly && disk.readonly));
        if let Some(other) = same {
            let (one, two, path) = (&other.id, &disk.id, disk.path.display());
            return Err(invalid(
                "disk",
                format!("`{one}` and `{two}` are both {path}: one file cannot be written as two disks"),
            ));
        }
    }
    Ok(())
}

fn validate_nets(nets: &[NetConfig]) -> Result<(), ConfigError> {
    validate_ids("net", nets.iter().map(|net| net.id.as_str()))?;
    let (mut macs, mut taps) = (BTreeSet::new(), BTreeSet::new());
    for NetConfig { id, tap, mac } in nets {
        let tap_is_plain = tap.bytes().all(|b| b.is_ascii_graphic() && !b"/:%".contains(&b));
        if tap.is_empty() || tap.len() > MAX_TAP_BYTES || !tap_is_plain || tap == "." || tap == ".." {
            return Err(invalid("net", format!("`{id}`: {tap:?} cannot be the name of a tap device")));
        }
        if !taps.insert(tap) {
            return Err(invalid("net", format!("`{id}`: the tap {tap} already belongs to another interface")));
        }
        let address = mac.parse::<MacAddress>().map_err(|error| invalid("net", format!("`{id}`: {error}")))?;
        if !macs.insert(address) {
            return Err(invalid(
                "net",
                format!("`{id}`: the hardware address {mac} already belongs to another interface"),
            ));
        }
    }
    Ok(())
}

fn validate_ids<'a>(key: &'static str, ids: impl Iterator<Item = &'a str>) -> Result<(), ConfigError> {
    let mut seen = BTreeSet::new();
    for id in ids {
        let plain = id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if id.is_empty() || id.len() > MAX_ID_BYTES || !plain {
            return Err(invalid(key, format!("id {id:?}: use 1 to {MAX_ID_BYTES} letters, digits, `-`, `_` and `.`")));
        }
        if !seen.insert(id) {
            return Err(invalid(key, format!("id `{id}` occurs more than once")));
        }
    }
    Ok(())
}
