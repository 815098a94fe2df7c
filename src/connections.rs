//! What is known of every connection, and what to do about it: for `status`, the dashboard and the admin API.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::names::{ProviderName, Subject, UserName};
use crate::oauth::registration::Registration;
use crate::oauth::wanted::Wanted;
use crate::oauth::{Grant, Provider};
use crate::store::{Row, State, Store, StoreError};

/// What is said of one provider and user.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The provider.
    pub provider: ProviderName,
    /// What people call it.
    pub title: String,
    /// For whom.
    pub subject: Subject,
    /// A stable name: `connected`, `not_connected`, `reauthorize`, `fix_configuration`, `on_demand`, or that of what
    /// the store says when it does not open.
    pub state: &'static str,
    /// Why, in a word.
    pub reason: Option<String>,
    /// What was granted, as far as it is known.
    pub scopes: Vec<String>,
    /// When the token at hand ends.
    pub expires_at: Option<SystemTime>,
    /// When the last one came.
    pub renewed_at: Option<SystemTime>,
    /// Its number in the history of its row.
    pub generation: Option<u64>,
    /// What to do, if anything.
    pub todo: String,
    /// Whether a user can connect it with their browser.
    pub by_consent: bool,
}

/// Every connection that is stored, and one for every provider that has none, in order.
///
/// # Errors
/// When the store cannot be read.
pub async fn all(store: &Store, providers: &[Arc<Provider>]) -> Result<Vec<Connection>, StoreError> {
    let find = |name: &ProviderName| providers.iter().find(|provider| provider.name == *name).map(|known| &**known);
    let stored = store.grants().await?.into_iter();
    let mut all: Vec<Connection> =
        stored.map(|(name, subject, row)| Connection::of(find(&name), name.clone(), subject, row)).collect();
    for provider in providers {
        if !all.iter().any(|connection| connection.provider == provider.name) {
            all.push(Connection::without_grant(provider, &UserName::default()));
        }
    }
    all.sort_by(|a, b| (&a.provider, &a.subject).cmp(&(&b.provider, &b.subject)));
    Ok(all)
}

impl Connection {
    /// A grant of the store.
    pub fn of(
        known: Option<&Provider>,
        provider: ProviderName,
        subject: Subject,
        row: Result<Row, StoreError>,
    ) -> Self {
        let title = known.map_or_else(|| provider.to_string(), |known| known.title.clone());
        let by_consent = known.is_some_and(|known| known.grant == Grant::AuthorizationCode);
        let row = match row {
            Ok(row) => row,
            Err(error) => {
                let (state, reason, todo) = (error.code(), Some(error.to_string()), error.hint());
                return Self { todo, ..Self::empty(provider, title, subject, state, reason, by_consent) };
            }
        };
        let state = known.map(|known| row.state_for(Registration::of(known), Wanted::of(known)));
        let (state, reason, todo) = match state.unwrap_or(row.state) {
            State::Connected => ("connected", None, String::new()),
            State::Reauthorize { reason, .. } if by_consent => {
                ("reauthorize", Some(reason), format!("`sidebearer connect {provider} --user {subject}`"))
            }
            State::Reauthorize { reason, .. } => {
                let todo = format!("grant access again, then `sidebearer import {provider} --user {subject} ...`");
                ("reauthorize", Some(reason), todo)
            }
            State::FixConfiguration { reason } => {
                ("fix_configuration", Some(reason), format!("correct `providers.{provider}` in proxy.yaml"))
            }
        };
        let asked = row.target.scopes.iter().chain(&row.further_scopes).cloned();
        Self {
            scopes: row.granted_scopes.unwrap_or_else(|| asked.collect()),
            expires_at: row.access.and_then(|access| access.expires_at),
            renewed_at: row.renewed_at,
            generation: Some(row.generation),
            todo,
            ..Self::empty(provider, title, subject, state, reason, by_consent)
        }
    }

    /// A provider that this user has not connected.
    pub fn without_grant(provider: &Provider, user: &UserName) -> Self {
        let name = &provider.name;
        let for_user = if *user == UserName::default() { String::new() } else { format!(" --user {user}") };
        let (subject, state, todo) = match provider.grant {
            Grant::ClientCredentials => (Subject::Client, "on_demand", String::new()),
            Grant::RefreshToken => {
                let todo = format!("`sidebearer import {name}{for_user} --refresh-token-file FILE`");
                (Subject::User(user.clone()), "not_connected", todo)
            }
            Grant::AuthorizationCode => {
                (Subject::User(user.clone()), "not_connected", format!("`sidebearer connect {name}{for_user}`"))
            }
        };
        let by_consent = provider.grant == Grant::AuthorizationCode;
        Self { todo, ..Self::empty(name.clone(), provider.title.clone(), subject, state, None, by_consent) }
    }

    fn empty(
        provider: ProviderName,
        title: String,
        subject: Subject,
        state: &'static str,
        reason: Option<String>,
        by_consent: bool,
    ) -> Self {
        Self {
            provider,
            title,
            subject,
            state,
            reason,
            scopes: Vec::new(),
            expires_at: None,
            renewed_at: None,
            generation: None,
            todo: String::new(),
            by_consent,
        }
    }

    /// How long the token at hand is still good for; zero when it is not.
    pub fn expires_in(&self, now: SystemTime) -> Option<Duration> {
        self.expires_at.map(|end| end.duration_since(now).unwrap_or_default())
    }

    /// How long ago the last token came.
    pub fn renewed_ago(&self, now: SystemTime) -> Option<Duration> {
        self.renewed_at.map(|at| now.duration_since(at).unwrap_or_default())
    }

    /// The user, for whom there is one.
    pub fn user(&self) -> Option<&UserName> {
        match &self.subject {
            Subject::Client => None,
            Subject::User(user) => Some(user),
        }
    }
}

/// A time as people say it: its largest unit.
pub fn spoken(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds @ 7200..=172_799 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}
