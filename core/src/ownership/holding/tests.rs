//! A holding against a real directory, with the destination played by hand.

use std::os::unix::fs::symlink;

use super::*;
use crate::ownership::directory::DirectoryStore;
use crate::ownership::store::{ClaimStore, Occupant};

struct Rig {
    _instances: tempfile::TempDir,
    directory: tempfile::TempDir,
    holding: Holding,
}

const SOON: Duration = Duration::from_millis(700);

fn rig() -> Rig {
    let (instances, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let host = Arc::new(Host::register(Some("here".parse().unwrap()), instances.path()).unwrap());
    let store = DirectoryStore::new(directory.path());
    let claim = host.claimant("m".parse().unwrap()).claim(Epoch::FIRST, Nonce(1));
    store.claim(&claim);
    let right = RightToRun::for_test(Epoch::FIRST);
    let holding = Holding::new(directory.path().into(), Timed::start(store).unwrap(), host, claim, right);
    Rig { _instances: instances, directory, holding }
}

impl Rig {
    fn committed() -> (Self, Epoch, Nonce) {
        let rig = rig();
        rig.holding.begin_handover();
        assert!(!rig.holding.may_run(), "what is handed over has no right to run");
        let (epoch, nonce) = rig.holding.commit().unwrap();
        (rig, epoch, nonce)
    }

    /// The destination claims.
    fn taken(&self, epoch: Epoch, nonce: Nonce) {
        let mut them = self.holding.me.clone();
        them.host = "there".parse().unwrap();
        DirectoryStore::new(self.directory.path()).claim(&them.claim(epoch, nonce));
    }

    fn settle(&self) -> Settlement {
        self.holding.settle(Some(Instant::now() + SOON), |_| {})
    }
}

#[test]
fn before_commit_the_right_comes_back_and_the_epoch_stays() {
    let rig = rig();
    rig.holding.begin_handover();
    assert!(rig.holding.give_up_handover());
    assert_eq!(rig.holding.claim().epoch, Epoch::FIRST);
    // Nothing to give up: nothing changes.
    assert!(rig.holding.give_up_handover());
}

#[test]
fn after_commit_giving_up_does_nothing() {
    let (rig, ..) = Rig::committed();
    assert!(!rig.holding.give_up_handover());
}

#[test]
fn a_destination_that_has_not_claimed_loses_the_machine() {
    let (rig, epoch, _) = Rig::committed();
    assert_eq!(rig.settle(), Settlement::Resumed(epoch));
    assert!(rig.holding.may_run());
    let found = DirectoryStore::new(rig.directory.path()).record(epoch).unwrap().unwrap();
    assert_eq!(found.occupant, Occupant::Claim(rig.holding.claim()), "the claim it holds is the one in the store");
}

#[test]
fn a_claim_without_a_marker_is_watched_until_there_is_one() {
    let (rig, epoch, nonce) = Rig::committed();
    rig.taken(epoch, nonce);
    assert!(matches!(rig.settle(), Settlement::Undecided(why) if why.contains("there")));
    assert!(!rig.holding.may_run());
    symlink("2.running", rig.directory.path().join("2.running")).unwrap();
    assert_eq!(rig.settle(), Settlement::Moved);
    assert!(!rig.holding.may_run());
}

#[test]
fn a_machine_claimed_anew_ends_the_copy() {
    let (rig, epoch, nonce) = Rig::committed();
    rig.taken(epoch, nonce);
    rig.taken(epoch.next().unwrap(), nonce);
    assert!(matches!(rig.settle(), Settlement::Superseded(record) if record.epoch.get() == 3));
    assert!(!rig.holding.may_run());
}

#[test]
fn a_store_that_is_away_leaves_it_undecided_and_back_again_decides_it() {
    let (rig, epoch, _) = Rig::committed();
    let away = rig.directory.path().with_extension("away");
    std::fs::rename(rig.directory.path(), &away).unwrap();
    assert!(matches!(rig.settle(), Settlement::Undecided(_)));
    assert!(!rig.holding.may_run());
    std::fs::rename(&away, rig.directory.path()).unwrap();
    assert_eq!(rig.settle(), Settlement::Resumed(epoch));
}

#[test]
fn running_ends_it_and_only_what_is_held_is_freed() {
    let (rig, ..) = Rig::committed();
    rig.holding.running();
    assert_eq!(rig.settle(), Settlement::Moved);
    rig.holding.free(SOON).unwrap();
    assert!(!rig.directory.path().join("1.free").is_symlink());

    let held = self::rig();
    held.holding.free(SOON).unwrap();
    assert!(held.directory.path().join("1.free").is_symlink());
    assert!(!held.holding.may_run(), "a freed machine does not run");
}

#[test]
fn a_person_s_word_claims_the_next_epoch_and_is_about_the_owner_that_was_shown() {
    let (rig, epoch, nonce) = Rig::committed();
    rig.taken(epoch, nonce);
    assert!(matches!(rig.settle(), Settlement::Undecided(_)));
    rig.holding.force(Epoch::FIRST);
    assert!(matches!(rig.settle(), Settlement::Undecided(_)), "a word about another owner counts for nothing");
    rig.holding.force(epoch);
    let next = epoch.next().unwrap();
    assert_eq!(rig.settle(), Settlement::Resumed(next));
    let found = DirectoryStore::new(rig.directory.path()).record(next).unwrap().unwrap();
    assert_eq!(found.occupant, Occupant::Claim(rig.holding.claim()), "what runs by force has claimed, too");
}

#[test]
fn no_word_counts_once_the_guest_has_run_elsewhere() {
    for (entry, text) in [("2.running", "2.running"), ("3", "somebody else's")] {
        let (rig, epoch, nonce) = Rig::committed();
        rig.taken(epoch, nonce);
        assert!(matches!(rig.settle(), Settlement::Undecided(_)));
        symlink(text, rig.directory.path().join(entry)).unwrap();
        rig.holding.force(epoch);
        assert!(matches!(rig.settle(), Settlement::Moved | Settlement::Superseded(_)), "{entry}");
        assert!(!rig.holding.may_run(), "{entry}");
    }
}

#[test]
fn a_person_s_word_is_forgotten_if_the_store_does_not_answer() {
    let (rig, epoch, nonce) = Rig::committed();
    rig.taken(epoch, nonce);
    assert!(matches!(rig.settle(), Settlement::Undecided(_)));
    let away = rig.directory.path().with_extension("away");
    std::fs::rename(rig.directory.path(), &away).unwrap();
    rig.holding.force(epoch);
    assert!(matches!(rig.settle(), Settlement::Undecided(_)));
    std::fs::rename(&away, rig.directory.path()).unwrap();
    assert!(matches!(rig.settle(), Settlement::Undecided(_)));
    assert!(!rig.holding.may_run());
}

#[test]
fn what_was_abandoned_never_runs_and_only_what_is_in_doubt_can_be() {
    assert!(!rig().holding.abandon(), "a machine that runs here is not in doubt");
    let (rig, ..) = Rig::committed();
    assert!(rig.holding.abandon());
    assert!(matches!(rig.settle(), Settlement::Undecided(_)));
    assert!(!rig.holding.may_run());
    assert!(DirectoryStore::new(rig.directory.path()).record(Epoch::new(2).unwrap()).unwrap().is_none());
}
