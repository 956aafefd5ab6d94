//! Memory that is handed over: what is not done then, and what else becomes of it.

use super::*;
use crate::source::{MemoryHandover, OnStall};

fn taken() -> Option<Input> {
    Some(Input::Message(Message::MemoryTaken(None)))
}

/// A move to a destination that takes memory over.
fn handed_over(options: SourceOptions, meddle: impl Fn(&Action, Option<Input>) -> Option<Input>) -> Run {
    run(control(options, true), Duration::from_micros(10), |_, action, answer| match action {
        Action::OfferMemory => meddle(action, taken()),
        _ => meddle(action, answer),
    })
}

fn place(run: &Run, action: &str) -> Option<usize> {
    run.actions.iter().position(|done| done.starts_with(action))
}

#[test]
fn nothing_is_logged_or_sent_and_memory_is_let_go_of_before_commit() {
    let run = handed_over(options(), |_, answer| answer);
    let Some(SourceOutcome::Moved(report)) = &run.outcome else { panic!("{:?}", run.outcome) };
    assert_eq!(report.handed_over_bytes, Some(1 << 30));
    assert!(report.audit.as_ref().is_some_and(|audit| audit.starts_with("ok")) && report.rounds.is_empty());
    for never in ["StartLog", "OpenData", "Round", "SendFinal", "Audit", "Send(Keep"] {
        assert_eq!(place(&run, never), None, "{:?}", run.actions);
    }
    let order = ["OfferMemory", "Send(Preflight", "Flush", "StopGuest", "Send(Table", "LetGo", "Send(Commit"];
    assert!(order.map(|action| place(&run, action)).is_sorted(), "{:?}", run.actions);
    assert!(order.iter().all(|action| place(&run, action).is_some()), "{:?}", run.actions);
}

#[test]
fn the_pause_is_predicted_from_what_it_takes_with_nothing_to_send() {
    let slow = |action: &Action, answer| match action {
        Action::Rehearse => {
            Some(Input::Done(Done::Rehearsed { sections: Vec::new(), pause: Duration::from_millis(400) }))
        }
        _ => answer,
    };
    let run = handed_over(options(), slow);
    let Some(SourceOutcome::Failed(why, _)) = &run.outcome else { panic!("{:?}", run.outcome) };
    assert!(why.contains("no memory is copied") && !run.stopped, "{why}");
    let run = handed_over(SourceOptions { on_stall: OnStall::Force, ..options() }, slow);
    assert!(matches!(run.outcome, Some(SourceOutcome::Moved(_))), "{:?}", run.outcome);
}

#[test]
fn whoever_waits_before_the_switchover_is_asked_once_and_disks_are_flushed_again() {
    let options = SourceOptions { pause_before_switchover: true, ..options() };
    let run = handed_over(options, |action, answer| match action {
        Action::Enter(Phase::PreSwitchover) => Some(Input::Proceed),
        _ => answer,
    });
    assert!(matches!(run.outcome, Some(SourceOutcome::Moved(_))), "{:?}", run.outcome);
    assert_eq!(run.actions.iter().filter(|action| *action == "Flush").count(), 2, "{:?}", run.actions);
}

#[test]
fn a_link_that_breaks_ends_the_move_and_memory_is_taken_back() {
    for at in ["StopGuest", "Send(State", "LetGo"] {
        let run = handed_over(options(), |action, answer| match format!("{action:?}").starts_with(at) {
            true => Some(Input::LinkLost("cut".into())),
            false => answer,
        });
        assert!(matches!(run.outcome, Some(SourceOutcome::Failed(..))), "{:?}", run.outcome);
        assert_eq!(place(&run, "BreakOff"), None);
        check(&run, true);
    }
}

/// What comes of a move whose memory is not offered or not taken, for each of the options.
#[test]
fn memory_that_cannot_be_handed_over_is_sent_or_refused_with_the_reason() {
    type Answer = fn() -> Option<Input>;
    let obstacles: [(&str, Answer); 3] = [
        ("unix:/PATH", || Some(Input::Done(Done::NotOffered(NotOffered::Link)))),
        ("--memory-backing memfd", || Some(Input::Done(Done::NotOffered(NotOffered::Memory("it is private".into()))))),
        ("another host", || Some(Input::Message(Message::MemoryTaken(Some("the receiver is on another host".into()))))),
    ];
    for (reason, answer) in obstacles {
        let with = |memory_handover| {
            let options = SourceOptions { memory_handover, ..options() };
            handed_over(options, |action, healthy| match action {
                Action::OfferMemory => answer(),
                _ => healthy,
            })
        };
        let run = with(MemoryHandover::Auto);
        let Some(SourceOutcome::Moved(report)) = &run.outcome else { panic!("{:?}", run.outcome) };
        assert_eq!(report.handed_over_bytes, None);
        let said = run.actions.iter().any(|action| action.contains("memory is copied, not handed over"));
        assert_eq!(said, reason != "unix:/PATH", "{:?}", run.actions);
        let run = with(MemoryHandover::Require);
        let Some(SourceOutcome::Refused(refusals)) = &run.outcome else { panic!("{:?}", run.outcome) };
        assert!(refusals[0].subject == "memory" && refusals[0].reason.contains(reason), "{refusals:?}");
        let run = with(MemoryHandover::Off);
        assert!(matches!(run.outcome, Some(SourceOutcome::Moved(_))) && place(&run, "OfferMemory").is_none());
    }
}

#[test]
fn memory_is_not_offered_to_a_peer_that_would_not_understand() {
    for (memory_handover, refused) in [(MemoryHandover::Auto, false), (MemoryHandover::Require, true)] {
        let options = SourceOptions { memory_handover, ..options() };
        let run = handed_over(options, |action, answer| match action {
            Action::Send(Message::Hello(hello)) => {
                Some(Input::Message(Message::Hello(Hello { features: 3, ..hello.clone() })))
            }
            _ => answer,
        });
        assert_eq!(place(&run, "OfferMemory"), None);
        assert_eq!(matches!(run.outcome, Some(SourceOutcome::Refused(_))), refused, "{:?}", run.outcome);
    }
}
