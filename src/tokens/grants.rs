//! Grants that come and go while the sidecar runs: by consent, by disconnect, and by what other processes store.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use url::Url;

use super::known::{Asked, Known, NoEndpoint, Refusal, Revocation};
use super::slot::{Slot, Token};
use super::{Bearer, Inner, Key, TokenError, Tokens};
use crate::events::TokenChange;
use crate::names::{ProviderName, Subject, UserName};
use crate::oauth::grant::{Ask, TokenRequest};
use crate::oauth::wire::Failure;
use crate::oauth::{Endpoint, union};
use crate::secret::Secret;
use crate::store::{Change, Row, State, StoreError};
use crate::upstream::{CallError, Reply};

/// How often it is looked for users who never were.
const SWEEP_EVERY: Duration = Duration::from_millis(500);
/// How soon a store is asked again that could not say what has changed.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// When it is looked whether a change was made all the same, one after the other: the request for it may have been held up.
const FIND_OUT_AFTER: [Duration; 3] = [Duration::ZERO, Duration::from_secs(5), Duration::from_secs(55)];
/// How long a statement may still be under way that nobody waits for: longer than the store's server lets one run.
const OUTSTANDING: Duration = Duration::from_secs(6);
/// How soon it is looked again whether a grant was stored.
const LOOK_FOR_GRANT: Duration = Duration::from_secs(2);
/// How long to wait before a grant that could not be stored is tried again.
const STORE_AGAIN: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(500), Duration::from_secs(2)];

/// What shows that a user has consented.
#[derive(Debug, Clone)]
pub enum Proof {
    /// A code, from the user's browser (RFC 6749 section 4.1).
    Code {
        /// The code.
        code: Secret,
        /// What it was asked for with (RFC 7636).
        verifier: Secret,
        /// The redirect URI that it was asked for with.
        redirect_uri: String,
    },
    /// A device code (RFC 8628).
    DeviceCode(Secret),
}

impl Proof {
    fn ask(&self) -> Ask<'_> {
        match self {
            Proof::Code { code, verifier, redirect_uri } => Ask::Code { code, verifier, redirect_uri },
            Proof::DeviceCode(code) => Ask::DeviceCode(code),
        }
    }
}

/// What a user has granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// The scopes, as far as the provider or our request names them.
    pub scopes: Vec<String>,
    /// How long the first token lives, if that is known.
    pub lifetime: Option<Duration>,
    /// Whether the grant can be renewed without the user.
    pub renewable: bool,
}

/// Why a consent brought no grant.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// The provider, or the way to it.
    #[error("{0}")]
    Provider(#[from] Failure),
    /// Where to ask is not known.
    #[error("{0}")]
    Nowhere(String),
    /// The grant could not be stored, and has been given back.
    #[error("the grant cannot be stored: {0}")]
    Store(StoreError),
}

/// Where a browser is sent for a consent, and who must have answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorizer {
    /// The authorization endpoint.
    pub endpoint: Url,
    /// The issuer that `iss` has to name, to the letter, if one is known (RFC 9207 section 2.4).
    pub issuer: Option<String>,
    /// Whether the answer has to have an `iss`.
    pub names_itself: bool,
}

impl Tokens {
    /// Where users of a provider consent.
    ///
    /// # Errors
    /// In words, when it is not known or cannot be found out.
    pub async fn authorizer(&self, provider: &ProviderName) -> Result<Authorizer, String> {
        let known = self.known(provider)?;
        let servers = &*self.inner.servers;
        let endpoint = known.endpoint(Endpoint::Authorization, servers).await.map_err(|none| none.to_string())?;
        let discovered = known.discovered();
        let written = || known.provider.endpoints.issuer.as_ref().map(|issuer| issuer.name.clone());
        let issuer = discovered.map(|metadata| metadata.issuer.clone()).or_else(written);
        let names_itself = discovered.is_some_and(|metadata| metadata.names_itself);
        Ok(Authorizer { endpoint, issuer, names_itself })
    }

    /// Where a device flow of a provider begins (RFC 8628).
    ///
    /// # Errors
    /// In words, when it is not known or cannot be found out.
    pub async fn device_authorization_endpoint(&self, provider: &ProviderName) -> Result<Url, String> {
        let known = self.known(provider)?;
        let found = known.endpoint(Endpoint::DeviceAuthorization, &*self.inner.servers).await;
        found.map_err(|none| none.to_string())
    }

    /// Sends a provider something else than a token request.
    ///
    /// # Errors
    /// When no answer comes.
    pub async fn post(&self, request: TokenRequest) -> Result<Reply, CallError> {
        self.inner.servers.post(request, None).await
    }

