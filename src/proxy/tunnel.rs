//! A blind tunnel: bytes to a host that no route names, untouched and unseen.

use std::io;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::io::AsyncWriteExt;

use super::body::ResponseBody;
use super::pace::Paced;
use super::pump::pump;
use super::reject::Reject;
use super::{Next, Proxy, bare};
use crate::host::Authority;
use crate::listen::Connection;
use crate::upstream::Leg;

/// Connects first, and says 200 only then, so that an agent learns why it cannot.
pub(super) async fn open(
    proxy: &Proxy,
    request: Request<Incoming>,
    to: &Authority,
    next: &Next,
) -> Result<Response<ResponseBody>, Reject> {
    let upstream = proxy.parts().upstream.dialer().tcp(to).await?;
    let open = proxy.lasting.metrics.tunnel();
    next.set(async move {
        let _open = open;
        let Some(agent) = bare::connection(request).await else { return };
        if let Err(error) = carry(agent, upstream).await {
            tracing::debug!(%error, "tunnel ended");
        }
    });
    Ok(Response::new(ResponseBody::whole(Bytes::new())))
}

/// Carries what either says to the other, until both have ended.
pub(super) async fn carry(mut agent: Paced<Connection>, mut upstream: Leg) -> io::Result<()> {
    if let Some(upstream) = upstream.as_tcp()
        && let Some((agent, said, patience)) = agent.as_tcp()
    {
        upstream.write_all(&said).await?;
        return pump(agent, upstream, patience).await;
    }
    tokio::io::copy_bidirectional(&mut agent, &mut upstream).await.map(drop)
}
