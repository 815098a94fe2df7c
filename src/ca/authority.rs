//! One authority of the CA: a root that agents trust, and what it has signed.
//!
//! The root signs an intermediate that is name-constrained to the routed hosts, several where these are many, and its key
//! is then destroyed; they sign a leaf per host. The constraints sit on them because Java ignores those of a root.

use std::collections::HashMap;
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

use super::{CaError, ORGANIZATION};
use crate::crypto;
use crate::host::{Host, HostName};

pub(super) const DAY: Duration = Duration::from_secs(24 * 60 * 60);
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
/// An authority, with its keys and its leaves.
pub(super) struct Authority {
    pub saved: Saved,
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
pub(super) struct Saved {
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

impl Authority {
    /// Makes one that can speak for these names and what is below them. The root's key is gone when this returns.
    pub fn generate(permitted: Vec<String>, now: SystemTime) -> Result<Self, CaError> {
        let root_key = KeyPair::generate()?;
        let mut root = authority("root", now)?;
        root.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        let root_certificate = root.self_signed(&root_key)?;
        let root_issuer = Issuer::new(root, root_key);

        let key = KeyPair::generate()?;
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

    /// Takes up a kept one.
    pub fn from_saved(saved: Saved) -> Result<Self, CaError> {
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
        Ok(Self { saved, intermediates, permitted, leaves })
    }

    /// The intermediate that may speak for a name: for itself, or for one that it is below.
    fn intermediate(&self, name: &str) -> Option<&Intermediate> {
        let mut names = std::iter::successors(Some(name), |name| Some(name.split_once('.')?.1));
        let place = names.find_map(|name| self.permitted.get(name))?;
        self.intermediates.get(*place)
    }

    /// Whether it may speak for a name.
    pub fn speaks_for(&self, name: &str) -> bool {
        self.intermediate(name).is_some()
    }

    /// The TLS settings for a host, minted once and again at half of the leaf's life.
    pub fn server_config(&self, host: &HostName, now: SystemTime) -> Result<Arc<ServerConfig>, CaError> {
        let mut leaves = self.leaves.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
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
        leaf.not_after = (now + LEAF_LIFE).min(self.saved.not_after()).into();
        leaf.serial_number = Some(serial()?);
        leaf.distinguished_name = name(if host.as_str().len() <= 64 { host.as_str() } else { "leaf" });
        leaf.subject_alt_names = vec![SanType::DnsName(Ia5String::try_from(host.as_str())?)];
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf.use_authority_key_identifier_extension = true;
        let intermediate = self.intermediate(host.as_str()).or(self.intermediates.first()).ok_or(CaError::Kept)?;
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

impl Saved {
    /// The root's certificate.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The names that it can speak for, each with all names below it.
    pub fn permitted(&self) -> impl Iterator<Item = &str> {
        self.permitted.iter().map(String::as_str)
    }

    /// When it ends.
    pub fn not_after(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.not_after)
    }

    /// Whether too little of its life is left to take it up again.
    pub fn ends_soon(&self, now: SystemTime) -> bool {
        self.not_after < seconds(now + AUTHORITY_MARGIN)
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
    use super::*;

    fn authority(name: &str) -> Authority {
        Authority::generate(vec![name.to_owned()], SystemTime::now()).unwrap()
    }

    #[test]
    fn a_host_is_minted_once_until_half_of_its_leafs_life() {
        let authority = authority("api.example.org");
        let (host, now) = ("api.example.org".parse().unwrap(), SystemTime::now());
        let first = authority.server_config(&host, now).unwrap();
        assert!(Arc::ptr_eq(&first, &authority.server_config(&host, now + DAY).unwrap()));
        assert!(!Arc::ptr_eq(&first, &authority.server_config(&host, now + DAY * 16).unwrap()));
    }

    #[test]
    fn leaves_for_a_wildcards_many_hosts_stay_bounded() {
        // TLS-018
        let authority = authority("example.org");
        for n in 0..LEAVES.get() + 10 {
            authority.server_config(&format!("h{n}.example.org").parse().unwrap(), SystemTime::now()).unwrap();
        }
        assert_eq!(authority.leaves.lock().unwrap().len(), LEAVES.get());
    }

    #[test]
    fn thousands_of_names_make_no_intermediate_that_fits_into_no_handshake() {
        let names = (0..10_000).map(|n| format!("api-{n}.a-long-name.example")).collect();
        let authority = Authority::generate(names, SystemTime::now()).unwrap();
        let largest = authority.intermediates.iter().map(|one| one.certificate.len()).max();
        assert!(largest < Some(16 << 10), "{largest:?}");
    }
}
