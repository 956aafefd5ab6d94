//! The first bytes of every connection, both ways.
//!
//! The dialler opens with a [`Preamble`] of 32 bytes, the listener replies with an [`Answer`] of 16. Integers are
//! little-endian.
//!
//! | offset | preamble | | offset | answer |
//! |---|---|---|---|---|
//! | 0 | magic, [`MAGIC`] | | 0 | magic, [`MAGIC`] |
//! | 8 | major version, u16 | | 8 | the listener's major version, u16 |
//! | 10 | minor version, u16 | | 10 | the listener's minor version, u16 |
//! | 12 | role, u16: 1 control, 2 data, 3 control again | | 12 | status, u16: 0 accepted, else a [`Refusal`] |
//! | 14 | index of the data channel, u16; else 0 | | 14 | zero, u16 |
//! | 16 | session token, 16 bytes; zeros for a new control channel | | | |
//!
//! These versions are those of the preamble; what follows it is versioned by the engine.

use godwit_core::SessionToken;

/// What both begin with. The first byte is not ASCII and the last is a line feed, so that neither text nor a
/// transfer that rewrites line ends is taken for ours.
pub const MAGIC: [u8; 8] = *b"\x89GODWIT\n";

/// The major version of the preamble. Listeners refuse any other.
pub const MAJOR: u16 = 1;

/// The minor version of the preamble. Listeners take any.
pub const MINOR: u16 = 1;

/// The length of an encoded [`Preamble`].
pub const PREAMBLE_BYTES: usize = 32;

/// The length of an encoded [`Answer`].
pub const ANSWER_BYTES: usize = 16;

/// What a connection wants to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preamble {
    /// The control channel of a new session.
    Control,
    /// The control channel of the session that `token` names, whose links have broken.
    ControlAgain {
        /// Told to the dialler over the first control channel.
        token: SessionToken,
    },
    /// A data channel of the session that `token` names.
    Data {
        /// Told to the dialler over the control channel.
        token: SessionToken,
        /// Which of the session's data channels.
        index: u16,
    },
}

const ROLE_CONTROL: u16 = 1;
const ROLE_DATA: u16 = 2;
const ROLE_CONTROL_AGAIN: u16 = 3;

/// Why the first bytes of a connection are not a preamble that we take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// The connection ended before the preamble did.
    #[error("the connection ended after {got} of the {PREAMBLE_BYTES} bytes of a preamble")]
    Truncated {
        /// How many bytes came.
        got: usize,
    },
    /// The magic is wrong: a peer that speaks something else.
    #[error("the first bytes are {}, which is {}", .0.escape_ascii(), guess(.0))]
    NotOurs([u8; 8]),
    /// Another major version.
    #[error("the peer's preamble has version {major}.{minor}, ours is {MAJOR}.{MINOR}")]
    Version {
        /// The peer's major version.
        major: u16,
        /// The peer's minor version.
        minor: u16,
    },
    /// A field has a value that it cannot have.
    #[error("the preamble's {field} is {value}, which it cannot be")]
    Field {
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: u16,
    },
}

/// What strangers usually are.
fn guess(first: &[u8]) -> &'static str {
    match first {
        [b'G', b'E', b'T', b' ', ..] | [b'P', b'O', b'S', b'T', ..] | [b'H', b'E', b'A', b'D', ..] => "HTTP",
        [0x16, 0x03, ..] => "TLS",
        [b'S', b'S', b'H', b'-', ..] => "SSH",
        [b'Q', b'E', b'V', b'M', ..] => "a QEMU migration stream",
        _ => "nothing that Godwit knows",
    }
}

