//! The frames that tell a network where a machine is now, as if the machine itself had sent them.
//!
//! RARP teaches switches the hardware address; gratuitous ARP, in both of its forms, and unsolicited neighbour advertisements
//! make neighbours look again at the addresses that the guest is known to have. Each goes into the VLAN that it is about.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{ArpEthIpv4Packet, ArpOperation, EtherType, Ethernet2Header, Icmpv6Type, PacketBuilder};

use super::learn::Presence;
use super::mac::MacAddress;

/// The shortest frame on an Ethernet, without its checksum.
const MIN_FRAME_BYTES: usize = 60;

/// Reverse ARP (RFC 903).
const RARP: EtherType = EtherType(0x8035);
const RARP_REQUEST: ArpOperation = ArpOperation(3);

/// All nodes on the link (ff02::1), and the group's hardware address.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: MacAddress = MacAddress([0x33, 0x33, 0, 0, 0, 1]);

/// What neighbour discovery demands.
const HOP_LIMIT: u8 = 255;

/// The option that carries the hardware address of an advertisement's target: type, length in units of 8 bytes.
const TARGET_ADDRESS_OPTION: [u8; 2] = [2, 1];

/// One round of frames for an interface with this hardware address, in one network.
pub(super) fn frames(mac: MacAddress, presence: &Presence) -> Vec<Vec<u8>> {
    let mut frames = vec![rarp(mac)];
    for address in &presence.addresses {
        match address {
            IpAddr::V4(address) => frames.extend(gratuitous_arp(mac, *address)),
            IpAddr::V6(address) => frames.extend(neighbour_advertisement(mac, *address, presence.router)),
        }
    }
    match presence.vlan {
        Some(vlan) => frames.into_iter().map(|frame| vlan.tag(frame)).collect(),
        None => frames,
    }
}

/// Asks which IP address belongs to its own hardware address.
fn rarp(mac: MacAddress) -> Vec<u8> {
    let none = Ipv4Addr::UNSPECIFIED.octets();
    arp_frame(RARP, RARP_REQUEST, (mac, none), (mac, none))
}

/// The request and the reply (RFC 5944, section 4.6): some neighbours heed only the one, some only the other.
fn gratuitous_arp(mac: MacAddress, address: Ipv4Addr) -> [Vec<u8>; 2] {
    let address = address.octets();
    let nobody = MacAddress([0; 6]);
    [
        arp_frame(EtherType::ARP, ArpOperation::REQUEST, (mac, address), (nobody, address)),
        arp_frame(EtherType::ARP, ArpOperation::REPLY, (mac, address), (mac, address)),
    ]
}

fn arp_frame(
    ether_type: EtherType,
    operation: ArpOperation,
    sender: (MacAddress, [u8; 4]),
    target: (MacAddress, [u8; 4]),
) -> Vec<u8> {
    let header = Ethernet2Header { destination: MacAddress::BROADCAST.0, source: sender.0.0, ether_type };
    let packet = ArpEthIpv4Packet {
        operation,
        sender_mac: sender.0.0,
        sender_ipv4: sender.1,
        target_mac: target.0.0,
        target_ipv4: target.1,
    };
    let mut frame = [&header.to_bytes()[..], &packet.to_bytes()[..]].concat();
    frame.resize(MIN_FRAME_BYTES, 0);
    frame
}

/// Unsolicited, and overriding what neighbours have in their caches (RFC 4861, section 7.2.6). None if it cannot be built, which
/// its fixed size rules out.
fn neighbour_advertisement(mac: MacAddress, address: Ipv6Addr, is_router: bool) -> Option<Vec<u8>> {
    let flags = NeighborAdvertisementHeader { router: is_router, solicited: false, r#override: true };
    let body = [&address.octets()[..], &TARGET_ADDRESS_OPTION, &mac.0].concat();
    let packet = PacketBuilder::ethernet2(mac.0, ALL_NODES_MAC.0)
        .ipv6(address.octets(), ALL_NODES.octets(), HOP_LIMIT)
        .icmpv6(Icmpv6Type::NeighborAdvertisement(flags));
    let mut frame = Vec::with_capacity(packet.size(body.len()));
    packet.write(&mut frame, &body).ok()?;
    Some(frame)
}

#[cfg(test)]
mod tests;
