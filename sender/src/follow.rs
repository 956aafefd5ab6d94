//! Follows a move through its events to its end.

use std::process::ExitCode;
use std::time::Duration;

use godwit_control::console::{EXIT_INTERNAL, out, say};
use godwit_control::display::Display;
use godwit_control::outcome::{Outcome, OutcomeKind};
use godwit_control::qmp::{Client, ClientError, Event};
use godwit_control::summary::summary;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::Failure;
use crate::interrupt::Interrupts;

/// How long an interrupt may go unnoticed.
const POLL: Duration = Duration::from_millis(50);

/// What an interrupt means to a move that is being followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnInterrupt {
    /// The first calls the move off, the second leaves it to itself.
    Cancel,
    /// Leave it to itself.
    Leave,
}

/// What came of following a move.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Followed {
    /// It has ended like this.
    Ended(Box<Outcome>),
    /// It has ended, and nobody told how.
    Lost,
    /// It goes on without us.
    Left,
}

impl Followed {
    /// For a command that wanted the move.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Followed::Ended(outcome) => outcome.outcome.exit_code(),
            Followed::Lost => OutcomeKind::Unknown.exit_code(),
            Followed::Left => ExitCode::from(EXIT_INTERNAL),
        }
    }

    /// For a command that wanted it cancelled.
    pub(crate) fn exit_code_of_cancel(&self) -> ExitCode {
        match self {
            Followed::Ended(outcome) if outcome.outcome == OutcomeKind::Cancelled => ExitCode::SUCCESS,
            _ => ExitCode::from(EXIT_INTERNAL),
        }
    }
}

/// Follows move `number` until it has ended; tells everything about it.
pub(crate) fn follow(
    client: &mut Client,
    number: u64,
    json: bool,
    interrupts: &Interrupts,
    on_interrupt: OnInterrupt,
) -> Result<Followed, Failure> {
    let mut display = Display::new();
    let mut heeded = 0;
    loop {
        if interrupts.number() > heeded {
            heeded += 1;
            if on_interrupt == OnInterrupt::Leave || heeded > 1 {
                display.end();
                say("left: the move goes on by itself; `godwit-sender status --watch` joins it again");
                return Ok(Followed::Left);
            }
            match client.execute("migrate_cancel", json!({})) {
                Ok(_) => display.line("cancelling (Ctrl-C once more leaves the move to itself)"),
                Err(ClientError::Command(error)) => display.line(&format!("not cancelled: {error}")),
                Err(error) => return Err(error.into()),
            }
        }
        let event = match client.next_event(POLL) {
            Ok(Some(event)) => event,
            Ok(None) => continue,
            Err(ClientError::Closed) => {
                display.end();
                lost(number);
                return Ok(Followed::Lost);
            }
            Err(error) => return Err(error.into()),
        };
        if json {
            out(&event.message);
        }
        if let Some(outcome) = told(&mut display, &event, number) {
            display.end();
            tell(&outcome, json);
            return Ok(Followed::Ended(Box::new(outcome)));
        }
    }
}

/// Tells how a move ended; the last line of stdout is one JSON object, that of stderr says where the guest is.
fn tell(outcome: &Outcome, json: bool) {
    for line in summary(outcome) {
        say(line);
    }
    if json {
        out(json!(outcome));
    }
}

fn told(display: &mut Display, event: &Event, number: u64) -> Option<Outcome> {
    if event.data.get("move") != Some(&json!(number)) {
        return None;
    }
    match event.name.as_str() {
        "GODWIT_PROGRESS" => read(&event.data).iter().for_each(|progress| display.progress(progress)),
        "GODWIT_ROUND" => read(&event.data).iter().for_each(|round| display.round(round)),
        "GODWIT_DECISION" => event.data["text"].as_str().iter().for_each(|text| display.line(text)),
        "GODWIT_OUTCOME" => return read(&event.data),
        _ => {}
    }
    None
}

fn read<T: DeserializeOwned>(data: &Value) -> Option<T> {
    T::deserialize(data).inspect_err(|error| tracing::warn!("an event cannot be read: {error}")).ok()
}

/// The process that kept the machine has gone without a word.
fn lost(number: u64) {
    say("the process that kept the machine ended without saying how the move ended");
    say(format_args!(
        "UNKNOWN: this needs a person: the guest is not running here any more; look whether the destination of move \
         {number} runs it"
    ));
}
