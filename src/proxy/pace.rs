//! An agent's connection: counted while it lives, and ended when the agent takes nothing that is there for it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Sleep;
use tokio_util::either::Either;

use crate::listen::Connection;

/// A connection whose writes do not wait for ever. It stays one when the protocol on it changes.
pub(super) struct Paced<IO> {
    io: IO,
    /// What of it has been read already.
    early: Bytes,
    write_timeout: Duration,
    /// Since the agent takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    _counted: OwnedSemaphorePermit,
}

impl<IO> Paced<IO> {
    pub(super) fn new(io: IO, write_timeout: Duration, counted: OwnedSemaphorePermit) -> Self {
        Self { io, early: Bytes::new(), write_timeout, stalled: None, _counted: counted }
    }

    /// The same, where these bytes have already been read.
    pub(super) fn after(self, early: Bytes) -> Self {
        Self { early, ..self }
    }

    /// Gives what a write came to, or an error when it has waited too long.
    fn waited<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let limit = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        stalled.as_mut().poll(cx).map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "the agent takes nothing")))
    }
}

impl Paced<Connection> {
    /// The TCP connection itself, if it is one, what of it has been read already, and how long its agent may take nothing.
    pub(super) fn as_tcp(&mut self) -> Option<(&mut TcpStream, Bytes, Duration)> {
        match &mut self.io {
            Either::Left(stream) => Some((stream, std::mem::take(&mut self.early), self.write_timeout)),
            Either::Right(_) => None,
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Paced<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        let length = self.early.len().min(buffer.remaining());
        buffer.put_slice(&self.early.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Paced<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.waited(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.waited(cx, flushed)
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
        self.waited(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::Semaphore;
    use tokio::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn paced(io: tokio::io::DuplexStream, places: &Arc<Semaphore>) -> Paced<tokio::io::DuplexStream> {
        Paced::new(io, LIMIT, places.clone().try_acquire_owned().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_takes_nothing_is_let_go_and_one_that_takes_a_little_is_not() {
        // LST-016
        let places = Arc::new(Semaphore::new(1));
        let (here, mut agent) = tokio::io::duplex(8);
        let mut here = paced(here, &places);
        for _ in 0..10 {
            let writing = here.write_all(b"12345678");
            let (written, _) = tokio::join!(writing, async {
                tokio::time::sleep(LIMIT - Duration::from_secs(1)).await;
                agent.read_exact(&mut [0; 8]).await.unwrap();
            });
            written.unwrap();
        }
        here.write_all(b"12345678").await.unwrap();
        let began = Instant::now();
        assert_eq!(here.write_all(b"9").await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(began.elapsed(), LIMIT);
        assert_eq!(places.available_permits(), 0);
        drop(here);
        assert_eq!(places.available_permits(), 1);
    }
}
