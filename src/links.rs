//! The links that lead a user to a consent, made in one place: for answers, logs, the dashboard and the admin API.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use url::Url;

use crate::names::{ProviderName, UserName};
use crate::store::{Store, StoreError};

/// How long a ticket is good for.
const TICKET_LIVES: Duration = Duration::from_secs(3600);
/// What a ticket is sealed for.
const TICKET: &str = "connect_ticket";

/// Makes links. A clone makes the same ones.
#[derive(Clone)]
pub struct Links {
    inner: Arc<Inner>,
}

struct Inner {
    base: Url,
    store: Store,
    tickets: bool,
}

/// What a user is to be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Invitation {
    /// The user who is to connect; the name of the one without a name when left out.
    #[serde(default)]
    pub user: String,
    /// Scopes besides the configured ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scopes: Vec<String>,
    /// Where the browser goes afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub return_to: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Ticket {
    provider: String,
    ends: u64,
    #[serde(flatten)]
    invitation: Invitation,
}

impl Links {
    /// Links to `base`. With `tickets` whoever opens one needs to know nothing else, and nobody can change whom it is for.
    pub fn new(base: Url, store: Store, tickets: bool) -> Self {
        Self { inner: Arc::new(Inner { base, store, tickets }) }
    }

    /// The admin listener, as browsers reach it: scheme, host and port.
    pub fn base(&self) -> &Url {
        &self.inner.base
    }

    /// The link to a user's consent, and when it ends, if it does.
    ///
    /// # Errors
    /// Where the machine has no randomness to seal a ticket with.
    pub fn connect(
        &self,
        provider: &ProviderName,
        invitation: &Invitation,
        now: SystemTime,
    ) -> Result<(Url, Option<SystemTime>), StoreError> {
        let mut url = self.inner.base.clone();
        url.set_path(&format!("/connect/{provider}"));
        if self.inner.tickets {
            let ends = now + TICKET_LIVES;
            let seconds = ends.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let ticket = Ticket { provider: provider.to_string(), ends: seconds, invitation: invitation.clone() };
            let text = serde_json::to_string(&ticket).expect("a ticket is JSON");
            url.query_pairs_mut().append_pair("ticket", &self.inner.store.stamp(TICKET, &text)?);
            return Ok((url, Some(ends)));
        }
        let mut query = url.query_pairs_mut();
        query.append_pair("user", &invitation.user);
        if !invitation.scopes.is_empty() {
            query.append_pair("scope", &invitation.scopes.join(" "));
        }
        if let Some(page) = &invitation.return_to {
            query.append_pair("return_to", page);
        }
        drop(query);
        Ok((url, None))
    }

    /// The link for a user, without anything special.
    pub fn for_user(
        &self,
        provider: &ProviderName,
        user: &UserName,
        scopes: &[String],
        now: SystemTime,
    ) -> Option<Url> {
        let invitation = Invitation { user: user.to_string(), scopes: scopes.to_vec(), return_to: None };
        self.connect(provider, &invitation, now).map(|(url, _)| url).ok()
    }

    /// What a ticket invites to, if it is one of ours for this provider, and has not ended.
    pub fn redeem(&self, provider: &ProviderName, word: &str, now: SystemTime) -> Option<Invitation> {
        let opened = self.inner.store.stamped(TICKET, word)?;
        let ticket: Ticket = serde_json::from_str(opened.expose()).ok()?;
        let ends = UNIX_EPOCH + Duration::from_secs(ticket.ends);
        (ticket.provider == provider.as_str() && now < ends).then_some(ticket.invitation)
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;

    use super::*;
    use crate::secret::Secret;
    use crate::store::key::Keyring;

    async fn links(tickets: bool) -> (tempfile::TempDir, Links) {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keyring::from_secrets(&[Secret::new(BASE64_STANDARD.encode([1; 32]))]).unwrap();
        let store = Store::open(folder.path(), keys, true).await.unwrap();
        (folder, Links::new("http://127.0.0.1:3129/".parse().unwrap(), store, tickets))
    }

    fn invitation() -> Invitation {
        Invitation { user: "alice & bob".into(), scopes: vec!["a".into(), "b".into()], return_to: None }
    }

    #[tokio::test]
    async fn a_link_says_for_whom_and_for_what() {
        let (_folder, links) = links(false).await;
        let github = "github".parse().unwrap();
        let (url, ends) = links.connect(&github, &invitation(), SystemTime::now()).unwrap();
        assert_eq!(url.as_str(), "http://127.0.0.1:3129/connect/github?user=alice+%26+bob&scope=a+b");
        assert_eq!(ends, None);
    }

    #[tokio::test]
    async fn a_ticket_is_for_one_provider_and_ends_and_cannot_be_made_up() {
        let (_folder, links) = links(true).await;
        let (github, slack) = ("github".parse().unwrap(), "slack".parse().unwrap());
        let now = SystemTime::now();
        let (url, ends) = links.connect(&github, &invitation(), now).unwrap();
        assert!(!url.as_str().contains("alice"), "{url}");
        let word = url.query_pairs().next().unwrap().1.into_owned();
        assert_eq!(links.redeem(&github, &word, now), Some(invitation()));
        assert_eq!(links.redeem(&slack, &word, now), None);
        assert_eq!(links.redeem(&github, &word, ends.unwrap()), None);
        for made_up in ["", "x", &word[1..], &word[..word.len() - 1], &format!("{word}A")] {
            assert_eq!(links.redeem(&github, made_up, now), None, "{made_up}");
        }
    }
}
