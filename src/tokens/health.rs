//! What keeps tokens from being renewed now, for whoever looks after the sidecar. None of it stops traffic while the tokens
//! at hand are valid.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::known::{self, Known};
use super::{Inner, TokenError, Tokens};
use crate::metrics::Grants;
use crate::names::ProviderName;
use crate::store::{Counted, StoreError};

/// How long the store may take to show that it is there.
const STORE_WITHIN: Duration = Duration::from_secs(2);

/// What keeps providers from giving tokens, the worse first.
pub const TROUBLES: [&str; 2] = ["fix_configuration", "token_unavailable"];

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

/// What is wrong now besides the store, and how each provider's tokens fare.
#[derive(Debug, Clone)]
pub struct Condition {
    /// Each once, in order.
    pub troubles: Vec<Trouble>,
    /// One for each provider, in order.
    pub providers: Vec<Fare>,
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
    /// How long the first of those in use to end is still good for, where an end is known. Nothing where it has ended, and
    /// none has come.
    pub expires_in: Option<Duration>,
    /// The stable code of what keeps it from giving tokens: one of [`TROUBLES`], and the first of them that there is.
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
        let store = self.store_trouble().await;
        self.condition().troubles.into_iter().chain(store).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// What is wrong with the store, if anything is.
    pub async fn store_trouble(&self) -> Option<Trouble> {
        let store = tokio::time::timeout(STORE_WITHIN, self.inner.store.is_there()).await;
        match store {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Trouble { code: error.code(), provider: None, detail: error.to_string() }),
            Err(_) => Some(Trouble {
                code: "store_slow",
                provider: None,
                detail: format!("the store has not answered within {} s", STORE_WITHIN.as_secs()),
            }),
        }
    }

    /// What is wrong besides the store, and how each provider's tokens fare. It looks at every token.
    pub fn condition(&self) -> Condition {
        let (fares, troubles, unsaved) = self.inner.fares();
        let (troubles, providers) = (troubles.into_iter().collect(), fares.into_values().collect());
        Condition { troubles, providers, unsaved }
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
            let its: Vec<&Counted> = counted.iter().filter(|counted| counted.provider == *name).collect();
            let of = |state: &str| {
                let grants = its.iter().filter(|counted| standing(counted, known) == Some(state));
                grants.map(|counted| usize::try_from(counted.grants).unwrap_or(usize::MAX)).sum::<usize>()
            };
            let never = known.provider.grant.is_for_users() && its.is_empty();
            STANDINGS.map(|state| (name.clone(), state, if state == NEVER { usize::from(never) } else { of(state) }))
        });
        Ok(standings.collect())
    }
}

/// The state that grants are in as their provider is configured now, by its stable name: of another server or client,
/// they are no use (C15). A client needs nobody to grant it anything.
fn standing(counted: &Counted, known: &Known) -> Option<&'static str> {
    let is_others = counted.registration.is_some_and(|its| its != known.registration);
    if is_others && known.provider.grant.is_for_users() {
        return Some("reauthorize");
    }
    counted.state.as_ref().map(|state| state.for_who_wants(known.wanted).name())
}

impl Inner {
    /// What the slots say: of each provider, and what is wrong.
    fn fares(&self) -> (BTreeMap<ProviderName, Fare>, BTreeSet<Trouble>, usize) {
        let now = self.clock.now();
        let empty =
            |provider: &ProviderName| Fare { provider: provider.clone(), tokens: 0, expires_in: None, trouble: None };
        let current = self.current.load();
        let mut fares: BTreeMap<_, _> = current.keys().map(|name| (name.clone(), empty(name))).collect();
        let (mut unsaved, mut troubles) = (0, BTreeSet::new());
        for slot in &self.slots {
            let state = slot.lock();
            unsaved += usize::from(state.unsaved.is_some());
            let provider = &slot.key.provider;
            // Nobody renews what was asked for as it was configured before.
            let given = known::gives(&current, &slot.key).is_some();
            let Some(fare) = fares.get_mut(provider).filter(|_| given) else { continue };
            fare.tokens += usize::from(state.has_usable(now));
            fare.expires_in = fare.expires_in.into_iter().chain(state.in_use_for(now)).min();
            // Where the provider was not asked, the store says what is wrong, or another process is at it.
            if let Some(error) = state.failing(now)
                && !matches!(error, TokenError::Unavailable { asked: false, .. })
            {
                let (code, detail) = (error.code(), error.to_string());
                fare.trouble = TROUBLES.into_iter().find(|one| *one == code || fare.trouble == Some(*one));
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
