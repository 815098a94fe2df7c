//! What is known of one token, and every decision about it that needs only the time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt;
use http::HeaderValue;
use tokio::sync::Notify;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::refresh::Unsaved;
use super::{Bearer, Cause, Flight, Key, TokenError};
use crate::clock::Now;
use crate::secret::Secret;
use crate::store::{Access, State as RowState};

/// A token is not used in its last seconds: it has to arrive, too.
const EARLY: Duration = Duration::from_secs(5);
const COOL_DOWN: Duration = Duration::from_secs(30);
const COOL_DOWN_MOST: Duration = Duration::from_secs(5 * 60);
/// What claims to live longer has no known end (SEMANTICS C16).
pub(super) const LONGEST_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
const BACKOFF_MOST: Duration = Duration::from_secs(60);
/// How often a configuration that the provider refuses is tried again.
const REFUSED_REST: Duration = Duration::from_secs(10 * 60);
/// How soon a renewal is tried again that did not come to its call: the store was away, or another process had the lease.
const UNASKED_REST: Duration = Duration::from_secs(1);
/// How often the store is asked for a grant that was missing, or that takes the place of a rejected one.
const ABSENT_REST: Duration = Duration::from_secs(1);

/// The place of one token.
pub(super) struct Slot {
    pub(super) key: Key,
    /// Somebody waits for the renewal under way.
    pub(super) awaited: Notify,
    /// A grant came or went, or a renewal has ended otherwise than for want of one.
    pub(super) changed: Notify,
    /// How many requests wait for the user, and since when there are any.
    parked: Mutex<Option<(usize, Instant)>>,
    state: Mutex<State>,
}

/// What is known of one token. What few have is in a box: there may be a million.
#[derive(Default)]
pub(super) struct State {
    token: Option<Token>,
    flight: Option<Flight>,
    rest: Option<Box<Rest>>,
    attempts: u32,
    force: Force,
    /// Whether a consent brought the token at hand while a renewal of the grant before it was under way.
    overtaken: bool,
    /// Whether the renewal under way began with a grant that is gone: what it brings is not to be used.
    pub(super) void: bool,
    /// Whether the renewal under way began on another way to the provider: its failure says nothing of the one of now.
    way_changed: bool,
    /// Whether the store has told of another grant during the renewal under way: its failure may be of the one before.
    pub(super) news: bool,
    /// Whether the token was used since it came.
    used: bool,
    /// Whether somebody waits for the renewal under way, and will use what it brings.
    joined: bool,
    pub(super) unsaved: Option<Box<Unsaved>>,
    /// The generation of the stored grant when it was last looked at.
    seen: Option<u64>,
    /// The generation of the stored grant that is to take the place of the one of the token at hand, as soon as it can be
    /// renewed.
    replaced_by: Option<u64>,
    /// The generation whose refresh token the provider has refused for good, and what its row should say of it.
    refused: Option<Box<(u64, RowState)>>,
}

/// A token and its times.
#[derive(Debug, Clone)]
pub(super) struct Token {
    secret: Secret,
    header: HeaderValue,
    generation: u64,
    expiry: Option<Expiry>,
    /// When to renew it ahead of its end.
    renew_at: Option<Instant>,
}

/// A token's end on both clocks; whichever comes first ends it (SEMANTICS C16).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Expiry {
    instant: Instant,
    wall: SystemTime,
}

/// After a failure: what it was, and until when nothing is tried.
struct Rest {
    error: TokenError,
    until: Instant,
}

/// How often a 401 may force a renewal (SEMANTICS C5).
struct Force {
    last: Option<Instant>,
    every: Duration,
    /// The generation that the last forced renewal brought, until an upstream takes it.
    brought: Option<u64>,
    /// Whether a 401 to that generation was counted.
    doubled: bool,
    /// When the store was last asked for another grant.
    looked: Option<Instant>,
}

impl Default for Force {
    fn default() -> Self {
        Self { last: None, every: COOL_DOWN, brought: None, doubled: false, looked: None }
    }
}

impl Slot {
    pub(super) fn new(key: Key) -> Self {
        Self { key, awaited: Notify::new(), changed: Notify::new(), parked: Mutex::default(), state: Mutex::default() }
    }

