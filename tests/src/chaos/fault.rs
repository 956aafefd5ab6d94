//! Faults struck and healed.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use serde_json::json;

use super::events::Events;
use super::kind::Kind;
use super::plan::{Fault, Hold, Moment};
use super::stores::{Stores, Trouble};
use super::world::Member;
use crate::clock::monotonic_ns;
use crate::netns::Hosts;

/// How long a moment is waited for that never comes.
const MOMENT_LIMIT: Duration = Duration::from_secs(20);

/// Between two tries to let a held move go.
const RELEASE_PERIOD: Duration = Duration::from_millis(20);

/// Packets lost out of 1000, one of these.
const LOSSES_PER_MILLE: [u32; 4] = [20, 100, 300, 600];

/// How late a slow store answers, one of these in milliseconds. The last is more than a call may take.
const DELAYS_MS: [u64; 4] = [20, 100, 600, 2500];

/// A move on which faults are struck.
pub struct Stage<'a> {
    /// Who has the machine.
    pub source: &'a Member,
    /// Who is to have it.
    pub destination: &'a Member,
    /// The command that asked for the move.
    pub client: Pid,
    /// What the source tells.
    pub events: &'a Events,
    /// The network.
    pub hosts: &'a Hosts,
    /// The claim store.
    pub stores: &'a Stores,
    /// Nobody wants to see more.
    pub interrupted: &'a AtomicBool,
}

/// A fault that has struck.
#[derive(Debug, Clone, Copy)]
pub struct Struck {
    /// Which.
    pub fault: Fault,
    /// When it had taken effect.
    pub at_ns: u64,
    /// When it had been healed. For what cannot be, when it had taken effect.
    pub healed_ns: u64,
}

