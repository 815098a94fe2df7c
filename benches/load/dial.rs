//! Opens connections of a shape: TCP, CONNECT, TLS.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::certificates;
use crate::http1;
use crate::shape::Shape;

/// A connection, whatever it is made of.
pub type Stream = Box<dyn Io>;

pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Where requests go, and how.
#[derive(clap::Args)]
pub struct Target {
    /// The proxy, or the upstream where there is none
    #[arg(long)]
    pub address: SocketAddr,
    #[arg(long)]
    pub shape: Shape,
    /// Whom requests are for: a host and port
    #[arg(long)]
    pub authority: String,
    /// Whom to trust: certificates in PEM
    #[arg(long)]
    pub ca: Vec<PathBuf>,
    /// Act for so many users, `u0` and so on, in turn
    #[arg(long, default_value_t = 0)]
    pub users: u64,
    /// The agent's secret, which goes with the users' names
    #[arg(long, default_value = "")]
    pub secret: String,
    /// Resume TLS sessions; each handshake is a whole one otherwise
    #[arg(long)]
    pub resume: bool,
}

impl Target {
    /// `Proxy-Authorization`, with its line's end, for the user whose turn it is; empty without users.
    pub fn credentials(&self, turn: u64) -> String {
        if self.users == 0 {
            return String::new();
        }
        let user = turn % self.users;
        let basic = BASE64_STANDARD.encode(format!("u{user}:{}", self.secret));
        format!("proxy-authorization: Basic {basic}\r\n")
    }
}

/// Opens connections to a target.
pub struct Dialer {
    target: Arc<Target>,
    tls: TlsConnector,
}

impl Dialer {
    pub fn new(target: Arc<Target>) -> io::Result<Self> {
        let tls = TlsConnector::from(Arc::new(client_config(&target)?));
        Ok(Self { target, tls })
    }

    /// A connection on which requests for `authority` can be sent, as the user whose turn it is.
    pub async fn open(&self, authority: &str, turn: u64) -> io::Result<Stream> {
        let mut stream = TcpStream::connect(self.target.address).await?;
        stream.set_nodelay(true)?;
        if self.target.shape.connects() {
            connect(&mut stream, authority, &self.target.credentials(turn)).await?;
        }
        if !self.target.shape.is_tls() {
            return Ok(Box::new(stream));
        }
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).to_owned();
        let host = ServerName::try_from(host).map_err(io::Error::other)?;
        let stream = self.tls.connect(host, stream).await?;
        // A peer that knows no HTTP/2 must not be measured as if it did.
        if self.target.shape.is_http2() && stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(io::Error::other("HTTP/2 was not agreed on"));
        }
        Ok(Box::new(stream))
    }
}

fn client_config(target: &Target) -> io::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for file in &target.ca {
        roots.add_parsable_certificates(certificates::certificates(file)?);
    }
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![if target.shape.is_http2() { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
    if !target.resume {
        config.resumption = Resumption::disabled();
    }
    Ok(config)
}

async fn connect(stream: &mut TcpStream, authority: &str, credentials: &str) -> io::Result<()> {
    let request = format!("CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n{credentials}\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::with_capacity(512);
    let Some(end) = http1::read_head(stream, &mut head).await? else {
        return Err(io::Error::other("hung up in place of an answer to CONNECT"));
    };
    match http1::status(&head[..end]) {
        // A TLS server waits for its client: nothing can have come behind the head.
        Some(200) => Ok(()),
        Some(other) => Err(io::Error::other(format!("CONNECT was answered {other}"))),
        None => Err(io::Error::other("not an answer to CONNECT")),
    }
}
