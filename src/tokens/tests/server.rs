//! A strict authorization server in memory: refresh tokens rotate, and one that comes a second time ends its grant.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderName, StatusCode};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;
use url::{Url, form_urlencoded};

use crate::clock::Now;
use crate::oauth::grant::TokenRequest;
use crate::secret::Secret;
use crate::tokens::{Bearer, Servers};
use crate::upstream::{CallError, Reply};

#[derive(Default)]
pub(super) struct Server {
    book: Mutex<Book>,
    released: Notify,
}

/// What the server does with a token request.
#[derive(Clone)]
pub(super) enum Act {
    /// Looks at it, and grants or refuses.
    Serve,
    /// Answers this, whatever was asked.
    Say(u16, &'static [(&'static str, &'static str)], &'static str),
    /// Serves it, but the answer gets lost.
    Lose,
    /// Takes a code, whichever it is, for a grant that begins with it.
    TakeCode,
    /// Takes no connection.
    Refuse,
    /// Serves it when the test says so.
    Hang,
    /// Breaks the process's task.
    Panic,
}

/// What becomes of a refresh token that was redeemed.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Rotation {
    #[default]
    New,
    Omit,
    Empty,
    Same,
}

/// One token request that arrived.
#[derive(Clone)]
pub(super) struct Call {
    pub at: Instant,
    pub host: String,
    pub refresh_token: Option<String>,
    pub scope: Option<String>,
}

pub(super) struct Book {
    pub calls: Vec<Call>,
    pub asked_for_metadata: Vec<String>,
    pub most_at_once: usize,
    /// How often a refresh token came again that had been replaced.
    pub reused: usize,
    /// What is done next, and after that; afterwards all is served.
    pub acts: VecDeque<Act>,
    /// What is done when no act is left.
    pub always: Act,
    /// Hosts whose requests hang.
    pub hanging_hosts: Vec<String>,
    pub delay: Duration,
    pub expires_in: Value,
    pub rotation: Rotation,
    /// Takes a replaced refresh token again.
    pub grace: bool,
    /// Gives the same access token until so long before its end.
    pub same_until: Option<Duration>,
    pub metadata: HashMap<String, Value>,
    /// The tokens that were given back, in order.
    pub given_back: Vec<String>,
    at_once: usize,
    count: usize,
    grants: HashMap<String, Grant>,
    refresh_tokens: HashMap<String, String>,
    access_tokens: HashMap<String, Access>,
}

#[derive(Default)]
struct Grant {
    current: String,
    dead: bool,
    access_token: Option<String>,
}

struct Access {
    grant: String,
    ends: Option<Instant>,
    revoked: bool,
}

impl Default for Book {
    fn default() -> Self {
        Self {
            calls: Vec::new(),
            asked_for_metadata: Vec::new(),
            most_at_once: 0,
            reused: 0,
            acts: VecDeque::new(),
            always: Act::Serve,
            hanging_hosts: Vec::new(),
            delay: Duration::ZERO,
            expires_in: json!(3600),
            rotation: Rotation::New,
            grace: false,
            same_until: None,
            metadata: HashMap::new(),
            given_back: Vec::new(),
            at_once: 0,
            count: 0,
            grants: HashMap::new(),
            refresh_tokens: HashMap::new(),
            access_tokens: HashMap::new(),
        }
    }
}

