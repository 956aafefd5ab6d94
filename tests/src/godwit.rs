//! The sender and the receiver as processes.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use godwit_control::qmp::Client;
use godwit_vmm::workload::layout::{self, field};
use serde_json::{Value, json};

use crate::guest_memory::RemoteMemory;
use crate::harness::{Scene, binary};
use crate::netns::Namespace;
use crate::process::Process;
use crate::sampler::Target;
use crate::wait;
use crate::workload::{self, Workload};

/// How long a process may take to start, a guest to begin its work, and a command to be answered.
pub const START_LIMIT: Duration = Duration::from_secs(30);

/// How long the check of a guest may take.
const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// A process that runs a machine, or waits for one.
pub struct Node {
    /// The process.
    pub process: Process,
    name: String,
    directory: PathBuf,
    control: PathBuf,
    commands: AtomicU32,
}

/// A client command that has ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Node {
    /// Starts a sender with the workload guest and waits until the guest works.
    pub fn sender(
        scene: &Scene,
        name: &str,
        namespace: Option<&Namespace>,
        workload: &Workload,
        more: &[&str],
    ) -> Result<Self> {
        let mut arguments = workload.arguments();
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        let mut node = Self::start(scene, name, namespace, "godwit-sender", &["run"], &arguments)?;
        node.wait_for_guest(workload.vcpus)?;
        Ok(node)
    }

    /// Starts a sender with `arguments` and waits until its control socket answers.
    pub fn sender_with(scene: &Scene, name: &str, arguments: &[&str]) -> Result<Self> {
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Self::start(scene, name, None, "godwit-sender", &["run"], &arguments)
    }

    /// Starts a receiver that listens at `listen` and waits until it does.
    pub fn receiver(
        scene: &Scene,
        name: &str,
        namespace: Option<&Namespace>,
        listen: &str,
        more: &[&str],
    ) -> Result<Self> {
        let more: Vec<String> = more.iter().map(|&argument| argument.to_owned()).collect();
        let mut node = Self::start(scene, name, namespace, "godwit-receiver", &["--listen", listen], &more)?;
        node.process.wait_while_running("LISTENING", START_LIMIT, |process| Ok(listening(&process.stdout()).pop()))?;
        Ok(node)
    }

    fn start(
        scene: &Scene,
        name: &str,
        namespace: Option<&Namespace>,
        program: &str,
        first: &[&str],
        more: &[String],
    ) -> Result<Self> {
        let control = scene.path().join(format!("{name}.sock"));
        let mut command = Command::new(binary(program)?);
        command.args(first).arg("--control").arg(&control).args(more);
        let mut process = Process::start(name, scene.path(), command, namespace)?;
        process.wait_while_running("control socket", START_LIMIT, |_| Ok(Client::connect(&control).ok()))?;
        let directory = scene.path().to_owned();
        Ok(Self { process, name: name.to_owned(), directory, control, commands: AtomicU32::new(0) })
    }

    /// Where the node listens, as it says in the last `LISTENING` line.
    pub fn uri(&self) -> Result<String> {
        listening(&self.process.stdout()).pop().with_context(|| format!("{} has never said LISTENING", self.name))
    }

    /// How often it has said that it listens.
    pub fn times_listening(&self) -> usize {
        listening(&self.process.stdout()).len()
    }

    /// A connection to its control socket.
    pub fn qmp(&self) -> Result<Client> {
        Client::connect(&self.control).with_context(|| self.name.clone())
    }

    /// Executes one command on its control socket.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp()?.execute(command, arguments).with_context(|| format!("{}: {command}", self.name))
    }

    /// Starts the client command `verb` towards this node.
    pub fn start_command(&self, verb: &[&str], arguments: &[&str]) -> Result<Process> {
        let number = self.commands.fetch_add(1, Ordering::Relaxed);
        let mut command = Command::new(binary("godwit-sender")?);
        command.args(verb).arg("--control").arg(&self.control).args(arguments);
        let name = format!("{}-{}-{number}", self.name, verb.join("-"));
        Process::start(&name, &self.directory, command, None)
    }

    /// Runs the client command `verb` towards this node to its end.
    pub fn command(&self, verb: &[&str], arguments: &[&str], limit: Duration) -> Result<Ended> {
        Ended::wait(&mut self.start_command(verb, arguments)?, limit)
    }

    /// Starts to move the node's machine to `uri`, with `--audit`.
    pub fn start_move(&self, uri: &str, more: &[&str]) -> Result<Process> {
        self.start_command(&["migrate"], &[&["--to", uri, "--insecure", "--audit", "--json"], more].concat())
    }

    /// Moves the node's machine to `uri` and waits for the end.
    pub fn move_to(&self, uri: &str, more: &[&str], limit: Duration) -> Result<Ended> {
        Ended::wait(&mut self.start_move(uri, more)?, limit)
    }

    /// What the node tells of its last move.
    pub fn migration(&self) -> Result<Value> {
        self.execute("x-godwit-query-migrate", json!({}))
    }

    /// The phase of the node's running move.
    pub fn phase(&self) -> Result<Option<String>> {
        Ok(self.migration()?["progress"]["phase"].as_str().map(str::to_owned))
    }

    /// Waits until the node's move is in `phase`.
    pub fn wait_for_phase(&self, phase: &str, limit: Duration) -> Result<()> {
        let what = format!("{} reaches phase {phase}", self.name);
        wait::until_true(&what, limit, || {
            let state = self.migration()?;
            if state["active"] == false && !state["outcome"].is_null() {
                bail!("the move ended before phase {phase}: {}", state["outcome"]);
            }
            Ok(state["progress"]["phase"] == phase)
        })
    }

    /// Guest RAM, as the node says where it is.
    pub fn memory(&self) -> Result<RemoteMemory> {
        RemoteMemory::from_answer(self.process.pid(), &self.execute("query-guest-ram", json!({}))?)
    }

    /// Where the workload guest's heartbeats are.
    pub fn heartbeats(&self, vcpus: usize) -> Result<Target> {
        let header = self.memory()?.host_address(layout::HEADER)?;
        Ok(workload::heartbeats(self.process.pid(), header, vcpus))
    }

    /// Waits until the guest has filled its memory and every vCPU works.
    fn wait_for_guest(&mut self, vcpus: usize) -> Result<()> {
        let what = format!("{}: the guest works", self.name);
        // The control socket answers a moment before the machine is there.
        let memory = wait::until(&what, START_LIMIT, || Ok(self.memory().ok()))?;
        let mut status = [0; 4];
        self.process.wait_while_running(&what, START_LIMIT, |_| {
            memory.read(layout::HEADER + field::STATUS, &mut status)?;
            Ok((u32::from_le_bytes(status) == layout::status::RUNNING).then_some(()))
        })?;
        self.ensure_guest_runs(vcpus)
    }

    /// Checks that the guest runs here: every vCPU's heartbeat advances.
    pub fn ensure_guest_runs(&self, vcpus: usize) -> Result<()> {
        let what = || format!("the guest runs at {}", self.name);
        advances(&self.heartbeats(vcpus)?, Duration::from_secs(5)).with_context(what)
    }

    /// Checks that the guest stands still here for a while.
    pub fn ensure_guest_stands(&self, vcpus: usize) -> Result<()> {
        let target = self.heartbeats(vcpus)?;
        match advances(&target, Duration::from_millis(300)) {
            Ok(()) => bail!("the guest runs at {}", self.name),
            Err(_) => Ok(()),
        }
    }

    /// Has every page of the guest checked and gives how many those were.
    pub fn check_guest(&self) -> Result<u64> {
        let ended = self.command(&["guest", "check"], &["--json"], CHECK_LIMIT)?;
        ensure!(ended.code == 0, "the guest's memory is not whole: {ended}");
        ended.last_json()?["pages_checked"].as_u64().context("the check does not say how many pages it checked")
    }

    /// Fails unless every page of the guest is as the guest left it.
    pub fn ensure_guest_whole(&self, workload: &Workload) -> Result<()> {
        let (checked, pages) = (self.check_guest()?, workload.pages());
        ensure!(checked == pages, "{checked} of {pages} pages were checked");
        Ok(())
    }

    /// Fails unless the guest works here and is whole, as after a move that came to nothing.
    pub fn ensure_guest_unharmed(&self, workload: &Workload) -> Result<()> {
        self.ensure_guest_runs(workload.vcpus)?;
        self.ensure_guest_whole(workload)
    }
}

