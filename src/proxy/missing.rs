//! Says that a user has to connect: once, however many requests meet it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use tokio::time::Instant;

use super::Proxy;
use crate::events;
use crate::names::{ProviderName, Subject, UserName};
use crate::oauth::Grant;
use crate::tokens::Key;

/// How long it is not said again.
const QUIET: Duration = Duration::from_secs(60);
/// Of so many users at most it is remembered that it was said.
const MOST: usize = 10_000;
/// How often room is looked for when there is none.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Of whom it was said, and when.
#[derive(Default)]
pub(super) struct Missing {
    said: DashMap<(ProviderName, UserName), Instant>,
    /// When there was no room, and it was looked for.
    full: Mutex<Option<Instant>>,
}

impl Missing {
    /// Whether it is time to say it. Of more users than are remembered it is not said: an agent may make up any number
    /// of names, and each would be told of (OAU-019).
    fn is_news(&self, provider: &ProviderName, user: &UserName, quiet: Duration) -> bool {
        let now = Instant::now();
        let who = (provider.clone(), user.clone());
        if self.said.len() >= MOST && !self.said.contains_key(&who) && !self.makes_room(now, quiet) {
            return false;
        }
        // Of two requests in one moment, one is the first.
        match self.said.entry(who) {
            Entry::Occupied(said) if now.duration_since(*said.get()) < quiet => false,
            entry => {
                entry.insert(now);
                true
            }
        }
    }

    /// Forgets those of whom it may be said again, and says whether that made room. It takes a while, so it is tried once
    /// a second.
    fn makes_room(&self, now: Instant, quiet: Duration) -> bool {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        if full.is_some_and(|looked| now.duration_since(looked) < LOOK_AGAIN) {
            return false;
        }
        self.said.retain(|_, said| now.duration_since(*said) < quiet);
        let room = self.said.len() < MOST;
        *full = Some(now).filter(|_| !room);
        room
    }

    /// The user has connected: the next time is news again.
    pub(super) fn settled(&self, key: &Key) {
        if let Subject::User(user) = &key.subject
            && !self.said.is_empty()
        {
            self.said.remove(&(key.provider.clone(), user.clone()));
        }
    }
}

/// The link where a user connects, if the provider has them consent. It is told to whoever watches, once.
pub(super) fn tell(proxy: &Proxy, key: &Key) -> Option<String> {
    let parts = proxy.parts();
    let (Subject::User(user), Some(links), Some(provider)) = (&key.subject, &parts.links, parts.tokens.provider(key))
    else {
        return None;
    };
    if provider.grant != Grant::AuthorizationCode {
        return None;
    }
    let url = links.for_user(&key.provider, user, &[], parts.clock.now().wall)?.to_string();
    let wait = provider.on_missing.wait;
    if proxy.lasting.missing.is_news(&key.provider, user, wait.max(QUIET)) {
        parts.events.missing(events::Missing {
            provider: key.provider.clone(),
            title: provider.title.clone(),
            user: user.clone(),
            connect_url: url.clone(),
            wait: Some(wait).filter(|wait| !wait.is_zero()),
        });
    }
    Some(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn of_so_many_users_it_is_said_and_of_no_more() {
        // OAU-019
        let (missing, github) = (Missing::default(), "github".parse().unwrap());
        let is_news = |n: usize| missing.is_news(&github, &format!("user-{n}").parse().unwrap(), QUIET);
        assert!((0..MOST).all(is_news));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(!(0..2 * MOST).any(is_news));
        assert_eq!(missing.said.len(), MOST);
        tokio::time::advance(QUIET).await;
        assert!(is_news(MOST) && is_news(0), "when it may be said again, there is room again");
        assert_eq!(missing.said.len(), 2);
    }
}
