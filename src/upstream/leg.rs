//! A connection on its way out, whoever is at the other end: a destination, or the proxy that leads there.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::ways::Way;

/// A connection. What it reads first may have come along with a proxy's answer.
pub struct Leg {
    early: Bytes,
    io: Io,
    /// Noted until it ends.
    _way: Option<Way>,
}

enum Io {
    Tcp(TcpStream),
    /// To a proxy that is spoken to with TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Leg {
    /// The TCP connection itself, where nothing is between.
    pub fn as_tcp(&mut self) -> Option<&mut TcpStream> {
        match &mut self.io {
            Io::Tcp(stream) if self.early.is_empty() => Some(stream),
            _ => None,
        }
    }

    /// Waits until the other end has said something, or ended; whether that can be seen at all. Nothing is read.
    pub async fn has_spoken(&mut self) -> bool {
        match self.as_tcp() {
            Some(stream) => stream.peek(&mut [0]).await.is_ok(),
            None => !self.early.is_empty(),
        }
    }

    /// The same, where these bytes have already been read.
    pub(super) fn after(self, early: Bytes) -> Self {
        Self { early, ..self }
    }

    /// The same, noted as long as it lives.
    pub(super) fn along(self, way: Option<Way>) -> Self {
        Self { _way: way, ..self }
    }
}

impl From<TcpStream> for Leg {
    fn from(stream: TcpStream) -> Self {
        Self { early: Bytes::new(), io: Io::Tcp(stream), _way: None }
    }
}

impl From<TlsStream<TcpStream>> for Leg {
    fn from(stream: TlsStream<TcpStream>) -> Self {
        Self { early: Bytes::new(), io: Io::Tls(Box::new(stream)), _way: None }
    }
}

/// Does the same to either kind of stream.
macro_rules! on_stream {
    ($leg:expr, $stream:ident => $do:expr) => {
        match &mut $leg.io {
            Io::Tcp($stream) => $do,
            Io::Tls($stream) => $do,
        }
    };
}

impl AsyncRead for Leg {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return on_stream!(self, stream => Pin::new(stream).poll_read(cx, buffer));
        }
        let length = self.early.len().min(buffer.remaining());
        buffer.put_slice(&self.early[..length]);
        self.early.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Leg {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        on_stream!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        on_stream!(self, stream => Pin::new(stream).poll_write_vectored(cx, parts))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Tcp(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
