//! The receiving end of a move.

mod claims;
pub mod control;
mod driver;
pub mod filling;
mod populating;
pub mod receiving;
mod worker;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

pub use self::claims::ClaimOptions;
use self::driver::Driver;
pub use self::filling::Filling;
pub use self::receiving::{DestinationPages, ReceivingChannel};
use crate::link::{ControlLink, LinkEnd};

use crate::channel::{Channel, IncomingData};
use crate::machine::DestinationHost;
use crate::message::Message;
use crate::ownership::Holding;
use crate::progress::{Observer, Report};

/// The knobs of the receiving end.
#[derive(Debug, Clone)]
pub struct DestinationOptions {
    /// Own the machine but do not run it.
    pub hold: bool,
    /// This host's name, for the peer's messages.
    pub host_name: String,
    /// As whom and where machines are claimed; `None`: only machines without claims are taken in.
    pub claims: Option<ClaimOptions>,
    /// The longest that what has arrived is kept for a source whose links have broken, however long it asks for.
    pub keep_limit: Duration,
    /// Set: this process takes no machine in any more. Ends the move before *commit*.
    pub stop: Arc<AtomicBool>,
    /// Set: a person says that the copy here is never to run. Heard while the claim is undecided.
    pub abandon: Arc<AtomicBool>,
    /// How long to wait for the source's *commit* after *ready*, and for anything at all in between.
    pub silence_limit: Duration,
}

impl Default for DestinationOptions {
    fn default() -> Self {
        Self {
            hold: false,
            host_name: "destination".into(),
            claims: None,
            keep_limit: Duration::from_secs(600),
            stop: Arc::default(),
            abandon: Arc::default(),
            silence_limit: Duration::from_secs(10),
        }
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
        /// Its claims, if it has any.
        holding: Option<Arc<Holding>>,
        /// Its memory is not complete yet (post-copy): what is left to be done for that.
        filling: Option<Box<Filling>>,
        /// How it went, as seen from here.
        report: Box<Report>,
    },
    /// *Commit* had come, and the machine could not be claimed: it is another's, or nobody's yet but never this end's. It has been dropped.
    Dropped(String),
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

/// How long a peer may take to introduce itself before it is told that nobody takes its machine in, and to hear it.
const REFUSAL_LIMIT: Duration = Duration::from_secs(5);

/// Tells a peer that opened a control channel why nobody takes its machine in, and hangs up. Blocks for a few seconds at most.
pub fn refuse(control: Channel, reason: &str) {
    let (tell, hear) = mpsc::channel();
    let deadline = Instant::now() + REFUSAL_LIMIT;
    let heard = move |message: Result<Message, LinkEnd>| {
        // Once nobody waits any more there is nobody to tell.
        let _ = tell.send(message.is_ok());
    };
    let Ok(link) = ControlLink::start(control, heard) else { return };
    let wait = || hear.recv_timeout(deadline.saturating_duration_since(Instant::now())).unwrap_or(false);
    // Its first message is read before the answer: closing a connection with unread bytes in it could take the answer away.
    if wait()
        && let Ok(()) = link.send(&Message::Abort(reason.into()))
    {
        link.finish();
        while wait() {}
    }
    link.hang_up();
}
