//! A grant on its way to an engine and back: its secrets are sealed for their place, the rest is written down plainly.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::engine::{IntentRecord, Names, Record, Result, StateRecord};
use super::key::Keyring;
use super::seal::{self, Place, Unopened};
use super::{Access, Intent, Row, State, StoreError};
use crate::names::Subject;
use crate::oauth::Target;
use crate::oauth::registration::Registration;
use crate::secret::Secret;

/// The keys, and the store whose values they seal.
#[derive(Clone)]
pub(super) struct Sealer {
    pub keys: Keyring,
    /// As people are told.
    pub at: String,
}

impl Sealer {
    pub fn seal(&self, place: Place<'_>, secret: &Secret) -> Result<Vec<u8>> {
        let sealed = seal::seal(&self.keys, place, secret);
        sealed.map_err(|error| StoreError::Io { at: self.at.clone(), error: error.into() })
    }

    pub fn open(&self, place: Place<'_>, sealed: &[u8]) -> Result<Secret> {
        seal::open(&self.keys, place, sealed).map_err(|unopened| match unopened {
            Unopened::UnknownKey(sealed_with) => {
                StoreError::WrongKey { at: self.at.clone(), sealed_with, keys: self.keys.ids() }
            }
            Unopened::Damaged => StoreError::corrupt_value(&self.at, place),
        })
    }

    pub fn record(&self, row: &Row) -> Result<Record> {
        let names = Names { provider: row.provider.clone(), subject: row.subject.clone() };
        let seal =
            |column, secret: Option<&Secret>| secret.map(|secret| self.seal(names.place(column), secret)).transpose();
        let access = row.access.as_ref();
        Ok(Record {
            generation: row.generation,
            target: to_json(&StoredTarget::of(row)),
            refresh_token: seal(REFRESH_TOKEN, row.refresh_token.as_ref())?,
            access_token: seal(ACCESS_TOKEN, access.map(|access| &access.token))?,
            obtained_at: access.map(|access| to_milliseconds(access.obtained_at)),
            expires_at: access.and_then(|access| access.expires_at).map(to_milliseconds),
            granted_scopes: row.granted_scopes.as_ref().map(to_json),
            further_scopes: Some(&row.further_scopes).filter(|scopes| !scopes.is_empty()).map(to_json),
            state: (&row.state).into(),
            intent: row.intent.as_ref().map(IntentRecord::from),
            renewed_at: row.renewed_at.map(to_milliseconds),
            stored_at: to_milliseconds(row.stored_at),
            names,
        })
    }

    pub fn row(&self, record: Record) -> Result<Row> {
        let names = &record.names;
        let open = |column, sealed: &Option<Vec<u8>>| {
            sealed.as_ref().map(|sealed| self.open(names.place(column), sealed)).transpose()
        };
        let corrupt = |column| StoreError::corrupt_value(&self.at, names.place(column));
        let refresh_token = open(REFRESH_TOKEN, &record.refresh_token)?;
        let access = match open(ACCESS_TOKEN, &record.access_token)? {
            None => None,
            Some(token) => {
                let obtained_at = from_milliseconds(record.obtained_at.ok_or_else(|| corrupt("obtained_at"))?);
                Some(Access { token, obtained_at, expires_at: record.expires_at.map(from_milliseconds) })
            }
        };
        let target: StoredTarget = serde_json::from_str(&record.target).map_err(|_| corrupt("target"))?;
        let registration = target.registration.as_deref().map(str::parse).transpose();
        let scopes = |column, text: &Option<String>| {
            let list = text.as_ref().map(|text| serde_json::from_str::<Vec<String>>(text));
            list.transpose().map_err(|_| corrupt(column))
        };
        Ok(Row {
            generation: record.generation,
            registration: registration.map_err(|_| corrupt("target"))?,
            target: target.into(),
            refresh_token,
            access,
            granted_scopes: scopes("granted_scopes", &record.granted_scopes)?,
            further_scopes: scopes("further_scopes", &record.further_scopes)?.unwrap_or_default(),
            state: State::try_from(record.state).map_err(|()| corrupt("state"))?,
            intent: record.intent.map(Intent::from),
            renewed_at: record.renewed_at.map(from_milliseconds),
            stored_at: from_milliseconds(record.stored_at),
            provider: names.provider.clone(),
            subject: names.subject.clone(),
        })
    }
}

