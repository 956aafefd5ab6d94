//! Where a peer is: parsing and printing of transport URIs.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// The address of a listener.
///
/// [`Display`](fmt::Display) and [`FromStr`] are inverse to each other. QEMU's spellings `tcp:host:port` and
/// `unix:/path` are understood too.
///
/// ```
/// use godwit_transport::Uri;
/// let uri: Uri = "tcp:[::1]:7000".parse()?;
/// assert_eq!(uri.to_string(), "tcp://[::1]:7000");
/// # Ok::<(), godwit_transport::UriError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Uri {
    /// `tcp://host:port`: clear text over TCP.
    Tcp(HostPort),
    /// `quic://host:port[?fp=sha256:HEX]`: encrypted, over UDP.
    Quic {
        /// Where.
        at: HostPort,
        /// The listener's certificate. A dialler needs it; a listener chooses its own.
        fingerprint: Option<Fingerprint>,
    },
    /// `unix:/path`: a unix stream socket on this host.
    Unix(PathBuf),
}

/// A host name or address, and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// A name or an address; IPv6 addresses without brackets.
    pub host: String,
    /// The port; 0 lets the system choose one to listen on.
    pub port: u16,
}

/// The SHA-256 of a certificate in DER form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// What is wrong with the text of a URI. Messages show an example.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UriError {
    /// No known scheme.
    #[error("{text:?} does not begin with a known transport; examples: {EXAMPLES}")]
    UnknownScheme {
        /// The whole text.
        text: String,
    },
    /// A transport that is planned.
    #[error(
        "the transport {scheme}: is not built yet; use quic://host:port (encrypted), tcp://host:port or unix:/path"
    )]
    NotBuiltYet {
        /// Its scheme.
        scheme: &'static str,
    },
    /// The host part is missing or malformed.
    #[error("{text:?}: {host:?} is not a host name or address; example: {example}")]
    Host {
        /// The whole text.
        text: String,
        /// The part that is wrong.
        host: String,
        /// How it should look.
        example: &'static str,
    },
    /// An IPv6 address without brackets.
    #[error("{text:?}: put an IPv6 address in brackets; example: tcp://[fd00::2]:7000")]
    Brackets {
        /// The whole text.
        text: String,
    },
    /// The port is missing or is not a number from 0 to 65535.
    #[error("{text:?}: {port:?} is not a port (0 to 65535); example: {example}")]
    Port {
        /// The whole text.
        text: String,
        /// The part that is wrong.
        port: String,
        /// How it should look.
        example: &'static str,
    },
    /// A parameter that does not exist.
    #[error("{text:?}: unknown parameter {parameter:?}; the only one is quic's fp; example: {QUIC_EXAMPLE}")]
    Parameter {
        /// The whole text.
        text: String,
        /// The part that is wrong.
        parameter: String,
    },
    /// The fingerprint is not `sha256:` and 64 hexadecimal digits.
    #[error(
        "{text:?}: a fingerprint is sha256: and 64 hexadecimal digits, as the receiver prints it; example: {QUIC_EXAMPLE}"
    )]
    Fingerprint {
        /// The whole text.
        text: String,
    },
    /// The path of a unix socket is not absolute, or holds a zero byte.
    #[error("{text:?}: a unix socket needs an absolute path; example: unix:/run/godwit/move.sock")]
    Path {
        /// The whole text.
        text: String,
    },
}

