//! A machine on a bridge is announced when it runs on another host, and not before.
//!
//! The workload guest has no driver for its network interfaces, so a round is one RARP request; what more there is to
//! say of a guest that speaks is tested with the device itself.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_core::Phase;
use godwit_tests::clock::monotonic_ns;
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::netns::{Hosts, Namespace};
use godwit_tests::process::Process;
use godwit_tests::scenario::capture::{Capture, Seen};
use godwit_tests::scenario::place;
use godwit_tests::wait;
use godwit_tests::workload::Workload;

fn main() {
    let test = |name, run: fn(&Scene) -> Result<()>| harness::test(name, &[Need::Kvm, Need::Root], run);
    harness::main(vec![
        test("the_verb_announces_every_interface_on_its_own_network", the_verb_announces_every_interface),
        test("a_machine_is_announced_when_it_runs_and_not_before", a_machine_is_announced_when_it_runs),
        test("a_machine_that_is_held_is_announced_when_it_is_resumed", a_held_machine_is_announced_when_it_is_resumed),
        test("a_move_that_fails_announces_nothing", a_move_that_fails_announces_nothing),
        test("no_announce_announces_nothing", no_announce_announces_nothing),
    ])
}

const LIMIT: Duration = Duration::from_secs(60);
/// Longer than all rounds take.
const A_WHILE: Duration = Duration::from_secs(2);
const WORKLOAD: Workload = Workload {
    memory: "64M",
    vcpus: 1,
    fill: "8M",
    working_set: "4M",
    rate: "1000",
    order: "seq",
    write: "word",
    contents: "random",
    seed: 1,
};

/// The machine's interfaces, one on each bridge.
const MACS: [[u8; 6]; 2] = [[0x52, 0x54, 0, 0, 0, 0x21], [0x52, 0x54, 0, 0, 0, 0x22]];
/// When rounds begin.
const ROUNDS_MS: [u64; 5] = [0, 50, 200, 450, 800];

/// Both of the machine's hosts in one namespace with two bridges; on each bridge a tap of either host and a link to the rest of the
/// network, where everything is captured.
struct Network {
    // First: what is captured ends before the namespaces do.
    captures: [Capture<Vec<u8>>; 2],
    hosts: Hosts,
}

