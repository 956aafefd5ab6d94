//! Bandwidths and times with their units, as people write them: `1Gbit`, `100M/s`, `50ms`.
//!
//! Link speeds are decimal bits per second (`1Gbit`), byte rates are binary (`100M/s`), times carry `ms` or `s`. A
//! number without a unit is refused: what was meant cannot be told. (Sizes of memory: `godwit_vmm::config::ByteSize`.)

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Bytes per second, written as bits (`1Gbit`) or as bytes (`100M/s`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bandwidth {
    /// Never zero.
    pub bytes_per_s: u64,
}

/// A length of time, written `50ms` or `1.5s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// A value or the word `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrNone<T>(pub Option<T>);

/// Why a text is not the quantity that it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// There is no number at the start.
    #[error("`{text}` does not start with a number; examples: {examples}")]
    NoNumber {
        /// What was given.
        text: String,
        /// How it is written.
        examples: &'static str,
    },
    /// There is a number and nothing after it.
    #[error("`{text}` has no unit; examples: {examples}")]
    NoUnit {
        /// What was given.
        text: String,
        /// How it is written.
        examples: &'static str,
    },
    /// The unit is not one that fits here.
    #[error("`{unit}` in `{text}` is not a unit known here; examples: {examples}")]
    UnknownUnit {
        /// What was given.
        text: String,
        /// The part after the number.
        unit: String,
        /// How it is written.
        examples: &'static str,
    },
    /// The number is too large, or too small to be anything at all.
    #[error("`{text}` is out of range")]
    OutOfRange {
        /// What was given.
        text: String,
    },
}

const BANDWIDTH_EXAMPLES: &str = "1Gbit, 500Mbit (decimal bits per second), 100M/s, 1GiB/s (binary bytes per second)";
const SPAN_EXAMPLES: &str = "50ms, 5s";

const BINARY_PREFIXES: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl FromStr for Bandwidth {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let number = Number::parse(text, BANDWIDTH_EXAMPLES)?;
        let bytes_per_s = if let Some(unit) = number.unit.strip_suffix("/s").and_then(binary_unit) {
            number.times(unit, 1)?
        } else {
            let bits = number.unit.strip_suffix("/s").unwrap_or(number.unit);
            number.times(decimal_bits(bits).ok_or_else(|| number.unknown_unit())?, 8)?
        };
        match bytes_per_s {
            0 => Err(UnitError::OutOfRange { text: text.to_owned() }),
            _ => Ok(Bandwidth { bytes_per_s }),
        }
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u128::from(self.bytes_per_s) * 8;
        for (name, unit) in [("Gbit", 1_000_000_000), ("Mbit", 1_000_000), ("kbit", 1_000)] {
            if bits.is_multiple_of(unit) {
                return write!(f, "{}{name}", bits / unit);
            }
        }
        match largest_exact_prefix(self.bytes_per_s) {
            Some((prefix, shift)) => write!(f, "{}{prefix}/s", self.bytes_per_s >> shift),
            None => write!(f, "{}B/s", self.bytes_per_s),
        }
    }
}

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let number = Number::parse(text, SPAN_EXAMPLES)?;
        let unit_ns = match number.unit {
            "us" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            _ => return Err(number.unknown_unit()),
        };
        Ok(Span(Duration::from_nanos(number.times(unit_ns, 1)?)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = self.0.as_micros();
        match us {
            _ if us.is_multiple_of(1_000_000) => write!(f, "{}s", us / 1_000_000),
            _ if us.is_multiple_of(1_000) => write!(f, "{}ms", us / 1_000),
            _ => write!(f, "{us}us"),
        }
    }
}

impl<T: FromStr> FromStr for OrNone<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        match text {
            "none" => Ok(OrNone(None)),
            _ => text.parse().map(|value| OrNone(Some(value))),
        }
    }
}

impl<T: fmt::Display> fmt::Display for OrNone<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("none"),
        }
    }
}

/// Bytes for a person to read, to three digits or so: `1.23 GiB`.
pub fn approximate_bytes(bytes: f64) -> String {
    let mut value = bytes;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            let digits = if unit == "B" || value >= 100.0 { 0 } else { 1 };
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.2} TiB")
}

/// A rate for a person to read, in decimal bits as links are sold: `941 Mbit/s`.
pub fn approximate_rate(bytes_per_s: f64) -> String {
    let mut value = bytes_per_s * 8.0;
    for unit in ["bit/s", "kbit/s", "Mbit/s"] {
        if value < 1000.0 {
            return format!("{value:.0} {unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.2} Gbit/s")
}

/// Milliseconds for a person to read: `4.3 ms`, `12.4 s`.
pub fn approximate_ms(ms: f64) -> String {
    match ms {
        _ if ms < 100.0 => format!("{ms:.1} ms"),
        _ if ms < 10_000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1000.0),
    }
}

/// A decimal number, kept exact, and what follows it.
struct Number<'a> {
    text: &'a str,
    /// The digits without the point.
    digits: u128,
    /// Ten to the number of digits after the point.
    scale: u128,
    unit: &'a str,
    examples: &'static str,
}

impl<'a> Number<'a> {
    /// More digits than this are refused: with them no product below can overflow.
    const MAX_DIGITS: usize = 20;

