//! Whom we trust upstream: the system's roots, a company's own, and embedded ones as the last resort. Never ourselves.

use std::path::{Path, PathBuf};

use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use crate::crypto;
use crate::files;

/// The longest file of roots, in bytes.
const LONGEST: u64 = 16 << 20;

/// The roots, and where they came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    certificates: Vec<CertificateDer<'static>>,
}

impl Roots {
    /// Loads the system's roots (`SSL_CERT_FILE` and `SSL_CERT_DIR` first, as everywhere), or embedded ones where it
    /// has none, and adds those of `extra` files. A certificate with `own` in it is one of ours and is left out: with
    /// an agent's variables inherited, the "system's" file is our own bundle.
    ///
    /// # Errors
    /// An extra file that cannot be read or holds no certificate, or variables that lead to none.
    pub fn load(extra: &[PathBuf], own: &str) -> Result<Self, RootsError> {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "some of the system's trusted roots cannot be read");
        }
        let mut certificates = found.certs;
        let named = ["SSL_CERT_FILE", "SSL_CERT_DIR"].into_iter().find(|name| std::env::var_os(name).is_some());
        if let (true, Some(variable)) = (certificates.is_empty(), named) {
            // Somebody chose whom to trust; to trust others instead would not be what they chose.
            return Err(RootsError::Variable { variable });
        }
        certificates.retain(|certificate| !contains(certificate, own.as_bytes()));
        if certificates.is_empty() {
            tracing::info!("the system has no trusted roots, using the embedded ones");
            certificates = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().map(|c| c.clone().into_owned()).collect();
        }
        for path in extra {
            certificates.extend(read(path)?);
        }
        Ok(Self { certificates })
    }

    /// All of them.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// Client TLS settings that trust these roots and offer these protocols.
    ///
    /// # Errors
    /// When TLS cannot be set up, which means a broken build.
    pub fn client_config(&self, alpn: &[&[u8]]) -> Result<ClientConfig, RootsError> {
        let [config] = self.client_configs([alpn])?;
        Ok(config)
    }

    /// One for each list of protocols, with the roots parsed once. Each keeps sessions of its own.
    ///
    /// # Errors
    /// As [`Roots::client_config`].
    pub fn client_configs<const N: usize>(&self, alpn: [&[&[u8]]; N]) -> Result<[ClientConfig; N], RootsError> {
        let mut store = RootCertStore::empty();
        // The system's list may hold certificates that rustls cannot use; one of them must not stop the start.
        store.add_parsable_certificates(self.certificates.iter().cloned());
        let config = ClientConfig::builder_with_provider(crypto::provider())
            .with_safe_default_protocol_versions()
            .map_err(RootsError::Tls)?
            .with_root_certificates(store)
            .with_no_client_auth();
        Ok(alpn.map(|protocols| {
            let mut config = config.clone();
            config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
            config.resumption = Resumption::default();
            config
        }))
    }
}

/// Why there are no roots.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// An extra file cannot be read as PEM.
    #[error("cannot read certificates from {path}: {reason}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A variable names the system's roots, and none are there.
    #[error("`{variable}` is set, and leads to no certificate")]
    Variable {
        /// Which variable.
        variable: &'static str,
    },
    /// TLS cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Tls(rustls::Error),
}

fn read(path: &Path) -> Result<Vec<CertificateDer<'static>>, RootsError> {
    let fail = |reason: String| RootsError::File { path: path.to_owned(), reason };
    let pem = files::read(path, LONGEST).map_err(|error| fail(error.to_string()))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| fail(format!("not PEM: {error:?}")))?;
    if certificates.is_empty() {
        return Err(fail("no certificate in it".into()));
    }
    let mut store = RootCertStore::empty();
    for certificate in &certificates {
        store.add(certificate.clone()).map_err(|error| fail(error.to_string()))?;
    }
    Ok(certificates)
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    !part.is_empty() && bytes.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn certificate(organization: &str) -> rcgen::Certificate {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, organization);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap()
    }

    #[test]
    fn a_companys_root_is_trusted_beside_the_others_and_never_our_own() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("company.pem");
        let company = certificate("Company");
        fs::write(&file, company.pem()).unwrap();
        let roots = Roots::load(&[file], "Sidebearer local CA").unwrap();
        assert!(roots.certificates().contains(company.der()));
        assert!(roots.certificates().len() > 1, "the system's or the embedded ones are there too");

        let own = certificate("Sidebearer local CA");
        assert!(contains(own.der(), b"Sidebearer local CA"));
        assert!(!contains(company.der(), b"Sidebearer local CA"));
    }

    #[test]
    fn a_file_without_a_certificate_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("empty.pem");
        fs::write(&file, "nothing").unwrap();
        let error = Roots::load(std::slice::from_ref(&file), "x").unwrap_err();
        let place = file.display();
        assert_eq!(error.to_string(), format!("cannot read certificates from {place}: no certificate in it"));
        let missing = Roots::load(&[folder.path().join("missing.pem")], "x").unwrap_err();
        assert!(missing.to_string().ends_with("No such file or directory (os error 2)"), "{missing}");
    }
}
