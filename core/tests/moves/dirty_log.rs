//! Moves of a machine whose dirty log does not behave, and what the audit makes of them.

use super::*;

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
    fn throttle(&self, hold: godwit_core::machine::Hold) {
        self.0.throttle(hold);
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
    let machine = running_machine();
    let meddling = Arc::new(Meddling(Arc::clone(&machine), meddle));
    let options = SourceOptions { pause_before_switchover: true, ..options() };
    let migration = SourceMigration::start(meddling, destination.dial(), options, Arc::new(Silent));
    wait_for_phase(&migration, Phase::PreSwitchover);
    // However quick the first pass was, the guest has written since.
    let writes = machine.writes();
    wait_until("the guest writes what has been sent", || machine.writes() > writes + 1000);
    assert!(migration.proceed());
    let outcome = migration.wait();
    let SourceOutcome::Moved(report) = &*outcome else { panic!("{outcome:?}") };
    report.audit.clone().unwrap_or_default()
}
