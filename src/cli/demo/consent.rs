//! The demo's page where a user consents, and the codes and refresh tokens that come of it (RFC 6749, RFC 7636).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, LOCATION};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use url::Url;

use super::servers::random;
use crate::oauth::pkce;
use crate::secret::Secret;

/// What was given out and not taken back.
#[derive(Default)]
pub(super) struct Consents {
    codes: Mutex<HashMap<String, Code>>,
    refresh_tokens: Mutex<Vec<String>>,
}

struct Code {
    challenge: String,
    redirect_uri: String,
}

/// The page: what is asked for, by whom, yes or no.
pub(super) fn ask(query: &str) -> Response<Full<Bytes>> {
    let fields: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let field = |name: &str| fields.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value.as_str());
    let scopes: String = field("scope").split(' ').map(|scope| format!("<li>{}</li>", escaped(scope))).collect();
    let hidden: String = ["state", "redirect_uri", "code_challenge"]
        .iter()
        .map(|name| format!("<input type=hidden name={name} value=\"{}\">", escaped(field(name))))
        .collect();
    let html = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">
<title>Demo Calendar</title>
<style>:root{{color-scheme:light dark;font:18px/1.5 system-ui}}body{{max-width:26rem;margin:4rem auto;padding:0 1rem}}
button{{font:inherit;padding:.5rem 1.2rem;margin-right:.5rem}}</style>
<h1>Demo Calendar</h1>
<p>This is the provider's own page, as GitHub or Google would show it. <b>{}</b> asks to:</p><ul>{scopes}</ul>
<form method=post action=/authorize>{hidden}<button name=answer value=yes>Allow</button>
<button name=answer value=no>Deny</button></form></html>",
        escaped(field("client_id")),
    );
    let mut page = Response::new(Full::from(html));
    page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    page
}

impl Consents {
    /// Sends the browser back, with a code if the user said yes.
    pub(super) fn decide(&self, form: &HashMap<String, String>, issuer: &str) -> Response<Full<Bytes>> {
        let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
        let back = Url::parse(field("redirect_uri")).ok().filter(|url| url.host_str() == Some("127.0.0.1"));
        let (Some(mut back), Ok(code)) = (back, random()) else { return refused() };
        let mut query = back.query_pairs_mut();
        query.append_pair("state", field("state")).append_pair("iss", issuer);
        if field("answer") == "yes" {
            query.append_pair("code", &code);
            let challenge = field("code_challenge").to_owned();
            lock(&self.codes).insert(code, Code { challenge, redirect_uri: field("redirect_uri").to_owned() });
        } else {
            query.append_pair("error", "access_denied").append_pair("error_description", "You said no.");
        }
        drop(query);
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SEE_OTHER;
        response.headers_mut().extend(HeaderValue::try_from(back.as_str()).map(|back| (LOCATION, back)));
        response
    }

    /// A refresh token for a code or for the one before it, each good once.
    pub(super) fn redeem(&self, form: &HashMap<String, String>) -> Option<String> {
        let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
        let mut refresh_tokens = lock(&self.refresh_tokens);
        if field("grant_type") == "authorization_code" {
            let code = lock(&self.codes).remove(field("code"))?;
            let verifier = Secret::new(field("code_verifier"));
            if code.redirect_uri != field("redirect_uri") || code.challenge != pkce::challenge(&verifier) {
                return None;
            }
        } else {
            let place = refresh_tokens.iter().position(|known| known == field("refresh_token"))?;
            refresh_tokens.swap_remove(place);
        }
        let next = random().ok()?;
        refresh_tokens.push(next.clone());
        Some(next)
    }

    /// Takes a refresh token back.
    pub(super) fn forget(&self, token: &str) {
        lock(&self.refresh_tokens).retain(|known| known != token);
    }
}

fn refused() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from("This request is not one of the demo's.\n"));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    response
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