impl Names {
    /// The names of a row; none when they are no names.
    pub fn parse(provider: &str, subject: &str) -> Option<Self> {
        Some(Self { provider: provider.parse().ok()?, subject: Subject::from_row(subject).ok()? })
    }

    /// Where a value of this grant belongs.
    pub fn place<'a>(&'a self, column: &'a str) -> Place<'a> {
        Place { provider: self.provider.as_str(), subject: self.subject.as_str(), column }
    }
}

impl StoreError {
    pub(super) fn corrupt_value(at: &str, place: Place<'_>) -> Self {
        let (provider, subject, column) = (place.provider.into(), place.subject.into(), place.column.into());
        StoreError::CorruptValue { at: at.into(), provider, subject, column }
    }
}

impl From<&State> for StateRecord {
    fn from(state: &State) -> Self {
        let reason = match state {
            State::Connected => None,
            State::Reauthorize { reason, wanted: Some(wanted) } => Some(format!("{reason} {wanted}")),
            State::Reauthorize { reason, wanted: None } | State::FixConfiguration { reason } => Some(reason.clone()),
        };
        Self { state: state.name().into(), reason }
    }
}

impl TryFrom<StateRecord> for State {
    type Error = ();

    fn try_from(stored: StateRecord) -> std::result::Result<Self, ()> {
        let reason = stored.reason.unwrap_or_default();
        match &*stored.state {
            CONNECTED => Ok(State::Connected),
            REAUTHORIZE => Ok(reauthorize(reason)),
            FIX_CONFIGURATION => Ok(State::FixConfiguration { reason }),
            _ => Err(()),
        }
    }
}

/// A reason by itself, as every one was written before, or with what was wanted.
fn reauthorize(reason: String) -> State {
    let split = reason.split_once(' ').and_then(|(reason, wanted)| Some((reason, wanted.parse().ok()?)));
    match split {
        Some((reason, wanted)) => State::Reauthorize { reason: reason.into(), wanted: Some(wanted) },
        None => State::reauthorize(reason),
    }
}

impl From<&Intent> for IntentRecord {
    fn from(intent: &Intent) -> Self {
        Self { hash: intent.refresh_token_hash, at: to_milliseconds(intent.at) }
    }
}

impl From<IntentRecord> for Intent {
    fn from(stored: IntentRecord) -> Self {
        Self { refresh_token_hash: stored.hash, at: from_milliseconds(stored.at) }
    }
}

/// [`Target`] as it is written down, whatever becomes of the type; with it, whose grant it is.
#[derive(Serialize, Deserialize)]
struct StoredTarget {
    scopes: Vec<String>,
    audience: Option<String>,
    resource: Vec<String>,
    /// None in rows that are older than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    registration: Option<String>,
}

/// Whose grant it is, of a target as it is written down.
pub(super) fn registration(target: &str) -> Option<Registration> {
    serde_json::from_str::<StoredTarget>(target).ok()?.registration?.parse().ok()
}

impl StoredTarget {
    fn of(row: &Row) -> Self {
        let Target { scopes, audience, resource } = row.target.clone();
        Self { scopes, audience, resource, registration: row.registration.map(|its| its.to_string()) }
    }
}

impl From<StoredTarget> for Target {
    fn from(stored: StoredTarget) -> Self {
        Self { scopes: stored.scopes, audience: stored.audience, resource: stored.resource }
    }
}

fn to_json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("strings and lists of them are JSON")
}

