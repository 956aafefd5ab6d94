//! A move measured from outside: time, gap, bytes, and how well the cap was kept.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use godwit_control::qmp::{Client, ClientError};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::clock::{monotonic_ns, ms};
use crate::cloud_hypervisor::{CloudHypervisor, Request};
use crate::counters::{CounterSampler, Interface, cap_error_max_pct};
use crate::godwit::{Ended, Node};
use crate::heartbeat::Gap;
use crate::sampler::{Sampler, Target};
use crate::{interrupt, wait, workload};

/// Between two looks at how the move stands.
const POLL_PERIOD: Duration = Duration::from_millis(2);

/// Between two looks for the destination's memory: each reads the list of its mappings.
const SEARCH_PERIOD_NS: u64 = 5_000_000;

/// How long the destination's heartbeat, and the command's own end, may take once the move has completed.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// The link that a move goes over, and the cap that it is to keep.
pub struct Link {
    /// The source's end.
    pub interface: Interface,
    /// The same, to be sampled meanwhile.
    pub sampled: Interface,
    /// Headers in each packet.
    pub header_bytes: u64,
    /// The cap.
    pub cap_bytes_per_s: f64,
}

/// What was seen of the link.
#[derive(Debug, Clone, Copy)]
pub struct LinkUse {
    /// Both directions, headers included, as the interface counts them.
    pub wire_bytes: u64,
    /// The largest excess over the cap in any 100 ms of the rounds.
    pub cap_error_max_pct: f64,
}

/// A move that completed.
#[derive(Debug, Clone)]
pub struct Measured {
    /// From the command until a poller saw it completed.
    pub total_ms: f64,
    /// What the mover itself says.
    pub downtime_ms: f64,
    /// By the guest's heartbeat.
    pub gap: Gap,
    /// The link, if one was given.
    pub link: Option<LinkUse>,
    /// What the mover itself tells of the move.
    pub outcome: Value,
}

/// A move that came to nothing, or took too long and was left alone.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NotCompleted {
    /// It ended otherwise.
    #[error("the move did not complete: {0}")]
    Ended(String),
    /// It goes on.
    #[error("the move has not completed within {0:?}; its status is {1}")]
    GoesOn(Duration, String),
}

/// Moves the machine of `source` to `destination` with the options `more`, and shows each answer about its progress to
/// `show`.
pub fn measure(
    source: &Node,
    destination: &Node,
    target: Target,
    link: Option<Link>,
    more: &[&str],
    limit: Duration,
    mut show: impl FnMut(&Value),
) -> Result<Measured> {
    let uri = destination.uri()?;
    let mut watch = Watch::start(target, destination.process.pid(), Box::new(|| Ok(true)));
    let mut poller = source.qmp()?;
    let link = link.map(LinkWatch::start).transpose()?;
    let last_move = source.migration()?["move"].clone();

    let start_ns = monotonic_ns();
    let mut command = source.start_command(&["migrate"], &[&["--to", &uri, "--insecure", "--json"], more].concat())?;
    let total_ns = watch.until_completed(start_ns, limit, || {
        let answer = match poller.execute("x-godwit-query-migrate", json!({})) {
            Ok(answer) => answer,
            // A source ends as soon as its machine has moved; it tells so before.
            Err(ClientError::Closed) => return completed_event(&mut poller),
            Err(error) => return Err(error.into()),
        };
        if answer["move"] == last_move {
            return Ok("none".into());
        }
        show(&answer);
        let status = answer["status"].as_str().unwrap_or_default().to_owned();
        Ok(if answer["active"] == true || status == "completed" { status } else { failure(&answer) })
    });
    let total_ns = total_ns.with_context(|| command.describe())?;
    let ended = Ended::wait(&mut command, SETTLE_LIMIT)?;
    let outcome = if more.contains(&"--audit") { ended.ensure_audited()? } else { ended.ensure_code(0)?.outcome()? };
    let gap = watch.gap()?;
    let link = link.map(|link| link.finish(&watch.sampler)).transpose()?;
    let downtime_ms = outcome["downtime_ms"].as_f64().context("the outcome has no downtime_ms")?;
    Ok(Measured { total_ms: ms(total_ns), downtime_ms, gap, link, outcome })
}

/// Whether the destination's memory may be looked at yet.
pub type MayBeSeen<'a> = Box<dyn FnMut() -> Result<bool> + 'a>;

