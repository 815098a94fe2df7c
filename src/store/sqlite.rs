//! The store's one engine so far: SQLite, which lets a sidecar and the command line write at the same time.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::types::FromSql;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior, named_params, params};
use serde::{Deserialize, Serialize};

use super::key::Keyring;
use super::seal::{self, Place, Unopened};
use super::{Access, Flow, Intent, Listed, Most, Put, Removed, Row, State, StoreError, Taken};
use crate::names::{ProviderName, Subject};
use crate::oauth::Target;
use crate::secret::Secret;

/// One connection to the file, with the keys to what is in it.
pub(super) struct Database {
    connection: Connection,
    keys: Keyring,
    path: PathBuf,
}

type Result<T> = std::result::Result<T, StoreError>;

impl Database {
    pub fn open(directory: &Path, keys: Keyring, create: bool) -> Result<Self> {
        let directory = prepare(directory, create)?;
        let path = file(&directory);
        if !is_there(&path)? {
            if !create {
                return Err(StoreError::Missing { path, log_left: false });
            }
            make(&path, &keys)?;
            is_there(&path)?;
        }
        let connection = connect(&path).map_err(|error| classify(&path, error))?;
        let mut database = Self { connection, keys, path };
        database.identify()?;
        // Only now: a file of another program's must not be changed.
        database.sql(write_ahead(&database.connection))?;
        database.examine()?;
        database.migrate()?;
        database.check_key()?;
        Ok(database)
    }

    /// Where it is, by its real name.
    pub fn directory(&self) -> &Path {
        super::parent(&self.path)
    }

    pub fn grant(&self, provider: &ProviderName, subject: &Subject) -> Result<Option<Row>> {
        let mut statement =
            self.sql(self.connection.prepare(&format!("{GRANTS} WHERE provider = ? AND subject = ?")))?;
        let mut rows = self.sql(statement.query([provider.as_str(), subject.as_str()]))?;
        let row = self.sql(rows.next())?;
        row.map(|row| Cells { database: self, row, provider, subject }.read()).transpose()
    }

    pub fn grants(&self) -> Result<Vec<Listed>> {
        let mut statement = self.sql(self.connection.prepare(&format!("{GRANTS} ORDER BY provider, subject")))?;
        let mut rows = self.sql(statement.query([]))?;
        let mut listed = Vec::new();
        while let Some(row) = self.sql(rows.next())? {
            let (provider, subject): (String, String) = (self.sql(row.get("provider"))?, self.sql(row.get("subject"))?);
            let (Ok(provider), Ok(subject)) = (provider.parse(), Subject::from_row(&subject)) else {
                return Err(self.corrupt("a row has a name that is none".into()));
            };
            let read = Cells { database: self, row, provider: &provider, subject: &subject }.read();
            listed.push((provider, subject, read));
        }
        Ok(listed)
    }

    pub fn put(&mut self, row: &Row, previous: Option<u64>) -> Result<Put> {
        // Sealed before the lock is taken, which others wait for.
        let refresh_token = self.seal(row, "refresh_token", row.refresh_token.as_ref())?;
        let access_token = self.seal(row, "access_token", row.access.as_ref().map(|access| &access.token))?;
        let path = self.path.clone();
        let failed = |error| classify(&path, error);
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let stored: Option<u64> = transaction
            .query_row(
                "SELECT generation FROM grants WHERE provider = ? AND subject = ?",
                [row.provider.as_str(), row.subject.as_str()],
                |stored| stored.get(0),
            )
            .optional()
            .map_err(failed)?;
        if stored != previous {
            drop(transaction);
            let stored = self.grant(&row.provider, &row.subject)?;
            return Ok(stored.map_or(Put::Gone, |row| Put::Stale(Box::new(row))));
        }
        write(&transaction, row, refresh_token, access_token).and_then(|()| transaction.commit()).map_err(failed)?;
        Ok(Put::Done)
    }