impl Preamble {
    /// The bytes that a dialler opens with.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let (role, index, token) = match self {
            Self::Control => (ROLE_CONTROL, 0, [0; 16]),
            Self::ControlAgain { token } => (ROLE_CONTROL_AGAIN, 0, token.0),
            Self::Data { token, index } => (ROLE_DATA, *index, token.0),
        };
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
        bytes[10..12].copy_from_slice(&MINOR.to_le_bytes());
        bytes[12..14].copy_from_slice(&role.to_le_bytes());
        bytes[14..16].copy_from_slice(&index.to_le_bytes());
        bytes[16..32].copy_from_slice(&token);
        bytes
    }

    /// Reads what a dialler opened with.
    ///
    /// # Errors
    /// If the bytes are not a preamble of our major version, or there are not exactly [`PREAMBLE_BYTES`]. What cannot
    /// become a preamble by more bytes is never called [`PreambleError::Truncated`] once 8 bytes are there.
    pub fn decode(bytes: &[u8]) -> Result<Self, PreambleError> {
        if let Some(first) = bytes.first_chunk::<8>()
            && *first != MAGIC
        {
            return Err(PreambleError::NotOurs(*first));
        }
        let bytes: &[u8; PREAMBLE_BYTES] =
            bytes.try_into().map_err(|_| PreambleError::Truncated { got: bytes.len() })?;
        let (major, minor) = (u16_at(bytes, 8), u16_at(bytes, 10));
        if major != MAJOR {
            return Err(PreambleError::Version { major, minor });
        }
        let (role, index) = (u16_at(bytes, 12), u16_at(bytes, 14));
        let mut token = [0; 16];
        token.copy_from_slice(&bytes[16..32]);
        match role {
            ROLE_CONTROL | ROLE_CONTROL_AGAIN if index != 0 => {
                Err(PreambleError::Field { field: "index", value: index })
            }
            ROLE_CONTROL => Ok(Self::Control),
            ROLE_CONTROL_AGAIN => Ok(Self::ControlAgain { token: SessionToken(token) }),
            ROLE_DATA => Ok(Self::Data { token: SessionToken(token), index }),
            _ => Err(PreambleError::Field { field: "role", value: role }),
        }
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

/// Why a listener turns a connection away although it speaks our language.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Another major version of the preamble.
    #[error("its preamble has version {major}.{minor}, ours is {MAJOR}.{MINOR}: use the same release on both hosts")]
    Version {
        /// The listener's major version.
        major: u16,
        /// The listener's minor version.
        minor: u16,
    },
    /// A field of the preamble has a value that it cannot have.
    #[error("it found our preamble malformed")]
    Malformed,
    /// No session there expects this token.
    #[error("it knows no session with our token; the move may have ended there")]
    UnknownSession,
    /// Too many connections wait to be taken.
    #[error("too many connections wait there; try again")]
    Busy,
    /// The listener is closing.
    #[error("it is shutting down")]
    Closing,
    /// A later version's reason.
    #[error("for a reason that this version does not know (code {0})")]
    Unknown(u16),
}

/// What a listener replies to a preamble.
pub type Answer = Result<(), Refusal>;

