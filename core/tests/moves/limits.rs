//! Limits of a move: on its pause, its time, its rounds and its bandwidth, and the wait before the switchover.

use super::*;

#[test]
fn a_limit_that_cannot_be_met_ends_the_move_or_forces_the_pause() {
    let machine = running_machine();
    // At this rate the pause is predicted to take days, whatever the rounds leave.
    let hopeless = SourceOptions { switchover_bandwidth_bytes_per_s: Some(1), max_rounds: 4, ..options() };
    let destination = Destination::start(DestinationOptions::default());
    let outcome = start(&machine, &destination, hopeless.clone()).wait();
    let SourceOutcome::Failed(why, report) = &*outcome else { panic!("{outcome:?}") };
    assert!(why.contains("does not converge") && report.rounds.len() <= 5, "{why}: {}", report.rounds.len());
    assert_runs_on(&machine);
    let impossible = SourceOptions { downtime_limit: Duration::ZERO, ..options() };
    let destination = Destination::start(DestinationOptions::default());
    let outcome = start(&machine, &destination, impossible).wait();
    let SourceOutcome::Failed(why, report) = &*outcome else { panic!("{outcome:?}") };
    assert!(why.contains("even with nothing left") && report.rounds.len() == 1, "{why}: {}", report.rounds.len());
    assert_runs_on(&machine);
    assert_moves(&machine, SourceOptions { on_stall: OnStall::Force, ..hopeless });
}

#[test]
fn a_time_budget_ends_a_round_in_the_middle() {
    let machine = running_machine();
    let slow = SourceOptions {
        // 4 MiB at 1 MB/s take four seconds.
        max_bandwidth_bytes_per_s: Some(1_000_000),
        compression: Compression::None,
        delta_cache_bytes: 0,
        switchover_bandwidth_bytes_per_s: Some(1_000_000),
        timeout: Some(Duration::from_millis(300)),
        ..options()
    };
    let destination = Destination::start(DestinationOptions::default());
    let began = Instant::now();
    let outcome = start(&machine, &destination, slow).wait();
    assert!(matches!(&*outcome, SourceOutcome::Failed(why, _) if why.contains("time budget")), "{outcome:?}");
    assert!(began.elapsed() < Duration::from_secs(3));
    assert_runs_on(&machine);
}

#[test]
fn waits_before_the_switchover_until_told_to_go_on() {
    let machine = running_machine();
    let destination = Destination::start(DestinationOptions::default());
    let migration = start(&machine, &destination, SourceOptions { pause_before_switchover: true, ..options() });
    wait_for_phase(&migration, Phase::PreSwitchover);
    let writes = machine.writes();
    wait_until("the guest runs on meanwhile", || machine.writes() > writes + 1000);
    assert!(migration.proceed());
    assert!(matches!(&*migration.wait(), SourceOutcome::Moved(_)));
    let (moved, _) = destination.owned();
    moved.pause(LIMIT).unwrap();
    assert!(moved.is_whole().unwrap());
}

#[test]
fn a_cap_changed_in_flight_holds_at_once() {
    let machine = running_machine();
    let destination = Destination::start(DestinationOptions::default());
    let crawl = SourceOptions {
        max_bandwidth_bytes_per_s: Some(10_000),
        compression: Compression::None,
        delta_cache_bytes: 0,
        switchover_bandwidth_bytes_per_s: Some(100_000_000),
        ..options()
    };
    let migration = start(&machine, &destination, crawl);
    wait_for_phase(&migration, Phase::FirstPass);
    thread::sleep(Duration::from_millis(50));
    assert!(migration.progress().wire_bytes < 100_000, "{}", migration.progress().wire_bytes);
    migration.set_max_bandwidth(None);
    assert!(matches!(&*migration.wait(), SourceOutcome::Moved(_)));
}
