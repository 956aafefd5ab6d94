//! Pausing, resuming and stopping a machine.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use godwit_core::machine::Hold;
use vm_memory::GuestAddress;

use super::{Inner, MachineEvent, MachineStatus};
use crate::error::{VmmError, chain};
use crate::kvm::line_is_unmasked;
use crate::sync::lock;
use crate::vcpu::{Notice, Vcpu};
use crate::workload::Header;
use crate::workload::layout::HEADER;

/// How long the machine's own thread waits for vCPUs to leave the guest, and for devices to complete what they are at, before
/// it says that they are stuck.
pub(super) const OWN_PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// How long a vCPU of a machine that lacks pages may take to end.
const DISMISS_LIMIT: Duration = Duration::from_secs(2);

const DISMISS_POLL: Duration = Duration::from_millis(5);

impl Inner {
    /// Stops all vCPUs and closes the devices' gates, or leaves the machine running as it was.
    pub(super) fn pause(&self, limit: Duration) -> Result<(), VmmError> {
        let _whole = lock(&self.whole);
        if lock(&self.life).status() == MachineStatus::Paused {
            return Ok(());
        }
        lock(&self.life).check_alive()?;
        let until = Instant::now() + limit;
        // First: nothing may be announced from here on, whatever becomes of the machine.
        self.announcer.cancel();
        self.halt_vcpus(limit)?;
        if let Err(error) = self.devices.pause(until) {
            self.run_vcpus();
            return Err(error);
        }
        // The guest may have asked for a reset just now. State of a machine in the middle of it is good for nothing.
        if lock(&self.life).take_reset() {
            self.reboot();
        }
        let mut life = lock(&self.life);
        life.check_alive()?;
        life.advance(MachineStatus::Paused);
        Ok(())
    }

    /// The memory is about to be another process's. What shows from outside how far the workload guest got stays as it is now.
    pub(super) fn let_go_of_memory(&self) -> Result<(), VmmError> {
        let _whole = lock(&self.whole);
        self.check_paused("let go of its memory")?;
        // A copy of a huge page could find none free, and who writes all the same is killed.
        let shows = !self.config.huge_pages && Header::new(self.ram.guest()).is_ok();
        self.ram.let_go(shows.then_some(GuestAddress(HEADER)))
    }

    /// Lets all vCPUs run.
    pub(super) fn resume(&self) -> Result<(), VmmError> {
        let _whole = lock(&self.whole);
        self.ram.own()?;
        {
            let mut life = lock(&self.life);
            life.check_alive()?;
            if life.status() == MachineStatus::Running {
                return Ok(());
            }
            life.advance(MachineStatus::Running);
        }
        self.devices.resume();
        self.run_vcpus();
        self.announcer.resumed(self.devices.nets());
        Ok(())
    }

    /// Presses the reset button: the machine boots again, and runs or stays paused as it was.
    pub(super) fn reset(&self) -> Result<(), VmmError> {
        let _whole = lock(&self.whole);
        lock(&self.life).check_alive()?;
        let running = lock(&self.life).status() == MachineStatus::Running;
        if running {
            self.halt_vcpus(OWN_PAUSE_LIMIT)?;
        }
        // If the guest has asked for the same just now, it gets it.
        lock(&self.life).take_reset();
        self.reboot();
        lock(&self.life).check_alive()?;
        if running {
            self.run_vcpus();
        }
        Ok(())
    }

    /// Stops the machine for good. False: something waits for a page that does not come, and ends with this process; it enters the guest no
    /// more, and what it was at may still be written.
    pub(super) fn stop(&self) -> bool {
        let mut at_rest = true;
        {
            let _whole = lock(&self.whole);
            lock(&self.life).advance(MachineStatus::Stopped);
            self.throttle.set(Hold::NONE);
            if self.ram.is_filling() {
                at_rest = self.dismiss_vcpus() & self.close_devices();
            } else {
                self.vcpus.iter().for_each(Vcpu::stop);
                self.close_devices();
            }
            if at_rest {
                self.devices.stop();
            }
        }
        // Without the lock: the thread may be waiting for it.
        let supervisor = lock(&self.supervisor).take();
        // If it is the machine's own thread that held the last reference, it ends by itself.
        // It ends with the last vCPU.
        let other = supervisor.filter(|supervisor| at_rest && supervisor.thread().id() != thread::current().id());
        if other.is_some_and(|supervisor| supervisor.join().is_err()) {
            tracing::error!("the machine's thread panicked");
        }
        at_rest
    }

