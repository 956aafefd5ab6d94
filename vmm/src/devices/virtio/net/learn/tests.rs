//! What is learned, and from whom.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{ArpEthIpv4Packet, ArpOperation, EtherType, Ethernet2Header, Icmpv6Type, PacketBuilder};
use proptest::prelude::*;

use super::*;

const OWN: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 1]);
const OTHER: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 2]);

fn v4(last: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, last).into()
}

fn v6(last: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last)
}

fn vlan(id: u16) -> Option<Vlan> {
    Some(Vlan::new(0x8100, id).unwrap())
}

/// The same in a VLAN.
fn tagged(id: u16, frame: Vec<u8>) -> Vec<u8> {
    vlan(id).unwrap().tag(frame)
}

/// An ARP packet that asks for another's address.
fn arp_of(sender: MacAddress, owner: MacAddress, address: IpAddr) -> Vec<u8> {
    arp(sender, owner, address, ArpOperation::REQUEST, Ipv4Addr::new(192, 0, 2, 254).into())
}

fn arp(sender: MacAddress, owner: MacAddress, address: IpAddr, operation: ArpOperation, target: IpAddr) -> Vec<u8> {
    let (IpAddr::V4(address), IpAddr::V4(target)) = (address, target) else { panic!("{address}, {target} in ARP") };
    let header = Ethernet2Header { destination: [0xff; 6], source: sender.0, ether_type: EtherType::ARP };
    let packet = ArpEthIpv4Packet {
        operation,
        sender_mac: owner.0,
        sender_ipv4: address.octets(),
        target_mac: [0; 6],
        target_ipv4: target.octets(),
    };
    [&header.to_bytes()[..], &packet.to_bytes()[..]].concat()
}

/// What the guest says when it is asked for this address.
fn arp_answer(address: IpAddr) -> Vec<u8> {
    arp(OWN, OWN, address, ArpOperation::REPLY, v4(200))
}

fn icmp(sender: MacAddress, source: Ipv6Addr, hop_limit: u8, kind: Icmpv6Type, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(sender.0, [0x33, 0x33, 0, 0, 0, 1])
        .ipv6(source.octets(), v6(0xff).octets(), hop_limit)
        .icmpv6(kind)
        .write(&mut frame, body)
        .unwrap();
    frame
}

fn option(kind: u8, mac: MacAddress) -> Vec<u8> {
    [&[kind, 1][..], &mac.0].concat()
}

fn solicitation(source: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let body = [&v6(0xfe).octets()[..], options].concat();
    icmp(OWN, source, 255, Icmpv6Type::NeighborSolicitation, &body)
}

