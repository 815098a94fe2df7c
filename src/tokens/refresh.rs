//! One renewal, from the stored grant to the stored answer: the steps of SEMANTICS C12, in their order.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::SemaphorePermit;
use tokio::time::Instant;
use url::Url;

use super::known::{Asked, Known, NoEndpoint, Refusal};
use super::slot::{Slot, Token};
use super::{Cause, Inner, Key, TokenError};
use crate::clock::Now;
use crate::events::TokenChange;
use crate::oauth::grant::Ask;
use crate::oauth::wire::Failure;
use crate::oauth::{Endpoint, Grant, union};
use crate::secret::Secret;
use crate::store::{Intent, Lease, PROVIDER_CHANGED, Put, Row, SEND_WITHIN, State as RowState, StoreError};

/// How long a renewal may wait before it calls: for discovery, for a turn, for another process.
const PREPARATION: Duration = Duration::from_secs(10);
/// How long another process's renewal is waited for (SEMANTICS C19).
const LEASE_WAIT: Duration = Duration::from_secs(5);
/// How soon it is looked for what that has brought, at first and at most.
const LOOK_FOR_TOKEN: Duration = Duration::from_millis(25);
const LOOK_FOR_TOKEN_MOST: Duration = Duration::from_millis(200);
/// How long the last holder of a lease has to store what it was given, once the store can be reached again: it tries every
/// [`SAVE_AGAIN_MOST`], and a try may fail on a connection that was cut unnoticed.
const OWNER_SAVES_WITHIN: Duration = Duration::from_secs(25);
const LOOK_FOR_OWNER: Duration = Duration::from_secs(1);
/// How soon a row that could not be written is tried again, at first and at most.
const SAVE_AGAIN: Duration = Duration::from_secs(1);
const SAVE_AGAIN_MOST: Duration = Duration::from_secs(10);

