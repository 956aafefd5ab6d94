//! The directory store on local file systems, and what may lie in it.

use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Barrier;
use std::thread;

use super::*;
use crate::ownership::claim::{Claimant, Nonce};

fn claimant(instance: &str) -> Claimant {
    let name = |text: &str| text.parse().unwrap();
    Claimant { machine: name("m"), host: name("h"), boot_id: name("b"), instance: name(instance) }
}

fn epoch(n: u64) -> Epoch {
    Epoch::new(n).unwrap()
}

fn store() -> (tempfile::TempDir, DirectoryStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = DirectoryStore::new(directory.path());
    (directory, store)
}

fn newest(store: &DirectoryStore) -> Option<Record> {
    match store.newest() {
        Reading::Newest(record) => record,
        Reading::Unknown(why) => panic!("{why}"),
    }
}

#[test]
fn a_claim_is_made_once_and_read_back() {
    let (directory, store) = store();
    assert_eq!(newest(&store), None);
    let ours = claimant("a").claim(epoch(1), Nonce(1));
    assert_eq!(store.claim(&ours), ClaimAnswer::Created);
    let text = fs::read_link(directory.path().join("1")).unwrap();
    assert_eq!(text.to_str().unwrap(), ours.to_string(), "readable by a person");

    // A retransmitted request finds itself; another's finds it taken; so does another nonce of the same process.
    let taken = ClaimAnswer::Exists(Occupant::Claim(ours.clone()));
    assert_eq!(store.claim(&ours), taken);
    assert_eq!(store.claim(&claimant("b").claim(epoch(1), Nonce(1))), taken);
    assert_eq!(store.claim(&claimant("a").claim(epoch(1), Nonce(2))), taken);

    let record = newest(&store).unwrap();
    assert_eq!(
        (record.epoch, record.occupant, record.running, record.free),
        (epoch(1), Occupant::Claim(ours), false, false)
    );
    assert!(record.since.is_some());
}

#[test]
fn a_machine_without_all_of_its_memory_has_it_once_that_is_marked() {
    let (_directory, store) = store();
    let incomplete = Claim { incomplete: true, ..claimant("a").claim(epoch(1), Nonce(1)) };
    assert_eq!(store.claim(&incomplete), ClaimAnswer::Created);
    let record = newest(&store).unwrap();
    assert_eq!((record.occupant, record.complete), (Occupant::Claim(incomplete), false));
    assert_eq!(store.mark(epoch(1), Marker::Complete), MarkAnswer::Marked);
    assert!(newest(&store).unwrap().complete);
    let _ = store.claim(&claimant("a").claim(epoch(2), Nonce(1)));
    assert!(newest(&store).unwrap().complete, "it never lacked any");
}

#[test]
fn markers_are_added_once_and_belong_to_their_epoch() {
    let (_directory, store) = store();
    let _ = store.claim(&claimant("a").claim(epoch(1), Nonce(1)));
    for _ in 0..2 {
        assert_eq!(store.mark(epoch(1), Marker::Running), MarkAnswer::Marked);
    }
    let record = newest(&store).unwrap();
    assert!(record.running && !record.free);
    let _ = store.mark(epoch(1), Marker::Free);
    assert!(newest(&store).unwrap().free);
    let _ = store.claim(&claimant("b").claim(epoch(2), Nonce(2)));
    let record = newest(&store).unwrap();
    assert!(record.epoch == epoch(2) && !record.running && !record.free);
}

