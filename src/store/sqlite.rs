//! The embedded engine: SQLite, which lets a sidecar and the command line write at the same time.
//!
//! A commit is synced to the disk before it returns (`synchronous=FULL`), so what is written survives a power cut.

mod upkeep;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::types::FromSql;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior, named_params, params};
use sha2::{Digest, Sha256};

use super::engine::{
    Change, Changes, Count, Engine, FlowRecord, Gone, Held, Intended, IntentRecord, Names, Owner, Plan, Record,
    Resealed, Result, Snapshot, StateRecord, TakenRecord,
};
use super::record::hex;
use super::seal;
use super::{Most, StoreError};
use crate::names::ProviderName;

/// The embedded engine: one connection to the file, and a folder of lock files beside it. A clone shares both.
#[derive(Clone)]
pub(super) struct Sqlite {
    inner: Arc<Inner>,
}

struct Inner {
    database: Mutex<Database>,
    at: String,
    leases: PathBuf,
}

/// One connection to the file.
struct Database {
    connection: Connection,
    path: PathBuf,
}

impl Sqlite {
    /// Opens the store in `directory`. Where there is none, makes one with this key check.
    pub async fn open(directory: PathBuf, create: Option<Vec<u8>>) -> Result<Self> {
        blocking(move || {
            let database = Database::open(&directory, create)?;
            let leases = super::parent(&database.path).join("leases");
            super::make_directory(&leases).map_err(|error| StoreError::io(&leases, error))?;
            let at = database.path.display().to_string();
            Ok(Self { inner: Arc::new(Inner { database: Mutex::new(database), at, leases }) })
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Database) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = self.inner.clone();
        // A panic in the middle of a transaction has rolled it back, so the connection is good for the next.
        blocking(move || work(&mut inner.database.lock().unwrap_or_else(PoisonError::into_inner))).await
    }
}

#[async_trait]
impl Engine for Sqlite {
    fn at(&self) -> &str {
        &self.inner.at
    }

    async fn key_check(&self) -> Result<Option<Vec<u8>>> {
        self.run(|database| database.key_check()).await
    }

    async fn grant(&self, names: &Names) -> Result<Option<Record>> {
        let names = names.clone();
        self.run(move |database| database.grant(&names)).await
    }

    async fn grants(&self) -> Result<Vec<(Names, Result<Record>)>> {
        self.run(|database| database.grants()).await
    }

    async fn census(&self) -> Result<Vec<Count>> {
        self.run(|database| database.census()).await
    }

    async fn generations(&self, of: &[Names]) -> Result<HashMap<Names, u64>> {
        let of = of.to_vec();
        self.run(move |database| database.generations(of)).await
    }

    async fn put(&self, record: &Record, previous: Option<u64>) -> Result<bool> {
        let record = record.clone();
        self.run(move |database| database.put(&record, previous)).await
    }

    async fn replace(&self, record: &Record) -> Result<u64> {
        let record = record.clone();
        self.run(move |database| database.replace(record)).await
    }

    async fn remove(&self, names: &Names) -> Result<Option<Gone>> {
        let names = names.clone();
        self.run(move |database| database.remove(&names)).await
    }

    /// The lock is this process's until it dies, so whoever calls has it.
    async fn intend(&self, names: &Names, generation: u64, intent: &IntentRecord, _: Owner) -> Result<Intended> {
        let (names, intent) = (names.clone(), intent.clone());
        self.run(move |database| database.intend(&names, generation, &intent)).await
    }

    async fn mark(&self, names: &Names, generation: u64, intent: &IntentRecord, state: &StateRecord) -> Result<bool> {
        let (names, intent, state) = (names.clone(), intent.clone(), state.clone());
        self.run(move |database| database.mark(&names, generation, &intent, &state)).await
    }

    async fn mark_all(&self, provider: &ProviderName, from: &str, to: &StateRecord) -> Result<()> {
        let (provider, from, to) = (provider.clone(), from.to_owned(), to.clone());
        self.run(move |database| {
            let sql = "UPDATE grants SET state = ?, reason = ? WHERE provider = ? AND state = ?";
            let marked = database.connection.execute(sql, params![to.state, to.reason, provider.as_str(), from]);
            database.sql(marked).map(|_| ())
        })
        .await
    }

