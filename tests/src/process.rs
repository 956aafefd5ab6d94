//! Child processes whose output goes to files and that never outlive their owner.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::netns::Namespace;
use crate::wait;

/// What the names of things begin with that we make outside ourselves.
const NAME_PREFIX: &str = "godwit-";

/// How long a killed process may take to be gone.
const REAP_LIMIT: Duration = Duration::from_secs(10);

/// How much of a log is shown when something fails.
const SHOWN_LINES: usize = 30;
/// Longer lines (events with whole reports in them) are cut.
const SHOWN_CHARACTERS: usize = 400;

/// A running child process. Dropping it kills it.
pub struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts `command` with both outputs in files in `directory`, if given inside a network namespace.
    pub fn start(name: &str, directory: &Path, mut command: Command, namespace: Option<&Namespace>) -> Result<Self> {
        let (stdout, stderr) = (directory.join(format!("{name}.out")), directory.join(format!("{name}.log")));
        let create = |path: &Path| File::create(path).with_context(|| format!("cannot create {}", path.display()));
        command.stdin(Stdio::null()).stdout(create(&stdout)?).stderr(create(&stderr)?);
        confine(&mut command, namespace.map(Namespace::open).transpose()?);
        let child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
        Ok(Self { name: name.to_owned(), child, stdout, stderr })
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// What it has written to stdout so far.
    pub fn stdout(&self) -> String {
        read_lossy(&self.stdout)
    }

    /// What it has written to stderr so far.
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} ends", self.name);
        wait::until(&what, limit, || Ok(self.child.try_wait()?)).with_context(|| self.describe())
    }

    /// Waits for its end and gives its exit code.
    pub fn exit_code(&mut self, limit: Duration) -> Result<i32> {
        self.wait(limit)?.code().with_context(|| format!("{} was killed by a signal", self.name))
    }

    /// Waits until `look` finds something; fails at once, with the log, if the process ends first.
    pub fn wait_while_running<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        wait::until(what, limit, || match (look(self)?, self.child.try_wait()?) {
            (Some(found), _) => Ok(Some(found)),
            // What it did last may have been what we wait for.
            (None, Some(status)) => match look(self)? {
                Some(found) => Ok(Some(found)),
                None => Err(anyhow!("{what}: {} ended with {status}", self.name)),
            },
            (None, None) => Ok(None),
        })
        .with_context(|| self.describe())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        signal::kill(self.pid(), signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        if self.is_running()? {
            self.signal(Signal::SIGKILL)?;
        }
        self.wait(REAP_LIMIT).map(drop)
    }

    /// Its name and the end of what it wrote.
    pub fn describe(&self) -> String {
        format!("{}:\n{}{}", self.name, tail(&self.stdout()), tail(&self.stderr()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a log.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let shown = lines[lines.len().saturating_sub(SHOWN_LINES)..].iter();
    shown.map(|line| format!("    {}\n", line.chars().take(SHOWN_CHARACTERS).collect::<String>())).collect()
}

/// A name for something that outlives us if we are killed: it tells whose it was.
pub(crate) fn own_name(suffix: &str) -> String {
    format!("{NAME_PREFIX}{}-{suffix}", std::process::id())
}

/// Whether a name was made by [`own_name`] in a process that has gone.
pub(crate) fn is_abandoned(name: &str) -> bool {
    let maker = name.strip_prefix(NAME_PREFIX).and_then(|rest| rest.split('-').next());
    maker.and_then(|pid| pid.parse::<u32>().ok()).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

/// Has the child killed with us, and started in `namespace`.
fn confine(command: &mut Command, namespace: Option<File>) {
    let setup = move || -> io::Result<()> {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        if let Some(namespace) = &namespace {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(setup) };
}

fn read_lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_end_are_seen() {
        let directory = tempfile::tempdir().unwrap();
        let mut process =
            Process::start("hello", directory.path(), shell("echo out; echo err >&2; exit 3"), None).unwrap();
        assert_eq!(process.wait(Duration::from_secs(5)).unwrap().code(), Some(3));
        assert_eq!((process.stdout().as_str(), process.stderr().as_str()), ("out\n", "err\n"));
    }

    #[test]
    fn an_early_end_is_an_error_that_shows_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let mut process = Process::start("early", directory.path(), shell("echo broken >&2"), None).unwrap();
        let never = process.wait_while_running("greeting", Duration::from_secs(5), |_| Ok(None::<()>));
        let text = format!("{:?}", never.unwrap_err());
        assert!(text.contains("broken") && text.contains("greeting: early ended"), "{text}");
    }

    #[test]
    fn only_what_a_dead_process_made_is_abandoned() {
        assert!(!is_abandoned(&own_name("x")));
        // Above the kernel's largest process id.
        assert!(is_abandoned("godwit-4194305-x"));
        assert!(!is_abandoned("godwit-machine"));
        assert!(!is_abandoned("4194305"));
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let process = Process::start("sleeper", directory.path(), shell("exec sleep 1000"), None).unwrap();
        let pid = process.pid();
        drop(process);
        assert!(signal::kill(pid, None).is_err());
    }
}
