//! Fresh bearer tokens: a memory read while one is good, one shared call to the provider when none is.
//!
//! The rules are C1 to C20 of the design's semantics. Three of them shape this module: a renewal runs in a task of its
//! own that no agent can cancel, everyone who needs it waits for that one task, and a rotated refresh token is durable
//! before its access token is handed to anyone.

mod grants;
mod health;
mod known;
#[doc(hidden)]
pub mod measured;
mod refresh;
mod schedule;
mod slot;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use dashmap::DashMap;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use http::HeaderValue;
use tokio::sync::oneshot;
use tokio::time::Instant;
use url::Url;

use crate::clock::{Clock, Now};
use crate::drain::Drain;
use crate::events::{self, Events, TokenChange};
use crate::names::{ProviderName, Subject, UserName};
use crate::oauth::grant::TokenRequest;
use crate::oauth::registration::Registration;
use crate::oauth::wire::BODY_LIMIT;
use crate::oauth::{Grant, Provider, Target};
use crate::secret::Secret;
use crate::store::Store;
use crate::upstream::{CallError, Calls, Reply};
use known::{Known, Providers, Targets};
use slot::{Slot, State};

pub use grants::{Authorizer, GrantError, Granted, Proof};
pub use health::{Condition, Fare, STANDINGS, TROUBLES, Trouble};
pub use known::Revocation;

/// All tokens, with the providers of one configuration. A clone shares both.
#[derive(Clone)]
pub struct Tokens {
    inner: Arc<Inner>,
    /// Requests that came under this configuration end under it.
    providers: Arc<Providers>,
}

struct Inner {
    /// Those of the configuration of this moment, at which tokens are renewed.
    current: ArcSwap<Providers>,
    /// Those of every configuration that there was.
    targets: Targets,
    slots: DashMap<Key, Arc<Slot>>,
    /// Those that may be of no use soon: a million good tokens are not looked at for the sake of these.
    waning: Mutex<HashSet<Key>>,
    store: Store,
    servers: Arc<dyn Servers>,
    clock: Clock,
    events: Events,
    drain: Drain,
    schedule: schedule::Schedule,
}

/// Which token: for whom, from whom, good for what. Never a joined string (SEMANTICS C4).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The provider.
    pub provider: ProviderName,
    /// The client, or the user who granted access.
    pub subject: Subject,
    /// The scopes, audience and resources.
    pub target: Arc<Target>,
    /// At which server, and of which client there.
    pub registration: Registration,
}

/// A token ready for a request.
#[derive(Debug, Clone)]
pub struct Bearer {
    /// `Bearer ...`, marked sensitive.
    pub header: HeaderValue,
    /// Its number in the history of its row.
    pub generation: u64,
    /// When it ends, if that is known. It may be long past for whoever had to wait since.
    pub ends: Option<Instant>,
    secret: Secret,
    /// A 401 forced its renewal, and no upstream has taken it yet.
    unproven: bool,
}

impl Bearer {
    /// The token by itself, to be recognised where it must not be.
    pub fn token(&self) -> &Secret {
        &self.secret
    }
}

/// Authorization servers, as something to call. [`Calls`] is the one that uses the network.
pub trait Servers: Send + Sync + 'static {
    /// Sends a request of a client: for a token, or about one. Its body is not sent after the moment `by`.
    fn post(&self, request: TokenRequest, by: Option<Now>) -> BoxFuture<'_, Result<Reply, CallError>>;
    /// Gets a metadata document.
    fn metadata(&self, url: Url) -> BoxFuture<'_, Result<Reply, CallError>>;
}

impl Servers for Calls {
    fn post(&self, request: TokenRequest, by: Option<Now>) -> BoxFuture<'_, Result<Reply, CallError>> {
        async move { Calls::post(self, &request, BODY_LIMIT, by).await }.boxed()
    }

    fn metadata(&self, url: Url) -> BoxFuture<'_, Result<Reply, CallError>> {
        async move { self.get(&url, BODY_LIMIT).await }.boxed()
    }
}

/// What a [`Tokens`] works with.
pub struct Parts {
    /// Where grants are kept.
    pub store: Store,
    /// How authorization servers are reached.
    pub servers: Arc<dyn Servers>,
    /// What time it is.
    pub clock: Clock,
    /// Who is told.
    pub events: Events,
    /// What waits for a renewal that is under way.
    pub drain: Drain,
}

