//! Announcing a machine, seen from the bridge's other port.

use super::driver::{MAC, Rig};
use super::network::{bridge, enter};
use super::*;

#[test]
fn a_round_is_seen_on_the_network_and_teaches_the_bridge() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    {
        let mut book = lock(&rig.net.shared.book);
        for address in [[192, 0, 2, 1], [192, 0, 2, 2]] {
            let packet = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &MAC.0, &address, &[0; 6], &[192, 0, 2, 9]].concat();
            book.hear_guest(&[&[0xff; 6][..], &MAC.0, &[8, 6], &packet].concat(), Instant::now());
        }
    }
    assert!(!forwarding_table().contains(&MAC.to_string()));
    assert_eq!(rig.net.announce().unwrap(), 5);
    let kinds: Vec<_> =
        std::iter::from_fn(|| outside.receive(A_WHILE)).map(|frame| (frame[12..14].to_vec(), frame[21])).collect();
    let (rarp, arp) = (vec![0x80, 0x35], vec![8, 6]);
    assert_eq!(kinds, [(rarp, 3), (arp.clone(), 1), (arp.clone(), 2), (arp.clone(), 1), (arp, 2)]);
    assert!(forwarding_table().contains(&MAC.to_string()));
}

fn forwarding_table() -> String {
    let output = std::process::Command::new("bridge").args(["fdb", "show", "dev", "tap0", "dynamic"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_closed_device_announces_nothing() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    rig.net.pause(soon()).unwrap();
    assert_eq!(rig.net.announce().unwrap(), 0);
    rig.net.ask_guest_to_announce();
    assert_eq!(rig.status(), 1);
    assert_eq!(outside.receive(A_WHILE), None);
}

#[test]
fn the_guest_is_asked_until_it_has_heard() {
    if !enter() {
        return;
    }
    bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    assert_eq!(rig.status(), 1);
    rig.net.ask_guest_to_announce();
    assert!(rig.interrupted(LIMIT));
    assert_eq!((rig.status(), rig.interrupt.status()), (3, 2));
    assert_eq!(rig.command(&[3, 0]), 0);
    assert_eq!(rig.status(), 1);
    drop(rig);
    // A driver that does not understand is not asked.
    let rig = Rig::with("tap0", |features| features & !(1 << VIRTIO_NET_F_GUEST_ANNOUNCE), true);
    rig.net.ask_guest_to_announce();
    assert_eq!(rig.status(), 1);
}
