//! What announces a machine on a network: frames that teach switches and neighbours where it is now.

use std::fmt;

use anyhow::Result;
use etherparse::{
    ArpOperation, ArpPacketSlice, EtherType, Ethernet2HeaderSlice, Icmpv6Type, NetSlice, SlicedPacket, TransportSlice,
};

use crate::netns::Namespace;
use crate::scenario::capture::{Capture, Seen};
use crate::scenario::gap::Window;

/// An Ethernet address.
pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
/// Where an advertisement for all nodes of a link goes: ff02::1.
const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
/// Who sends neighbour advertisements that are not from beyond a router.
const HOP_LIMIT: u8 = 255;

/// Reverse ARP.
const RARP: EtherType = EtherType(0x8035);
const RARP_REQUEST: ArpOperation = ArpOperation(3);
/// In the protocol type of an ARP packet.
const IPV4: EtherType = EtherType(0x0800);

/// Ways to announce a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A reverse ARP request for its own address: teaches switches.
    Rarp,
    /// Gratuitous ARP as a request.
    ArpRequest,
    /// Gratuitous ARP as a reply.
    ArpReply,
    /// An unsolicited neighbour advertisement that overrides.
    NeighbourAdvertisement,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Rarp => "RARP",
            Kind::ArpRequest => "gratuitous ARP request",
            Kind::ArpReply => "gratuitous ARP reply",
            Kind::NeighbourAdvertisement => "unsolicited neighbour advertisement",
        })
    }
}

/// One announcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// When it arrived, by the monotonic clock.
    pub at_ns: u64,
    /// Which way it announces.
    pub kind: Kind,
}

/// How a frame announces `mac`, if it does. Whatever is not exactly as it should be does not count.
pub fn kind(frame: &[u8], mac: Mac) -> Option<Kind> {
    let ethernet = Ethernet2HeaderSlice::from_slice(frame).ok()?;
    if ethernet.source() != mac {
        return None;
    }
    let payload = frame.get(ethernet.slice().len()..)?;
    match ethernet.ether_type() {
        EtherType::ARP if ethernet.destination() == BROADCAST => arp_kind(payload, mac),
        RARP if ethernet.destination() == BROADCAST => {
            let rarp = ArpPacketSlice::from_slice(payload).ok()?;
            let is_own = rarp.sender_hw_addr() == mac && rarp.target_hw_addr() == mac;
            (rarp.operation() == RARP_REQUEST && is_own).then_some(Kind::Rarp)
        }
        EtherType::IPV6 if ethernet.destination() == ALL_NODES_MAC => neighbour_kind(frame),
        _ => None,
    }
}

fn arp_kind(payload: &[u8], mac: Mac) -> Option<Kind> {
    let arp = ArpPacketSlice::from_slice(payload).ok()?;
    let is_own = arp.sender_hw_addr() == mac && arp.sender_protocol_addr() == arp.target_protocol_addr();
    let is_ipv4 = arp.proto_addr_type() == IPV4 && arp.sender_protocol_addr().len() == 4;
    if !is_own || !is_ipv4 || arp.sender_protocol_addr() == [0; 4] {
        return None;
    }
    match arp.operation() {
        ArpOperation::REQUEST => Some(Kind::ArpRequest),
        ArpOperation::REPLY => Some(Kind::ArpReply),
        _ => None,
    }
}

fn neighbour_kind(frame: &[u8]) -> Option<Kind> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Icmpv6(icmp))) = (packet.net, packet.transport) else {
        return None;
    };
    let header = ip.header();
    let is_for_all = header.destination() == ALL_NODES && header.hop_limit() == HOP_LIMIT;
    match icmp.icmp_type() {
        Icmpv6Type::NeighborAdvertisement(flags) if is_for_all && flags.r#override && !flags.solicited => {
            icmp.is_checksum_valid(header.source(), header.destination()).then_some(Kind::NeighbourAdvertisement)
        }
        _ => None,
    }
}

/// Captures what announces one address in a namespace, until it is dropped.
pub struct AnnounceCounter(Capture<Kind>);

impl AnnounceCounter {
    /// Begins to capture on every interface of `namespace`.
    pub fn start(namespace: &Namespace, mac: Mac) -> Result<Self> {
        Ok(Self(Capture::start(namespace, move |frame| kind(frame, mac))?))
    }

    /// What was captured in `window`.
    pub fn frames(&self, window: Window) -> Vec<Frame> {
        let frames = self.0.seen().into_iter().map(|Seen { at_ns, what }| Frame { at_ns, kind: what });
        frames.filter(|frame| window.holds(frame.at_ns)).collect()
    }
}

