//! What a claim says, and what the entries of a claim directory are called.
//!
//! A claim is one line of printable ASCII, made to be read by people with `ls -l` as well:
//!
//! ```text
//! godwit1 machine=fw1 n=7 host=kvm1 boot=d2b7… instance=4f31… nonce=00c0ffee00c0ffee
//! ```
//!
//! One more word, `incomplete`, says that the guest goes on there before all of its memory is there (post-copy).

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// The longest claim there is, in bytes; longer texts are not even looked at.
pub const MAX_CLAIM_BYTES: usize = 512;
/// The longest name in a claim, in bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// Format and version, the first word of every claim.
const FORMAT: &str = "godwit1";

/// What is wrong with a claim's text.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ClaimError {
    /// Longer than any claim.
    #[error("{0} bytes are more than a claim has ({MAX_CLAIM_BYTES})")]
    TooLong(usize),
    /// Not of this format.
    #[error("not a claim of format {FORMAT}")]
    Format,
    /// A field is missing, out of order, or says what it must not.
    #[error("field {0:?} is missing or malformed")]
    Field(&'static str),
    /// There is more than a claim.
    #[error("there is something behind the last field")]
    Trailing,
}

/// A name in a claim: 1 to [`MAX_NAME_BYTES`] letters, digits and `._:@+-`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

/// A text that cannot stand in a claim.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not a name of 1 to {MAX_NAME_BYTES} letters, digits and ._:@+-")]
pub struct NameError(String);

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:@+-".contains(&byte);
        match (1..=MAX_NAME_BYTES).contains(&text.len()) && text.bytes().all(allowed) {
            true => Ok(Self(text.into())),
            false => Err(NameError(text.chars().take(MAX_NAME_BYTES + 1).collect())),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, formatter)
    }
}

/// The number of a claim. A machine's first is 1; each is claimed only once the one before it is known to exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(NonZeroU64);

impl Epoch {
    /// A machine's first.
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// Epoch `n`; there is no epoch 0.
    pub fn new(n: u64) -> Option<Self> {
        NonZeroU64::new(n).map(Self)
    }

    /// The number.
    pub fn get(self) -> u64 {
        self.0.get()
    }

    /// The one after it, unless this is the last there can be.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, formatter)
    }
}

/// Tells one attempt to claim from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nonce(pub u64);

impl Nonce {
    /// One that no other attempt has.
    pub fn random() -> Self {
        Self(crate::random::number())
    }
}

/// Who claims: a machine, on a host since its last boot, kept by one process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claimant {
    /// The machine.
    pub machine: Name,
    /// The host: its machine-id, or `--host-id`.
    pub host: Name,
    /// The host's boot id: another one means that every process of that claim is dead.
    pub boot_id: Name,
    /// The process: the name of its lock file.
    pub instance: Name,
}

impl Claimant {
    /// This claimant's claim of an epoch.
    pub fn claim(&self, epoch: Epoch, nonce: Nonce) -> Claim {
        Claim { claimant: self.clone(), epoch, nonce, incomplete: false }
    }
}

/// An epoch of a machine belongs to a claimant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claim {
    /// Whose.
    pub claimant: Claimant,
    /// What.
    pub epoch: Epoch,
    /// By which attempt.
    pub nonce: Nonce,
    /// Whether memory was still to come when the epoch was claimed ([`Marker::Complete`] says that it has).
    pub incomplete: bool,
}

/// The last word of a claim for which memory was still to come.
const INCOMPLETE: &str = "incomplete";

impl fmt::Display for Claim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Claimant { machine, host, boot_id, instance } = &self.claimant;
        write!(
            formatter,
            "{FORMAT} machine={machine} n={} host={host} boot={boot_id} instance={instance} nonce={:016x}",
            self.epoch, self.nonce.0
        )?;
        match self.incomplete {
            true => write!(formatter, " {INCOMPLETE}"),
            false => Ok(()),
        }
    }
}

impl FromStr for Claim {
    type Err = ClaimError;

