//! What is learned, and from whom.

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{ArpEthIpv4Packet, ArpOperation, Ethernet2Header, PacketBuilder};
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

fn arp_of(sender: MacAddress, owner: MacAddress, address: IpAddr) -> Vec<u8> {
    let IpAddr::V4(address) = address else { panic!("{address} in ARP") };
    let header = Ethernet2Header { destination: [0xff; 6], source: sender.0, ether_type: EtherType::ARP };
    let packet = ArpEthIpv4Packet {
        operation: ArpOperation::REQUEST,
        sender_mac: owner.0,
        sender_ipv4: address.octets(),
        target_mac: [0; 6],
        target_ipv4: [192, 0, 2, 254],
    };
    [&header.to_bytes()[..], &packet.to_bytes()[..]].concat()
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
    let flags = NeighborAdvertisementHeader { router, solicited: true, r#override: true };
    let body = [&target.octets()[..], options].concat();
    icmp(sender, target, 255, Icmpv6Type::NeighborAdvertisement(flags), &body)
}

fn heard(frames: &[Vec<u8>]) -> AddressBook {
    let mut book = AddressBook::new(OWN);
    let now = Instant::now();
    frames.iter().for_each(|frame| book.hear_guest(frame, now));
    book
}

fn learned(frames: &[Vec<u8>]) -> Vec<IpAddr> {
    heard(frames).addresses(Instant::now())
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
    let mut tagged = arp_of(OWN, OWN, v4(9));
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
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
        tagged,
        routed,
        not_ethernet,
    ];
    for frame in &frames {
        assert_eq!(learned(std::slice::from_ref(frame)), Vec::<IpAddr>::new(), "{frame:02x?}");
    }
}

#[test]
fn an_address_is_forgotten_when_somebody_else_claims_it() {
    let own = [arp_of(OWN, OWN, v4(1)), arp_of(OWN, OWN, v4(2)), advertisement(OWN, v6(3), false, &option(2, OWN))];
    let mut book = heard(&own);
    book.hear_others(&arp_of(OTHER, OTHER, v4(1)));
    assert_eq!(book.addresses(Instant::now()), [v4(2), v6(3).into()]);
    book.hear_others(&advertisement(OTHER, v6(3), false, &[]));
    assert_eq!(book.addresses(Instant::now()), [v4(2)]);
    // A guest that answers for another machine.
    book.hear_guest(&arp_of(OWN, OTHER, v4(2)), Instant::now());
    assert_eq!(book.addresses(Instant::now()), Vec::<IpAddr>::new());
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
    assert!(!heard(&[]).is_router());
    assert!(heard(&[says(true)]).is_router());
    assert!(!heard(&[says(true), says(false)]).is_router());
    assert!(heard(&[says(false), advertises]).is_router());
    assert!(!heard(&[advertisement(OTHER, v6(3), true, &[])]).is_router());
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
    let addresses = book.addresses(later);
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
    assert_eq!(moved.addresses(arrival), [v4(1), v4(2)]);
    assert_eq!(moved.addresses(arrival + Duration::from_secs(2)), [v4(2)]);
    assert_eq!(moved.addresses(arrival + MAX_AGE), Vec::<IpAddr>::new());
    assert_eq!(book.save(start + 2 * MAX_AGE).addresses, []);
}

#[test]
fn saved_addresses_are_checked() {
    let load = |addresses: Vec<(IpAddr, u64)>| {
        AddressBook::new(OWN).load(&SavedBook { router: false, addresses }, Instant::now())
    };
    assert_eq!(load(vec![(v4(1), u64::MAX)]), Ok(()));
    assert!(load(vec![(v4(1), 0); MAX_ADDRESSES + 1]).is_err());
    assert!(load(vec![(Ipv4Addr::new(224, 0, 0, 1).into(), 0)]).is_err());
    assert!(load(vec![(Ipv6Addr::UNSPECIFIED.into(), 0)]).is_err());
}

impl AddressBook {
    fn with_times_of(mut self, other: &Self) -> Self {
        for (entry, other) in self.entries.iter_mut().zip(&other.entries) {
            entry.heard_at = other.heard_at;
        }
        self
    }
}

proptest! {
    #[test]
    fn any_frame_can_be_heard(frame in prop::collection::vec(any::<u8>(), 0..HEAD_BYTES), ether_type in prop::sample::select(vec![0x0806u16, 0x86dd, 0x8100, 0x0800])) {
        let mut frame = frame;
        if frame.len() > 20 {
            frame[6..12].copy_from_slice(&OWN.0);
            frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
        }
        let mut book = heard(&[frame.clone()]);
        book.hear_others(&frame);
        prop_assert!(book.addresses(Instant::now()).into_iter().all(can_be_owned));
    }

    #[test]
    fn damaged_frames_can_be_heard(which in 0usize..4, at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
        let frames = [
            arp_of(OWN, OWN, v4(1)),
            solicitation(v6(2), &option(1, OWN)),
            advertisement(OWN, v6(3), true, &option(2, OWN)),
            advertisement(OTHER, v6(3), true, &option(2, OTHER)),
        ];
        let mut book = heard(&frames);
        let mut frame = frames[which].clone();
        let at = at.index(frame.len());
        frame[at] = byte;
        book.hear_guest(&frame, Instant::now());
        book.hear_others(&frame);
        frame.truncate(cut.index(frame.len()));
        book.hear_guest(&frame, Instant::now());
        book.hear_others(&frame);
        prop_assert!(book.addresses(Instant::now()).len() <= MAX_ADDRESSES);
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
