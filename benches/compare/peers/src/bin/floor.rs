//! The least that intercepts, injects a fixed header and forwards: what hyper, tokio and rustls cost by themselves.
//!
//! No product: it checks nothing, and knows neither tokens nor their life.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderValue, Method, Request, Response, Uri};
use http_body_util::{Either, Empty};
use hudsucker::rcgen::{CertificateParams, DnType, Issuer, KeyPair};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use peers::{Arguments, INTERCEPTED, ThisMachine, install_provider};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

type Answer = Response<Either<Incoming, Empty<Bytes>>>;

struct Proxy {
    client: Client<HttpsConnector<HttpConnector<ThisMachine>>, Incoming>,
    authorization: HeaderValue,
    issuer: Issuer<'static, KeyPair>,
    key: KeyPair,
    leaves: Mutex<HashMap<String, Arc<ServerConfig>>>,
}

#[tokio::main]
async fn main() {
    install_provider();
    let arguments = Arguments::read();
    let listener = TcpListener::bind(arguments.listen).await.expect("a free address");
    let proxy = Arc::new(Proxy {
        client: Client::builder(TokioExecutor::new()).build(arguments.connector(true)),
        issuer: arguments.issuer(),
        authorization: arguments.authorization,
        key: KeyPair::generate().expect("a key"),
        leaves: Mutex::default(),
    });
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let proxy = Arc::clone(&proxy);
        tokio::spawn(async move {
            let service = service_fn(|request| Arc::clone(&proxy).handle(request));
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
                .await;
        });
    }
}

impl Proxy {
    async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Result<Answer, Error> {
        if request.method() != Method::CONNECT {
            return self.forward(request).await;
        }
        let authority = request.uri().to_string();
        tokio::spawn(async move {
            let Ok(agent) = hyper::upgrade::on(request).await else { return };
            self.open(authority, TokioIo::new(agent)).await;
        });
        Ok(Response::new(Either::Right(Empty::new())))
    }

    async fn open(self: Arc<Self>, authority: String, mut agent: TokioIo<hyper::upgrade::Upgraded>) {
        let host = authority.rsplit_once(':').map_or(authority.as_str(), |(host, _)| host);
        if !host.ends_with(INTERCEPTED) {
            let Ok(mut upstream) = TcpStream::connect(&authority).await else { return };
            let _ = upstream.set_nodelay(true);
            let _ = copy_bidirectional(&mut agent, &mut upstream).await;
            return;
        }
        let Ok(agent) = TlsAcceptor::from(self.leaf(host)).accept(agent).await else { return };
        let service = service_fn(|mut request: Request<Incoming>| {
            let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
            *request.uri_mut() = format!("https://{authority}{path}").parse::<Uri>().expect("it was one before");
            Arc::clone(&self).forward(request)
        });
        let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(agent), service).await;
    }

    async fn forward(self: Arc<Self>, mut request: Request<Incoming>) -> Result<Answer, Error> {
        request.headers_mut().insert(AUTHORIZATION, self.authorization.clone());
        // An HTTP/1 upstream takes what came by HTTP/2 only if it does not say so.
        *request.version_mut() = http::Version::HTTP_11;
        Ok(self.client.request(request).await?.map(Either::Left))
    }

    fn leaf(&self, host: &str) -> Arc<ServerConfig> {
        let mut leaves = self.leaves.lock().expect("no panic while it is held");
        Arc::clone(leaves.entry(host.to_owned()).or_insert_with(|| Arc::new(self.mint(host))))
    }

    fn mint(&self, host: &str) -> ServerConfig {
        let mut leaf = CertificateParams::new([host.to_owned()]).expect("a name");
        leaf.distinguished_name.push(DnType::CommonName, host);
        let leaf = leaf.signed_by(&self.key, &self.issuer).expect("it signs");
        let key = self.key.serialize_der().try_into().expect("a key");
        let mut config =
            ServerConfig::builder().with_no_client_auth().with_single_cert(vec![leaf.into()], key).expect("they match");
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config
    }
}
