//! Lets an HTTP/1 connection that idles give back what reading it takes: the parser, its buffers and its timers.
//!
//! hyper keeps 8 KiB to read into and 8 KiB to write from for as long as a connection lives, and agents keep connections
//! open that they seldom use. So hyper is left when nothing is under way, and begun anew with the next byte.

use std::convert::Infallible;
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1::UpgradeableConnection;
use hyper::service::Service;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use zeroize::Zeroizing;

use super::half::{Answer, Answers};
use crate::drain::Drain;
use crate::seldom::seldom;

/// How often it is looked whether anything has come since. Requests that follow each other sooner pay nothing.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// As much is read at once of what ends a rest.
const FIRST: usize = 4096;

/// What reads the requests of a connection.
pub(super) type Reader<IO, S> = Pin<Box<UpgradeableConnection<TokioIo<Resting<IO>>, S>>>;

/// What answers them.
pub(super) trait Answering<B>:
    Service<
        Request<Incoming>,
        Response = Response<Answer<B>>,
        Error = Infallible,
        Future: Future<Output = Result<Response<Answer<B>>, Infallible>> + Send,
    > + Send
    + Unpin
{
}

impl<B, S> Answering<B> for S
where
    S: Service<Request<Incoming>, Response = Response<Answer<B>>, Error = Infallible> + Send + Unpin,
    S::Future: Send,
{
}

/// Serves a connection to its end, or when the stop begins what is under way on it; it idles no longer than `idle`.
pub(super) fn serve<IO, S, B>(
    io: IO,
    answers: Answers,
    idle: Duration,
    drain: Drain,
    read: impl Fn(Resting<IO>) -> Reader<IO, S> + Send,
) -> impl Future<Output = hyper::Result<()>> + Send
where
    IO: AsyncRead + AsyncWrite + Between + Unpin + Send + 'static,
    S: Answering<B>,
    B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Unpin + Send + 'static,
{
    let rest = Rest::default();
    // Not in the future: it would hold the connection twice, as it was given and as it is read.
    let mut reader = read(Resting::new(io, rest.clone()));
    async move {
        loop {
            let mut over = seldom(over(&drain, &answers, idle));
            tokio::select! {
                biased;
                ended = reader.as_mut() => return ended,
                () = &mut over => {
                    reader.as_mut().graceful_shutdown();
                    return reader.await;
                }
                () = seldom(rest.is_due(&answers)) => {}
            }
            let Some(parts) = Pin::into_inner(reader).into_parts() else { return Ok(()) };
            // Boxed: the future is no larger for it while the connection is read.
            let mut io = Box::new(parts.io.into_inner().after(parts.read_buf));
            if !io.stirs(over).await {
                return Ok(());
            }
            reader = read(*io);
        }
    }
}

async fn over(drain: &Drain, answers: &Answers, idle: Duration) {
    tokio::select! {
        () = drain.started() => {}
        () = answers.rest(idle) => {}
    }
}

/// A connection that knows where its requests begin and end.
pub(super) trait Between {
    /// Whether the last request has come whole, and nothing of another one.
    fn is_between(&self) -> bool;
}

/// What is known of a connection outside of the parser that holds it. A clone is the same one.
#[derive(Clone, Default)]
pub(super) struct Rest {
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    /// Everything that came was read, and everything that was to be written is.
    quiet: AtomicBool,
    /// Since it was last looked.
    stirred: AtomicBool,
}

impl Rest {
    fn stirs(&self) {
        self.seen.stirred.store(true, Ordering::Relaxed);
    }

    /// Resolves when the connection has been idle for a while.
    async fn is_due(&self, answers: &Answers) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let stirred = self.seen.stirred.swap(false, Ordering::Relaxed);
            if !stirred && self.seen.quiet.load(Ordering::Relaxed) && !answers.are_under_way() {
                return;
            }
        }
    }
}

/// A connection that is left by its parser while it idles.
pub(super) struct Resting<IO> {
    io: IO,
    /// What ended the last rest.
    early: Bytes,
    /// The last read found nothing.
    waits: bool,
    /// Nothing was written since the last flush.
    flushed: bool,
    rest: Rest,
}

impl<IO> Resting<IO> {
    pub(super) fn new(io: IO, rest: Rest) -> Self {
        Self { io, early: Bytes::new(), waits: false, flushed: true, rest }
    }

    /// The connection, and what was read of it and not yet taken.
    pub(super) fn into_parts(self) -> (IO, Bytes) {
        (self.io, self.early)
    }

    fn writes(&mut self) {
        self.flushed = false;
        self.rest.stirs();
    }

    /// The same, where these bytes have already been read. Empty lines between requests are passed over (RFC 9112 section
    /// 2.2).
    fn after(self, read: Bytes) -> Self {
        let empty = read.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
        Self { early: if empty { self.early } else { read }, ..self }
    }
}

impl<IO: Between> Resting<IO> {
    fn note(&self) {
        let quiet = self.waits && self.flushed && self.early.is_empty() && self.io.is_between();
        self.rest.seen.quiet.store(quiet, Ordering::Relaxed);
    }
}

impl<IO: AsyncRead + AsyncWrite + Between + Unpin> Resting<IO> {
    /// Waits for the next byte until it is over; false when the connection has ended.
    async fn stirs(&mut self, over: impl Future<Output = ()>) -> bool {
        if !self.early.is_empty() {
            return true;
        }
        let came = tokio::select! {
            came = poll_fn(|cx| self.poll_first(cx)) => came.unwrap_or(0),
            () = over => 0,
        };
        if came == 0 {
            let _ = self.io.shutdown().await;
        }
        came > 0
    }

