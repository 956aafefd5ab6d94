//! Post-copy, with real threads and sockets.

use std::sync::atomic::Ordering;

use super::broken_links::{Breaking, assert_whole};
use super::*;

/// A move that goes over to post-copy after a first pass in which the guest has time to write.
fn late() -> SourceOptions {
    SourceOptions {
        on_stall: OnStall::PostCopy,
        max_rounds: 0,
        switchover_bandwidth_bytes_per_s: Some(1),
        max_bandwidth_bytes_per_s: Some(8_000_000),
        ..options()
    }
}

#[test]
fn a_move_that_stalls_goes_over_and_arrives_whole() {
    for (channels, verify) in [(1, true), (3, true), (2, false)] {
        let machine = running_machine();
        let destination = Destination::start(DestinationOptions::default());
        let outcome = start(&machine, &destination, SourceOptions { channels, verify, audit: verify, ..late() }).wait();
        let SourceOutcome::Moved(report) = &*outcome else { panic!("{outcome:?}") };
        let postcopy = report.postcopy.clone().expect("it went over");
        assert!(postcopy.missing_pages > 0, "{postcopy:?}");
        assert!(postcopy.pages_by_fault + postcopy.pages_by_push >= postcopy.missing_pages, "{postcopy:?}");
        assert!(report.audit.as_deref().is_none_or(|audit| audit.starts_with("ok: ")), "{:?}", report.audit);
        assert!(!machine.is_running());
        let (moved, running) = destination.owned();
        assert!(running);
        moved.pause(LIMIT).unwrap();
        assert!(moved.writes() >= machine.writes());
        assert!(moved.is_whole().unwrap());
    }
}

#[test]
fn a_person_can_let_it_go_over_in_the_first_pass() {
    let machine = running_machine();
    let destination = Destination::start(DestinationOptions::default());
    let slow = SourceOptions { max_bandwidth_bytes_per_s: Some(1_000_000), ..options() };
    let migration = start(&machine, &destination, slow);
    assert!(migration.go_over_to_postcopy().is_err(), "too early");
    wait_for_phase(&migration, Phase::FirstPass);
    migration.go_over_to_postcopy().unwrap();
    wait_for_phase(&migration, Phase::PostCopy);
    assert!(matches!(migration.cancel(), Err(CancelError::Committed(_))));
    migration.set_max_bandwidth(None);
    let outcome = migration.wait();
    let SourceOutcome::Moved(report) = &*outcome else { panic!("{outcome:?}") };
    assert_eq!(report.rounds.len(), 1, "the round under way was left");
    let (moved, _) = destination.owned();
    moved.pause(LIMIT).unwrap();
    assert!(moved.is_whole().unwrap());
}

#[test]
fn links_that_break_in_postcopy_are_made_anew() {
    // Odd numbers, so that breaks fall into headers and pages alike.
    for breaks in [vec![1], vec![4_133, 77, 200_011], vec![24; 5]] {
        let machine = running_machine();
        let destination = Destination::start(DestinationOptions::default());
        let options = SourceOptions { channels: 2, ..late() };
        let dial = Breaking::new(destination.dial(), options.channels, breaks);
        let shared = Arc::clone(&dial.shared);
        let outcome = SourceMigration::start(machine as _, Box::new(dial), options, Arc::new(Silent)).wait();
        let SourceOutcome::Moved(report) = &*outcome else { panic!("{outcome:?}") };
        let broken = shared.broken.load(Ordering::SeqCst);
        assert!(broken > 0 && !report.reconnections.is_empty(), "{broken} breaks, {report:?}");
        assert!(report.reconnections.iter().all(|broken| broken.outage_ms.is_some()), "{report:?}");
        assert!(report.audit.as_deref().is_some_and(|audit| audit.starts_with("ok: ")), "{:?}", report.audit);
        assert_whole(destination);
    }
}

#[test]
fn a_control_link_that_breaks_on_either_side_of_commit_loses_nothing() {
    for phase in [Phase::Pause, Phase::FinalPages, Phase::PostCopy] {
        let machine = running_machine();
        let destination = Destination::start(DestinationOptions::default());
        let migration = start(&machine, &destination, SourceOptions { hold_at: Some(phase), ..late() });
        wait_for_phase(&migration, phase);
        destination.hang_up.recv_timeout(LIMIT).unwrap().hang_up();
        migration.release_hold();
        let outcome = migration.wait();
        let SourceOutcome::Moved(report) = &*outcome else { panic!("{phase}: {outcome:?}") };
        assert_eq!(report.reconnections.len(), 1, "{phase}: {report:?}");
        assert_whole(destination);
    }
}

/// Without claims nobody can tell whether *commit* has arrived: the guest stays paused here, and only a person ends the wait.
#[test]
fn a_destination_that_is_lost_after_commit_is_waited_for_until_a_person_has_decided() {
    let machine = running_machine();
    let destination = Destination::start(DestinationOptions::default());
    let migration = start(&machine, &destination, SourceOptions { hold_at: Some(Phase::Commit), ..late() });
    wait_for_phase(&migration, Phase::Commit);
    destination.hang_up.recv_timeout(LIMIT).unwrap().hang_up();
    destination.ended();
    assert!(!migration.abandon(), "it is not lost yet");
    migration.release_hold();
    wait_for_phase(&migration, Phase::PostCopyPaused);
    wait_until("it has tried", || {
        migration.progress().reconnecting.is_some_and(|reconnecting| reconnecting.attempts > 2)
    });
    assert!(!machine.is_running() && migration.outcome().is_none());
    assert!(migration.abandon());
    let outcome = migration.wait();
    assert!(matches!(&*outcome, SourceOutcome::Unknown(why, _) if why.contains("a person")), "{outcome:?}");
    assert!(!machine.is_running());
}

/// Whoever does not say beforehand that it may come to post-copy hears when it does, and the rounds go on.
#[test]
fn a_host_that_cannot_fill_memory_says_so() {
    struct Unable(ToyHost);
    impl DestinationHost for Unable {
        type Machine = ToyMachine;

        fn check(&mut self, description: &MachineDescription, question: &[u8]) -> Verdict {
            self.0.check(description, question)
        }

        fn prepare(&mut self, description: &MachineDescription) -> Result<ToyMachine, MachineError> {
            self.0.prepare(description)
        }
    }
    let machine = running_machine();
    let destination = Destination::with_host(DestinationOptions::default(), Unable(ToyHost));
    let outcome = start(&machine, &destination, late()).wait();
    let refused = |refusals: &[Refusal]| refusals.iter().any(|refusal| refusal.subject == "post-copy");
    assert!(matches!(&*outcome, SourceOutcome::Refused(refusals) if refused(refusals)), "{outcome:?}");
    assert_runs_on(&machine);

    let destination = Destination::with_host(DestinationOptions::default(), Unable(ToyHost));
    let migration =
        start(&machine, &destination, SourceOptions { max_bandwidth_bytes_per_s: Some(8_000_000), ..options() });
    wait_for_phase(&migration, Phase::FirstPass);
    migration.go_over_to_postcopy().unwrap();
    migration.set_max_bandwidth(None);
    let outcome = migration.wait();
    assert!(matches!(&*outcome, SourceOutcome::Moved(report) if report.postcopy.is_none()), "{outcome:?}");
    assert_whole(destination);
}
