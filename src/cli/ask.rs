//! Asks a sidecar that runs on this machine, over one of its own listeners.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST, HeaderValue};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::secret::Secret;

/// How long an answer may take: less than a probe usually has, so that it is told why.
const LONGEST: Duration = Duration::from_millis(2500);
/// As much of an answer as is read.
const LARGEST: usize = 1 << 20;

/// A question that is asked once.
pub(super) struct Question {
    pub method: Method,
    /// Whom to ask: an address, or a name, and a port.
    pub authority: String,
    pub path: String,
    pub token: Option<Secret>,
}

impl Question {
    /// The answer's status and text, or why there is none.
    pub async fn ask(self) -> Result<(StatusCode, String), String> {
        let authority = self.authority.clone();
        let asked = tokio::time::timeout(LONGEST, self.asked()).await;
        let asked = asked.unwrap_or_else(|_| Err(format!("no answer within {} ms", LONGEST.as_millis())));
        asked.map_err(|error| format!("{authority}: {error}"))
    }

    async fn asked(self) -> Result<(StatusCode, String), String> {
        let stream = TcpStream::connect(&self.authority).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        let answer = sender.send_request(self.request()?).await.map_err(|error| error.to_string())?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), LARGEST).collect().await.map_err(|error| error.to_string())?;
        Ok((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    }

    fn request(&self) -> Result<Request<Empty<Bytes>>, String> {
        let request = Request::builder().method(&self.method).uri(&self.path).header(HOST, &self.authority);
        let mut request = request.body(Empty::new()).map_err(|error| error.to_string())?;
        if let Some(token) = &self.token {
            let value = HeaderValue::try_from(format!("Bearer {}", token.expose()));
            let mut value = value.map_err(|_| "the admin token does not fit into a header field".to_owned())?;
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        Ok(request)
    }
}

/// Where a listener is met on this machine: one that listens on every address, on loopback.
pub(super) fn here(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_every_address_is_met_on_loopback() {
        let met = |address: &str| here(address.parse().unwrap()).to_string();
        assert_eq!(met("0.0.0.0:3130"), "127.0.0.1:3130");
        assert_eq!(met("[::]:3130"), "[::1]:3130");
        assert_eq!(met("10.0.0.7:1"), "10.0.0.7:1");
    }
}
