//! Certificates, good and bad.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

/// Whether a server can prove its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    Good,
    Expired,
    OtherName,
    SelfSigned,
    OtherRoot,
    /// It proves itself, and wants the same of whoever calls.
    OfBothSides,
}

/// What a server needs for TLS.
pub struct Tls {
    pub config: Arc<ServerConfig>,
    pub certificate: CertificateDer<'static>,
}

/// A company's root, which the sidecar is told to trust.
pub struct Root {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Root {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let pem = root.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(root, key), pem }
    }

    /// The TLS settings of a server with these names, which offers these protocols.
    pub fn server(&self, names: &[&str], proof: Proof, alpn: &[&str]) -> Tls {
        let names = if proof == Proof::OtherName { &["other.test"] } else { names };
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut leaf = CertificateParams::new(names).unwrap();
        leaf.use_authority_key_identifier_extension = true;
        if proof == Proof::Expired {
            (leaf.not_before, leaf.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        }
        let leaf = match proof {
            Proof::SelfSigned => leaf.self_signed(&key).unwrap(),
            Proof::OtherRoot => leaf.signed_by(&key, &Root::new().issuer).unwrap(),
            _ => leaf.signed_by(&key, &self.issuer).unwrap(),
        };
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
        let config = match proof {
            Proof::OfBothSides => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from(pem::parse(&self.pem).unwrap().into_contents())).unwrap();
                let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
                config.with_client_cert_verifier(clients)
            }
            _ => config.with_no_client_auth(),
        };
        let mut config = config
            .with_single_cert(vec![leaf.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Tls { config: Arc::new(config), certificate: leaf.der().clone() }
    }
}
