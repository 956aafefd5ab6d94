//! The addresses that a guest has on one interface, learned from what it says of itself: ARP and IPv6 neighbour discovery.
//!
//! Never from the headers of IP packets: a guest that forwards sends packets with other machines' addresses, which it would
//! then claim. Nor from answers that a proxy gives for others. Each VLAN is a network of its own: what is said in one changes
//! nothing in another.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::mac::MacAddress;
use super::state::{SavedBook, SavedNetwork};
use super::statement::{Claim, Statement, can_be_owned};
use super::vlan::{Frame, Vlan};

/// The most addresses that are remembered for an interface; the one heard of least recently makes room.
pub(super) const MAX_ADDRESSES: usize = 16;

/// The most networks, VLANs and the one without a tag, that are remembered for an interface; the one used least recently makes
/// room, with its addresses.
pub(super) const MAX_NETWORKS: usize = 64;

/// How long an address is remembered after the guest last spoke of it, and a VLAN after the guest last used it. Long: a server
/// that is only ever called by its router may have no reason to speak of itself for hours.
pub(super) const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// As much of a frame as [`AddressBook`] has to see.
pub(super) const HEAD_BYTES: usize = 256;

/// What is known of a guest's addresses on one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddressBook {
    mac: MacAddress,
    /// Without a tag, and by VLAN.
    networks: BTreeMap<Option<Vlan>, Network>,
}

/// A network in which the guest has been heard.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Network {
    heard_at: Instant,
    /// Whether the guest last presented itself as an IPv6 router.
    router: bool,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    address: IpAddr,
    heard_at: Instant,
}

/// Where a guest is to be announced, and with what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Presence {
    pub(super) vlan: Option<Vlan>,
    /// In the order in which they were learned.
    pub(super) addresses: Vec<IpAddr>,
    /// Whether the guest last presented itself as an IPv6 router.
    pub(super) router: bool,
}

impl AddressBook {
    /// An empty one, for the interface with this hardware address.
    pub(super) fn new(mac: MacAddress) -> Self {
        Self { mac, networks: BTreeMap::new() }
    }

    /// Takes in a frame that the guest sends, or its first [`HEAD_BYTES`].
    pub(super) fn hear_guest(&mut self, frame: &[u8], now: Instant) {
        let Some(frame) = Frame::read(frame) else { return };
        let Statement { claim, router } = Statement::read(&frame).unwrap_or_default();
        let own = frame.source == self.mac;
        if own {
            let network = self.enter(frame.vlan, now);
            network.router = router.unwrap_or(network.router);
        }
        match claim {
            Some(claim) if claim.owner != self.mac => self.forget(frame.vlan, claim.address),
            Some(claim) if own => self.learn(frame.vlan, &claim, now),
            _ => {}
        }
    }

    /// Takes in a frame that others send to the guest: whoever claims one of its addresses has it.
    pub(super) fn hear_others(&mut self, frame: &[u8]) {
        let Some(frame) = Frame::read(frame) else { return };
        let Some(network) = self.networks.get_mut(&frame.vlan).filter(|network| !network.entries.is_empty()) else {
            return;
        };
        if let Some(Statement { claim: Some(claim), .. }) = Statement::read(&frame)
            && claim.owner != self.mac
        {
            network.forget(claim.address);
        }
    }

    /// Where to announce the guest: without a tag, whether it has been heard there or not, and in each VLAN that it has used.
    /// With the addresses that are not too old.
    pub(super) fn presences(&self, now: Instant) -> Vec<Presence> {
        let presence = |(vlan, network): (Option<Vlan>, &Network)| Presence {
            vlan,
            addresses: network.fresh(now).map(|entry| entry.address).collect(),
            router: network.router,
        };
        let mut presences: Vec<_> = self.fresh(now).map(presence).collect();
        if presences.first().is_none_or(|first| first.vlan.is_some()) {
            presences.insert(0, Presence { vlan: None, addresses: Vec::new(), router: false });
        }
        presences
    }

