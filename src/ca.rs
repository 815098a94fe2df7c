//! The local certificate authority: answers TLS for routed hosts, and for no other.
//!
//! A root signs an intermediate that is name-constrained to the routed hosts, several where these are many, and its key is
//! then destroyed; they sign a leaf per host. The constraints sit on them because Java ignores those of a root.

pub mod files;
#[doc(hidden)]
pub mod measured;

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SanType, SerialNumber,
};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::crypto;
use crate::host::{Host, HostName};
use crate::routes::HostPattern;
use crate::secret::Secret;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Of the root and the intermediate. Long enough that agents seldom need a new `ca.pem`.
const AUTHORITY_LIFE: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// A CA with less than this left is replaced at start.
const AUTHORITY_MARGIN: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const LEAF_LIFE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Certificates are valid from a day ago: an agent's clock may be behind ours.
const BACKDATED: Duration = DAY;
/// Of one intermediate, which each new agent is sent: all of thousands of hosts would fit into no handshake.
const NAMES: usize = 256;
/// A wildcard route can meet any number of hosts; the least recently used leaf makes room.
const LEAVES: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// In the subject of our certificates. Upstream roots that carry it are left out: we never trust ourselves.
pub const ORGANIZATION: &str = "Sidebearer local CA";

/// The authority. A clone shares its keys and its leaves.
#[derive(Clone)]
pub struct Ca {
    inner: Arc<Inner>,
}

struct Inner {
    saved: Saved,
    intermediates: Vec<Intermediate>,
    /// Each permitted name, and the place of the intermediate that may speak for it.
    permitted: HashMap<String, usize>,
    leaves: Mutex<lru::LruCache<HostName, Leaf>>,
}

/// Signs leaves of some of the names.
struct Intermediate {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

/// A host's TLS settings, shared by its connections so that sessions resume.
struct Leaf {
    config: Arc<ServerConfig>,
    minted: SystemTime,
}

/// What is kept of an authority from one run to the next.
#[derive(Serialize, Deserialize)]
struct Saved {
    root: String,
    /// One or more, after each other.
    intermediate: String,
    /// Theirs.
    key: String,
    /// If there are more, each is for the next [`NAMES`] of these.
    permitted: Vec<String>,
    /// Seconds since the epoch.
    not_after: u64,
}

/// Why a kept authority is not used again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outdated {
    /// These hosts are routed now, and its name constraints do not cover them.
    NewHosts(Vec<String>),
    /// It ends within 30 days.
    Ending,
}

impl Ca {
    /// Makes an authority for these hosts. The root's key is gone when this returns.
    ///
    /// # Errors
    /// When the cryptography fails, which means a broken machine.
    pub fn generate(hosts: &[HostPattern], now: SystemTime) -> Result<Self, CaError> {
        let root_key = KeyPair::generate()?;
        let mut root = authority("root", now)?;
        root.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        let root_certificate = root.self_signed(&root_key)?;
        let root_issuer = Issuer::new(root, root_key);

        let key = KeyPair::generate()?;
        let mut permitted: Vec<String> = hosts.iter().map(|host| host.base().to_string()).collect();
        permitted.sort_unstable();
        permitted.dedup();
        let mut intermediates = String::new();
        for names in parts(&permitted) {
            let mut intermediate = authority("intermediate", now)?;
            intermediate.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            intermediate.use_authority_key_identifier_extension = true;
            intermediate.name_constraints = Some(constraints(names));
            intermediates += &intermediate.signed_by(&key, &root_issuer)?.pem();
        }
        drop(root_issuer);

        let saved = Saved {
            root: root_certificate.pem(),
            intermediate: intermediates,
            key: key.serialize_pem(),
            permitted,
            not_after: seconds(now + AUTHORITY_LIFE),
        };
        Self::from_saved(saved)
    }

    /// What to keep, sealed, so that the next run is the same authority.
    pub fn export(&self) -> Secret {
        Secret::new(serde_json::to_string(&self.inner.saved).unwrap_or_default())
    }

