//! Pausing, resuming, and going on behind another tap.

use super::driver::{MAC, Rig};
use super::network::{OUTSIDE_MAC, bridge, enter, open_soon};
use super::*;
use crate::devices::virtio::net::tap::HEADER_BYTES;

fn arp(address: [u8; 4]) -> Vec<u8> {
    let packet = etherparse::ArpEthIpv4Packet {
        operation: etherparse::ArpOperation::REQUEST,
        sender_mac: MAC.0,
        sender_ipv4: address,
        target_mac: [0; 6],
        target_ipv4: [192, 0, 2, 254],
    };
    [&[0xff; 6][..], &MAC.0, &[8, 6], &packet.to_bytes()].concat()
}

#[test]
fn nothing_is_lost_or_moved_while_the_device_is_closed() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    rig.post(250, 2048);
    for round in 0..10 {
        rig.net.pause(soon()).unwrap();
        let arriving: Vec<_> = (0..20).map(|seed| frame(MAC, OUTSIDE_MAC, round * 100 + seed, 300)).collect();
        let leaving: Vec<_> = (0..20).map(|seed| frame(OUTSIDE_MAC, MAC, round * 100 + 50 + seed, 300)).collect();
        for (arriving, leaving) in arriving.iter().zip(&leaving) {
            outside.write_frame(arriving).unwrap();
            rig.offer(&[&[0; HEADER_BYTES][..], leaving].concat(), &[]);
        }
        assert_eq!(rig.receive(Duration::from_millis(10)), None);
        assert_eq!(outside.receive(Duration::from_millis(10)), None);
        rig.net.resume();
        for (arriving, leaving) in arriving.iter().zip(&leaving) {
            assert_eq!(rig.receive(LIMIT).as_ref(), Some(arriving));
            assert_eq!(outside.receive(LIMIT).as_ref(), Some(leaving));
            assert!(rig.wait_used(super::driver::TRANSMIT, LIMIT).is_some());
        }
        rig.post(20, 2048);
    }
}

#[test]
fn a_pause_in_the_middle_of_traffic_leaves_every_frame_on_one_side() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    rig.post(250, 512);
    let frames: Vec<_> = (0..200).map(|seed| frame(MAC, OUTSIDE_MAC, seed, 400)).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| frames.iter().for_each(|frame| outside.write_frame(frame).unwrap()));
        for _ in 0..50 {
            rig.net.pause(soon()).unwrap();
            let before = rig.net.queues();
            std::thread::sleep(Duration::from_micros(100));
            assert_eq!(rig.net.queues(), before);
            rig.net.resume();
        }
    });
    for (number, frame) in frames.iter().enumerate() {
        assert_eq!(rig.receive(LIMIT).as_ref(), Some(frame), "{number}");
    }
}

#[test]
fn the_guest_goes_on_where_it_was_behind_another_tap() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0", "tap1"]);
    let source = Rig::new("tap0");
    source.post(100, 1536);
    source.send(&arp([192, 0, 2, 7]));
    outside.receive(LIMIT).unwrap();
    outside.write_frame(&frame(MAC, OUTSIDE_MAC, 1, 200)).unwrap();
    assert!(source.receive(LIMIT).is_some());
    source.net.ask_guest_to_announce();
    source.net.pause(soon()).unwrap();
    // Available when the guest is stopped, seen by its new host.
    let last = frame(OUTSIDE_MAC, MAC, 2, 300);
    source.offer(&[&[0; HEADER_BYTES][..], &last].concat(), &[]);

    let moved = source.moved("tap1");
    assert_eq!(moved.status(), 3, "still asked to announce itself");
    assert_eq!(
        lock(&moved.net.shared.book).presences(Instant::now())[0].addresses,
        ["192.0.2.7".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(outside.receive(A_WHILE), None, "nothing before it is resumed");
    moved.net.resume();
    assert_eq!(outside.receive(LIMIT), Some(last));
    let arriving = frame(MAC, OUTSIDE_MAC, 3, 1400);
    outside.write_frame(&arriving).unwrap();
    assert_eq!(moved.receive(LIMIT), Some(arriving));
    // Back at the source nothing has changed: it could have been resumed.
    assert_eq!(source.net.queues().len(), 3);
}

#[test]
fn what_was_flooded_to_the_new_host_before_is_not_delivered() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0", "tap1"]);
    let source = Rig::new("tap0");
    source.post(100, 1536);
    // The new host has opened its tap long ago, and the bridge does not know yet where the guest is.
    let waiting = open_soon("tap1", 0);
    for seed in 0..10 {
        let flooded = frame(MAC, OUTSIDE_MAC, seed, 200);
        outside.write_frame(&flooded).unwrap();
        assert_eq!(source.receive(LIMIT), Some(flooded));
    }
    source.net.pause(soon()).unwrap();
    let moved = source.moved_to(waiting);
    let after = frame(MAC, OUTSIDE_MAC, 99, 200);
    outside.write_frame(&after).unwrap();
    moved.net.resume();
    assert_eq!(moved.receive(LIMIT), Some(after));
}

#[test]
fn a_reset_device_begins_anew() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    rig.post(10, 1536);
    rig.send(&arp([192, 0, 2, 7]));
    outside.receive(LIMIT).unwrap();
    rig.net.ask_guest_to_announce();
    rig.net.reset();
    assert_eq!(rig.status(), 1);
    assert!(rig.net.queues().is_empty());
    assert!(lock(&rig.net.shared.book).presences(Instant::now())[0].addresses.is_empty());
    outside.write_frame(&frame(MAC, OUTSIDE_MAC, 1, 200)).unwrap();
    assert_eq!(rig.receive(A_WHILE), None);
    // Neither of these does anything.
    rig.net.resume();
    rig.net.pause(soon()).unwrap();
}

#[test]
fn state_that_makes_no_sense_is_refused() {
    if !enter() {
        return;
    }
    bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    rig.net.pause(soon()).unwrap();
    let state = rig.net.save().unwrap();
    rig.net.reset();
    assert!(rig.net.load(&state[..state.len() - 1]).is_err());
    assert!(rig.net.load(&[state.clone(), vec![0]].concat()).is_err());
    assert!(rig.net.load(&vec![0xff; state.len()]).is_err());
    rig.net.load(&state).unwrap();
    // Offloads that the driver never accepted.
    assert!(rig.net.shared.use_features(0).is_err());
}