/// Why there is no token for a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Nobody has granted access yet.
    #[error("`{subject}` has not connected `{provider}`")]
    NotConnected {
        /// The provider.
        provider: ProviderName,
        /// The user.
        subject: Subject,
    },
    /// The provider no longer honours the grant (SEMANTICS C15).
    #[error("`{provider}` no longer honours the grant of `{subject}`: {reason}")]
    Reauthorize {
        /// The provider.
        provider: ProviderName,
        /// The user.
        subject: Subject,
        /// `invalid_grant`, `lost_rotation`, ...
        reason: String,
    },
    /// The provider refuses this client (SEMANTICS C15).
    #[error("`{provider}` refuses the client: {error}")]
    FixConfiguration {
        /// The provider.
        provider: ProviderName,
        /// Its error code, or what is wrong.
        error: String,
    },
    /// The provider, the network or the store fails for now (SEMANTICS C15, C17).
    #[error("no token from `{provider}` now: {why}")]
    Unavailable {
        /// The provider.
        provider: ProviderName,
        /// What failed.
        why: String,
        /// When it is tried again.
        retry_after: Duration,
        /// Whether the provider was asked: one that was not need not be spared.
        asked: bool,
    },
}

impl TokenError {
    fn not_connected(key: &Key) -> Self {
        TokenError::NotConnected { provider: key.provider.clone(), subject: key.subject.clone() }
    }

    /// Whether only the user can mend it, by granting access.
    pub fn is_for_the_user(&self) -> bool {
        matches!(self, TokenError::NotConnected { .. } | TokenError::Reauthorize { .. })
    }

    /// A stable name for logs and answers.
    pub fn code(&self) -> &'static str {
        match self {
            TokenError::NotConnected { .. } => "not_connected",
            TokenError::Reauthorize { .. } => "reauthorize",
            TokenError::FixConfiguration { .. } => "fix_configuration",
            TokenError::Unavailable { .. } => "token_unavailable",
        }
    }
}

/// Why a 401 brings no second try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoRenewal {
    /// A 401 forced a renewal a short time ago (SEMANTICS C5).
    CoolDown,
    /// The provider gave the same token again.
    SameToken,
    /// There is no new token.
    Failed(TokenError),
}

impl NoRenewal {
    /// A stable name for logs.
    pub fn code(&self) -> &'static str {
        match self {
            NoRenewal::CoolDown => "cooldown",
            NoRenewal::SameToken => "same_token",
            NoRenewal::Failed(error) => error.code(),
        }
    }
}

/// Why a token is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// There is none, or it expired.
    Needed,
    /// It will expire soon.
    Ahead,
    /// The upstream answered 401 to the token at hand.
    Rejected,
}

impl Cause {
    fn name(self) -> &'static str {
        match self {
            Cause::Needed => "needed",
            Cause::Ahead => "ahead",
            Cause::Rejected => "rejected",
        }
    }
}

/// A renewal under way, which any number may await.
type Flight = Shared<oneshot::Receiver<Result<Bearer, TokenError>>>;

impl Tokens {
    /// Tokens for these providers, none of them fetched yet. Must be called within a tokio runtime.
    pub fn new(providers: &[Arc<Provider>], parts: Parts) -> Self {
        let providers = Arc::new(known::providers(providers, &Providers::new()));
        let Parts { store, servers, clock, events, drain } = parts;
        count_from_zero(&providers, &events);
        let inner = Arc::new_cyclic(|inner: &Weak<Inner>| Inner {
            current: ArcSwap::new(providers.clone()),
            targets: Targets::of(&providers),
            slots: DashMap::new(),
            waning: Mutex::default(),
            store,
            servers,
            clock,
            events,
            schedule: schedule::start(inner.clone(), &drain),
            drain,
        });
        Self { inner, providers }
    }