    /// Takes up a kept authority, if it still fits these hosts.
    ///
    /// # Errors
    /// When what was kept cannot be read.
    pub fn restore(kept: &Secret, hosts: &[HostPattern], now: SystemTime) -> Result<Result<Self, Outdated>, CaError> {
        let saved: Saved = serde_json::from_str(kept.expose()).map_err(|_| CaError::Kept)?;
        if saved.not_after < seconds(now + AUTHORITY_MARGIN) {
            return Ok(Err(Outdated::Ending));
        }
        let ca = Self::from_saved(saved)?;
        let mut new: Vec<String> = hosts.iter().map(|host| host.base().to_string()).collect();
        new.retain(|base| ca.intermediate(base).is_none());
        Ok(if new.is_empty() { Ok(ca) } else { Err(Outdated::NewHosts(new)) })
    }

    fn from_saved(saved: Saved) -> Result<Self, CaError> {
        let certificates = pem::parse_many(&saved.intermediate).map_err(|_| CaError::Kept)?;
        let permitted = match certificates.len() {
            0 => return Err(CaError::Kept),
            1 => saved.permitted.iter().map(|name| (name.clone(), 0)).collect(),
            _ => saved.permitted.iter().enumerate().map(|(place, name)| (name.clone(), place / NAMES)).collect(),
        };
        let mut intermediates = Vec::new();
        for certificate in certificates {
            let certificate = CertificateDer::from(certificate.into_contents());
            let issuer = Issuer::from_ca_cert_der(&certificate, KeyPair::from_pem(&saved.key)?)?;
            intermediates.push(Intermediate { issuer, certificate });
        }
        let leaves = Mutex::new(lru::LruCache::new(LEAVES));
        Ok(Self { inner: Arc::new(Inner { saved, intermediates, permitted, leaves }) })
    }

    /// The intermediate that may speak for a name: for itself, or for one that it is below.
    fn intermediate(&self, name: &str) -> Option<&Intermediate> {
        let mut names = std::iter::successors(Some(name), |name| Some(name.split_once('.')?.1));
        let place = names.find_map(|name| self.inner.permitted.get(name))?;
        self.inner.intermediates.get(*place)
    }

    /// The root's certificate, which agents trust.
    pub fn root_pem(&self) -> &str {
        &self.inner.saved.root
    }

    /// The names that it can speak for, each with all names below it.
    pub fn permitted(&self) -> &[String] {
        &self.inner.saved.permitted
    }

    /// When it ends.
    pub fn not_after(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.inner.saved.not_after)
    }

    /// Answers an agent's TLS as `host`, with ALPN h2 and http/1.1.
    ///
    /// # Errors
    /// The handshake failed: the agent does not trust the root, named another host in SNI, or spoke something else.
    pub async fn accept<IO>(&self, host: &HostName, io: IO, now: SystemTime) -> io::Result<TlsStream<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let config = self.server_config(host, now).map_err(io::Error::other)?;
        TlsAcceptor::from(config).accept(io).await
    }

    /// The TLS settings for a host, minted once and again at half of the leaf's life.
    fn server_config(&self, host: &HostName, now: SystemTime) -> Result<Arc<ServerConfig>, CaError> {
        let mut leaves = self.inner.leaves.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fresh = |leaf: &&Leaf| now.duration_since(leaf.minted).is_ok_and(|age| age < LEAF_LIFE / 2);
        if let Some(leaf) = leaves.get(host).filter(fresh) {
            return Ok(leaf.config.clone());
        }
        // Under the lock: a leaf takes less than 0.1 ms, and a host must not be minted twice at once.
        let config = Arc::new(self.mint(host, now)?);
        leaves.put(host.clone(), Leaf { config: config.clone(), minted: now });
        Ok(config)
    }

    fn mint(&self, host: &HostName, now: SystemTime) -> Result<ServerConfig, CaError> {
        // A fresh key each time: browsers refuse two leaves of one issuer that share key and serial.
        let key = KeyPair::generate()?;
        let mut leaf = CertificateParams::default();
        leaf.not_before = (now - BACKDATED).into();
        leaf.not_after = (now + LEAF_LIFE).min(self.not_after()).into();
        leaf.serial_number = Some(serial()?);
        leaf.distinguished_name = name(if host.as_str().len() <= 64 { host.as_str() } else { "leaf" });
        leaf.subject_alt_names = vec![SanType::DnsName(Ia5String::try_from(host.as_str())?)];
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf.use_authority_key_identifier_extension = true;
        // No other is ever asked for; what one of them signs of it, nobody believes.
        let intermediate =
            self.intermediate(host.as_str()).or(self.inner.intermediates.first()).ok_or(CaError::Kept)?;
        let certificate = leaf.signed_by(&key, &intermediate.issuer)?;

        let provider = crypto::provider();
        let signing = provider
            .key_provider
            .load_private_key(rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into()))?;
        let chain = vec![certificate.der().clone(), intermediate.certificate.clone()];
        let only = OnlyFor { host: host.clone(), key: Arc::new(CertifiedKey::new(chain, signing)) };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(only));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // Both ends are on one machine, and its cheapest suite is the best.
        config.ignore_client_order = true;
        Ok(config)
    }
}

