//! The variables that bring an agent's clients under the proxy, as measured client by client.

mod files;
mod nss;

use std::net::SocketAddr;
use std::path::Path;

use url::Url;

use crate::ca::files::{CaFiles, TRUSTSTORE_PASSWORD};
use crate::config::{self, Settings};
use crate::listen::Place;
use crate::oauth::Provider;
use crate::routes::{Action, Routes};
use crate::secret::{PLACEHOLDER, Secret};

pub use self::files::files;
pub use self::nss::{NssError, trust};

/// Where clients look for a proxy. With a scheme: several of them refuse `host:port`.
const PROXY: [&str; 6] = ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
/// Variables whose file takes the place of a client's roots.
const REPLACING: [&str; 12] = [
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "PIP_CERT",
    "npm_config_cafile",
    "CARGO_HTTP_CAINFO",
    "AWS_CA_BUNDLE",
    "HTTPLIB2_CA_CERTS",
    "CODEX_CA_CERTIFICATE",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "NIX_SSL_CERT_FILE",
];
/// Variables whose file is added to them.
const ADDING: [&str; 2] = ["NODE_EXTRA_CA_CERTS", "DENO_CERT"];
const NO_PROXY: [&str; 2] = ["NO_PROXY", "no_proxy"];
const LOOPBACK: &str = "localhost,127.0.0.1,::1";
/// A variable and its value.
pub type Variable = (String, String);

/// The variables for an agent; `inherited` looks up what it has now.
pub fn variables(proxy: SocketAddr, files: &CaFiles, inherited: &dyn Fn(&str) -> Option<String>) -> Vec<Variable> {
    let mut all = Vec::new();
    let mut set = |names: &[&str], value: &str| {
        all.extend(names.iter().map(|name| ((*name).to_owned(), value.to_owned())));
    };
    set(&PROXY, &format!("http://{proxy}"));
    set(&NO_PROXY, &no_proxy(inherited));
    set(&REPLACING, &text(&files.bundle));
    set(&ADDING, &text(&files.ca));
    set(&["NODE_USE_ENV_PROXY"], "1");
    set(&["JAVA_TOOL_OPTIONS"], &java(proxy, files, inherited));
    all
}

/// Placeholders for keys that programs insist on, where the agent has none of its own and the host is routed.
pub fn placeholders(settings: &Settings, inherited: &dyn Fn(&str) -> Option<String>) -> Vec<Variable> {
    let routed = |provider: &Provider| {
        let action = Action::Authenticate(provider.name.clone());
        settings.routes.iter().any(|route| route.action == action)
    };
    let of_providers = settings.providers.iter().filter(|provider| routed(provider));
    let mut names: Vec<String> = of_providers.flat_map(|provider| provider.placeholders.iter().cloned()).collect();
    names.extend(config::placeholders(&Routes::new(settings.routes.iter().cloned())));
    names.sort();
    names.dedup();
    names.retain(|name| inherited(name).is_none());
    names.into_iter().map(|name| (name, PLACEHOLDER.to_owned())).collect()
}

/// Has the variables name an agent and its user, percent-encoded, where a client takes credentials from a proxy's URL.
pub fn name(variables: &mut [Variable], proxy: SocketAddr, user: &str, secret: &Secret) {
    let Ok(mut url) = Url::parse(&format!("http://{proxy}")) else { return };
    // Neither fails for a URL that has a host.
    let _ = url.set_username(user);
    let _ = url.set_password(Some(secret.expose()));
    let url = url.as_str().trim_end_matches('/');
    for (_, value) in variables.iter_mut().filter(|(name, _)| PROXY.contains(&name.as_str())) {
        url.clone_into(value);
    }
}

/// The variables as an operator copies them: from nobody's environment, and with a secret to be filled in where agents
/// have them.
pub fn shown(settings: &Settings, places: &[Place], files: &CaFiles) -> Vec<Variable> {
    let Some(proxy) = places.iter().find_map(Place::address) else { return Vec::new() };
    let mut all = variables(proxy, files, &|_| None);
    if !settings.agents.is_empty() {
        name(&mut all, proxy, "USER", &Secret::new("SECRET"));
    }
    all
}

fn no_proxy(inherited: &dyn Fn(&str) -> Option<String>) -> String {
    let own = NO_PROXY.iter().filter_map(|name| inherited(name)).find(|value| !value.trim().is_empty());
    // `*` would keep every client from the proxy.
    let own =
        own.map(|value| value.split(',').map(str::trim).filter(|host| *host != "*").collect::<Vec<_>>().join(","));
    match own.filter(|value| !value.is_empty()) {
        Some(own) => format!("{own},{LOOPBACK}"),
        None => LOOPBACK.to_owned(),
    }
}

fn java(proxy: SocketAddr, files: &CaFiles, inherited: &dyn Fn(&str) -> Option<String>) -> String {
    let (host, port) = (proxy.ip(), proxy.port());
    let own = format!(
        "-Dhttps.proxyHost={host} -Dhttps.proxyPort={port} -Dhttp.proxyHost={host} -Dhttp.proxyPort={port} \
         -Dhttp.nonProxyHosts=localhost|127.*|[::1] -Djavax.net.ssl.trustStore={} \
         -Djavax.net.ssl.trustStoreType=PKCS12 -Djavax.net.ssl.trustStorePassword={TRUSTSTORE_PASSWORD}",
        text(&files.truststore)
    );
    match inherited("JAVA_TOOL_OPTIONS").filter(|value| !value.trim().is_empty()) {
        Some(inherited) => format!("{inherited} {own}"),
        None => own,
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(all: &[Variable], name: &str) -> String {
        all.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone()).unwrap_or_default()
    }

    #[test]
    fn an_agents_own_exceptions_stay_but_not_the_one_for_everything() {
        let files = CaFiles::within(Path::new("/ca"));
        let proxy = "127.0.0.1:3128".parse().unwrap();
        let all = variables(proxy, &files, &|name| (name == "no_proxy").then(|| "*, internal.example".into()));
        assert_eq!(value(&all, "NO_PROXY"), "internal.example,localhost,127.0.0.1,::1");
        assert_eq!(value(&all, "https_proxy"), "http://127.0.0.1:3128");
        assert_eq!(value(&all, "SSL_CERT_FILE"), "/ca/bundle.pem");
        assert_eq!(value(&all, "NODE_EXTRA_CA_CERTS"), "/ca/ca.pem");
    }

    #[test]
    fn credentials_stay_what_they_are_in_a_url() {
        let proxy = "127.0.0.1:3128".parse().unwrap();
        let mut all = variables(proxy, &CaFiles::within(Path::new("/ca")), &|_| None);
        name(&mut all, proxy, "a@b.test/é", &Secret::new("p:w@x"));
        assert_eq!(value(&all, "HTTPS_PROXY"), "http://a%40b.test%2F%C3%A9:p%3Aw%40x@127.0.0.1:3128");
        assert!(!value(&all, "JAVA_TOOL_OPTIONS").contains("p%3Aw"));
    }
}