    /// A file lock: the kernel frees it when its process dies, and at no other time.
    async fn lease(&self, names: &Names, _: Owner) -> Result<Option<Held>> {
        let path = self.inner.leases.join(lease_name(names));
        blocking(move || {
            let file = lock_file(&path).map_err(|error| StoreError::io(&path, error))?;
            match file.try_lock() {
                // Closing the file unlocks it.
                Ok(()) => Ok(Some(Held { _guard: Box::new(file), inherited: false })),
                Err(fs::TryLockError::WouldBlock) => Ok(None),
                Err(fs::TryLockError::Error(error)) => Err(StoreError::io(&path, error)),
            }
        })
        .await
    }

    async fn prolong(&self, _: &Names, _: Owner) -> Result<bool> {
        Ok(true)
    }

    async fn put_flow(&self, flow: &FlowRecord, most: Most, now: i64) -> Result<()> {
        let flow = flow.clone();
        self.run(move |database| database.put_flow(&flow, most, now)).await
    }

    async fn take_flow(&self, id: [u8; 32]) -> Result<Option<TakenRecord>> {
        self.run(move |database| database.take_flow(id)).await
    }

    async fn sealed(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let name = name.to_owned();
        self.run(move |database| {
            let value =
                database.connection.query_row("SELECT value FROM sealed WHERE name = ?", [name], |row| row.get(0));
            database.sql(value.optional())
        })
        .await
    }

    async fn put_sealed(&self, name: &str, value: &[u8], previous: Option<&[u8]>) -> Result<bool> {
        let (name, value, previous) = (name.to_owned(), value.to_owned(), previous.map(<[u8]>::to_owned));
        self.run(move |database| database.sql(put_sealed(&database.connection, &name, &value, previous.as_deref())))
            .await
    }

    async fn changes(&self) -> Box<dyn Changes> {
        let seen = self.revision().await.ok();
        Box::new(Revisions { sqlite: self.clone(), seen })
    }

    async fn snapshot(&self) -> Result<Snapshot> {
        self.run(|database| database.snapshot()).await
    }

    async fn reseal(&self, batch: &[Resealed]) -> Result<usize> {
        let batch = batch.to_vec();
        self.run(move |database| database.reseal(&batch)).await
    }

    async fn carry_out(&self, plan: &Plan) -> Result<bool> {
        let plan = plan.clone();
        self.run(move |database| database.carry_out(&plan)).await
    }
}

impl Sqlite {
    /// A number that is another one after another connection has written.
    async fn revision(&self) -> Result<u64> {
        self.run(|database| {
            database.sql(database.connection.pragma_query_value(None, "data_version", |row| row.get(0)))
        })
        .await
    }
}

/// Looks at the file's revision, again and again: it costs microseconds.
struct Revisions {
    sqlite: Sqlite,
    seen: Option<u64>,
}

#[async_trait]
impl Changes for Revisions {
    async fn next(&mut self) -> Change {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let revision = self.sqlite.revision().await.ok();
            if revision.is_some() && revision != self.seen {
                self.seen = revision;
                return Change::Anything;
            }
        }
    }
}

impl Database {
    fn open(directory: &Path, create: Option<Vec<u8>>) -> Result<Self> {
        let directory = prepare(directory, create.is_some())?;
        let path = file(&directory);
        if !is_there(&path)? {
            let Some(check) = create else {
                return Err(StoreError::Missing { at: path.display().to_string(), log_left: false });
            };
            make(&path, &check)?;
            is_there(&path)?;
        }
        let connection = connect(&path).map_err(|error| classify(&path, error))?;
        let mut database = Self { connection, path };
        database.identify()?;
        // Only now: a file of another program's must not be changed.
        database.sql(write_ahead(&database.connection))?;
        database.examine()?;
        let migrated = migrate(&mut database.connection);
        database.sql(migrated)?;
        Ok(database)
    }