    pub fn replace(&mut self, row: &Row) -> Result<u64> {
        let refresh_token = self.seal(row, "refresh_token", row.refresh_token.as_ref())?;
        let access_token = self.seal(row, "access_token", row.access.as_ref().map(|access| &access.token))?;
        let names = [row.provider.as_str(), row.subject.as_str()];
        let path = self.path.clone();
        let mut replace = || {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let last: Option<u64> = transaction.query_row(LAST_GENERATION, names, |last| last.get(0))?;
            let row = Row { generation: last.map_or(1, |last| last + 1), ..row.clone() };
            write(&transaction, &row, refresh_token.clone(), access_token.clone())?;
            transaction.execute("DELETE FROM removed WHERE provider = ? AND subject = ?", names)?;
            transaction.commit()?;
            Ok(row.generation)
        };
        replace().map_err(|error| classify(&path, error))
    }

    pub fn remove(&mut self, provider: &ProviderName, subject: &Subject) -> Result<Option<Removed>> {
        let names = [provider.as_str(), subject.as_str()];
        let path = self.path.clone();
        let failed = |error| classify(&path, error);
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let found = transaction.query_row(
            "DELETE FROM grants WHERE provider = ? AND subject = ? RETURNING generation, refresh_token, access_token",
            names,
            |row| Ok((row.get::<_, u64>(0)?, row.get::<_, Option<Vec<u8>>>(1)?, row.get::<_, Option<Vec<u8>>>(2)?)),
        );
        let Some((generation, refresh_token, access_token)) = found.optional().map_err(failed)? else {
            return Ok(None);
        };
        let remember = "INSERT OR REPLACE INTO removed VALUES (?, ?, ?)";
        let remembered = transaction.execute(remember, params![names[0], names[1], generation]);
        let forgotten = transaction.execute(FORGET_FURTHER, names);
        remembered.and(forgotten).and_then(|_| transaction.commit()).map_err(failed)?;
        let open = |column, sealed: Option<Vec<u8>>| {
            let place = Place { provider: names[0], subject: names[1], column };
            sealed.and_then(|sealed| self.unseal(place, &sealed).ok())
        };
        let (refresh_token, access_token) = (open("refresh_token", refresh_token), open("access_token", access_token));
        Ok(Some(Removed { refresh_token, access_token }))
    }

    pub fn generations(&self) -> Result<HashMap<(ProviderName, Subject), u64>> {
        let mut statement = self.sql(self.connection.prepare("SELECT provider, subject, generation FROM grants"))?;
        let mut rows = self.sql(statement.query([]))?;
        let mut generations = HashMap::new();
        while let Some(row) = self.sql(rows.next())? {
            let names: (String, String) = (self.sql(row.get(0))?, self.sql(row.get(1))?);
            if let (Ok(provider), Ok(subject)) = (names.0.parse(), Subject::from_row(&names.1)) {
                generations.insert((provider, subject), self.sql(row.get(2))?);
            }
        }
        Ok(generations)
    }