impl Server {
    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap()
    }

    pub fn calls(&self) -> usize {
        self.book().calls.len()
    }

    /// A user grants access: the refresh token of it.
    pub fn grant(&self, user: &str) -> Secret {
        let mut book = self.book();
        let name = format!("{user}{}", book.next());
        let refresh_token = book.new_refresh_token(&name);
        book.grants.insert(name, Grant { current: refresh_token.clone(), ..Grant::default() });
        Secret::new(refresh_token)
    }

    /// An access token of the grant that `refresh_token` belongs to.
    pub fn issue(&self, refresh_token: &Secret) -> Secret {
        let mut book = self.book();
        let name = book.refresh_tokens[refresh_token.expose()].clone();
        Secret::new(book.new_access_token(&name))
    }

    /// The upstream's verdict on a token.
    pub fn accepts(&self, bearer: &Bearer) -> bool {
        self.book().access(bearer).is_some_and(|access| !access.revoked && !access.is_over())
    }

    pub fn is_expired(&self, bearer: &Bearer) -> bool {
        self.book().access(bearer).is_none_or(Access::is_over)
    }

    /// Whose token it is, as the server sees it.
    pub fn owner(&self, bearer: &Bearer) -> String {
        let book = self.book();
        user_of(&book.access(bearer).unwrap().grant).to_owned()
    }

    /// The refresh token that is good now for the grant of an access token.
    pub fn newest_refresh_token(&self, bearer: &Bearer) -> String {
        let book = self.book();
        book.grants[&book.access(bearer).unwrap().grant].current.clone()
    }

    /// Who granted it.
    pub fn user_of(&self, refresh_token: &str) -> String {
        user_of(&self.book().refresh_tokens[refresh_token]).to_owned()
    }

    /// Whether both tokens are of one grant.
    pub fn is_of(&self, bearer: &Bearer, refresh_token: &str) -> bool {
        let book = self.book();
        book.access(bearer).is_some_and(|access| book.refresh_tokens.get(refresh_token) == Some(&access.grant))
    }

    /// Whether it would bring a token now.
    pub fn honours(&self, refresh_token: &str) -> bool {
        let book = self.book();
        let grant = &book.grants[&book.refresh_tokens[refresh_token]];
        !grant.dead && (book.grace || grant.current == refresh_token)
    }

    /// Whether a token still lives after so long.
    pub fn lives_for(&self, bearer: &Bearer, time: Duration) -> bool {
        let book = self.book();
        book.access(bearer).is_some_and(|access| access.ends.is_none_or(|end| Instant::now() + time < end))
    }

    /// The upstream no longer takes this token.
    pub fn revoke(&self, bearer: &Bearer) {
        let mut book = self.book();
        if let Some(access) = book.access_tokens.get_mut(token(bearer)) {
            access.revoked = true;
        }
    }

    pub fn release(&self) {
        self.released.notify_waiters();
    }
}

impl Servers for Server {
    fn post(&self, request: TokenRequest, _: Option<Now>) -> BoxFuture<'_, Result<Reply, CallError>> {
        async move {
            let host = request.url.host_str().unwrap().to_owned();
            let fields: HashMap<_, _> = form_urlencoded::parse(request.body.expose().as_bytes()).into_owned().collect();
            if let Some(token) = fields.get("token") {
                self.book().given_back.push(token.clone());
                return Ok(reply(200, &[], b""));
            }
            let refresh_token = fields.get("refresh_token").cloned();
            let consent_of = fields.get("code").and_then(|code| code.strip_prefix("of ")).map(str::to_owned);
            let scope = fields.get("scope").cloned();
            let (act, delay) =
                self.book().begin(Call { at: Instant::now(), host, refresh_token: refresh_token.clone(), scope });
            tokio::time::sleep(delay).await;
            if matches!(act, Act::Hang) {
                self.released.notified().await;
            }
            let mut book = self.book();
            book.at_once -= 1;
            match act {
                Act::Serve | Act::Hang => Ok(book.serve_either(refresh_token, consent_of)),
                Act::Say(status, headers, body) => Ok(reply(status, headers, body.as_bytes())),
                Act::Lose => {
                    book.serve_either(refresh_token, consent_of);
                    Err(CallError::Broken)
                }
                Act::TakeCode => Ok(book.take_code("consent")),
                Act::Refuse => Err(CallError::Connect("refused".into())),
                Act::Panic => {
                    drop(book);
                    panic!("as told by the test")
                }
            }
        }
        .boxed()
    }

    fn metadata(&self, url: Url) -> BoxFuture<'_, Result<Reply, CallError>> {
        async move {
            let mut book = self.book();
            book.asked_for_metadata.push(url.to_string());
            Ok(match book.metadata.get(url.as_str()) {
                Some(document) => reply(200, &[], document.to_string().as_bytes()),
                None => reply(404, &[], b"not here"),
            })
        }
        .boxed()
    }
}

impl Book {
    fn begin(&mut self, call: Call) -> (Act, Duration) {
        let hangs = self.hanging_hosts.contains(&call.host);
        self.calls.push(call);
        self.at_once += 1;
        self.most_at_once = self.most_at_once.max(self.at_once);
        let act = if hangs { Act::Hang } else { self.acts.pop_front().unwrap_or_else(|| self.always.clone()) };
        (act, self.delay)
    }

