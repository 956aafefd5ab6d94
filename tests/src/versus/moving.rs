//! One move by Godwit or by another program, in network namespaces, seen from outside by the same means.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_vmm::config::MemoryBacking;
use godwit_vmm::guest_memory;
use nix::unistd::Pid;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::case::{Case, Copying, LINK_BYTES_PER_S, LINK_MEGABITS_PER_S, Link};
use super::limits::fresh_tcp;
use super::settings::{Mover, Settings};
use super::watch::Watch;
use crate::cloud_hypervisor::CloudHypervisor;
use crate::godwit::Node;
use crate::harness::{Scene, binary};
use crate::heartbeat::Gap;
use crate::measure::{MayBeSeen, NotCompleted, measure_by_qmp, measure_cloud_hypervisor};
use crate::netns::Hosts;
use crate::qemu::{Place, Qemu};
use crate::sampler::{Sampler, Target};
use crate::{wait, workload};

/// A move that has not ended by then is cut and counts as that long.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How long a guest may take to fill its memory and write its working set.
const SETTLE_LIMIT: Duration = Duration::from_secs(120);

/// For how long memory that a move is to find is held: free page reporting goes over what is free 2 s after some was freed
/// (`PAGE_REPORTING_DELAY` in Linux' mm/page_reporting.c).
const HELD: Duration = Duration::from_millis(3000);

/// Where other programs listen at the destination.
const PORT: u16 = 4444;

/// By which both are told to go over to post-copy.
const START_POSTCOPY: &str = "migrate-start-postcopy";

/// Where post-copy is compared, neither is to find that it can do without.
const POSTCOPY_DOWNTIME_LIMIT_MS: u64 = 20;

/// A move, seen from outside.
#[derive(Debug, Clone)]
pub struct Moved {
    /// From the command until a poller saw it completed; [`LIMIT`] if it did not.
    pub total_ms: f64,
    /// By the guest's heartbeat; none if it did not complete.
    pub gap_ms: Option<f64>,
    /// Both directions, on the link.
    pub wire_bytes: u64,
    /// Of both ends, without what the guest itself used.
    pub cpu_s: f64,
    /// The guest's rate of writes until the pause over that before the move.
    pub guest_rate_share: Option<f64>,
    /// Why it did not complete.
    pub cut: Option<String>,
}

/// Moves a guest of the case with Godwit, by the same commands as with QEMU.
pub fn by_godwit(case: &Case, downtime_limit_ms: u64) -> Result<Moved> {
    let (scene, hosts) = (Scene::new()?, hosts(case)?);
    let source = Node::sender(&scene, "source", Some(hosts.host(0)), &case.workload, &[])?;
    let listen = format!("tcp://{}:0", hosts.address(1, 0));
    let destination = Node::receiver(&scene, "destination", Some(hosts.host(1)), &listen, &["--insecure"])?;
    let target = source.heartbeats(case.workload.vcpus)?;
    settle(case, target)?;
    let mut qmp = source.qmp()?;
    let cap = (case.link == Link::Capped).then_some(LINK_BYTES_PER_S as u64);
    qmp.execute("migrate-set-parameters", parameters(case, cap, downtime_limit(case, downtime_limit_ms)))?;
    let uri = destination.uri()?;
    provide_memory(case)?;
    let receiver = destination.process.pid();
    let watch = Watch::start(hosts.counters(0, 1)?, target, [source.process.pid(), receiver])?;
    let mut switch = Switch::new(case);
    let measured = measure_by_qmp(qmp, receiver, target, (&uri, Box::new(|| Ok(true))), LIMIT, |qmp, progress| {
        if switch.is_due(progress) {
            // It may have gone over by itself meanwhile.
            let _ = qmp.execute(START_POSTCOPY, json!({}));
        }
        Ok(())
    });
    let moved = Moved::new(measured, watch).with_context(|| scene.logs())?;
    if moved.cut.is_none() {
        destination.ensure_guest_whole(&case.workload)?;
    }
    Ok(moved)
}

/// Godwit's defaults, but for link and downtime limit.
fn parameters(case: &Case, cap: Option<u64>, downtime_limit_ms: u64) -> Value {
    let mut parameters = json!({
        "x-godwit-insecure": true,
        "max-bandwidth": cap.unwrap_or(0),
        "downtime-limit": downtime_limit_ms,
    });
    if case.copy == Copying::Post {
        parameters["x-godwit-on-stall"] = json!("postcopy");
    }
    parameters
}

