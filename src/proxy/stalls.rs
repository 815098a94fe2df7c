//! Gives up answers that an agent does not read: while it keeps its window shut, bytes of the upstream's wait for it, on a
//! connection that others share.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use crate::upstream::{BodyError, UpstreamBody};

/// At most; and as often as the limit is long.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// All answers that are on their way. A clone is the same ones.
#[derive(Clone)]
pub(super) struct Stalls<B = UpstreamBody> {
    inner: Arc<Inner<B>>,
}

struct Inner<B> {
    watched: Mutex<Vec<Weak<Watched<B>>>>,
    limit: Mutex<Duration>,
}

impl<B: Send + 'static> Stalls<B> {
    /// Looks after the answers for as long as there is anyone to watch them for.
    pub(super) fn start(limit: Duration) -> Self {
        let stalls = Self { inner: Arc::new(Inner { watched: Mutex::default(), limit: Mutex::new(limit) }) };
        let inner = Arc::downgrade(&stalls.inner);
        tokio::spawn(async move {
            let mut pause = LOOK_EVERY.min(limit);
            loop {
                tokio::time::sleep(pause).await;
                let Some(inner) = inner.upgrade() else { return };
                let (now, limit) = (Instant::now(), *lock(&inner.limit));
                pause = LOOK_EVERY.min(limit);
                lock(&inner.watched)
                    .retain(|answer| answer.upgrade().is_some_and(|answer| !answer.is_given_up(now, limit)));
            }
        });
        stalls
    }

    /// How long an agent may leave what is there unread, from now on.
    pub(super) fn limit(&self, limit: Duration) {
        *lock(&self.inner.limit) = limit;
    }

    /// An answer that is given up when the agent does not read it.
    pub(super) fn watch(&self, body: B) -> Reading<B> {
        let watched = Arc::new(Watched(Mutex::new(State { body: Some(body), taken: None })));
        lock(&self.inner.watched).push(Arc::downgrade(&watched));
        Reading::Watched(WatchedBody(watched))
    }
}

struct Watched<B>(Mutex<State<B>>);

struct State<B> {
    /// None when it was given up.
    body: Option<B>,
    /// When the agent took a frame and asked for no other since.
    taken: Option<Instant>,
}

impl<B> Watched<B> {
    fn is_given_up(&self, now: Instant, limit: Duration) -> bool {
        let mut state = lock(&self.0);
        if state.taken.is_some_and(|taken| now.duration_since(taken) >= limit) {
            let unread = state.body.take();
            drop(state);
            if unread.is_some() {
                tracing::warn!(seconds = limit.as_secs(), "gave up an answer that its agent did not read");
            }
            return true;
        }
        false
    }
}

/// An answer's body on its way to its agent.
pub(super) enum Reading<B = UpstreamBody> {
    /// It is given up when the agent does not read it.
    Watched(WatchedBody<B>),
    /// The agent may take its time.
    Unwatched(B),
}

pub(super) struct WatchedBody<B>(Arc<Watched<B>>);

impl<B: Body<Data = Bytes, Error = BodyError> + Unpin> Body for Reading<B> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let watched = match self.get_mut() {
            Self::Unwatched(body) => return Pin::new(body).poll_frame(cx),
            Self::Watched(watched) => watched,
        };
        let mut state = lock(&watched.0.0);
        let Some(body) = &mut state.body else {
            return Poll::Ready(Some(Err("the answer was not read for too long".into())));
        };
        let frame = Pin::new(body).poll_frame(cx);
        state.taken = matches!(frame, Poll::Ready(Some(_))).then(Instant::now);
        frame
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Unwatched(body) => body.is_end_stream(),
            Self::Watched(watched) => lock(&watched.0.0).body.as_ref().is_some_and(Body::is_end_stream),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Unwatched(body) => body.size_hint(),
            Self::Watched(watched) => lock(&watched.0.0).body.as_ref().map_or_else(SizeHint::default, Body::size_hint),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, StreamBody};
    use tokio::sync::mpsc;

    use super::*;

    const STALLED: Duration = Duration::from_secs(300);

    /// A body that gives what is sent to it, and the end that sees it dropped.
    fn body() -> (mpsc::Sender<Bytes>, impl Body<Data = Bytes, Error = BodyError> + Unpin + Send + 'static) {
        let (sender, mut receiver) = mpsc::channel::<Bytes>(10);
        let frames = futures_util::stream::poll_fn(move |cx| {
            receiver.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data))))
        });
        (sender, StreamBody::new(frames))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_nobody_reads_is_given_up_and_says_so() {
        // LST-017: window 0.
        let stalls = Stalls::start(STALLED);
        let (sender, body) = body();
        let mut reading = stalls.watch(body);
        sender.send("a".into()).await.unwrap();
        assert!(reading.frame().await.unwrap().is_ok());
        tokio::time::sleep(STALLED - LOOK_EVERY).await;
        assert!(!sender.is_closed());
        tokio::time::sleep(2 * LOOK_EVERY).await;
        assert!(sender.is_closed());
        assert!(reading.frame().await.unwrap().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_whose_upstream_takes_long_is_waited_for() {
        let stalls = Stalls::start(STALLED);
        let (sender, body) = body();
        let mut reading = stalls.watch(body);
        let reader = tokio::spawn(async move {
            assert!(reading.frame().await.unwrap().is_ok());
            assert!(reading.frame().await.is_none());
        });
        tokio::time::sleep(3 * STALLED).await;
        sender.send("a".into()).await.unwrap();
        tokio::time::sleep(3 * STALLED).await;
        drop(sender);
        reader.await.unwrap();
    }
}
