//! What a request is for: one authority, read once, that everything else must agree with.

use http::header::HOST;
use http::uri::Scheme;
use http::{Method, Request, Version};

use super::reject::Reject;
use super::websocket;
use crate::host::Authority;

/// The target of a request on the proxy port (RFC 9112 section 3.2).
pub(super) enum Target {
    /// Authority form: CONNECT.
    Connect(Authority),
    /// Absolute form, `http://`.
    Plain(Authority),
}

impl Target {
    /// Reads the request's target.
    ///
    /// # Errors
    /// Anything that is not for a proxy, or that could be read in two ways.
    pub(super) fn of<B>(request: &Request<B>) -> Result<Self, Reject> {
        let uri = request.uri();
        let Some(authority) = uri.authority() else { return Err(Reject::NotForAProxy) };
        if *request.method() == Method::CONNECT {
            let authority = Authority::parse(authority.as_str(), None)?;
            // Python before 3.12 sends CONNECT without Host. Where there is one, it must name the same host.
            if let Some(host) = host(request)?
                && Authority::parse(host, Some(authority.port))?.host != authority.host
            {
                return Err(Reject::ConnectHostDiffers);
            }
            return Ok(Target::Connect(authority));
        }
        if uri.scheme() != Some(&Scheme::HTTP) {
            return Err(Reject::NeedsConnect);
        }
        // An absolute-form target overrides Host (RFC 9112 section 3.2.2), so Host need only be one, and readable.
        if let Some(host) = host(request)?.filter(|host| *host != authority.as_str()) {
            Authority::parse(host, Some(80))?;
        }
        Ok(Target::Plain(Authority::parse(authority.as_str(), Some(80))?))
    }
}

/// Checks that a request inside a tunnel is for the host that CONNECT named (SEMANTICS H1, H2, H6).
///
/// # Errors
/// 421 when it is for another one; 400 when it does not say clearly.
pub(super) fn agrees<B>(request: &Request<B>, tunnel: &Authority) -> Result<(), Reject> {
    if *request.method() == Method::CONNECT {
        // What is not a WebSocket leads to other hosts: `connect-udp`, `connect-ip` (RFC 9298, RFC 9484).
        return Err(match websocket::protocol(request.extensions()) {
            Some(_) => Reject::UnknownProtocol,
            None => Reject::ConnectInTunnel,
        });
    }
    let default_port = Some(tunnel.port);
    let named = match (request.uri().authority(), host(request)?) {
        // As nearly all say it: there is nothing to parse.
        (None, Some(host)) if tunnel.is_plainly(host) => return Ok(()),
        (Some(target), None) if tunnel.is_plainly(target.as_str()) => return Ok(()),
        (Some(target), None) => Authority::parse(target.as_str(), default_port)?,
        (None, Some(host)) => Authority::parse(host, default_port)?,
        (Some(target), Some(host)) => {
            let target = Authority::parse(target.as_str(), default_port)?;
            let host = Authority::parse(host, default_port)?;
            if target != host {
                return Err(if request.version() == Version::HTTP_2 { Reject::TwoHosts } else { Reject::Misdirected });
            }
            target
        }
        (None, None) => return Err(Reject::NoHost),
    };
    if named == *tunnel { Ok(()) } else { Err(Reject::Misdirected) }
}

fn host<B>(request: &Request<B>) -> Result<Option<&str>, Reject> {
    let mut all = request.headers().get_all(HOST).iter();
    match (all.next(), all.next()) {
        (None, _) => Ok(None),
        (Some(host), None) => host.to_str().map(Some).map_err(|_| Reject::BadHost("the Host is not ASCII".into())),
        (Some(_), Some(_)) => Err(Reject::TwoHosts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inside(uri: &str, hosts: &[&str], version: Version) -> Result<(), Reject> {
        let mut request = Request::builder().uri(uri).version(version);
        for host in hosts {
            request = request.header(HOST, *host);
        }
        agrees(&request.body(()).unwrap(), &Authority::parse("api.test:443", None).unwrap())
    }

    #[test]
    fn a_request_in_a_tunnel_is_for_the_tunnels_host_or_refused() {
        // SEC-001, SEC-006, SEC-008, SEC-009, SEC-015, SEC-017, SEC-020, SEC-022, SEC-057
        use Version as V;
        for (uri, hosts, version, code) in [
            ("/x", &["api.test"][..], V::HTTP_11, None),
            ("/x", &["API.Test.:443"], V::HTTP_11, None),
            ("https://api.test/x", &["api.test"], V::HTTP_11, None),
            ("https://api.test/x", &[], V::HTTP_2, None),
            ("/x", &["evil.test"], V::HTTP_11, Some("authority_mismatch")),
            ("/x", &["api.test:8443"], V::HTTP_11, Some("authority_mismatch")),
            ("https://evil.test/x", &["api.test"], V::HTTP_11, Some("authority_mismatch")),
            ("https://evil.test/x", &[], V::HTTP_2, Some("authority_mismatch")),
            ("https://api.test/x", &["evil.test"], V::HTTP_2, Some("bad_host")),
            ("/x", &[], V::HTTP_11, Some("bad_host")),
            ("/x", &["api.test", "api.test"], V::HTTP_11, Some("bad_host")),
            ("/x", &["api.test, evil.test"], V::HTTP_11, Some("bad_host")),
            ("/x", &[""], V::HTTP_11, Some("bad_host")),
            ("/x", &["api.test:x@evil.test"], V::HTTP_11, Some("bad_host")),
        ] {
            let verdict = inside(uri, hosts, version).err().map(|reject| reject.code());
            assert_eq!(verdict, code, "{uri} {hosts:?} {version:?}");
        }
    }
}
