//! The authorization server: issues tokens, rotates refresh tokens, forgets them when told to (RFC 6749, RFC 7009); and
//! what its user says in the browser (RFC 7636, RFC 9207).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use serde_json::json;
use sha2::{Digest, Sha256};
use url::Url;

use super::Form;
use super::answer::{Answer, answer};
use super::log::CANARY;
use super::server::Seen;

pub const CLIENT_ID: &str = "agent";

/// What it has issued. A clone shares it.
#[derive(Clone)]
pub struct Issued {
    world: usize,
    lifetime: Option<u64>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    access: HashSet<String>,
    refresh: HashSet<String>,
    count: usize,
    repeat: Option<String>,
    /// What each code was asked for with; a code is good once.
    codes: HashMap<String, Asked>,
    /// Whose a token is, where that is known.
    owners: HashMap<String, String>,
    device_is_approved: bool,
}

/// An authorization request.
struct Asked {
    challenge: String,
    redirect_uri: String,
}

impl Issued {
    pub fn new(world: usize, lifetime: Option<u64>) -> Self {
        Self { world, lifetime, state: Arc::default() }
    }

    /// The access token of this number, from 1.
    pub fn access(&self, number: usize) -> String {
        format!("{CANARY}access-{}-{number}", self.world)
    }

    pub fn refresh(&self, number: usize) -> String {
        format!("{CANARY}refresh-{}-{number}", self.world)
    }

    pub fn client_secret(&self) -> String {
        format!("{CANARY}secret-{}", self.world)
    }

    /// Ends every access token before its time.
    pub fn revoke(&self) {
        self.state().access.clear();
    }

    /// Ends every grant.
    pub fn forget_grants(&self) {
        self.state().refresh.clear();
    }

    /// From now on every answer has the same access token.
    pub fn repeats(&self, token: &str) {
        self.state().repeat = Some(token.to_owned());
    }

    /// A refresh token that a user got elsewhere.
    pub fn grant_to(&self, user: &str, number: usize) -> String {
        let token = self.refresh(number);
        let mut state = self.state();
        state.refresh.insert(token.clone());
        state.owners.insert(token.clone(), user.to_owned());
        token
    }

    /// Whose tokens these are.
    pub fn owners(&self, tokens: &[String]) -> Vec<String> {
        let state = self.state();
        tokens
            .iter()
            .map(|token| state.owners.get(token).cloned().unwrap_or_else(|| format!("nobody: {token}")))
            .collect()
    }

    /// At the address that a browser was sent to, the user says yes: where it is sent back to.
    pub fn says_yes(&self, asked: &Url) -> Url {
        let query: Form = asked.query_pairs().into_owned().collect();
        assert_eq!((asked.scheme(), asked.path()), ("https", "/authorize"), "{asked}");
        assert_eq!(
            ["response_type", "client_id", "code_challenge_method"].map(|name| query[name].as_str()),
            ["code", CLIENT_ID, "S256"]
        );
        let mut state = self.state();
        let code = format!("{CANARY}code-{}-{}", self.world, state.codes.len());
        let (challenge, redirect_uri) = (query["code_challenge"].clone(), query["redirect_uri"].clone());
        let mut back: Url = redirect_uri.parse().unwrap();
        state.codes.insert(code.clone(), Asked { challenge, redirect_uri });
        back.query_pairs_mut().append_pair("code", &code).append_pair("state", &query["state"]);
        back
    }

    /// At the address that a browser was sent to, somebody says no: where it is sent back to.
    pub fn says_no(&self, asked: &Url, error: &str, description: &str) -> Url {
        let query: Form = asked.query_pairs().into_owned().collect();
        let mut back: Url = query["redirect_uri"].parse().unwrap();
        let mut pairs = back.query_pairs_mut();
        pairs.append_pair("error", error).append_pair("error_description", description);
        pairs.append_pair("state", &query["state"]);
        drop(pairs);
        back
    }

    /// On the other device, the user says yes.
    pub fn approves_the_device(&self) {
        self.state().device_is_approved = true;
    }

