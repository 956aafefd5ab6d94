//! Moves that may or may not converge, predicted before they begin and measured from outside.
//!
//! | module | what |
//! |---|---|
//! | [`point`] | guests and links, drawn from ranges by a seed |
//! | [`running`] | one point: boot, estimate, write the prediction down, move |
//! | [`moving`] | one move, seen from outside |
//! | [`policy`] | a guest that does not converge, moved once more by `--on-stall` |
//! | [`own_machine`] | the same with a machine that somebody already runs |
//! | [`rate`] | how fast the guest writes through the move |
//! | [`score`] | how right the predictions were: pure arithmetic |

pub mod moving;
pub mod own_machine;
pub mod point;
pub mod policy;
pub mod rate;
pub mod running;
pub mod score;
