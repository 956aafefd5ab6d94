//! What the program in `fw1` answers: one line a request, a list ends with an empty line. The hosts run the same program
//! to tell what their clocks show.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::netns::Namespace;
use crate::scenario::klog::Line;
use crate::scenario::place;

/// Where the program listens.
pub const PORT: u16 = 7000;

/// The requests.
pub mod request {
    /// The three clocks in nanoseconds: real time, monotonic, boot time.
    pub const CLOCK: &str = "clock";
    /// Kernel log lines of level warning or worse.
    pub const KLOG: &str = "klog";
    /// What the samplers of the clocks have seen.
    pub const STEPS: &str = "steps";
    /// The id of this boot.
    pub const BOOT_ID: &str = "boot-id";
    /// Writes numbered records from now on, and tells each number once its fsync has returned.
    pub const RECORDS: &str = "records";
    /// Writes a file whose contents follow from a seed: `write SEED`.
    pub const WRITE: &str = "write";
    /// Reads that file from the disk, not from the page cache, and compares it: `check SEED`.
    pub const CHECK: &str = "check";
    /// Fills so many MiB of a file in memory with random bytes, and removes it: `use-memory MIB`.
    pub const USE_MEMORY: &str = "use-memory";
    /// Reboots as `reboot` does.
    pub const REBOOT: &str = "reboot";
}

/// What is answered to a request that was done and has nothing to tell.
pub const DONE: &str = "done";

/// How long an answer may take: longer than any pause.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A connection to the program.
pub struct GuestClient {
    reader: BufReader<std::net::TcpStream>,
}

/// What a machine's clocks show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clocks {
    /// Since 1970.
    pub realtime_ns: u64,
    /// Since boot.
    pub monotonic_ns: u64,
    /// Since boot, time asleep included.
    pub boottime_ns: u64,
}

/// What the samplers of the guest's clocks have seen since it booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Steps {
    /// How often the monotonic clock was read.
    pub samples: u64,
    /// How often it showed less than before, on the same CPU or another.
    pub backward: u64,
    /// By how much at most.
    pub worst_ns: u64,
}

impl GuestClient {
    /// Connects from `namespace`.
    pub fn connect(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        Ok(Self { reader: BufReader::new(place::connect(namespace, address, ANSWER_LIMIT)?) })
    }

    /// What its clocks show.
    pub fn clocks(&mut self) -> Result<Clocks> {
        let answer = self.ask(request::CLOCK)?;
        let [realtime_ns, monotonic_ns, boottime_ns] = numbers(&answer)?;
        Ok(Clocks { realtime_ns, monotonic_ns, boottime_ns })
    }

    /// What its samplers have seen.
    pub fn steps(&mut self) -> Result<Steps> {
        let answer = self.ask(request::STEPS)?;
        let [samples, backward, worst_ns] = numbers(&answer)?;
        Ok(Steps { samples, backward, worst_ns })
    }

    /// The warnings in its kernel log.
    pub fn klog(&mut self) -> Result<Vec<Line>> {
        self.send(request::KLOG)?;
        let mut lines = Vec::new();
        loop {
            let text = self.line()?;
            if text.is_empty() {
                return Ok(lines);
            }
            lines.push(Line::parse(&text).with_context(|| format!("not a line of a kernel log: {text}"))?);
        }
    }

    /// The id of its boot: another one means that it has rebooted.
    pub fn boot_id(&mut self) -> Result<String> {
        self.ask(request::BOOT_ID)
    }

    /// Has it write a file whose contents follow from `seed`.
    pub fn write_file(&mut self, seed: u64) -> Result<()> {
        self.order(&format!("{} {seed}", request::WRITE))
    }

    /// Has it read that file back from its disk and compare.
    pub fn check_file(&mut self, seed: u64) -> Result<()> {
        self.order(&format!("{} {seed}", request::CHECK))
    }

    /// Has it use so much memory for a while, and free it.
    pub fn use_memory(&mut self, mib: u64) -> Result<()> {
        self.order(&format!("{} {mib}", request::USE_MEMORY))
    }

    /// Has it reboot. It goes on for a while before it does.
    pub fn reboot(&mut self) -> Result<()> {
        self.order(request::REBOOT)
    }

    /// Sends a request and gives the connection to whoever reads the many answers.
    pub(crate) fn into_stream_of(mut self, request: &str) -> Result<BufReader<std::net::TcpStream>> {
        self.send(request)?;
        Ok(self.reader)
    }

    fn order(&mut self, request: &str) -> Result<()> {
        let answer = self.ask(request)?;
        ensure!(answer == DONE, "`{request}` was answered with `{answer}`");
        Ok(())
    }

    fn ask(&mut self, request: &str) -> Result<String> {
        self.send(request)?;
        let answer = self.line()?;
        ensure!(!answer.starts_with("error: "), "`{request}` was answered with `{answer}`");
        Ok(answer)
    }

    fn send(&mut self, request: &str) -> Result<()> {
        let sent = self.reader.get_mut().write_all(format!("{request}\n").as_bytes());
        sent.with_context(|| format!("cannot send `{request}`"))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line).context("no answer")?;
        Ok(line.strip_suffix('\n').context("the connection ended instead of an answer")?.to_owned())
    }
}

fn numbers<const N: usize>(answer: &str) -> Result<[u64; N]> {
    let numbers: Result<Vec<u64>, _> = answer.split(' ').map(str::parse).collect();
    let numbers = numbers.ok().and_then(|numbers| numbers.try_into().ok());
    numbers.with_context(|| format!("`{answer}` is not {N} numbers"))
}
