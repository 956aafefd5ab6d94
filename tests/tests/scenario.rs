//! The lab's clients against a firewall that is only a network namespace: they measure outages right, and notice what
//! they are there to notice.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::clock::{monotonic_ns, ms};
use godwit_tests::harness::{self, Need, Scene, binary};
use godwit_tests::netns::Hosts;
use godwit_tests::process::Process;
use godwit_tests::scenario::announce::{AnnounceCounter, Kind, Mac};
use godwit_tests::scenario::counting::CountingConnection;
use godwit_tests::scenario::gap::Window;
use godwit_tests::scenario::guest::{GuestClient, PORT};
use godwit_tests::scenario::image::{self, Fsck};
use godwit_tests::scenario::offset::Offset;
use godwit_tests::scenario::ping::Pinger;
use godwit_tests::scenario::place;
use godwit_tests::scenario::record::{self, RECORD_BYTES, RECORDS_FILE};
use godwit_tests::scenario::records::RecordsClient;
use godwit_tests::wait;

const LIMIT: Duration = Duration::from_secs(10);

fn main() {
    harness::main(vec![
        harness::test("an_outage_is_measured_right", &[Need::Root], |_| an_outage_is_measured_right()),
        harness::test("a_forwarded_connection_outlives_an_outage", &[Need::Root], |_| connection_outlives_an_outage()),
        harness::test("a_broken_connection_is_noticed", &[Need::Root], |_| a_broken_connection_is_noticed()),
        harness::test("records_are_confirmed_and_on_the_disk", &[Need::Root], records_are_confirmed),
        harness::test("the_guest_answers", &[Need::Root], the_guest_answers),
        harness::test("announcements_are_counted", &[Need::Root], |_| announcements_are_counted()),
        harness::test("a_damaged_image_is_noticed", &[], a_damaged_image_is_noticed),
    ])
}

const PUBLIC: usize = 0;
const FIREWALL: usize = 1;
const PRIVATE: usize = 2;

/// A public and a private client that reach each other only through a firewall.
struct Network {
    hosts: Hosts,
}

impl Network {
    fn new() -> Result<Self> {
        let hosts = Hosts::new(3)?;
        hosts.take_down(PUBLIC, PRIVATE)?;
        place::inside(hosts.host(FIREWALL), || Ok(fs::write("/proc/sys/net/ipv4/ip_forward", "1")?))?;
        for (from, to) in [(PUBLIC, PRIVATE), (PRIVATE, PUBLIC)] {
            let behind = format!("{}/32", hosts.address(to, FIREWALL));
            hosts.host(from).ip(&["route", "add", &behind, "via", &hosts.address(FIREWALL, from)])?;
        }
        Ok(Self { hosts })
    }

    /// The firewall as the public client sees it.
    fn firewall(&self) -> Result<Ipv4Addr> {
        Ok(self.hosts.address(FIREWALL, PUBLIC).parse()?)
    }

    fn count(&self) -> Result<CountingConnection> {
        let address = self.hosts.address(PRIVATE, FIREWALL).parse()?;
        CountingConnection::start(self.hosts.host(PUBLIC), self.hosts.host(PRIVATE), address)
    }

    /// Cuts the public client off for a while and gives when that was.
    fn outage(&self, length: Duration) -> Result<Window> {
        let from_ns = monotonic_ns();
        self.hosts.cut(PUBLIC, FIREWALL)?;
        thread::sleep(length);
        self.hosts.mend(PUBLIC, FIREWALL)?;
        Ok(Window { from_ns, to_ns: monotonic_ns() })
    }

    fn guest(&self, scene: &Scene) -> Result<(Process, GuestClient)> {
        let mut command = Command::new(binary("lab-guest")?);
        command.arg(disk(scene));
        let firewall = self.hosts.host(FIREWALL);
        let mut process = Process::start("guest", scene.path(), command, Some(firewall))?;
        let connect = |_: &Process| Ok(self.connect().ok());
        let client = process.wait_while_running("the guest answers", LIMIT, connect)?;
        Ok((process, client))
    }

    fn connect(&self) -> Result<GuestClient> {
        GuestClient::connect(self.hosts.host(PUBLIC), (self.firewall()?, PORT).into())
    }
}

fn disk(scene: &Scene) -> std::path::PathBuf {
    scene.path().join("disk")
}

