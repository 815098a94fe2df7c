//! Keeps connections to upstreams, and sends each request on one that can take it now.
//!
//! hyper-util's legacy pool opens a connection for every cold request, queues behind one HTTP/2 connection's stream
//! limit, and does not give back a request that was never written. All three matter to an agent, so this is our own.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use futures_util::future::Either;
use http::header::{CONTENT_LENGTH, HOST, PROXY_AUTHORIZATION, TRANSFER_ENCODING, UPGRADE};
use http::uri::{self, Scheme};
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::counted::Counted;
use super::http2::{self, Duplex, bodiless};
use super::proxies::UpstreamProxy;
use super::via::UpstreamProxyError;
use super::websocket::Key;
use super::{BodyError, Dialer, Origin, RequestBody, UpstreamError};
use crate::routes::UpstreamHttp;

/// Idle HTTP/1 connections are not used after this: below the 5 s after which Node's servers close them.
const IDLE_H1: Duration = Duration::from_secs(4);
const IDLE_H2: Duration = Duration::from_secs(60);
const REAP_EVERY: Duration = Duration::from_secs(5);
/// Beyond this, requests wait for a stream of the existing connections.
const H2_CONNECTIONS: usize = 8;
/// How many connections may close, one after the other, before a byte of a request is written to them; then a new one
/// is opened.
const UNSENT_TRIES: u32 = 3;

/// An answer whose connection goes back to the pool when its body has been read.
pub type Pooled = Response<UpstreamBody>;

type H1 = http1::SendRequest<RequestBody>;

/// All connections, by origin.
#[derive(Clone)]
pub(super) struct Pool {
    dialer: Dialer,
    origins: Arc<DashMap<Origin, Arc<Connections>>>,
}

/// The connections to one origin.
struct Connections {
    /// What `Host` says on them (RFC 9110 section 7.2).
    host: Option<HeaderValue>,
    /// What `:authority` says on them (RFC 9113 section 8.3.1).
    authority: Option<uri::Authority>,
    state: Mutex<State>,
    /// Held while a connection is opened whose protocol is not known, or is HTTP/2: the others wait and share it.
    opening: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// The origin is known to speak HTTP/1.1, so every request beyond the idle ones needs a connection of its own.
    speaks_h1: bool,
    h1: Vec<IdleH1>,
    h2: Vec<SharedH2>,
    /// How many times opening failed, and how it did last.
    failures: (u64, Option<UpstreamError>),
}

struct IdleH1 {
    sender: H1,
    since: Instant,
}

struct SharedH2 {
    connection: http2::Connection,
    used: Instant,
}

/// A connection that can take a request.
enum Ready {
    H1 { sender: H1 },
    H2 { connection: http2::Connection, stream: http2::Stream },
}

impl Pool {
    pub(super) fn new(dialer: Dialer) -> Self {
        let pool = Self { dialer, origins: Arc::default() };
        let origins = Arc::downgrade(&pool.origins);
        pool.dialer.inner.metrics.idle_upstreams(move || {
            origins.upgrade().map(|origins| origins.iter().map(|connections| connections.idle()).sum())
        });
        tokio::spawn(reap(Arc::downgrade(&pool.origins)));
        pool
    }

    // Not an `async fn`, as all that the usual request passes through here: that would hold the request twice.
    pub(super) fn send(
        &self,
        origin: &Origin,
        mut request: Request<RequestBody>,
        by: Option<Instant>,
    ) -> impl Future<Output = Result<Pooled, UpstreamError>> + Send {
        let relay = self.dialer.relay(origin);
        async move {
            if relay.is_some() && has_no_form_for_a_proxy(&request) {
                return Box::pin(self.send_alone(origin, request, by)).await;
            }
            let connections = self.connections(origin);
            for _ in 0..UNSENT_TRIES {
                let ready = self.ready(origin, &connections).await?;
                match send_on(ready, origin, relay, &connections, (request, by)).await {
                    Ok(response) => return Ok(response),
                    // The connection closed before a byte was written: as if it had not been there.
                    Err(Unsent::Whole(unsent)) => request = *unsent,
                    Err(Unsent::Failed(error)) => return Err(error),
                }
            }
            Box::pin(self.send_anew(origin, request, by)).await
        }
    }

    pub(super) async fn send_anew(
        &self,
        origin: &Origin,
        request: Request<RequestBody>,
        by: Option<Instant>,
    ) -> Result<Pooled, UpstreamError> {
        let relay = self.dialer.relay(origin);
        if relay.is_some() && has_no_form_for_a_proxy(&request) {
            return self.send_alone(origin, request, by).await;
        }
        let connections = self.connections(origin);
        let opened = self.open(origin).await;
        connections.lock().note(&opened);
        send_on(opened?, origin, relay, &connections, (request, by)).await.map_err(Unsent::into_error)
    }