#[cfg(test)]
mod tests {
    use etherparse::icmpv6::NeighborAdvertisementHeader;
    use etherparse::{ArpHardwareId, ArpPacket, PacketBuilder};
    use proptest::prelude::*;

    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 5];
    const OTHER: Mac = [2, 0, 0, 0, 0, 6];
    const ADDRESS: [u8; 4] = [192, 0, 2, 5];

    fn arp(destination: Mac, operation: ArpOperation, sender: Mac, from: [u8; 4], target: Mac, of: [u8; 4]) -> Vec<u8> {
        let packet = ArpPacket::new(ArpHardwareId::ETHERNET, IPV4, operation, &sender, &from, &target, &of).unwrap();
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(MAC, destination).arp(packet).write(&mut frame).unwrap();
        frame
    }

    fn rarp(sender: Mac, target: Mac) -> Vec<u8> {
        let mut frame = arp(BROADCAST, RARP_REQUEST, sender, [0; 4], target, [0; 4]);
        frame[12..14].copy_from_slice(&RARP.0.to_be_bytes());
        frame
    }

    fn advertisement(hop_limit: u8, solicited: bool, r#override: bool) -> Vec<u8> {
        let source = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
        let flags = NeighborAdvertisementHeader { router: true, solicited, r#override };
        let builder = PacketBuilder::ethernet2(MAC, ALL_NODES_MAC)
            .ipv6(source, ALL_NODES, hop_limit)
            .icmpv6(Icmpv6Type::NeighborAdvertisement(flags));
        let mut frame = Vec::new();
        builder.write(&mut frame, &[&source[..], &[2, 1], &MAC].concat()).unwrap();
        frame
    }

    #[test]
    fn every_way_to_announce_is_known() {
        let request = arp(BROADCAST, ArpOperation::REQUEST, MAC, ADDRESS, [0; 6], ADDRESS);
        let reply = arp(BROADCAST, ArpOperation::REPLY, MAC, ADDRESS, MAC, ADDRESS);
        assert_eq!(kind(&request, MAC), Some(Kind::ArpRequest));
        assert_eq!(kind(&reply, MAC), Some(Kind::ArpReply));
        assert_eq!(kind(&rarp(MAC, MAC), MAC), Some(Kind::Rarp));
        assert_eq!(kind(&advertisement(255, false, true), MAC), Some(Kind::NeighbourAdvertisement));
        // Frames are padded to 60 bytes on the way.
        let padded = [&request[..], &[0; 18]].concat();
        assert_eq!(kind(&padded, MAC), Some(Kind::ArpRequest));
    }

    #[test]
    fn what_only_looks_like_it_does_not_count() {
        let question = arp(BROADCAST, ArpOperation::REQUEST, MAC, ADDRESS, [0; 6], [192, 0, 2, 9]);
        let probe = arp(BROADCAST, ArpOperation::REQUEST, MAC, [0; 4], [0; 6], [0; 4]);
        let answer = arp(OTHER, ArpOperation::REPLY, MAC, ADDRESS, OTHER, [192, 0, 2, 9]);
        let hijack = arp(BROADCAST, ArpOperation::REPLY, OTHER, ADDRESS, MAC, ADDRESS);
        let mut broken = advertisement(255, false, true);
        *broken.last_mut().unwrap() ^= 1;
        let routed = advertisement(254, false, true);
        let solicited = advertisement(255, true, true);
        let timid = advertisement(255, false, false);
        for frame in [question, probe, answer, hijack, rarp(MAC, OTHER), broken, routed, solicited, timid] {
            assert_eq!(kind(&frame, MAC), None, "{frame:02x?}");
        }
        assert_eq!(kind(&rarp(MAC, MAC), OTHER), None, "another machine's");
        let whole = rarp(MAC, MAC);
        for length in 0..whole.len() {
            assert_eq!(kind(&whole[..length], MAC), None, "cut off at {length}");
        }
    }

    proptest! {
        #[test]
        fn no_frame_is_too_strange(
            rest in prop::collection::vec(any::<u8>(), 0..200),
            ether_type in prop::sample::select(vec![0x0806u16, 0x8035, 0x86dd]),
        ) {
            for destination in [BROADCAST, ALL_NODES_MAC] {
                let frame = [&destination[..], &MAC, &ether_type.to_be_bytes(), &rest].concat();
                kind(&frame, MAC);
            }
        }
    }
}