    /// Forgets everything: another guest begins.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.mac);
    }

    pub(super) fn save(&self, now: Instant) -> SavedBook {
        let age_s = |heard_at| age(heard_at, now).as_secs();
        let save = |(vlan, network): (Option<Vlan>, &Network)| SavedNetwork {
            vlan: vlan.map(|vlan| (vlan.protocol(), vlan.id())),
            age_s: age_s(network.heard_at),
            router: network.router,
            addresses: network.fresh(now).map(|entry| (entry.address, age_s(entry.heard_at))).collect(),
        };
        SavedBook { networks: self.fresh(now).map(save).collect() }
    }

    /// Takes over what another host has learned, or says why it cannot have learned that.
    pub(super) fn load(&mut self, saved: &SavedBook, now: Instant) -> Result<(), String> {
        let (network_count, address_count) =
            (saved.networks.len(), saved.networks.iter().map(|network| network.addresses.len()).sum::<usize>());
        if network_count > MAX_NETWORKS {
            return Err(format!("{network_count} learned networks, of at most {MAX_NETWORKS}"));
        }
        if address_count > MAX_ADDRESSES {
            return Err(format!("{address_count} learned addresses, of at most {MAX_ADDRESSES}"));
        }
        let mut networks = BTreeMap::new();
        for network in &saved.networks {
            let tag = |(protocol, id)| {
                Vlan::new(protocol, id)
                    .ok_or_else(|| format!("there is no VLAN {id} with tags of type {protocol:#06x}"))
            };
            let vlan = network.vlan.map(tag).transpose()?;
            if networks.insert(vlan, Network::load(network, now)?).is_some() {
                return Err("a network is there twice".into());
            }
        }
        self.networks = networks;
        Ok(())
    }

    /// The network in which the guest has just been heard.
    fn enter(&mut self, vlan: Option<Vlan>, now: Instant) -> &mut Network {
        if !self.networks.contains_key(&vlan) && self.networks.len() >= MAX_NETWORKS {
            let oldest = self.networks.iter().min_by_key(|(_, network)| network.heard_at).map(|(vlan, _)| *vlan);
            oldest.map(|oldest| self.networks.remove(&oldest));
        }
        let network = self.networks.entry(vlan).or_insert_with(|| Network::new(now));
        network.heard_at = now;
        network
    }

    /// The guest has said that it has an address in a network in which it has been heard. For an address that others may have,
    /// too, that is only worth something if it has said so by itself before, not too long ago.
    fn learn(&mut self, vlan: Option<Vlan>, claim: &Claim, now: Instant) {
        let known = self.networks.get_mut(&vlan).and_then(|network| network.find(claim.address));
        if claim.shared && known.as_ref().is_none_or(|entry| age(entry.heard_at, now) > MAX_AGE) {
            return;
        }
        if let Some(entry) = known {
            entry.heard_at = now;
            return;
        }
        if self.entries().count() >= MAX_ADDRESSES {
            let oldest = self.entries().min_by_key(|(_, entry)| entry.heard_at);
            if let Some((vlan, Entry { address, .. })) = oldest {
                self.forget(vlan, address);
            }
        }
        if let Some(network) = self.networks.get_mut(&vlan) {
            network.entries.push(Entry { address: claim.address, heard_at: now });
        }
    }

    fn forget(&mut self, vlan: Option<Vlan>, address: IpAddr) {
        if let Some(network) = self.networks.get_mut(&vlan) {
            network.forget(address);
        }
    }

    /// The networks that are not too old.
    fn fresh(&self, now: Instant) -> impl Iterator<Item = (Option<Vlan>, &Network)> {
        let fresh = self.networks.iter().filter(move |(_, network)| age(network.heard_at, now) <= MAX_AGE);
        fresh.map(|(vlan, network)| (*vlan, network))
    }

    /// All addresses, each with its network.
    fn entries(&self) -> impl Iterator<Item = (Option<Vlan>, Entry)> {
        self.networks.iter().flat_map(|(vlan, network)| network.entries.iter().map(|entry| (*vlan, *entry)))
    }
}

impl Network {
    fn new(now: Instant) -> Self {
        Self { heard_at: now, router: false, entries: Vec::new() }
    }

    fn load(saved: &SavedNetwork, now: Instant) -> Result<Self, String> {
        // A clock that has not run that long counts what it hears of as fresh.
        let heard_at = |age_s| now.checked_sub(Duration::from_secs(age_s)).unwrap_or(now);
        let mut network = Self { heard_at: heard_at(saved.age_s), router: saved.router, entries: Vec::new() };
        for &(address, age_s) in &saved.addresses {
            if !can_be_owned(address) {
                return Err(format!("{address} is no address of an interface"));
            }
            network.entries.push(Entry { address, heard_at: heard_at(age_s) });
        }
        Ok(network)
    }

    /// The addresses that are not too old.
    fn fresh(&self, now: Instant) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| age(entry.heard_at, now) <= MAX_AGE)
    }

    fn find(&mut self, address: IpAddr) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.address == address)
    }

    fn forget(&mut self, address: IpAddr) {
        self.entries.retain(|entry| entry.address != address);
    }
}

fn age(heard_at: Instant, now: Instant) -> Duration {
    now.saturating_duration_since(heard_at)
}

#[cfg(test)]
mod tests;
