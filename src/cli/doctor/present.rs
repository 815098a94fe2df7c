//! The present environment as it is: where its variables lead, and the same variables with the bench in the sidecar's place.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::environment::Finding;
use crate::app::agent::Variable;
use crate::ca::ORGANIZATION;

const PATIENCE: Duration = Duration::from_secs(2);
/// What helps where variables are missing or old.
const EVALUATE: &str = "eval \"$(sidebearer env)\"";

/// Where HTTPS_PROXY leads.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Proxy {
    /// It is not set, or says nothing that can be read.
    Unset,
    /// To a sidecar.
    Sidecar { at: String },
    /// To a place where nobody listens.
    Nobody { at: String },
    /// To something else.
    Other { at: String },
}

impl Proxy {
    /// Goes and looks.
    pub async fn named(inherited: &dyn Fn(&str) -> Option<String>) -> Self {
        let value = ["HTTPS_PROXY", "https_proxy"].iter().find_map(|name| inherited(name)).unwrap_or_default();
        let Some(at) = address(&value) else { return Proxy::Unset };
        match tokio::time::timeout(PATIENCE, is_sidecar(&at)).await {
            Ok(Ok(true)) => Proxy::Sidecar { at },
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => Proxy::Nobody { at },
            _ => Proxy::Other { at },
        }
    }

    /// What is to be said of it.
    pub fn finding(&self) -> Option<Finding> {
        let problem = |code, what: String, fix: &str| Some(Finding { code, problem: true, what, fix: fix.to_owned() });
        match self {
            Proxy::Sidecar { .. } => None,
            Proxy::Unset => problem("proxy_unset", "HTTPS_PROXY is not set".to_owned(), EVALUATE),
            Proxy::Nobody { at } => {
                let what = format!("HTTPS_PROXY leads to {at}, where nobody listens");
                problem("proxy_down", what, "start `sidebearer run`, or correct `listen`")
            }
            Proxy::Other { at } => {
                problem("proxy_other", format!("HTTPS_PROXY leads to {at}, which is no sidecar"), EVALUATE)
            }
        }
    }

    fn at(&self) -> Option<&str> {
        match self {
            Proxy::Sidecar { at } | Proxy::Nobody { at } => Some(at),
            Proxy::Unset | Proxy::Other { .. } => None,
        }
    }
}

/// Whether the variables bring the CA along.
pub(super) fn ca(inherited: &dyn Fn(&str) -> Option<String>) -> Option<Finding> {
    let named = inherited("SSL_CERT_FILE");
    let what = match named.as_deref() {
        None => "SSL_CERT_FILE is not set",
        Some(file) if !holds_our_ca(file) => "SSL_CERT_FILE names a file without the sidecar's CA",
        Some(_) => return None,
    };
    Some(Finding { code: "ca_unset", problem: true, what: what.to_owned(), fix: EVALUATE.to_owned() })
}

/// Of the bench's variables those that are set now and lead to the sidecar or its CA. The others stay as they are, set or not.
pub(super) fn exchanged(
    proxy: &Proxy,
    bench: &[Variable],
    inherited: &dyn Fn(&str) -> Option<String>,
) -> Vec<Variable> {
    let leads_there = |(name, value): &&Variable| {
        inherited(name).is_some_and(|own| match name.as_str() {
            "NO_PROXY" | "no_proxy" | "NODE_USE_ENV_PROXY" => false,
            "JAVA_TOOL_OPTIONS" => proxy.at().is_some_and(|at| java_leads_to(&own, at)),
            // As `exec` names the file that it has Node load.
            "NODE_OPTIONS" => own.contains("/sidebearer-") && own.contains("/node.cjs"),
            "WGETRC" => std::fs::read_to_string(&own).is_ok_and(|text| text.contains("ca_certificate")),
            _ if value.starts_with("http://") => address(&own).as_deref() == proxy.at() && proxy.at().is_some(),
            _ => holds_our_ca(&own),
        })
    };
    bench.iter().filter(leads_there).cloned().collect()
}

