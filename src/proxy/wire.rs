//! Reads an agent's HTTP/1 bytes before hyper does, and refuses heads that hyper would forgive.
//!
//! hyper takes bare line feeds, and silently drops a Content-Length beside a Transfer-Encoding: by the time a request
//! reaches us, nothing shows that two readers could have split the bytes differently (SEMANTICS H2). So the framing is
//! followed here, on the bytes themselves; a head that breaks the rules is replaced by one that hyper answers with 400.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::linger::Linger;
use super::rest::Between;
use crate::limits::Limits;

/// As much of a line as is looked at; the fields that matter are short.
const LINE: usize = 128;
/// The fields whose whole value matters.
const FRAMING: [&[u8]; 2] = [b"content-length", b"transfer-encoding"];
/// No parser takes this for a head.
const POISON: &[u8] = b"\0\r\n\r\n";

/// A connection whose requests are framed in one way only, and do not dawdle.
pub(super) struct Strict<IO> {
    io: IO,
    framing: Framing,
    poisoned: bool,
    head_timeout: Duration,
    body_timeout: Duration,
    /// What is waited for, and until when.
    deadline: Option<(Awaited, Pin<Box<Sleep>>)>,
    /// Since nothing more is said to an agent that still sends.
    linger: Option<Linger>,
}

impl<IO> Strict<IO> {
    pub(super) fn new(io: IO, limits: &Limits) -> Self {
        Self {
            io,
            framing: Framing::default(),
            poisoned: false,
            head_timeout: limits.head_timeout,
            body_timeout: limits.body_timeout,
            deadline: None,
            linger: None,
        }
    }

    pub(super) fn into_inner(self) -> IO {
        self.io
    }

    /// Bytes have come. Those of a head do not give it more time.
    fn came(&mut self) {
        let awaited = self.framing.awaited();
        self.deadline.take_if(|(before, _)| Some(*before) != awaited || *before == Awaited::Body);
    }

    /// No bytes are there: waits for them no longer than it may.
    fn waits(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(awaited) = self.framing.awaited() else { return Poll::Pending };
        let limit = match awaited {
            Awaited::Head(_) => self.head_timeout,
            Awaited::Body => self.body_timeout,
        };
        let (_, deadline) = self.deadline.get_or_insert_with(|| (awaited, Box::pin(tokio::time::sleep(limit))));
        deadline.as_mut().poll(cx).map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, awaited.overdue())))
    }
}

impl<IO> Between for Strict<IO> {
    fn is_between(&self) -> bool {
        matches!(self.framing.place, Place::Head) && self.framing.awaited().is_none() && !self.poisoned
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Strict<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.poisoned {
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut self.io).poll_read(cx, buffer) {
            Poll::Ready(read) => read?,
            Poll::Pending => return self.waits(cx),
        }
        let read = buffer.filled().len() - before;
        if self.framing.follow(&buffer.filled()[before..]).is_err() {
            self.poisoned = true;
            buffer.set_filled(before);
            buffer.put_slice(&POISON[..POISON.len().min(read)]);
        }
        self.came();
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Strict<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.io).poll_shutdown(cx))?;
            if !this.poisoned && !this.framing.is_in_body() {
                return Poll::Ready(Ok(()));
            }
        }
        this.linger.get_or_insert_with(Linger::new).poll(Pin::new(&mut this.io), cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// The head or the chunk can be read in two ways.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ambiguous;

/// Where in the stream of requests the next byte stands.
#[derive(Default)]
pub(super) struct Framing {
    pub(super) place: Place,
    line: Line,
    pub(super) head: Head,
    /// The request whose body this is asks for another protocol.
    upgrade: bool,
    /// How many heads have ended.
    heads: u64,
}

#[derive(Default, Clone, Copy)]
pub(super) enum Place {
    #[default]
    Head,
    /// This many bytes of a body are left.
    Length(u64),
    ChunkSize,
    /// This many bytes of a chunk are left, with the line end behind it.
    Chunk(u64),
    Trailer,
    /// No longer HTTP: after a CONNECT, or a request for another protocol and its body. When those are refused, the
    /// connection is closed, so that nothing behind them is read as a request.
    Raw,
}

/// What an agent has begun to send, and must go on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// With its number.
    Head(u64),
    /// Of a length that it has named.
    Body,
}

