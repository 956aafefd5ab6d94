//! What the machine is asked to do in a move, each in the order that keeps the invariants. In life each runs on the machine's
//! own thread; `now` is a clock.

use std::sync::Mutex;
use std::time::Duration;

use super::control::Done;
use super::sending::SourcePages;
use crate::machine::{Hold, MachineError, SourceMachine};
use crate::message::TimedStep;
use crate::ownership::Holding;
use crate::pending::{Harvester, forget_vmm_writes};
use crate::plants::{Plant, planted};
use crate::sync::lock;

/// How long the rehearsed pause may take.
const REHEARSAL_LIMIT: Duration = Duration::from_secs(1);

/// The time since whenever.
pub type Clock<'c> = &'c dyn Fn() -> Duration;

/// Pauses, saves and lets run on, as a rehearsal: what cannot be saved is found now, and what it takes is known. Of two
/// the quicker counts: the first is also slowed by whatever is done for the first time.
pub fn rehearse(machine: &dyn SourceMachine, now: Clock<'_>) -> Result<Done, MachineError> {
    let running = machine.is_running();
    let once = || {
        let began = now();
        machine.pause(REHEARSAL_LIMIT)?;
        let saved = machine.save();
        let pause = now().saturating_sub(began);
        if running {
            machine.resume()?;
        }
        Ok::<_, MachineError>((pause, saved?))
    };
    let (first, _) = once()?;
    let (second, sections) = once()?;
    Ok(Done::Rehearsed { sections, pause: first.min(second) })
}

/// Starts the dirty log and makes every page pending.
pub fn start_log(machine: &dyn SourceMachine, pages: &SourcePages) -> Result<Done, MachineError> {
    // Whatever is written from here on is logged, and all that was written before is about to be sent.
    machine.dirty_log().start()?;
    forget_vmm_writes(pages.view.memory());
    pages.pending.fill(pages.view.layout());
    Ok(Done::LogStarted)
}

/// Collects what has been dirtied since, and returns how many pages that adds to those that are pending.
pub fn harvest(
    machine: &dyn SourceMachine,
    pages: &SourcePages,
    harvester: &Mutex<Harvester>,
) -> Result<u64, MachineError> {
    let SourcePages { view, pending, .. } = pages;
    lock(harvester).harvest(view.layout(), machine.dirty_log(), view.memory(), pending)
}

/// Lifts the throttle, pauses the guest, saves its state and collects the last dirty pages; without `dirty`, memory is handed over, and no log is kept.
pub fn stop_guest(
    machine: &dyn SourceMachine,
    ownership: Option<&Holding>,
    dirty: Option<(&SourcePages, &Mutex<Harvester>)>,
    limit: Duration,
    now: Clock<'_>,
) -> Result<Done, MachineError> {
    let mut steps = Vec::new();
    let mut began = now();
    let mut step = |name: &str| {
        let ended = now();
        steps.push(TimedStep { name: name.into(), duration: ended.saturating_sub(began) });
        began = ended;
    };
    // However and wherever the guest goes on, it does so at its full speed.
    machine.throttle(Hold::NONE);
    machine.pause(limit)?;
    // Whatever ends the move from here on gives the right back before the guest resumes.
    if let Some(holding) = ownership {
        holding.begin_handover();
    }
    step("pause vCPUs and devices");
    if let Some((pages, harvester)) = dirty.filter(|_| planted(Plant::HarvestBeforeSave)) {
        harvest(machine, pages, harvester)?;
        return Ok(Done::Stopped { sections: machine.save()?, steps });
    }
    let sections = machine.save()?;
    step("save state");
    // The last harvest follows the last KVM ioctl and the last device write.
    if let Some((pages, harvester)) = dirty {
        harvest(machine, pages, harvester)?;
        step("last harvest");
    }
    Ok(Done::Stopped { sections, steps })
}

/// Lets go of the machine's memory, which the destination is about to own.
pub fn let_go(machine: &dyn SourceMachine) -> Result<Done, MachineError> {
    machine.let_go_of_memory()?;
    Ok(Done::LetGo)
}

/// The move has come to nothing: the guest is as it was, and at its full speed. Its dirty log is left to be stopped.
pub fn restore(machine: &dyn SourceMachine, ownership: Option<&Holding>, resume: bool) -> Result<(), MachineError> {
    // The guest first: it has waited long enough.
    let resumed = take_back(machine, ownership, resume);
    if !planted(Plant::KeepThrottle) {
        machine.throttle(Hold::NONE);
    }
    resumed
}

/// The handover has come to nothing: takes the machine's memory back, if it was let go of, and lets the guest run on here, if it did and may.
pub fn take_back(machine: &dyn SourceMachine, ownership: Option<&Holding>, resume: bool) -> Result<(), MachineError> {
    let ours = ownership.is_none_or(Holding::give_up_handover);
    if ours {
        machine.take_back_memory()?;
    }
    match (resume, ours) {
        (false, _) => Ok(()),
        (true, true) => machine.resume(),
        (true, false) => Err(MachineError::new("there is no right to run it: it has been handed over")),
    }
}
