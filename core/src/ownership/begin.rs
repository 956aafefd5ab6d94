//! A start in life: [`Start`] with a store, a clock and patience.

use std::collections::VecDeque;
use std::path::Path;
use std::thread;

use super::attempt::RightToRun;
use super::claim::{Claimant, Nonce};
use super::instance::liveness;
use super::rules::Rules;
use super::start::{Action, Input, Mode, Refused, Start};
use super::timed::Timed;
use super::{CALL_LIMIT, RETRY_GAP};

/// Finds out whether the machine may start here, and claims it. `instances` is where this host's lock files lie. Blocks until it
/// is known, however long the store does not answer; `tell` hears why it takes so long.
pub fn begin(
    me: Claimant,
    nonce: Nonce,
    mode: Mode,
    store: &Timed,
    instances: &Path,
    mut tell: impl FnMut(&str),
) -> Result<RightToRun, Refused> {
    let (mut start, first) = Start::new(me, nonce, mode, Rules::default());
    let mut actions = VecDeque::from([first]);
    while let Some(action) = actions.pop_front() {
        let input = match action {
            Action::Look => Input::Seen(store.newest(CALL_LIMIT)),
            Action::Examine(claim) => Input::Examined(liveness(instances, &claim.claimant.instance)),
            Action::Claim(claim) => Input::Claimed(store.claim(&claim, CALL_LIMIT)),
            Action::Wait => {
                thread::sleep(RETRY_GAP);
                Input::Retry
            }
            Action::Report(why) => {
                tell(&why);
                continue;
            }
            Action::Run(right) => return Ok(right),
            Action::Refuse(why) => return Err(why),
        };
        actions.extend(start.handle(input));
    }
    // The rules end every start with one of the two.
    Err(Refused::CannotClaim("the start came to no end".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::directory::DirectoryStore;
    use crate::ownership::{Epoch, Marker};

    fn name(text: &str) -> crate::ownership::Name {
        text.parse().unwrap()
    }

    #[test]
    fn a_machine_is_started_once_and_again_when_it_is_free() {
        let directory = tempfile::tempdir().unwrap();
        let store = Timed::start(DirectoryStore::new(directory.path())).unwrap();
        let try_to = |host: &str, mode| {
            let me = Claimant { machine: name("m"), host: name(host), boot_id: name("b"), instance: name("i") };
            begin(me, Nonce(host.len() as u64), mode, &store, directory.path(), |_| {})
        };
        assert_eq!(try_to("here", Mode::Existing), Err(Refused::NoClaims));
        assert_eq!(try_to("here", Mode::New).unwrap().epoch(), Epoch::FIRST);
        assert!(
            matches!(try_to("there", Mode::Existing), Err(Refused::Others(record)) if record.epoch == Epoch::FIRST)
        );
        store.mark(Epoch::FIRST, Marker::Free, CALL_LIMIT);
        assert_eq!(try_to("there", Mode::Existing).unwrap().epoch().get(), 2);
    }
}
