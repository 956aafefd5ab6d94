//! Links that break while memory is being sent: the move goes on, or ends with the guest as it was.

use super::*;

const CUT: fn() -> Option<Input> = || Some(Input::LinkLost("cut".into()));

fn moved(run: &Run) -> &Report {
    match &run.outcome {
        Some(SourceOutcome::Moved(report)) => report,
        other => panic!("{other:?}\n{:#?}", run.actions),
    }
}

fn failed(run: &Run) -> &str {
    match &run.outcome {
        Some(SourceOutcome::Failed(why, _)) => why,
        other => panic!("{other:?}\n{:#?}", run.actions),
    }
}

/// A move of which the answer to the first action that begins with `at` is lost with the links.
fn cut_once(at: &str, options: SourceOptions) -> Run {
    let mut cut = false;
    run(control(options, true), Duration::from_millis(1), |_, action, answer| {
        if !cut && format!("{action:?}").starts_with(at) {
            cut = true;
            return CUT();
        }
        answer
    })
}

fn count(run: &Run, action: &str) -> usize {
    run.actions.iter().filter(|done| done.starts_with(action)).count()
}

#[test]
fn a_break_before_state_is_loaded_is_made_good() {
    for (at, phase, rounds, stops) in [
        ("Round { first: true }", Phase::FirstPass, 2, 1),
        ("StopGuest", Phase::Pause, 2, 2),
        ("SendFinal", Phase::FinalPages, 2, 2),
        ("Send(Table", Phase::State, 2, 2),
    ] {
        let run = cut_once(at, options());
        let report = moved(&run);
        check(&run, true);
        assert_eq!(report.reconnections.len(), 1);
        let reconnection = &report.reconnections[0];
        assert_eq!((reconnection.phase, reconnection.attempts), (Some(phase), 1));
        assert_eq!(reconnection.dirtied_bytes, 3 * 4096);
        assert!(reconnection.outage_ms.is_some_and(|outage| outage < 100.0), "{reconnection:?}");
        assert_eq!((count(&run, "Round {"), count(&run, "StopGuest")), (rounds, stops), "{at}");
        assert_eq!(run.resumed, stops == 2, "a guest that was paused is let go on at once");
        assert_eq!(reconnection.paused_ms.is_some(), stops == 2);
        assert!(report.downtime_ms.is_some_and(|downtime| downtime < 50.0), "only the last pause counts: {report:?}");
    }
}

#[test]
fn the_pause_before_the_switchover_survives_a_break() {
    let options = SourceOptions { pause_before_switchover: true, ..options() };
    let mut entered = 0;
    let run = run(control(options, true), Duration::from_millis(1), |_, action, answer| match action {
        Action::Enter(Phase::PreSwitchover) => {
            entered += 1;
            if entered == 1 { CUT() } else { Some(Input::Proceed) }
        }
        _ => answer,
    });
    assert_eq!(moved(&run).reconnections[0].phase, Some(Phase::PreSwitchover));
    assert_eq!(entered, 2);
}

#[test]
fn breaks_before_memory_is_sent_end_the_move() {
    for at in ["Probe", "StartLog", "Send(Prepare"] {
        let run = cut_once(at, options());
        assert!(failed(&run).contains("cut"), "{at}");
        assert_eq!(count(&run, "Reconnect"), 0, "{at}");
        check(&run, true);
    }
}

#[test]
fn nothing_is_made_anew_if_either_end_does_not_want_to() {
    let run = cut_once("Round", SourceOptions { reconnect_timeout: Duration::ZERO, ..options() });
    assert!(failed(&run).contains("cut"));
    assert_eq!(count(&run, "Send(Keep"), 0);
    let mut cut = false;
    let old = super::run(control(options(), true), Duration::ZERO, |_, action, answer| match action {
        Action::Send(Message::Hello(_)) => match hello(VERSION.major) {
            Input::Message(Message::Hello(hello)) => {
                Some(Input::Message(Message::Hello(Hello { features: 0, ..hello })))
            }
            other => Some(other),
        },
        Action::Round { .. } if !cut => {
            cut = true;
            CUT()
        }
        _ => answer,
    });
    assert!(failed(&old).contains("cut"));
    assert_eq!(count(&old, "Send(Keep"), 0);
}

