//! The JSON API: lists connections, disconnects, and says how the sidecar fares. Another call, which starts a consent, is the consent's own.

use std::time::SystemTime;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde_json::{Value, json};

use super::{Admin, subject, told};
use crate::connections::Connection;
use crate::names::ProviderName;
use crate::store::StoreError;
use crate::tokens::Revocation;
use crate::web::{self, json_response, problem, written};

pub(super) fn router() -> Router<Admin> {
    Router::new()
        .route("/v1/connections", get(list))
        .route("/v1/connections/{provider}/{user}", delete(leave))
        .route("/v1/openapi.json", get(describe))
        .route("/readyz", get(ready))
        .route("/quit", post(quit))
}

/// Ready as long as it is not stopping: what keeps tokens from being renewed is told in the body, and stops no traffic.
async fn ready(State(admin): State<Admin>) -> Response {
    if admin.parts().drain.is_started() {
        return json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({ "status": "stopping" }));
    }
    let troubles = admin.parts().tokens.troubles().await;
    let status = if troubles.is_empty() { "ok" } else { "degraded" };
    let troubles = troubles.iter().map(|trouble| json!({ "code": trouble.code, "detail": trouble.detail }));
    json_response(StatusCode::OK, &json!({ "status": status, "troubles": troubles.collect::<Vec<_>>() }))
}

/// Begins the stop for a program of this machine: never for another one, and never for a browser, whoever uses it.
async fn quit(State(admin): State<Admin>, request: Request) -> Response {
    let Some(quit) = &admin.parts().quit else {
        return problem(StatusCode::NOT_FOUND, "not_found", "it is not to be asked for", "`quit: true` in proxy.yaml");
    };
    if !web::is_from_here(&request) {
        let detail = "only a program of the sidecar's own machine may ask for this";
        return problem(StatusCode::FORBIDDEN, "forbidden", detail, "send it SIGTERM");
    }
    if web::is_of_a_browser(request.headers()) {
        return problem(StatusCode::FORBIDDEN, "forbidden", "a page in a browser may not ask for this", "");
    }
    quit.ask();
    json_response(StatusCode::ACCEPTED, &json!({ "status": "stopping" }))
}

/// What a store that fails is answered with.
fn failed(error: &StoreError) -> Response {
    let status = match error {
        StoreError::Away { .. } | StoreError::Busy { .. } => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    problem(status, error.code(), &error.to_string(), &error.hint())
}

async fn describe() -> Response {
    ([(CONTENT_TYPE, "application/json")], include_str!("openapi.json")).into_response()
}

async fn list(State(admin): State<Admin>) -> Response {
    let now = admin.parts().clock.now().wall;
    match admin.connections().await {
        Ok(all) => {
            let all: Vec<Value> = all.iter().map(|connection| to_json(&admin, connection, now)).collect();
            json_response(StatusCode::OK, &json!({ "connections": all }))
        }
        Err(error) => failed(&error),
    }
}

fn to_json(admin: &Admin, connection: &Connection, now: SystemTime) -> Value {
    let links = &admin.parts().links;
    let user = connection.user().filter(|_| connection.by_consent);
    let connect_url = user.and_then(|user| links.for_user(&connection.provider, user, &[], now));
    json!({
        "provider": connection.provider.as_str(),
        "title": connection.title,
        "user": connection.user().map(|user| user.as_str()),
        "state": connection.state,
        "reason": connection.reason,
        "scopes": connection.scopes,
        "expires_at": connection.expires_at.and_then(written),
        "renewed_at": connection.renewed_at.and_then(written),
        "connect_url": connect_url.map(String::from),
    })
}

async fn leave(State(admin): State<Admin>, Path((provider, user)): Path<(String, String)>) -> Response {
    let none = || {
        problem(
            StatusCode::NOT_FOUND,
            "not_connected",
            "there is no such connection",
            "`GET /v1/connections` lists them",
        )
    };
    let (Ok(provider), Some(subject)) = (provider.parse::<ProviderName>(), subject(&user)) else { return none() };
    match admin.disconnect(&provider, &subject).await {
        Ok(None) => none(),
        Ok(Some(revocation)) => {
            let why = (revocation != Revocation::Done).then(|| told(&revocation, admin.provider(&provider)));
            let revoked = revocation == Revocation::Done;
            json_response(StatusCode::OK, &json!({ "disconnected": true, "revoked": revoked, "why": why }))
        }
        Err(error) => failed(&error),
    }
}
