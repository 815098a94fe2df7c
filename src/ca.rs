//! The local certificate authority: answers TLS for routed hosts, and for no other.
//!
//! It is one authority or several: hosts that are routed later get one of their own, so that agents which trust the first
//! go on trusting it.

mod authority;
pub mod files;
#[doc(hidden)]
pub mod measured;

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::host::HostName;
use crate::routes::HostPattern;
use crate::secret::Secret;
use authority::{Authority, Saved};

/// In the subject of our certificates. Upstream roots that carry it are left out: we never trust ourselves.
pub const ORGANIZATION: &str = "Sidebearer local CA";
/// So many authorities are one CA. An agent reads the roots of all of them.
const MOST: usize = 8;

/// The CA. A clone shares its keys and its leaves.
#[derive(Clone)]
pub struct Ca {
    inner: Arc<Inner>,
}

struct Inner {
    /// The oldest first. Never empty.
    authorities: Vec<Arc<Authority>>,
    roots: String,
}

/// Why a CA is made anew, which leaves running agents without trust in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Outdated {
    /// It ends within 30 days.
    #[error("the old one ends")]
    Ending,
    /// Hosts were added to it too often.
    #[error("hosts were added to the old one too often")]
    Full,
}

impl Ca {
    /// Makes an authority for these hosts. The root's key is gone when this returns.
    ///
    /// # Errors
    /// When the cryptography fails, which means a broken machine.
    pub fn generate(hosts: &[HostPattern], now: SystemTime) -> Result<Self, CaError> {
        Ok(Self::of(vec![Arc::new(Authority::generate(bases(hosts), now)?)]))
    }

    /// What to keep, sealed, so that the next run is the same CA.
    pub fn export(&self) -> Secret {
        let saved: Vec<&Saved> = self.inner.authorities.iter().map(|authority| &authority.saved).collect();
        // One alone is kept as it was before there could be more.
        let text = if let [one] = saved[..] { serde_json::to_string(one) } else { serde_json::to_string(&saved) };
        Secret::new(text.unwrap_or_default())
    }

    /// Takes up a kept CA, if it does not end soon.
    ///
    /// # Errors
    /// When what was kept cannot be read.
    pub fn restore(kept: &Secret, now: SystemTime) -> Result<Result<Self, Outdated>, CaError> {
        let text = kept.expose();
        let read = if text.starts_with('[') {
            serde_json::from_str(text)
        } else {
            serde_json::from_str(text).map(|one| vec![one])
        };
        let saved: Vec<Saved> = read.map_err(|_| CaError::Kept)?;
        if saved.iter().any(|saved| saved.ends_soon(now)) {
            return Ok(Err(Outdated::Ending));
        }
        let authorities = saved.into_iter().map(|saved| Authority::from_saved(saved).map(Arc::new));
        let authorities = authorities.collect::<Result<Vec<_>, _>>()?;
        if authorities.is_empty() { Err(CaError::Kept) } else { Ok(Ok(Self::of(authorities))) }
    }

    /// The hosts that it cannot speak for.
    pub fn lacks(&self, hosts: &[HostPattern]) -> Vec<String> {
        let mut lacking = bases(hosts);
        lacking.retain(|base| self.authority(base).is_none());
        lacking
    }

    /// The same CA with one more authority, for the hosts that it cannot speak for yet.
    ///
    /// # Errors
    /// When the cryptography fails, which means a broken machine.
    pub fn extended(&self, hosts: &[HostPattern], now: SystemTime) -> Result<Result<Self, Outdated>, CaError> {
        let lacking = self.lacks(hosts);
        if lacking.is_empty() {
            return Ok(Ok(self.clone()));
        }
        if self.inner.authorities.len() == MOST {
            return Ok(Err(Outdated::Full));
        }
        let mut authorities = self.inner.authorities.clone();
        authorities.push(Arc::new(Authority::generate(lacking, now)?));
        Ok(Ok(Self::of(authorities)))
    }

    /// The same CA with the authorities of another besides its own, which come first.
    pub fn with(&self, other: &Self) -> Self {
        let own = &self.inner.authorities;
        let is_new = |one: &&Arc<Authority>| own.iter().all(|known| known.saved.root() != one.saved.root());
        let new: Vec<Arc<Authority>> = other.inner.authorities.iter().filter(is_new).cloned().collect();
        Self::of(own.iter().cloned().chain(new).collect())
    }

    fn of(authorities: Vec<Arc<Authority>>) -> Self {
        let roots = authorities.iter().map(|authority| authority.saved.root()).collect();
        Self { inner: Arc::new(Inner { authorities, roots }) }
    }

    /// The authority that may speak for a name.
    fn authority(&self, name: &str) -> Option<&Authority> {
        self.inner.authorities.iter().find(|authority| authority.speaks_for(name)).map(|authority| &**authority)
    }

    /// The roots' certificates, which agents trust: one or more, after each other.
    pub fn roots_pem(&self) -> &str {
        &self.inner.roots
    }

    /// The names that it can speak for, each with all names below it.
    pub fn permitted(&self) -> impl Iterator<Item = &str> {
        self.inner.authorities.iter().flat_map(|authority| authority.saved.permitted())
    }

