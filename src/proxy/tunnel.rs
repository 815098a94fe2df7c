//! A blind tunnel: bytes to a host that no route names, untouched and unseen.

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;

use super::Proxy;
use super::body::ResponseBody;
use super::reject::Reject;
use crate::host::Authority;

/// Connects first, and says 200 only then, so that an agent learns why it cannot.
pub(super) async fn open(
    proxy: &Proxy,
    request: Request<Incoming>,
    to: &Authority,
) -> Result<Response<ResponseBody>, Reject> {
    let mut upstream = proxy.parts().upstream.dialer().tcp(to).await?;
    let agent = hyper::upgrade::on(request);
    proxy.drain().spawn_until_forced(async move {
        let Ok(agent) = agent.await else { return };
        let mut agent = TokioIo::new(agent);
        if let Err(error) = tokio::io::copy_bidirectional(&mut agent, &mut upstream).await {
            tracing::debug!(%error, "tunnel ended");
        }
    });
    Ok(Response::new(ResponseBody::whole(Bytes::new())))
}
