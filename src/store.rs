//! Keeps grants and the sidecar's own secrets, sealed, in a file that several processes use at once.

#[cfg(fuzzing)]
pub mod fuzzing;
pub mod key;
mod seal;
mod sqlite;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use tempfile::TempPath;
use tokio::time::Instant;

use self::key::{KeyId, Keyring};
use self::seal::Place;
use self::sqlite::Database;
use crate::names::{ProviderName, Subject};
use crate::oauth::Target;
use crate::secret::Secret;

/// The store. A clone is the same one; work on it goes on when a caller stops waiting for it.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    database: Mutex<Database>,
    keys: Keyring,
    leases: PathBuf,
}

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
            state: State::Connected,
            intent: None,
            renewed_at: None,
            stored_at,
        }
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
    },
    /// The operator's.
    FixConfiguration {
        /// Why, in a word.
        reason: String,
    },
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

/// The right to renew one grant, until it is dropped or its process ends.
#[derive(Debug)]
pub struct Lease {
    // Closing the file unlocks it, and the kernel closes what a dead process leaves.
    _file: File,
}

impl Store {
    /// Opens the store in the directory `path`; makes one only when `create` is set and there is none at all.
    ///
    /// # Errors
    /// When there is none, it is damaged, it is sealed with other keys, or other users can get at it. A file that is
    /// there is never replaced by an empty one.
    pub async fn open(path: &Path, keys: Keyring, create: bool) -> Result<Store, StoreError> {
        let path = path.to_owned();
        blocking(move || {
            let database = Database::open(&path, keys.clone(), create)?;
            let leases = database.directory().join("leases");
            make_directory(&leases).map_err(|error| StoreError::io(&leases, error))?;
            Ok(Store { inner: Arc::new(Inner { database: Mutex::new(database), keys, leases }) })
        })
        .await
    }

    /// Whether a store has been made in the directory `path`.
    pub fn exists(path: &Path) -> bool {
        sqlite::file(path).symlink_metadata().is_ok()
    }

    /// One grant.
    ///
    /// # Errors
    /// When it cannot be read, or does not open.
    pub async fn grant(&self, provider: &ProviderName, subject: &Subject) -> Result<Option<Row>, StoreError> {
        let (provider, subject) = (provider.clone(), subject.clone());
        self.run(move |database| database.grant(&provider, &subject)).await
    }

    /// All grants, in order. One that does not open is an error in its place, and hides no other.
    ///
    /// # Errors
    /// When the list itself cannot be read, or holds a name that is none.
    pub async fn grants(&self) -> Result<Vec<Listed>, StoreError> {
        self.run(|database| database.grants()).await
    }

    /// Writes `row`, intent and all, if the stored generation is `previous` (`None`: there is no row). It is durable
    /// when this returns.
    ///
    /// # Errors
    /// When it cannot be written; then nothing was.
    pub async fn put(&self, row: Row, previous: Option<u64>) -> Result<Put, StoreError> {
        self.run(move |database| database.put(&row, previous)).await
    }

    /// Writes `row` in place of whatever is there, with a generation that no grant of this user has had before. Gives
    /// that generation; the row's own does not count. It is durable when this returns.
    ///
    /// # Errors
    /// When it cannot be written; then nothing was.
    pub async fn replace(&self, row: Row) -> Result<u64, StoreError> {
        self.run(move |database| database.replace(&row)).await
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
        let (provider, subject) = (provider.clone(), subject.clone());
        self.run(move |database| database.remove(&provider, &subject)).await
    }

