//! Takes the empty DATA frames out of what an upstream sends.
//!
//! They say nothing, and some servers send one with each flush. `h2` counts them over a connection's whole life and closes
//! it at the 101st, with every request on it; nothing sets that number.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// RFC 9113 section 4.1.
const HEAD: usize = 9;
const DATA: u8 = 0;
const END_STREAM: u8 = 1;
const CHUNK: usize = 16 << 10;

/// A connection on which HTTP/2 frames come in.
pub(super) struct WithoutEmpties<IO> {
    io: IO,
    frames: Frames,
    chunk: Box<[u8]>,
}

impl<IO> WithoutEmpties<IO> {
    pub(super) fn new(io: IO) -> Self {
        Self { io, frames: Frames::default(), chunk: vec![0; CHUNK].into() }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for WithoutEmpties<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.frames.kept.is_empty() {
            let mut chunk = ReadBuf::new(&mut this.chunk);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut chunk))?;
            if chunk.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.frames.follow(chunk.filled());
        }
        let length = this.frames.kept.len().min(buffer.remaining());
        buffer.put_slice(&this.frames.kept[..length]);
        this.frames.kept.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for WithoutEmpties<IO> {
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

/// Where in the frames the next byte stands, and what of them is kept.
#[derive(Default)]
struct Frames {
    head: Vec<u8>,
    payload_left: usize,
    kept: BytesMut,
}

impl Frames {
    fn follow(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let (payload, rest) = bytes.split_at(self.payload_left.min(bytes.len()));
                self.kept.extend_from_slice(payload);
                self.payload_left -= payload.len();
                bytes = rest;
            } else {
                let (head, rest) = bytes.split_at((HEAD - self.head.len()).min(bytes.len()));
                self.head.extend_from_slice(head);
                self.head_ended();
                bytes = rest;
            }
        }
    }

    fn head_ended(&mut self) {
        let &[a, b, c, kind, flags, ..] = &self.head[..] else { return };
        if self.head.len() < HEAD {
            return;
        }
        self.payload_left = u32::from_be_bytes([0, a, b, c]) as usize;
        if kind != DATA || self.payload_left > 0 || flags & END_STREAM != 0 {
            self.kept.extend_from_slice(&self.head);
        }
        self.head.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        [&[0, 0, payload.len() as u8, kind, flags, 0, 0, 0, 1], payload].concat()
    }

    #[test]
    fn only_data_without_data_is_taken_out_in_pieces_of_any_size() {
        let kept =
            [frame(4, 0, b""), frame(0, 0, b"hello"), frame(1, 4, b"\0\0\0\0\0"), frame(0, 1, b""), frame(4, 1, b"")];
        let empty = frame(0, 0, b"");
        let stream = [empty.clone(), kept.join(&empty[..]), empty.repeat(3)].concat();
        for step in 1..=stream.len() {
            let mut frames = Frames::default();
            stream.chunks(step).for_each(|bytes| frames.follow(bytes));
            assert_eq!(frames.kept, kept.concat(), "by {step}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(stream: Vec<u8>, step in 1usize..20) {
            let mut frames = Frames::default();
            stream.chunks(step).for_each(|bytes| frames.follow(bytes));
        }
    }
}
