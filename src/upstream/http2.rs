//! HTTP/2 to an upstream, on the `h2` crate itself.
//!
//! hyper's client does not tell what a server allows now, neither streams nor WebSockets, and takes an answer that was
//! canceled halfway for a whole one. All three matter to an agent.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::ext::Protocol;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, request, uri};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, oneshot};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::empties::WithoutEmpties;
use super::{BodyError, RequestBody, UpstreamError, websocket};
use crate::metrics::Open;

/// What an agent that does not read keeps waiting for each of its answers.
const STREAM_WINDOW: u32 = 256 << 10;
/// Room for every stream's window: agents that do not read must not stop what the others read on the same connection.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// How much less than 256 bytes all small frames that are unread may hold together; `h2` closes the connection beyond.
/// Language models send a frame for each word: the full windows of a hundred such answers may wait.
const SMALL_FRAMES: usize = 128 << 20;
const MAX_HEADER_LIST: u32 = 256 << 10;
const SEND_BUFFER: usize = 256 << 10;
/// What agents canceled is remembered: frames that were under way are errors otherwise, and too many of those end the
/// connection for all.
const CANCELED: usize = 1024;
const CANCELED_FOR: Duration = Duration::from_secs(10);
const PING_AFTER: Duration = Duration::from_secs(20);
/// gRPC servers hang up at the fourth ping that comes within 5 minutes of the one before while they have nothing to say.
const PINGS_SOON: u32 = 2;
const PING_LATER: Duration = Duration::from_secs(310);
const PONG_WITHIN: Duration = Duration::from_secs(20);
/// How long a server whose answer its agent has may take nothing more of the request, or not say the end: as long as an
/// agent may pause by default, and with nobody there any more who would give it up.
const LINGER: Duration = Duration::from_secs(5 * 60);

/// A connection. A clone is the same one.
#[derive(Clone)]
pub(super) struct Connection {
    sender: SendRequest<Bytes>,
    state: Arc<State>,
}

struct State {
    /// Taken by whoever waits for a pong.
    pings: Mutex<Option<PingPong>>,
    /// The server's settings have arrived.
    settled: AtomicBool,
    ended: AtomicBool,
    open: AtomicUsize,
    /// Something of an answer has come since this was last looked at.
    heard: AtomicBool,
}

/// One stream of a connection, counted while it lives.
pub(super) struct Stream(Arc<State>);

