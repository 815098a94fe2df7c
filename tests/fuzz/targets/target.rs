//! Whatever a request says it is for, everything in it that names a host names the one that we take (SEC-001 to SEC-022).
//!
//! The input: the method, the target and each `Host`, a line each.
#![no_main]

use http::header::HOST;
use http::{HeaderValue, Request, Version};
use libfuzzer_sys::fuzz_target;
use sidebearer::host::Authority;
use sidebearer::proxy::fuzzing;

fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|byte| *byte == b'\n');
    let Some(method) = lines.next() else { return };
    let mut request = Request::builder().method(method).uri(lines.next().unwrap_or_default());
    for host in lines {
        request = request.header(HOST, host);
    }
    let Ok(mut request) = request.body(()) else { return };
    let connect = request.method() == http::Method::CONNECT;
    if let Ok((authority, is_connect)) = fuzzing::target(&request) {
        assert_eq!(is_connect, connect);
        let default_port = if connect { authority.port } else { 80 };
        let named = request.uri().authority().expect("it is for somebody").as_str();
        assert_eq!(Authority::parse(named, Some(default_port)).as_ref(), Ok(&authority));
        if connect && let Some(host) = one_host(&request) {
            assert_eq!(Authority::parse(host, Some(authority.port)).unwrap().host, authority.host);
        }
    }
    let tunnel = Authority::parse("api.test:443", None).unwrap();
    for version in [Version::HTTP_11, Version::HTTP_2] {
        *request.version_mut() = version;
        if fuzzing::agrees(&request, &tunnel).is_ok() {
            let named = [request.uri().authority().map(|authority| authority.as_str()), one_host(&request)];
            assert!(!connect && named.iter().any(Option::is_some));
            for name in named.into_iter().flatten() {
                assert_eq!(Authority::parse(name, Some(443)).as_ref(), Ok(&tunnel));
            }
        }
    }
});

/// The Host, of which there is at most one in what was not refused.
fn one_host(request: &Request<()>) -> Option<&str> {
    let mut all = request.headers().get_all(HOST).iter().map(HeaderValue::to_str);
    let first = all.next()?.expect("it was read");
    assert!(all.next().is_none(), "two hosts were taken for one");
    Some(first)
}
