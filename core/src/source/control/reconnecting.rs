//! When the links break while memory is being sent: they are made anew, and the rounds go on.
//!
//! ```text
//! link lost → breaking off → waiting ⇄ dialling → attaching → opening → a round
//! ```
//!
//! In post-copy the channels for pages are opened instead, and there is no end to the attempts.
//!
//! The guest runs on meanwhile; if it was paused it is resumed first. All that was not acknowledged is pending again, and the
//! destination keeps what it has for as long as this end tries.

use std::time::Duration;

use super::ending::Ending;
use super::{Action, Done, Input, SourceControl};
use crate::message::Message;
use crate::phase::Phase;
use crate::plants::{Plant, planted};
use crate::progress::{self, Reconnection};
use crate::source::sending::BrokenOff;

/// The time between attempts, from when one has failed; the last one is repeated.
const GAPS: [Duration; 5] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(3),
];
/// How long the destination may take to take up the session once the control channel is open.
const ATTACH_LIMIT: Duration = Duration::from_secs(5);
/// Links that break again before they have held for so long share the time that the first break was given.
const HELD: Duration = Duration::from_secs(10);

/// A connection that breaks more often in one move is of no use: no move goes on for ever.
const MAX_BREAKS: usize = 100;

/// The links are broken.
pub(super) struct Reconnecting {
    /// Since when; bounds it all.
    since: Duration,
    attempts: u32,
    why: String,
    stage: Stage,
}

/// The break before this one.
#[derive(Clone, Copy)]
pub(super) struct LastBreak {
    since: Duration,
    over: Duration,
    /// Until a round has been sent: pages that would have been sent again in it anyway.
    anyway_pages: Option<u64>,
}

enum Stage {
    BreakingOff,
    Waiting { until: Duration },
    Dialling,
    Attaching { until: Duration },
    Opening,
}

impl Reconnecting {
    pub(super) fn deadline(&self, timeout: Duration) -> Duration {
        let end = self.since.saturating_add(timeout);
        match self.stage {
            Stage::Waiting { until } | Stage::Attaching { until } => end.min(until),
            Stage::BreakingOff | Stage::Dialling | Stage::Opening => end,
        }
    }

    pub(super) fn progress(&self, now: Duration, timeout: Duration) -> progress::Reconnecting {
        let left = self.since.saturating_add(timeout).saturating_sub(now);
        progress::Reconnecting {
            attempts: self.attempts,
            time_left_ms: left.as_secs_f64() * 1e3,
            why: self.why.clone(),
        }
    }
}

impl SourceControl {
    /// The control link or a data channel broke.
    pub(super) fn link_lost(&mut self, why: String) {
        // Whether the destination has begun to load state cannot be told from here: if it has, it refuses to go on.
        let resumable = (Phase::FirstPass..=Phase::State).contains(&self.phase);
        let goes_over = self.phase == Phase::Commit && self.options.ownership.is_none() && self.postcopy.is_some();
        if self.is_following() || goes_over {
            return self.pages_link_lost(why);
        }
        let often = self.report.reconnections.len() >= MAX_BREAKS;
        if !resumable || often || self.session.is_none() {
            return self.fail(format!("the connection to {} broke: {why}", self.peer_host));
        }
        let shaky = self.last_break.filter(|last| self.now.saturating_sub(last.over) < HELD);
        let since = shaky.map_or(self.now, |last| last.since);
        self.act(Action::Say(format!(
            "the connection to {} broke: {why}; the guest runs on here, and the connection is made anew for up to {:.0?}",
            self.peer_host, self.options.reconnect_timeout
        )));
        self.queue_awaited_since = None;
        self.not_gone_over();
        self.begin_to_reconnect(since, why);
        self.act(Action::BreakOff { resume: self.running && self.guest_stopped });
    }

    /// The same while the guest may run at the destination, without all of its memory.
    pub(super) fn pages_link_lost(&mut self, why: String) {
        if planted(Plant::ResumeInPostCopy) {
            return self.end(Ending::Failed(why));
        }
        self.link_up = false;
        self.act(Action::Say(format!(
            "the connection to {} broke: {why}; the guest runs on there until it needs a page that is missing, and the connection is \
             made anew for as long as it takes",
            self.peer_host
        )));
        self.begin_to_reconnect(self.now, why);
        self.enter(Phase::PostCopyPaused);
        self.act(Action::LeavePages);
    }

    fn begin_to_reconnect(&mut self, since: Duration, why: String) {
        self.report.reconnections.push(Reconnection {
            phase: Some(self.phase),
            why: why.clone(),
            at_ms: self.now.as_secs_f64() * 1e3,
            ..Reconnection::default()
        });
        self.lift_throttle();
        self.course.broken();
        self.reconnecting = Some(Reconnecting { since, attempts: 0, why, stage: Stage::BreakingOff });
    }

