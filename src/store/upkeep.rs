//! Looks after the keys: proves that every sealed value opens, and seals anew what an older key has sealed.

use std::fmt;

use super::engine::{Names, Resealed, Slot, Snapshot};
use super::key::KeyId;
use super::record::{ACCESS_TOKEN, KEY_CHECK, REFRESH_TOKEN, Sealer, flow_place, hex, own_place};
use super::seal::{self, Place};
use super::{Store, StoreError};
use crate::names::{ProviderName, Subject};
use crate::secret::Secret;

type Result<T> = std::result::Result<T, StoreError>;

/// What a store's values are sealed with, and whether they open.
#[derive(Debug)]
pub struct Verified {
    /// How many values each key has sealed: first the keys at hand, in their order, then any other.
    pub keys: Vec<(KeyId, usize)>,
    /// How many of `keys` are at hand.
    pub at_hand: usize,
    /// How many values there are.
    pub values: usize,
    /// What does not open, or cannot be read.
    pub faults: Vec<Fault>,
}

/// What became of a [`Store::rekey`].
#[derive(Debug)]
pub struct Rekeyed {
    /// How many values are sealed anew.
    pub resealed: usize,
    /// How many are sealed with an older key, again and again: somebody still seals with it.
    pub behind: usize,
    /// What does not open, and therefore stays as it is.
    pub faults: Vec<Fault>,
}

/// A value that does not open, or a row that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What it is.
    pub what: Kept,
    /// The key that it is sealed with, if that is not at hand; otherwise it is damaged.
    pub sealed_with: Option<KeyId>,
}

/// Something that is kept in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// A grant.
    Grant {
        /// Who gave it.
        provider: ProviderName,
        /// For whom.
        subject: Subject,
    },
    /// A column of a grant.
    OfGrant {
        /// Who gave it.
        provider: ProviderName,
        /// For whom.
        subject: Subject,
        /// Which column.
        column: String,
    },
    /// A secret of the sidecar's own, by its name.
    Own(String),
    /// A consent that is under way.
    Consent,
    /// What tells a wrong key before there are rows.
    KeyCheck,
}

impl Store {
    /// Tries every sealed value with the keys at hand.
    ///
    /// # Errors
    /// When the store itself cannot be read.
    pub async fn verify(&self) -> Result<Verified> {
        let snapshot = self.engine.snapshot().await?;
        let mut keys: Vec<(KeyId, usize)> = self.sealer.keys.ids().into_iter().map(|id| (id, 0)).collect();
        let at_hand = keys.len();
        let values = snapshot.values();
        for id in values.iter().filter_map(|(_, sealed)| seal::key_id(sealed)) {
            match keys.iter_mut().find(|(known, _)| *known == id) {
                Some((_, count)) => *count += 1,
                None => keys.push((id, 1)),
            }
        }
        let count = values.len();
        Ok(Verified { keys, at_hand, values: count, faults: self.sealer.faults(&snapshot, &values) })
    }

    /// Seals with the first key whatever another one has sealed, in small steps, while others use the store. Nothing that
    /// they write is lost, and they notice nothing. Killed at any moment, it can be run again. `progress` is told how many
    /// values are done, and of how many.
    ///
    /// # Errors
    /// When the store cannot be read or written.
    pub async fn rekey(&self, mut progress: impl FnMut(usize, usize)) -> Result<Rekeyed> {
        let first = self.sealer.keys.first().id;
        let mut resealed = 0;
        for pass in 0.. {
            let snapshot = self.engine.snapshot().await?;
            let values = snapshot.values();
            let faults = self.sealer.faults(&snapshot, &values);
            let opens = |(slot, sealed): &(Slot, &[u8])| self.sealer.opened(slot, sealed).is_ok();
            let behind = values.into_iter().filter(|(_, sealed)| seal::key_id(sealed) != Some(first)).filter(opens);
            let behind: Vec<(Slot, &[u8])> = behind.collect();
            // What was written meanwhile by one whose first key is the new one is not there any more. Another one would
            // keep this up for ever.
            if behind.is_empty() || pass == PASSES {
                return Ok(Rekeyed { resealed, behind: behind.len(), faults });
            }
            let all = resealed + behind.len();
            for batch in behind.chunks(BATCH) {
                let anew = batch.iter().map(|(slot, sealed)| self.sealer.anew(slot, sealed));
                resealed += self.engine.reseal(&anew.collect::<Result<Vec<_>>>()?).await?;
                progress(resealed, all);
            }
        }
        unreachable!("the passes end")
    }
}

impl Snapshot {
    /// Every sealed value; the key check last, so that whoever lacks the newest key is let in until all else has it.
    pub fn values(&self) -> Vec<(Slot, &[u8])> {
        let mut values = Vec::new();
        let grants = self.grants.iter().filter_map(|(names, record)| Some((names, record.as_ref().ok()?)));
        for (names, record) in grants {
            let slots = [Slot::RefreshToken(names.clone()), Slot::AccessToken(names.clone())];
            let sealed = [&record.refresh_token, &record.access_token];
            values.extend(slots.into_iter().zip(sealed).filter_map(|(slot, sealed)| Some((slot, sealed.as_deref()?))));
        }
        values.extend(self.flows.iter().map(|(id, content)| (Slot::Flow(id.clone()), &content[..])));
        values.extend(self.own.iter().map(|(name, value)| (Slot::Own(name.clone()), &value[..])));
        values.extend(self.key_check.iter().map(|check| (Slot::KeyCheck, &check[..])));
        values
    }
}