fn an_outage_is_measured_right() -> Result<()> {
    /// Between two pings, and what it takes to switch the link over by `ip`.
    const TOLERANCE_MS: f64 = 20.0;
    let network = Network::new()?;
    let pinger = Pinger::start(network.hosts.host(PUBLIC), network.firewall()?)?;
    let quiet_from_ns = monotonic_ns();
    thread::sleep(Duration::from_millis(1500));
    let quiet = Window { from_ns: quiet_from_ns, to_ns: monotonic_ns() };
    // A silence counts in every window that it touches.
    thread::sleep(Duration::from_millis(100));
    let outage = network.outage(Duration::from_millis(300))?;
    thread::sleep(Duration::from_millis(500));
    let exchange = pinger.exchange();
    let gap = |window| exchange.longest_gap_ns(window).map(ms).context("nothing was sent");
    let (without, with, length) = (gap(quiet)?, gap(outage)?, ms(outage.length_ns()));
    eprintln!("outage of {length:.1} ms: gap {with:.1} ms, without {without:.1} ms, {} lost", exchange.lost(outage));
    // A busy host adds silences of its own: as long as those without an outage.
    ensure!(without < 300.0 / 2.0, "the gap is {without} ms without an outage");
    // What lies before the first command and after the last takes effect is not part of the outage.
    ensure!(
        with > 300.0 - TOLERANCE_MS && with < length + without + TOLERANCE_MS,
        "a gap of {with} ms, an outage of {length} ms"
    );
    ensure!(exchange.lost(quiet) == 0, "{} lost without an outage", exchange.lost(quiet));
    let lost = exchange.lost(outage);
    ensure!((27..=(length / 10.0) as usize + 2).contains(&lost), "{lost} lost in {length} ms");
    Ok(())
}

fn connection_outlives_an_outage() -> Result<()> {
    let network = Network::new()?;
    let connection = network.count()?;
    connection.wait_for_progress(LIMIT)?;
    network.outage(Duration::from_millis(700))?;
    connection.wait_for_progress(LIMIT)?;
    let finished = connection.finish()?;
    ensure!(finished.client_received > 14 && finished.server_received > 14, "{finished:?}");
    // And it goes nowhere but through the firewall.
    network.hosts.take_down(FIREWALL, PRIVATE)?;
    ensure!(network.count().is_err(), "there is another way to the private client");
    Ok(())
}

fn a_broken_connection_is_noticed() -> Result<()> {
    let network = Network::new()?;
    let connection = network.count()?;
    connection.wait_for_progress(LIMIT)?;
    connection.reset();
    wait::until_true("the break is noticed", LIMIT, || Ok(connection.standing().broken.is_some()))?;
    ensure!(connection.wait_for_progress(LIMIT).is_err() && connection.finish().is_err());
    Ok(())
}

fn records_are_confirmed(scene: &Scene) -> Result<()> {
    let network = Network::new()?;
    let (process, _) = network.guest(scene)?;
    let (firewall, client) = ((network.firewall()?, PORT).into(), network.hosts.host(PUBLIC));
    let records = RecordsClient::start(client, firewall)?;
    records.wait_for_progress(LIMIT)?;
    let from_ns = monotonic_ns();
    thread::sleep(Duration::from_secs(1));
    let confirmed = records.confirmed();
    let rate = confirmed.within(Window { from_ns, to_ns: monotonic_ns() });
    ensure!((10..=51).contains(&rate), "{rate} records in a second");
    ensure!(confirmed.broken().is_none() && confirmed.last_at(from_ns) < confirmed.last(), "{confirmed:?}");

    // A second client is turned away, and told why.
    let second = RecordsClient::start(client, firewall)?;
    wait::until_true("the second client is turned away", LIMIT, || {
        Ok(second.confirmed().broken().is_some_and(|why| why.contains("already")))
    })?;
    records.wait_for_progress(LIMIT)?;
    drop(process);
    wait::until_true("the end is noticed", LIMIT, || Ok(records.confirmed().broken().is_some()))?;
    let (confirmed, file) = (records.confirmed().last(), fs::read(disk(scene).join("records"))?);
    record::check(&file, confirmed)?;
    ensure!(record::check(&file[..(confirmed as usize - 1) * RECORD_BYTES], confirmed).is_err());

    // After a start anew the numbers go on.
    let (_process, _) = network.guest(scene)?;
    let records = RecordsClient::start(client, firewall)?;
    records.wait_for_progress(LIMIT)?;
    let confirmed = records.confirmed().last().max(confirmed + 2);
    record::check(&fs::read(disk(scene).join("records"))?, confirmed)?;
    Ok(())
}