    /// Something happened while the links are broken.
    pub(super) fn reconnect(&mut self, input: Input) {
        let Some(Reconnecting { stage, .. }) = &self.reconnecting else { return };
        match (stage, input) {
            (_, Input::Cancel) if self.may_cancel().is_ok() => self.end(Ending::Cancelled),
            (_, Input::Abandon) if self.is_following() => self.abandon(),
            (_, Input::Message(Message::Abort(why))) if self.is_following() => self.unknown(format!(
                "{} has given the machine up before all of its memory was there: {why}",
                self.peer_host
            )),
            (_, Input::Message(Message::Running(_))) if self.is_following() => self.note_follows(),
            (Stage::BreakingOff, Input::Done(Done::BrokenOff(_))) if self.is_following() => self.next_attempt(),
            (_, Input::Failed(what)) if self.is_following() => self.attempt_failed(what),
            (_, Input::PostCopy) if self.may_go_over().is_ok() => self.go_over("it was asked for".into(), false),
            (_, Input::Failed(what)) => self.fail(what),
            (_, Input::Message(Message::Abort(why))) => self.fail(format!("{} gave up: {why}", self.peer_host)),
            (_, Input::DowntimeLimit(limit)) => self.options.downtime_limit = limit,
            // Said before anybody knew of the break: it holds for when the move has converged again.
            (_, Input::Proceed) => self.proceed = true,
            (Stage::BreakingOff, Input::Done(Done::BrokenOff(broken))) => {
                if let Some(at) = self.paused_at.take().filter(|_| self.guest_stopped) {
                    let paused = self.now.saturating_sub(at);
                    self.note(|reconnection| reconnection.paused_ms = Some(paused.as_secs_f64() * 1e3));
                }
                self.guest_stopped = false;
                if self.phase > Phase::Rounds {
                    self.enter(Phase::Rounds);
                }
                self.broken_off(broken);
                self.next_attempt();
            }
            (Stage::Dialling, Input::Done(Done::Connected)) => {
                self.link_up = true;
                self.stage(Stage::Attaching { until: self.now + ATTACH_LIMIT });
            }
            // A firewall may say so as well.
            (Stage::Dialling, Input::Unreachable { why, gone: true }) if !self.is_following() => self.fail(format!(
                "the connection to {} broke, and the process that had the guest's memory there is gone: {why}",
                self.peer_host
            )),
            (Stage::Dialling, Input::Unreachable { why, .. }) => self.attempt_failed(why),
            (Stage::Attaching { .. }, Input::Message(Message::Attached(token))) => {
                self.stage(Stage::Opening);
                self.data_token = Some(token);
                self.act(match self.is_following() {
                    true => Action::OpenPages { token },
                    false => Action::ReopenData { token },
                });
            }
            (Stage::Opening, Input::Done(Done::PagesOpened)) if self.is_following() => self.pages_reopened(),
            (Stage::Attaching { .. } | Stage::Opening, Input::Unreachable { why, .. } | Input::LinkLost(why)) => {
                self.link_up = false;
                self.note(|reconnection| reconnection.why.clone_from(&why));
                self.attempt_failed(why);
            }
            (Stage::Opening, Input::Done(Done::Reattached { dirtied_pages })) => self.reattached(dirtied_pages),
            (_, Input::Tick) => {}
            // What was under way when the links broke, and is late.
            (_, input) => tracing::debug!("while reconnecting: {input:?}"),
        }
    }

    /// Time has passed: for the next attempt, for this one, or for all of them.
    pub(super) fn reconnecting_overdue(&mut self) {
        let following = self.is_following();
        let Some(reconnecting) = &mut self.reconnecting else { return };
        let over = self.now >= reconnecting.since.saturating_add(self.options.reconnect_timeout);
        if over && following {
            // There is nothing to go back to: the attempts begin anew.
            reconnecting.since = self.now;
        }
        let Some(reconnecting) = &self.reconnecting else { return };
        if over && !following {
            let (why, attempts) = (&reconnecting.why, reconnecting.attempts);
            return self.fail(format!(
                "the connection to {} broke and could not be made anew within --reconnect-timeout ({:.1?}, {attempts} \
                 attempts): {why}",
                self.peer_host, self.options.reconnect_timeout
            ));
        }
        match reconnecting.stage {
            Stage::Waiting { .. } => self.attempt(),
            Stage::Attaching { .. } => {
                self.link_up = false;
                self.attempt_failed(format!("{} did not take up the session in time", self.peer_host));
            }
            Stage::BreakingOff | Stage::Dialling | Stage::Opening => {}
        }
    }

    /// A round has been sent, and so many of its pages had been sent before: how many of them because of a break.
    pub(super) fn caught_up(&mut self, again_pages: u64) {
        if let Some(anyway) = self.last_break.as_mut().and_then(|last| last.anyway_pages.take()) {
            self.note_sent_again(again_pages.saturating_sub(anyway));
        }
    }