    fn key_check(&self) -> Result<Option<Vec<u8>>> {
        let check = self.connection.query_row("SELECT key_check FROM meta", [], |row| row.get(0));
        self.sql(check.optional())
    }

    fn grant(&self, names: &Names) -> Result<Option<Record>> {
        let mut statement =
            self.sql(self.connection.prepare(&format!("{GRANTS} WHERE provider = ? AND subject = ?")))?;
        let mut rows = self.sql(statement.query([names.provider.as_str(), names.subject.as_str()]))?;
        let row = self.sql(rows.next())?;
        row.map(|row| Cells { database: self, row, names }.read()).transpose()
    }

    fn grants(&self) -> Result<Vec<(Names, Result<Record>)>> {
        let mut statement = self.sql(self.connection.prepare(&format!("{GRANTS} ORDER BY provider, subject")))?;
        let mut rows = self.sql(statement.query([]))?;
        let mut listed = Vec::new();
        while let Some(row) = self.sql(rows.next())? {
            let (provider, subject): (String, String) = (self.sql(row.get("provider"))?, self.sql(row.get("subject"))?);
            let names = Names::parse(&provider, &subject)
                .ok_or_else(|| self.corrupt("a row has a name that is none".into()))?;
            let read = Cells { database: self, row, names: &names }.read();
            listed.push((names, read));
        }
        Ok(listed)
    }

    fn census(&self) -> Result<Vec<Count>> {
        let sql = "SELECT provider, target, state, reason, count(*) FROM grants GROUP BY 1, 2, 3, 4";
        let mut statement = self.sql(self.connection.prepare(sql))?;
        let counted = statement.query_map([], |row| {
            let (state, grants) = (StateRecord { state: row.get(2)?, reason: row.get(3)? }, row.get::<_, i64>(4)?);
            Ok(Count { provider: row.get(0)?, target: row.get(1)?, state, grants: grants.unsigned_abs() })
        });
        self.sql(counted.and_then(Iterator::collect))
    }

    fn generations(&self, of: Vec<Names>) -> Result<HashMap<Names, u64>> {
        let one = "SELECT generation FROM grants WHERE provider = ? AND subject = ?";
        let mut statement = self.sql(self.connection.prepare(one))?;
        let mut generations = HashMap::new();
        for names in of {
            let found = statement.query_row([names.provider.as_str(), names.subject.as_str()], |row| row.get(0));
            if let Some(generation) = self.sql(found.optional())? {
                generations.insert(names, generation);
            }
        }
        Ok(generations)
    }

    fn put(&mut self, record: &Record, previous: Option<u64>) -> Result<bool> {
        let path = self.path.clone();
        let mut put = || {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            if !write_after(&transaction, record, previous)? {
                return Ok(false);
            }
            transaction.commit().map(|()| true)
        };
        put().map_err(|error| classify(&path, error))
    }

    fn replace(&mut self, mut record: Record) -> Result<u64> {
        let path = self.path.clone();
        let mut replace = || {
            let names = [record.names.provider.as_str(), record.names.subject.as_str()];
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let last: Option<u64> = transaction.query_row(LAST_GENERATION, names, |last| last.get(0))?;
            transaction.execute("DELETE FROM removed WHERE provider = ? AND subject = ?", names)?;
            record.generation = last.map_or(1, |last| last + 1);
            write(&transaction, &record)?;
            transaction.commit()?;
            Ok(record.generation)
        };
        replace().map_err(|error| classify(&path, error))
    }

    fn remove(&mut self, names: &Names) -> Result<Option<Gone>> {
        let path = self.path.clone();
        let names = [names.provider.as_str(), names.subject.as_str()];
        let mut remove = || {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let found = transaction.query_row(
                "DELETE FROM grants WHERE provider = ? AND subject = ?
                 RETURNING generation, target, refresh_token, access_token",
                names,
                |row| {
                    let gone = Gone { target: row.get(1)?, refresh_token: row.get(2)?, access_token: row.get(3)? };
                    Ok((row.get::<_, u64>(0)?, gone))
                },
            );
            let Some((generation, gone)) = found.optional()? else { return Ok(None) };
            let remember = "INSERT OR REPLACE INTO removed VALUES (?, ?, ?)";
            transaction.execute(remember, params![names[0], names[1], generation])?;
            transaction.execute(FORGET_FURTHER, names)?;
            transaction.commit()?;
            Ok(Some(gone))
        };
        remove().map_err(|error| classify(&path, error))
    }

