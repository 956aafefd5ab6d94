//! The phases of a move, as the source lives through them.

use serde::{Deserialize, Serialize};

/// Where a move stands, in order. The guest runs at the source up to and including [`Phase::PreSwitchover`], and
/// whatever fails up to and including [`Phase::State`] leaves it there.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    strum::VariantArray,
    strum::Display,
    strum::EnumString,
    strum::IntoStaticStr,
)]
#[strum(serialize_all = "kebab-case")]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Opening the control channel.
    Connect,
    /// Versions, features and clocks.
    Handshake,
    /// Every reason for which the move would fail is collected; nothing has changed yet.
    Preflight,
    /// The destination builds the machine and loads a rehearsal of its state; data channels are opened.
    Prepare,
    /// The first pass over all of memory (round 0).
    FirstPass,
    /// Rounds over the pages dirtied since.
    Rounds,
    /// Converged, waiting for `continue`.
    PreSwitchover,
    /// The guest is being paused, its disks drained and flushed.
    Pause,
    /// The last dirty pages are sent, without cap.
    FinalPages,
    /// The page tables are compared, device state is sent and loaded; ends with the destination's *ready*.
    State,
    /// *commit* has been sent; ends with *running*. No way back from here. In post-copy the guest's memory is not complete yet.
    Commit,
    /// The destination runs the guest, and the pages that it lacks follow.
    #[strum(serialize = "postcopy")]
    #[serde(rename = "postcopy")]
    PostCopy,
    /// The same, with a broken link that is made anew: the guest runs until it needs a page that is missing.
    #[strum(serialize = "postcopy-paused")]
    #[serde(rename = "postcopy-paused")]
    PostCopyPaused,
    /// The destination runs the guest, and all of its memory is there.
    Completed,
}

impl Phase {
    /// All phases, in order.
    pub fn all() -> &'static [Phase] {
        <Phase as strum::VariantArray>::VARIANTS
    }

    /// Whether a move in this phase can still be called off.
    pub fn before_commit(self) -> bool {
        self < Phase::Commit
    }

    /// Whether the guest is stopped at the source in this phase.
    pub fn guest_paused(self) -> bool {
        self >= Phase::Pause
    }
}