impl Awaited {
    fn overdue(self) -> &'static str {
        match self {
            Awaited::Head(_) => "the request's head took too long",
            Awaited::Body => "the request's body stopped coming",
        }
    }
}

/// A line that came in pieces, so far: its beginning, and how it ends.
#[derive(Default)]
struct Line {
    start: Vec<u8>,
    length: usize,
    last: u8,
}

/// What a head has said so far.
#[derive(Default)]
pub(super) struct Head {
    pub(super) lines: usize,
    connect: bool,
    upgrade: bool,
    content_length: Option<u64>,
    chunked: bool,
}

impl Framing {
    fn awaited(&self) -> Option<Awaited> {
        match self.place {
            Place::Head if self.head.lines > 0 || self.line.length > 0 => Some(Awaited::Head(self.heads)),
            Place::Trailer => Some(Awaited::Head(self.heads)),
            Place::Length(_) => Some(Awaited::Body),
            Place::Head | Place::ChunkSize | Place::Chunk(_) | Place::Raw => None,
        }
    }

    pub(super) fn follow(&mut self, mut bytes: &[u8]) -> Result<(), Ambiguous> {
        while !bytes.is_empty() {
            match self.place {
                Place::Raw => return Ok(()),
                Place::Length(left) => bytes = self.skip(bytes, left, Place::Length, self.after_body()),
                Place::Chunk(left) => bytes = self.skip(bytes, left, Place::Chunk, Place::ChunkSize),
                Place::Head | Place::ChunkSize | Place::Trailer => {
                    let Some(end) = memchr::memchr(b'\n', bytes) else {
                        self.line.extend(bytes);
                        return Ok(());
                    };
                    let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
                    self.place = if self.line.length == 0 {
                        self.line_ended(ended(line, line.len(), line.last())?)?
                    } else {
                        self.line.extend(line);
                        let Line { start, length, last } = std::mem::take(&mut self.line);
                        self.line_ended(ended(&start, length, Some(&last))?)?
                    };
                    bytes = rest;
                }
            }
        }
        Ok(())
    }

    /// A request's body has begun, and not ended.
    fn is_in_body(&self) -> bool {
        matches!(self.place, Place::Length(_) | Place::ChunkSize | Place::Chunk(_) | Place::Trailer)
    }

    fn after_body(&self) -> Place {
        if self.upgrade { Place::Raw } else { Place::Head }
    }

    fn skip<'a>(&mut self, bytes: &'a [u8], left: u64, same: fn(u64) -> Place, next: Place) -> &'a [u8] {
        let taken = left.min(bytes.len() as u64);
        self.place = if taken == left { next } else { same(left - taken) };
        &bytes[taken as usize..]
    }

    fn line_ended(&mut self, line: &[u8]) -> Result<Place, Ambiguous> {
        match self.place {
            Place::ChunkSize => Ok(match chunk_size(line)? {
                0 => Place::Trailer,
                size => Place::Chunk(size.checked_add(2).ok_or(Ambiguous)?),
            }),
            Place::Trailer => Ok(if line.is_empty() { self.after_body() } else { Place::Trailer }),
            // Empty lines before a request are passed over (RFC 9112 section 2.2).
            _ if line.is_empty() && self.head.lines == 0 => Ok(Place::Head),
            _ if line.is_empty() => {
                self.heads += 1;
                let head = std::mem::take(&mut self.head);
                self.upgrade = head.upgrade;
                Ok(head.body()?.unwrap_or_else(|| self.after_body()))
            }
            _ => self.head.line(line).map(|()| Place::Head),
        }
    }
}