/// Moves the same guest with another program.
pub fn by_other(case: &Case, mover: &Mover, downtime_limit_ms: u64) -> Result<Moved> {
    match mover {
        Mover::Qemu(settings) => by_qemu(case, settings, downtime_limit_ms),
        Mover::CloudHypervisor { binary, connections } => {
            by_cloud_hypervisor(case, binary, *connections, downtime_limit_ms)
        }
    }
}

fn by_qemu(case: &Case, settings: &Settings, downtime_limit_ms: u64) -> Result<Moved> {
    let (scene, hosts) = (Scene::new()?, hosts(case)?);
    let image = scene.path().join("workload.elf");
    export(case, &image)?;
    let uri = format!("tcp:{}:{PORT}", hosts.address(1, 0));
    let memory = case.workload.memory;
    let place = |host| Place { directory: scene.path(), namespace: Some(hosts.host(host)) };
    let source = Qemu::start("source", place(0), &image, memory, false)?;
    let destination = Qemu::start("destination", place(1), &image, memory, true)?;
    let cap = (case.link == Link::Capped).then_some(LINK_BYTES_PER_S as u64);
    for end in [&source, &destination] {
        let mut qmp = end.qmp()?;
        qmp.execute("migrate-set-capabilities", settings.capabilities())?;
        qmp.execute("migrate-set-parameters", settings.parameters(cap, downtime_limit(case, downtime_limit_ms)))?;
    }
    destination.listen(&uri)?;
    let pid = source.process.pid();
    let target = settled(case, pid)?;
    let watch = Watch::start(hosts.counters(0, 1)?, target, [pid, destination.process.pid()])?;
    let mut switch = Switch::new(case);
    // In post-copy QEMU discards what is stale before it registers memory: whoever reads there meanwhile puts pages of zeros in the way,
    // and the move breaks. The destination says so once it has done both, which is later than the source does.
    let mut receiver = destination.qmp()?;
    let mut may_be_seen = case.copy == Copying::Pre;
    let to = (
        &*uri,
        Box::new(move || {
            may_be_seen = may_be_seen || {
                let progress = receiver.execute("query-migrate", json!({}))?;
                matches!(progress["status"].as_str(), Some("postcopy-active" | "completed"))
            };
            Ok(may_be_seen)
        }) as MayBeSeen<'_>,
    );
    let measured = measure_by_qmp(source.qmp()?, destination.process.pid(), target, to, LIMIT, |qmp, progress| {
        if switch.is_due(progress) {
            qmp.execute(START_POSTCOPY, json!({}))?;
        }
        Ok(())
    });
    Moved::new(measured, watch).with_context(|| scene.logs())
}

fn by_cloud_hypervisor(case: &Case, binary: &Path, connections: u32, downtime_limit_ms: u64) -> Result<Moved> {
    let (scene, hosts) = (Scene::new()?, hosts(case)?);
    let image = scene.path().join("workload.elf");
    export(case, &image)?;
    let place = |host| Place { directory: scene.path(), namespace: Some(hosts.host(host)) };
    let machine = Some((&*image, case.workload.memory));
    let source = CloudHypervisor::start(binary, "source", place(0), machine)?;
    let mut destination = CloudHypervisor::start(binary, "destination", place(1), None)?;
    let _listening = destination.listen(PORT)?;
    let (pid, to) = (source.process.pid(), format!("{}:{PORT}", hosts.address(1, 0)));
    let target = settled(case, pid)?;
    let watch = Watch::start(hosts.counters(0, 1)?, target, [pid, destination.process.pid()])?;
    let send = || source.send(&to, connections, downtime_limit_ms);
    let measured = measure_cloud_hypervisor(&source, &destination, target, send, LIMIT);
    Moved::new(measured, watch).with_context(|| scene.logs())
}

/// The guest of another program, found by its memory, once it can be moved.
fn settled(case: &Case, pid: Pid) -> Result<Target> {
    let header = wait::until("the guest", SETTLE_LIMIT, || Ok(workload::find_header(pid)))?;
    let target = workload::heartbeats(pid, header, case.workload.vcpus);
    settle(case, target)?;
    provide_memory(case)?;
    Ok(target)
}

fn downtime_limit(case: &Case, downtime_limit_ms: u64) -> u64 {
    match case.copy {
        Copying::Pre => downtime_limit_ms,
        Copying::Post => POSTCOPY_DOWNTIME_LIMIT_MS,
    }
}

/// When to go over to post-copy: once, after the first pass.
struct Switch {
    waits: bool,
}

