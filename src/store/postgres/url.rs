//! `store.url`: where the shared store is, and with which protection it is reached.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use url::form_urlencoded;

use crate::host::Authority;
use crate::secret::Secret;

/// A PostgreSQL database: its servers, user and password (libpq's connection URI).
#[derive(Clone, PartialEq, Eq)]
pub struct ServerUrl {
    config: Config,
    at: String,
}

/// Why a `store.url` is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not a URL of a PostgreSQL server.
    #[error("not a URL of a PostgreSQL server{0}")]
    Garbled(String),
    /// No host, or no user.
    #[error("its {0} is missing")]
    Missing(&'static str),
    /// A parameter that would weaken the protection.
    #[error("`sslmode={0}` would let others read along, or answer in the server's place")]
    Unprotected(String),
    /// A parameter that has another place here.
    #[error("`{0}` is not taken from the URL")]
    Elsewhere(String),
    /// A host that is in `resolve` beside one that is not.
    #[error("`resolve` has some of its hosts and not all")]
    HalfResolved,
}

impl UrlError {
    /// What to write instead.
    pub fn hint(&self) -> &'static str {
        match self {
            UrlError::Garbled(_) | UrlError::Missing(_) => {
                "`postgres://user:password@host:5432/database`, with special characters percent-encoded; \
                 a password may stand in `store.password` as it is"
            }
            UrlError::Unprotected(_) => {
                "leave it out, or write `sslmode=verify-full`; only a server on this machine may go without TLS \
                 (`sslmode=disable`)"
            }
            UrlError::Elsewhere(_) => "the certificates to trust go into `extra_ca_files`",
            UrlError::HalfResolved => "name all hosts of `store.url` in `resolve`, or none",
        }
    }
}

impl ServerUrl {
    /// Reads a URL. `password` takes the place of the one in it; `resolve` gives addresses for its hosts, instead of DNS.
    ///
    /// # Errors
    /// See [`UrlError`], which never has a part of the URL that may be a secret.
    pub fn parse(
        url: &Secret,
        password: Option<&Secret>,
        resolve: &HashMap<Authority, SocketAddr>,
    ) -> Result<Self, UrlError> {
        let text = url.expose().trim();
        let (base, query) = text.split_once('?').unwrap_or((text, ""));
        if !(base.starts_with("postgres://") || base.starts_with("postgresql://")) {
            return Err(UrlError::Garbled(": it begins with neither `postgres://` nor `postgresql://`".into()));
        }
        let mut plain = false;
        let mut rest = form_urlencoded::Serializer::new(String::new());
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*key {
                "sslmode" => match &*value {
                    "verify-full" => {}
                    "disable" => plain = true,
                    _ => return Err(UrlError::Unprotected(value.into_owned())),
                },
                "sslrootcert" | "sslcert" | "sslkey" | "hostaddr" => return Err(UrlError::Elsewhere(key.into_owned())),
                _ => drop(rest.append_pair(&key, &value)),
            }
        }
        let parsed = format!("{base}?{}", rest.finish()).parse::<Config>();
        // Its message names a parameter, and never a value.
        let mut parsed = parsed.map_err(|error| UrlError::Garbled(format!(": {}", super::reasons(&error))))?;
        if let Some(password) = password {
            parsed.password(password.expose());
        }
        let hosts = parsed.get_hosts().to_vec();
        let user = parsed.get_user().filter(|user| !user.is_empty()).ok_or(UrlError::Missing("user"))?.to_owned();
        if hosts.is_empty() || hosts.contains(&Host::Tcp(String::new())) {
            return Err(UrlError::Missing("host"));
        }
        if plain && !hosts.iter().all(is_here) {
            return Err(UrlError::Unprotected("disable".into()));
        }
        let port = |index: usize| match parsed.get_ports() {
            [] => 5432,
            [one] => *one,
            several => several.get(index).copied().unwrap_or(5432),
        };
        let ports: Vec<u16> = (0..hosts.len()).map(port).collect();
        let name = |(host, port): (&Host, &u16)| match host {
            Host::Tcp(name) => format!("{name}:{port}"),
            Host::Unix(path) => path.display().to_string(),
        };
        let names: Vec<String> = hosts.iter().zip(&ports).map(name).collect();
        let database = parsed.get_dbname().unwrap_or(&user).to_owned();
        let at = format!("postgres://{}/{database}", names.join(","));

        let mut config = parsed.clone();
        let resolved = names.iter().map(|name| resolve.get(&Authority::parse(name, None).ok()?).copied());
        let resolved: Vec<Option<SocketAddr>> = resolved.collect();
        if resolved.iter().any(Option::is_some) {
            let all: Option<Vec<SocketAddr>> = resolved.into_iter().collect();
            config = dialled(&parsed, &hosts, &all.ok_or(UrlError::HalfResolved)?);
        }
        config
            .ssl_mode(if plain || hosts.iter().all(is_socket) { SslMode::Disable } else { SslMode::Require })
            // Of several servers, the one that takes writes.
            .target_session_attrs(TargetSessionAttrs::ReadWrite)
            .application_name("sidebearer")
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_user_timeout(SILENCE)
            .keepalives_idle(SILENCE);
        Ok(Self { config, at })
    }

    /// Whether a password is known.
    pub fn has_password(&self) -> bool {
        self.config.get_password().is_some()
    }

    pub(in crate::store) fn config(&self) -> Config {
        self.config.clone()
    }
}

