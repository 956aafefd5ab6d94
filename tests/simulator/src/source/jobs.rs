//! What the machine's thread is asked to do, one thing after the other, each in its time.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use godwit_core::audit;
use godwit_core::machine::{DirtyLog, Hold, MachineError, SourceMachine};
use godwit_core::source::control::{Done, Input};
use godwit_core::source::{jobs, sending};

use super::{End, SourceEnd};
use crate::chance::{ms, us};
use crate::event::Wake;
use crate::world::World;

/// How long the rehearsed pause may take.
const REHEARSAL_LIMIT: Duration = Duration::from_secs(1);

/// A job.
pub enum Job {
    /// Describe the machine.
    Describe,
    /// Judge the destination's answer.
    Judge,
    /// Pause, save, resume.
    Rehearse,
    /// What would make the pause longer.
    Flush,
    /// Start the dirty log.
    StartLog,
    /// Lift the throttle, pause, save, harvest.
    StopGuest,
    /// Let go of memory.
    LetGo,
    /// The links broke: let the guest run on if told so, and make pending what may not have arrived.
    BreakOff {
        /// Let it run.
        resume: bool,
    },
    /// The move has come to nothing.
    Restore {
        /// Let it run.
        resume: bool,
    },
    /// Hold the vCPUs back.
    Throttle(Hold),
    /// Hash the stopped guest's memory.
    Audit,
}

impl Job {
    /// How long it may take to pause the machine, if it does.
    fn pauses(&self, end: &SourceEnd) -> Option<Duration> {
        match self {
            Self::StopGuest => Some(end.pause_limit),
            Self::Rehearse => Some(REHEARSAL_LIMIT),
            _ => None,
        }
    }
}

impl World {
    pub(super) fn source_queues_job(&mut self, (process, end): End<'_>, job: Job) {
        end.jobs.push_back(job);
        if end.job_since.is_none() {
            self.source_starts_job((process, end));
        }
    }

    fn source_starts_job(&mut self, (process, end): End<'_>) {
        let Some(job) = end.jobs.front() else { return };
        end.job_since = Some(self.now());
        if job.pauses(end).is_some() {
            end.machine.halt();
        }
        let work = self.setup.work;
        let delay = self.chance.time(us(10), work.max(us(20)));
        self.wake_after(process, delay, Wake::Job);
    }

    /// The machine's thread is done with a job, or goes on waiting for the disk.
    pub(super) fn source_job(&mut self, (process, end): End<'_>) {
        let (Some(job), Some(since)) = (end.jobs.front(), end.job_since) else { return };
        let waited = self.now() - since;
        if let Some(limit) = job.pauses(end).filter(|limit| !end.machine.is_drained() && waited < *limit) {
            return self.wake_after(process, (limit - waited).min(ms(2)), Wake::Job);
        }
        let Some(job) = end.jobs.pop_front() else { return };
        end.job_since = None;
        if let Job::Throttle(hold) = job {
            // Nobody waits for it.
            self.note(format_args!("p{process} leaves its guest {:.0} % of its speed", hold.share * 100.0));
            end.machine.throttle(hold);
            return self.source_starts_job((process, end));
        }
        let input = match carry_out(end, job) {
            Ok(done) => Input::Done(done),
            Err(error) => Input::Failed(error.to_string()),
        };
        if let Input::Done(Done::Audited(text)) = &input {
            self.note(format_args!("p{process} audits its memory: {text}"));
            end.audit_failed |= !text.starts_with("ok");
        }
        self.source_input(end, input);
        self.source_starts_job((process, end));
    }
}

fn carry_out(end: &mut SourceEnd, job: Job) -> Result<Done, MachineError> {
    let machine = &*Arc::clone(&end.machine);
    let ownership = end.holding.as_deref();
    let ticks = Cell::new(0);
    let now = || {
        ticks.set(ticks.get() + 150);
        us(ticks.get())
    };
    let no_data = || MachineError::new("there are no data channels");
    let pages = || end.pages.clone().ok_or_else(no_data);
    match job {
        Job::Describe => Ok(Done::Described(machine.describe()?, machine.inquire()?.question())),
        Job::Judge => Ok(Done::Judged(Vec::new())),
        Job::Rehearse => jobs::rehearse(machine, &now),
        Job::Flush => Ok(Done::Flushed),
        Job::StartLog => jobs::start_log(machine, &*pages()?),
        Job::StopGuest => {
            let dirty = end.pages.as_deref().zip(end.harvester.as_ref());
            jobs::stop_guest(machine, ownership, dirty, end.pause_limit, &now)
        }
        Job::LetGo => jobs::let_go(machine),
        Job::Throttle(_) => Err(MachineError::new("nobody waits for that")),
        Job::BreakOff { resume } => {
            jobs::take_back(machine, ownership, resume)?;
            let pages = pages()?;
            Ok(Done::BrokenOff(sending::break_off(&pages, &mut end.sending, &mut end.unacknowledged)))
        }
        Job::Restore { resume } => {
            let resumed = jobs::restore(machine, ownership, resume);
            let stopped = if end.pages.is_some() { machine.stop() } else { Ok(()) };
            Ok(Done::Restored(resumed.and(stopped).map_err(|error| error.to_string())))
        }
        Job::Audit => Ok(Done::Audited(audit::memory_against_table(&*pages()?))),
    }
}