impl Sealer {
    /// What is wrong with a store, each with its place.
    pub(super) fn faults(&self, snapshot: &Snapshot, values: &[(Slot, &[u8])]) -> Vec<Fault> {
        let mut faults: Vec<Fault> = values.iter().filter_map(|(slot, sealed)| self.fault(slot, sealed)).collect();
        for (names, record) in &snapshot.grants {
            let opened = record.as_ref().map(|record| self.row(record.clone()).err());
            // What is not sealed may be damaged too.
            let column = match opened {
                Err(StoreError::CorruptValue { column, .. }) => column.clone(),
                Ok(Some(StoreError::CorruptValue { column, .. })) => column,
                Err(_) => "row".to_owned(),
                Ok(_) => continue,
            };
            let fault = Fault { what: Kept::of_grant(names, &column), sealed_with: None };
            if !faults.contains(&fault) {
                faults.push(fault);
            }
        }
        faults
    }

    pub(super) fn fault(&self, slot: &Slot, sealed: &[u8]) -> Option<Fault> {
        let sealed_with = match self.opened(slot, sealed).err()? {
            StoreError::WrongKey { sealed_with, .. } => Some(sealed_with),
            _ => None,
        };
        Some(Fault { what: slot.kept(), sealed_with })
    }

    pub(super) fn opened(&self, slot: &Slot, sealed: &[u8]) -> Result<Secret> {
        slot.with_place(|place| self.open(place, sealed))
    }

    pub(super) fn anew(&self, slot: &Slot, sealed: &[u8]) -> Result<Resealed> {
        let secret = self.opened(slot, sealed)?;
        let to = slot.with_place(|place| self.seal(place, &secret))?;
        Ok(Resealed { slot: slot.clone(), from: sealed.to_owned(), to })
    }
}

impl Slot {
    fn kept(&self) -> Kept {
        match self {
            Slot::KeyCheck => Kept::KeyCheck,
            Slot::Own(name) => Kept::Own(name.clone()),
            Slot::RefreshToken(names) => Kept::of_grant(names, REFRESH_TOKEN),
            Slot::AccessToken(names) => Kept::of_grant(names, ACCESS_TOKEN),
            Slot::Flow(_) => Kept::Consent,
        }
    }

    fn with_place<T>(&self, with: impl FnOnce(Place<'_>) -> T) -> T {
        match self {
            Slot::KeyCheck => with(KEY_CHECK),
            Slot::Own(name) => with(own_place(name)),
            Slot::RefreshToken(names) => with(names.place(REFRESH_TOKEN)),
            Slot::AccessToken(names) => with(names.place(ACCESS_TOKEN)),
            Slot::Flow(id) => with(flow_place(&hex(id))),
        }
    }
}

impl Kept {
    pub(super) fn grant(names: &Names) -> Self {
        Kept::Grant { provider: names.provider.clone(), subject: names.subject.clone() }
    }

    pub(super) fn of_grant(names: &Names, column: &str) -> Self {
        Kept::OfGrant { provider: names.provider.clone(), subject: names.subject.clone(), column: column.into() }
    }
}

impl Fault {
    /// A stable name for machines, that of the [`StoreError`] that a sidecar would meet.
    pub fn code(&self) -> &'static str {
        if self.sealed_with.is_some() { "store_wrong_key" } else { "store_value_corrupt" }
    }

    /// What to do next.
    pub fn hint(&self) -> String {
        match &self.what {
            _ if self.sealed_with.is_some() => "put that key back into `store.keys`, behind the first".into(),
            Kept::Grant { .. } | Kept::OfGrant { .. } => "connect this user again".into(),
            Kept::Consent => "nothing: it ends by itself, and the user begins anew".into(),
            Kept::Own(_) | Kept::KeyCheck => "put the store back from a backup".into(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.sealed_with {
            Some(key) => write!(f, "{} is sealed with key `{key}`, which is not at hand", self.what),
            None => write!(f, "{} is damaged", self.what),
        }
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kept::OfGrant { provider, subject, column } => {
                write!(f, "`{column}` of {} at `{provider}`", spoken(subject))
            }
            Kept::Grant { provider, subject } => write!(f, "the grant of {} at `{provider}`", spoken(subject)),
            Kept::Own(name) => write!(f, "the secret `{}`", name.escape_debug()),
            Kept::Consent => f.write_str("a consent that is under way"),
            Kept::KeyCheck => f.write_str("the key check"),
        }
    }
}

/// A name is somebody else's text: nothing in it may steer a terminal.
fn spoken(subject: &Subject) -> String {
    match subject {
        Subject::Client => "the client itself".into(),
        Subject::User(name) => format!("user `{}`", name.as_str().escape_debug()),
    }
}

/// Others that write wait for one such step at most.
const BATCH: usize = 100;
/// How often it is looked for what somebody has sealed with an older key in the meantime.
const PASSES: usize = 5;
