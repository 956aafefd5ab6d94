//! Post-copy: the guest goes on at the destination, and the pages that it lacks follow ([`crate::postcopy`]).
//!
//! ```text
//!  rounds → asked whether that can be → channels for pages open → pause → channels end, nothing more is sent
//!                                                                            │
//!  completed ← postcopy ⇄ postcopy-paused       commit ← state ← what is missing is told, and served
//!                  ↑                               │
//!                  └───────────────────────────────┘
//! ```
//!
//! It is asked for by a person, or follows from the stop rule. Until *commit* all is as in every move: whatever fails leaves the guest here,
//! and a link that breaks is made anew and the rounds go on. After it the guest never runs here again, and this end serves its memory
//! until the destination says that it is complete: if the links break they are made anew for as long as it takes, since the guest lives in
//! the memory of both hosts.

use std::time::Duration;

use super::ending::Ending;
use super::{Action, SourceControl};
use crate::machine::Refusal;
use crate::message::{FEATURE_POSTCOPY, Filled, Message};
use crate::phase::Phase;
use crate::progress::PostCopyReport;
use crate::source::{MemoryHandover, OnStall};

/// How long the destination may take to answer, and then its channels to open, while the guest runs here.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// What it risks, said when it is chosen.
const RISK: &str = "from then on, until all of its memory is there, the guest lives in the memory of both hosts: if either \
                    process or host fails, it is lost and has to be booted from its disks";

/// The move goes over to post-copy, or has.
pub(super) struct PostCopying {
    why: String,
    /// It was the answer to a stall, and not asked for: without it the move has failed.
    is_last_resort: bool,
    stage: Stage,
    /// When the guest went on at the destination.
    since: Option<Duration>,
    /// After *commit* nobody has said yet that the destination has the machine: the claims may still give it back.
    in_doubt: bool,
}

enum Stage {
    /// The round under way is left first.
    LeavingRound,
    /// The destination has been asked, or the channels are being opened.
    Opening { since: Duration },
    /// The channels for pages are open.
    Open,
}

impl PostCopying {
    pub(super) fn deadline(&self) -> Option<Duration> {
        match self.stage {
            Stage::Opening { since } => Some(since + OPEN_LIMIT),
            Stage::LeavingRound | Stage::Open => None,
        }
    }
}

impl SourceControl {
    /// Whether the guest is, or may be, at the destination while its memory is not.
    pub(super) fn is_following(&self) -> bool {
        matches!(self.phase, Phase::PostCopy | Phase::PostCopyPaused)
    }