    pub fn put_flow(
        &mut self,
        flow: &Flow,
        (provider, subject): (&ProviderName, &Subject),
        most: Most,
        now: SystemTime,
    ) -> Result<()> {
        let content = seal_at(&self.path, &self.keys, flow_place(&hex(&flow.id)), &flow.content)?;
        let path = self.path.clone();
        let mut put = || {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute("DELETE FROM flows WHERE expires_at <= ?", [to_milliseconds(now)])?;
            let (provider, subject) = (provider.as_str(), subject.as_str());
            let others = |most: usize| i64::try_from(most.saturating_sub(1)).unwrap_or(i64::MAX);
            let oldest_of_one = "DELETE FROM flows WHERE id IN (SELECT id FROM flows WHERE provider = ? AND subject = ?
                                 ORDER BY expires_at DESC LIMIT -1 OFFSET ?)";
            transaction.execute(oldest_of_one, params![provider, subject, others(most.of_one)])?;
            let oldest =
                "DELETE FROM flows WHERE id IN (SELECT id FROM flows ORDER BY expires_at DESC LIMIT -1 OFFSET ?)";
            transaction.execute(oldest, [others(most.flows)])?;
            transaction.execute(
                "INSERT INTO flows (id, content, expires_at, taken, provider, subject) VALUES (?, ?, ?, 0, ?, ?)",
                params![flow.id, content, to_milliseconds(flow.expires_at), provider, subject],
            )?;
            transaction.commit()
        };
        put().map_err(|error| classify(&path, error))
    }

    pub fn take_flow(&self, id: &[u8; 32], now: SystemTime) -> Result<Taken> {
        let taken = self.connection.query_row(
            "UPDATE flows SET taken = taken + 1 WHERE id = ? RETURNING content, expires_at, taken",
            [id],
            |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?)),
        );
        let Some((content, expires_at, taken)) = self.sql(taken.optional())? else { return Ok(Taken::No) };
        if expires_at <= to_milliseconds(now) {
            return Ok(Taken::Expired);
        }
        let content = self.unseal(flow_place(&hex(id)), &content)?;
        let flow = Flow { id: *id, content, expires_at: from_milliseconds(expires_at) };
        Ok(if taken == 1 { Taken::Flow(flow) } else { Taken::Again(flow) })
    }

    pub fn intend(&self, provider: &ProviderName, subject: &Subject, generation: u64, intent: &Intent) -> Result<()> {
        let changed = self.connection.execute(
            "UPDATE grants SET intent_hash = ?, intent_at = ? WHERE provider = ? AND subject = ? AND generation = ?",
            params![
                intent.refresh_token_hash,
                to_milliseconds(intent.at),
                provider.as_str(),
                subject.as_str(),
                generation
            ],
        );
        self.moved_unless_one(changed, provider, subject)
    }

    pub fn mark(&self, provider: &ProviderName, subject: &Subject, generation: u64, state: &State) -> Result<()> {
        let (state, reason) = state_to_text(state);
        let changed = self.connection.execute(
            "UPDATE grants SET state = ?, reason = ?, intent_hash = NULL, intent_at = NULL
             WHERE provider = ? AND subject = ? AND generation = ?",
            params![state, reason, provider.as_str(), subject.as_str(), generation],
        );
        self.moved_unless_one(changed, provider, subject)
    }

    pub fn sealed(&self, name: &str) -> Result<Option<Secret>> {
        let value = self.connection.query_row("SELECT value FROM sealed WHERE name = ?", [name], |row| row.get(0));
        let value: Option<Vec<u8>> = self.sql(value.optional())?;
        value.map(|value| self.unseal(Place { provider: "", subject: "", column: name }, &value)).transpose()
    }

    pub fn put_sealed(&self, name: &str, value: &Secret) -> Result<()> {
        let sealed = seal_at(&self.path, &self.keys, Place { provider: "", subject: "", column: name }, value)?;
        let put = self.connection.execute("INSERT OR REPLACE INTO sealed VALUES (?, ?)", params![name, sealed]);
        self.sql(put).map(|_| ())
    }

    pub fn revision(&self) -> Result<u64> {
        self.sql(self.connection.pragma_query_value(None, "data_version", |row| row.get(0)))
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
            return Err(StoreError::NewerSchema { path: self.path.clone(), found, known: SCHEMA });
        }
        Ok(())
    }

    fn examine(&self) -> Result<()> {
        let verdict: String = self.sql(self.connection.pragma_query_value(None, "quick_check", |row| row.get(0)))?;
        if verdict == "ok" { Ok(()) } else { Err(self.corrupt(verdict)) }
    }

    fn migrate(&mut self) -> Result<()> {
        let migrated = migrate(&mut self.connection);
        self.sql(migrated)
    }

    fn check_key(&self) -> Result<()> {
        let check = self.connection.query_row("SELECT key_check FROM meta", [], |row| row.get(0));
        let check: Option<Vec<u8>> = self.sql(check.optional())?;
        let check = check.ok_or_else(|| self.corrupt("its key check is gone".into()))?;
        let value = self.unseal(KEY_CHECK, &check)?;
        if seal::key_id(&check) == Some(self.keys.first().id) {
            return Ok(());
        }
        // Under the new first key from now on, or the old key could never be retired.
        let sealed = seal_at(&self.path, &self.keys, KEY_CHECK, &value)?;
        self.sql(self.connection.execute("UPDATE meta SET key_check = ?", [sealed])).map(|_| ())
    }

    fn seal(&self, row: &Row, column: &str, secret: Option<&Secret>) -> Result<Option<Vec<u8>>> {
        let place = Place { provider: row.provider.as_str(), subject: row.subject.as_str(), column };
        secret.map(|secret| seal_at(&self.path, &self.keys, place, secret)).transpose()
    }

    fn unseal(&self, place: Place<'_>, sealed: &[u8]) -> Result<Secret> {
        let path = self.path.clone();
        seal::open(&self.keys, place, sealed).map_err(|unopened| match unopened {
            Unopened::UnknownKey(sealed_with) => StoreError::WrongKey { path, sealed_with, keys: self.keys.ids() },
            Unopened::Damaged => self.corrupt_value(place),
        })
    }

    fn moved_unless_one(
        &self,
        changed: rusqlite::Result<usize>,
        provider: &ProviderName,
        subject: &Subject,
    ) -> Result<()> {
        match self.sql(changed)? {
            0 => Err(StoreError::Moved { provider: provider.clone(), subject: subject.clone() }),
            _ => Ok(()),
        }
    }

    fn sql<T>(&self, result: rusqlite::Result<T>) -> Result<T> {
        result.map_err(|error| classify(&self.path, error))
    }

    fn corrupt(&self, what: String) -> StoreError {
        StoreError::Corrupt { path: self.path.clone(), what }
    }

    fn corrupt_value(&self, place: Place<'_>) -> StoreError {
        StoreError::CorruptValue {
            path: self.path.clone(),
            provider: place.provider.into(),
            subject: place.subject.into(),
            column: place.column.into(),
        }
    }
}

