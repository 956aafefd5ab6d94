//! Whole moves of a machine that is not the KVM machine, over unix sockets, in one process.

// Helpers outside of #[test] functions may unwrap too: a test is where that belongs.
#![allow(clippy::unwrap_used)]

#[path = "moves/broken_links.rs"]
mod broken_links;
#[path = "moves/called_off.rs"]
mod called_off;
#[path = "moves/dirty_log.rs"]
mod dirty_log;
#[path = "moves/limits.rs"]
mod limits;
#[path = "moves/postcopy.rs"]
mod postcopy;
#[path = "moves/preflight.rs"]
mod preflight;
#[path = "moves/refusals.rs"]
mod refusals;
#[path = "../examples/toy_vmm.rs"]
#[allow(dead_code)]
mod toy_vmm;

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
            let mut data = listener.incoming_data();
            let mut outcome = receive(control, &mut data, &mut host, &options, Arc::new(Silent));
            if let DestinationOutcome::Owned { filling, .. } = &mut outcome
                && let Some(filling) = filling.take()
            {
                filling.run(&mut data);
            }
            outcome
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
    // It writes a word of each page and then the next: pages of which less is set are hardly any bytes.
    wait_until("the guest has written the first 70 words of each page", || machine.writes() > 70 << 10);
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

/// A link that is said to be too slow for the first pass to suffice, so that there are rounds.
fn stop_late(phase: Phase) -> Option<u64> {
    (phase == Phase::Rounds).then_some(1)
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
fn a_dry_run_changes_nothing() {
    let machine = running_machine();
    let destination = Destination::start(DestinationOptions::default());
    let outcome = start(&machine, &destination, SourceOptions { dry_run: true, ..options() }).wait();
    assert!(matches!(&*outcome, SourceOutcome::WouldMove(report) if report.downtime_ms.is_none()), "{outcome:?}");
    assert!(destination.ended().contains("dry run"));
    assert_runs_on(&machine);
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
fn loading_hostile_state_is_an_error() {
    let mut machine = ToyMachine::new().unwrap();
    assert!(machine.load(&[], &Default::default()).is_err());
}
