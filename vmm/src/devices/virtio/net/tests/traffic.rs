//! Frames in both directions.

use godwit_core::GuestMemory;
use virtio_bindings::virtio_net::{VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::driver::{MAC, RECEIVE, Rig};
use super::network::{OUTSIDE_MAC, bridge, enter};
use super::*;
use crate::devices::virtio::driver_ring::WRITABLE;
use crate::devices::virtio::net::tap::{HEADER_BYTES, OFFLOAD_FEATURES};

const HEADERS: usize = 14 + 20 + 20;
const SEGMENT: usize = 1448;

/// A TCP segment that is much too long for a wire, with a header that says how to cut it up.
fn oversized_segment(to: MacAddress, from: MacAddress, payload: usize) -> Vec<u8> {
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2(from.0, to.0)
        .ipv4([192, 0, 2, 1], [192, 0, 2, 2], 64)
        .tcp(4000, 5000, 1, 8192)
        .ack(1)
        .write(&mut frame, &random(7, payload))
        .unwrap();
    // The sum of the pseudo header alone, as whoever finishes the frame expects it.
    let tcp_bytes = (frame.len() - 34) as u32;
    let sum = [0xc000u32, 0x0201, 0xc000, 0x0202, 6, tcp_bytes >> 16, tcp_bytes & 0xffff].iter().sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[50..52].copy_from_slice(&(((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    let mut header = vec![VIRTIO_NET_HDR_F_NEEDS_CSUM as u8, VIRTIO_NET_HDR_GSO_TCPV4 as u8];
    for field in [HEADERS as u16, SEGMENT as u16, 34, 16, 0] {
        header.extend(field.to_le_bytes());
    }
    [header, frame].concat()
}

/// The payload of a TCP segment whose checksums are right.
fn checked_payload(frame: &[u8]) -> Vec<u8> {
    let packet = etherparse::PacketHeaders::from_ethernet_slice(frame).unwrap();
    let Some(etherparse::NetHeaders::Ipv4(ip, _)) = packet.net else { panic!("not IPv4") };
    let tcp = packet.transport.unwrap().tcp().unwrap();
    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
    assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, packet.payload.slice()).unwrap());
    packet.payload.slice().into()
}

fn marked_pages(memory: &GuestMemory) -> Vec<u64> {
    let mut pages = Vec::new();
    for region in memory.iter() {
        let marked = (0..region.len()).step_by(4096).filter(|at| region.bitmap().dirty_at(*at as usize));
        pages.extend(marked.map(|at| region.start_addr().raw_value() + at));
        std::ops::Deref::deref(region).bitmap().clear();
    }
    pages
}

#[test]
fn frames_arrive_as_they_were_sent() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    rig.post(200, 2048);
    for seed in 0..600 {
        let length = 60 + (seed as usize * 37) % 1455;
        let sent = frame(OUTSIDE_MAC, MAC, seed, length);
        rig.send_with_header(
            &[&[0; HEADER_BYTES][..], &sent].concat(),
            [&[][..], &[12], &[5, 100, 1]][seed as usize % 3],
        );
        assert_eq!(outside.receive(LIMIT).as_ref(), Some(&sent), "{seed}");
        let answer = frame(MAC, OUTSIDE_MAC, seed + 1000, length);
        outside.write_frame(&answer).unwrap();
        assert_eq!(rig.receive(LIMIT).as_ref(), Some(&answer), "{seed}");
        rig.post(1, 2048);
    }
    assert!(rig.interrupted(LIMIT));
    assert!(!rig.interrupt.is_broken());
}

#[test]
fn a_frame_takes_up_as_many_buffers_as_it_needs() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    for event_idx in [false, true] {
        let rig = Rig::with("tap0", |features| features, event_idx);
        rig.post(250, 100);
        for seed in 0..40 {
            let sent = frame(MAC, OUTSIDE_MAC, seed, 60 + seed as usize * 36);
            outside.write_frame(&sent).unwrap();
            let got = rig.receive_with_header(LIMIT).unwrap();
            let buffers = u16::from_le_bytes([got[10], got[11]]);
            assert_eq!(usize::from(buffers), (HEADER_BYTES + sent.len()).div_ceil(100));
            assert_eq!(got[HEADER_BYTES..], sent);
            rig.post(usize::from(buffers), 100);
        }
        assert!(rig.interrupted(LIMIT));
    }
}

#[test]
fn without_mergeable_buffers_a_frame_has_one() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::with("tap0", |features| features & !(1 << VIRTIO_NET_F_MRG_RXBUF), true);
    rig.post(10, 1526);
    for seed in 0..10 {
        let sent = frame(MAC, OUTSIDE_MAC, seed, 1514);
        outside.write_frame(&sent).unwrap();
        let got = rig.receive_with_header(LIMIT).unwrap();
        assert_eq!(got[10..12], [1, 0]);
        assert_eq!(got[HEADER_BYTES..], sent);
    }
    // What does not fit is lost, not cut off.
    rig.post(2, 200);
    outside.write_frame(&frame(MAC, OUTSIDE_MAC, 1, 1000)).unwrap();
    let fits = frame(MAC, OUTSIDE_MAC, 2, 180);
    outside.write_frame(&fits).unwrap();
    assert_eq!(rig.receive(LIMIT), Some(fits));
}