    fn put_flow(&mut self, flow: &FlowRecord, most: Most, now: i64) -> Result<()> {
        let path = self.path.clone();
        let mut put = || {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute("DELETE FROM flows WHERE expires_at <= ?", [now])?;
            let (provider, subject) = (flow.names.provider.as_str(), flow.names.subject.as_str());
            let others = |most: usize| i64::try_from(most.saturating_sub(1)).unwrap_or(i64::MAX);
            let oldest_of_one = "DELETE FROM flows WHERE id IN (SELECT id FROM flows WHERE provider = ? AND subject = ?
                                 ORDER BY expires_at DESC LIMIT -1 OFFSET ?)";
            transaction.execute(oldest_of_one, params![provider, subject, others(most.of_one)])?;
            let oldest =
                "DELETE FROM flows WHERE id IN (SELECT id FROM flows ORDER BY expires_at DESC LIMIT -1 OFFSET ?)";
            transaction.execute(oldest, [others(most.flows)])?;
            transaction.execute(
                "INSERT INTO flows (id, content, expires_at, taken, provider, subject) VALUES (?, ?, ?, 0, ?, ?)",
                params![flow.id, flow.content, flow.expires_at, provider, subject],
            )?;
            transaction.commit()
        };
        put().map_err(|error| classify(&path, error))
    }

    fn take_flow(&self, id: [u8; 32]) -> Result<Option<TakenRecord>> {
        let taken = self.connection.query_row(
            "UPDATE flows SET taken = taken + 1 WHERE id = ? RETURNING content, expires_at, taken",
            [id],
            |row| Ok(TakenRecord { content: row.get(0)?, expires_at: row.get(1)?, times: row.get(2)? }),
        );
        self.sql(taken.optional())
    }

    fn intend(&self, names: &Names, generation: u64, intent: &IntentRecord) -> Result<Intended> {
        let changed = self.connection.execute(
            "UPDATE grants SET intent_hash = ?, intent_at = ? WHERE provider = ? AND subject = ? AND generation = ?",
            params![intent.hash, intent.at, names.provider.as_str(), names.subject.as_str(), generation],
        );
        Ok(if self.sql(changed)? > 0 { Intended::Done } else { Intended::Moved })
    }

    fn mark(&self, names: &Names, generation: u64, intent: &IntentRecord, state: &StateRecord) -> Result<bool> {
        let changed = self.connection.execute(
            "UPDATE grants SET state = ?, reason = ?, intent_hash = NULL, intent_at = NULL
             WHERE provider = ? AND subject = ? AND generation = ? AND intent_hash = ? AND intent_at = ?",
            params![
                state.state,
                state.reason,
                names.provider.as_str(),
                names.subject.as_str(),
                generation,
                intent.hash,
                intent.at
            ],
        );
        self.sql(changed).map(|changed| changed > 0)
    }

    /// Refuses what is not ours, and what is from the future.
    fn identify(&self) -> Result<()> {
        let application: i64 =
            self.sql(self.connection.pragma_query_value(None, "application_id", |row| row.get(0)))?;
        if application != APPLICATION_ID {
            return Err(self.corrupt("it is another program's database".into()));
        }
        let found: i64 = self.sql(schema(&self.connection))?;
        if found > SCHEMA {
            return Err(StoreError::NewerSchema { at: self.at(), found, known: SCHEMA });
        }
        Ok(())
    }

    fn examine(&self) -> Result<()> {
        let verdict: String = self.sql(self.connection.pragma_query_value(None, "quick_check", |row| row.get(0)))?;
        if verdict == "ok" { Ok(()) } else { Err(self.corrupt(verdict)) }
    }

    fn sql<T>(&self, result: rusqlite::Result<T>) -> Result<T> {
        result.map_err(|error| classify(&self.path, error))
    }

    fn corrupt(&self, what: String) -> StoreError {
        StoreError::Corrupt { at: self.at(), what }
    }

    fn at(&self) -> String {
        self.path.display().to_string()
    }
}

