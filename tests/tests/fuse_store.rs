//! Storage that misbehaves on demand: that it does what it says, and what the claim store makes of each of its answers.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use godwit_core::ownership::directory::DirectoryStore;
use godwit_core::ownership::store::{ClaimAnswer, ClaimStore, MarkAnswer, Occupant, Reading};
use godwit_core::ownership::timed::Timed;
use godwit_core::ownership::{Claim, Claimant, Epoch, Marker, Nonce};
use godwit_tests::fuse::{Calls, FuseStore, KIND, Mode};
use godwit_tests::harness::{self, Need, Scene, binary};
use godwit_tests::process::Process;
use godwit_tests::wait;
use nix::errno::Errno;
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_secs(20);

/// How long the tests wait for a store that hangs.
const PATIENCE: Duration = Duration::from_millis(200);

fn main() {
    let needs = &[Need::Fuse];
    harness::main(vec![
        harness::test("every_mount_shows_one_folder", needs, every_mount_shows_one_folder),
        harness::test("files_are_written_through", needs, files_are_written_through),
        harness::test("nothing_stays_mounted", needs, nothing_stays_mounted),
        harness::test("a_caller_that_hangs_can_be_killed", needs, a_caller_that_hangs_can_be_killed),
        harness::test("of_claimants_at_both_mounts_exactly_one_wins", needs, exactly_one_wins),
        harness::test("a_refusal_did_nothing", needs, a_refusal_did_nothing),
        harness::test("an_error_that_is_no_refusal_is_unknown", needs, an_error_is_unknown),
        harness::test("a_claim_that_took_effect_all_the_same", needs, a_claim_that_took_effect_all_the_same),
        harness::test("a_store_that_hangs_is_unknown", needs, a_store_that_hangs_is_unknown),
        harness::test("a_claim_that_comes_late", needs, a_claim_that_comes_late),
        harness::test("a_claim_whose_answer_is_lost", needs, a_claim_whose_answer_is_lost),
        harness::test("a_slow_store_is_waited_for", needs, a_slow_store_is_waited_for),
    ])
}

/// One folder and two hosts that see it.
struct Shared {
    here: FuseStore,
    there: FuseStore,
}

impl Shared {
    fn new(scene: &Scene) -> Result<Self> {
        let backing = scene.path().join("backing");
        fs::create_dir(&backing)?;
        let mount = |name: &str| FuseStore::mount(&backing, &scene.path().join(name));
        Ok(Self { here: mount("here")?, there: mount("there")? })
    }
}

fn store(mount: &FuseStore) -> DirectoryStore {
    DirectoryStore::new(mount.path())
}

/// The same with a time limit.
fn timed(mount: &FuseStore) -> Result<Timed> {
    Ok(Timed::start(store(mount))?)
}

fn claim(host: &str, epoch: u64) -> Result<Claim> {
    let me = Claimant { machine: "m".parse()?, host: host.parse()?, boot_id: "b".parse()?, instance: "i".parse()? };
    let epoch = Epoch::new(epoch).context("no epoch")?;
    Ok(me.claim(epoch, Nonce::random()))
}

fn taken(claim: &Claim) -> ClaimAnswer {
    ClaimAnswer::Exists(Occupant::Claim(claim.clone()))
}

fn ensure_answer(answer: &ClaimAnswer, expected: &ClaimAnswer) -> Result<()> {
    ensure!(answer == expected, "{answer:?} instead of {expected:?}");
    Ok(())
}

fn ensure_unknown(answer: &ClaimAnswer) -> Result<()> {
    ensure!(matches!(answer, ClaimAnswer::Unknown(_)), "{answer:?}");
    Ok(())
}

/// Whether something is seen at the epoch of `claim`.
fn is_seen(mount: &FuseStore, claim: &Claim) -> Result<bool> {
    Ok(store(mount).record(claim.epoch)?.is_some())
}

fn is_mounted(path: &Path) -> Result<bool> {
    let path = path.to_str().context("not text")?;
    let is_ours = |line: &str| line.split(' ').nth(1) == Some(path) && line.contains(KIND);
    Ok(fs::read_to_string("/proc/self/mounts")?.lines().any(is_ours))
}