/// Presents the leaf unless the agent asks, in SNI, for another host than its CONNECT named.
#[derive(Debug)]
struct OnlyFor {
    host: HostName,
    key: Arc<CertifiedKey>,
}

impl ResolvesServerCert for OnlyFor {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let Some(asked) = hello.server_name()
            && !matches!(asked.parse(), Ok(Host::Name(name)) if name == self.host)
        {
            tracing::warn!(host = %self.host, sni = asked, code = "authority_mismatch", "SNI is not the CONNECT target");
            return None;
        }
        Some(self.key.clone())
    }
}

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A certificate could not be made.
    #[error("the local CA's certificate could not be made: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A leaf could not be used.
    #[error("the local CA's leaf could not be used: {0}")]
    Tls(#[from] rustls::Error),
    /// The system gave no random bytes.
    #[error("the system gives no random bytes")]
    Random,
    /// What was kept in the store is not an authority.
    #[error("the local CA kept in the store cannot be read")]
    Kept,
    /// A file could not be written.
    #[error("cannot write {path}: {error}")]
    File {
        /// Which file.
        path: std::path::PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The truststore for Java could not be built.
    #[error("the Java truststore could not be built: {0}")]
    Truststore(#[from] p12_keystore::error::Error),
}

fn authority(role: &str, now: SystemTime) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + AUTHORITY_LIFE).into();
    let serial = serial()?;
    // Told apart by its serial, so that two authorities in one trust store are two names.
    let id: String = serial.to_bytes().iter().take(4).map(|b| format!("{b:02x}")).collect();
    params.serial_number = Some(serial);
    params.distinguished_name = name(&format!("Sidebearer {role} {id}"));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, ORGANIZATION);
    name.push(DnType::CommonName, common);
    name
}

/// The names of each intermediate; one has none where there are none.
fn parts(names: &[String]) -> Vec<&[String]> {
    if names.is_empty() { vec![names] } else { names.chunks(NAMES).collect() }
}

/// Only these names, and no address at all: permitted names alone would leave every address open.
fn constraints(names: &[String]) -> NameConstraints {
    // No permitted name would mean no constraint; `.invalid` never resolves (RFC 6761 section 6.4).
    let names = if names.is_empty() { &["invalid".to_owned()] } else { names };
    NameConstraints {
        permitted_subtrees: names.iter().cloned().map(GeneralSubtree::DnsName).collect(),
        excluded_subtrees: vec![
            GeneralSubtree::IpAddress(CidrSubnet::V4([0; 4], [0; 4])),
            GeneralSubtree::IpAddress(CidrSubnet::V6([0; 16], [0; 16])),
        ],
    }
}

