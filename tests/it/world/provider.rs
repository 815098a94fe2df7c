//! The authorization server: issues tokens, rotates refresh tokens, forgets them when told to (RFC 6749).

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    pub fn grant(&self, number: usize) -> String {
        let token = self.refresh(number);
        self.state().refresh.insert(token.clone());
        token
    }

    /// The token endpoint.
    pub fn token(&self, request: &Seen) -> Answer {
        let form: Vec<_> = url::form_urlencoded::parse(&request.body).into_owned().collect();
        let field = |name: &str| form.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let basic = format!("{CLIENT_ID}:{}", self.client_secret());
        let basic = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, basic);
        if request.header("authorization") != Some(&format!("Basic {basic}")) {
            return refused(401, "invalid_client");
        }
        match field("grant_type").as_deref() {
            Some("client_credentials") => self.issue(false),
            Some("refresh_token") => {
                let known = field("refresh_token").is_some_and(|token| self.state().refresh.remove(&token));
                if known { self.issue(true) } else { refused(400, "invalid_grant") }
            }
            _ => refused(400, "unsupported_grant_type"),
        }
    }

    fn issue(&self, rotate: bool) -> Answer {
        let mut state = self.state();
        state.count += 1;
        let access = state.repeat.clone().unwrap_or_else(|| self.access(state.count));
        state.access.insert(access.clone());
        let mut body = serde_json::json!({ "access_token": access, "token_type": "Bearer" });
        if let Some(lifetime) = self.lifetime {
            body["expires_in"] = lifetime.into();
        }
        if rotate {
            // The numbers before are those that users came with.
            let refresh = self.refresh(1000 + state.count);
            state.refresh.insert(refresh.clone());
            body["refresh_token"] = refresh.into();
        }
        answer(200).with("content-type", "application/json").saying(body.to_string())
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

pub fn refused(status: u16, error: &str) -> Answer {
    answer(status).with("content-type", "application/json").saying(format!("{{\"error\":\"{error}\"}}"))
}
