//! A provider as tokens know it: where it is, and how it is asked for a token.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OnceCell, Semaphore};
use url::Url;

use super::slot::{LONGEST_LIFETIME, Token};
use super::{Key, Servers};
use crate::clock::{Clock, Now};
use crate::names::{ProviderName, Subject};
use crate::oauth::grant::{self, Ask};
use crate::oauth::metadata::{self, Metadata};
use crate::oauth::registration::{Registration, server};
use crate::oauth::wanted::Wanted;
use crate::oauth::wire::{self, Answer, Failure};
use crate::oauth::{Endpoint, Provider, Target};
use crate::secret::Secret;
use crate::store::Access;
use crate::upstream::CallError;

/// At most this many calls at once to one token endpoint.
const CALLS_AT_ONCE: usize = 4;
/// Of those, for renewals that nobody waits for.
const AHEAD_AT_ONCE: usize = 3;

/// The providers of one configuration.
pub(super) type Providers = HashMap<ProviderName, Arc<Known>>;

/// The provider that gives tokens of this key, as it is configured here.
pub(super) fn gives<'a>(providers: &'a Providers, key: &Key) -> Option<&'a Arc<Known>> {
    let gives = |known: &&Arc<Known>| {
        let is_for_users = known.provider.grant.is_for_users();
        (&known.target, known.registration) == (&key.target, key.registration)
            && is_for_users == (key.subject != Subject::Client)
    };
    providers.get(&key.provider).filter(gives)
}

/// Those of a configuration that comes after another: one that has not changed stays what it was.
pub(super) fn providers(all: &[Arc<Provider>], before: &Providers) -> Providers {
    // Two clients of one server share its turns, one that was configured before too.
    let mut turns: HashMap<Option<Url>, Arc<Turns>> =
        before.values().map(|known| (server(&known.provider).cloned(), known.turns.clone())).collect();
    let known = |provider: &Arc<Provider>| {
        let same = before.get(&provider.name).filter(|known| known.provider == *provider).cloned();
        let known = same.unwrap_or_else(|| {
            let turns = turns.entry(server(provider).cloned()).or_default().clone();
            Arc::new(Known::new(provider.clone(), turns))
        });
        (provider.name.clone(), known)
    };
    all.iter().map(known).collect()
}

/// What tokens of each provider are good for and whose they are, in this configuration and in those before it: as long as
/// anybody knows.
#[derive(Default)]
pub(super) struct Targets(Mutex<HashMap<ProviderName, Vec<Whose>>>);

type Whose = (Weak<Target>, Registration);

impl Targets {
    pub(super) fn of(providers: &Providers) -> Self {
        let targets = Self::default();
        targets.include(providers);
        targets
    }

    /// Includes those of one more configuration.
    pub(super) fn include(&self, providers: &Providers) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, known) in providers {
            let of_provider = all.entry(name.clone()).or_default();
            of_provider.retain(|(target, _)| target.strong_count() > 0);
            let target = Arc::downgrade(&known.target);
            if !of_provider.iter().any(|(there, _)| there.ptr_eq(&target)) {
                of_provider.push((target, known.registration));
            }
        }
    }

    /// All of one provider, each once.
    pub(super) fn of_provider(&self, provider: &ProviderName) -> HashSet<(Arc<Target>, Registration)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let targets = all.get(provider).into_iter().flatten();
        targets.filter_map(|(target, registration)| Some((target.upgrade()?, *registration))).collect()
    }
}

/// A provider, and what is shared by all its tokens.
pub(super) struct Known {
    pub(super) provider: Arc<Provider>,
    pub(super) target: Arc<Target>,
    pub(super) registration: Registration,
    pub(super) wanted: Wanted,
    pub(super) turns: Arc<Turns>,
    /// Whether the provider has taken the client as it is configured here.
    pub(super) takes_client: AtomicBool,
    /// What its issuer says of itself, once discovered.
    metadata: OnceCell<Metadata>,
}

/// Who may call a token endpoint now (SEMANTICS C15).
pub(super) struct Turns {
    pub(super) all: Semaphore,
    pub(super) ahead: Semaphore,
}

impl Default for Turns {
    fn default() -> Self {
        Self { all: Semaphore::new(CALLS_AT_ONCE), ahead: Semaphore::new(AHEAD_AT_ONCE) }
    }
}

/// What the provider answered, and when it was asked.
pub(super) struct Asked {
    pub(super) answer: Answer,
    pub(super) sent: Now,
}

/// Why the provider gave no token.
pub(super) enum Refusal {
    /// Not a byte reached it.
    Unsent(String),
    /// It answered, or may have acted on the request.
    Failed(Failure),
}

/// Why it is not known where to ask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoEndpoint {
    /// Neither the configuration nor the provider names it.
    #[error("no `{0}` is known")]
    Unnamed(&'static str),
    /// The provider could not be asked, or says nothing that can be used.
    #[error("discovery failed: {0}")]
    Undiscovered(String),
}

/// What became of a token that was to be given back (RFC 7009).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revocation {
    /// The provider knows it no more.
    Done,
    /// The provider has no endpoint for it.
    NotOffered,
    /// It could not be given back: why.
    Failed(String),
}