#[test]
fn what_lands_in_guest_memory_is_marked() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::with("tap0", |features| features, false);
    // The header at the end of a page, the frame in the next one: the device writes into the header by itself.
    let (index, page) = rig.next(RECEIVE);
    rig.describe(RECEIVE, index, page + 4096 - HEADER_BYTES as u64, 8192, WRITABLE, 0);
    rig.make_available(RECEIVE, index);
    rig.kick(RECEIVE);
    std::thread::sleep(A_WHILE);
    marked_pages(&rig.memory);
    outside.write_frame(&frame(MAC, OUTSIDE_MAC, 3, 1514)).unwrap();
    assert_eq!(rig.wait_used(RECEIVE, LIMIT), Some((index, HEADER_BYTES as u32 + 1514)));
    let marked = marked_pages(&rig.memory);
    assert!(marked.contains(&(page + 4096)), "{page:#x} and the next page in {marked:x?}");
    assert!(!marked.contains(&(page + 8192)), "only what was written");
    assert!(marked.contains(&rig.rings[RECEIVE].used()), "the used ring");
}

#[test]
fn a_segment_of_the_guest_leaves_the_host_cut_up_and_summed() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    let segment = oversized_segment(OUTSIDE_MAC, MAC, 30_000);
    rig.send_with_header(&segment, &[12, 54]);
    let mut payload = Vec::new();
    while payload.len() < 30_000 {
        let frame = outside.receive(LIMIT).unwrap();
        assert!(frame.len() <= HEADERS + SEGMENT);
        payload.extend(checked_payload(&frame));
    }
    assert_eq!(payload, random(7, 30_000));
    // To a neighbour that takes it, it goes as it is.
    outside.set_offloads(OFFLOAD_FEATURES).unwrap();
    rig.send_with_header(&segment, &[12, 54]);
    let whole = outside.receive_with_header(LIMIT).unwrap();
    assert_eq!((whole[1], whole.len()), (VIRTIO_NET_HDR_GSO_TCPV4 as u8, segment.len()));
    assert_eq!(whole[HEADER_BYTES + HEADERS..], segment[HEADER_BYTES + HEADERS..]);
}

#[test]
fn a_driver_gets_what_it_has_agreed_to() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let segment = oversized_segment(MAC, OUTSIDE_MAC, 30_000);
    let rig = Rig::new("tap0");
    rig.post(100, 1536);
    outside.send_with_header(&segment);
    let whole = rig.receive_with_header(LIMIT).unwrap();
    assert_eq!((whole[1], whole.len()), (VIRTIO_NET_HDR_GSO_TCPV4 as u8, segment.len()));
    assert_eq!(whole[HEADER_BYTES + HEADERS..], segment[HEADER_BYTES + HEADERS..]);
    // The driver wants no segments for now.
    assert_eq!(rig.command(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    rig.post(100, 1536);
    outside.send_with_header(&segment);
    let part = rig.receive_with_header(LIMIT).unwrap();
    assert!(part[1] == 0 && part.len() <= HEADER_BYTES + HEADERS + SEGMENT, "{} bytes", part.len());
    drop(rig);
    // One that cannot do anything.
    let rig = Rig::with("tap0", |features| features & !OFFLOAD_FEATURES, true);
    rig.post(100, 1536);
    outside.send_with_header(&segment);
    let mut payload = Vec::new();
    while payload.len() < 30_000 {
        payload.extend(checked_payload(&rig.receive(LIMIT).unwrap()));
    }
    assert_eq!(payload, random(7, 30_000));
}

#[test]
fn frames_wait_for_buffers_and_keep_their_order() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    let frames: Vec<_> = (0..30).map(|seed| frame(MAC, OUTSIDE_MAC, seed, 1000)).collect();
    // Room for less than one.
    rig.post(3, 100);
    for frame in &frames {
        outside.write_frame(frame).unwrap();
    }
    assert_eq!(rig.receive(A_WHILE), None);
    for _ in 0..200 {
        rig.post(1, 200);
    }
    for (number, frame) in frames.iter().enumerate() {
        assert_eq!(rig.receive(LIMIT).as_ref(), Some(frame), "{number}");
    }
}

#[test]
fn unknown_commands_are_rejected() {
    if !enter() {
        return;
    }
    bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    // Promiscuous mode, a MAC filter, queue pairs, offloads that nobody has offered, nothing at all.
    let commands = [&[0, 0, 1][..], &[1, 1, 2, 2, 2, 2, 2, 2], &[4, 0, 2, 0], &[5, 0, 0, 4, 0, 0, 0, 0, 0, 0], &[]];
    for command in commands {
        assert_eq!(rig.command(command), 1, "{command:?}");
    }
    assert!(!rig.interrupt.is_broken());
}