    /// Counts a request that waits for the user, until the guard goes.
    pub(super) fn park(&self) -> Parked<'_> {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, since) = parked.unwrap_or((0, Instant::now()));
        *parked = Some((count + 1, since));
        Parked(self)
    }

    /// Since when requests wait for the user, if any do.
    pub(super) fn parked_since(&self) -> Option<Instant> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner).map(|(_, since)| since)
    }

    pub(super) fn generation(&self) -> Option<u64> {
        self.lock().generation()
    }

    /// Whether nothing would be lost with it.
    pub(super) fn is_idle(&self, now: Now) -> bool {
        self.parked_since().is_none() && self.lock().is_idle(now)
    }

    /// A user has granted access, and this came with it.
    pub(super) fn granted(&self, token: Token) {
        let mut state = self.lock();
        let (flight, unsaved) = (state.flight.take(), state.unsaved.take());
        *state = State {
            token: Some(token),
            overtaken: flight.is_some(),
            flight,
            joined: state.joined,
            unsaved,
            ..State::default()
        };
        drop(state);
        self.changed.notify_waiters();
    }

    /// The grant is gone, and its token with it.
    pub(super) fn forget(&self) {
        let mut state = self.lock();
        // What could not be stored of it is still to be given back.
        let (flight, unsaved) = (state.flight.take(), state.unsaved.take());
        *state = State { void: flight.is_some(), flight, joined: state.joined, unsaved, ..State::default() };
        drop(state);
        self.changed.notify_waiters();
    }

    /// What is at hand is to be held against the store before it serves: there is none until then.
    pub(super) fn doubt(&self) {
        self.lock().token = None;
    }

    /// There is a grant in the store now: what was missing is to be looked for again.
    pub(super) fn awake(&self) {
        self.lock().rest = None;
        self.changed.notify_waiters();
    }

    /// Its provider is configured anew: whatever failed before is tried again.
    pub(super) fn reconsider(&self) {
        self.lock().reconsider();
        self.changed.notify_waiters();
    }

    /// There is another way to its provider: what failed for a while is tried again.
    pub(super) fn try_again(&self) {
        let mut state = self.lock();
        state.way_changed = state.flight.is_some();
        state.try_again();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The renewal under way, to wait for it.
    pub(super) fn join(&self, state: &mut State) -> Option<Flight> {
        let flight = state.flight.clone()?;
        state.joined = true;
        self.awaited.notify_one();
        Some(flight)
    }

    /// Begins a renewal.
    pub(super) fn take_off(&self, state: &mut State, flight: Flight, cause: Cause) {
        state.flight = Some(flight);
        state.joined = !matches!(cause, Cause::Ahead);
        // Left by those who waited for the one before.
        let _ = self.awaited.notified().now_or_never();
    }
}

/// A request that waits for the user.
pub(super) struct Parked<'a>(&'a Slot);

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        let mut parked = self.0.parked.lock().unwrap_or_else(PoisonError::into_inner);
        *parked = parked.and_then(|(count, since)| (count > 1).then_some((count - 1, since)));
    }
}

impl State {
    /// The token, if it can still be sent.
    pub(super) fn usable(&mut self, now: Now) -> Option<Bearer> {
        let token = self.token.as_ref().filter(|token| token.lives(now))?;
        self.used = true;
        Some(self.bearer(token))
    }

    /// How long the token can still be sent, if it can; none within where no end is known.
    pub(super) fn left(&self, now: Now) -> Option<Option<Duration>> {
        let token = self.token.as_ref().filter(|token| token.lives(now))?;
        Some(token.expiry.map(|end| {
            let by_wall = end.wall.duration_since(now.wall).unwrap_or_default();
            end.instant.saturating_duration_since(now.instant).min(by_wall)
        }))
    }

    /// How long the token that is in use is good for still, and nothing while no other comes in its place.
    pub(super) fn in_use_for(&self, now: Now) -> Option<Duration> {
        match self.left(now) {
            Some(left) => left.filter(|_| self.used),
            None if self.used || self.joined => self.failing(now).map(|_| Duration::ZERO),
            None => None,
        }
    }

    /// The failure that stands: the last try came to it, and not so long ago that nobody wants a token any more.
    pub(super) fn failing(&self, now: Now) -> Option<&TokenError> {
        let rest = self.rest.as_ref().filter(|rest| now.instant < rest.until + BACKOFF_MOST)?;
        Some(&rest.error).filter(|error| !error.is_for_the_user())
    }

    pub(super) fn has_usable(&self, now: Now) -> bool {
        self.token.as_ref().is_some_and(|token| token.lives(now))
    }

