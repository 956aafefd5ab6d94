//! The source's control plane in virtual time, with every answer, fault and silence that a peer or a machine can give.

use proptest::prelude::*;

use super::*;
use crate::channel::SessionToken;
use crate::machine::{RegionDescription, Verdict};
use crate::message::{Applied, Hello, Prepared, VERSION, Version};
use crate::source::sending::BrokenOff;

fn machine() -> MachineDescription {
    MachineDescription {
        name: "m".into(),
        vcpus: 1,
        memory: vec![RegionDescription { guest_address: 0, size_bytes: 1 << 30 }],
        sections: Vec::new(),
        vmm: Vec::new(),
    }
}

fn control(options: SourceOptions, running: bool) -> SourceControl {
    let (program, host) = ("test".into(), "here".into());
    SourceControl::new(Beginning { options, program, host, running, table_seed: 1, nonce: 2 })
}

fn hello(major: u16) -> Input {
    let version = Version { major, minor: 9 };
    Input::Message(Message::Hello(Hello { version, features: u64::MAX, program: "p".into(), host: "there".into() }))
}

/// What a healthy peer and machine answer. `dirty` pages are found after each round.
fn healthy(action: &Action, dirty: u64) -> Option<Input> {
    let message = |message| Some(Input::Message(message));
    let done = |done| Some(Input::Done(done));
    match action {
        Action::Connect => done(Done::Connected),
        Action::Send(Message::Hello(_)) => Some(hello(VERSION.major)),
        Action::Send(Message::ClockRequest(number)) => message(Message::ClockReply((*number, 0))),
        Action::Describe => done(Done::Described(machine(), vec![7])),
        Action::OfferMemory => done(Done::NotOffered(NotOffered::Link)),
        Action::Send(Message::Preflight(_)) => message(Message::Verdict(Verdict::default())),
        Action::Judge(_) => done(Done::Judged(Vec::new())),
        Action::Rehearse => done(Done::Rehearsed { sections: Vec::new(), pause: Duration::from_micros(500) }),
        Action::Send(Message::Prepare(_)) => {
            message(Message::Prepared(Prepared { token: SessionToken([0; 16]), load: Duration::from_millis(1) }))
        }
        Action::OpenData { .. } => done(Done::DataOpened { capped: true }),
        Action::Probe(bytes) => done(Done::Probed { bytes: *bytes, duration: Duration::from_millis(5) }),
        Action::Flush => done(Done::Flushed),
        Action::LetGo => done(Done::LetGo),
        Action::StartLog => done(Done::LogStarted),
        Action::Round { .. } => done(Done::RoundSent(RoundSent {
            duration: Duration::from_millis(100),
            pages: 1000,
            wire_bytes: 4_200_000,
            dirty_pages: dirty,
            ..RoundSent::default()
        })),
        Action::StopGuest => done(Done::Stopped { sections: Vec::new(), steps: Vec::new() }),
        Action::SendFinal => done(Done::FinalSent { sum: 3 }),
        Action::Send(Message::Table(_)) => message(Message::Ready(Vec::new())),
        Action::Send(Message::Commit(_)) => message(Message::Running(Vec::new())),
        Action::Restore { .. } => done(Done::Restored(Ok(()))),
        Action::BreakOff { .. } => done(Done::BrokenOff(BrokenOff::default())),
        Action::Reconnect { .. } => done(Done::Connected),
        Action::ReopenData { .. } => done(Done::Reattached { dirtied_pages: 3 }),
        Action::Send(Message::PostCopy(())) => message(Message::PostCopyAnswer(None)),
        Action::OpenPages { .. } => done(Done::PagesOpened),
        Action::EndChannels => done(Done::FinalSent { sum: 3 }),
        Action::Push => message(Message::Complete(Default::default())),
        Action::LeavePages => done(Done::BrokenOff(BrokenOff::default())),
        Action::Audit => done(Done::Audited("ok: 1 pages".into())),
        _ => None,
    }
}

/// All that a move did, and how it ended.
#[derive(Default)]
struct Run {
    actions: Vec<String>,
    committed: bool,
    /// The guest was asked to stop, and not to go on.
    stopped: bool,
    resumed: bool,
    restored: bool,
    outcome: Option<SourceOutcome>,
    ended_at: Duration,
}

