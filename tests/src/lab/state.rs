//! What a lab has made outside its own memory, in a file: another process can take it down.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::network::remove_namespace;
use crate::wait;

const FILE: &str = "state.json";

/// How long killed processes may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A process of the lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// What it is.
    pub name: String,
    pid: i32,
    /// Ticks from boot to its start: process ids come again.
    start_ticks: u64,
}

/// All that has to be removed.
#[derive(Default, Serialize, Deserialize)]
pub struct State {
    /// Where sockets lie.
    pub sockets: PathBuf,
    /// Where the hosts' common tree lies.
    pub tree: PathBuf,
    /// Names of network namespaces.
    pub namespaces: Vec<String>,
    /// Processes, in the order in which they were started.
    pub processes: Vec<Recorded>,
}

impl State {
    /// Reads it from `run`, if a lab has left one there.
    pub fn load(run: &Path) -> Result<Option<Self>> {
        let path = run.join(FILE);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes it to `run`.
    pub fn save(&self, run: &Path) -> Result<()> {
        let (path, part) = (run.join(FILE), run.join("state.part"));
        fs::write(&part, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&part, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether a host of it still runs.
    pub fn is_up(&self) -> bool {
        self.processes.iter().any(Recorded::is_running)
    }

    /// Ends its processes, last first, removes its namespaces and sockets, and forgets it. Logs stay.
    pub fn remove(self, run: &Path) -> Result<()> {
        for process in self.processes.iter().rev() {
            process.kill();
        }
        wait::until_true("the lab's processes end", END_LIMIT, || Ok(!self.is_up()))?;
        for namespace in &self.namespaces {
            remove_namespace(namespace)?;
        }
        remove_directory(&self.sockets)?;
        fs::remove_file(run.join(FILE)).context("cannot remove the lab's state")
    }
}

impl Recorded {
    /// Records a process that was started, and not waited for: it may have ended already.
    pub fn new(name: impl Into<String>, pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid)?;
        let Started { start_ticks, .. } = Started::read(pid).with_context(|| format!("there is no process {pid}"))?;
        Ok(Self { name: name.into(), pid, start_ticks })
    }

    /// Whether it runs, and is not merely unwaited for.
    pub fn is_running(&self) -> bool {
        Started::read(self.pid).is_some_and(|now| !now.ended && now.start_ticks == self.start_ticks)
    }

    fn kill(&self) {
        if self.is_running() {
            // It may go in between.
            let _ = signal::kill(Pid::from_raw(self.pid), Signal::SIGKILL);
            reap(self.pid);
        }
    }
}

/// Waits for a child; another's child is its parent's or init's to wait for.
fn reap(pid: i32) {
    thread::spawn(move || nix::sys::wait::waitpid(Pid::from_raw(pid), None));
}

/// What /proc tells of a process.
struct Started {
    start_ticks: u64,
    /// It is only waited for.
    ended: bool,
}

impl Started {
    fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything; the state follows, and the start is 19 fields after it.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let ended = fields.next()? == "Z";
        Some(Self { start_ticks: fields.nth(18)?.parse().ok()?, ended })
    }
}

fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_killed_only_if_it_is_the_one_recorded() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let recorded = Recorded::new("sleeper", child.id()).unwrap();
        let other = Recorded { start_ticks: recorded.start_ticks + 1, ..recorded.clone() };
        other.kill();
        assert!(recorded.is_running() && !other.is_running());
        assert_eq!(child.try_wait().unwrap(), None);
        recorded.kill();
        wait::until_true("it is gone", END_LIMIT, || Ok(!recorded.is_running())).unwrap();
        // Whichever of the two waits comes first.
        let _ = child.wait();
    }

    #[test]
    fn a_process_that_ends_at_once_is_recorded_as_one_that_has_ended() {
        let mut child = Command::new("true").spawn().unwrap();
        let ended = || Started::read(child.id() as i32).is_some_and(|now| now.ended);
        wait::until_true("it ends", END_LIMIT, || Ok(ended())).unwrap();
        assert!(!Recorded::new("brief", child.id()).unwrap().is_running());
        child.wait().unwrap();
    }

    #[test]
    fn another_process_takes_down_what_is_in_the_file() {
        let run = tempfile::tempdir().unwrap();
        let sockets = run.path().join("sockets");
        fs::create_dir(&sockets).unwrap();
        State { sockets: sockets.clone(), ..State::default() }.save(run.path()).unwrap();
        State::load(run.path()).unwrap().expect("a state").remove(run.path()).unwrap();
        assert!(!sockets.exists() && State::load(run.path()).unwrap().is_none());
    }
}