    fn poll_first(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut room = Zeroizing::new([0; FIRST]);
        let mut first = ReadBuf::new(&mut room[..]);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut first))?;
        self.early = Bytes::copy_from_slice(first.filled());
        Poll::Ready(Ok(self.early.len()))
    }
}

impl<IO: AsyncRead + Between + Unpin> AsyncRead for Resting<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            let read = Pin::new(&mut self.io).poll_read(cx, buffer);
            self.waits = read.is_pending();
            if read.is_ready() {
                self.rest.stirs();
            }
            self.note();
            return read;
        }
        let length = self.early.len().min(buffer.remaining());
        buffer.put_slice(&self.early[..length]);
        self.early.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Between + Unpin> AsyncWrite for Resting<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.writes();
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.flushed = flushed.is_ready();
        self.note();
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.flushed = false;
        self.note();
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.writes();
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures_util::FutureExt;
    use http_body_util::{BodyExt, Full};
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use tokio::io::{AsyncReadExt, BufWriter, DuplexStream, duplex};
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::limits::Limits;
    use crate::proxy::wire::Strict;

    const IDLE: Duration = Duration::from_secs(60);
    /// More than the agent's side holds, and less than what buffers it, as TLS does.
    const LONG: usize = 8000;

    /// An agent whose connection is served, how often its reading has begun, and how it ends.
    fn served(takes: Duration) -> (DuplexStream, Arc<AtomicUsize>, impl Future<Output = hyper::Result<()>>, Drain) {
        let (agent, io) = duplex(1024);
        let (begun, answers, drain) = (Arc::<AtomicUsize>::default(), Answers::default(), Drain::default());
        let (counted, count) = (answers.clone(), begun.clone());
        let served =
            serve(Strict::new(BufWriter::new(io), &Limits::default()), answers, IDLE, drain.clone(), move |io| {
                count.fetch_add(1, Ordering::Relaxed);
                let counted = counted.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let answer = counted.begin();
                    Box::pin(async move {
                        let body = if request.uri() == "/long" { "x".repeat(LONG) } else { "answer".to_owned() };
                        request.into_body().collect().await.unwrap();
                        sleep(takes).await;
                        Ok(Response::new(answer.with(Full::new(Bytes::from(body)))))
                    })
                });
                Box::pin(
                    http1::Builder::new()
                        .auto_date_header(false)
                        .serve_connection(TokioIo::new(io), service)
                        .with_upgrades(),
                )
            });
        (agent, begun, tokio::spawn(served).map(Result::unwrap), drain)
    }

    async fn asks(agent: &mut DuplexStream, parts: &[&str], pause: Duration) {
        for part in parts {
            agent.write_all(part.as_bytes()).await.unwrap();
            sleep(pause).await;
        }
        let mut answer = [0; 44];
        agent.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nanswer");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_idles_is_read_anew_and_one_in_use_is_not() {
        let (mut agent, begun, ended, _) = served(Duration::ZERO);
        let request = ["GET / HTTP/1.1\r\nhost: a\r\n\r\n"];
        for _ in 0..20 {
            asks(&mut agent, &request, LOOK_EVERY / 2).await;
        }
        assert_eq!(begun.load(Ordering::Relaxed), 1);
        for rests in 1..4 {
            sleep(3 * LOOK_EVERY).await;
            asks(&mut agent, &request, Duration::ZERO).await;
            assert_eq!(begun.load(Ordering::Relaxed), 1 + rests);
        }
        // More at once than ends a rest, and empty lines before it.
        sleep(3 * LOOK_EVERY).await;
        let long = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9000\r\n\r\n{}", "x".repeat(9000));
        asks(&mut agent, &["\r\n", "\r\n", &long], 3 * LOOK_EVERY).await;
        drop(agent);
        ended.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_under_way_is_not_left() {
        let (mut agent, begun, _ended, _) = served(10 * LOOK_EVERY);
        asks(&mut agent, &["GET / HTTP/1.1\r\n", "host: a\r\n", "\r\n"], 4 * LOOK_EVERY).await;
        let body = ["POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n", "ab", "cd"];
        asks(&mut agent, &body, 4 * LOOK_EVERY).await;
        assert_eq!(begun.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_its_agent_takes_later_is_not_left() {
        let (began, (mut agent, begun, _ended, _)) = (Instant::now(), served(Duration::ZERO));
        agent.write_all(b"GET /long HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        sleep(10 * LOOK_EVERY).await;
        let mut answer = vec![0; "HTTP/1.1 200 OK\r\ncontent-length: 8000\r\n\r\n".len() + LONG];
        agent.read_exact(&mut answer).await.unwrap();
        assert!(answer.ends_with(b"xx"));
        assert!(began.elapsed() < 11 * LOOK_EVERY, "{:?}", began.elapsed());
        assert_eq!(begun.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_ends_with_the_agent_with_the_stop_and_with_its_time() {
        let (mut agent, _, ended, _) = served(Duration::ZERO);
        sleep(3 * LOOK_EVERY).await;
        agent.shutdown().await.unwrap();
        ended.await.unwrap();
        assert_eq!(agent.read(&mut [0]).await.unwrap(), 0);

        let (mut agent, _, ended, drain) = served(Duration::ZERO);
        sleep(3 * LOOK_EVERY).await;
        drain.finish(Duration::ZERO).await;
        ended.await.unwrap();
        assert_eq!(agent.read(&mut [0]).await.unwrap(), 0);

        let (mut agent, _, ended, _) = served(Duration::ZERO);
        let began = Instant::now();
        ended.await.unwrap();
        assert_eq!(began.elapsed().as_secs(), IDLE.as_secs());
        assert_eq!(agent.read(&mut [0]).await.unwrap(), 0);
    }
}