#[test]
fn it_is_tried_with_growing_gaps_until_the_time_is_up() {
    let mut tried = Vec::new();
    let mut cut = false;
    let run = run(control(options(), true), Duration::from_micros(1), |_, action, answer| match action {
        Action::Round { .. } if !cut => {
            cut = true;
            CUT()
        }
        Action::Reconnect { .. } => {
            tried.push(());
            Some(Input::Unreachable { why: "no route".into(), gone: false })
        }
        _ => answer,
    });
    let why = failed(&run);
    assert!(why.contains("--reconnect-timeout (60.0s") && why.contains("no route"), "{why}");
    assert!((60..62).contains(&run.ended_at.as_secs()), "{:?}", run.ended_at);
    assert!((20..30).contains(&tried.len()), "{}", tried.len());
    check(&run, true);
}

#[test]
fn a_destination_that_is_gone_ends_it_at_once() {
    let mut cut = false;
    let run = run(control(options(), true), Duration::from_micros(1), |_, action, answer| match action {
        Action::SendFinal if !cut => {
            cut = true;
            CUT()
        }
        Action::Reconnect { .. } => Some(Input::Unreachable { why: "refused".into(), gone: true }),
        _ => answer,
    });
    assert!(failed(&run).contains("gone: refused"));
    assert!(run.resumed && run.ended_at < Duration::from_secs(1));
    check(&run, true);
}

#[test]
fn a_session_that_is_not_taken_up_is_tried_again() {
    let mut opened = 0;
    let run = cut_once_then(|action, answer| match action {
        Action::ReopenData { .. } => {
            opened += 1;
            if opened < 3 { Some(Input::LinkLost("cut again".into())) } else { answer }
        }
        _ => answer,
    });
    assert_eq!(moved(&run).reconnections[0].attempts, 3);
    assert_eq!(count(&run, "BreakOff"), 3, "what an attempt has opened is closed before the next");
}

#[test]
fn breaks_that_follow_each_other_share_the_time() {
    let mut broken = 0;
    let run = cut_once_then(|action, answer| match action {
        Action::Round { .. } => {
            broken += 1;
            CUT()
        }
        Action::BreakOff { .. } => answer,
        Action::Reconnect { .. } if broken > 3 => Some(Input::Unreachable { why: "no route".into(), gone: false }),
        _ => answer,
    });
    assert!(failed(&run).contains("--reconnect-timeout"));
    assert!(run.ended_at < Duration::from_secs(61), "{:?}", run.ended_at);
}

#[test]
fn a_connection_that_always_breaks_ends_it() {
    let run = run(control(options(), true), Duration::from_micros(1), |_, action, answer| match action {
        Action::Send(Message::Table(_)) => CUT(),
        _ => answer,
    });
    assert!(failed(&run).contains("cut"));
    check(&run, true);
}

#[test]
fn cancelling_works_meanwhile() {
    for stage in ["BreakOff", "Reconnect", "ReopenData"] {
        let run = cut_once_then(|action, answer| match format!("{action:?}").starts_with(stage) {
            true => Some(Input::Cancel),
            false => answer,
        });
        assert!(matches!(run.outcome, Some(SourceOutcome::Cancelled(_))), "{stage}: {:?}", run.outcome);
        check(&run, true);
    }
}

#[test]
fn what_is_sent_again_is_counted() {
    let broken = BrokenOff { unacknowledged_pages: 100, anyway_pages: 20, again_pages: 0 };
    let run = cut_once_then(|action, answer| match action {
        Action::BreakOff { .. } => Some(Input::Done(Done::BrokenOff(broken))),
        Action::Round { first: true } => Some(Input::Done(Done::RoundSent(RoundSent {
            pages: 500,
            again: 123,
            dirty_pages: 1,
            ..RoundSent::default()
        }))),
        _ => answer,
    });
    let report = moved(&run);
    assert_eq!(report.resent_bytes, 103 * 4096);
    let reconnection = &report.reconnections[0];
    assert_eq!((reconnection.unacknowledged_bytes, reconnection.resent_bytes), (100 * 4096, 103 * 4096));
}

/// The links break in the first pass; from then on `meddle` decides.
fn cut_once_then(mut meddle: impl FnMut(&Action, Option<Input>) -> Option<Input>) -> Run {
    let mut cut = false;
    run(control(options(), true), Duration::from_micros(1), |_, action, answer| match action {
        Action::Round { .. } if !cut => {
            cut = true;
            CUT()
        }
        _ if cut => meddle(action, answer),
        _ => answer,
    })
}