fn advertisement(sender: MacAddress, target: Ipv6Addr, router: bool, options: &[u8]) -> Vec<u8> {
    advertisement_with(
        sender,
        target,
        NeighborAdvertisementHeader { router, solicited: true, r#override: true },
        options,
    )
}

fn advertisement_with(
    sender: MacAddress,
    target: Ipv6Addr,
    flags: NeighborAdvertisementHeader,
    options: &[u8],
) -> Vec<u8> {
    let body = [&target.octets()[..], options].concat();
    icmp(sender, target, 255, Icmpv6Type::NeighborAdvertisement(flags), &body)
}

/// What a proxy says, or one of several that have the address.
fn shy_advertisement(target: Ipv6Addr) -> Vec<u8> {
    let flags = NeighborAdvertisementHeader { router: false, solicited: true, r#override: false };
    advertisement_with(OWN, target, flags, &option(2, OWN))
}

fn heard(frames: &[Vec<u8>]) -> AddressBook {
    let mut book = AddressBook::new(OWN);
    let now = Instant::now();
    frames.iter().for_each(|frame| book.hear_guest(frame, now));
    book
}

fn learned(frames: &[Vec<u8>]) -> Vec<IpAddr> {
    heard(frames).untagged(Instant::now())
}

#[test]
fn a_guest_presents_itself_by_arp_and_neighbour_discovery() {
    let frames = [
        arp_of(OWN, OWN, v4(1)),
        solicitation(v6(2), &option(1, OWN)),
        advertisement(OWN, v6(3), false, &option(2, OWN)),
        // Without the option, the target is who sends.
        advertisement(OWN, v6(4), false, &[]),
    ];
    assert_eq!(learned(&frames), [v4(1), v6(2).into(), v6(3).into(), v6(4).into()]);
}

#[test]
fn the_headers_of_packets_teach_nothing() {
    let mut udp = Vec::new();
    PacketBuilder::ethernet2(OWN.0, OTHER.0)
        .ipv4([198, 51, 100, 1], [192, 0, 2, 9], 64)
        .udp(1, 2)
        .write(&mut udp, b"forwarded")
        .unwrap();
    let echo = icmp(OWN, v6(7), 255, Icmpv6Type::EchoRequest(etherparse::IcmpEchoHeader { id: 1, seq: 1 }), b"ping");
    assert_eq!(learned(&[udp, echo]), Vec::<IpAddr>::new());
}

#[test]
fn what_is_not_the_guests_own_is_not_learned() {
    let twice_tagged = tagged(5, tagged(6, arp_of(OWN, OWN, v4(9))));
    let mut in_no_vlan = tagged(5, arp_of(OWN, OWN, v4(9)));
    in_no_vlan[14..16].fill(0xff);
    let mut routed = solicitation(v6(5), &option(1, OWN));
    routed[14 + 7] = 64;
    let mut not_ethernet = arp_of(OWN, OWN, v4(9));
    not_ethernet[15] = 6;
    let frames = [
        arp_of(OWN, OTHER, v4(1)),
        arp_of(OTHER, OWN, v4(2)),
        // A probe (RFC 5227) has no address yet.
        arp_of(OWN, OWN, Ipv4Addr::UNSPECIFIED.into()),
        arp_of(OWN, OWN, Ipv4Addr::BROADCAST.into()),
        arp_of(OWN, OWN, Ipv4Addr::new(224, 0, 0, 1).into()),
        arp_of(OWN, OWN, Ipv4Addr::LOCALHOST.into()),
        // Duplicate address detection: neither has this.
        solicitation(Ipv6Addr::UNSPECIFIED, &[]),
        solicitation(Ipv6Addr::UNSPECIFIED, &option(1, OWN)),
        solicitation(v6(3), &[]),
        solicitation(v6(3), &option(1, OTHER)),
        advertisement(OTHER, v6(4), false, &[]),
        advertisement(OWN, v6(4), false, &option(2, OTHER)),
        // Answers that a proxy may give.
        arp_answer(v4(6)),
        shy_advertisement(v6(6)),
        twice_tagged,
        in_no_vlan,
        routed,
        not_ethernet,
    ];
    for frame in &frames {
        let book = heard(std::slice::from_ref(frame));
        assert_eq!(book.entries().count(), 0, "{frame:02x?}");
    }
}

#[test]
fn an_address_is_forgotten_when_somebody_else_claims_it() {
    let own = [arp_of(OWN, OWN, v4(1)), arp_of(OWN, OWN, v4(2)), advertisement(OWN, v6(3), false, &option(2, OWN))];
    let mut book = heard(&own);
    book.hear_others(&arp_of(OTHER, OTHER, v4(1)));
    assert_eq!(book.untagged(Instant::now()), [v4(2), v6(3).into()]);
    book.hear_others(&advertisement(OTHER, v6(3), false, &[]));
    assert_eq!(book.untagged(Instant::now()), [v4(2)]);
    // A guest that answers for another machine.
    book.hear_guest(&arp_of(OWN, OTHER, v4(2)), Instant::now());
    assert_eq!(book.untagged(Instant::now()), Vec::<IpAddr>::new());
    // A proxy that answers for it, and a guest that says that it is not alone.
    let mut book = heard(&own);
    book.hear_others(&arp(OTHER, OTHER, v4(2), ArpOperation::REPLY, v4(1)));
    assert_eq!(book.untagged(Instant::now()), [v4(1), v6(3).into()]);
    // What others ask for, and the guest's own frames that come back, change nothing.
    let mut book = heard(&own);
    book.hear_others(&arp_of(OTHER, OTHER, v4(77)));
    book.hear_others(&arp_of(OWN, OWN, v4(1)));
    assert_eq!(book, heard(&own).with_times_of(&book));
}

#[test]
fn a_router_is_who_last_said_so() {
    let says = |router| advertisement(OWN, v6(3), router, &[]);
    let advertises = icmp(
        OWN,
        v6(3),
        255,
        Icmpv6Type::RouterAdvertisement(etherparse::icmpv6::RouterAdvertisementHeader::from_bytes([64, 0, 7, 8])),
        &[0; 8],
    );
    let is_router = |frames: &[Vec<u8>]| heard(frames).presences(Instant::now())[0].router;
    assert!(!is_router(&[]));
    assert!(is_router(&[says(true)]));
    assert!(!is_router(&[says(true), says(false)]));
    assert!(is_router(&[says(false), advertises]));
    assert!(!is_router(&[advertisement(OTHER, v6(3), true, &[])]));
    // In one network and not in another.
    let presences = heard(&[says(false), tagged(5, says(true))]).presences(Instant::now());
    assert_eq!(presences.iter().map(|presence| presence.router).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn an_answer_keeps_alive_what_the_guest_has_said_by_itself() {
    let start = Instant::now();
    let later = start + MAX_AGE / 2;
    let mut book = AddressBook::new(OWN);
    for unasked in [arp_of(OWN, OWN, v4(1)), arp_of(OWN, OWN, v4(2)), solicitation(v6(3), &option(1, OWN))] {
        book.hear_guest(&unasked, start);
    }
    for answer in [arp_answer(v4(1)), arp_answer(v4(4)), shy_advertisement(v6(3)), shy_advertisement(v6(5))] {
        book.hear_guest(&answer, later);
    }
    assert_eq!(book.untagged(later + MAX_AGE), [v4(1), v6(3).into()]);
    book.hear_guest(&arp_answer(v4(2)), later + MAX_AGE);
    assert_eq!(book.untagged(later + MAX_AGE), [v4(1), v6(3).into()], "too late");
}

#[test]
fn who_announces_an_address_by_itself_has_it() {
    for operation in [ArpOperation::REQUEST, ArpOperation::REPLY] {
        assert_eq!(learned(&[arp(OWN, OWN, v4(1), operation, v4(1))]), [v4(1)]);
    }
}

#[test]
fn every_vlan_is_a_network_of_its_own() {
    let provider = Vlan::new(0x88a8, 5).unwrap();
    let link_local: Ipv6Addr = "fe80::11".parse().unwrap();
    let frames = [
        arp_of(OWN, OWN, v4(1)),
        // A priority makes no VLAN.
        [&arp_of(OWN, OWN, v4(2))[..12], &[0x81, 0, 0xe0, 0], &arp_of(OWN, OWN, v4(2))[12..]].concat(),
        tagged(5, arp_of(OWN, OWN, v4(1))),
        tagged(5, solicitation(link_local, &option(1, OWN))),
        tagged(5, advertisement(OWN, v6(3), true, &option(2, OWN))),
        provider.tag(arp_of(OWN, OWN, v4(3))),
    ];
    let mut book = heard(&frames);
    let presence = |vlan, addresses: &[IpAddr], router| Presence { vlan, addresses: addresses.into(), router };
    let untagged = presence(None, &[v4(1), v4(2)], false);
    let in_provider = presence(Some(provider), &[v4(3)], false);
    let in_vlan = presence(vlan(5), &[v4(1), link_local.into(), v6(3).into()], true);
    assert_eq!(book.presences(Instant::now()), [untagged.clone(), in_vlan, in_provider.clone()]);

    // Somebody in one VLAN says nothing about the others.
    book.hear_others(&tagged(5, arp_of(OTHER, OTHER, v4(1))));
    book.hear_others(&tagged(6, arp_of(OTHER, OTHER, v4(1))));
    book.hear_guest(&tagged(5, advertisement(OWN, link_local, true, &option(2, OTHER))), Instant::now());
    let in_vlan = presence(vlan(5), &[v6(3).into()], true);
    assert_eq!(book.presences(Instant::now()), [untagged, in_vlan.clone(), in_provider.clone()]);
    book.hear_others(&arp_of(OTHER, OTHER, v4(1)));
    assert_eq!(book.presences(Instant::now()), [presence(None, &[v4(2)], false), in_vlan, in_provider]);
}

#[test]
fn a_vlan_is_known_by_any_frame_of_the_guests_own() {
    let data = |source: MacAddress| [&OTHER.0[..], &source.0, &[0x88, 0xb5], &[7; 50]].concat();
    let frames = [tagged(7, data(OWN)), tagged(8, data(OTHER)), tagged(9, tagged(10, data(OWN)))];
    let book = heard(&frames);
    let vlans = |book: &AddressBook, now| book.presences(now).iter().map(|presence| presence.vlan).collect::<Vec<_>>();
    // The outermost tag is what the next switch goes by.
    assert_eq!(vlans(&book, Instant::now()), [None, vlan(7), vlan(9)]);
    assert_eq!(vlans(&book, Instant::now() + 2 * MAX_AGE), [None]);
    assert!(book.save(Instant::now() + 2 * MAX_AGE).networks.is_empty());
    assert_eq!(vlans(&AddressBook::new(OWN), Instant::now()), [None]);
}

#[test]
fn the_vlan_not_used_for_longest_makes_room_with_its_addresses() {
    let start = Instant::now();
    let after = |seconds: u16| start + Duration::from_secs(seconds.into());
    let mut book = AddressBook::new(OWN);
    let count = MAX_NETWORKS as u16;
    for id in 1..=count {
        book.hear_guest(&tagged(id, arp_of(OWN, OWN, v4(1 + (id % 2) as u8))), after(id));
    }
    book.hear_guest(&tagged(1, arp_of(OWN, OWN, v4(1))), after(count + 1));
    book.hear_guest(&tagged(4000, arp_of(OWN, OWN, v4(1))), after(count + 2));
    let presences = book.presences(after(count + 2));
    let has = |id| presences.iter().any(|presence| presence.vlan == vlan(id));
    assert_eq!(presences.len(), MAX_NETWORKS + 1, "and without a tag");
    assert!(has(1) && !has(2) && has(3) && has(4000));
    assert_eq!(book.entries().count(), MAX_ADDRESSES);
}

#[test]
fn the_one_not_heard_of_for_longest_makes_room() {
    let start = Instant::now();
    let mut book = AddressBook::new(OWN);
    for last in 0..MAX_ADDRESSES as u8 {
        book.hear_guest(&arp_of(OWN, OWN, v4(last)), start + Duration::from_secs(last.into()));
    }
    let later = start + Duration::from_secs(60);
    book.hear_guest(&arp_of(OWN, OWN, v4(0)), later);
    book.hear_guest(&arp_of(OWN, OWN, v4(100)), later);
    let addresses = book.untagged(later);
    assert_eq!(addresses.len(), MAX_ADDRESSES);
    assert!(addresses.contains(&v4(0)) && addresses.contains(&v4(100)) && !addresses.contains(&v4(1)));
}

#[test]
fn addresses_age_also_on_the_way() {
    let start = Instant::now();
    let mut book = AddressBook::new(OWN);
    book.hear_guest(&arp_of(OWN, OWN, v4(1)), start);
    book.hear_guest(&arp_of(OWN, OWN, v4(2)), start + MAX_AGE / 2);
    let saved = book.save(start + MAX_AGE);
    let arrival = Instant::now();
    let mut moved = AddressBook::new(OWN);
    moved.load(&saved, arrival).unwrap();
    assert_eq!(moved.untagged(arrival), [v4(1), v4(2)]);
    assert_eq!(moved.untagged(arrival + Duration::from_secs(2)), [v4(2)]);
    assert_eq!(moved.untagged(arrival + MAX_AGE), Vec::<IpAddr>::new());
    assert_eq!(book.save(start + 2 * MAX_AGE), SavedBook::default());
}

#[test]
fn saved_addresses_are_checked() {
    let load = |networks: &[SavedNetwork]| {
        let before = heard(&[arp_of(OWN, OWN, v4(1))]);
        let mut book = before.clone();
        let result = book.load(&SavedBook { networks: networks.into() }, Instant::now());
        assert!(result.is_ok() || book == before, "what is refused changes nothing");
        result
    };
    let network =
        |vlan, addresses: &[(IpAddr, u64)]| SavedNetwork { vlan, age_s: 0, router: false, addresses: addresses.into() };
    assert_eq!(load(&[network(None, &[(v4(1), u64::MAX)]), network(Some((0x8100, 5)), &[(v4(1), 0)])]), Ok(()));
    let half = [(v4(1), 0); MAX_ADDRESSES / 2 + 1];
    let too_many: Vec<_> = (1..=MAX_NETWORKS as u16 + 1).map(|id| network(Some((0x8100, id)), &[])).collect();
    let refused = [
        &[network(None, &half), network(Some((0x8100, 5)), &half)][..],
        &[network(None, &[(Ipv4Addr::new(224, 0, 0, 1).into(), 0)])],
        &[network(None, &[(Ipv6Addr::UNSPECIFIED.into(), 0)])],
        &[network(Some((0x8100, 4095)), &[])],
        &[network(Some((0x8100, 0)), &[])],
        &[network(Some((0x0800, 5)), &[])],
        &[network(None, &[]), network(None, &[])],
        &too_many,
    ];
    for networks in refused {
        assert!(load(networks).is_err(), "{networks:?}");
    }
}

impl AddressBook {
    /// The addresses in the network without a tag.
    fn untagged(&self, now: Instant) -> Vec<IpAddr> {
        self.presences(now).swap_remove(0).addresses
    }

    fn with_times_of(mut self, other: &Self) -> Self {
        for (network, other) in self.networks.values_mut().zip(other.networks.values()) {
            network.heard_at = other.heard_at;
            for (entry, other) in network.entries.iter_mut().zip(&other.entries) {
                entry.heard_at = other.heard_at;
            }
        }
        self
    }

    fn is_within_its_limits(&self) -> bool {
        let all = self.entries().all(|(_, entry)| can_be_owned(entry.address));
        all && self.entries().count() <= MAX_ADDRESSES && self.networks.len() <= MAX_NETWORKS
    }
}

/// ARP, neighbour discovery, damaged or not, with any number of tags.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let whole = prop_oneof![
        any::<u8>().prop_map(|last| arp_of(OWN, OWN, v4(last))),
        any::<u8>().prop_map(|last| arp_of(OTHER, OTHER, v4(last))),
        any::<u16>().prop_map(|last| solicitation(v6(last), &option(1, OWN))),
        any::<u16>().prop_map(|last| advertisement(OWN, v6(last), true, &option(2, OWN))),
        prop::collection::vec(any::<u8>(), 0..HEAD_BYTES),
    ];
    let tags = prop::collection::vec((prop::sample::select(vec![0x8100u16, 0x88a8, 0x9100]), any::<u16>()), 0..4);
    let damage = prop::option::of((any::<prop::sample::Index>(), any::<u8>()));
    (whole, tags, damage, any::<prop::sample::Index>(), any::<bool>()).prop_map(
        |(mut frame, tags, damage, cut, whole)| {
            for (protocol, id) in tags {
                let [[a, b], [c, d]] = [protocol.to_be_bytes(), id.to_be_bytes()];
                let at = frame.len().min(12);
                frame.splice(at..at, [a, b, c, d]);
            }
            if let Some((at, byte)) = damage.filter(|_| !frame.is_empty()) {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
            if !whole && !frame.is_empty() {
                frame.truncate(cut.index(frame.len()));
            }
            frame
        },
    )
}

proptest! {
    #[test]
    fn any_frames_can_be_heard(frames in prop::collection::vec((any_frame(), any::<bool>()), 0..200)) {
        let mut book = AddressBook::new(OWN);
        for (frame, guest) in &frames {
            if *guest { book.hear_guest(frame, Instant::now()) } else { book.hear_others(frame) }
            prop_assert!(book.is_within_its_limits());
        }
        // And travels.
        let now = Instant::now();
        let mut moved = AddressBook::new(OWN);
        prop_assert_eq!(moved.load(&book.save(now), now), Ok(()));
        prop_assert_eq!(moved.presences(now), book.presences(now));
    }

    #[test]
    fn however_many_speak_the_book_stays_small(lasts in prop::collection::vec(any::<u8>(), 0..100)) {
        let frames: Vec<_> = lasts.iter().map(|last| arp_of(OWN, OWN, v4(*last))).collect();
        let addresses = learned(&frames);
        prop_assert!(addresses.len() <= MAX_ADDRESSES);
        if let Some(last) = lasts.last() {
            prop_assert!(addresses.contains(&v4(*last)));
        }
    }
}