impl Known {
    pub(super) fn new(provider: Arc<Provider>, turns: Arc<Turns>) -> Self {
        let target = Arc::new(provider.target.clone());
        let (registration, wanted) = (Registration::of(&provider), Wanted::of(&provider));
        let (takes_client, metadata) = (AtomicBool::new(false), OnceCell::new());
        Self { provider, target, registration, wanted, turns, takes_client, metadata }
    }

    /// The token of a user or of the client.
    pub(super) fn key(&self, subject: Subject) -> Key {
        let (provider, target) = (self.provider.name.clone(), self.target.clone());
        Key { provider, subject, target, registration: self.registration }
    }

    /// One of its endpoints: as it is written down, or else as its issuer says.
    pub(super) async fn endpoint(&self, which: Endpoint, servers: &dyn Servers) -> Result<Url, NoEndpoint> {
        if let Some(written) = self.provider.endpoints.written(which) {
            return Ok(written.clone());
        }
        let found = self.metadata(servers).await?.and_then(|metadata| metadata.endpoint(which));
        found.cloned().ok_or(NoEndpoint::Unnamed(which.name()))
    }

    /// What its issuer says of itself, as far as anybody had to ask.
    pub(super) fn discovered(&self) -> Option<&Metadata> {
        self.metadata.get()
    }

    /// What its issuer says of itself, asked for once; nothing without an issuer.
    async fn metadata(&self, servers: &dyn Servers) -> Result<Option<&Metadata>, NoEndpoint> {
        let Some(issuer) = &self.provider.endpoints.issuer else { return Ok(None) };
        let found = self.metadata.get_or_try_init(|| async {
            let mut why = "no metadata".to_owned();
            for url in metadata::candidates(&issuer.url) {
                match servers.metadata(url).await {
                    Ok(reply) if reply.status.is_success() => match metadata::read(&issuer.url, &reply.body) {
                        Ok(metadata) => return Ok(metadata),
                        Err(error) => why = error.to_string(),
                    },
                    Ok(reply) => why = format!("status {}", reply.status.as_u16()),
                    Err(error) => why = error.to_string(),
                }
            }
            Err(NoEndpoint::Undiscovered(why))
        });
        found.await.map(Some)
    }

    /// One token request. After the moment `by` it is not sent any more.
    pub(super) async fn ask(
        &self,
        servers: &dyn Servers,
        clock: &Clock,
        endpoint: &Url,
        ask: Ask<'_>,
        by: Option<Now>,
    ) -> Result<Asked, Refusal> {
        let request = grant::request(&self.provider, endpoint, ask);
        let sent = clock.now();
        let reply = servers.post(request, by).await.map_err(|error| match error {
            CallError::Connect(_)
            | CallError::Certificate(_)
            | CallError::Proxy(_)
            | CallError::Request
            | CallError::Late => Refusal::Unsent(error.to_string()),
            other => Refusal::Failed(Failure::Transient { why: other.to_string(), retry_after: None }),
        })?;
        let answer = wire::read(reply.status, &reply.headers, &reply.body, sent.wall, &self.provider.quirks);
        let answer = answer.map_err(Refusal::Failed)?;
        let provider = &self.provider.name;
        if answer.token_type_missing {
            tracing::warn!(%provider, "the answer has no token_type, taken as Bearer");
        }
        if let Some(granted) = &answer.scopes
            && let Some(missing) = self.target.scopes.iter().find(|scope| !granted.contains(scope))
        {
            tracing::warn!(%provider, missing, "the provider granted less than the scopes asked for");
        }
        Ok(Asked { answer, sent })
    }

    /// Gives a token back (RFC 7009).
    pub(super) async fn revoke(&self, servers: &dyn Servers, token: &Secret, is_refresh_token: bool) -> Revocation {
        let endpoint = match self.endpoint(Endpoint::Revocation, servers).await {
            Ok(endpoint) => endpoint,
            Err(NoEndpoint::Unnamed(_)) => return Revocation::NotOffered,
            Err(error) => return Revocation::Failed(error.to_string()),
        };
        let request = grant::revocation(&self.provider, &endpoint, token, is_refresh_token);
        match servers.post(request, None).await {
            Ok(reply) if reply.status.is_success() => Revocation::Done,
            Ok(reply) => Revocation::Failed(format!("its revocation endpoint answered {}", reply.status.as_u16())),
            Err(error) => Revocation::Failed(error.to_string()),
        }
    }

    pub(super) fn lifetime(&self, answer: &Answer) -> Option<Duration> {
        let lifetime = answer.lifetime.or(self.provider.default_lifetime);
        lifetime.filter(|life| *life <= LONGEST_LIFETIME)
    }

    /// The answer's token, to be kept.
    pub(super) fn access(&self, asked: &Asked) -> Access {
        let (token, obtained_at) = (asked.answer.access_token.clone(), asked.sent.wall);
        Access { token, obtained_at, expires_at: self.lifetime(&asked.answer).map(|life| obtained_at + life) }
    }

    /// The answer's token, to be used.
    pub(super) fn token(&self, asked: &Asked, generation: u64) -> Token {
        let lifetime = self.lifetime(&asked.answer);
        Token::new(asked.answer.access_token.clone(), generation, asked.sent, lifetime, self.provider.refresh_before)
    }
}
