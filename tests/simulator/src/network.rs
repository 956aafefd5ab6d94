//! Streams between processes, and what befalls them.
//!
//! A stream keeps its order and loses nothing, as TCP and QUIC see to it, until it breaks. So a lost packet is a delay, streams
//! overtake each other, and what breaks is noticed by the two ends at different times, or by silence alone.

use std::collections::VecDeque;
use std::time::Duration;

use godwit_core::message::HEADER_BYTES;
use godwit_core::postcopy::PageChannel;

use crate::agenda::Agenda;
use crate::chance::{Chance, ms, us};
use crate::event::Event;

/// Hosts in the world.
pub const HOSTS: usize = 3;
/// What a socket's buffers and the path hold of one stream.
const WINDOW_BYTES: usize = 128 << 10;

/// An end that gets no answer for so long gives its connection up (TCP_USER_TIMEOUT, QUIC's idle timeout).
const DEAD_PEER_LIMIT: Duration = Duration::from_secs(30);

/// A connection's number.
pub type ConnectionId = usize;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Messages.
    Control,
    /// Pages.
    Data(u16),
    /// Pages in post-copy.
    Pages(PageChannel),
}

/// All connections there have ever been, and the paths they take.
pub struct Network {
    connections: Vec<Connection>,
    paths: [[Path; HOSTS]; HOSTS],
}

/// The way from one host to another.
#[derive(Debug, Clone, Copy)]
struct Path {
    latency: Duration,
    bytes_per_s: f64,
    /// Nothing arrives before.
    blocked_until: Duration,
}

struct Connection {
    kind: Kind,
    /// Process and host at each end.
    ends: [(usize, usize); 2],
    /// Nothing more arrives.
    broken: bool,
    /// Who has hung up.
    closed: [bool; 2],
    /// By the side that reads.
    streams: [Stream; 2],
}

#[derive(Default)]
struct Stream {
    under_way: VecDeque<(Duration, Vec<u8>)>,
    last_arrival: Duration,
    bytes_under_way: usize,
    arrived: Vec<u8>,
}

impl Network {
    /// Paths as this seed has them.
    pub fn new(chance: &mut Chance) -> Self {
        let mut path = || Path {
            latency: chance.time(us(30), ms(20)),
            bytes_per_s: chance.amount(2e6, 2e9),
            blocked_until: Duration::ZERO,
        };
        Self { connections: Vec::new(), paths: std::array::from_fn(|_| std::array::from_fn(|_| path())) }
    }

    /// Nothing sent from one host to another arrives before then. Connections do not survive that for long.
    pub fn block(&mut self, from: usize, to: usize, until: Duration, agenda: &mut Agenda<Event>) {
        let path = &mut self.paths[from][to];
        path.blocked_until = path.blocked_until.max(until);
        if until < agenda.now() + DEAD_PEER_LIMIT {
            return;
        }
        for (id, connection) in self.connections.iter().enumerate() {
            let hosts = connection.ends.map(|(_, host)| host);
            if !connection.broken && (hosts == [from, to] || hosts == [to, from]) {
                agenda.after(DEAD_PEER_LIMIT, Event::Expires(id));
            }
        }
    }

    /// When something sent now from one host arrives at another.
    pub fn arrival(&self, now: Duration, from: usize, to: usize) -> Duration {
        let path = &self.paths[from][to];
        path.blocked_until.max(now) + path.latency
    }

    /// Connects two processes, each with its host.
    pub fn connect(&mut self, kind: Kind, ends: [(usize, usize); 2]) -> ConnectionId {
        let streams = Default::default();
        self.connections.push(Connection { kind, ends, broken: false, closed: [false; 2], streams });
        self.connections.len() - 1
    }

    /// What a connection is for.
    pub fn kind(&self, id: ConnectionId) -> Kind {
        self.connections[id].kind
    }

    /// The process at a side.
    pub fn process(&self, id: ConnectionId, side: usize) -> usize {
        self.connections[id].ends[side].0
    }

    /// Whether it can still carry anything.
    pub fn is_up(&self, id: ConnectionId) -> bool {
        let Connection { broken, closed, .. } = &self.connections[id];
        !broken && !closed[0] && !closed[1]
    }

    /// Whether as much may be written, or something is on its way already and there is no room.
    pub fn has_room(&self, id: ConnectionId, side: usize, bytes: usize) -> bool {
        let under_way = self.connections[id].streams[1 - side].bytes_under_way;
        under_way == 0 || under_way + bytes <= WINDOW_BYTES
    }