fn every_mount_shows_one_folder(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let (here, there) = (shared.here.path(), shared.there.path());
    // What is not there is not remembered as missing.
    ensure!(!there.join("1").exists());
    fs::create_dir(here.join("machine"))?;
    fs::write(here.join("machine/disk"), "contents")?;
    std::os::unix::fs::symlink("text", here.join("machine/1"))?;
    ensure!(fs::read_link(there.join("machine/1"))? == Path::new("text"));
    let inode = |root: &Path| -> Result<u64> { Ok(fs::metadata(root.join("machine/disk"))?.ino()) };
    ensure!(inode(here)? == inode(there)?, "the hosts see two files");
    ensure!(inode(here)? == inode(&scene.path().join("backing"))?);
    fs::rename(here.join("machine/disk"), here.join("disk"))?;
    ensure!(fs::read_to_string(there.join("disk"))? == "contents");
    fs::remove_file(there.join("machine/1"))?;
    let names: Vec<_> = fs::read_dir(here)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    ensure!(names.len() == 2, "{names:?}");
    ensure!(fs::read_dir(here.join("machine"))?.next().is_none());
    fs::remove_dir(here.join("machine"))?;
    ensure!(!there.join("machine").exists());
    let listed = Command::new("stat").args(["-f", "-c", "%S"]).arg(here).output()?;
    ensure!(listed.status.success(), "statfs: {listed:?}");
    Ok(())
}

fn files_are_written_through(scene: &Scene) -> Result<()> {
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let shared = Shared::new(scene)?;
    let (here, there) = (shared.here.path().join("disk"), shared.there.path().join("disk"));
    let direct = |path: &Path| OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
    fs::write(&here, vec![1; 1 << 20])?;
    let mut disk = direct(&here).context("O_DIRECT")?;
    disk.write_all(&Block([2; 4096]).0)?;
    disk.sync_all()?;
    let mut block = Block([0; 4096]);
    direct(&there)?.read_exact(&mut block.0)?;
    ensure!(block.0 == [2; 4096], "the other host does not see what was written");
    ensure!(fs::metadata(&there)?.len() == 1 << 20);
    disk.set_len(4096)?;
    ensure!(fs::metadata(&there)?.len() == 4096);
    let exclusive = OpenOptions::new().write(true).create_new(true).open(&there);
    ensure!(exclusive.is_err_and(|error| error.raw_os_error() == Some(libc::EEXIST)));
    shared.here.set_for(Calls::Flushes, Mode::Refusing(Errno::EIO))?;
    ensure!(disk.sync_all().is_err_and(|error| error.raw_os_error() == Some(libc::EIO)));
    shared.here.set_for(Calls::Changes, Mode::Refusing(Errno::ENOSPC))?;
    ensure!(disk.write_all(&block.0).is_err_and(|error| error.raw_os_error() == Some(libc::ENOSPC)));
    disk.sync_all().context("only changes are refused")
}

fn nothing_stays_mounted(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let path = shared.here.path().to_owned();
    ensure!(is_mounted(&path)?);
    shared.here.set(Mode::Unreachable)?;
    let hangs = thread::spawn({
        let path = path.clone();
        move || fs::read_dir(path).map(drop)
    });
    shared.here.wait_until_held(LIMIT)?;
    drop(shared);
    let ended = hangs.join();
    ensure!(ended.is_ok_and(|read| read.is_err()), "a caller that hangs is let go with an error");
    ensure!(!is_mounted(&path)?, "it is still mounted");

    // Its owner dies without a word; here that owner is a shell that keeps its stdin open.
    let backing = scene.path().join("backing");
    let script =
        format!("sleep 1000 | {} {} {} & wait", binary("fuse-store")?.display(), backing.display(), path.display());
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]);
    let mut owner = Process::start("owner", scene.path(), shell, None)?;
    owner.wait_while_running("mount", LIMIT, |_| Ok(is_mounted(&path)?.then_some(())))?;
    let sleeper = Command::new("pgrep").args(["-P", &owner.pid().to_string(), "sleep"]).output()?;
    let sleeper: i32 = String::from_utf8(sleeper.stdout)?.trim().parse().context("no such process")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(sleeper), Signal::SIGKILL)?;
    wait::until_true("its owner's death unmounts it", LIMIT, || Ok(!is_mounted(&path)?))
}