impl Stage<'_> {
    /// Lets the move go after it has been held as long as planned.
    pub fn hold(&self, hold: Hold) {
        if self.events.wait_for(hold.phase, MOMENT_LIMIT).is_none() {
            return;
        }
        thread::sleep(hold.lasts);
        // A source that is stopped meanwhile answers no greeting in time. One whose move has ended has nothing to release.
        let deadline = Instant::now() + MOMENT_LIMIT;
        while self.source.node.execute("x-godwit-release-hold", json!({})).is_err()
            && !self.events.story().is_over()
            && Instant::now() < deadline
        {
            thread::sleep(RELEASE_PERIOD);
        }
        self.events.released();
    }

    /// Waits for the fault's moment, strikes, and heals. `None` if the moment never came.
    pub fn play(&self, fault: Fault) -> Result<Option<Struck>> {
        if !self.moment_comes(fault.moment) || !self.is_there(fault.kind) {
            return Ok(None);
        }
        let struck = self.strike(fault);
        let at_ns = monotonic_ns();
        if !fault.kind.is_instant() {
            self.sleep(fault.lasts);
        }
        // Also what was struck by half is healed.
        let healed = self.heal(fault);
        struck.and(healed).with_context(|| format!("cannot play {fault}"))?;
        let healed_ns = if fault.kind.is_instant() { at_ns } else { monotonic_ns() };
        Ok(Some(Struck { fault, at_ns, healed_ns }))
    }

    fn moment_comes(&self, moment: Moment) -> bool {
        let delay = match moment {
            Moment::After(delay) => return !self.events.wait_for_end(delay),
            Moment::In(phase, delay) => self.events.wait_for(phase, MOMENT_LIMIT).map(|_| delay),
            Moment::Released(delay) => self.events.wait_for_release(MOMENT_LIMIT).map(|_| delay),
        };
        delay.is_some_and(|delay| {
            thread::sleep(delay);
            !self.events.story().is_over()
        })
    }

    /// Whether there is anything left that the fault could strike.
    fn is_there(&self, kind: Kind) -> bool {
        match kind {
            Kind::KillSource | Kind::StopSource => lives(self.source.node.process.pid()),
            Kind::KillDestination | Kind::StopDestination => lives(self.destination.node.process.pid()),
            Kind::KillClient => lives(self.client),
            _ => true,
        }
    }

    fn strike(&self, fault: Fault) -> Result<()> {
        let (source, destination) = (self.source.node.process.pid(), self.destination.node.process.pid());
        let (here, there) = (self.source.host, self.destination.host);
        match fault.kind {
            Kind::KillSource => send(source, Signal::SIGKILL),
            Kind::KillDestination => send(destination, Signal::SIGKILL),
            Kind::KillClient => send(self.client, Signal::SIGKILL),
            Kind::StopSource => send(source, Signal::SIGSTOP),
            Kind::StopDestination => send(destination, Signal::SIGSTOP),
            Kind::LinkDown => self.hosts.take_down(here, there),
            Kind::PacketLoss => {
                let per_mille = choose(&LOSSES_PER_MILLE, fault.variant);
                self.hosts.lose_some(here, there, per_mille)?;
                self.hosts.lose_some(there, here, per_mille)
            }
            Kind::HalfOpen => {
                let (from, to) = if fault.variant.is_multiple_of(2) { (here, there) } else { (there, here) };
                self.hosts.lose(from, to)
            }
            Kind::Cancel => {
                // After *commit* it is refused.
                let _ = self.source.node.execute("migrate_cancel", json!({}));
                Ok(())
            }
            _ => self
                .troubles(fault)
                .into_iter()
                .try_for_each(|(host, trouble)| self.stores.trouble(host, Some(trouble))),
        }
    }

    fn heal(&self, fault: Fault) -> Result<()> {
        let (here, there) = (self.source.host, self.destination.host);
        match fault.kind {
            Kind::KillSource | Kind::KillDestination | Kind::KillClient | Kind::Cancel => Ok(()),
            Kind::StopSource => send(self.source.node.process.pid(), Signal::SIGCONT),
            Kind::StopDestination => send(self.destination.node.process.pid(), Signal::SIGCONT),
            Kind::LinkDown => self.hosts.bring_up(here, there),
            Kind::PacketLoss => self.hosts.lose_none(here, there).and(self.hosts.lose_none(there, here)),
            Kind::HalfOpen => {
                let (from, to) = if fault.variant.is_multiple_of(2) { (here, there) } else { (there, here) };
                self.hosts.find(from, to)
            }
            _ => self.troubles(fault).into_iter().try_for_each(|(host, _)| self.stores.trouble(host, None)),
        }
    }

    /// What the fault does to the claim store, and at which hosts.
    fn troubles(&self, fault: Fault) -> Vec<(usize, Trouble)> {
        let (here, there) = (self.source.host, self.destination.host);
        let uncertain = if fault.variant.is_multiple_of(3) { Trouble::Unsure } else { Trouble::Mute };
        match fault.kind {
            Kind::StoreUnreachableSource => vec![(here, Trouble::Unreachable)],
            Kind::StoreUnreachableDestination => vec![(there, Trouble::Unreachable)],
            Kind::StoreUncertainSource => vec![(here, uncertain)],
            Kind::StoreUncertainDestination => vec![(there, uncertain)],
            Kind::StoreSlow => {
                let slow = Trouble::Slow(Duration::from_millis(choose(&DELAYS_MS, fault.variant)));
                vec![(here, slow), (there, slow)]
            }
            Kind::FullDisk => vec![(if fault.variant.is_multiple_of(2) { here } else { there }, Trouble::Full)],
            _ => Vec::new(),
        }
    }

    /// Shorter if nobody wants to see more.
    fn sleep(&self, duration: Duration) {
        const STEP: Duration = Duration::from_millis(50);
        let mut left = duration;
        while !left.is_zero() && !self.interrupted.load(Ordering::Relaxed) {
            thread::sleep(left.min(STEP));
            left = left.saturating_sub(STEP);
        }
    }
}

fn choose<T: Copy>(choices: &[T], variant: u64) -> T {
    choices[(variant % choices.len() as u64) as usize]
}

fn send(pid: Pid, signal: Signal) -> Result<()> {
    signal::kill(pid, signal).with_context(|| format!("cannot send {signal} to process {pid}"))
}

/// Whether a child of ours has not ended, though nobody may have noticed yet.
fn lives(pid: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the name, which is in parentheses.
    status.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
