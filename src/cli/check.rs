//! `sidebearer check`: whether proxy.yaml is right, and what it means for one call.

use std::path::Path;
use std::time::SystemTime;

use http::Method;
use serde_json::json;
use url::Url;

use super::CliError;
use super::status::words;
use crate::app;
use crate::config::{self, Settings};
use crate::connections::Connection;
use crate::host::Authority;
use crate::names::{Subject, UserName};
use crate::oauth::{Grant, Provider};
use crate::routes::{Action, Route, Routes, Unmatched};

/// A call that somebody asks about.
pub(super) struct Call {
    pub(super) url: String,
    pub(super) method: Method,
    pub(super) user: UserName,
}

/// Says that the file is right, and what it grants to which host. Mistakes have been told by then.
pub(super) fn file(path: &Path, settings: &Settings) -> Result<u8, CliError> {
    for warning in &settings.warnings {
        anstream::eprintln!("warning: {warning}");
    }
    anstream::println!(
        "{}: {} providers, {} routes, no mistakes",
        path.display(),
        settings.providers.len(),
        settings.routes.len()
    );
    for route in &settings.routes {
        let grants = match &route.action {
            Action::Deny => "denied".to_owned(),
            Action::Authenticate(name) => match settings.providers.iter().find(|provider| provider.name == *name) {
                Some(provider) => format!("{name} {:?}", provider.target.scopes),
                None => name.to_string(),
            },
        };
        anstream::println!("  {}:{}{}  ->  {grants}", route.host, route.port, narrowed(route));
    }
    Ok(0)
}

/// Lists the providers that are known by name.
pub(super) fn presets(as_json: bool) -> Result<u8, CliError> {
    let presets = config::presets();
    if as_json {
        let all: Vec<_> = presets
            .iter()
            .map(|p| {
                json!({ "name": p.name, "title": p.title, "hosts": p.hosts, "device": p.device,
                    "revocation": p.revocation, "variables": p.needs, "placeholders": p.placeholders })
            })
            .collect();
        anstream::println!("{:#}", serde_json::Value::Array(all));
        return Ok(0);
    }
    let width = presets.iter().map(|preset| preset.name.len()).max().unwrap_or(0);
    for preset in &presets {
        let mut notes = Vec::new();
        notes.extend(preset.device.then(|| "device flow".to_owned()));
        notes.extend(preset.revocation.then(|| "revocation".to_owned()));
        notes.extend((!preset.needs.is_empty()).then(|| format!("needs variables: {}", preset.needs.join(", "))));
        let notes = if notes.is_empty() { String::new() } else { format!("  ({})", notes.join("; ")) };
        anstream::println!("{:width$}  {}{notes}", preset.name, preset.hosts.join(", "));
    }
    Ok(0)
}

/// Says which route a call takes, which credential it gets, and why.
pub(super) async fn call(settings: &Settings, call: &Call, as_json: bool) -> Result<u8, CliError> {
    let verdict = judge(settings, call).await?;
    if as_json {
        let fields: serde_json::Map<_, _> =
            verdict.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        anstream::println!("{:#}", serde_json::Value::Object(fields));
        return Ok(0);
    }
    anstream::println!("{} {}", call.method, call.url);
    for (name, value) in verdict {
        anstream::println!("  {name:<11} {value}");
    }
    Ok(0)
}