fn a_caller_that_hangs_can_be_killed(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    shared.here.set(Mode::Unreachable)?;
    let mut command = Command::new("ln");
    command.args(["-sT", "text"]).arg(shared.here.path().join("1"));
    let mut caller = Process::start("caller", scene.path(), command, None)?;
    shared.here.wait_until_held(LIMIT)?;
    caller.signal(Signal::SIGTERM)?;
    caller.kill().context("it cannot be killed")?;
    shared.here.set(Mode::Normal)?;
    ensure!(!shared.here.path().join("1").is_symlink(), "a dead caller's call was made");
    Ok(())
}

fn exactly_one_wins(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    for epoch in 1..=50 {
        let claims: Vec<Claim> = (0..6).map(|i| claim(&format!("h{i}"), epoch)).collect::<Result<_>>()?;
        let barrier = Barrier::new(claims.len());
        let ask = |(index, claim): (usize, &Claim)| {
            let mount = if index % 2 == 0 { &shared.here } else { &shared.there };
            let store = store(mount);
            barrier.wait();
            store.claim(claim)
        };
        let answers: Vec<ClaimAnswer> = thread::scope(|scope| {
            let ask = &ask;
            let threads: Vec<_> = claims.iter().enumerate().map(|who| scope.spawn(move || ask(who))).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        let winner = answers.iter().position(|answer| *answer == ClaimAnswer::Created).context("nobody won")?;
        for (index, answer) in answers.iter().enumerate().filter(|(index, _)| *index != winner) {
            ensure!(*answer == taken(&claims[winner]), "epoch {epoch}: claimant {index} was told {answer:?}");
        }
    }
    Ok(())
}

fn a_refusal_did_nothing(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let ours = claim("here", 1)?;
    for refusal in [Errno::ENOSPC, Errno::EDQUOT, Errno::EROFS, Errno::EACCES] {
        shared.here.set_for(Calls::Changes, Mode::Refusing(refusal))?;
        let answer = store(&shared.here).claim(&ours);
        ensure!(matches!(answer, ClaimAnswer::Failed(_)), "{refusal}: {answer:?}");
        let marked = store(&shared.here).mark(ours.epoch, Marker::Free);
        ensure!(matches!(marked, MarkAnswer::Unknown(_)), "{refusal}: {marked:?}");
        ensure!(!is_seen(&shared.there, &ours)?);
    }
    shared.here.set(Mode::Normal)?;
    ensure_answer(&store(&shared.here).claim(&ours), &ClaimAnswer::Created)
}

fn an_error_is_unknown(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let ours = claim("here", 1)?;
    for calls in [Calls::All, Calls::Links] {
        for error in [Errno::EIO, Errno::ESTALE, Errno::ETIMEDOUT, Errno::EINTR, Errno::ENOMEM, Errno::ECONNREFUSED] {
            shared.here.set_for(calls, Mode::Refusing(error))?;
            ensure_unknown(&store(&shared.here).claim(&ours)).context(error)?;
            ensure!(!is_seen(&shared.there, &ours)?);
        }
        let seen = store(&shared.here).newest();
        let readable = matches!(seen, Reading::Newest(None));
        ensure!(readable == (calls == Calls::Links), "{seen:?}");
    }
    // A refusal that cannot be looked after is none.
    shared.here.set(Mode::Refusing(Errno::EROFS))?;
    ensure_unknown(&store(&shared.here).claim(&ours))
}

fn a_claim_that_took_effect_all_the_same(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let (ours, theirs) = (claim("here", 1)?, claim("there", 1)?);
    shared.here.set_for(Calls::Links, Mode::Unsure(Errno::EIO))?;
    ensure_unknown(&store(&shared.here).claim(&ours))?;
    ensure_answer(&store(&shared.there).claim(&theirs), &taken(&ours))?;
    // Asked again, it finds its own.
    ensure_answer(&store(&shared.here).claim(&ours), &taken(&ours))?;
    // A retransmitted request may be answered by a refusal although the first one won.
    let next = claim("here", 2)?;
    for (refusal, epoch) in [(Errno::ENOSPC, 2), (Errno::EROFS, 3), (Errno::ENOENT, 4)] {
        let next = Claim { epoch: Epoch::new(epoch).context("no epoch")?, ..next.clone() };
        shared.here.set_for(Calls::Links, Mode::Unsure(refusal))?;
        ensure_answer(&store(&shared.here).claim(&next), &taken(&next)).context(refusal)?;
    }
    Ok(())
}

fn a_store_that_hangs_is_unknown(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let ours = claim("here", 1)?;
    let store = timed(&shared.here)?;
    shared.here.set(Mode::Unreachable)?;
    let began = Instant::now();
    ensure_unknown(&store.claim(&ours, PATIENCE))?;
    ensure!(matches!(store.newest(PATIENCE), Reading::Unknown(_)));
    ensure!(began.elapsed() < LIMIT);
    ensure!(!is_seen(&shared.there, &ours)?);
    // The call that hung is made once the store answers, whoever has given it up by then.
    shared.here.set(Mode::Normal)?;
    wait::until_true("the claim takes effect", LIMIT, || is_seen(&shared.there, &ours))?;
    ensure_answer(&store.claim(&ours, LIMIT), &taken(&ours))?;
    // A call that never reaches the store.
    let next = claim("here", 2)?;
    shared.here.set_for(Calls::Links, Mode::Unreachable)?;
    ensure_unknown(&store.claim(&next, PATIENCE))?;
    shared.here.set(Mode::Refusing(Errno::EIO))?;
    wait::until_true("the call that hung is refused", LIMIT, || Ok(shared.here.held()? == 0))?;
    shared.here.set(Mode::Normal)?;
    ensure_answer(&store.claim(&next, LIMIT), &ClaimAnswer::Created)
}

fn a_claim_that_comes_late(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    for (epoch, calls) in [(1, Calls::Links), (2, Calls::All)] {
        let (ours, theirs) = (claim("here", epoch)?, claim("there", epoch)?);
        let late = timed(&shared.here)?;
        shared.here.set_for(calls, Mode::Unreachable)?;
        ensure_unknown(&late.claim(&ours, PATIENCE))?;
        ensure_answer(&store(&shared.there).claim(&theirs), &ClaimAnswer::Created)?;
        shared.here.set(Mode::Normal)?;
        ensure_answer(&late.claim(&ours, LIMIT), &taken(&theirs))?;
    }
    Ok(())
}

fn a_claim_whose_answer_is_lost(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let (ours, theirs) = (claim("here", 1)?, claim("there", 1)?);
    let mute = timed(&shared.here)?;
    shared.here.set_for(Calls::Links, Mode::Mute)?;
    ensure_unknown(&mute.claim(&ours, PATIENCE))?;
    ensure_answer(&store(&shared.there).claim(&theirs), &taken(&ours))?;
    match store(&shared.there).newest() {
        Reading::Newest(Some(record)) => ensure!(record.occupant == Occupant::Claim(ours.clone())),
        other => bail!("{other:?}"),
    }
    shared.here.set(Mode::Normal)?;
    ensure_answer(&mute.claim(&ours, LIMIT), &taken(&ours))
}

fn a_slow_store_is_waited_for(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let ours = claim("here", 1)?;
    shared.here.set_for(Calls::Links, Mode::Slow(PATIENCE))?;
    let began = Instant::now();
    ensure_answer(&timed(&shared.here)?.claim(&ours, LIMIT), &ClaimAnswer::Created)?;
    ensure!(began.elapsed() >= PATIENCE, "it is not slow");
    Ok(())
}
