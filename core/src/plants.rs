//! Planted faults: mistakes that somebody has made in earnest, made here on purpose, so that the model check and the
//! simulator can show that they would find them.
//!
//! They are there only in tests of this crate and with the feature `plants`, which nothing but `cargo xtask simulate` switches on.
//! Everywhere else `planted` is a constant `false`, and the compiler leaves the faults out.

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(
    any(test, feature = "plants"),
    derive(strum::VariantArray, strum::Display, strum::EnumString, strum::EnumMessage),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Plant {
    /// The destination claims when it is ready, not when it is told to.
    ClaimBeforeCommit,
    /// The destination runs the guest while its claim is on its way.
    RunBeforeClaim,
    /// The source resumes when the destination is lost, and claims nothing.
    ResumeWithoutClaim,
    /// The source looks for the destination's claim, sees none and resumes.
    TrustAbsence,
    /// Whoever finds its epoch taken claims the next instead.
    ForgetEpoch,
    /// A call that timed out counts as one that did nothing.
    TimeoutIsFailure,
    /// A call that timed out counts as one that succeeded.
    TimeoutIsSuccess,
    /// A call that did nothing clears up the doubt about an earlier one.
    ForgetDoubt,
    /// Our own claim, found in the store, is taken for somebody else's.
    IgnoreOwnNonce,
    /// The source takes the destination's claim for the guest running there.
    ClaimIsMoved,
    /// The source resumes on a person's word, and claims nothing.
    ForceWithoutClaim,
    /// A restarted process runs on its predecessor's claim.
    RunOnOldClaim,
    /// A process starts whatever the newest claim says.
    StartFromAnyClaim,

    /// The dirty log is cleared of more than was taken to be sent.
    ClearBeforeHarvest,
    /// Pages are copied first, and then cleared in the dirty log.
    CopyBeforeClear,
    /// Whether a page was ever touched is looked at before it is cleared in the dirty log.
    JudgeBeforeClear,
    /// The first pass leaves out a page that was touched.
    LeaveOutTouched,
    /// A harvest sets the pending bits instead of adding to them.
    HarvestOverwrites,
    /// What the VMM itself has written is not harvested.
    ForgetVmmWrites,
    /// A data channel stops without its END.
    SkipEnd,
    /// One acknowledgement counts for all that was sent.
    AcknowledgeTooMuch,
    /// What was under way when the link broke counts as arrived.
    ForgetUnacknowledged,
    /// A page that was half written when the link broke counts as what was there before.
    TrustTornPages,
    /// Differences are sent to what was last sent before the link broke, whether it has arrived or not.
    ReuseDeltaBase,
    /// The last harvest comes before the state is saved.
    HarvestBeforeSave,
    /// The page tables are not compared.
    IgnoreTable,
    /// State is loaded before every data channel has ended.
    LoadBeforeEnd,
    /// The destination is ready without having loaded the state.
    ReadyBeforeLoad,
    /// A move can be cancelled after *commit*.
    CancelAfterCommit,

    /// A move that has come to nothing leaves the guest throttled.
    KeepThrottle,
    /// The source lets the guest run on when it loses the destination in post-copy.
    ResumeInPostCopy,
    /// A page that is missing counts as there as soon as it has been asked for.
    ForgetMissingPage,
    /// After a break in post-copy the source goes by what it has sent, not by what the destination says it lacks.
    TrustWhatWasSent,
    /// What had been asked for before a break in post-copy is not asked for again.
    ForgetWanted,
}

/// Whether this fault is planted. A constant `false` in whatever is shipped.
#[cfg(not(any(test, feature = "plants")))]
pub(crate) const fn planted(_: Plant) -> bool {
    false
}

#[cfg(any(test, feature = "plants"))]
mod switch {
    use std::cell::Cell;

    use strum::{EnumMessage, VariantArray};

    use super::Plant;

    thread_local! {
        static PLANTED: Cell<Option<Plant>> = const { Cell::new(None) };
    }

    impl Plant {
        /// Every fault.
        pub fn all() -> &'static [Self] {
            Self::VARIANTS
        }

        /// Whether it breaks the rules by which ownership passes: then the model check finds it, too.
        pub fn breaks_the_rules(self) -> bool {
            self as usize <= Self::StartFromAnyClaim as usize
        }

        /// What is wrong with it, in a sentence.
        pub fn describe(self) -> &'static str {
            self.get_documentation().unwrap_or_default()
        }
    }

    /// Whether this fault is planted.
    pub(crate) fn planted(plant: Plant) -> bool {
        PLANTED.get() == Some(plant)
    }

    /// Plants a fault for all that this thread does from here on, or none.
    pub fn plant(plant: Option<Plant>) {
        PLANTED.set(plant);
    }

    /// The fault that is planted.
    pub(crate) fn current() -> Option<Plant> {
        PLANTED.get()
    }
}

#[cfg(any(test, feature = "plants"))]
pub use switch::plant;
#[cfg(any(test, feature = "plants"))]
pub(crate) use switch::{current, planted};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_planted_for_one_thread_and_nothing_else_breaks() {
        plant(Some(Plant::ForgetEpoch));
        assert!(planted(Plant::ForgetEpoch) && !planted(Plant::ClaimBeforeCommit));
        assert!(!std::thread::spawn(|| planted(Plant::ForgetEpoch)).join().unwrap());
        plant(None);
        assert!(!planted(Plant::ForgetEpoch));
        assert!(Plant::all().iter().all(|plant| !plant.describe().is_empty()));
    }
}