/// A row of `grants` whose names are known, so that what is wrong with the rest can be said of them.
struct Cells<'a> {
    database: &'a Database,
    row: &'a rusqlite::Row<'a>,
    provider: &'a ProviderName,
    subject: &'a Subject,
}

impl Cells<'_> {
    fn read(&self) -> Result<Row> {
        Ok(Row {
            provider: self.provider.clone(),
            subject: self.subject.clone(),
            generation: self.get("generation")?,
            target: self.json::<StoredTarget>("target")?.ok_or_else(|| self.corrupt("target"))?.into(),
            refresh_token: self.secret("refresh_token")?,
            access: self.access()?,
            granted_scopes: self.json("granted_scopes")?,
            further_scopes: self.json("further_scopes")?.unwrap_or_default(),
            state: self.state()?,
            intent: self.intent()?,
            renewed_at: self.time("renewed_at")?,
            stored_at: self.time("stored_at")?.ok_or_else(|| self.corrupt("stored_at"))?,
        })
    }

    fn access(&self) -> Result<Option<Access>> {
        let Some(token) = self.secret("access_token")? else { return Ok(None) };
        let obtained_at = self.time("obtained_at")?.ok_or_else(|| self.corrupt("obtained_at"))?;
        Ok(Some(Access { token, obtained_at, expires_at: self.time("expires_at")? }))
    }

    fn state(&self) -> Result<State> {
        let reason = self.get::<Option<String>>("reason")?.unwrap_or_default();
        match &*self.get::<String>("state")? {
            CONNECTED => Ok(State::Connected),
            REAUTHORIZE => Ok(State::Reauthorize { reason }),
            FIX_CONFIGURATION => Ok(State::FixConfiguration { reason }),
            _ => Err(self.corrupt("state")),
        }
    }

    fn intent(&self) -> Result<Option<Intent>> {
        let Some(refresh_token_hash) = self.get("intent_hash")? else { return Ok(None) };
        let at = self.time("intent_at")?.ok_or_else(|| self.corrupt("intent_at"))?;
        Ok(Some(Intent { refresh_token_hash, at }))
    }

    fn secret(&self, column: &'static str) -> Result<Option<Secret>> {
        let place = Place { provider: self.provider.as_str(), subject: self.subject.as_str(), column };
        self.get::<Option<Vec<u8>>>(column)?.map(|sealed| self.database.unseal(place, &sealed)).transpose()
    }

    fn json<T: for<'de> Deserialize<'de>>(&self, column: &'static str) -> Result<Option<T>> {
        let text = self.get::<Option<String>>(column)?;
        text.map(|text| serde_json::from_str(&text).map_err(|_| self.corrupt(column))).transpose()
    }

    fn time(&self, column: &'static str) -> Result<Option<SystemTime>> {
        Ok(self.get::<Option<i64>>(column)?.map(from_milliseconds))
    }

    fn get<T: FromSql>(&self, column: &'static str) -> Result<T> {
        self.row.get(column).map_err(|_| self.corrupt(column))
    }

    fn corrupt(&self, column: &str) -> StoreError {
        let place = Place { provider: self.provider.as_str(), subject: self.subject.as_str(), column };
        self.database.corrupt_value(place)
    }
}

