//! What a machine is made of, and its file MACHINE.toml (docs/machine.md describes it key by key).

mod devices;
mod size;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs;
use std::io;
use std::path::{self, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use self::devices::{BalloonConfig, DiskConfig, MAX_DEVICES, NetConfig};
pub use self::size::{ByteSize, ParseByteSizeError};
use crate::workload::WriterConfig;

/// The most vCPUs that a machine may have: their LAPIC ids fit into a byte.
pub const MAX_VCPUS: u32 = 254;

/// The smallest memory that a machine may have: what boot data and a kernel need at the very least.
pub const MIN_MEMORY_BYTES: u64 = 4 << 20;

/// The largest memory that a machine may have: bounds what a peer can make a destination reckon with.
pub const MAX_MEMORY_BYTES: u64 = 4 << 40;

/// The definition of a machine: what its file says, with defaults filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MachineConfig {
    /// Name, for people and for the path of the control socket.
    pub name: String,
    /// Size of RAM.
    pub memory: ByteSize,
    /// What RAM is made of.
    pub memory_backing: MemoryBacking,
    /// Whether RAM comes from the host's reserve of 2 MiB pages.
    pub huge_pages: bool,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// A PVH ELF image or a bzImage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// An initial RAM disk for the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// What the first serial port is connected to.
    pub serial: SerialTarget,
    /// How the guest's writes are tracked during a move.
    pub dirty_tracking: DirtyTracking,
    /// A guest that is built in, instead of a kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestKind>,
    /// What the built-in guest `writer` is to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writer: Option<WriterConfig>,
    /// Whether disks go through the host's page cache instead of around it (O_DIRECT). Another host's cache may then be stale.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unsafe_cache: bool,
    /// A memory balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Disks.
    #[serde(rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Network interfaces.
    #[serde(rename = "net", skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            name: "machine".into(),
            memory: ByteSize(1 << 30),
            memory_backing: MemoryBacking::default(),
            huge_pages: false,
            vcpus: 1,
            kernel: None,
            initrd: None,
            cmdline: String::new(),
            serial: SerialTarget::default(),
            dirty_tracking: DirtyTracking::default(),
            guest: None,
            writer: None,
            unsafe_cache: false,
            balloon: None,
            disks: Vec::new(),
            nets: Vec::new(),
        }
    }
}

impl MachineConfig {
    /// Reads a machine file. Options may still be laid over it: [`MachineConfig::validate`] judges the result.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::from_toml(&text, &path.display().to_string())
    }

    /// Parses the text of a machine file; `origin` names it in errors.
    pub fn from_toml(text: &str, origin: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| ConfigError::Parse {
            origin: origin.to_owned(),
            place: place(text, error.span()),
            reason: error.message().to_owned(),
        })
    }

    /// Makes the paths of disks absolute: they are compared with those of other hosts.
    pub fn make_disk_paths_absolute(&mut self) -> Result<(), ConfigError> {
        for disk in &mut self.disks {
            disk.path = path::absolute(&disk.path).map_err(|error| {
                invalid("disk", format!("`{}`: {} cannot be made absolute: {error}", disk.id, disk.path.display()))
            })?;
        }
        Ok(())
    }

    /// The machine as a file, every default spelled out.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(ConfigError::Write)
    }

    /// Whether the machine can be built as it is described, as far as that can be told without trying.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_identity()?;
        self.validate_memory()?;
        self.validate_boot()?;
        if self.dirty_tracking == DirtyTracking::Ring {
            return Err(invalid("dirty_tracking", RING_REFUSED));
        }
        devices::validate(&self.disks, &self.nets, self.balloon)
    }

    /// How many virtio devices the machine has: its disks and interfaces, an entropy source, and perhaps a balloon.
    pub(crate) fn virtio_devices(&self) -> usize {
        self.disks.len() + self.nets.len() + 1 + usize::from(self.balloon.is_some())
    }

    fn validate_identity(&self) -> Result<(), ConfigError> {
        let name_is_plain = self.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if self.name.is_empty() || self.name.len() > 64 || !name_is_plain || self.name.starts_with('.') {
            return Err(invalid(
                "name",
                "use 1 to 64 letters, digits, `-`, `_` and `.`, not starting with `.` (it names the control socket)",
            ));
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(invalid("vcpus", format!("{} is not between 1 and {MAX_VCPUS}", self.vcpus)));
        }
        Ok(())
    }

    fn validate_memory(&self) -> Result<(), ConfigError> {
        let bytes = self.memory.bytes();
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) {
            return Err(invalid(
                "memory",
                format!(
                    "{} is not between {} and {}",
                    self.memory,
                    ByteSize(MIN_MEMORY_BYTES),
                    ByteSize(MAX_MEMORY_BYTES)
                ),
            ));
        }
        let unit = if self.huge_pages { 2 << 20 } else { 4096 };
        if !bytes.is_multiple_of(unit) {
            return Err(invalid(
                "memory",
                format!("{} is not a whole number of {} pages", self.memory, ByteSize(unit)),
            ));
        }
        Ok(())
    }

    fn validate_boot(&self) -> Result<(), ConfigError> {
        match (&self.kernel, self.guest) {
            (None, None) => return Err(invalid("kernel", "nothing to boot: give a kernel, or guest = \"writer\"")),
            (Some(_), Some(_)) => {
                return Err(invalid("guest", "a machine boots a kernel or a built-in guest, not both"));
            }
            (None, Some(_)) if self.initrd.is_some() => return Err(invalid("initrd", "needs a kernel")),
            (None, Some(_)) if !self.cmdline.is_empty() => return Err(invalid("cmdline", "needs a kernel")),
            _ => {}
        }
        if self.writer.is_some() && self.guest != Some(GuestKind::Writer) {
            return Err(invalid("writer", "these settings need guest = \"writer\""));
        }
        if self.cmdline.contains('\0') || self.cmdline.len() > MAX_CMDLINE_BYTES {
            return Err(invalid("cmdline", format!("at most {MAX_CMDLINE_BYTES} bytes, none of them zero")));
        }
        Ok(())
    }
}