    /// The same tokens with these providers, at which they are renewed from now on; what was made before goes on with the
    /// providers that it knows. A provider that is the same goes on as it was, its rests too; one that is another in
    /// anything is asked again at once, whatever it refused before (SEMANTICS C15).
    pub fn reconfigured(&self, providers: &[Arc<Provider>]) -> Self {
        let before = self.inner.current.load_full();
        let providers = Arc::new(known::providers(providers, &before));
        count_from_zero(&providers, &self.inner.events);
        self.inner.targets.include(&providers);
        self.inner.current.store(providers.clone());
        // After that: what fails from now on, failed as it is configured now.
        for slot in &self.inner.slots {
            let of = |providers: &Providers| providers.get(&slot.key.provider).map(Arc::as_ptr);
            if of(&providers) == of(&before) {
                continue;
            }
            if known::gives(&before, &slot.key).is_none() && known::gives(&providers, &slot.key).is_some() {
                // Nobody has renewed it since, and its grant may be another one.
                slot.doubt();
                self.inner.wanes(&slot.key);
            }
            slot.reconsider();
        }
        Self { inner: self.inner.clone(), providers }
    }

    /// Says that there is another way to the providers: what failed on the old one is tried again at once.
    pub fn way_changed(&self) {
        for slot in &self.inner.slots {
            slot.try_again();
        }
    }

    /// The token that a user's request to a provider needs; none when no such provider is configured.
    pub fn key(&self, provider: &ProviderName, user: &UserName) -> Option<Key> {
        let known = self.providers.get(provider)?;
        let subject = match known.provider.grant {
            Grant::ClientCredentials => Subject::Client,
            Grant::RefreshToken | Grant::AuthorizationCode => Subject::User(user.clone()),
        };
        Some(known.key(subject))
    }

    /// The provider behind a key.
    pub fn provider(&self, key: &Key) -> Option<&Arc<Provider>> {
        self.providers.get(&key.provider).map(|known| &known.provider)
    }

    /// A token that has not expired: from memory, else from the store, else from the provider.
    ///
    /// # Errors
    /// There is none, and [`TokenError`] says what would bring one.
    pub async fn bearer(&self, key: &Key) -> Result<Bearer, TokenError> {
        let flight = {
            let slot = self.inner.slot(key);
            let now = self.inner.clock.now();
            let mut state = slot.lock();
            if let Some(bearer) = state.usable(now) {
                if state.due(now) {
                    // Nobody waits for it: the token at hand is good.
                    Inner::fly_ahead(&self.inner, &slot, &mut state);
                }
                return Ok(bearer);
            }
            if let Some(error) = state.resting(now) {
                return Err(error);
            }
            self.fly(&slot, &mut state, Cause::Needed)
        };
        land(&key.provider, flight).await
    }

    /// A token other than the one that was just rejected with 401: a newer one if there is one, else a renewed one.
    ///
    /// # Errors
    /// No second try makes sense, and [`NoRenewal`] says why.
    pub async fn renew(&self, key: &Key, rejected: &Bearer) -> Result<Bearer, NoRenewal> {
        let renewed = match self.reject(key, rejected) {
            Ok(Ok(newer)) => newer,
            Ok(Err(flight)) => land(&key.provider, flight).await.map_err(NoRenewal::Failed)?,
            Err(NoRenewal::CoolDown) => self.superseded(key, rejected).await?,
            Err(why) => return Err(why),
        };
        if renewed.secret == rejected.secret { Err(NoRenewal::SameToken) } else { Ok(renewed) }
    }

    /// As [`Tokens::renew`], without waiting: for a request that cannot be sent again.
    pub fn renew_for_the_next(&self, key: &Key, rejected: &Bearer) {
        // A flight goes on by itself; what it brings is in the slot for whoever comes next.
        let _ = self.reject(key, rejected);
    }

    /// Says that an upstream took a token: a forced renewal has been worth it (SEMANTICS C5).
    pub fn accepted(&self, key: &Key, bearer: &Bearer) {
        if bearer.unproven {
            self.inner.slot(key).lock().proven(bearer.generation);
        }
    }

    /// In the cool-down: a token of a grant that somebody stored since, which is worth a call at once.
    async fn superseded(&self, key: &Key, rejected: &Bearer) -> Result<Bearer, NoRenewal> {
        let slot = self.inner.slot(key);
        if !slot.lock().may_look(self.inner.clock.now()) {
            return Err(NoRenewal::CoolDown);
        }
        let row = self.inner.store.grant(&key.provider, &key.subject).await;
        let later = row.ok().flatten().filter(|row| row.generation > rejected.generation);
        if !later.is_some_and(|row| self.is_worth_a_call(&row, key)) {
            return Err(NoRenewal::CoolDown);
        }

        let flight = {
            let mut state = slot.lock();
            if let Some(error) = state.resting(self.inner.clock.now()) {
                return Err(NoRenewal::Failed(error));
            }
            self.fly(&slot, &mut state, Cause::Rejected)
        };
        land(&key.provider, flight).await.map_err(NoRenewal::Failed)
    }

