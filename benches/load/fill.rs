//! Puts users with tokens into a store, as if each had connected: the product has no reason to do that in bulk.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use sidebearer::names::Subject;
use sidebearer::secret::Secret;
use sidebearer::store::{Access, Row};
use sidebearer::{app, config};

use crate::upstream::AUTHORIZATION;

/// Longer than a measurement: nothing is renewed while it runs.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

#[derive(clap::Args)]
pub struct Options {
    /// Whose store it is; its first provider is whose tokens they are
    #[arg(long)]
    config: PathBuf,
    /// How many: `u0` and so on
    #[arg(long)]
    users: u64,
}

pub async fn run(options: Options) -> io::Result<()> {
    let settings = config::load(&options.config).map_err(io::Error::other)?;
    let provider = settings.providers.first().ok_or_else(|| io::Error::other("no provider"))?;
    let store = app::open_store(&settings, true).await.map_err(io::Error::other)?;
    let now = SystemTime::now();
    let token = AUTHORIZATION.trim_start_matches("Bearer ");
    for number in 0..options.users {
        let user = format!("u{number}").parse().map_err(|_| io::Error::other("not a user's name"))?;
        let row = Row::new(provider.name.clone(), Subject::User(user), provider.target.clone(), now);
        let access = Access { token: Secret::new(token), obtained_at: now, expires_at: Some(now + LIFETIME) };
        let row = Row { refresh_token: Some(Secret::new(format!("refresh-{number}"))), access: Some(access), ..row };
        store.replace(row).await.map_err(io::Error::other)?;
    }
    println!("{{\"users\":{}}}", options.users);
    Ok(())
}