/// A row of `grants` whose names are known, so that what is wrong with the rest can be said of them.
struct Cells<'a> {
    database: &'a Database,
    row: &'a rusqlite::Row<'a>,
    names: &'a Names,
}

impl Cells<'_> {
    fn read(&self) -> Result<Record> {
        Ok(Record {
            names: self.names.clone(),
            generation: self.get("generation")?,
            target: self.get("target")?,
            refresh_token: self.get("refresh_token")?,
            access_token: self.get("access_token")?,
            obtained_at: self.get("obtained_at")?,
            expires_at: self.get("expires_at")?,
            granted_scopes: self.get("granted_scopes")?,
            further_scopes: self.get("further_scopes")?,
            state: StateRecord { state: self.get("state")?, reason: self.get("reason")? },
            intent: self.intent()?,
            renewed_at: self.get("renewed_at")?,
            stored_at: self.get("stored_at")?,
        })
    }

    fn intent(&self) -> Result<Option<IntentRecord>> {
        let Some(hash) = self.get("intent_hash")? else { return Ok(None) };
        Ok(Some(IntentRecord { hash, at: self.get("intent_at")? }))
    }

    fn get<T: FromSql>(&self, column: &'static str) -> Result<T> {
        let got = self.row.get(column);
        got.map_err(|_| StoreError::corrupt_value(&self.database.at(), self.names.place(column)))
    }
}

/// Writes a record if the stored generation is `previous`; whether it did.
fn write_after(connection: &Connection, record: &Record, previous: Option<u64>) -> rusqlite::Result<bool> {
    let stored: Option<u64> = connection
        .query_row(
            "SELECT generation FROM grants WHERE provider = ? AND subject = ?",
            [record.names.provider.as_str(), record.names.subject.as_str()],
            |stored| stored.get(0),
        )
        .optional()?;
    if stored != previous {
        return Ok(false);
    }
    write(connection, record).map(|()| true)
}

fn write(connection: &Connection, record: &Record) -> rusqlite::Result<()> {
    let (provider, subject) = (record.names.provider.as_str(), record.names.subject.as_str());
    connection.execute(
        "INSERT OR REPLACE INTO grants (provider, subject, generation, target, refresh_token, access_token,
         obtained_at, expires_at, granted_scopes, state, reason, intent_hash, intent_at, renewed_at, stored_at)
         VALUES (:provider, :subject, :generation, :target, :refresh_token, :access_token,
         :obtained_at, :expires_at, :granted_scopes, :state, :reason, :intent_hash, :intent_at, :renewed_at, :stored_at)",
        named_params! {
            ":provider": provider,
            ":subject": subject,
            ":generation": record.generation,
            ":target": record.target,
            ":refresh_token": record.refresh_token,
            ":access_token": record.access_token,
            ":obtained_at": record.obtained_at,
            ":expires_at": record.expires_at,
            ":granted_scopes": record.granted_scopes,
            ":state": record.state.state,
            ":reason": record.state.reason,
            ":intent_hash": record.intent.as_ref().map(|intent| intent.hash),
            ":intent_at": record.intent.as_ref().map(|intent| intent.at),
            ":renewed_at": record.renewed_at,
            ":stored_at": record.stored_at,
        },
    )?;
    let Some(further_scopes) = &record.further_scopes else {
        return connection.execute(FORGET_FURTHER, [provider, subject]).map(|_| ());
    };
    connection.execute(
        "INSERT OR REPLACE INTO further (provider, subject, stored_at, scopes) VALUES (?, ?, ?, ?)",
        params![provider, subject, record.stored_at, further_scopes],
    )?;
    Ok(())
}

/// Writes a secret of the sidecar's own if what is stored is `previous`; whether it did.
fn put_sealed(connection: &Connection, name: &str, value: &[u8], previous: Option<&[u8]>) -> rusqlite::Result<bool> {
    let put = match previous {
        None => connection.execute("INSERT OR IGNORE INTO sealed (name, value) VALUES (?, ?)", params![name, value]),
        Some(previous) => connection
            .execute("UPDATE sealed SET value = ? WHERE name = ? AND value = ?", params![value, name, previous]),
    };
    put.map(|changed| changed > 0)
}