/// Lets the move run, each answer after `delay`; `meddle` may replace the answer to the n-th action. When nothing is
/// under way, time jumps to the deadline.
fn run(
    mut control: SourceControl,
    delay: Duration,
    mut meddle: impl FnMut(usize, &Action, Option<Input>) -> Option<Input>,
) -> Run {
    let mut run = Run::default();
    let mut now = Duration::ZERO;
    for _ in 0..10_000 {
        let mut answers = Vec::new();
        while let Some(action) = control.poll_action() {
            let answer = meddle(run.actions.len(), &action, healthy(&action, 10));
            run.actions.push(format!("{action:?}"));
            let is_reconnect = matches!(action, Action::Reconnect { .. });
            match action {
                Action::StopGuest => run.stopped = true,
                Action::Restore { resume } => {
                    run.restored = true;
                    run.resumed |= resume;
                    run.stopped &= !resume;
                }
                Action::BreakOff { resume } => {
                    assert!(!run.committed, "invariant 1: after commit the source never resumes");
                    run.resumed |= resume;
                    run.stopped &= !resume;
                }
                Action::Send(Message::Commit(_)) => run.committed = true,
                Action::Finish(outcome) => {
                    run.outcome = Some(*outcome);
                    run.ended_at = now;
                    return run;
                }
                _ => {}
            }
            let back = is_reconnect && matches!(answer, Some(Input::Done(Done::Connected)));
            answers.extend(answer);
            if back {
                answers.push(Input::Message(Message::Attached(SessionToken([1; 16]))));
            }
        }
        if answers.is_empty() {
            // The driver's own limits stand behind connecting and the machine's actions, which cannot go missing.
            let Some(deadline) = control.deadline() else { return run };
            now = now.max(deadline) + Duration::from_nanos(1);
            control.handle(now, Input::Tick);
        }
        for answer in answers {
            now += delay;
            control.handle(now, answer);
        }
    }
    panic!("goes on for ever: {:?}", run.actions);
}

/// Invariants 1 and 2, as far as the source can break them.
fn check(run: &Run, running: bool) {
    if run.committed {
        assert!(!run.restored, "invariant 1: after commit the source never resumes");
        assert!(
            matches!(run.outcome, None | Some(SourceOutcome::Moved(_) | SourceOutcome::Unknown(..))),
            "{:?}",
            run.outcome
        );
    } else if run.outcome.is_some() {
        assert!(
            run.restored,
            "invariant 2: before commit whatever ends the move restores the guest: {:?}",
            run.actions
        );
        assert!(!(running && run.stopped), "invariant 2: the guest runs on: {:?}", run.actions);
        assert!(!matches!(run.outcome, Some(SourceOutcome::Moved(_))));
    }
}

fn options() -> SourceOptions {
    SourceOptions { audit: true, timeout: Some(Duration::from_secs(60)), ..SourceOptions::default() }
}

#[test]
fn a_round_of_pages_that_are_hardly_any_bytes_says_nothing_of_the_link_but_that_it_takes_as_much() {
    let after = |by_pages| {
        let mut control = control(options(), true);
        let sent = |pages, wire_bytes, by_pages| {
            let duration = Duration::from_millis(100);
            RoundSent { duration, pages, wire_bytes, dirty_pages: 50_000, by_pages, ..RoundSent::default() }
        };
        control.round_sent(sent(25_000, 100_000_000, false));
        control.round_sent(sent(50_000, 1_000_000, by_pages));
        control.switchover_bytes_per_s().round()
    };
    assert_eq!(after(true), 1e9);
    assert_eq!(after(false), 1e7);
}

#[test]
fn what_the_peer_does_not_know_is_not_sent() {
    for (features, sparse, delta_cache_bytes) in [(u64::MAX, true, 7), (2, false, 7), (0, false, 0)] {
        let mut control = control(SourceOptions { delta_cache_bytes: 7, ..SourceOptions::default() }, true);
        control.hello(Hello { version: VERSION, features, program: "p".into(), host: "there".into() });
        let encodings = control.encodings();
        assert_eq!((encodings.sparse, encodings.delta_cache_bytes), (sparse, delta_cache_bytes), "{features}");
    }
}

#[test]
fn a_healthy_move_is_made() {
    let run = run(control(options(), true), Duration::from_micros(100), |_, _, answer| answer);
    let Some(SourceOutcome::Moved(report)) = &run.outcome else { panic!("{:?}", run.outcome) };
    assert!(report.downtime_ms.is_some() && report.audit.is_some());
    check(&run, true);
}

