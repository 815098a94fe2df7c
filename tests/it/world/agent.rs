//! An agent: calls APIs through the proxy, over HTTP/1.1 or HTTP/2, and has no credential.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::future::{BoxFuture, Shared};
use http::{HeaderMap, Request, Response};
use http_body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http2;

use super::answer::Filler;
use super::log::unread;
use super::{DEADLINE, World, soon};

/// What an agent is answered.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: HeaderMap,
    /// There is no body, and the head said so.
    pub ended_with_its_head: bool,
}

impl Reply {
    /// Reads a response to its end.
    pub async fn read(response: Response<Incoming>, heard: &Heard) -> Result<Self, hyper::Error> {
        let (head, body) = response.into_parts();
        let ended_with_its_head = body.is_end_stream();
        let body = tokio::time::timeout(DEADLINE, body.collect()).await.expect("the body does not end")?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        let body = body.to_bytes();
        heard.keep(format!("{:?} {trailers:?}", head.headers).as_bytes());
        heard.keep(&body);
        Ok(Self { status: head.status.as_u16(), headers: head.headers, body, trailers, ended_with_its_head })
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// An answer of the sidecar's own.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_| panic!("{} is no answer of the sidecar's own: {:?}", self.status, self.body))
    }

    /// The stable code of an answer of the sidecar's own.
    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap().to_owned()
    }
}

/// What agents were answered, to look for secrets in it. A clone is the same one.
#[derive(Clone, Default)]
pub struct Heard(Arc<Mutex<Vec<u8>>>);

/// Long enough for any answer of the proxy's own.
const KEPT: usize = 64 << 10;

impl Heard {
    pub fn keep(&self, bytes: &[u8]) {
        self.0.lock().unwrap().extend(&bytes[..bytes.len().min(KEPT)]);
    }

    pub fn forget(&self) {
        self.0.lock().unwrap().clear();
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

/// An HTTP/2 connection. A clone is the same one.
#[derive(Clone)]
pub struct Streams {
    /// Until it ends.
    pub connection: Shared<BoxFuture<'static, ()>>,
    pub sender: http2::SendRequest<Filler>,
    pub heard: Heard,
}

impl Streams {
    /// The other side ends the connection.
    pub async fn ends(self) {
        soon(self.connection).await;
    }

    pub async fn send(&self, request: Request<Filler>) -> Result<Reply, hyper::Error> {
        Reply::read(self.streaming(request).await?, &self.heard).await
    }

    /// As [`Streams::send`], to the end of the head.
    pub async fn streaming(&self, request: Request<Filler>) -> Result<Response<Incoming>, hyper::Error> {
        let mut sender = self.sender.clone();
        let response = tokio::time::timeout(DEADLINE, unread(sender.send_request(request))).await;
        response.expect("no answer in time")
    }
}

/// A call that is being put together.
pub struct Call<'a> {
    world: &'a World,
    host: String,
    path: String,
    request: http::request::Builder,
    body: Filler,
    h2: bool,
}

impl World {
    /// A call to the API over HTTP/1.1, in a tunnel of its own.
    pub fn call(&self, method: &str, path: &str) -> Call<'_> {
        let request = Request::builder().method(method);
        Call { world: self, host: "api.test".into(), path: path.into(), request, body: Filler::text(""), h2: false }
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.call("GET", path).send().await
    }
}

impl Call<'_> {
    pub fn over_h2(self) -> Self {
        Self { h2: true, ..self }
    }

    /// To another host than the API's own.
    pub fn to(self, host: &str) -> Self {
        Self { host: host.into(), ..self }
    }

    pub fn with(self, name: &str, value: &str) -> Self {
        Self { request: self.request.header(name, value), ..self }
    }

    pub fn body(self, body: Filler) -> Self {
        Self { body, ..self }
    }

    pub async fn send(self) -> Reply {
        self.try_send().await.expect("no whole answer")
    }

    /// The answer, unless the connection breaks.
    pub async fn try_send(self) -> Result<Reply, hyper::Error> {
        let Call { world, host, path, request, body, h2 } = self;
        let tunnel = world.tunnel(&format!("{host}:443")).await;
        let tls = tunnel.tls(&host, &[if h2 { "h2" } else { "http/1.1" }]).await.unwrap();
        if h2 {
            let request = request.uri(format!("https://{host}{path}")).body(body).unwrap();
            soon(tls.http2()).await.send(request).await
        } else {
            let request = request.uri(path).header("host", host).body(body).unwrap();
            tls.http1(request).await
        }
    }
}
