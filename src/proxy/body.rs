//! Bodies: the agent's, kept while it streams so that it can be sent once more, and the answer's.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::{HeaderMap, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use tokio::time::Sleep;

use super::headers;
use super::redact::{Redacted, Redactor};
use super::stalls::Reading;
use crate::upstream::{BodyError, RequestBody};

/// All bodies kept by this process together (SEMANTICS C7).
const BUDGET: usize = 64 << 20;
/// How much of a 401's body is read ahead while its token is renewed (SEMANTICS C9).
const READ_AHEAD: usize = 64 << 10;

/// The memory for kept bodies. A clone shares it.
#[derive(Clone, Default)]
pub(super) struct Budget(Arc<AtomicUsize>);

impl Budget {
    fn take(&self, bytes: usize) -> bool {
        let taken = self.0.fetch_add(bytes, Ordering::Relaxed);
        if taken + bytes > BUDGET {
            self.give(bytes);
            return false;
        }
        true
    }

    fn give(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// An agent's body that can be sent a second time, as long as what was read of it fits the limit.
pub(super) struct Replay {
    /// None where there is no body.
    kept: Option<Arc<Mutex<Kept>>>,
}

struct Kept {
    frames: VecDeque<Frame<Bytes>>,
    /// How many of them the try that reads has.
    read: usize,
    /// So much was kept, and may be.
    bytes: usize,
    limit: usize,
    /// The memory that it takes.
    taken: usize,
    budget: Budget,
    /// Why there can be no other try, if something was dropped.
    dropped: Option<&'static str>,
    live: Incoming,
    /// It is a stream of HTTP/2.
    h2: bool,
    ended: bool,
    /// It ended before it was whole. hyper says so only once, and then nothing more: to the next try that would be the end.
    broke_off: bool,
    /// The try that may read now; an earlier one that is still being written is told to stop.
    current: u32,
    /// Nobody has that one yet.
    promised: bool,
    /// Wakes the try that reads.
    reader: Option<Waker>,
    /// How long the agent may pause, where it has said how much is to come; otherwise it is a stream, and may.
    patience: Duration,
    /// Set while it does.
    paused: Option<Pin<Box<Sleep>>>,
}

impl Replay {
    /// Nothing of the body is read before a try asks for it, so no 100-continue is sent before that (SEMANTICS C8). An
    /// agent that has named its length may pause for `patience`.
    pub(super) fn new(live: Incoming, version: Version, (limit, patience): (usize, Duration), budget: Budget) -> Self {
        if live.is_end_stream() {
            return Self { kept: None };
        }
        let kept = Kept {
            frames: VecDeque::new(),
            read: 0,
            bytes: 0,
            limit,
            taken: 0,
            budget,
            dropped: None,
            live,
            h2: version == Version::HTTP_2,
            ended: false,
            broke_off: false,
            current: 0,
            promised: false,
            reader: None,
            patience,
            paused: None,
        };
        Self { kept: Some(Arc::new(Mutex::new(kept))) }
    }

    /// The body for the first try, or for the next one if there can be one.
    pub(super) fn next_try(&self) -> Option<RequestBody> {
        let Some(shared) = &self.kept else { return Some(no_body()) };
        let mut kept = lock(shared);
        if !std::mem::take(&mut kept.promised) {
            kept.begin_try().ok()?;
        }
        let body = Try { kept: shared.clone(), number: kept.current };
        drop(kept);
        Some(body.boxed_unsync())
    }

    /// Makes sure of the next try, however late it begins, or tells why there can be none. The one before it ends with
    /// an error at once, and its connection with it: it reads nothing more that would have to be kept.
    pub(super) fn promise(&self) -> Result<(), &'static str> {
        let Some(shared) = &self.kept else { return Ok(()) };
        let mut kept = lock(shared);
        kept.begin_try()?;
        kept.promised = true;
        Ok(())
    }

    /// Why there can be no other try, if there can be none.
    pub(super) fn dropped(&self) -> Option<&'static str> {
        lock(self.kept.as_ref()?).dropped
    }
}

/// Which takes no memory.
fn no_body() -> RequestBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

impl Drop for Replay {
    /// Without it there will be no other try, so nothing is kept any more that the last one has sent.
    fn drop(&mut self) {
        if let Some(kept) = &self.kept {
            lock(kept).forget("answered");
        }
    }
}