/// The same, with its servers at these addresses. What a configuration has of hosts and ports cannot be taken out of it.
fn dialled(parsed: &Config, hosts: &[Host], addresses: &[SocketAddr]) -> Config {
    let mut config = Config::new();
    for (host, address) in hosts.iter().zip(addresses) {
        if let Host::Tcp(name) = host {
            // The name is the one that the certificate has to be for.
            config.host(name).hostaddr(address.ip()).port(address.port());
        }
    }
    parsed.get_user().map(|user| config.user(user));
    parsed.get_password().map(|password| config.password(password));
    parsed.get_dbname().map(|name| config.dbname(name));
    parsed.get_options().map(|options| config.options(options));
    config.load_balance_hosts(parsed.get_load_balance_hosts());
    config
}

/// Whether nobody but this machine sees what is sent there.
fn is_here(host: &Host) -> bool {
    match host {
        Host::Tcp(name) => name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()),
        Host::Unix(_) => true,
    }
}

fn is_socket(host: &Host) -> bool {
    matches!(host, Host::Unix(_))
}

/// Without credentials.
impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.at)
    }
}

impl fmt::Debug for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.at)
    }
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// After how long a server that says nothing is asked whether it is there, and what was sent unanswered ends a connection.
const SILENCE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<ServerUrl, UrlError> {
        ServerUrl::parse(&Secret::new(url), None, &HashMap::new())
    }

    #[test]
    fn a_server_is_reached_over_verified_tls() {
        let server = parse("postgres://me:canary@db.test/grants?sslmode=verify-full").unwrap();
        assert_eq!(server.config().get_ssl_mode(), SslMode::Require);
        assert_eq!(parse("postgres://me@db.test").unwrap().config().get_ssl_mode(), SslMode::Require);
        for weak in ["prefer", "require", "verify-ca", "disable", ""] {
            let error = parse(&format!("postgres://me:canary@db.test/grants?sslmode={weak}")).unwrap_err();
            assert_eq!(error, UrlError::Unprotected(weak.into()));
        }
    }

    #[test]
    fn only_a_server_on_this_machine_goes_without_tls() {
        for here in ["localhost", "127.0.0.1", "[::1]", "%2Frun%2Fpostgresql"] {
            let server = parse(&format!("postgres://me@{here}/grants?sslmode=disable")).unwrap();
            assert_eq!(server.config().get_ssl_mode(), SslMode::Disable, "{here}");
        }
        assert!(parse("postgres://me@localhost,db.test/grants?sslmode=disable").is_err());
        assert_eq!(parse("postgres://me@localhost/grants").unwrap().config().get_ssl_mode(), SslMode::Require);
    }

    #[test]
    fn it_is_shown_without_credentials() {
        let server = parse("postgres://me:canary@db.test:5433,two.test:5434/grants?options=-c%20x%3Dcanary").unwrap();
        assert_eq!(server.to_string(), "postgres://db.test:5433,two.test:5434/grants");
        assert_eq!(format!("{server:?}"), server.to_string());
    }

    #[test]
    fn a_password_may_stand_beside_it() {
        let odd = Secret::new("p@ss/w:rd?%");
        let server = ServerUrl::parse(&Secret::new("postgres://me@db.test/x"), Some(&odd), &HashMap::new()).unwrap();
        assert_eq!(server.config().get_password(), Some(odd.expose().as_bytes()));
    }

    #[test]
    fn its_hosts_can_be_resolved_elsewhere_and_are_verified_by_name() {
        let resolve =
            HashMap::from([(Authority::parse("db.test:5432", None).unwrap(), "127.0.0.1:7777".parse().unwrap())]);
        let server = ServerUrl::parse(&Secret::new("postgres://me:pw@db.test/x"), None, &resolve).unwrap();
        let config = server.config();
        assert_eq!((config.get_ports(), config.get_dbname(), config.get_user()), (&[7777][..], Some("x"), Some("me")));
        assert_eq!(config.get_hosts(), [Host::Tcp("db.test".into())]);
        assert_eq!(config.get_hostaddrs(), ["127.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(server.to_string(), "postgres://db.test:5432/x");
        let two = ServerUrl::parse(&Secret::new("postgres://me:pw@db.test,two.test/x"), None, &resolve);
        assert_eq!(two.unwrap_err(), UrlError::HalfResolved);
    }

    #[test]
    fn what_is_no_url_is_told_without_its_secrets() {
        for (bad, said) in [
            (
                "mysql://me:canary@db/x",
                "not a URL of a PostgreSQL server: it begins with neither `postgres://` nor `postgresql://`",
            ),
            ("postgres://:canary@db.test/x", "its user is missing"),
            ("postgres://me:canary@/x", "its host is missing"),
            ("postgres://me:canary@db.test/x?sslrootcert=a.pem", "`sslrootcert` is not taken from the URL"),
            (
                "postgres://me:canary@db.test:port/x",
                "not a URL of a PostgreSQL server: invalid connection string: invalid value for option `port`",
            ),
            (
                "postgres://me@db.test/x?colour=canary",
                "not a URL of a PostgreSQL server: invalid connection string: unknown option `colour`",
            ),
        ] {
            let error = parse(bad).unwrap_err();
            assert_eq!(error.to_string(), said, "{bad}");
            assert!(!error.to_string().contains("canary") && !error.hint().is_empty());
        }
    }
}