    fn parse(text: &'a str, examples: &'static str) -> Result<Self, UnitError> {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
            return Err(UnitError::NoNumber { text: text.to_owned(), examples });
        }
        let unit = unit.trim_start();
        if unit.is_empty() {
            return Err(UnitError::NoUnit { text: text.to_owned(), examples });
        }
        let out_of_range = || UnitError::OutOfRange { text: text.to_owned() };
        if whole.len() + fraction.len() > Self::MAX_DIGITS {
            return Err(out_of_range());
        }
        let digits = format!("{whole}{fraction}").parse().map_err(|_| out_of_range())?;
        Ok(Number { text, digits, scale: 10u128.pow(fraction.len() as u32), unit, examples })
    }

    /// The number times `unit` divided by `divisor`, rounded down.
    fn times(&self, unit: u64, divisor: u128) -> Result<u64, UnitError> {
        self.digits
            .checked_mul(u128::from(unit))
            .and_then(|product| u64::try_from(product / (self.scale * divisor)).ok())
            .ok_or_else(|| UnitError::OutOfRange { text: self.text.to_owned() })
    }

    fn unknown_unit(&self) -> UnitError {
        UnitError::UnknownUnit { text: self.text.to_owned(), unit: self.unit.to_owned(), examples: self.examples }
    }
}

/// `G` or `GiB` and the like, in bytes. `GB` is not accepted: it means either.
fn binary_unit(unit: &str) -> Option<u64> {
    if unit == "B" {
        return Some(1);
    }
    let mut letters = unit.chars();
    let prefix = letters.next()?.to_ascii_uppercase();
    let shift = BINARY_PREFIXES.iter().find(|(letter, _)| *letter == prefix)?.1;
    matches!(letters.as_str(), "" | "B" | "iB").then_some(1 << shift)
}

/// `Gbit` and the like, in bits.
fn decimal_bits(unit: &str) -> Option<u64> {
    match unit {
        "bit" => Some(1),
        "kbit" | "Kbit" => Some(1_000),
        "Mbit" => Some(1_000_000),
        "Gbit" => Some(1_000_000_000),
        _ => None,
    }
}

fn largest_exact_prefix(bytes: u64) -> Option<(char, u32)> {
    BINARY_PREFIXES.into_iter().rev().find(|(_, shift)| bytes >> shift != 0 && bytes.trailing_zeros() >= *shift)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bandwidth(text: &str) -> Result<u64, UnitError> {
        text.parse::<Bandwidth>().map(|bandwidth| bandwidth.bytes_per_s)
    }

    fn span(text: &str) -> Result<Duration, UnitError> {
        text.parse::<Span>().map(|span| span.0)
    }

    #[test]
    fn link_speeds_are_decimal_bits_and_byte_rates_are_binary() {
        assert_eq!(bandwidth("1Gbit"), Ok(125_000_000));
        assert_eq!(bandwidth("500Mbit"), Ok(62_500_000));
        assert_eq!(bandwidth("2.5Gbit/s"), Ok(312_500_000));
        assert_eq!(bandwidth("100M/s"), Ok(100 << 20));
        assert_eq!(bandwidth("1GiB/s"), Ok(1 << 30));
        assert_eq!(bandwidth("2GB/s"), Ok(2 << 30), "as everywhere, G is 2^30");
    }

    #[test]
    fn times_carry_their_unit() {
        assert_eq!(span("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(span("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(span("0s"), Ok(Duration::ZERO));
    }

    #[test]
    fn mistakes_are_told_apart() {
        assert!(matches!(bandwidth("512"), Err(UnitError::NoUnit { .. })));
        assert!(matches!(bandwidth("Gbit"), Err(UnitError::NoNumber { .. })));
        assert!(matches!(bandwidth("-1Gbit"), Err(UnitError::NoNumber { .. })));
        assert!(matches!(bandwidth("1.Gbit"), Err(UnitError::NoNumber { .. })));
        assert!(matches!(bandwidth("99999999T/s"), Err(UnitError::OutOfRange { .. })));
        assert!(matches!(bandwidth("1G"), Err(UnitError::UnknownUnit { .. })));
        assert!(matches!(bandwidth("0Gbit"), Err(UnitError::OutOfRange { .. })));
        assert!(matches!(span("50"), Err(UnitError::NoUnit { .. })));
        assert!(matches!(span("1h"), Err(UnitError::UnknownUnit { .. })));
        assert!(bandwidth("1G").is_err_and(|error| error.to_string().contains("1Gbit")));
    }

    #[test]
    fn none_is_a_value_of_its_own() {
        assert_eq!("none".parse(), Ok(OrNone::<Bandwidth>(None)));
        assert_eq!("1Gbit".parse(), Ok(OrNone(Some(Bandwidth { bytes_per_s: 125_000_000 }))));
    }

    proptest! {
        #[test]
        fn what_is_displayed_is_read_back(value in 1u64.., shift in 0u32..60) {
            let value = (value >> shift).max(1);
            let bandwidth = Bandwidth { bytes_per_s: value };
            prop_assert_eq!(bandwidth.to_string().parse(), Ok(bandwidth));
            let span = Span(Duration::from_micros(value >> 12));
            prop_assert_eq!(span.to_string().parse(), Ok(span));
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = (bandwidth(&text), span(&text));
        }

        #[test]
        fn no_number_panics(text in "[0-9]{0,40}\\.?[0-9]{0,40}(T|TiB|Gbit|G/s|s|ms|B)") {
            let _ = (bandwidth(&text), span(&text));
        }
    }
}
