//! The way out: verified connections to APIs, kept in a pool, and calls to token endpoints.

mod calls;
mod counted;
mod empties;
mod http2;
mod leg;
mod pool;
mod proxies;
mod roots;
mod via;
mod ways;
mod websocket;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::client::conn::http1;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower_service::Service;

use crate::host::{Authority, Host};
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::routes::UpstreamHttp;

pub use calls::{CallError, Calls, Reply};
pub use http2::{Duplex, Unwanted};
pub use leg::Leg;
pub use pool::{Pooled, Switched, UpstreamBody};
pub use proxies::{NoProxy, Proxies, ProxyUrlError, UpstreamProxy};
pub use roots::{Roots, RootsError};
pub use via::UpstreamProxyError;
pub use ways::{Way, Ways};
pub use websocket::WEBSOCKET;

/// A request's body on its way out.
pub type RequestBody = UnsyncBoxBody<Bytes, std::io::Error>;

/// Why the body of an answer broke off.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// How long a silent connection is left before it is asked whether somebody is there.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// What a server says to a client that shows no certificate, before it reads anything from it.
const LATE_HANDSHAKE: [AlertDescription; 7] = [
    AlertDescription::BadCertificate,
    AlertDescription::UnsupportedCertificate,
    AlertDescription::CertificateRevoked,
    AlertDescription::CertificateExpired,
    AlertDescription::CertificateUnknown,
    AlertDescription::UnknownCA,
    AlertDescription::CertificateRequired,
];
/// How we name ourselves where a request is our own.
const OURSELVES: &str = concat!("sidebearer/", env!("CARGO_PKG_VERSION"));

/// Where requests go. A clone shares the connections.
#[derive(Clone)]
pub struct Upstream {
    dialer: Dialer,
    pool: pool::Pool,
}

/// One server to speak to, and how.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Its name and port.
    pub authority: Authority,
    /// Whether it is spoken to without TLS.
    pub plaintext: bool,
    /// The protocol.
    pub http: UpstreamHttp,
}

/// Opens connections: name resolution, the `resolve:` map, a proxy on the way, TCP, TLS.
#[derive(Clone)]
pub struct Dialer {
    inner: Arc<DialerInner>,
}

struct DialerInner {
    resolve: HashMap<Authority, SocketAddr>,
    proxies: Proxies,
    own: OnceLock<Vec<SocketAddr>>,
    ways: OnceLock<Ways>,
    any: Arc<ClientConfig>,
    h1: Arc<ClientConfig>,
    connect_timeout: Duration,
    handshake_timeout: Duration,
    max_headers: usize,
    metrics: Metrics,
}

