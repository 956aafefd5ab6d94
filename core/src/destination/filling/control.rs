//! The control plane of a machine that runs here while pages are still to come: a state machine without I/O, threads or a clock.
//!
//! ```text
//!  attached ⇄ away        until no page is missing any more, and the source has heard so
//! ```
//!
//! The machine is this end's, whatever becomes of the link. There is nothing to go back to: this end waits for the source for as long as it
//! takes, and says so.

use std::time::Duration;

use crate::channel::SessionToken;
use crate::message::{Filled, Message};

/// How often who waits for the source says so.
const TELL_GAP: Duration = Duration::from_secs(5);
/// How long a source may take to come back to hear that nothing is missing any more. It can find that out by itself.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(60);

/// What the driver tells.
#[derive(Debug, Clone)]
pub enum Input {
    /// The links broke; why.
    Lost(String),
    /// The source is back.
    Returned {
        /// Drawn for the channels to come.
        token: SessionToken,
    },
    /// The channels for pages are open again.
    Opened,
    /// No page is missing any more.
    Filled(Filled),
    /// The source has heard that.
    Farewell,
    /// Time has passed.
    Tick,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Tell the user.
    Say(String),
    /// Close the links; keep what has come.
    Detach,
    /// From here on the control channel that came back is the one.
    Attach,
    /// Send a message.
    Send(Message),
    /// Tell the source what is missing.
    SendMissing,
    /// Wait for the channels for pages; answer with [`Input::Opened`] or [`Input::Lost`].
    OpenPages,
    /// Say everywhere that all of memory is there.
    Complete(Filled),
    /// There is nothing left to be done.
    End,
}

/// See the module.
pub struct FillingControl {
    peer: String,
    state: State,
    filled: Option<Filled>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Attached,
    Away { since: Duration, tell_at: Duration },
    Over,
}

impl FillingControl {
    /// The guest runs here, and the links are as they were.
    pub fn new(peer: String) -> Self {
        Self { peer, state: State::Attached, filled: None }
    }

    /// Takes in what has happened; what is to be done, in this order.
    #[must_use]
    pub fn handle(&mut self, now: Duration, input: Input) -> Vec<Action> {
        match (self.state, input) {
            (State::Over, _) => Vec::new(),
            (State::Attached, Input::Lost(why)) => {
                self.state = State::Away { since: now, tell_at: now + TELL_GAP };
                let peer = &self.peer;
                let goes_on = match self.filled {
                    Some(_) => "all of its memory is here".into(),
                    None => format!("the guest runs until it needs a page that is missing, and {peer} is waited for"),
                };
                vec![Action::Say(format!("the connection to {peer} broke: {why}; {goes_on}")), Action::Detach]
            }
            (State::Attached, Input::Returned { token }) => [vec![Action::Detach], self.take_up(token)].concat(),
            (State::Away { .. }, Input::Returned { token }) => self.take_up(token),
            (State::Attached, Input::Opened) => self.filled.map(complete).into_iter().collect(),
            (state, Input::Filled(filled)) if self.filled.is_none() => {
                self.filled = Some(filled);
                let told = (state == State::Attached).then(|| complete(filled));
                [Action::Complete(filled)].into_iter().chain(told).collect()
            }
            (_, Input::Farewell) if self.filled.is_some() => self.end(),
            (State::Away { since, .. }, Input::Tick) if self.filled.is_some() => {
                match now.saturating_sub(since) >= LAST_WORD_LIMIT {
                    true => self.end(),
                    false => Vec::new(),
                }
            }
            (State::Away { since, tell_at }, Input::Tick) if now >= tell_at => {
                self.state = State::Away { since, tell_at: now + TELL_GAP };
                let (peer, age) = (&self.peer, now.saturating_sub(since));
                vec![Action::Say(format!(
                    "{peer} has been away for {age:.0?}, and has pages that the guest lacks: it is waited for"
                ))]
            }
            _ => Vec::new(),
        }
    }

    fn take_up(&mut self, token: SessionToken) -> Vec<Action> {
        self.state = State::Attached;
        vec![
            Action::Attach,
            Action::Say(format!("{} is back: pages follow", self.peer)),
            Action::Send(Message::Attached(token)),
            // It may not have heard.
            Action::Send(Message::Running(Vec::new())),
            Action::SendMissing,
            Action::OpenPages,
        ]
    }

    fn end(&mut self) -> Vec<Action> {
        self.state = State::Over;
        vec![Action::End]
    }
}

fn complete(filled: Filled) -> Action {
    Action::Send(Message::Complete(filled))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: SessionToken = SessionToken([3; 16]);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn lost() -> Input {
        Input::Lost("cut".into())
    }

    #[test]
    fn what_is_complete_is_told_until_it_is_heard() {
        let mut control = FillingControl::new("source".into());
        let filled = Filled { faults: 3, ..Filled::default() };
        assert_eq!(control.handle(seconds(0), Input::Farewell), vec![], "not before it is");
        let actions = control.handle(seconds(1), Input::Filled(filled));
        assert_eq!(actions, vec![Action::Complete(filled), Action::Send(Message::Complete(filled))]);
        assert_eq!(control.handle(seconds(1), Input::Filled(filled)), vec![], "once");
        assert!(control.handle(seconds(2), lost()).contains(&Action::Detach));
        assert!(control.handle(seconds(3), Input::Returned { token: TOKEN }).contains(&Action::OpenPages));
        assert_eq!(control.handle(seconds(3), Input::Opened), vec![Action::Send(Message::Complete(filled))]);
        assert_eq!(control.handle(seconds(4), Input::Farewell), vec![Action::End]);
        assert_eq!(control.handle(seconds(5), lost()), vec![]);
    }

    #[test]
    fn a_source_that_is_away_is_waited_for_and_that_is_said() {
        let mut control = FillingControl::new("source".into());
        assert!(matches!(&control.handle(seconds(0), lost())[..], [Action::Say(_), Action::Detach]));
        assert_eq!(control.handle(seconds(1), lost()), vec![], "once");
        let said = (0..3600).filter(|second| !control.handle(seconds(*second), Input::Tick).is_empty()).count();
        assert_eq!(said, 719, "every five seconds, for as long as it takes");
        let actions = control.handle(seconds(3600), Input::Returned { token: TOKEN });
        assert_eq!(actions.first(), Some(&Action::Attach));
        assert_eq!(control.handle(seconds(3601), Input::Opened), vec![]);
    }

    #[test]
    fn nobody_waits_for_ever_to_say_that_all_is_there() {
        let mut control = FillingControl::new("source".into());
        let _ = control.handle(seconds(0), lost());
        assert_eq!(
            control.handle(seconds(1), Input::Filled(Filled::default())),
            vec![Action::Complete(Filled::default())]
        );
        assert_eq!(control.handle(seconds(59), Input::Tick), vec![]);
        assert_eq!(control.handle(seconds(60), Input::Tick), vec![Action::End]);
    }

    #[test]
    fn a_source_that_comes_back_before_its_break_was_noticed_is_taken_up() {
        let mut control = FillingControl::new("source".into());
        let actions = control.handle(seconds(0), Input::Returned { token: TOKEN });
        assert_eq!(actions[..2], [Action::Detach, Action::Attach]);
    }
}
