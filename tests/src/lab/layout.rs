//! The lab on paper: its hosts, networks and addresses.

use std::fmt::{self, Display};

/// A network of the lab: a bridge in the lab's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Where the world meets the guest. A learning bridge: it must be told where the guest has gone.
    Public,
    /// Behind the guest.
    Private,
    /// Between the hosts: NFS, and moves.
    Storage,
    /// The lab's own way to its hosts, so that tests can break all others.
    Management,
}

/// A host of the lab.
#[derive(Clone, Copy, Debug)]
pub struct HostPlan {
    /// Its name.
    pub name: &'static str,
    /// What it does: a function of its boot script.
    pub role: &'static str,
    /// The last part of its addresses.
    pub number: u8,
    /// Virtual processors.
    pub cpus: u8,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// The networks it is in.
    pub networks: &'static [Network],
}

/// All networks.
pub const NETWORKS: [Network; 4] = [Network::Public, Network::Private, Network::Storage, Network::Management];

/// All hosts. `storage` comes first: the others mount from it. Each has one processor: with two, emulated hosts and the
/// guests in them were seen to die of triple faults, one in about ten minutes (QEMU 7.2).
pub const HOSTS: [HostPlan; 3] = [
    HostPlan {
        name: "storage",
        role: "storage",
        number: 20,
        cpus: 1,
        memory_mib: 768,
        networks: &[Network::Storage, Network::Management],
    },
    HostPlan { name: "kvm1", role: "kvm", number: 21, cpus: 1, memory_mib: 2560, networks: &NETWORKS },
    HostPlan { name: "kvm2", role: "kvm", number: 22, cpus: 1, memory_mib: 2560, networks: &NETWORKS },
];

/// The taps that both KVM hosts keep ready for the guest, with their networks.
pub const GUEST_TAPS: [(&str, Network); 2] = [("fw1-pub", Network::Public), ("fw1-priv", Network::Private)];

/// The guest's number on the public network; on the private one it is the gateway, [`GATEWAY`].
pub const GUEST: u8 = 10;
/// The number of whoever forwards on a network; on the management network that is the lab's own end.
pub const GATEWAY: u8 = 1;
/// The number of a client on its network.
pub const CLIENT: u8 = 2;

impl Network {
    /// Its name, which is its bridge's in the lab's namespace and its NIC's in a host.
    pub fn name(self) -> &'static str {
        match self {
            Network::Public => "public",
            Network::Private => "private",
            Network::Storage => "storage",
            Network::Management => "management",
        }
    }

    /// The bridge in the KVM hosts that holds its NIC, where there is one.
    pub fn host_bridge(self) -> Option<&'static str> {
        match self {
            Network::Public => Some("br-public"),
            Network::Private => Some("br-private"),
            Network::Storage | Network::Management => None,
        }
    }

    /// The IPv4 address of `number` here. The prefix is 24 bits long.
    pub fn address(self, number: u8) -> String {
        format!("10.{}.0.{number}", self.octet())
    }

    /// The IPv6 address of `number` here, where there is IPv6. The prefix is 64 bits long.
    pub fn address_v6(self, number: u8) -> String {
        format!("fd{}::{number}", self.octet())
    }

    /// The link-layer address of `number` here. Its digits are those of the IPv4 address.
    pub fn link_address(self, number: u8) -> String {
        format!("52:54:00:{}:00:{number:02}", self.octet())
    }

    /// The longest packet. Storage networks commonly carry long ones; here they save most where each costs most: datagrams
    /// that emulated NICs pass on one by one.
    pub fn mtu(self) -> u32 {
        match self {
            Network::Storage => 9000,
            Network::Public | Network::Private | Network::Management => 1500,
        }
    }

    fn octet(self) -> u8 {
        match self {
            Network::Public => 90,
            Network::Private => 91,
            Network::Storage => 92,
            Network::Management => 93,
        }
    }
}

impl HostPlan {
    /// The plan of the host of that name.
    pub fn named(name: &str) -> Option<&'static HostPlan> {
        HOSTS.iter().find(|host| host.name == name)
    }

    /// The tap in the lab's namespace that is this host's NIC on `network`.
    pub fn tap(&self, network: Network) -> String {
        format!("{}-{}", self.name, &network.name()[..3])
    }

    /// What the host's boot script reads, in the shell's language.
    pub fn settings(&self, nfs: NfsVersion) -> String {
        let nics = self.networks.iter().map(|network| self.nic_line(*network)).collect::<Vec<_>>().join("\n");
        let taps = match self.role {
            "kvm" => GUEST_TAPS.iter().filter_map(|(tap, network)| Some(format!("{tap} {}", network.host_bridge()?))),
            _ => return self.settings_with(&nics, "", nfs),
        };
        self.settings_with(&nics, &taps.collect::<Vec<_>>().join("\n"), nfs)
    }

    fn settings_with(&self, nics: &str, taps: &str, nfs: NfsVersion) -> String {
        format!("NAME={}\nROLE={}\nNFS_VERSION={nfs}\nNICS='{nics}'\nTAPS='{taps}'\n", self.name, self.role)
    }

    fn nic_line(&self, network: Network) -> String {
        let bridge = network.host_bridge();
        // A bridged network is the guests'; the host has no address there.
        let address = if bridge.is_some() { "-".to_owned() } else { network.address(self.number) };
        let (mac, bridge) = (network.link_address(self.number), bridge.unwrap_or("-"));
        format!("{mac} {} {} {address} {bridge}", network.name(), network.mtu())
    }
}

/// `/etc/hosts` of every host: names stand for addresses on the storage network.
pub fn hosts_file() -> String {
    let lines = HOSTS.iter().map(|host| format!("{} {}\n", Network::Storage.address(host.number), host.name));
    std::iter::once("127.0.0.1 localhost\n".to_owned()).chain(lines).collect()
}

/// The version of NFS by which the KVM hosts mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum NfsVersion {
    /// NFSv3
    #[value(name = "3")]
    V3,
    /// NFSv4.2
    #[default]
    #[value(name = "4.2")]
    V4_2,
}

impl Display for NfsVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            NfsVersion::V3 => "3",
            NfsVersion::V4_2 => "4.2",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_interfaces_share_a_name_or_an_address() {
        let mut seen = std::collections::HashSet::new();
        for host in HOSTS {
            for network in host.networks {
                assert!(seen.insert(network.link_address(host.number)));
                assert!(seen.insert(host.tap(*network)));
                assert!(host.tap(*network).len() < 16, "the kernel takes 15 characters");
            }
        }
    }

    #[test]
    fn the_guest_in_the_image_has_the_addresses_of_the_plan() {
        let customize = include_str!("files/guest-customize.sh");
        for (network, number) in [(Network::Public, GUEST), (Network::Private, GATEWAY)] {
            assert!(customize.contains(&format!("Address={}/24", network.address(number))));
            assert!(customize.contains(&format!("Address={}/64", network.address_v6(number))));
            assert!(customize.contains(&format!("MACAddress={}", network.link_address(GUEST))));
        }
    }

    #[test]
    fn a_kvm_host_has_the_guests_taps_and_storage_has_none() {
        let settings = |name| HostPlan::named(name).unwrap().settings(NfsVersion::V4_2);
        assert!(settings("kvm1").contains("TAPS='fw1-pub br-public\nfw1-priv br-private'"));
        assert!(settings("kvm1").contains("52:54:00:90:00:21 public 1500 - br-public"));
        assert!(settings("storage").contains("TAPS=''"));
    }
}