/// 16 random bytes, the first bit clear so that the number is positive and needs no padding.
fn serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|_| CaError::Random)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, RootCertStore};
    use tokio_rustls::TlsConnector;

    use super::*;

    fn hosts(names: &[&str]) -> Vec<HostPattern> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn trusting(ca: &Ca) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(pem::parse(ca.root_pem()).unwrap().into_contents())).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        TlsConnector::from(Arc::new(config))
    }

    /// A client that trusts `ca` asks for `asked`, and is answered as `host`.
    async fn handshake(ca: &Ca, host: &str, asked: &str) -> Result<(), io::Error> {
        let (client, server) = tokio::io::duplex(64 * 1024);
        let connector = trusting(ca);
        let asked = ServerName::try_from(asked.to_owned()).unwrap();
        let host: HostName = host.parse().unwrap();
        let (client, _server) =
            tokio::join!(connector.connect(asked, client), ca.accept(&host, server, SystemTime::now()));
        client.map(|_| ())
    }

    #[tokio::test]
    async fn an_agent_that_trusts_the_root_trusts_a_routed_host() {
        let ca = Ca::generate(&hosts(&["api.test.example", "*.wild.example"]), SystemTime::now()).unwrap();
        handshake(&ca, "api.test.example", "api.test.example").await.unwrap();
        handshake(&ca, "a.wild.example", "A.Wild.Example").await.unwrap();
    }

    #[tokio::test]
    async fn a_stolen_intermediate_forges_no_other_host() {
        // TLS-003: the leaf is signed by the real intermediate key, and a verifier refuses the name.
        let ca = Ca::generate(&hosts(&["api.test.example"]), SystemTime::now()).unwrap();
        let error = handshake(&ca, "evil.example", "evil.example").await.unwrap_err();
        assert!(error.to_string().contains("NameConstraintViolation"), "{error}");
        let none = Ca::generate(&[], SystemTime::now()).unwrap();
        handshake(&none, "evil.example", "evil.example").await.unwrap_err();
    }

    #[tokio::test]
    async fn an_sni_other_than_the_connect_target_is_refused() {
        // SEC-002
        let ca = Ca::generate(&hosts(&["api.example.org", "evil.example.org"]), SystemTime::now()).unwrap();
        handshake(&ca, "api.example.org", "evil.example.org").await.unwrap_err();
    }

    #[test]
    fn a_kept_authority_is_the_same_authority() {
        let now = SystemTime::now();
        let made = Ca::generate(&hosts(&["api.example.org", "*.example.net"]), now).unwrap();
        let kept = made.export();
        let again = Ca::restore(&kept, &hosts(&["api.example.org", "eu.example.net"]), now).unwrap().ok().unwrap();
        assert_eq!(again.root_pem(), made.root_pem());

        let more = Ca::restore(&kept, &hosts(&["api.example.org", "new.example"]), now).unwrap();
        assert_eq!(more.err(), Some(Outdated::NewHosts(vec!["new.example".into()])));
        let late = Ca::restore(&kept, &hosts(&["api.example.org"]), now + DAY * 340).unwrap();
        assert_eq!(late.err(), Some(Outdated::Ending));
        assert!(matches!(Ca::restore(&Secret::new("{}"), &[], now), Err(CaError::Kept)));
    }

    #[tokio::test]
    async fn any_number_of_hosts_is_answered_each_by_an_intermediate_for_some_of_them() {
        let names: Vec<String> = (0..10_000).map(|n| format!("api-{n}.a-long-name.example")).collect();
        let hosts: Vec<HostPattern> = names.iter().map(|name| name.parse().unwrap()).collect();
        let made = Ca::generate(&hosts, SystemTime::now()).unwrap();
        let kept = Ca::restore(&made.export(), &hosts, SystemTime::now()).unwrap().ok().unwrap();
        for ca in [made, kept] {
            for name in [names[0].as_str(), &names[5000], &names[9999], "eu.api-7.a-long-name.example"] {
                handshake(&ca, name, name).await.unwrap();
            }
            handshake(&ca, "a-long-name.example", "a-long-name.example").await.unwrap_err();
            let largest = ca.inner.intermediates.iter().map(|one| one.certificate.len()).max();
            assert!(largest < Some(16 << 10), "{largest:?}");
        }
    }

    #[test]
    fn a_host_is_minted_once_until_half_of_its_leafs_life() {
        let ca = Ca::generate(&hosts(&["api.example.org"]), SystemTime::now()).unwrap();
        let (host, now) = ("api.example.org".parse().unwrap(), SystemTime::now());
        let first = ca.server_config(&host, now).unwrap();
        assert!(Arc::ptr_eq(&first, &ca.server_config(&host, now + DAY).unwrap()));
        assert!(!Arc::ptr_eq(&first, &ca.server_config(&host, now + DAY * 16).unwrap()));
    }

    #[test]
    fn leaves_for_a_wildcards_many_hosts_stay_bounded() {
        // TLS-018
        let ca = Ca::generate(&hosts(&["*.example.org"]), SystemTime::now()).unwrap();
        for n in 0..LEAVES.get() + 10 {
            ca.server_config(&format!("h{n}.example.org").parse().unwrap(), SystemTime::now()).unwrap();
        }
        assert_eq!(ca.inner.leaves.lock().unwrap().len(), LEAVES.get());
    }
}
