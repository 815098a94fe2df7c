//! Host names and authorities, parsed once into types that cannot be wrong.
//!
//! Every comparison between a CONNECT target, an SNI, a `Host` and an `:authority` is made on these types, so the
//! same name in another spelling (case, trailing dot, default port) gets the same verdict everywhere.

use std::borrow::Borrow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use url::Url;

/// A DNS name in its one canonical spelling: lower-case A-labels, no trailing dot.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Arc<str>);

impl HostName {
    /// The name, as it goes on the wire.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Looked up by its text: both hash alike, for one is the other.
impl Borrow<str> for HostName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = HostError;

    /// Parses a DNS name; an IP address is an error here.
    fn from_str(text: &str) -> Result<Self, HostError> {
        match text.parse()? {
            Host::Name(name) => Ok(name),
            Host::Ip(_) => Err(HostError::NotAName),
        }
    }
}

/// What stands before the port: a name or a literal address.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    /// A DNS name.
    Name(HostName),
    /// An IPv4 or IPv6 address, without a zone.
    Ip(IpAddr),
}

impl FromStr for Host {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or(HostError::Brackets)?;
            let ip = inner.parse::<Ipv6Addr>().map_err(|_| HostError::Brackets)?;
            return Ok(Host::Ip(canonical(IpAddr::V6(ip))));
        }
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return Err(HostError::Empty);
        }
        if looks_numeric(text) {
            // `127.1`, `0x7f.1` and `2130706433` mean 127.0.0.1 to some resolvers and nothing to others.
            let ip = text.parse::<Ipv4Addr>().map_err(|_| HostError::Numeric)?;
            return Ok(Host::Ip(ip.into()));
        }
        name(text).map(Host::Name)
    }
}

/// A host and a port: the one thing that is matched, dialled, and named in TLS and in `Host`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Authority {
    /// The name or address.
    pub host: Host,
    /// The port, never 0.
    pub port: u16,
}

impl Authority {
    /// Puts a host and a port together.
    pub fn new(host: Host, port: u16) -> Self {
        Self { host, port }
    }

    /// Parses `host:port`, or `host` alone when a default is given (RFC 9110 section 4.2.2).
    ///
    /// # Errors
    /// Anything that two parsers could read differently: userinfo, an empty or odd port, brackets around a name, an
    /// IPv6 zone, a byte outside ASCII.
    pub fn parse(text: &str, default_port: Option<u16>) -> Result<Self, HostError> {
        if text.contains('@') {
            return Err(HostError::Userinfo);
        }
        let (host, port) = split(text)?;
        let port = match port {
            Some(port) => parse_port(port)?,
            None => default_port.ok_or(HostError::NoPort)?,
        };
        Ok(Self { host: host.parse()?, port })
    }

    /// Whether a text is its own plain spelling, with its port or without. Others may mean it too: [`Authority::parse`].
    pub fn is_plainly(&self, text: &str) -> bool {
        let Host::Name(name) = &self.host else { return false };
        match text.strip_prefix(name.as_str()) {
            Some("") => true,
            Some(rest) => rest.strip_prefix(':').is_some_and(|port| parse_port(port) == Ok(self.port)),
            None => false,
        }
    }

    /// The spelling for a `Host` header of a URL with this default port (no `:443` on https).
    pub fn without_default(&self, default_port: u16) -> String {
        if self.port == default_port { self.host.to_string() } else { self.to_string() }
    }
}

/// Why a host or an authority was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Nothing there.
    #[error("the host is empty")]
    Empty,
    /// `user@host`.
    #[error("a host must not carry userinfo")]
    Userinfo,
    /// `host` where `host:port` is needed.
    #[error("the port is missing")]
    NoPort,
    /// `host:`, `host:0`, `host:99999`, `host:+1`.
    #[error("the port is not a number from 1 to 65535")]
    Port,
    /// `[name]`, `[::1`, `[fe80::1%eth0]`, or an IPv6 address without brackets.
    #[error("brackets belong around an IPv6 address without a zone, and nowhere else")]
    Brackets,
    /// `127.1`, `0x7f.1`.
    #[error("an IPv4 address is written as four decimal numbers")]
    Numeric,
    /// A character that no host name has.
    #[error("a host name has only letters, digits, `-`, `_` and `.`; write an international name as its `xn--` form")]
    Character,
    /// An empty or overlong label, or one that begins or ends with `-`.
    #[error("a label of the host name is empty, longer than 63, or begins or ends with `-`")]
    Label,
    /// An `xn--` label that decodes to nothing valid.
    #[error("an `xn--` label of the host name is not valid")]
    Punycode,
    /// Longer than 253.
    #[error("the host name is longer than 253 characters")]
    Long,
    /// An address where a name is needed.
    #[error("an IP address is not a host name")]
    NotAName,
}

/// Whether a URL leads to this very machine.
pub fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

fn name(text: &str) -> Result<HostName, HostError> {
    if text.len() > 253 {
        return Err(HostError::Long);
    }
    if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        return Err(HostError::Character);
    }
    let lower = text.to_ascii_lowercase();
    for label in lower.split('.') {
        if label.is_empty() || label.len() > 63 || label.starts_with('-') || label.ends_with('-') {
            return Err(HostError::Label);
        }
        // The url crate applies UTS 46 to such labels, and it must leave a canonical one as it is.
        if label.starts_with("xn--") && !matches!(url::Host::parse(label), Ok(url::Host::Domain(d)) if d == label) {
            return Err(HostError::Punycode);
        }
    }
    Ok(HostName(lower.into()))
}

