//! Hardware addresses.

use std::fmt;
use std::str::FromStr;

/// The address of an Ethernet interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MacAddress(pub(crate) [u8; 6]);

impl MacAddress {
    /// Every interface.
    pub(super) const BROADCAST: MacAddress = MacAddress([0xff; 6]);

    /// Whether it names a group and not one interface.
    pub(crate) fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A text that no interface can have as its address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not the hardware address of an interface: use six pairs of hexadecimal digits, such as 52:54:00:12:34:56"
)]
pub(crate) struct ParseMacError(String);

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let failed = || ParseMacError(text.to_owned());
        let pairs: Vec<&str> = text.split(':').collect();
        let pairs: [&str; 6] = pairs.try_into().map_err(|_| failed())?;
        let mut address = [0; 6];
        for (byte, pair) in address.iter_mut().zip(pairs) {
            let is_pair = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(pair, 16).ok().filter(|_| is_pair).ok_or_else(failed)?;
        }
        let address = MacAddress(address);
        if address.is_multicast() || address.0 == [0; 6] { Err(failed()) } else { Ok(address) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_single_interfaces_are_read() {
        for text in ["52:54:00:12:34:56", "00:00:00:00:00:01", "fe:ff:ff:ff:ff:ff"] {
            assert_eq!(text.parse::<MacAddress>().unwrap().to_string(), text);
        }
        assert_eq!("AA:bb:00:11:22:33".parse::<MacAddress>().unwrap().0, [0xaa, 0xbb, 0, 0x11, 0x22, 0x33]);
    }

    #[test]
    fn anything_else_is_refused() {
        let wrong = [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52-54-00-12-34-56",
            "5:54:00:12:34:56",
            "+5:54:00:12:34:56",
            "zz:54:00:12:34:56",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ];
        for text in wrong {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }
}
