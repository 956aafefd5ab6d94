//! `cargo xtask chaos`: one machine moves there and back between two hosts, again and again, while random faults strike at random
//! moments, most of them between the pause and *running*.
//!
//! Processes, guests and the network are real. Who runs the guest is told by its heartbeat, read from outside; what the programs say of
//! it is compared with that. Nothing is expected of a move's outcome: it may be made, fail, or leave a person to decide. What is
//! expected is that never two run, that whoever is entitled to run does so soon after everything is healed, and that the guest's
//! memory is whole.
//!
//! | module | what |
//! |---|---|
//! | [`dice`], [`kind`], [`plan`] | what will happen: decided by the seed |
//! | [`world`], [`stores`] | two hosts, a machine, its claims |
//! | [`watch`], [`ledger`] | who runs |
//! | [`events`] | what the source tells |
//! | [`fault`] | faults struck and healed |
//! | [`episode`], [`person`], [`claims`] | one move, what came of it, and what a person does then |
//! | [`tally`] | all of it in numbers |

pub mod claims;
pub mod dice;
pub mod episode;
pub mod events;
pub mod fault;
pub mod kind;
pub mod ledger;
pub mod person;
pub mod plan;
pub mod stores;
pub mod tally;
pub mod watch;
pub mod world;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::plan::Plan;
use self::tally::{Crime, Outcome, Tally, Violation};
use self::world::World;
use crate::harness::Scene;

/// What is played.
#[derive(Debug, Clone)]
pub struct Options {
    /// Decides kinds, moments and everything else.
    pub seed: u64,
    /// The first episode.
    pub first: u64,
    /// For so long,
    pub time: Option<Duration>,
    /// and so many episodes at most.
    pub episodes: Option<u64>,
}

/// An episode that has been played, for whoever watches.
pub struct Played<'a> {
    /// What was to happen.
    pub plan: &'a Plan,
    /// What came of it.
    pub result: &'a tally::Result,
    /// From which host.
    pub from: &'static str,
    /// How long it took.
    pub took: Duration,
    /// Where the logs are kept, if something happened that must not.
    pub logs: Option<PathBuf>,
    /// All episodes so far.
    pub tally: &'a Tally,
}

/// Plays until time or episodes are used up, or until `interrupted`.
pub fn run(options: &Options, interrupted: &AtomicBool, mut show: impl FnMut(Played<'_>)) -> Result<Tally> {
    let scene = Scene::new()?;
    let begin = Instant::now();
    let mut world = World::new(&scene)?;
    let mut tally = Tally::default();
    for episode in options.first.. {
        let enough = options.time.is_some_and(|time| begin.elapsed() >= time)
            || options.episodes.is_some_and(|episodes| episode >= options.first + episodes);
        if enough || interrupted.load(Ordering::Relaxed) {
            break;
        }
        let plan = Plan::new(options.seed, episode);
        let (from, since) = (world.owner.host_name(), Instant::now());
        let result = match episode::play(&mut world, &plan, interrupted) {
            Ok(result) => result,
            // An interrupt ends the children, too.
            Err(_) if interrupted.load(Ordering::Relaxed) => break,
            Err(error) => {
                person::start_over(&mut world).with_context(|| format!("after {error:#}"))?;
                let violations = vec![Violation { crime: Crime::Contradiction, text: format!("{error:#}") }];
                tally::Result { outcome: Outcome::Person, struck: Vec::new(), said: String::new(), violations }
            }
        };
        if interrupted.load(Ordering::Relaxed) {
            break;
        }
        tally.add(&result);
        let logs = match result.violations.is_empty() {
            true => None,
            false => Some(keep_logs(&scene, options.seed, episode)?),
        };
        show(Played { plan: &plan, result: &result, from, took: since.elapsed(), logs, tally: &tally });
    }
    if !interrupted.load(Ordering::Relaxed) {
        world.see_off(true)?;
    }
    Ok(tally)
}

/// Copies the logs of late to where they stay.
fn keep_logs(scene: &Scene, seed: u64, episode: u64) -> Result<PathBuf> {
    const LATE: Duration = Duration::from_secs(120);
    let directory = std::env::temp_dir().join(format!("godwit-chaos-{seed}")).join(format!("episode-{episode}"));
    let copy = || -> std::io::Result<()> {
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(scene.path())?.flatten() {
            let (path, metadata) = (entry.path(), entry.metadata()?);
            let is_log = path.extension().is_some_and(|extension| extension == "log" || extension == "out");
            if is_log && metadata.modified()?.elapsed().unwrap_or_default() < LATE {
                fs::copy(&path, directory.join(path.file_name().unwrap_or(Path::new("log").as_os_str())))?;
            }
        }
        Ok(())
    };
    copy().with_context(|| format!("cannot keep logs in {}", directory.display()))?;
    Ok(directory)
}
