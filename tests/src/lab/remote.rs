//! Running commands on a host of the lab, by ssh.
//!
//! The ssh client is the tree's, started by the tree's own loader, so that nothing needs to be installed on this machine. One
//! connection per host is opened when the host is up, and all commands share it: a handshake takes long where the
//! other end's processor is emulated.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::layout::{HostPlan, Network};
use super::machine;
use super::state::Recorded;
use crate::netns::Namespace;
use crate::process::{self, Process};
use crate::wait;

/// How long a command may take if nobody says otherwise.
const RUN_LIMIT: Duration = Duration::from_secs(60);

/// The file that holds the key pair of a lab, in its run directory.
pub const KEY: &str = "id_ed25519";

/// What ssh ends with if it could not reach the host, or the connection broke.
const SSH_FAILED: i32 = 255;

static SPAWNED: AtomicU32 = AtomicU32::new(0);

/// The tree's program `name`, run on this machine.
pub fn tree_program(tree: &Path, name: &str) -> Command {
    let mut command = Command::new(tree.join("lib64/ld-linux-x86-64.so.2"));
    let libraries = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|path| tree.join(path));
    command.arg("--library-path").arg(format!("{}:{}", libraries[0].display(), libraries[1].display()));
    command.arg(tree.join("usr/bin").join(name));
    command
}

/// A host of the lab.
#[derive(Clone)]
pub struct Host {
    plan: &'static HostPlan,
    tree: PathBuf,
    run: PathBuf,
    socket: PathBuf,
}

