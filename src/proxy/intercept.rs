//! Answers a provider's TLS in its place, and reads the requests inside.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::body::ResponseBody;
use super::{Arrival, Proxy};
use crate::host::{Authority, Host};
use crate::upstream::Origin;

/// For the first byte and for the handshake, each.
const PATIENCE: Duration = Duration::from_secs(10);
/// The first byte of a TLS record that holds a ClientHello (RFC 8446 section 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// Says 200, and serves what comes through the tunnel as if it were the host.
pub(super) fn open(proxy: &Proxy, request: Request<Incoming>, to: Authority) -> Response<ResponseBody> {
    let served = proxy.clone();
    proxy.drain().spawn_until_forced(async move {
        let Ok(agent) = hyper::upgrade::on(request).await else { return };
        if let Err(error) = serve(&served, TokioIo::new(agent), &to).await {
            tell(&served, &to, &error);
        }
    });
    Response::new(ResponseBody::whole(Bytes::new()))
}

/// Once for each host: an agent that does not trust the CA tries again and again.
fn tell(proxy: &Proxy, to: &Authority, error: &io::Error) {
    if proxy.inner.failing.insert(to.clone()) {
        let hint = "an agent that does not trust the CA needs `ca.pem`: see `sidebearer env`";
        tracing::warn!(authority = %to, %error, hint, "tunnel to a routed host failed; said once for this host");
    } else {
        tracing::debug!(authority = %to, %error, "tunnel to a routed host failed");
    }
}

async fn serve<IO>(proxy: &Proxy, mut agent: IO, to: &Authority) -> io::Result<()>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let first = tokio::time::timeout(PATIENCE, agent.read_u8()).await;
    let first = match first.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no byte within 10 s"))? {
        Ok(first) => first,
        // Opened for later use, and closed unused.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        Err(error) => return Err(error),
    };
    let agent = Pushed { first: Some(first), io: agent };
    let plaintext = proxy.parts().routes.plaintext(to);
    let origin = Arc::new(Origin { authority: to.clone(), plaintext, http: Default::default() });
    match (&to.host, first == TLS_HANDSHAKE) {
        (Host::Name(name), true) if !plaintext => {
            let now = proxy.parts().clock.now().wall;
            let accepted = tokio::time::timeout(PATIENCE, proxy.parts().ca.accept(name, agent, now)).await;
            let agent =
                accepted.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake within 10 s"))??;
            match agent.get_ref().1.alpn_protocol() {
                Some(b"h2") => proxy.serve_h2(agent, Arrival::Tunnel(origin)).await,
                _ => proxy.serve_h1(agent, Arrival::Tunnel(origin)).await,
            }
        }
        // Node's fetch sends `http://` URLs this way.
        (_, false) if plaintext => proxy.serve_h1(agent, Arrival::Tunnel(origin)).await,
        _ => {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not TLS where the route says TLS, or the reverse"));
        }
    }
    Ok(())
}

/// A connection with its first byte put back.
struct Pushed<IO> {
    first: Option<u8>,
    io: IO,
}

impl<IO: AsyncRead + Unpin> AsyncRead for Pushed<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buffer.remaining() > 0
            && let Some(first) = self.first.take()
        {
            buffer.put_slice(&[first]);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Pushed<IO> {
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