fn write(
    connection: &Connection,
    row: &Row,
    refresh_token: Option<Vec<u8>>,
    access_token: Option<Vec<u8>>,
) -> rusqlite::Result<()> {
    let (state, reason) = state_to_text(&row.state);
    let access = row.access.as_ref();
    connection.execute(
        "INSERT OR REPLACE INTO grants (provider, subject, generation, target, refresh_token, access_token,
         obtained_at, expires_at, granted_scopes, state, reason, intent_hash, intent_at, renewed_at, stored_at)
         VALUES (:provider, :subject, :generation, :target, :refresh_token, :access_token,
         :obtained_at, :expires_at, :granted_scopes, :state, :reason, :intent_hash, :intent_at, :renewed_at, :stored_at)",
        named_params! {
            ":provider": row.provider.as_str(),
            ":subject": row.subject.as_str(),
            ":generation": row.generation,
            ":target": to_json(&StoredTarget::from(&row.target)),
            ":refresh_token": refresh_token,
            ":access_token": access_token,
            ":obtained_at": access.map(|access| to_milliseconds(access.obtained_at)),
            ":expires_at": access.and_then(|access| access.expires_at).map(to_milliseconds),
            ":granted_scopes": row.granted_scopes.as_ref().map(to_json),
            ":state": state,
            ":reason": reason,
            ":intent_hash": row.intent.as_ref().map(|intent| intent.refresh_token_hash),
            ":intent_at": row.intent.as_ref().map(|intent| to_milliseconds(intent.at)),
            ":renewed_at": row.renewed_at.map(to_milliseconds),
            ":stored_at": to_milliseconds(row.stored_at),
        },
    )?;
    let names = [row.provider.as_str(), row.subject.as_str()];
    if row.further_scopes.is_empty() {
        return connection.execute(FORGET_FURTHER, names).map(|_| ());
    }
    connection.execute(
        "INSERT OR REPLACE INTO further (provider, subject, stored_at, scopes) VALUES (?, ?, ?, ?)",
        params![names[0], names[1], to_milliseconds(row.stored_at), to_json(&row.further_scopes)],
    )?;
    Ok(())
}

