//! What a frame says of an interface's addresses: ARP and IPv6 neighbour discovery.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::{
    NdpOptionSlice, NdpOptionsIterator, NeighborAdvertisementPayloadSlice, NeighborSolicitationPayloadSlice,
};
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacketSlice, EtherType, Icmpv6Slice, Icmpv6Type, IpNumber, Ipv6HeaderSlice,
};

use super::mac::MacAddress;
use super::vlan::Frame;

/// What neighbour discovery demands, so that none of it comes from beyond a router.
const HOP_LIMIT: u8 = 255;

/// What a frame says of its sender.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Statement {
    /// Who has an address.
    pub(super) claim: Option<Claim>,
    /// Whether the sender is an IPv6 router.
    pub(super) router: Option<bool>,
}

/// Says that an address belongs to an interface.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) address: IpAddr,
    pub(super) owner: MacAddress,
    /// Others may have the address, too: whoever answers for it may be a proxy, or one of several (anycast). An ARP reply to a
    /// question does not tell, a neighbour advertisement does by not overriding what neighbours know.
    pub(super) shared: bool,
}

impl Statement {
    /// None if the frame says nothing.
    pub(super) fn read(frame: &Frame) -> Option<Self> {
        let statement = match frame.ether_type {
            EtherType::ARP => Self { claim: Some(arp(frame.payload)?), router: None },
            EtherType::IPV6 => neighbour_discovery(frame)?,
            _ => return None,
        };
        let claim = statement.claim.filter(|claim| can_be_owned(claim.address));
        Some(Self { claim, ..statement })
    }
}

/// The sender of an ARP packet.
fn arp(packet: &[u8]) -> Option<Claim> {
    let arp = ArpPacketSlice::from_slice(packet).ok()?;
    if arp.hw_addr_type() != ArpHardwareId::ETHERNET || arp.proto_addr_type() != EtherType::IPV4 {
        return None;
    }
    let owner = arp.sender_hw_addr().try_into().ok()?;
    let address: [u8; 4] = arp.sender_protocol_addr().try_into().ok()?;
    let gratuitous = arp.target_protocol_addr() == address;
    let shared = arp.operation() != ArpOperation::REQUEST && !gratuitous;
    Some(Claim { address: Ipv4Addr::from(address).into(), owner: MacAddress(owner), shared })
}

fn neighbour_discovery(frame: &Frame) -> Option<Statement> {
    let header = Ipv6HeaderSlice::from_slice(frame.payload).ok()?;
    if header.next_header() != IpNumber::IPV6_ICMP || header.hop_limit() != HOP_LIMIT {
        return None;
    }
    let body = frame.payload.get(header.slice().len()..)?;
    let body = body.get(..usize::from(header.payload_length())).unwrap_or(body);
    let icmp = Icmpv6Slice::from_slice(body).ok()?;
    match icmp.icmp_type() {
        // Whoever looks whether an address is free (its source is `::`) has none yet.
        Icmpv6Type::NeighborSolicitation => {
            let solicitation = NeighborSolicitationPayloadSlice::from_slice(icmp.payload()).ok()?;
            let owner = source_address(solicitation.options_iterator())?;
            let claim = Claim { address: header.source_addr().into(), owner, shared: false };
            Some(Statement { claim: Some(claim), router: None })
        }
        Icmpv6Type::NeighborAdvertisement(flags) => {
            let advertisement = NeighborAdvertisementPayloadSlice::from_slice(icmp.payload()).ok()?;
            let owner = target_address(advertisement.options_iterator()).unwrap_or(frame.source);
            let claim = Claim { address: advertisement.target_address().into(), owner, shared: !flags.r#override };
            Some(Statement { claim: Some(claim), router: Some(flags.router) })
        }
        Icmpv6Type::RouterAdvertisement(_) => Some(Statement { claim: None, router: Some(true) }),
        _ => None,
    }
}

fn source_address(options: NdpOptionsIterator) -> Option<MacAddress> {
    options.map_while(Result::ok).find_map(|option| match option {
        NdpOptionSlice::SourceLinkLayerAddress(option) => option.link_layer_address().try_into().ok().map(MacAddress),
        _ => None,
    })
}

fn target_address(options: NdpOptionsIterator) -> Option<MacAddress> {
    options.map_while(Result::ok).find_map(|option| match option {
        NdpOptionSlice::TargetLinkLayerAddress(option) => option.link_layer_address().try_into().ok().map(MacAddress),
        _ => None,
    })
}

/// Whether one interface can have this address.
pub(super) fn can_be_owned(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast() || v4.is_loopback() || v4.octets()[0] == 0)
        }
        IpAddr::V6(v6) => !(v6.is_unspecified() || v6.is_multicast() || v6.is_loopback() || is_mapped(v6)),
    }
}

fn is_mapped(address: Ipv6Addr) -> bool {
    address.to_ipv4_mapped().is_some()
}