const TCP_EXAMPLE: &str = "tcp://10.0.0.2:7000";
const QUIC_EXAMPLE: &str =
    "quic://10.0.0.2:7000?fp=sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const EXAMPLES: &str = "tcp://10.0.0.2:7000, quic://10.0.0.2:7000, unix:/run/godwit/move.sock";

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let unknown = || UriError::UnknownScheme { text: text.into() };
        let (scheme, rest) = text.split_once(':').ok_or_else(unknown)?;
        // QEMU leaves the slashes out.
        let authority = rest.strip_prefix("//").unwrap_or(rest);
        match scheme {
            "tcp" => Ok(Self::Tcp(HostPort::parse(text, authority, TCP_EXAMPLE)?)),
            "quic" => parse_quic(text, authority),
            "unix" => parse_unix(text, authority),
            "tls" => Err(UriError::NotBuiltYet { scheme: "tls" }),
            "ssh" => Err(UriError::NotBuiltYet { scheme: "ssh" }),
            "stdio" => Err(UriError::NotBuiltYet { scheme: "stdio" }),
            _ => Err(unknown()),
        }
    }
}

fn parse_quic(text: &str, rest: &str) -> Result<Uri, UriError> {
    let (authority, query) = match rest.split_once('?') {
        Some((authority, query)) => (authority, Some(query)),
        None => (rest, None),
    };
    let at = HostPort::parse(text, authority, QUIC_EXAMPLE)?;
    let fingerprint = match query {
        None => None,
        Some(query) => match query.strip_prefix("fp=") {
            None => return Err(UriError::Parameter { text: text.into(), parameter: query.into() }),
            Some(value) => Some(Fingerprint::parse(value).ok_or_else(|| UriError::Fingerprint { text: text.into() })?),
        },
    };
    Ok(Uri::Quic { at, fingerprint })
}

fn parse_unix(text: &str, path: &str) -> Result<Uri, UriError> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(UriError::Path { text: text.into() });
    }
    // Several leading slashes mean the same as one, and would look like `unix://host` when printed.
    Ok(Uri::Unix(PathBuf::from(format!("/{}", path.trim_start_matches('/')))))
}

impl HostPort {
    fn parse(text: &str, authority: &str, example: &'static str) -> Result<Self, UriError> {
        let bad_host = |host: &str| UriError::Host { text: text.into(), host: host.into(), example };
        let bad_port = |port: &str| UriError::Port { text: text.into(), port: port.into(), example };

        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest.split_once(']').ok_or_else(|| bad_host(authority))?;
                if !is_ipv6(host) {
                    return Err(bad_host(host));
                }
                (host, after.strip_prefix(':').ok_or_else(|| bad_port(after))?)
            }
            None => {
                let (host, port) = authority.rsplit_once(':').ok_or_else(|| bad_port(""))?;
                if host.contains(':') {
                    return Err(UriError::Brackets { text: text.into() });
                }
                if !is_host_name(host) {
                    return Err(bad_host(host));
                }
                (host, port)
            }
        };
        // `u16::from_str` takes "+1", a URI does not.
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(bad_port(port));
        }
        Ok(Self { host: host.into(), port: port.parse().map_err(|_| bad_port(port))? })
    }
}