    pub(super) async fn send_alone(
        &self,
        origin: &Origin,
        request: Request<RequestBody>,
        by: Option<Instant>,
    ) -> Result<Pooled, UpstreamError> {
        let origin = Origin { http: UpstreamHttp::H1, ..origin.clone() };
        let opened = if origin.plaintext {
            // Through a proxy, too, the connection is the origin's own (RFC 6455 section 4.1).
            self.h1(self.dialer.plain(&origin.authority).await?).await?
        } else {
            self.open(&origin).await?
        };
        let Ready::H1 { sender } = opened else {
            return Err(UpstreamError::Protocol("HTTP/2 where HTTP/1.1 was asked for".into()));
        };
        let connections = Arc::new(Connections::to(&origin));
        send_h1(&origin, None, &connections, sender, (request, by)).await.map_err(Unsent::into_error)
    }

    /// Sends a WebSocket handshake that an agent said in HTTP/2: as it is to a server that takes it so, otherwise in
    /// HTTP/1.1 (RFC 8441 section 5).
    pub(super) async fn send_websocket(
        &self,
        origin: &Origin,
        mut request: Request<RequestBody>,
        by: Option<Instant>,
    ) -> Result<Pooled, UpstreamError> {
        if let Some((connection, stream)) = self.takes_websockets(origin).await? {
            in_time(by)?;
            let authority = self.connections(origin).authority.clone();
            let answer = connection.connect(stream, authority, request).await?;
            return Ok(answer.map(|body| body.map_or_else(UpstreamBody::http2, UpstreamBody::switched)));
        }
        let key = Key::give(request.headers_mut()).ok_or(UpstreamError::RequestBody)?;
        let answer = self.send_alone(origin, request, by).await?;
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS && !key.is_accepted(answer.headers()) {
            return Err(UpstreamError::Protocol("a WebSocket handshake answered with another key".into()));
        }
        Ok(answer)
    }

    /// A connection that takes WebSockets in HTTP/2, if the server does.
    async fn takes_websockets(
        &self,
        origin: &Origin,
    ) -> Result<Option<(http2::Connection, http2::Stream)>, UpstreamError> {
        if origin.http == UpstreamHttp::H1 || origin.plaintext {
            return Ok(None);
        }
        let connections = self.connections(origin);
        match self.ready(origin, &connections).await? {
            Ready::H2 { connection, stream } => Ok(connection.takes_websockets().await.then_some((connection, stream))),
            Ready::H1 { sender } => {
                connections.give_back(sender);
                Ok(None)
            }
        }
    }

    fn connections(&self, origin: &Origin) -> Arc<Connections> {
        if let Some(known) = self.origins.get(origin) {
            return known.clone();
        }
        self.origins.entry(origin.clone()).or_insert_with(|| Arc::new(Connections::to(origin))).clone()
    }

    /// A connection from the pool, or a new one.
    async fn ready(&self, origin: &Origin, connections: &Connections) -> Result<Ready, UpstreamError> {
        let failures = {
            let mut state = connections.lock();
            if let Some(ready) = state.take() {
                return Ok(ready);
            }
            state.failures.0
        };
        // Boxed, as is every path that few requests take: the usual one must not carry the size of a handshake.
        Box::pin(self.opened(origin, connections, failures)).await
    }

    /// A new connection, or one that came free while others were opened; so many had failed before.
    async fn opened(&self, origin: &Origin, connections: &Connections, failures: u64) -> Result<Ready, UpstreamError> {
        let opening = connections.opening.lock().await;
        let speaks_h1 = {
            let mut state = connections.lock();
            if let Some(ready) = state.take() {
                return Ok(ready);
            }
            // The attempt that we waited for failed: another one each would only queue the same failure.
            if let (now, Some(error)) = &state.failures
                && *now != failures
            {
                return Err(error.clone());
            }
            state.speaks_h1
        };
        // Others can share what is opened here only if it is HTTP/2.
        let _opening = (!speaks_h1).then_some(opening);
        let opened = self.open(origin).await;
        connections.lock().note(&opened);
        opened
    }

