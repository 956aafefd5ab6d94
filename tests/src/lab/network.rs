//! The lab's wires: bridges in a namespace of the lab's own, taps for the hosts' NICs, and clients beside them.

use anyhow::Result;

use super::layout::{CLIENT, GATEWAY, GUEST, HOSTS, NETWORKS, Network};
use crate::netns::Namespace;

/// The namespaces of a lab.
pub struct Wires {
    /// Holds the bridges; the hosts' processes run in it.
    pub switch: Namespace,
    /// A client in the public network.
    pub public_client: Namespace,
    /// A client in the private network, behind the guest.
    pub private_client: Namespace,
}

impl Wires {
    /// Their names, for a lab called `instance`.
    pub fn names(instance: &str) -> [String; 3] {
        ["switch", "public", "private"].map(|part| format!("{instance}-{part}"))
    }

    /// Those that a lab has made.
    pub fn existing(instance: &str) -> Self {
        let [switch, public_client, private_client] = Self::names(instance).map(Namespace::existing);
        Self { switch, public_client, private_client }
    }

    /// Makes them. They stay until [`remove_namespace`].
    pub fn create(instance: &str) -> Result<Self> {
        for name in Self::names(instance) {
            Namespace::create_kept(&name)?;
        }
        let wires = Self::existing(instance);
        for network in NETWORKS {
            wires.add_bridge(network)?;
        }
        for host in HOSTS {
            for network in host.networks {
                wires.add_tap(&host.tap(*network), *network)?;
            }
        }
        let management = format!("{}/24", Network::Management.address(GATEWAY));
        wires.switch.ip(&["address", "add", &management, "dev", Network::Management.name()])?;
        wires.add_client(&wires.public_client, Network::Public)?;
        wires.add_client(&wires.private_client, Network::Private)?;
        // The guest forwards between its two networks.
        wires.public_client.route_by(Network::Private, Network::Public, GUEST)?;
        wires.private_client.route_by(Network::Public, Network::Private, GATEWAY)?;
        Ok(wires)
    }

    /// A learning bridge that forwards at once: no spanning tree, and multicast goes everywhere.
    fn add_bridge(&self, network: Network) -> Result<()> {
        let name = network.name();
        let options = ["type", "bridge", "stp_state", "0", "forward_delay", "0", "mcast_snooping", "0"];
        self.switch.ip(&[&["link", "add", name], &options[..]].concat())?;
        self.switch.ip(&["link", "set", name, "addrgenmode", "none", "up"])
    }

    fn add_tap(&self, tap: &str, network: Network) -> Result<()> {
        self.switch.ip(&["tuntap", "add", tap, "mode", "tap", "vnet_hdr"])?;
        let mtu = network.mtu().to_string();
        self.switch.ip(&["link", "set", tap, "mtu", &mtu, "addrgenmode", "none", "master", network.name(), "up"])
    }

    fn add_client(&self, client: &Namespace, network: Network) -> Result<()> {
        let port = format!("{}-client", network.name());
        let link_address = network.link_address(CLIENT);
        let end = ["peer", "name", "eth0", "address", &link_address, "netns", client.name()];
        self.switch.ip(&[&["link", "add", &port, "type", "veth"], &end[..]].concat())?;
        self.switch.ip(&["link", "set", &port, "addrgenmode", "none", "master", network.name(), "up"])?;
        client.ip(&["address", "add", &format!("{}/24", network.address(CLIENT)), "dev", "eth0"])?;
        client.ip(&["address", "add", &format!("{}/64", network.address_v6(CLIENT)), "dev", "eth0", "nodad"])?;
        client.ip(&["link", "set", "eth0", "up"])
    }
}

impl Namespace {
    /// Sends what is for network `to` by `router`, a number in the network `by`.
    fn route_by(&self, to: Network, by: Network, router: u8) -> Result<()> {
        let (subnet, subnet_v6) = (format!("{}/24", to.address(0)), format!("{}/64", to.address_v6(0)));
        self.ip(&["route", "add", &subnet, "via", &by.address(router)])?;
        self.ip(&["-6", "route", "add", &subnet_v6, "via", &by.address_v6(router)])
    }
}

/// Removes a namespace of a lab with all in it. It may be gone already.
pub fn remove_namespace(name: &str) -> Result<()> {
    let namespace = Namespace::existing(name.to_owned());
    if namespace.path().exists() { namespace.remove() } else { Ok(()) }
}
