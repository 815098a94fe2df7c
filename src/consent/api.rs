//! Starts a consent for a program: gives out the link at which a user connects.

use axum::body::Bytes;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::post;
use axum::{Router, middleware};
use serde::Deserialize;
use serde_json::json;

use super::{Consent, ConsentError};
use crate::links::Invitation;
use crate::web::{self, json_response, problem, written};

/// The path of a new consent. It needs the guard before it.
pub fn router(consent: Consent) -> Router {
    let path = Router::new().route("/v1/connections", post(begin)).with_state(consent);
    path.layer(middleware::from_fn(web::authorized_only))
}

/// Who is to be connected.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wish {
    provider: String,
    #[serde(default)]
    user: String,
    #[serde(default)]
    scopes: Vec<String>,
    return_to: Option<String>,
}

async fn begin(State(consent): State<Consent>, headers: HeaderMap, body: Bytes) -> Response {
    // A form of another site cannot be of this type without asking first, and is then refused.
    let content_type = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if content_type.split(';').next().map(str::trim) != Some("application/json") {
        let hint = "send it with `content-type: application/json`";
        return problem(StatusCode::UNSUPPORTED_MEDIA_TYPE, "not_json", "the body is not JSON", hint);
    }
    let wish: Wish = match serde_json::from_slice(&body) {
        Ok(wish) => wish,
        Err(error) => {
            let hint = "`/v1/openapi.json` says what it has to be";
            return problem(StatusCode::BAD_REQUEST, "bad_request", &format!("the body cannot be read: {error}"), hint);
        }
    };
    let invitation = Invitation { user: wish.user, scopes: wish.scopes, return_to: wish.return_to };
    match link(&consent, &wish.provider, &invitation).await {
        Ok(body) => json_response(StatusCode::CREATED, &body),
        Err(error) => problem(error.status(), error.code(), &error.to_string(), &error.hint()),
    }
}

/// Checked before the link is given out: its user could mend nothing.
async fn link(consent: &Consent, provider: &str, invitation: &Invitation) -> Result<serde_json::Value, ConsentError> {
    let plan = consent.plan(provider, invitation).await?;
    let now = consent.inner.parts.clock.now().wall;
    let (url, ends) = consent.inner.parts.links.connect(&plan.provider.name, invitation, now)?;
    Ok(json!({ "connect_url": url.as_str(), "expires_at": ends.and_then(written) }))
}