    /// When the first of its authorities ends.
    pub fn not_after(&self) -> SystemTime {
        let ends = self.inner.authorities.iter().map(|authority| authority.saved.not_after());
        ends.min().unwrap_or(SystemTime::UNIX_EPOCH)
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

    fn server_config(&self, host: &HostName, now: SystemTime) -> Result<Arc<ServerConfig>, CaError> {
        // No other is ever asked for; what the first of them signs of it, nobody believes.
        let authority = self.authority(host.as_str()).unwrap_or(&self.inner.authorities[0]);
        authority.server_config(host, now)
    }
}

/// What the constraints name: a wildcard's part behind the label, each once, in order.
fn bases(hosts: &[HostPattern]) -> Vec<String> {
    let mut bases: Vec<String> = hosts.iter().map(|host| host.base().to_string()).collect();
    bases.sort_unstable();
    bases.dedup();
    bases
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

#[cfg(test)]
mod tests {
    use rustls::pki_types::{CertificateDer, ServerName};
    use rustls::{ClientConfig, RootCertStore};
    use tokio_rustls::TlsConnector;

    use super::authority::DAY;
    use super::*;

    fn hosts(names: &[&str]) -> Vec<HostPattern> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn trusting(pem: &str) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        for root in pem::parse_many(pem).unwrap() {
            roots.add(CertificateDer::from(root.into_contents())).unwrap();
        }
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
        as_agent(trusting(ca.roots_pem()), ca, host, asked).await
    }

    async fn as_agent(connector: TlsConnector, ca: &Ca, host: &str, asked: &str) -> Result<(), io::Error> {
        let (client, server) = tokio::io::duplex(64 * 1024);
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
    fn a_kept_ca_is_the_same_ca() {
        let now = SystemTime::now();
        let made = Ca::generate(&hosts(&["api.example.org", "*.example.net"]), now).unwrap();
        let kept = made.export();
        let again = Ca::restore(&kept, now).unwrap().unwrap();
        assert_eq!(again.roots_pem(), made.roots_pem());
        assert_eq!(again.lacks(&hosts(&["eu.example.net", "new.example", "api.example.org"])), ["new.example"]);

        assert_eq!(Ca::restore(&kept, now + DAY * 340).unwrap().err(), Some(Outdated::Ending));
        for broken in ["{}", "[]", "", "[{}]"] {
            assert!(matches!(Ca::restore(&Secret::new(broken), now), Err(CaError::Kept)), "{broken}");
        }
    }

    #[tokio::test]
    async fn hosts_that_are_added_leave_an_agent_its_trust_in_the_others() {
        let now = SystemTime::now();
        let first = Ca::generate(&hosts(&["old.example"]), now).unwrap();
        let more = first.extended(&hosts(&["old.example", "new.example"]), now).unwrap().unwrap();
        let kept = Ca::restore(&more.export(), now).unwrap().unwrap();
        for ca in [more, kept] {
            assert!(ca.roots_pem().starts_with(first.roots_pem()));
            assert_eq!(ca.permitted().collect::<Vec<_>>(), ["old.example", "new.example"]);
            handshake(&ca, "new.example", "new.example").await.unwrap();
            as_agent(trusting(first.roots_pem()), &ca, "old.example", "old.example").await.unwrap();
            as_agent(trusting(first.roots_pem()), &ca, "new.example", "new.example").await.unwrap_err();
            // TLS-003: the new authority may speak for its own host only.
            handshake(&ca, "evil.example", "evil.example").await.unwrap_err();
        }
    }

    #[tokio::test]
    async fn of_two_cas_an_agent_of_each_trusts_both_together() {
        let now = SystemTime::now();
        let ours = Ca::generate(&hosts(&["api.example"]), now).unwrap();
        let theirs = Ca::generate(&hosts(&["api.example", "new.example"]), now).unwrap();
        let both = ours.with(&theirs);
        as_agent(trusting(ours.roots_pem()), &both, "api.example", "api.example").await.unwrap();
        as_agent(trusting(theirs.roots_pem()), &both, "new.example", "new.example").await.unwrap();
        assert_eq!(both.with(&theirs).roots_pem(), both.roots_pem());
    }

    #[test]
    fn hosts_are_added_a_few_times_and_no_more() {
        let now = SystemTime::now();
        let mut ca = Ca::generate(&hosts(&["h0.example"]), now).unwrap();
        for n in 1..MOST {
            ca = ca.extended(&hosts(&[&format!("h{n}.example")]), now).unwrap().unwrap();
        }
        assert_eq!(ca.extended(&hosts(&["one.more.example"]), now).unwrap().err(), Some(Outdated::Full));
        assert_eq!(ca.extended(&hosts(&["h3.example"]), now).unwrap().unwrap().roots_pem(), ca.roots_pem());
    }

    #[tokio::test]
    async fn any_number_of_hosts_is_answered_each_by_an_intermediate_for_some_of_them() {
        let names: Vec<String> = (0..10_000).map(|n| format!("api-{n}.a-long-name.example")).collect();
        let hosts: Vec<HostPattern> = names.iter().map(|name| name.parse().unwrap()).collect();
        let made = Ca::generate(&hosts, SystemTime::now()).unwrap();
        let kept = Ca::restore(&made.export(), SystemTime::now()).unwrap().unwrap();
        for ca in [made, kept] {
            for name in [names[0].as_str(), &names[5000], &names[9999], "eu.api-7.a-long-name.example"] {
                handshake(&ca, name, name).await.unwrap();
            }
            handshake(&ca, "a-long-name.example", "a-long-name.example").await.unwrap_err();
        }
    }
}
