//! The same guest moved by Godwit and by QEMU in turn, case by case.
//!
//! | module | what |
//! |---|---|
//! | [`case`] | which guests over which links |
//! | [`settings`] | what QEMU is given to be at its best |
//! | [`moving`] | one move by either, seen from outside |
//! | [`compare`] | the tournament for QEMU's settings, then pairs |
//! | [`limits`] | what the machine itself allows, measured in the same run |

pub mod case;
pub mod compare;
pub mod limits;
pub mod moving;
pub mod settings;
mod watch;
