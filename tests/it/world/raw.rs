//! A connection byte by byte, plain or with TLS, on which nothing is waited for in vain.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use http::HeaderMap;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ConfigBuilder, HandshakeKind, RootCertStore, WantsVersions};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::agent::{Heard, Reply, Streams};
use super::frames::Frames;
use super::log::{Unread, unread};
use super::{DEADLINE, soon};

/// What bytes go through.
pub trait Bytestream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<IO: AsyncRead + AsyncWrite + Unpin + Send> Bytestream for IO {}

/// One connection.
pub struct Raw {
    io: Box<dyn Bytestream>,
    unread: Vec<u8>,
    roots: Arc<RootCertStore>,
    heard: Heard,
    /// What the other side proved itself with, once TLS is up.
    pub certificate: Option<CertificateDer<'static>>,
    pub alpn: Option<String>,
    /// The handshake went on from one before.
    pub resumed: bool,
}

/// A client that trusts these roots.
pub fn client(roots: Arc<RootCertStore>) -> ClientConfig {
    client_by(|builder| builder.with_safe_default_protocol_versions())
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// A client whose first steps are these.
pub fn client_by<S>(first: impl FnOnce(ConfigBuilder<ClientConfig, WantsVersions>) -> Result<S, rustls::Error>) -> S {
    first(ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))).unwrap()
}

async fn connect<IO: Bytestream>(config: Arc<ClientConfig>, sni: &str, io: IO) -> io::Result<TlsStream<IO>> {
    let name = ServerName::try_from(sni.to_owned()).unwrap();
    soon(unread(TlsConnector::from(config).connect(name, io))).await
}

impl Raw {
    pub fn new(io: impl Bytestream + 'static, roots: Arc<RootCertStore>, heard: Heard) -> Self {
        Self { io: Box::new(io), unread: Vec::new(), roots, heard, certificate: None, alpn: None, resumed: false }
    }

    pub async fn says(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        soon(async { self.io.write_all(bytes.as_ref()).await.unwrap() }).await;
        soon(async { self.io.flush().await.unwrap() }).await;
        self
    }

    /// As [`Raw::says`], to somebody who may have closed already.
    pub async fn says_if_open(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = soon(self.io.write_all(bytes.as_ref())).await;
        let _ = soon(self.io.flush()).await;
    }

    /// That was all.
    pub async fn says_end(&mut self) {
        let _ = soon(self.io.shutdown()).await;
    }