    /// The generation of every grant: what has changed since, at a glance.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn generations(&self) -> Result<HashMap<(ProviderName, Subject), u64>, StoreError> {
        self.run(|database| database.generations()).await
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
        self.run(move |database| database.put_flow(&flow, (&provider, &subject), most, now)).await
    }

    /// Takes a flow, once: of any number at the same moment, one gets it.
    ///
    /// # Errors
    /// When the store cannot be used.
    pub async fn take_flow(&self, id: [u8; 32], now: SystemTime) -> Result<Taken, StoreError> {
        self.run(move |database| database.take_flow(&id, now)).await
    }

    /// Seals a text for `purpose`, as a word that goes into a URL. Only the keys of this store open it.
    ///
    /// # Errors
    /// Where the machine has no randomness.
    pub fn stamp(&self, purpose: &str, text: &str) -> Result<String, StoreError> {
        let place = Place { provider: "", subject: "", column: purpose };
        let sealed = seal::seal(&self.inner.keys, place, &Secret::new(text));
        let sealed = sealed.map_err(|error| StoreError::Io { path: PathBuf::new(), error: error.into() })?;
        Ok(BASE64_URL_SAFE_NO_PAD.encode(sealed))
    }

    /// What [`Store::stamp`] sealed for the same purpose.
    pub fn stamped(&self, purpose: &str, word: &str) -> Option<Secret> {
        let sealed = BASE64_URL_SAFE_NO_PAD.decode(word).ok()?;
        seal::open(&self.inner.keys, Place { provider: "", subject: "", column: purpose }, &sealed).ok()
    }

    /// Notes durably that the refresh token of `generation` is about to be redeemed (SEMANTICS C12).
    ///
    /// # Errors
    /// [`StoreError::Moved`] when the stored generation is another one; and when it cannot be written. In both cases
    /// the token must not be redeemed.
    pub async fn intend(
        &self,
        provider: &ProviderName,
        subject: &Subject,
        generation: u64,
        intent: Intent,
    ) -> Result<(), StoreError> {
        let (provider, subject) = (provider.clone(), subject.clone());
        self.run(move |database| database.intend(&provider, &subject, generation, &intent)).await
    }

    /// Sets the state of a grant, and clears its intent.
    ///
    /// # Errors
    /// [`StoreError::Moved`] when the stored generation is another one; and when it cannot be written.
    pub async fn mark(
        &self,
        provider: &ProviderName,
        subject: &Subject,
        generation: u64,
        state: State,
    ) -> Result<(), StoreError> {
        let (provider, subject) = (provider.clone(), subject.clone());
        self.run(move |database| database.mark(&provider, &subject, generation, &state)).await
    }

    /// The right to renew a grant, among all processes on this machine; `None` when it is still held elsewhere after
    /// `wait` (SEMANTICS C19). It saves calls; what keeps writes apart is the generation.
    ///
    /// # Errors
    /// When the lock's file cannot be made or locked.
    pub async fn lease(
        &self,
        provider: &ProviderName,
        subject: &Subject,
        wait: Duration,
    ) -> Result<Option<Lease>, StoreError> {
        let path = self.inner.leases.join(lease_name(provider, subject));
        let deadline = Instant::now() + wait;
        let file = {
            let path = path.clone();
            blocking(move || lock_file(&path).map_err(|error| StoreError::io(&path, error))).await?
        };
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Lease { _file: file })),
                Err(fs::TryLockError::Error(error)) => return Err(StoreError::io(&path, error)),
                Err(fs::TryLockError::WouldBlock) if Instant::now() >= deadline => return Ok(None),
                Err(fs::TryLockError::WouldBlock) => tokio::time::sleep(LEASE_POLL).await,
            }
        }
    }

    /// A secret of the sidecar's own, such as its CA's key.
    ///
    /// # Errors
    /// When it cannot be read, or does not open.
    pub async fn sealed(&self, name: &str) -> Result<Option<Secret>, StoreError> {
        let name = name.to_owned();
        self.run(move |database| database.sealed(&name)).await
    }

    /// Keeps a secret of the sidecar's own, durably, in place of what had its name.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn put_sealed(&self, name: &str, value: &Secret) -> Result<(), StoreError> {
        let (name, value) = (name.to_owned(), value.clone());
        self.run(move |database| database.put_sealed(&name, &value)).await
    }

    /// A number that is another one after another process, or another [`Store::open`] in this one, has written.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn revision(&self) -> Result<u64, StoreError> {
        self.run(|database| database.revision()).await
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Database) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.inner.clone();
        // A panic in the middle of a transaction has rolled it back, so the connection is good for the next.
        blocking(move || work(&mut inner.database.lock().unwrap_or_else(PoisonError::into_inner))).await
    }
}