/// A file name for any pair of names: they may hold slashes, dots, and 1 KiB of anything.
pub(super) fn lease_name(names: &Names) -> String {
    let pair = seal::join(&[names.provider.as_str().as_bytes(), names.subject.as_str().as_bytes()]);
    hex(&Sha256::digest(&pair))
}

/// Lock files stay: one that is removed while another process opens it would be locked twice.
fn lock_file(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Runs `work` where it may block. It runs to its end even if nobody waits for it any more.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await.map_err(tokio::task::JoinError::try_into_panic) {
        Ok(done) => done,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        Err(Err(stopped)) => Err(StoreError::Io { at: "the embedded store".into(), error: stopped.into() }),
    }
}

/// The directory, made if it may be; its real name, since SQLite is told to follow no link.
fn prepare(directory: &Path, create: bool) -> Result<PathBuf> {
    let failed = |error| StoreError::io(directory, error);
    match fs::metadata(directory) {
        Ok(metadata) if !metadata.is_dir() => {
            Err(StoreError::Permissions { at: directory.display().to_string(), why: "is not a directory" })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && !create => {
            Err(StoreError::Missing { at: file(directory).display().to_string(), log_left: false })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            super::make_directory(directory).and_then(|()| directory.canonicalize()).map_err(failed)
        }
        found => found.and_then(|_| directory.canonicalize()).map_err(failed),
    }
}

/// Whether there is a database that may be opened.
///
/// It is looked at, never opened and closed: that would drop the locks of this process's other connections (POSIX
/// fcntl locks belong to the process).
fn is_there(path: &Path) -> Result<bool> {
    let refused = |why| Err(StoreError::Permissions { at: path.display().to_string(), why });
    // The log first: whoever makes a store right now makes its log last.
    let log = path.with_extension("db-wal");
    let log_left = log.try_exists().map_err(|error| StoreError::io(&log, error))?;
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && log_left => {
            return Err(StoreError::Missing { at: path.display().to_string(), log_left });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        found => found.map_err(|error| StoreError::io(path, error))?,
    };
    match metadata {
        link if link.is_symlink() => refused("is a symbolic link"),
        other if !other.is_file() => refused("is not a regular file"),
        open if open.mode() & 0o007 != 0 => refused("is open to every user of this machine"),
        // Ours gets its name only when it has its tables.
        empty if empty.len() == 0 => {
            Err(StoreError::Corrupt { at: path.display().to_string(), what: "it is empty".into() })
        }
        _ => Ok(true),
    }
}

/// Makes a database under a name of its own and then gives it its name, so that no other process and no crash ever
/// sees half of one. When another process was quicker, its database is the one.
fn make(path: &Path, check: &[u8]) -> Result<()> {
    let failed = |error| StoreError::io(path, error);
    // Mode 0600, which SQLite gives to its log beside it too.
    let file = tempfile::Builder::new().prefix(".new-").tempfile_in(super::parent(path)).map_err(failed)?;
    let file = file.into_temp_path();
    let fill = || {
        let mut connection = connect(&file)?;
        write_ahead(&connection)?;
        connection.pragma_update(None, "application_id", APPLICATION_ID)?;
        migrate(&mut connection)?;
        connection.execute("INSERT INTO meta VALUES (?)", [check])?;
        connection.close().map_err(|(_, error)| error)
    };
    fill().map_err(|error| classify(path, error))?;
    fs::File::open(&file).and_then(|file| file.sync_all()).map_err(failed)?;
    super::settle(file, path).map(|_| ()).map_err(failed)
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // A commit is on the disk when it returns: a rotated refresh token exists nowhere else.
    connection.pragma_update(None, "synchronous", "FULL")?;
    Ok(connection)
}

/// Readers and one writer at once, also from other processes. The file remembers it.
fn write_ahead(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")
}

/// Brings the schema up to date. Whoever comes second at the same time finds it done.
fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    if schema(connection)? == SCHEMA {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let done = usize::try_from(schema(&transaction)?).unwrap_or_default();
    for step in MIGRATIONS.iter().skip(done) {
        transaction.execute_batch(step)?;
    }
    transaction.pragma_update(None, "user_version", SCHEMA)?;
    transaction.commit()
}

fn schema(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

fn classify(path: &Path, error: rusqlite::Error) -> StoreError {
    let at = path.display().to_string();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Busy { at },
        Some(ErrorCode::DiskFull) => StoreError::Full { at },
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            StoreError::Permissions { at, why: "cannot be written" }
        }
        Some(ErrorCode::NotADatabase) => StoreError::Corrupt { at, what: "it is no SQLite database".into() },
        Some(ErrorCode::DatabaseCorrupt) => StoreError::Corrupt { at, what: error.to_string() },
        Some(_) => StoreError::Io { at, error: error.into() },
        // No code: the file is sound to SQLite, but a value in it is not of its column's type.
        None => StoreError::Corrupt { at, what: error.to_string() },
    }
}