/// Brings a token for a slot: adopts a newer one from the store, or asks the provider.
pub(super) async fn run(
    inner: &Arc<Inner>,
    slot: &Arc<Slot>,
    cause: Cause,
    known: Option<&Arc<Known>>,
) -> Result<Token, TokenError> {
    let known = known.cloned().ok_or_else(|| TokenError::FixConfiguration {
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
        Grant::RefreshToken | Grant::AuthorizationCode => renewal.rotate().await?,
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

/// Who may renew a grant now.
enum Right<'a> {
    /// This renewal: it may call, and holds the lease.
    Ours(SemaphorePermit<'a>, Arc<Lease>),
    /// Another process did, and brought this.
    Theirs(Token),
}

/// What the store has for a key, when it has anything good.
enum Found {
    /// A token that will do.
    Token(Token),
    /// A grant that brings one.
    Grant(Box<Row>),
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
        let endpoint = self.endpoint(Endpoint::Token).await?;
        let turn = self.turn().await?;
        let asked = self.ask(&endpoint, Ask::ClientCredentials, None).await;
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
        let endpoint = self.endpoint(Endpoint::Refresh).await?;
        let (turn, lease) = match self.right().await? {
            Right::Ours(turn, lease) => (turn, lease),
            Right::Theirs(token) => return Ok(token),
        };
        match self.look().await? {
            Found::Token(token) => Ok(token),
            Found::Grant(row) if lease.is_inherited() && left_open(&row) => {
                // Others' calls need not wait for as long.
                drop(turn);
                self.inherit(&endpoint, &row, &lease).await
            }
            Found::Grant(row) => self.redeem_or_adopt(&endpoint, &row, &lease).await,
        }
    }

    /// Waits for the right to call the provider and to renew this grant (C19).
    async fn right(&self) -> Result<Right<'_>, TokenError> {
        let until = self.ready_by.min(Instant::now() + LEASE_WAIT);
        let mut pause = LOOK_FOR_TOKEN;
        loop {
            // Before the lease, which is a file held open, or a row with an end: a thousand may wait for their turn.
            let turn = self.turn().await?;
            if let Some(lease) = self.lease().await? {
                return Ok(Right::Ours(turn, Arc::new(lease)));
            }
            drop(turn);
            if Instant::now() >= until {
                return Err(self.others_have_it());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_FOR_TOKEN_MOST);
            if let Found::Token(token) = self.look().await? {
                return Ok(Right::Theirs(token));
            }
        }
    }

    /// The lease's last holder let its time pass after it had sent the refresh token. If it lives, it is about to store
    /// what it was given: that is worth waiting for before the old token is sent again (C14), since a provider that
    /// replaces tokens at each use takes that for a theft.
    async fn inherit(&self, endpoint: &Url, row: &Row, lease: &Arc<Lease>) -> Result<Token, TokenError> {
        let until = Instant::now() + OWNER_SAVES_WITHIN;
        while Instant::now() < until {
            tokio::time::sleep(LOOK_FOR_OWNER).await;
            match self.look().await? {
                Found::Token(token) => return Ok(token),
                Found::Grant(now) if now.generation != row.generation => break,
                Found::Grant(_) => {}
            }
            let kept = self.inner.store.prolong(lease).await.map_err(|error| self.store_failed(&error))?;
            if !kept {
                return Err(self.others_have_it());
            }
        }
        let turn = tokio::time::timeout(LOOK_FOR_OWNER, self.known.turns.all.acquire()).await;
        let _turn = turn.map_err(|_| self.unasked("the provider is too slow".into()))?;
        match self.look().await? {
            Found::Token(token) => Ok(token),
            Found::Grant(row) => self.redeem_or_adopt(endpoint, &row, lease).await,
        }
    }

    async fn redeem_or_adopt(&self, endpoint: &Url, row: &Row, lease: &Arc<Lease>) -> Result<Token, TokenError> {
        match self.redeem(endpoint, row, lease).await {
            Err(Redeemed::Replaced) => self.redeem_again(endpoint, lease).await,
            other => other.map_err(|error| self.last(error)),
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
        let refusal = self.slot.lock().refusal(row.generation);
        if let Some(state) = refusal.filter(|state| state.is_for(self.known.wanted)) {
            return Err(self.refused_before(row, lease, state).await);
        }
        // Left by an earlier try whose answer nobody saw: the provider may have replaced this token already.
        let unsure = left_open(row);
        let before = self.inner.clock.now();
        let intent = Intent { refresh_token_hash: hash(refresh_token), at: before.wall };
        let intended = self.inner.store.intend(lease, row.generation, intent.clone()).await;
        intended.map_err(|error| Redeemed::No(self.store_failed(&error)))?;
        let attempt = Attempt { row, lease, intent };

        let by = before + SEND_WITHIN;
        match self.ask(endpoint, Ask::Refresh(refresh_token, &self.scopes(row)), Some(by)).await {
            Ok(asked) => {
                let kept = self.keep(row, &asked, lease).await.map_err(Redeemed::No);
                self.takes_client(row);
                kept
            }
            Err(refusal) => self.note(&attempt, refusal, unsure).await,
        }
    }

    /// Notes in the row why the refresh token brought no token.
    async fn note(&self, attempt: &Attempt<'_>, refusal: Refusal, unsure: bool) -> Result<Token, Redeemed> {
        match refusal {
            // What is asked for is more than the user has consented to: only they can change that, or whoever wrote it
            // down. The grant is as good as it was.
            Refusal::Failed(Failure::FixConfiguration { error }) if error == "invalid_scope" && self.consents() => {
                let wanted = Some(self.known.wanted);
                Err(self.dead(attempt, RowState::Reauthorize { reason: error, wanted }).await)
            }
            Refusal::Failed(Failure::Reauthorize { error }) => {
                let reason = if unsure { "lost_rotation".to_owned() } else { error };
                Err(self.dead(attempt, RowState::reauthorize(reason)).await)
            }
            Refusal::Failed(Failure::Unusable { error, refresh_token })
                if attempt.row.refresh_token.as_ref() != Some(&refresh_token) =>
            {
                self.keep_refresh_token(attempt, refresh_token, error).await.map_err(Redeemed::No)
            }
            Refusal::Failed(Failure::FixConfiguration { error } | Failure::Unusable { error, .. }) => {
                self.mark(attempt, RowState::FixConfiguration { reason: error.clone() }).await;
                Err(Redeemed::No(self.refused(error)))
            }
            unsent @ Refusal::Unsent(_) if !unsure => {
                self.mark(attempt, attempt.row.state.clone()).await;
                Err(Redeemed::No(self.failed(unsent)))
            }
            other => Err(Redeemed::No(self.failed(other))),
        }
    }

    /// The provider takes the client. That it was refused says nothing of any one grant, and not all of those whose rows say
    /// so come back.
    fn takes_client(&self, row: &Row) {
        let was_taken = self.known.takes_client.swap(true, Ordering::Relaxed);
        if was_taken && !matches!(row.state, RowState::FixConfiguration { .. }) {
            return;
        }
        let (inner, known) = (self.inner.clone(), self.known.clone());
        // Nobody's token has to wait for that.
        self.inner.drain.spawn(async move {
            if let Err(error) = inner.store.corrected(&known.provider.name).await {
                tracing::warn!(provider = %known.provider.name, %error,
                    "that the provider takes the client again could not be stored");
                known.takes_client.store(false, Ordering::Relaxed);
            }
        });
    }

    /// Makes the answer durable before anyone gets its access token (C12 step 4).
    async fn keep(&self, row: &Row, asked: &Asked, lease: &Arc<Lease>) -> Result<Token, TokenError> {
        let new = self.new_row(asked, row.generation + 1, Some(row));
        let generation = new.generation;
        let theirs = self.put_rotated(row, new, asked.answer.what_to_revoke(), lease).await?;
        Ok(theirs.unwrap_or_else(|| self.obtained(asked, generation)))
    }

    /// The same for an answer that replaces the refresh token and brings no token that can be used: the one that was sent
    /// may be good no more.
    async fn keep_refresh_token(
        &self,
        Attempt { row, lease, .. }: &Attempt<'_>,
        refresh_token: Secret,
        error: String,
    ) -> Result<Token, TokenError> {
        let new = Row {
            generation: row.generation + 1,
            refresh_token: Some(refresh_token.clone()),
            access: None,
            registration: Some(self.slot.key.registration),
            state: RowState::FixConfiguration { reason: error.clone() },
            intent: None,
            ..(*row).clone()
        };
        let theirs = self.put_rotated(row, new, (&refresh_token, true), lease).await?;
        theirs.ok_or_else(|| self.refused(error))
    }

    /// Writes the row that takes the place of `row`. Gives the token of another grant, if one has taken it meanwhile.
    async fn put_rotated(
        &self,
        row: &Row,
        new: Row,
        (token, renews): (&Secret, bool),
        lease: &Arc<Lease>,
    ) -> Result<Option<Token>, TokenError> {
        match self.inner.store.put(new.clone(), Some(row.generation)).await {
            Ok(Put::Done) => Ok(None),
            Ok(Put::Gone) => {
                tracing::warn!(provider = %row.provider, subject = %row.subject,
                    "the grant was removed during its renewal, and stays removed");
                // What came too late must not live on at the provider (TOK-038).
                self.known.revoke(&*self.inner.servers, token, renews).await;
                Err(self.not_connected())
            }
            Ok(Put::Stale(newer)) => {
                tracing::warn!(provider = %row.provider, subject = %row.subject, generation = newer.generation,
                    "another grant was stored during a renewal, and is kept");
                let theirs = self.adopt(&newer);
                if theirs.is_none() && !newer.is_of_grant(row) {
                    return Err(self.begin_again(&newer));
                }
                // Where another process has renewed it for itself only, the one at hand serves until its end.
                Ok(theirs)
            }
            Err(error) => {
                tracing::error!(provider = %row.provider, subject = %row.subject, %error,
                    "a rotated refresh token could not be stored; it is held in memory and tried again");
                self.save_later(Unsaved { row: new, lease: lease.clone() });
                Ok(None)
            }
        }
    }

    /// Has the renewal run once more, with another grant that has taken the place of the one that it began with: what came of
    /// that may be of another account, or of a grant that was removed before. It is not given back, for with it many a
    /// provider ends every grant of the user.
    fn begin_again(&self, newer: &Row) -> TokenError {
        let mut state = self.slot.lock();
        state.replaced_by(newer.generation);
        state.void = true;
        self.not_connected()
    }

    /// Goes on trying, in a task that a graceful stop waits for: without it the grant would be lost.
    fn save_later(&self, unsaved: Unsaved) {
        self.slot.lock().unsaved = Some(Box::new(unsaved));
        let (inner, slot) = (self.inner.clone(), self.slot.clone());
        self.inner.drain.spawn(async move {
            let mut wait = SAVE_AGAIN;
            while save(&inner, &slot).await.is_err() {
                let lease = slot.lock().unsaved.as_ref().map(|unsaved| unsaved.lease.clone());
                if let Some(lease) = lease {
                    // Where only this row cannot be written, others must not take it for given up.
                    let _ = inner.store.prolong(&lease).await;
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(SAVE_AGAIN_MOST);
            }
        });
    }

    /// The provider refused the refresh token: for good, unless a sibling has stored a newer one (C15).
    async fn dead(&self, attempt: &Attempt<'_>, state: RowState) -> Redeemed {
        match self.stored().await {
            Ok(Some(now)) if now.generation != attempt.row.generation => return Redeemed::Replaced,
            Ok(_) => {}
            Err(error) => return Redeemed::No(error),
        }
        // Whether that can be stored or not: it is never sent again.
        self.slot.lock().refused(attempt.row.generation, state.clone());
        self.mark(attempt, state.clone()).await;
        Redeemed::No(self.reauthorize(state.reason()))
    }

    /// The provider has refused the token of this very row already, and the store could not be told.
    async fn refused_before(&self, row: &Row, lease: &Arc<Lease>, state: RowState) -> Redeemed {
        if let Some(intent) = row.intent.clone() {
            self.mark(&Attempt { row, lease, intent }, state.clone()).await;
        }
        Redeemed::No(self.reauthorize(state.reason()))
    }

    /// Says what became of the attempt. One that another process has made meanwhile is its own to judge.
    async fn mark(&self, Attempt { row, lease, intent }: &Attempt<'_>, state: RowState) {
        let marked = self.inner.store.mark(lease, row.generation, intent.clone(), state).await;
        if let Err(error) = marked {
            tracing::warn!(provider = %row.provider, subject = %row.subject, %error, "the grant's state could not be stored");
        }
    }

    async fn ask(&self, endpoint: &Url, ask: Ask<'_>, by: Option<Now>) -> Result<Asked, Refusal> {
        self.known.ask(&*self.inner.servers, &self.inner.clock, endpoint, ask, by).await
    }

    async fn endpoint(&self, which: Endpoint) -> Result<Url, TokenError> {
        let found = self.prepared(self.known.endpoint(which, &*self.inner.servers)).await?;
        found.map_err(|none| match none {
            NoEndpoint::Unnamed(_) => self.refused(none.to_string()),
            NoEndpoint::Undiscovered(_) => self.unavailable(none.to_string(), Duration::ZERO),
        })
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>, TokenError> {
        let turn = tokio::time::timeout_at(self.ready_by, self.known.turns.all.acquire()).await;
        let turn = turn.map_err(|_| self.unasked("the provider is too slow".into()))?;
        turn.map_err(|_| self.unavailable("the sidecar is stopping".into(), Duration::ZERO))
    }

    async fn lease(&self) -> Result<Option<Lease>, TokenError> {
        let (provider, subject) = (&self.slot.key.provider, &self.slot.key.subject);
        let lease = self.inner.store.lease(provider, subject).await;
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

    /// What the store has for this key, or a consent has brought meanwhile.
    async fn look(&self) -> Result<Found, TokenError> {
        if let Some(token) = self.slot.lock().overtaking(self.inner.clock.now()) {
            return Ok(Found::Token(token));
        }
        let row = self.stored().await?.ok_or_else(|| self.not_connected())?;
        if !row.is_of(self.slot.key.registration) {
            // Not noted in the row: a configuration that comes back can use it.
            return Err(self.reauthorize(PROVIDER_CHANGED));
        }
        self.slot.lock().looks_at(row.generation);
        if let Some(token) = self.adopt(&row) {
            return Ok(Found::Token(token));
        }
        match row.state_for(self.slot.key.registration, self.known.wanted) {
            RowState::Reauthorize { reason, .. } => Err(self.reauthorize(&reason)),
            RowState::Connected | RowState::FixConfiguration { .. } => Ok(Found::Grant(Box::new(row))),
        }
    }

    /// The row's token, if it is a later one than the one at hand, and lives.
    fn adopt(&self, row: &Row) -> Option<Token> {
        let key = &self.slot.key;
        let access = row.access.as_ref().filter(|_| row.target == *key.target && row.is_of(key.registration))?;
        let now = self.inner.clock.now();
        let token = Token::stored(access, row.generation, now, self.known.provider.refresh_before);
        let newer = self.slot.lock().is_news(&token, self.cause);
        let adopted = Some(token).filter(|token| newer && token.lives(now))?;
        self.inner.tell(&self.slot.key, TokenChange::Adopted { generation: row.generation });
        Some(adopted)
    }

    fn consents(&self) -> bool {
        self.known.provider.grant == Grant::AuthorizationCode
    }

    /// What a renewal asks for: never more than was granted, where that is known (RFC 6749 section 6). Granted for scopes
    /// that were configured before, it says nothing of those of today.
    fn scopes(&self, row: &Row) -> Vec<String> {
        let asked = union(&self.slot.key.target.scopes, &row.further_scopes);
        let Some(granted) = self.granted(row) else { return asked };
        // Few providers name it among what they grant, and there is a refresh token.
        let offline = asked.into_iter().filter(|scope| scope == "offline_access").collect::<Vec<_>>();
        union(granted, &offline)
    }

    /// What was granted for what is asked for now.
    fn granted<'r>(&self, row: &'r Row) -> Option<&'r Vec<String>> {
        row.granted_scopes.as_ref().filter(|_| row.target == *self.slot.key.target)
    }

    fn new_row(&self, asked: &Asked, generation: u64, old: Option<&Row>) -> Row {
        let Key { provider, subject, target, registration } = &self.slot.key;
        let answer = &asked.answer;
        let kept: Option<Secret> = old.and_then(|row| row.refresh_token.clone());
        let stored_at = old.map_or(asked.sent.wall, |row| row.stored_at);
        Row {
            generation,
            refresh_token: answer.refresh_token.clone().filter(|_| old.is_some()).or(kept),
            access: Some(self.known.access(asked)),
            granted_scopes: answer.scopes.clone().or_else(|| old.and_then(|row| self.granted(row)).cloned()),
            further_scopes: old.map(|row| row.further_scopes.clone()).unwrap_or_default(),
            registration: Some(*registration),
            renewed_at: Some(asked.sent.wall),
            ..Row::new(provider.clone(), subject.clone(), (**target).clone(), stored_at)
        }
    }

    fn obtained(&self, asked: &Asked, generation: u64) -> Token {
        let lifetime = self.known.lifetime(&asked.answer);
        let took = self.inner.clock.now().instant - asked.sent.instant;
        let cause = self.cause.name();
        self.inner.tell(&self.slot.key, TokenChange::Obtained { cause, lifetime, generation, took });
        self.known.token(asked, generation)
    }

    fn not_connected(&self) -> TokenError {
        TokenError::not_connected(&self.slot.key)
    }

    fn reauthorize(&self, reason: &str) -> TokenError {
        let (provider, subject) = (self.slot.key.provider.clone(), self.slot.key.subject.clone());
        TokenError::Reauthorize { provider, subject, reason: reason.to_owned() }
    }

    fn refused(&self, error: String) -> TokenError {
        TokenError::FixConfiguration { provider: self.slot.key.provider.clone(), error }
    }

    fn unavailable(&self, why: String, retry_after: Duration) -> TokenError {
        TokenError::Unavailable { provider: self.slot.key.provider.clone(), why, retry_after, asked: true }
    }

    /// As [`Renewal::unavailable`], when it is nothing that the provider would have to be spared for.
    fn unasked(&self, why: String) -> TokenError {
        let provider = self.slot.key.provider.clone();
        TokenError::Unavailable { provider, why, retry_after: Duration::ZERO, asked: false }
    }

    fn store_failed(&self, error: &StoreError) -> TokenError {
        self.unasked(format!("the store fails: {error}"))
    }

    fn others_have_it(&self) -> TokenError {
        self.unasked("another process is renewing it".into())
    }

    fn failed(&self, refusal: Refusal) -> TokenError {
        match refusal {
            Refusal::Unsent(why) => self.unavailable(why, Duration::ZERO),
            Refusal::Failed(Failure::Transient { why, retry_after }) => {
                self.unavailable(why, retry_after.unwrap_or_default())
            }
            Refusal::Failed(Failure::FixConfiguration { error } | Failure::Unusable { error, .. }) => {
                self.refused(error)
            }
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

/// Whether the row's refresh token may have been sent, by somebody who did not get to store what came of it.
fn left_open(row: &Row) -> bool {
    let intended = row.intent.as_ref().map(|intent| intent.refresh_token_hash);
    intended.is_some() && intended == row.refresh_token.as_ref().map(hash)
}

fn hash(token: &Secret) -> [u8; 32] {
    Sha256::digest(token.expose().as_bytes()).into()
}

/// A refresh token on its way: the row that it is of, the right to send it, and what was noted before.
struct Attempt<'a> {
    row: &'a Row,
    lease: &'a Arc<Lease>,
    intent: Intent,
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
    lease: Arc<Lease>,
}

/// Writes a rotated row that could not be written when it came (SEMANTICS C13).
async fn save(inner: &Inner, slot: &Slot) -> Result<(), StoreError> {
    let Some(row) = slot.lock().unsaved.as_ref().map(|unsaved| unsaved.row.clone()) else { return Ok(()) };
    let (provider, subject, generation) = (&slot.key.provider, &slot.key.subject, row.generation);
    let put = inner.store.put(row.clone(), Some(generation - 1)).await?;
    let stored = match &put {
        Put::Done => true,
        // A write can fail after it was done.
        Put::Stale(there) => there.generation == generation && there.refresh_token == row.refresh_token,
        Put::Gone => false,
    };
    let settled = slot.lock().unsaved.take_if(|unsaved| unsaved.row.generation == generation);
    if settled.is_none() {
        return Ok(());
    }
    if stored {
        tracing::info!(%provider, %subject, "the rotated refresh token is stored now");
    } else {
        tracing::warn!(%provider, %subject, "the grant was replaced or removed, and its rotated refresh token is dropped");
    }
    if put == Put::Gone {
        // Nobody told of the removal while the flight was under way.
        inner.forget_all(provider, subject);
    }
    let replaced = matches!(&put, Put::Stale(there) if !there.is_of_grant(&row));
    if replaced && row.access.as_ref().is_some_and(|access| slot.lock().holds(&access.token)) {
        // It has the number of the other grant, and would be taken for that one's token to its end.
        inner.forget(slot);
    }
    // Whoever removed the grant could give back only the token before it, which the provider had replaced (TOK-038).
    let known = inner.current.load().get(provider).filter(|known| row.is_of(known.registration)).cloned();
    if let (Put::Gone, Some(known), Some(token)) = (put, known, &row.refresh_token) {
        known.revoke(&*inner.servers, token, true).await;
    }
    Ok(())
}
