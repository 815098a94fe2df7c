//! What keeps tokens from being renewed now, for whoever looks after the sidecar. None of it stops traffic while the tokens
//! at hand are valid.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{TokenError, Tokens};

/// How long the store may take to show that it is there.
const STORE_WITHIN: Duration = Duration::from_secs(2);

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Trouble {
    /// A stable name.
    pub code: &'static str,
    /// What it is, in words.
    pub detail: String,
}

impl Tokens {
    /// What is wrong now: with the store, with grants that are in memory only (SEMANTICS C13), with providers that tokens
    /// are wanted from (C15). Each once, in order.
    pub async fn troubles(&self) -> Vec<Trouble> {
        let store = tokio::time::timeout(STORE_WITHIN, self.inner.store.is_there()).await;
        let store = match store {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Trouble { code: error.code(), detail: error.to_string() }),
            Err(_) => Some(Trouble {
                code: "store_slow",
                detail: format!("the store has not answered within {} s", STORE_WITHIN.as_secs()),
            }),
        };
        let now = self.inner.clock.now();
        let mut unsaved = 0;
        let mut troubles: BTreeSet<Trouble> = store.into_iter().collect();
        for slot in &self.inner.slots {
            let state = slot.lock();
            unsaved += usize::from(state.unsaved.is_some());
            // Where the provider was not asked, the store says what is wrong, or another process is at it.
            if let Some(error) = state.resting(now)
                && !matches!(error, TokenError::Unavailable { asked: false, .. })
                && !error.is_for_the_user()
            {
                troubles.insert(Trouble { code: error.code(), detail: error.to_string() });
            }
        }
        if unsaved > 0 {
            let detail =
                format!("{unsaved} rotated refresh tokens are in memory only, since the store failed to take them");
            troubles.insert(Trouble { code: "unsaved", detail });
        }
        troubles.into_iter().collect()
    }
}