impl Dialer {
    /// Opens connections that are verified against `roots`; `resolve` names addresses that neither DNS nor one of the
    /// `proxies` is asked for.
    ///
    /// # Errors
    /// When TLS cannot be set up, which means a broken build.
    pub fn new(
        roots: &Roots,
        resolve: HashMap<Authority, SocketAddr>,
        proxies: Proxies,
        limits: &Limits,
        metrics: &Metrics,
    ) -> Result<Self, RootsError> {
        let [any, h1] = roots.client_configs([&[b"h2", b"http/1.1"], &[b"http/1.1"]])?;
        let inner = DialerInner {
            resolve,
            proxies,
            own: OnceLock::new(),
            ways: OnceLock::new(),
            any: Arc::new(any),
            h1: Arc::new(h1),
            connect_timeout: limits.connect_timeout,
            handshake_timeout: limits.upstream_handshake_timeout,
            max_headers: limits.max_headers,
            metrics: metrics.clone(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Names our own listeners, to which no request is ever sent (SEMANTICS H4). Only the first call counts.
    pub fn refuse(&self, own: Vec<SocketAddr>) {
        let _ = self.inner.own.set(own);
    }

    /// The connections that are open, by their ends; noted from the first time that somebody asks.
    pub fn ways(&self) -> &Ways {
        self.inner.ways.get_or_init(Ways::default)
    }

    /// Opens a connection on which the destination's own bytes go: its TLS, or whatever it speaks.
    ///
    /// # Errors
    /// No address, no connection in time, our own listener at the other end, or a proxy that does not lead there.
    pub async fn tcp(&self, to: &Authority) -> Result<Leg, UpstreamError> {
        self.open(to, self.proxy(to, false)).await
    }

    /// As [`Dialer::tcp`], for a destination that is spoken to in the clear.
    async fn plain(&self, to: &Authority) -> Result<Leg, UpstreamError> {
        self.open(to, self.proxy(to, true)).await
    }

    async fn open(&self, to: &Authority, proxy: Option<&UpstreamProxy>) -> Result<Leg, UpstreamError> {
        let Some(proxy) = proxy else {
            let (tcp, way) = self.direct(to).await?;
            return Ok(Leg::from(tcp).along(way));
        };
        let leg = self.to_proxy(proxy).await?;
        let (leg, early) = via::connect(leg, proxy, to, self.inner.connect_timeout).await?;
        Ok(leg.after(early))
    }

    /// The proxy that leads to a destination. An address that `resolve:` names is dialled, whatever leads there else.
    fn proxy(&self, to: &Authority, plaintext: bool) -> Option<&UpstreamProxy> {
        self.inner.proxies.to(to, plaintext).filter(|_| !self.inner.resolve.contains_key(to))
    }

    /// The proxy that requests to an origin are sent to, as they are and not through a tunnel: many have none to port 80.
    fn relay(&self, origin: &Origin) -> Option<&UpstreamProxy> {
        if origin.plaintext { self.proxy(&origin.authority, true) } else { None }
    }

    /// Opens a connection to a proxy.
    async fn to_proxy(&self, proxy: &UpstreamProxy) -> Result<Leg, UpstreamError> {
        let unreachable = |error| match error {
            UpstreamError::Loop => UpstreamProxyError::Own,
            error => UpstreamProxyError::Unreachable(Box::new(error)),
        };
        let (tcp, way) = self.direct(&proxy.authority).await.map_err(unreachable)?;
        if !proxy.tls {
            return Ok(Leg::from(tcp).along(way));
        }
        let tls = self.handshake(&self.inner.h1, &proxy.authority.host, tcp).await.map_err(unreachable)?;
        Ok(Leg::from(tls).along(way))
    }

    /// A connection, and its way, where those are noted.
    async fn direct(&self, to: &Authority) -> Result<(TcpStream, Option<Way>), UpstreamError> {
        let stream = self.dialled(to).await;
        self.inner.metrics.connect(stream.as_ref().map_or_else(UpstreamError::code, |_| "ok"));
        stream
    }

    async fn dialled(&self, to: &Authority) -> Result<(TcpStream, Option<Way>), UpstreamError> {
        let stream = match self.inner.resolve.get(to) {
            Some(address) => within(self.inner.connect_timeout, TcpStream::connect(address)).await?,
            None => self.resolved(to).await?,
        };
        let peer = stream.peer_addr().map_err(|error| UpstreamError::connect(&error))?;
        let local = stream.local_addr().map_err(|error| UpstreamError::connect(&error))?;
        if self.inner.own.get().is_some_and(|own| own.iter().any(|own| leads_to(own, peer, local))) {
            return Err(UpstreamError::Loop);
        }
        let way = match self.inner.ways.get() {
            Some(ways) => Some(ways.enter(local, peer).ok_or(UpstreamError::Loop)?),
            None => None,
        };
        let _ = stream.set_nodelay(true);
        // A peer that vanishes without a word is noticed.
        let _ = rustix::net::sockopt::set_socket_keepalive(&stream, true);
        let _ = rustix::net::sockopt::set_tcp_keepidle(&stream, KEEP_ALIVE);
        let _ = rustix::net::sockopt::set_tcp_keepintvl(&stream, KEEP_ALIVE / 2);
        let _ = rustix::net::sockopt::set_tcp_keepcnt(&stream, 4);
        Ok((stream, way))
    }

    async fn resolved(&self, to: &Authority) -> Result<TcpStream, UpstreamError> {
        let mut connector = HttpConnector::new();
        let limit = self.inner.connect_timeout;
        connector.set_connect_timeout(Some(limit));
        let uri = format!("http://{to}").parse().map_err(|_| UpstreamError::Resolve)?;
        // Name resolution has no limit of its own.
        let stream = tokio::time::timeout(limit * 2, connector.call(uri));
        let stream = stream.await.map_err(|_| UpstreamError::ConnectTimeout(limit))?;
        stream.map(TokioIo::into_inner).map_err(|error| UpstreamError::from_connector(&error, limit))
    }

    /// Opens a TLS connection, verified for the authority's own name.
    ///
    /// # Errors
    /// As [`Dialer::tcp`], or the other side could not prove that it is that name.
    pub async fn tls(&self, to: &Authority, http: UpstreamHttp) -> Result<TlsStream<Leg>, UpstreamError> {
        let leg = self.tcp(to).await?;
        let config = match http {
            UpstreamHttp::Auto => &self.inner.any,
            UpstreamHttp::H1 => &self.inner.h1,
        };
        self.handshake(config, &to.host, leg).await
    }

    /// How HTTP/1 is spoken on what it opens.
    fn http1(&self) -> http1::Builder {
        let mut http1 = http1::Builder::new();
        if self.inner.max_headers != Limits::FREE_HEADERS {
            http1.max_headers(self.inner.max_headers);
        }
        http1
    }

    async fn handshake<IO>(
        &self,
        config: &Arc<ClientConfig>,
        host: &Host,
        io: IO,
    ) -> Result<TlsStream<IO>, UpstreamError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let name = match host {
            Host::Name(name) => ServerName::try_from(name.as_str().to_owned()).map_err(|_| UpstreamError::Resolve)?,
            Host::Ip(ip) => ServerName::from(*ip),
        };
        let handshake = TlsConnector::from(config.clone()).connect(name, io);
        let (limit, began) = (self.inner.handshake_timeout, Instant::now());
        let stream = tokio::time::timeout(limit, handshake).await.map_err(|_| UpstreamError::TlsTimeout(limit))?;
        let stream = stream.map_err(|error| UpstreamError::tls(&error))?;
        self.inner.metrics.upstream_handshake(began.elapsed());
        Ok(stream)
    }
}

impl Upstream {
    /// An empty pool over this dialer. Must be called within a tokio runtime.
    pub fn new(dialer: Dialer) -> Self {
        Self { pool: pool::Pool::new(dialer.clone()), dialer }
    }

    /// For tunnels, which need a connection of their own.
    pub fn dialer(&self) -> &Dialer {
        &self.dialer
    }

    /// Sends a request and gives the answer's head; its body streams. It is not sent after the moment `by`, however long
    /// its connection takes to be there.
    ///
    /// The request's URI must be in origin form; `Host` and `:authority` are set here, from the origin.
    ///
    /// # Errors
    /// See [`UpstreamError`]; [`UpstreamError::unprocessed`] tells whether the server certainly did nothing.
    pub fn send(
        &self,
        origin: &Origin,
        request: Request<RequestBody>,
        by: Option<Instant>,
    ) -> impl Future<Output = Result<Pooled, UpstreamError>> + Send {
        self.pool.send(origin, request, by)
    }

    /// Sends a request on a connection that is opened for it and kept in the pool afterwards.
    ///
    /// # Errors
    /// As [`Upstream::send`].
    pub async fn send_anew(
        &self,
        origin: &Origin,
        request: Request<RequestBody>,
        by: Option<Instant>,
    ) -> Result<Pooled, UpstreamError> {
        self.pool.send_anew(origin, request, by).await
    }

    /// Sends a request that asks for another protocol, on an HTTP/1.1 connection of its own.
    ///
    /// # Errors
    /// As [`Upstream::send`].
    pub async fn send_upgrade(
        &self,
        origin: &Origin,
        request: Request<RequestBody>,
        by: Option<Instant>,
    ) -> Result<Pooled, UpstreamError> {
        self.pool.send_alone(origin, request, by).await
    }

    /// Sends a WebSocket handshake in the form of HTTP/1.1 but without a key, in whatever form the server takes it. The
    /// answer is in the form of HTTP/1.1.
    ///
    /// # Errors
    /// As [`Upstream::send`].
    pub async fn send_websocket(
        &self,
        origin: &Origin,
        request: Request<RequestBody>,
        by: Option<Instant>,
    ) -> Result<Pooled, UpstreamError> {
        self.pool.send_websocket(origin, request, by).await
    }
}

/// Why an upstream gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamError {
    /// The name has no address.
    #[error("the host name does not resolve")]
    Resolve,
    /// Nobody listens, or the network refuses.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// Nobody answered within this time.
    #[error("no connection within {} s", .0.as_secs_f32())]
    ConnectTimeout(Duration),
    /// The handshake took longer than this.
    #[error("no TLS handshake within {} s", .0.as_secs_f32())]
    TlsTimeout(Duration),
    /// Its certificate does not prove its name.
    #[error("the upstream's certificate is not valid for it: {0}")]
    Certificate(String),
    /// The handshake failed otherwise.
    #[error("TLS failed: {0}")]
    Tls(String),
    /// The connection led to ourselves.
    #[error("the connection leads back to this proxy")]
    Loop,
    /// The server refused the stream before it looked at it (RFC 9113 section 8.7), or the connection closed before a byte
    /// was written to it.
    #[error("the upstream did not read the request")]
    Unprocessed,
    /// Its time was over before it could be sent.
    #[error("it took too long to reach the upstream; nothing was sent")]
    Late,
    /// The agent's body broke off.
    #[error("the request's body broke off")]
    RequestBody,
    /// The connection closed before an answer came.
    #[error("the upstream closed the connection without an answer")]
    Closed,
    /// More fields than `limits.max_headers`, over HTTP/1.
    #[error("the upstream's answer has too many header fields")]
    TooManyFields,
    /// What came is not HTTP.
    #[error("the upstream's answer is broken: {0}")]
    Protocol(String),
    /// A proxy on the way did not lead there.
    #[error(transparent)]
    Proxy(#[from] UpstreamProxyError),
}

impl UpstreamError {
    /// Whether the server certainly did not act on the request, so that sending it again is safe (SEMANTICS C6).
    pub fn unprocessed(&self) -> bool {
        matches!(self, UpstreamError::Unprocessed)
    }

    /// Whether somebody may have read the request, and with it the token: the server, or in the clear a proxy before it.
    pub fn was_read(&self, plaintext: bool) -> bool {
        match self {
            UpstreamError::Proxy(_) => plaintext,
            UpstreamError::Unprocessed
            | UpstreamError::RequestBody
            | UpstreamError::Closed
            | UpstreamError::TooManyFields
            | UpstreamError::Protocol(_) => true,
            UpstreamError::Resolve
            | UpstreamError::Connect(_)
            | UpstreamError::ConnectTimeout(_)
            | UpstreamError::TlsTimeout(_)
            | UpstreamError::Certificate(_)
            | UpstreamError::Tls(_)
            | UpstreamError::Loop
            | UpstreamError::Late => false,
        }
    }

    /// A stable name, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            UpstreamError::Proxy(error) => error.code(),
            other => other.proxy_status(),
        }
    }

