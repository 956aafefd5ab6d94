//! What an episode will be: which faults, when, and for how long. Pure: the seed and the episode's number decide it.

use std::fmt;
use std::time::Duration;

use godwit_core::Phase;

use super::dice::Dice;
use super::kind::Kind;

/// How often each kind is drawn. Those that cost the machine a fresh start are rarer.
const WEIGHTS: [(Kind, u64); 15] = [
    (Kind::KillSource, 4),
    (Kind::KillDestination, 7),
    (Kind::StopSource, 8),
    (Kind::StopDestination, 8),
    (Kind::LinkDown, 9),
    (Kind::PacketLoss, 7),
    (Kind::HalfOpen, 9),
    (Kind::StoreUnreachableSource, 7),
    (Kind::StoreUnreachableDestination, 7),
    (Kind::StoreUncertainSource, 6),
    (Kind::StoreUncertainDestination, 6),
    (Kind::StoreSlow, 6),
    (Kind::FullDisk, 6),
    (Kind::Cancel, 5),
    (Kind::KillClient, 5),
];

/// Between the pause and *running*; the guest is paused when they begin.
const HANDOVER: [Phase; 3] = [Phase::FinalPages, Phase::State, Phase::Commit];

/// Out of 100 faults, how many are aimed at the handover. Not all meet it: a fault before may have ended the move.
const AIMED_PERCENT: u64 = 70;

/// One move and what befalls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Which move.
    pub episode: u64,
    /// The scheme of the receiver's URI.
    pub transport: &'static str,
    /// `--max-bandwidth`.
    pub cap: &'static str,
    /// `--channels`.
    pub channels: &'static str,
    /// Where the move is held for a while, so that faults can be aimed.
    pub hold: Option<Hold>,
    /// In the order of being struck.
    pub faults: Vec<Fault>,
    /// Afterwards somebody tries to start the machine a second time, which has to be refused.
    pub second_start: bool,
    /// If its owner dies, a person starts the machine at the other host.
    pub restart_elsewhere: bool,
}

/// A move that waits on entering a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    /// Which.
    pub phase: Phase,
    /// How long.
    pub lasts: Duration,
}

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// What is done.
    pub kind: Kind,
    /// When.
    pub moment: Moment,
    /// How long until it is healed, if it can be.
    pub lasts: Duration,
    /// A choice within the kind: which direction, how much.
    pub variant: u64,
}

/// When a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// So long after the move was asked for.
    After(Duration),
    /// So long after a phase was entered.
    In(Phase, Duration),
    /// So long after a held move was let go.
    Released(Duration),
}

impl Plan {
    /// The plan for one episode.
    pub fn new(seed: u64, episode: u64) -> Self {
        let mut dice = Dice::new(seed, episode);
        let hold = dice.chance(85).then(|| Hold {
            phase: dice.weighted(&[(HANDOVER[0], 1), (HANDOVER[1], 2), (HANDOVER[2], 4)]),
            lasts: dice.between(Duration::from_millis(10), Duration::from_millis(120)),
        });
        let count = dice.weighted(&[(1, 4), (2, 4), (3, 2)]);
        let mut faults: Vec<Fault> = Vec::new();
        while faults.len() < count {
            let fault = Fault::new(&mut dice, hold);
            if faults.iter().all(|other| other.kind.target() != fault.kind.target()) {
                faults.push(fault);
            }
        }
        Self {
            episode,
            transport: dice.weighted(&[("tcp", 3), ("quic", 1)]),
            cap: dice.weighted(&[("none", 3), ("1Gbit", 1), ("400Mbit", 1)]),
            channels: dice.weighted(&[("1", 3), ("2", 1)]),
            hold,
            faults,
            second_start: dice.chance(12),
            restart_elsewhere: dice.chance(40),
        }
    }
}

impl Fault {
    fn new(dice: &mut Dice, hold: Option<Hold>) -> Self {
        let kind = dice.weighted(&WEIGHTS);
        let millis = Duration::from_millis;
        let moment = Moment::new(dice, hold);
        // Mostly over soon. What outlasts the wait for *running* is what leaves the two ends without a word of each other.
        let lasts = match (dice.below(100), moment.is_at_commit(hold)) {
            (0..12, true) | (0..2, false) => dice.between(millis(4500), millis(6000)),
            (12..75, _) => dice.between(millis(10), millis(400)),
            _ => dice.between(millis(400), millis(1500)),
        };
        Self { kind, moment, lasts, variant: dice.number() }
    }
}

impl Moment {
    fn new(dice: &mut Dice, hold: Option<Hold>) -> Self {
        if !dice.chance(AIMED_PERCENT) {
            return Moment::After(dice.between(Duration::ZERO, Duration::from_millis(500)));
        }
        match hold {
            Some(hold) if dice.chance(60) => Moment::In(hold.phase, dice.between(Duration::ZERO, hold.lasts)),
            Some(_) => Moment::Released(dice.between(Duration::ZERO, Duration::from_millis(4))),
            None => Moment::In(dice.one_of(&HANDOVER), dice.between(Duration::ZERO, Duration::from_millis(2))),
        }
    }
}

impl Moment {
    /// Whether it is one at which ownership passes.
    fn is_at_commit(self, hold: Option<Hold>) -> bool {
        match self {
            Moment::After(_) => false,
            Moment::In(phase, _) => phase == Phase::Commit,
            Moment::Released(_) => hold.is_some_and(|hold| hold.phase == Phase::Commit),
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Moment::After(delay) => write!(f, "{delay:.1?} after the command"),
            Moment::In(phase, delay) => write!(f, "{delay:.1?} into {phase}"),
            Moment::Released(delay) => write!(f, "{delay:.1?} after the release"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.moment)?;
        match self.kind.is_instant() {
            true => Ok(()),
            false => write!(f, " for {:.1?}", self.lasts),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { transport, cap, channels, hold, faults, .. } = self;
        write!(f, "{transport}, cap {cap}, channels {channels}")?;
        if let Some(Hold { phase, lasts }) = hold {
            write!(f, ", held at {phase} for {lasts:.1?}")?;
        }
        faults.iter().try_for_each(|fault| write!(f, "; {fault}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_kind_is_drawn_and_most_are_aimed_at_the_handover() {
        let faults: Vec<Fault> = (0..200).flat_map(|episode| Plan::new(1, episode).faults).collect();
        for kind in Kind::all() {
            assert!(faults.iter().any(|fault| fault.kind == *kind), "{kind}");
        }
        let aimed = faults.iter().filter(|fault| !matches!(fault.moment, Moment::After(_))).count();
        assert!(aimed * 100 > faults.len() * 60, "{aimed} of {}", faults.len());
    }

    proptest! {
        #[test]
        fn the_seed_decides_and_nothing_strikes_what_is_not_there(seed: u64, episode in 0u64..10_000) {
            let plan = Plan::new(seed, episode);
            prop_assert_eq!(&plan, &Plan::new(seed, episode));
            prop_assert!((1..=3).contains(&plan.faults.len()));
            for (index, fault) in plan.faults.iter().enumerate() {
                prop_assert!(plan.faults[..index].iter().all(|other| other.kind.target() != fault.kind.target()));
                prop_assert!(plan.hold.is_some() || !matches!(fault.moment, Moment::Released(_)));
            }
        }
    }
}
