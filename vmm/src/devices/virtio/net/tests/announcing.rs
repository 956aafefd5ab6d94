//! Announcing a machine, seen from a bridge's other port, from its forwarding table, and from neighbours.

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{Icmpv6Type, PacketBuilder};

use super::driver::{MAC, Rig};
use super::network::{self, bridge, bridge_called, enter, ip, open_soon, wait_until_connected};
use super::*;
use crate::devices::virtio::net::vlan::Vlan;

/// The guest's addresses.
const V4: [u8; 4] = [192, 0, 2, 17];
const V6: [u8; 16] = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x17];
const LINK_LOCAL: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x17];

/// The guest asks for its gateway's address.
fn asks(sender: [u8; 4]) -> Vec<u8> {
    let packet = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &MAC.0, &sender, &[0; 6], &[192, 0, 2, 9]].concat();
    [&[0xff; 6][..], &MAC.0, &[8, 6], &packet].concat()
}

/// The guest tells who has an address of its own.
fn advertises(address: [u8; 16], router: bool) -> Vec<u8> {
    let flags = NeighborAdvertisementHeader { router, solicited: true, r#override: true };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(MAC.0, [2, 0, 0, 0, 0, 9])
        .ipv6(address, LINK_LOCAL, 255)
        .icmpv6(Icmpv6Type::NeighborAdvertisement(flags))
        .write(&mut frame, &[&address[..], &[2, 1], &MAC.0].concat())
        .unwrap();
    frame
}

fn tagged(id: u16, frame: Vec<u8>) -> Vec<u8> {
    Vlan::new(0x8100, id).unwrap().tag(frame)
}

/// The frames of a round, from their definitions.
mod expected {
    use super::*;

    fn arp_like(ether_type: u16, operation: u8, sender: [u8; 4], target: [u8; 10]) -> Vec<u8> {
        let head = [&[0xff; 6][..], &MAC.0, &ether_type.to_be_bytes(), &[0, 1, 8, 0, 6, 4, 0, operation]].concat();
        [&head[..], &MAC.0, &sender, &target, &[0; 18]].concat()
    }

    fn beside<const N: usize>(mac: [u8; 6], address: [u8; N]) -> [u8; 10] {
        [&mac[..], &address].concat().try_into().unwrap()
    }

    pub(super) fn rarp() -> Vec<u8> {
        arp_like(0x8035, 3, [0; 4], beside(MAC.0, [0; 4]))
    }

    pub(super) fn gratuitous_arp(address: [u8; 4]) -> [Vec<u8>; 2] {
        let nobody = [0; 6];
        [arp_like(0x0806, 1, address, beside(nobody, address)), arp_like(0x0806, 2, address, beside(MAC.0, address))]
    }

    pub(super) fn advertisement(address: [u8; 16], router: bool) -> Vec<u8> {
        let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let flags = if router { 0xa0 } else { 0x20 };
        let mut message = [&[136, 0, 0, 0, flags, 0, 0, 0][..], &address, &[2, 1], &MAC.0].concat();
        let pseudo_header = [&address[..], &all_nodes, &[0, 0, 0, 32, 0, 0, 0, 58]].concat();
        let words = [&pseudo_header[..], &message].concat();
        let sum: u32 = words.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
        let checksum = !(((sum & 0xffff) + (sum >> 16)) as u16);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        let ethernet = [&[0x33, 0x33, 0, 0, 0, 1][..], &MAC.0, &[0x86, 0xdd]].concat();
        [&ethernet[..], &[0x60, 0, 0, 0, 0, 32, 58, 255], &address, &all_nodes, &message].concat()
    }

    /// All of one network.
    pub(super) fn round(v4: &[[u8; 4]], v6: &[[u8; 16]], router: bool) -> Vec<Vec<u8>> {
        let arp = v4.iter().flat_map(|address| gratuitous_arp(*address));
        let advertisements = v6.iter().map(|address| advertisement(*address, router));
        [rarp()].into_iter().chain(arp).chain(advertisements).collect()
    }

    pub(super) fn round_in(id: u16, v4: &[[u8; 4]], v6: &[[u8; 16]], router: bool) -> Vec<Vec<u8>> {
        round(v4, v6, router).into_iter().map(|frame| tagged(id, frame)).collect()
    }
}

/// All that the guest, or who announces it, has sent to this port.
fn seen(port: &Tap) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| port.receive(A_WHILE)).filter(|frame| frame[6..12] == MAC.0).collect()
}

/// By which port a bridge reaches the guest: without VLANs, or in one.
fn port_of_guest(bridge: &str, vlan: Option<u16>) -> Option<String> {
    let table = network::run("bridge", &format!("fdb show br {bridge} dynamic"));
    let of_guest = table.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|words| {
        let in_vlan = words.iter().position(|word| *word == "vlan").map(|at| words[at + 1].parse().unwrap());
        words[0] == MAC.to_string() && in_vlan == vlan
    });
    of_guest.map(|words| words[2].to_owned())
}