    async fn open(&self, origin: &Origin) -> Result<Ready, UpstreamError> {
        if origin.plaintext {
            let leg = match self.dialer.relay(origin) {
                Some(proxy) => self.dialer.to_proxy(proxy).await?,
                None => self.dialer.plain(&origin.authority).await?,
            };
            return self.h1(leg).await;
        }
        let tls = self.dialer.tls(&origin.authority, origin.http).await?;
        match tls.get_ref().1.alpn_protocol() {
            Some(b"h2") => {
                let connection = http2::Connection::open(tls, self.dialer.inner.metrics.upstream()).await?;
                let stream = connection.stream();
                Ok(Ready::H2 { connection, stream })
            }
            _ => self.h1(tls).await,
        }
    }
}

impl Pool {
    /// Speaks HTTP/1 on a new connection.
    async fn h1<IO>(&self, io: IO) -> Result<Ready, UpstreamError>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // An upgrade ends the task below, and takes the bytes with it.
        let io = Counted::new(io, self.dialer.inner.metrics.upstream());
        let handshake = self.dialer.http1().handshake(TokioIo::new(io)).await;
        let (sender, connection) = handshake.map_err(|error| UpstreamError::from_hyper(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "upstream connection ended");
            }
        });
        Ok(Ready::H1 { sender })
    }
}