    /// Accepts exactly what [`Claim`]'s `Display` writes.
    fn from_str(text: &str) -> Result<Self, ClaimError> {
        if text.len() > MAX_CLAIM_BYTES {
            return Err(ClaimError::TooLong(text.len()));
        }
        let mut words = text.split(' ');
        if words.next() != Some(FORMAT) {
            return Err(ClaimError::Format);
        }
        let mut field = |key: &'static str| {
            let value = words.next().and_then(|word| word.strip_prefix(key)?.strip_prefix('='));
            value.ok_or(ClaimError::Field(key))
        };
        let name = |key, value: &str| value.parse().map_err(|_: NameError| ClaimError::Field(key));
        let machine = name("machine", field("machine")?)?;
        let epoch = parse_epoch(field("n")?).ok_or(ClaimError::Field("n"))?;
        let host = name("host", field("host")?)?;
        let boot_id = name("boot", field("boot")?)?;
        let instance = name("instance", field("instance")?)?;
        let nonce = parse_nonce(field("nonce")?).ok_or(ClaimError::Field("nonce"))?;
        let incomplete = match (words.next(), words.next()) {
            (None, _) => false,
            (Some(INCOMPLETE), None) => true,
            (Some(_), _) => return Err(ClaimError::Trailing),
        };
        Ok(Self { claimant: Claimant { machine, host, boot_id, instance }, epoch, nonce, incomplete })
    }
}

/// Decimal without sign or leading zeros.
fn parse_epoch(text: &str) -> Option<Epoch> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| plain).and_then(Epoch::new)
}

/// Exactly 16 lower-case hexadecimal digits.
fn parse_nonce(text: &str) -> Option<Nonce> {
    let plain = text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    u64::from_str_radix(text, 16).ok().filter(|_| plain).map(Nonce)
}

/// What the owner of an epoch adds to its claim.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, strum::Display, strum::EnumString, strum::VariantArray,
)]
#[strum(serialize_all = "kebab-case")]
pub enum Marker {
    /// The guest has run in this epoch.
    Running,
    /// All of its memory is there, in an epoch that was claimed without it.
    Complete,
    /// The machine was ended cleanly in this epoch: anybody may claim the next.
    Free,
}

/// An entry of a claim directory, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EntryName {
    /// `n`
    Claim(Epoch),
    /// `n.running` and the like.
    Marker(Epoch, Marker),
}

impl EntryName {
    /// The entry of that name; `None` for whatever else lies about.
    pub fn parse(name: &str) -> Option<Self> {
        match name.split_once('.') {
            None => parse_epoch(name).map(Self::Claim),
            Some((epoch, marker)) => Some(Self::Marker(parse_epoch(epoch)?, marker.parse().ok()?)),
        }
    }
}

