//! A sidecar's tokens, the store they are kept in, and the server they come from.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::server::Server;
use crate::clock::Clock;
use crate::drain::Drain;
use crate::events::{Event, Events, TokenChange};
use crate::names::{Subject, UserName};
use crate::oauth::{ClientAuth, Endpoints, Grant, Provider};
use crate::secret::Secret;
use crate::store::key::Keyring;
use crate::store::{Access, Row, Store};
use crate::tokens::{Bearer, Key, NoRenewal, Parts, TokenError, Tokens};

pub(super) struct World {
    pub directory: TempDir,
    pub clock: Clock,
    pub server: Arc<Server>,
    pub store: Store,
    /// The same, as the command line has it.
    command_line: Store,
    pub events: Events,
    pub drain: Drain,
    pub tokens: Tokens,
    providers: Vec<Arc<Provider>>,
}

/// What an agent gets for a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Got {
    /// 200, at the first or the second try.
    Fine,
    /// The 401, and why there was no second try, or none that helped.
    Unauthorized(Option<NoRenewal>),
    /// An answer of our own.
    Nothing(TokenError),
}

impl World {
    /// With users' grants at `acme`.
    pub async fn new() -> Self {
        Self::of(vec![provider("acme", Grant::RefreshToken)]).await
    }

    /// With client credentials at `acme`.
    pub async fn of_a_client() -> Self {
        Self::of(vec![provider("acme", Grant::ClientCredentials)]).await
    }

    pub async fn of(providers: Vec<Provider>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let providers: Vec<_> = providers.into_iter().map(Arc::new).collect();
        let (clock, server) = (Clock::stepped(), Arc::new(Server::default()));
        let (events, drain) = (Events::default(), Drain::default());
        let (store, command_line) = (open(directory.path()).await, open(directory.path()).await);
        let tokens = tokens(&providers, &store, &server, &clock, &events, &drain);
        Self { directory, clock, server, store, command_line, events, drain, tokens, providers }
    }

    /// Another process over the same store.
    pub async fn sibling(&self) -> Tokens {
        self.sibling_of(&self.providers).await
    }

    /// Another process over the same store, with a configuration of its own.
    pub async fn sibling_of(&self, providers: &[Arc<Provider>]) -> Tokens {
        let (events, drain) = (Events::default(), Drain::default());
        let store = open(self.directory.path()).await;
        tokens(providers, &store, &self.server, &self.clock, &events, &drain)
    }

    /// The process ends and starts again.
    pub async fn restart(&mut self) {
        (self.events, self.drain, self.store) =
            (Events::default(), Drain::default(), open(self.directory.path()).await);
        self.tokens = tokens(&self.providers, &self.store, &self.server, &self.clock, &self.events, &self.drain);
    }

    /// The configuration changes: `change` says how, provider by provider.
    pub fn reconfigure(&mut self, change: impl Fn(&mut Provider)) {
        for provider in &mut self.providers {
            change(Arc::make_mut(provider));
        }
        self.tokens = self.tokens.reconfigured(&self.providers);
    }

    pub fn key(&self, user: &str) -> Key {
        let user: UserName = user.parse().unwrap();
        self.tokens.key(&self.providers[0].name, &user).unwrap()
    }

    /// A user grants access, and the refresh token of it is stored.
    pub async fn connect(&self, user: &str) -> Key {
        let key = self.key(user);
        self.import(&key, self.server.grant(user), None).await;
        key
    }

    /// As [`World::connect`], with a token that was asked for this moment.
    pub async fn connect_with_token(&self, user: &str) -> Key {
        let key = self.key(user);
        let refresh_token = self.server.grant(user);
        let access = self.server.issue(&refresh_token);
        self.import(&key, refresh_token, Some(access)).await;
        key
    }

    /// Stores a grant in place of the one that is there, as `sidebearer import` does.
    pub async fn import(&self, key: &Key, refresh_token: Secret, access: Option<Secret>) {
        let lifetime = self.server.book().lifetime();
        let now = self.clock.now().wall;
        let access =
            access.map(|token| Access { token, obtained_at: now, expires_at: lifetime.map(|lifetime| now + lifetime) });
        let row = Row::new(key.provider.clone(), key.subject.clone(), (*key.target).clone(), now);
        // A renewal may be under way.
        let registration = Some(key.registration);
        self.command_line
            .replace(Row { refresh_token: Some(refresh_token), access, registration, ..row })
            .await
            .unwrap();
    }

    pub async fn row(&self, key: &Key) -> Row {
        self.store.grant(&key.provider, &key.subject).await.unwrap().unwrap()
    }

    /// How many grants are counted as in a state.
    pub async fn counted(&self, state: &str) -> usize {
        let census = self.tokens.census().await.unwrap();
        census.iter().filter(|(_, of, _)| *of == state).map(|(.., grants)| grants).sum()
    }