/// Has the process behind `qmp`, which is QEMU or speaks as it does, move its machine to the process `destination`, which waits at `uri`.
/// Each answer about its progress is shown to `show`. The destination's memory is looked at once `may_be_seen`. Gives the total in ms and
/// the gap.
pub fn measure_by_qmp(
    mut qmp: Client,
    destination: Pid,
    target: Target,
    (uri, may_be_seen): (&str, MayBeSeen<'_>),
    limit: Duration,
    mut show: impl FnMut(&mut Client, &Value) -> Result<()>,
) -> Result<(f64, Gap)> {
    let mut watch = Watch::start(target, destination, may_be_seen);
    let start_ns = monotonic_ns();
    qmp.execute("migrate", json!({ "uri": uri }))?;
    let total_ns = watch.until_completed(start_ns, limit, || {
        let answer = match qmp.execute("query-migrate", json!({})) {
            Ok(answer) => answer,
            // A source may end as soon as its machine has moved; it tells so before.
            Err(ClientError::Closed) => return completed_event(&mut qmp),
            Err(error) => return Err(error.into()),
        };
        show(&mut qmp, &answer)?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    })?;
    Ok((ms(total_ns), watch.gap()?))
}

/// Has Cloud Hypervisor send its machine to `destination` by `send`; gives the total in ms and the gap. It says nothing of its downtime.
pub fn measure_cloud_hypervisor(
    source: &CloudHypervisor,
    destination: &CloudHypervisor,
    target: Target,
    send: impl FnOnce() -> Result<Request>,
    limit: Duration,
) -> Result<(f64, Gap)> {
    let mut watch = Watch::start(target, destination.process.pid(), Box::new(|| Ok(true)));
    let start_ns = monotonic_ns();
    let mut request = send()?;
    let total_ns = watch.until_completed(start_ns, limit, || {
        // A source ends once its machine has moved.
        if source.has_ended()? {
            return Ok("completed".into());
        }
        Ok(request.check().map_or_else(|error| format!("{error:#}"), |()| "active".into()))
    })?;
    Ok((ms(total_ns), watch.gap()?))
}

/// The heartbeat at both ends, the destination's from as soon as its memory can be found.
struct Watch<'a> {
    sampler: Sampler,
    destination: Pid,
    vcpus: usize,
    found: bool,
    searched_ns: u64,
    /// Until then the destination is left alone.
    may_be_seen: MayBeSeen<'a>,
}

impl<'a> Watch<'a> {
    fn start(source: Target, destination: Pid, may_be_seen: MayBeSeen<'a>) -> Self {
        Self {
            sampler: Sampler::start(source),
            destination,
            vcpus: source.vcpus,
            found: false,
            searched_ns: 0,
            may_be_seen,
        }
    }

    fn search(&mut self) -> Result<()> {
        let now_ns = monotonic_ns();
        if self.found || now_ns - self.searched_ns < SEARCH_PERIOD_NS || !(self.may_be_seen)()? {
            return Ok(());
        }
        self.searched_ns = now_ns;
        if let Some(header) = workload::find_header(self.destination) {
            self.sampler.watch_destination(workload::heartbeats(self.destination, header, self.vcpus));
            self.found = true;
        }
        Ok(())
    }

    /// Polls until the status is `completed` and gives the time since `start_ns`.
    fn until_completed(
        &mut self,
        start_ns: u64,
        limit: Duration,
        mut status: impl FnMut() -> Result<String>,
    ) -> Result<u64> {
        loop {
            interrupt::check()?;
            let status = status()?;
            let taken_ns = monotonic_ns() - start_ns;
            self.search()?;
            match status.as_str() {
                "completed" => return Ok(taken_ns),
                "" | "none" | "setup" | "active" | "pre-switchover" | "device" | "postcopy-active" | "cancelling" => {}
                other => return Err(NotCompleted::Ended(other.to_owned()).into()),
            }
            if taken_ns > limit.as_nanos() as u64 {
                return Err(NotCompleted::GoesOn(limit, status).into());
            }
            thread::sleep(POLL_PERIOD);
        }
    }

    fn gap(&mut self) -> Result<Gap> {
        let settled = wait::until("the gap can be told", SETTLE_LIMIT, || {
            self.search()?;
            Ok(self.sampler.gap().ok())
        });
        settled.or_else(|_| self.sampler.gap())
    }
}

struct LinkWatch {
    interface: Interface,
    received_before: u64,
    sent_before: u64,
    sampler: CounterSampler,
    cap_bytes_per_s: f64,
}

impl LinkWatch {
    fn start(link: Link) -> Result<Self> {
        let before = link.interface.traffic()?;
        Ok(Self {
            interface: link.interface,
            received_before: before.received_bytes,
            sent_before: before.sent_bytes,
            sampler: CounterSampler::start(link.sampled, link.header_bytes),
            cap_bytes_per_s: link.cap_bytes_per_s,
        })
    }

    fn finish(self, heartbeat: &Sampler) -> Result<LinkUse> {
        let after = self.interface.traffic()?;
        let wire_bytes = after.received_bytes - self.received_before + after.sent_bytes - self.sent_before;
        // The rounds end with the pause, which is when the heartbeat stops.
        let paused_ns = heartbeat.source_last_change_ns().context("the source's heartbeat was never seen")?;
        let mut samples = self.sampler.finish()?;
        samples.retain(|sample| sample.at_ns <= paused_ns);
        let cap_error_max_pct = cap_error_max_pct(&samples, self.cap_bytes_per_s)
            .context("the rounds were too short for a window of 100 ms: how well the cap was kept is not known")?;
        Ok(LinkUse { wire_bytes, cap_error_max_pct })
    }
}

/// After the source has hung up: whether the last thing it told was that the move has completed.
fn completed_event(poller: &mut Client) -> Result<String> {
    while let Ok(Some(event)) = poller.next_event(Duration::from_millis(1)) {
        if event.name == "MIGRATION" && event.data["status"] == "completed" {
            return Ok("completed".into());
        }
    }
    bail!("the source ended without telling that the move has completed")
}

/// A move that is neither active nor completed, in words; empty before it has begun.
fn failure(answer: &Value) -> String {
    match &answer["outcome"] {
        Value::Null => String::new(),
        outcome => outcome.to_string(),
    }
}
