//! A host and a port mean to us what they mean to every WHATWG client, or they are refused (SEC-015 to SEC-019).
#![no_main]

use std::net::IpAddr;

use libfuzzer_sys::fuzz_target;
use sidebearer::host::{Authority, Host};
use url::Url;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(ours) = Authority::parse(text, Some(80)) else { return };
    assert_eq!(Authority::parse(&ours.to_string(), None).as_ref(), Ok(&ours), "what it prints as is something else");
    assert_eq!(Authority::parse(&ours.without_default(80), Some(80)).as_ref(), Ok(&ours));
    if let Ok(theirs) = Url::parse(&format!("http://{text}/")) {
        assert_eq!((host(&theirs), theirs.port_or_known_default()), (Some(ours.host.clone()), Some(ours.port)));
    }
    if let Ok(theirs) = text.parse::<http::uri::Authority>() {
        assert_eq!(theirs.host().parse().as_ref(), Ok(&ours.host), "another host to the HTTP library");
        assert_eq!(theirs.port_u16().unwrap_or(80), ours.port, "another port to the HTTP library");
    }
});

/// The url crate's host in our spelling: without a trailing dot, and an IPv4 address as one in IPv6's clothes too.
fn host(url: &Url) -> Option<Host> {
    Some(match url.host()? {
        url::Host::Domain(name) => name.strip_suffix('.').unwrap_or(name).parse().ok()?,
        url::Host::Ipv4(ip) => Host::Ip(ip.into()),
        url::Host::Ipv6(ip) => Host::Ip(IpAddr::from(ip).to_canonical()),
    })
}
