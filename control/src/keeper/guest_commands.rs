//! The commands about the workload guest.

use std::sync::Arc;

use super::commands::NoArguments;
use super::state::Shared;
use crate::qmp::message::arguments;
use crate::qmp::{Answer, Arguments, QmpError};

pub(super) fn guest(_shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    Err(QmpError::generic("the machine does not run the workload guest"))
}

pub(super) fn check(_shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    Err(QmpError::generic("the machine does not run the workload guest"))
}
