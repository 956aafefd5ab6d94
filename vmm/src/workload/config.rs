//! What the workload guest is asked to do.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What the workload guest (`--guest writer`) is asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WriterConfig {
    /// Memory that is rewritten over and over, in bytes (rounded up to whole pages).
    pub working_set_bytes: u64,
    /// Memory that is filled with contents at boot, in bytes (rounded up to whole pages). The
    /// working set is the first part of it; pages of the working set beyond it start as zeros.
    pub fill_bytes: u64,
    /// Page writes per second, the total over all vCPUs.
    pub rate: Rate,
    /// In which order the pages of the working set are written.
    pub order: Order,
    /// How much of a page one write changes.
    pub write: WriteUnit,
    /// What pages hold.
    pub contents: Contents,
    /// Seed of contents and orders.
    pub seed: u64,
    /// vCPUs that write: the first so many. The others only wait. 0: all of them write.
    pub writers: u32,
}

impl Default for WriterConfig {
    fn default() -> Self {
        Self {
            working_set_bytes: 64 << 20,
            fill_bytes: 0,
            rate: Rate::PagesPerSecond(10_000),
            order: Order::Random,
            write: WriteUnit::Page,
            contents: Contents::Random,
            seed: 1,
            writers: 0,
        }
    }
}

/// Page writes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// This many; zero keeps the guest running without writing.
    PagesPerSecond(u64),
    /// As many as the vCPUs can.
    Max,
}

/// In which order the pages of the working set are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// First to last, then again.
    Seq,
    /// Uniformly at random.
    Random,
    /// 90 % of the writes go to 10 % of the pages.
    HotCold,
}

/// How much of a page one write changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WriteUnit {
    /// One 64-bit word.
    Word,
    /// All 512 words.
    Page,
}

/// What pages hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contents {
    /// Incompressible pseudo-random words.
    Random,
    /// Words of low entropy: about 4:1 or better under zstd level 1.
    Compressible,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rate::PagesPerSecond(rate) => write!(f, "{rate}"),
            Rate::Max => f.write_str("max"),
        }
    }
}

/// A rate that is neither a number of pages per second nor `max`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a rate: give a number of pages per second, or `max`")]
pub struct ParseRateError(String);

impl FromStr for Rate {
    type Err = ParseRateError;

    fn from_str(text: &str) -> Result<Self, ParseRateError> {
        if text == "max" {
            return Ok(Rate::Max);
        }
        text.parse().map(Rate::PagesPerSecond).map_err(|_| ParseRateError(text.to_owned()))
    }
}

/// One of the writer's choices that was not one of its names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not one of: {choices}")]
pub struct ParseChoiceError {
    given: String,
    choices: &'static str,
}

/// Names of a choice, in both directions.
macro_rules! names {
    ($choice:ident, $list:literal, $($variant:ident = $name:literal),+) => {
        impl fmt::Display for $choice {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($choice::$variant => $name),+ })
            }
        }

        impl FromStr for $choice {
            type Err = ParseChoiceError;

            fn from_str(text: &str) -> Result<Self, ParseChoiceError> {
                match text {
                    $($name => Ok($choice::$variant),)+
                    _ => Err(ParseChoiceError { given: text.to_owned(), choices: $list }),
                }
            }
        }
    };
}

names!(Order, "seq, random, hot-cold", Seq = "seq", Random = "random", HotCold = "hot-cold");
names!(WriteUnit, "word, page", Word = "word", Page = "page");
names!(Contents, "random, compressible", Random = "random", Compressible = "compressible");

// In files a rate is a number or the string "max".
impl Serialize for Rate {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Rate::PagesPerSecond(rate) => serializer.serialize_u64(*rate),
            Rate::Max => serializer.serialize_str("max"),
        }
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum NumberOrText {
            Number(u64),
            Text(String),
        }
        match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Number(rate) => Ok(Rate::PagesPerSecond(rate)),
            NumberOrText::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}