    /// Its endpoints, and its metadata (RFC 8414).
    pub fn answer(&self, request: &Seen) -> Answer {
        let path = request.path();
        if let Some(tenant) = path.strip_prefix("/.well-known/oauth-authorization-server") {
            return json_answer(&json!({
                "issuer": format!("https://auth.test{tenant}"),
                "token_endpoint": "https://auth.test/token",
                "authorization_endpoint": "https://auth.test/authorize",
                "revocation_endpoint": "https://auth.test/revoke",
                "authorization_response_iss_parameter_supported": true,
            }));
        }
        let basic = BASE64_STANDARD.encode(format!("{CLIENT_ID}:{}", self.client_secret()));
        if request.header("authorization") != Some(&format!("Basic {basic}")) {
            return refused(401, "invalid_client");
        }
        let form: Form = url::form_urlencoded::parse(&request.body).into_owned().collect();
        match path {
            "/token" => self.token(&form),
            "/revoke" => {
                self.state().refresh.remove(&form["token"]);
                answer(200)
            }
            "/device" => json_answer(&json!({
                "device_code": format!("{CANARY}device-{}", self.world),
                "user_code": "ABCD-EFGH",
                "verification_uri": "https://auth.test/activate",
                "interval": 1,
            })),
            _ => answer(404),
        }
    }

    /// The token endpoint.
    fn token(&self, form: &Form) -> Answer {
        let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
        match field("grant_type") {
            "client_credentials" => self.issue(false, None),
            "refresh_token" => {
                let (known, owner) = {
                    let mut state = self.state();
                    let token = field("refresh_token");
                    (state.refresh.remove(token), state.owners.get(token).cloned())
                };
                if known { self.issue(true, owner) } else { refused(400, "invalid_grant") }
            }
            "authorization_code" => {
                let Some(asked) = self.state().codes.remove(field("code")) else {
                    return refused(400, "invalid_grant");
                };
                let proved = challenge_of(field("code_verifier")) == asked.challenge;
                if proved && field("redirect_uri") == asked.redirect_uri {
                    self.issue(true, None)
                } else {
                    refused(400, "invalid_grant")
                }
            }
            "urn:ietf:params:oauth:grant-type:device_code" => {
                let approved = self.state().device_is_approved;
                if approved { self.issue(true, None) } else { refused(400, "authorization_pending") }
            }
            _ => refused(400, "unsupported_grant_type"),
        }
    }

    fn issue(&self, rotate: bool, owner: Option<String>) -> Answer {
        let mut state = self.state();
        state.count += 1;
        let access = state.repeat.clone().unwrap_or_else(|| self.access(state.count));
        state.access.insert(access.clone());
        state.belongs_to(&access, owner.as_deref());
        let mut body = json!({ "access_token": access, "token_type": "Bearer" });
        if let Some(lifetime) = self.lifetime {
            body["expires_in"] = lifetime.into();
        }
        if rotate {
            // The numbers before are those that users came with.
            let refresh = self.refresh(1000 + state.count);
            state.belongs_to(&refresh, owner.as_deref());
            state.refresh.insert(refresh.clone());
            body["refresh_token"] = refresh.into();
        }
        json_answer(&body)
    }

    /// The API: RFC 6750 section 3.
    pub fn api(&self, request: &Seen) -> Answer {
        if request.token().is_some_and(|token| self.state().access.contains(token)) {
            return answer(200).with("content-type", "text/plain").saying("welcome\n");
        }
        Answer::from(401)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn belongs_to(&mut self, token: &str, owner: Option<&str>) {
        self.owners.extend(owner.map(|owner| (token.to_owned(), owner.to_owned())));
    }
}

/// RFC 7636 section 4.2.
pub fn challenge_of(verifier: &str) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(verifier))
}

pub fn json_answer(body: &serde_json::Value) -> Answer {
    answer(200).with("content-type", "application/json").saying(body.to_string())
}

pub fn refused(status: u16, error: &str) -> Answer {
    answer(status).with("content-type", "application/json").saying(format!("{{\"error\":\"{error}\"}}"))
}
