//! Whole moves of a machine that is not the KVM machine, over unix sockets, in one process.

// Helpers outside of #[test] functions may unwrap too: a test is where that belongs.
#![allow(clippy::unwrap_used)]

#[path = "moves/broken_links.rs"]
mod broken_links;
#[path = "moves/preflight.rs"]
mod preflight;
#[path = "../examples/toy_vmm.rs"]
#[allow(dead_code)]
mod toy_vmm;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use godwit_core::destination::{DestinationOptions, DestinationOutcome, receive, refuse};
use godwit_core::progress::{Event, Observer, Reconnection, Silent};
use godwit_core::source::{CancelError, Compression, OnStall, SourceMigration, SourceOptions, SourceOutcome};
use godwit_core::{
    DestinationHost, DestinationMachine, DirtyLog, GuestMemory, MachineDescription, MachineError, Phase, Refusal,
    Section, SourceMachine, Verdict,
};
use godwit_transport::{Options, Uri};
use toy_vmm::{ToyHost, ToyMachine};

const LIMIT: Duration = Duration::from_secs(20);

/// A destination in a thread of its own, with the means to break it.
struct Destination {
    uri: Uri,
    taken_in: JoinHandle<DestinationOutcome<ToyMachine>>,
    hang_up: Receiver<Arc<dyn godwit_core::HangUp>>,
    _directory: tempfile::TempDir,
}

impl Destination {
    fn start(options: DestinationOptions) -> Self {
        Self::with_host(options, ToyHost)
    }

    fn with_host<H: DestinationHost<Machine = ToyMachine> + 'static>(options: DestinationOptions, mut host: H) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let uri: Uri = format!("unix:{}", directory.path().join("socket").display()).parse().unwrap();
        let listener = godwit_transport::listen(&uri, Options::default()).unwrap();
        let (tell, hang_up) = mpsc::channel();
        let taken_in = thread::spawn(move || {
            let control = listener.next_control(LIMIT).unwrap().expect("a peer");
            tell.send(Arc::clone(&control.hang_up)).unwrap();
            receive(control, &mut listener.incoming_data(), &mut host, &options, Arc::new(Silent))
        });
        Self { uri, taken_in, hang_up, _directory: directory }
    }

    fn dial(&self) -> Box<dyn godwit_core::Dial> {
        godwit_transport::connect(&self.uri, Options::default()).unwrap()
    }

    fn owned(self) -> (ToyMachine, bool) {
        match self.taken_in.join().unwrap() {
            DestinationOutcome::Owned { machine, running, .. } => (machine, running),
            DestinationOutcome::Ended(why) | DestinationOutcome::Dropped(why) => panic!("not owned: {why}"),
        }
    }

    fn ended(self) -> String {
        match self.taken_in.join().unwrap() {
            DestinationOutcome::Owned { .. } => panic!("owned by the destination"),
            DestinationOutcome::Ended(why) => why,
            DestinationOutcome::Dropped(why) => panic!("lost: {why}"),
        }
    }
}

