//! Where a machine stands, and who is told what it does by itself.

use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, Sender};

use super::{MachineEvent, MachineStatus};
use crate::error::VmmError;
use crate::sync::lock;
use crate::vcpu::Notice;

/// Where a machine stands. What a vCPU finds out is recorded here before the vCPU answers anything else, so that a pause
/// that comes at the same moment knows of it.
#[derive(Debug)]
pub(super) struct Life {
    status: MachineStatus,
    reset_pending: bool,
}

impl Life {
    /// A machine that has not run yet.
    pub(super) fn new() -> Self {
        Self { status: MachineStatus::Paused, reset_pending: false }
    }

    pub(super) fn status(&self) -> MachineStatus {
        self.status
    }

    /// Records what a vCPU found out.
    pub(super) fn note(&mut self, notice: &Notice) {
        match notice {
            Notice::Reset => self.reset_pending = true,
            Notice::Shutdown(_) => self.advance(MachineStatus::Shutdown),
            Notice::Fault(_) => self.advance(MachineStatus::Faulted),
        }
    }

    /// Whether the guest has asked for a reset that nobody has begun with; the caller does.
    pub(super) fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.reset_pending)
    }

    /// Goes on to `status`, unless the machine is at its end already.
    pub(super) fn advance(&mut self, status: MachineStatus) {
        let alive = matches!(self.status, MachineStatus::Running | MachineStatus::Paused);
        if alive || status == MachineStatus::Stopped {
            self.status = status;
        }
    }

    /// An error if the machine will never run again.
    pub(super) fn check_alive(&self) -> Result<(), VmmError> {
        let end = match self.status {
            MachineStatus::Running | MachineStatus::Paused => return Ok(()),
            MachineStatus::Shutdown => "the guest has shut down",
            MachineStatus::Faulted => "the guest cannot be run on after a fault",
            MachineStatus::Stopped => "the machine has been stopped",
        };
        Err(VmmError::Status(end.into()))
    }
}

/// Those who are told.
#[derive(Default)]
pub(super) struct Subscribers {
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    senders: Vec<Sender<MachineEvent>>,
    /// The event that was the end, for those who come later.
    end: Option<MachineEvent>,
}

impl Subscribers {
    pub(super) fn subscribe(&self) -> Receiver<MachineEvent> {
        let (sender, receiver) = mpsc::channel();
        let mut list = lock(&self.list);
        if let Some(end) = &list.end {
            // The receiver is right here.
            let _ = sender.send(end.clone());
        }
        list.senders.push(sender);
        receiver
    }

    pub(super) fn tell(&self, event: &MachineEvent) {
        let mut list = lock(&self.list);
        list.senders.retain(|sender| sender.send(event.clone()).is_ok());
        if *event != MachineEvent::Reset {
            list.end.get_or_insert(event.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_at_its_end_does_not_come_back() {
        let mut life = Life::new();
        life.advance(MachineStatus::Running);
        life.note(&Notice::Shutdown("off".into()));
        for status in [MachineStatus::Running, MachineStatus::Paused, MachineStatus::Faulted] {
            life.advance(status);
            assert_eq!(life.status(), MachineStatus::Shutdown);
        }
        life.advance(MachineStatus::Stopped);
        assert_eq!(life.status(), MachineStatus::Stopped);
    }

    #[test]
    fn one_reset_is_taken_once() {
        let mut life = Life::new();
        life.note(&Notice::Reset);
        assert!(life.take_reset());
        assert!(!life.take_reset());
    }

    #[test]
    fn the_end_is_told_to_those_who_come_later() {
        let subscribers = Subscribers::default();
        subscribers.tell(&MachineEvent::Reset);
        let end = MachineEvent::Fault { text: "it broke".into() };
        subscribers.tell(&end);
        let late = subscribers.subscribe();
        assert_eq!(late.try_recv(), Ok(end));
        assert!(late.try_recv().is_err());
    }
}
