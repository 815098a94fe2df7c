//! `store.url`: where the shared store is, and with which protection it is reached.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use url::form_urlencoded;

use crate::host::Authority;
use crate::secret::Secret;

/// A PostgreSQL database: its servers, user and password (libpq's connection URI).
#[derive(Clone, PartialEq, Eq)]
pub struct ServerUrl {
    /// One for each server.
    each: Vec<Config>,
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
    #[error("its `sslmode` would let others read along, or answer in the server's place")]
    Unprotected,
    /// A parameter that has another place here.
    #[error("`{0}` is not taken from its parameters")]
    Elsewhere(&'static str),
    /// A parameter that nobody knows. It may be the rest of a password.
    #[error("it has a parameter that is none of `sslmode`, `options`, `channel_binding`")]
    Unknown,
    /// A host that is in `resolve` beside one that is not.
    #[error("`resolve` has some of its hosts and not all")]
    HalfResolved,
}

impl UrlError {
    /// What to write instead.
    pub fn hint(&self) -> &'static str {
        match self {
            UrlError::Garbled(_) | UrlError::Missing(_) | UrlError::Unknown => {
                "`postgres://user:password@host:5432/database`, with special characters percent-encoded; \
                 a password may stand in `store.password` as it is"
            }
            UrlError::Unprotected => {
                "leave it out, or write `sslmode=verify-full`; only a server on this machine may go without TLS \
                 (`sslmode=disable`)"
            }
            UrlError::Elsewhere(name) if name.starts_with("ssl") => {
                "the certificates to trust go into `extra_ca_files`"
            }
            UrlError::Elsewhere(_) => "write it before the `?`: `postgres://user:password@host:5432/database`",
            UrlError::HalfResolved => "name all hosts of `store.url` in `resolve`, or none",
        }
    }
}

/// What a URL says besides where the server is.
struct Parameters {
    /// Whether to go without TLS.
    plain: bool,
    /// What the driver understands.
    rest: String,
}

impl Parameters {
    fn parse(query: &str) -> Result<Self, UrlError> {
        let mut parameters = Self { plain: false, rest: String::new() };
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match (&*key, &*value) {
                ("sslmode", "verify-full") => {}
                ("sslmode", "disable") => parameters.plain = true,
                ("sslmode", _) => return Err(UrlError::Unprotected),
                ("options" | "channel_binding", value) => {
                    let value = utf8_percent_encode(value, NON_ALPHANUMERIC);
                    parameters.rest += &format!("{key}={value}&");
                }
                (key, _) => {
                    let known = ELSEWHERE.iter().find(|name| **name == key);
                    return Err(known.map_or(UrlError::Unknown, |name| UrlError::Elsewhere(name)));
                }
            }
        }
        Ok(parameters)
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
        let parameters = Parameters::parse(query)?;
        let parsed = format!("{base}?{}", parameters.rest).parse::<Config>();
        // Its message names a parameter, and never a value.
        let mut parsed = parsed.map_err(|error| UrlError::Garbled(format!(": {}", super::reasons(&error))))?;
        if let Some(password) = password {
            parsed.password(password.expose());
        }
        let user = parsed.get_user().filter(|user| !user.is_empty()).ok_or(UrlError::Missing("user"))?;
        let servers = servers(&parsed, resolve)?;
        let names: Vec<&str> = servers.iter().map(|server| &*server.name).collect();
        let at = format!("postgres://{}/{}", names.join(","), parsed.get_dbname().unwrap_or(user));
        if parameters.plain && !servers.iter().all(Server::is_here) {
            return Err(UrlError::Unprotected);
        }
        Ok(Self { each: servers.iter().map(|server| server.config(&parsed, parameters.plain)).collect(), at })
    }

    /// Whether a password is known.
    pub fn has_password(&self) -> bool {
        self.each.iter().any(|config| config.get_password().is_some())
    }

    /// How each of its servers is reached, in the order in which they are tried.
    pub(in crate::store) fn each(&self) -> Vec<Config> {
        self.each.clone()
    }
}

/// One server of a URL.
struct Server {
    host: Host,
    port: u16,
    /// As people are told.
    name: String,
    /// Where it is dialled, if not where DNS says.
    address: Option<SocketAddr>,
}

