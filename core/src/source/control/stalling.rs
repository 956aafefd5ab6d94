//! A move that is not going to meet its limits: noticed by the fit, and what the user has chosen is done about it.

use std::time::Duration;

use super::rounds::TELLING_ROUND_BYTES;
use super::{Action, RoundSent, SourceControl};
use crate::estimate::BETWEEN_ROUNDS;
use crate::fit::{Ahead, Fit, Outlook};
use crate::machine::Hold;
use crate::memory::PAGE_SIZE;
use crate::phase::Phase;
use crate::policy::{DATA_PATH_BYTES_PER_S, Limits, Met, NextRound, RoundEnd, Stall, THROTTLED_AFTER};
use crate::predict::{PageCost, Path};
use crate::source::{OnStall, is_slow};

/// A pause that is forced begins when it is at most this much longer than the shortest that is within reach.
const GOOD_MOMENT: f64 = 1.1;
/// After so many rounds that do not lead to the limits, the first pass among them, in a row or not, a guest is throttled.
const DOUBTFUL_ROUNDS: u32 = 2;
/// A round that took so long shows what leaves, even if that is little.
const TELLING_ROUND: Duration = Duration::from_millis(100);
/// A throttle was in vain if the guest writes less by not even so much of what it should.
const OF_EFFECT: f64 = 0.5;
/// The first pass is judged this far apart: a throttle takes two judgements in a row.
pub(super) const JUDGE_INTERVAL: Duration = Duration::from_millis(THROTTLED_AFTER.as_millis() as u64 / 2);

/// How the move goes, as far as it is known.
pub(super) struct Course {
    pub(super) fit: Fit,
    pub(super) stall: Stall,
    /// What leaves, as the last round that was telling has shown.
    bytes_per_s: Option<f64>,
    /// Some round has shown what pages cost that are sent again.
    again_known: bool,
    /// As long as none has: their bytes on the wire where differences may be sent instead, if the first pass has shown that.
    again_wire_bytes: Option<f64>,
    judged_at: Duration,
    /// A pause is to be forced at the next good moment, why.
    forcing: Option<String>,
    /// Of their time, what the vCPUs that write are left.
    pub(super) share: f64,
    /// What was last asked for.
    pub(super) hold: Hold,
    /// When the downtime limit was met.
    pub(super) met: Option<Met>,
    /// Rounds at whose end the limits were not going to be met.
    doubtful_rounds: u32,
    /// What the guest was left of its time in the last round, and how fast it wrote: as many times as in the first pass.
    wrote: Option<(f64, f64)>,
    /// It was left less than before, and wrote as much: it has time to spare.
    pub(super) in_vain: bool,
    /// From the end of the round under way until the guest runs at the destination.
    pub(super) then: Option<Duration>,
}

impl Default for Course {
    fn default() -> Self {
        Self {
            fit: Fit::default(),
            stall: Stall::default(),
            bytes_per_s: None,
            again_known: false,
            again_wire_bytes: None,
            judged_at: Duration::ZERO,
            forcing: None,
            share: 1.0,
            hold: Hold::NONE,
            met: None,
            doubtful_rounds: 0,
            wrote: None,
            in_vain: false,
            then: None,
        }
    }
}

impl Course {
    /// The links broke: what the round under way had shown does not count any more.
    pub(super) fn broken(&mut self) {
        self.stall.forget();
        self.fit.interrupted();
        self.then = None;
    }

    /// The guest runs at its full speed.
    pub(super) fn lifted(&mut self) {
        (self.share, self.hold) = (1.0, Hold::NONE);
        self.then = None;
    }

    /// A round has ended in which the guest was left [`Course::share`].
    fn compare(&mut self) {
        let writing = self.share * self.fit.speed();
        self.in_vain = self.wrote.is_some_and(|(share, before)| {
            let fall = 1.0 - self.share / share;
            fall > 0.0 && writing > before * (1.0 - OF_EFFECT * fall)
        });
        self.wrote = Some((self.share, writing));
    }

    /// A round has ended, or a part of the first pass.
    pub(super) fn measured(&mut self, first: bool, sent: &RoundSent) {
        let is_telling = sent.wire_bytes >= TELLING_ROUND_BYTES || sent.duration >= TELLING_ROUND;
        if sent.pages > 0 && is_telling {
            let per_s = |bytes: u64| bytes as f64 / sent.duration.as_secs_f64().max(1e-9);
            // Where nobody has waited for the link, pages that are hardly any bytes take the time of whole ones at most.
            let bytes_per_s = match sent.by_pages {
                true => per_s(sent.pages * PAGE_SIZE as u64).min(DATA_PATH_BYTES_PER_S).max(per_s(sent.wire_bytes)),
                false => per_s(sent.wire_bytes),
            };
            self.bytes_per_s = Some(bytes_per_s);
            self.again_known |= !first;
        }
        self.again_wire_bytes = sent.seen.again_wire_bytes;
    }
}

