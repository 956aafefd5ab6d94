//! Drivers that put nonsense into the queues.

use proptest::prelude::*;

use super::driver::{MAC, RECEIVE, Rig, TRANSMIT, buffer};
use super::network::{OUTSIDE_MAC, bridge, enter};
use super::*;
use crate::devices::virtio::driver_ring::{INDIRECT, NEXT, WRITABLE, descriptor};

fn broken(rig: &Rig) -> bool {
    let until = soon();
    while !rig.interrupt.is_broken() && Instant::now() < until {
        std::thread::sleep(Duration::from_micros(200));
    }
    rig.interrupt.is_broken()
}

#[test]
fn chains_that_no_driver_may_make_break_the_device() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let at = buffer(TRANSMIT, 0);
    let cases: [(&str, usize, Vec<[u8; 16]>); 8] = [
        ("writable in transmit", TRANSMIT, vec![descriptor(at, 100, WRITABLE, 0)]),
        ("readable in receive", RECEIVE, vec![descriptor(at, 2000, 0, 0)]),
        ("no room for the header", RECEIVE, vec![descriptor(at, 11, WRITABLE, 0)]),
        ("a loop", TRANSMIT, vec![descriptor(at, 100, NEXT, 0)]),
        ("leads nowhere", TRANSMIT, vec![descriptor(at, 100, NEXT, 999)]),
        ("outside memory", TRANSMIT, vec![descriptor(u64::MAX - 10, 100, 0, 0)]),
        ("an indirect table outside memory", TRANSMIT, vec![descriptor(1 << 40, 32, INDIRECT, 0)]),
        ("an indirect table of odd length", TRANSMIT, vec![descriptor(at, 17, INDIRECT, 0)]),
    ];
    for (what, queue, descriptors) in cases {
        let rig = Rig::new("tap0");
        rig.rings[queue].describe(0, &descriptors);
        rig.make_available(queue, 0);
        rig.kick(queue);
        assert!(broken(&rig), "{what}");
        // It does nothing more, and can be paused and reset all the same.
        outside.write_frame(&frame(MAC, OUTSIDE_MAC, 1, 100)).unwrap();
        rig.net.pause(soon()).unwrap();
        rig.net.resume();
        rig.net.reset();
    }
}

#[test]
fn a_ring_that_runs_ahead_breaks_the_device() {
    if !enter() {
        return;
    }
    bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    for _ in 0..300 {
        rig.make_available(TRANSMIT, 0);
    }
    rig.kick(TRANSMIT);
    assert!(broken(&rig));
}

#[test]
fn headers_that_make_no_sense_lose_the_frame_only() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let rig = Rig::new("tap0");
    let good = frame(OUTSIDE_MAC, MAC, 1, 100);
    for header in [[0xff; 12], [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
        rig.send_with_header(&[&header[..], &good].concat(), &[]);
    }
    for length in [0, 1, 11, 12, 13, 25] {
        rig.send_with_header(&vec![0; length], &[]);
    }
    rig.send(&good);
    assert_eq!(outside.receive(LIMIT), Some(good));
    assert!(!rig.interrupt.is_broken());
}

#[test]
fn any_descriptors_are_survived() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    let any_descriptor = (
        prop_oneof![0..0x10_0000u64, any::<u64>(), Just(buffer(TRANSMIT, 0))],
        prop_oneof![0..3000u32, any::<u32>()],
        0..8u16,
        0..10u16,
    );
    let chains = prop::collection::vec(any_descriptor, 1..8);
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    proptest::test_runner::TestRunner::new(config)
        .run(&(chains, 0..3usize, any::<u16>()), |(descriptors, queue, head)| {
            let rig = Rig::new("tap0");
            for (index, (at, length, flags, next)) in (0..).zip(descriptors) {
                rig.describe(queue, index, at, length, flags, next);
            }
            rig.make_available(queue, head % 8);
            rig.kick(queue);
            outside.write_frame(&frame(MAC, OUTSIDE_MAC, 1, 1000)).unwrap();
            std::thread::sleep(Duration::from_millis(1));
            rig.net.pause(soon()).unwrap();
            prop_assert_eq!(rig.net.queues().len(), 3);
            Ok(())
        })
        .unwrap();
}