impl Connection {
    pub(super) async fn open<IO>(io: IO, counted: Open) -> Result<Self, UpstreamError>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handshake = Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .data_frame_budget(SMALL_FRAMES)
            .max_header_list_size(MAX_HEADER_LIST)
            .max_send_buffer_size(SEND_BUFFER)
            .max_concurrent_reset_streams(CANCELED)
            .reset_stream_duration(CANCELED_FOR)
            .enable_push(false)
            .handshake(WithoutEmpties::new(io));
        let (sender, mut connection) = handshake.await.map_err(|error| UpstreamError::from_h2(&error))?;
        let state = Arc::new(State {
            pings: Mutex::new(connection.ping_pong()),
            settled: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            open: AtomicUsize::new(0),
            heard: AtomicBool::new(false),
        });
        let kept = state.clone();
        tokio::spawn(async move {
            let _counted = counted;
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "upstream connection ended");
                },
                () = kept.falls_silent() => tracing::debug!("upstream connection ended: no pong"),
            }
            kept.ended.store(true, Ordering::Release);
        });
        Ok(Self { sender, state })
    }

    /// Whether no new stream can be opened: it ended, or the server said that it goes away.
    pub(super) fn is_closed(&self) -> bool {
        let ready = self.sender.clone().poll_ready(&mut Context::from_waker(Waker::noop()));
        self.state.ended.load(Ordering::Acquire) || matches!(ready, Poll::Ready(Err(_)))
    }

    /// How many streams are open.
    pub(super) fn streams(&self) -> usize {
        self.state.open.load(Ordering::Relaxed)
    }

    /// Whether the server allows another stream now (RFC 9113 section 6.5.2).
    pub(super) fn has_room(&self) -> bool {
        self.streams() < self.sender.current_max_send_streams()
    }

    /// Counts a stream.
    pub(super) fn stream(&self) -> Stream {
        self.state.open.fetch_add(1, Ordering::Relaxed);
        Stream(self.state.clone())
    }

    /// Whether the server takes WebSockets (RFC 8441 section 3), which its settings say.
    pub(super) async fn takes_websockets(&self) -> bool {
        self.state.settled().await;
        self.sender.is_extended_connect_protocol_enabled()
    }

    /// Sends a request in origin form; what is awaited is the answer.
    pub(super) fn send(
        mut self,
        stream: Stream,
        authority: Option<uri::Authority>,
        request: Request<RequestBody>,
    ) -> Result<impl Future<Output = Result<Response<Answer>, UpstreamError>> + Send + use<>, UpstreamError> {
        let (mut head, body) = request.into_parts();
        rewrite(&mut head, authority)?;
        if let Some(length @ 1..) = body.size_hint().exact() {
            head.headers.entry(CONTENT_LENGTH).or_insert(HeaderValue::from(length));
        } else if body.is_end_stream() && !bodiless(&head.method) {
            head.headers.entry(CONTENT_LENGTH).or_insert(HeaderValue::from(0));
        }
        let (ended, asks_for_head) = (body.is_end_stream(), head.method == Method::HEAD);
        let sent = self.sender.send_request(Request::from_parts(head, ()), ended);
        let (answer, to) = sent.map_err(|error| UpstreamError::from_h2(&error))?;
        let upload = if ended { Upload(None) } else { Upload::start(body, to) };
        Ok(async move {
            let answer = head_of(answer).await?;
            stream.heard();
            Ok(Answer::of(answer, asks_for_head, upload, stream))
        })
    }

    /// Sends a WebSocket handshake in the form of HTTP/1.1 as an extended CONNECT (RFC 8441 section 5). The answer is
    /// in the form of HTTP/1.1 too.
    pub(super) async fn connect(
        mut self,
        stream: Stream,
        authority: Option<uri::Authority>,
        request: Request<RequestBody>,
    ) -> Result<Response<Result<Duplex, Answer>>, UpstreamError> {
        let (mut head, _) = request.into_parts();
        rewrite(&mut head, authority)?;
        websocket::remove_key(&mut head.headers);
        head.method = Method::CONNECT;
        head.extensions.insert(Protocol::from_static(websocket::WEBSOCKET));
        let sent = self.sender.send_request(Request::from_parts(head, ()), false);
        let (answer, to) = sent.map_err(|error| UpstreamError::from_h2(&error))?;
        let mut answer = head_of(answer).await?;
        if !answer.status().is_success() {
            return Ok(Answer::of(answer, false, Upload(None), stream).map(Err));
        }
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        answer.headers_mut().insert(UPGRADE, HeaderValue::from_static(websocket::WEBSOCKET));
        Ok(answer.map(|from| Ok(Duplex { to, from, unread: Bytes::new(), stream })))
    }
}

impl State {
    /// Waits for the settings. They are the server's first frame, so they have come when a pong has.
    async fn settled(&self) {
        if self.settled.load(Ordering::Acquire) {
            return;
        }
        let mut pings = self.pings.lock().await;
        let Some(pings) = &mut *pings else { return };
        if !self.settled.load(Ordering::Acquire) {
            pong(pings).await;
            self.settled.store(true, Ordering::Release);
        }
    }

    /// Resolves when the server does not answer a ping. It gets one when nothing of an answer has come for a while.
    async fn falls_silent(&self) {
        let (mut pinged, mut count) = (Instant::now(), 0);
        loop {
            tokio::time::sleep(PING_AFTER).await;
            if self.heard.swap(false, Ordering::Relaxed) {
                count = 0;
            } else if self.open.load(Ordering::Relaxed) > 0 && (count < PINGS_SOON || pinged.elapsed() > PING_LATER) {
                (pinged, count) = (Instant::now(), count + 1);
                let mut pings = self.pings.lock().await;
                let Some(pings) = &mut *pings else { return std::future::pending().await };
                if !pong(pings).await {
                    return;
                }
            }
        }
    }
}

/// Whether a ping is answered in time; one that is under way already will do, for whoever sent it may be gone.
async fn pong(pings: &mut PingPong) -> bool {
    // The only error is that one is under way, or that the connection has ended, which the pong tells too.
    let _ = pings.send_ping(Ping::opaque());
    matches!(tokio::time::timeout(PONG_WITHIN, poll_fn(|cx| pings.poll_pong(cx))).await, Ok(Ok(_)))
}