/// Tries to start a machine with `workload`, which is refused (exit code 3), and gives how that ended. Without a `--control` of its own
/// it gets one that nobody else has.
pub fn refused_start(scene: &Scene, name: &str, workload: &Workload, more: &[&str]) -> Result<Ended> {
    let mut command = Command::new(binary("godwit-sender")?);
    command.arg("run").args(workload.arguments()).args(more);
    if !more.contains(&"--control") {
        command.arg("--control").arg(scene.path().join(format!("{name}.sock")));
    }
    Ended::wait(&mut Process::start(name, scene.path(), command, None)?, START_LIMIT)?.ensure_code(3)
}

impl Ended {
    /// Waits for a command's end.
    pub fn wait(process: &mut Process, limit: Duration) -> Result<Self> {
        let status = process.wait(limit)?;
        let code = status.code().ok_or_else(|| anyhow!("ended with {status}\n{}", process.describe()))?;
        Ok(Self { code, stdout: process.stdout(), stderr: process.stderr() })
    }

    /// Fails, with all that was said, unless the command ended with `code`.
    pub fn ensure_code(self, code: i32) -> Result<Self> {
        ensure!(self.code == code, "expected exit code {code}: {self}");
        Ok(self)
    }

    /// Fails unless stderr says all of `texts`.
    pub fn ensure_says(self, texts: &[&str]) -> Result<Self> {
        for text in texts {
            ensure!(self.stderr.contains(text), "does not say `{text}`: {self}");
        }
        Ok(self)
    }