impl Network {
    fn new() -> Result<Self> {
        let hosts = Hosts::new(3)?;
        let here = hosts.host(0);
        for bridge in [0, 1] {
            let name = format!("br{bridge}");
            here.ip(&["link", "add", &name, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0"])?;
            // Silent itself.
            place::inside(here, || Ok(fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1")?))?;
            for tap in [format!("source{bridge}"), format!("dest{bridge}")] {
                here.ip(&["tuntap", "add", &tap, "mode", "tap", "vnet_hdr"])?;
                join(here, &tap, &name)?;
            }
            join(here, &format!("to-{}", bridge + 1), &name)?;
            here.ip(&["link", "set", &name, "up"])?;
        }
        let capture = |bridge: usize| {
            let of_machine = |frame: &[u8]| {
                let source = frame.get(6..12)?;
                MACS.iter().any(|mac| mac == source).then(|| frame.to_vec())
            };
            Capture::start(hosts.host(bridge + 1), of_machine)
        };
        Ok(Self { captures: [capture(0)?, capture(1)?], hosts })
    }

    fn source(&self, scene: &Scene) -> Result<Node> {
        let [lan, wan] = [0, 1].map(|at: usize| format!("id=net{at},tap=source{at},mac={}", text(MACS[at])));
        Node::sender(scene, "source", Some(self.hosts.host(0)), &WORKLOAD, &["--net", &lan, "--net", &wan])
    }

    fn destination(&self, scene: &Scene, more: &[&str]) -> Result<Node> {
        let taps = ["--map-net", "net0=dest0", "--map-net", "net1=dest1"];
        Node::receiver(scene, "destination", Some(self.hosts.host(0)), "tcp://127.0.0.1:0", &[&taps, more].concat())
    }

    /// What was announced on one of the bridges.
    fn seen(&self, bridge: usize) -> Vec<Seen<Vec<u8>>> {
        self.captures[bridge].seen()
    }

    /// On both bridges, by and by, so many rounds of announcements are seen, each of one frame that is exactly as it should be, and
    /// no other.
    fn ensure_rounds(&self, count: usize) -> Result<()> {
        wait::until_true("the machine is announced", LIMIT, || {
            Ok([0, 1].iter().all(|at| self.seen(*at).len() >= count))
        })?;
        thread::sleep(A_WHILE);
        for (bridge, mac) in MACS.into_iter().enumerate() {
            let seen = self.seen(bridge);
            ensure!(seen.len() == count, "bridge {bridge}: {} frames, expected {count}", seen.len());
            for (number, frame) in seen.iter().enumerate() {
                ensure!(frame.what == rarp(mac), "bridge {bridge}, frame {number}: {:02x?}", frame.what);
            }
        }
        Ok(())
    }

    /// Nothing more comes than these frames on each bridge.
    fn ensure_silent_after(&self, count: usize) -> Result<()> {
        thread::sleep(A_WHILE);
        for bridge in [0, 1] {
            let seen = self.seen(bridge);
            ensure!(seen.len() == count, "bridge {bridge}: {} frames, expected {count}: {seen:02x?}", seen.len());
        }
        Ok(())
    }

    /// Behind which ports the bridges take the machine to be.
    fn ensure_behind(&self, ports: Option<&str>) -> Result<()> {
        let host = self.hosts.host(0).name();
        for (bridge, mac) in MACS.into_iter().enumerate() {
            let name = format!("br{bridge}");
            let output = Command::new("bridge").args(["-n", host, "fdb", "show", "br", &name, "dynamic"]).output()?;
            let table = String::from_utf8(output.stdout)?;
            let port = table.lines().find_map(|line| line.strip_prefix(&format!("{} dev ", text(mac))));
            let port = port.and_then(|rest| rest.split(' ').next());
            let expected = ports.map(|prefix| format!("{prefix}{bridge}"));
            ensure!(port == expected.as_deref(), "{name}: the machine is behind {port:?}, expected {expected:?}");
        }
        Ok(())
    }
}

fn join(host: &Namespace, port: &str, bridge: &str) -> Result<()> {
    host.ip(&["link", "set", port, "master", bridge])?;
    host.ip(&["link", "set", port, "up"])
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A request for the protocol address of its own hardware address, to everyone.
fn rarp(mac: [u8; 6]) -> Vec<u8> {
    let ethernet = [&[0xff; 6][..], &mac, &[0x80, 0x35]].concat();
    let packet = [&[0, 1, 8, 0, 6, 4, 0, 3][..], &mac, &[0; 4], &mac, &[0; 4]].concat();
    [ethernet, packet, vec![0; 18]].concat()
}

fn the_verb_announces_every_interface(scene: &Scene) -> Result<()> {
    let network = Network::new()?;
    let source = network.source(scene)?;
    network.ensure_silent_after(0).context("a machine that was booted here")?;
    network.ensure_behind(None)?;
    let asked_ns = monotonic_ns();
    let says = ["net0: announced, 1 frames a round", "net1: announced, 1 frames a round"];
    source.command(&["announce"], &[], LIMIT)?.ensure_code(0)?.ensure_says(&says)?;
    network.ensure_rounds(ROUNDS_MS.len())?;
    network.ensure_behind(Some("source"))?;
    for bridge in [0, 1] {
        for (frame, round_ms) in network.seen(bridge).iter().zip(ROUNDS_MS) {
            let after_ms = (frame.at_ns - asked_ns) as f64 / 1e6;
            ensure!(after_ms >= round_ms as f64, "the round of {round_ms} ms {after_ms:.1} ms after it was asked for");
        }
    }
    // Paused, it says nothing.
    source.command(&["pause"], &[], LIMIT)?.ensure_code(0)?;
    ensure!(source.command(&["announce"], &[], LIMIT)?.code != 0);
    network.ensure_silent_after(ROUNDS_MS.len())
}

fn a_machine_is_announced_when_it_runs(scene: &Scene) -> Result<()> {
    let network = Network::new()?;
    let source = network.source(scene)?;
    let destination = network.destination(scene, &[])?;
    source.command(&["announce"], &[], LIMIT)?.ensure_code(0)?;
    network.ensure_rounds(5)?;
    network.ensure_behind(Some("source"))?;
    let mut command = hold_at(&source, &destination, Phase::Commit)?;
    network.ensure_silent_after(5).context("everything has arrived, nothing has been handed over")?;
    network.ensure_behind(Some("source"))?;
    release(&source)?;
    let ended = Ended::wait(&mut command, LIMIT)?;
    // Before the guest is looked at: a pause ends the rounds.
    network.ensure_rounds(10)?;
    network.ensure_behind(Some("dest"))?;
    ended.ensure_moved(&destination, &WORKLOAD).map(drop)
}

fn a_held_machine_is_announced_when_it_is_resumed(scene: &Scene) -> Result<()> {
    let network = Network::new()?;
    let source = network.source(scene)?;
    let destination = network.destination(scene, &["--hold"])?;
    source.move_to(&destination.uri()?, &[], LIMIT)?.ensure_code(0)?;
    ensure!(destination.command(&["announce"], &[], LIMIT)?.code != 0, "a machine that does not run is not announced");
    network.ensure_silent_after(0)?;
    network.ensure_behind(None)?;
    destination.command(&["resume"], &[], LIMIT)?.ensure_code(0)?;
    network.ensure_rounds(5)?;
    network.ensure_behind(Some("dest"))?;
    // Once.
    destination.command(&["pause"], &[], LIMIT)?.ensure_code(0)?;
    destination.command(&["resume"], &[], LIMIT)?.ensure_code(0)?;
    network.ensure_silent_after(5)
}

fn a_move_that_fails_announces_nothing(scene: &Scene) -> Result<()> {
    let network = Network::new()?;
    let source = network.source(scene)?;
    let mut destination = network.destination(scene, &[])?;
    let last = Phase::all().iter().copied().filter(|phase| phase.before_commit()).max().context("no phase")?;
    let mut command = hold_at(&source, &destination, last)?;
    destination.process.kill()?;
    release(&source)?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(4)?;
    source.ensure_guest_unharmed(&WORKLOAD)?;
    network.ensure_silent_after(0)?;
    network.ensure_behind(None)
}

fn no_announce_announces_nothing(scene: &Scene) -> Result<()> {
    let network = Network::new()?;
    let source = network.source(scene)?;
    let destination = network.destination(scene, &["--no-announce"])?;
    source.move_to(&destination.uri()?, &[], LIMIT)?.ensure_moved(&destination, &WORKLOAD)?;
    network.ensure_silent_after(0)?;
    destination.command(&["announce"], &[], LIMIT)?.ensure_code(0)?;
    network.ensure_rounds(5)?;
    network.ensure_behind(Some("dest"))
}

/// Starts the move and waits until it is held in `phase`.
fn hold_at(source: &Node, destination: &Node, phase: Phase) -> Result<Process> {
    let name = phase.to_string();
    let command = source.start_move(&destination.uri()?, &["--test-hold-at", &name])?;
    source.wait_for_phase(&name, LIMIT)?;
    Ok(command)
}

fn release(source: &Node) -> Result<()> {
    source.command(&["release"], &[], LIMIT)?.ensure_code(0).map(drop)
}
