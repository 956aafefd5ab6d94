//! The addresses that a guest has on one interface, learned from what it says of itself: ARP and IPv6 neighbour discovery.
//!
//! Never from the headers of IP packets: a guest that forwards sends packets with other machines' addresses, which it would
//! then claim.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use etherparse::icmpv6::{
    NdpOptionSlice, NdpOptionsIterator, NeighborAdvertisementPayloadSlice, NeighborSolicitationPayloadSlice,
};
use etherparse::{
    ArpHardwareId, ArpPacketSlice, EtherType, Ethernet2HeaderSlice, Icmpv6Slice, Icmpv6Type, IpNumber, Ipv6HeaderSlice,
};
use serde::{Deserialize, Serialize};

use super::mac::MacAddress;

/// The most addresses that are remembered for an interface; the one heard of least recently makes room.
pub(super) const MAX_ADDRESSES: usize = 16;

/// How long an address is remembered after the guest last spoke of it. Long: a server that is only ever called by its router
/// may have no reason to speak of itself for hours.
pub(super) const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// As much of a frame as [`AddressBook`] has to see.
pub(super) const HEAD_BYTES: usize = 256;

/// What is known of a guest's addresses on one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddressBook {
    mac: MacAddress,
    /// Whether the guest last presented itself as an IPv6 router.
    router: bool,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    address: IpAddr,
    heard_at: Instant,
}

/// The same for a destination, whose clock is another one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedBook {
    router: bool,
    /// Each address, and how long ago the guest spoke of it.
    addresses: Vec<(IpAddr, u64)>,
}

impl AddressBook {
    /// An empty one, for the interface with this hardware address.
    pub(super) fn new(mac: MacAddress) -> Self {
        Self { mac, router: false, entries: Vec::new() }
    }

    /// Takes in a frame that the guest sends, or its first [`HEAD_BYTES`].
    pub(super) fn hear_guest(&mut self, frame: &[u8], now: Instant) {
        let Some(statement) = Statement::read(frame) else { return };
        let own = statement.sender == self.mac;
        if let (true, Some(router)) = (own, statement.router) {
            self.router = router;
        }
        match statement.claim {
            Some((address, owner)) if owner == self.mac && own => self.learn(address, now),
            Some((address, owner)) if owner != self.mac => self.forget(address),
            _ => {}
        }
    }

    /// Takes in a frame that others send to the guest: whoever claims one of its addresses has it.
    pub(super) fn hear_others(&mut self, frame: &[u8]) {
        if self.entries.is_empty() {
            return;
        }
        if let Some(Statement { claim: Some((address, owner)), .. }) = Statement::read(frame)
            && owner != self.mac
        {
            self.forget(address);
        }
    }

    /// The addresses that are not too old, in the order in which they were learned.
    pub(super) fn addresses(&self, now: Instant) -> Vec<IpAddr> {
        let fresh = |entry: &&Entry| now.saturating_duration_since(entry.heard_at) <= MAX_AGE;
        self.entries.iter().filter(fresh).map(|entry| entry.address).collect()
    }

    /// Whether the guest last presented itself as an IPv6 router.
    pub(super) fn is_router(&self) -> bool {
        self.router
    }

