//! What must hold at every moment.

use godwit_core::Phase;
use godwit_core::ownership::Marker;

use crate::process::{Process, Role};
use crate::world::World;

impl World {
    /// Looks at all of it.
    pub fn check(&mut self) {
        self.check_runner();
        self.check_throttle();
        self.check_needs();
    }

    /// One runs the guest at most, and by right.
    fn check_runner(&mut self) {
        let mut runners = self.processes.iter().filter(|process| process.runs());
        let Some(runner) = runners.next() else { return };
        if runners.next().is_some() {
            return self.violate("two run the guest");
        }
        if !self.setup.claims {
            return;
        }
        let is_whole = runner.machine.as_ref().is_none_or(|machine| machine.is_whole());
        let newest = self.store.entries.newest_claim().filter(|newest| newest.claimant == runner.claimant);
        let Some(newest) = newest else {
            return self.violate("the guest runs against the newest claim, which is another's");
        };
        let (epoch, incomplete) = (newest.epoch, newest.incomplete);
        self.ran.insert(epoch);
        if !is_whole && !incomplete {
            self.violate("the guest runs without all of its memory, and its claim does not say so");
        }
        if !is_whole && self.store.entries.is_marked(epoch, Marker::Complete) {
            self.violate("the guest runs without all of its memory, and the claims say that it has it");
        }
    }

    /// A guest is held back only while its memory is being sent, by a move that is under way.
    fn check_throttle(&mut self) {
        let wrongly = |process: &&Process| match &process.role {
            _ if !process.machine.as_ref().is_some_and(|machine| machine.is_throttled()) => false,
            Role::Source(end) if end.is_busy() => false,
            Role::Source(end) => {
                end.control.reconnecting().is_some() || !matches!(end.control.phase(), Phase::FirstPass | Phase::Rounds)
            }
            _ => true,
        };
        if self.processes.iter().find(wrongly).is_some() {
            self.violate("a guest is throttled, and no move has a reason for that");
        }
    }

    /// Who waits for a page has asked for it, as soon as there is somebody to ask, and what nobody asks for comes, too.
    fn check_needs(&mut self) {
        let mut services = self.processes.iter().filter_map(|process| match &process.role {
            Role::Filling(end) => Some(&end.service),
            Role::Destination(end) => end.service(),
            _ => None,
        });
        let forgotten = services.clone().any(|service| service.forgotten().is_some());
        if services.any(|service| service.is_left_behind()) {
            self.violate("the source has sent all that it knows of, and pages are missing");
        } else if forgotten {
            self.violate("somebody waits for a page that nobody has asked for");
        }
    }
}
