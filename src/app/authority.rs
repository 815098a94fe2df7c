//! The local CA as the store keeps it: that of the last run, with one more authority where hosts are new.

use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::{AppError, open_store};
use crate::ca::{Ca, CaError, Outdated};
use crate::config::Settings;
use crate::routes::{HostPattern, Routes};
use crate::store::Store;

/// The name of the local CA in the store.
const KEPT: &str = "ca";

/// The kept CA, which then speaks for all of these hosts; where one is `running`, agents that trust it go on to. Of several
/// who add to it at the same moment, for the same hosts, all get the same.
pub(super) async fn kept(
    store: &Store,
    settings: &Settings,
    hosts: &[HostPattern],
    now: SystemTime,
    running: Option<&Ca>,
) -> Result<Ca, AppError> {
    let name = name(settings);
    let mut kept = store.sealed(&name).await?;
    loop {
        let before = match &kept {
            Some(kept) => Some(Ca::restore(kept, now)?),
            None => running.cloned().map(Ok),
        };
        if let (Some(_), Some(Ok(ca))) = (&kept, &before)
            && ca.lacks(hosts).is_empty()
        {
            return Ok(running.map_or_else(|| ca.clone(), |running| running.with(ca)));
        }
        let made = made(before, hosts, now)?;
        kept = Some(store.put_sealed(&name, made.export(), kept.as_ref()).await?);
    }
}

/// The CA from before with what it lacks, or a new one.
fn made(before: Option<Result<Ca, Outdated>>, hosts: &[HostPattern], now: SystemTime) -> Result<Ca, CaError> {
    let Some(before) = before else { return Ca::generate(hosts, now) };
    let new = before.as_ref().map(|ca| ca.lacks(hosts).join(", ")).unwrap_or_default();
    if new.is_empty()
        && let Ok(ca) = before
    {
        return Ok(ca);
    }
    let extended = match before {
        Ok(ca) => ca.extended(hosts, now)?,
        Err(why) => Err(why),
    };
    match extended {
        Ok(ca) => {
            tracing::warn!(
                hosts = new,
                "new hosts have a root of their own in `ca.pem`; running agents need it for them"
            );
            Ok(ca)
        }
        Err(why) => {
            tracing::warn!(%why, "the local CA is made anew; running agents need the new `ca.pem`");
            Ca::generate(hosts, now)
        }
    }
}

/// Under which name the CA is kept. Of sidecars that share a store, those with the same hosts share a CA: one with others
/// would add to it at each start.
pub(super) fn name(settings: &Settings) -> String {
    if settings.store_url.is_none() {
        return KEPT.to_owned();
    }
    let routes = Routes::new(settings.routes.iter().cloned());
    let mut hosts: Vec<String> = routes.hosts().iter().map(ToString::to_string).collect();
    hosts.sort();
    let hosts = Sha256::digest(hosts.join("\n"));
    format!("{KEPT} {}", hosts.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// The CA of the last run, without making one.
///
/// # Errors
/// When the store cannot be read, or holds none.
pub async fn last(settings: &Settings) -> Result<Ca, AppError> {
    let store = open_store(settings, false).await?;
    let kept = store.sealed(&name(settings)).await?.ok_or(AppError::NoCa)?;
    Ca::restore(&kept, SystemTime::UNIX_EPOCH)?.map_err(|_| AppError::NoCa)
}
