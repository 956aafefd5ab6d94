//! How a move ends: the one way out before *commit*, and what there is after it.

use super::{Action, SourceControl};
use crate::machine::Refusal;
use crate::message::Message;
use crate::phase::Phase;
use crate::progress::{PageCounts, Report};
use crate::source::SourceOutcome;

/// How the move ends, once the guest is as it was.
pub(super) enum Ending {
    Failed(String),
    Refused(Vec<Refusal>),
    Cancelled,
    WouldMove,
}

impl SourceControl {
    pub(super) fn moved(&mut self) {
        self.report.total_ms = self.now.as_secs_f64() * 1e3;
        self.downtime = self.paused_at.map(|at| self.now - at);
        self.report.downtime_ms = self.downtime.map(|downtime| downtime.as_secs_f64() * 1e3);
        self.enter(Phase::Completed);
        match self.options.audit {
            true => self.act(Action::Audit),
            false => self.finish(SourceOutcome::Moved),
        }
    }

    pub(super) fn unknown(&mut self, why: String) {
        self.act(Action::HangUp);
        self.report.total_ms = self.now.as_secs_f64() * 1e3;
        self.finish(|report| SourceOutcome::Unknown(why, report));
    }

    /// Something went wrong: before *commit* the move ends, after it nobody here knows who runs the guest.
    pub(super) fn fail(&mut self, why: String) {
        match self.phase {
            Phase::Commit => self.unknown(why),
            Phase::Completed => {}
            _ => self.end(Ending::Failed(why)),
        }
    }

    /// The one way out before *commit*: the peer is told, and the guest made as it was (invariant 2).
    pub(super) fn end(&mut self, ending: Ending) {
        let reason = match &ending {
            Ending::Failed(why) => why.clone(),
            Ending::Refused(_) => "refused by preflight".into(),
            Ending::Cancelled => "cancelled at the source".into(),
            Ending::WouldMove => "dry run: nothing was to be moved".into(),
        };
        if self.link_up {
            self.act(Action::Send(Message::Abort(reason)));
        }
        self.act(Action::HangUp);
        self.act(Action::Restore { resume: self.running && self.phase.guest_paused() });
        self.ending = Some(ending);
    }

    pub(super) fn restored(&mut self, result: Result<(), String>) {
        let Some(ending) = self.ending.take() else { return };
        self.report.total_ms = self.now.as_secs_f64() * 1e3;
        if let Some(at) = self.paused_at {
            self.report.downtime_ms = Some((self.now - at).as_secs_f64() * 1e3);
        }
        let trouble = result.err().map(|error| format!("; and the guest could not be made as it was: {error}"));
        self.finish(|report| match (ending, trouble) {
            (Ending::Failed(why), trouble) => SourceOutcome::Failed(why + &trouble.unwrap_or_default(), report),
            (Ending::Refused(refusals), None) => SourceOutcome::Refused(refusals),
            (Ending::Cancelled, None) => SourceOutcome::Cancelled(report),
            (Ending::WouldMove, None) => SourceOutcome::WouldMove(report),
            (_, Some(trouble)) => SourceOutcome::Failed(format!("the move ended{trouble}"), report),
        });
    }

    pub(super) fn finish(&mut self, outcome: impl FnOnce(Report) -> SourceOutcome) {
        self.finished = true;
        let outcome = outcome(std::mem::take(&mut self.report));
        self.act(Action::Finish(Box::new(outcome)));
    }

    /// Adds what only the driver counts to the report of an outcome.
    pub fn complete(outcome: &mut SourceOutcome, wire_bytes: u64, pages: PageCounts) {
        match outcome {
            SourceOutcome::Moved(report)
            | SourceOutcome::WouldMove(report)
            | SourceOutcome::Failed(_, report)
            | SourceOutcome::Cancelled(report)
            | SourceOutcome::Unknown(_, report) => {
                report.wire_bytes = wire_bytes;
                report.pages = pages;
            }
            SourceOutcome::Refused(_) => {}
        }
    }
}
