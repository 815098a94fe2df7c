//! Builds authorization requests and reads what a browser brings back (RFC 6749 section 4.1, RFC 7636, RFC 9207).

use std::collections::HashMap;

use url::Url;

use super::{Provider, pkce};
use crate::secret::Secret;

/// What makes one authorization request different from the next.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Where the browser is sent back to, to the letter.
    pub redirect_uri: &'a str,
    /// The scopes that are asked for.
    pub scopes: &'a [String],
    /// What only the browser that began may bring back.
    pub state: &'a Secret,
    /// What redeems the code.
    pub verifier: &'a Secret,
}

/// The address that a browser is sent to. It holds the state, so it is for that browser only.
pub fn url(provider: &Provider, authorization_endpoint: &Url, request: &Request<'_>) -> Url {
    let quirks = &provider.quirks;
    let scope = request.scopes.join(&quirks.scope_separator);
    let mut url = authorization_endpoint.clone();
    // An endpoint's own query is kept (RFC 6749 section 3.1).
    let mut query = url.query_pairs_mut();
    query.append_pair("response_type", "code");
    query.append_pair("client_id", &provider.client_id);
    query.append_pair("redirect_uri", request.redirect_uri);
    if !scope.is_empty() {
        query.append_pair(&quirks.scope_parameter, &scope);
    }
    query.append_pair("state", request.state.expose());
    query.append_pair("code_challenge", &pkce::challenge(request.verifier));
    query.append_pair("code_challenge_method", pkce::METHOD);
    if let Some(audience) = &provider.target.audience {
        query.append_pair("audience", audience);
    }
    for resource in &provider.target.resource {
        query.append_pair("resource", resource);
    }
    for (name, value) in &provider.consent.params {
        query.append_pair(name, value);
    }
    drop(query);
    url
}

/// The parameters that requests of ours set by themselves.
pub const OUR_PARAMETERS: [&str; 10] = [
    "response_type",
    "client_id",
    "redirect_uri",
    "scope",
    "state",
    "code_challenge",
    "code_challenge_method",
    "resource",
    "request",
    "request_uri",
];

/// What a browser brought back to the redirect URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Which request it answers.
    pub state: Secret,
    /// Who says that it answers (RFC 9207 section 2).
    pub iss: Option<String>,
    /// What it brings.
    pub outcome: Outcome,
}

/// What an authorization response brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A code to be redeemed once.
    Code(Secret),
    /// Why there is none (RFC 6749 section 4.1.2.1).
    Refused {
        /// The provider's code, or ours for an answer that is none.
        error: String,
        /// Its own words, as it gave them: for people, and not to be trusted.
        description: Option<String>,
    },
}

/// Reads the query of a callback; nothing when it has no single `state`, so that it answers no request of ours.
pub fn read(query: &str) -> Option<Response> {
    let mut fields: HashMap<String, String> = HashMap::new();
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        // A parameter must not come twice (RFC 6749 section 3.1): two readers would see two answers.
        if fields.insert(name.into_owned(), value.into_owned()).is_some() {
            return None;
        }
    }
    let mut take = |name| fields.remove(name).filter(|value| !value.is_empty());
    let state = Secret::new(take("state")?);
    let iss = take("iss");
    let outcome = match (take("code"), take("error")) {
        (_, Some(error)) => Outcome::Refused {
            error: plain(&error, 64),
            description: take("error_description").map(|d| plain(&d, 500)),
        },
        (Some(code), None) => Outcome::Code(Secret::new(code)),
        (None, None) => Outcome::Refused { error: "no_code".into(), description: None },
    };
    Some(Response { state, iss, outcome })
}

/// Text from outside, without what would steer a terminal or turn a line around, and not longer than people read.
fn plain(text: &str, most: usize) -> String {
    let steers = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if steers(c) { ' ' } else { c }).take(most).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Grant;
    use super::*;

    fn provider() -> Provider {
        Provider::new("acme".parse().unwrap(), "id 1", Grant::AuthorizationCode)
    }

    fn sent(provider: &Provider, scopes: &[&str]) -> String {
        let scopes: Vec<String> = scopes.iter().map(|scope| (*scope).to_owned()).collect();
        let request = Request {
            redirect_uri: "http://127.0.0.1:3129/callback/acme",
            scopes: &scopes,
            state: &Secret::new("st"),
            verifier: &Secret::new("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
        };
        url(provider, &"https://acme.test/authorize?tenant=1".parse().unwrap(), &request).to_string()
    }

    #[test]
    fn a_request_names_the_client_the_scopes_and_the_challenge() {
        assert_eq!(
            sent(&provider(), &["a", "b:c"]),
            "https://acme.test/authorize?tenant=1&response_type=code&client_id=id+1\
             &redirect_uri=http%3A%2F%2F127.0.0.1%3A3129%2Fcallback%2Facme&scope=a+b%3Ac&state=st\
             &code_challenge=E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM&code_challenge_method=S256"
        );
    }

    #[test]
    fn a_providers_own_ways_are_followed() {
        let mut acme = provider();
        acme.quirks.scope_separator = ",".into();
        acme.quirks.scope_parameter = "user_scope".into();
        acme.target.audience = Some("api.acme.test".into());
        acme.target.resource = vec!["https://api.acme.test/".into()];
        acme.consent.params = vec![("prompt".into(), "consent".into())];
        let url = sent(&acme, &["a", "b"]);
        assert!(url.contains("&user_scope=a%2Cb&"), "{url}");
        let end = "&audience=api.acme.test&resource=https%3A%2F%2Fapi.acme.test%2F&prompt=consent";
        assert!(url.ends_with(end), "{url}");
        assert!(!sent(&provider(), &[]).contains("scope"));
    }

    #[test]
    fn a_response_is_read_or_refused_whole() {
        // OAU-001, OAU-003
        let code = |query| match read(query).map(|response| response.outcome) {
            Some(Outcome::Code(code)) => code.expose().to_owned(),
            other => format!("{other:?}"),
        };
        assert_eq!(code("code=c%2F1&state=s"), "c/1");
        assert_eq!(read("code=c&state=s&iss=https%3A%2F%2Fas.test").unwrap().iss.unwrap(), "https://as.test");
        for none in ["", "code=c", "code=c&state=", "state=s&state=t&code=c", "code=c&code=d&state=s"] {
            assert_eq!(read(none), None, "{none}");
        }
        // An error beside a code: the error counts.
        let refused = |error: &str, description: Option<&str>| {
            Some(Outcome::Refused { error: error.into(), description: description.map(str::to_owned) })
        };
        let outcome = |query| read(query).map(|response| response.outcome);
        assert_eq!(outcome("error=access_denied&code=c&state=s"), refused("access_denied", None));
        assert_eq!(outcome("state=s"), refused("no_code", None));
        let steering = "error=x%1b%5B31m&error_description=%3Cb%3E%0d%0a%E2%80%AEevil&state=s";
        assert_eq!(outcome(steering), refused("x [31m", Some("<b>   evil")));
        let long = format!("state=s&error={}", "x".repeat(10_000));
        assert_eq!(outcome(&long), refused(&"x".repeat(64), None));
    }

    #[test]
    fn what_is_printed_of_a_response_holds_neither_code_nor_state() {
        // LEK-003
        let shown = format!("{:?}", read("code=canary&state=canary"));
        assert!(!shown.contains("canary"), "{shown}");
    }
}