impl fmt::Display for EntryName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claim(epoch) => fmt::Display::fmt(epoch, formatter),
            Self::Marker(epoch, marker) => write!(formatter, "{epoch}.{marker}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names() -> impl Strategy<Value = Name> {
        "[A-Za-z0-9._:@+-]{1,64}".prop_map(|text| text.parse().unwrap())
    }

    fn claims() -> impl Strategy<Value = Claim> {
        let claimant = (names(), names(), names(), names()).prop_map(|(machine, host, boot_id, instance)| Claimant {
            machine,
            host,
            boot_id,
            instance,
        });
        (claimant, 1..=u64::MAX, any::<u64>(), any::<bool>()).prop_map(|(claimant, n, nonce, incomplete)| Claim {
            incomplete,
            ..claimant.claim(Epoch::new(n).unwrap(), Nonce(nonce))
        })
    }

    #[test]
    fn the_text_is_what_the_documentation_says() {
        let text = "godwit1 machine=fw1 n=7 host=kvm1 boot=d2b7 instance=4f31 nonce=00c0ffee00c0ffee";
        let claim: Claim = text.parse().unwrap();
        assert_eq!(claim.epoch.get(), 7);
        assert_eq!(claim.nonce, Nonce(0xc0ffee00c0ffee));
        assert_eq!(claim.to_string(), text);
    }

    #[test]
    fn only_one_text_means_one_claim() {
        let good = "godwit1 machine=m n=7 host=h boot=b instance=i nonce=00000000000000aa";
        assert!(good.parse::<Claim>().is_ok());
        for bad in [
            "",
            "godwit2 machine=m n=7 host=h boot=b instance=i nonce=00000000000000aa",
            "godwit1 machine=m n=07 host=h boot=b instance=i nonce=00000000000000aa",
            "godwit1 machine=m n=+7 host=h boot=b instance=i nonce=00000000000000aa",
            "godwit1 machine=m n=0 host=h boot=b instance=i nonce=00000000000000aa",
            "godwit1 machine=m n=18446744073709551616 host=h boot=b instance=i nonce=00000000000000aa",
            "godwit1 machine= n=7 host=h boot=b instance=i nonce=00000000000000aa",
            "godwit1 machine=m n=7 host=h/x boot=b instance=i nonce=00000000000000aa",
            "godwit1 machine=m n=7 host=h boot=b instance=i nonce=00000000000000AA",
            "godwit1 machine=m n=7 host=h boot=b instance=i nonce=aa",
            "godwit1 machine=m n=7 host=h boot=b instance=i nonce=00000000000000aa complete",
            "godwit1 machine=m n=7 host=h boot=b instance=i nonce=00000000000000aa incomplete ",
            "godwit1 machine=m n=7 host=h boot=b instance=i nonce=00000000000000aa incomplete incomplete",
            "godwit1 machine=m n=7 host=h boot=b instance=i nonce=00000000000000aa\n",
            "godwit1 machine=m  n=7 host=h boot=b instance=i nonce=00000000000000aa",
            "godwit1 n=7 machine=m host=h boot=b instance=i nonce=00000000000000aa",
        ] {
            assert!(bad.parse::<Claim>().is_err(), "{bad}");
        }
    }

    #[test]
    fn hostile_entry_names_are_nobody_s() {
        for name in
            ["0", "01", "-1", "+1", " 1", "1 ", "1.", ".1", "1.free.", "1.Free", "x", "", "1.running~", "..", "٣"]
        {
            assert_eq!(EntryName::parse(name), None, "{name:?}");
        }
        assert_eq!(EntryName::parse("18446744073709551616"), None);
    }

    proptest! {
        #[test]
        fn claims_round_trip_and_are_short(claim in claims()) {
            let text = claim.to_string();
            prop_assert!(text.len() <= MAX_CLAIM_BYTES);
            prop_assert!(text.bytes().all(|byte| (0x20..0x7f).contains(&byte)));
            prop_assert_eq!(text.parse::<Claim>().unwrap(), claim);
        }

        #[test]
        fn invariant_5_any_text_is_refused_or_means_itself(text in "\\PC{0,600}") {
            if let Ok(claim) = text.parse::<Claim>() {
                prop_assert_eq!(claim.to_string(), text);
            }
        }

        #[test]
        fn invariant_5_a_damaged_claim_is_refused_or_means_itself(claim in claims(), at in 0usize..512, byte in 0x20u8..0x7f) {
            let mut text = claim.to_string().into_bytes();
            let at = at % text.len();
            text[at] = byte;
            let text = String::from_utf8(text).unwrap();
            if let Ok(claim) = text.parse::<Claim>() {
                prop_assert_eq!(claim.to_string(), text);
            }
        }

        #[test]
        fn entry_names_round_trip(n in 1..=u64::MAX) {
            let epoch = Epoch::new(n).unwrap();
            let markers = <Marker as strum::VariantArray>::VARIANTS.iter().map(|marker| EntryName::Marker(epoch, *marker));
            for name in markers.chain([EntryName::Claim(epoch)]) {
                prop_assert_eq!(EntryName::parse(&name.to_string()), Some(name));
            }
        }
    }
}
