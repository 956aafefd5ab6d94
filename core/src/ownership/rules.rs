//! The rules in force. There is one set of them; tests can plant a fault.

/// The rules that the state machines follow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Rules {
    #[cfg(test)]
    planted: Option<Plant>,
}

impl Rules {
    /// Rules with one fault, for the model check to find.
    #[cfg(test)]
    pub(super) fn planted(plant: Plant) -> Self {
        Self { planted: Some(plant) }
    }

    /// Whether the fault is planted. Outside of tests: no.
    pub(super) fn broken(self, plant: Plant) -> bool {
        #[cfg(test)]
        return self.planted == Some(plant);
        #[cfg(not(test))]
        {
            let _ = plant;
            false
        }
    }
}

/// Faults that the model check must find. Each is a mistake that somebody has made in earnest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(test, derive(strum::VariantArray, strum::Display), strum(serialize_all = "kebab-case"))]
pub(super) enum Plant {
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
    /// A restarted process runs on its predecessor's claim.
    RunOnOldClaim,
    /// A process starts whatever the newest claim says.
    StartFromAnyClaim,
}
