//! Says that a user has to connect: once, however many requests meet it.

use std::time::Duration;

use dashmap::DashMap;
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

/// Of whom it was said, and when.
#[derive(Default)]
pub(super) struct Missing {
    said: DashMap<(ProviderName, UserName), Instant>,
}

impl Missing {
    /// Whether it is time to say it.
    fn is_news(&self, provider: &ProviderName, user: &UserName, quiet: Duration) -> bool {
        let now = Instant::now();
        if self.said.len() >= MOST {
            self.said.retain(|_, said| now.duration_since(*said) < quiet);
        }
        let mut said = self.said.entry((provider.clone(), user.clone())).or_insert(now);
        let news = *said == now || now.duration_since(*said) >= quiet;
        if news {
            *said = now;
        }
        news
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
    if proxy.inner.missing.is_news(&key.provider, user, wait.max(QUIET)) {
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