    pub(super) fn holds(&self, token: &Secret) -> bool {
        self.token.as_ref().is_some_and(|held| held.secret == *token)
    }

    pub(super) fn generation(&self) -> Option<u64> {
        self.token.as_ref().map(|token| token.generation)
    }

    /// Notes that the provider refuses the refresh token of a generation for good.
    pub(super) fn refused(&mut self, generation: u64, state: RowState) {
        self.refused = Some(Box::new((generation, state)));
    }

    /// What the row of this generation should say of the refresh token, if the provider has refused it.
    pub(super) fn refusal(&self, generation: u64) -> Option<RowState> {
        self.refused.as_ref().filter(|refused| refused.0 == generation).map(|refused| refused.1.clone())
    }

    /// Whether there is a token, or was a grant when it was last looked.
    pub(super) fn has_seen_a_grant(&self) -> bool {
        self.token.is_some() || self.seen.is_some()
    }

    /// Notes the generation of the stored grant with which a renewal goes on: what was told of it is no news any more.
    pub(super) fn looks_at(&mut self, generation: u64) {
        self.news &= self.seen.is_some_and(|told| told > generation);
        self.seen = Some(generation);
    }

    /// Notes the generation of the stored grant when the store tells of it; whether it is another one than before.
    pub(super) fn is_told_of(&mut self, generation: u64) -> bool {
        let news = self.seen.replace(generation) != Some(generation);
        self.news |= news && self.flight.is_some();
        news
    }

    /// Notes that a grant of this generation is to take the place of the one of the token at hand.
    pub(super) fn replaced_by(&mut self, generation: u64) {
        self.replaced_by = Some(generation);
    }

    /// Whether the token at hand is of a grant that another one has replaced.
    fn is_of_the_grant_before(&self) -> bool {
        self.token.as_ref().is_some_and(|token| self.replaced_by.is_some_and(|newer| token.generation < newer))
    }

    /// Whether a token from the store is a later one than the token at hand, and not the one that was rejected, under
    /// another number.
    pub(super) fn is_news(&self, stored: &Token, cause: Cause) -> bool {
        let Some(held) = &self.token else { return true };
        let rejected = matches!(cause, Cause::Rejected) && stored.secret == held.secret;
        stored.generation > held.generation && !rejected
    }

    /// The token that a consent brought while the renewal under way began with the grant before.
    pub(super) fn overtaking(&self, now: Now) -> Option<Token> {
        self.token.clone().filter(|token| self.overtaken && token.lives(now))
    }

    fn is_idle(&self, now: Now) -> bool {
        let rests = self.rest.as_ref().is_some_and(|rest| {
            // How often it has failed is what the next rest is made of.
            let remembered = if rest.error.is_for_the_user() { Duration::ZERO } else { BACKOFF_MOST };
            now.instant < rest.until + remembered
        });
        !self.is_of_use(now) && self.flight.is_none() && self.unsaved.is_none() && !rests
    }

    /// Whether there is a token that lives, or something to be remembered of one that does not.
    fn is_of_use(&self, now: Now) -> bool {
        let forced = self.force.last.is_some_and(|last| now.instant.duration_since(last) < COOL_DOWN_MOST);
        self.token.as_ref().is_some_and(|token| !token.is_over(now) || forced || self.refused.is_some())
    }

    /// Whether there is no token, or its plan has come and there is no other. A refusal is kept with it (SEMANTICS C15).
    pub(super) fn wanes(&self, now: Now) -> bool {
        let planned = |token: &Token| token.renew_at.is_some_and(|at| at <= now.instant) || token.is_over(now);
        self.token.as_ref().is_none_or(|token| planned(token) && self.refused.is_none())
    }

    /// Whether the token should be renewed now, ahead of its end, by a request that comes along.
    pub(super) fn due(&self, now: Now) -> bool {
        let planned = self.token.as_ref().and_then(|token| token.renew_at).is_some_and(|at| at <= now.instant);
        let due = planned || self.is_of_the_grant_before();
        due && self.flight.is_none() && self.resting(now).is_none()
    }

    /// Whether the planned renewal is worth a call: only for a token that was used since the last one, or that should not be
    /// used any more.
    pub(super) fn due_and_worth_it(&self, now: Now) -> bool {
        (self.used || self.is_of_the_grant_before()) && self.due(now)
    }

