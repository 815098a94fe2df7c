//! A company's own proxies: how they are named, and which destinations are reached through them.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::HeaderValue;
use percent_encoding::percent_decode_str;
use url::Url;
use zeroize::Zeroizing;

use crate::host::{Authority, Host, HostError, HostName};
use crate::secret::Secret;

/// Which proxy leads where. The default is none, to anywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    /// For TLS and for blind tunnels.
    pub tunnels: Option<UpstreamProxy>,
    /// For what is spoken in the clear.
    pub plain: Option<UpstreamProxy>,
    /// What is reached without one.
    pub direct: Vec<NoProxy>,
}

impl Proxies {
    /// The proxy that leads to a destination, if it is not reached directly. This very machine always is.
    pub fn to(&self, to: &Authority, plaintext: bool) -> Option<&UpstreamProxy> {
        let proxy = if plaintext { &self.plain } else { &self.tunnels };
        proxy.as_ref().filter(|_| !is_here(&to.host) && !self.direct.iter().any(|direct| direct.covers(to)))
    }

    /// Each proxy once.
    pub fn all(&self) -> impl Iterator<Item = &UpstreamProxy> {
        let plain = self.plain.as_ref().filter(|plain| self.tunnels.as_ref() != Some(plain));
        self.tunnels.iter().chain(plain)
    }
}

/// An HTTP proxy, and who we are to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamProxy {
    /// Its name and port.
    pub authority: Authority,
    /// Whether it is spoken to with TLS.
    pub tls: bool,
    /// The value of `Proxy-Authorization` (RFC 7617 section 2).
    credentials: Option<Secret>,
}

impl UpstreamProxy {
    /// What it is to be shown, for nobody else to see.
    pub(super) fn authorization(&self) -> Option<HeaderValue> {
        // It is base64, which any field may hold.
        let mut value = HeaderValue::from_str(self.credentials.as_ref()?.expose()).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Whether its URL holds a secret.
    pub fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }

    /// Whether it is one of these listeners of our own, as far as its name alone says so.
    pub fn is_one_of(&self, own: &[SocketAddr]) -> bool {
        let named = |own: &IpAddr| match &self.authority.host {
            Host::Ip(ip) => ip == own || own.is_unspecified() && ip.is_loopback(),
            Host::Name(_) => is_here(&self.authority.host) && (own.is_loopback() || own.is_unspecified()),
        };
        own.iter().any(|own| own.port() == self.authority.port && named(&own.ip().to_canonical()))
    }
}

impl FromStr for UpstreamProxy {
    type Err = ProxyUrlError;

    /// Reads a URL. No error shows any of it: there may be a password in it.
    fn from_str(text: &str) -> Result<Self, ProxyUrlError> {
        let (scheme, _) = text.split_once("://").ok_or(ProxyUrlError::NotAUrl)?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            socks if socks.starts_with("socks") => return Err(ProxyUrlError::Socks),
            _ => return Err(ProxyUrlError::Scheme),
        };
        if !text.bytes().all(|b| b.is_ascii_graphic() && b != b'\\') {
            return Err(ProxyUrlError::NotAUrl);
        }
        let url = Url::parse(text).map_err(|_| ProxyUrlError::NotAUrl)?;
        // The end of a password that holds a `/` looks like a path.
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(ProxyUrlError::Longer);
        }
        let host = url.host_str().unwrap_or_default().parse().map_err(ProxyUrlError::Host)?;
        let port = url.port_or_known_default().filter(|port| *port != 0);
        let port = port.ok_or(ProxyUrlError::Host(HostError::Port))?;
        Ok(Self { authority: Authority::new(host, port), tls, credentials: basic(&url)? })
    }
}

/// The URL's user name and password as RFC 7617 section 2 has them.
fn basic(url: &Url) -> Result<Option<Secret>, ProxyUrlError> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(None);
    }
    let user: Vec<u8> = percent_decode_str(url.username()).collect();
    let password = Zeroizing::new(percent_decode_str(url.password().unwrap_or_default()).collect::<Vec<u8>>());
    if user.contains(&b':') || user.iter().chain(password.iter()).any(u8::is_ascii_control) {
        return Err(ProxyUrlError::Credentials);
    }
    let both = Zeroizing::new([&user[..], b":", &password].concat());
    let encoded = Zeroizing::new(BASE64_STANDARD.encode(&*both));
    Ok(Some(Secret::new(format!("Basic {}", &*encoded))))
}