    /// Lets all vCPUs end. False if one does not for a while: it is in the kernel, where it waits for a page.
    fn dismiss_vcpus(&self) -> bool {
        self.vcpus.iter().for_each(Vcpu::dismiss);
        let until = Instant::now() + DISMISS_LIMIT;
        while !self.vcpus.iter().all(Vcpu::has_ended) {
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(DISMISS_POLL);
        }
        true
    }

    /// What a vCPU found out, on the machine's own thread.
    pub(super) fn attend_to(&self, notice: Notice) {
        let _whole = lock(&self.whole);
        if lock(&self.life).status() == MachineStatus::Stopped {
            return;
        }
        match (notice, self.halt_vcpus(OWN_PAUSE_LIMIT)) {
            (Notice::Reset, Ok(())) => {
                // Unless a pause has been quicker.
                if lock(&self.life).take_reset() {
                    self.reboot();
                }
                if lock(&self.life).status() == MachineStatus::Running {
                    self.run_vcpus();
                }
            }
            (Notice::Reset, Err(error)) => self.fail(format!("the guest asked for a reboot, and that failed: {error}")),
            // A vCPU that does not leave the guest changes nothing about its end.
            (Notice::Shutdown(why), _) => {
                if self.close_devices()
                    && let Err(error) = self.ram.end_filling()
                {
                    tracing::error!("{}", chain(&error));
                }
                self.subscribers.tell(&MachineEvent::Shutdown { why });
            }
            (Notice::Fault(text), _) => self.fail(text),
        }
    }

    /// The machine cannot go on.
    pub(super) fn fail(&self, text: String) {
        self.close_devices();
        lock(&self.life).advance(MachineStatus::Faulted);
        self.subscribers.tell(&MachineEvent::Fault { text });
    }

    /// Completes what the devices are at: nothing more will come. Whether that has been done.
    fn close_devices(&self) -> bool {
        self.announcer.cancel();
        let closed = self.devices.pause(Instant::now() + OWN_PAUSE_LIMIT);
        if let Err(error) = &closed {
            tracing::error!("what the guest wrote last may be lost: {}", chain(error));
        }
        closed.is_ok()
    }

    /// Presses the power button, if the guest listens to it.
    pub(super) fn powerdown(&self) -> Result<bool, VmmError> {
        lock(&self.life).check_alive()?;
        let line = self.identity.layout.event_line;
        let listens = line_is_unmasked(self.vm.fd(), line).map_err(VmmError::kvm("cannot read the I/O APIC"))?;
        if listens {
            self.devices.press_power_button();
        }
        Ok(listens)
    }

    /// Makes all vCPUs idle. If one is not within `limit`, all of them run on.
    pub(super) fn halt_vcpus(&self, limit: Duration) -> Result<(), VmmError> {
        let until = Instant::now() + limit;
        let (done, all_done) = mpsc::channel();
        for vcpu in self.vcpus.iter() {
            vcpu.pause(done.clone());
        }
        drop(done);
        for halted in 0..self.vcpus.len() {
            let left = until.saturating_duration_since(Instant::now());
            match all_done.recv_timeout(left) {
                Ok(()) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(VmmError::Status("the machine has been stopped".into()));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.run_vcpus();
                    return Err(VmmError::Status(format!(
                        "only {halted} of {} vCPUs left the guest within {} ms; the guest runs on",
                        self.vcpus.len(),
                        limit.as_millis()
                    )));
                }
            }
        }
        Ok(())
    }

    /// Lets all vCPUs run. Their guests are told that they have been paused, so that no watchdog bites.
    fn run_vcpus(&self) {
        for vcpu in self.vcpus.iter() {
            let id = vcpu.id();
            vcpu.with(move |fd| match fd.kvmclock_ctrl() {
                // EINVAL: this guest does not use KVM's clock.
                Err(error) if error.errno() != libc::EINVAL => {
                    tracing::warn!("cannot tell the guest on vCPU {id} of the pause: {error}");
                }
                _ => {}
            });
            vcpu.run();
        }
    }
}