/// The database file of a store's directory.
pub(super) fn file(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

const FILE: &str = "sidebearer.db";
/// `SdBr`, in the file's header: says whose file it is to `file` and to us.
const APPLICATION_ID: i64 = 0x5364_4272;
/// How often it is looked whether another connection has written.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Whole rows. Scopes that belong to an earlier grant of the same user, which an older release has replaced, are left out.
const GRANTS: &str = "SELECT grants.*, further.scopes AS further_scopes FROM grants
    LEFT JOIN further USING (provider, subject, stored_at)";
const FORGET_FURTHER: &str = "DELETE FROM further WHERE provider = ? AND subject = ?";

/// The highest generation that a user has had at a provider.
const LAST_GENERATION: &str = "SELECT max(generation) FROM (
    SELECT generation FROM grants WHERE provider = ?1 AND subject = ?2
    UNION ALL SELECT generation FROM removed WHERE provider = ?1 AND subject = ?2)";

/// What leads from each schema to the next. Released ones never change. A sidecar of the release before may be running,
/// and writes all columns of `grants` without their names: what is new goes into tables of its own.
const MIGRATIONS: [&str; 3] = [
    "
    CREATE TABLE meta (key_check BLOB NOT NULL) STRICT;
    CREATE TABLE sealed (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE grants (
        provider TEXT NOT NULL,
        subject TEXT NOT NULL,
        generation INTEGER NOT NULL,
        target TEXT NOT NULL,           -- JSON
        refresh_token BLOB,             -- sealed
        access_token BLOB,              -- sealed
        obtained_at INTEGER,            -- this and the other times: milliseconds since 1970
        expires_at INTEGER,
        granted_scopes TEXT,            -- JSON
        state TEXT NOT NULL,
        reason TEXT,
        intent_hash BLOB,
        intent_at INTEGER,
        renewed_at INTEGER,
        stored_at INTEGER NOT NULL,
        PRIMARY KEY (provider, subject)
    ) STRICT, WITHOUT ROWID;
",
    "
    ALTER TABLE grants ADD COLUMN further_scopes TEXT;      -- JSON
    CREATE TABLE removed (
        provider TEXT NOT NULL,
        subject TEXT NOT NULL,
        generation INTEGER NOT NULL,    -- the last one that was there
        PRIMARY KEY (provider, subject)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE flows (
        id BLOB PRIMARY KEY,            -- SHA-256 of the state
        content BLOB NOT NULL,          -- sealed
        expires_at INTEGER NOT NULL,
        taken INTEGER NOT NULL          -- how often
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX flows_by_end ON flows (expires_at);
",
    "
    CREATE TABLE further (
        provider TEXT NOT NULL,
        subject TEXT NOT NULL,
        stored_at INTEGER NOT NULL,     -- of the grant that they belong to
        scopes TEXT NOT NULL,           -- JSON
        PRIMARY KEY (provider, subject)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO further
        SELECT provider, subject, stored_at, further_scopes FROM grants WHERE further_scopes IS NOT NULL;
    ALTER TABLE grants DROP COLUMN further_scopes;
    ALTER TABLE flows ADD COLUMN provider TEXT;
    ALTER TABLE flows ADD COLUMN subject TEXT;
    CREATE INDEX flows_by_user ON flows (provider, subject);
",
];
const SCHEMA: i64 = MIGRATIONS.len() as i64;

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn new() -> (TempDir, Database, Record) {
        let directory = tempfile::tempdir().unwrap();
        let mut database = Database::open(directory.path(), Some(vec![0; 60])).unwrap();
        let record = Record {
            names: Names::parse("github", "").unwrap(),
            generation: 1,
            target: "{}".into(),
            refresh_token: Some(vec![1; 60]),
            access_token: None,
            obtained_at: None,
            expires_at: None,
            granted_scopes: None,
            further_scopes: None,
            state: StateRecord { state: "connected".into(), reason: None },
            intent: None,
            renewed_at: None,
            stored_at: 0,
        };
        database.put(&record, None).unwrap();
        (directory, database, record)
    }

    #[test]
    fn a_full_disk_is_said_to_be_full_and_changes_nothing() {
        // TOK-021, TOK-022
        let (_directory, mut database, row) = new();
        database.connection.pragma_update(None, "max_page_count", 1).unwrap();
        let long = Record { generation: 2, refresh_token: Some(vec![1; 1 << 16]), ..row.clone() };
        assert_eq!(database.put(&long, Some(1)).unwrap_err().code(), "store_full");
        assert_eq!(database.grant(&row.names).unwrap(), Some(row));
        database.connection.pragma_update(None, "max_page_count", 1_000_000).unwrap();
        assert!(database.put(&long, Some(1)).unwrap());
    }

    #[test]
    fn a_store_that_cannot_be_written_says_so_before_a_token_is_redeemed() {
        // TOK-021
        let (_directory, database, row) = new();
        database.connection.pragma_update(None, "query_only", true).unwrap();
        let intent = IntentRecord { hash: [0; 32], at: 0 };
        let error = database.intend(&row.names, 1, &intent).unwrap_err();
        assert_eq!(error.to_string(), format!("the store `{}` cannot be written", database.path.display()));
        assert_eq!(database.grant(&row.names).unwrap(), Some(row));
    }

    #[test]
    fn another_s_long_transaction_makes_it_busy() {
        let (directory, mut database, row) = new();
        let other = Connection::open(directory.path().canonicalize().unwrap().join(FILE)).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        database.connection.busy_timeout(Duration::from_millis(20)).unwrap();
        assert_eq!(database.remove(&row.names).unwrap_err().code(), "store_busy");
        assert!(database.grant(&row.names).unwrap().is_some(), "readers do not wait");
    }

    #[test]
    fn a_commit_is_synced_to_the_disk() {
        // TOK-023; also after a backup was put back, which has lost the journal mode.
        let (directory, database, _) = new();
        database.connection.pragma_update(None, "journal_mode", "DELETE").unwrap();
        drop(database);
        let database = Database::open(directory.path(), None).unwrap();
        let pragma = |name| database.connection.pragma_query_value(None, name, |row| row.get::<_, String>(0));
        let synchronous: i64 = database.connection.pragma_query_value(None, "synchronous", |row| row.get(0)).unwrap();
        assert_eq!((pragma("journal_mode").unwrap().as_str(), synchronous), ("wal", 2));
    }

    #[test]
    fn a_value_of_the_wrong_type_is_told_by_its_column() {
        // TOK-025
        for (sql, column) in [
            ("UPDATE grants SET generation = -1", "generation"),
            ("UPDATE grants SET intent_hash = x'01'", "intent_hash"),
            ("UPDATE grants SET intent_hash = zeroblob(32)", "intent_at"),
        ] {
            let (_directory, database, row) = new();
            database.connection.execute_batch(sql).unwrap();
            match database.grant(&row.names) {
                Err(StoreError::CorruptValue { column: told, .. }) => assert_eq!(told, column),
                other => panic!("{sql}: {other:?}"),
            }
        }
    }
}
