//! A move that is not going to meet its limits: noticed by the fit, and what the user has chosen is done about it.

use std::time::Duration;

use super::rounds::TELLING_ROUND_BYTES;
use super::{Action, RoundSent, SourceControl};
use crate::estimate::BETWEEN_ROUNDS;
use crate::fit::{Fit, Outlook};
use crate::memory::PAGE_SIZE;
use crate::phase::Phase;
use crate::policy::{DATA_PATH_BYTES_PER_S, Limits, RoundEnd, Stall};
use crate::predict::{PageCost, Path};
use crate::source::{OnStall, is_slow};

/// A pause that is forced begins when it is at most this much longer than the shortest that is within reach.
const GOOD_MOMENT: f64 = 1.1;
/// A round that took so long shows what leaves, even if that is little.
const TELLING_ROUND: Duration = Duration::from_millis(100);
/// Looks of the first pass are judged this far apart.
const JUDGE_INTERVAL: Duration = Duration::from_millis(500);
/// A throttle aims at this much of the downtime limit and of the time that is left: guests do not write evenly.
const AIM: f64 = 0.85;
/// The least share of time that vCPUs keep.
const LEAST_SHARE: f64 = 0.01;

/// How the move goes, as far as it is known.
pub(super) struct Course {
    fit: Fit,
    stall: Stall,
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
    share: f64,
    /// From the end of the round under way until the guest runs at the destination.
    then: Option<Duration>,
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
        self.fit.sped(1.0 / self.share);
        self.share = 1.0;
        self.then = None;
    }

    /// A round has ended, or a part of the first pass.
    pub(super) fn measured(&mut self, first: bool, sent: &RoundSent) {
        let is_telling = sent.wire_bytes >= TELLING_ROUND_BYTES || sent.duration >= TELLING_ROUND;
        if sent.pages > 0 && is_telling {
            self.bytes_per_s = Some(sent.wire_bytes as f64 / sent.duration.as_secs_f64().max(1e-9));
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

    /// The first pass has shown something. It knows only a part of memory, and that there is more to send: if the limits cannot be met
    /// even so, they cannot be met.
    pub(super) fn looked(&mut self, so_far: RoundSent) {
        if self.phase != Phase::FirstPass || !self.round_under_way {
            return;
        }
        if so_far.wire_bytes >= TELLING_ROUND_BYTES {
            self.wire_bytes_per_page = so_far.wire_bytes as f64 / so_far.pages.max(1) as f64;
        }
        self.course.measured(true, &so_far);
        let end = self.round_end(&so_far);
        self.course.fit.first_pass(so_far.seen);
        if self.now < self.course.judged_at + JUDGE_INTERVAL {
            return;
        }
        self.course.judged_at = self.now;
        let limits = self.limits();
        let Some(outlook) = self.outlook(&end, &limits) else { return };
        self.course.then = outlook.converges.then(|| outlook.total.saturating_sub(self.now));
        let why = self.course.stall.judge_look(self.now, &outlook);
        // All of memory has to be sent before the guest can stop; and what the guest does at its full speed is to be known before it is
        // throttled.
        if let (OnStall::Abort, Some(why)) = (self.options.on_stall, why) {
            self.give_up(&why);
        }
    }

    /// Lets the guest run at its full speed.
    pub(super) fn lift_throttle(&mut self) {
        if self.course.share < 1.0 {
            self.act(Action::Throttle { share: 1.0 });
        }
        self.course.lifted();
    }

    /// A round has ended: what it says of the guest.
    pub(super) fn learn(&mut self, sent: &RoundSent) {
        self.course.measured(self.round == 0, sent);
        match self.round {
            0 => self.course.fit.first_pass(sent.seen.clone()),
            _ => self.course.fit.round(sent.duration, sent.seen.clone()),
        }
    }

    /// A round has ended, and the guest cannot stop yet: on to the next one, if that leads anywhere.
    pub(super) fn go_on(&mut self, end: &RoundEnd, limits: &Limits) {
        let Some(outlook) = self.outlook(end, limits) else { return self.next_round() };
        self.course.then = outlook.converges.then_some(outlook.after_next_round);
        let throttles = self.options.on_stall == OnStall::Throttle;
        if throttles && (!outlook.converges || self.course.share < 1.0) {
            let why = outlook.why.clone().unwrap_or_default();
            self.throttle(end, limits, &why);
            return if self.ending.is_none() {
                self.next_round()
            };
        }
        let Some(why) = self.course.stall.judge_round(self.now, end.dirty_pages, &outlook) else {
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
        self.course.stall.deadline().filter(|_| self.round_under_way && self.options.on_stall == OnStall::Abort)
    }

    fn give_up(&mut self, why: &str) {
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

    /// Holds the guest to the highest speed at which the limits are met from here on.
    fn throttle(&mut self, end: &RoundEnd, limits: &Limits, why: &str) {
        let Some((cost, path)) = self.way(end) else { return };
        let highest = |limits: &Limits| self.course.fit.highest_speed(end.round, end.elapsed, cost, &path, limits);
        let target = match highest(&aim(limits, end.elapsed)) {
            Some(0.0) => highest(limits),
            target => target,
        };
        if target == Some(0.0) {
            return self.give_up(&format!("{why}; and no throttle changes that"));
        }
        let before = self.course.share;
        let speed = self.course.fit.speed();
        let share = target.map_or(1.0, |target| (before * target / speed.max(1e-6)).clamp(LEAST_SHARE, 1.0));
        self.course.share = share;
        self.course.fit.sped(share / before);
        self.course.then =
            self.outlook(end, limits).filter(|outlook| outlook.converges).map(|outlook| outlook.after_next_round);
        if share != before {
            self.act(Action::Throttle { share });
        }
        if before == 1.0 && share < 1.0 {
            self.act(Action::Say(format!(
                "throttling the guest (--on-stall throttle): {why}. Its vCPUs that write are held to {:.0} % of what they wrote, until it \
                 stops here",
                share * 100.0
            )));
        } else if before < 1.0 && share == 1.0 {
            self.act(Action::Say("the throttle is lifted: the guest writes less by itself".into()));
        }
    }

    fn outlook(&self, end: &RoundEnd, limits: &Limits) -> Option<Outlook> {
        let (cost, path) = self.way(end)?;
        self.course.fit.outlook(end.round, end.elapsed, cost, &path, limits)
    }

    /// What a page costs that is sent again, and the way it goes. `None` as long as that is not known.
    fn way(&self, end: &RoundEnd) -> Option<(PageCost, Path)> {
        let bandwidth_bytes_per_s = self.course.bytes_per_s?;
        let differences = self.options.delta_cache_bytes > 0 && is_slow(Some(bandwidth_bytes_per_s as u64));
        let wire_bytes = match differences && !self.course.again_known {
            true => self.course.again_wire_bytes?,
            false => end.wire_bytes_per_page,
        };
        let cost = PageCost { wire_bytes, pages_per_s: DATA_PATH_BYTES_PER_S / PAGE_SIZE as f64 };
        let path = Path {
            bandwidth_bytes_per_s,
            switchover_bytes_per_s: end.switchover_bytes_per_s,
            setup: Duration::ZERO,
            probe_bytes: 0.0,
            round_overhead: BETWEEN_ROUNDS + self.cost.harvest,
            fixed: end.fixed,
            queued_bytes: end.queued_bytes as f64,
        };
        Some((cost, path))
    }
}

/// The same with something in reserve.
fn aim(limits: &Limits, elapsed: Duration) -> Limits {
    let timeout = limits.timeout.map(|timeout| elapsed + timeout.saturating_sub(elapsed).mul_f64(AIM));
    Limits { downtime: limits.downtime.mul_f64(AIM), timeout, ..*limits }
}