/// The bytes of `answer`.
#[must_use]
pub fn encode_answer(answer: Answer) -> [u8; ANSWER_BYTES] {
    let status: u16 = match answer {
        Ok(()) => 0,
        Err(Refusal::Version { .. }) => 1,
        Err(Refusal::Malformed) => 2,
        Err(Refusal::UnknownSession) => 3,
        Err(Refusal::Busy) => 4,
        Err(Refusal::Closing) => 5,
        Err(Refusal::Unknown(code)) => code,
    };
    let mut bytes = [0; ANSWER_BYTES];
    bytes[0..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
    bytes[10..12].copy_from_slice(&MINOR.to_le_bytes());
    bytes[12..14].copy_from_slice(&status.to_le_bytes());
    bytes
}

/// Reads an answer; `None` if it is not one.
#[must_use]
pub fn decode_answer(bytes: &[u8; ANSWER_BYTES]) -> Option<Answer> {
    if bytes[0..8] != MAGIC {
        return None;
    }
    Some(match u16_at(bytes, 12) {
        0 => Ok(()),
        1 => Err(Refusal::Version { major: u16_at(bytes, 8), minor: u16_at(bytes, 10) }),
        2 => Err(Refusal::Malformed),
        3 => Err(Refusal::UnknownSession),
        4 => Err(Refusal::Busy),
        5 => Err(Refusal::Closing),
        code => Err(Refusal::Unknown(code)),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_preamble() -> impl Strategy<Value = Preamble> {
        prop_oneof![
            Just(Preamble::Control),
            any::<[u8; 16]>().prop_map(|token| Preamble::ControlAgain { token: SessionToken(token) }),
            (any::<[u8; 16]>(), any::<u16>())
                .prop_map(|(token, index)| Preamble::Data { token: SessionToken(token), index }),
        ]
    }

    #[test]
    fn layout_is_fixed() {
        let bytes = Preamble::Data { token: SessionToken([7; 16]), index: 0x0102 }.encode();
        assert_eq!(&bytes[..16], b"\x89GODWIT\n\x01\x00\x01\x00\x02\x00\x02\x01");
        assert_eq!(bytes[16..], [7; 16]);
        assert_eq!(&encode_answer(Err(Refusal::Busy)), b"\x89GODWIT\n\x01\x00\x01\x00\x04\x00\x00\x00");
    }

    #[test]
    fn strangers_are_named() {
        let http = Preamble::decode(b"GET / HTTP/1.1\r\n").unwrap_err();
        assert!(http.to_string().contains("HTTP"), "{http}");
        assert_eq!(Preamble::decode(b"GET"), Err(PreambleError::Truncated { got: 3 }));
    }

    #[test]
    fn other_versions_and_roles_are_refused() {
        let mut bytes = Preamble::Control.encode();
        bytes[8] = 2;
        assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Version { major: 2, minor: MINOR }));
        let mut bytes = Preamble::Control.encode();
        bytes[10] = 9;
        assert_eq!(Preamble::decode(&bytes), Ok(Preamble::Control), "a later minor version is compatible");
        for role in [0, 4, 255] {
            let mut bytes = Preamble::Control.encode();
            bytes[12] = role;
            assert!(matches!(Preamble::decode(&bytes), Err(PreambleError::Field { field: "role", .. })));
        }
        let mut bytes = Preamble::Control.encode();
        bytes[14] = 1;
        assert!(matches!(Preamble::decode(&bytes), Err(PreambleError::Field { field: "index", .. })));
    }

    proptest! {
        #[test]
        fn encoding_and_decoding_are_inverse(preamble in any_preamble()) {
            prop_assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }

        #[test]
        fn every_truncation_is_refused(preamble in any_preamble(), length in 0..PREAMBLE_BYTES) {
            let bytes = &preamble.encode()[..length];
            prop_assert_eq!(Preamble::decode(bytes), Err(PreambleError::Truncated { got: length }));
        }

        #[test]
        fn every_extension_is_refused(preamble in any_preamble(), more in proptest::collection::vec(any::<u8>(), 1..9)) {
            let bytes = [&preamble.encode()[..], &more].concat();
            prop_assert!(Preamble::decode(&bytes).is_err());
        }

        #[test]
        fn garbage_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(Preamble::decode(&bytes).is_err());
        }

        #[test]
        fn garbage_after_the_magic_never_panics(rest in any::<[u8; 24]>()) {
            let mut bytes = [0; PREAMBLE_BYTES];
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..].copy_from_slice(&rest);
            let _ = Preamble::decode(&bytes);
        }

        #[test]
        fn answers_are_inverse(status in any::<u16>(), garbage in any::<[u8; ANSWER_BYTES]>()) {
            let mut bytes = encode_answer(Ok(()));
            bytes[12..14].copy_from_slice(&status.to_le_bytes());
            let answer = decode_answer(&bytes).unwrap();
            prop_assert_eq!(encode_answer(answer), bytes);
            if garbage[..8] != MAGIC {
                prop_assert_eq!(decode_answer(&garbage), None);
            }
        }
    }
}
