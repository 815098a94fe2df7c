//! `sidebearer store`: looks after the store.

use super::CliError;
use crate::app;
use crate::config::Settings;

/// What to do with it.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Prove that every row opens with the configured keys.
    Verify,
}

/// Does it; 1 when a row does not open.
pub(super) async fn store(settings: &Settings, command: &Command) -> Result<u8, CliError> {
    match command {
        Command::Verify => verify(settings).await,
    }
}

async fn verify(settings: &Settings) -> Result<u8, CliError> {
    let store = app::open_store(settings, false).await?;
    let rows = store.grants().await?;
    let mut bad = 0;
    for (provider, subject, row) in &rows {
        if let Err(error) = row {
            bad += 1;
            anstream::eprintln!("error: {provider} {subject}: {error}\nhint: {}", error.hint());
        }
    }
    anstream::println!("{} rows, {} open, {bad} do not", rows.len(), rows.len() - bad);
    Ok(if bad == 0 { 0 } else { 1 })
}
