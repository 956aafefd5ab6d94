//! The guest's time: KVM's clock and the vCPUs' TSCs.
//!
//! Both travel as a reading and the host's CLOCK_REALTIME at that instant. The destination adds the time that has really
//! passed, as measured with the two hosts' clocks and their offset, and never a negative one: guest time goes on, and never
//! backwards. TSCs travel as one reading (vCPU 0's) and each vCPU's distance to it, so that they stay as synchronous as
//! they were.
//!
//! Where the host's own TSC is unstable (it is not the host's clock source, as on emulated processors), KVM stops a guest's TSC
//! whenever the vCPU leaves the guest, lets it catch up when it enters again, and changes the offset at every ioctl to do so.
//! Offsets say nothing about distances then.

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::error::VmmError;
use crate::kvm::{set_tsc_offset, tsc_offset};
use crate::vcpu::msr;

/// Version of the layout of section `clock`.
pub(crate) const VERSION: u16 = 1;

/// The state of the guest's clocks, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClockState {
    kvmclock_ns: u64,
    kvmclock_read_at_ns: u64,
    tsc: u64,
    tsc_read_at_ns: u64,
    tsc_khz: u32,
    /// Of each vCPU, less vCPU 0's.
    tsc_distances: Vec<u64>,
}

/// One vCPU's TSC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TscReading {
    tsc: u64,
    read_at_ns: u64,
    offset: u64,
    /// Whether the offset stays as it is while the vCPU does not run.
    steady: bool,
}

impl TscReading {
    /// Reads the TSC of a vCPU that is not running.
    pub(crate) fn take(vcpu: &VcpuFd) -> Result<Self, VmmError> {
        let before = realtime_ns();
        let tsc = msr::read(vcpu, &[msr::TSC])?.iter().map(|msr| msr.data).sum();
        let after = realtime_ns();
        let offset = read_offset(vcpu)?;
        let steady = read_offset(vcpu)? == offset;
        Ok(Self { tsc, read_at_ns: before + after.saturating_sub(before) / 2, offset, steady })
    }
}

impl ClockState {
    /// Reads KVM's clock; `tscs` are those of all vCPUs, in order.
    pub(crate) fn save(vm: &VmFd, tscs: &[TscReading], tsc_khz: u32) -> Result<Self, VmmError> {
        let first = tscs.first().ok_or_else(|| VmmError::Status("a machine without vCPUs has no clock".into()))?;
        let before = realtime_ns();
        let clock = vm.get_clock().map_err(VmmError::kvm("cannot read KVM's clock"))?;
        let after = realtime_ns();
        let exact = clock.flags & KVM_CLOCK_REALTIME != 0;
        let (reading, tsc_distances) = together(first, tscs);
        Ok(Self {
            kvmclock_ns: clock.clock,
            kvmclock_read_at_ns: if exact { clock.realtime } else { before + after.saturating_sub(before) / 2 },
            tsc: reading.tsc,
            tsc_read_at_ns: reading.read_at_ns,
            tsc_khz,
            tsc_distances,
        })
    }

    /// Whether this can be the clock of a machine with so many vCPUs at this frequency.
    pub(crate) fn check(&self, vcpus: usize, tsc_khz: u32) -> Result<(), String> {
        if self.tsc_distances.len() != vcpus {
            return Err(format!("{} TSCs for {vcpus} vCPUs", self.tsc_distances.len()));
        }
        if self.tsc_khz != tsc_khz {
            return Err(format!("a TSC of {} kHz, {tsc_khz} kHz had been agreed on", self.tsc_khz));
        }
        Ok(())
    }

    /// The offsets that make the vCPUs' TSCs go on where they were. `now` is vCPU 0's TSC here, `clock_offset_ns` this host's
    /// CLOCK_REALTIME less the source's.
    pub(crate) fn tsc_offsets(&self, now: &TscReading, clock_offset_ns: i64) -> Vec<u64> {
        let elapsed_ns = elapsed_ns(self.tsc_read_at_ns, clock_offset_ns, now.read_at_ns);
        let target = self.tsc.wrapping_add(ticks(elapsed_ns, self.tsc_khz));
        let first = now.offset.wrapping_add(target.wrapping_sub(now.tsc));
        self.tsc_distances.iter().map(|distance| first.wrapping_add(*distance)).collect()
    }

    /// Whether the guest can live with the host's own TSC, read as `now`, where KVM lets it have no other: only if that is not
    /// a step back. (KVM's clock goes on by the true pause all the same.)
    pub(crate) fn accept_host_tsc(&self, now: &TscReading) -> Result<(), String> {
        let seconds = |ticks: u64| ticks / (u64::from(self.tsc_khz.max(1)) * 1000);
        match now.tsc.checked_sub(self.tsc) {
            None => Err(format!(
                "this host's KVM cannot set the guest's TSC, which would go back by {} s",
                seconds(self.tsc - now.tsc)
            )),
            Some(ahead) => {
                tracing::info!("KVM cannot set the guest's TSC here: it goes on {} s ahead", seconds(ahead));
                Ok(())
            }
        }
    }

    /// Sets KVM's clock to where it would be now.
    pub(crate) fn load(&self, vm: &VmFd, clock_offset_ns: i64) -> Result<(), VmmError> {
        let elapsed_ns = elapsed_ns(self.kvmclock_read_at_ns, clock_offset_ns, realtime_ns());
        let clock = kvm_clock_data { clock: self.kvmclock_ns.saturating_add(elapsed_ns), ..Default::default() };
        vm.set_clock(&clock).map_err(VmmError::kvm("cannot set KVM's clock"))
    }
}