    /// Whether nobody answered in time.
    pub fn is_timeout(&self) -> bool {
        match self {
            UpstreamError::ConnectTimeout(_) | UpstreamError::TlsTimeout(_) => true,
            UpstreamError::Proxy(UpstreamProxyError::Unreachable(error)) => error.is_timeout(),
            UpstreamError::Proxy(UpstreamProxyError::Silent(_)) => true,
            _ => false,
        }
    }

    /// The error's name in `Proxy-Status` (RFC 9209 section 2.3).
    pub fn proxy_status(&self) -> &'static str {
        match self {
            UpstreamError::Proxy(error) => error.proxy_status(),
            UpstreamError::Resolve => "dns_error",
            UpstreamError::Connect(_) => "connection_refused",
            UpstreamError::ConnectTimeout(_) | UpstreamError::TlsTimeout(_) | UpstreamError::Late => {
                "connection_timeout"
            }
            UpstreamError::Certificate(_) => "tls_certificate_error",
            UpstreamError::Tls(_) => "tls_protocol_error",
            UpstreamError::Loop => "proxy_loop_detected",
            UpstreamError::Unprocessed | UpstreamError::Closed => "connection_terminated",
            UpstreamError::RequestBody => "http_request_error",
            UpstreamError::TooManyFields => "http_response_header_section_size",
            UpstreamError::Protocol(_) => "http_protocol_error",
        }
    }

    fn connect(error: &std::io::Error) -> Self {
        UpstreamError::Connect(error.kind().to_string())
    }

    fn from_connector(error: &(dyn std::error::Error + 'static), limit: Duration) -> Self {
        if error.to_string().contains("dns") {
            return UpstreamError::Resolve;
        }
        match causes(error).filter_map(|cause| cause.downcast_ref::<std::io::Error>()).last() {
            Some(io) if io.kind() == std::io::ErrorKind::TimedOut => UpstreamError::ConnectTimeout(limit),
            Some(io) => UpstreamError::connect(io),
            None => UpstreamError::Connect(error.to_string()),
        }
    }

    fn tls(error: &std::io::Error) -> Self {
        match causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(reason)) => UpstreamError::Certificate(reason.to_string()),
            Some(other) => UpstreamError::Tls(other.to_string()),
            None => UpstreamError::Tls(error.kind().to_string()),
        }
    }

    fn from_hyper(error: &hyper::Error) -> Self {
        if error.is_user() {
            return UpstreamError::RequestBody;
        }
        if let Some(error) = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
            return UpstreamError::late_tls(error.to_string());
        }
        if error.is_incomplete_message()
            || error.is_canceled()
            || error.is_closed()
            || causes(error).filter_map(|cause| cause.downcast_ref()).any(is_closed)
        {
            return UpstreamError::Closed;
        }
        if error.is_parse_too_large() {
            return UpstreamError::TooManyFields;
        }
        UpstreamError::Protocol(error.to_string())
    }

    fn from_h2(error: &h2::Error) -> Self {
        // A stream learns of GOAWAY only when it is above the last one that the server looked at, or was never sent
        // (RFC 9113 section 6.8).
        if error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM)) {
            return UpstreamError::Unprocessed;
        }
        if !error.is_remote() && error.reason() == Some(h2::Reason::CANCEL) {
            return UpstreamError::RequestBody;
        }
        match error.get_io() {
            Some(io) if is_closed(io) => UpstreamError::Closed,
            // h2 keeps the kind and the words of an error, and only TLS gives this kind.
            Some(io) if io.kind() == std::io::ErrorKind::InvalidData => UpstreamError::late_tls(io.to_string()),
            _ => UpstreamError::Protocol(error.to_string()),
        }
    }

    /// TLS that fails in these words behind its handshake. There a server of TLS 1.3 may still say that it wanted a
    /// certificate of ours (RFC 8446 section 4.4.2.4): then it has read nothing. Of any other failure that is not known.
    fn late_tls(words: String) -> Self {
        if LATE_HANDSHAKE.iter().any(|alert| rustls::Error::AlertReceived(*alert).to_string() == words) {
            return UpstreamError::Tls(words);
        }
        UpstreamError::Protocol(format!("TLS failed: {words}"))
    }
}

