//! The control socket: QMP, as QEMU's clients speak it.
//!
//! [`message`] knows the messages and [`mod@line`] the framing; [`server`] answers any number of clients, each with a
//! bounded [`outbox`], and [`client`] is the other end.

pub mod client;
pub mod line;
pub mod message;
pub mod outbox;
pub mod server;
pub mod socket;

pub use client::{Client, ClientError, Event};
pub use message::{Answer, Arguments, ErrorClass, QmpError};
pub use outbox::Hub;
pub use server::{Caller, Handler, Server};
