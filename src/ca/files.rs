//! The files through which agents come to trust the CA: written whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use p12_keystore::{Certificate, KeyStore, KeyStoreEntry};
use rustls::pki_types::CertificateDer;

use super::{Ca, CaError};

/// The password of the Java truststore. It protects nothing: the file holds public certificates only.
pub const TRUSTSTORE_PASSWORD: &str = "changeit";

/// Where the files are.
#[derive(Debug, Clone)]
pub struct CaFiles {
    /// Our root alone, for variables that add to a client's roots (`NODE_EXTRA_CA_CERTS`).
    pub ca: PathBuf,
    /// The system's roots, the extra ones and ours, for variables that replace them (`SSL_CERT_FILE`).
    pub bundle: PathBuf,
    /// The same as PKCS #12, for Java.
    pub truststore: PathBuf,
}

impl CaFiles {
    /// The files' places in a folder.
    pub fn within(folder: &Path) -> Self {
        Self { ca: folder.join("ca.pem"), bundle: folder.join("bundle.pem"), truststore: folder.join("truststore.p12") }
    }

    /// Writes all three; `roots` are those that a client would otherwise trust.
    ///
    /// # Errors
    /// When the folder or a file in it cannot be written; what stood there before then still stands.
    pub fn write(&self, ca: &Ca, roots: &[CertificateDer<'_>]) -> Result<(), CaError> {
        let mut bundle = String::from(ca.root_pem());
        for root in roots {
            bundle.push_str(&pem::encode(&pem::Pem::new("CERTIFICATE", root.as_ref())));
        }
        write(&self.ca, ca.root_pem().as_bytes())?;
        write(&self.bundle, bundle.as_bytes())?;
        write(&self.truststore, &truststore(ca, roots)?)
    }
}

/// A PKCS #12 truststore, as Java 17 and later read it.
fn truststore(ca: &Ca, roots: &[CertificateDer<'_>]) -> Result<Vec<u8>, CaError> {
    let mut store = KeyStore::new();
    let own = pem::parse(ca.root_pem()).map_err(|_| CaError::Kept)?;
    store.add_entry("sidebearer", KeyStoreEntry::Certificate(Certificate::from_der(own.contents())?));
    for (number, root) in roots.iter().enumerate() {
        // A root that this parser refuses is left out: Java would refuse it too.
        if let Ok(certificate) = Certificate::from_der(root) {
            store.add_entry(&format!("root-{number}"), KeyStoreEntry::Certificate(certificate));
        }
    }
    Ok(store.writer(TRUSTSTORE_PASSWORD).write()?)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), CaError> {
    replace(path, bytes).map_err(|error| CaError::File { path: path.to_owned(), error })
}

/// Writes beside the place and renames over it, readable to all: an agent may run as another user.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new().prefix(".sidebearer-").tempfile_in(folder)?;
    file.write_all(bytes)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    }
    file.as_file().sync_all()?;
    file.persist(path)?;
    fs::File::open(folder)?.sync_all()
}