impl Connections {
    /// None yet.
    fn to(origin: &Origin) -> Self {
        let name = origin.authority.without_default(if origin.plaintext { 80 } else { 443 });
        let (host, authority) = (HeaderValue::try_from(&name).ok(), name.parse().ok());
        Self { host, authority, state: Mutex::default(), opening: Default::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// How many connections wait for a request.
    fn idle(&self) -> usize {
        let state = self.lock();
        let h1 = state.h1.iter().filter(|idle| !idle.sender.is_closed()).count();
        let h2 = state.h2.iter().map(|shared| &shared.connection);
        h1 + h2.filter(|connection| connection.streams() == 0 && !connection.is_closed()).count()
    }

    fn give_back(&self, sender: H1) {
        if !sender.is_closed() {
            self.lock().h1.push(IdleH1 { sender, since: Instant::now() });
        }
    }
}

impl State {
    /// The connection that idles shortest, or an HTTP/2 connection with a free stream.
    fn take(&mut self) -> Option<Ready> {
        self.drop_stale(Instant::now());
        if let Some(place) = self.h1.iter().rposition(|idle| idle.sender.is_ready()) {
            return Some(Ready::H1 { sender: self.h1.remove(place).sender });
        }
        let full = self.h2.len() >= H2_CONNECTIONS;
        let free = self.h2.iter().position(|shared| shared.connection.has_room());
        let place = free.or(if full { least_loaded(&self.h2) } else { None })?;
        let shared = &mut self.h2[place];
        shared.used = Instant::now();
        Some(Ready::H2 { connection: shared.connection.clone(), stream: shared.connection.stream() })
    }

    /// Learns from a new connection, or from there being none.
    fn note(&mut self, opened: &Result<Ready, UpstreamError>) {
        match opened {
            Ok(Ready::H1 { .. }) => self.speaks_h1 = true,
            Ok(Ready::H2 { connection, .. }) => {
                self.speaks_h1 = false;
                self.h2.push(SharedH2 { connection: connection.clone(), used: Instant::now() });
            }
            Err(error) => self.failures = (self.failures.0 + 1, Some(error.clone())),
        }
    }

    fn drop_stale(&mut self, now: Instant) {
        self.h1.retain(|idle| !idle.sender.is_closed() && now.duration_since(idle.since) < IDLE_H1);
        self.h2.retain(|shared| {
            let idle = shared.connection.streams() == 0 && now.duration_since(shared.used) >= IDLE_H2;
            !shared.connection.is_closed() && !idle
        });
    }
}

/// Why a request was not answered.
enum Unsent {
    /// Not a byte of it was written.
    Whole(Box<Request<RequestBody>>),
    /// It may have been seen.
    Failed(UpstreamError),
}

impl Unsent {
    fn into_error(self) -> UpstreamError {
        match self {
            Unsent::Whole(_) => UpstreamError::Unprocessed,
            Unsent::Failed(error) => error,
        }
    }
}

/// Sends a request at once; what is awaited is the answer.
fn send_on(
    ready: Ready,
    origin: &Origin,
    relay: Option<&UpstreamProxy>,
    connections: &Arc<Connections>,
    request: (Request<RequestBody>, Option<Instant>),
) -> impl Future<Output = Result<Pooled, Unsent>> + Send + use<> {
    match ready {
        Ready::H1 { sender } => Either::Left(send_h1(origin, relay, connections, sender, request)),
        Ready::H2 { connection, stream } => Either::Right(send_h2(connections, connection, stream, request)),
    }
}

fn send_h1(
    origin: &Origin,
    relay: Option<&UpstreamProxy>,
    connections: &Arc<Connections>,
    mut sender: H1,
    (mut request, by): (Request<RequestBody>, Option<Instant>),
) -> impl Future<Output = Result<Pooled, Unsent>> + Send + use<> {
    let prepared = in_time(by).and_then(|()| prepare_h1(&mut request, origin, relay, connections));
    let sent = prepared.map(|()| sender.try_send_request(request));
    let (relayed, connections) = (relay.is_some(), connections.clone());
    async move {
        let mut response = sent.map_err(Unsent::Failed)?.await.map_err(|mut error| match error.take_message() {
            Some(unsent) => Unsent::Whole(Box::new(unsent)),
            None => Unsent::Failed(UpstreamError::from_hyper(error.error())),
        })?;
        // Of a proxy, to which our credentials are not the agent's concern.
        if relayed && response.status() == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            return Err(Unsent::Failed(UpstreamProxyError::asks(response.status(), response.headers()).into()));
        }
        let reusable = normalise(&mut response).map_err(Unsent::Failed)?;
        let back = reusable.then(|| Back { connections, sender });
        Ok(response.map(|body| UpstreamBody::http1(body, back)))
    }
}

fn prepare_h1(
    request: &mut Request<RequestBody>,
    origin: &Origin,
    relay: Option<&UpstreamProxy>,
    connections: &Connections,
) -> Result<(), UpstreamError> {
    request.headers_mut().insert(HOST, connections.host.clone().ok_or(UpstreamError::Resolve)?);
    *request.version_mut() = Version::HTTP_11;
    frame(request);
    match relay {
        Some(proxy) => address(request, origin, proxy),
        None => Ok(()),
    }
}

fn send_h2(
    connections: &Connections,
    connection: http2::Connection,
    stream: http2::Stream,
    (request, by): (Request<RequestBody>, Option<Instant>),
) -> impl Future<Output = Result<Pooled, Unsent>> + Send + use<> {
    let sent = if connection.is_closed() {
        Err(Unsent::Whole(Box::new(request)))
    } else {
        let sent = in_time(by).and_then(|()| connection.send(stream, connections.authority.clone(), request));
        // Its end may have come just now.
        sent.map_err(|error| {
            Unsent::Failed(if error == UpstreamError::Closed { UpstreamError::Unprocessed } else { error })
        })
    };
    async move { sent?.await.map(|answer| answer.map(UpstreamBody::http2)).map_err(Unsent::Failed) }
}

fn in_time(by: Option<Instant>) -> Result<(), UpstreamError> {
    match by {
        Some(by) if by <= Instant::now() => Err(UpstreamError::Late),
        _ => Ok(()),
    }
}

/// Whether it is an `OPTIONS *`, which hyper writes in origin form only (RFC 9112 section 3.2.4).
fn has_no_form_for_a_proxy(request: &Request<RequestBody>) -> bool {
    request.uri().path() == "*"
}

/// Makes a request one for a proxy, which sends it on (RFC 9112 section 3.2.2).
fn address(request: &mut Request<RequestBody>, origin: &Origin, proxy: &UpstreamProxy) -> Result<(), UpstreamError> {
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = origin.authority.without_default(80).parse().ok();
    *request.uri_mut() = Uri::from_parts(parts).map_err(|_| UpstreamError::Protocol("unusable URI".into()))?;
    if let Some(authorization) = proxy.authorization() {
        request.headers_mut().insert(PROXY_AUTHORIZATION, authorization);
    }
    Ok(())
}

/// Says how long a body is where hyper would not: it takes a GET's for empty, and leaves out the zero of a POST's.
fn frame(request: &mut Request<RequestBody>) {
    if request.headers().contains_key(CONTENT_LENGTH) || request.body().size_hint().exact().is_some_and(|n| n > 0) {
        return;
    }
    if !request.body().is_end_stream() {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    } else if !bodiless(request.method()) && !request.headers().contains_key(UPGRADE) {
        request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
}

/// Makes an odd but readable HTTP/1 answer plain, and tells whether its connection may be used again.
///
/// An answer with both lengths is delivered by its chunks and the connection closed (RFC 9112 section 6.3); HTTP/1.0
/// must not reach hyper's server side, which would close the agent's connection. A coding besides `chunked` would be
/// lost with the hop that it is for, so such an answer is an error.
fn normalise(response: &mut Response<Incoming>) -> Result<bool, UpstreamError> {
    let old = response.version() == Version::HTTP_10;
    *response.version_mut() = Version::HTTP_11;
    let mut codings = response.headers().get_all(TRANSFER_ENCODING).iter();
    let Some(coding) = codings.next() else { return Ok(!old) };
    if !coding.as_bytes().eq_ignore_ascii_case(b"chunked") || codings.next().is_some() {
        return Err(UpstreamError::Protocol("a transfer coding other than one `chunked`".into()));
    }
    let twice = response.headers_mut().remove(CONTENT_LENGTH).is_some();
    Ok(!old && !twice)
}

fn least_loaded(shared: &[SharedH2]) -> Option<usize> {
    (0..shared.len()).min_by_key(|place| shared[*place].connection.streams())
}

/// Closes connections that idle too long, for as long as the pool lives.
async fn reap(origins: Weak<DashMap<Origin, Arc<Connections>>>) {
    loop {
        tokio::time::sleep(REAP_EVERY).await;
        let Some(origins) = origins.upgrade() else { return };
        origins.retain(|_, connections| {
            let mut state = connections.lock();
            state.drop_stale(Instant::now());
            let empty = state.h1.is_empty() && state.h2.is_empty();
            drop(state);
            !empty || Arc::strong_count(connections) > 1
        });
    }
}

/// An answer's body. Read to its end, its HTTP/1 connection is free again; dropped before, the connection closes.
pub struct UpstreamBody {
    body: Source,
    back: Option<Back>,
}

enum Source {
    H1(Incoming),
    H2(Box<http2::Answer>),
    /// Nothing: the server changed the protocol.
    Switched(Option<Box<Duplex>>),
}

struct Back {
    connections: Arc<Connections>,
    sender: H1,
}

impl UpstreamBody {
    fn http1(body: Incoming, back: Option<Back>) -> Self {
        let mut body = Self { body: Source::H1(body), back };
        body.give_back_at_end();
        body
    }

    fn http2(body: http2::Answer) -> Self {
        Self { body: Source::H2(Box::new(body)), back: None }
    }

    fn switched(duplex: Duplex) -> Self {
        Self { body: Source::Switched(Some(Box::new(duplex))), back: None }
    }

    fn give_back_at_end(&mut self) {
        if self.is_end_stream()
            && let Some(back) = self.back.take()
        {
            back.connections.give_back(back.sender);
        }
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match &mut self.body {
            Source::H1(body) => ready!(Pin::new(body).poll_frame(cx)).map(|frame| frame.map_err(BodyError::from)),
            Source::H2(body) => return Pin::new(body).poll_frame(cx),
            Source::Switched(_) => None,
        };
        match &frame {
            None => {
                if let Some(back) = self.back.take() {
                    back.connections.give_back(back.sender);
                }
            }
            Some(_) => self.give_back_at_end(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.body {
            Source::H1(body) => body.is_end_stream(),
            Source::H2(body) => body.is_end_stream(),
            Source::Switched(_) => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            Source::H1(body) => body.size_hint(),
            Source::H2(body) => body.size_hint(),
            Source::Switched(_) => SizeHint::with_exact(0),
        }
    }
}

/// The upstream's side of a connection that is no longer HTTP.
pub enum Switched {
    /// A whole connection, once the 101 has been read.
    H1(OnUpgrade),
    /// One stream of a connection.
    H2(Box<Duplex>),
}

impl Switched {
    /// Takes it out of a 101.
    pub fn by(response: &mut Pooled) -> Self {
        if let Source::Switched(duplex) = &mut response.body_mut().body
            && let Some(duplex) = duplex.take()
        {
            return Self::H2(duplex);
        }
        Self::H1(hyper::upgrade::on(response))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use http_body_util::{BodyExt, Full};
    use tokio::io::duplex;

    use super::super::{Proxies, Roots};
    use super::*;
    use crate::host::Authority;
    use crate::limits::Limits;
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn a_request_of_which_not_a_byte_was_written_was_not_processed() {
        // RTY-032, C6
        let (roots, metrics) = (Roots::load(&[], "x").unwrap(), Metrics::default());
        let dialer = Dialer::new(&roots, HashMap::new(), Proxies::default(), &Limits::default(), &metrics).unwrap();
        let authority = Authority::parse("api.test:443", None).unwrap();
        let origin = Origin { authority, plaintext: false, http: UpstreamHttp::H1 };
        let (io, closed) = duplex(1024);
        drop(closed);
        let ready = Pool::new(dialer).h1(io).await.unwrap();
        let body = Full::new(Bytes::from("x")).map_err(|never| match never {}).boxed_unsync();
        let request = (Request::post("/").body(body).unwrap(), None);
        let sent = send_on(ready, &origin, None, &Arc::new(Connections::to(&origin)), request).await;
        assert_eq!(sent.map(drop).map_err(Unsent::into_error), Err(UpstreamError::Unprocessed));
    }
}
