//! `sidebearer store`: looks after the store.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::CliError;
use crate::app;
use crate::config::Settings;
use crate::names::Subject;
use crate::store::key::KeyId;
use crate::store::{Fault, Kept, Verified};

/// What to do with it.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Prove that every sealed value opens with the keys at hand, and count what each key has sealed.
    Verify {
        /// For scripts.
        #[arg(long)]
        json: bool,
    },
    /// Seal everything with the first key that an older one has sealed, while sidecars run.
    Rekey {
        /// For scripts.
        #[arg(long)]
        json: bool,
    },
}

/// Does it; 1 when a value does not open.
pub(super) async fn store(settings: &Settings, command: &Command) -> Result<u8, CliError> {
    match command {
        Command::Verify { json } => verify(settings, *json).await,
        Command::Rekey { json } => rekey(settings, *json).await,
    }
}

async fn verify(settings: &Settings, as_json: bool) -> Result<u8, CliError> {
    let verified = app::open_store(settings, false).await?.verify().await?;
    if as_json {
        anstream::println!("{:#}", verified_to_json(&verified));
    } else {
        tell(&verified.faults);
        anstream::print!("{}", counts(&verified));
    }
    Ok(u8::from(!verified.faults.is_empty()))
}

/// A line for each key, and one for all.
fn counts(verified: &Verified) -> String {
    let mut text = String::new();
    for (index, (key, values)) in verified.keys.iter().enumerate() {
        let role = match index {
            0 => "seals",
            _ if index >= verified.at_hand => "is not at hand",
            _ if *values == 0 => "opens, and is needed no more",
            _ => "opens",
        };
        text.push_str(&format!("key {key}: {}, {role}\n", counted(*values, "value")));
    }
    let bad = verified.faults.len();
    text + &format!(
        "{}, {} open, {bad} do not\n",
        counted(verified.values, "value"),
        verified.values.saturating_sub(bad)
    )
}

fn verified_to_json(verified: &Verified) -> Value {
    let key = |(index, (key, values)): (usize, &(KeyId, usize))| {
        let (seals, at_hand) = (index == 0, index < verified.at_hand);
        json!({ "key": key.to_string(), "values": values, "seals": seals, "at_hand": at_hand })
    };
    json!({
        "values": verified.values,
        "keys": verified.keys.iter().enumerate().map(key).collect::<Value>(),
        "faults": verified.faults.iter().map(fault_to_json).collect::<Value>(),
    })
}

async fn rekey(settings: &Settings, as_json: bool) -> Result<u8, CliError> {
    let store = app::open_store(settings, false).await?;
    let mut told = Instant::now();
    let rekeyed = store
        .rekey(|done, all| {
            if told.elapsed() >= TELL_EVERY {
                anstream::eprintln!("{done} of {all} values are sealed anew");
                told = Instant::now();
            }
        })
        .await?;
    let left = rekeyed.behind + rekeyed.faults.len();
    if as_json {
        let faults = rekeyed.faults.iter().map(fault_to_json).collect::<Value>();
        anstream::println!("{:#}", json!({ "resealed": rekeyed.resealed, "behind": rekeyed.behind, "left": faults }));
        return Ok(u8::from(left > 0));
    }
    tell(&rekeyed.faults);
    if rekeyed.behind > 0 {
        anstream::eprintln!(
            "error: a sidecar goes on sealing with an older key\n\
             hint: put the new key first in its `store.keys`, restart it, and run this again"
        );
    }
    anstream::println!("{} sealed anew, {left} left", counted(rekeyed.resealed, "value"));
    Ok(u8::from(left > 0))
}

fn tell(faults: &[Fault]) {
    for fault in faults {
        anstream::eprintln!("error: {fault}\nhint: {}", fault.hint());
    }
}

fn fault_to_json(fault: &Fault) -> Value {
    let (kind, provider, user, value) = match &fault.what {
        Kept::OfGrant { provider, subject, column } => {
            ("grant", Some(provider.as_str()), Some(subject), column.as_str())
        }
        Kept::Own(name) => ("secret", None, None, name.as_str()),
        Kept::Consent => ("consent", None, None, "content"),
        Kept::KeyCheck => ("key_check", None, None, "key_check"),
    };
    let user = user.and_then(|subject| match subject {
        Subject::User(name) => Some(name.as_str()),
        Subject::Client => None,
    });
    json!({
        "kind": kind,
        "provider": provider,
        "user": user,
        "value": value,
        "code": fault.code(),
        "key": fault.sealed_with.map(|key| key.to_string()),
        "hint": fault.hint(),
    })
}

fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

const TELL_EVERY: Duration = Duration::from_secs(1);