fn java_leads_to(options: &str, at: &str) -> bool {
    let port = at.rsplit(':').next().unwrap_or_default();
    let has = |option: &str| options.split_whitespace().any(|word| word.starts_with(option));
    has(&format!("-Dhttps.proxyPort={port}")) && has("-Djavax.net.ssl.trustStore=")
}

fn holds_our_ca(file: &str) -> bool {
    let certificates = std::fs::read(file).ok().and_then(|text| pem::parse_many(text).ok()).unwrap_or_default();
    let ours = |der: &[u8]| der.windows(ORGANIZATION.len()).any(|part| part == ORGANIZATION.as_bytes());
    certificates.iter().any(|certificate| ours(certificate.contents()))
}

/// The host and port of a proxy's URL, without its credentials.
fn address(value: &str) -> Option<String> {
    let value = value.trim();
    let url = if value.contains("://") { value.to_owned() } else { format!("http://{value}") };
    let url = url::Url::parse(&url).ok()?;
    Some(format!("{}:{}", url.host_str()?, url.port_or_known_default()?))
}

/// A sidecar says who it is, also to whoever takes it for a web server.
async fn is_sidecar(at: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(at).await?;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(8 << 10).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).to_ascii_lowercase();
    Ok(answer.lines().any(|line| line.starts_with("proxy-status: sidebearer")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(all: &[(&str, &str)]) -> Vec<Variable> {
        all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn only_what_leads_to_the_sidecar_is_exchanged_and_nothing_is_added() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) = (folder.path().join("ours.pem"), folder.path().join("theirs.pem"));
        let authority = crate::ca::Ca::generate(&[], std::time::SystemTime::now()).unwrap();
        std::fs::write(&ours, authority.roots_pem()).unwrap();
        std::fs::write(&theirs, "no certificate").unwrap();
        let java = "-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=3128 -Djavax.net.ssl.trustStore=/x";
        let present = set(&[
            ("HTTPS_PROXY", "http://ada:secret@127.0.0.1:3128"),
            ("ALL_PROXY", "http://corp:8080"),
            ("SSL_CERT_FILE", ours.to_str().unwrap()),
            ("CURL_CA_BUNDLE", theirs.to_str().unwrap()),
            ("NO_PROXY", "*"),
            ("JAVA_TOOL_OPTIONS", java),
        ]);
        let bench = set(&[
            ("HTTPS_PROXY", "http://127.0.0.1:9"),
            ("ALL_PROXY", "http://127.0.0.1:9"),
            ("HTTP_PROXY", "http://127.0.0.1:9"),
            ("SSL_CERT_FILE", "/bench.pem"),
            ("CURL_CA_BUNDLE", "/bench.pem"),
            ("NO_PROXY", "localhost"),
            ("JAVA_TOOL_OPTIONS", "bench"),
        ]);
        let inherited = |name: &str| present.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
        let sidecar = Proxy::Sidecar { at: "127.0.0.1:3128".into() };
        let expected = set(&[
            ("HTTPS_PROXY", "http://127.0.0.1:9"),
            ("SSL_CERT_FILE", "/bench.pem"),
            ("JAVA_TOOL_OPTIONS", "bench"),
        ]);
        assert_eq!(exchanged(&sidecar, &bench, &inherited), expected);
        assert_eq!(exchanged(&Proxy::Unset, &bench, &inherited), set(&[("SSL_CERT_FILE", "/bench.pem")]));
        assert_eq!(ca(&inherited), None);
        assert_eq!(ca(&|_| None).unwrap().what, "SSL_CERT_FILE is not set");
    }

    #[tokio::test]
    async fn a_place_where_nobody_listens_is_told_without_the_credentials_on_the_way() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let value = format!("http://ada:hunter2@{free}");
        let proxy = Proxy::named(&|name| (name == "https_proxy").then(|| value.clone())).await;
        assert_eq!(proxy, Proxy::Nobody { at: free.to_string() });
        let what = proxy.finding().unwrap().what;
        assert_eq!(what, format!("HTTPS_PROXY leads to {free}, where nobody listens"));
        assert_eq!(Proxy::named(&|_| None).await, Proxy::Unset);
    }
}
