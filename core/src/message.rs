//! Control messages and their framing.
//!
//! A frame is a header of fixed layout, little-endian, then a bincode payload ([`crate::codec`]):
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `GWCT` |
//! | 4 | 2 | type |
//! | 6 | 2 | reserved, 0 |
//! | 8 | 4 | payload length in bytes |
//! | 12 | 4 | CRC-32C of the first 12 bytes and the payload |
//!
//! Each type has a maximum length, checked before anything is allocated.

use std::io::{self, Read};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::channel::SessionToken;
use crate::codec::{self, CodecError};
use crate::machine::{MachineDescription, Section, Verdict};
use crate::memory_files::MemoryOffer;
use crate::postcopy::Missing;

/// The protocol's version: another major number cannot be talked to, a smaller minor one sets what is used.
pub const VERSION: Version = Version { major: 1, minor: 1 };
/// Feature bit: what a broken link leaves is kept for a while, and the session can come back ([`Message::Keep`]).
pub const FEATURE_RETURN: u64 = 1;
/// Pages may be sent as differences from what was last sent of them ([`crate::delta`]).
pub const FEATURE_DELTA: u64 = 2;
/// On one host memory may be handed over as the files behind it ([`crate::memory_files`]).
pub const FEATURE_MEMORY_FILES: u64 = 4;
/// The guest may run at the destination before all of its memory is there ([`crate::postcopy`]).
pub const FEATURE_POSTCOPY: u64 = 8;
/// Pages that are zeros but for a few words may be sent as those ([`crate::delta`]).
pub const FEATURE_SPARSE: u64 = 16;
/// Data channels may say which pages come next, so that memory for them can be made ready.
pub const FEATURE_COMING: u64 = 32;
/// All that this version can do.
pub const FEATURES: u64 =
    FEATURE_RETURN | FEATURE_DELTA | FEATURE_MEMORY_FILES | FEATURE_POSTCOPY | FEATURE_SPARSE | FEATURE_COMING;
/// Bytes in a frame header.
pub const HEADER_BYTES: usize = 16;
const MAGIC: [u8; 4] = *b"GWCT";
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// A protocol version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Peers of another one do not understand each other.
    pub major: u16,
    /// The smaller of both ends' is spoken.
    pub minor: u16,
}

/// Who speaks, and what it can do. The first message of either end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The protocol spoken.
    pub version: Version,
    /// Feature bits; what both ends have set is used.
    pub features: u64,
    /// Name and version of the program, for messages.
    pub program: String,
    /// The host's name, for messages.
    pub host: String,
}

/// Where a machine's claims are, and the source's own: whoever finds the same claim in the same place sees the same store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedClaims {
    /// The claim directory, as the source names it.
    pub directory: String,
    /// The text of the source's claim.
    pub claim: String,
}

/// What a destination is asked to judge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreflightRequest {
    /// The machine.
    pub machine: MachineDescription,
    /// What the source's VMM asks the destination's ([`crate::machine::Inquiry`]).
    pub question: Vec<u8>,
    /// The claims by which ownership passes; none: by *commit* alone.
    pub claims: Option<SharedClaims>,
    /// Data channels to come; none if memory was handed over.
    pub channels: u16,
    /// Nothing will follow.
    pub dry_run: bool,
}

/// What a destination needs to build the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareRequest {
    /// Seed of the page hashes, drawn for this move.
    pub table_seed: u64,
    /// Whether pages are hashed and the sums compared.
    pub verify: bool,
    /// The destination's CLOCK_REALTIME less the source's.
    pub clock_offset_ns: i64,
    /// State as it was a moment ago: loaded as a rehearsal, so that whatever cannot be loaded is found before any memory
    /// is sent, and the time it takes is measured.
    pub rehearsal: Vec<Section>,
}

/// The machine is built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// To be shown by data channels.
    pub token: SessionToken,
    /// How long the rehearsed load took.
    pub load: Duration,
}

/// What the source has sent in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableSum {
    /// The sum of the page table modulo 2^64.
    pub sum: u64,
}

/// How long a step took, at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimedStep {
    /// What was done.
    pub name: String,
    /// How long it took.
    pub duration: Duration,
}

/// Ownership passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The epoch that the destination is to claim; 0 with `--ownership none`.
    pub epoch: u64,
    /// To tell this handover's claim from any other's.
    pub nonce: u64,
    /// Whether the guest was running when the move began.
    pub run: bool,
}