/// The directory, made if it may be; its real name, since SQLite is told to follow no link.
fn prepare(directory: &Path, create: bool) -> Result<PathBuf> {
    let failed = |error| StoreError::io(directory, error);
    match fs::metadata(directory) {
        Ok(metadata) if !metadata.is_dir() => {
            Err(StoreError::Permissions { path: directory.into(), why: "is not a directory" })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && !create => {
            Err(StoreError::Missing { path: file(directory), log_left: false })
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
    let refused = |why| Err(StoreError::Permissions { path: path.into(), why });
    // The log first: whoever makes a store right now makes its log last.
    let log = path.with_extension("db-wal");
    let log_left = log.try_exists().map_err(|error| StoreError::io(&log, error))?;
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && log_left => {
            return Err(StoreError::Missing { path: path.into(), log_left });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        found => found.map_err(|error| StoreError::io(path, error))?,
    };
    match metadata {
        link if link.is_symlink() => refused("is a symbolic link"),
        other if !other.is_file() => refused("is not a regular file"),
        open if open.mode() & 0o007 != 0 => refused("is open to every user of this machine"),
        // Ours gets its name only when it has its tables.
        empty if empty.len() == 0 => Err(StoreError::Corrupt { path: path.into(), what: "it is empty".into() }),
        _ => Ok(true),
    }
}

/// Makes a database under a name of its own and then gives it its name, so that no other process and no crash ever
/// sees half of one. When another process was quicker, its database is the one.
fn make(path: &Path, keys: &Keyring) -> Result<()> {
    let failed = |error| StoreError::io(path, error);
    let check = seal_at(path, keys, KEY_CHECK, &Secret::new("sidebearer"))?;
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

fn seal_at(path: &Path, keys: &Keyring, place: Place<'_>, secret: &Secret) -> Result<Vec<u8>> {
    seal::seal(keys, place, secret).map_err(|error| StoreError::Io { path: path.into(), error: error.into() })
}

fn classify(path: &Path, error: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Busy { path },
        Some(ErrorCode::DiskFull) => StoreError::Full { path },
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            StoreError::Permissions { path, why: "cannot be written" }
        }
        Some(ErrorCode::NotADatabase) => StoreError::Corrupt { path, what: "it is no SQLite database".into() },
        Some(ErrorCode::DatabaseCorrupt) => StoreError::Corrupt { path, what: error.to_string() },
        Some(_) => StoreError::Io { path, error: error.into() },
        // No code: the file is sound to SQLite, but a value in it is not of its column's type.
        None => StoreError::Corrupt { path, what: error.to_string() },
    }
}

fn state_to_text(state: &State) -> (&'static str, Option<&str>) {
    match state {
        State::Connected => (CONNECTED, None),
        State::Reauthorize { reason } => (REAUTHORIZE, Some(reason)),
        State::FixConfiguration { reason } => (FIX_CONFIGURATION, Some(reason)),
    }
}

/// [`Target`] as it is written down, whatever becomes of the type.
#[derive(Serialize, Deserialize)]
struct StoredTarget {
    scopes: Vec<String>,
    audience: Option<String>,
    resource: Vec<String>,
}

impl From<&Target> for StoredTarget {
    fn from(target: &Target) -> Self {
        let Target { scopes, audience, resource } = target.clone();
        Self { scopes, audience, resource }
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

fn to_milliseconds(time: SystemTime) -> i64 {
    let whole = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    time.duration_since(UNIX_EPOCH).map_or_else(|before| -whole(before.duration()), whole)
}

/// The reverse; a time that no clock can show is the start of 1970.
fn from_milliseconds(milliseconds: i64) -> SystemTime {
    let distance = Duration::from_millis(milliseconds.unsigned_abs());
    let time = if milliseconds < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    time.unwrap_or(UNIX_EPOCH)
}

/// Where a flow's content belongs: to its own state and no other.
fn flow_place(id: &str) -> Place<'_> {
    Place { provider: "", subject: id, column: "flow" }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The database file of a store's directory.
pub(super) fn file(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

const CONNECTED: &str = "connected";
const REAUTHORIZE: &str = "reauthorize";
const FIX_CONFIGURATION: &str = "fix_configuration";
const FILE: &str = "sidebearer.db";
/// `SdBr`, in the file's header: says whose file it is to `file` and to us.
const APPLICATION_ID: i64 = 0x5364_4272;
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Sealed at the start, so that a wrong key is told before there are rows.
const KEY_CHECK: Place<'_> = Place { provider: "", subject: "", column: "key_check" };

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
    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;
    use tempfile::TempDir;

    use super::*;

    fn new() -> (TempDir, Database, Row) {
        let directory = tempfile::tempdir().unwrap();
        let keys = Keyring::from_secrets(&[Secret::new(BASE64_STANDARD.encode([1; 32]))]).unwrap();
        let mut database = Database::open(directory.path(), keys, true).unwrap();
        let row = Row {
            refresh_token: Some(Secret::new("rt")),
            ..Row::new("github".parse().unwrap(), Subject::Client, Target::default(), UNIX_EPOCH)
        };
        database.put(&row, None).unwrap();
        (directory, database, row)
    }

    #[test]
    fn a_full_disk_is_said_to_be_full_and_changes_nothing() {
        // TOK-021, TOK-022
        let (_directory, mut database, row) = new();
        database.connection.pragma_update(None, "max_page_count", 1).unwrap();
        let long = Row { generation: 2, refresh_token: Some(Secret::new("x".repeat(1 << 16))), ..row.clone() };
        assert_eq!(database.put(&long, Some(1)).unwrap_err().code(), "store_full");
        assert_eq!(database.grant(&row.provider, &row.subject).unwrap(), Some(row));
        database.connection.pragma_update(None, "max_page_count", 1_000_000).unwrap();
        assert_eq!(database.put(&long, Some(1)).unwrap(), Put::Done);
    }

    #[test]
    fn a_store_that_cannot_be_written_says_so_before_a_token_is_redeemed() {
        // TOK-021
        let (_directory, database, row) = new();
        database.connection.pragma_update(None, "query_only", true).unwrap();
        let intent = Intent { refresh_token_hash: [0; 32], at: UNIX_EPOCH };
        let error = database.intend(&row.provider, &row.subject, 1, &intent).unwrap_err();
        assert_eq!(error.to_string(), format!("the store `{}` cannot be written", database.path.display()));
        assert_eq!(database.grant(&row.provider, &row.subject).unwrap(), Some(row));
    }

    #[test]
    fn another_s_long_transaction_makes_it_busy() {
        let (directory, mut database, row) = new();
        let other = Connection::open(directory.path().canonicalize().unwrap().join(FILE)).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        database.connection.busy_timeout(Duration::from_millis(20)).unwrap();
        assert_eq!(database.remove(&row.provider, &row.subject).unwrap_err().code(), "store_busy");
        assert!(database.grant(&row.provider, &row.subject).unwrap().is_some(), "readers do not wait");
    }

    #[test]
    fn a_commit_is_synced_to_the_disk() {
        // TOK-023; also after a backup was put back, which has lost the journal mode.
        let (directory, database, _) = new();
        database.connection.pragma_update(None, "journal_mode", "DELETE").unwrap();
        let keys = database.keys.clone();
        drop(database);
        let database = Database::open(directory.path(), keys, false).unwrap();
        let pragma = |name| database.connection.pragma_query_value(None, name, |row| row.get::<_, String>(0));
        let synchronous: i64 = database.connection.pragma_query_value(None, "synchronous", |row| row.get(0)).unwrap();
        assert_eq!((pragma("journal_mode").unwrap().as_str(), synchronous), ("wal", 2));
    }

    #[test]
    fn a_value_of_the_wrong_type_is_told_by_its_column() {
        // TOK-025
        for (sql, column) in [
            ("UPDATE grants SET target = '{'", "target"),
            ("UPDATE grants SET state = 'canary'", "state"),
            ("UPDATE grants SET generation = -1", "generation"),
            ("UPDATE grants SET refresh_token = x'01'", "refresh_token"),
            ("UPDATE grants SET intent_hash = x'01'", "intent_hash"),
            ("UPDATE grants SET intent_hash = zeroblob(32)", "intent_at"),
            ("UPDATE grants SET granted_scopes = '{}'", "granted_scopes"),
        ] {
            let (_directory, database, row) = new();
            database.connection.execute_batch(sql).unwrap();
            match database.grant(&row.provider, &row.subject) {
                Err(StoreError::CorruptValue { column: told, .. }) => assert_eq!(told, column),
                other => panic!("{sql}: {other:?}"),
            }
        }
    }

    #[test]
    fn no_time_is_out_of_range() {
        for milliseconds in [i64::MIN, -1, 0, 1, i64::MAX] {
            let time = from_milliseconds(milliseconds);
            assert!(time == UNIX_EPOCH || to_milliseconds(time) == milliseconds.max(-i64::MAX), "{milliseconds}");
        }
    }
}
