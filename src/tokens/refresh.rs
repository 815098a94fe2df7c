//! One renewal, from the stored grant to the stored answer: the steps of SEMANTICS C12, in their order.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::SemaphorePermit;
use tokio::time::Instant;
use url::Url;

use super::slot::{LONGEST_LIFETIME, Slot, Token};
use super::{Cause, Inner, Known, TokenError};
use crate::clock::Now;
use crate::events::TokenChange;
use crate::oauth::grant::{self, Ask};
use crate::oauth::wire::{self, Answer, Failure};
use crate::oauth::{Endpoint, Grant, metadata};
use crate::secret::Secret;
use crate::store::{Access, Intent, Lease, Put, Row, State as RowState, StoreError};
use crate::upstream::CallError;

/// How long a renewal may wait before it calls: for discovery, for a turn, for another process.
const PREPARATION: Duration = Duration::from_secs(10);
/// How long another process's renewal is waited for (SEMANTICS C19).
const LEASE_WAIT: Duration = Duration::from_secs(5);
/// How soon a row that could not be written is tried again, at first and at most.
const SAVE_AGAIN: Duration = Duration::from_secs(1);
const SAVE_AGAIN_MOST: Duration = Duration::from_secs(10);

/// Brings a token for a slot: adopts a newer one from the store, or asks the provider.
pub(super) async fn run(inner: &Arc<Inner>, slot: &Arc<Slot>, cause: Cause) -> Result<Token, TokenError> {
    let known = inner.providers.get(&slot.key.provider).cloned().ok_or_else(|| TokenError::FixConfiguration {
        provider: slot.key.provider.clone(),
        error: "it is no longer configured".into(),
    })?;
    let place = match cause {
        Cause::Ahead => queue(inner, slot, &known).await,
        Cause::Needed | Cause::Rejected => Place::First,
    };
    let renewal = Renewal { inner, slot, known: known.clone(), cause, ready_by: Instant::now() + PREPARATION };
    if let Place::Never = place {
        return Err(renewal.unavailable("the sidecar is stopping".into(), Duration::ZERO));
    }
    let token = match known.provider.grant {
        Grant::ClientCredentials => renewal.mint().await?,
        Grant::RefreshToken => renewal.rotate().await?,
    };
    if token.is_over(inner.clock.now()) {
        return Err(renewal.unavailable("the token had ended before it came".into(), Duration::ZERO));
    }
    Ok(token)
}

/// A renewal's place in the queue of those that nobody waits for.
enum Place<'a> {
    /// None is needed: somebody waits for it.
    First,
    /// It came up, and is kept until the renewal is done.
    Taken { _permit: SemaphorePermit<'a> },
    /// The stop comes first.
    Never,
}

/// Renewals that nobody waits for queue among themselves, so that a thousand of them hold up no request, and for as
/// long as it takes.
async fn queue<'a>(inner: &Inner, slot: &Slot, known: &'a Known) -> Place<'a> {
    tokio::select! {
        biased;
        () = slot.awaited.notified() => Place::First,
        () = inner.drain.started() => Place::Never,
        permit = known.turns.ahead.acquire() => permit.map_or(Place::Never, |permit| Place::Taken { _permit: permit }),
    }
}

struct Renewal<'a> {
    inner: &'a Arc<Inner>,
    slot: &'a Arc<Slot>,
    known: Arc<Known>,
    cause: Cause,
    /// Until when it waits for what it needs before it calls.
    ready_by: Instant,
}

/// What the provider answered, and when it was asked.
struct Asked {
    answer: Answer,
    sent: Now,
}

/// What the store has for a key, when it has anything good.
enum Found {
    /// A token that will do.
    Token(Token),
    /// A grant that brings one.
    Grant(Row),
}

/// Why the provider gave no token.
enum Refusal {
    /// Not a byte reached it.
    Unsent(String),
    /// It answered, or may have acted on the request.
    Failed(Failure),
}

