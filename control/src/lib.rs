//! Godwit's control plane towards people and programs.
//!
//! | module | what |
//! |---|---|
//! | [`qmp`] | the control socket: QMP messages, server and client |
//! | [`units`] | numbers with their units, as options and files write them |

pub mod qmp;
pub mod units;