impl Stream {
    /// Something of its answer has come.
    fn heard(&self) {
        self.0.heard.store(true, Ordering::Relaxed);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Makes a head what HTTP/2 wants: a whole URI, and no field that is for one HTTP/1 connection.
fn rewrite(head: &mut request::Parts, authority: Option<uri::Authority>) -> Result<(), UpstreamError> {
    for name in [HOST, TRANSFER_ENCODING, CONNECTION, UPGRADE] {
        head.headers.remove(name);
    }
    head.version = Version::HTTP_2;
    let mut uri = std::mem::take(&mut head.uri).into_parts();
    uri.scheme = Some(http::uri::Scheme::HTTPS);
    uri.authority = authority;
    head.uri = http::Uri::from_parts(uri).map_err(|_| UpstreamError::Protocol("unusable URI".into()))?;
    Ok(())
}

/// Whether a request of this method without a body says nothing of its length (RFC 9110 section 8.6).
pub(super) fn bodiless(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::DELETE)
}

async fn head_of(answer: ResponseFuture) -> Result<Response<RecvStream>, UpstreamError> {
    answer.await.map_err(|error| UpstreamError::from_h2(&error))
}

/// Sends a body as the server makes room for it; stops when the server wants no more of it.
async fn upload(mut body: RequestBody, mut to: SendStream<Bytes>, mut answered: Answered) {
    loop {
        let frame = tokio::select! {
            biased;
            _ = poll_fn(|cx| to.poll_reset(cx)) => return,
            frame = body.frame() => frame,
        };
        let (sent, last) = match frame.map(|frame| frame.map(Frame::into_data)) {
            Some(Ok(Ok(data))) => {
                let last = body.is_end_stream();
                (send(&mut to, data, last, &mut answered).await, last)
            }
            Some(Ok(Err(frame))) => match frame.into_trailers() {
                Ok(trailers) => (to.send_trailers(trailers), true),
                Err(_) => (Ok(()), false),
            },
            // It must not look complete.
            Some(Err(_)) => return to.send_reset(Reason::CANCEL),
            None => (to.send_data(Bytes::new(), true), true),
        };
        if sent.is_err() {
            return;
        }
        if last {
            break;
        }
    }
    drop(body);
    if let Some(rest) = answered.rest() {
        rest.ends().await;
    }
}

async fn send(
    to: &mut SendStream<Bytes>,
    mut data: Bytes,
    last: bool,
    answered: &mut Answered,
) -> Result<(), h2::Error> {
    while data.has_remaining() {
        let room = tokio::select! {
            biased;
            room = poll_fn(|cx| poll_room(to, data.len(), cx)) => room?,
            () = answered.long_ago() => return Err(Reason::CANCEL.into()),
        };
        let part = data.split_to(room.min(data.len()));
        let last = last && data.is_empty();
        to.send_data(part, last)?;
        if last {
            return Ok(());
        }
    }
    if last { to.send_data(data, true) } else { Ok(()) }
}

/// Waits until there is room for something of these many bytes. Room is only asked for with data at hand: what one
/// stream holds of the connection's, no other can use.
fn poll_room(to: &mut SendStream<Bytes>, wanted: usize, cx: &mut Context<'_>) -> Poll<Result<usize, h2::Error>> {
    to.reserve_capacity(wanted);
    loop {
        match to.capacity() {
            0 => ready!(to.poll_capacity(cx)).unwrap_or(Err(Reason::STREAM_CLOSED.into()))?,
            room => return Poll::Ready(Ok(room)),
        };
    }
}

/// The sending of a request's body, which ends when nobody waits for the answer any more; but goes on when its agent has
/// the answer whole, for the server may still want the rest of the request.
struct Upload(Option<Sending>);

struct Sending {
    task: AbortHandle,
    whole: oneshot::Sender<Receiving>,
    unwanted: Unwanted,
}

impl Upload {
    fn start(body: RequestBody, to: SendStream<Bytes>) -> Self {
        let (whole, comes) = oneshot::channel();
        let task = tokio::spawn(upload(body, to, Answered { comes: Some(comes), rest: None })).abort_handle();
        Self(Some(Sending { task, whole, unwanted: Unwanted::default() }))
    }

    fn is_unwanted(&self) -> bool {
        self.0.as_ref().is_some_and(|sending| sending.unwanted.is_said())
    }

