//! The frames, byte by byte: what builds them must not be what checks them.

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::net::vlan::Vlan;

const MAC: MacAddress = MacAddress([0x52, 0x54, 0x00, 0xaa, 0xbb, 0xcc]);

fn bytes(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn padded(text: &str) -> Vec<u8> {
    let mut frame = bytes(text);
    frame.resize(60, 0);
    frame
}

/// The sum that RFC 1071 wants to be all ones.
fn internet_sum(parts: &[&[u8]]) -> u16 {
    let sum: u32 = parts
        .iter()
        .flat_map(|part| part.chunks(2))
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    (sum % 0xffff) as u16
}

fn round(vlan: Option<Vlan>, addresses: &[&str], router: bool) -> Vec<Vec<u8>> {
    let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
    frames(MAC, &Presence { vlan, addresses, router })
}

#[test]
fn every_address_has_its_frames() {
    let frames = round(None, &["192.0.2.17", "2001:db8::17"], true);
    let rarp =
        padded("ffffffffffff 525400aabbcc 8035  0001 0800 06 04 0003  525400aabbcc 00000000  525400aabbcc 00000000");
    let request =
        padded("ffffffffffff 525400aabbcc 0806  0001 0800 06 04 0001  525400aabbcc c0000211  000000000000 c0000211");
    let reply =
        padded("ffffffffffff 525400aabbcc 0806  0001 0800 06 04 0002  525400aabbcc c0000211  525400aabbcc c0000211");
    assert_eq!(frames[..3], [rarp, request, reply]);
    assert_eq!(frames.len(), 4);
    let mut advertisement = frames[3].clone();
    // The checksum is judged by itself.
    advertisement[56..58].fill(0);
    let expected = bytes(
        "333300000001 525400aabbcc 86dd  60000000 0020 3a ff  20010db8000000000000000000000017
         ff020000000000000000000000000001  88 00 0000 a0000000  20010db8000000000000000000000017  02 01 525400aabbcc",
    );
    assert_eq!(advertisement, expected);
}

#[test]
fn a_vlans_frames_have_its_tag() {
    let addresses = ["192.0.2.17", "fe80::17"];
    let untagged = round(None, &addresses, false);
    for (protocol, tag) in [(0x8100, [0x81, 0, 0x0f, 0xa1]), (0x88a8, [0x88, 0xa8, 0x0f, 0xa1])] {
        let tagged = round(Vlan::new(protocol, 0xfa1), &addresses, false);
        let expected: Vec<_> = untagged.iter().map(|frame| [&frame[..12], &tag, &frame[12..]].concat()).collect();
        assert_eq!(tagged, expected);
        assert!(tagged.iter().all(|frame| frame.len() >= MIN_FRAME_BYTES + 4), "long enough without the tag, too");
    }
}

proptest! {
    #[test]
    fn advertisements_have_the_right_flags_and_checksum(address: u128, mac: [u8; 6], router: bool) {
        let presence = Presence { vlan: None, addresses: vec![Ipv6Addr::from(address).into()], router };
        let frames = frames(MacAddress(mac), &presence);
        let packet = &frames[1][14..];
        let (addresses, message) = (&packet[8..40], &packet[40..]);
        let pseudo_header = [0, 0, 0, message.len() as u8, 0, 0, 0, 58];
        prop_assert_eq!(internet_sum(&[addresses, &pseudo_header, message]), 0, "all ones count as nothing");
        prop_assert_eq!(message[4], if router { 0xa0 } else { 0x20 });
        prop_assert_eq!(packet[7], 255);
    }
}