/// The longest kernel command line, without its final zero: what Linux takes on x86.
pub const MAX_CMDLINE_BYTES: usize = 2047;

/// Why machines have no dirty rings: docs/decisions.md says more.
const RING_REFUSED: &str = "machines track writes by KVM's bitmap only, use \"bitmap\": a dirty ring cannot protect pages again just before \
                            they are sent, and held guests back no better when both were measured";

/// What RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryBacking {
    /// Private anonymous memory, with transparent huge pages where the host has them.
    #[default]
    Private,
    /// A memfd: can be shared with another process.
    Memfd,
}

/// How the guest's writes are tracked during a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyTracking {
    /// KVM's dirty bitmap.
    #[default]
    Bitmap,
    /// KVM's dirty ring.
    Ring,
}

/// A guest that is built in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestKind {
    /// The workload guest: [`crate::workload`].
    Writer,
}

/// What a serial port is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum SerialTarget {
    /// Nothing: output is dropped.
    #[default]
    None,
    /// The process's standard input and output.
    Stdio,
    /// A new pseudo-terminal; the path is made a symbolic link to it.
    Pty(PathBuf),
    /// A unix socket that listens for one client at a time; output without a client is dropped.
    Unix(PathBuf),
    /// A file that output is appended to.
    File(PathBuf),
}

impl fmt::Display for SerialTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SerialTarget::None => f.write_str("none"),
            SerialTarget::Stdio => f.write_str("stdio"),
            SerialTarget::Pty(path) => write!(f, "pty:{}", path.display()),
            SerialTarget::Unix(path) => write!(f, "unix:{}", path.display()),
            SerialTarget::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl From<SerialTarget> for String {
    fn from(target: SerialTarget) -> Self {
        target.to_string()
    }
}

/// A serial target that is none of those there are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a serial target: use none, stdio, pty:PATH, unix:PATH or file:PATH")]
pub struct ParseSerialTargetError(String);

impl FromStr for SerialTarget {
    type Err = ParseSerialTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "none" => Ok(SerialTarget::None),
            None if text == "stdio" => Ok(SerialTarget::Stdio),
            Some(("pty", path)) if !path.is_empty() => Ok(SerialTarget::Pty(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(SerialTarget::Unix(path.into())),
            Some(("file", path)) if !path.is_empty() => Ok(SerialTarget::File(path.into())),
            _ => Err(ParseSerialTargetError(text.to_owned())),
        }
    }
}

impl TryFrom<String> for SerialTarget {
    type Error = ParseSerialTargetError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// Why a machine's definition cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the machine file {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not TOML, or a key is unknown, missing or of the wrong kind.
    #[error("cannot use the machine file {origin}{place}: {reason}")]
    Parse {
        /// The file.
        origin: String,
        /// Where in it.
        place: String,
        /// Why.
        reason: String,
    },
    /// A value makes no sense.
    #[error("{key}: {reason}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// Why, and what would do.
        reason: String,
    },
    /// It could not be written as TOML.
    #[error("cannot write the machine's definition as TOML")]
    Write(#[source] toml::ser::Error),
}

/// The line on which an error is, and what it says.
fn place(text: &str, span: Option<std::ops::Range<usize>>) -> String {
    let Some(before) = span.and_then(|span| text.get(..span.start)) else { return String::new() };
    let number = before.matches('\n').count();
    match text.lines().nth(number) {
        Some(line) if !line.trim().is_empty() => format!(", line {} (`{}`)", number + 1, line.trim()),
        _ => String::new(),
    }
}

fn invalid(key: &'static str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key, reason: reason.into() }
}