    fn reject(&self, key: &Key, rejected: &Bearer) -> Result<Result<Bearer, Flight>, NoRenewal> {
        let slot = self.inner.slot(key);
        let now = self.inner.clock.now();
        let mut state = slot.lock();
        if let Some(newer) = state.usable(now).filter(|bearer| bearer.generation != rejected.generation) {
            return Ok(Ok(newer));
        }
        if let Some(flight) = slot.join(&mut state) {
            return Ok(Err(flight));
        }
        if !state.may_force(now, rejected.generation) {
            return Err(NoRenewal::CoolDown);
        }
        if let Some(error) = state.resting(now) {
            return Err(NoRenewal::Failed(error));
        }
        state.forced(now);
        self.inner.tell(key, TokenChange::Rejected { generation: rejected.generation });
        Ok(Err(self.fly(&slot, &mut state, Cause::Rejected)))
    }

    /// Joins the renewal under way, or starts one: at the provider as it is configured now, else as the request knows it.
    fn fly(&self, slot: &Arc<Slot>, state: &mut State, cause: Cause) -> Flight {
        let known = self.inner.renewing(&slot.key).or_else(|| self.providers.get(&slot.key.provider).cloned());
        Inner::fly(&self.inner, slot, state, cause, known)
    }
}

impl Inner {
    fn slot(&self, key: &Key) -> Arc<Slot> {
        if let Some(slot) = self.slots.get(key) {
            return slot.clone();
        }
        let new = || {
            self.wanes(key);
            Arc::new(Slot::new(key.clone()))
        };
        self.slots.entry(key.clone()).or_insert_with(new).clone()
    }

    /// The slots of a user or of the client, whatever they are good for: of configurations that are gone, too.
    fn slots_of(&self, provider: &ProviderName, subject: &Subject) -> Vec<Arc<Slot>> {
        let key = |(target, registration)| {
            let (provider, subject) = (provider.clone(), subject.clone());
            Key { provider, subject, target, registration }
        };
        let keys = self.targets.of_provider(provider).into_iter().map(key);
        keys.filter_map(|key| self.slots.get(&key).map(|slot| slot.clone())).collect()
    }

    /// The grant of a user is gone or another one, and with it every token of it.
    fn forget_all(&self, provider: &ProviderName, subject: &Subject) {
        for slot in self.slots_of(provider, subject) {
            self.forget(&slot);
        }
    }

    /// The grant of a slot is gone, and its token with it.
    fn forget(&self, slot: &Slot) {
        slot.forget();
        self.wanes(&slot.key);
    }

    /// Has the sweep look at a slot until it holds a token that is not due.
    fn wanes(&self, key: &Key) {
        self.waning.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
    }

    /// Forgets the users of whom nothing is known: an agent may make up any number of names (OAU-019). And those whose
    /// token has ended unused.
    fn sweep(&self) {
        let now = self.clock.now();
        let waning = std::mem::take(&mut *self.waning.lock().unwrap_or_else(PoisonError::into_inner));
        let still = waning.into_iter().filter(|key| {
            // Only a plan of renewal can get hold of a slot while it is looked at, and it would find nothing to renew: its
            // part of the map is locked.
            let gone = self.slots.remove_if(key, |_, slot| Arc::strong_count(slot) == 1 && slot.is_idle(now)).is_some();
            !gone && self.slots.get(key).is_some_and(|slot| slot.lock().wanes(now))
        });
        let still: Vec<Key> = still.collect();
        self.waning.lock().unwrap_or_else(PoisonError::into_inner).extend(still);
    }

    /// The provider as it is configured now, for as long as it gives tokens of this key: a configuration may have other
    /// scopes for it, or none of it.
    fn renewing(&self, key: &Key) -> Option<Arc<Known>> {
        known::gives(&self.current.load(), key).cloned()
    }

