//! `sidebearer import`: stores a refresh token that was obtained elsewhere.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::time::SystemTime;

use super::CliError;
use crate::app;
use crate::config::Settings;
use crate::names::{ProviderName, Subject, UserName};
use crate::oauth::registration::Registration;
use crate::oauth::{Grant, Provider};
use crate::secret::Secret;
use crate::store::Row;

/// A refresh token longer than this is none.
const MOST: u64 = 64 << 10;

/// Reads the token and stores it as the user's grant, in place of an earlier one.
pub(super) async fn import(
    settings: &Settings,
    name: &ProviderName,
    user: UserName,
    from: &Path,
) -> Result<u8, CliError> {
    let provider = find(settings, name)?;
    let refresh_token = read(from)?;
    let store = app::open_store(settings, true).await?;
    let subject = Subject::User(user);
    let row = Row::new(name.clone(), subject.clone(), provider.target.clone(), SystemTime::now());
    // A sidecar may renew the old grant at this moment; then this one comes after it.
    let registration = Some(Registration::of(provider));
    store.replace(Row { refresh_token: Some(refresh_token), registration, ..row }).await?;
    anstream::println!("stored the refresh token of `{subject}` for `{name}`; the next call uses it");
    Ok(0)
}

fn find<'a>(settings: &'a Settings, name: &ProviderName) -> Result<&'a Provider, CliError> {
    let provider = super::provider(settings, name)?;
    match provider.grant {
        Grant::RefreshToken | Grant::AuthorizationCode => Ok(provider),
        Grant::ClientCredentials => Err(CliError::failed(
            format!("`{name}` uses client credentials, which need no refresh token"),
            format!("write `refresh_token: {{}}` under `providers.{name}` if it is to act for users"),
        )),
    }
}

fn read(from: &Path) -> Result<Secret, CliError> {
    let mut text = String::new();
    let read = if from == Path::new("-") {
        io::stdin().lock().take(MOST).read_to_string(&mut text)
    } else {
        fs::File::open(from).and_then(|file| file.take(MOST).read_to_string(&mut text))
    };
    let place = from.display();
    read.map_err(|error| {
        CliError::failed(format!("cannot read {place}: {error}"), "name a file that holds the token")
    })?;
    let token = text.trim();
    // RFC 6749 appendix A.17.
    if token.is_empty() || !token.bytes().all(|byte| (0x20..=0x7e).contains(&byte)) {
        return Err(CliError::failed(
            format!("{place} does not hold a refresh token"),
            "it must hold the token alone: one line of printable ASCII",
        ));
    }
    Ok(Secret::new(token))
}