impl Renewal<'_> {
    /// RFC 6749 section 4.4. The store is a convenience here: without it, the token is used all the same.
    async fn mint(&self) -> Result<Token, TokenError> {
        let row = self.row().await.unwrap_or_else(|error| {
            tracing::warn!(provider = %self.slot.key.provider, %error, "the store cannot be read, asking for a token");
            None
        });
        if let Some(token) = row.as_ref().and_then(|row| self.adopt(row)) {
            return Ok(token);
        }
        let endpoint = self.endpoint().await?;
        let turn = self.turn().await?;
        let asked = self.ask(&endpoint, Ask::ClientCredentials).await;
        drop(turn);
        let asked = asked.map_err(|refusal| match refusal {
            // Without a refresh token there is no grant to renew by consent: it is the client that is refused.
            Refusal::Failed(Failure::Reauthorize { error }) => self.refused(error),
            other => self.failed(other),
        })?;
        let previous = row.map(|row| row.generation);
        let held = self.slot.lock().generation();
        let mut row = self.new_row(&asked, previous.max(held).map_or(1, |last| last + 1), None);
        if let Err(error) = self.put_minted(&mut row, previous).await {
            tracing::warn!(provider = %self.slot.key.provider, %error, "the token could not be stored, and is used all the same");
        }
        Ok(self.obtained(&asked, row.generation))
    }

    async fn put_minted(&self, row: &mut Row, previous: Option<u64>) -> Result<(), StoreError> {
        if let Put::Stale(newer) = self.inner.store.put(row.clone(), previous).await? {
            // Another process minted one meanwhile. Both are good; the later one is kept.
            row.generation = row.generation.max(newer.generation + 1);
            self.inner.store.put(row.clone(), Some(newer.generation)).await?;
        }
        Ok(())
    }

    /// RFC 6749 section 6, under the key's lease, so that no two processes redeem one refresh token.
    async fn rotate(&self) -> Result<Token, TokenError> {
        save(self.inner, self.slot).await.map_err(|error| self.store_failed(&error))?;
        // Before anything that can fail: that nobody has connected is true of a provider that is down, too.
        if let Found::Token(token) = self.look().await? {
            return Ok(token);
        }
        let endpoint = self.endpoint().await?;
        // Before the lease, which is a file held open: a thousand may wait for their turn.
        let _turn = self.turn().await?;
        let lease = self.lease().await?.map(Arc::new);
        match (self.look().await?, lease) {
            (Found::Token(token), _) => Ok(token),
            (Found::Grant(_), None) => Err(self.unavailable("another process is renewing it".into(), Duration::ZERO)),
            (Found::Grant(row), Some(lease)) => match self.redeem(&endpoint, &row, &lease).await {
                Err(Redeemed::Replaced) => self.redeem_again(&endpoint, &lease).await,
                other => other.map_err(|error| self.last(error)),
            },
        }
    }

    /// A sibling's newer refresh token takes the place of the refused one, once (C15).
    async fn redeem_again(&self, endpoint: &Url, lease: &Arc<Lease>) -> Result<Token, TokenError> {
        match self.look().await? {
            Found::Token(token) => Ok(token),
            Found::Grant(row) => self.redeem(endpoint, &row, lease).await.map_err(|error| self.last(error)),
        }
    }

    /// Sends the refresh token: intent, call, new row, in this order.
    async fn redeem(&self, endpoint: &Url, row: &Row, lease: &Arc<Lease>) -> Result<Token, Redeemed> {
        let Some(refresh_token) = &row.refresh_token else {
            return Err(Redeemed::No(self.reauthorize("no_refresh_token")));
        };
        let hash = Sha256::digest(refresh_token.expose().as_bytes()).into();
        // Left by an earlier try whose answer nobody saw: the provider may have replaced this token already.
        let unsure = row.intent.as_ref().is_some_and(|intent| intent.refresh_token_hash == hash);
        let intent = Intent { refresh_token_hash: hash, at: self.inner.clock.now().wall };
        let (provider, subject) = (&row.provider, &row.subject);
        let intended = self.inner.store.intend(provider, subject, row.generation, intent).await;
        intended.map_err(|error| Redeemed::No(self.store_failed(&error)))?;

        match self.ask(endpoint, Ask::Refresh(refresh_token)).await {
            Ok(asked) => self.keep(row, &asked, lease).await.map_err(Redeemed::No),
            Err(Refusal::Failed(Failure::Reauthorize { error })) => {
                let reason = if unsure { "lost_rotation".to_owned() } else { error };
                Err(self.dead(row, reason).await)
            }
            Err(Refusal::Failed(Failure::FixConfiguration { error })) => {
                self.mark(row, RowState::FixConfiguration { reason: error.clone() }).await;
                Err(Redeemed::No(self.refused(error)))
            }
            Err(unsent @ Refusal::Unsent(_)) if !unsure => {
                self.mark(row, row.state.clone()).await;
                Err(Redeemed::No(self.failed(unsent)))
            }
            Err(other) => Err(Redeemed::No(self.failed(other))),
        }
    }

    /// Makes the answer durable before anyone gets its access token (C12 step 4).
    async fn keep(&self, row: &Row, asked: &Asked, lease: &Arc<Lease>) -> Result<Token, TokenError> {
        let new = self.new_row(asked, row.generation + 1, Some(row));
        match self.inner.store.put(new.clone(), Some(row.generation)).await {
            Ok(Put::Done) => {}
            Ok(Put::Gone) => {
                tracing::warn!(provider = %row.provider, subject = %row.subject,
                    "the grant was removed during its renewal, and stays removed");
                return Err(self.not_connected());
            }
            Ok(Put::Stale(newer)) => {
                tracing::warn!(provider = %row.provider, subject = %row.subject, generation = newer.generation,
                    "another grant was stored during a renewal, and is kept");
                if let Some(token) = self.adopt(&newer) {
                    return Ok(token);
                }
                // It has no token yet; the one at hand serves until its end.
            }
            Err(error) => {
                tracing::error!(provider = %row.provider, subject = %row.subject, %error,
                    "a rotated refresh token could not be stored; it is held in memory and tried again");
                self.save_later(Unsaved { row: new.clone(), _lease: lease.clone() });
            }
        }
        Ok(self.obtained(asked, new.generation))
    }

    /// Goes on trying, in a task that a graceful stop waits for: without it the grant would be lost.
    fn save_later(&self, unsaved: Unsaved) {
        self.slot.lock().unsaved = Some(unsaved);
        let (inner, slot) = (self.inner.clone(), self.slot.clone());
        self.inner.drain.spawn(async move {
            let mut wait = SAVE_AGAIN;
            while save(&inner, &slot).await.is_err() {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(SAVE_AGAIN_MOST);
            }
        });
    }

    /// The provider refused the refresh token: for good, unless a sibling has stored a newer one (C15).
    async fn dead(&self, row: &Row, reason: String) -> Redeemed {
        match self.stored().await {
            Ok(Some(now)) if now.generation != row.generation => return Redeemed::Replaced,
            Ok(_) => {}
            Err(error) => return Redeemed::No(error),
        }
        self.mark(row, RowState::Reauthorize { reason: reason.clone() }).await;
        Redeemed::No(self.reauthorize(&reason))
    }

    async fn mark(&self, row: &Row, state: RowState) {
        let marked = self.inner.store.mark(&row.provider, &row.subject, row.generation, state).await;
        if let Err(error) = marked {
            tracing::warn!(provider = %row.provider, subject = %row.subject, %error, "the grant's state could not be stored");
        }
    }

    async fn ask(&self, endpoint: &Url, ask: Ask<'_>) -> Result<Asked, Refusal> {
        let request = grant::request(&self.known.provider, endpoint, ask);
        let sent = self.inner.clock.now();
        let reply = self.inner.servers.token(request).await.map_err(|error| match error {
            CallError::Connect(_) | CallError::Certificate(_) | CallError::Request => {
                Refusal::Unsent(error.to_string())
            }
            other => Refusal::Failed(Failure::Transient { why: other.to_string(), retry_after: None }),
        })?;
        let answer = wire::read(reply.status, &reply.headers, &reply.body, sent.wall).map_err(Refusal::Failed)?;
        let provider = &self.slot.key.provider;
        if answer.token_type_missing {
            tracing::warn!(%provider, "the answer has no token_type, taken as Bearer");
        }
        let wanted = &self.slot.key.target.scopes;
        if let Some(granted) = &answer.scopes
            && let Some(missing) = wanted.iter().find(|scope| !granted.contains(scope))
        {
            tracing::warn!(%provider, missing, "the provider granted less than the scopes asked for");
        }
        Ok(Asked { answer, sent })
    }

    /// The token endpoint, discovered once.
    async fn endpoint(&self) -> Result<Url, TokenError> {
        let issuer = match &self.known.provider.endpoint {
            Endpoint::Token(url) => return Ok(url.clone()),
            Endpoint::Issuer(issuer) => issuer,
        };
        let found = self.known.endpoint.get_or_try_init(|| async {
            let mut why = "no metadata".to_owned();
            for url in metadata::candidates(issuer) {
                match self.inner.servers.metadata(url).await {
                    Ok(reply) if reply.status.is_success() => match metadata::read(issuer, &reply.body) {
                        Ok(metadata) => return Ok(metadata.token_endpoint),
                        Err(error) => why = error.to_string(),
                    },
                    Ok(reply) => why = format!("status {}", reply.status.as_u16()),
                    Err(error) => why = error.to_string(),
                }
            }
            Err(self.unavailable(format!("discovery failed: {why}"), Duration::ZERO))
        });
        self.prepared(found).await?.cloned()
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>, TokenError> {
        let turn = self.prepared(self.known.turns.all.acquire()).await?;
        turn.map_err(|_| self.unavailable("the sidecar is stopping".into(), Duration::ZERO))
    }

    async fn lease(&self) -> Result<Option<Lease>, TokenError> {
        let (provider, subject) = (&self.slot.key.provider, &self.slot.key.subject);
        let wait = LEASE_WAIT.min(self.ready_by.saturating_duration_since(Instant::now()));
        let lease = self.inner.store.lease(provider, subject, wait).await;
        lease.map_err(|error| self.store_failed(&error))
    }

    async fn prepared<T>(&self, step: impl Future<Output = T>) -> Result<T, TokenError> {
        let done = tokio::time::timeout_at(self.ready_by, step).await;
        done.map_err(|_| self.unavailable("the provider is too slow".into(), Duration::ZERO))
    }

    async fn row(&self) -> Result<Option<Row>, StoreError> {
        self.inner.store.grant(&self.slot.key.provider, &self.slot.key.subject).await
    }

    async fn stored(&self) -> Result<Option<Row>, TokenError> {
        self.row().await.map_err(|error| self.store_failed(&error))
    }

    /// What the store has for this key.
    async fn look(&self) -> Result<Found, TokenError> {
        let row = self.stored().await?.ok_or_else(|| self.not_connected())?;
        if let Some(token) = self.adopt(&row) {
            return Ok(Found::Token(token));
        }
        match &row.state {
            RowState::Reauthorize { reason } => Err(self.reauthorize(reason)),
            RowState::Connected | RowState::FixConfiguration { .. } => Ok(Found::Grant(row)),
        }
    }

    /// The row's token, if it is a later one than the one at hand, and lives.
    fn adopt(&self, row: &Row) -> Option<Token> {
        let access = row.access.as_ref().filter(|_| row.target == *self.slot.key.target)?;
        let now = self.inner.clock.now();
        let token = Token::stored(access, row.generation, now, self.known.provider.refresh_before);
        let newer = self.slot.lock().is_news(&token, self.cause);
        let adopted = Some(token).filter(|token| newer && token.lives(now))?;
        self.inner.tell(&self.slot.key, TokenChange::Adopted { generation: row.generation });
        Some(adopted)
    }

    fn new_row(&self, asked: &Asked, generation: u64, old: Option<&Row>) -> Row {
        let answer = &asked.answer;
        let lifetime = self.lifetime(answer);
        let kept: Option<Secret> = old.and_then(|row| row.refresh_token.clone());
        Row {
            provider: self.slot.key.provider.clone(),
            subject: self.slot.key.subject.clone(),
            generation,
            target: (*self.slot.key.target).clone(),
            refresh_token: answer.refresh_token.clone().filter(|_| old.is_some()).or(kept),
            access: Some(Access {
                token: answer.access_token.clone(),
                obtained_at: asked.sent.wall,
                expires_at: lifetime.map(|life| asked.sent.wall + life),
            }),
            granted_scopes: answer.scopes.clone().or_else(|| old.and_then(|row| row.granted_scopes.clone())),
            state: RowState::Connected,
            intent: None,
            renewed_at: Some(asked.sent.wall),
            stored_at: old.map_or(asked.sent.wall, |row| row.stored_at),
        }
    }

    fn obtained(&self, asked: &Asked, generation: u64) -> Token {
        let lifetime = self.lifetime(&asked.answer);
        let took = self.inner.clock.now().instant - asked.sent.instant;
        let cause = self.cause.name();
        self.inner.tell(&self.slot.key, TokenChange::Obtained { cause, lifetime, generation, took });
        let ahead = self.known.provider.refresh_before;
        Token::new(asked.answer.access_token.clone(), generation, asked.sent, lifetime, ahead)
    }

    fn lifetime(&self, answer: &Answer) -> Option<Duration> {
        let lifetime = answer.lifetime.or(self.known.provider.default_lifetime);
        lifetime.filter(|life| *life <= LONGEST_LIFETIME)
    }

    fn not_connected(&self) -> TokenError {
        let (provider, subject) = (self.slot.key.provider.clone(), self.slot.key.subject.clone());
        TokenError::NotConnected { provider, subject }
    }

    fn reauthorize(&self, reason: &str) -> TokenError {
        let (provider, subject) = (self.slot.key.provider.clone(), self.slot.key.subject.clone());
        TokenError::Reauthorize { provider, subject, reason: reason.to_owned() }
    }

    fn refused(&self, error: String) -> TokenError {
        TokenError::FixConfiguration { provider: self.slot.key.provider.clone(), error }
    }

    fn unavailable(&self, why: String, retry_after: Duration) -> TokenError {
        TokenError::Unavailable { provider: self.slot.key.provider.clone(), why, retry_after }
    }

    fn store_failed(&self, error: &StoreError) -> TokenError {
        self.unavailable(format!("the store fails: {error}"), Duration::ZERO)
    }

    fn failed(&self, refusal: Refusal) -> TokenError {
        match refusal {
            Refusal::Unsent(why) => self.unavailable(why, Duration::ZERO),
            Refusal::Failed(Failure::Transient { why, retry_after }) => {
                self.unavailable(why, retry_after.unwrap_or_default())
            }
            Refusal::Failed(Failure::FixConfiguration { error }) => self.refused(error),
            Refusal::Failed(Failure::Reauthorize { error }) => self.reauthorize(&error),
        }
    }

    fn last(&self, error: Redeemed) -> TokenError {
        match error {
            Redeemed::No(error) => error,
            Redeemed::Replaced => self.unavailable("other processes keep renewing it".into(), Duration::ZERO),
        }
    }
}