impl Kept {
    fn begin_try(&mut self) -> Result<(), &'static str> {
        if let Some(why) = self.dropped.filter(|_| self.current > 0) {
            return Err(why);
        }
        self.current += 1;
        self.read = 0;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        Ok(())
    }

    /// Keeps a frame for the next try, by reference, or gives up on there being one.
    fn keep(&mut self, frame: &Frame<Bytes>) {
        if self.dropped.is_some() {
            return;
        }
        if self.bytes + length(frame) > self.limit {
            return self.forget("body_too_long");
        }
        if !self.budget.take(memory(frame)) {
            return self.forget("replay_memory_full");
        }
        self.bytes += length(frame);
        self.taken += memory(frame);
        self.frames.push_back(copy(frame));
        self.read += 1;
    }

    /// The next of what was kept for the try that reads.
    fn next_kept(&mut self) -> Option<Frame<Bytes>> {
        if self.dropped.is_none() {
            let frame = self.frames.get(self.read)?;
            self.read += 1;
            return Some(copy(frame));
        }
        let frame = self.frames.pop_front()?;
        self.gives(memory(&frame));
        Some(frame)
    }

    fn unread(&self) -> impl Iterator<Item = &Frame<Bytes>> {
        self.frames.iter().skip(self.read)
    }

    /// Resolves when the agent has paused for too long.
    fn pauses(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.live.size_hint().exact().is_none() {
            return Poll::Pending;
        }
        let patience = self.patience;
        self.paused.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience))).as_mut().poll(cx)
    }

    /// Keeps only what the try that reads does not have yet: an answer may begin before all of it is sent again.
    fn forget(&mut self, why: &'static str) {
        self.dropped = Some(why);
        let read = self.frames.drain(..std::mem::take(&mut self.read)).map(|frame| memory(&frame)).sum();
        self.frames.shrink_to_fit();
        self.gives(read);
    }

    /// There is no other try: it could not be whole either.
    fn breaks_off(&mut self, why: impl Into<BodyError>) -> io::Error {
        self.broke_off = true;
        self.forget("body_broke_off");
        io::Error::other(why)
    }

    fn gives(&mut self, memory: usize) {
        self.taken -= memory;
        self.budget.give(memory);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.budget.give(self.taken);
    }
}

/// One try's view of the body: first what was kept, then the live rest.
struct Try {
    kept: Arc<Mutex<Kept>>,
    number: u32,
}

impl Body for Try {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let mut kept = lock(&self.kept);
        if kept.current != self.number {
            return Poll::Ready(Some(Err(io::Error::other("sent again on another connection"))));
        }
        if let Some(frame) = kept.next_kept() {
            return Poll::Ready(Some(Ok(frame)));
        }
        if kept.broke_off {
            return Poll::Ready(Some(Err(io::Error::other("the body broke off"))));
        }
        if kept.ended {
            return Poll::Ready(None);
        }
        let polled = Pin::new(&mut kept.live).poll_frame(cx);
        kept.reader = polled.is_pending().then(|| cx.waker().clone());
        let Poll::Ready(polled) = polled else {
            ready!(kept.pauses(cx));
            return Poll::Ready(Some(Err(io::Error::other("the body stopped coming"))));
        };
        kept.paused = None;
        let Some(frame) = polled else {
            // A stream that is reset without an error ends for hyper like one that is whole. Of HTTP/1 it never says
            // that chunks are at their end, and tells an error.
            if kept.h2 && !kept.live.is_end_stream() {
                return Poll::Ready(Some(Err(kept.breaks_off("its stream was reset"))));
            }
            kept.ended = true;
            return Poll::Ready(None);
        };
        let mut frame = frame.map_err(|error| kept.breaks_off(error))?;
        if let Some(trailers) = frame.trailers_mut() {
            headers::clean_trailers(trailers);
        }
        kept.keep(&frame);
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        let kept = lock(&self.kept);
        // As long as it is this one that reads.
        kept.current == self.number && (kept.ended || kept.live.is_end_stream()) && kept.unread().next().is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let kept = lock(&self.kept);
        let before: usize = kept.unread().map(length).sum();
        let rest = if kept.ended { SizeHint::with_exact(0) } else { kept.live.size_hint() };
        longer(rest, before)
    }
}

/// Sees the trailers of an answer go by.
type Watcher = Box<dyn FnOnce(&HeaderMap) + Send>;

/// An answer's body, on its way to the agent.
pub(super) enum ResponseBody {
    /// Our own.
    Whole(Option<Bytes>),
    /// The upstream's, after what was read ahead of it.
    Upstream { ahead: VecDeque<Result<Frame<Bytes>, BodyError>>, rest: Reading, watcher: Option<Watcher> },
    /// An upstream's from which tokens are taken out.
    Redacted(Box<Redacted<ResponseBody>>),
}

impl ResponseBody {
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self::Whole(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }

    /// Shows the trailers to `watcher` when they come.
    pub(super) fn watch(&mut self, watcher: impl FnOnce(&HeaderMap) + Send + 'static) {
        if let Self::Upstream { watcher: place, .. } = self {
            *place = Some(Box::new(watcher));
        }
    }

    /// Takes tokens out of it from here on: out of its trailers, and out of its data if that is text.
    pub(super) fn redacted(self, redactor: Redactor, text: bool) -> Self {
        Self::Redacted(Box::new(Redacted::new(self, redactor, text)))
    }