#[test]
fn a_guest_is_announced_in_every_network_that_it_uses() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    assert_eq!(rig.net.announce().unwrap(), 1);
    assert_eq!(seen(&outside), [expected::rarp()], "where it has not been heard yet");

    let data = frame(super::network::OUTSIDE_MAC, MAC, 1, 100);
    let said = [
        asks(V4),
        advertises(V6, false),
        tagged(5, asks(V4)),
        tagged(5, advertises(LINK_LOCAL, true)),
        tagged(5, advertises(V6, true)),
        tagged(9, data),
        // Twice tagged, and another machine's address.
        tagged(5, tagged(6, asks([192, 0, 2, 66]))),
    ];
    for frame in &said {
        rig.send(frame);
    }
    assert_eq!(seen(&outside), said, "what the guest says leaves as it is");
    let round = [
        expected::round(&[V4], &[V6], false),
        expected::round_in(5, &[V4], &[LINK_LOCAL, V6], true),
        expected::round_in(9, &[], &[], false),
    ]
    .concat();
    assert_eq!(rig.net.announce().unwrap(), round.len());
    assert_eq!(seen(&outside), round);

    // Somebody else claims an address in one VLAN.
    let mut other = tagged(5, asks(V4));
    for at in [6..12, 4 + 22..4 + 28] {
        other[at].copy_from_slice(&[2, 0, 0, 0, 0, 0x77]);
    }
    rig.post(10, 2048);
    outside.write_frame(&other).unwrap();
    assert_eq!(rig.receive(LIMIT), Some(other));
    let round = [
        expected::round(&[V4], &[V6], false),
        expected::round_in(5, &[], &[LINK_LOCAL, V6], true),
        expected::round_in(9, &[], &[], false),
    ]
    .concat();
    rig.net.announce().unwrap();
    assert_eq!(seen(&outside), round);
}

#[test]
fn a_bridge_learns_where_the_guest_is_now() {
    if !enter() {
        return;
    }
    let _outside = bridge(&["tap0", "tap1"]);
    let source = Rig::new("tap0");
    source.send(&asks(V4));
    assert_eq!(port_of_guest("br0", None).as_deref(), Some("tap0"));
    source.net.pause(soon()).unwrap();
    let moved = source.moved("tap1");
    assert_eq!(port_of_guest("br0", None).as_deref(), Some("tap0"), "until it is announced");
    moved.net.resume();
    moved.net.announce().unwrap();
    assert_eq!(port_of_guest("br0", None).as_deref(), Some("tap1"));
}

/// A neighbour on the bridge, which takes the guest to be somebody else.
struct Neighbour {
    interface: &'static str,
}

impl Neighbour {
    const WRONG: &str = "02:00:00:00:00:77";
    const ADDRESSES: [&str; 2] = ["192.0.2.17", "2001:db8::17"];

