//! `sidebearer disconnect`: forgets a user's grant, and revokes it at the provider.

use super::CliError;
use crate::app::{self, Desk};
use crate::config::Settings;
use crate::names::{ProviderName, Subject, UserName};
use crate::tokens::Revocation;

/// Does both; 1 when the provider could not be told.
pub(super) async fn disconnect(settings: &Settings, name: &ProviderName, user: UserName) -> Result<u8, CliError> {
    let provider = settings.providers.iter().find(|provider| provider.name == *name);
    let Desk { tokens, drain, .. } = app::desk(settings).await?;
    let revocation = tokens.disconnect(name, &Subject::User(user.clone())).await?;
    drain.finish(settings.drain).await;
    let by_hand = provider.and_then(|provider| provider.manage_url.as_ref());
    let by_hand = by_hand.map_or("take the access back at the provider".into(), |url| format!("take it back at {url}"));
    match revocation {
        None => Err(CliError::failed(
            format!("`{user}` is not connected to `{name}`"),
            "`sidebearer status` says who is connected",
        )),
        Some(Revocation::Done) => {
            anstream::println!("disconnected `{name}` for `{user}`, and revoked at the provider");
            Ok(0)
        }
        Some(Revocation::NotOffered) => {
            anstream::println!("disconnected `{name}` for `{user}`");
            anstream::eprintln!("note: the provider offers no way to revoke it from here: {by_hand}");
            Ok(0)
        }
        Some(Revocation::Failed(why)) => Err(CliError::failed(
            format!("`{name}` is forgotten here for `{user}`, but not revoked at the provider: {why}"),
            by_hand,
        )),
    }
}