fn running_machine() -> Arc<ToyMachine> {
    let machine = Arc::new(ToyMachine::new().unwrap());
    machine.resume().unwrap();
    wait_until("the guest writes", || machine.writes() > 1000);
    machine
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn options() -> SourceOptions {
    SourceOptions { downtime_limit: Duration::from_millis(50), audit: true, ..SourceOptions::default() }
}

fn start(machine: &Arc<ToyMachine>, destination: &Destination, options: SourceOptions) -> SourceMigration {
    SourceMigration::start(Arc::clone(machine) as _, destination.dial(), options, Arc::new(Silent))
}

fn wait_for_phase(migration: &SourceMigration, phase: Phase) {
    wait_until(&format!("phase {phase}"), || {
        assert!(migration.outcome().is_none(), "ended before {phase}: {:?}", migration.outcome());
        migration.progress().phase == Some(phase)
    });
}

/// Invariant 2, as far as a toy has it: runs, log off, memory whole.
fn assert_runs_on(machine: &Arc<ToyMachine>) {
    assert!(machine.is_running());
    let writes = machine.writes();
    wait_until("the guest goes on", || machine.writes() > writes + 1000);
    machine.pause(LIMIT).unwrap();
    assert!(machine.is_whole().unwrap());
    machine.resume().unwrap();
}

fn assert_moves(machine: &Arc<ToyMachine>, options: SourceOptions) -> ToyMachine {
    let destination = Destination::start(DestinationOptions::default());
    let outcome = start(machine, &destination, options).wait();
    let SourceOutcome::Moved(report) = &*outcome else { panic!("{outcome:?}") };
    assert!(report.audit.as_deref().is_none_or(|audit| audit.starts_with("ok: ")), "{:?}", report.audit);
    assert!(!machine.is_running());
    let writes_at_source = machine.writes();
    let (moved, running) = destination.owned();
    assert!(running);
    wait_until("the guest goes on at the destination", || moved.writes() > writes_at_source + 100);
    moved.pause(LIMIT).unwrap();
    assert!(moved.is_whole().unwrap(), "the guest's memory is whole at the destination");
    moved
}

#[test]
fn moves_whole_with_any_channels_and_compression() {
    for (channels, compression, cap) in [
        (1, Compression::None, None),
        (3, Compression::Zstd(1), None),
        (2, Compression::Auto, Some(20_000_000)),
        (64, Compression::Auto, None),
    ] {
        let options = SourceOptions { channels, compression, max_bandwidth_bytes_per_s: cap, ..options() };
        assert_moves(&running_machine(), options);
    }
}

/// A machine whose dirty log does not behave.
struct Meddling(Arc<ToyMachine>, Meddle);

#[derive(PartialEq)]
enum Meddle {
    /// The guest writes a page at the worst moment: just before the log is cleared of that very page.
    WriteBeforeClear,
    /// The log forgets what the guest has written.
    Forget,
}

impl SourceMachine for Meddling {
    fn describe(&self) -> Result<MachineDescription, MachineError> {
        self.0.describe()
    }
    fn memory(&self) -> GuestMemory {
        SourceMachine::memory(&*self.0)
    }
    fn dirty_log(&self) -> &dyn DirtyLog {
        self
    }
    fn is_running(&self) -> bool {
        self.0.is_running()
    }
    fn pause(&self, limit: Duration) -> Result<(), MachineError> {
        self.0.pause(limit)
    }
    fn save(&self) -> Result<Vec<Section>, MachineError> {
        self.0.save()
    }
    fn resume(&self) -> Result<(), MachineError> {
        self.0.resume()
    }
    fn throttle(&self, share: f64) {
        self.0.throttle(share);
    }
}

impl DirtyLog for Meddling {
    fn start(&self) -> Result<(), MachineError> {
        self.0.dirty_log().start()
    }
    fn stop(&self) -> Result<(), MachineError> {
        self.0.dirty_log().stop()
    }
    fn harvest(&self, region: usize, words: &mut [u64]) -> Result<(), MachineError> {
        self.0.dirty_log().harvest(region, words)?;
        if self.1 == Meddle::Forget {
            words.fill(0);
        }
        Ok(())
    }
    fn clear(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), MachineError> {
        if self.1 == Meddle::WriteBeforeClear && words[0] & 1 == 1 {
            // Past what the toy's own guest writes, in the page's last word.
            self.0.guest_write(self.0.writes() + 1, first_page * 4096 + 4088).unwrap();
        }
        self.0.dirty_log().clear(region, first_page, words)
    }
}

#[test]
fn invariant_3_a_write_just_before_the_log_is_cleared_is_not_lost() {
    // Pages that were never touched before are written so too: they must not be left out as untouched.
    assert_eq!(audit_with(Meddle::WriteBeforeClear), "ok: 16384 pages");
}

/// Both ends agree on the stale pages: only the audit knows better.
#[test]
fn invariant_4_lost_dirty_bits_are_found_by_the_audit() {
    let audit = audit_with(Meddle::Forget);
    assert!(audit.starts_with("FAILED: "), "{audit}");
}

fn audit_with(meddle: Meddle) -> String {
    let destination = Destination::start(DestinationOptions::default());
    let machine = Arc::new(Meddling(running_machine(), meddle));
    let outcome = SourceMigration::start(machine, destination.dial(), options(), Arc::new(Silent)).wait();
    let SourceOutcome::Moved(report) = &*outcome else { panic!("{outcome:?}") };
    report.audit.clone().unwrap_or_default()
}

#[test]
fn moves_without_verification_too() {
    assert_moves(&running_machine(), SourceOptions { verify: false, audit: false, ..options() });
}

#[test]
fn a_machine_can_be_sent_onward_and_back() {
    let mut machine = running_machine();
    for _ in 0..3 {
        let moved = Arc::new(assert_moves(&machine, options()));
        moved.resume().unwrap();
        machine = moved;
    }
}

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

/// A link that is said to be too slow for the first pass to suffice, so that there are rounds.
fn stop_late(phase: Phase) -> Option<u64> {
    (phase == Phase::Rounds).then_some(1)
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
fn a_paused_or_held_machine_arrives_paused() {
    for (pause, hold) in [(true, false), (false, true)] {
        let machine = running_machine();
        if pause {
            machine.pause(LIMIT).unwrap();
        }
        let destination = Destination::start(DestinationOptions { hold, ..DestinationOptions::default() });
        let outcome = start(&machine, &destination, options()).wait();
        assert!(matches!(&*outcome, SourceOutcome::Moved(_)), "{outcome:?}");
        let (moved, running) = destination.owned();
        assert!(!running && !moved.is_running());
        assert_eq!(moved.writes(), machine.writes());
        assert!(moved.is_whole().unwrap());
    }
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

/// Refuses, or cannot build, or has memory that is not what it should be.
struct Bad(&'static str);

impl DestinationHost for Bad {
    type Machine = ToyMachine;

    fn check(&mut self, _: &MachineDescription, _: &[u8]) -> Verdict {
        match self.0 {
            "check" => vec![Refusal::new("cpu", "no avx"), Refusal::new("memory", "too large")].into(),
            _ => Verdict::default(),
        }
    }

    fn prepare(&mut self, _: &MachineDescription) -> Result<ToyMachine, MachineError> {
        match self.0 {
            "prepare" => Err(MachineError::new("no room for the machine")),
            _ => ToyMachine::new(),
        }
    }
}

#[test]
fn every_reason_for_a_refusal_reaches_the_user() {
    let machine = running_machine();
    let destination = Destination::with_host(DestinationOptions::default(), Bad("check"));
    let outcome = start(&machine, &destination, options()).wait();
    let SourceOutcome::Refused(refusals) = &*outcome else { panic!("{outcome:?}") };
    assert_eq!(refusals.iter().map(|refusal| &*refusal.subject).collect::<Vec<_>>(), ["cpu", "memory"]);
    assert_runs_on(&machine);
}

#[test]
fn why_the_destination_cannot_build_the_machine_reaches_the_user() {
    let machine = running_machine();
    let destination = Destination::with_host(DestinationOptions::default(), Bad("prepare"));
    let outcome = start(&machine, &destination, options()).wait();
    assert!(
        matches!(&*outcome, SourceOutcome::Failed(why, _) if why.contains("no room for the machine")),
        "{outcome:?}"
    );
    assert_runs_on(&machine);
}

#[test]
fn a_dry_run_changes_nothing() {
    let machine = running_machine();
    let destination = Destination::start(DestinationOptions::default());
    let outcome = start(&machine, &destination, SourceOptions { dry_run: true, ..options() }).wait();
    assert!(matches!(&*outcome, SourceOutcome::WouldMove(report) if report.downtime_ms.is_none()), "{outcome:?}");
    assert!(destination.ended().contains("dry run"));
    assert_runs_on(&machine);
}

#[test]
fn a_limit_that_cannot_be_met_ends_the_move_or_forces_the_pause() {
    let machine = running_machine();
    // At this rate the pause is predicted to take days, whatever the rounds leave.
    let hopeless = SourceOptions { switchover_bandwidth_bytes_per_s: Some(1), max_rounds: 4, ..options() };
    let destination = Destination::start(DestinationOptions::default());
    let outcome = start(&machine, &destination, hopeless.clone()).wait();
    let SourceOutcome::Failed(why, report) = &*outcome else { panic!("{outcome:?}") };
    assert!(why.contains("does not converge") && report.rounds.len() == 5, "{why}: {}", report.rounds.len());
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

/// Collects what is told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Observer for Told {
    fn event(&self, event: Event) {
        let text = match event {
            Event::Phase { phase } => phase.to_string(),
            Event::Round(round) => format!("round {}", round.round),
            Event::Decision { text } => text,
        };
        self.0.lock().unwrap().push(text);
    }
}

#[test]
fn an_observer_hears_of_phases_rounds_and_decisions() {
    let machine = running_machine();
    let destination = Destination::start(DestinationOptions::default());
    let told = Arc::new(Told::default());
    SourceMigration::start(machine as _, destination.dial(), options(), Arc::clone(&told) as _).wait();
    let told = told.0.lock().unwrap().join("\n");
    for part in ["connect", "handshake", "first-pass", "round 0", "stopping the guest", "commit", "completed"] {
        assert!(told.contains(part), "{part} in\n{told}");
    }
}

#[test]
fn invariant_5_peers_that_are_not_ours_are_survived() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let uri: Uri = format!("unix:{}", path.display()).parse().unwrap();
    let listener = godwit_transport::listen(&uri, Options::default()).unwrap();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"x"] {
        UnixStream::connect(&path).unwrap().write_all(garbage).unwrap();
    }
    // A peer that knows the transport but then talks nonsense on its control channel.
    for frame in [
        &b"GWCT\x01\x00\x00\x00\xff\xff\xff\xff\0\0\0\0"[..],
        b"GWCT\x63\x00\x00\x00\x00\x00\x00\x00\0\0\0\0",
        &[7; 64],
    ] {
        let mut channel = godwit_transport::connect(&uri, Options::default()).unwrap().control(LIMIT).unwrap();
        channel.writer.write_all(frame).unwrap();
        let control = listener.next_control(LIMIT).unwrap().expect("a peer");
        let outcome = receive(
            control,
            &mut listener.incoming_data(),
            &mut ToyHost,
            &DestinationOptions::default(),
            Arc::new(Silent),
        );
        assert!(matches!(outcome, DestinationOutcome::Ended(_)));
    }
    let machine = running_machine();
    let dial = godwit_transport::connect(&uri, Options::default()).unwrap();
    let migration = SourceMigration::start(Arc::clone(&machine) as _, dial, options(), Arc::new(Silent));
    let control = listener.next_control(LIMIT).unwrap().expect("a peer");
    let mut data = listener.incoming_data();
    let outcome = receive(control, &mut data, &mut ToyHost, &DestinationOptions::default(), Arc::new(Silent));
    assert!(matches!(outcome, DestinationOutcome::Owned { .. }));
    assert!(matches!(&*migration.wait(), SourceOutcome::Moved(_)));
}

#[test]
fn a_peer_that_is_turned_away_hears_why() {
    let directory = tempfile::tempdir().unwrap();
    let uri: Uri = format!("unix:{}", directory.path().join("socket").display()).parse().unwrap();
    let listener = godwit_transport::listen(&uri, Options::default()).unwrap();
    let dial = godwit_transport::connect(&uri, Options::default()).unwrap();
    let machine = running_machine();
    let migration = SourceMigration::start(Arc::clone(&machine) as _, dial, options(), Arc::new(Silent));
    refuse(listener.next_control(LIMIT).unwrap().expect("a peer"), "fw1 is moving in");
    let outcome = migration.wait();
    let SourceOutcome::Refused(refusals) = &*outcome else { panic!("{outcome:?}") };
    assert!(refusals[0].reason.contains("fw1 is moving in"), "{refusals:?}");
    assert_runs_on(&machine);
}

#[test]
fn loading_hostile_state_is_an_error() {
    let mut machine = ToyMachine::new().unwrap();
    assert!(machine.load(&[], &Default::default()).is_err());
}
