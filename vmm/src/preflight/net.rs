//! Whether the taps of a host can take the place of those that a machine has had: the same network, as far as that shows.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::net::link::Port;
use crate::devices::virtio::net::tap::{self, TapError};

/// What a tap of the source is connected to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TapPort {
    /// The longest packet; 0 if the source does not know.
    pub(crate) mtu: u32,
    /// The bridge that it is in.
    pub(crate) bridge: Option<String>,
}

impl From<&Port> for TapPort {
    fn from(port: &Port) -> Self {
        Self { mtu: port.link.mtu, bridge: port.bridge.as_ref().map(|bridge| bridge.name.clone()) }
    }
}

/// Every reason why the tap of this name cannot take the place of one that was connected like `source`, each with what to do.
pub(crate) fn objections(name: &str, source: &TapPort, here: Option<&Port>) -> Vec<String> {
    let Some(Port { link, bridge }) = here else { return vec![TapError::Missing(name.into()).to_string()] };
    if let Err(error) = tap::check_kind(link) {
        return vec![error.to_string()];
    }
    let mut objections = Vec::new();
    if !link.up {
        objections.push(format!("tap {name} is down here: `ip link set {name} up`"));
    } else if link.carrier {
        objections.push(format!("tap {name} is in use by another process here"));
    }
    if link.mtu < source.mtu {
        let (source_mtu, mtu) = (source.mtu, link.mtu);
        objections.push(format!(
            "tap {name} has an MTU of {mtu} here, the source's has {source_mtu}: `ip link set {name} mtu {source_mtu}`"
        ));
    }
    match (&source.bridge, bridge) {
        (Some(source_bridge), None) => objections.push(format!(
            "tap {name} is in no bridge here, the source's is in {source_bridge}: the guest would be cut off; \
             `ip link set {name} master BRIDGE`"
        )),
        (_, Some(bridge)) if !bridge.up => objections.push(format!(
            "the bridge {bridge} that tap {name} is in is down here: `ip link set {bridge} up`",
            bridge = bridge.name
        )),
        _ => {}
    }
    objections
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::net::link::Link;

    fn tap() -> Port {
        let link = Link {
            name: "tap0".into(),
            up: true,
            mtu: 1500,
            kind: Some("tun".into()),
            is_tap: true,
            ..Link::default()
        };
        let bridge = Link { name: "br0".into(), up: true, kind: Some("bridge".into()), ..Link::default() };
        Port { link, bridge: Some(bridge) }
    }

    fn source() -> TapPort {
        TapPort { mtu: 1500, bridge: Some("lan".into()) }
    }

    /// The one objection against the tap after `change`.
    fn objection(change: impl Fn(&mut Port)) -> String {
        let mut port = tap();
        change(&mut port);
        let objections = objections("tap0", &source(), Some(&port));
        assert_eq!(objections.len(), 1, "{objections:?}");
        objections[0].clone()
    }

    #[test]
    fn a_tap_like_the_sources_is_good_enough() {
        assert_eq!(objections("tap0", &source(), Some(&tap())), Vec::<String>::new());
        let jumbo = Port { link: Link { mtu: 9000, ..tap().link }, ..tap() };
        assert_eq!(objections("tap0", &source(), Some(&jumbo)), Vec::<String>::new());
        // Where the source's tap is in no bridge, this one may be in one or not.
        let alone = TapPort { bridge: None, ..source() };
        for bridge in [tap().bridge, None] {
            assert_eq!(objections("tap0", &alone, Some(&Port { bridge, ..tap() })), Vec::<String>::new());
        }
        assert_eq!(objections("tap0", &TapPort::default(), Some(&tap())), Vec::<String>::new());
    }

    #[test]
    fn every_objection_says_what_to_do() {
        assert!(objections("tap9", &source(), None)[0].contains("`ip tuntap add tap9 mode tap vnet_hdr`"));
        assert!(objection(|port| port.link.up = false).contains("`ip link set tap0 up`"));
        assert!(objection(|port| port.link.carrier = true).contains("in use by another process"));
        assert!(objection(|port| port.link.mtu = 1400).contains("an MTU of 1400 here, the source's has 1500"));
        let unbridged = objection(|port| port.bridge = None);
        assert!(unbridged.contains("tap0 is in no bridge here, the source's is in lan"), "{unbridged}");
        assert!(objection(|port| port.bridge.iter_mut().for_each(|bridge| bridge.up = false)).contains("br0"));
        assert!(objection(|port| port.link.is_tap = false).contains("is not a tap"));
        assert!(objection(|port| port.link.multi_queue = true).contains("several queues"));
    }

    #[test]
    fn all_objections_are_given_at_once() {
        let mut port = tap();
        (port.link.up, port.link.mtu, port.bridge) = (false, 68, None);
        assert_eq!(objections("tap0", &source(), Some(&port)).len(), 3);
    }
}
