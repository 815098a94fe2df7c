//! Sidecars that share one store, each with its own way to the store and to the provider.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::Instant;
use url::Url;

use super::server::Server;
use super::world::provider;
use crate::clock::{Clock, Now};
use crate::drain::Drain;
use crate::events::Events;
use crate::names::{Subject, UserName};
use crate::oauth::grant::TokenRequest;
use crate::oauth::registration::Registration;
use crate::oauth::{Grant, Provider};
use crate::secret::Secret;
use crate::store::memory::{self, Broken, Process};
use crate::store::{Row, Store, StoreError};
use crate::tokens::{Key, Parts, Proof, Servers, Tokens};
use crate::upstream::{CallError, Reply};

/// How long a call waits for its answer, as the real ones do.
const DEADLINE: Duration = Duration::from_secs(20);

/// What sidecars have in common.
#[derive(Clone)]
pub(super) struct Fleet {
    pub clock: Clock,
    pub started: Instant,
    pub server: Arc<Server>,
    pub shared: memory::Server,
    /// As the test itself sees it, whatever happens.
    pub store: Store,
    pub provider: Arc<Provider>,
}

/// One of them.
#[derive(Clone)]
pub(super) struct Sidecar {
    pub process: Process,
    pub clock: Clock,
    pub tokens: Tokens,
}

/// Sees each token request when it is sent, and what came of it.
pub(super) trait Witness: Send + Sync + 'static {
    /// One is sent now, and would not be sent any more after `by`. Gives it a number.
    fn sent<'a>(&'a self, request: &'a TokenRequest, by: Option<Now>) -> BoxFuture<'a, usize>;
    fn ended(&self, number: usize, answer: &Result<Reply, CallError>);
}

/// Sees nothing.
struct Nobody;

impl Witness for Nobody {
    fn sent<'a>(&'a self, _: &'a TokenRequest, _: Option<Now>) -> BoxFuture<'a, usize> {
        async { 0 }.boxed()
    }

    fn ended(&self, _: usize, _: &Result<Reply, CallError>) {}
}

impl Fleet {
    pub async fn new() -> Self {
        let shared = memory::Server::new();
        let store = shared.observe().await;
        let mut provider = provider("acme", Grant::AuthorizationCode);
        provider.endpoints.revocation = "https://acme.test/revoke".parse().ok();
        let provider = Arc::new(provider);
        Self { clock: Clock::stepped(), started: Instant::now(), server: Arc::default(), shared, store, provider }
    }

    pub async fn sidecar(&self) -> Sidecar {
        self.sidecar_of(&self.provider, Process::default(), self.clock.elsewhere(), Arc::new(Nobody)).await
    }

    pub async fn sidecar_of(
        &self,
        provider: &Arc<Provider>,
        process: Process,
        clock: Clock,
        witness: Arc<dyn Witness>,
    ) -> Sidecar {
        let store = self.shared.open(&process).await;
        let line = Line { process: process.clone(), clock: clock.clone(), server: self.server.clone(), witness };
        let parts = Parts {
            store,
            servers: Arc::new(line),
            clock: clock.clone(),
            events: Events::default(),
            drain: Drain::default(),
        };
        let tokens = Tokens::new(std::slice::from_ref(provider), parts);
        let follower = tokens.clone();
        // Not the sweeping, which would wake it twice a second for as long as time passes.
        tokio::spawn(async move { follower.follow_changes().await });
        // Before anything else happens, it listens to the store.
        tokio::task::yield_now().await;
        Sidecar { process, clock, tokens }
    }

    /// Where a user's grant is kept, whatever each sidecar asks for.
    pub fn key(&self, user: &str) -> Key {
        let subject = Subject::User(user.parse().unwrap());
        let target = Arc::new(self.provider.target.clone());
        Key { provider: self.provider.name.clone(), subject, target, registration: Registration::of(&self.provider) }
    }

    /// A user grants access, and the refresh token of it is stored.
    pub async fn connect(&self, key: &Key) {
        let refresh_token = self.server.grant(key.subject.as_str());
        self.import(key, refresh_token).await.unwrap();
    }

    pub async fn import(&self, key: &Key, refresh_token: Secret) -> Result<u64, StoreError> {
        let now = self.clock.now().wall;
        let row = Row::new(key.provider.clone(), key.subject.clone(), (*key.target).clone(), now);
        self.store.replace(Row { refresh_token: Some(refresh_token), ..row }).await
    }

    pub async fn row(&self, key: &Key) -> Option<Row> {
        self.store.grant(&key.provider, &key.subject).await.unwrap()
    }
}

impl Sidecar {
    pub fn key(&self, user: &str) -> Key {
        let user: UserName = user.parse().unwrap();
        self.tokens.key(&"acme".parse().unwrap(), &user).unwrap()
    }
}

/// That a user has consented; the provider learns from it who it was.
pub(super) fn proof(user: &str) -> Proof {
    Proof::Code {
        code: Secret::new(format!("of {user}")),
        verifier: Secret::new("verifier"),
        redirect_uri: "http://127.0.0.1:1/callback".into(),
    }
}

/// The way from a sidecar to the provider.
struct Line {
    process: Process,
    clock: Clock,
    server: Arc<Server>,
    witness: Arc<dyn Witness>,
}

impl Servers for Line {
    fn post(&self, request: TokenRequest, by: Option<Now>) -> BoxFuture<'_, Result<Reply, CallError>> {
        async move {
            self.process.step().await.map_err(|Broken| CallError::Connect("refused".into()))?;
            if by.is_some_and(|by| by.is_past(self.clock.now())) {
                return Err(CallError::Late);
            }
            let number = self.witness.sent(&request, by).await;
            let (server, process) = (self.server.clone(), self.process.clone());
            // What has been sent arrives, whatever becomes of this process.
            let answer = tokio::spawn(async move {
                let reply = server.post(request, None).await;
                process.step().await.map_err(|Broken| CallError::Broken)?;
                reply
            });
            let answer = self.process.waits(answer, DEADLINE).await.unwrap_or(Err(CallError::Timeout));
            self.witness.ended(number, &answer);
            answer
        }
        .boxed()
    }

    fn metadata(&self, url: Url) -> BoxFuture<'_, Result<Reply, CallError>> {
        self.server.metadata(url)
    }
}
