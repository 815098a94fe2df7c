//! An API, an authorization server, and an agent between them and the sidecar.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Empty, Full};
use hyper::client::conn::{http1, http2};
use hyper::server::conn as server;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::callgrind::Sidecar;

/// A body as APIs answer it.
const ANSWER: [u8; 1024] = [b'x'; 1024];

/// A way that requests take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// In absolute form, to an API without TLS, with a token.
    Plain,
    /// HTTP/1.1 inside an intercepted CONNECT, and to the API.
    H1,
    /// HTTP/2 on both sides.
    H2,
    /// HTTP/1.1 in a blind tunnel.
    Tunnel,
    /// A CONNECT, a handshake that resumes no session, a leaf that is there already, and one request.
    Connection,
}

impl Shape {
    pub const ALL: [Self; 5] = [Shape::Plain, Shape::H1, Shape::H2, Shape::Tunnel, Shape::Connection];

    pub fn name(self) -> &'static str {
        match self {
            Shape::Plain => "plain",
            Shape::H1 => "h1",
            Shape::H2 => "h2",
            Shape::Tunnel => "tunnel",
            Shape::Connection => "connection",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shape| shape.name() == name)
    }
}

/// Everything around the sidecar, and the sidecar.
pub struct World {
    pub sidecar: Sidecar,
    /// Removed when this goes.
    _folder: TempDir,
}

impl World {
    /// With so many routes.
    pub async fn start(routes: usize) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let root = Root::new();
        std::fs::write(folder.path().join("root.pem"), &root.pem).unwrap();
        let plain = serve(None).await;
        let h1 = serve(Some(root.server("h1.test", &["http/1.1"]))).await;
        let h2 = serve(Some(root.server("h2.test", &["h2"]))).await;
        let auth = serve(Some(root.server("auth.test", &["http/1.1"]))).await;
        let config = format!(
            "listen: 127.0.0.1:0
admin: 127.0.0.1:0
health: off
extra_ca_files: [root.pem]
resolve:
  plain.test:80: {plain}
  tunnel.test:443: {plain}
  h1.test:443: {h1}
  h2.test:443: {h2}
  auth.test:443: {auth}
providers:
  main:
    token_endpoint: https://auth.test/token
    client_id: agent
    client_secret: secret
    client_credentials: {{}}
routes:
  - {{host: 'plain.test:80', plaintext: true, provider: main}}
  - {{host: h1.test, provider: main}}
  - {{host: h2.test, provider: main}}
"
        );
        let more = (3..routes).map(|index| {
            // Of 1,000 hosts at most: the CA's constraints name each, and a handshake has no place for many more.
            let (host, version) = (index % 1_000, index / 1_000);
            format!("  - host: api{host}.example\n    paths:\n      - /v{version}/**\n    provider: main\n")
        });
        let config = config + &more.collect::<String>();
        std::fs::write(folder.path().join("proxy.yaml"), config).unwrap();
        Self { sidecar: Sidecar::start(folder.path()).await, _folder: folder }
    }

    /// An agent that sends requests of this shape, on a connection of its own.
    pub async fn agent(&self, shape: Shape) -> Agent {
        let (proxy, pem) = (self.sidecar.address.clone(), std::fs::read(&self.sidecar.ca).unwrap());
        let sender = match shape {
            Shape::Plain => Sender::h1(TcpStream::connect(&proxy).await.unwrap()).await,
            Shape::Tunnel => Sender::h1(connect(&proxy, "tunnel.test").await).await,
            Shape::H1 => Sender::h1(handshake(&proxy, "h1.test", "http/1.1", &pem).await).await,
            Shape::H2 => Sender::h2(handshake(&proxy, "h2.test", "h2", &pem).await).await,
            Shape::Connection => Sender::New { proxy, pem },
        };
        Agent { shape, sender }
    }
}

/// Sends one request after the other.
pub struct Agent {
    shape: Shape,
    sender: Sender,
}

enum Sender {
    H1(http1::SendRequest<Empty<Bytes>>),
    H2(http2::SendRequest<Empty<Bytes>>),
    New { proxy: String, pem: Vec<u8> },
}

impl Agent {
    pub async fn ask(&mut self, count: u64) {
        for _ in 0..count {
            self.sender.ask(self.shape).await;
        }
    }
}

impl Sender {
    async fn h1(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Sender::H1(sender)
    }

