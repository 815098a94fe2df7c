//! Where one request ends and the next begins is the same in pieces of any size, and the same to hyper (SEC-051 to SEC-060).
//!
//! The input: a byte for the size of the pieces, and a connection.
#![no_main]

use std::cell::RefCell;
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use libfuzzer_sys::fuzz_target;
use sidebearer::proxy::fuzzing;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

fuzz_target!(|data: &[u8]| {
    let Some((size, stream)) = data.split_first() else { return };
    let size = usize::from(*size).max(1);
    let clear = fuzzing::is_clear([stream]);
    for size in [1, 2, size] {
        assert_eq!(fuzzing::is_clear(stream.chunks(size)), clear, "another verdict in pieces of {size}");
    }
    let bodies = fuzzing::bodies(stream);
    let read = read_by_hyper(stream, size);
    assert!(read.len() <= bodies.len(), "hyper reads {read:?}, where the framing has {bodies:?}");
    for (read, body) in read.iter().zip(&bodies) {
        assert!(read.is_none_or(|length| length == *body), "hyper reads {read:?}, where the framing has {bodies:?}");
    }
});

/// The length of the body of each request that hyper takes up, where it came to its end.
fn read_by_hyper(stream: &[u8], size: usize) -> Vec<Option<u64>> {
    let read = Rc::new(RefCell::new(Vec::new()));
    let seen = read.clone();
    let service = service_fn(move |request| answer(request, seen.clone()));
    let agent = Agent { unread: stream.to_vec(), size };
    let connection = http1::Builder::new()
        .max_headers(256)
        .max_buf_size(256 << 10)
        .serve_connection(TokioIo::new(fuzzing::strict(agent)), service)
        .with_upgrades();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let _ = runtime.block_on(connection);
    drop(runtime);
    read.take()
}

async fn answer(
    request: Request<Incoming>,
    seen: Rc<RefCell<Vec<Option<u64>>>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::default();
    // As the product ends what could have become something else than HTTP/1.
    if *request.method() == Method::CONNECT || request.headers().contains_key(UPGRADE) {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let place = seen.borrow().len();
    seen.borrow_mut().push(None);
    seen.borrow_mut()[place] = request.into_body().collect().await.ok().map(|body| body.to_bytes().len() as u64);
    Ok(response)
}

/// Sends its bytes in pieces, and listens to nobody.
struct Agent {
    unread: Vec<u8>,
    size: usize,
}

impl AsyncRead for Agent {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let taken = self.size.min(self.unread.len()).min(buffer.remaining());
        buffer.put_slice(&self.unread[..taken]);
        self.unread.drain(..taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Agent {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