/// The WHATWG rule for "ends in a number": the last label is all digits or hexadecimal.
fn looks_numeric(text: &str) -> bool {
    let last = text.rsplit('.').next().unwrap_or(text);
    let hex = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    match hex {
        Some(hex) => hex.bytes().all(|b| b.is_ascii_hexdigit()),
        None => !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()),
    }
}

fn split(text: &str) -> Result<(&str, Option<&str>), HostError> {
    if text.starts_with('[') {
        let end = text.find(']').ok_or(HostError::Brackets)?;
        let (host, rest) = text.split_at(end + 1);
        return match rest.strip_prefix(':') {
            Some(port) => Ok((host, Some(port))),
            None if rest.is_empty() => Ok((host, None)),
            None => Err(HostError::Brackets),
        };
    }
    match text.split_once(':') {
        Some((_, port)) if port.contains(':') => Err(HostError::Brackets),
        Some((host, port)) => Ok((host, Some(port))),
        None => Ok((text, None)),
    }
}

fn parse_port(text: &str) -> Result<u16, HostError> {
    if text.is_empty() || text.len() > 5 || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(HostError::Port);
    }
    text.parse().ok().filter(|port| *port != 0).ok_or(HostError::Port)
}

/// `::ffff:127.0.0.1` is 127.0.0.1: whoever compares or refuses addresses must see one of them.
fn canonical(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Name(name) => name.fmt(f),
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Host::Ip(IpAddr::V4(ip)) => ip.fmt(f),
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority(text: &str) -> Result<String, HostError> {
        Authority::parse(text, Some(443)).map(|a| a.to_string())
    }

    #[test]
    fn a_plain_spelling_is_known_without_parsing() {
        let authority = Authority::parse("api.test:8443", None).unwrap();
        for (text, plain) in [
            ("api.test", true),
            ("api.test:8443", true),
            ("api.test:443", false),
            ("api.test:+8443", false),
            ("api.test:", false),
            ("api.test.", false),
            ("API.test", false),
            ("api.test8443", false),
            ("my.api.test", false),
            ("", false),
        ] {
            assert_eq!(authority.is_plainly(text), plain, "{text}");
            assert!(!plain || Authority::parse(text, Some(8443)) == Ok(authority.clone()), "{text}");
        }
    }

    #[test]
    fn one_host_in_many_spellings_is_one_host() {
        // SEC-015, SEC-017, SEC-020
        for text in ["api.test", "API.Test", "api.test.", "api.test:443", "API.TEST.:443"] {
            assert_eq!(authority(text).as_deref(), Ok("api.test:443"), "{text}");
        }
        assert_eq!(authority("api.test:8443").as_deref(), Ok("api.test:8443"));
        assert_eq!(authority("xn--bcher-kva.test").as_deref(), Ok("xn--bcher-kva.test:443"));
    }

    #[test]
    fn addresses_are_addresses_in_one_spelling_only() {
        // SEC-019
        assert_eq!(authority("127.0.0.1").as_deref(), Ok("127.0.0.1:443"));
        assert_eq!(authority("[::1]:80").as_deref(), Ok("[::1]:80"));
        assert_eq!(authority("[::ffff:127.0.0.1]").as_deref(), Ok("127.0.0.1:443"));
        for text in ["127.1", "0x7f.1", "2130706433", "0177.0.0.1", "1.2.3.4.5", "api.0x7f"] {
            assert_eq!(authority(text), Err(HostError::Numeric), "{text}");
        }
    }

    #[test]
    fn what_two_parsers_could_read_differently_is_refused() {
        // SEC-011, SEC-016, SEC-018, SEC-019
        use HostError::*;
        for (text, error) in [
            ("", Empty),
            (".", Empty),
            ("api.test:x@evil.test", Userinfo),
            ("api.test@evil.test", Userinfo),
            ("evil.test#@api.test", Userinfo),
            ("evil.test#", Character),
            ("api.test:", Port),
            ("api.test:0", Port),
            ("api.test:+443", Port),
            ("api.test:99999", Port),
            ("api.test:4 3", Port),
            ("[api.test]:443", Brackets),
            ("[[api.test]]:443", Brackets),
            ("[::1", Brackets),
            ("[::1]443", Brackets),
            ("[fe80::1%eth0]:443", Brackets),
            ("::1", Brackets),
            ("api\u{3002}test", Character),
            ("\u{ff41}pi.test", Character),
            ("api%2etest", Character),
            ("api.test\u{212a}", Character),
            ("api test", Character),
            ("api..test", Label),
            ("-api.test", Label),
            ("api.test..", Label),
            ("xn--a.test", Punycode),
            ("xn--.test", Label),
        ] {
            assert_eq!(authority(text), Err(error), "{text}");
        }
        assert_eq!(Authority::parse("api.test", None), Err(NoPort));
    }

    proptest::proptest! {
        #[test]
        fn what_parses_prints_as_what_parses_the_same(text in "[a-zA-Z0-9.:@\\[\\]_-]{0,40}") {
            if let Ok(first) = Authority::parse(&text, Some(443)) {
                let again = Authority::parse(&first.to_string(), None);
                proptest::prop_assert_eq!(again, Ok(first));
            }
        }
    }
}
