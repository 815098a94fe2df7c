//! Asks a proxy for a tunnel (RFC 9110 section 9.3.6), and says what came of it.

use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, HeaderMap, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, USER_AGENT};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::proxies::UpstreamProxy;
use super::{OURSELVES, UpstreamError};
use crate::host::Authority;

/// The longest head of an answer.
const MAX_HEAD: usize = 64 << 10;

/// Has a proxy connect to a destination. Gives the connection back, with what has been read of it already.
pub(super) async fn connect<IO>(
    io: IO,
    proxy: &UpstreamProxy,
    to: &Authority,
    limit: Duration,
) -> Result<(IO, Bytes), UpstreamProxyError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let asked = tokio::time::timeout(limit, ask(io, request(proxy, to)?));
    asked.await.map_err(|_| UpstreamProxyError::Silent(limit))?
}

fn request(proxy: &UpstreamProxy, to: &Authority) -> Result<Request<Empty<Bytes>>, UpstreamProxyError> {
    let to = to.to_string();
    let target = Uri::try_from(&to).map_err(broken)?;
    let mut request = Request::builder().method(Method::CONNECT).uri(target).header(HOST, to);
    request = request.header(USER_AGENT, OURSELVES);
    if let Some(authorization) = proxy.authorization() {
        request = request.header(PROXY_AUTHORIZATION, authorization);
    }
    request.body(Empty::new()).map_err(broken)
}

async fn ask<IO>(io: IO, request: Request<Empty<Bytes>>) -> Result<(IO, Bytes), UpstreamProxyError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = http1::Builder::new().max_buf_size(MAX_HEAD).handshake(TokioIo::new(io)).await;
    let (mut sender, connection) = handshake.map_err(broken)?;
    // It ends when the tunnel is taken out of it below, or when nobody waits for the answer any more.
    tokio::spawn(async move {
        let _ = connection.with_upgrades().await;
    });
    let response = sender.send_request(request).await.map_err(|error| match UpstreamError::from_hyper(&error) {
        UpstreamError::Closed => UpstreamProxyError::Closed,
        _ => broken(error),
    })?;
    accepted(response.status(), response.headers())?;
    let tunnel = hyper::upgrade::on(response).await.map_err(broken)?;
    let parts = tunnel.downcast::<TokioIo<IO>>().map_err(|_| UpstreamProxyError::Broken("no tunnel".into()))?;
    Ok((parts.io.into_inner(), parts.read_buf))
}

/// Whether an answer of a proxy's own is a good one.
fn accepted(status: StatusCode, headers: &HeaderMap) -> Result<(), UpstreamProxyError> {
    match status {
        // What tinyproxy says to a wrong password. Nobody else has spoken yet.
        StatusCode::PROXY_AUTHENTICATION_REQUIRED | StatusCode::UNAUTHORIZED => {
            Err(UpstreamProxyError::asks(status, headers))
        }
        status if status.is_success() => Ok(()),
        status => Err(UpstreamProxyError::Refused(status)),
    }
}

fn broken(error: impl ToString) -> UpstreamProxyError {
    UpstreamProxyError::Broken(error.to_string())
}

/// Why a proxy did not lead to a destination.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamProxyError {
    /// There is no connection to it.
    #[error("the upstream proxy cannot be reached: {0}")]
    Unreachable(Box<UpstreamError>),
    /// It is this very proxy.
    #[error("`upstream_proxy` leads to this proxy itself")]
    Own,
    /// It does not answer.
    #[error("the upstream proxy did not connect within {} s", .0.as_secs_f32())]
    Silent(Duration),
    /// It wants credentials, and not those that it got. With the ways of showing them that it names.
    #[error("the upstream proxy does not accept the credentials of `upstream_proxy`, or wants some{}", ways(.1))]
    Credentials(StatusCode, Vec<String>),
    /// It does not want to connect, or could not.
    #[error("the upstream proxy answered CONNECT with {0}")]
    Refused(StatusCode),
    /// It hung up.
    #[error("the upstream proxy closed the connection without an answer")]
    Closed,
    /// What it says is not HTTP.
    #[error("the upstream proxy's answer is broken: {0}")]
    Broken(String),
}

