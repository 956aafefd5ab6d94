//! What the kernel says of an interface, asked by netlink: /sys/class/net shows the network that it was mounted in, which need
//! not be this process's.

use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoTun, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Attributes of a tun or tap (linux/if_link.h).
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
/// The type of a tap (IFF_TAP).
const TAP: u8 = 2;

/// An interface of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) name: String,
    /// Whether it has been set up.
    pub(crate) up: bool,
    /// Whether it has a carrier: for a tap that is up, whether a process has it.
    pub(crate) carrier: bool,
    pub(crate) mtu: u32,
    /// What kind of virtual interface it is, if it is one.
    pub(crate) kind: Option<String>,
    pub(crate) is_tap: bool,
    pub(crate) multi_queue: bool,
    /// The number of the bridge (or the like) that it is a port of.
    pub(crate) controller: Option<u32>,
}

impl Link {
    /// Its kind, in a sentence.
    pub(crate) fn kind_for_people(&self) -> String {
        match self.kind.as_deref() {
            Some("tun") => "a tun".into(),
            Some(kind) => format!("of the kind {kind}"),
            None => "a device of the host".into(),
        }
    }
}

/// An interface with the bridge that it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) link: Link,
    /// The bridge, or what does a bridge's work.
    pub(crate) bridge: Option<Link>,
}

impl Port {
    /// The interface of this name, if there is one.
    pub(crate) fn find(name: &str) -> io::Result<Option<Self>> {
        let Some(link) = find(name)? else { return Ok(None) };
        let bridge = link.controller.map(by_index).transpose()?.flatten();
        Ok(Some(Self { link, bridge }))
    }
}

/// The interface of this name, if there is one.
pub(super) fn find(name: &str) -> io::Result<Option<Link>> {
    let mut question = LinkMessage::default();
    question.attributes.push(LinkAttribute::IfName(name.to_owned()));
    ask(question)
}

/// The interface with this number, if there is one.
fn by_index(index: u32) -> io::Result<Option<Link>> {
    let mut question = LinkMessage::default();
    question.header.index = index;
    ask(question)
}

fn ask(question: LinkMessage) -> io::Result<Option<Link>> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(RouteNetlinkMessage::GetLink(question)));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(read(&link))),
        NetlinkPayload::Error(error) => match error.to_io() {
            error if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            error => Err(error),
        },
        _ => Err(io::Error::other("the kernel's answer is none about an interface")),
    }
}

fn read(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link =
        Link { up: flags.contains(LinkFlags::Up), carrier: flags.contains(LinkFlags::LowerUp), ..Link::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| read_info(&mut link, info)),
            _ => {}
        }
    }
    link
}

fn read_info(link: &mut Link, info: &LinkInfo) {
    match info {
        LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
        LinkInfo::Data(InfoData::Tun(attributes)) => {
            let is = |kind: u16, value: u8| {
                attributes.iter().any(|attribute: &InfoTun| {
                    let mut bytes = vec![0; attribute.value_len()];
                    attribute.emit_value(&mut bytes);
                    attribute.kind() == kind && bytes == [value]
                })
            };
            link.is_tap = is(IFLA_TUN_TYPE, TAP);
            link.multi_queue = is(IFLA_TUN_MULTI_QUEUE, 1);
        }
        _ => {}
    }
}
