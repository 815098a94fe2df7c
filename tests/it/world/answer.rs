//! What a server of the world answers, in words.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Response};
use http_body::{Body, Frame, SizeHint};
use sha2::{Digest, Sha256};

/// One answer, or what is done instead of one.
#[derive(Clone)]
pub struct Answer {
    /// Nothing was scripted: the server does what it is for.
    pub usual: bool,
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Filler,
    pub trailers: Option<HeaderMap>,
    pub gate: Option<Gate>,
    /// Before the request's body has been read.
    pub early: bool,
}

/// The server does what it is for.
pub fn usual() -> Answer {
    Answer { usual: true, ..answer(200) }
}

pub fn answer(status: u16) -> Answer {
    Answer {
        usual: false,
        status,
        headers: Vec::new(),
        body: Filler::text(""),
        trailers: None,
        gate: None,
        early: false,
    }
}

impl Answer {
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn saying(mut self, body: impl Into<Bytes>) -> Self {
        self.body = Filler::text(body);
        self
    }

    pub fn streaming(mut self, body: Filler) -> Self {
        self.body = body;
        self
    }

    pub fn saying_bytes(mut self, bytes: u64) -> Self {
        self.body = Filler::of(bytes);
        self
    }

    pub fn then(mut self, trailers: &[(&'static str, &str)]) -> Self {
        let field = |(name, value): &(&'static str, &str)| (HeaderName::from_static(name), value.parse().unwrap());
        self.trailers = Some(trailers.iter().map(field).collect());
        self
    }

    pub fn once(mut self, gate: &Gate) -> Self {
        self.gate = Some(gate.clone());
        self
    }

    pub fn early(mut self) -> Self {
        self.early = true;
        self
    }

    pub fn response(self) -> Response<Filler> {
        let mut response = Response::builder().status(self.status);
        for (name, value) in self.headers {
            response = response.header(name, value);
        }
        response.body(Filler { trailers: self.trailers, ..self.body }).unwrap()
    }
}

impl From<u16> for Answer {
    /// As an API answers: 401 with the challenge of RFC 6750.
    fn from(status: u16) -> Self {
        let said = answer(status).saying(format!("scripted {status}\n"));
        match status {
            401 => said.with("www-authenticate", "Bearer realm=\"api\", error=\"invalid_token\""),
            _ => said,
        }
    }
}

/// Holds an answer back until it is opened. A clone is the same one.
#[derive(Clone, Default)]
pub struct Gate(Arc<Mutex<(bool, Vec<Waker>)>>);

impl Gate {
    pub fn shut() -> Self {
        Self::default()
    }

    pub fn open(&self) {
        let mut state = self.0.lock().unwrap();
        state.0 = true;
        state.1.drain(..).for_each(Waker::wake);
    }

    pub async fn pass(&self) {
        poll_fn(|cx| self.poll_pass(cx)).await;
    }

    fn poll_pass(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.0.lock().unwrap();
        if state.0 {
            return Poll::Ready(());
        }
        state.1.push(cx.waker().clone());
        Poll::Pending
    }
}

/// A body: a text, or any number of bytes of a pattern, which is never in memory as a whole.
#[derive(Clone)]
pub struct Filler {
    text: Bytes,
    /// Texts behind it, each in a frame of its own, some of which wait.
    later: VecDeque<(Option<Gate>, Bytes)>,
    left: u64,
    trailers: Option<HeaderMap>,
    gate: Option<(u64, Gate)>,
    length_unknown: bool,
}

const CHUNK: u64 = 16 << 10;

impl Filler {
    pub fn text(text: impl Into<Bytes>) -> Self {
        Self { text: text.into(), later: VecDeque::new(), left: 0, trailers: None, gate: None, length_unknown: false }
    }

    /// A text, in frames of so many bytes.
    pub fn cut(text: &str, size: usize) -> Self {
        let later = text.as_bytes().chunks(size).map(|piece| (None, Bytes::copy_from_slice(piece))).collect();
        Self { later, ..Self::text("") }
    }

    /// Another text behind it, when the gate is open.
    pub fn then_text(mut self, gate: &Gate, text: impl Into<Bytes>) -> Self {
        self.later.push_back((Some(gate.clone()), text.into()));
        self
    }

    pub fn of(bytes: u64) -> Self {
        Self { left: bytes, ..Self::text("") }
    }

    /// The last bytes come only when the gate is open.
    pub fn held_at(self, left: u64, gate: &Gate) -> Self {
        Self { gate: Some((left, gate.clone())), ..self }
    }

    /// Chunked over HTTP/1.1.
    pub fn of_unknown_length(self) -> Self {
        Self { length_unknown: true, ..self }
    }

    pub fn with_trailers(self, trailers: HeaderMap) -> Self {
        Self { trailers: Some(trailers), ..self }
    }

    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        let mut rest = self.clone();
        while let Some(chunk) = rest.chunk() {
            hash.update(&chunk);
        }
        hex(&hash.finalize())
    }

    fn chunk(&mut self) -> Option<Bytes> {
        if !self.text.is_empty() {
            return Some(std::mem::take(&mut self.text));
        }
        let size = self.left.min(CHUNK);
        // Chunks differ from their neighbours, so that a swapped or repeated one is seen.
        let filling = (self.left / CHUNK) as u8;
        self.left -= size;
        (size > 0).then(|| vec![filling; size as usize].into())
    }
}

impl Body for Filler {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some((left, gate)) = &self.gate
            && self.left <= *left
        {
            ready!(gate.poll_pass(cx));
        }
        if let Some(chunk) = self.chunk() {
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if let Some((gate, _)) = self.later.front() {
            if let Some(gate) = gate {
                ready!(gate.poll_pass(cx));
            }
            return Poll::Ready(self.later.pop_front().map(|(_, text)| Ok(Frame::data(text))));
        }
        Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.text.is_empty() && self.left == 0 && self.later.is_empty() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.length_unknown || self.trailers.is_some() {
            SizeHint::default()
        } else {
            let later: usize = self.later.iter().map(|(_, text)| text.len()).sum();
            SizeHint::with_exact((self.text.len() + later) as u64 + self.left)
        }
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
