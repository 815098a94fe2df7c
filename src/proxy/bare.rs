//! Takes an agent's connection back out of the HTTP/1 that its CONNECT came in.

use bytes::{Bytes, BytesMut};
use http::Request;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;

use super::half::HeldEnd;
use super::pace::Paced;
use super::rest::Resting;
use super::wire::Strict;
use crate::listen::Connection;

/// A listener's connection while its requests are read.
type Read = TokioIo<Resting<Strict<HeldEnd<Paced<Connection>>>>>;

/// The connection as it was accepted, once the CONNECT is answered. Nothing of what read HTTP from it is left in between.
pub(super) async fn connection(connect: Request<Incoming>) -> Option<Paced<Connection>> {
    let upgraded = hyper::upgrade::on(connect).await.ok()?;
    let Ok(parts) = upgraded.downcast::<Read>() else {
        tracing::error!("a CONNECT came in on what is no listener's connection; its tunnel is closed");
        return None;
    };
    let (io, unread) = parts.io.into_inner().into_parts();
    Some(io.into_inner().into_inner().after(joined(parts.read_buf, unread)))
}

fn joined(first: Bytes, second: Bytes) -> Bytes {
    if second.is_empty() {
        return first;
    }
    let mut both = BytesMut::from(first);
    both.extend_from_slice(&second);
    both.freeze()
}
