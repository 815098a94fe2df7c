//! A company's proxy: asks who comes, remembers what it was asked, leads where it knows the way, and can misbehave.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::header::{CONNECTION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::certificates::Tls;
use super::log::unread;
use super::secret_of;

/// As long as two letters, so that a secret behind them looks the same in base64 as without.
pub const USER: &str = "it";

/// What proxy.yaml says of it.
pub const URL: &str = "http://it:${CORPORATE_SECRET}@corp.test:3128";

/// The proxy. A clone is the same one.
#[derive(Clone)]
pub struct Corporate {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    ways: HashMap<String, SocketAddr>,
    asked: Vec<Asked>,
    connections: usize,
    refuses: Option<StatusCode>,
    says: Option<Vec<u8>>,
    greets: &'static [u8],
}

/// One request that it was sent.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: Method,
    pub target: String,
    pub headers: HeaderMap,
}

impl Asked {
    pub fn line(&self) -> String {
        format!("{} {}", self.method, self.target)
    }
}

type Answer = Response<UnsyncBoxBody<Bytes, hyper::Error>>;

impl Corporate {
    pub async fn start(tls: Option<Tls>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let corporate = Self { address: listener.local_addr().unwrap(), state: Arc::default() };
        let accepting = corporate.clone();
        tokio::spawn(unread(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                accepting.state().connections += 1;
                let (corporate, tls) = (accepting.clone(), tls.as_ref().map(|tls| tls.config.clone()));
                tokio::spawn(unread(async move {
                    match tls {
                        None => corporate.serve(stream).await,
                        Some(tls) => {
                            if let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await {
                                corporate.serve(stream).await;
                            }
                        }
                    }
                }));
            }
        }));
        corporate
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The way to a host and port, which nobody else knows.
    pub fn knows(&self, authority: &str, address: SocketAddr) {
        self.state().ways.insert(authority.to_owned(), address);
    }

    /// From now on it answers everything with this status.
    pub fn refuses(&self, status: u16) {
        self.state().refuses = StatusCode::from_u16(status).ok();
    }

    /// From now on it writes these bytes to whoever asks, and closes.
    pub fn says(&self, bytes: impl Into<Vec<u8>>) {
        self.state().says = Some(bytes.into());
    }

    /// From now on tunnels begin with these bytes, in one piece with its answer.
    pub fn greets(&self, bytes: &'static [u8]) {
        self.state().greets = bytes;
    }

    /// What it was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state().asked.clone()
    }

    /// The same, without who asked.
    pub fn lines(&self) -> Vec<String> {
        self.state().asked.iter().map(Asked::line).collect()
    }

    /// How many times somebody connected.
    pub fn connections(&self) -> usize {
        self.state().connections
    }

    async fn serve<IO>(self, mut stream: IO)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (says, greets) = {
            let state = self.state();
            (state.says.clone(), state.greets)
        };
        if says.is_some() || !greets.is_empty() {
            let _ = self.misbehave(&mut stream, says, greets).await;
            return;
        }
        let service = service_fn(move |request| {
            let corporate = self.clone();
            async move { Ok::<_, Infallible>(corporate.answer(request).await) }
        });
        let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades().await;
    }

    /// Writes what HTTP has no words for.
    async fn misbehave<IO>(&self, stream: &mut IO, says: Option<Vec<u8>>, greets: &[u8]) -> std::io::Result<()>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        if let Some(says) = says {
            stream.write_all(&says).await?;
            return stream.shutdown().await;
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let way = self.way(head.split(' ').nth(1).unwrap_or_default());
        let mut there = TcpStream::connect(way.unwrap()).await?;
        stream.write_all(&[b"HTTP/1.0 200 Connection established\r\n\r\n", greets].concat()).await?;
        tokio::io::copy_bidirectional(stream, &mut there).await.map(|_| ())
    }

    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let (method, headers) = (request.method().clone(), request.headers().clone());
        self.state().asked.push(Asked { method, target: request.uri().to_string(), headers });
        let known = format!("Basic {}", BASE64_STANDARD.encode(format!("{USER}:{}", secret_of("corporate"))));
        if request.headers().get(PROXY_AUTHORIZATION).is_none_or(|shown| shown.as_bytes() != known.as_bytes()) {
            let mut asks = empty(StatusCode::PROXY_AUTHENTICATION_REQUIRED);
            asks.headers_mut().insert(PROXY_AUTHENTICATE, "Basic realm=\"corp\"".parse().unwrap());
            return asks;
        }
        if let Some(status) = self.state().refuses {
            return empty(status);
        }
        let authority = request.uri().authority().map(|authority| authority.to_string()).unwrap_or_default();
        let authority = if authority.contains(':') { authority } else { format!("{authority}:80") };
        let Some(way) = self.way(&authority) else { return empty(StatusCode::BAD_GATEWAY) };
        let there = TcpStream::connect(way).await.unwrap();
        if *request.method() != Method::CONNECT {
            return send_on(request, there).await;
        }
        tokio::spawn(unread(async move {
            let mut here = TokioIo::new(hyper::upgrade::on(request).await.unwrap());
            let mut there = there;
            let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
        }));
        empty(StatusCode::OK)
    }

    fn way(&self, authority: &str) -> Option<SocketAddr> {
        self.state().ways.get(authority).copied()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As a proxy sends a request on: in origin form, without what was said to the proxy alone.
async fn send_on(mut request: Request<Incoming>, there: TcpStream) -> Answer {
    let path = request.uri().path_and_query().cloned().unwrap();
    *request.uri_mut() = path.into();
    request.headers_mut().remove(PROXY_AUTHORIZATION);
    request.headers_mut().remove(CONNECTION);
    let (mut sender, connection) = client::handshake(TokioIo::new(there)).await.unwrap();
    tokio::spawn(unread(connection));
    sender.send_request(request).await.unwrap().map(BodyExt::boxed_unsync)
}

fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
    *answer.status_mut() = status;
    answer
}
