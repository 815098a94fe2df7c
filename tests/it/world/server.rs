//! A TLS server that remembers what it saw and answers as scripted.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use http::{HeaderMap, Request, Response, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use super::answer::{Answer, Filler, hex};
use super::certificates::Tls;
use super::log::{Unread, unread};
use super::raw::Bytestream;
use super::{DEADLINE, soon};

/// As much of a body as is kept as it is.
const KEPT: usize = 64 << 10;

/// A server. A clone is the same one.
#[derive(Clone)]
pub struct Server {
    inner: Arc<Inner>,
}

struct Inner {
    address: SocketAddr,
    certificate: Option<CertificateDer<'static>>,
    usual: Usual,
    state: Mutex<State>,
    changed: Notify,
    connections: AtomicUsize,
    handshakes: AtomicUsize,
    garbles: Arc<AtomicBool>,
}

/// What a server does when nothing is scripted.
pub type Usual = Box<dyn Fn(&Seen) -> Answer + Send + Sync>;

#[derive(Default)]
struct State {
    seen: Vec<Seen>,
    answers: VecDeque<Answer>,
    raw: VecDeque<Raw>,
    is_raw: bool,
    /// What came behind the last request, on connections that ended.
    leftover: Vec<u8>,
    refuse: usize,
    garble: bool,
    by_hand: Option<ByHand>,
}

/// Serves a connection by hand: which one it is, from 1, and its bytes.
type ByHand = Arc<dyn Fn(usize, Box<dyn Bytestream>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// An answer byte by byte, and what follows it.
pub struct Raw {
    bytes: Vec<u8>,
    then: Then,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    NextRequest,
    Close,
    Echo,
}

/// The bytes, and then the next request.
pub fn raw(bytes: impl Into<Vec<u8>>) -> Raw {
    Raw { bytes: bytes.into(), then: Then::NextRequest }
}

impl Raw {
    pub fn and_close(self) -> Self {
        Self { then: Then::Close, ..self }
    }

    pub fn and_echo(self) -> Self {
        Self { then: Then::Echo, ..self }
    }
}

/// One request, as it arrived.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub method: String,
    pub target: String,
    pub version: Version,
    pub headers: HeaderMap,
    /// The beginning of the body.
    pub body: Vec<u8>,
    pub length: u64,
    pub sha256: String,
    pub trailers: HeaderMap,
    /// The body came to its end.
    pub complete: bool,
}

impl Seen {
    /// The one value of a field, if there is one.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.headers.get_all(name).iter();
        let first = all.next().and_then(|value| value.to_str().ok());
        assert!(all.next().is_none(), "{name} is there twice");
        first
    }

    /// The token that it carried.
    pub fn token(&self) -> Option<&str> {
        self.header("authorization").and_then(|value| value.strip_prefix("Bearer "))
    }

    /// The path of its target, in either form, without the query.
    pub fn path(&self) -> &str {
        let path = match self.target.split_once("://") {
            Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
            None => &self.target,
        };
        path.split('?').next().unwrap_or_default()
    }

    pub fn names(&self) -> Vec<&str> {
        self.headers.keys().map(|name| name.as_str()).collect()
    }
}