    pub async fn stored_refresh_token(&self, key: &Key) -> String {
        self.row(key).await.refresh_token.unwrap().expose().to_owned()
    }

    pub async fn bearer(&self, key: &Key) -> Bearer {
        self.tokens.bearer(key).await.unwrap()
    }

    /// A token without a moment's waiting.
    pub async fn bearer_at_once(&self, key: &Key) -> Bearer {
        let asked = Instant::now();
        let bearer = self.bearer(key).await;
        assert_eq!(asked.elapsed(), Duration::ZERO);
        bearer
    }

    /// A request as the proxy makes it: at most two tries.
    pub async fn request(&self, key: &Key) -> Got {
        let first = match self.tokens.bearer(key).await {
            Ok(bearer) => bearer,
            Err(error) => return Got::Nothing(error),
        };
        assert!(!self.server.is_expired(&first), "an expired token was handed out");
        if self.taken(key, &first) {
            return Got::Fine;
        }
        match self.tokens.renew(key, &first).await {
            Ok(second) if self.taken(key, &second) => Got::Fine,
            Ok(_) => Got::Unauthorized(None),
            Err(why) => Got::Unauthorized(Some(why)),
        }
    }

    fn taken(&self, key: &Key, bearer: &Bearer) -> bool {
        let taken = self.server.accepts(bearer);
        if taken {
            self.tokens.accepted(key, bearer);
        }
        taken
    }

    /// Makes the store fail for real, or work again, through another connection to its file.
    pub fn sql(&self, sql: &str) {
        let path = self.directory.path().join("sidebearer.db");
        rusqlite::Connection::open(path).unwrap().execute_batch(sql).unwrap();
    }

    /// From now on, no intent is written.
    pub fn break_intents(&self) {
        self.sql("CREATE TRIGGER broken BEFORE UPDATE ON grants BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END");
    }

    /// From now on, no row is written.
    pub fn break_rows(&self) {
        self.sql("CREATE TRIGGER broken BEFORE INSERT ON grants BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END");
    }

    pub fn repair(&self) {
        self.sql("DROP TRIGGER broken");
    }
}

pub(super) fn provider(name: &str, grant: Grant) -> Provider {
    let token = format!("https://{name}.test/token").parse().unwrap();
    Provider {
        endpoints: Endpoints { token: Some(token), ..Endpoints::default() },
        client_secret: Some(Secret::new("secret")),
        client_auth: ClientAuth::Basic,
        ..Provider::new(name.parse().unwrap(), "id", grant)
    }
}

/// Looks at the store as a sidecar that runs does.
pub(super) fn follows(tokens: &Tokens) {
    let tokens = tokens.clone();
    tokio::spawn(async move { tokens.follow_store().await });
}

/// As it comes of a wait, if it comes within a second.
pub(super) async fn soon(waiting: JoinHandle<Result<Bearer, TokenError>>) -> Bearer {
    let waited = tokio::time::timeout(Duration::from_secs(1), waiting).await;
    waited.expect("it waits on").unwrap().unwrap()
}

/// Lets time pass, with all that is planned in it.
pub(super) async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

/// Failures of a watched sidecar, by their stable code.
pub(super) fn failures(watch: &mut tokio::sync::broadcast::Receiver<Event>) -> Vec<&'static str> {
    std::iter::from_fn(|| watch.try_recv().ok())
        .filter_map(|event| match event {
            Event::Token(token) => Some(token.what),
            Event::Request(_) | Event::Missing(_) => None,
        })
        .filter_map(|what| match what {
            TokenChange::Failed { code, .. } => Some(code),
            _ => None,
        })
        .collect()
}

/// A figure that Prometheus would read, if it is there.
pub(super) fn figure(world: &World, series: &str) -> Option<f64> {
    let text = world.events.metrics().text(false);
    let value = text.lines().find_map(|line| line.strip_prefix("sidebearer_")?.strip_prefix(series));
    value.map(|value| value.trim().parse().unwrap())
}

pub(super) fn user(name: &str) -> Subject {
    Subject::User(name.parse().unwrap())
}

async fn open(directory: &Path) -> Store {
    let keys = Keyring::from_secrets(&[Secret::new(BASE64_STANDARD.encode([1; 32]))]).unwrap();
    Store::open(directory, keys, true).await.unwrap()
}

fn tokens(
    providers: &[Arc<Provider>],
    store: &Store,
    server: &Arc<Server>,
    clock: &Clock,
    events: &Events,
    drain: &Drain,
) -> Tokens {
    let parts = Parts {
        store: store.clone(),
        servers: server.clone(),
        clock: clock.clone(),
        events: events.clone(),
        drain: drain.clone(),
    };
    Tokens::new(providers, parts)
}