#[test]
fn another_major_version_is_refused_with_both_versions_named() {
    let run = run(control(options(), true), Duration::ZERO, |_, action, answer| match action {
        Action::Send(Message::Hello(_)) => Some(hello(VERSION.major + 1)),
        _ => answer,
    });
    let Some(SourceOutcome::Refused(refusals)) = &run.outcome else { panic!("{:?}", run.outcome) };
    assert!(refusals[0].reason.contains("2.9") && refusals[0].reason.contains("end 1.1"), "{refusals:?}");
}

#[test]
fn overrunning_the_pause_before_commit_resumes_the_source() {
    for silent in ["SendFinal", "Table"] {
        let run = run(control(options(), true), Duration::from_micros(10), |_, action, answer| {
            if format!("{action:?}").contains(silent) { None } else { answer }
        });
        assert!(
            matches!(&run.outcome, Some(SourceOutcome::Failed(why, _)) if why.contains("--pause-timeout")),
            "{:?}",
            run.outcome
        );
        assert!(run.resumed && run.ended_at < Duration::from_secs(6));
        check(&run, true);
    }
}

#[test]
fn hearing_nothing_after_commit_needs_a_person() {
    let run = run(control(options(), true), Duration::ZERO, |_, action, answer| match action {
        Action::Send(Message::Commit(_)) => None,
        _ => answer,
    });
    assert!(matches!(&run.outcome, Some(SourceOutcome::Unknown(why, _)) if why.contains("--handover-timeout")));
    check(&run, true);
}

/// Something that can go wrong in answer to an action.
fn faults() -> impl Strategy<Value = Option<u8>> {
    prop::option::of(0u8..10)
}