type Verdict = Vec<(&'static str, String)>;

async fn judge(settings: &Settings, call: &Call) -> Result<Verdict, CliError> {
    let bad = |what: String| CliError::failed(what, "write it as `https://api.example.com/path`");
    let url = Url::parse(&call.url).map_err(|error| bad(format!("`{}` is not a URL: {error}", call.url)))?;
    let plaintext = match url.scheme() {
        "https" => false,
        "http" => true,
        other => return Err(bad(format!("`{other}` is not `https` or `http`"))),
    };
    let host = url.host_str().unwrap_or_default().parse().map_err(|error| bad(format!("`{}`: {error}", call.url)))?;
    let authority = Authority::new(host, url.port_or_known_default().unwrap_or(443));

    let routes = Routes::new(settings.routes.iter().cloned());
    if plaintext && routes.names(&authority.host) && !routes.plaintext(&authority) {
        let why = "the host is routed with TLS; call it with `https://`, or set `plaintext: true` on its route";
        return Ok(vec![("route", "none".into()), ("outcome", "refused".into()), ("why", why.into())]);
    }
    match routes.find(&authority, &call.method, written_path(&call.url)) {
        Err(ambiguous) => {
            Ok(vec![("route", "none".into()), ("outcome", "refused".into()), ("why", ambiguous.to_string())])
        }
        Ok(None) => Ok(unrouted(settings, &routes, &authority)),
        Ok(Some(route)) => routed(settings, route, call).await,
    }
}

fn unrouted(settings: &Settings, routes: &Routes, authority: &Authority) -> Verdict {
    let nearby = if routes.claims(authority) {
        format!("routes name {authority}, but none of them this path and method")
    } else if routes.names(&authority.host) {
        format!("routes name {}, but not port {}", authority.host, authority.port)
    } else {
        format!("no route names {}", authority.host)
    };
    let outcome = match settings.unmatched {
        Unmatched::Deny => "refused",
        Unmatched::Tunnel => "passed on without a token",
    };
    vec![("route", "none".into()), ("outcome", outcome.into()), ("why", nearby)]
}

async fn routed(settings: &Settings, route: &Route, call: &Call) -> Result<Verdict, CliError> {
    let mut verdict = vec![("route", route.name.to_string())];
    let name = match &route.action {
        Action::Authenticate(name) => name,
        Action::Deny => {
            verdict.extend([("outcome", "refused".into()), ("why", "the route says `deny: true`".into())]);
            return Ok(verdict);
        }
    };
    let Some(provider) = settings.providers.iter().find(|provider| provider.name == *name) else {
        return Ok(verdict);
    };
    let subject = match provider.grant {
        Grant::ClientCredentials => Subject::Client,
        Grant::RefreshToken | Grant::AuthorizationCode => Subject::User(call.user.clone()),
    };
    verdict.push(("outcome", "sent with a bearer token".into()));
    verdict.push(("credential", credential(provider, &subject)));
    verdict.push(("why", format!("it is the most specific route for the host{}", narrowed(route))));
    verdict.push(("grant", grant(settings, provider, subject, &call.user).await?));
    Ok(verdict)
}

fn credential(provider: &Provider, subject: &Subject) -> String {
    let from = match (&provider.endpoints.token, &provider.endpoints.issuer) {
        (Some(url), _) => url.to_string(),
        (None, Some(issuer)) => format!("the token endpoint of {}", issuer.name),
        (None, None) => "nowhere".to_owned(),
    };
    match subject {
        Subject::Client => format!("{}: the client's own, by client credentials from {from}", provider.name),
        Subject::User(user) => format!("{}: that of `{user}`, from {from}", provider.name),
    }
}

/// What the store holds for it. No store yet is no mistake here.
async fn grant(
    settings: &Settings,
    provider: &Provider,
    subject: Subject,
    user: &UserName,
) -> Result<String, CliError> {
    let now = SystemTime::now();
    let Ok(store) = app::open_store(settings, false).await else {
        return Ok(words(&Connection::without_grant(provider, user), now));
    };
    Ok(match store.grant(&provider.name, &subject).await? {
        Some(row) => words(&Connection::of(Some(provider), provider.name.clone(), subject, Ok(row)), now),
        None => words(&Connection::without_grant(provider, user), now),
    })
}

fn narrowed(route: &Route) -> String {
    let mut words = String::new();
    if !route.paths.is_empty() {
        words.push_str(&format!(" {:?}", route.paths));
    }
    if !route.methods.is_empty() {
        words.push_str(&format!(" {:?}", route.methods));
    }
    words
}

/// The path as it was written: the URL parser would already have resolved its dot segments.
fn written_path(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let path = rest.find('/').map_or("/", |at| &rest[at..]);
    path.split(['?', '#']).next().unwrap_or("/")
}
