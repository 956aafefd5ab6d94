//! Post-copy: the guest runs at the destination already, and the pages that it lacks follow.
//!
//! ```text
//!  destination                                   source
//!  touches a page that is missing ── frame ──→   sends that page at once       over the fault channel
//!  puts pages in place            ←── page ───   sends all others, those near   over the push channel
//!                                                recent faults first
//! ```
//!
//! The source knows what is missing as well as the destination does: both began with the same pages ([`Missing`]), and whenever
//! their links were made anew the destination says again what it lacks. So nothing has to be acknowledged, and a page that
//! comes twice is put in place once.
//!
//! What is here is pure: driven by threads in `source` and `destination`.

mod known;
mod latency;
mod missing;
mod order;
mod record;
mod wanted;

#[cfg(test)]
mod tests;

pub use self::known::Known;
pub use self::latency::Latencies;
pub use self::missing::{BadMissing, Missing, missing_parts};
pub use self::order::PushOrder;
pub use self::record::{BadRecord, RECORD_BYTES, REQUEST_BYTES, Record, RecordKind};
pub use self::wanted::{Answer, Wanted};

/// The two channels that post-copy uses beside the control channel, by their distance from the number of data channels before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageChannel {
    /// Frames that are needed at once, and those pages.
    Fault,
    /// All other pages.
    Push,
}

impl PageChannel {
    /// How many there are.
    pub const COUNT: u16 = 2;

    /// The index by which it is opened, in a move with so many data channels.
    pub fn index(self, data_channels: u16) -> u16 {
        data_channels + self as u16
    }
}