impl SourceControl {
    /// From the end of the round under way until the guest runs at the destination, if that can be told.
    pub fn after_this_round(&self) -> Option<Duration> {
        self.course.then
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            downtime: self.options.downtime_limit,
            max_rounds: self.options.max_rounds,
            timeout: self.options.timeout,
            on_stall: self.options.on_stall,
        }
    }

    /// The first pass has shown something. Of memory that it has not reached nothing is known, and it is taken to be left alone: if the
    /// limits cannot be met even so, they cannot be met.
    pub(super) fn looked(&mut self, so_far: RoundSent) {
        if self.phase != Phase::FirstPass || !self.round_under_way {
            return;
        }
        if so_far.wire_bytes >= TELLING_ROUND_BYTES {
            self.wire_bytes_per_page = so_far.wire_bytes as f64 / so_far.pages.max(1) as f64;
        }
        if self.options.switchover_bandwidth_bytes_per_s.is_none() {
            // What has arrived the link takes at least, whatever a probe has shown.
            let arrived = so_far.wire_bytes.saturating_sub(so_far.queued_bytes) as f64;
            let rate = arrived / so_far.duration.as_secs_f64().max(1e-9);
            self.switchover_bytes_per_s = self.switchover_bytes_per_s.max(rate);
        }
        self.course.measured(true, &so_far);
        let end = self.round_end(&so_far);
        self.course.fit.first_pass(so_far.seen);
        if self.now < self.course.judged_at.max(self.phase_since) + JUDGE_INTERVAL {
            return;
        }
        self.course.judged_at = self.now;
        let limits = self.limits();
        let Some(outlook) = self.outlook(&end, &limits.to_judge_by()) else { return };
        self.course.then = outlook.converges.then_some(outlook.after_next_round);
        let why = self.course.stall.judge_look(self.now, &outlook);
        // What remains is least at the end of a round: only there a guest is stopped.
        match (self.options.on_stall, why) {
            _ if !self.options.stall_detection => {}
            (OnStall::Abort, Some(why)) => self.give_up(&why),
            (OnStall::Throttle, _) => self.throttle_in_first_pass(&end, &limits),
            _ => {}
        }
    }

    /// A round has ended: what it says of the guest.
    pub(super) fn learn(&mut self, sent: &RoundSent) {
        self.course.measured(self.round == 0, sent);
        match self.round {
            0 => self.course.fit.first_pass(sent.seen.clone()),
            _ => self.course.fit.round(sent.seen.clone()),
        }
        self.course.compare();
    }

    /// A round has ended, and the guest cannot stop yet: on to the next one, if that leads anywhere.
    pub(super) fn go_on(&mut self, end: &RoundEnd, limits: &Limits) {
        let Some(outlook) = self.outlook(end, &limits.to_judge_by()) else { return self.next_round() };
        self.course.then = outlook.converges.then_some(outlook.after_next_round);
        if !self.options.stall_detection {
            return self.next_round();
        }
        let throttles = self.options.on_stall == OnStall::Throttle;
        let stalled = match self.course.stall.judge_round(self.now, end.dirty_pages, &outlook) {
            None if throttles && end.round == 0 => self.clear_in_first_pass(),
            stalled => stalled,
        };
        let has_stood = self.course.stall.has_stood(self.now);
        self.course.doubtful_rounds += u32::from(!outlook.converges);
        // A throttle can be taken back after the next round: it does not wait for two judgements in a row. Writers that go through memory from
        // front to back leave now more, now less, and the budget would be used up: once they are known as such, no round is waited for.
        let known = !outlook.converges && self.course.fit.front_pages_per_s().is_some();
        let doubtful = known || self.course.doubtful_rounds >= DOUBTFUL_ROUNDS;
        if throttles && (stalled.is_some() || doubtful || self.course.share < 1.0) {
            let certain = stalled.is_some() && has_stood;
            return self.throttle_after_round(end, limits, certain, &stalled.or(outlook.why).unwrap_or_default());
        }
        let Some(why) = stalled.filter(|_| has_stood) else {
            self.course.forcing = None;
            return self.next_round();
        };
        match self.options.on_stall {
            OnStall::Force => self.force_or_wait(end, limits, &outlook, why),
            OnStall::PostCopy => self.go_over(why, true),
            OnStall::Abort | OnStall::Throttle => self.give_up(&why),
        }
    }

    /// A doubt has become a certainty in the middle of a round.
    pub(super) fn stalled_meanwhile(&mut self) {
        if let Some(why) = self.course.stall.check(self.now) {
            self.give_up(&why);
        }
    }

    /// When a doubt becomes a certainty in the middle of a round. A throttle does not wait for that, and what remains is least at the end
    /// of a round: only a move that is to be given up is.
    pub(super) fn certain_at(&self) -> Option<Duration> {
        let gives_up = self.options.stall_detection && self.options.on_stall == OnStall::Abort;
        self.course.stall.deadline().filter(|_| self.round_under_way && gives_up)
    }

    pub(super) fn give_up(&mut self, why: &str) {
        self.fail(format!("the move does not converge: {why}"));
    }

    /// The guest is to stop although the limit is not met; at the end of a round that leaves about as little as any will.
    fn force_or_wait(&mut self, end: &RoundEnd, limits: &Limits, outlook: &Outlook, why: String) {
        let pause = end.predicted_pause();
        if pause <= outlook.shortest_pause.mul_f64(GOOD_MOMENT) {
            return self.force(end, limits, &why);
        }
        if self.course.forcing.is_none() {
            self.act(Action::Say(format!(
                "stalled: {why}. The pause would take {pause:.1?} now; rounds to come leave less, down to {:.1?}",
                outlook.shortest_pause
            )));
        }
        self.course.forcing = Some(why);
        self.next_round();
    }

    /// Stops the guest although the limit is not met.
    pub(super) fn force(&mut self, end: &RoundEnd, limits: &Limits, why: &str) {
        self.act(Action::Say(format!(
            "stopping the guest all the same (--on-stall force): predicted pause {:.1?} ({:.1?} of it fixed), limit {:.1?}: {why}",
            end.predicted_pause(),
            end.fixed,
            limits.downtime
        )));
        self.switch_over();
    }

    pub(super) fn outlook(&self, end: &RoundEnd, limits: &Limits) -> Option<Outlook> {
        self.course.fit.outlook(&self.ahead(end, limits)?)
    }

    /// What another round would come to. Nothing that a guest that is held should wait for once its limit is met.
    pub(super) fn next_round_is(&self, end: &RoundEnd) -> Option<NextRound> {
        if self.course.share < 1.0 {
            return None;
        }
        // Where differences may be sent and nobody knows how short they are, pages cost no more than they did.
        let again_bytes = self.again_wire_bytes(end).unwrap_or(end.wire_bytes_per_page);
        self.course.fit.next_round(&self.ahead_at(again_bytes, end, &self.limits())?)
    }

    pub(super) fn throttled_share(&self, end: &RoundEnd, limits: &Limits) -> Option<f64> {
        self.course.fit.throttled_share(&self.ahead(end, limits)?)
    }

    /// Where the move stands, what pages cost, and the way that they go. `None` as long as that is not known.
    fn ahead(&self, end: &RoundEnd, limits: &Limits) -> Option<Ahead> {
        self.ahead_at(self.again_wire_bytes(end)?, end, limits)
    }

    /// Bytes on the wire of a page that is sent again. `None` as long as that is not known.
    fn again_wire_bytes(&self, end: &RoundEnd) -> Option<f64> {
        let differences = self.options.delta_cache_bytes > 0 && is_slow(Some(self.course.bytes_per_s? as u64));
        match differences && !self.course.again_known {
            true => self.course.again_wire_bytes,
            false => Some(end.wire_bytes_per_page),
        }
    }

    fn ahead_at(&self, again_bytes: f64, end: &RoundEnd, limits: &Limits) -> Option<Ahead> {
        let bandwidth_bytes_per_s = self.course.bytes_per_s?;
        let cost = |wire_bytes: f64| PageCost { wire_bytes, pages_per_s: DATA_PATH_BYTES_PER_S / PAGE_SIZE as f64 };
        let path = Path {
            bandwidth_bytes_per_s,
            switchover_bytes_per_s: end.switchover_bytes_per_s,
            setup: Duration::ZERO,
            probe_bytes: 0.0,
            round_overhead: BETWEEN_ROUNDS + self.cost.harvest,
            fixed: end.fixed,
            queued_bytes: end.queued_bytes as f64,
        };
        Some(Ahead {
            round: end.round,
            elapsed: end.elapsed,
            share: self.course.share,
            first: cost(end.wire_bytes_per_page),
            again: cost(again_bytes),
            path,
            limits: *limits,
        })
    }
}
