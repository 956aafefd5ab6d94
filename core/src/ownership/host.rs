//! This process on this host, as claims name it.

use std::fs;
use std::io;
use std::path::Path;

use super::claim::{Claimant, Name};
use super::instance::Instance;
use crate::random;

/// Where the lock files of processes that make claims lie: empty after a boot.
pub const INSTANCES: &str = "/run/godwit/instances";
/// A name that is the same for the life of an installation.
const MACHINE_ID: &str = "/etc/machine-id";
/// A name that is another one after every boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A process that may own machines. It counts as alive for as long as this exists.
#[derive(Debug)]
pub struct Host {
    name: Name,
    boot_id: Name,
    instance: Instance,
}

impl Host {
    /// Registers this process. The host is `name`, or else its machine-id.
    pub fn register(name: Option<Name>, instances: &Path) -> io::Result<Self> {
        let name = match name {
            Some(name) => name,
            None => read_name(MACHINE_ID)?,
        };
        let boot_id = read_name(BOOT_ID)?;
        fs::create_dir_all(instances).map_err(|error| with_path(&instances.display(), &error))?;
        let id = u128::from_le_bytes(random::secret()?);
        let instance = format!("{id:032x}").parse().map_err(io::Error::other)?;
        let instance =
            Instance::register(instances, instance).map_err(|error| with_path(&instances.display(), &error))?;
        Ok(Self { name, boot_id, instance })
    }

    /// The host's name in claims.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Who claims `machine` here.
    pub fn claimant(&self, machine: Name) -> Claimant {
        let (host, boot_id) = (self.name.clone(), self.boot_id.clone());
        Claimant { machine, host, boot_id, instance: self.instance.name().clone() }
    }
}

fn read_name(path: &str) -> io::Result<Name> {
    let text = fs::read_to_string(path).map_err(|error| with_path(&path, &error))?;
    text.trim().parse().map_err(|error| io::Error::other(format!("{path}: {error} (give --host-id)")))
}

fn with_path(path: &dyn std::fmt::Display, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::instance::liveness;
    use crate::ownership::start::Liveness;

    #[test]
    fn a_process_registers_under_names_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let instances = directory.path().join("instances");
        let register = || Host::register(Some("kvm1".parse().unwrap()), &instances).unwrap();
        let (one, other) = (register(), register());
        let claimants = [&one, &other].map(|host| host.claimant("m".parse().unwrap()));
        assert_eq!(claimants[0].host.as_str(), "kvm1");
        assert_ne!(claimants[0].instance, claimants[1].instance);
        drop(other);
        assert_eq!(liveness(&instances, &claimants[0].instance), Liveness::Alive);
        assert_eq!(liveness(&instances, &claimants[1].instance), Liveness::Dead);
    }
}