impl Line {
    fn extend(&mut self, bytes: &[u8]) {
        let room = LINE.saturating_sub(self.start.len());
        self.start.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.length += bytes.len();
        self.last = bytes.last().copied().unwrap_or(self.last);
    }
}

/// A line without its end, which must be CR LF; the beginning of it, if it is long.
fn ended<'a>(start: &'a [u8], length: usize, last: Option<&u8>) -> Result<&'a [u8], Ambiguous> {
    if last != Some(&b'\r') {
        return Err(Ambiguous);
    }
    if length <= LINE {
        return Ok(&start[..length - 1]);
    }
    let start = &start[..LINE];
    if FRAMING.iter().any(|name| starts_with(start, name)) { Err(Ambiguous) } else { Ok(start) }
}

impl Head {
    fn line(&mut self, line: &[u8]) -> Result<(), Ambiguous> {
        self.lines += 1;
        if self.lines == 1 {
            self.connect = line.starts_with(b"CONNECT ");
            return Ok(());
        }
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, value) = (&line[..colon], line.get(colon + 1..).unwrap_or_default().trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            let length = decimal(value)?;
            if self.content_length.replace(length).is_some_and(|other| other != length) || self.chunked {
                return Err(Ambiguous);
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if !value.eq_ignore_ascii_case(b"chunked") || self.chunked || self.content_length.is_some() {
                return Err(Ambiguous);
            }
            self.chunked = true;
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            self.upgrade = true;
        }
        Ok(())
    }

    /// What follows it before anything else, if something does.
    fn body(self) -> Result<Option<Place>, Ambiguous> {
        match self {
            Head { connect: true, chunked: false, content_length: None | Some(0), .. } => Ok(Some(Place::Raw)),
            // A CONNECT has no content (RFC 9110 section 9.3.6): it would be the tunnel's first bytes to one reader, and a
            // body to another.
            Head { connect: true, .. } => Err(Ambiguous),
            Head { chunked: true, .. } => Ok(Some(Place::ChunkSize)),
            Head { content_length: Some(length @ 1..), .. } => Ok(Some(Place::Length(length))),
            _ => Ok(None),
        }
    }
}

fn starts_with(line: &[u8], name: &[u8]) -> bool {
    line.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
}

fn decimal(digits: &[u8]) -> Result<u64, Ambiguous> {
    let text = std::str::from_utf8(digits).map_err(|_| Ambiguous)?;
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| plain).ok_or(Ambiguous)
}