/// Everything of the last harvest has been applied up to a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The data channel.
    pub channel: u16,
    /// The mark's number.
    pub mark: u64,
}

/// How memory was filled while the guest ran in it, as the destination saw it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filled {
    /// Pages that somebody waited for.
    pub faults: u64,
    /// How long half of them took at most, in microseconds.
    pub fault_p50_us: u64,
    /// How long 99 % of them took at most.
    pub fault_p99_us: u64,
    /// How long the slowest took.
    pub fault_max_us: u64,
}

/// Where the source stands, for the destination's display.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundStart {
    /// 0 is the first pass.
    pub round: u32,
    /// Pages to be sent in it.
    pub pages: u64,
}

macro_rules! messages {
    ($($(#[$doc:meta])* $id:literal $name:ident($payload:ty) max $max:expr;)*) => {
        /// A control message.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Message {
            $($(#[$doc])* $name($payload),)*
        }

        impl Message {
            fn to_frame(&self) -> Result<(u16, usize, Vec<u8>), CodecError> {
                Ok(match self {
                    $(Message::$name(payload) => ($id, $max, codec::encode(payload)?),)*
                })
            }

            fn max_bytes(kind: u16) -> Option<usize> {
                match kind {
                    $($id => Some($max),)*
                    _ => None,
                }
            }

            fn from_frame(kind: u16, payload: &[u8]) -> Result<Self, MessageError> {
                match kind {
                    $($id => Ok(Message::$name(codec::decode(payload)?)),)*
                    _ => Err(MessageError::Kind(kind)),
                }
            }

            /// The message's name, for errors.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Message::$name(_) => stringify!($name),)*
                }
            }
        }
    };
}

messages! {
    /// Both ends: who speaks.
    1 Hello(Hello) max 4 * KIB;
    /// Both ends: still here.
    2 Ping(()) max 0;
    /// Both ends: the move is over, and why. The guest is where it was.
    3 Abort(String) max 64 * KIB;
    /// Source: what is your clock? Carries a number to be echoed.
    16 ClockRequest(u32) max 16;
    /// Source: can you take this machine in?
    17 Preflight(PreflightRequest) max 4 * MIB;
    /// Source: build it.
    18 Prepare(PrepareRequest) max 32 * MIB;
    /// Source: a round begins.
    19 Round(RoundStart) max 64;
    /// Source: the state of the paused machine.
    20 State(Vec<Section>) max 32 * MIB;
    /// Source: every channel has ended; compare, load and say *ready*.
    21 Table(TableSum) max 64;
    /// Source: the machine is yours.
    22 Commit(Commit) max 64;
    /// Source: if the links break while memory is being sent, keep what has arrived for so long.
    23 Keep(Duration) max 64;
    /// Source: these files, whose descriptors come along, are the machine's memory: map them, and nothing need be sent.
    24 Memory(MemoryOffer) max 4 * KIB;
    /// Source: the machine may go over to post-copy: judge that, too.
    25 PostCopyWanted(()) max 0;
    /// Source: it is to go over to post-copy: can that be? If so, the channels for pages are opened next.
    26 PostCopy(()) max 0;
    /// Both ends: pages that are missing at the destination.
    27 Missing(Missing) max 2 * MIB;
    /// Source: all of memory is there, as was said, and nothing more will come.
    28 Farewell(()) max 0;
    /// Destination: the number and CLOCK_REALTIME in nanoseconds.
    32 ClockReply((u32, i64)) max 64;
    /// Destination: every reason against it, and the answer to the question; no reason: go on.
    33 Verdict(Verdict) max MIB;
    /// Destination: built.
    34 Prepared(Prepared) max 64;
    /// Destination: applied up to a mark.
    35 Applied(Applied) max 64;
    /// Destination: *ready*: memory compared, state loaded, waiting for *commit*.
    36 Ready(Vec<TimedStep>) max 64 * KIB;
    /// Destination: *running* (or, for a machine that was paused or is held, owned).
    37 Running(Vec<TimedStep>) max 64 * KIB;
    /// Destination: the session is back; its data channels are to show this.
    38 Attached(SessionToken) max 64;
    /// Destination: it will map the files that were offered, or why it cannot.
    39 MemoryTaken(Option<String>) max 4 * KIB;
    /// Destination: the machine can go over to post-copy, or why it cannot.
    40 PostCopyAnswer(Option<String>) max 4 * KIB;
    /// Destination: no page is missing any more.
    41 Complete(Filled) max 64;
}

/// Why bytes are no message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The peer does not speak this protocol.
    #[error("this is not Godwit's control protocol (the frame begins with {0:02x?})")]
    Magic([u8; 4]),
    /// A type that this version does not know.
    #[error("unknown control message type {0}")]
    Kind(u16),
    /// Longer than the type allows.
    #[error("a control message of type {kind} says it is {length} bytes long, {max} is the most")]
    TooLong {
        /// The type.
        kind: u16,
        /// What it says.
        length: usize,
        /// What is allowed.
        max: usize,
    },
    /// Damaged on the way.
    #[error("a control message's checksum is wrong")]
    Checksum,
    /// The payload is not what the type says.
    #[error("a control message is malformed: {0}")]
    Codec(#[from] CodecError),
    /// The stream broke.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Message {
    /// The whole frame.
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let (kind, max, payload) = self.to_frame()?;
        if payload.len() > max {
            return Err(MessageError::TooLong { kind, length: payload.len(), max });
        }
        let mut frame = vec![0; HEADER_BYTES];
        frame[..4].copy_from_slice(&MAGIC);
        frame[4..6].copy_from_slice(&kind.to_le_bytes());
        frame[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&frame[..12]), &payload);
        frame[12..].copy_from_slice(&checksum.to_le_bytes());
        frame.extend_from_slice(&payload);
        Ok(frame)
    }

    /// Reads one frame.
    pub fn read(reader: &mut impl Read) -> Result<Self, MessageError> {
        let mut header = [0; HEADER_BYTES];
        reader.read_exact(&mut header)?;
        let [magic @ .., _, _, _, _, _, _, _, _, _, _, _, _] = header;
        let kind = u16::from_le_bytes([header[4], header[5]]);
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
        let checksum = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
        if magic != MAGIC || header[6..8] != [0, 0] {
            return Err(MessageError::Magic(magic));
        }
        let max = Self::max_bytes(kind).ok_or(MessageError::Kind(kind))?;
        if length > max {
            return Err(MessageError::TooLong { kind, length, max });
        }
        let mut payload = vec![0; length];
        reader.read_exact(&mut payload)?;
        if crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &payload) != checksum {
            return Err(MessageError::Checksum);
        }
        Self::from_frame(kind, &payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(host: String) -> Message {
        Message::Hello(Hello { version: VERSION, features: 3, program: "godwit 1".into(), host })
    }

    #[test]
    fn a_frame_that_says_it_is_too_long_is_refused_before_it_is_read() {
        let mut frame = Message::Ping(()).encode().unwrap();
        frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let refused = Message::read(&mut &frame[..]);
        assert!(matches!(refused, Err(MessageError::TooLong { kind: 2, max: 0, .. })), "{refused:?}");
        assert!(hello("x".repeat(5000)).encode().is_err());
    }

    #[test]
    fn other_protocols_are_told_apart() {
        for bytes in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"SSH-2.0-OpenSSH_9.2\r\n", &[0; 64]] {
            assert!(matches!(Message::read(&mut &bytes[..]), Err(MessageError::Magic(_))));
        }
    }

    proptest! {
        #[test]
        fn round_trip(host in "[a-z]{0,60}", sum in any::<u64>(), kind in "[a-z/0-9]{1,9}", payload in prop::collection::vec(any::<u8>(), 0..300)) {
            for message in [
                hello(host),
                Message::Table(TableSum { sum }),
                Message::State(vec![Section { kind, version: 7, payload }]),
            ] {
                let frame = message.encode().unwrap();
                prop_assert_eq!(Message::read(&mut &frame[..]).unwrap(), message);
            }
        }

        #[test]
        fn invariant_5_any_flipped_bit_is_found(sum in any::<u64>(), at in 0..HEADER_BYTES + 8, bit in 0u8..8) {
            let mut frame = Message::Table(TableSum { sum }).encode().unwrap();
            frame[at] ^= 1 << bit;
            prop_assert!(Message::read(&mut &frame[..]).is_err());
        }

        #[test]
        fn invariant_5_truncated_and_random_frames_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0.0..1.0f64) {
            prop_assert!(Message::read(&mut &bytes[..]).is_err());
            let frame = hello("destination".into()).encode().unwrap();
            let cut = (cut * frame.len() as f64) as usize;
            prop_assert!(Message::read(&mut &frame[..cut]).is_err());
        }
    }
}
