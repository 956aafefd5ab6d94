//! A network interface's own state as it travels, in section `virtio/N`.

use std::net::IpAddr;

use godwit_core::codec;
use godwit_core::codec::CodecError;
use serde::{Deserialize, Serialize};

/// What a destination has to know of an interface: as of version 2 of the section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) book: SavedBook,
    pub(super) announce_pending: bool,
    /// None before a driver was ready.
    pub(super) offloads: Option<u64>,
}

/// What is known of a guest's addresses, by network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedBook {
    pub(super) networks: Vec<SavedNetwork>,
}

/// A network in which the guest has been heard. Ages instead of times: a destination's clock is another one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedNetwork {
    /// The type and the number of its frames' tag.
    pub(super) vlan: Option<(u16, u16)>,
    /// How long ago the guest was heard there.
    pub(super) age_s: u64,
    pub(super) router: bool,
    /// Each address, and how many seconds ago the guest spoke of it.
    pub(super) addresses: Vec<(IpAddr, u64)>,
}

/// The same as of version 1, which knew no VLANs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct StateV1 {
    book: SavedBookV1,
    announce_pending: bool,
    offloads: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct SavedBookV1 {
    router: bool,
    addresses: Vec<(IpAddr, u64)>,
}

impl From<StateV1> for State {
    fn from(StateV1 { book, announce_pending, offloads }: StateV1) -> Self {
        let age_s = book.addresses.iter().map(|(_, age_s)| *age_s).min().unwrap_or(0);
        let untagged = SavedNetwork { vlan: None, age_s, router: book.router, addresses: book.addresses };
        Self { book: SavedBook { networks: vec![untagged] }, announce_pending, offloads }
    }
}

/// Brings state of version 1 up to date.
pub(crate) fn from_version_1(state: &[u8]) -> Result<Vec<u8>, CodecError> {
    let state: StateV1 = codec::decode(state)?;
    codec::encode(&State::from(state))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A router with 192.0.2.7, heard of 5 s ago, and fe80::7, 9 s ago; asked to announce itself; offloads 0x182.
    const VERSION_1: &[&[u8]] = &[
        &[1],
        &[2, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 0, 0, 192, 0, 2, 7, 5, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 0, 0, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 9, 0, 0, 0, 0, 0, 0, 0],
        &[1],
        &[1, 0x82, 1, 0, 0, 0, 0, 0, 0],
    ];

    /// The same, and 192.0.2.7 in VLAN 5 (0x8100) too, heard of 3 s ago; the VLAN was used 2 s ago.
    const VERSION_2: &[&[u8]] = &[
        &[2, 0, 0, 0, 0, 0, 0, 0],
        &[0],
        &[5, 0, 0, 0, 0, 0, 0, 0],
        &[1],
        &[2, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 0, 0, 192, 0, 2, 7, 5, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 0, 0, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 9, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0x00, 0x81, 5, 0],
        &[2, 0, 0, 0, 0, 0, 0, 0],
        &[0],
        &[1, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 0, 0, 192, 0, 2, 7, 3, 0, 0, 0, 0, 0, 0, 0],
        &[1],
        &[1, 0x82, 1, 0, 0, 0, 0, 0, 0],
    ];

    fn untagged() -> SavedNetwork {
        let addresses = vec![("192.0.2.7".parse().unwrap(), 5), ("fe80::7".parse().unwrap(), 9)];
        SavedNetwork { vlan: None, age_s: 5, router: true, addresses }
    }

    fn state(networks: Vec<SavedNetwork>) -> State {
        State { book: SavedBook { networks }, announce_pending: true, offloads: Some(0x182) }
    }

    #[test]
    fn version_2_is_as_it_was() {
        let in_vlan = SavedNetwork {
            vlan: Some((0x8100, 5)),
            age_s: 2,
            router: false,
            addresses: vec![("192.0.2.7".parse().unwrap(), 3)],
        };
        let state = state(vec![untagged(), in_vlan]);
        assert_eq!(codec::encode(&state).unwrap(), VERSION_2.concat());
        assert_eq!(codec::decode::<State>(&VERSION_2.concat()).unwrap(), state);
    }

    #[test]
    fn version_1_is_still_read() {
        let read = from_version_1(&VERSION_1.concat()).unwrap();
        assert_eq!(codec::decode::<State>(&read).unwrap(), state(vec![untagged()]));
        assert!(from_version_1(&VERSION_1.concat()[1..]).is_err());
        // Before anything was learned.
        let nothing = from_version_1(&[0; 1 + 8 + 1 + 1]).unwrap();
        let nothing: State = codec::decode(&nothing).unwrap();
        assert_eq!((nothing.announce_pending, nothing.offloads), (false, None));
        assert_eq!(nothing.book.networks, [SavedNetwork::default()]);
    }
}