pub(super) fn to_milliseconds(time: SystemTime) -> i64 {
    let whole = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    time.duration_since(UNIX_EPOCH).map_or_else(|before| -whole(before.duration()), whole)
}

/// The reverse; a time that no clock can show is the start of 1970.
pub(super) fn from_milliseconds(milliseconds: i64) -> SystemTime {
    let distance = Duration::from_millis(milliseconds.unsigned_abs());
    let time = if milliseconds < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    time.unwrap_or(UNIX_EPOCH)
}

/// Where a secret of the sidecar's own belongs.
pub(super) fn own_place(name: &str) -> Place<'_> {
    Place { provider: "", subject: "", column: name }
}

/// Where a flow's content belongs: to its own state and no other.
pub(super) fn flow_place(id: &str) -> Place<'_> {
    Place { provider: "", subject: id, column: "flow" }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Sealed at the start, so that a wrong key is told before there are rows.
pub(super) const KEY_CHECK: Place<'_> = Place { provider: "", subject: "", column: "key_check" };
pub(super) const REFRESH_TOKEN: &str = "refresh_token";
pub(super) const ACCESS_TOKEN: &str = "access_token";

pub(super) const CONNECTED: &str = "connected";
pub(super) const REAUTHORIZE: &str = "reauthorize";
pub(super) const FIX_CONFIGURATION: &str = "fix_configuration";

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;

    use super::*;

    #[test]
    fn no_time_is_out_of_range() {
        for milliseconds in [i64::MIN, -1, 0, 1, i64::MAX] {
            let time = from_milliseconds(milliseconds);
            assert!(time == UNIX_EPOCH || to_milliseconds(time) == milliseconds.max(-i64::MAX), "{milliseconds}");
        }
    }

    #[test]
    fn what_was_refused_is_written_with_the_reason_and_a_reason_without_it_is_read() {
        let wanted = "0123456789abcdef".parse().ok();
        let refused = State::Reauthorize { reason: "invalid_scope".into(), wanted };
        for (state, reason) in [
            (refused, "invalid_scope 0123456789abcdef"),
            (State::reauthorize("invalid_scope"), "invalid_scope"),
            (State::reauthorize("error 400"), "error 400"),
        ] {
            let stored = StateRecord::from(&state);
            assert_eq!((&*stored.state, stored.reason.as_deref()), ("reauthorize", Some(reason)));
            assert_eq!(State::try_from(stored), Ok(state));
        }
    }

    #[test]
    fn a_value_that_is_none_is_told_by_its_column() {
        // TOK-025
        let keys = Keyring::from_secrets(&[Secret::new(BASE64_STANDARD.encode([1; 32]))]).unwrap();
        let sealer = Sealer { keys, at: "here".into() };
        let access = Access { token: Secret::new("at"), obtained_at: UNIX_EPOCH, expires_at: None };
        let row = Row {
            refresh_token: Some(Secret::new("rt")),
            access: Some(access),
            ..Row::new("github".parse().unwrap(), Subject::Client, Target::default(), UNIX_EPOCH)
        };
        let whole = sealer.record(&row).unwrap();
        assert_eq!(sealer.row(whole.clone()).unwrap(), row);
        type Damage = fn(&mut Record);
        let damages: [(&str, Damage); 6] = [
            ("target", |record| record.target = "{".into()),
            ("state", |record| record.state.state = "canary".into()),
            ("refresh_token", |record| record.refresh_token = Some(vec![1])),
            ("access_token", |record| record.access_token = record.refresh_token.clone()),
            ("granted_scopes", |record| record.granted_scopes = Some("{}".into())),
            ("obtained_at", |record| record.obtained_at = None),
        ];
        for (column, damage) in damages {
            let mut damaged = whole.clone();
            damage(&mut damaged);
            match sealer.row(damaged) {
                Err(StoreError::CorruptValue { column: told, .. }) => assert_eq!(told, column),
                other => panic!("{column}: {other:?}"),
            }
        }
    }
}
