//! A connection that is counted for as long as its bytes can flow, whatever is spoken on it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::metrics::Open;

pub(super) struct Counted<IO> {
    io: IO,
    _open: Open,
}

impl<IO> Counted<IO> {
    pub(super) fn new(io: IO, open: Open) -> Self {
        Self { io, _open: open }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Counted<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Counted<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Empty;
    use hyper::client::conn::http1;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn an_upgraded_connection_counts_until_it_ends() {
        let metrics = Metrics::default();
        let busy = || metrics.text(false).contains("sidebearer_upstream_connections{state=\"busy\"} 1");
        let (near, mut far) = tokio::io::duplex(1024);
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(Counted::new(near, metrics.upstream()))).await.unwrap();
        let connection = tokio::spawn(connection.with_upgrades());
        let request = http::Request::get("/").header("upgrade", "x").header("connection", "upgrade");
        let answer = sender.send_request(request.body(Empty::<bytes::Bytes>::new()).unwrap());
        let upstream = async {
            let _ = far.read(&mut [0; 1024]).await;
            far.write_all(b"HTTP/1.1 101 x\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n").await.unwrap();
        };
        let upgraded = hyper::upgrade::on(tokio::join!(answer, upstream).0.unwrap()).await.unwrap();
        connection.await.unwrap().unwrap();
        assert!(busy());
        drop(upgraded);
        assert!(!busy());
    }
}