    fn serve(&mut self, refresh_token: Option<String>) -> Reply {
        let Some(sent) = refresh_token else {
            self.grants.entry("(client)".into()).or_default();
            return self.answer("(client)", None);
        };
        let Some(name) = self.refresh_tokens.get(&sent).cloned() else { return invalid_grant() };
        let grant = self.grants.get_mut(&name).unwrap();
        if grant.current != sent && !self.grace {
            self.reused += 1;
            grant.dead = true;
            self.access_tokens.values_mut().filter(|access| access.grant == name).for_each(|a| a.revoked = true);
        }
        if self.grants[&name].dead {
            return invalid_grant();
        }
        let replacement = match self.rotation {
            Rotation::New => Some(self.new_refresh_token(&name)),
            Rotation::Omit => None,
            Rotation::Empty => Some(String::new()),
            Rotation::Same => Some(sent),
        };
        if let Some(replacement) = replacement.as_ref().filter(|replacement| !replacement.is_empty()) {
            self.grants.get_mut(&name).unwrap().current = replacement.clone();
        }
        self.answer(&name, replacement)
    }

    /// A code names its user, where a test wants to know.
    fn serve_either(&mut self, refresh_token: Option<String>, consent_of: Option<String>) -> Reply {
        match consent_of {
            Some(user) => self.take_code(&user),
            None => self.serve(refresh_token),
        }
    }

    fn take_code(&mut self, user: &str) -> Reply {
        let name = format!("{user}{}", self.next());
        let refresh_token = self.new_refresh_token(&name);
        self.grants.insert(name.clone(), Grant { current: refresh_token.clone(), ..Grant::default() });
        self.answer(&name, Some(refresh_token))
    }

    fn answer(&mut self, grant: &str, refresh_token: Option<String>) -> Reply {
        let (access_token, expires_in) = match self.same_again(grant) {
            Some((same, remaining)) => (same, json!(remaining.as_secs_f64())),
            None => (self.new_access_token(grant), self.expires_in.clone()),
        };
        let mut answer = json!({ "access_token": access_token, "token_type": "Bearer" });
        if !expires_in.is_null() {
            answer["expires_in"] = expires_in;
        }
        if let Some(refresh_token) = refresh_token {
            answer["refresh_token"] = json!(refresh_token);
        }
        reply(200, &[], answer.to_string().as_bytes())
    }

    fn same_again(&self, grant: &str) -> Option<(String, Duration)> {
        let (before, token) = (self.same_until?, self.grants[grant].access_token.as_ref()?);
        let remaining = self.access_tokens[token].ends?.saturating_duration_since(Instant::now());
        (remaining > before).then(|| (token.clone(), remaining))
    }

    fn new_refresh_token(&mut self, grant: &str) -> String {
        let token = format!("rt-{}", self.next());
        self.refresh_tokens.insert(token.clone(), grant.to_owned());
        token
    }

    fn new_access_token(&mut self, grant: &str) -> String {
        let token = format!("at-{}", self.next());
        let ends = self.lifetime().map(|lifetime| Instant::now() + lifetime);
        self.access_tokens.insert(token.clone(), Access { grant: grant.to_owned(), ends, revoked: false });
        self.grants.get_mut(grant).unwrap().access_token = Some(token.clone());
        token
    }

    pub fn lifetime(&self) -> Option<Duration> {
        self.expires_in.as_f64().filter(|seconds| *seconds > 0.0).map(Duration::from_secs_f64)
    }

    fn access(&self, bearer: &Bearer) -> Option<&Access> {
        self.access_tokens.get(token(bearer))
    }

    fn next(&mut self) -> usize {
        self.count += 1;
        self.count
    }
}

impl Access {
    fn is_over(&self) -> bool {
        self.ends.is_some_and(|end| end <= Instant::now())
    }
}

fn user_of(grant: &str) -> &str {
    grant.trim_end_matches(|c: char| c.is_ascii_digit())
}

pub(super) fn token(bearer: &Bearer) -> &str {
    bearer.header.to_str().unwrap().strip_prefix("Bearer ").unwrap()
}

fn invalid_grant() -> Reply {
    reply(400, &[], br#"{"error":"invalid_grant"}"#)
}

fn reply(status: u16, headers: &[(&'static str, &'static str)], body: &[u8]) -> Reply {
    let headers: HeaderMap =
        headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect();
    Reply { status: StatusCode::from_u16(status).unwrap(), headers, body: body.to_vec() }
}
