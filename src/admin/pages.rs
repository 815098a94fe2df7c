//! The dashboard: plain HTML from the server, and a live list for browsers with scripts.

use std::time::SystemTime;

use askama::Template;
use axum::Router;
use axum::extract::{Form, Query, State};
use axum::http::header::{CONTENT_TYPE, LOCATION};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use time::OffsetDateTime;
use url::form_urlencoded::Serializer;

use super::live::Moment;
use super::{Admin, subject, told};
use crate::connections::{Connection, spoken};
use crate::listen::Place;
use crate::names::{ProviderName, Subject, UserName};
use crate::oauth::Grant;
use crate::tokens::Revocation;
use crate::web::{self, Browser};

pub(super) fn router() -> Router<Admin> {
    Router::new()
        .route("/", get(dashboard))
        .route("/disconnect", post(disconnect))
        .route("/events", get(events))
        .route("/live.js", get(script))
}

#[derive(Template)]
#[template(path = "dashboard.html", config = "src/pages/askama.toml")]
struct Dashboard {
    csrf: String,
    version: &'static str,
    proxy: String,
    rows: Vec<Row>,
    choices: Vec<Choice>,
    waiting: Vec<Waiting>,
    recent: Vec<Moment>,
    variables: Vec<Variable>,
    notice: Option<String>,
}

struct Row {
    provider: String,
    title: String,
    user: String,
    state: &'static str,
    words: String,
    reason: Option<String>,
    expires: Option<String>,
    renewed: Option<String>,
    scopes: Vec<String>,
    todo: String,
    connect: Option<String>,
    connect_label: &'static str,
    can_disconnect: bool,
}

struct Choice {
    name: String,
    title: String,
}

/// A request that is held until its user has connected.
struct Waiting {
    title: String,
    user: String,
    url: String,
    since: String,
}

struct Variable {
    name: String,
    value: String,
}

#[derive(Deserialize)]
struct Arrival {
    left: Option<String>,
    how: Option<String>,
}

async fn dashboard(State(admin): State<Admin>, Query(arrival): Query<Arrival>, headers: HeaderMap) -> Response {
    let (connections, browser) = match (admin.connections().await, Browser::of(&headers, admin.parts().links.base())) {
        (Ok(connections), Ok(browser)) => (connections, browser),
        (Err(error), _) => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            return web::refusal(status, "The store cannot be read", &error.to_string(), &error.hint());
        }
        (_, Err(error)) => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            return web::refusal(status, "The machine has no randomness", &error.to_string(), "");
        }
    };
    let now = admin.parts().clock.now().wall;
    let choices = admin.parts().providers.iter().filter(|provider| provider.grant == Grant::AuthorizationCode);
    let page = Dashboard {
        csrf: browser.csrf(),
        version: env!("CARGO_PKG_VERSION"),
        proxy: admin.parts().proxies.iter().map(Place::to_string).collect::<Vec<_>>().join(", "),
        rows: connections.iter().map(|connection| Row::of(connection, now)).collect(),
        choices: choices.map(|p| Choice { name: p.name.to_string(), title: p.title.clone() }).collect(),
        waiting: waiting(&admin, now),
        recent: admin.inner.live.recent(),
        variables: variables(&admin),
        notice: arrival.left.zip(arrival.how).and_then(|(who, how)| notice(&who, &how)),
    };
    let mut response = web::page(StatusCode::OK, &page);
    browser.remember(&mut response, admin.parts().links.base());
    response
}

impl Row {
    fn of(connection: &Connection, now: SystemTime) -> Self {
        let expires = connection.expires_in(now).map(|left| match left.is_zero() {
            true => "expired".to_owned(),
            false => format!("in {}", spoken(left)),
        });
        // Whoever sees the dashboard may invite: the link needs no ticket, and is short.
        let link = |user: &UserName| {
            let query = Serializer::new(String::new()).append_pair("user", user.as_str()).finish();
            format!("/connect/{}?{query}", connection.provider)
        };
        let connect = connection.user().filter(|_| connection.by_consent).map(link);
        let is_stored = connection.generation.is_some() || connection.state.starts_with("store_");
        // What the page has a button for needs no words.
        let todo = if connection.by_consent && connection.state != "fix_configuration" { "" } else { &connection.todo };
        Self {
            provider: connection.provider.to_string(),
            title: connection.title.clone(),
            user: connection.subject.to_string(),
            state: if connection.state.starts_with("store_") { "unreadable" } else { connection.state },
            words: words(connection.state).to_owned(),
            reason: connection.reason.clone(),
            expires,
            renewed: connection.renewed_ago(now).map(|ago| format!("{} ago", spoken(ago))),
            scopes: connection.scopes.clone(),
            todo: todo.replace('`', ""),
            connect,
            connect_label: if is_stored { "Reconnect" } else { "Connect" },
            can_disconnect: is_stored && connection.user().is_some(),
        }
    }
}