fn is_closed(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// Whether a connection leads to our listener. One that listens on every address is met on each of this machine's own,
/// where both ends of a connection have the same.
fn leads_to(own: &SocketAddr, peer: SocketAddr, local: SocketAddr) -> bool {
    let (own_ip, peer_ip) = (own.ip().to_canonical(), peer.ip().to_canonical());
    let everywhere = own_ip.is_unspecified() && peer_ip == local.ip().to_canonical();
    own.port() == peer.port() && (own_ip == peer_ip || everywhere)
}

async fn within<T>(limit: Duration, connect: impl Future<Output = std::io::Result<T>>) -> Result<T, UpstreamError> {
    let done = tokio::time::timeout(limit, connect).await.map_err(|_| UpstreamError::ConnectTimeout(limit))?;
    done.map_err(|error| UpstreamError::connect(&error))
}

/// An error and what caused it, down to the first. An io::Error does not name the error that it wraps as its source.
fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| match error.downcast_ref::<std::io::Error>() {
        Some(io) => io.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static)),
        None => error.source(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_every_address_is_met_on_each_of_them() {
        // LST-002, TLS-017
        let loops = |own: &str, peer: &str, local: &str| {
            leads_to(&own.parse().unwrap(), peer.parse().unwrap(), local.parse().unwrap())
        };
        assert!(loops("127.0.0.1:3129", "127.0.0.1:3129", "127.0.0.1:50000"));
        assert!(loops("0.0.0.0:3129", "127.0.0.1:3129", "127.0.0.1:50000"));
        assert!(loops("0.0.0.0:3129", "10.0.0.5:3129", "10.0.0.5:50000"));
        assert!(loops("[::]:3129", "[::ffff:127.0.0.1]:3129", "[::ffff:127.0.0.1]:50000"));
        assert!(!loops("0.0.0.0:3129", "10.0.0.6:3129", "10.0.0.5:50000"));
        assert!(!loops("0.0.0.0:3129", "127.0.0.1:3130", "127.0.0.1:50000"));
        assert!(!loops("127.0.0.1:3129", "127.0.0.2:3129", "127.0.0.1:50000"));
    }
    #[tokio::test]
    async fn a_proxy_that_turns_out_to_be_our_own_listener_is_not_asked() {
        // LST-002
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let corp = "http://corp.test:3128".parse::<UpstreamProxy>().unwrap();
        let resolve = HashMap::from([(corp.authority.clone(), address)]);
        let proxies = Proxies { plain: Some(corp.clone()), tunnels: Some(corp), direct: Vec::new() };
        let dialer =
            Dialer::new(&Roots::load(&[], "x").unwrap(), resolve, proxies, &Limits::default(), &Metrics::default())
                .unwrap();
        dialer.refuse(vec![address]);
        let api = Authority::parse("api.test:443", None).unwrap();
        assert_eq!(dialer.tcp(&api).await.err(), Some(UpstreamError::Proxy(UpstreamProxyError::Own)));
        assert_eq!(dialer.plain(&api).await.err(), Some(UpstreamError::Proxy(UpstreamProxyError::Own)));
    }
}
