//! Lets an agent that has said all it has to say still hear its answer.
//!
//! hyper takes the end of what an agent sends for its leaving, and gives up its request. Whether it left shows only when
//! something is written to it. So the end is held back while an answer is under way; an agent that closes without
//! TLS's goodbye, as one does that is killed, has left in any case.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use std::{future::Future, io};

use futures_util::task::AtomicWaker;
use http_body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// An agent that ended and to which nothing is written for so long has left: most of them have, and their requests cost.
const LEFT: Duration = Duration::from_secs(30);

/// The answers under way on one connection. A clone counts the same ones.
#[derive(Clone, Default)]
pub(super) struct Answers {
    counted: Arc<Counted>,
}

struct Counted {
    since: Instant,
    under_way: AtomicUsize,
    /// When the last one ended, in milliseconds from `since`.
    ended: AtomicU64,
    reader: AtomicWaker,
}

impl Default for Counted {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            under_way: Default::default(),
            ended: Default::default(),
            reader: Default::default(),
        }
    }
}

impl Answers {
    /// From the request to the end of its answer.
    pub(super) fn begin(&self) -> UnderWay {
        self.counted.under_way.fetch_add(1, Ordering::AcqRel);
        UnderWay(self.counted.clone())
    }

    /// Whether there is any.
    pub(super) fn are_under_way(&self) -> bool {
        self.counted.under_way.load(Ordering::Acquire) > 0
    }

    /// Resolves when none has been under way for this long. Its timer goes on through any number of requests.
    pub(super) async fn rest(&self, limit: Duration) {
        loop {
            let due = limit + if self.are_under_way() { self.counted.since.elapsed() } else { self.ended() };
            if due <= self.counted.since.elapsed() {
                return;
            }
            tokio::time::sleep_until(self.counted.since + due).await;
        }
    }

    fn ended(&self) -> Duration {
        Duration::from_millis(self.counted.ended.load(Ordering::Relaxed))
    }
}

/// One answer under way.
pub(super) struct UnderWay(Arc<Counted>);

impl UnderWay {
    /// Until this body has been written.
    pub(super) fn with<B>(self, body: B) -> Answer<B> {
        Answer { body, _under_way: self }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.ended.store(self.0.since.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
        self.0.reader.wake();
    }
}

/// An agent's connection, whose end is seen once no answer is under way.
pub(super) struct HeldEnd<IO> {
    io: IO,
    answers: Answers,
    /// Set once the agent has ended.
    left: Option<Pin<Box<Sleep>>>,
}

impl<IO> HeldEnd<IO> {
    pub(super) fn new(io: IO, answers: Answers) -> Self {
        Self { io, answers, left: None }
    }

    pub(super) fn into_inner(self) -> IO {
        self.io
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for HeldEnd<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.left.is_none() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut this.io).poll_read(cx, buffer))?;
            if buffer.filled().len() > before || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        let left = this.left.get_or_insert_with(|| Box::pin(tokio::time::sleep(LEFT)));
        this.answers.counted.reader.register(cx.waker());
        if !this.answers.are_under_way() {
            return Poll::Ready(Ok(()));
        }
        left.as_mut().poll(cx).map(Ok)
    }
}

impl<IO: AsyncWrite + Unpin> HeldEnd<IO> {
    fn written(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let (Some(left), Poll::Ready(Ok(_))) = (&mut self.left, &written) {
            left.as_mut().reset(Instant::now() + LEFT);
        }
        written
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for HeldEnd<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.written(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.written(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// An answer's body, under way until it is dropped.
pub(super) struct Answer<B> {
    body: B,
    _under_way: UnderWay,
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_end_is_seen_when_the_answer_has_ended() {
        let (mut agent, io) = tokio::io::duplex(64);
        let answers = Answers::default();
        let answer = answers.begin();
        let mut held = HeldEnd::new(io, answers);
        agent.write_all(b"all").await.unwrap();
        agent.shutdown().await.unwrap();
        assert_eq!(held.read(&mut [0; 8]).await.unwrap(), 3);
        let now = Instant::now();
        tokio::spawn(async move {
            tokio::time::sleep(LEFT / 2).await;
            drop(answer);
        });
        assert_eq!((held.read(&mut [0; 8]).await.unwrap(), now.elapsed()), (0, LEFT / 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_begins_at_the_end_of_the_last_answer_and_not_under_one() {
        let (answers, limit, began) = (Answers::default(), Duration::from_secs(60), Instant::now());
        let asks = async {
            tokio::time::sleep(limit / 2).await;
            drop(answers.begin());
            tokio::time::sleep(limit / 2).await;
            let long = answers.begin();
            tokio::time::sleep(limit * 3).await;
            drop(long);
        };
        let (_, ()) = tokio::join!(asks, answers.rest(limit));
        assert_eq!(began.elapsed(), limit * 5);
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_ended_has_left_when_nothing_is_written_to_it() {
        let (mut agent, io) = tokio::io::duplex(64);
        let answers = Answers::default();
        let _answer = answers.begin();
        let mut held = HeldEnd::new(io, answers);
        agent.shutdown().await.unwrap();
        let now = Instant::now();
        let early = tokio::time::timeout(LEFT / 2, held.read(&mut [0; 8])).await;
        assert!(early.is_err());
        held.write_all(b"part").await.unwrap();
        assert_eq!((held.read(&mut [0; 8]).await.unwrap(), now.elapsed()), (0, LEFT / 2 + LEFT));
    }
}