    /// Why it can never be, if it cannot: known once both ends have introduced themselves.
    fn postcopy_objection(&self) -> Option<&'static str> {
        match () {
            () if self.hands_over || self.options.memory_handover == MemoryHandover::Require => {
                Some("memory is handed over on this host, and nothing would follow")
            }
            () if self.peer_features & FEATURE_POSTCOPY == 0 => {
                Some("the receiver is of a version that knows no post-copy")
            }
            () if !self.returns => Some("a broken link has to be made anew, which --reconnect-timeout 0s rules out"),
            () => None,
        }
    }

    /// Both ends have introduced themselves: if it may come to post-copy, it must be possible. False: the move is refused.
    pub(super) fn agree_on_postcopy(&mut self) -> bool {
        if self.options.on_stall != OnStall::PostCopy {
            return true;
        }
        match self.postcopy_objection() {
            None => true,
            Some(why) => {
                self.end(Ending::Refused(vec![Refusal::new("post-copy", why)]));
                false
            }
        }
    }

    /// Preflight is about to be asked for: also about post-copy, if it may come to that.
    pub(super) fn ask_about_postcopy(&mut self) {
        if self.options.on_stall == OnStall::PostCopy && !self.hands_over {
            self.act(Action::Say(format!("warning: should the move not converge, it goes over to post-copy: {RISK}")));
            self.act(Action::Send(Message::PostCopyWanted(())));
        }
    }

    /// Whether the move can go over to post-copy now, as far as is known here.
    pub fn may_go_over(&self) -> Result<(), String> {
        let possible = (Phase::FirstPass..=Phase::PreSwitchover).contains(&self.phase) && !self.is_ending();
        match self.postcopy_objection() {
            _ if !possible => {
                Err(format!("the move is in phase {}: only while memory is being sent can it go over", self.phase))
            }
            Some(why) => Err(why.into()),
            None => Ok(()),
        }
    }

    /// Goes over to post-copy: once the round that is under way has been left.
    pub(super) fn go_over(&mut self, why: String, is_last_resort: bool) {
        if self.postcopy.is_some() {
            return;
        }
        self.act(Action::Say(format!("going over to post-copy: {why}. Warning: {RISK}")));
        self.postcopy =
            Some(PostCopying { why, is_last_resort, stage: Stage::LeavingRound, since: None, in_doubt: false });
        match (&self.reconnecting, self.round_under_way) {
            (Some(_), _) => {}
            (None, true) => self.act(Action::CutRound),
            (None, false) => self.ask_for_postcopy(),
        }
    }

    /// No round is under way: asks the destination.
    pub(super) fn ask_for_postcopy(&mut self) {
        let since = self.now;
        self.queue_awaited_since = None;
        let Some(postcopy) = &mut self.postcopy else { return };
        postcopy.stage = Stage::Opening { since };
        self.act(Action::Send(Message::PostCopy(())));
    }

    pub(super) fn postcopy_answered(&mut self, refused: Option<String>) {
        let Some(mut postcopy) = self.postcopy.take() else { return };
        match (refused, self.data_token) {
            (None, Some(token)) if postcopy.deadline().is_some() => {
                postcopy.stage = Stage::Opening { since: self.now };
                self.postcopy = Some(postcopy);
                self.act(Action::OpenPages { token });
            }
            (None, _) => self.postcopy = Some(postcopy),
            (Some(why), _) => {
                let why = format!("{} cannot take it in by post-copy: {why}", self.peer_host);
                if postcopy.is_last_resort {
                    return self.fail(format!("the move does not converge ({}), and {why}", postcopy.why));
                }
                self.act(Action::Say(format!("{why}; the rounds go on")));
                self.act(Action::UncutRounds);
                self.next_round();
            }
        }
    }

    /// All is prepared: the guest goes over.
    pub(super) fn pages_opened(&mut self) {
        let Some(postcopy) = &mut self.postcopy else { return };
        postcopy.stage = Stage::Open;
        self.stop_guest();
    }

    /// The links broke before the guest was stopped, or it runs on here: all begins anew with the next round's end.
    pub(super) fn not_gone_over(&mut self) {
        if let Some(postcopy) = &mut self.postcopy {
            postcopy.stage = Stage::LeavingRound;
        }
    }

    /// The destination was lost after *commit*, and the claims have been asked: it has the machine, or that is still `in_doubt`.
    pub(super) fn follow_unheard(&mut self, why: String, in_doubt: bool) {
        if let Some(postcopy) = &mut self.postcopy {
            postcopy.in_doubt = in_doubt;
        }
        match self.is_following() {
            true => self.attempt(),
            false => self.pages_link_lost(why),
        }
    }

    /// Whether nobody has said yet that the destination has the machine.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.postcopy.as_ref().is_some_and(|postcopy| postcopy.in_doubt)
    }

    /// A person says that the destination is not to be waited for.
    pub(super) fn abandon(&mut self) {
        self.settling = None;
        self.unknown(format!(
            "a person has said that {} is not to be waited for, where the guest runs without all of its memory: it is lost",
            self.peer_host
        ));
    }

    /// The guest runs at the destination.
    pub(super) fn follow(&mut self) {
        self.enter(Phase::PostCopy);
        self.note_follows();
        self.act(Action::Push);
    }

    /// The destination says that the guest runs there; it says so again when its links were made anew.
    pub(super) fn note_follows(&mut self) {
        self.note_running();
        if self.downtime.is_none() {
            self.downtime = self.paused_at.map(|at| self.now.saturating_sub(at));
        }
        let now = self.now;
        if let Some(postcopy) = &mut self.postcopy {
            postcopy.since.get_or_insert(now);
            postcopy.in_doubt = false;
        }
    }

    /// All of its memory is there.
    pub(super) fn followed(&mut self, filled: Filled) {
        if let Some(PostCopying { why, since, .. }) = &self.postcopy {
            let Filled { faults, fault_p50_us, fault_p99_us, fault_max_us } = filled;
            let duration = self.now.saturating_sub(since.unwrap_or(self.now));
            let why = why.clone();
            // What was counted is added by the driver.
            self.report.postcopy = Some(PostCopyReport {
                why,
                duration_ms: duration.as_secs_f64() * 1e3,
                faults,
                fault_p50_us,
                fault_p99_us,
                fault_max_us,
                ..PostCopyReport::default()
            });
        }
        self.act(Action::Send(Message::Farewell(())));
        self.moved();
    }
}
