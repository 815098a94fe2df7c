//! `sidebearer status`: who is connected, until when, and what to do.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::CliError;
use crate::app;
use crate::config::Settings;
use crate::names::{ProviderName, Subject, UserName};
use crate::oauth::{Grant, Provider};
use crate::store::{Row, State, StoreError};

/// Prints a line for each provider and user; 0 also when something needs doing.
pub(super) async fn status(settings: &Settings, as_json: bool) -> Result<u8, CliError> {
    let store = app::open_store(settings, false).await?;
    let now = SystemTime::now();
    let stored = store.grants().await?.into_iter();
    let mut lines: Vec<Line> = stored.map(|(provider, subject, row)| Line::of(provider, subject, row, now)).collect();
    for provider in &settings.providers {
        if !lines.iter().any(|line| line.provider == provider.name) {
            lines.push(Line::without_grant(provider));
        }
    }
    lines.sort_by(|a, b| (&a.provider, &a.subject).cmp(&(&b.provider, &b.subject)));
    if as_json {
        anstream::println!("{:#}", Value::Array(lines.iter().map(Line::json).collect()));
    } else {
        anstream::print!("{}", table(&lines));
    }
    Ok(0)
}

/// What is said of one grant.
pub(super) struct Line {
    provider: ProviderName,
    subject: Subject,
    state: &'static str,
    reason: Option<String>,
    expires_in: Option<Duration>,
    renewed: Option<Duration>,
    generation: Option<u64>,
    todo: String,
}

impl Line {
    /// A grant of the store.
    pub(super) fn of(provider: ProviderName, subject: Subject, row: Result<Row, StoreError>, now: SystemTime) -> Self {
        let row = match row {
            Ok(row) => row,
            Err(error) => return Self::unreadable(provider, subject, &error),
        };
        let (state, reason, todo) = match row.state {
            State::Connected => ("connected", None, String::new()),
            State::Reauthorize { reason } => {
                let todo = format!("grant access again, then `sidebearer import {provider} --user {subject} ...`");
                ("reauthorize", Some(reason), todo)
            }
            State::FixConfiguration { reason } => {
                ("fix_configuration", Some(reason), format!("correct `providers.{provider}` in proxy.yaml"))
            }
        };
        let expires_in = row.access.and_then(|access| access.expires_at).map(|end| since(now, end));
        let renewed = row.renewed_at.map(|at| since(at, now));
        Self { provider, subject, state, reason, expires_in, renewed, generation: Some(row.generation), todo }
    }

    /// A provider that nobody has connected.
    pub(super) fn without_grant(provider: &Provider) -> Self {
        let (subject, state, todo) = match provider.grant {
            Grant::ClientCredentials => (Subject::Client, "on_demand", String::new()),
            Grant::RefreshToken => {
                let todo = format!("`sidebearer import {} --refresh-token-file FILE`", provider.name);
                (Subject::User(UserName::default()), "not_connected", todo)
            }
        };
        let provider = provider.name.clone();
        Self { provider, subject, state, reason: None, expires_in: None, renewed: None, generation: None, todo }
    }

    fn unreadable(provider: ProviderName, subject: Subject, error: &StoreError) -> Self {
        let (reason, todo) = (Some(error.to_string()), error.hint());
        Self { provider, subject, state: error.code(), reason, expires_in: None, renewed: None, generation: None, todo }
    }

    /// For scripts.
    pub(super) fn json(&self) -> Value {
        json!({
            "provider": self.provider.as_str(),
            "user": match &self.subject { Subject::Client => Value::Null, Subject::User(user) => user.as_str().into() },
            "state": self.state,
            "reason": self.reason,
            "expires_in": self.expires_in.map(|time| time.as_secs()),
            "renewed_ago": self.renewed.map(|time| time.as_secs()),
            "generation": self.generation,
            "todo": Some(&self.todo).filter(|todo| !todo.is_empty()),
        })
    }

    /// In words, for `check`.
    pub(super) fn words(&self) -> String {
        let mut words = self.state.replace('_', " ");
        if let Some(reason) = &self.reason {
            words.push_str(&format!(" ({reason})"));
        }
        match self.expires_in {
            Some(Duration::ZERO) => words.push_str(", token expired"),
            Some(time) => words.push_str(&format!(", token expires in {}", spoken(time))),
            None => {}
        }
        if !self.todo.is_empty() {
            words.push_str(&format!(": {}", self.todo));
        }
        words
    }
}

fn table(lines: &[Line]) -> String {
    let head = ["PROVIDER", "USER", "STATE", "EXPIRES", "RENEWED", "TO DO"].map(str::to_owned);
    let rows = lines.iter().map(|line| {
        let state = line.reason.as_ref().map_or(line.state.to_owned(), |reason| format!("{} ({reason})", line.state));
        let expires = match line.expires_in {
            Some(Duration::ZERO) => "expired".to_owned(),
            Some(time) => format!("in {}", spoken(time)),
            None => "-".to_owned(),
        };
        let renewed = line.renewed.map_or("-".to_owned(), |time| format!("{} ago", spoken(time)));
        let todo = if line.todo.is_empty() { "-".to_owned() } else { line.todo.clone() };
        [line.provider.to_string(), printable(&line.subject), state, expires, renewed, todo]
    });
    let rows: Vec<[String; 6]> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..6).map(width).collect();
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect::<Vec<_>>();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// A user's name is the agent's service's own text: nothing in it may steer a terminal.
fn printable(subject: &Subject) -> String {
    subject.to_string().escape_debug().to_string()
}

fn since(from: SystemTime, to: SystemTime) -> Duration {
    to.duration_since(from).unwrap_or_default()
}

/// A time as people say it: its largest unit.
fn spoken(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds @ 7200..=172_799 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_to_do() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let row = |state| Row {
            provider: "github".parse().unwrap(),
            subject: Subject::User(UserName::default()),
            generation: 7,
            target: Default::default(),
            refresh_token: None,
            access: None,
            granted_scopes: None,
            state,
            intent: None,
            renewed_at: Some(now - Duration::from_secs(300)),
            stored_at: now,
        };
        let lost = row(State::Reauthorize { reason: "lost_rotation".into() });
        let lines = [Line::of(lost.provider.clone(), lost.subject.clone(), Ok(lost), now)];
        assert_eq!(
            table(&lines),
            "PROVIDER  USER     STATE                        EXPIRES  RENEWED    TO DO\n\
             github    default  reauthorize (lost_rotation)  -        5 min ago  grant access again, then `sidebearer \
             import github --user default ...`\n"
        );
    }
}
