//! Moves that are cancelled or whose link breaks, in every phase, which are taken from the engine's own list.

use super::*;

#[test]
fn invariant_2_a_broken_link_in_every_phase_before_commit_leaves_the_guest_at_the_source() {
    for &phase in Phase::all().iter().filter(|phase| phase.before_commit()) {
        let machine = running_machine();
        let destination = Destination::start(DestinationOptions::default());
        let wait = phase == Phase::PreSwitchover;
        let held = SourceOptions {
            hold_at: Some(phase),
            pause_before_switchover: wait,
            switchover_bandwidth_bytes_per_s: stop_late(phase),
            reconnect_timeout: Duration::ZERO,
            ..options()
        };
        let migration = start(&machine, &destination, held);
        wait_for_phase(&migration, phase);
        if phase == Phase::Connect {
            // There is no link to break yet: the destination goes away instead.
            std::fs::remove_file(destination.uri.to_string().trim_start_matches("unix:")).unwrap();
        } else {
            destination.hang_up.recv_timeout(LIMIT).unwrap().hang_up();
        }
        migration.release_hold();
        let outcome = migration.wait();
        assert!(matches!(&*outcome, SourceOutcome::Failed(..)), "{phase}: {outcome:?}");
        if phase != Phase::Connect {
            destination.ended();
        }
        assert_runs_on(&machine);
        assert_moves(&machine, options());
    }
}

#[test]
fn invariant_2_cancelling_in_every_phase_before_commit_leaves_the_guest_at_the_source() {
    for &phase in Phase::all().iter().filter(|phase| phase.before_commit()) {
        let machine = running_machine();
        let destination = Destination::start(DestinationOptions::default());
        let wait = phase == Phase::PreSwitchover;
        let held = SourceOptions {
            hold_at: Some(phase),
            pause_before_switchover: wait,
            switchover_bandwidth_bytes_per_s: stop_late(phase),
            ..options()
        };
        let migration = start(&machine, &destination, held);
        wait_for_phase(&migration, phase);
        migration.cancel().unwrap();
        let outcome = migration.wait();
        assert!(matches!(&*outcome, SourceOutcome::Cancelled(_)), "{phase}: {outcome:?}");
        assert_eq!(migration.cancel(), Err(CancelError::Ended));
        if phase != Phase::Connect {
            destination.ended();
        }
        assert_runs_on(&machine);
        assert_moves(&machine, options());
    }
}

#[test]
fn invariant_1_after_commit_nothing_is_cancelled_and_a_lost_link_leaves_the_source_paused() {
    let machine = running_machine();
    let destination = Destination::start(DestinationOptions::default());
    let migration = start(&machine, &destination, SourceOptions { hold_at: Some(Phase::Commit), ..options() });
    wait_for_phase(&migration, Phase::Commit);
    assert!(matches!(migration.cancel(), Err(CancelError::Committed(_))));
    destination.hang_up.recv_timeout(LIMIT).unwrap().hang_up();
    migration.release_hold();
    let outcome = migration.wait();
    assert!(matches!(&*outcome, SourceOutcome::Unknown(..)), "{outcome:?}");
    assert!(!machine.is_running(), "the source never resumes by itself after commit");
    destination.ended();
}

#[test]
fn a_paused_machine_stays_paused_when_its_move_fails() {
    let machine = running_machine();
    machine.pause(LIMIT).unwrap();
    let destination = Destination::start(DestinationOptions::default());
    let migration = start(&machine, &destination, SourceOptions { hold_at: Some(Phase::State), ..options() });
    wait_for_phase(&migration, Phase::State);
    migration.cancel().unwrap();
    migration.wait();
    assert!(!machine.is_running());
}