/// Why a refresh token brought nothing.
enum Redeemed {
    /// It failed.
    No(TokenError),
    /// It was refused, and the store holds another one by now.
    Replaced,
}

/// A rotated row that is in memory only (SEMANTICS C13).
pub(super) struct Unsaved {
    row: Row,
    /// Held until it is stored: until then other processes read the refresh token that must not be sent again.
    _lease: Arc<Lease>,
}

/// Writes a rotated row that could not be written when it came (SEMANTICS C13).
async fn save(inner: &Inner, slot: &Slot) -> Result<(), StoreError> {
    let Some(row) = slot.lock().unsaved.as_ref().map(|unsaved| unsaved.row.clone()) else { return Ok(()) };
    let (provider, subject, generation) = (&slot.key.provider, &slot.key.subject, row.generation);
    let stored = match inner.store.put(row.clone(), Some(generation - 1)).await? {
        Put::Done => true,
        // A write can fail after it was done.
        Put::Stale(there) => there.generation == generation && there.refresh_token == row.refresh_token,
        Put::Gone => false,
    };
    let mut state = slot.lock();
    if state.unsaved.take_if(|unsaved| unsaved.row.generation == generation).is_none() {
        return Ok(());
    }
    if stored {
        tracing::info!(%provider, %subject, "the rotated refresh token is stored now");
    } else {
        tracing::warn!(%provider, %subject, "the grant was replaced or removed, and its rotated refresh token is dropped");
    }
    Ok(())
}
