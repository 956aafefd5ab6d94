//! VLAN tags (IEEE 802.1Q and 802.1ad), and frames with and without them.

use etherparse::{EtherType, Ethernet2HeaderSlice, SingleVlanHeaderSlice};

use super::mac::MacAddress;

/// The highest number of a VLAN; 0 means none, and 4095 is reserved.
const MAX_ID: u16 = 4094;

/// Where a tag is in a frame: after the addresses.
const TAG_OFFSET: usize = 12;

/// A VLAN, as the tag of its frames names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Vlan {
    /// 0x8100 for a customer's VLAN, 0x88a8 for a provider's.
    protocol: u16,
    id: u16,
}

impl Vlan {
    /// None if there is no such VLAN.
    pub(super) fn new(protocol: u16, id: u16) -> Option<Self> {
        let is_tag = [EtherType::VLAN_TAGGED_FRAME.0, EtherType::PROVIDER_BRIDGING.0].contains(&protocol);
        (is_tag && (1..=MAX_ID).contains(&id)).then_some(Self { protocol, id })
    }

    pub(super) fn protocol(self) -> u16 {
        self.protocol
    }

    pub(super) fn id(self) -> u16 {
        self.id
    }

    /// Puts an untagged frame into this VLAN, with no priority.
    pub(super) fn tag(self, mut frame: Vec<u8>) -> Vec<u8> {
        let [[a, b], [c, d]] = [self.protocol.to_be_bytes(), self.id.to_be_bytes()];
        frame.splice(TAG_OFFSET..TAG_OFFSET, [a, b, c, d]);
        frame
    }
}

/// A frame, or its beginning.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    pub(super) source: MacAddress,
    /// By its outermost tag: that is the one which the next switch goes by. A tag may also give a priority and no VLAN.
    pub(super) vlan: Option<Vlan>,
    /// What it carries: behind one tag there may be another one.
    pub(super) ether_type: EtherType,
    pub(super) payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// None for what is no frame, or in a VLAN that there is not.
    pub(super) fn read(bytes: &'a [u8]) -> Option<Self> {
        let ethernet = Ethernet2HeaderSlice::from_slice(bytes).ok()?;
        let (source, protocol) = (MacAddress(ethernet.source()), ethernet.ether_type());
        let payload = bytes.get(ethernet.slice().len()..)?;
        if protocol != EtherType::VLAN_TAGGED_FRAME && protocol != EtherType::PROVIDER_BRIDGING {
            return Some(Self { source, vlan: None, ether_type: protocol, payload });
        }
        let tag = SingleVlanHeaderSlice::from_slice(payload).ok()?;
        let vlan = match tag.vlan_identifier().value() {
            0 => None,
            id => Some(Vlan::new(protocol.0, id)?),
        };
        Some(Self { source, vlan, ether_type: tag.ether_type(), payload: payload.get(tag.slice().len()..)? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ADDRESSES: [u8; 12] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0, 0, 1];
    const SOURCE: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 1]);

    fn frame(rest: &[u8]) -> Vec<u8> {
        [&ADDRESSES[..], rest].concat()
    }

    #[test]
    fn a_frame_belongs_to_the_vlan_of_its_outermost_tag() {
        let cases: [(&[u8], Option<Vlan>, u16); 6] = [
            (&[8, 6, 7], None, 0x0806),
            (&[0x81, 0, 0, 5, 8, 6, 7], Vlan::new(0x8100, 5), 0x0806),
            // With a priority, and fit to be dropped.
            (&[0x81, 0, 0xff, 0xfe, 8, 6, 7], Vlan::new(0x8100, 4094), 0x0806),
            (&[0x88, 0xa8, 0, 5, 8, 6, 7], Vlan::new(0x88a8, 5), 0x0806),
            (&[0x88, 0xa8, 0, 5, 0x81, 0, 7], Vlan::new(0x88a8, 5), 0x8100),
            // A priority and no VLAN.
            (&[0x81, 0, 0xe0, 0, 8, 6, 7], None, 0x0806),
        ];
        for (rest, vlan, ether_type) in cases {
            let bytes = frame(rest);
            let expected = Frame { source: SOURCE, vlan, ether_type: EtherType(ether_type), payload: &[7] };
            assert_eq!(Frame::read(&bytes), Some(expected), "{rest:02x?}");
        }
        for rest in [&[8][..], &[0x81, 0, 0, 5, 8], &[0x81, 0, 0x0f, 0xff, 8, 6, 7]] {
            assert_eq!(Frame::read(&frame(rest)), None, "{rest:02x?}");
        }
    }

    #[test]
    fn there_are_4094_vlans_of_each_kind() {
        for protocol in [0x8100, 0x88a8] {
            assert_eq!((0..=u16::MAX).filter_map(|id| Vlan::new(protocol, id)).count(), 4094);
        }
        assert_eq!(Vlan::new(0x0800, 1), None);
    }

    proptest! {
        #[test]
        fn what_is_tagged_is_read_back(protocol in prop::sample::select(vec![0x8100, 0x88a8]), id in 1..=MAX_ID) {
            let vlan = Vlan::new(protocol, id).unwrap();
            let tagged = vlan.tag(frame(&[8, 6, 1, 2, 3]));
            let expected = Frame { source: SOURCE, vlan: Some(vlan), ether_type: EtherType::ARP, payload: &[1, 2, 3] };
            prop_assert_eq!(Frame::read(&tagged), Some(expected));
        }

        #[test]
        fn anything_can_be_read(bytes in prop::collection::vec(any::<u8>(), 0..40), tags in 0usize..10) {
            Frame::read(&bytes);
            let tagged = frame(&[[0x81, 0, 0, 9].repeat(tags), bytes].concat());
            Frame::read(&tagged);
        }
    }
}
