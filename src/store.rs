//! Keeps grants and the sidecar's own secrets, sealed, in a file that several processes use at once.

pub mod key;
mod seal;
mod sqlite;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use tempfile::TempPath;
use tokio::time::Instant;

use self::key::{KeyId, Keyring};
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
    /// Whether it can be renewed.
    pub state: State,
    /// Set while a refresh token may be on its way to the provider (SEMANTICS C12, C14).
    pub intent: Option<Intent>,
    /// When it was last renewed.
    pub renewed_at: Option<SystemTime>,
    /// When this row was written.
    pub stored_at: SystemTime,
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
            let database = Database::open(&path, keys, create)?;
            let leases = database.directory().join("leases");
            make_directory(&leases).map_err(|error| StoreError::io(&leases, error))?;
            Ok(Store { inner: Arc::new(Inner { database: Mutex::new(database), leases }) })
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

    /// Removes a grant, whatever its state; whether there was one.
    ///
    /// A later grant must not reuse its generations: a renewal that is still under way would take it for its own.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn remove(&self, provider: &ProviderName, subject: &Subject) -> Result<bool, StoreError> {
        let (provider, subject) = (provider.clone(), subject.clone());
        self.run(move |database| database.remove(&provider, &subject)).await
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
                "`sidebearer run` and `sidebearer import` make one; if there should be one, check `store.path`".into()
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
    Sha256::digest(&pair).iter().map(|byte| format!("{byte:02x}")).collect()
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::process::{Child, ChildStdout, Command, Stdio};

    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;
    use rusqlite::Connection;
    use tempfile::TempDir;

    use super::*;
    use crate::names::UserName;

    fn keys(seed: u8) -> Keyring {
        Keyring::from_secrets(&[Secret::new(BASE64_STANDARD.encode([seed; 32]))]).unwrap()
    }

    fn github() -> ProviderName {
        "github".parse().unwrap()
    }

    fn user(name: &str) -> Subject {
        Subject::User(name.parse().unwrap())
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn row(name: &str, generation: u64) -> Row {
        Row {
            provider: github(),
            subject: user(name),
            generation,
            target: Target { scopes: vec!["a".into()], audience: Some("b".into()), resource: vec!["c".into()] },
            refresh_token: Some(Secret::new(format!("canary-rt-{name}-{generation}"))),
            access: Some(Access {
                token: Secret::new(format!("canary-at-{name}-{generation}")),
                obtained_at: at(1000),
                expires_at: Some(at(4600)),
            }),
            granted_scopes: Some(vec!["a".into()]),
            state: State::Reauthorize { reason: "invalid_grant".into() },
            intent: Some(Intent { refresh_token_hash: [7; 32], at: at(900) }),
            renewed_at: Some(at(1001)),
            stored_at: at(1002),
        }
    }

    async fn create(directory: &TempDir) -> Store {
        Store::open(directory.path(), keys(1), true).await.unwrap()
    }

    /// A directory with a store that holds alice's grant.
    async fn with_alice() -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        create(&directory).await.put(row("alice", 1), None).await.unwrap();
        directory
    }

    fn database(directory: &TempDir) -> PathBuf {
        directory.path().join("sidebearer.db")
    }

    fn sqlite(directory: &TempDir, sql: &str) {
        Connection::open(database(directory)).unwrap().execute_batch(sql).unwrap();
    }

    async fn refused(directory: &TempDir) -> StoreError {
        Store::open(directory.path(), keys(1), true).await.err().expect("the store opened")
    }

    #[tokio::test]
    async fn what_is_put_comes_back_whole() {
        let directory = tempfile::tempdir().unwrap();
        let bare = Row {
            subject: Subject::Client,
            target: Target::default(),
            refresh_token: None,
            access: None,
            granted_scopes: None,
            state: State::Connected,
            intent: None,
            renewed_at: None,
            stored_at: SystemTime::UNIX_EPOCH - Duration::from_millis(1),
            ..row("alice", 0)
        };
        let full = Row { state: State::FixConfiguration { reason: "invalid_client".into() }, ..row("alice", 1) };
        let store = create(&directory).await;
        assert_eq!(store.grant(&github(), &user("alice")).await.unwrap(), None);
        for row in [&full, &bare] {
            assert_eq!(store.put(row.clone(), None).await.unwrap(), Put::Done);
        }
        drop(store);
        let store = Store::open(directory.path(), keys(1), false).await.unwrap();
        assert_eq!(store.grant(&github(), &user("alice")).await.unwrap(), Some(full.clone()));
        let listed: Vec<Row> = store.grants().await.unwrap().into_iter().map(|(_, _, row)| row.unwrap()).collect();
        assert_eq!(listed, [bare, full]);
    }

    #[tokio::test]
    async fn only_who_knows_the_generation_writes() {
        // TOK-031, TOK-038
        let directory = with_alice().await;
        let store = create(&directory).await;
        assert_eq!(store.put(row("alice", 2), Some(1)).await.unwrap(), Put::Done);
        let stored = Put::Stale(Box::new(row("alice", 2)));
        assert_eq!(store.put(row("alice", 9), Some(1)).await.unwrap(), stored);
        assert_eq!(store.put(row("alice", 9), None).await.unwrap(), stored);
        assert!(store.remove(&github(), &user("alice")).await.unwrap());
        assert!(!store.remove(&github(), &user("alice")).await.unwrap());
        assert_eq!(store.put(row("alice", 3), Some(2)).await.unwrap(), Put::Gone);
        assert_eq!(store.grants().await.unwrap().len(), 0);
    }

    #[tokio::test]
    async fn an_intent_stays_until_the_row_is_written_or_marked() {
        // C12
        let directory = tempfile::tempdir().unwrap();
        let store = create(&directory).await;
        let clean = Row { intent: None, ..row("alice", 1) };
        let intent = Intent { refresh_token_hash: [3; 32], at: at(2000) };
        let stored = async || store.grant(&github(), &user("alice")).await.unwrap().unwrap();
        store.put(clean.clone(), None).await.unwrap();
        store.intend(&github(), &user("alice"), 1, intent.clone()).await.unwrap();
        assert_eq!(stored().await, Row { intent: Some(intent.clone()), ..clean.clone() });
        let state = State::Reauthorize { reason: "lost_rotation".into() };
        store.mark(&github(), &user("alice"), 1, state.clone()).await.unwrap();
        assert_eq!(stored().await, Row { state, ..clean.clone() });
        store.intend(&github(), &user("alice"), 1, intent.clone()).await.unwrap();
        store.put(Row { generation: 2, ..clean.clone() }, Some(1)).await.unwrap();
        assert_eq!(stored().await, Row { generation: 2, ..clean.clone() });

        let late = store.intend(&github(), &user("alice"), 1, intent).await.unwrap_err();
        assert_eq!(late.to_string(), "the grant of user `alice` at `github` was changed in between");
        let late = store.mark(&github(), &user("alice"), 1, State::Connected).await.unwrap_err();
        assert_eq!(late.code(), "store_moved");
        assert_eq!(stored().await, Row { generation: 2, ..clean });
    }

    #[tokio::test]
    async fn users_with_odd_names_are_kept_apart() {
        // TOK-042
        let long = "x".repeat(1024);
        let names = [
            "a:b",
            "a/b",
            "../a",
            "..",
            ".",
            "a",
            "A",
            "a ",
            "a%00",
            "%",
            "_",
            "é",
            "e\u{301}",
            "'; DROP TABLE grants; --",
            "\u{202e}",
            &long,
            &long[1..],
        ];
        let directory = tempfile::tempdir().unwrap();
        let store = create(&directory).await;
        let mut leases = Vec::new();
        for name in names {
            assert_eq!(store.put(row(name, 1), None).await.unwrap(), Put::Done, "{name:?}");
            leases.push(store.lease(&github(), &user(name), Duration::ZERO).await.unwrap().expect(name));
        }
        for name in names {
            assert_eq!(store.grant(&github(), &user(name)).await.unwrap(), Some(row(name, 1)), "{name:?}");
        }
        assert_eq!(fs::read_dir(directory.path().join("leases")).unwrap().count(), names.len());
        assert!("a\0b".parse::<UserName>().is_err());
        let pairs = [("a", "bc"), ("ab", "c"), ("abc", "d")];
        let distinct: HashSet<_> = pairs.iter().map(|(p, s)| lease_name(&p.parse().unwrap(), &user(s))).collect();
        assert_eq!(distinct.len(), 3);
    }

    #[tokio::test]
    async fn a_store_that_is_not_there_is_not_made_unasked() {
        // TOK-025
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path().to_owned(), directory.path().join("deeper")] {
            let error = Store::open(&path, keys(1), false).await.err().unwrap();
            let file = path.join("sidebearer.db");
            assert_eq!(error.to_string(), format!("there is no store at `{}`", file.display()));
            let hint = "`sidebearer run` and `sidebearer import` make one; if there should be one, check `store.path`";
            assert_eq!(error.hint(), hint);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_lost_database_is_not_taken_for_a_first_start() {
        // TOK-025
        let directory = with_alice().await;
        fs::rename(database(&directory), directory.path().join("sidebearer.db-wal")).unwrap();
        let error = refused(&directory).await;
        let file = database(&directory);
        assert_eq!(error.to_string(), format!("there is no store at `{}`, only its write-ahead log", file.display()));
        assert!(!file.exists());
    }

    #[tokio::test]
    async fn a_file_that_is_no_store_is_refused_and_left_alone() {
        // TOK-025
        let whole = fs::read(database(&with_alice().await)).unwrap();
        let mut headless = whole.clone();
        headless[0] ^= 1;
        let mut blank_page = whole.clone();
        // The last page is the grants': nothing else that is done at the start would come upon it.
        let last = blank_page.len() - 4096;
        blank_page[last..].fill(0);
        for (content, what) in [
            (&whole[..0], "it is empty"),
            (b"canary", "it is no SQLite database"),
            (&headless, "it is no SQLite database"),
            (&whole[..whole.len() / 2], "database disk image is malformed"),
            (&whole[..512], "database disk image is malformed"),
            (&blank_page, ""),
        ] {
            let directory = tempfile::tempdir().unwrap();
            fs::write(database(&directory), content).unwrap();
            fs::set_permissions(database(&directory), fs::Permissions::from_mode(0o600)).unwrap();
            match refused(&directory).await {
                StoreError::Corrupt { what: said, .. } if said.contains(what) => {}
                other => panic!("{what}: {other:?}"),
            }
            assert_eq!(fs::read(database(&directory)).unwrap(), content, "{what}");
        }
    }

    #[tokio::test]
    async fn a_store_of_another_program_or_of_the_future_is_refused() {
        // TOK-025
        let directory = with_alice().await;
        sqlite(&directory, "PRAGMA user_version = 99");
        let error = refused(&directory).await;
        let said = "was made by a newer version: its schema is 99, and 1 is the newest known";
        assert_eq!(error.to_string(), format!("the store `{}` {said}", database(&directory).display()));
        assert_eq!(error.hint(), "run the version that made it, or a later one");
        sqlite(&directory, "PRAGMA application_id = 1; PRAGMA journal_mode = DELETE");
        let theirs = fs::read(database(&directory)).unwrap();
        let said = "is damaged: it is another program's database";
        let error = refused(&directory).await;
        assert_eq!(error.to_string(), format!("the store `{}` {said}", database(&directory).display()));
        assert_eq!(fs::read(database(&directory)).unwrap(), theirs);
    }

    #[tokio::test]
    async fn a_store_that_others_can_get_at_is_refused() {
        // TOK-025
        let directory = with_alice().await;
        let path = database(&directory);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = refused(&directory).await;
        assert_eq!(error.to_string(), format!("the store `{}` is open to every user of this machine", path.display()));
        assert_eq!(
            error.hint(),
            format!("make `{}` readable and writable for this user, and for nobody else", path.display())
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(&path, directory.path().join("elsewhere.db")).unwrap();
        symlink(directory.path().join("elsewhere.db"), &path).unwrap();
        assert_eq!(refused(&directory).await.to_string(), format!("the store `{}` is a symbolic link", path.display()));
        fs::remove_file(&path).unwrap();
        symlink(directory.path().join("nowhere.db"), &path).unwrap();
        assert_eq!(refused(&directory).await.code(), "store_permissions");
        assert!(!directory.path().join("nowhere.db").exists());
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let said = "is not a regular file";
        assert_eq!(refused(&directory).await.to_string(), format!("the store `{}` {said}", path.display()));
        let error = Store::open(&directory.path().join("elsewhere.db"), keys(1), true).await.err().unwrap();
        assert!(error.to_string().ends_with("is not a directory"), "{error}");
    }

    #[tokio::test]
    async fn a_linked_directory_is_followed() {
        let directory = with_alice().await;
        let links = tempfile::tempdir().unwrap();
        symlink(directory.path(), links.path().join("data")).unwrap();
        let store = Store::open(&links.path().join("data"), keys(1), false).await.unwrap();
        assert_eq!(store.grants().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_wrong_key_is_told_at_once_even_without_rows() {
        // TOK-025
        let directory = tempfile::tempdir().unwrap();
        create(&directory).await;
        let error = Store::open(directory.path(), keys(2), true).await.err().unwrap();
        let (right, wrong) = (keys(1).ids()[0], keys(2).ids()[0]);
        let said = format!("is sealed with key `{right}`, and the keys at hand are [{wrong}]");
        assert_eq!(error.to_string(), format!("the store `{}` {said}", database(&directory).display()));
        assert_eq!(error.hint(), "put the key it was sealed with into `store.keys`");
        assert!(Store::open(directory.path(), keys(1), true).await.is_ok());
    }

    #[tokio::test]
    async fn an_old_key_can_be_retired_once_all_is_sealed_anew() {
        let directory = with_alice().await;
        let secret = |seed: u8| Secret::new(BASE64_STANDARD.encode([seed; 32]));
        let both = Keyring::from_secrets(&[secret(2), secret(1)]).unwrap();
        let store = Store::open(directory.path(), both, false).await.unwrap();
        assert!(store.grant(&github(), &user("alice")).await.is_ok());
        let new_only = Store::open(directory.path(), keys(2), false).await.unwrap();
        let error = new_only.grant(&github(), &user("alice")).await.unwrap_err();
        assert_eq!(error.code(), "store_wrong_key");
        store.put(row("alice", 2), Some(1)).await.unwrap();
        assert_eq!(new_only.grant(&github(), &user("alice")).await.unwrap(), Some(row("alice", 2)));
    }

    #[tokio::test]
    async fn a_value_copied_to_another_user_does_not_open_and_hides_no_other() {
        // TOK-025, TOK-026
        let directory = with_alice().await;
        let store = create(&directory).await;
        for name in ["bob", "carol"] {
            store.put(row(name, 1), None).await.unwrap();
        }
        let alices = "(SELECT refresh_token FROM grants WHERE subject = 'alice')";
        sqlite(&directory, &format!("UPDATE grants SET refresh_token = {alices} WHERE subject = 'bob'"));
        sqlite(&directory, "UPDATE grants SET access_token = refresh_token WHERE subject = 'carol'");
        let error = store.grant(&github(), &user("bob")).await.unwrap_err();
        let said = "`refresh_token` of user `bob` at `github` is damaged in the store";
        assert_eq!(error.to_string(), format!("{said} `{}`", database(&directory).display()));
        assert_eq!(error.hint(), "connect this user again");
        let opened: Vec<_> =
            store.grants().await.unwrap().into_iter().map(|(_, who, row)| (who.to_string(), row.is_ok())).collect();
        assert_eq!(opened, [("alice", true), ("bob", false), ("carol", false)].map(|(a, b)| (a.to_owned(), b)));
        store.remove(&github(), &user("bob")).await.unwrap();
        assert_eq!(store.put(row("bob", 2), None).await.unwrap(), Put::Done);
    }

    #[tokio::test]
    async fn a_flipped_bit_never_yields_another_token_or_an_empty_store() {
        // TOK-025
        let original = with_alice().await;
        let whole = fs::read(database(&original)).unwrap();
        for offset in (0..whole.len()).step_by(61) {
            let directory = tempfile::tempdir().unwrap();
            let mut flipped = whole.clone();
            flipped[offset] ^= 1 << (offset % 8);
            fs::write(database(&directory), &flipped).unwrap();
            fs::set_permissions(database(&directory), fs::Permissions::from_mode(0o600)).unwrap();
            let Ok(store) = Store::open(directory.path(), keys(1), true).await else { continue };
            let Ok(listed) = store.grants().await else { continue };
            assert_eq!(listed.len(), 1, "offset {offset}");
            if let (_, _, Ok(found)) = &listed[0] {
                assert_eq!(found.refresh_token, row("alice", 1).refresh_token, "offset {offset}");
                assert_eq!(found.access.as_ref().map(|a| &a.token), row("alice", 1).access.as_ref().map(|a| &a.token));
            }
        }
    }

    #[tokio::test]
    async fn no_file_of_the_store_holds_a_secret() {
        // LEK-006, LEK-011
        let directory = tempfile::tempdir().unwrap();
        let store = create(&directory).await;
        store.put(row("alice", 1), None).await.unwrap();
        store.put_sealed("ca_key", &Secret::new("canary-ca")).await.unwrap();
        let _lease = store.lease(&github(), &user("alice"), Duration::ZERO).await.unwrap();
        let assert_clean = || {
            let files: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
            for path in files.iter().filter(|path| path.is_file()) {
                let content = fs::read(path).unwrap();
                assert!(!content.windows(6).any(|window| window == b"canary"), "{}", path.display());
                assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o600, "{}", path.display());
            }
            files.len()
        };
        assert_eq!(assert_clean(), 4, "database, -wal, -shm and leases");
        drop(store);
        assert_eq!(assert_clean(), 2);
        assert_eq!(fs::metadata(directory.path().join("leases")).unwrap().mode() & 0o777, 0o700);
    }

    #[tokio::test]
    async fn a_secret_of_the_sidecar_is_kept_under_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let store = create(&directory).await;
        assert_eq!(store.sealed("ca_key").await.unwrap(), None);
        for value in ["old", "new"] {
            store.put_sealed("ca_key", &Secret::new(value)).await.unwrap();
        }
        assert_eq!(store.sealed("ca_key").await.unwrap(), Some(Secret::new("new")));
        sqlite(&directory, "INSERT INTO sealed SELECT 'other', value FROM sealed");
        assert_eq!(store.sealed("other").await.unwrap_err().code(), "store_value_corrupt");
    }

    #[tokio::test]
    async fn another_s_write_changes_the_revision() {
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (create(&directory).await, create(&directory).await);
        let before = one.revision().await.unwrap();
        assert_eq!(one.revision().await.unwrap(), before);
        other.put(row("alice", 1), None).await.unwrap();
        assert_ne!(one.revision().await.unwrap(), before);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_who_open_a_new_store_at_once_get_the_same_one() {
        // TOK-029
        let directory = tempfile::tempdir().unwrap();
        let opening: Vec<_> = (0..12)
            .map(|index| {
                let path = directory.path().join("store");
                tokio::spawn(async move {
                    let store = Store::open(&path, keys(1), true).await.unwrap();
                    store.put(row(&format!("user{index}"), 1), None).await.unwrap()
                })
            })
            .collect();
        for opened in opening {
            assert_eq!(opened.await.unwrap(), Put::Done);
        }
        let store = Store::open(&directory.path().join("store"), keys(1), false).await.unwrap();
        assert_eq!(store.grants().await.unwrap().len(), 12);
        assert_eq!(fs::metadata(directory.path().join("store")).unwrap().mode() & 0o777, 0o700);
        drop(store);
        assert_eq!(fs::read_dir(directory.path().join("store")).unwrap().count(), 2, "database and leases");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_many_writers_of_one_generation_one_wins() {
        // TOK-029, TOK-030
        let directory = with_alice().await;
        for generation in 1..5 {
            let mut writers = Vec::new();
            for _ in 0..4 {
                let store = create(&directory).await;
                writers
                    .push(tokio::spawn(async move { store.put(row("alice", generation + 1), Some(generation)).await }));
            }
            let mut done = 0;
            for writer in writers {
                done += usize::from(writer.await.unwrap().unwrap() == Put::Done);
            }
            assert_eq!(done, 1);
        }
    }

    #[tokio::test]
    async fn a_lease_is_held_by_one_until_it_is_dropped() {
        // C12, C19
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (create(&directory).await, create(&directory).await);
        let lease = one.lease(&github(), &user("alice"), Duration::ZERO).await.unwrap().unwrap();
        assert!(other.lease(&github(), &user("alice"), Duration::from_millis(60)).await.unwrap().is_none());
        assert!(one.lease(&github(), &user("alice"), Duration::ZERO).await.unwrap().is_none());
        assert!(other.lease(&github(), &user("bob"), Duration::ZERO).await.unwrap().is_some());
        let waiting =
            tokio::spawn(async move { other.lease(&github(), &user("alice"), Duration::from_secs(60)).await });
        tokio::task::yield_now().await;
        drop(lease);
        assert!(waiting.await.unwrap().unwrap().is_some());
    }

    /// This test binary as another process, which does what [`other_process`] says until it is killed.
    fn spawn(directory: &TempDir, task: &str) -> (Child, BufReader<ChildStdout>) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::other_process", "--ignored", "--nocapture"])
            .env("STORE_TEST_DIRECTORY", directory.path())
            .env("STORE_TEST_TASK", task)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        (child, stdout)
    }

    #[tokio::test]
    #[ignore = "the other half of the tests that call `spawn`"]
    async fn other_process() {
        let Ok(directory) = std::env::var("STORE_TEST_DIRECTORY") else { return };
        let store = Store::open(Path::new(&directory), keys(1), true).await.unwrap();
        let say = |what: &str| writeln!(std::io::stdout(), "\n{what}").unwrap();
        if std::env::var("STORE_TEST_TASK").unwrap() == "hold" {
            let _lease = store.lease(&github(), &user("alice"), Duration::ZERO).await.unwrap().unwrap();
            say("held");
            std::future::pending::<()>().await;
        }
        let mut generation = store.grant(&github(), &user("alice")).await.unwrap().map(|row| row.generation);
        loop {
            let next = generation.unwrap_or(0) + 1;
            assert_eq!(store.put(row("alice", next), generation).await.unwrap(), Put::Done);
            say(&format!("wrote {next}"));
            generation = Some(next);
        }
    }

    #[tokio::test]
    async fn a_lease_ends_with_its_process() {
        // C12
        let directory = tempfile::tempdir().unwrap();
        let store = create(&directory).await;
        let (mut child, stdout) = spawn(&directory, "hold");
        assert!(stdout.lines().any(|line| line.unwrap() == "held"));
        assert!(store.lease(&github(), &user("alice"), Duration::ZERO).await.unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(store.lease(&github(), &user("alice"), Duration::from_secs(5)).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn what_was_written_survives_the_death_of_the_writer() {
        // TOK-020, TOK-029
        let directory = tempfile::tempdir().unwrap();
        for round in 1..=6 {
            let (mut child, stdout) = spawn(&directory, "write");
            let written = |line: io::Result<String>| line.unwrap().strip_prefix("wrote ")?.parse::<u64>().ok();
            let mut written = stdout.lines().filter_map(written);
            let told = written.nth(round * 3).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            let told = written.last().unwrap_or(told);
            let store = Store::open(directory.path(), keys(1), false).await.unwrap();
            let stored = store.grant(&github(), &user("alice")).await.unwrap().unwrap();
            assert_eq!(stored, row("alice", stored.generation));
            assert!((told..=told + 1).contains(&stored.generation), "told {told}, stored {}", stored.generation);
        }
    }
}