impl UpstreamProxyError {
    /// Of an answer that asks who we are (RFC 9110 section 11.7.1).
    pub(super) fn asks(status: StatusCode, headers: &HeaderMap) -> Self {
        let challenges = headers.get_all(PROXY_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let word = |challenge: &str| challenge.split([' ', ',']).next().unwrap_or_default().to_owned();
        let named = |word: &String| (1..=20).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_alphanumeric());
        UpstreamProxyError::Credentials(status, challenges.map(word).filter(named).take(4).collect())
    }

    /// A stable name, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            UpstreamProxyError::Unreachable(_) => "upstream_proxy_unreachable",
            UpstreamProxyError::Own => "proxy_loop_detected",
            UpstreamProxyError::Silent(_) => "connection_timeout",
            UpstreamProxyError::Credentials(..) => "upstream_proxy_authentication",
            UpstreamProxyError::Refused(_) => "upstream_proxy_refused",
            UpstreamProxyError::Closed | UpstreamProxyError::Broken(_) => "upstream_proxy_broken",
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            UpstreamProxyError::Unreachable(_) | UpstreamProxyError::Silent(_) => {
                "the operator checks `upstream_proxy` in `proxy.yaml`, and whether that proxy is up"
            }
            UpstreamProxyError::Own => "the operator names the company's proxy in `upstream_proxy`, and not this one",
            UpstreamProxyError::Credentials(..) => {
                "the operator corrects the user name and password in `upstream_proxy`; only Basic is spoken"
            }
            UpstreamProxyError::Refused(_) => {
                "ask whoever runs that proxy to allow the host; the operator lists one that needs no proxy in `no_proxy`"
            }
            UpstreamProxyError::Closed | UpstreamProxyError::Broken(_) => {
                "the operator checks that `upstream_proxy` names an HTTP proxy"
            }
        }
    }

    /// The status that the proxy answered with.
    pub fn received(&self) -> Option<StatusCode> {
        match self {
            UpstreamProxyError::Credentials(status, _) | UpstreamProxyError::Refused(status) => Some(*status),
            _ => None,
        }
    }

    /// The error's name in `Proxy-Status` (RFC 9209 section 2.3).
    pub fn proxy_status(&self) -> &'static str {
        match self {
            UpstreamProxyError::Unreachable(error) => error.proxy_status(),
            UpstreamProxyError::Own => "proxy_loop_detected",
            UpstreamProxyError::Silent(_) => "connection_timeout",
            UpstreamProxyError::Credentials(..) => "proxy_configuration_error",
            UpstreamProxyError::Refused(_) => "destination_unavailable",
            UpstreamProxyError::Closed => "connection_terminated",
            UpstreamProxyError::Broken(_) => "http_protocol_error",
        }
    }
}

