//! Post-copy in virtual time: when the move goes over, and what a broken link leads to on either side of *commit*.

use std::sync::Arc;

use super::*;
use crate::ownership::{Epoch, Settlement};
use crate::source::{MemoryHandover, OnStall};

/// No round meets the limit.
const DIRTY: u64 = 1_000_000;

fn late() -> SourceOptions {
    SourceOptions { on_stall: OnStall::PostCopy, max_rounds: 2, ..options() }
}

/// As [`run`], of a guest that dirties too much.
fn run_busy(options: SourceOptions, mut meddle: impl FnMut(usize, &Action, Option<Input>) -> Option<Input>) -> Run {
    run(control(options, true), Duration::from_millis(1), |index, action, answer| {
        let answer = match action {
            Action::Round { .. } => healthy(action, DIRTY),
            _ => answer,
        };
        meddle(index, action, answer)
    })
}

fn moved(run: &Run) -> &Report {
    match &run.outcome {
        Some(SourceOutcome::Moved(report)) => report,
        other => panic!("{other:?}\n{:#?}", run.actions),
    }
}

/// Where the first action is that begins so.
fn place(run: &Run, action: &str) -> usize {
    run.actions
        .iter()
        .position(|done| done.starts_with(action))
        .unwrap_or_else(|| panic!("no {action}: {:#?}", run.actions))
}

#[test]
fn the_guest_goes_over_when_rounds_will_not_do() {
    let run = run_busy(late(), |_, _, answer| answer);
    let report = moved(&run);
    check(&run, true);
    assert_eq!(report.rounds.len(), 3, "the rounds that were allowed");
    assert!(report.postcopy.as_ref().is_some_and(|postcopy| postcopy.why.contains("2 rounds")), "{report:?}");
    assert!(report.downtime_ms.is_some_and(|downtime| downtime < 20.0), "{report:?}");
    let order = [
        "Say(\"warning",
        "Send(PostCopyWanted",
        "Send(Preflight",
        "Say(\"going over",
        "Send(PostCopy(",
        "OpenPages",
        "StopGuest",
        "EndChannels",
        "SendMissing",
        "Serve",
        "Send(Table",
        "Send(Commit",
        "Push",
        "Send(Farewell",
        "Audit",
    ];
    assert!(order.map(|action| place(&run, action)).is_sorted(), "{:#?}", run.actions);
    assert!(!run.actions.iter().any(|done| done.starts_with("SendFinal")));
}

#[test]
fn a_limit_that_is_met_needs_no_postcopy() {
    let run = run(control(late(), true), Duration::from_millis(1), |_, _, answer| answer);
    assert!(moved(&run).postcopy.is_none());
    assert!(!run.actions.iter().any(|done| done.starts_with("Send(PostCopy(")));
}

#[test]
fn a_destination_that_cannot_ends_a_move_that_has_no_other_way() {
    let run = run_busy(late(), |_, action, answer| match action {
        Action::Send(Message::PostCopy(())) => Some(Input::Message(Message::PostCopyAnswer(Some("no".into())))),
        _ => answer,
    });
    assert!(
        matches!(&run.outcome, Some(SourceOutcome::Failed(why, _)) if why.contains("by post-copy: no")),
        "{:?}",
        run.outcome
    );
    check(&run, true);
}

#[test]
fn what_can_never_be_is_refused_before_anything_is_sent() {
    for (options, reason) in [
        (SourceOptions { reconnect_timeout: Duration::ZERO, ..late() }, "--reconnect-timeout"),
        (SourceOptions { memory_handover: MemoryHandover::Require, ..late() }, "handed over"),
    ] {
        let run = run_busy(options, |_, _, answer| answer);
        let Some(SourceOutcome::Refused(refusals)) = &run.outcome else { panic!("{:?}", run.outcome) };
        assert!(refusals[0].subject == "post-copy" && refusals[0].reason.contains(reason), "{refusals:?}");
        check(&run, true);
    }
}

