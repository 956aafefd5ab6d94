//! Taps that can be opened, and those that cannot.

use super::driver::{Rig, config, every_feature};
use super::network::{add_tap, bridge, enter, ip, open_soon};
use super::*;

fn refusal(tap: &str) -> String {
    chain(&open(&config(tap), 0).err().expect("a refusal"))
}

#[test]
fn what_is_no_free_tap_is_refused_by_its_reason() {
    if !enter() {
        return;
    }
    add_tap("tap0");
    ip("tuntap add tun0 mode tun");
    ip("tuntap add many mode tap multi_queue");
    ip("link add dummy0 type veth peer name dummy1");
    let used = open(&config("tap0"), 0).unwrap();
    let expected = [
        ("nothing", "this host has no tap nothing: make it with `ip tuntap add nothing mode tap vnet_hdr`"),
        ("tap0", "tap tap0 is in use by another process"),
        ("many", "tap many has several queues"),
        ("tun0", "tun0 is not a tap, it is a tun"),
        ("dummy0", "dummy0 is not a tap, it is of the kind veth"),
        ("lo", "lo is not a tap"),
        ("tap%d", "`tap%d` is not the name of an interface"),
        ("", "`` is not the name of an interface"),
        ("a-name-of-16-byt", "is not the name of an interface"),
    ];
    for (tap, reason) in expected {
        let text = refusal(tap);
        assert!(text.starts_with("network interface net0: ") && text.contains(reason), "{tap}: {text}");
    }
    assert!(!ip("link show").contains("nothing"), "no tap has been made");
    drop(used);
    open_soon("tap0", 0);
    let wrong_mac = NetConfig { mac: "01:00:00:00:00:00".into(), ..config("tap0") };
    assert!(chain(&open(&wrong_mac, 0).err().unwrap()).contains("hardware address"));
}

#[test]
fn what_the_tap_can_do_is_offered() {
    if !enter() {
        return;
    }
    add_tap("tap0");
    let net = open_soon("tap0", 0);
    let names = tap::feature_names(net.features());
    assert_eq!(names, "CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, HOST_TSO4, HOST_TSO6, HOST_ECN");
    assert_eq!(net.features() & (1 << 10 | 1 << 14), 0, "no fragmentation of UDP");
    let all = every_feature(&net);
    drop(net);
    open_soon("tap0", all);
}

#[test]
fn the_configuration_space_is_zero_where_there_is_nothing() {
    if !enter() {
        return;
    }
    add_tap("tap0");
    let rig = Rig::new("tap0");
    let mut space = [0xff; 12];
    rig.net.read_config(0, &mut space);
    assert_eq!(space, [0x52, 0x54, 0, 0, 0, 0x11, 1, 0, 0, 0, 0, 0]);
    let mut far = [0xff; 4];
    rig.net.read_config(u64::MAX, &mut far);
    assert_eq!(far, [0; 4]);
}

#[test]
fn what_a_tap_is_connected_to_is_found_out_in_the_threads_own_network() {
    if !enter() {
        return;
    }
    let outside = bridge(&["tap0"]);
    add_tap("tap1");
    ip("link set tap1 mtu 1400 down");
    let port = Port::find("tap0").unwrap().unwrap();
    assert_eq!((port.link.up, port.link.carrier, port.link.mtu, port.link.is_tap), (true, false, 1500, true));
    assert_eq!(port.bridge.as_ref().map(|bridge| (bridge.name.as_str(), bridge.up)), Some(("br0", true)));
    let net = open_soon("tap0", 0);
    assert!(Port::find("tap0").unwrap().unwrap().link.carrier, "it is in use now");
    assert_eq!(net.port(), TapPort { mtu: 1500, bridge: Some("br0".into()) });
    let alone = Port::find("tap1").unwrap().unwrap();
    assert_eq!((alone.link.up, alone.link.mtu, alone.bridge), (false, 1400, None));
    assert_eq!(Port::find("tap2").unwrap(), None);
    tap::check_host().unwrap();
    drop(outside);
}