    /// The next response, whole.
    pub async fn hears(&mut self) -> Reply {
        let head = self.head().await;
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.get(9..12)?.parse().ok());
        let status = status.unwrap_or_else(|| panic!("not a response: {head:?}"));
        let fields = lines.filter_map(|line| line.split_once(':'));
        let headers: HeaderMap =
            fields.map(|(name, value)| (name.parse().unwrap(), value.trim().parse().unwrap())).collect();
        let body = match (headers.get("content-length"), headers.contains_key("transfer-encoding")) {
            (Some(length), _) => self.take(length.to_str().unwrap().parse().unwrap()).await,
            (None, true) => self.chunks().await,
            (None, false) => Vec::new(),
        };
        let ended_with_its_head = body.is_empty();
        Reply { status, headers, body: Bytes::from(body), trailers: HeaderMap::new(), ended_with_its_head }
    }

    /// All that comes until the other side closes.
    pub async fn hears_to_the_end(&mut self) -> String {
        let mut all = std::mem::take(&mut self.unread);
        // A connection may also end with a reset, or without TLS's goodbye.
        let _ = tokio::time::timeout(DEADLINE, self.io.read_to_end(&mut all)).await.expect("it stays open");
        self.heard.keep(&all);
        String::from_utf8_lossy(&all).into_owned()
    }

    /// Nothing has come so far, although everything that can run now has run.
    pub async fn hears_nothing_yet(&mut self) {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        let read = std::pin::pin!(self.io.read_buf(&mut self.unread)).now_or_never();
        assert!(read.is_none() && self.unread.is_empty(), "{:?}", String::from_utf8_lossy(&self.unread));
    }

    /// Exactly these many bytes.
    pub async fn take(&mut self, length: usize) -> Vec<u8> {
        while self.unread.len() < length {
            self.more().await;
        }
        self.unread.drain(..length).collect()
    }

    async fn head(&mut self) -> String {
        String::from_utf8(self.until(b"\r\n\r\n").await).unwrap()
    }

    async fn chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let line = String::from_utf8(self.until(b"\r\n").await).unwrap();
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            if size == 0 {
                while self.until(b"\r\n").await != b"\r\n" {}
                return body;
            }
            body.extend(self.take(size).await);
            self.take(2).await;
        }
    }

    async fn until(&mut self, end: &[u8]) -> Vec<u8> {
        loop {
            if let Some(at) = self.unread.windows(end.len()).position(|window| window == end) {
                return self.unread.drain(..at + end.len()).collect();
            }
            self.more().await;
        }
    }

    async fn more(&mut self) {
        let before = self.unread.len();
        let read = soon(self.io.read_buf(&mut self.unread)).await.unwrap_or(0);
        self.heard.keep(&self.unread[before..]);
        assert!(read > 0, "the connection ended after {:?}", String::from_utf8_lossy(&self.unread));
    }

    /// Starts TLS, asking for this name and offering these protocols.
    pub async fn tls(self, sni: &str, alpn: &[&str]) -> io::Result<Raw> {
        self.tls_through(sni, alpn, |io| io).await
    }

    /// As [`Raw::tls`], with something between the TLS and the connection.
    pub async fn tls_through<IO: Bytestream + 'static>(
        self,
        sni: &str,
        alpn: &[&str],
        between: impl FnOnce(Box<dyn Bytestream>) -> IO,
    ) -> io::Result<Raw> {
        let mut config = client(self.roots.clone());
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let tls = connect(Arc::new(config), sni, between(self.io)).await?;
        Ok(Self::over(tls, self.roots, self.heard))
    }

    /// Starts TLS with these settings, asking for this name.
    pub async fn tls_with(self, config: Arc<ClientConfig>, sni: &str) -> io::Result<Raw> {
        let tls = connect(config, sni, self.io).await?;
        Ok(Self::over(tls, self.roots, self.heard))
    }

    /// Starts TLS and asks so often for new keys, whatever the other side says to that.
    pub async fn tls_asking_for_keys(self, config: Arc<ClientConfig>, sni: &str, times: usize) -> io::Result<Raw> {
        let mut tls = connect(config, sni, self.io).await?;
        for _ in 0..times {
            let asked = tls.get_mut().1.refresh_traffic_keys();
            if asked.is_err() || unread(tls.flush()).await.is_err() {
                break;
            }
        }
        Ok(Self::over(tls, self.roots, self.heard))
    }

    /// Whoever proves themselves to it: it does not believe them.
    pub fn trusting_nobody(self) -> Self {
        Self { roots: Arc::new(RootCertStore::empty()), ..self }
    }

    fn over(tls: TlsStream<impl Bytestream + 'static>, roots: Arc<RootCertStore>, heard: Heard) -> Self {
        let session = tls.get_ref().1;
        let certificate = session.peer_certificates().and_then(|chain| chain.first()).cloned();
        let alpn = session.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned());
        let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
        Raw { certificate, alpn, resumed, ..Raw::new(tls, roots, heard) }
    }

    /// Speaks HTTP/2 on it.
    pub async fn http2(self) -> Streams {
        let handshake = http2::handshake(Unread, TokioIo::new(self.io));
        let (sender, connection) = soon(unread(handshake)).await.unwrap();
        let connection = tokio::spawn(unread(connection)).map(drop).boxed().shared();
        Streams { sender, connection, heard: self.heard }
    }

    /// Speaks HTTP/2 on it, stream by stream.
    pub async fn h2(self) -> h2::client::SendRequest<Bytes> {
        let (sender, connection) = soon(unread(h2::client::handshake(self.io))).await.unwrap();
        tokio::spawn(unread(connection));
        sender
    }

    /// Speaks HTTP/2 on it, frame by frame.
    pub async fn frames(self) -> Frames {
        Frames::agent(self.io).await
    }

    /// Speaks HTTP/1.1 on it, for one request.
    pub async fn http1(self, request: http::Request<super::answer::Filler>) -> Result<Reply, hyper::Error> {
        let heard = self.heard.clone();
        Reply::read(self.http1_streaming(request).await?, &heard).await
    }

    /// As [`Raw::http1`], to the end of the head.
    pub async fn http1_streaming(
        self,
        request: http::Request<super::answer::Filler>,
    ) -> Result<http::Response<Incoming>, hyper::Error> {
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(self.io));
        let (mut sender, connection) = soon(unread(handshake)).await?;
        tokio::spawn(unread(connection));
        let response = tokio::time::timeout(DEADLINE, unread(sender.send_request(request))).await;
        response.expect("no answer in time")
    }
}