    /// Forgets what failed, and how often a 401 has forced a renewal. A grant that is refused for good stays refused.
    pub(super) fn reconsider(&mut self) {
        (self.rest, self.attempts, self.force) = (None, 0, Force::default());
    }

    /// Forgets what failed for a while.
    fn try_again(&mut self) {
        if self.rest.as_ref().is_some_and(|rest| matches!(rest.error, TokenError::Unavailable { .. })) {
            (self.rest, self.attempts) = (None, 0);
        }
    }

    /// Whether the last try failed with the very same error.
    pub(super) fn is_known(&self, error: &TokenError) -> bool {
        self.rest.as_ref().is_some_and(|rest| rest.error == *error)
    }

    /// The last failure, while nothing is to be tried after it.
    pub(super) fn resting(&self, now: Now) -> Option<TokenError> {
        let rest = self.rest.as_ref().filter(|rest| now.instant < rest.until)?;
        let mut error = rest.error.clone();
        if let TokenError::Unavailable { retry_after, .. } = &mut error {
            *retry_after = rest.until - now.instant;
        }
        Some(error)
    }

    /// Whether a 401 to this generation may force a renewal now.
    pub(super) fn may_force(&mut self, now: Now, rejected: u64) -> bool {
        if self.force.brought == Some(rejected) && !self.force.doubled {
            self.force.doubled = true;
            self.force.every = (self.force.every * 2).min(COOL_DOWN_MOST);
        }
        self.force.last.is_none_or(|last| now.instant.duration_since(last) >= self.force.every)
    }

    /// Whether the store may be asked now, in the cool-down, for a grant that somebody else put there.
    pub(super) fn may_look(&mut self, now: Now) -> bool {
        let may = self.force.looked.is_none_or(|looked| now.instant.duration_since(looked) >= ABSENT_REST);
        if may {
            self.force.looked = Some(now.instant);
        }
        may
    }

    pub(super) fn forced(&mut self, now: Now) {
        self.force.last = Some(now.instant);
    }

    /// An upstream answered something else than 401 to this generation.
    pub(super) fn proven(&mut self, generation: u64) {
        if self.force.brought == Some(generation) {
            self.force = Force { last: self.force.last, ..Force::default() };
        }
    }

    /// Ends the flight with what it brought.
    pub(super) fn settle(
        &mut self,
        now: Now,
        cause: Cause,
        outcome: Result<Token, TokenError>,
        not_connected: TokenError,
    ) -> Result<Bearer, TokenError> {
        self.flight = None;
        let (way_changed, news) = (std::mem::take(&mut self.way_changed), std::mem::take(&mut self.news));
        let outcome = match std::mem::take(&mut self.void) {
            true => outcome.and_then(|_| Err(not_connected)),
            false => outcome,
        };
        if let Some(held) = self.overtaking(now) {
            self.overtaken = false;
            if outcome.as_ref().map_or(true, |token| token.generation <= held.generation) {
                return Ok(self.bearer(&held));
            }
        }
        match outcome {
            Ok(mut token) => {
                token.renew_at = self.paced(now, &token);
                if matches!(cause, Cause::Rejected) {
                    self.force.brought = Some(token.generation);
                    self.force.doubled = false;
                }
                self.used = self.joined;
                (self.rest, self.attempts) = (None, 0);
                // Those who waited for it use it even in its last seconds; it came this moment.
                let bearer = self.bearer(&token);
                self.token = Some(token);
                Ok(bearer)
            }
            Err(error) => {
                let error = self.rest_after(now, error);
                if way_changed {
                    self.try_again();
                }
                if news {
                    self.rest = None;
                } else if error.is_for_the_user() {
                    // Nothing comes of it before another one is stored, and the token at hand serves until its end
                    // (SEMANTICS C15).
                    self.replaced_by = None;
                }
                Err(error)
            }
        }
    }

    /// When the scheduler should look again, while the token lives.
    pub(super) fn next_renewal(&self, now: Now) -> Option<Instant> {
        let token = self.token.as_ref().filter(|token| token.lives(now))?;
        let at = if self.is_of_the_grant_before() { now.instant } else { token.renew_at? };
        Some(self.rest.as_ref().map_or(at, |rest| at.max(rest.until)))
    }

    fn bearer(&self, token: &Token) -> Bearer {
        Bearer {
            header: token.header.clone(),
            generation: token.generation,
            ends: token.expiry.map(|end| end.instant),
            secret: token.secret.clone(),
            unproven: self.force.brought == Some(token.generation),
        }
    }

