//! The receiving end of a move.

mod control;
mod driver;
mod worker;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use self::driver::Driver;

use crate::channel::{Channel, IncomingData};
use crate::machine::DestinationHost;
use crate::message::Message;
use crate::progress::{Observer, Report};

/// The knobs of the receiving end.
#[derive(Debug, Clone)]
pub struct DestinationOptions {
    /// Own the machine but do not run it.
    pub hold: bool,
    /// This host's name, for the peer's messages.
    pub host_name: String,
    /// How long to wait for the source's *commit* after *ready*, and for anything at all in between.
    pub silence_limit: Duration,
}

impl Default for DestinationOptions {
    fn default() -> Self {
        Self { hold: false, host_name: "destination".into(), silence_limit: Duration::from_secs(10) }
    }
}

/// How taking a machine in ended.
#[derive(Debug)]
pub enum DestinationOutcome<M> {
    /// This end owns the machine. `running` is false if it is held or came paused.
    Owned {
        /// The machine.
        machine: M,
        /// Whether its vCPUs run.
        running: bool,
        /// How it went, as seen from here.
        report: Report,
    },
    /// It came to nothing and the source keeps the machine (or it was only a dry run, or the peer was not one of
    /// ours). Listen again.
    Ended(String),
}

/// Takes one machine in over `control`. Blocks until it is owned or the attempt has ended.
pub fn receive<H: DestinationHost>(
    control: Channel,
    data: &mut dyn IncomingData,
    host: &mut H,
    options: &DestinationOptions,
    observer: Arc<dyn Observer>,
) -> DestinationOutcome<H::Machine> {
    match Driver::new(control, data, host, options, observer) {
        Ok(driver) => driver.run(),
        Err(error) => DestinationOutcome::Ended(format!("cannot begin to take a machine in: {error}")),
    }
}

/// Tells a peer that opened a control channel why nobody takes its machine in, and hangs up.
pub fn refuse(mut control: Channel, reason: &str) {
    let told = Message::Abort(reason.into()).encode().map_err(io::Error::other);
    let told = told.and_then(|frame| control.writer.write_all(&frame)).and_then(|()| control.writer.finish());
    if let Err(error) = told {
        tracing::debug!("{} could not be told why it is turned away: {error}", control.peer);
    }
    control.hang_up.hang_up();
}