    /// Forgets everything: another guest begins.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.mac);
    }

    pub(super) fn save(&self, now: Instant) -> SavedBook {
        let age = |entry: &Entry| now.saturating_duration_since(entry.heard_at);
        let fresh = self.entries.iter().filter(|entry| age(entry) <= MAX_AGE);
        SavedBook { router: self.router, addresses: fresh.map(|entry| (entry.address, age(entry).as_secs())).collect() }
    }

    /// Takes over what another host has learned, or says why it cannot have learned that.
    pub(super) fn load(&mut self, saved: &SavedBook, now: Instant) -> Result<(), String> {
        if saved.addresses.len() > MAX_ADDRESSES {
            return Err(format!("{} learned addresses, of at most {MAX_ADDRESSES}", saved.addresses.len()));
        }
        let mut entries = Vec::with_capacity(saved.addresses.len());
        for &(address, age_s) in &saved.addresses {
            if !can_be_owned(address) {
                return Err(format!("{address} is no address of an interface"));
            }
            // A clock that has not run that long counts the address as fresh.
            let heard_at = now.checked_sub(Duration::from_secs(age_s)).unwrap_or(now);
            entries.push(Entry { address, heard_at });
        }
        *self = Self { mac: self.mac, router: saved.router, entries };
        Ok(())
    }

    fn learn(&mut self, address: IpAddr, now: Instant) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.address == address) {
            entry.heard_at = now;
            return;
        }
        if self.entries.len() >= MAX_ADDRESSES {
            let oldest = (0..).zip(&self.entries).min_by_key(|(_, entry)| entry.heard_at).map(|(at, _)| at);
            oldest.map(|at: usize| self.entries.remove(at));
        }
        self.entries.push(Entry { address, heard_at: now });
    }

    fn forget(&mut self, address: IpAddr) {
        self.entries.retain(|entry| entry.address != address);
    }
}

/// What a frame says of its sender.
#[derive(Debug, PartialEq, Eq)]
struct Statement {
    /// The frame's source.
    sender: MacAddress,
    /// An address, and the interface that has it.
    claim: Option<(IpAddr, MacAddress)>,
    /// Whether the sender is an IPv6 router.
    router: Option<bool>,
}

impl Statement {
    fn read(frame: &[u8]) -> Option<Self> {
        let ethernet = Ethernet2HeaderSlice::from_slice(frame).ok()?;
        let (sender, rest) = (MacAddress(ethernet.source()), frame.get(ethernet.slice().len()..)?);
        let statement = match ethernet.ether_type() {
            EtherType::ARP => Self { sender, claim: Some(arp(rest)?), router: None },
            EtherType::IPV6 => Self::read_ipv6(sender, rest)?,
            _ => return None,
        };
        let claim = statement.claim.filter(|(address, _)| can_be_owned(*address));
        Some(Self { claim, ..statement })
    }

    fn read_ipv6(sender: MacAddress, packet: &[u8]) -> Option<Self> {
        let header = Ipv6HeaderSlice::from_slice(packet).ok()?;
        // Neighbour discovery has this hop limit, so that none of it comes from beyond a router.
        if header.next_header() != IpNumber::IPV6_ICMP || header.hop_limit() != 255 {
            return None;
        }
        let body = packet.get(header.slice().len()..)?;
        let body = body.get(..usize::from(header.payload_length())).unwrap_or(body);
        let icmp = Icmpv6Slice::from_slice(body).ok()?;
        match icmp.icmp_type() {
            Icmpv6Type::NeighborSolicitation => {
                let solicitation = NeighborSolicitationPayloadSlice::from_slice(icmp.payload()).ok()?;
                let owner = source_address(solicitation.options_iterator())?;
                Some(Self { sender, claim: Some((header.source_addr().into(), owner)), router: None })
            }
            Icmpv6Type::NeighborAdvertisement(flags) => {
                let advertisement = NeighborAdvertisementPayloadSlice::from_slice(icmp.payload()).ok()?;
                let owner = target_address(advertisement.options_iterator()).unwrap_or(sender);
                let claim = Some((advertisement.target_address().into(), owner));
                Some(Self { sender, claim, router: Some(flags.router) })
            }
            Icmpv6Type::RouterAdvertisement(_) => Some(Self { sender, claim: None, router: Some(true) }),
            _ => None,
        }
    }
}

/// The sender's addresses in an ARP packet.
fn arp(packet: &[u8]) -> Option<(IpAddr, MacAddress)> {
    let arp = ArpPacketSlice::from_slice(packet).ok()?;
    if arp.hw_addr_type() != ArpHardwareId::ETHERNET || arp.proto_addr_type() != EtherType::IPV4 {
        return None;
    }
    let owner = arp.sender_hw_addr().try_into().ok()?;
    let address: [u8; 4] = arp.sender_protocol_addr().try_into().ok()?;
    Some((Ipv4Addr::from(address).into(), MacAddress(owner)))
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
fn can_be_owned(address: IpAddr) -> bool {
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

#[cfg(test)]
mod tests;