    /// A side writes. What is written to a broken connection goes nowhere.
    pub fn write(
        &mut self,
        id: ConnectionId,
        side: usize,
        bytes: &[u8],
        chance: &mut Chance,
        agenda: &mut Agenda<Event>,
    ) {
        let connection = &mut self.connections[id];
        if connection.broken || connection.closed[side] {
            return;
        }
        let path = &self.paths[connection.ends[side].1][connection.ends[1 - side].1];
        let stream = &mut connection.streams[1 - side];
        stream.bytes_under_way += bytes.len();
        let mut rest = bytes;
        while !rest.is_empty() {
            // Reads see pieces.
            let length = if chance.hit(0.7) { rest.len() } else { 1 + chance.below(rest.len()) };
            let (piece, later) = rest.split_at(length);
            rest = later;
            // One in a while is lost and sent again.
            let jitter = if chance.hit(0.02) { chance.time(ms(5), ms(800)) } else { path.latency.mul_f64(0.2) };
            let sending = Duration::from_secs_f64(piece.len() as f64 / path.bytes_per_s);
            let begins = stream.last_arrival.max(agenda.now() + path.latency + jitter);
            stream.last_arrival = begins + sending;
            stream.under_way.push_back((stream.last_arrival, piece.to_vec()));
            agenda.at(stream.last_arrival, Event::Arrives(id, 1 - side));
        }
    }

    /// It is time for something to arrive at a side. False if nothing does.
    pub fn arrive(&mut self, id: ConnectionId, side: usize, agenda: &mut Agenda<Event>) -> bool {
        let connection = &mut self.connections[id];
        let blocked_until = self.paths[connection.ends[1 - side].1][connection.ends[side].1].blocked_until;
        let stream = &mut connection.streams[side];
        let due = stream.under_way.front().is_some_and(|(at, _)| *at <= agenda.now());
        if connection.broken || !due {
            return false;
        }
        if agenda.now() < blocked_until {
            agenda.at(blocked_until, Event::Arrives(id, side));
            return false;
        }
        while let Some((at, piece)) = stream.under_way.pop_front() {
            if at > agenda.now() {
                stream.under_way.push_front((at, piece));
                break;
            }
            stream.bytes_under_way -= piece.len();
            stream.arrived.extend_from_slice(&piece);
        }
        true
    }

    /// What has arrived at a side and was not taken.
    pub fn arrived(&mut self, id: ConnectionId, side: usize) -> &mut Vec<u8> {
        &mut self.connections[id].streams[side].arrived
    }

    /// Changes a bit of what is under way to a side, as checksums of 16 bits let it pass now and then. False: there is nothing.
    pub fn corrupt(&mut self, id: ConnectionId, side: usize, chance: &mut Chance) -> bool {
        let stream = &mut self.connections[id].streams[side];
        let Some((_, piece)) = stream.under_way.back_mut() else { return false };
        let at = chance.below(piece.len());
        piece[at] ^= 1 << chance.below(8);
        true
    }

    /// Whether what arrives next at a side is no more than a sign of life.
    pub fn is_ping(&self, id: ConnectionId, side: usize) -> bool {
        let Connection { kind, streams, .. } = &self.connections[id];
        let next = streams[side].under_way.front();
        *kind == Kind::Control && next.is_none_or(|(_, piece)| piece.len() <= HEADER_BYTES)
    }

    /// Breaks a connection. What is under way is lost, but for the beginning of it now and then; each end notices at once, or only when it has had no answer for long.
    pub fn cut(&mut self, id: ConnectionId, chance: &mut Chance, agenda: &mut Agenda<Event>) {
        let connection = &mut self.connections[id];
        if std::mem::replace(&mut connection.broken, true) {
            return;
        }
        for side in [0, 1] {
            let stream = &mut connection.streams[side];
            if let Some((_, piece)) = stream.under_way.front()
                && chance.hit(0.5)
            {
                stream.arrived.extend_from_slice(&piece[..chance.below(piece.len())]);
            }
            let notices = if chance.hit(0.15) { DEAD_PEER_LIMIT } else { chance.time(us(10), ms(300)) };
            agenda.after(notices, Event::Broken(id, side));
        }
    }

    /// A side hangs up, or its process dies: the other hears of it after all that was written, if anything arrives there at all.
    pub fn close(&mut self, id: ConnectionId, side: usize, agenda: &mut Agenda<Event>) {
        let connection = &mut self.connections[id];
        if std::mem::replace(&mut connection.closed[side], true) || connection.broken {
            return;
        }
        let path = &self.paths[connection.ends[side].1][connection.ends[1 - side].1];
        let last = connection.streams[1 - side].last_arrival;
        let at = last.max(path.blocked_until).max(agenda.now()) + path.latency;
        agenda.at(at, Event::Broken(id, 1 - side));
    }

    /// The host at a side is gone: the other side notices when it has had no answer for long.
    pub fn forget(&mut self, id: ConnectionId, side: usize, agenda: &mut Agenda<Event>) {
        self.connections[id].broken = true;
        agenda.after(DEAD_PEER_LIMIT, Event::Broken(id, 1 - side));
    }

    /// The connections of a process that are up, and its side of each.
    pub fn of(&self, process: usize) -> Vec<(ConnectionId, usize)> {
        let up = (0..self.connections.len()).filter(|id| self.is_up(*id));
        up.flat_map(|id| [0, 1].map(|side| (id, side)))
            .filter(|(id, side)| self.process(*id, *side) == process)
            .collect()
    }
}