    /// Renews a token that nobody waits for; none that no configured provider gives any more.
    fn fly_ahead(inner: &Arc<Inner>, slot: &Arc<Slot>, state: &mut State) {
        if let Some(known) = inner.renewing(&slot.key) {
            drop(Inner::fly(inner, slot, state, Cause::Ahead, Some(known)));
        }
    }

    /// Joins the renewal under way, or starts one.
    fn fly(inner: &Arc<Inner>, slot: &Arc<Slot>, state: &mut State, cause: Cause, known: Option<Arc<Known>>) -> Flight {
        if let Some(flight) = slot.join(state) {
            return flight;
        }
        let (landed, flight) = oneshot::channel();
        let flight = flight.shared();
        slot.take_off(state, flight.clone(), cause);
        let (inner, slot) = (inner.clone(), slot.clone());
        // In a task of its own: an agent that hangs up must not cancel a renewal, since the provider may already
        // have replaced the refresh token that we would then lose.
        inner.clone().drain.spawn(async move {
            let outcome = loop {
                // A panic must not leave a flight that never lands: nobody could start another.
                let outcome = AssertUnwindSafe(refresh::run(&inner, &slot, cause, known.as_ref())).catch_unwind().await;
                // When the grant that it began with has gone, there may be another by now.
                if !std::mem::take(&mut slot.lock().void) {
                    break outcome.unwrap_or_else(|_| Err(broken_off(&slot.key.provider)));
                }
            };
            // The only error is that nobody waits.
            let _ = landed.send(inner.settle(&slot, cause, known.as_ref(), outcome));
        });
        flight
    }

    /// Keeps what a renewal brought, and plans the next one.
    fn settle(
        &self,
        slot: &Arc<Slot>,
        cause: Cause,
        asked: Option<&Arc<Known>>,
        outcome: Result<slot::Token, TokenError>,
    ) -> Result<Bearer, TokenError> {
        let now = self.clock.now();
        let mut state = slot.lock();
        let repeated = outcome.as_ref().is_err_and(|error| state.is_known(error));
        let (news, not_connected) = (state.news, TokenError::not_connected(&slot.key));
        let settled = state.settle(now, cause, outcome, not_connected);
        if self.renewing(&slot.key).as_ref().map(Arc::as_ptr) != asked.map(Arc::as_ptr) {
            // It failed as it was configured before; that says nothing of what is configured now.
            state.reconsider();
        }
        let (next, serving_old) = (state.next_renewal(now), state.has_usable(now));
        drop(state);
        if let Some(at) = next {
            self.schedule.at(slot, at);
        }
        if news || !settled.as_ref().is_err_and(TokenError::is_for_the_user) {
            // What another process has stored for them was fetched here, by nobody who waits, or is still to be fetched.
            slot.changed.notify_waiters();
        }
        if let Err(error) = settled.as_ref() {
            let (cause, code, error) = (cause.name(), error.code(), error.to_string());
            self.tell(&slot.key, TokenChange::Failed { cause, code, error, serving_old, repeated });
        }
        settled
    }

    fn tell(&self, key: &Key, what: TokenChange) {
        self.tell_of((key.provider.clone(), key.subject.clone()), what);
    }

    fn tell_of(&self, (provider, subject): (ProviderName, Subject), what: TokenChange) {
        self.events.token(events::Token { provider, subject, what });
    }
}

/// Whatever can come of a renewal is counted from 0, so that the first failure is an increase.
fn count_from_zero(providers: &Providers, events: &Events) {
    for (name, known) in providers {
        let of_users: &[_] = if known.provider.grant.is_for_users() { &["reauthorize", "not_connected"] } else { &[] };
        for cause in [Cause::Needed, Cause::Ahead, Cause::Rejected] {
            let outcomes = ["obtained", "token_unavailable", "fix_configuration"].iter().chain(of_users);
            outcomes.for_each(|outcome| events.metrics().renewals_begin(name, cause.name(), outcome));
        }
    }
}

async fn land(provider: &ProviderName, flight: Flight) -> Result<Bearer, TokenError> {
    // The only error is that the runtime has dropped the task: the process is ending.
    flight.await.unwrap_or_else(|_| Err(broken_off(provider)))
}

fn broken_off(provider: &ProviderName) -> TokenError {
    let why = "the renewal broke off; this is a defect in Sidebearer".to_owned();
    TokenError::Unavailable { provider: provider.clone(), why, retry_after: Duration::from_secs(1), asked: true }
}