    /// Turns a user's consent into a stored grant, and has it used from now on. `further` are the scopes that were asked
    /// for besides the configured ones.
    ///
    /// It goes on when nobody waits for it any more: the code is good once, and what it brought must be kept.
    ///
    /// # Errors
    /// See [`GrantError`].
    pub async fn grant(
        &self,
        provider: &ProviderName,
        user: &UserName,
        proof: Proof,
        further: Vec<String>,
    ) -> Result<Granted, GrantError> {
        let known = self.known(provider).map_err(GrantError::Nowhere)?;
        let key = known.key(Subject::User(user.clone()));
        let inner = self.inner.clone();
        let granting = self.inner.drain.spawn(async move { inner.grant(&known, &key, &proof, further).await });
        granting.await.unwrap_or_else(|_| Err(GrantError::Nowhere("the consent broke off".into())))
    }

    /// Removes a user's grant and gives it back to the provider; nothing when there is none.
    ///
    /// The removal comes first: whatever the provider says, this sidecar uses the grant no more.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn disconnect(
        &self,
        provider: &ProviderName,
        subject: &Subject,
    ) -> Result<Option<Revocation>, StoreError> {
        let (tokens, provider, subject) = (self.clone(), provider.clone(), subject.clone());
        let leaving = self.inner.drain.spawn(async move {
            let left = tokens.inner.disconnect(&provider, &subject).await;
            if left.is_err() {
                tokens.find_out(Change::Of(provider, subject));
            }
            left
        });
        leaving.await.unwrap_or_else(|_| Ok(Some(Revocation::Failed("it broke off".into()))))
    }

    /// As [`Tokens::bearer`]; where only the user is missing, waits up to `wait` for them to connect.
    ///
    /// # Errors
    /// As [`Tokens::bearer`].
    pub async fn bearer_within(&self, key: &Key, wait: Duration) -> Result<Bearer, TokenError> {
        let slot = self.inner.slot(key);
        let _parked = slot.park();
        let until = Instant::now() + wait;
        loop {
            let mut changed = std::pin::pin!(slot.changed.notified());
            // Before looking: what comes in between is not missed.
            changed.as_mut().enable();
            let missing = match self.bearer(key).await {
                Err(error) if error.is_for_the_user() => error,
                other => return other,
            };
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(until) => return Err(missing),
                () = self.inner.drain.started() => return Err(missing),
            }
        }
    }

    /// The users that requests wait for, each with the moment since which they do.
    pub fn waiting(&self) -> Vec<(Key, Instant)> {
        let slots = self.inner.slots.iter();
        let mut waiting: Vec<_> = slots.filter_map(|slot| Some((slot.key().clone(), slot.parked_since()?))).collect();
        waiting.sort_by_key(|(_, since)| *since);
        waiting
    }

    /// Follows what other processes write to the store, until the stop begins: a new grant is used at once, and a
    /// removed one no more. What is remembered of users who never were is forgotten by the way.
    pub async fn follow_store(&self) {
        tokio::select! {
            () = self.inner.drain.started() => {}
            () = self.follow_changes() => {}
            () = self.sweep_now_and_then() => {}
        }
    }

    async fn sweep_now_and_then(&self) {
        loop {
            tokio::time::sleep(SWEEP_EVERY).await;
            self.inner.sweep();
        }
    }

    pub(super) async fn follow_changes(&self) {
        let mut changes = self.inner.store.watch().await;
        loop {
            let change = changes.next().await;
            self.notice(&change).await;
        }
    }

    /// Looks whether a change was made whose answer did not come. Nobody else tells of what this process does.
    fn find_out(&self, change: Change) {
        let tokens = self.clone();
        tokio::spawn(async move {
            let looks = async {
                for wait in FIND_OUT_AFTER {
                    tokio::time::sleep(wait).await;
                    tokens.notice(&change).await;
                }
            };
            tokio::select! {
                () = tokens.inner.drain.started() => {}
                () = looks => {}
            }
        });
    }

    async fn notice(&self, change: &Change) {
        // It is told once.
        while self.reconcile(change).await.is_err() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Holds what is in memory against what is in the store. What is written for one user is no news to another: it ends
    /// no rest of theirs.
    async fn reconcile(&self, change: &Change) -> Result<(), StoreError> {
        let mut slots: Vec<Arc<Slot>> = match change {
            Change::Anything => self.inner.slots.iter().map(|slot| slot.value().clone()).collect(),
            Change::Of(provider, subject) => self.inner.slots_of(provider, subject),
        };
        slots.retain(|slot| slot.key.subject != Subject::Client);
        let names = |slot: &Slot| (slot.key.provider.clone(), slot.key.subject.clone());
        let stored = self.inner.store.generations(slots.iter().map(|slot| names(slot))).await?;
        for slot in &slots {
            let Some(stored) = stored.get(&names(slot)) else {
                // A renewal may be under way of what is gone.
                if slot.lock().has_seen_a_grant() {
                    self.inner.forget(slot);
                }
                continue;
            };
            if !slot.lock().is_told_of(*stored) || self.is_refused_alike(slot).await {
                continue;
            }
            match slot.generation() {
                None => slot.awake(),
                Some(held) if *stored > held => self.take_over(slot, *stored).await,
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Whether another process was refused just as this one was, and has stored no more than a refresh token: to ask again
    /// would be news to that process in turn, and so on (SEMANTICS C15).
    async fn is_refused_alike(&self, slot: &Slot) -> bool {
        let rests = slot.lock().resting(self.inner.clock.now());
        if !matches!(rests, Some(TokenError::FixConfiguration { .. })) {
            return false;
        }
        let row = self.inner.store.grant(&slot.key.provider, &slot.key.subject).await;
        row.is_ok_and(|row| row.is_some_and(|row| matches!(row.state, State::FixConfiguration { .. })))
    }

    /// Another process has stored a newer grant than the one that brought the token at hand.
    async fn take_over(&self, slot: &Arc<Slot>, stored: u64) {
        let Key { provider, subject, .. } = &slot.key;
        if self.inner.renewing(&slot.key).is_none() {
            // Of a configuration that is gone: nobody renews it until that comes back.
            return self.inner.forget(slot);
        }
        let row = self.inner.store.grant(provider, subject).await;
        if row.is_ok_and(|row| row.is_some_and(|row| self.is_no_use(&row, &slot.key))) {
            // To renew it for this one would be news to that process in turn, and so on for ever: only a request that
            // needs a token does.
            return slot.awake();
        }
        let mut state = slot.lock();
        // A renewal that was under way may have found it meanwhile; one more would redeem it for nothing.
        if state.generation().is_some_and(|held| held < stored) {
            // The token at hand serves until the new one is there, which may take more than one try.
            state.replaced_by(stored);
            Inner::fly_ahead(&self.inner, slot, &mut state);
        }
    }

    /// Whether another process has renewed it for itself only, with other scopes, or with a wall clock far from ours; or
    /// got nothing that can be used.
    fn is_no_use(&self, row: &Row, key: &Key) -> bool {
        let now = self.inner.clock.now();
        let is_over = |access| !Token::stored(access, row.generation, now, Duration::ZERO).lives(now);
        let is_refused = matches!(row.state, State::FixConfiguration { .. });
        is_refused
            || row.target != *key.target
            || !row.is_of(key.registration)
            || row.access.as_ref().is_some_and(is_over)
    }

    /// Whether a later row brings something else than what was rejected: not where another process has renewed for itself
    /// only what both have. Each would do so for the other's sake, in turn and for ever.
    pub(super) fn is_worth_a_call(&self, row: &Row, key: &Key) -> bool {
        // A consent writes both times at once, and an import knows of no renewal. A client has no grant but this.
        let is_new = row.renewed_at.is_none_or(|renewed_at| renewed_at == row.stored_at);
        is_new && key.subject != Subject::Client || !self.is_no_use(row, key)
    }

    fn known(&self, provider: &ProviderName) -> Result<Arc<Known>, String> {
        let known = self.providers.get(provider).cloned();
        known.ok_or_else(|| format!("no provider is named `{provider}`"))
    }
}

impl Inner {
    async fn grant(
        self: &Arc<Self>,
        known: &Arc<Known>,
        key: &Key,
        proof: &Proof,
        further: Vec<String>,
    ) -> Result<Granted, GrantError> {
        let endpoint = known.endpoint(Endpoint::Token, &*self.servers).await;
        let endpoint = endpoint.map_err(|none: NoEndpoint| GrantError::Nowhere(none.to_string()))?;
        // Each call before it ends within its own deadline.
        let turn = known.turns.all.acquire().await;
        let asked = known.ask(&*self.servers, &self.clock, &endpoint, proof.ask(), None).await;
        drop(turn);
        let asked = asked.map_err(|refusal| match refusal {
            Refusal::Unsent(why) => Failure::Transient { why, retry_after: None },
            Refusal::Failed(failure) => failure,
        })?;

        let answer = &asked.answer;
        let row = Row {
            refresh_token: answer.refresh_token.clone(),
            access: Some(known.access(&asked)),
            granted_scopes: answer.scopes.clone(),
            further_scopes: further.clone(),
            registration: Some(known.registration),
            renewed_at: Some(asked.sent.wall),
            ..Row::new(key.provider.clone(), key.subject.clone(), (*key.target).clone(), asked.sent.wall)
        };
        let generation = match self.keep(row).await {
            Ok(generation) => generation,
            Err(error @ StoreError::Away { .. }) => {
                Inner::give_back_unless_stored(self.clone(), known.clone(), key.clone(), asked);
                return Err(GrantError::Store(error));
            }
            Err(error) => {
                self.give_back(known, &asked).await;
                return Err(GrantError::Store(error));
            }
        };
        let lifetime = known.lifetime(answer);
        let took = self.clock.now().instant - asked.sent.instant;
        let slot = self.slot(key);
        slot.granted(known.token(&asked, generation));
        for other in self.slots_of(&key.provider, &key.subject).iter().filter(|other| !Arc::ptr_eq(other, &slot)) {
            self.forget(other);
        }
        if let Some(at) = slot.lock().next_renewal(self.clock.now()) {
            self.schedule.at(&slot, at);
        }
        self.tell(key, TokenChange::Obtained { cause: "consent", lifetime, generation, took });
        let scopes = answer.scopes.clone().unwrap_or_else(|| union(&known.target.scopes, &further));
        Ok(Granted { scopes, lifetime, renewable: answer.refresh_token.is_some() })
    }

    /// Stores a new grant; a store that fails for a moment must not cost the user their consent.
    async fn keep(&self, row: Row) -> Result<u64, StoreError> {
        let mut kept = self.store.replace(row.clone()).await;
        for wait in STORE_AGAIN {
            let Err(error) = &kept else { break };
            tracing::warn!(provider = %row.provider, subject = %row.subject, %error,
                "a new grant could not be stored; it is tried again");
            tokio::time::sleep(wait).await;
            kept = self.keep_again(&row).await;
        }
        kept
    }

    /// It may have been stored all the same, and renewed since: then to store it again would bring a spent refresh token
    /// back.
    async fn keep_again(&self, row: &Row) -> Result<u64, StoreError> {
        match self.store.grant(&row.provider, &row.subject).await? {
            Some(there) if there.is_of_grant(row) && there.refresh_token == row.refresh_token => Ok(there.generation),
            // What is at hand is older than what is there.
            Some(there) if there.is_of_grant(row) => Ok(there.generation - 1),
            _ => self.store.replace(row.clone()).await,
        }
    }

    /// Whether the grant was stored is not known: the answer may have been lost. If it was, the user has what they wanted, and
    /// it stays; else it is given back.
    fn give_back_unless_stored(inner: Arc<Inner>, known: Arc<Known>, key: Key, asked: Asked) {
        inner.clone().drain.spawn(async move {
            let mut wait = OUTSTANDING;
            let stored = loop {
                tokio::time::sleep(wait).await;
                match inner.store.grant(&key.provider, &key.subject).await {
                    Ok(stored) => break stored,
                    Err(_) => wait = LOOK_FOR_GRANT,
                }
            };
            let token = stored.and_then(|row| row.access).map(|access| access.token);
            if token.as_ref() == Some(&asked.answer.access_token) {
                tracing::info!(provider = %key.provider, subject = %key.subject, "the new grant was stored after all");
                // What is at hand is of the grant before it.
                inner.forget_all(&key.provider, &key.subject);
            } else {
                inner.give_back(&known, &asked).await;
            }
        });
    }

    async fn give_back(&self, known: &Known, asked: &Asked) {
        let (token, renews) = asked.answer.what_to_revoke();
        let _ = known.revoke(&*self.servers, token, renews).await;
    }

    async fn disconnect(&self, provider: &ProviderName, subject: &Subject) -> Result<Option<Revocation>, StoreError> {
        let removed = self.store.remove(provider, subject).await?;
        self.forget_all(provider, subject);
        let Some(removed) = removed else { return Ok(None) };
        let key = (provider.clone(), subject.clone());
        self.tell_of(key, TokenChange::Disconnected);
        let token = match (&removed.refresh_token, &removed.access_token) {
            (Some(token), _) => Some((token, true)),
            (None, Some(token)) => Some((token, false)),
            (None, None) => None,
        };
        let revocation = match (self.current.load().get(provider).cloned(), token) {
            // It is given back where it is from, and shown nowhere else.
            (Some(known), _) if removed.registration.is_some_and(|its| its != known.registration) => {
                Revocation::Failed("it is of another server or client than is configured".into())
            }
            (Some(known), Some((token, renews))) => known.revoke(&*self.servers, token, renews).await,
            (None, _) => Revocation::Failed("it is no longer configured".into()),
            (_, None) => Revocation::Failed("what is stored of it does not open".into()),
        };
        if let Revocation::Failed(why) = &revocation {
            tracing::warn!(%provider, %subject, why, "the grant is forgotten here, but not revoked at the provider");
        }
        Ok(Some(revocation))
    }
}