    fn new(interface: &'static str, own_address: &str) -> Self {
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "0").unwrap();
        ip(&format!("link set {interface} up"));
        ip(&format!("address add {own_address}/24 dev {interface}"));
        for address in Self::ADDRESSES {
            ip(&format!("neigh replace {address} lladdr {} nud stale dev {interface}", Self::WRONG));
        }
        Self { interface }
    }

    /// The hardware addresses of the guest's addresses.
    fn knows(&self) -> [String; 2] {
        Self::ADDRESSES.map(|address| {
            let entry = ip(&format!("neigh show {address} dev {}", self.interface));
            entry.split_whitespace().skip_while(|word| *word != "lladdr").nth(1).unwrap().to_owned()
        })
    }

    fn wait_until_it_knows(&self, mac: &str) {
        let until = soon();
        while self.knows() != [mac, mac] {
            assert!(Instant::now() < until, "{:?}", self.knows());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// An interface of this host at the bridge, which is up.
fn add_peer() {
    ip("link add peer type veth peer name port");
    ip("link set port master br0");
    ip("link set port up");
    ip("link set peer up");
    wait_until_connected("port");
}

/// A guest with both kinds of addresses in this network, which nobody but the device has heard.
fn quiet_guest(wrap: impl Fn(Vec<u8>) -> Vec<u8>) -> Rig {
    let rig = Rig::new("tap0");
    for frame in [asks(V4), advertises(V6, false)] {
        lock(&rig.net.shared.book).hear_guest(&wrap(frame), Instant::now());
    }
    rig
}

#[test]
fn neighbours_correct_what_they_know() {
    if !enter() {
        return;
    }
    let _outside = bridge(&["tap0"]);
    add_peer();
    let neighbour = Neighbour::new("peer", "192.0.2.9");
    let rig = quiet_guest(|frame| frame);
    assert_eq!(neighbour.knows(), [Neighbour::WRONG; 2]);
    rig.net.announce().unwrap();
    neighbour.wait_until_it_knows(&MAC.to_string());
}

#[test]
fn each_interface_announces_itself_on_its_own_tap() {
    if !enter() {
        return;
    }
    let outsides = [bridge_called("br0", &["tap0"], "outside0"), bridge_called("br1", &["tap1"], "outside1")];
    let nets = ["tap0", "tap1"].map(|tap| open_soon(tap, 0));
    lock(&nets[0].shared.book).hear_guest(&asks(V4), Instant::now());
    lock(&nets[1].shared.book).hear_guest(&tagged(5, advertises(V6, true)), Instant::now());
    let rounds = [
        expected::round(&[V4], &[], false),
        [expected::round(&[], &[], false), expected::round_in(5, &[], &[V6], true)].concat(),
    ];
    for (number, net) in nets.iter().enumerate() {
        net.announce().unwrap();
        for (at, outside) in outsides.iter().enumerate() {
            let expected = if at == number { rounds[at].clone() } else { Vec::new() };
            assert_eq!(seen(outside), expected);
        }
    }
}

#[test]
fn a_closed_device_announces_nothing() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    rig.net.pause(soon()).unwrap();
    assert_eq!(rig.net.announce().unwrap(), 0);
    rig.net.ask_guest_to_announce();
    assert_eq!(rig.status(), 1);
    assert_eq!(outside.receive(A_WHILE), None);
}

#[test]
fn the_guest_is_asked_until_it_has_heard() {
    if !enter() {
        return;
    }
    bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    assert_eq!(rig.status(), 1);
    rig.net.ask_guest_to_announce();
    assert!(rig.interrupted(LIMIT));
    assert_eq!((rig.status(), rig.interrupt.status()), (3, 2));
    assert_eq!(rig.command(&[3, 0]), 0);
    assert_eq!(rig.status(), 1);
    drop(rig);
    // A driver that does not understand is not asked.
    let rig = Rig::with("tap0", |features| features & !(1 << VIRTIO_NET_F_GUEST_ANNOUNCE), true);
    rig.net.ask_guest_to_announce();
    assert_eq!(rig.status(), 1);
}

/// With VLANs of the kernel's own. Not every kernel has them: these are built only with the feature `vlan-tests`, and played in the lab.
#[cfg(feature = "vlan-tests")]
mod kernel_vlans {
    use super::*;

    #[test]
    fn a_bridge_that_filters_vlans_learns_it_in_each_of_them() {
        assert!(enter());
        let outside = bridge(&["tap0", "tap1"]);
        ip("link set br0 type bridge vlan_filtering 1 vlan_default_pvid 1");
        for port in ["tap0", "tap1", network::OUTSIDE] {
            network::run("bridge", &format!("vlan add dev {port} vid 5"));
        }
        // The guest also uses a VLAN that its port is not in.
        let source = Rig::new("tap0");
        let said = [asks(V4), tagged(5, asks(V4)), tagged(5, advertises(LINK_LOCAL, false)), tagged(6, asks(V4))];
        said.iter().for_each(|frame| source.send(frame));
        assert_eq!(seen(&outside), said[..3]);
        let ports = || [Some(1), Some(5), Some(6)].map(|vlan| port_of_guest("br0", vlan));
        assert_eq!(ports(), [Some("tap0".into()), Some("tap0".into()), None]);

        source.net.pause(soon()).unwrap();
        let moved = source.moved("tap1");
        moved.net.resume();
        let round = [expected::round(&[V4], &[], false), expected::round_in(5, &[V4], &[LINK_LOCAL], false)].concat();
        let filtered = expected::round_in(6, &[V4], &[], false);
        assert_eq!(moved.net.announce().unwrap(), round.len() + filtered.len());
        assert_eq!(seen(&outside), round);
        assert_eq!(ports(), [Some("tap1".into()), Some("tap1".into()), None]);
    }

    #[test]
    fn neighbours_correct_what_they_know_in_that_vlan_only() {
        assert!(enter());
        let _outside = bridge(&["tap0"]);
        add_peer();
        ip("link add link peer name peer.5 type vlan id 5");
        ip("link add link peer name peer.6 type vlan id 6");
        let [untagged, inside, elsewhere] =
            [("peer", "192.0.2.9"), ("peer.5", "198.51.100.9"), ("peer.6", "203.0.113.9")]
                .map(|(interface, address)| Neighbour::new(interface, address));
        let rig = quiet_guest(|frame| tagged(5, frame));
        rig.net.announce().unwrap();
        inside.wait_until_it_knows(&MAC.to_string());
        for neighbour in [untagged, elsewhere] {
            assert_eq!(neighbour.knows(), [Neighbour::WRONG; 2], "{}", neighbour.interface);
        }
    }
}
