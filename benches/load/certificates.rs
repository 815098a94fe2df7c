//! The CA of the upstream, which peers also use to answer TLS, and a leaf for every host that is asked for.

use std::fs;
use std::io;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Whom the leaf is for: `api.load.test` and `hN.load.test` are for interception, the address is for tunnels.
const NAMES: [&str; 3] = ["*.load.test", "localhost", "127.0.0.1"];

/// Writes `ca.pem`, `ca.key`, `leaf.pem` (with the CA's certificate behind it) and `leaf.key`.
pub fn write(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let ca_key = KeyPair::generate().map_err(io::Error::other)?;
    let mut ca = CertificateParams::new([]).map_err(io::Error::other)?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "Load test CA");
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let ca_certificate = ca.self_signed(&ca_key).map_err(io::Error::other)?;
    fs::write(directory.join("ca.pem"), ca_certificate.pem())?;
    fs::write(directory.join("ca.key"), ca_key.serialize_pem())?;

    let key = KeyPair::generate().map_err(io::Error::other)?;
    let mut leaf = CertificateParams::new(NAMES.map(String::from)).map_err(io::Error::other)?;
    leaf.distinguished_name.push(DnType::CommonName, "api.load.test");
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    leaf.use_authority_key_identifier_extension = true;
    let leaf = leaf.signed_by(&key, &Issuer::new(ca, ca_key)).map_err(io::Error::other)?;
    fs::write(directory.join("leaf.pem"), format!("{}{}", leaf.pem(), ca_certificate.pem()))?;
    fs::write(directory.join("leaf.key"), key.serialize_pem())
}

/// The upstream's TLS, from what `write` wrote. It resumes sessions: a proxy that does so too may gain by it.
pub fn server(directory: &Path, http1_only: bool) -> io::Result<ServerConfig> {
    let chain = certificates(&directory.join("leaf.pem"))?;
    let key = PrivateKeyDer::from_pem_file(directory.join("leaf.key")).map_err(io::Error::other)?;
    let mut config =
        ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).map_err(io::Error::other)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()].split_off(usize::from(http1_only));
    Ok(config)
}

/// All certificates of a PEM file.
pub fn certificates(file: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|error| io::Error::other(format!("{}: {error}", file.display())))
}