    /// Lets it go on by itself, with what is left of the stream; gives that back where nothing goes on.
    fn goes_on(&mut self, rest: Receiving) -> Option<Receiving> {
        match self.0.take() {
            Some(sending) => sending.whole.send(rest).err(),
            None => Some(rest),
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(sending) = self.0.take() {
            sending.task.abort();
        }
    }
}

/// Comes with an answer while its request may still be sent: whoever drops the answer and says this before wants neither,
/// also when the answer is whole.
#[derive(Clone, Default)]
pub struct Unwanted(Arc<AtomicBool>);

impl Unwanted {
    /// Says so.
    pub fn say(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_said(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What an upload knows of its answer.
struct Answered {
    comes: Option<oneshot::Receiver<Receiving>>,
    rest: Option<Receiving>,
}

impl Answered {
    /// Resolves when the agent has had the whole answer for a while.
    async fn long_ago(&mut self) {
        if let Some(comes) = &mut self.comes {
            self.rest = comes.await.ok();
            self.comes = None;
        }
        if self.rest.is_none() {
            // It was dropped before its end, and aborts this.
            return std::future::pending().await;
        }
        tokio::time::sleep(LINGER).await;
    }

    /// What is left of the answer, if its agent has all that counts of it.
    fn rest(mut self) -> Option<Receiving> {
        if let Some(mut comes) = self.comes.take() {
            comes.close();
            return comes.try_recv().ok();
        }
        self.rest.take()
    }
}

/// The answer's side of a stream.
struct Receiving {
    from: RecvStream,
    stream: Stream,
}

impl Receiving {
    /// Waits for the end, of which the bytes have come. A stream that is dropped before is canceled, and with it what some
    /// servers still do behind their answer.
    async fn ends(mut self) {
        let ends = async { while let Some(Ok(_)) = self.from.data().await {} };
        let _ = tokio::time::timeout(LINGER, ends).await;
    }
}

/// The body of an answer. Dropped before its end, the stream is canceled.
pub(super) struct Answer {
    /// None once it is dropped.
    open: Option<Receiving>,
    /// How much is still to come, if that was said.
    left: Option<u64>,
    data_ended: bool,
    upload: Upload,
}

impl Answer {
    fn of(answer: Response<RecvStream>, asked_for_head: bool, upload: Upload, stream: Stream) -> Response<Self> {
        let length = answer.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let empty = asked_for_head || matches!(answer.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        let left = if empty || answer.body().is_end_stream() { Some(0) } else { length };
        let unwanted = upload.0.as_ref().map(|sending| sending.unwanted.clone());
        let open = |from| Some(Receiving { from, stream });
        let mut answer = answer.map(|from| Self { open: open(from), left, data_ended: false, upload });
        if let Some(unwanted) = unwanted {
            answer.extensions_mut().insert(unwanted);
        }
        answer
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let Some(rest) = self.open.take() else { return };
        let whole = self.left == Some(0) || rest.from.is_end_stream();
        if whole
            && !self.upload.is_unwanted()
            && let Some(rest) = self.upload.goes_on(rest)
            && !rest.from.is_end_stream()
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(rest.ends());
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let Some(Receiving { from, stream }) = &mut this.open else { return Poll::Ready(None) };
        while !this.data_ended {
            match ready!(from.poll_data(cx)).transpose().map_err(broken)? {
                // Such as the one that only carries the end.
                Some(data) if data.is_empty() => {}
                Some(data) => {
                    stream.heard();
                    let _ = from.flow_control().release_capacity(data.len());
                    this.left = this.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                None => this.data_ended = true,
            }
        }
        let trailers = ready!(from.poll_trailers(cx)).map_err(broken)?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.open.as_ref().is_none_or(|open| open.from.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// An answer that broke off. Said to an agent as they are, these two reasons would make it a whole one.
fn broken(error: h2::Error) -> BodyError {
    match error.reason() {
        Some(Reason::NO_ERROR | Reason::CANCEL) => "the upstream canceled its answer".into(),
        _ => error.into(),
    }
}

/// A stream on which both sides say what they like.
pub struct Duplex {
    to: SendStream<Bytes>,
    from: RecvStream,
    unread: Bytes,
    stream: Stream,
}

impl AsyncRead for Duplex {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match ready!(self.from.poll_data(cx)) {
                Some(data) => {
                    self.unread = data.map_err(io::Error::other)?;
                    self.stream.heard();
                }
                None => return Poll::Ready(Ok(())),
            }
        }
        let length = self.unread.len().min(buffer.remaining());
        buffer.put_slice(&self.unread.split_to(length));
        let _ = self.from.flow_control().release_capacity(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Duplex {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(poll_room(&mut self.to, bytes.len(), cx)).map_err(io::Error::other)?;
        let length = room.min(bytes.len());
        self.to.send_data(Bytes::copy_from_slice(&bytes[..length]), false).map_err(io::Error::other)?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.to.send_data(Bytes::new(), true).map_err(io::Error::other))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http_body_util::{Empty, Full};
    use tokio::io::DuplexStream;

    use super::*;
    use crate::metrics::Metrics;

    /// A server's end of a connection, and all bytes that come to it.
    struct Tapped {
        io: DuplexStream,
        heard: Arc<Mutex<Vec<u8>>>,
    }

    impl AsyncRead for Tapped {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
            self.heard.lock().unwrap().extend_from_slice(&buffer.filled()[before..]);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Tapped {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.io).poll_write(cx, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_shutdown(cx)
        }
    }

    /// The pings among a client's frames, which begin behind its preface (RFC 9113 sections 3.4, 4.1, 6.7).
    fn pings(heard: &Mutex<Vec<u8>>) -> usize {
        let heard = heard.lock().unwrap();
        let (mut frames, mut pings) = (&heard[24..], 0);
        while let [a, b, c, kind, flags, ..] = *frames {
            pings += usize::from(kind == 6 && flags == 0);
            frames = &frames[9 + usize::from(a) * 65536 + usize::from(b) * 256 + usize::from(c)..];
        }
        pings
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_stops_waiting_for_the_settings_does_no_harm_to_the_connection() {
        let (near, far) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(far).await.unwrap();
            while connection.accept().await.is_some() {}
        });
        let connection = Connection::open(near, Metrics::default().upstream()).await.unwrap();
        for _ in 0..2 {
            // Polled once, so that its ping is sent, and given up.
            let asked = connection.takes_websockets();
            tokio::select! {
                biased;
                _ = asked => panic!("no pong can have come"),
                () = std::future::ready(()) => {}
            }
        }
        // A stream that is silent for long.
        let _stream = connection.stream();
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!connection.is_closed());
        assert!(!connection.takes_websockets().await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_has_nothing_to_say_is_pinged_twice_and_then_rarely() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let heard = Arc::new(Mutex::new(Vec::new()));
        let tapped = Tapped { io: far, heard: heard.clone() };
        let (speak, mut spoken) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(tapped).await.unwrap();
            let (_, mut answer) = connection.accept().await.unwrap().unwrap();
            let mut body = answer.send_response(Response::new(()), false).unwrap();
            loop {
                tokio::select! {
                    _ = connection.accept() => return,
                    Some(()) = spoken.recv() => body.send_data(Bytes::from_static(b"word"), false).unwrap(),
                }
            }
        });
        let connection = Connection::open(near, Metrics::default().upstream()).await.unwrap();
        let authority = Some(uri::Authority::from_static("api.test"));
        let request = Request::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
        let answer = connection.clone().send(connection.stream(), authority, request).unwrap().await.unwrap();
        let mut body = answer.into_body();
        let minutes = |count: u64| tokio::time::sleep(Duration::from_secs(60 * count));

        minutes(4).await;
        assert_eq!(pings(&heard), 2);
        minutes(60).await;
        assert!((3..=2 + 12).contains(&pings(&heard)), "{}", pings(&heard));
        // A word of it, and it may be asked anew.
        let before = pings(&heard);
        speak.send(()).await.unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "word");
        minutes(2).await;
        assert_eq!(pings(&heard) - before, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_that_a_server_takes_no_more_of_behind_its_answer_ends_in_time() {
        let (near, far) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move {
            let mut connection =
                h2::server::Builder::new().initial_window_size(1000).handshake::<_, Bytes>(far).await.unwrap();
            let (request, mut answer) = connection.accept().await.unwrap().unwrap();
            answer.send_response(Response::new(()), true).unwrap();
            let _unread = request;
            while connection.accept().await.is_some() {}
        });
        let connection = Connection::open(near, Metrics::default().upstream()).await.unwrap();
        let body = Arc::new(vec![0; 1 << 20]);
        let sent = Full::new(Bytes::from_owner(Kept(body.clone()))).map_err(|never| match never {}).boxed_unsync();
        let request = Request::post("/").body(sent).unwrap();
        let authority = Some(uri::Authority::from_static("api.test"));
        let answer = connection.clone().send(connection.stream(), authority, request).unwrap().await.unwrap();
        drop(answer);
        tokio::time::sleep(LINGER - Duration::from_secs(1)).await;
        assert_eq!((connection.streams(), Arc::strong_count(&body)), (1, 2));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!((connection.streams(), Arc::strong_count(&body)), (0, 1));
        assert!(!connection.is_closed());
    }

    /// A body of which it shows when nobody holds it any more.
    struct Kept(Arc<Vec<u8>>);

    impl AsRef<[u8]> for Kept {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
}
