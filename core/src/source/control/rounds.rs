//! Rounds: what each has shown, and whether another follows or the pause.

use super::{Action, RoundSent, SourceControl};
use crate::message::{Message, RoundStart};
use crate::phase::Phase;
use crate::policy::{Decision, RoundEnd};
use crate::progress::RoundReport;

/// Rounds that sent less say little about the rate.
pub(crate) const TELLING_ROUND_BYTES: u64 = 256 << 10;

impl SourceControl {
    pub(super) fn begin_round(&mut self) {
        let pages = match (self.report.rounds.last(), &self.machine) {
            (Some(round), _) => round.dirty_pages,
            (None, Some(machine)) => machine.memory_bytes() / 4096,
            (None, None) => 0,
        };
        self.act(Action::Send(Message::Round(RoundStart { round: self.round, pages })));
        self.round_under_way = true;
        self.act(Action::Round { first: self.round == 0 });
    }

    pub(super) fn next_round(&mut self) {
        self.queue_awaited_since = None;
        if self.phase != Phase::Rounds {
            self.enter(Phase::Rounds);
        }
        self.round += 1;
        self.begin_round();
    }

    pub(super) fn round_sent(&mut self, sent: RoundSent) {
        self.round_under_way = false;
        self.caught_up(sent.again);
        let seconds = sent.duration.as_secs_f64().max(1e-9);
        if sent.wire_bytes >= TELLING_ROUND_BYTES {
            self.wire_bytes_per_page = sent.wire_bytes as f64 / sent.pages.max(1) as f64;
            let rate = sent.wire_bytes as f64 / seconds;
            if self.options.switchover_bandwidth_bytes_per_s.is_none() {
                // Under a cap, or of pages that are hardly any bytes, a round shows what the link takes at least; else what it takes.
                let at_least = sent.capped || sent.by_pages;
                self.switchover_bytes_per_s = if at_least { self.switchover_bytes_per_s.max(rate) } else { rate };
            }
        }
        self.cost.harvest = sent.harvest;
        self.learn(&sent);
        let end = self.round_end(&sent);
        let report = RoundReport {
            round: self.round,
            duration_ms: sent.duration.as_secs_f64() * 1e3,
            pages_sent: sent.pages,
            wire_bytes: sent.wire_bytes,
            dirty_pages: sent.dirty_pages,
            predicted_pause_ms: end.predicted_pause().as_secs_f64() * 1e3,
        };
        self.report.rounds.push(report.clone());
        self.act(Action::RoundEnded(report));
        if self.postcopy.is_some() {
            return self.ask_for_postcopy();
        }
        let limits = self.limits();
        let end = RoundEnd { next: self.next_round_is(&end), ..end };
        let is_met = end.predicted_pause() <= limits.downtime;
        if is_met {
            self.course.met = Some(end.met_now());
        }
        match end.decide(&limits) {
            Decision::AwaitQueue => {
                self.queue_awaited_since = Some(self.now);
                self.act(Action::AwaitQueue);
            }
            Decision::Continue if is_met => self.next_round(),
            Decision::Continue => self.go_on(&end, &limits),
            // A throttle aims lower than the limit, and there is time.
            Decision::Stop if self.is_throttled_short_of_its_aim(&end, &limits) => self.go_on(&end, &limits),
            Decision::Stop => {
                let pause = end.predicted_pause();
                self.act(Action::Say(format!(
                    "stopping the guest after round {}: {} dirty pages, predicted pause {pause:.1?} ({:.1?} of it fixed), limit {:.1?}",
                    self.round, sent.dirty_pages, end.fixed, limits.downtime
                )));
                self.switch_over();
            }
            Decision::ForceStop(why) => self.force(&end, &limits, &why),
            Decision::PostCopy(why) => self.go_over(why, true),
            Decision::GiveUp(why) => self.fail(format!("the move does not converge: {why}")),
        }
    }

    /// Where the move stands after a round, or in the middle of one.
    pub(super) fn round_end(&self, sent: &RoundSent) -> RoundEnd {
        RoundEnd {
            round: self.round,
            elapsed: self.now,
            dirty_pages: sent.dirty_pages,
            wire_bytes_per_page: self.wire_bytes_per_page,
            queued_bytes: sent.queued_bytes,
            applying: sent.applying,
            switchover_bytes_per_s: self.switchover_bytes_per_s,
            fixed: self.cost.total(),
            next: None,
            met: self.course.met,
        }
    }

    pub(super) fn switch_over(&mut self) {
        if self.options.pause_before_switchover && !self.proceed {
            // While nothing is sent, a throttle is of no use.
            self.lift_throttle();
            return self.enter(Phase::PreSwitchover);
        }
        self.stop_guest();
    }

    pub(super) fn stop_guest(&mut self) {
        self.enter(Phase::Pause);
        self.paused_at = Some(self.now);
        self.guest_stopped = true;
        // Stopping the guest does it.
        self.course.lifted();
        self.act(Action::StopGuest);
    }
}
