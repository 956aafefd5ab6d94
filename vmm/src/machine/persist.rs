//! Saving a paused machine's state, and loading it into one that has not run yet.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use godwit_core::{LoadContext, Section};

use super::reset::answer;
use super::{Inner, MachineStatus};
use crate::chips::{IrqchipState, PitState};
use crate::clock::{ClockState, TscReading, load_tsc_offset};
use crate::error::{VmmError, chain};
use crate::state::MachineState;
use crate::sync::lock;
use crate::vcpu::state::VcpuState;

impl Inner {
    /// The machine's state. Each vCPU saves its own, all at the same time.
    pub(super) fn save(&self) -> Result<Vec<Section>, VmmError> {
        let _whole = lock(&self.whole);
        self.check_paused("be saved")?;
        let shape = Arc::new(self.identity.shape.clone());
        let pending: Vec<_> = self
            .vcpus
            .iter()
            .map(|vcpu| {
                let shape = Arc::clone(&shape);
                vcpu.with(move |fd| Ok((VcpuState::save(fd, &shape)?, TscReading::take(fd)?)))
            })
            .collect();
        let irqchip = IrqchipState::save(self.vm.fd())?;
        let pit = PitState::save(self.vm.fd())?;
        let devices = self.devices.save();
        // All vCPUs have answered before an error is returned.
        let (vcpus, tscs): (Vec<_>, Vec<_>) = collect(pending)?.into_iter().unzip();
        let clock = ClockState::save(self.vm.fd(), &tscs, self.identity.tsc_khz)?;
        MachineState { vcpus, irqchip, pit, clock, devices: devices? }.encode()
    }

    /// Loads state. Everything is checked before the first part of it is used.
    pub(super) fn load(&self, sections: &[Section], context: &LoadContext) -> Result<(), VmmError> {
        let _whole = lock(&self.whole);
        self.check_paused("take in state")?;
        // KVM reads guest memory while it takes in state (a 32-bit guest's page table roots), and writes to it (the time of boot):
        // if it is another process's yet, it is to read what is there by now, and what it writes is to stay here.
        self.ram.look_again()?;
        let state =
            MachineState::decode(sections, self.identity.counts(), &self.identity.shape, self.identity.tsc_khz)?;
        let now = self.on_vcpu(0, TscReading::take)??;
        let offsets = state.clock.tsc_offsets(&now, context.clock_offset_ns);
        let shape = Arc::new(self.identity.shape.clone());
        let pending = self.vcpus.iter().zip(state.vcpus).zip(offsets).map(|((vcpu, state), offset)| {
            let shape = Arc::clone(&shape);
            vcpu.with(move |fd| {
                // The TSC before the MSRs: a TSC deadline fires against it.
                let tsc_is_set = load_tsc_offset(fd, offset)?;
                state.load(fd, &shape)?;
                Ok(tsc_is_set)
            })
        });
        if collect(pending.collect())?.contains(&false) {
            state.clock.accept_host_tsc(&now).map_err(|reason| VmmError::state("clock", reason))?;
        }
        // After the LAPICs: what the chips still have to deliver must arrive there.
        state.irqchip.load(self.vm.fd())?;
        state.pit.load(self.vm.fd())?;
        state.clock.load(self.vm.fd(), context.clock_offset_ns)?;
        self.devices.load(&state.devices)
    }

    pub(super) fn check_paused(&self, what: &str) -> Result<(), VmmError> {
        let life = lock(&self.life);
        life.check_alive()?;
        match life.status() {
            MachineStatus::Paused => Ok(()),
            _ => Err(VmmError::Status(format!("a running machine cannot {what}"))),
        }
    }
}

/// Waits for the answers of all vCPUs, in order; the first error names the vCPU.
fn collect<T>(pending: Vec<Receiver<Result<T, VmmError>>>) -> Result<Vec<T>, VmmError> {
    // All of them answer before the first error is looked at, so that none is still at work.
    let answers: Vec<_> = pending.iter().map(answer).collect();
    let named = |(id, answer): (usize, Result<Result<T, VmmError>, VmmError>)| {
        answer?.map_err(|error| VmmError::state(format!("vcpu/{id}"), chain(&error)))
    };
    answers.into_iter().enumerate().map(named).collect()
}
