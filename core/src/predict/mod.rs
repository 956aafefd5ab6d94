//! How a move will go, before it begins: pure arithmetic on what is known of a guest and of the way to its destination.
//!
//! | part | what |
//! |---|---|
//! | [`Dirtying`] | U(t): how many different pages the guest dirties in a window |
//! | [`Contents`] | what its pages cost on the wire |
//! | [`predict()`] | plays the rounds, by the stop rule of [`crate::policy`] itself |
//! | [`predict_from`] | plays the rounds that are still to come, from where a move stands |
//! | [`Forecast`] | that, with an error band, how near the border it is, and the shortest pause within reach |
//! | [`highest_speed`] | the other way round: how fast the guest may write for the limits to be met |
//! | [`throttled_share`] | the same from where a move stands, with a throttle's reserve |
//! | [`wan`] | what delay and loss leave of a link's bandwidth |
//!
//! docs/convergence.md tells the model and where it is wrong.

mod contents;
mod curve;
mod forecast;
mod rounds;
#[cfg(test)]
mod tests;
pub mod wan;

pub use self::contents::{Contents, Encoded, PageCost};
pub use self::curve::Dirtying;
pub use self::forecast::{Band, Cell, Forecast, Row, Throttle, highest_speed, table, throttled_share};
pub use self::rounds::{
    Path, PredictedRound, Prediction, Standing, Workload, Zone, dirty_after_round, next_round, predict, predict_from,
    shortest_pause, standing_after,
};
