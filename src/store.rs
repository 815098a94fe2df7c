//! Keeps grants and the sidecar's own secrets, sealed, where several processes use them at once.
//!
//! This handle knows names, rows and keys; the engines beneath it keep what is sealed.

pub mod archive;
#[cfg(test)]
mod contract;
mod engine;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod key;
#[doc(hidden)]
pub mod measured;
#[cfg(test)]
pub(crate) mod memory;
pub mod postgres;
mod record;
mod seal;
mod sqlite;
#[cfg(test)]
mod tests;
mod timed;
mod upkeep;

use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use rustls::ClientConfig;
use tempfile::TempPath;

use self::engine::{Changes, Count, Engine, FlowRecord, Gone, Held, Intended, Names, Owner};
use self::key::Keyring;
use self::postgres::{Postgres, ServerUrl};
use self::record::{KEY_CHECK, Sealer, flow_place, from_milliseconds, hex, own_place, to_milliseconds};
use self::sqlite::Sqlite;
use self::timed::Timed;
use crate::metrics::Metrics;
use crate::names::{ProviderName, Subject};
use crate::oauth::Target;
use crate::oauth::registration::Registration;
use crate::oauth::wanted::Wanted;
use crate::secret::Secret;

pub use engine::Change;
pub use error::StoreError;
pub use upkeep::{Fault, Kept, Rekeyed, Verified};

/// The store. A clone is the same one; work on it goes on when a caller stops waiting for it.
#[derive(Clone)]
pub struct Store {
    engine: Arc<dyn Engine>,
    sealer: Sealer,
}

/// Why a grant is no use whose provider is configured as another server or client since.
pub const PROVIDER_CHANGED: &str = "provider_changed";

/// One grant: what a provider gave for one subject. Times are kept to the millisecond.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Who gave it.
    pub provider: ProviderName,
    /// For whom.
    pub subject: Subject,
    /// Goes up with every token; the fence of [`Store::put`].
    pub generation: u64,
    /// What it was asked for.
    pub target: Target,
    /// What renews it.
    pub refresh_token: Option<Secret>,
    /// The token in use.
    pub access: Option<Access>,
    /// What was granted, if that is not what was asked for.
    pub granted_scopes: Option<Vec<String>>,
    /// Scopes that the user has consented to besides those of the target, sorted.
    pub further_scopes: Vec<String>,
    /// At which server and of which client it was obtained, where that is known.
    pub registration: Option<Registration>,
    /// Whether it can be renewed.
    pub state: State,
    /// Set while a refresh token may be on its way to the provider (SEMANTICS C12, C14).
    pub intent: Option<Intent>,
    /// When it was last renewed.
    pub renewed_at: Option<SystemTime>,
    /// When this row was written.
    pub stored_at: SystemTime,
}

impl Row {
    /// The first row of a grant that can be renewed, and of which nothing else is known yet.
    pub fn new(provider: ProviderName, subject: Subject, target: Target, stored_at: SystemTime) -> Self {
        Self {
            provider,
            subject,
            generation: 1,
            target,
            refresh_token: None,
            access: None,
            granted_scopes: None,
            further_scopes: Vec::new(),
            registration: None,
            state: State::Connected,
            intent: None,
            renewed_at: None,
            stored_at,
        }
    }

    /// Whether it is of this server and client, as far as is known.
    pub fn is_of(&self, registration: Registration) -> bool {
        self.registration.is_none_or(|its| its == registration)
    }

    /// Its state for who is this client of this server, and wants this.
    pub fn state_for(&self, registration: Registration, wanted: Wanted) -> State {
        if self.is_of(registration) { self.state.for_who_wants(wanted) } else { State::reauthorize(PROVIDER_CHANGED) }
    }

    /// Whether both are of one grant, however often it was renewed in between.
    pub fn is_of_grant(&self, other: &Row) -> bool {
        to_milliseconds(self.stored_at) == to_milliseconds(other.stored_at)
    }
}

/// An access token and its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// The token.
    pub token: Secret,
    /// When it was asked for.
    pub obtained_at: SystemTime,
    /// When it ends, if that is known.
    pub expires_at: Option<SystemTime>,
}

