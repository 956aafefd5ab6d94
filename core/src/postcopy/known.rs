//! Whether the source knows what is missing at the destination.
//!
//! At first it is what is pending. Once links have broken nobody knows what of it has arrived: the destination says so, in parts, and
//! that is pending from then on, and nothing else.

use super::missing::{BadMissing, Missing};
use crate::layout::Layout;
use crate::pending::Pending;
use crate::plants::{Plant, planted};

/// What is known.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// What is pending is missing.
    #[default]
    All,
    /// The destination is about to say what is.
    Nothing,
    /// It has begun to.
    InPart,
}

impl Known {
    /// The destination says what it lacks, or a part of it, as it does whenever links were made anew. It then is pending.
    pub fn told(&mut self, part: &Missing, layout: &Layout, pending: &Pending) -> Result<(), BadMissing> {
        let stripes = part.stripes(layout)?;
        if !planted(Plant::TrustWhatWasSent) {
            if *self == Self::Nothing {
                pending.clear();
            }
            for (stripe, bits) in stripes {
                pending.merge(stripe, &bits);
            }
        }
        *self = if part.last { Self::All } else { Self::InPart };
        Ok(())
    }
}