/// The servers that a URL names. Either all of them are resolved, or none.
fn servers(parsed: &Config, resolve: &HashMap<Authority, SocketAddr>) -> Result<Vec<Server>, UrlError> {
    let (hosts, ports) = (parsed.get_hosts(), parsed.get_ports());
    if hosts.is_empty() || hosts.contains(&Host::Tcp(String::new())) {
        return Err(UrlError::Missing("host"));
    }
    let server = |(index, host): (usize, &Host)| {
        let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
        let name = match host {
            Host::Tcp(name) if name.contains(':') && !name.starts_with('[') => format!("[{name}]:{port}"),
            Host::Tcp(name) => format!("{name}:{port}"),
            Host::Unix(path) => path.display().to_string(),
        };
        let address = Authority::parse(&name, None).ok().and_then(|authority| resolve.get(&authority).copied());
        Server { host: host.clone(), port, name, address }
    };
    let servers: Vec<Server> = hosts.iter().enumerate().map(server).collect();
    match servers.iter().filter(|server| server.address.is_some()).count() {
        0 => Ok(servers),
        all if all == servers.len() => Ok(servers),
        _ => Err(UrlError::HalfResolved),
    }
}

impl Server {
    /// Whether nobody but this machine sees what is sent there.
    fn is_here(&self) -> bool {
        match (&self.host, self.address) {
            (_, Some(address)) => address.ip().is_loopback(),
            (Host::Unix(_), None) => true,
            (Host::Tcp(name), None) => {
                name == "localhost" || name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }

    /// How it is reached, with what the URL says of the user and the database.
    fn config(&self, parsed: &Config, plain: bool) -> Config {
        let mut config = Config::new();
        match &self.host {
            // The name is the one that the certificate has to be for.
            Host::Tcp(name) => config.host(name.trim_matches(['[', ']'])),
            Host::Unix(path) => config.host_path(path),
        };
        match self.address {
            Some(address) => config.hostaddr(address.ip()).port(address.port()),
            None => config.port(self.port),
        };
        parsed.get_user().map(|user| config.user(user));
        parsed.get_password().map(|password| config.password(password));
        parsed.get_dbname().map(|name| config.dbname(name));
        parsed.get_options().map(|options| config.options(options));
        let without_tls = plain || matches!(self.host, Host::Unix(_));
        config
            .channel_binding(parsed.get_channel_binding())
            .ssl_mode(if without_tls { SslMode::Disable } else { SslMode::Require })
            // Of several servers, the one that takes writes.
            .target_session_attrs(TargetSessionAttrs::ReadWrite)
            .application_name("sidebearer")
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_user_timeout(SILENCE)
            .keepalives_idle(SILENCE)
            .keepalives_interval(KEEPALIVE)
            .keepalives_retries(3);
        config
    }
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

/// What libpq takes from a URL's parameters, and we do not.
const ELSEWHERE: [&str; 9] =
    ["sslrootcert", "sslcert", "sslkey", "hostaddr", "host", "port", "user", "password", "dbname"];
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// After how long a server that says nothing is asked whether it is there, and what was sent unanswered ends a connection.
const SILENCE: Duration = Duration::from_secs(10);
const KEEPALIVE: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<ServerUrl, UrlError> {
        ServerUrl::parse(&Secret::new(url), None, &HashMap::new())
    }

    fn config(url: &str) -> Config {
        parse(url).unwrap().each().remove(0)
    }

    fn resolving(pairs: &[(&str, &str)]) -> HashMap<Authority, SocketAddr> {
        pairs.iter().map(|(name, at)| (Authority::parse(name, None).unwrap(), at.parse().unwrap())).collect()
    }

    #[test]
    fn a_server_is_reached_over_verified_tls() {
        // SEC-025
        let mode = |url: &str| config(url).get_ssl_mode();
        assert_eq!(mode("postgres://me:canary@db.test/grants?sslmode=verify-full"), SslMode::Require);
        assert_eq!(mode("postgres://me@db.test"), SslMode::Require);
        for weak in [
            "prefer",
            "require",
            "verify-ca",
            "disable",
            "",
            "verify-full&sslmode=prefer",
            "verify-full&ssl%6Dode=disable",
        ] {
            let error = parse(&format!("postgres://me:canary@db.test/grants?sslmode={weak}")).unwrap_err();
            assert_eq!(error, UrlError::Unprotected, "{weak}");
        }
    }

    #[test]
    fn only_a_server_on_this_machine_goes_without_tls() {
        let mode = |url: &str| config(url).get_ssl_mode();
        for here in ["localhost", "127.0.0.1", "[::1]", "%2Frun%2Fpostgresql"] {
            assert_eq!(mode(&format!("postgres://me@{here}/grants?sslmode=disable")), SslMode::Disable, "{here}");
        }
        assert!(parse("postgres://me@localhost,db.test/grants?sslmode=disable").is_err());
        assert_eq!(mode("postgres://me@localhost/grants"), SslMode::Require);
        let plain = Secret::new("postgres://me@localhost/grants?sslmode=disable");
        let elsewhere = ServerUrl::parse(&plain, None, &resolving(&[("localhost:5432", "10.1.2.3:5432")]));
        assert_eq!(elsewhere, Err(UrlError::Unprotected), "what counts is where it is dialled");
    }

    #[test]
    fn it_is_shown_without_credentials() {
        let server = parse("postgres://me:canary@db.test:5433,[::1]:5434/grants?options=-c%20x%3Dcanary").unwrap();
        assert_eq!(server.to_string(), "postgres://db.test:5433,[::1]:5434/grants");
        assert_eq!(format!("{server:?}"), server.to_string());
        let options: Vec<_> = server.each().iter().map(|config| config.get_options().map(str::to_owned)).collect();
        assert_eq!(options, [Some("-c x=canary".to_owned()), Some("-c x=canary".to_owned())]);
        let ports: Vec<u16> = server.each().iter().map(|config| config.get_ports()[0]).collect();
        assert_eq!(ports, [5433, 5434]);
    }

    #[test]
    fn a_password_may_stand_beside_it() {
        let odd = Secret::new("p@ss/w:rd?%");
        let server = ServerUrl::parse(&Secret::new("postgres://me@db.test/x"), Some(&odd), &HashMap::new()).unwrap();
        assert_eq!(server.each()[0].get_password(), Some(odd.expose().as_bytes()));
    }

    #[test]
    fn its_hosts_can_be_resolved_elsewhere_and_are_verified_by_name() {
        let resolve = resolving(&[("db.test:5432", "127.0.0.1:7777")]);
        let url = Secret::new("postgres://me:pw@db.test/x?channel_binding=require");
        let server = ServerUrl::parse(&url, None, &resolve).unwrap();
        let config = &server.each()[0];
        assert_eq!((config.get_ports(), config.get_dbname(), config.get_user()), (&[7777][..], Some("x"), Some("me")));
        assert_eq!(config.get_hosts(), [Host::Tcp("db.test".into())]);
        assert_eq!(config.get_hostaddrs(), ["127.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(config.get_channel_binding(), tokio_postgres::config::ChannelBinding::Require);
        assert_eq!(server.to_string(), "postgres://db.test:5432/x");
        let two = ServerUrl::parse(&Secret::new("postgres://me:pw@db.test,two.test/x"), None, &resolve);
        assert_eq!(two.unwrap_err(), UrlError::HalfResolved);
    }

    #[test]
    fn what_is_no_url_is_told_without_its_secrets() {
        // LEK-001
        let none_known = "it has a parameter that is none of `sslmode`, `options`, `channel_binding`";
        for (bad, said) in [
            (
                "mysql://me:canary@db/x",
                "not a URL of a PostgreSQL server: it begins with neither `postgres://` nor `postgresql://`",
            ),
            ("postgres://:canary@db.test/x", "its user is missing"),
            ("postgres://me:canary@/x", "its host is missing"),
            ("postgres://me:canary@db.test/x?sslrootcert=a.pem", "`sslrootcert` is not taken from its parameters"),
            ("postgres://me:canary@db.test/x?port=6000", "`port` is not taken from its parameters"),
            (
                "postgres://me:canary@db.test:port/x",
                "not a URL of a PostgreSQL server: invalid connection string: invalid value for option `port`",
            ),
            ("postgres://me@db.test/x?colour=canary", none_known),
            ("postgres://me:?canary@db.test/x", none_known),
            (
                "postgres://me:12?sslmode=canary@db.test/x",
                "its `sslmode` would let others read along, or answer in the server's place",
            ),
        ] {
            let error = parse(bad).unwrap_err();
            assert_eq!(error.to_string(), said, "{bad}");
            assert!(!error.to_string().contains("canary") && !error.hint().is_empty());
        }
    }
}
