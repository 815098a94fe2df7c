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

/// A connection on which HTTP/2 frames come in.
pub(super) struct WithoutEmpties<IO> {
    io: IO,
    frames: Frames,
    /// What was read for a reader that had no room for it.
    kept: BytesMut,
}

impl<IO> WithoutEmpties<IO> {
    pub(super) fn new(io: IO) -> Self {
        Self { io, frames: Frames::default(), kept: BytesMut::new() }
    }
}

impl<IO: AsyncRead + Unpin> WithoutEmpties<IO> {
    /// Reads into a buffer with room for more than a frame's head, and takes the empties out of it there.
    fn poll_fill(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let start = buffer.filled().len();
        loop {
            buffer.put_slice(&self.frames.head);
            let held = buffer.filled().len();
            let read = Pin::new(&mut self.io).poll_read(cx, buffer);
            if !matches!(read, Poll::Ready(Ok(()))) || buffer.filled().len() == held {
                buffer.set_filled(start);
                return read;
            }
            let left = self.frames.take_out(&mut buffer.filled_mut()[start..]);
            buffer.set_filled(start + left);
            if left > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for WithoutEmpties<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.kept.is_empty() {
            if buffer.remaining() > HEAD {
                return this.poll_fill(cx, buffer);
            }
            let mut space = [0; 4 * HEAD];
            let mut chunk = ReadBuf::new(&mut space);
            ready!(this.poll_fill(cx, &mut chunk))?;
            this.kept.extend_from_slice(chunk.filled());
        }
        let length = this.kept.len().min(buffer.remaining());
        buffer.put_slice(&this.kept[..length]);
        this.kept.advance(length);
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

/// Where in the frames the next byte stands.
#[derive(Default)]
struct Frames {
    /// As much of a head as has come; it is not passed on before it is whole.
    head: Vec<u8>,
    payload_left: usize,
}

impl Frames {
    /// Takes empty frames out of what has come, which begins with the head that was held, and gives how much is left of it.
    fn take_out(&mut self, bytes: &mut [u8]) -> usize {
        self.head.clear();
        let (mut next, mut left) = (0, 0);
        while next < bytes.len() {
            let (length, stays) = match self.payload_left {
                0 => match bytes[next..].first_chunk() {
                    Some(head) => (HEAD, self.begin(*head)),
                    None => {
                        self.head.extend_from_slice(&bytes[next..]);
                        break;
                    }
                },
                payload_left => {
                    let length = payload_left.min(bytes.len() - next);
                    self.payload_left -= length;
                    (length, true)
                }
            };
            if stays {
                if left < next {
                    bytes.copy_within(next..next + length, left);
                }
                left += length;
            }
            next += length;
        }
        left
    }

    /// Begins a frame, and tells whether it says anything.
    fn begin(&mut self, [a, b, c, kind, flags, ..]: [u8; HEAD]) -> bool {
        self.payload_left = u32::from_be_bytes([0, a, b, c]) as usize;
        kind != DATA || self.payload_left > 0 || flags & END_STREAM != 0
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
            for room in [1, HEAD, HEAD + 1, 64, 1024] {
                assert_eq!(through(&stream, step, room), kept.concat(), "by {step} into {room}");
            }
        }
    }

    /// A connection from which so many bytes come at a time.
    struct Pieces<'a> {
        stream: &'a [u8],
        step: usize,
    }

    impl AsyncRead for Pieces<'_> {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let length = self.step.min(buffer.remaining()).min(self.stream.len());
            let (piece, rest) = self.stream.split_at(length);
            buffer.put_slice(piece);
            self.stream = rest;
            Poll::Ready(Ok(()))
        }
    }

    /// What is read, so many bytes at most at once, of what comes in pieces of a size.
    fn through(stream: &[u8], step: usize, room: usize) -> Vec<u8> {
        let (mut io, mut all) = (WithoutEmpties::new(Pieces { stream, step }), Vec::new());
        let mut cx = Context::from_waker(std::task::Waker::noop());
        loop {
            let mut space = vec![0; room];
            let mut buffer = ReadBuf::new(&mut space);
            assert!(matches!(Pin::new(&mut io).poll_read(&mut cx, &mut buffer), Poll::Ready(Ok(()))));
            if buffer.filled().is_empty() {
                return all;
            }
            all.extend_from_slice(buffer.filled());
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(stream: Vec<u8>, step in 1usize..20, room in 1usize..40) {
            through(&stream, step, room);
        }
    }
}
