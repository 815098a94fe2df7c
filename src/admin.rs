//! The dashboard and the admin API: who is connected, what happens, and how to change it.

mod api;
mod live;
mod pages;

use std::sync::Arc;

use axum::{Router, middleware};

use crate::clock::Clock;
use crate::connections::{self, Connection};
use crate::drain::{Drain, Quit};
use crate::events::Events;
use crate::links::Links;
use crate::listen::Place;
use crate::names::{ProviderName, Subject};
use crate::oauth::Provider;
use crate::store::{Store, StoreError};
use crate::tokens::{Revocation, Tokens};
use crate::web;
use live::Live;

/// The admin listener's own part. A clone is the same one.
#[derive(Clone)]
pub struct Admin {
    inner: Arc<Inner>,
}

/// What it works with.
pub struct Parts {
    /// Who is connected, and who goes.
    pub tokens: Tokens,
    /// Where grants are kept.
    pub store: Store,
    /// The links to a consent.
    pub links: Links,
    /// What time it is.
    pub clock: Clock,
    /// What happens.
    pub events: Events,
    /// What ends the live view.
    pub drain: Drain,
    /// What has everything stop, if whoever is on this machine may.
    pub quit: Option<Quit>,
    /// Whom there is to connect.
    pub providers: Vec<Arc<Provider>>,
    /// Where agents reach the proxy.
    pub proxies: Vec<Place>,
    /// The variables that an agent needs.
    pub variables: Vec<(String, String)>,
}

struct Inner {
    parts: Parts,
    live: Live,
}

impl Admin {
    /// Puts the parts together, and begins to watch. Must be called within a tokio runtime.
    pub fn new(parts: Parts) -> Self {
        let live = Live::start(&parts.events, &parts.drain);
        Self { inner: Arc::new(Inner { parts, live }) }
    }

    /// Its paths. They need the guard before them.
    pub fn router(&self) -> Router {
        let paths = pages::router().merge(api::router()).with_state(self.clone());
        paths.layer(middleware::from_fn(web::authorized_only))
    }

    async fn connections(&self) -> Result<Vec<Connection>, StoreError> {
        connections::all(&self.parts().store, &self.parts().providers).await
    }

    async fn disconnect(&self, provider: &ProviderName, subject: &Subject) -> Result<Option<Revocation>, StoreError> {
        self.parts().tokens.disconnect(provider, subject).await
    }

    fn provider(&self, name: &ProviderName) -> Option<&Arc<Provider>> {
        self.parts().providers.iter().find(|provider| provider.name == *name)
    }

    fn parts(&self) -> &Parts {
        &self.inner.parts
    }
}

/// Whose grant it is, as a form or a path names it.
fn subject(user: &str) -> Option<Subject> {
    if user.is_empty() || user == "(client)" { Some(Subject::Client) } else { user.parse().ok().map(Subject::User) }
}

/// What became of a disconnect at the provider, in words, and where to finish it by hand.
fn told(revocation: &Revocation, provider: Option<&Arc<Provider>>) -> String {
    let by_hand = provider.and_then(|provider| provider.manage_url.as_ref());
    let by_hand = by_hand.map(|url| format!("; take the access back at {url}")).unwrap_or_default();
    match revocation {
        Revocation::Done => "revoked at the provider".into(),
        Revocation::NotOffered => format!("the provider offers no way to revoke it from here{by_hand}"),
        Revocation::Failed(why) => format!("it could not be revoked at the provider: {why}{by_hand}"),
    }
}
