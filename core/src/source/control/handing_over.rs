//! On one host: memory is handed over as the files behind it, and nothing is sent.
//!
//! ```text
//! described → offered → taken → … prepared → flushed → (pre-switchover) → pause → state → let go → commit
//! ```
//!
//! It is offered before the machine is judged, so that whatever speaks against it is found in preflight. Then there is no dirty
//! log, no round and no data channel, and the pause is what it takes with nothing to send. The destination maps the memory of a
//! guest that still runs here, and may not write it before the machine is its own: so whatever ends the move before *commit*
//! leaves memory as it was. A link that breaks ends the move, as there is nothing that would be worth keeping.

use super::ending::Ending;
use super::{Action, NotOffered, SourceControl};
use crate::machine::Refusal;
use crate::message::FEATURE_MEMORY_FILES;
use crate::source::{MemoryHandover, OnStall};

/// Over whatever link, with whatever memory: how to have it otherwise.
const TO_A_UNIX_SOCKET: &str = "the link to the receiver passes no files on: have a receiver on this host listen at \
                                unix:/PATH and move there, or leave out --memory-handover require";
const TO_A_MEMFD: &str = "a machine started with --memory-backing memfd can hand it over";
const TO_ANOTHER_RECEIVER: &str = "the receiver is of a version that cannot take memory over";

impl SourceControl {
    /// The machine is described; whether its memory can be handed over decides what is asked next.
    pub(super) fn offer_memory(&mut self) {
        match self.options.memory_handover {
            MemoryHandover::Off => self.ask_for_verdict(),
            _ if self.peer_features & FEATURE_MEMORY_FILES != 0 => self.act(Action::OfferMemory),
            MemoryHandover::Auto => self.ask_for_verdict(),
            MemoryHandover::Require => self.send_memory(TO_ANOTHER_RECEIVER.into()),
        }
    }

    /// It was not offered.
    pub(super) fn not_offered(&mut self, why: NotOffered) {
        match (why, self.options.memory_handover) {
            // Over a network nobody expects anything else.
            (NotOffered::Link, MemoryHandover::Auto | MemoryHandover::Off) => self.ask_for_verdict(),
            (NotOffered::Link, MemoryHandover::Require) => self.send_memory(TO_A_UNIX_SOCKET.into()),
            (NotOffered::Memory(why), _) => self.send_memory(format!("{why}; {TO_A_MEMFD}")),
        }
    }

    /// The destination has answered.
    pub(super) fn memory_taken(&mut self, refused: Option<String>) {
        match refused {
            None => {
                // There is nothing to come back for.
                (self.hands_over, self.returns) = (true, false);
                self.ask_for_verdict();
            }
            Some(why) => self.send_memory(format!("{} cannot take it over: {why}", self.peer_host)),
        }
    }

    /// It is sent, and the user told why; or nothing is, if the user wants it handed over.
    fn send_memory(&mut self, why: String) {
        if self.options.memory_handover == MemoryHandover::Require {
            let why = format!("it cannot be handed over: {why}");
            return self.end(Ending::Refused(vec![Refusal::new("memory", why)]));
        }
        self.act(Action::Say(format!("memory is copied, not handed over: {why}")));
        self.ask_for_verdict();
    }

    /// The destination is prepared and nothing is left to be sent: the guest may stop, if that is short enough.
    pub(super) fn flushed(&mut self) {
        let (pause, limit) = (self.cost.total(), self.options.downtime_limit);
        let forced = match (pause > limit, self.options.on_stall) {
            // A guest that writes less makes it no shorter, and there is nothing that could follow.
            (true, OnStall::Abort | OnStall::Throttle | OnStall::PostCopy) => {
                return self.fail(format!(
                    "the move does not converge: the pause takes {pause:.1?} although no memory is copied, where {limit:.1?} \
                     are allowed"
                ));
            }
            (true, OnStall::Force) => " all the same (--on-stall force)",
            (false, _) => "",
        };
        self.act(Action::Say(format!(
            "stopping the guest{forced}: {} bytes of memory are handed over and none is copied, predicted pause {pause:.1?}, limit \
             {limit:.1?}",
            self.memory_bytes()
        )));
        self.switch_over();
    }

    /// The guest goes on at the destination, in the memory that it had here.
    pub(super) fn handed_over(&mut self) {
        self.report.handed_over_bytes = Some(self.memory_bytes());
        if self.options.audit {
            self.report.audit = Some("ok: memory was handed over, no page was sent".into());
        }
    }

    /// Its memory is not touched here any more.
    pub(super) fn let_go(&mut self) {
        self.step("let go of memory");
        self.commit();
    }

    fn memory_bytes(&self) -> u64 {
        self.machine.as_ref().map_or(0, |machine| machine.memory_bytes())
    }
}
