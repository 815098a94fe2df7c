//! The files through which agents come to trust the CA: written whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use p12_keystore::{Certificate, KeyStore, KeyStoreEntry};
use rustls::pki_types::CertificateDer;

use super::{Ca, CaError};

/// The password of the Java truststore. It protects nothing: the file holds public certificates only.
pub const TRUSTSTORE_PASSWORD: &str = "changeit";

/// Where the files are.
#[derive(Debug, Clone)]
pub struct CaFiles {
    /// Our roots alone, for variables that add to a client's roots (`NODE_EXTRA_CA_CERTS`).
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

    /// Writes all three, where they are not there as they are to be; `roots` are those that a client would otherwise
    /// trust. With `lasting` they survive a power cut.
    ///
    /// # Errors
    /// When the folder or a file in it cannot be written; what stood there before then still stands.
    pub fn write(&self, ca: &Ca, roots: &[CertificateDer<'_>], lasting: bool) -> Result<(), CaError> {
        let mut bundle = String::from(ca.roots_pem());
        for root in roots {
            bundle.push_str(&pem::encode(&pem::Pem::new("CERTIFICATE", root.as_ref())));
        }
        if self.are_written(ca.roots_pem(), &bundle) {
            return Ok(());
        }
        write(&self.ca, ca.roots_pem().as_bytes(), lasting)?;
        write(&self.truststore, &truststore(ca, roots)?, lasting)?;
        // Last: a bundle as it is to be tells that the truststore, which is never the same twice, was written for it.
        write(&self.bundle, bundle.as_bytes(), lasting)
    }

    fn are_written(&self, ca: &str, bundle: &str) -> bool {
        let holds = |path: &Path, text: &str| fs::read(path).is_ok_and(|there| there == text.as_bytes());
        let written = |path: &Path| readable(path)?.modified().ok();
        let (truststore, sealed) = (written(&self.truststore), written(&self.bundle));
        let in_order = truststore.is_some() && truststore <= sealed;
        in_order && readable(&self.ca).is_some() && holds(&self.ca, ca) && holds(&self.bundle, bundle)
    }
}

/// What is known of a file that everybody can read.
fn readable(path: &Path) -> Option<fs::Metadata> {
    let there = fs::metadata(path).ok()?;
    (there.permissions().mode() & 0o444 == 0o444 && there.len() > 0).then_some(there)
}

/// A PKCS #12 truststore, as Java 17 and later read it.
fn truststore(ca: &Ca, roots: &[CertificateDer<'_>]) -> Result<Vec<u8>, CaError> {
    let mut store = KeyStore::new();
    for (number, own) in (1..).zip(&pem::parse_many(ca.roots_pem()).map_err(|_| CaError::Kept)?) {
        let name = if number == 1 { "sidebearer".to_owned() } else { format!("sidebearer-{number}") };
        store.add_entry(&name, KeyStoreEntry::Certificate(Certificate::from_der(own.contents())?));
    }
    for (number, root) in roots.iter().enumerate() {
        // A root that this parser refuses is left out: Java would refuse it too.
        if let Ok(certificate) = Certificate::from_der(root) {
            store.add_entry(&format!("root-{number}"), KeyStoreEntry::Certificate(certificate));
        }
    }
    // What a known password protects nothing with is not worth the 10,000 rounds that hold off those who guess it.
    Ok(store.writer(TRUSTSTORE_PASSWORD).encryption_iterations(1).mac_iterations(1).write()?)
}

fn write(path: &Path, bytes: &[u8], lasting: bool) -> Result<(), CaError> {
    replace(path, bytes, lasting).map_err(|error| CaError::File { path: path.to_owned(), error })
}

/// Writes beside the place and renames over it, readable to all: an agent may run as another user.
fn replace(path: &Path, bytes: &[u8], lasting: bool) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new().prefix(".sidebearer-").tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    if !lasting {
        file.persist(path)?;
        return Ok(());
    }
    file.as_file().sync_all()?;
    file.persist(path)?;
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    fn inodes(files: &CaFiles) -> [u64; 3] {
        use std::os::unix::fs::MetadataExt;
        [&files.ca, &files.bundle, &files.truststore].map(|path| fs::metadata(path).unwrap().ino())
    }

    #[test]
    fn files_that_are_there_as_they_are_to_be_are_left_alone_and_others_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let files = CaFiles::within(folder.path());
        let ca = Ca::generate(&["api.example.org".parse().unwrap()], SystemTime::now()).unwrap();
        let other = Ca::generate(&["api.example.org".parse().unwrap()], SystemTime::now()).unwrap();
        let other = [CertificateDer::from(pem::parse(other.roots_pem()).unwrap().into_contents())];
        files.write(&ca, &[], true).unwrap();
        let first = inodes(&files);
        files.write(&ca, &[], true).unwrap();
        assert_eq!(inodes(&files), first);

        files.write(&ca, &other, true).unwrap();
        let second = inodes(&files);
        assert!(first.iter().zip(second).all(|(before, after)| *before != after));
        let later = SystemTime::now() + Duration::from_secs(10);
        let spoil: [&dyn Fn(); 4] = [
            &|| fs::write(&files.ca, "").unwrap(),
            &|| fs::set_permissions(&files.bundle, fs::Permissions::from_mode(0o600)).unwrap(),
            &|| fs::remove_file(&files.truststore).unwrap(),
            &|| fs::File::open(&files.truststore).unwrap().set_modified(later).unwrap(),
        ];
        for spoil in spoil {
            spoil();
            files.write(&ca, &other, true).unwrap();
            assert_eq!(fs::read(&files.ca).unwrap(), ca.roots_pem().as_bytes());
            let bundle = fs::metadata(&files.bundle).unwrap();
            assert_eq!(bundle.permissions().mode() & 0o777, 0o644);
            assert!(fs::metadata(&files.truststore).unwrap().modified().unwrap() <= bundle.modified().unwrap());
        }
    }
}
