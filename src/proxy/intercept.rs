//! Answers a provider's TLS in its place, and reads the requests inside.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;

use super::body::ResponseBody;
use super::{Arrival, Front, Next, Proxy, Tunnel, bare, is_first};
use crate::events::TunnelStep;
use crate::host::{Authority, Host, HostName};

/// Says 200, and serves what comes through the tunnel as if it were the host.
pub(super) fn open(proxy: &Proxy, request: Request<Incoming>, tunnel: Tunnel, next: &Next) -> Response<ResponseBody> {
    let (front, tunnel) = (proxy.front(), Arc::new(tunnel));
    proxy.parts().events.tunnel(&tunnel.origin.authority, TunnelStep::Open);
    next.set(async move {
        let Some(agent) = bare::connection(request).await else { return };
        answer(&front, agent, &tunnel).await;
    });
    Response::new(ResponseBody::whole(Bytes::new()))
}

/// Serves a connection to its end, and tells where nothing comes of it.
pub(super) async fn answer<IO>(front: &Front, agent: IO, tunnel: &Arc<Tunnel>)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    if let Err(error) = serve(front, agent, tunnel).await {
        let to = &tunnel.origin.authority;
        front.current().parts().events.tunnel(to, TunnelStep::Failed { error: error.to_string() });
        tell(front, to, &error);
    }
}

/// Once for each host: an agent that does not trust the CA tries again and again.
fn tell(front: &Front, to: &Authority, error: &io::Error) {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        // Opened for later use, and closed unused.
        return front.lasting.metrics.handshake("unused");
    }
    front.lasting.metrics.handshake("failed");
    if is_first(&front.lasting.failing, to) {
        let hint = "an agent that does not trust the CA needs `ca.pem`: see `sidebearer env`";
        tracing::warn!(authority = %to, %error, hint, "tunnel to a routed host failed; said once for this host");
    } else {
        tracing::debug!(authority = %to, %error, "tunnel to a routed host failed");
    }
}

pub(super) async fn serve<IO>(front: &Front, agent: IO, tunnel: &Arc<Tunnel>) -> io::Result<()>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (origin, arrival) = (&tunnel.origin, Arrival::Tunnel(tunnel.clone()));
    let name = match &origin.authority.host {
        Host::Name(name) if !origin.plaintext => name,
        // Node's fetch sends `http://` URLs this way.
        _ => {
            Box::pin(front.serve_h1(agent, arrival)).await;
            return Ok(());
        }
    };
    // Boxed, and the connection out of sight: what only one of the two needs is not kept through the other.
    let serving: BoxFuture<'_, ()> = {
        let agent = Box::pin(handshake(front.current(), name, agent)).await?;
        let h2 = agent.get_ref().1.alpn_protocol() == Some(b"h2");
        front.lasting.metrics.handshake("ok");
        front.current().parts().events.tunnel(&origin.authority, TunnelStep::Tls { h2 });
        if h2 { Box::pin(front.serve_h2(agent, arrival)) } else { Box::pin(front.serve_h1(agent, arrival)) }
    };
    serving.await;
    Ok(())
}

async fn handshake<IO>(proxy: Proxy, name: &HostName, agent: IO) -> io::Result<TlsStream<IO>>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = proxy.parts().ca.accept(name, agent, proxy.parts().clock.now().wall);
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long");
    tokio::time::timeout(proxy.limits().handshake_timeout, handshake).await.map_err(late)?
}
