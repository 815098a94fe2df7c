//! `sidebearer store`: looks after the store.

use std::fs;
use std::io::{self, BufWriter, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::CliError;
use crate::app;
use crate::config::Settings;
use crate::names::Subject;
use crate::store::archive::{Archive, ArchiveError};
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
    /// Write all grants to a file, sealed as they are, to import them into another store.
    Export {
        /// A new file, or `-` for standard output.
        file: Option<PathBuf>,
    },
    /// Write into this store what was exported from another one, all of it or nothing.
    Import {
        /// The file, or `-` for standard input.
        file: PathBuf,
        /// Put it in the place of other grants and secrets that are there.
        #[arg(long)]
        replace: bool,
    },
}

/// Does it; 1 when a value does not open.
pub(super) async fn store(settings: &Settings, command: &Command) -> Result<u8, CliError> {
    match command {
        Command::Verify { json } => verify(settings, *json).await,
        Command::Rekey { json } => rekey(settings, *json).await,
        Command::Export { file } => export(settings, file.as_deref()).await,
        Command::Import { file, replace } => import(settings, file, *replace).await,
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

async fn export(settings: &Settings, file: Option<&Path>) -> Result<u8, CliError> {
    if file.is_none() && io::stdout().is_terminal() {
        return Err(CliError::failed("an export is not for a terminal", "name a file, or `-` to see it all the same"));
    }
    let store = app::open_store(settings, false).await?;
    let exported = match file.filter(|file| *file != Path::new("-")) {
        Some(file) => {
            let exported = store.export_to(file).await.map_err(|error| failed(file, &error))?;
            anstream::println!("exported {}", moved(exported.grants, exported.removed, exported.secrets));
            exported
        }
        None => {
            let mut out = BufWriter::new(io::stdout());
            store.export(&mut out).await.map_err(|error| failed(Path::new("standard output"), &error))?
        }
    };
    for (provider, subject) in &exported.pending {
        let user = subject.to_string();
        anstream::eprintln!(
            "warning: the refresh token of `{}` may be on its way to `{provider}`: stop the sidecars and export again; \
             when none runs any more, the new store tries that token once",
            user.escape_debug()
        );
    }
    anstream::eprintln!("{ONE_STORE}");
    Ok(0)
}

async fn import(settings: &Settings, file: &Path, replace: bool) -> Result<u8, CliError> {
    let archive = match file == Path::new("-") {
        true => Archive::read(io::stdin().lock()),
        false => fs::File::open(file).map_err(ArchiveError::from).and_then(Archive::read),
    };
    let archive = archive.map_err(|error| failed(file, &error))?;
    // Before there is a store: one that is made with a wrong key would only be in the way.
    let keys = app::keys_at_hand(settings).await?;
    archive.check(&keys).map_err(|error| failed(file, &error))?;
    let store = app::open_with(settings, keys, true).await?;
    let imported = store.import(&archive, replace).await.map_err(|error| failed(file, &error))?;
    let new = moved(imported.grants, imported.removed, imported.secrets);
    anstream::println!("imported {new}; {} there already", imported.same);
    anstream::eprintln!("{ONE_STORE}");
    Ok(0)
}

fn failed(file: &Path, error: &ArchiveError) -> CliError {
    match error {
        ArchiveError::Unopened(_) | ArchiveError::InTheWay(_) | ArchiveError::Store(_) => {
            CliError::failed(error.to_string(), error.hint())
        }
        _ => CliError::failed(format!("{}: {error}", file.display()), error.hint()),
    }
}

fn moved(grants: usize, removed: usize, secrets: usize) -> String {
    let (grants, secrets, removed) =
        (counted(grants, "grant"), counted(secrets, "secret"), counted(removed, "generation"));
    format!("{grants}, {secrets}, {removed} of removed grants")
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
        Kept::Grant { provider, subject } => ("grant", Some(provider.as_str()), Some(subject), "row"),
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

/// A provider that sees a refresh token twice takes it for stolen, and ends the grant.
const ONE_STORE: &str = "warning: the sidecars of the old store must have stopped before those of the new one start, or both \
     redeem the same refresh tokens, and the grants are lost";
const TELL_EVERY: Duration = Duration::from_secs(1);