/// The size before any extension (RFC 9112 section 7.1).
fn chunk_size(line: &[u8]) -> Result<u64, Ambiguous> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii_end();
    let text = std::str::from_utf8(digits).map_err(|_| Ambiguous)?;
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    u64::from_str_radix(text, 16).ok().filter(|_| plain).ok_or(Ambiguous)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn follow(stream: &[u8], step: usize) -> Result<(), Ambiguous> {
        let mut framing = Framing::default();
        stream.chunks(step).try_for_each(|bytes| framing.follow(bytes))
    }

    #[test]
    fn one_way_to_read_it_is_let_through_in_pieces_of_any_size() {
        for stream in [
            &b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
            b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\na\nb\n\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n3;x=y\r\na\nb\r\n0\r\nT: 1\r\n\r\nGET / HTTP/1.1\r\n\r\n",
            b"CONNECT a:443 HTTP/1.0\r\n\r\n\x16\x03\x01\n\n\n",
            b"CONNECT a:443 HTTP/1.1\r\nContent-Length: 0\r\n\r\n\x16\x03\x01\n\n\n",
            b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n\x81\n\n\n",
            b"POST / HTTP/1.1\r\nUpgrade: tcp\r\nContent-Length: 2\r\n\r\n{}ls\n\n",
            b"POST / HTTP/1.1\r\nUpgrade: tcp\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nT: 1\r\n\r\nls\n\n",
        ] {
            for step in [1, 2, 3, 7, stream.len()] {
                assert_eq!(follow(stream, step), Ok(()), "{} by {step}", stream.escape_ascii());
            }
        }
    }

    #[test]
    fn two_ways_to_read_it_are_refused_in_pieces_of_any_size() {
        // SEC-051, SEC-052, SEC-053, SEC-055, SEC-056
        for stream in [
            &b"GET / HTTP/1.1\nHost: a\n\n"[..],
            b"GET / HTTP/1.1\r\nHost: a\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\ncontent-length: 3\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: identity, chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: \r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n0\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0_2\r\na\r\n0\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n",
            b"POST / HTTP/1.1\r\nUpgrade: tcp\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n",
            b"CONNECT a:443 HTTP/1.1\r\nContent-Length: 2\r\n\r\n\x16\x03",
            b"CONNECT a:443 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ] {
            for step in [1, 2, 3, 7, stream.len()] {
                assert_eq!(follow(stream, step), Err(Ambiguous), "{} by {step}", stream.escape_ascii());
            }
        }
    }

    const LIMIT: Duration = Duration::from_secs(10);

    /// Reads what an agent sends, each piece this long after the one before, and says when and why that ended.
    async fn reads(pieces: &[&[u8]], pause: Duration) -> (Duration, Option<io::ErrorKind>) {
        let limits = Limits { head_timeout: LIMIT, body_timeout: LIMIT, ..Limits::default() };
        let (mut agent, here) = tokio::io::duplex(1 << 16);
        let mut here = Strict::new(here, &limits);
        let (began, mut read) = (tokio::time::Instant::now(), [0; 1024]);
        let sends = async {
            for piece in pieces {
                tokio::time::sleep(pause).await;
                agent.write_all(piece).await.unwrap();
            }
            // And then it keeps the connection open.
            tokio::time::sleep(LIMIT * 100).await;
            drop(agent);
        };
        let reads = async {
            loop {
                match here.read(&mut read).await {
                    Ok(0) => return None,
                    Ok(_) => {}
                    Err(error) => return Some(error.kind()),
                }
            }
        };
        tokio::pin!(sends);
        let ended = tokio::select! {
            ended = reads => ended,
            () = &mut sends => None,
        };
        (began.elapsed(), ended)
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_begun_must_go_on() {
        // LST-016
        let late = Some(io::ErrorKind::TimedOut);
        let head: &[u8] = b"POST / HTTP/1.1\r\nHost: a\r\n";
        let slowly: Vec<&[u8]> = head.chunks(1).collect();
        let second = Duration::from_secs(1);
        // A byte now and then does not make a head's time longer; the first byte begins it.
        assert_eq!(reads(&slowly, second).await, (LIMIT + second, late));
        assert_eq!(reads(&[head, b"Content-Length: 3\r\n"], second * 9).await, (LIMIT + second * 9, late));
        let with_length = [head, b"Content-Length: 3\r\n\r\n", b"1", b"2"];
        // A body may be as slow as it likes, but not stop.
        assert_eq!(reads(&with_length, second * 5).await, (LIMIT + second * 20, late));
        let through = Duration::from_secs(1000);
        assert_eq!(reads(&[head, b"Content-Length: 1\r\n\r\n", b"1"], second * 9).await, (through + second * 27, None));
        for stream in [
            &b"Transfer-Encoding: chunked\r\n\r\n1\r\n"[..],
            b"Upgrade: websocket\r\n\r\n",
            b"Upgrade: tcp\r\nContent-Length: 2\r\n\r\n{}l",
            b"\r\n",
        ] {
            assert_eq!(reads(&[head, stream], second).await, (through + second * 2, None), "{}", stream.escape_ascii());
        }
        // The next request's head has a time of its own, also when its beginning came with the end of this one's.
        let two = [head, b"\r\nPOST / HTTP/1.1\r\n"];
        assert_eq!(reads(&two, second * 9).await, (LIMIT + second * 18, late));
        assert_eq!(reads(&[], second).await, (through, None), "that is for whoever reads requests to say");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(stream: Vec<u8>, step in 1usize..9) {
            let _ = follow(&stream, step);
        }
    }
}
