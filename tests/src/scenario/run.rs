//! The scenario: `fw1` works, is moved to the other host over TCP and back over QUIC while it works, and is switched off.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::clock::{monotonic_ns, ms};
use crate::lab::Lab;
use crate::lab::layout::{CLIENT, GUEST, Network};
use crate::lab::remote::{Host, Remote, quoted};
use crate::scenario::announce::{AnnounceCounter, Mac};
use crate::scenario::counting::CountingConnection;
use crate::scenario::gap::Window;
use crate::scenario::guest::{self, GuestClient};
use crate::scenario::image::{self, Output};
use crate::scenario::offset::{ClockChange, Offset, Offsets};
use crate::scenario::ping::Pinger;
use crate::scenario::record;
use crate::scenario::records::{Confirmed, RecordsClient};
use crate::scenario::stage::{self, DISK, Keeper};
use crate::scenario::verdict::{MoveSeen, RunSeen};
use crate::scenario::{cases, claims, free_pages, race};

/// How long the clients look at a guest that does not move.
const BASELINE: Duration = Duration::from_secs(15);
/// Silence counts in full in every window that it touches: this keeps that of a move out of the baseline.
const CLEARANCE: Duration = Duration::from_millis(500);
/// How long all clients may take to see the guest work again.
const PROGRESS_LIMIT: Duration = Duration::from_secs(60);
/// How long the check of a disk image may take.
const IMAGE_LIMIT: Duration = Duration::from_secs(120);

/// A move of the scenario.
struct Leg {
    from: &'static str,
    to: &'static str,
    transport: &'static str,
}

const LEGS: [Leg; 2] =
    [Leg { from: "kvm1", to: "kvm2", transport: "tcp" }, Leg { from: "kvm2", to: "kvm1", transport: "quic" }];

/// What is played beside the scenario itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct More {
    /// Moves that are refused or fail, and a reboot.
    pub cases: bool,
    /// Claims while the NFS server comes and goes.
    pub claims: bool,
    /// Moves after memory was used and freed, with a balloon and without.
    pub free_pages: bool,
}

/// Plays the scenario in a lab that is up, and what is asked for around it. If it cannot be played to its end, the error
/// holds what the machine and its keepers have said last.
pub fn play(lab: &Lab, more: More) -> Result<RunSeen> {
    step("fw1 boots on kvm1");
    let mut keeper = Keeper::boot(lab, lab.host("kvm1")?)?;
    play_with(lab, &mut keeper, more).map_err(|error| {
        let hosts: String =
            ["kvm1", "kvm2", "storage"].iter().filter_map(|name| Some(lab.host(name).ok()?.describe())).collect();
        anyhow!("{error:#}\n{}{hosts}", keeper.describe())
    })
}

/// Says what is being done now.
pub fn step(what: &str) {
    eprintln!("lab: {what}");
}

fn play_with(lab: &Lab, keeper: &mut Keeper, more: More) -> Result<RunSeen> {
    let clocks = HostClocks::start(lab)?;
    let mut guest = stage::guest(lab)?;
    let boot_id = guest.boot_id()?;
    guest.write_file(0).context("fw1 writes a file")?;
    if more.cases {
        cases::before_moves(lab, keeper)?;
    }

    step("clients connect");
    let clients = Clients::start(lab)?;
    step("clients watch fw1 without a move");
    let baseline_ms = clients.baseline_gap_ms()?;
    let control_klog = guest.klog()?;

    let mut moves = Vec::new();
    for (seed, leg) in (1..).zip(&LEGS) {
        step(&format!("fw1 moves from {} to {} over {}", leg.from, leg.to, leg.transport));
        let read_before = read_on(lab, lab.host(leg.to)?).with_context(|| format!("{} reads the disk", leg.to))?;
        // What the destination has read is no longer what is on the disk.
        guest.write_file(seed)?;
        let before = clocks.measure(leg, &mut guest)?;
        let mut destination = Keeper::receive(lab.host(leg.to)?, leg.transport, "")?;
        let moved = keeper.move_to(&mut destination)?;
        let source = std::mem::replace(keeper, destination);
        drop(source);
        clients.wait_for_progress()?;
        let window = Window { from_ns: moved.begun_ns, to_ns: monotonic_ns() };
        let after = clocks.measure(leg, &mut guest)?;
        guest.check_file(seed).with_context(|| format!("the disk is stale ({read_before} blocks had been read)"))?;
        let seen = clients.seen(leg, window, baseline_ms)?;
        moves.push((
            window,
            MoveSeen {
                total_ms: moved.total_ms,
                downtime_ms: moved.downtime_ms,
                clock: ClockChange::over(&before, &after),
                same_boot: guest.boot_id()? == boot_id,
                ..seen
            },
        ));
    }
    let (klog, steps) = (guest.klog()?, guest.steps()?);
    let (confirmed, counting) = clients.finish();
    drop(guest);
    let mut last_record = confirmed.last();
    if more.cases {
        cases::after_moves(lab, keeper)?;
    }
    let mut race = None;
    if more.claims {
        last_record = claims::play(lab, keeper)?;
        race = Some(race::play(lab)?);
    }
    let mut reboot_ms = None;
    if more.cases {
        step(&format!("fw1 reboots on {}", keeper.host.name()));
        reboot_ms = Some(keeper.reboot(lab).context("fw1 reboots")?);
    }

    step("fw1 is powered off by ACPI, and its image is looked at");
    keeper.power_down()?;
    let storage = lab.host("storage")?;
    let on_storage = |words: &[&str]| run_on(storage, words);
    let fsck = image::check_file_system(DISK, on_storage)?;
    let records = image::read_records(DISK, on_storage)?;
    let moves = moves.into_iter().map(|(window, seen)| MoveSeen {
        disk_records: record::check(&records, confirmed.last_at(window.to_ns)),
        tcp_wrong: seen.tcp_wrong.clone().or_else(|| counting.as_ref().err().map(|error| format!("{error:#}"))),
        ..seen
    });
    record::check(&records, last_record).context("the image lacks records confirmed after the moves")?;
    let moves = moves.collect();
    let free_pages = if more.free_pages { Some(free_pages::play(lab)?) } else { None };
    Ok(RunSeen { moves, fsck, klog, control_klog, steps, race, reboot_ms, free_pages })
}

