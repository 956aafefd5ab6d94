//! The rules in force. There is one set of them; tests can plant a fault.

use crate::plants::Plant;

/// The rules that the state machines follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(not(any(test, feature = "plants")), derive(Default))]
pub struct Rules {
    #[cfg(any(test, feature = "plants"))]
    planted: Option<Plant>,
}

/// With the fault that is planted for this thread, if any.
#[cfg(any(test, feature = "plants"))]
impl Default for Rules {
    fn default() -> Self {
        Self { planted: crate::plants::current() }
    }
}

impl Rules {
    /// Rules with one fault, for the model check to find.
    #[cfg(test)]
    pub(super) fn planted(plant: Plant) -> Self {
        Self { planted: Some(plant) }
    }

    /// Whether the fault is planted. Outside of tests: no.
    pub(super) fn broken(self, plant: Plant) -> bool {
        #[cfg(any(test, feature = "plants"))]
        return self.planted == Some(plant);
        #[cfg(not(any(test, feature = "plants")))]
        crate::plants::planted(plant)
    }
}
