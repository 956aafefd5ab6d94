//! How a move ends: the one way out before *commit*, and what there is after it.

use std::time::Duration;

use super::{Action, SourceControl};
use crate::machine::Refusal;
use crate::message::{Commit, Message};
use crate::ownership::Settlement;
use crate::phase::Phase;
use crate::progress::{PageCounts, PostCopyCounts, Report};
use crate::source::SourceOutcome;

/// However late the destination was lost, the claims are asked for so long before the move is called unknown.
const SETTLE_AT_LEAST: Duration = Duration::from_secs(3);

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
        // In post-copy the pause has been over for a while.
        self.downtime = self.downtime.or(self.paused_at.map(|at| self.now - at));
        self.report.downtime_ms = self.downtime.map(|downtime| downtime.as_secs_f64() * 1e3);
        self.enter(Phase::Completed);
        if self.hands_over {
            self.handed_over();
        }
        match self.options.audit && !self.hands_over {
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
            Phase::Commit if self.options.ownership.is_some() => self.settle(why),
            // The destination may run the guest, and need what is here.
            Phase::Commit if self.postcopy.is_some() => self.pages_link_lost(why),
            Phase::Commit => self.unknown(why),
            Phase::PostCopy | Phase::PostCopyPaused => self.pages_link_lost(why),
            Phase::Completed => {}
            _ => self.end(Ending::Failed(why)),
        }
    }

    /// Ownership passes: from here on this end may run the guest only in an epoch that it claims anew.
    pub(super) fn commit(&mut self) {
        let (epoch, nonce) = match self.options.ownership.as_deref().map(|holding| holding.commit()) {
            None => (0, self.nonce),
            Some(Some((epoch, nonce))) => (epoch.get(), nonce.0),
            Some(None) => return self.fail("this machine's claims cannot pass to the destination".into()),
        };
        self.enter(Phase::Commit);
        self.act(Action::Send(Message::Commit(Commit { epoch, nonce, run: self.running })));
    }

    pub(super) fn note_running(&mut self) {
        if let Some(holding) = &self.options.ownership {
            holding.running();
        }
    }

    /// The destination is lost, and may have claimed the machine or not: the store knows.
    fn settle(&mut self, why: String) {
        let elapsed = self.now.saturating_sub(self.phase_since);
        let patience = self.options.handover_timeout.saturating_sub(elapsed).max(SETTLE_AT_LEAST);
        self.act(Action::Say(format!("{why}: asking the claims who has the machine")));
        self.settling = Some(why);
        self.act(Action::Settle(patience));
    }

    /// They have not said so the last time.
    pub(super) fn settle_again(&mut self, why: String) {
        self.settling = Some(why);
        self.act(Action::Settle(SETTLE_AT_LEAST));
    }

    pub(super) fn settled(&mut self, settlement: Settlement) {
        let Some(why) = self.settling.take() else { return };
        match settlement {
            Settlement::Resumed(epoch) => {
                self.end(Ending::Failed(format!(
                    "{why}; the destination had not claimed the machine: claimed back, epoch {epoch}"
                )));
            }
            // The destination may not say so for a long time, and needs what is here.
            Settlement::Moved if self.postcopy.is_some() => self.follow_unheard(why, false),
            Settlement::Undecided(_) if self.postcopy.is_some() => self.follow_unheard(why, true),
            Settlement::Moved => self.moved(),
            Settlement::Superseded(record) => {
                self.unknown(format!(
                    "{why}; {}: the machine was started anew, and the copy here is out of date",
                    record.occupant
                ));
            }
            Settlement::Undecided(what) => self.unknown(format!("{why}; {what}")),
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
        self.reconnecting = None;
        self.act(Action::Restore { resume: self.running && self.guest_stopped });
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
    pub fn complete(outcome: &mut SourceOutcome, wire_bytes: u64, pages: PageCounts, postcopy: PostCopyCounts) {
        match outcome {
            SourceOutcome::Moved(report)
            | SourceOutcome::WouldMove(report)
            | SourceOutcome::Failed(_, report)
            | SourceOutcome::Cancelled(report)
            | SourceOutcome::Unknown(_, report) => {
                report.wire_bytes = wire_bytes;
                report.pages = pages;
                if let Some(report) = &mut report.postcopy {
                    report.missing_pages = postcopy.missing_pages;
                    report.pages_by_fault = postcopy.by_fault;
                    report.pages_by_push = postcopy.by_push;
                    report.wire_bytes = postcopy.wire_bytes;
                }
            }
            SourceOutcome::Refused(_) => {}
        }
    }
}
