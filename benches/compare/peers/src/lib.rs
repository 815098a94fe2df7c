//! What both programs need: their arguments, the CA, and a connector for which every name is this machine.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::task::{Context, Poll};

use http::HeaderValue;
use hudsucker::rcgen::{Issuer, KeyPair};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tower_service::Service;

/// Hosts below it are intercepted, all others tunnelled.
pub const INTERCEPTED: &str = ".load.test";

/// PROGRAM LISTEN DIRECTORY AUTHORIZATION
pub struct Arguments {
    pub listen: SocketAddr,
    /// Where `ca.pem` and `ca.key` are.
    pub directory: PathBuf,
    pub authorization: HeaderValue,
}

impl Arguments {
    pub fn read() -> Self {
        let mut arguments = std::env::args().skip(1);
        let mut next = || arguments.next().expect("arguments: LISTEN DIRECTORY AUTHORIZATION");
        Self {
            listen: next().parse().expect("an address"),
            directory: next().into(),
            authorization: next().parse().expect("a field's value"),
        }
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.join(name)).expect("the CA is there")
    }

    pub fn issuer(&self) -> Issuer<'static, KeyPair> {
        let key = KeyPair::from_pem(&self.file("ca.key")).expect("a key");
        Issuer::from_ca_cert_pem(&self.file("ca.pem"), key).expect("a certificate")
    }

    /// Without `nodelay`, it is the connector as its libraries make it.
    pub fn connector(&self, nodelay: bool) -> HttpsConnector<HttpConnector<ThisMachine>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.file("ca.pem").as_bytes()).expect("PEM")).expect("a root");
        let tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let mut tcp = HttpConnector::new_with_resolver(ThisMachine);
        tcp.enforce_http(false);
        tcp.set_nodelay(nodelay);
        HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_all_versions().wrap_connector(tcp)
    }
}

/// The address of every name.
#[derive(Clone)]
pub struct ThisMachine;

impl Service<Name> for ThisMachine {
    type Response = std::iter::Once<SocketAddr>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Name) -> Self::Future {
        std::future::ready(Ok(std::iter::once((Ipv4Addr::LOCALHOST, 0).into())))
    }
}

/// Installs the one TLS provider.
pub fn install_provider() {
    let _ = tokio_rustls::rustls::crypto::aws_lc_rs::default_provider().install_default();
}