impl Server {
    pub async fn start(tls: Option<Tls>, usual: Usual) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let inner = Inner {
            address: listener.local_addr().unwrap(),
            certificate: tls.as_ref().map(|tls| tls.certificate.clone()),
            usual,
            state: Mutex::default(),
            changed: Notify::new(),
            connections: AtomicUsize::new(0),
            handshakes: AtomicUsize::new(0),
            garbles: Arc::default(),
        };
        let server = Self { inner: Arc::new(inner) };
        let accepting = server.clone();
        tokio::spawn(unread(async move {
            while let Ok((stream, _)) = listener.accept().await {
                accepting.inner.connections.fetch_add(1, Ordering::SeqCst);
                let _ = stream.set_nodelay(true);
                let server = accepting.clone();
                match &tls {
                    Some(tls) => {
                        tokio::spawn(unread(server.serve_tls(TlsAcceptor::from(tls.config.clone()), stream)));
                    }
                    None => {
                        tokio::spawn(unread(server.serve(stream, false)));
                    }
                }
            }
        }));
        server
    }

    pub fn address(&self) -> SocketAddr {
        self.inner.address
    }

    /// What it proves itself with.
    pub fn certificate(&self) -> Option<CertificateDer<'static>> {
        self.inner.certificate.clone()
    }

    /// The next answers, in this order.
    pub fn answers<A: Into<Answer>>(&self, answers: impl IntoIterator<Item = A>) {
        self.state().answers.extend(answers.into_iter().map(Into::into));
    }

    /// From now on it writes these bytes, whatever they are, one after each request.
    pub fn answers_raw(&self, answers: impl IntoIterator<Item = Raw>) {
        let mut state = self.state();
        state.is_raw = true;
        state.raw.extend(answers);
    }

    /// From now on it refuses so many HTTP/2 streams unread, and then answers 200.
    pub fn refuses_streams(&self, streams: usize) {
        self.state().refuse = streams;
    }

    /// Once it has seen another request, all that it says is garbled below TLS.
    pub fn garbles_its_answers(&self) {
        self.state().garble = true;
    }

    /// From now on its connections are served by this.
    pub fn is_served_by<F>(&self, serve: impl Fn(usize, Box<dyn Bytestream>) -> F + Send + Sync + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.state().by_hand = Some(Arc::new(move |number, stream| Box::pin(serve(number, stream))));
    }

    /// The bytes behind the last request on connections that spoke raw.
    pub fn leftover(&self) -> Vec<u8> {
        self.state().leftover.clone()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state().seen.clone()
    }

    /// The tokens of the requests that it saw.
    pub fn tokens(&self) -> Vec<String> {
        self.seen().iter().map(|seen| seen.token().unwrap_or("none").to_owned()).collect()
    }

    /// How many times somebody connected, and how many of them finished the handshake.
    pub fn met(&self) -> (usize, usize) {
        (self.inner.connections.load(Ordering::SeqCst), self.inner.handshakes.load(Ordering::SeqCst))
    }

    /// Waits until it has seen so many requests' heads.
    pub async fn has_seen(&self, requests: usize) {
        self.until(|seen| seen.len() >= requests).await;
    }

    /// Waits until its requests look like this.
    pub async fn until(&self, condition: impl Fn(&[Seen]) -> bool) {
        soon(async {
            loop {
                let mut changed = std::pin::pin!(self.inner.changed.notified());
                changed.as_mut().enable();
                if condition(&self.state().seen) {
                    return;
                }
                changed.await;
            }
        })
        .await;
    }

    async fn serve_tls(self, tls: TlsAcceptor, stream: TcpStream) {
        let stream = Garbling { io: stream, on: self.inner.garbles.clone() };
        let Ok(stream) = tls.accept(stream).await else { return };
        self.inner.handshakes.fetch_add(1, Ordering::SeqCst);
        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        self.serve(stream, h2).await;
    }

    async fn serve<S>(self, mut stream: S, h2: bool)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let by_hand = self.state().by_hand.clone();
        if let Some(serve) = by_hand {
            return serve(self.inner.connections.load(Ordering::SeqCst), Box::new(stream)).await;
        }
        if self.state().is_raw {
            let mut unread = Vec::new();
            let _ = self.serve_raw(&mut stream, &mut unread).await;
            self.state().leftover.extend(unread);
            return;
        }
        if self.state().refuse > 0 {
            let _ = self.serve_refusing(stream).await;
            return;
        }
        let service = service_fn(move |request| {
            let server = self.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        let stream = TokioIo::new(stream);
        let _ = match h2 {
            true => http2::Builder::new(Unread).serve_connection(stream, service).await,
            false => http1::Builder::new().serve_connection(stream, service).await,
        };
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Filler> {
        let (head, body) = request.into_parts();
        let seen = Seen {
            method: head.method.to_string(),
            target: head.uri.to_string(),
            version: head.version,
            headers: head.headers,
            ..Seen::default()
        };
        let place = self.remember(seen);
        let scripted = self.state().answers.pop_front();
        if scripted.as_ref().is_some_and(|answer| answer.early) {
            tokio::spawn(unread(self.clone().read(place, body)));
        } else {
            self.clone().read(place, body).await;
        }
        if let Some(gate) = scripted.as_ref().and_then(|answer| answer.gate.clone()) {
            gate.pass().await;
        }
        let answer = scripted.filter(|answer| !answer.usual);
        answer.unwrap_or_else(|| (self.inner.usual)(&self.seen()[place])).response()
    }

    async fn read(self, place: usize, mut body: Incoming) {
        let mut hash = Sha256::new();
        let mut complete = true;
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else {
                complete = false;
                break;
            };
            let mut state = self.state();
            let seen = &mut state.seen[place];
            if let Some(data) = frame.data_ref() {
                seen.length += data.len() as u64;
                hash.update(data);
                let room = KEPT.saturating_sub(seen.body.len()).min(data.len());
                seen.body.extend_from_slice(&data[..room]);
            }
            if let Some(trailers) = frame.trailers_ref() {
                seen.trailers = trailers.clone();
            }
            drop(state);
            self.inner.changed.notify_waiters();
        }
        let mut state = self.state();
        state.seen[place].complete = complete;
        state.seen[place].sha256 = hex(&hash.finalize());
        drop(state);
        self.inner.changed.notify_waiters();
    }

    async fn serve_refusing<S>(&self, stream: S) -> Result<(), h2::Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut streams = h2::server::handshake(stream).await?;
        while let Some(accepted) = streams.accept().await {
            let (request, mut respond) = accepted?;
            let refuse = self.state().refuse;
            self.state().refuse = refuse.saturating_sub(1);
            if refuse > 0 {
                respond.send_reset(h2::Reason::REFUSED_STREAM);
                continue;
            }
            let server = self.clone();
            tokio::spawn(unread(async move {
                let mut body = request.into_body();
                let mut hash = Sha256::new();
                while let Some(Ok(data)) = body.data().await {
                    let _ = body.flow_control().release_capacity(data.len());
                    hash.update(&data);
                }
                server.remember(Seen { sha256: hex(&hash.finalize()), complete: true, ..Seen::default() });
                let _ = respond.send_response(Response::new(()), true);
            }));
        }
        Ok(())
    }

    async fn serve_raw<S>(&self, stream: &mut S, unread: &mut Vec<u8>) -> std::io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        while let Some(seen) = read_raw(stream, unread).await? {
            self.remember(seen);
            let Some(answer) = self.state().raw.pop_front() else { return Ok(()) };
            stream.write_all(&answer.bytes).await?;
            stream.flush().await?;
            match answer.then {
                Then::NextRequest => {}
                Then::Close => return stream.shutdown().await,
                Then::Echo => loop {
                    stream.write_all(&std::mem::take(unread)).await?;
                    stream.flush().await?;
                    if stream.read_buf(unread).await? == 0 {
                        return Ok(());
                    }
                },
            }
        }
        Ok(())
    }

    /// Notes a request of a connection that is served by hand.
    pub fn remember(&self, seen: Seen) -> usize {
        let mut state = self.state();
        state.seen.push(seen);
        let place = state.seen.len() - 1;
        self.inner.garbles.store(state.garble, Ordering::SeqCst);
        drop(state);
        self.inner.changed.notify_waiters();
        place
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that, while this is on, changes the last of the bytes that are written together: TLS's seal is broken.
struct Garbling {
    io: TcpStream,
    on: Arc<AtomicBool>,
}

impl AsyncRead for Garbling {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Garbling {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut bytes = bytes.to_vec();
        if let Some(last) = bytes.last_mut().filter(|_| self.on.load(Ordering::SeqCst)) {
            *last ^= 1;
        }
        Pin::new(&mut self.io).poll_write(cx, &bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Reads a head and its body, chunks as they are; what comes behind stays unread.
async fn read_raw<S>(stream: &mut S, unread: &mut Vec<u8>) -> std::io::Result<Option<Seen>>
where
    S: AsyncRead + Unpin,
{
    let Some(head) = read_until(stream, unread, b"\r\n\r\n").await? else { return Ok(None) };
    let mut seen = parse_head(&String::from_utf8_lossy(&head));
    if seen.header("transfer-encoding").is_some() {
        seen.body = read_until(stream, unread, b"0\r\n\r\n").await?.unwrap_or_default();
    } else {
        let length = seen.header("content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
        while unread.len() < length && stream.read_buf(unread).await? > 0 {}
        seen.body = unread.drain(..length.min(unread.len())).collect();
    }
    seen.length = seen.body.len() as u64;
    Ok(Some(seen))
}

async fn read_until<S>(stream: &mut S, unread: &mut Vec<u8>, end: &[u8]) -> std::io::Result<Option<Vec<u8>>>
where
    S: AsyncRead + Unpin,
{
    loop {
        if let Some(at) = unread.windows(end.len()).position(|window| window == end) {
            return Ok(Some(unread.drain(..at + end.len()).collect()));
        }
        if tokio::time::timeout(DEADLINE, stream.read_buf(unread)).await.map_err(std::io::Error::other)?? == 0 {
            return Ok(None);
        }
    }
}

fn parse_head(head: &str) -> Seen {
    let mut lines = head.lines();
    let mut start = lines.next().unwrap_or_default().split(' ');
    let mut part = || start.next().unwrap_or_default().to_owned();
    let (method, target) = (part(), part());
    let fields = lines.filter_map(|line| line.split_once(':'));
    let headers = fields.map(|(name, value)| (name.parse().unwrap(), value.trim().parse().unwrap())).collect();
    Seen { method, target, headers, complete: true, ..Seen::default() }
}