/// All who watch the guest from outside.
struct Clients {
    pinger: Pinger,
    announces: AnnounceCounter,
    counting: CountingConnection,
    records: RecordsClient,
}

impl Clients {
    fn start(lab: &Lab) -> Result<Self> {
        let (public, private) = (lab.public_client(), lab.private_client());
        let guest = stage::guest_address()?;
        Ok(Self {
            pinger: Pinger::start(public, guest)?,
            announces: AnnounceCounter::start(public, mac(&Network::Public.link_address(GUEST))?)?,
            counting: CountingConnection::start(public, private, Network::Private.address(CLIENT).parse()?)?,
            records: RecordsClient::start(public, SocketAddr::from((guest, guest::PORT)))?,
        })
    }

    /// The longest interval between replies while nothing happens.
    fn baseline_gap_ms(&self) -> Result<f64> {
        self.wait_for_progress()?;
        thread::sleep(CLEARANCE);
        let from_ns = monotonic_ns();
        thread::sleep(BASELINE);
        let window = Window { from_ns, to_ns: monotonic_ns() };
        thread::sleep(CLEARANCE);
        self.gap_ms(window)
    }

    fn gap_ms(&self, window: Window) -> Result<f64> {
        self.pinger.exchange().longest_gap_ns(window).map(ms).context("nobody pinged")
    }

    fn wait_for_progress(&self) -> Result<()> {
        self.counting.wait_for_progress(PROGRESS_LIMIT)?;
        self.records.wait_for_progress(PROGRESS_LIMIT)?;
        let replies = self.pinger.exchange().replies();
        crate::wait::until_true("replies", PROGRESS_LIMIT, || Ok(self.pinger.exchange().replies() > replies))
    }

    /// What of a move shows here. Times, clocks and what is on the disk are others' to tell.
    fn seen(&self, leg: &Leg, window: Window, baseline_gap_ms: f64) -> Result<MoveSeen> {
        let standing = self.counting.standing();
        let confirmed = self.records.confirmed();
        Ok(MoveSeen {
            from: leg.from.into(),
            to: leg.to.into(),
            transport: leg.transport.into(),
            total_ms: f64::NAN,
            downtime_ms: f64::NAN,
            client_gap_ms: self.gap_ms(window)?,
            baseline_gap_ms,
            pings_lost: self.pinger.exchange().lost(window),
            tcp_broken: standing.broken,
            tcp_wrong: standing.wrong,
            records: confirmed.within(window),
            disk_records: Ok(0),
            announces: self.announces.frames(window),
            clock: ClockChange { change_ms: f64::NAN, uncertainty_ms: f64::NAN },
            same_boot: false,
        })
    }

    /// What was confirmed, and whether all that was counted has arrived.
    fn finish(self) -> (Confirmed, Result<()>) {
        let confirmed = self.records.confirmed();
        (confirmed, self.counting.finish().map(drop))
    }
}

/// The hosts' clocks, told by a program there.
struct HostClocks<'a> {
    lab: &'a Lab,
    _servers: Vec<Remote>,
}

impl<'a> HostClocks<'a> {
    fn start(lab: &'a Lab) -> Result<Self> {
        let start = |name| lab.host(name)?.spawn("clock", "lab-guest clock-server");
        let servers = ["kvm1", "kvm2"].into_iter().map(start).collect::<Result<_>>()?;
        Ok(Self { lab, _servers: servers })
    }

    fn measure(&self, leg: &Leg, guest: &mut GuestClient) -> Result<Offsets> {
        let host = |name| Offset::measure(&mut self.connect(name)?).with_context(|| format!("the clock of {name}"));
        Ok(Offsets { guest: Offset::measure(guest)?, source: host(leg.from)?, destination: host(leg.to)? })
    }

    fn connect(&self, name: &str) -> Result<GuestClient> {
        let address = self.lab.host(name)?.address(Network::Management).parse()?;
        GuestClient::connect(self.lab.switch(), SocketAddr::new(address, guest::PORT))
    }
}

/// Has `host` read the blocks in which the guest keeps its file, and gives how many those are: they are in its page cache
/// from then on.
fn read_on(lab: &Lab, host: &Host) -> Result<u64> {
    let list = format!("debugfs -R 'blocks /var/lib/lab/contents' {DISK}");
    let blocks = lab.host("storage")?.check(&list).context("the guest's file on its disk")?;
    let blocks: Vec<u64> = blocks.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let (Some(first), Some(last)) = (blocks.iter().min(), blocks.iter().max()) else { bail!("the file has no blocks") };
    let count = last - first + 1;
    host.check(&format!("dd if={DISK} of=/dev/null bs=4096 skip={first} count={count} status=none"))?;
    Ok(count)
}

fn run_on(host: &Host, words: &[&str]) -> Result<Output> {
    let line: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    let output = host.run_within(&line.join(" "), IMAGE_LIMIT)?;
    Ok(Output { code: output.code, stdout: output.stdout.into_bytes(), stderr: output.stderr })
}

fn mac(text: &str) -> Result<Mac> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).with_context(|| format!("not a link-layer address: {text}"))
}