    /// The last line of stdout.
    pub fn last_json(&self) -> Result<Value> {
        let line = self.stdout.lines().last().with_context(|| format!("nothing on stdout: {self}"))?;
        serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))
    }

    /// How a move ended.
    pub fn outcome(&self) -> Result<Value> {
        let outcome = self.last_json()?;
        ensure!(outcome["outcome"].is_string(), "no outcome was told: {self}");
        Ok(outcome)
    }

    /// Fails unless this was a move whose audit found nothing.
    pub fn ensure_audited(self) -> Result<Value> {
        let outcome = self.ensure_code(0)?.outcome()?;
        ensure!(outcome["outcome"] == "moved", "{outcome}");
        ensure!(outcome["audit"].as_str().is_some_and(|audit| audit.starts_with("ok")), "audit: {}", outcome["audit"]);
        Ok(outcome)
    }

    /// Fails unless this was a move, with `--audit`, after which the guest is whole at `destination` and works there.
    pub fn ensure_moved(self, destination: &Node, workload: &Workload) -> Result<Value> {
        let outcome = self.ensure_audited()?;
        destination.ensure_guest_runs(workload.vcpus)?;
        destination.ensure_guest_whole(workload)?;
        Ok(outcome)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { code, stdout, stderr } = self;
        write!(
            f,
            "exit code {code}\nstdout:\n{}stderr:\n{}",
            crate::process::tail(stdout),
            crate::process::tail(stderr)
        )
    }
}

/// Waits until every heartbeat has advanced.
fn advances(target: &Target, limit: Duration) -> Result<()> {
    let (mut first, mut now) = (Vec::new(), Vec::new());
    target.read(&mut first).context("cannot read the heartbeat")?;
    wait::until_true("the heartbeat of every vCPU advances", limit, || {
        target.read(&mut now).context("cannot read the heartbeat")?;
        Ok(first.iter().zip(&now).all(|(first, now)| now > first))
    })
}

/// The URIs that a receiver has said it listens at.
fn listening(stdout: &str) -> Vec<String> {
    stdout.lines().filter_map(|line| line.strip_prefix("LISTENING ")).map(str::to_owned).collect()
}
