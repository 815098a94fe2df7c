//! What keeps tokens from being renewed now, for whoever looks after the sidecar. None of it stops traffic while the tokens
//! at hand are valid.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Inner, TokenError, Tokens};
use crate::metrics::Grants;
use crate::names::ProviderName;
use crate::oauth::Grant;
use crate::store::StoreError;

/// How long the store may take to show that it is there.
const STORE_WITHIN: Duration = Duration::from_secs(2);

/// The states that grants are counted by.
pub const STANDINGS: [&str; 4] = ["connected", "reauthorize", "fix_configuration", NEVER];
const NEVER: &str = "never_connected";

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Trouble {
    /// A stable name.
    pub code: &'static str,
    /// With which provider, if with one.
    pub provider: Option<ProviderName>,
    /// What it is, in words.
    pub detail: String,
}

/// What is wrong now, and how each provider's tokens fare.
#[derive(Debug, Clone)]
pub struct Condition {
    /// As of [`Tokens::troubles`].
    pub troubles: Vec<Trouble>,
    /// One for each provider, in order.
    pub providers: Vec<Fare>,
    /// Whether the store answers.
    pub store_is_there: bool,
    /// How many rotated refresh tokens are in memory only.
    pub unsaved: usize,
}

/// How the tokens of one provider fare, whoever they are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fare {
    /// The provider.
    pub provider: ProviderName,
    /// How many tokens are at hand that can be sent.
    pub tokens: usize,
    /// How long the first of them to end is still good for, where an end is known.
    pub expires_in: Option<Duration>,
    /// The stable code of what keeps it from giving tokens now.
    pub trouble: Option<&'static str>,
}

impl Fare {
    /// In a word: that of its trouble, `ok`, or `idle` where no token was asked for.
    pub fn state(&self) -> &'static str {
        self.trouble.unwrap_or(if self.tokens > 0 { "ok" } else { "idle" })
    }
}

impl Tokens {
    /// What is wrong now: with the store, with grants that are in memory only (SEMANTICS C13), with providers that tokens
    /// are wanted from (C15). Each once, in order.
    pub async fn troubles(&self) -> Vec<Trouble> {
        self.condition().await.troubles
    }

    /// The same, with how each provider's tokens fare. It looks at every token.
    pub async fn condition(&self) -> Condition {
        let store = tokio::time::timeout(STORE_WITHIN, self.inner.store.is_there()).await;
        let store = match store {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Trouble { code: error.code(), provider: None, detail: error.to_string() }),
            Err(_) => Some(Trouble {
                code: "store_slow",
                provider: None,
                detail: format!("the store has not answered within {} s", STORE_WITHIN.as_secs()),
            }),
        };
        let store_is_there = store.is_none();
        let (fares, mut troubles, unsaved) = self.inner.fares();
        troubles.extend(store);
        let (troubles, providers) = (troubles.into_iter().collect(), fares.into_values().collect());
        Condition { troubles, providers, store_is_there, unsaved }
    }

    /// How many grants of each provider are in which state, by the names of [`STANDINGS`]: a provider that users connect is
    /// in one of them in any case.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub async fn census(&self) -> Result<Vec<Grants>, StoreError> {
        let counted = self.inner.store.census().await?;
        let providers = self.inner.current.load();
        let standings = providers.iter().flat_map(|(name, known)| {
            let of = |state: &str| {
                let grants = counted.iter().filter(|(provider, stored, _)| provider == name && stored == state);
                grants.map(|(_, _, grants)| usize::try_from(*grants).unwrap_or(usize::MAX)).sum::<usize>()
            };
            let by_users = known.provider.grant != Grant::ClientCredentials;
            let never = by_users && !counted.iter().any(|(provider, ..)| provider == name);
            STANDINGS.map(|state| (name.clone(), state, if state == NEVER { usize::from(never) } else { of(state) }))
        });
        Ok(standings.collect())
    }
}

impl Inner {
    /// What the slots say: of each provider, and what is wrong.
    fn fares(&self) -> (BTreeMap<ProviderName, Fare>, BTreeSet<Trouble>, usize) {
        let now = self.clock.now();
        let empty =
            |provider: &ProviderName| Fare { provider: provider.clone(), tokens: 0, expires_in: None, trouble: None };
        let mut fares: BTreeMap<_, _> = self.current.load().keys().map(|name| (name.clone(), empty(name))).collect();
        let (mut unsaved, mut troubles) = (0, BTreeSet::new());
        for slot in &self.slots {
            let state = slot.lock();
            unsaved += usize::from(state.unsaved.is_some());
            let provider = &slot.key.provider;
            let Some(fare) = fares.get_mut(provider) else { continue };
            if let Some(left) = state.left(now) {
                fare.tokens += 1;
                fare.expires_in = fare.expires_in.into_iter().chain(left).min();
            }
            // Where the provider was not asked, the store says what is wrong, or another process is at it.
            if let Some(error) = state.resting(now)
                && !matches!(error, TokenError::Unavailable { asked: false, .. })
                && !error.is_for_the_user()
            {
                fare.trouble = Some(error.code());
                let (code, detail) = (error.code(), error.to_string());
                troubles.insert(Trouble { code, provider: Some(provider.clone()), detail });
            }
        }
        if unsaved > 0 {
            let detail =
                format!("{unsaved} rotated refresh tokens are in memory only, since the store failed to take them");
            troubles.insert(Trouble { code: "unsaved", provider: None, detail });
        }
        (fares, troubles, unsaved)
    }
}