#[test]
fn after_commit_a_broken_link_is_made_anew_for_as_long_as_it_takes() {
    for (at, breaks) in [("Send(Commit", 1), ("Push", 1), ("Push", 3)] {
        let (mut left, mut unreachable) = (breaks, 40);
        let run =
            run_busy(SourceOptions { reconnect_timeout: Duration::from_secs(5), ..late() }, |_, action, answer| {
                if left > 0 && format!("{action:?}").starts_with(at) {
                    left -= 1;
                    return Some(Input::LinkLost("cut".into()));
                }
                match action {
                    // Also a host that says that nobody is there: it may be a firewall.
                    Action::Reconnect { .. } if unreachable > 0 => {
                        unreachable -= 1;
                        Some(Input::Unreachable { why: "no route".into(), gone: unreachable % 2 == 0 })
                    }
                    _ => answer,
                }
            });
        let report = moved(&run);
        assert_eq!(report.reconnections.len(), breaks);
        assert_eq!(report.reconnections[0].attempts, 41);
        assert!(run.ended_at > Duration::from_secs(60), "far longer than --reconnect-timeout");
        assert!(!run.resumed);
        check(&run, true);
    }
}

#[test]
fn as_long_as_nobody_says_who_has_the_machine_the_claims_are_asked_between_attempts() {
    for in_the_end in ["running", "moved", "resumed", "abandoned"] {
        let directory = tempfile::tempdir().unwrap();
        let holding = super::with_claims::holding(directory.path());
        let options = SourceOptions { ownership: Some(Arc::clone(&holding)), ..late() };
        let (mut asked, mut dialled) = (0, 0);
        let run = run_busy(options, |_, action, healthy| match action {
            Action::StopGuest => {
                holding.begin_handover();
                healthy
            }
            Action::Send(Message::Commit(_)) => Some(Input::LinkLost("cut".into())),
            Action::Settle(_) => {
                asked += 1;
                let settlement = match in_the_end {
                    "abandoned" if asked == 6 => return Some(Input::Abandon),
                    "moved" if asked >= 6 => Settlement::Moved,
                    "resumed" if asked == 6 => Settlement::Resumed(Epoch::new(2).unwrap()),
                    _ => Settlement::Undecided("the store does not answer".into()),
                };
                Some(Input::Done(Done::Settled(settlement)))
            }
            Action::Reconnect { .. } => {
                dialled += 1;
                match in_the_end {
                    "running" | "moved" if dialled == 20 => healthy,
                    _ => Some(Input::Unreachable { why: "it says no".into(), gone: true }),
                }
            }
            _ => healthy,
        });
        match (in_the_end, &run.outcome) {
            ("running", Some(SourceOutcome::Moved(_))) => assert_eq!(asked, 20),
            ("moved", Some(SourceOutcome::Moved(_))) => assert_eq!((asked, dialled), (6, 20)),
            ("resumed", Some(SourceOutcome::Failed(why, _))) => {
                assert!(why.contains("claimed back") && run.resumed && (asked, dialled) == (6, 5));
            }
            ("abandoned", Some(SourceOutcome::Unknown(..))) => assert!(!run.resumed),
            (_, outcome) => panic!("{in_the_end}: {outcome:?}\n{:#?}", run.actions),
        }
    }
}

proptest! {
    /// Wherever the links break, however often: the guest is never at both ends, and the move completes.
    #[test]
    fn links_may_break_anywhere(breaks in prop::collection::btree_set(0usize..120, 0..4)) {
        let run = run_busy(late(), |index, action, answer| {
            // Whoever dials, or has closed what is left, always answers.
            let answers = matches!(
                action,
                Action::Reconnect { .. } | Action::BreakOff { .. } | Action::LeavePages | Action::Restore { .. } | Action::Audit
            );
            match breaks.contains(&index) && !answers && answer.is_some() {
                true => Some(Input::LinkLost("cut".into())),
                false => answer,
            }
        });
        check(&run, true);
        prop_assert!(run.outcome.is_some(), "{:#?}", run.actions);
        prop_assert!(!run.committed || matches!(run.outcome, Some(SourceOutcome::Moved(_))), "{:?}\n{:#?}", run.outcome, run.actions);
    }
}