fn fault(kind: u8) -> Option<Input> {
    match kind {
        0 => None,
        1 => Some(Input::LinkLost("cut".into())),
        2 => Some(Input::Failed("broken".into())),
        3 => Some(Input::Cancel),
        4 => Some(Input::Message(Message::Abort("no".into()))),
        5 => Some(Input::Message(Message::Running(Vec::new()))),
        6 => Some(Input::Message(Message::Ready(Vec::new()))),
        7 => Some(Input::Message(Message::Verdict(vec![Refusal::new("cpu", "none")].into()))),
        8 => Some(Input::Done(Done::Judged(vec![Refusal::new("disk root", "another one")]))),
        _ => Some(Input::Message(Message::Applied(Applied { channel: 9, mark: 9 }))),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn invariants_1_2_6_hold_whatever_happens_at_any_step(
        at in 0usize..70, kind in faults(), again in 0usize..70, second in faults(),
        running: bool, force: bool, wait: bool, hands_over: bool, dry_run in prop::bool::weighted(0.1), delay_us in 0u64..2000,
    ) {
        let on_stall = if force { super::super::OnStall::Force } else { super::super::OnStall::Abort };
        let options = SourceOptions { on_stall, pause_before_switchover: wait, dry_run, ..options() };
        let run = run(control(options, running), Duration::from_micros(delay_us), |step, action, answer| {
            // What the machine is asked to restore, it does or says why it cannot: it cannot fall silent.
            if matches!(action, Action::Restore { .. } | Action::Audit) { return answer }
            if matches!(action, Action::Enter(Phase::PreSwitchover)) { return Some(Input::Proceed) }
            let taken = matches!(action, Action::OfferMemory) && hands_over;
            let answer = if taken { Some(Input::Message(Message::MemoryTaken(None))) } else { answer };
            match (kind, second) {
                (Some(kind), _) if step == at => fault(kind),
                (_, Some(kind)) if step == again => fault(kind),
                _ => answer,
            }
        });
        check(&run, running);
        // The only silences without a limit in the control plane are those the driver limits: connecting, the
        // machine's own work, and the rounds, which end by themselves or with the link.
        let waits_for_driver = run.actions.last().is_some_and(|last| {
            ["Connect", "Describe", "Judge", "Rehearse", "OpenData", "Probe", "StartLog", "Round", "Flush", "StopGuest", "CutRound"]
                .iter().any(|action| last.starts_with(action))
        });
        prop_assert!(run.outcome.is_some() || waits_for_driver, "hangs after {:?}", run.actions.last());
    }
}

mod broken_links;
mod handing_over;
mod postcopying;
mod stalling;
mod throttling;

mod with_claims {
    //! The same where the machine has claims: after *commit* they say whose it is.

    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::ownership::directory::DirectoryStore;
    use crate::ownership::start::Mode;
    use crate::ownership::timed::Timed;
    use crate::ownership::{Epoch, Holding, Host, Nonce, Settlement, begin};

    pub(super) fn holding(directory: &Path) -> Arc<Holding> {
        let host = Arc::new(Host::register(Some("here".parse().unwrap()), &directory.join("instances")).unwrap());
        let store = Timed::start(DirectoryStore::new(directory)).unwrap();
        let me = host.claimant("m".parse().unwrap());
        let right = begin(me.clone(), Nonce(1), Mode::New, &store, directory, |_| {}).unwrap();
        Arc::new(Holding::new(directory.into(), store, host, me.claim(Epoch::FIRST, Nonce(1)), right))
    }

    /// A move whose destination answers *commit* with `answer`; the claims then say `settlement`.
    fn run_with(answer: Option<Input>, settlement: Settlement) -> (Run, Arc<Holding>) {
        let directory = tempfile::tempdir().unwrap();
        let holding = holding(directory.path());
        let options = SourceOptions { ownership: Some(Arc::clone(&holding)), ..options() };
        let mut answer = Some(answer);
        let run = run(control(options, true), Duration::from_micros(10), |_, action, healthy| match action {
            Action::Send(Message::Preflight(request)) => {
                let claims = request.claims.as_ref().unwrap();
                assert_eq!(claims.claim, holding.claim().to_string());
                healthy
            }
            // What the driver does beside.
            Action::StopGuest => {
                holding.begin_handover();
                healthy
            }
            Action::Restore { .. } => {
                holding.give_up_handover();
                healthy
            }
            Action::Send(Message::Commit(commit)) => {
                assert_eq!(commit.epoch, 2);
                answer.take().flatten()
            }
            Action::Settle(_) => Some(Input::Done(Done::Settled(settlement.clone()))),
            _ => healthy,
        });
        (run, holding)
    }

    const UNDECIDED: fn() -> Settlement = || Settlement::Undecided("taken".into());

    #[test]
    fn running_ends_the_right_of_the_source() {
        let (run, holding) = run_with(Some(Input::Message(Message::Running(Vec::new()))), UNDECIDED());
        assert!(matches!(run.outcome, Some(SourceOutcome::Moved(_))), "{:?}", run.outcome);
        assert!(!holding.may_run() && !run.resumed);
    }

    #[test]
    fn a_destination_that_is_lost_is_settled_by_the_claims() {
        let lost: [fn() -> Option<Input>; 3] = [
            || None,
            || Some(Input::LinkLost("cut".into())),
            || Some(Input::Message(Message::Abort("taken by another".into()))),
        ];
        for lost in lost {
            let (run, _) = run_with(lost(), Settlement::Resumed(Epoch::new(2).unwrap()));
            assert!(
                matches!(&run.outcome, Some(SourceOutcome::Failed(why, _)) if why.contains("claimed back, epoch 2")),
                "{:?}",
                run.outcome
            );
            assert!(run.resumed, "{:?}", run.actions);
            let (run, holding) = run_with(lost(), UNDECIDED());
            assert!(matches!(run.outcome, Some(SourceOutcome::Unknown(..))), "{:?}", run.outcome);
            assert!(!run.resumed && !holding.may_run());
            let (run, _) = run_with(lost(), Settlement::Moved);
            assert!(matches!(run.outcome, Some(SourceOutcome::Moved(_))), "{:?}", run.outcome);
            assert!(!run.resumed);
        }
    }

    #[test]
    fn before_commit_the_epoch_stays() {
        let directory = tempfile::tempdir().unwrap();
        let holding = holding(directory.path());
        let ownership = Some(Arc::clone(&holding));
        let options = SourceOptions { ownership, reconnect_timeout: Duration::ZERO, ..options() };
        let run = run(control(options, true), Duration::from_micros(10), |_, action, healthy| match action {
            Action::StopGuest => {
                holding.begin_handover();
                healthy
            }
            Action::Send(Message::Table(_)) => Some(Input::LinkLost("cut".into())),
            Action::Restore { .. } => {
                assert!(holding.give_up_handover());
                healthy
            }
            _ => healthy,
        });
        check(&run, true);
        assert_eq!(holding.claim().epoch, Epoch::FIRST);
    }
}
