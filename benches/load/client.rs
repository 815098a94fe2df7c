//! Sends GETs of a shape, and makes sure that the answers are the upstream's.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Uri, header};

use crate::dial::{Dialer, Stream, Target};
use crate::shape::Shape;
use crate::upstream::AUTHORIZATION;
use crate::{http1, http2};

/// Longer than anything takes that works: an answer that does not come is an error, and the run ends.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is asked for, and how it looks in each protocol.
pub struct Asked {
    authority: String,
    path: String,
    length: usize,
    target: Arc<Target>,
}

impl Asked {
    /// The usual answer of 1 KiB.
    pub fn usual(target: &Arc<Target>, authority: &str) -> Self {
        Self { authority: authority.into(), path: "/v1/things/1".into(), length: 1024, target: Arc::clone(target) }
    }

    /// A body of so many bytes.
    pub fn bytes(target: &Arc<Target>, authority: &str, length: usize) -> Self {
        Self { path: format!("/bytes/{length}"), length, ..Self::usual(target, authority) }
    }

    fn http1(&self, turn: u64) -> Vec<u8> {
        let Self { authority, path, target, .. } = self;
        // Within a tunnel the CONNECT has said already who is acting.
        let (origin, credentials) = match target.shape {
            Shape::Plain => (format!("http://{authority}"), target.credentials(turn)),
            _ => (String::new(), String::new()),
        };
        let token =
            if target.shape.brings_token() { format!("authorization: {AUTHORIZATION}\r\n") } else { String::new() };
        format!(
            "GET {origin}{path} HTTP/1.1\r\nhost: {authority}\r\nuser-agent: load\r\naccept: */*\r\n{token}{credentials}\r\n"
        )
        .into_bytes()
    }

    fn http2(&self) -> io::Result<Request<()>> {
        let Self { authority, path, target, .. } = self;
        let uri = Uri::builder().scheme("https").authority(authority.as_str()).path_and_query(path.as_str());
        let mut request = Request::get(uri.build().map_err(io::Error::other)?)
            .header(header::USER_AGENT, "load")
            .header(header::ACCEPT, "*/*");
        if target.shape.brings_token() {
            request = request.header(header::AUTHORIZATION, AUTHORIZATION);
        }
        request.body(()).map_err(io::Error::other)
    }
}

/// A connection, or an HTTP/2 stream at a time on a shared one.
pub struct Client {
    protocol: Protocol,
    asked: Arc<Asked>,
    /// The bytes of a request, where they are always the same.
    request: Vec<u8>,
}

enum Protocol {
    Http1(http1::Connection<Stream>),
    Http2(http2::Connection),
}

impl Client {
    /// Opens a connection, and gives a client for each of its streams; HTTP/1.1 has one.
    pub async fn open(dialer: &Dialer, asked: &Arc<Asked>, streams: usize, turn: u64) -> io::Result<Vec<Self>> {
        timely(async {
            let stream = dialer.open(&asked.authority, turn).await?;
            if !asked.target.shape.is_http2() {
                return Ok(vec![Self::new(Protocol::Http1(http1::Connection::new(stream)), asked)]);
            }
            let connection = http2::Connection::open(stream).await?;
            Ok((0..streams).map(|_| Self::new(Protocol::Http2(connection.clone()), asked)).collect())
        })
        .await
    }

    fn new(protocol: Protocol, asked: &Arc<Asked>) -> Self {
        Self { protocol, asked: Arc::clone(asked), request: asked.http1(0) }
    }

    /// Sends the request, and waits for the whole answer.
    pub async fn get(&mut self, turn: u64) -> io::Result<()> {
        if self.asked.target.users > 0 && self.asked.target.shape == Shape::Plain {
            self.request = self.asked.http1(turn);
        }
        let length = timely(async {
            match &mut self.protocol {
                Protocol::Http1(connection) => connection.exchange(&self.request).await,
                Protocol::Http2(connection) => connection.exchange(self.asked.http2()?).await,
            }
        })
        .await?;
        if length != self.asked.length {
            return Err(io::Error::other(format!("{length} bytes in place of {}", self.asked.length)));
        }
        Ok(())
    }
}

async fn timely<T>(what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(PATIENCE, what).await.map_err(|_| io::Error::other("no answer within 30 s"))?
}