/// Why a text names no proxy that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProxyUrlError {
    /// It is not a URL.
    #[error("this is not the URL of a proxy, as in `http://proxy.example.com:3128`")]
    NotAUrl,
    /// `socks5://` and the like.
    #[error("a SOCKS proxy cannot be used")]
    Socks,
    /// Neither `http://` nor `https://`.
    #[error("only `http://` and `https://` proxies can be used")]
    Scheme,
    /// A path, a query or a fragment.
    #[error("the URL of a proxy ends with its port")]
    Longer,
    /// The host or the port cannot be one.
    #[error("{0}")]
    Host(HostError),
    /// A user name with a `:`, or control characters.
    #[error("there is a `:` in the user name, or a control character in it or in the password")]
    Credentials,
}

impl ProxyUrlError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            ProxyUrlError::Socks | ProxyUrlError::Scheme => {
                Some("name an HTTP proxy, as in `http://proxy.example.com:3128`")
            }
            ProxyUrlError::NotAUrl | ProxyUrlError::Longer => {
                Some("in a user name or a password, write `/` as `%2F`, `#` as `%23`, `?` as `%3F`, `%` as `%25`")
            }
            ProxyUrlError::Host(_) => None,
            ProxyUrlError::Credentials => Some("Basic credentials (RFC 7617) have neither"),
        }
    }
}

/// Destinations that are reached without a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoProxy {
    which: Which,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Which {
    All,
    /// The name and all below it.
    Domain(HostName),
    /// Only what is below it.
    Below(HostName),
    Network {
        ip: IpAddr,
        prefix: u8,
    },
}

impl NoProxy {
    /// Whether a destination is one of them. A name is not looked up for it.
    pub fn covers(&self, to: &Authority) -> bool {
        let host = match (&self.which, &to.host) {
            (Which::All, _) => true,
            (Which::Domain(domain), Host::Name(name)) => name == domain || is_below(name, domain),
            (Which::Below(domain), Host::Name(name)) => is_below(name, domain),
            (Which::Network { ip, prefix }, Host::Ip(to)) => is_within(*ip, *prefix, *to),
            _ => false,
        };
        host && self.port.is_none_or(|port| port == to.port)
    }
}

impl FromStr for NoProxy {
    type Err = NoProxyError;

    /// Reads what curl's NO_PROXY has, and besides a port, and `*.` for what is only below a name.
    fn from_str(text: &str) -> Result<Self, NoProxyError> {
        if text == "*" {
            return Ok(Self { which: Which::All, port: None });
        }
        if let Some((ip, prefix)) = text.split_once('/') {
            return network(ip, Some(prefix));
        }
        if text.parse::<IpAddr>().is_ok() {
            return network(text, None);
        }
        let (only_below, text) = match text.strip_prefix("*.") {
            Some(text) => (true, text),
            None => (false, text.strip_prefix('.').unwrap_or(text)),
        };
        let (host, port) = match Authority::parse(text, None) {
            Ok(Authority { host, port }) => (host, Some(port)),
            Err(HostError::NoPort) => (text.parse().map_err(|_| NoProxyError)?, None),
            Err(_) => return Err(NoProxyError),
        };
        let which = match host {
            Host::Name(name) if only_below => Which::Below(name),
            Host::Name(name) => Which::Domain(name),
            Host::Ip(_) if only_below => return Err(NoProxyError),
            Host::Ip(ip) => Which::Network { ip, prefix: bits(ip) },
        };
        Ok(Self { which, port })
    }
}

fn network(ip: &str, prefix: Option<&str>) -> Result<NoProxy, NoProxyError> {
    let ip = ip.parse::<IpAddr>().map_err(|_| NoProxyError)?.to_canonical();
    let prefix = match prefix {
        Some(prefix) => prefix.parse().ok().filter(|prefix| *prefix <= bits(ip)).ok_or(NoProxyError)?,
        None => bits(ip),
    };
    Ok(NoProxy { which: Which::Network { ip, prefix }, port: None })
}