fn ways(schemes: &[String]) -> String {
    if schemes.is_empty() { String::new() } else { format!(" (it names {})", schemes.join(", ")) }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// What becomes of a tunnel whose proxy reads the request and then does this; and the request.
    async fn asked<F, P>(then: F) -> (Result<(DuplexStream, Bytes), UpstreamProxyError>, String)
    where
        F: FnOnce(DuplexStream) -> P + Send + 'static,
        P: Future<Output = ()> + Send + 'static,
    {
        let (ours, mut proxys) = tokio::io::duplex(1 << 20);
        let reading = tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(proxys.read_u8().await.unwrap());
            }
            tokio::spawn(then(proxys));
            String::from_utf8(head).unwrap()
        });
        let proxy = "http://ada:pw@corp:3128".parse().unwrap();
        let tunnel = connect(ours, &proxy, &Authority::parse("api.test:443", None).unwrap(), LIMIT).await;
        (tunnel, reading.await.unwrap())
    }

    async fn answered(answer: impl Into<Vec<u8>>) -> Result<Bytes, UpstreamProxyError> {
        let answer = answer.into();
        let (tunnel, _) = asked(|mut io| async move {
            let _ = io.write_all(&answer).await;
        })
        .await;
        tunnel.map(|(_, early)| early)
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_behind_the_answer_belongs_to_the_tunnel() {
        let (tunnel, request) = asked(|mut io| async move {
            io.write_all(b"HTTP/1.0 200 Connection established\r\nContent-Length: 3\r\n\r\n220 hi\r\n").await.unwrap();
            let mut heard = [0; 4];
            io.read_exact(&mut heard).await.unwrap();
            io.write_all(&heard).await.unwrap();
        })
        .await;
        let ours = concat!("user-agent: sidebearer/", env!("CARGO_PKG_VERSION"), "\r\n");
        assert_eq!(
            request,
            format!(
                "CONNECT api.test:443 HTTP/1.1\r\nhost: api.test:443\r\n{ours}proxy-authorization: Basic YWRhOnB3\r\n\r\n"
            )
        );
        let (mut tunnel, early) = tunnel.unwrap();
        assert_eq!(early, "220 hi\r\n");
        tunnel.write_all(b"quit").await.unwrap();
        let mut heard = String::new();
        tunnel.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "quit");
    }

    #[tokio::test(start_paused = true)]
    async fn every_other_answer_is_no_tunnel() {
        use UpstreamProxyError::*;
        let names = |names: &[&str]| {
            let status = StatusCode::PROXY_AUTHENTICATION_REQUIRED;
            Credentials(status, names.iter().map(|name| (*name).to_owned()).collect())
        };
        assert_eq!(answered("HTTP/1.1 102 x\r\n\r\nHTTP/1.1 201 x\r\n\r\n").await, Ok(Bytes::new()));
        for (answer, expected) in [
            ("HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", Refused(StatusCode::FORBIDDEN)),
            ("HTTP/1.1 302 x\r\nLocation: https://login.corp/\r\n\r\n", Refused(StatusCode::FOUND)),
            ("HTTP/1.1 407 x\r\n\r\n", names(&[])),
            ("HTTP/1.0 401 x\r\nWWW-Authenticate: Basic\r\n\r\n", Credentials(StatusCode::UNAUTHORIZED, Vec::new())),
            ("HTTP/1.1 407 x\r\nProxy-Authenticate: Basic realm=\"a, b\"\r\n\r\n", names(&["Basic"])),
            (
                "HTTP/1.1 407 x\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\nProxy-Authenticate: <b>\r\n\r\n",
                names(&["Negotiate", "NTLM"]),
            ),
            ("", Closed),
            ("HTTP/1.1 200 OK\r\nX: ", Closed),
        ] {
            assert_eq!(answered(answer).await, Err(expected), "{answer}");
        }
        let endless = |line: &str, times: usize| format!("HTTP/1.1 200 OK\r\n{}", line.repeat(times));
        for broken in [
            "SSH-2.0-OpenSSH_9.9\r\n".to_owned(),
            "HTTP/2 200 OK\r\n\r\n".to_owned(),
            "HTTP/1.1 200 OK\r\nX\r\n\r\n".to_owned(),
            "\0\0\0\0\0\0\0\0".to_owned(),
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n".to_owned(),
            endless("X: 1\r\n", 10_000),
            endless("X: 1\r\n", 257) + "\r\n",
            endless("x", 70_000),
        ] {
            let error = answered(broken.clone()).await.unwrap_err();
            assert!(matches!(error, Broken(_) | Refused(StatusCode::SWITCHING_PROTOCOLS)), "{:.40}: {error}", broken);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_has_no_longer_than_anybody_to_connect() {
        let (tunnel, _) = asked(|io| async move {
            std::future::pending::<()>().await;
            drop(io);
        })
        .await;
        assert_eq!(tunnel.err(), Some(UpstreamProxyError::Silent(LIMIT)));
        let (tunnel, _) = asked(|mut io| async move {
            for byte in "HTTP/1.1 200 OK\r\n\r\n".bytes() {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let _ = io.write_all(&[byte]).await;
            }
        })
        .await;
        assert_eq!(tunnel.err(), Some(UpstreamProxyError::Silent(LIMIT)));
    }
}