/// Whether a grant can be renewed, and if not, whose turn it is (SEMANTICS C15).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It can.
    Connected,
    /// The user's.
    Reauthorize {
        /// Why, in a word.
        reason: String,
        /// What was wanted, where no more than that was refused: the grant is still good for anything else.
        wanted: Option<Wanted>,
    },
    /// The operator's.
    FixConfiguration {
        /// Why, in a word.
        reason: String,
    },
}

impl State {
    /// It is the user's turn, whatever is wanted.
    pub fn reauthorize(reason: impl Into<String>) -> Self {
        State::Reauthorize { reason: reason.into(), wanted: None }
    }

    /// Why, in a word; nothing where it can be renewed.
    pub fn reason(&self) -> &str {
        match self {
            State::Connected => "",
            State::Reauthorize { reason, .. } | State::FixConfiguration { reason } => reason,
        }
    }

    /// Whether it says something of who wants this.
    pub fn is_for(&self, wanted: Wanted) -> bool {
        !matches!(self, State::Reauthorize { wanted: Some(refused), .. } if *refused != wanted)
    }

    /// What it comes to for who wants this.
    pub fn for_who_wants(&self, wanted: Wanted) -> State {
        if self.is_for(wanted) { self.clone() } else { State::Connected }
    }

    /// A stable name.
    pub fn name(&self) -> &'static str {
        match self {
            State::Connected => record::CONNECTED,
            State::Reauthorize { .. } => record::REAUTHORIZE,
            State::FixConfiguration { .. } => record::FIX_CONFIGURATION,
        }
    }
}

/// That a refresh token is about to be redeemed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// SHA-256 of the refresh token.
    pub refresh_token_hash: [u8; 32],
    /// Since when.
    pub at: SystemTime,
}

/// What became of a [`Store::put`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// The row is written, durably.
    Done,
    /// Somebody else wrote this row in between; nothing was written.
    Stale(Box<Row>),
    /// Somebody else removed the row in between; nothing was written.
    Gone,
}

/// What was in a grant that is no longer there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// What renewed it.
    pub refresh_token: Option<Secret>,
    /// The token in use.
    pub access_token: Option<Secret>,
    /// At which server and of which client they were obtained, where that is known.
    pub registration: Option<Registration>,
}

/// A consent that has begun in a browser and not ended (RFC 6749 section 4.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// SHA-256 of its `state`: what a stolen copy of the store holds finishes nothing.
    pub id: [u8; 32],
    /// Everything about it, in the words of whoever began it.
    pub content: Secret,
    /// When it ends.
    pub expires_at: SystemTime,
}

/// How many flows are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    /// In all.
    pub flows: usize,
    /// Of one user at one provider.
    pub of_one: usize,
}

/// What became of a [`Store::take_flow`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// It was there, and nobody else gets it any more.
    Flow(Flow),
    /// It was taken before: by a second click, or by somebody who has seen the address.
    Again(Flow),
    /// It was there, and has ended.
    Expired,
    /// There is none.
    No,
}

/// One entry of [`Store::grants`].
pub type Listed = (ProviderName, Subject, Result<Row, StoreError>);

/// So many grants of a provider: whose, and in which state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    /// The provider.
    pub provider: ProviderName,
    /// At which server and of which client they were obtained, where that is known.
    pub registration: Option<Registration>,
    /// Their state, if it is one that is known.
    pub state: Option<State>,
    /// How many they are.
    pub grants: u64,
}

/// The right to renew one grant, until it is dropped, its process ends, or its time has passed.
#[derive(Debug)]
pub struct Lease {
    names: Names,
    owner: Owner,
    held: Held,
}

impl Lease {
    /// Whether it was taken from one who let its time pass. That one may be alive, and about to store what it was given.
    pub fn is_inherited(&self) -> bool {
        self.held.inherited
    }
}

/// What others change in a store.
pub struct Watch(Box<dyn Changes>);

impl Watch {
    /// Waits for the next change.
    pub async fn next(&mut self) -> Change {
        self.0.next().await
    }
}

impl Store {
    /// Opens the embedded store in the directory `path`; makes one only when `create` is set and there is none at all.
    ///
    /// # Errors
    /// When there is none, it is damaged, it is sealed with other keys, or other users can get at it. A file that is
    /// there is never replaced by an empty one.
    pub async fn open(path: &Path, keys: Keyring, create: bool) -> Result<Store, StoreError> {
        let sealer = Sealer { keys, at: sqlite::file(path).display().to_string() };
        let check = sealer.seal(KEY_CHECK, &Secret::new(CHECKED))?;
        let engine = Sqlite::open(path.to_owned(), create.then_some(check)).await?;
        Store::over(Arc::new(engine), sealer.keys).await
    }

