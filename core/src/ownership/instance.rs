//! Whether a process of this host that made a claim still lives: it holds a lock on a file named after it.
//!
//! The files lie on the host's own storage that is empty after a boot (`/run`). The kernel frees the lock when the process
//! dies, whatever it died of, and not while it is merely stopped. Only a file that is there and free proves a death: a
//! missing one may lie in another mount namespace.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::claim::Name;
use super::start::Liveness;

/// This process, known to live for as long as this exists. The file stays behind, as the proof of its death.
#[derive(Debug)]
pub struct Instance {
    name: Name,
    _locked: File,
}

impl Instance {
    /// Takes the lock of a name that no process has had, in a directory of this host.
    pub fn register(directory: &Path, name: Name) -> io::Result<Self> {
        let path = lock_file(directory, &name);
        let file = OpenOptions::new().create_new(true).write(true).open(&path)?;
        file.try_lock()?;
        Ok(Self { name, _locked: file })
    }

    /// Its name, for claims.
    pub fn name(&self) -> &Name {
        &self.name
    }
}

/// Whether the instance of that name lives. Asked of this host since its last boot.
pub fn liveness(directory: &Path, name: &Name) -> Liveness {
    let Ok(file) = File::open(lock_file(directory, name)) else { return Liveness::Unknown };
    match file.try_lock_shared() {
        Ok(()) => Liveness::Dead,
        Err(TryLockError::WouldBlock) => Liveness::Alive,
        Err(TryLockError::Error(_)) => Liveness::Unknown,
    }
}

fn lock_file(directory: &Path, name: &Name) -> PathBuf {
    directory.join(format!("{name}.instance"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_lives_until_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let name: Name = "4f31".parse().unwrap();
        assert_eq!(liveness(directory.path(), &name), Liveness::Unknown, "no file proves nothing");
        let instance = Instance::register(directory.path(), name.clone()).unwrap();
        assert_eq!(liveness(directory.path(), &name), Liveness::Alive);
        assert!(Instance::register(directory.path(), name.clone()).is_err(), "a name is used once");
        drop(instance);
        assert_eq!(liveness(directory.path(), &name), Liveness::Dead);
    }
}