    /// A provider that returns the same token until its end is not asked again and again.
    fn paced(&self, now: Now, token: &Token) -> Option<Instant> {
        let planned = token.renew_at?;
        let (Some(old), Some(new)) = (self.token.as_ref().and_then(|old| old.expiry), token.expiry) else {
            return Some(planned);
        };
        if new.instant > old.instant + Duration::from_secs(1) {
            return Some(planned);
        }
        let remaining = new.instant.saturating_duration_since(now.instant);
        Some(now.instant + (remaining / 2).max(Duration::from_secs(10)))
    }

    fn rest_after(&mut self, now: Now, mut error: TokenError) -> TokenError {
        let rest = match &mut error {
            TokenError::NotConnected { .. } | TokenError::Reauthorize { .. } => ABSENT_REST,
            TokenError::FixConfiguration { .. } => REFUSED_REST,
            TokenError::Unavailable { retry_after, asked: false, .. } => {
                *retry_after = UNASKED_REST.mul_f64(1.0 + 0.5 * random());
                *retry_after
            }
            TokenError::Unavailable { retry_after, .. } => {
                let most = Duration::from_secs(1 << self.attempts.min(6)).min(BACKOFF_MOST);
                self.attempts = self.attempts.saturating_add(1);
                *retry_after = (most.mul_f64(random())).max(Duration::from_secs(1)).max(*retry_after);
                *retry_after
            }
        };
        self.rest = Some(Box::new(Rest { error: error.clone(), until: now.instant + rest }));
        error
    }
}

impl Token {
    /// A token that lives for `lifetime` from `sent`, the moment of its request, and is renewed `ahead` of its end at
    /// most.
    pub(super) fn new(secret: Secret, generation: u64, sent: Now, lifetime: Option<Duration>, ahead: Duration) -> Self {
        let lifetime = lifetime.filter(|life| *life <= LONGEST_LIFETIME);
        let expiry = lifetime.map(|life| Expiry { instant: sent.instant + life, wall: sent.wall + life });
        let renew_at = lifetime.map(|life| {
            let ahead = ahead.min(life / 3);
            sent.instant + (life - ahead).saturating_sub(ahead.mul_f64(0.1 * random()))
        });
        Self { header: header(&secret), secret, generation, expiry, renew_at }
    }

    /// The token of a row, which was written some time ago, perhaps by another process.
    pub(super) fn stored(access: &Access, generation: u64, now: Now, ahead: Duration) -> Self {
        let age = now.wall.duration_since(access.obtained_at);
        // From the future, so the wall clock was set back, and how old it is nobody knows. Another machine's clock may
        // be a little ahead.
        let unknown = age.as_ref().is_err_and(|ahead| ahead.duration() > EARLY);
        let lifetime = access.expires_at.map(|end| match end.duration_since(access.obtained_at) {
            Ok(lifetime) if !unknown => lifetime,
            _ => Duration::ZERO,
        });
        let age = age.unwrap_or_default();
        // Of the monotonic clock only the present is known, so the age is what the wall clock says.
        let sent = Now { instant: now.instant.checked_sub(age).unwrap_or(now.instant), wall: access.obtained_at };
        Self::new(access.token.clone(), generation, sent, lifetime, ahead)
    }

    pub(super) fn lives(&self, now: Now) -> bool {
        self.expiry.is_none_or(|end| now.instant + EARLY < end.instant && now.wall + EARLY < end.wall)
    }

    /// Whether its end has come.
    pub(super) fn is_over(&self, now: Now) -> bool {
        self.expiry.is_some_and(|end| end.instant <= now.instant || end.wall <= now.wall)
    }
}

/// The value of `Authorization`, which hyper and h2 then neither print nor index.
fn header(secret: &Secret) -> HeaderValue {
    // Every copy of the value shares these bytes, and the last one wipes them.
    let bytes = Bytes::from_owner(Zeroizing::new(format!("Bearer {}", secret.expose()).into_bytes()));
    let mut value = HeaderValue::from_maybe_shared(bytes).unwrap_or_else(|_| HeaderValue::from_static("Bearer"));
    value.set_sensitive(true);
    value
}

/// From 0 to 1, for jitter only.
fn random() -> f64 {
    #[cfg(test)]
    if let Some(number) = super::tests::jitter() {
        return number;
    }
    f64::from(getrandom::u32().unwrap_or(u32::MAX / 2)) / f64::from(u32::MAX)
}