fn the_guest_answers(scene: &Scene) -> Result<()> {
    let network = Network::new()?;
    let (_process, mut guest) = network.guest(scene)?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!(guest.boot_id()? == boot_id.trim());
    guest.klog()?;
    let before = guest.steps()?;
    thread::sleep(Duration::from_millis(300));
    let after = guest.steps()?;
    ensure!(after.samples > before.samples + 200, "{before:?} {after:?}");
    ensure!(after.backward == 0, "this machine's clock goes back: {after:?}");

    // The same clock, so the offset is what real time and monotonic time differ by.
    let measured = Offset::measure(&mut guest)?;
    let clocks = guest.clocks()?;
    let expected_ms = (clocks.realtime_ns - clocks.monotonic_ns) as f64 / 1e6;
    ensure!((measured.offset_ms - expected_ms).abs() < measured.uncertainty_ms + 1.0, "{measured:?} {expected_ms}");

    guest.write_file(7)?;
    ensure!(guest.check_file(8).is_err_and(|error| error.to_string().contains("differ")));
    guest.check_file(7)?;
    ensure!(GuestClient::connect(network.hosts.host(PUBLIC), (network.firewall()?, PORT).into())?.steps().is_ok());
    Ok(())
}

fn announcements_are_counted() -> Result<()> {
    let network = Network::new()?;
    let (firewall, link) = (network.hosts.host(FIREWALL), format!("to-{PUBLIC}"));
    let mac: Mac = [2, 0, 0, 0, 7, 1];
    let text: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    firewall.ip(&["link", "set", &link, "address", &text.join(":")])?;
    let counter = AnnounceCounter::start(network.hosts.host(PUBLIC), mac)?;
    let from_ns = monotonic_ns();
    place::inside(firewall, || {
        fs::write(format!("/proc/sys/net/ipv4/conf/{link}/arp_notify"), "1")?;
        Ok(fs::write(format!("/proc/sys/net/ipv6/conf/{link}/ndisc_notify"), "1")?)
    })?;
    firewall.ip(&["link", "set", &link, "down"])?;
    firewall.ip(&["link", "set", &link, "up"])?;
    let seen = || counter.frames(Window { from_ns, to_ns: monotonic_ns() });
    wait::until_true("both kinds of announcement", LIMIT, || {
        let has = |kind| seen().iter().any(|frame| frame.kind == kind);
        Ok(has(Kind::ArpRequest) && has(Kind::NeighbourAdvertisement))
    })
    .with_context(|| format!("{:?}", seen()))?;
    ensure!(counter.frames(Window { from_ns: 0, to_ns: from_ns }).is_empty());
    Ok(())
}

/// Has mke2fs make an image with a file of records in it.
fn make_image(scene: &Scene, records: &[u8]) -> Result<String> {
    let (root, image) = (scene.path().join("root"), scene.path().join("image.raw"));
    let file = root.join(Path::new(RECORDS_FILE).strip_prefix("/")?);
    fs::create_dir_all(file.parent().context("no folder")?)?;
    fs::write(file, records)?;
    let (root, image) = (root.display().to_string(), image.display().to_string());
    let made = image::run_here(&["mke2fs", "-q", "-t", "ext4", "-d", &root, &image, "16M"])?;
    ensure!(made.code == 0, "{made:?}");
    Ok(image)
}

fn a_damaged_image_is_noticed(scene: &Scene) -> Result<()> {
    let records: Vec<u8> = (1..=500).flat_map(|number| record::encode(number, number)).collect();
    let image = make_image(scene, &records)?;
    ensure!(image::check_file_system(&image, image::run_here)? == Fsck::Clean);
    let found = image::read_records(&image, image::run_here)?;
    ensure!(record::check(&found, 500) == Ok(500) && record::check(&found, 501).is_err());

    // The link count of the records' inode is wrong.
    let spoil = format!("set_inode_field {RECORDS_FILE} links_count 7");
    ensure!(image::run_here(&["debugfs", "-w", "-R", &spoil, &image])?.code == 0);
    let damaged = image::check_file_system(&image, image::run_here)?;
    ensure!(matches!(&damaged, Fsck::Errors(said) if said.contains("ref count")), "{damaged:?}");

    ensure!(image::run_here(&["debugfs", "-w", "-R", &format!("rm {RECORDS_FILE}"), &image])?.code == 0);
    ensure!(image::read_records(&image, image::run_here).is_err());
    ensure!(image::check_file_system("/nonexistent/image.raw", image::run_here).is_err());
    Ok(())
}