#[test]
fn of_many_threads_exactly_one_wins_each_epoch() {
    let (_directory, store) = store();
    for n in 1..=50 {
        let barrier = Barrier::new(8);
        let claims: Vec<_> = (0..8).map(|i| claimant(&format!("i{i}")).claim(epoch(n), Nonce(i))).collect();
        let answers: Vec<_> = thread::scope(|scope| {
            let ask = |claim| {
                barrier.wait();
                store.claim(claim)
            };
            let threads: Vec<_> = claims.iter().map(|claim| scope.spawn(move || ask(claim))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let winner = answers.iter().position(|answer| *answer == ClaimAnswer::Created).expect("nobody won");
        for (i, answer) in answers.iter().enumerate().filter(|(i, _)| *i != winner) {
            assert_eq!(*answer, ClaimAnswer::Exists(Occupant::Claim(claims[winner].clone())), "claimant {i}");
        }
    }
}

#[test]
fn of_many_processes_exactly_one_wins_each_epoch() {
    let (directory, store) = store();
    for n in 1..=10 {
        let mut racers: Vec<_> = (0..6)
            .map(|i| {
                let claim = claimant(&format!("i{i}")).claim(epoch(n), Nonce(i));
                let link = directory.path().join(n.to_string());
                Command::new("ln")
                    .arg("-sT")
                    .arg(claim.to_string())
                    .arg(link)
                    .stderr(std::process::Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        let ours = claimant("ours").claim(epoch(n), Nonce(99));
        let answer = store.claim(&ours);
        let won = racers.iter_mut().filter_map(|racer| racer.wait().ok()).filter(|status| status.success()).count();
        assert_eq!(won + usize::from(answer == ClaimAnswer::Created), 1, "epoch {n}");
    }
}

#[test]
fn a_directory_that_is_not_there_or_not_one_does_nothing() {
    let (directory, _) = store();
    let claim = claimant("a").claim(epoch(1), Nonce(1));
    let missing = DirectoryStore::new(directory.path().join("missing"));
    assert!(matches!(missing.claim(&claim), ClaimAnswer::Failed(why) if why.contains("missing")));
    assert!(matches!(missing.newest(), Reading::Unknown(_)), "no directory is not an empty one");
    assert!(matches!(missing.mark(epoch(1), Marker::Free), MarkAnswer::Unknown(_)));
    fs::write(directory.path().join("file"), "").unwrap();
    let file = DirectoryStore::new(directory.path().join("file"));
    assert!(matches!(file.claim(&claim), ClaimAnswer::Failed(_)));
    assert!(matches!(file.newest(), Reading::Unknown(_)));
}

#[test]
fn stale_entries_and_hostile_names_are_passed_over() {
    let (directory, store) = store();
    for n in [1, 2, 9, 10] {
        let _ = store.claim(&claimant("a").claim(epoch(n), Nonce(n)));
    }
    let path = |name: &str| directory.path().join(name);
    for name in ["011", "+11", "11x", "11.free", "9.free", "18446744073709551616", "-1", "x\ny", ".11", "11 "] {
        symlink("x", path(name)).unwrap();
    }
    {
        use std::ffi::OsStr;
        symlink("x", directory.path().join(OsStr::from_bytes(b"11\xff"))).unwrap();
    }
    let record = newest(&store).unwrap();
    assert_eq!(record.epoch, epoch(10));
    assert!(!record.free);
}

#[test]
fn what_is_no_claim_holds_its_epoch_and_is_nobody_s() {
    let claim = claimant("a").claim(epoch(1), Nonce(1));
    let other = claimant("a").claim(epoch(2), Nonce(1)).to_string();
    let long = "x".repeat(4000);
    for target in ["/etc/passwd", "1", &other, &long, "godwit1", "\u{1b}[31m"] {
        let (directory, store) = store();
        symlink(target, directory.path().join("1")).unwrap();
        let answer = store.claim(&claim);
        assert!(
            matches!(&answer, ClaimAnswer::Exists(Occupant::Foreign(why)) if why.len() < 600),
            "{target}: {answer:?}"
        );
        assert!(matches!(newest(&store).unwrap().occupant, Occupant::Foreign(_)));
    }
    for make in [|path: &Path| fs::write(path, "").unwrap(), |path: &Path| fs::create_dir(path).unwrap()] {
        let (directory, store) = store();
        make(&directory.path().join("1"));
        assert!(matches!(store.claim(&claim), ClaimAnswer::Exists(Occupant::Foreign(_))));
    }
}

#[test]
fn the_last_epoch_is_found_and_nothing_follows() {
    let (_directory, store) = store();
    let _ = store.claim(&claimant("a").claim(epoch(u64::MAX), Nonce(1)));
    assert_eq!(newest(&store).unwrap().epoch, epoch(u64::MAX));
}

/// Runs a script that runs one probe, in a mount namespace that ends with it. False if that cannot be made here.
fn probed_in_namespace(script: &str) -> bool {
    let Ok(output) = Command::new("unshare").args(["-m", "sh", "-ec", script]).output() else { return false };
    let text = String::from_utf8_lossy(&output.stderr);
    // No right to make namespaces or mounts: the caller skips.
    if !output.status.success() && (text.contains("Operation not permitted") || text.contains("permission denied")) {
        return false;
    }
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{text}");
    true
}

/// This test binary, asked to run the test `name` once more, as the part of it that is run in the directory CLAIMS.
fn again(name: &str) -> String {
    let exe = std::env::current_exe().unwrap();
    format!("{} --exact --nocapture ownership::directory::tests::{name}", exe.display())
}

/// Runs `script`. Only root can be expected to be able to.
fn run_in_namespace(script: &str) {
    // SAFETY: a call without arguments in memory.
    let root = unsafe { libc::geteuid() } == 0;
    assert!(probed_in_namespace(script) || !root, "mounts cannot be made here");
}

#[test]
fn a_full_disk_does_nothing_and_says_so() {
    if let Some(directory) = std::env::var_os("CLAIMS") {
        return assert_takes_no_entries(&DirectoryStore::new(directory));
    }
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().display();
    run_in_namespace(&format!(
        "mount -t tmpfs -o size=8k,nr_inodes=4 tmpfs {dir}; touch {dir}/a {dir}/b {dir}/c; CLAIMS={dir} {}",
        again("a_full_disk_does_nothing_and_says_so")
    ));
}

#[test]
fn a_read_only_file_system_does_nothing_and_says_so() {
    if let Some(directory) = std::env::var_os("CLAIMS") {
        return assert_takes_no_entries(&DirectoryStore::new(directory));
    }
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().display();
    run_in_namespace(&format!(
        "mount -t tmpfs -o ro tmpfs {dir}; CLAIMS={dir} {}",
        again("a_read_only_file_system_does_nothing_and_says_so")
    ));
}

fn assert_takes_no_entries(store: &DirectoryStore) {
    let answer = store.claim(&claimant("a").claim(epoch(1), Nonce(1)));
    assert!(matches!(answer, ClaimAnswer::Failed(_)), "{answer:?}");
    assert!(matches!(store.mark(epoch(1), Marker::Running), MarkAnswer::Unknown(_)));
}

#[test]
fn an_unreadable_directory_is_unknown_to_look_at() {
    if let Some(directory) = std::env::var_os("CLAIMS") {
        return assert_closed(&DirectoryStore::new(directory));
    }
    // Root reads everything: it becomes another user for this.
    let directory = tempfile::Builder::new().prefix("claims").tempdir_in("/tmp").unwrap();
    let store = DirectoryStore::new(directory.path());
    let _ = store.claim(&claimant("a").claim(epoch(1), Nonce(1)));
    let closed = directory.path().join("closed");
    fs::create_dir(&closed).unwrap();
    let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode;
    fs::set_permissions(directory.path(), mode(0o755)).unwrap();
    fs::set_permissions(&closed, mode(0o000)).unwrap();
    // SAFETY: a call without arguments in memory.
    let root = unsafe { libc::geteuid() } == 0;
    if root {
        run_in_namespace(&format!(
            "CLAIMS={} setpriv --reuid 65534 --regid 65534 --clear-groups {}",
            closed.display(),
            again("an_unreadable_directory_is_unknown_to_look_at")
        ));
    } else {
        assert_closed(&DirectoryStore::new(&closed));
    }
}

fn assert_closed(store: &DirectoryStore) {
    assert!(matches!(store.newest(), Reading::Unknown(_)));
    assert!(matches!(store.claim(&claimant("a").claim(epoch(1), Nonce(1))), ClaimAnswer::Failed(_)));
}

#[test]
fn every_claim_is_listed_whatever_else_lies_there() {
    let directory = tempfile::tempdir().unwrap();
    let store = DirectoryStore::new(directory.path());
    assert_eq!(store.records().unwrap(), []);
    for garbage in ["README", "1.old", "-3", "007"] {
        std::fs::write(directory.path().join(garbage), "").unwrap();
    }
    let last = u64::MAX.to_string();
    symlink("garbage", directory.path().join(&last)).unwrap();
    symlink("garbage", directory.path().join("1")).unwrap();
    let epochs: Vec<u64> = store.records().unwrap().iter().map(|record| record.epoch.get()).collect();
    assert_eq!(epochs, [1, u64::MAX]);
}