/// Sets a vCPU's TSC offset. False: KVM takes it and ignores it (guests without hardware virtualisation read the host's own
/// TSC).
pub(crate) fn load_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<bool, VmmError> {
    let before = read_offset(vcpu)?;
    set_tsc_offset(vcpu, offset).map_err(VmmError::kvm("cannot set the TSC offset"))?;
    Ok(has_been_set(before, offset, read_offset(vcpu)?))
}

fn read_offset(vcpu: &VcpuFd) -> Result<u64, VmmError> {
    tsc_offset(vcpu).map_err(VmmError::kvm("cannot read the TSC offset"))
}

/// Whether KVM has taken the offset `asked`, from those read before and after. One that is ignored stays what it was; on a
/// host with an unstable TSC it has moved on a little by the time it is read.
fn has_been_set(before: u64, asked: u64, after: u64) -> bool {
    after == asked || after != before
}

/// The reading that stands for all vCPUs, and each one's distance to it. Where TSCs stop while a vCPU does not run,
/// the one that ran last has the most right value, and once they run again they all have caught up to it.
fn together<'a>(first: &'a TscReading, all: &'a [TscReading]) -> (&'a TscReading, Vec<u64>) {
    if all.iter().all(|reading| reading.steady) {
        return (first, all.iter().map(|reading| reading.offset.wrapping_sub(first.offset)).collect());
    }
    (all.iter().max_by_key(|reading| reading.tsc).unwrap_or(first), vec![0; all.len()])
}

/// This host's CLOCK_REALTIME.
fn realtime_ns() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}

/// Time from an instant on the source's clock to one on ours.
fn elapsed_ns(then_source_ns: u64, clock_offset_ns: i64, now_ns: u64) -> u64 {
    now_ns.saturating_sub(then_source_ns.saturating_add_signed(clock_offset_ns))
}

/// Ticks of a TSC in this time.
fn ticks(ns: u64, khz: u32) -> u64 {
    // Cannot overflow: 64 bits times 32 bits; the quotient wraps as the TSC itself does.
    (u128::from(ns) * u128::from(khz) / 1_000_000) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn saved(tsc: u64, at_ns: u64, distances: Vec<u64>) -> ClockState {
        ClockState {
            kvmclock_ns: 0,
            kvmclock_read_at_ns: at_ns,
            tsc,
            tsc_read_at_ns: at_ns,
            tsc_khz: 2_000_000,
            tsc_distances: distances,
        }
    }

    #[test]
    fn a_tsc_advances_by_the_time_that_has_really_passed() {
        // 5 ms have passed; this host's clock is 1 s ahead.
        let state = saved(1_000_000, 10_000_000_000, vec![0, 7]);
        let now = TscReading { tsc: 500, read_at_ns: 11_005_000_000, offset: 100, steady: true };
        let offsets = state.tsc_offsets(&now, 1_000_000_000);
        // What the host's own counter stood at when ours was read.
        let host = now.tsc - now.offset;
        assert_eq!(host + offsets[0], 1_000_000 + 5 * 2_000_000);
        assert_eq!(offsets[1], offsets[0] + 7);
    }

    #[test]
    fn a_tsc_that_cannot_be_set_must_not_go_back() {
        let state = saved(1_000_000, 0, vec![0]);
        let reading = |tsc| TscReading { tsc, read_at_ns: 0, offset: 0, steady: true };
        assert!(state.accept_host_tsc(&reading(1_000_000)).is_ok());
        assert!(state.accept_host_tsc(&reading(999_999)).unwrap_err().contains("go back"));
    }

    #[test]
    fn an_offset_that_moves_by_itself_has_been_set_all_the_same() {
        assert!(has_been_set(0, 100, 100));
        assert!(!has_been_set(0, 100, 0), "ignored");
        assert!(has_been_set(0, 0, 0), "nothing to change");
        assert!(has_been_set(7_000_000, 100_000, 99_900), "an unstable TSC");
    }

    #[test]
    fn distances_are_kept_unless_tscs_stop_by_themselves() {
        let reading = |tsc, offset, steady| TscReading { tsc, read_at_ns: tsc, offset, steady };
        let synchronous = [reading(1000, 50, true), reading(1010, 57, true)];
        assert_eq!(together(&synchronous[0], &synchronous), (&synchronous[0], vec![0, 7]));
        // The first vCPU has been idle for long.
        let stopped = [reading(1000, 50, false), reading(9000, 8047, false)];
        assert_eq!(together(&stopped[0], &stopped), (&stopped[1], vec![0, 0]));
    }

    proptest! {
        #[test]
        fn guest_time_never_goes_backwards(
            tsc in 0..u64::MAX / 4, then in 0..u64::MAX / 4, now_ns in 0..u64::MAX / 4, host in 0..u64::MAX / 4, offset: u64,
            clock_offset: i64
        ) {
            let now = TscReading { tsc: host.wrapping_add(offset), read_at_ns: now_ns, offset, steady: true };
            let offsets = saved(tsc, then, vec![0]).tsc_offsets(&now, clock_offset);
            prop_assert!(host.wrapping_add(offsets[0]) >= tsc);
        }

        #[test]
        fn no_reading_overflows(state_ns: u64, tsc: u64, now: u64, clock_offset: i64, distance: u64, khz: u32) {
            let mut state = saved(tsc, state_ns, vec![0, distance]);
            state.tsc_khz = khz;
            state.tsc_offsets(&TscReading { tsc: now, read_at_ns: now, offset: tsc, steady: true }, clock_offset);
        }
    }
}