    /// Connects to the shared store; makes its tables only when `create` is set and there are none at all. Servers are
    /// verified as `tls` says.
    ///
    /// # Errors
    /// When it cannot be reached, does not let us in, has no tables, or is sealed with other keys.
    pub async fn connect(
        server: &ServerUrl,
        tls: ClientConfig,
        keys: Keyring,
        create: bool,
    ) -> Result<Store, StoreError> {
        let sealer = Sealer { keys, at: server.to_string() };
        let check = sealer.seal(KEY_CHECK, &Secret::new(CHECKED))?;
        let engine = Postgres::open(server, tls, create.then_some(check)).await?;
        Store::over(Arc::new(engine), sealer.keys).await
    }

    async fn over(engine: Arc<dyn Engine>, keys: Keyring) -> Result<Store, StoreError> {
        let sealer = Sealer { keys, at: engine.at().to_owned() };
        let check = engine.key_check().await?;
        let gone = || StoreError::Corrupt { at: sealer.at.clone(), what: "its key check is gone".into() };
        sealer.open(KEY_CHECK, &check.ok_or_else(gone)?)?;
        Ok(Store { engine, sealer })
    }

    /// The same store, its operations timed and counted here.
    pub fn measured_by(self, metrics: &Metrics) -> Store {
        let engine = Arc::new(Timed { engine: self.engine, metrics: metrics.clone() });
        Store { engine, sealer: self.sealer }
    }

    /// Whether an embedded store has been made in the directory `path`.
    pub fn exists(path: &Path) -> bool {
        sqlite::file(path).symlink_metadata().is_ok()
    }

    /// One grant.
    ///
    /// # Errors
    /// When it cannot be read, or does not open.
    pub async fn grant(&self, provider: &ProviderName, subject: &Subject) -> Result<Option<Row>, StoreError> {
        let record = self.engine.grant(&names(provider, subject)).await?;
        record.map(|record| self.sealer.row(record)).transpose()
    }

    /// All grants, in order. One that does not open is an error in its place, and hides no other.
    ///
    /// # Errors
    /// When the list itself cannot be read, or holds a name that is none.
    pub async fn grants(&self) -> Result<Vec<Listed>, StoreError> {
        let listed = self.engine.grants().await?.into_iter();
        let opened = listed
            .map(|(names, record)| (names.provider, names.subject, record.and_then(|record| self.sealer.row(record))));
        Ok(opened.collect())
    }

    /// How many grants of each provider are whose, and in which state. Nothing is opened for it.
    ///
    /// # Errors
    /// When they cannot be counted.
    pub async fn census(&self) -> Result<Vec<Counted>, StoreError> {
        let counted = |Count { provider, target, state, grants }| {
            let (provider, state) = (provider.parse().ok()?, State::try_from(state).ok());
            Some(Counted { provider, registration: record::registration(&target), state, grants })
        };
        Ok(self.engine.census().await?.into_iter().filter_map(counted).collect())
    }

    /// Writes `row`, intent and all, if the stored generation is `previous` (`None`: there is no row). It is durable
    /// when this returns.
    ///
    /// # Errors
    /// When it cannot be written. Where the engine is another machine, it may have been written all the same.
    pub async fn put(&self, row: Row, previous: Option<u64>) -> Result<Put, StoreError> {
        let record = self.sealer.record(&row)?;
        if self.engine.put(&record, previous).await? {
            return Ok(Put::Done);
        }
        let stored = self.grant(&row.provider, &row.subject).await?;
        Ok(stored.map_or(Put::Gone, |row| Put::Stale(Box::new(row))))
    }

    /// Writes `row` in place of whatever is there, with a generation that no grant of this user has had before. Gives
    /// that generation; the row's own does not count. It is durable when this returns.
    ///
    /// # Errors
    /// When it cannot be written. Where the engine is another machine, it may have been written all the same.
    pub async fn replace(&self, row: Row) -> Result<u64, StoreError> {
        self.engine.replace(&self.sealer.record(&row)?).await
    }