impl Switch {
    fn new(case: &Case) -> Self {
        Self { waits: case.copy == Copying::Post }
    }

    /// `progress`: what `query-migrate` answers, which counts the first pass as 1.
    fn is_due(&mut self, progress: &Value) -> bool {
        let passes = progress["ram"]["dirty-sync-count"].as_u64();
        let due = self.waits && passes.is_some_and(|passes| passes > 1);
        self.waits &= !due;
        due
    }
}

impl Moved {
    /// `measured`: total in ms, and the gap.
    fn new(measured: Result<(f64, Gap)>, watch: Watch) -> Result<Self> {
        let cost = watch.finish()?;
        let (total_ms, gap_ms, cut) = match measured {
            Ok((total_ms, gap)) => (total_ms, Some(gap.gap_ms), None),
            Err(error) => match error.downcast_ref::<NotCompleted>() {
                Some(why) => (LIMIT.as_secs_f64() * 1e3, None, Some(why.to_string())),
                None => return Err(error),
            },
        };
        let (wire_bytes, cpu_s, guest_rate_share) = (cost.wire_bytes, cost.cpu_s, cost.guest_rate_share);
        Ok(Self { total_ms, gap_ms, wire_bytes, cpu_s, guest_rate_share, cut })
    }
}

/// What TCP takes beside a guest of the case and what watches it, bytes per second: its contents once, into memory that nobody has touched.
pub fn raw_bytes_per_s(case: &Case) -> Result<f64> {
    let (scene, hosts) = (Scene::new()?, hosts(case)?);
    let source = Node::sender(&scene, "source", Some(hosts.host(0)), &case.workload, &[])?;
    let target = source.heartbeats(case.workload.vcpus)?;
    settle(case, target)?;
    provide_memory(case)?;
    let _watching = Sampler::start(target);
    fresh_tcp(case.contents_pages as usize * 4096)
}

/// SHA-256 of the guest that both boot.
pub fn guest_sha256(case: &Case) -> Result<String> {
    let scene = Scene::new()?;
    let image = scene.path().join("workload.elf");
    export(case, &image)?;
    Ok(Sha256::digest(std::fs::read(&image)?).iter().map(|byte| format!("{byte:02x}")).collect())
}

fn hosts(case: &Case) -> Result<Hosts> {
    let hosts = Hosts::new(2)?;
    if case.link == Link::Shaped {
        hosts.shape(0, 1, LINK_MEGABITS_PER_S)?;
        hosts.shape(1, 0, LINK_MEGABITS_PER_S)?;
    }
    Ok(hosts)
}

/// The guest as a file for other programs.
fn export(case: &Case, image: &Path) -> Result<()> {
    let mut command = Command::new(binary("godwit-sender")?);
    command.arg("run").args(case.workload.arguments()).arg("--export-elf").arg(image);
    let output = command.output().context("cannot run godwit-sender")?;
    ensure!(output.status.success(), "the guest was not exported: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Makes sure that as much free memory as the guest has is really there. On a machine that is itself virtual, its host may have taken
/// free memory back, and the next who touches it waits for it: that would be whichever move happens to come first. A kernel reports free
/// memory some time after some was freed (`HELD`): memory is freed after what was freed before has been reported, and so remains.
fn provide_memory(case: &Case) -> Result<()> {
    let memory = guest_memory(case.workload.pages() * 4096, MemoryBacking::Private, false)?;
    for region in memory.iter() {
        for offset in (0..region.len()).step_by(4096) {
            region.write_obj(1u8, MemoryRegionAddress(offset))?;
        }
    }
    thread::sleep(HELD);
    Ok(())
}

/// Waits until the guest has filled its memory and been through its working set, so that each move finds the same memory.
fn settle(case: &Case, heartbeats: Target) -> Result<()> {
    let mut values = Vec::new();
    let advancing = |values: &mut Vec<u64>| heartbeats.read(values).context("cannot read the guest's heartbeat");
    wait::until_true("the guest runs", SETTLE_LIMIT, || {
        advancing(&mut values)?;
        Ok(values.iter().all(|&beats| beats > 0))
    })?;
    if !case.writes() {
        return Ok(());
    }
    let writes = workload::writes(heartbeats);
    wait::until_true("the guest has written its working set", SETTLE_LIMIT, || {
        writes.read(&mut values).context("cannot read the guest's counters")?;
        Ok(values.iter().sum::<u64>() >= case.workload.working_set_pages())
    })
}
