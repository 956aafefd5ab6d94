//! Holding the guest to what it may write for the limits to be met.

use super::stalling::JUDGE_INTERVAL;
use super::{Action, SourceControl};
use crate::machine::Hold;
use crate::policy::{Limits, RoundEnd};

/// The least share of time that vCPUs keep.
const LEAST_SHARE: f64 = 0.01;

/// Once what was aimed at has been missed, each round leaves the guest so much of what the one before did: the model is wrong about it.
const LESS: f64 = 0.5;

/// One round that leaves little does not lift a throttle: the next may leave a lot again. It gives back so many times what the guest was left.
const MORE: f64 = 2.0;

/// A guest that wrote as much as before in less time has time to spare, and how much nobody knows: it is left so much of what would be right
/// if it had none.
const SPARE: f64 = 0.5;

/// A guest that is busy all the time is held by its time alone, which is exact; only one that gets as much done in less comes up against its pages.
const FREE_PLAY: f64 = 1.15;

impl SourceControl {
    /// Two judgements in a row were clear.
    pub(super) fn clear_in_first_pass(&self) -> Option<String> {
        self.course.stall.clear_for(self.now, JUDGE_INTERVAL).map(str::to_owned)
    }

    /// A throttle that begins early can be a weak one.
    pub(super) fn throttle_in_first_pass(&mut self, end: &RoundEnd, limits: &Limits) {
        let clear = self.clear_in_first_pass();
        if self.course.share == 1.0 && clear.is_none() {
            return;
        }
        match self.throttled_share(end, limits) {
            // The first pass has not shown everything yet.
            None | Some(0.0) => {}
            Some(share) => self.throttle(share, end, limits, &clear.unwrap_or_default()),
        }
    }

    /// A round has ended that does not lead to the limits, or would not without a throttle: why. `certain`: rounds have borne that out.
    pub(super) fn throttle_after_round(&mut self, end: &RoundEnd, limits: &Limits, certain: bool, why: &str) {
        let [aim, ..] = limits.aims();
        match self.throttled_share(end, limits) {
            None => {}
            Some(_) if aim.are_spent(end) => self.throttle(self.course.share * LESS, end, limits, why),
            Some(0.0) if certain => return self.give_up(&format!("{why}; and no throttle changes that")),
            Some(0.0) => {}
            Some(share) if self.course.in_vain => self.throttle(share * SPARE, end, limits, why),
            Some(share) if self.course.share < 1.0 => {
                self.throttle(share.min(MORE * self.course.share), end, limits, why)
            }
            Some(share) => self.throttle(share, end, limits, why),
        }
        self.next_round();
    }

    /// The guest is held, and its pause, if it began now, would meet the limit with less in reserve than there is time for: predictions are
    /// off by a few percent.
    pub(super) fn is_throttled_short_of_its_aim(&self, end: &RoundEnd, limits: &Limits) -> bool {
        let aim = limits.aims().into_iter().find(|aim| !aim.are_spent(end));
        self.course.share < 1.0 && aim.is_some_and(|aim| end.predicted_pause() > aim.downtime)
    }

    /// Leaves the guest this share of its time, from now on; why it needs a throttle.
    fn throttle(&mut self, share: f64, end: &RoundEnd, limits: &Limits, why: &str) {
        let share = share.clamp(LEAST_SHARE, 1.0);
        let pages_per_s = self.course.fit.front_pages_per_s().filter(|_| share < 1.0);
        let hold = Hold { share, pages_per_s: pages_per_s.map(|all| share * FREE_PLAY * all) };
        let before = std::mem::replace(&mut self.course.share, share);
        if self.course.hold != hold {
            self.course.hold = hold;
            self.act(Action::Throttle(hold));
        }
        let outlook = self.outlook(end, limits).filter(|outlook| outlook.converges);
        self.course.then = outlook.map(|outlook| outlook.after_next_round);
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

    /// Lets the guest run at its full speed.
    pub(super) fn lift_throttle(&mut self) {
        if self.course.share < 1.0 {
            self.act(Action::Throttle(Hold::NONE));
        }
        self.course.lifted();
    }
}