    async fn h2(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Sender::H2(sender)
    }

    async fn ask(&mut self, shape: Shape) {
        let response = match self {
            Sender::H1(sender) => {
                sender.ready().await.unwrap();
                sender.send_request(request(shape)).await.unwrap()
            }
            Sender::H2(sender) => {
                sender.ready().await.unwrap();
                sender.send_request(request(shape)).await.unwrap()
            }
            Sender::New { proxy, pem } => {
                let stream = handshake(proxy, "h1.test", "http/1.1", pem).await;
                let mut once = Sender::h1(stream).await;
                return Box::pin(once.ask(Shape::H1)).await;
            }
        };
        assert_eq!(response.status(), 200, "{:?}", response.into_body().collect().await.unwrap().to_bytes());
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes().len(), ANSWER.len());
    }
}

/// A request as programs send it.
fn request(shape: Shape) -> Request<Empty<Bytes>> {
    let (host, uri, version) = match shape {
        Shape::Plain => ("plain.test", "http://plain.test/v1/items?page=2", Version::HTTP_11),
        Shape::Tunnel => ("tunnel.test", "/v1/items?page=2", Version::HTTP_11),
        Shape::H1 | Shape::Connection => ("h1.test", "/v1/items?page=2", Version::HTTP_11),
        Shape::H2 => ("h2.test", "https://h2.test/v1/items?page=2", Version::HTTP_2),
    };
    let mut request = Request::get(uri).version(version);
    if version == Version::HTTP_11 {
        request = request.header("host", host);
    }
    let request = request.header("user-agent", "python-httpx/0.28.1").header("accept", "application/json");
    request.header("accept-encoding", "gzip, deflate, br").body(Empty::new()).unwrap()
}

/// A tunnel through the sidecar.
async fn connect(proxy: &str, host: &str) -> TcpStream {
    let mut stream = TcpStream::connect(proxy).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let request = format!("CONNECT {host}:443 HTTP/1.1\r\nhost: {host}:443\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    stream
}

async fn handshake(
    proxy: &str,
    host: &'static str,
    alpn: &str,
    pem: &[u8],
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem).unwrap()).unwrap();
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![alpn.into()];
    config.resumption = Resumption::disabled();
    let stream = connect(proxy, host).await;
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(host).unwrap(), stream).await.unwrap()
}

/// A root, and what it signed.
struct Root {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Root {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let pem = root.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(root, key), pem }
    }

    fn server(&self, name: &str, alpn: &[&str]) -> ServerConfig {
        let key = KeyPair::generate().unwrap();
        let mut leaf = CertificateParams::new([name.to_owned()]).unwrap();
        leaf.use_authority_key_identifier_extension = true;
        let leaf = leaf.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let config = ServerConfig::builder().with_no_client_auth();
        let mut config = config.with_single_cert(vec![leaf.der().clone()], key).unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        config
    }
}

/// A server on a free port: an API, and an authorization server at `/token`.
async fn serve(tls: Option<ServerConfig>) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let speaks_h2 = tls.as_ref().is_some_and(|tls| tls.alpn_protocols == [b"h2"]);
    let tls = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let tls = tls.clone();
            tokio::spawn(async move {
                match tls {
                    Some(tls) => answer(tls.accept(stream).await?, speaks_h2).await,
                    None => answer(stream, false).await,
                }
                std::io::Result::Ok(())
            });
        }
    });
    address
}

async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, speaks_h2: bool) {
    let service = service_fn(|request: Request<hyper::body::Incoming>| async move {
        let is_token = request.uri().path() == "/token";
        let body: &'static [u8] = if is_token {
            br#"{"access_token": "a-token-of-the-usual-length-which-is-about-forty", "token_type": "Bearer", "expires_in": 36000}"#
        } else {
            assert!(is_tunnel(&request) || request.headers().contains_key("authorization"), "{request:?}");
            &ANSWER
        };
        let answer = Response::builder().header("content-type", "application/json");
        Ok::<_, Infallible>(answer.body(Full::new(Bytes::from_static(body))).unwrap())
    });
    let _ = if speaks_h2 {
        server::http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await
    } else {
        server::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await
    };
}

fn is_tunnel<B>(request: &Request<B>) -> bool {
    request.headers().get("host").is_some_and(|host| host == "tunnel.test")
}