fn words(state: &str) -> &str {
    match state {
        "connected" => "connected",
        "not_connected" => "not connected",
        "reauthorize" => "has to be granted again",
        "fix_configuration" => "configuration to be corrected",
        "on_demand" => "fetched when needed",
        _ => "does not open",
    }
}

/// Those who keep a request waiting.
fn waiting(admin: &Admin, now: SystemTime) -> Vec<Waiting> {
    let parts = admin.parts();
    let waits = parts.tokens.waiting().into_iter().filter_map(|(key, since)| {
        let provider = parts.tokens.provider(&key)?;
        let Subject::User(user) = &key.subject else { return None };
        Some(Waiting {
            title: provider.title.clone(),
            user: user.to_string(),
            url: parts.links.for_user(&provider.name, user, &[], now)?.to_string(),
            since: time_of_day(now - since.elapsed()),
        })
    });
    waits.collect()
}

/// The ones that an operator copies. Where agents have names, the secret is theirs to fill in.
fn variables(admin: &Admin) -> Vec<Variable> {
    let quoted = |value: &str| value.replace('\'', r"'\''");
    let all = admin.parts().variables.iter();
    all.map(|(name, value)| Variable { name: name.clone(), value: quoted(value) }).collect()
}

/// What the dashboard says after a disconnect. Nothing of the address is repeated that could be anything else.
fn notice(provider: &str, how: &str) -> Option<String> {
    let provider: ProviderName = provider.parse().ok()?;
    match how {
        "revoked" => Some(format!("Disconnected {provider}, and revoked at the provider.")),
        "not_offered" => Some(format!("Disconnected {provider}. The provider offers no way to revoke it from here.")),
        "failed" => Some(format!("Disconnected {provider} here, but it could not be revoked at the provider.")),
        "none" => Some(format!("There was nothing to disconnect at {provider}.")),
        _ => None,
    }
}

#[derive(Deserialize)]
struct Leaving {
    provider: String,
    user: String,
    csrf: String,
}

async fn disconnect(State(admin): State<Admin>, headers: HeaderMap, Form(form): Form<Leaving>) -> Response {
    if !Browser::known(&headers, admin.parts().links.base()).is_some_and(|browser| browser.sent(&form.csrf)) {
        let said = "The form did not come from a page that this browser got here.";
        return web::refusal(StatusCode::FORBIDDEN, "Nothing was changed", said, "Open the dashboard again.");
    }
    let (Ok(provider), Some(subject)) = (form.provider.parse::<ProviderName>(), subject(&form.user)) else {
        return web::refusal(StatusCode::BAD_REQUEST, "Nothing was changed", "There is no such connection.", "");
    };
    let how = match admin.disconnect(&provider, &subject).await {
        Ok(None) => "none",
        Ok(Some(revocation)) => {
            tracing::info!(%provider, %subject, how = told(&revocation, admin.provider(&provider)), "disconnected by hand");
            match revocation {
                Revocation::Done => "revoked",
                Revocation::NotOffered => "not_offered",
                Revocation::Failed(_) => "failed",
            }
        }
        Err(error) => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            return web::refusal(status, "Nothing was changed", &error.to_string(), &error.hint());
        }
    };
    let to = HeaderValue::try_from(format!("/?left={provider}&how={how}")).unwrap_or(HeaderValue::from_static("/"));
    (StatusCode::SEE_OTHER, [(LOCATION, to)]).into_response()
}

async fn events(State(admin): State<Admin>) -> Response {
    ([(CONTENT_TYPE, "text/event-stream")], web::streamed(admin.inner.live.stream())).into_response()
}

async fn script() -> Response {
    ([(CONTENT_TYPE, "text/javascript; charset=utf-8")], include_str!("../pages/live.js")).into_response()
}

fn time_of_day(time: SystemTime) -> String {
    let (hour, minute, second) = OffsetDateTime::from(time).to_hms();
    format!("{hour:02}:{minute:02}:{second:02} UTC")
}