/// Why the store does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is none.
    #[error("there is no store at `{path}`{}", if *.log_left { ", only its write-ahead log" } else { "" })]
    Missing {
        /// The database file.
        path: PathBuf,
        /// Whether the log is there without the file: that is a loss, not a first start.
        log_left: bool,
    },
    /// The file is not a whole store.
    #[error("the store `{path}` is damaged: {what}")]
    Corrupt {
        /// The database file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// One value was changed, cut off, or moved from another place. Others are not affected.
    #[error("`{column}` of user `{subject}` at `{provider}` is damaged in the store `{path}`")]
    CorruptValue {
        /// The database file.
        path: PathBuf,
        /// The row's provider; empty for a secret of the sidecar's own.
        provider: String,
        /// The row's subject; empty for the client, and for a secret of the sidecar's own.
        subject: String,
        /// The column, or the secret's name.
        column: String,
    },
    /// Sealed with a key that is not at hand.
    #[error("the store `{path}` is sealed with key `{sealed_with}`, and the keys at hand are {keys:?}")]
    WrongKey {
        /// The database file.
        path: PathBuf,
        /// The key that is missing.
        sealed_with: KeyId,
        /// The keys that are there.
        keys: Vec<KeyId>,
    },
    /// Written by a later release.
    #[error("the store `{path}` was made by a newer version: its schema is {found}, and {known} is the newest known")]
    NewerSchema {
        /// The database file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// Open to others, closed to us, or no file at all.
    #[error("the store `{path}` {why}")]
    Permissions {
        /// What it is about.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No room left.
    #[error("no room is left to write the store `{path}`")]
    Full {
        /// The database file.
        path: PathBuf,
    },
    /// The machine failed us.
    #[error("the store `{path}`: {error}")]
    Io {
        /// What it is about.
        path: PathBuf,
        /// What it said.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Another process has held it for too long.
    #[error("another process keeps the store `{path}` locked")]
    Busy {
        /// The database file.
        path: PathBuf,
    },
    /// Somebody else wrote the row, or removed it.
    #[error("the grant of user `{subject}` at `{provider}` was changed in between")]
    Moved {
        /// The row's provider.
        provider: ProviderName,
        /// The row's subject.
        subject: Subject,
    },
}

impl StoreError {
    /// A stable name for machines.
    pub fn code(&self) -> &'static str {
        match self {
            StoreError::Missing { .. } => "store_missing",
            StoreError::Corrupt { .. } => "store_corrupt",
            StoreError::CorruptValue { .. } => "store_value_corrupt",
            StoreError::WrongKey { .. } => "store_wrong_key",
            StoreError::NewerSchema { .. } => "store_newer",
            StoreError::Permissions { .. } => "store_permissions",
            StoreError::Full { .. } => "store_full",
            StoreError::Io { .. } => "store_io",
            StoreError::Busy { .. } => "store_busy",
            StoreError::Moved { .. } => "store_moved",
        }
    }

    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            StoreError::Missing { log_left: false, .. } => {
                "`sidebearer run`, `connect` and `import` make one; if there should be one, check `store.path`".into()
            }
            StoreError::Missing { path, .. } => {
                format!("put `{}` back from a backup, or move its `-wal` away to start anew", path.display())
            }
            StoreError::Corrupt { path, .. } => {
                format!("put `{}` back from a backup, or move it away to start anew", path.display())
            }
            StoreError::CorruptValue { provider, .. } if provider.is_empty() => {
                "put the store back from a backup".into()
            }
            StoreError::CorruptValue { .. } => "connect this user again".into(),
            StoreError::WrongKey { .. } => "put the key it was sealed with into `store.keys`".into(),
            StoreError::NewerSchema { .. } => "run the version that made it, or a later one".into(),
            StoreError::Permissions { path, .. } => {
                format!("make `{}` readable and writable for this user, and for nobody else", path.display())
            }
            StoreError::Full { .. } => "free some space on its disk".into(),
            StoreError::Io { .. } => "check the disk that it is on".into(),
            StoreError::Busy { .. } => "end the process that holds it, if it hangs".into(),
            StoreError::Moved { .. } => "read it again".into(),
        }
    }

    fn io(path: &Path, error: io::Error) -> Self {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::PermissionDenied => StoreError::Permissions { path, why: "is closed to this user" },
            io::ErrorKind::ReadOnlyFilesystem => StoreError::Permissions { path, why: "cannot be written" },
            io::ErrorKind::NotADirectory => StoreError::Permissions { path, why: "is not a directory" },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full { path },
            _ => StoreError::Io { path, error: error.into() },
        }
    }
}

/// Runs `work` where it may block. It runs to its end even if nobody waits for it any more.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await.map_err(tokio::task::JoinError::try_into_panic) {
        Ok(done) => done,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        Err(Err(stopped)) => Err(StoreError::Io { path: PathBuf::new(), error: stopped.into() }),
    }
}

/// A file name for any pair of names: they may hold slashes, dots, and 1 KiB of anything.
fn lease_name(provider: &ProviderName, subject: &Subject) -> String {
    let pair = seal::join(&[provider.as_str().as_bytes(), subject.as_str().as_bytes()]);
    sqlite::hex(&Sha256::digest(&pair))
}

/// Lock files stay: one that is removed while another process opens it would be locked twice.
fn lock_file(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(false).mode(0o600).open(path)
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

const LEASE_POLL: Duration = Duration::from_millis(25);