    /// Says that a provider takes the client, which says of no grant that it is the operator's turn any more.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn corrected(&self, provider: &ProviderName) -> Result<(), StoreError> {
        self.engine.mark_all(provider, record::FIX_CONFIGURATION, &(&State::Connected).into()).await
    }

    /// Removes a grant, whatever its state, and gives what was there. A value in it that does not open is no reason to
    /// keep it: it is left out.
    ///
    /// Its generation is remembered, so that no later grant reuses it: a renewal that is still under way would take
    /// that one for its own.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn remove(&self, provider: &ProviderName, subject: &Subject) -> Result<Option<Removed>, StoreError> {
        let names = names(provider, subject);
        let Some(Gone { target, refresh_token, access_token }) = self.engine.remove(&names).await? else {
            return Ok(None);
        };
        let open = |column, sealed: Option<Vec<u8>>| {
            sealed.and_then(|sealed| self.sealer.open(names.place(column), &sealed).ok())
        };
        let refresh_token = open(record::REFRESH_TOKEN, refresh_token);
        let access_token = open(record::ACCESS_TOKEN, access_token);
        Ok(Some(Removed { refresh_token, access_token, registration: record::registration(&target) }))
    }

    /// The generations of those of these grants that are there: what has changed since, at a glance.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn generations(
        &self,
        of: impl IntoIterator<Item = (ProviderName, Subject)>,
    ) -> Result<HashMap<(ProviderName, Subject), u64>, StoreError> {
        let of: Vec<Names> = of.into_iter().map(|(provider, subject)| Names { provider, subject }).collect();
        let found = self.engine.generations(&of).await?.into_iter();
        Ok(found.map(|(names, generation)| ((names.provider, names.subject), generation)).collect())
    }

    /// Whether it can be read now.
    ///
    /// # Errors
    /// Why it cannot.
    pub async fn is_there(&self) -> Result<(), StoreError> {
        self.engine.key_check().await.map(|_| ())
    }

    /// What others change from now on: other processes, and other [`Store::open`]s in this one.
    pub async fn watch(&self) -> Watch {
        Watch(self.engine.changes().await)
    }

    /// Keeps a user's flow at a provider until it ends. At most `most` are kept: the oldest make room, those of the same
    /// user first.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn put_flow(
        &self,
        flow: Flow,
        (provider, subject): (ProviderName, Subject),
        most: Most,
        now: SystemTime,
    ) -> Result<(), StoreError> {
        let content = self.sealer.seal(flow_place(&hex(&flow.id)), &flow.content)?;
        let names = Names { provider, subject };
        let flow = FlowRecord { id: flow.id, content, expires_at: to_milliseconds(flow.expires_at), names };
        self.engine.put_flow(&flow, most, to_milliseconds(now)).await
    }

    /// Takes a flow, once: of any number at the same moment, one gets it.
    ///
    /// # Errors
    /// When the store cannot be used.
    pub async fn take_flow(&self, id: [u8; 32], now: SystemTime) -> Result<Taken, StoreError> {
        let Some(taken) = self.engine.take_flow(id).await? else { return Ok(Taken::No) };
        if taken.expires_at <= to_milliseconds(now) {
            return Ok(Taken::Expired);
        }
        let content = self.sealer.open(flow_place(&hex(&id)), &taken.content)?;
        let flow = Flow { id, content, expires_at: from_milliseconds(taken.expires_at) };
        Ok(if taken.times == 1 { Taken::Flow(flow) } else { Taken::Again(flow) })
    }

    /// Seals a text for `purpose`, as a word that goes into a URL. Only the keys of this store open it.
    ///
    /// # Errors
    /// Where the machine has no randomness.
    pub fn stamp(&self, purpose: &str, text: &str) -> Result<String, StoreError> {
        let sealed = self.sealer.seal(own_place(purpose), &Secret::new(text))?;
        Ok(BASE64_URL_SAFE_NO_PAD.encode(sealed))
    }

    /// What [`Store::stamp`] sealed for the same purpose.
    pub fn stamped(&self, purpose: &str, word: &str) -> Option<Secret> {
        let sealed = BASE64_URL_SAFE_NO_PAD.decode(word).ok()?;
        self.sealer.open(own_place(purpose), &sealed).ok()
    }

    /// Notes durably that the refresh token of `generation` is about to be redeemed (SEMANTICS C12). It is to be sent
    /// within [`SEND_WITHIN`] of the moment in which this was called, or not at all.
    ///
    /// # Errors
    /// [`StoreError::Moved`] when the stored generation is another one, [`StoreError::LeaseLost`] when the lease is held
    /// no more; and when the intent cannot be written. In all cases the token must not be redeemed.
    pub async fn intend(&self, lease: &Lease, generation: u64, intent: Intent) -> Result<(), StoreError> {
        let Names { provider, subject } = lease.names.clone();
        match self.engine.intend(&lease.names, generation, &(&intent).into(), lease.owner).await? {
            Intended::Done => Ok(()),
            Intended::Moved => Err(StoreError::Moved { provider, subject }),
            Intended::LeaseLost => Err(StoreError::LeaseLost { provider, subject }),
        }
    }

    /// Sets the state of a grant, and clears the intent that it was written with under this lease.
    ///
    /// # Errors
    /// [`StoreError::Moved`] when the stored generation or intent is another one; and when it cannot be written.
    pub async fn mark(&self, lease: &Lease, generation: u64, intent: Intent, state: State) -> Result<(), StoreError> {
        let Names { provider, subject } = lease.names.clone();
        match self.engine.mark(&lease.names, generation, &(&intent).into(), &(&state).into()).await? {
            true => Ok(()),
            false => Err(StoreError::Moved { provider, subject }),
        }
    }

    /// The right to renew a grant, among all who use this store; `None` while another one has it (SEMANTICS C19). It saves
    /// calls; what keeps writes apart is the generation.
    ///
    /// # Errors
    /// When it cannot be asked for.
    pub async fn lease(&self, provider: &ProviderName, subject: &Subject) -> Result<Option<Lease>, StoreError> {
        let (names, mut owner) = (names(provider, subject), Owner::default());
        getrandom::fill(&mut owner)
            .map_err(|error| StoreError::Io { at: self.sealer.at.clone(), error: error.into() })?;
        let held = self.engine.lease(&names, owner).await?;
        Ok(held.map(|held| Lease { names, owner, held }))
    }

    /// Keeps a lease from ending within the next 20 s; whether it is still held.
    ///
    /// # Errors
    /// When it cannot be asked for.
    pub async fn prolong(&self, lease: &Lease) -> Result<bool, StoreError> {
        self.engine.prolong(&lease.names, lease.owner).await
    }

    /// A secret of the sidecar's own, such as its CA's key.
    ///
    /// # Errors
    /// When it cannot be read, or does not open.
    pub async fn sealed(&self, name: &str) -> Result<Option<Secret>, StoreError> {
        let sealed = self.engine.sealed(name).await?;
        sealed.map(|sealed| self.sealer.open(own_place(name), &sealed)).transpose()
    }

    /// Keeps a secret of the sidecar's own, durably, in place of `previous`; what is kept in the end, which is another's
    /// if that one was quicker.
    ///
    /// # Errors
    /// When it cannot be written, or another's does not open.
    pub async fn put_sealed(&self, name: &str, value: Secret, previous: Option<&Secret>) -> Result<Secret, StoreError> {
        let sealed = self.sealer.seal(own_place(name), &value)?;
        let there = self.engine.sealed(name).await?;
        let opened = there.as_deref().map(|there| self.sealer.open(own_place(name), there)).transpose()?;
        if opened.as_ref() == previous && self.engine.put_sealed(name, &sealed, there.as_deref()).await? {
            return Ok(value);
        }
        Ok(self.sealed(name).await?.unwrap_or(value))
    }
}

fn names(provider: &ProviderName, subject: &Subject) -> Names {
    Names { provider: provider.clone(), subject: subject.clone() }
}

fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Gives a finished and synced file its name, durably; `false` when the name is taken, by whatever it is.
fn settle(file: TempPath, path: &Path) -> io::Result<bool> {
    match file.persist_noclobber(path) {
        Ok(()) => File::open(parent(path))?.sync_all().map(|()| true),
        Err(taken) if taken.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(failed) => Err(failed.error),
    }
}

/// How soon a refresh token is to be sent after its intent was asked for. The call's own deadline fits into what is then
/// left of the lease.
pub const SEND_WITHIN: Duration = Duration::from_secs(15);
/// What the key check says.
const CHECKED: &str = "sidebearer";
