//! Booting, and booting again in place.
//!
//! A reset is a power cycle: memory reads as zeros, vCPUs and chips are as they were when the machine was built (their state
//! was saved then), and the boot image is loaded afresh. Only time goes on.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use kvm_ioctls::{VcpuFd, VmFd};

use super::{Inner, MachineEvent};
use crate::boot;
use crate::chips::{IrqchipState, PitState};
use crate::error::{VmmError, chain};
use crate::vcpu::state::{StateShape, VcpuState};

/// How long an idle vCPU may take to do what it is asked: far longer than any call to KVM.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The state of vCPUs and chips at power-on.
pub(super) struct PowerOn {
    vcpus: Vec<VcpuState>,
    irqchip: IrqchipState,
    pit: PitState,
}

impl PowerOn {
    /// The state of a machine that has just been built.
    pub(super) fn save(vm: &VmFd, fds: &[VcpuFd], shape: &StateShape) -> Result<Self, VmmError> {
        Ok(Self {
            vcpus: fds.iter().map(|fd| VcpuState::save(fd, shape)).collect::<Result<_, _>>()?,
            irqchip: IrqchipState::save(vm)?,
            pit: PitState::save(vm)?,
        })
    }
}

/// Which files may be read when the guest reboots. A peer that sends a machine also names its kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BootFiles {
    /// All: the machine was defined here.
    Any,
    /// Only what lies in these folders.
    Under(Vec<PathBuf>),
}

impl BootFiles {
    fn check(&self, path: &Path) -> Result<(), VmmError> {
        let BootFiles::Under(folders) = self else { return Ok(()) };
        let refused = |reason: String| VmmError::Boot { path: path.to_owned(), reason };
        let real = path.canonicalize().map_err(|error| refused(format!("cannot open it: {error}")))?;
        let allowed = |folder: &PathBuf| folder.canonicalize().is_ok_and(|folder| real.starts_with(folder));
        if folders.iter().any(allowed) {
            return Ok(());
        }
        Err(refused("it lies in no folder from which this host lets a machine from elsewhere boot".into()))
    }
}

impl Inner {
    /// Loads the boot image into fresh memory and puts the first vCPU, as it was at power-on, to its start.
    pub(super) fn load_boot_image(&self) -> Result<(), VmmError> {
        for path in [&self.config.kernel, &self.config.initrd].into_iter().flatten() {
            self.boot_files.check(path)?;
        }
        let entry = boot::load(&self.config, &self.identity.layout, self.ram.guest())?;
        self.on_vcpu(0, move |fd| entry.apply(fd))?
    }

    /// Boots again. All vCPUs are idle. If it fails, that is the machine's end.
    pub(super) fn reboot(&self) {
        match self.try_reboot() {
            Ok(()) => self.subscribers.tell(&MachineEvent::Reset),
            Err(error) => {
                self.fail(format!("the guest asked for a reboot, and that failed: {}", chain(&error)));
            }
        }
    }

    fn try_reboot(&self) -> Result<(), VmmError> {
        // First: what they are at must not end up in the memory that the guest boots into.
        self.devices.reset()?;
        self.ram.clear()?;
        for (id, state) in self.power_on.vcpus.iter().enumerate() {
            let (state, shape) = (state.clone(), self.identity.shape.clone());
            self.on_vcpu(id, move |fd| state.load(fd, &shape))??;
        }
        self.power_on.irqchip.load(self.vm.fd())?;
        self.power_on.pit.load(self.vm.fd())?;
        self.load_boot_image()
    }

    /// Runs `body` with idle vCPU `id` and waits for its answer.
    pub(super) fn on_vcpu<T: Send + 'static>(
        &self,
        id: usize,
        body: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> Result<T, VmmError> {
        let vcpu = self.vcpus.get(id).ok_or_else(|| VmmError::Status(format!("there is no vCPU {id}")))?;
        answer(&vcpu.with(body))
    }
}

/// Waits for an idle vCPU's answer.
pub(super) fn answer<T>(pending: &Receiver<T>) -> Result<T, VmmError> {
    pending.recv_timeout(ANSWER_LIMIT).map_err(|error| match error {
        RecvTimeoutError::Timeout => {
            VmmError::Status(format!("a vCPU did not answer for {} s", ANSWER_LIMIT.as_secs()))
        }
        RecvTimeoutError::Disconnected => VmmError::Status("the machine has been stopped".into()),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_machine_from_elsewhere_boots_only_from_folders_that_are_open_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let (open, closed) = (folder.path().join("open"), folder.path().join("closed"));
        for path in [&open, &closed] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("kernel"), b"").unwrap();
        }
        std::os::unix::fs::symlink(closed.join("kernel"), open.join("link")).unwrap();
        let files = BootFiles::Under(vec![open.clone()]);
        assert!(files.check(&open.join("kernel")).is_ok());
        assert!(files.check(&closed.join("kernel")).is_err());
        assert!(files.check(&open.join("../closed/kernel")).is_err());
        assert!(files.check(&open.join("link")).is_err());
        assert!(BootFiles::Under(Vec::new()).check(&open.join("kernel")).is_err());
        assert!(BootFiles::Any.check(&closed.join("kernel")).is_ok());
    }
}