impl From<SocketAddr> for HostPort {
    fn from(address: SocketAddr) -> Self {
        // Without a zone: it is a name of this host's, and a dialler elsewhere has its own.
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

/// Names and IPv4 addresses. What else a name may not be, the resolver knows.
fn is_host_name(host: &str) -> bool {
    !host.is_empty() && host.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

/// An IPv6 address, with a zone (`fe80::1%eth0`) or without.
fn is_ipv6(host: &str) -> bool {
    let (address, zone) = host.split_once('%').unwrap_or((host, "0"));
    address.parse::<Ipv6Addr>().is_ok() && is_host_name(zone)
}

impl Fingerprint {
    fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("sha256:")?.as_bytes();
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let high = char::from(pair[0]).to_digit(16)?;
            let low = char::from(pair[1]).to_digit(16)?;
            *byte = (high << 4 | low) as u8;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(at) => write!(f, "tcp://{at}"),
            Self::Quic { at, fingerprint: None } => write!(f, "quic://{at}"),
            Self::Quic { at, fingerprint: Some(fingerprint) } => write!(f, "quic://{at}?fp={fingerprint}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Uri {
        text.parse().unwrap()
    }

    fn error(text: &str) -> String {
        text.parse::<Uri>().unwrap_err().to_string()
    }

    fn at(host: &str, port: u16) -> HostPort {
        HostPort { host: host.into(), port }
    }

    #[test]
    fn the_usual_spellings() {
        assert_eq!(parse("tcp://10.0.0.2:7000"), Uri::Tcp(at("10.0.0.2", 7000)));
        assert_eq!(parse("tcp:host-b.example:0"), Uri::Tcp(at("host-b.example", 0)));
        assert_eq!(parse("tcp:[fe80::1%eth0]:65535"), Uri::Tcp(at("fe80::1%eth0", 65535)));
        assert_eq!(parse("quic://[::1]:1"), Uri::Quic { at: at("::1", 1), fingerprint: None });
        assert_eq!(parse("unix:/run/a b?c.sock"), Uri::Unix("/run/a b?c.sock".into()));
        assert_eq!(parse("unix:///run/x"), Uri::Unix("/run/x".into()));
    }

    #[test]
    fn fingerprints_in_either_case() {
        let upper = format!("quic://h:1?fp=sha256:{}", "AB".repeat(32));
        assert_eq!(parse(&upper).to_string(), upper.replace("AB", "ab"));
    }

    #[test]
    fn errors_name_the_part_and_show_an_example() {
        for (text, expected) in [
            ("", "tcp://"),
            ("10.0.0.2:7000", "tcp://"),
            ("http://host:80", "tcp://"),
            ("tcp://host", "not a port"),
            ("tcp://host:", "not a port"),
            ("tcp://host:70000", "\"70000\" is not a port"),
            ("tcp://host:+1", "not a port"),
            ("tcp://host:80/", "not a port"),
            ("tcp://:80", "not a host name"),
            ("tcp://a b:80", "not a host name"),
            ("tcp://user@host:80", "not a host name"),
            ("tcp://::1:80", "brackets"),
            ("tcp://[::1:80", "not a host name"),
            ("tcp://[host]:80", "not a host name"),
            ("tcp://[::1]80", "not a port"),
            ("quic://h:1?fp=abc", "64 hexadecimal digits"),
            ("quic://h:1?cert=x", "unknown parameter \"cert=x\""),
            ("unix:run/x", "absolute path"),
            ("unix:", "absolute path"),
            ("unix:/a\0b", "absolute path"),
        ] {
            let message = error(text);
            assert!(message.contains(expected), "{text:?} gave {message:?}");
            assert!(message.contains("example"), "{text:?} gave {message:?}");
        }
        for planned in ["tls://h:1", "ssh://h", "stdio:"] {
            assert!(error(planned).contains("not built yet"));
        }
    }

    fn any_uri() -> impl Strategy<Value = Uri> {
        let host = prop_oneof![
            "[a-z0-9][a-z0-9._-]{0,30}".prop_map(String::from),
            any::<std::net::Ipv4Addr>().prop_map(|ip| ip.to_string()),
            any::<Ipv6Addr>().prop_map(|ip| ip.to_string()),
            any::<Ipv6Addr>().prop_map(|ip| format!("{ip}%eth0")),
        ];
        let at = (host, any::<u16>()).prop_map(|(host, port)| HostPort { host, port });
        prop_oneof![
            at.clone().prop_map(Uri::Tcp),
            (at, any::<Option<[u8; 32]>>()).prop_map(|(at, fp)| Uri::Quic { at, fingerprint: fp.map(Fingerprint) }),
            "(/[^/\0]{1,12}){1,4}".prop_map(|path| Uri::Unix(path.into())),
        ]
    }

    proptest! {
        #[test]
        fn printing_and_parsing_are_inverse(uri in any_uri()) {
            prop_assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
        }

        #[test]
        fn whatever_parses_prints_and_parses_to_the_same(text in "(tcp|quic|unix):(//)?[\\PC]{0,40}") {
            if let Ok(uri) = text.parse::<Uri>() {
                prop_assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
            }
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = text.parse::<Uri>();
        }
    }
}
