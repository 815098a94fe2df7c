//! Reads an agent's HTTP/1 bytes before hyper does, and refuses heads that hyper would forgive.
//!
//! hyper takes bare line feeds, and silently drops a Content-Length beside a Transfer-Encoding: by the time a request
//! reaches us, nothing shows that two readers could have split the bytes differently (SEMANTICS H2). So the framing is
//! followed here, on the bytes themselves; a head that breaks the rules is replaced by one that hyper answers with 400.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// As much of a line as is looked at; the fields that matter are short.
const LINE: usize = 128;
/// The fields whose whole value matters.
const FRAMING: [&[u8]; 2] = [b"content-length", b"transfer-encoding"];
/// No parser takes this for a head.
const POISON: &[u8] = b"\0\r\n\r\n";

/// A connection whose requests are framed in one way only.
pub(super) struct Strict<IO> {
    io: IO,
    framing: Framing,
    poisoned: bool,
}

impl<IO> Strict<IO> {
    pub(super) fn new(io: IO) -> Self {
        Self { io, framing: Framing::default(), poisoned: false }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Strict<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.poisoned {
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        let read = buffer.filled().len() - before;
        if self.framing.follow(&buffer.filled()[before..]).is_err() {
            self.poisoned = true;
            buffer.set_filled(before);
            buffer.put_slice(&POISON[..POISON.len().min(read)]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Strict<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
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
    /// No longer HTTP: after a CONNECT or a request for another protocol. When those are refused, the connection is
    /// closed, so that nothing behind them is read as a request.
    Raw,
}

/// A line so far: its beginning, and how it ends.
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
    pub(super) fn follow(&mut self, mut bytes: &[u8]) -> Result<(), Ambiguous> {
        while !bytes.is_empty() {
            match self.place {
                Place::Raw => return Ok(()),
                Place::Length(left) => bytes = self.skip(bytes, left, Place::Length, Place::Head),
                Place::Chunk(left) => bytes = self.skip(bytes, left, Place::Chunk, Place::ChunkSize),
                Place::Head | Place::ChunkSize | Place::Trailer => {
                    let end = bytes.iter().position(|byte| *byte == b'\n');
                    let (line, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
                    self.line.extend(line);
                    let Some(_) = end else { return Ok(()) };
                    bytes = &rest[1..];
                    let line = std::mem::take(&mut self.line).ended()?;
                    self.place = self.line_ended(&line)?;
                }
            }
        }
        Ok(())
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
            Place::Trailer => Ok(if line.is_empty() { Place::Head } else { Place::Trailer }),
            // Empty lines before a request are passed over (RFC 9112 section 2.2).
            _ if line.is_empty() && self.head.lines == 0 => Ok(Place::Head),
            _ if line.is_empty() => Ok(std::mem::take(&mut self.head).ended()),
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

    /// The line without its end, which must be CR LF; the beginning of it, if it is long.
    fn ended(mut self) -> Result<Vec<u8>, Ambiguous> {
        if self.length == 0 || self.last != b'\r' {
            return Err(Ambiguous);
        }
        if self.length <= LINE {
            self.start.pop();
        } else if FRAMING.iter().any(|name| starts_with(&self.start, name)) {
            return Err(Ambiguous);
        }
        Ok(self.start)
    }
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

    fn ended(self) -> Place {
        match self {
            Head { connect: true, .. } => Place::Raw,
            Head { chunked: true, .. } => Place::ChunkSize,
            Head { content_length: Some(length @ 1..), .. } => Place::Length(length),
            Head { upgrade: true, .. } => Place::Raw,
            _ => Place::Head,
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
            b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n\x81\n\n\n",
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
        ] {
            for step in [1, 2, 3, 7, stream.len()] {
                assert_eq!(follow(stream, step), Err(Ambiguous), "{} by {step}", stream.escape_ascii());
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(stream: Vec<u8>, step in 1usize..9) {
            let _ = follow(&stream, step);
        }
    }
}