    fn note_sent_again(&mut self, pages: u64) {
        let bytes = pages * 4096;
        self.note(|reconnection| reconnection.resent_bytes += bytes);
        self.report.resent_bytes += bytes;
    }

    fn broken_off(&mut self, broken: BrokenOff) {
        // If the round after the break before this one was not sent to its end, what is left of it still counts as sent again.
        let before = self.last_break.as_mut().and_then(|last| last.anyway_pages.take());
        if let Some(anyway) = before {
            let pages = broken.again_pages.saturating_sub(anyway);
            let bytes = pages * 4096;
            let count = self.report.reconnections.len();
            if let Some(last) = count.checked_sub(2).and_then(|index| self.report.reconnections.get_mut(index)) {
                last.resent_bytes += bytes;
            }
            self.report.resent_bytes += bytes;
        }
        let anyway_pages = before.map_or(broken.anyway_pages, |before| before.min(broken.anyway_pages));
        let since = self.reconnecting.as_ref().map_or(self.now, |reconnecting| reconnecting.since);
        self.last_break = Some(LastBreak { since, over: self.now, anyway_pages: Some(anyway_pages) });
        let bytes = broken.unacknowledged_pages * 4096;
        self.note(|reconnection| reconnection.unacknowledged_bytes += bytes);
    }

    fn reattached(&mut self, dirtied_pages: u64) {
        let Some(Reconnecting { attempts, .. }) = self.reconnecting.take() else { return };
        let now_ms = self.now.as_secs_f64() * 1e3;
        if let Some(last) = &mut self.last_break {
            last.over = self.now;
        }
        self.note(|reconnection| {
            reconnection.outage_ms = Some(now_ms - reconnection.at_ms);
            reconnection.dirtied_bytes += dirtied_pages * 4096;
        });
        if let Some(Reconnection { outage_ms: Some(outage), unacknowledged_bytes, .. }) =
            self.report.reconnections.last()
        {
            let text = format!(
                "connected to {} again after {:.1} s and {attempts} attempts: {:.1} MiB that were not acknowledged and {:.1} MiB \
                 written since are sent",
                self.peer_host,
                outage / 1e3,
                *unacknowledged_bytes as f64 / f64::from(1 << 20),
                dirtied_pages as f64 * 4096.0 / f64::from(1 << 20),
            );
            self.act(Action::Say(text));
        }
        match self.round_under_way {
            true => self.begin_round(),
            false => self.next_round(),
        }
    }

    /// The channels for pages are open again, and what is missing is known anew.
    fn pages_reopened(&mut self) {
        self.reconnecting = None;
        let now_ms = self.now.as_secs_f64() * 1e3;
        self.note(|reconnection| reconnection.outage_ms = Some(now_ms - reconnection.at_ms));
        self.act(Action::Say(format!("connected to {} again: pages follow", self.peer_host)));
        self.enter(Phase::PostCopy);
        self.act(Action::Serve);
        self.act(Action::Push);
    }

    /// This attempt has come to nothing: what it has opened is closed before the next.
    fn attempt_failed(&mut self, why: String) {
        if let Some(reconnecting) = &mut self.reconnecting {
            let left = reconnecting.since.saturating_add(self.options.reconnect_timeout).saturating_sub(self.now);
            let left = match self.phase {
                Phase::PostCopyPaused => "the guest may be waiting for pages".into(),
                _ => format!("{left:.0?} left"),
            };
            let text =
                format!("not connected to {} yet (attempt {}, {left}): {why}", self.peer_host, reconnecting.attempts);
            reconnecting.why = why;
            self.act(Action::Say(text));
        }
        self.stage(Stage::BreakingOff);
        self.act(match self.is_following() {
            true => Action::LeavePages,
            false => Action::BreakOff { resume: false },
        });
    }

    fn next_attempt(&mut self) {
        let Some(reconnecting) = &self.reconnecting else { return };
        match (reconnecting.attempts as usize).checked_sub(1) {
            None => self.attempt(),
            // Nobody may be there: the destination may have dropped the machine without having claimed it.
            Some(_) if self.is_in_doubt() => self.settle_again(reconnecting.why.clone()),
            Some(failed) => self.stage(Stage::Waiting { until: self.now + GAPS[failed.min(GAPS.len() - 1)] }),
        }
    }

    pub(super) fn attempt(&mut self) {
        let (Some(token), Some(reconnecting)) = (self.session, &mut self.reconnecting) else { return };
        reconnecting.attempts += 1;
        reconnecting.stage = Stage::Dialling;
        let attempts = reconnecting.attempts;
        self.note(|reconnection| reconnection.attempts = attempts);
        self.act(Action::Reconnect { token });
    }

    fn stage(&mut self, stage: Stage) {
        if let Some(reconnecting) = &mut self.reconnecting {
            reconnecting.stage = stage;
        }
    }

    fn note(&mut self, note: impl FnOnce(&mut Reconnection)) {
        if let Some(reconnection) = self.report.reconnections.last_mut() {
            note(reconnection);
        }
    }
}