/// The text names no destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no host name, address or network")]
pub struct NoProxyError;

fn bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn is_within(network: IpAddr, prefix: u8, ip: IpAddr) -> bool {
    let left_aligned = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
        IpAddr::V6(ip) => u128::from(ip),
    };
    let differing = left_aligned(network) ^ left_aligned(ip);
    network.is_ipv4() == ip.is_ipv4() && differing.leading_zeros() >= u32::from(prefix)
}

fn is_below(name: &HostName, domain: &HostName) -> bool {
    name.as_str().strip_suffix(domain.as_str()).is_some_and(|rest| rest.ends_with('.'))
}

/// Whether a host is this very machine, whoever is asked.
fn is_here(host: &Host) -> bool {
    match host {
        Host::Name(name) => name.as_str() == "localhost",
        Host::Ip(ip) => ip.is_loopback(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(text: &str) -> Authority {
        Authority::parse(text, Some(443)).unwrap()
    }

    fn proxy(text: &str) -> Result<UpstreamProxy, ProxyUrlError> {
        text.parse()
    }

    fn shown(text: &str) -> String {
        let authorization = proxy(text).unwrap().authorization().unwrap();
        let encoded = authorization.to_str().unwrap().strip_prefix("Basic ").unwrap().to_owned();
        String::from_utf8(BASE64_STANDARD.decode(encoded).unwrap()).unwrap()
    }

    #[test]
    fn a_proxy_is_named_by_a_url_and_its_credentials_are_decoded() {
        let plain = proxy("http://proxy.corp.test:3128").unwrap();
        assert_eq!((plain.authority.to_string().as_str(), plain.tls), ("proxy.corp.test:3128", false));
        assert_eq!(plain.authorization(), None);
        for (url, authority) in [
            ("http://corp", "corp:80"),
            ("HTTPS://Corp.Test./", "corp.test:443"),
            ("http://[::1]:8080", "[::1]:8080"),
            ("http://10.0.0.1:3128/", "10.0.0.1:3128"),
        ] {
            assert_eq!(proxy(url).unwrap().authority.to_string(), authority, "{url}");
        }
        for (url, credentials) in [
            ("http://ada:pw@corp:3128", "ada:pw"),
            ("http://corp%5Cada:p%40s%3As%2F%25@corp:3128", "corp\\ada:p@s:s/%"),
            ("http://ada:p@ss@corp", "ada:p@ss"),
            ("http://ada@corp", "ada:"),
            ("http://ada:%C3%A9+%20@corp", "ada:é+ "),
        ] {
            assert_eq!(shown(url), credentials, "{url}");
        }
    }

    #[test]
    fn what_is_no_http_proxy_is_refused_without_showing_it() {
        use ProxyUrlError::*;
        for (url, error) in [
            ("", NotAUrl),
            ("corp:3128", NotAUrl),
            ("http://", NotAUrl),
            ("http://corp:x", NotAUrl),
            ("http://a b@corp", NotAUrl),
            ("socks5h://corp:1080", Socks),
            ("SOCKS4://corp:1080", Socks),
            ("ftp://corp", Scheme),
            ("http://corp:3128/path", Longer),
            ("http://ada:12/34@corp:3128", Longer),
            ("http://corp?x", Longer),
            ("http://corp#x", Longer),
            ("http://corp:0", Host(HostError::Port)),
            ("http://a%3Ab:pw@corp", Credentials),
            ("http://ada:p%0Aw@corp", Credentials),
        ] {
            assert_eq!(proxy(url).map(|_| ()), Err(error), "{url}");
        }
    }

    #[test]
    fn a_proxy_prints_without_its_credentials() {
        // LEK-003
        let printed = format!("{:?}", proxy("http://ada:hunter2@corp:3128").unwrap());
        assert_eq!(printed, "UpstreamProxy { authority: corp:3128, tls: false, credentials: Some(Secret(..)) }");
    }

    #[test]
    fn an_exception_covers_what_curls_no_proxy_covers() {
        for (exception, covered, others) in [
            ("corp.test", "corp.test a.corp.test a.b.corp.test:8443 CORP.test.", "xcorp.test test corp.test.evil.test"),
            (".corp.test", "corp.test a.corp.test", "xcorp.test"),
            ("*.corp.test", "a.corp.test a.b.corp.test", "corp.test xcorp.test"),
            ("corp.test:8443", "corp.test:8443 a.corp.test:8443", "corp.test"),
            ("Corp.Test.", "corp.test", "test"),
            ("10.0.0.0/8", "10.0.0.0 10.255.1.2:80", "11.0.0.0 9.255.255.255 [a00::1] ten.test"),
            ("10.1.2.3/31", "10.1.2.2 10.1.2.3", "10.1.2.4"),
            ("0.0.0.0/0", "1.2.3.4 255.255.255.255", "[2001:db8::1] a.test"),
            ("10.1.2.3", "10.1.2.3 [::ffff:10.1.2.3]", "10.1.2.4"),
            ("10.1.2.3:80", "10.1.2.3:80", "10.1.2.3:81"),
            ("2001:db8::/32", "[2001:db8:1::1]", "[2001:db9::1] 32.1.13.184"),
            ("2001:db8::1", "[2001:db8::1]:80", "[2001:db8::2]"),
            ("[2001:db8::1]:443", "[2001:db8::1]", "[2001:db8::1]:80"),
            ("*", "a.test 1.2.3.4 [::2]", ""),
        ] {
            let exception: NoProxy = exception.parse().unwrap();
            for covered in covered.split_whitespace() {
                assert!(exception.covers(&to(covered)), "{exception:?} {covered}");
            }
            for other in others.split_whitespace() {
                assert!(!exception.covers(&to(other)), "{exception:?} {other}");
            }
        }
    }

    #[test]
    fn what_is_no_exception_is_refused() {
        for text in [
            "",
            ".",
            "*.",
            "**",
            "a.*",
            "*a.test",
            "a b",
            "http://a.test",
            "a.test/8",
            "10.0.0.0/33",
            "10.0.0.0/x",
            "10.0.0.0/",
            "10.0/8",
            "10.0.0",
            "*.10.0.0.1",
            "a.test:",
            "a.test:0",
            "a.test:x",
            "fd00::/129",
            "<local>",
        ] {
            assert!(text.parse::<NoProxy>().is_err(), "{text}");
        }
    }

    #[test]
    fn this_machine_is_never_asked_of_a_proxy() {
        let both = proxy("http://corp:3128").ok();
        let proxies = Proxies { tunnels: both.clone(), plain: both, direct: vec!["in.test".parse().unwrap()] };
        for here in
            ["127.0.0.1:80", "127.9.9.9", "[::1]:8443", "[::ffff:127.0.0.1]", "localhost", "LocalHost.:80", "in.test"]
        {
            assert_eq!((proxies.to(&to(here), true), proxies.to(&to(here), false)), (None, None), "{here}");
        }
        for there in ["api.test", "localhost.test", "api.localhost", "10.0.0.1"] {
            assert!(proxies.to(&to(there), true).is_some() && proxies.to(&to(there), false).is_some(), "{there}");
        }
        assert_eq!((proxies.all().count(), Proxies::default().to(&to("api.test"), false)), (1, None));
    }

    #[test]
    fn our_own_listener_is_known_by_its_name() {
        // LST-002
        let is_own = |url: &str, own: &str| proxy(url).unwrap().is_one_of(&[own.parse().unwrap()]);
        assert!(is_own("http://127.0.0.1:3128", "127.0.0.1:3128"));
        assert!(is_own("http://localhost:3128", "127.0.0.1:3128"));
        assert!(is_own("http://localhost:3128", "[::1]:3128"));
        assert!(is_own("http://[::ffff:127.0.0.1]:3128", "127.0.0.1:3128"));
        assert!(is_own("http://127.0.0.1:3128", "0.0.0.0:3128"));
        assert!(!is_own("http://127.0.0.1:3129", "127.0.0.1:3128"));
        assert!(!is_own("http://127.0.0.2:3128", "127.0.0.1:3128"));
        assert!(!is_own("http://10.0.0.1:3128", "0.0.0.0:3128"));
        assert!(!is_own("http://corp:3128", "127.0.0.1:3128"));
    }
}