/// What a command has left.
#[derive(Debug)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Host {
    /// `plan`'s host of the lab whose files lie in `run` and whose sockets in `sockets`.
    pub fn new(plan: &'static HostPlan, tree: &Path, run: &Path, sockets: &Path) -> Self {
        Self { plan, tree: tree.to_owned(), run: run.to_owned(), socket: sockets.join(plan.name) }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.plan.name
    }

    /// Its address on a network.
    pub fn address(&self, network: Network) -> String {
        network.address(self.plan.number)
    }

    /// What its console has shown.
    pub fn console(&self) -> String {
        let log = fs::read(machine::console_log(&self.run, self.name())).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Opens the connection that all commands use, once sshd answers in the machine that is `process`.
    pub fn connect(&self, process: &Recorded, switch: &Namespace, kept: bool, limit: Duration) -> Result<Recorded> {
        let deadline = Instant::now() + limit;
        let log = self.run.join(format!("{}.ssh.log", self.name()));
        loop {
            let mut command = self.ssh();
            command.args(["-M", "-N", &self.destination()]).stdin(Stdio::null()).stdout(Stdio::null());
            command.stderr(File::create(&log).with_context(|| format!("cannot create {}", log.display()))?);
            let master = machine::start_in(&mut command, switch, kept, &format!("ssh to {}", self.name()))?;
            let left = deadline.saturating_duration_since(Instant::now());
            // The socket is there once the two have shaken hands.
            wait::until_true(&format!("{} is reached by ssh", self.name()), left, || {
                Ok(self.socket.exists() || !master.is_running() || !process.is_running())
            })
            .with_context(|| self.describe())?;
            if !process.is_running() {
                let said = fs::read_to_string(machine::program_log(&self.run, self.name())).unwrap_or_default();
                bail!("{}'s QEMU has ended: {}", self.name(), process::tail(&said));
            }
            if master.is_running() {
                return Ok(master);
            }
            if Instant::now() >= deadline {
                bail!("{} is not reached by ssh: {}", self.name(), self.describe());
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Runs a line of shell to its end.
    pub fn run(&self, line: &str) -> Result<Output> {
        self.run_within(line, RUN_LIMIT)
    }

    /// Runs a line of shell to its end, which must come within `limit`.
    pub fn run_within(&self, line: &str, limit: Duration) -> Result<Output> {
        self.run_with_input(line, b"", limit)
    }

    /// Runs a line of shell that reads `input`.
    pub fn run_with_input(&self, line: &str, input: &[u8], limit: Duration) -> Result<Output> {
        let mut command = self.command(line, false);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start ssh")?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let what = || format!("on {}: {line}", self.name());
        let input = input.to_vec();
        // A command need not read what it is given.
        thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(&input)));
        let (stdout, stderr) = (thread::spawn(|| read_all(stdout)), thread::spawn(|| read_all(stderr)));
        let ended = wait::until(&what(), limit, || Ok(child.try_wait()?));
        if ended.is_err() {
            // The shared connection keeps the other ends of the pipes for as long as the command goes on: nobody waits for that.
            let _ = child.kill();
            let _ = child.wait();
        }
        let status = ended?;
        let panicked = |_| anyhow!("a thread that reads panicked");
        let output = Output {
            code: status.code().with_context(what)?,
            stdout: stdout.join().map_err(panicked)?,
            stderr: stderr.join().map_err(panicked)?,
        };
        if output.code == SSH_FAILED {
            bail!("{}: no connection, or the command ended with {SSH_FAILED}: {}", what(), output.stderr.trim());
        }
        Ok(output)
    }

    /// Runs a line of shell that must succeed, and gives what it wrote to stdout.
    pub fn check(&self, line: &str) -> Result<String> {
        let output = self.run(line)?;
        if output.code != 0 {
            bail!("on {}: {line}: ended with {}: {}{}", self.name(), output.code, output.stdout, output.stderr);
        }
        Ok(output.stdout)
    }

    /// Starts a line of shell that goes on by itself. Its outputs go to files in the lab's run directory.
    pub fn spawn(&self, name: &str, line: &str) -> Result<Remote> {
        let number = SPAWNED.fetch_add(1, Ordering::Relaxed);
        let pid_file = format!("/run/lab/{}-{number}.pid", std::process::id());
        // The shell gives its process to the program, so that signals reach that.
        let line = format!("echo $$ >{pid_file}; exec {line}");
        let process = Process::start(&format!("{}.{name}", self.name()), &self.run, self.command(&line, false), None)?;
        Ok(Remote { host: self.clone(), process, pid_file })
    }

    /// Waits until a line of shell succeeds, and gives what it wrote to stdout.
    pub fn wait_for(&self, what: &str, line: &str, limit: Duration) -> Result<String> {
        wait::until(&format!("{}: {what}", self.name()), limit, || {
            let output = self.run(line)?;
            Ok((output.code == 0).then_some(output.stdout))
        })
    }

    /// The command on this machine that runs a line of shell on the host; with a terminal there, if asked.
    pub fn command(&self, line: &str, terminal: bool) -> Command {
        let mut command = self.ssh();
        command.arg(if terminal { "-tt" } else { "-T" }).arg(self.destination()).arg("--").arg(line);
        command
    }

    /// The end of its console's log.
    pub fn describe(&self) -> String {
        let log = machine::console_log(&self.run, self.name());
        format!("the end of {}:\n{}", log.display(), process::tail(&self.console()))
    }

    fn destination(&self) -> String {
        format!("root@{}", self.address(Network::Management))
    }

    fn ssh(&self) -> Command {
        let mut command = tree_program(&self.tree, "ssh");
        let path = |path: &Path| path.display().to_string();
        let options = [
            "BatchMode=yes".to_owned(),
            "ConnectTimeout=10".to_owned(),
            "ServerAliveInterval=10".to_owned(),
            "ServerAliveCountMax=6".to_owned(),
            "LogLevel=ERROR".to_owned(),
            "IdentitiesOnly=yes".to_owned(),
            "StrictHostKeyChecking=yes".to_owned(),
            format!("IdentityFile={}", path(&self.run.join(KEY))),
            format!("UserKnownHostsFile={}", path(&self.run.join("known_hosts"))),
            "GlobalKnownHostsFile=none".to_owned(),
            format!("ControlPath={}", path(&self.socket)),
        ];
        command.args(["-F", "none"]);
        for option in options {
            command.args(["-o", &option]);
        }
        command
    }
}

/// A command that goes on by itself on a host. Dropping it kills it there.
pub struct Remote {
    host: Host,
    process: Process,
    pid_file: String,
}

impl Remote {
    /// Its outputs, and its end, as of a process here: ssh ends as the command does.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Sends it a signal, by name without `SIG`.
    pub fn signal(&self, signal: &str) -> Result<()> {
        self.host.check(&format!("kill -{signal} $(cat {})", self.pid_file)).map(drop)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // It may have ended, and so may the host.
        if self.process.is_running().unwrap_or(false) {
            let _ = self.signal("KILL");
        }
    }
}

/// One word for the shell.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn read_all(from: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    // What came before an error is still worth showing.
    let _ = from.map(|mut from| from.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_reads_back_what_was_quoted() {
        for word in ["plain", "two words", "it's", "$HOME `x` \\ \"y\"", ""] {
            let output = Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
