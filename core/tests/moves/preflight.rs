//! The second leg of preflight: a machine's question, the destination's answer, and what becomes of it. And settling.

use std::sync::atomic::{AtomicUsize, Ordering};

use godwit_core::Inquiry;
use godwit_core::machine::Hold;

use super::*;

/// A machine with a question, behind a toy machine.
struct Asks {
    machine: Arc<ToyMachine>,
    question: &'static [u8],
    asking: Arc<AtomicUsize>,
    settled: Arc<AtomicUsize>,
}

/// Counts how many of its kind there are.
struct Question(&'static [u8], Arc<AtomicUsize>);

impl Inquiry for Question {
    fn question(&self) -> Vec<u8> {
        self.0.into()
    }
    fn judge(&self, evidence: &[u8]) -> Vec<Refusal> {
        match evidence {
            b"answer" => Vec::new(),
            _ => vec![Refusal::new("disk root", "another one")],
        }
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

impl SourceMachine for Asks {
    fn describe(&self) -> Result<MachineDescription, MachineError> {
        self.machine.describe()
    }
    fn inquire(&self) -> Result<Box<dyn Inquiry>, MachineError> {
        self.asking.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Question(self.question, Arc::clone(&self.asking))))
    }
    fn memory(&self) -> GuestMemory {
        SourceMachine::memory(&*self.machine)
    }
    fn dirty_log(&self) -> &dyn DirtyLog {
        self.machine.dirty_log()
    }
    fn is_running(&self) -> bool {
        self.machine.is_running()
    }
    fn pause(&self, limit: Duration) -> Result<(), MachineError> {
        self.machine.pause(limit)
    }
    fn save(&self) -> Result<Vec<Section>, MachineError> {
        self.machine.save()
    }
    fn resume(&self) -> Result<(), MachineError> {
        self.machine.resume()
    }
    fn throttle(&self, hold: Hold) {
        self.machine.throttle(hold);
    }
    fn settle(&self) {
        self.settled.fetch_add(1, Ordering::SeqCst);
    }
}

/// Answers one question, and warns.
struct Answers;

impl DestinationHost for Answers {
    type Machine = ToyMachine;

    fn check(&mut self, _: &MachineDescription, question: &[u8]) -> Verdict {
        let evidence = if question == b"question" { b"answer".to_vec() } else { Vec::new() };
        Verdict { evidence, warnings: vec!["it is windy here".into()], ..Verdict::default() }
    }

    fn prepare(&mut self, _: &MachineDescription) -> Result<ToyMachine, MachineError> {
        ToyMachine::new()
    }
}

/// Remembers what it was told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Observer for Told {
    fn event(&self, event: Event) {
        if let Event::Decision { text } = event {
            self.0.lock().unwrap().push(text);
        }
    }
}

fn asks(machine: &Arc<ToyMachine>, question: &'static [u8]) -> Arc<Asks> {
    let machine = Arc::clone(machine);
    Arc::new(Asks { machine, question, asking: Arc::default(), settled: Arc::default() })
}

#[test]
fn the_answer_to_a_machines_question_decides_in_preflight() {
    let toy = running_machine();
    for (question, dry_run) in [(&b"question"[..], true), (b"question", false), (b"riddle", true), (b"riddle", false)] {
        let machine = asks(&toy, question);
        let destination = Destination::with_host(DestinationOptions::default(), Answers);
        let told = Arc::new(Told::default());
        let migration = SourceMigration::start(
            Arc::clone(&machine) as _,
            destination.dial(),
            SourceOptions { dry_run, hold_at: Some(Phase::Prepare).filter(|_| !dry_run), ..options() },
            Arc::clone(&told) as _,
        );
        if question == b"question" && !dry_run {
            wait_for_phase(&migration, Phase::Prepare);
            migration.cancel().unwrap();
        }
        let outcome = migration.wait();
        match (&*outcome, question) {
            (SourceOutcome::WouldMove(_), b"question") => assert!(dry_run),
            (SourceOutcome::Cancelled(_), b"question") => assert!(!dry_run),
            (SourceOutcome::Refused(refusals), b"riddle") => {
                assert_eq!(refusals, &[Refusal::new("disk root", "another one")]);
            }
            _ => panic!("{outcome:?}"),
        }
        assert_eq!(machine.asking.load(Ordering::SeqCst), 0, "what was made for the question is gone");
        assert!(told.0.lock().unwrap().iter().any(|text| text.contains("it is windy here")));
        assert_runs_on(&toy);
    }
}

#[test]
fn a_question_without_an_answer_goes_with_the_move() {
    let toy = running_machine();
    let machine = asks(&toy, b"question");
    // A destination that never comes to an answer.
    let destination = Destination::with_host(DestinationOptions::default(), Answers);
    let options = SourceOptions { hold_at: Some(Phase::Preflight), ..options() };
    let migration = SourceMigration::start(Arc::clone(&machine) as _, destination.dial(), options, Arc::new(Silent));
    wait_for_phase(&migration, Phase::Preflight);
    destination.hang_up.recv().unwrap().hang_up();
    migration.release_hold();
    assert!(matches!(&*migration.wait(), SourceOutcome::Failed(..)));
    assert_eq!(machine.asking.load(Ordering::SeqCst), 0);
}

#[test]
fn a_machine_is_settled_while_its_memory_is_being_sent_and_not_later() {
    let toy = running_machine();
    let machine = asks(&toy, b"question");
    let destination = Destination::with_host(DestinationOptions::default(), Answers);
    // Its working set of 4 MiB takes four seconds.
    let options = SourceOptions {
        max_bandwidth_bytes_per_s: Some(1_000_000),
        compression: Compression::None,
        delta_cache_bytes: 0,
        ..options()
    };
    let migration = SourceMigration::start(Arc::clone(&machine) as _, destination.dial(), options, Arc::new(Silent));
    assert!(matches!(&*migration.wait(), SourceOutcome::Moved(_)));
    let settled = machine.settled.load(Ordering::SeqCst);
    assert!((2..20).contains(&settled), "{settled}");
    thread::sleep(Duration::from_millis(700));
    assert_eq!(machine.settled.load(Ordering::SeqCst), settled);
}
