//! `sidebearer status`: who is connected, until when, and what to do.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::CliError;
use crate::app;
use crate::config::Settings;
use crate::connections::{self, Connection, spoken};
use crate::names::Subject;

/// Prints a line for each provider and user; 0 also when something needs doing.
pub(super) async fn status(settings: &Settings, as_json: bool) -> Result<u8, CliError> {
    let store = app::open_store(settings, false).await?;
    let now = SystemTime::now();
    let all = connections::all(&store, &settings.providers).await?;
    if as_json {
        anstream::println!("{:#}", all.iter().map(|one| to_json(one, now)).collect::<Value>());
    } else {
        anstream::print!("{}", table(&all, now));
    }
    Ok(0)
}

/// For scripts.
fn to_json(connection: &Connection, now: SystemTime) -> Value {
    json!({
        "provider": connection.provider.as_str(),
        "user": connection.user().map(|user| user.as_str()),
        "state": connection.state,
        "reason": connection.reason,
        "scopes": connection.scopes,
        "expires_in": connection.expires_in(now).map(|time| time.as_secs()),
        "renewed_ago": connection.renewed_ago(now).map(|time| time.as_secs()),
        "generation": connection.generation,
        "todo": Some(&connection.todo).filter(|todo| !todo.is_empty()),
    })
}

/// In words, for `check`.
pub(super) fn words(connection: &Connection, now: SystemTime) -> String {
    let mut words = connection.state.replace('_', " ");
    if let Some(reason) = &connection.reason {
        words.push_str(&format!(" ({reason})"));
    }
    match connection.expires_in(now) {
        Some(Duration::ZERO) => words.push_str(", token expired"),
        Some(time) => words.push_str(&format!(", token expires in {}", spoken(time))),
        None => {}
    }
    if !connection.todo.is_empty() {
        words.push_str(&format!(": {}", connection.todo));
    }
    words
}

fn table(connections: &[Connection], now: SystemTime) -> String {
    let head = ["PROVIDER", "USER", "STATE", "EXPIRES", "RENEWED", "TO DO"].map(str::to_owned);
    let rows = connections.iter().map(|line| {
        let state = line.reason.as_ref().map_or(line.state.to_owned(), |reason| format!("{} ({reason})", line.state));
        let expires = match line.expires_in(now) {
            Some(Duration::ZERO) => "expired".to_owned(),
            Some(time) => format!("in {}", spoken(time)),
            None => "-".to_owned(),
        };
        let renewed = line.renewed_ago(now).map_or("-".to_owned(), |time| format!("{} ago", spoken(time)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::UserName;
    use crate::oauth::wanted::Wanted;
    use crate::oauth::{Grant, Provider};
    use crate::store::{Row, State};

    #[test]
    fn the_table_says_what_to_do() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let row = |state| Row {
            generation: 7,
            state,
            renewed_at: Some(now - Duration::from_secs(300)),
            ..Row::new("github".parse().unwrap(), Subject::User(UserName::default()), Default::default(), now)
        };
        let lost = row(State::reauthorize("lost_rotation"));
        let lines = [Connection::of(None, lost.provider.clone(), lost.subject.clone(), Ok(lost))];
        assert_eq!(
            table(&lines, now),
            "PROVIDER  USER     STATE                        EXPIRES  RENEWED    TO DO\n\
             github    default  reauthorize (lost_rotation)  -        5 min ago  grant access again, then `sidebearer \
             import github --user default ...`\n"
        );
    }

    #[test]
    fn scopes_that_were_refused_are_told_of_while_they_are_configured() {
        // C15
        let mut github = Provider::new("github".parse().unwrap(), "id", Grant::AuthorizationCode);
        let subject = Subject::User(UserName::default());
        let state = State::Reauthorize { reason: "invalid_scope".into(), wanted: Some(Wanted::of(&github)) };
        let now = SystemTime::UNIX_EPOCH;
        let row = Row { state, ..Row::new(github.name.clone(), subject.clone(), Default::default(), now) };
        let of = |github: &Provider| {
            Connection::of(Some(github), github.name.clone(), subject.clone(), Ok(row.clone())).state
        };
        assert_eq!(of(&github), "reauthorize");
        github.target.scopes = vec!["repo".into()];
        assert_eq!(of(&github), "connected");
    }
}