    /// Reads up to 64 KiB ahead, so that a short body's connection is free again while its token is renewed. Can be
    /// broken off at any time.
    pub(super) async fn read_ahead(&mut self) {
        let Self::Upstream { ahead, rest, .. } = self else { return };
        let mut bytes = 0;
        while bytes < READ_AHEAD {
            let Some(frame) = rest.frame().await else { return };
            let failed = frame.is_err();
            bytes += data_length(&frame);
            // An error too: hyper tells it once, and without it a truncated body would end like a whole one.
            ahead.push_back(frame);
            if failed {
                return;
            }
        }
    }
}

impl From<Reading> for ResponseBody {
    fn from(rest: Reading) -> Self {
        Self::Upstream { ahead: VecDeque::new(), rest, watcher: None }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Upstream { ahead, rest, watcher } => {
                let mut frame = match ahead.pop_front() {
                    Some(frame) => Some(frame),
                    None => ready!(Pin::new(rest).poll_frame(cx)),
                };
                if let Some(trailers) = frame.as_mut().and_then(|frame| frame.as_mut().ok()?.trailers_mut()) {
                    if let Some(watcher) = watcher.take() {
                        watcher(trailers);
                    }
                    headers::clean_trailers(trailers);
                }
                Poll::Ready(frame)
            }
            Self::Redacted(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Upstream { ahead, rest, .. } => ahead.is_empty() && rest.is_end_stream(),
            Self::Redacted(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Buf::remaining) as u64),
            Self::Upstream { ahead, rest, .. } => {
                let before: usize = ahead.iter().map(data_length).sum();
                longer(rest.size_hint(), before)
            }
            Self::Redacted(body) => body.size_hint(),
        }
    }
}

fn data_length<E>(frame: &Result<Frame<Bytes>, E>) -> usize {
    frame.as_ref().map_or(0, length)
}

fn length(frame: &Frame<Bytes>) -> usize {
    frame.data_ref().map_or(0, Bytes::len)
}

/// What a kept frame takes: of a small one its content is the least.
fn memory(frame: &Frame<Bytes>) -> usize {
    size_of::<Frame<Bytes>>() + length(frame)
}

pub(super) fn longer(mut hint: SizeHint, by: usize) -> SizeHint {
    if let Some(upper) = hint.upper() {
        hint.set_upper(upper + by as u64);
    }
    hint.set_lower(hint.lower() + by as u64);
    hint
}

fn copy(frame: &Frame<Bytes>) -> Frame<Bytes> {
    match (frame.data_ref(), frame.trailers_ref()) {
        (Some(data), _) => Frame::data(data.clone()),
        (None, trailers) => Frame::trailers(trailers.cloned().unwrap_or_default()),
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::AsyncWriteExt;
    use tokio::sync::mpsc;

    use super::*;

    /// What a request with this body brings, and the memory that it is kept in.
    async fn replay(body: &[u8]) -> (Replay, Budget) {
        let (mut agent, io) = tokio::io::duplex(1 << 20);
        let (sends, mut sent) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let service = service_fn(move |request: http::Request<Incoming>| {
                sends.send(request.into_body()).unwrap();
                std::future::pending::<Result<http::Response<Empty<Bytes>>, io::Error>>()
            });
            http1::Builder::new().serve_connection(TokioIo::new(io), service).await
        });
        agent.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        agent.write_all(body).await.unwrap();
        let (limits, budget) = ((1 << 20, Duration::from_secs(1)), Budget::default());
        (Replay::new(sent.recv().await.unwrap(), Version::HTTP_11, limits, budget.clone()), budget)
    }

    async fn reads(body: &mut RequestBody, frames: usize) {
        for _ in 0..frames {
            body.frame().await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn small_frames_count_for_what_they_take() {
        // C7
        const FRAMES: usize = 1000;
        let each = size_of::<Frame<Bytes>>() + 1;
        let (replay, budget) = replay(&b"1\r\nx\r\n".repeat(FRAMES)).await;
        let taken = || budget.0.load(Ordering::Relaxed);
        reads(&mut replay.next_try().unwrap(), FRAMES).await;
        assert_eq!(taken(), FRAMES * each);
        let mut second = replay.next_try().unwrap();
        reads(&mut second, 10).await;
        drop(replay);
        assert_eq!(taken(), (FRAMES - 10) * each);
        reads(&mut second, 10).await;
        assert_eq!(taken(), (FRAMES - 20) * each);
        drop(second);
        assert_eq!(taken(), 0);
    }

    #[tokio::test]
    async fn a_try_that_another_one_has_overtaken_does_not_end_like_a_whole_one() {
        // C9
        let (replay, _) = replay(b"2\r\nok\r\n0\r\n\r\n").await;
        let mut first = replay.next_try().unwrap();
        reads(&mut first, 1).await;
        assert!(first.frame().await.is_none() && first.is_end_stream());
        let mut second = replay.next_try().unwrap();
        reads(&mut second, 1).await;
        assert!(second.is_end_stream());
        assert!(!first.is_end_stream() && first.frame().await.unwrap().is_err());
    }
}
