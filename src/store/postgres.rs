//! The shared engine: PostgreSQL, for many sidecars on many machines.
//!
//! Every change is one statement or one transaction, and a commit is on the server's disk before it is confirmed
//! (`synchronous_commit` is raised to `on` where it is less). A statement whose answer is lost may have been carried out:
//! that is an error, and the caller looks. All times of leases are the server's.

mod changes;
mod schema;
mod upkeep;
mod url;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use deadpool_postgres::{
    ClientWrapper, Connect, Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime,
    TimeoutType,
};
use futures_util::future::BoxFuture;
use rustls::ClientConfig;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Client, Config, Connection, Row, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::engine::{
    Changes, Count, Engine, FlowRecord, Gone, Held, Intended, IntentRecord, Names, Owner, Plan, Record, Resealed,
    Result, Snapshot, StateRecord, TakenRecord,
};
use super::record::hex;
use super::{Most, StoreError};
use crate::names::ProviderName;

pub use url::{ServerUrl, UrlError};

/// A pool of connections to one database. A clone shares it.
#[derive(Clone)]
pub(super) struct Postgres {
    inner: Arc<Inner>,
}

struct Inner {
    pool: Pool,
    servers: Servers,
    at: String,
    /// Who we are among those who tell each other of changes.
    origin: String,
    /// Until when nobody tries to connect, after one could not, and why.
    down: Mutex<Option<(Instant, String)>>,
}

type Parameters<'a> = &'a [(&'a (dyn ToSql + Sync), Type)];
type Done<T> = std::result::Result<T, tokio_postgres::Error>;

impl Postgres {
    /// Connects, and brings the schema up to date; makes it, with this key check, where there is none.
    pub async fn open(server: &ServerUrl, tls: ClientConfig, create: Option<Vec<u8>>) -> Result<Self> {
        let at = server.to_string();
        let mut origin = Owner::default();
        getrandom::fill(&mut origin).map_err(|error| StoreError::Io { at: at.clone(), error: error.into() })?;
        let servers = Servers { each: server.each(), tls: MakeRustlsConnect::new(tls) };
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let pool = Pool::builder(Manager::from_connect(Config::new(), servers.clone(), recycling))
            .max_size(CONNECTIONS)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(DEADLINE))
            .create_timeout(Some(servers.patience()))
            .recycle_timeout(Some(DEADLINE))
            .post_create(Hook::async_fn(|client, _| {
                Box::pin(async move { client.batch_execute(SESSION).await.map_err(HookError::Backend) })
            }))
            .build()
            .expect("a pool with timeouts has a runtime");
        let origin = hex(&origin);
        let postgres = Self { inner: Arc::new(Inner { pool, servers, at, origin, down: Mutex::default() }) };
        postgres.migrate(create).await?;
        Ok(postgres)
    }

    /// A connection, for as long as it is needed.
    async fn connection(&self) -> Result<Object> {
        let Inner { pool, servers, down, .. } = &*self.inner;
        let down = || down.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.status().available == 0
            && let Some((until, why)) = &*down()
            && Instant::now() < *until
        {
            return Err(self.away(why.clone()));
        }
        let error = match pool.get().await {
            Ok(connection) => return Ok(connection),
            Err(PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error))) => {
                self.failed(&error)
            }
            Err(PoolError::Timeout(TimeoutType::Create)) => {
                self.away(format!("no connection within {} s", servers.patience().as_secs()))
            }
            Err(other) => return Err(self.away(other.to_string())),
        };
        if let StoreError::Away { why, .. } = &error {
            // A server that starts up is not to be met by everybody at once.
            *down() = Some((Instant::now() + CONNECT_REST, why.clone()));
        }
        Err(error)
    }

    /// Some work on a connection, as long as it takes at most.
    async fn work<T>(&self, most: Duration, work: impl AsyncFnOnce(&mut ClientWrapper) -> Done<T>) -> Result<T> {
        let mut connection = self.connection().await?;
        match tokio::time::timeout(most, work(&mut connection)).await {
            Ok(done) => done.map_err(|error| self.failed(&error)),
            Err(_) => {
                // Nobody knows what state it is in; and if it was cut unnoticed, so were those that are not in use.
                drop(Object::take(connection));
                self.inner.pool.retain(|_, _| false);
                Err(self.away(format!("no answer within {} s", most.as_secs())))
            }
        }
    }

    async fn in_time<T>(&self, most: Duration, work: impl Future<Output = Done<T>>) -> Result<T> {
        match tokio::time::timeout(most, work).await {
            Ok(done) => done.map_err(|error| self.failed(&error)),
            Err(_) => Err(self.away(format!("no answer within {} s", most.as_secs()))),
        }
    }

    /// One statement.
    async fn query(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>> {
        self.work(DEADLINE, async |connection| connection.query_typed(sql, parameters).await).await
    }

    /// A statement that changes nothing. One more try is harmless: a pooled connection may have been cut unnoticed.
    async fn read(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>> {
        match self.query(sql, parameters).await {
            Err(StoreError::Away { .. }) => self.query(sql, parameters).await,
            done => done,
        }
    }

    /// A statement during which nobody else does anything of this kind to the grant.
    async fn alone(&self, names: &Names, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>> {
        self.work(DEADLINE, async |connection| {
            let transaction = connection.transaction().await?;
            let (provider, subject) = (names.provider.as_str(), names.subject.as_str());
            transaction.query_typed(ALONE, &[(&provider, Type::TEXT), (&subject, Type::TEXT)]).await?;
            // A statement of its own: it sees what others had done when the lock came.
            let rows = transaction.query_typed(sql, parameters).await?;
            transaction.commit().await.map(|()| rows)
        })
        .await
    }

    async fn release(&self, names: &Names, owner: Owner) -> Result<()> {
        let (provider, subject, owner) = (names.provider.as_str(), names.subject.as_str(), &owner[..]);
        let parameters: Parameters<'_> = &[(&provider, Type::TEXT), (&subject, Type::TEXT), (&owner, Type::BYTEA)];
        self.query(RELEASE, parameters).await.map(|_| ())
    }

    /// What is told to others of a change to this grant.
    fn news(&self, names: &Names) -> String {
        changes::news(&self.inner.origin, names)
    }

    fn cells<'a>(&'a self, row: &'a Row) -> Result<Cells<'a>> {
        let (provider, subject): (&str, &str) = (self.get(row, "provider")?, self.get(row, "subject")?);
        let none = || StoreError::Corrupt { at: self.inner.at.clone(), what: "a row has a name that is none".into() };
        Ok(Cells { postgres: self, row, names: Names::parse(provider, subject).ok_or_else(none)? })
    }

    fn get<'a, T: FromSql<'a>>(&self, row: &'a Row, column: &str) -> Result<T> {
        row.try_get(column).map_err(|error| self.failed(&error))
    }

    fn away(&self, why: String) -> StoreError {
        StoreError::Away { at: self.inner.at.clone(), why }
    }

    fn failed(&self, error: &tokio_postgres::Error) -> StoreError {
        let at = self.inner.at.clone();
        let Some(said) = error.as_db_error() else {
            let why = reasons(error);
            return match certificate(error) || why.ends_with("password missing") {
                true => StoreError::Denied { at, why },
                false => StoreError::Away { at, why },
            };
        };
        let why = said.message().to_owned();
        match said.code() {
            code if code.code().starts_with("28") => StoreError::Denied { at, why },
            &SqlState::INSUFFICIENT_PRIVILEGE
            | &SqlState::INVALID_CATALOG_NAME
            | &SqlState::READ_ONLY_SQL_TRANSACTION => StoreError::Denied { at, why },
            &SqlState::DISK_FULL => StoreError::Full { at },
            &SqlState::DATA_CORRUPTED | &SqlState::INDEX_CORRUPTED => StoreError::Corrupt { at, what: why },
            // Operator intervention, insufficient resources, a lock or a statement that took too long.
            code if ["57", "53", "55", "08", "40"].iter().any(|class| code.code().starts_with(class)) => {
                StoreError::Away { at, why }
            }
            code => StoreError::Io { at, error: format!("{why} (SQLSTATE {})", code.code()).into() },
        }
    }
}

#[async_trait]
impl Engine for Postgres {
    fn at(&self) -> &str {
        &self.inner.at
    }

    async fn key_check(&self) -> Result<Option<Vec<u8>>> {
        let rows = self.read("SELECT key_check FROM sidebearer.meta", &[]).await?;
        rows.first().map(|row| self.get(row, "key_check")).transpose()
    }

    async fn grant(&self, names: &Names) -> Result<Option<Record>> {
        let sql = "SELECT * FROM sidebearer.grants WHERE provider = $1 AND subject = $2";
        let (provider, subject) = (names.provider.as_str(), names.subject.as_str());
        let rows = self.read(sql, &[(&provider, Type::TEXT), (&subject, Type::TEXT)]).await?;
        rows.first().map(|row| self.cells(row)?.record()).transpose()
    }

    async fn grants(&self) -> Result<Vec<(Names, Result<Record>)>> {
        let sql = r#"SELECT * FROM sidebearer.grants ORDER BY provider COLLATE "C", subject COLLATE "C""#;
        let rows = self.read(sql, &[]).await?;
        let record = |row| {
            let cells = self.cells(row)?;
            Ok((cells.names.clone(), cells.record()))
        };
        rows.iter().map(record).collect()
    }

    async fn census(&self) -> Result<Vec<Count>> {
        let sql = "SELECT provider, target, state, reason, count(*) AS grants FROM sidebearer.grants
                   GROUP BY provider, target, state, reason";
        let count = |row| {
            let grants: i64 = self.get(row, "grants")?;
            Ok(Count {
                provider: self.get(row, "provider")?,
                target: self.get(row, "target")?,
                state: StateRecord { state: self.get(row, "state")?, reason: self.get(row, "reason")? },
                grants: grants.unsigned_abs(),
            })
        };
        self.read(sql, &[]).await?.iter().map(count).collect()
    }

    async fn generations(&self, of: &[Names]) -> Result<HashMap<Names, u64>> {
        if of.is_empty() {
            return Ok(HashMap::new());
        }
        let providers: Vec<&str> = of.iter().map(|names| names.provider.as_str()).collect();
        let subjects: Vec<&str> = of.iter().map(|names| names.subject.as_str()).collect();
        let sql = "SELECT provider, subject, generation FROM sidebearer.grants
                   JOIN unnest($1, $2) AS asked (provider, subject) USING (provider, subject)";
        let rows = self.read(sql, &[(&providers, Type::TEXT_ARRAY), (&subjects, Type::TEXT_ARRAY)]).await?;
        let generation = |row| {
            let cells = self.cells(row)?;
            Ok((cells.names.clone(), cells.generation()?))
        };
        rows.iter().map(generation).collect()
    }

    async fn put(&self, record: &Record, previous: Option<u64>) -> Result<bool> {
        let values = Values::of(record, self.news(&record.names));
        let previous = previous.map(signed);
        let mut parameters = values.parameters();
        let sql = match &previous {
            None => PUT_FIRST,
            Some(previous) => {
                parameters.push((previous, Type::INT8));
                PUT_NEXT
            }
        };
        Ok(!self.query(sql, &parameters).await?.is_empty())
    }

    async fn replace(&self, record: &Record) -> Result<u64> {
        let values = Values::of(record, self.news(&record.names));
        let rows = self.alone(&record.names, REPLACE, &values.parameters()).await?;
        let generation = rows.first().map(|row| self.get::<i64>(row, "generation")).transpose()?;
        Ok(generation.unwrap_or_default().unsigned_abs())
    }

    async fn remove(&self, names: &Names) -> Result<Option<Gone>> {
        let (provider, subject, news) = (names.provider.as_str(), names.subject.as_str(), self.news(names));
        let parameters: Parameters<'_> = &[(&provider, Type::TEXT), (&subject, Type::TEXT), (&news, Type::TEXT)];
        let rows = self.alone(names, REMOVE, parameters).await?;
        let gone = |row| {
            let (refresh_token, access_token) = (self.get(row, "refresh_token")?, self.get(row, "access_token")?);
            Ok(Gone { target: self.get(row, "target")?, refresh_token, access_token })
        };
        rows.first().map(gone).transpose()
    }

    async fn intend(&self, names: &Names, generation: u64, intent: &IntentRecord, owner: Owner) -> Result<Intended> {
        let (provider, subject) = (names.provider.as_str(), names.subject.as_str());
        let (hash, owner, generation) = (&intent.hash[..], &owner[..], signed(generation));
        let parameters: Parameters<'_> = &[
            (&provider, Type::TEXT),
            (&subject, Type::TEXT),
            (&owner, Type::BYTEA),
            (&LEASE_TO_REDEEM.as_secs_f64(), Type::FLOAT8),
            (&generation, Type::INT8),
            (&hash, Type::BYTEA),
            (&intent.at, Type::INT8),
        ];
        let rows = self.query(INTEND, parameters).await?;
        let counts = rows.first().map(|row| Ok((self.get::<i64>(row, "held")?, self.get::<i64>(row, "written")?)));
        Ok(match counts.transpose()?.unwrap_or_default() {
            (0, _) => Intended::LeaseLost,
            (_, 0) => Intended::Moved,
            _ => Intended::Done,
        })
    }

    async fn mark(&self, names: &Names, generation: u64, intent: &IntentRecord, state: &StateRecord) -> Result<bool> {
        let (provider, subject, generation) = (names.provider.as_str(), names.subject.as_str(), signed(generation));
        let hash = &intent.hash[..];
        let sql = "UPDATE sidebearer.grants SET state = $4, reason = $5, intent_hash = NULL, intent_at = NULL
                   WHERE provider = $1 AND subject = $2 AND generation = $3 AND intent_hash = $6 AND intent_at = $7
                   RETURNING 1";
        let parameters: Parameters<'_> = &[
            (&provider, Type::TEXT),
            (&subject, Type::TEXT),
            (&generation, Type::INT8),
            (&state.state, Type::TEXT),
            (&state.reason, Type::TEXT),
            (&hash, Type::BYTEA),
            (&intent.at, Type::INT8),
        ];
        Ok(!self.query(sql, parameters).await?.is_empty())
    }

    async fn mark_all(&self, provider: &ProviderName, from: &str, to: &StateRecord) -> Result<()> {
        let provider = provider.as_str();
        let parameters: Parameters<'_> =
            &[(&provider, Type::TEXT), (&from, Type::TEXT), (&to.state, Type::TEXT), (&to.reason, Type::TEXT)];
        self.query(MARK_ALL, parameters).await.map(|_| ())
    }

    async fn lease(&self, names: &Names, owner: Owner) -> Result<Option<Held>> {
        let (provider, subject, taker) = (names.provider.as_str(), names.subject.as_str(), &owner[..]);
        let parameters: Parameters<'_> = &[
            (&provider, Type::TEXT),
            (&subject, Type::TEXT),
            (&taker, Type::BYTEA),
            (&LEASE_TO_INTEND.as_secs_f64(), Type::FLOAT8),
        ];
        let rows = self.query(LEASE, parameters).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let guard = RowLease { postgres: self.clone(), names: names.clone(), owner, runtime: Handle::current() };
        Ok(Some(Held { inherited: self.get(row, "inherited")?, _guard: Box::new(guard) }))
    }

    async fn prolong(&self, names: &Names, owner: Owner) -> Result<bool> {
        let (provider, subject, owner) = (names.provider.as_str(), names.subject.as_str(), &owner[..]);
        let parameters: Parameters<'_> = &[
            (&provider, Type::TEXT),
            (&subject, Type::TEXT),
            (&owner, Type::BYTEA),
            (&LEASE_TO_SAVE.as_secs_f64(), Type::FLOAT8),
        ];
        Ok(!self.query(PROLONG, parameters).await?.is_empty())
    }

    async fn put_flow(&self, flow: &FlowRecord, most: Most, now: i64) -> Result<()> {
        let (provider, subject, id) = (flow.names.provider.as_str(), flow.names.subject.as_str(), &flow.id[..]);
        let others = |most: usize| i64::try_from(most.saturating_sub(1)).unwrap_or(i64::MAX);
        let parameters: Parameters<'_> = &[
            (&id, Type::BYTEA),
            (&flow.content, Type::BYTEA),
            (&flow.expires_at, Type::INT8),
            (&provider, Type::TEXT),
            (&subject, Type::TEXT),
            (&now, Type::INT8),
            (&others(most.of_one), Type::INT8),
            (&others(most.flows), Type::INT8),
        ];
        self.query(PUT_FLOW, parameters).await.map(|_| ())
    }

    async fn take_flow(&self, id: [u8; 32]) -> Result<Option<TakenRecord>> {
        let sql = "UPDATE sidebearer.flows SET taken = taken + 1 WHERE id = $1 RETURNING content, expires_at, taken";
        let rows = self.query(sql, &[(&&id[..], Type::BYTEA)]).await?;
        let taken = |row| {
            let (content, expires_at) = (self.get(row, "content")?, self.get(row, "expires_at")?);
            Ok(TakenRecord { content, expires_at, times: self.get(row, "taken")? })
        };
        rows.first().map(taken).transpose()
    }

    async fn sealed(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let rows = self.read("SELECT value FROM sidebearer.sealed WHERE name = $1", &[(&name, Type::TEXT)]).await?;
        rows.first().map(|row| self.get(row, "value")).transpose()
    }

    async fn put_sealed(&self, name: &str, value: &[u8], previous: Option<&[u8]>) -> Result<bool> {
        let sql = if previous.is_some() { REPLACE_SEALED } else { PUT_SEALED };
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> = vec![(&name, Type::TEXT), (&value, Type::BYTEA)];
        if let Some(previous) = &previous {
            parameters.push((previous, Type::BYTEA));
        }
        Ok(!self.query(sql, &parameters).await?.is_empty())
    }

    async fn changes(&self) -> Box<dyn Changes> {
        Box::new(changes::listen(self.clone()))
    }

    async fn snapshot(&self) -> Result<Snapshot> {
        self.all_of_it().await
    }

    async fn reseal(&self, batch: &[Resealed]) -> Result<usize> {
        self.replace_seals(batch).await
    }

    async fn carry_out(&self, plan: &Plan) -> Result<bool> {
        self.write_all(plan).await
    }
}

/// A row whose names are known, so that what is wrong with the rest can be said of them.
struct Cells<'a> {
    postgres: &'a Postgres,
    row: &'a Row,
    names: Names,
}

impl<'a> Cells<'a> {
    fn record(&self) -> Result<Record> {
        Ok(Record {
            names: self.names.clone(),
            generation: self.generation()?,
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

    fn generation(&self) -> Result<u64> {
        u64::try_from(self.get::<i64>("generation")?).map_err(|_| self.corrupt("generation"))
    }

    fn intent(&self) -> Result<Option<IntentRecord>> {
        let Some(hash) = self.get::<Option<&[u8]>>("intent_hash")? else { return Ok(None) };
        let hash = hash.try_into().map_err(|_| self.corrupt("intent_hash"))?;
        Ok(Some(IntentRecord { hash, at: self.get("intent_at")? }))
    }

    fn get<T: FromSql<'a>>(&self, column: &'static str) -> Result<T> {
        self.row.try_get(column).map_err(|_| self.corrupt(column))
    }

    fn corrupt(&self, column: &'static str) -> StoreError {
        StoreError::corrupt_value(&self.postgres.inner.at, self.names.place(column))
    }
}

/// A record in the form in which it is sent.
struct Values<'a> {
    record: &'a Record,
    provider: &'a str,
    subject: &'a str,
    generation: i64,
    intent_hash: Option<&'a [u8]>,
    intent_at: Option<i64>,
    news: String,
}

impl<'a> Values<'a> {
    fn of(record: &'a Record, news: String) -> Self {
        Self {
            record,
            provider: record.names.provider.as_str(),
            subject: record.names.subject.as_str(),
            generation: signed(record.generation),
            intent_hash: record.intent.as_ref().map(|intent| &intent.hash[..]),
            intent_at: record.intent.as_ref().map(|intent| intent.at),
            news,
        }
    }

    /// `$1` to `$17`: what is told of the change, then the columns in the table's order.
    fn parameters(&self) -> Vec<(&(dyn ToSql + Sync), Type)> {
        let record = self.record;
        vec![
            (&self.news, Type::TEXT),
            (&self.provider, Type::TEXT),
            (&self.subject, Type::TEXT),
            (&self.generation, Type::INT8),
            (&record.target, Type::TEXT),
            (&record.refresh_token, Type::BYTEA),
            (&record.access_token, Type::BYTEA),
            (&record.obtained_at, Type::INT8),
            (&record.expires_at, Type::INT8),
            (&record.granted_scopes, Type::TEXT),
            (&record.further_scopes, Type::TEXT),
            (&record.state.state, Type::TEXT),
            (&record.state.reason, Type::TEXT),
            (&self.intent_hash, Type::BYTEA),
            (&self.intent_at, Type::INT8),
            (&record.renewed_at, Type::INT8),
            (&record.stored_at, Type::INT8),
        ]
    }
}

/// Gives a lease back.
struct RowLease {
    postgres: Postgres,
    names: Names,
    owner: Owner,
    runtime: Handle,
}

impl Drop for RowLease {
    fn drop(&mut self) {
        let (postgres, names, owner) = (self.postgres.clone(), self.names.clone(), self.owner);
        self.runtime.spawn(async move {
            if let Err(error) = postgres.release(&names, owner).await {
                // It ends by itself, only later.
                tracing::debug!(%error, "a lease could not be given back");
            }
        });
    }
}

/// The servers of a database, the first that answers first.
#[derive(Clone)]
struct Servers {
    each: Vec<Config>,
    tls: MakeRustlsConnect,
}

type Connected = (Client, Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>);

impl Servers {
    /// Connects to the first that takes writes. One that is silent holds up the next for [`PER_SERVER`]; if none says
    /// anything, this does not return.
    async fn reach(&self) -> Done<Connected> {
        let mut said = None;
        for server in &self.each {
            match tokio::time::timeout(PER_SERVER, server.connect(self.tls.clone())).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(error)) => said = Some(error),
                Err(_) => {}
            }
        }
        match said {
            Some(error) => Err(error),
            None => std::future::pending().await,
        }
    }

    /// How long to wait for all of them.
    fn patience(&self) -> Duration {
        PER_SERVER * u32::try_from(self.each.len()).unwrap_or(1) + Duration::from_secs(1)
    }
}

impl Connect for Servers {
    fn connect(&self, _: &Config) -> BoxFuture<'_, Done<(Client, JoinHandle<()>)>> {
        Box::pin(async move {
            let (client, connection) = self.reach().await?;
            // It ends with an error when the server goes; whoever uses the client is told.
            Ok((client, tokio::spawn(async move { drop(connection.await) })))
        })
    }
}

/// No generation comes near the limit.
fn signed(generation: u64) -> i64 {
    i64::try_from(generation).unwrap_or(i64::MAX)
}

/// An error and what it was caused by, in one line.
fn reasons(error: &tokio_postgres::Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |error| error.source());
    causes.fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.ends_with(&cause) { text } else { format!("{text}: {cause}") }
    })
}

/// Whether the server could not prove who it is.
fn certificate(error: &tokio_postgres::Error) -> bool {
    let mut causes = std::iter::successors(std::error::Error::source(error), |error| error.source());
    causes.any(|cause| {
        let inner = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        cause.is::<rustls::Error>() || inner.is_some_and(|inner| inner.is::<rustls::Error>())
    })
}

/// How long a lease lasts before there is an intent: time to read a row and write one. Whoever stands still for longer
/// has lost it, and has done nothing yet.
const LEASE_TO_INTEND: Duration = Duration::from_secs(5);
/// How long it lasts from the intent on: until the refresh token is sent, the call's deadline after it (SEMANTICS C19).
const LEASE_TO_REDEEM: Duration = Duration::from_secs(35);
/// How long it lasts at least from a moment in which its holder shows that it goes on: until the next such moment.
const LEASE_TO_SAVE: Duration = Duration::from_secs(20);
/// How long the server may take for anything.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long one of several servers may take to let us in.
const PER_SERVER: Duration = Duration::from_secs(4);
/// How long nobody tries to connect after somebody could not.
const CONNECT_REST: Duration = Duration::from_millis(500);
const CONNECTIONS: usize = 8;

/// What a connection begins with. A sidecar that is gone in the middle of a transaction must not hold up the others, and no
/// name is looked for where another user of the database may have put something.
const SESSION: &str = "SET search_path = ''; SET default_transaction_isolation = 'read committed';
    SET statement_timeout = '5s'; SET lock_timeout = '4s'; SET idle_in_transaction_session_timeout = '10s';
    SELECT pg_catalog.set_config('synchronous_commit', 'on', false)
        WHERE pg_catalog.current_setting('synchronous_commit') IN ('off', 'local');";

/// With types that fit exactly, so that nobody else's function fits better.
const ALONE: &str = "SELECT pg_catalog.pg_advisory_xact_lock(
    pg_catalog.hashtextextended($2, pg_catalog.hashtextextended($1, 1396851314::bigint)))";

/// Whoever writes a row ends the lease on it: its holder has read an older row, and can do no more than find that out.
const PUT_FIRST: &str = "WITH written AS (INSERT INTO sidebearer.grants VALUES
        ($2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17) ON CONFLICT DO NOTHING RETURNING 1)
    SELECT pg_notify('sidebearer', $1) FROM written";

const PUT_NEXT: &str = "WITH written AS (UPDATE sidebearer.grants SET generation = $4, target = $5, refresh_token = $6,
        access_token = $7, obtained_at = $8, expires_at = $9, granted_scopes = $10, further_scopes = $11, state = $12,
        reason = $13, intent_hash = $14, intent_at = $15, renewed_at = $16, stored_at = $17
        WHERE provider = $2 AND subject = $3 AND generation = $18 RETURNING 1),
    ended AS (DELETE FROM sidebearer.leases WHERE provider = $2 AND subject = $3 AND EXISTS (SELECT FROM written))
    SELECT pg_notify('sidebearer', $1) FROM written";

const REPLACE: &str = "WITH last AS (
        SELECT max(generation) AS generation FROM (
            SELECT generation FROM sidebearer.grants WHERE provider = $2 AND subject = $3
            UNION ALL SELECT generation FROM sidebearer.removed WHERE provider = $2 AND subject = $3) AS all_there_were),
    written AS (INSERT INTO sidebearer.grants AS there SELECT
        $2, $3, coalesce(last.generation, 0) + 1, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17 FROM last
        ON CONFLICT (provider, subject) DO UPDATE SET
            generation = greatest(there.generation + 1, excluded.generation), target = $5, refresh_token = $6,
            access_token = $7, obtained_at = $8, expires_at = $9, granted_scopes = $10, further_scopes = $11, state = $12,
            reason = $13, intent_hash = $14, intent_at = $15, renewed_at = $16, stored_at = $17
        RETURNING generation),
    back AS (DELETE FROM sidebearer.removed WHERE provider = $2 AND subject = $3),
    ended AS (DELETE FROM sidebearer.leases WHERE provider = $2 AND subject = $3)
    SELECT generation, pg_notify('sidebearer', $1) FROM written";

const REMOVE: &str = "WITH gone AS (DELETE FROM sidebearer.grants WHERE provider = $1 AND subject = $2
        RETURNING generation, target, refresh_token, access_token),
    remembered AS (INSERT INTO sidebearer.removed SELECT $1, $2, generation FROM gone
        ON CONFLICT (provider, subject) DO UPDATE SET generation = excluded.generation),
    ended AS (DELETE FROM sidebearer.leases WHERE provider = $1 AND subject = $2)
    SELECT target, refresh_token, access_token, pg_notify('sidebearer', $3) FROM gone";

const PUT_SEALED: &str =
    "INSERT INTO sidebearer.sealed (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING 1";
const REPLACE_SEALED: &str = "UPDATE sidebearer.sealed SET value = $2 WHERE name = $1 AND value = $3 RETURNING 1";

const LEASE: &str = "INSERT INTO sidebearer.leases AS there (provider, subject, owner, expires_at, inherited)
    VALUES ($1, $2, $3, clock_timestamp() + make_interval(secs => $4), false)
    ON CONFLICT (provider, subject) DO UPDATE
        SET owner = excluded.owner, expires_at = clock_timestamp() + make_interval(secs => $4), inherited = true
        WHERE there.expires_at <= clock_timestamp()
    RETURNING inherited";

const PROLONG: &str = "UPDATE sidebearer.leases
    SET expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => $4))
    WHERE provider = $1 AND subject = $2 AND owner = $3 AND expires_at > clock_timestamp() RETURNING 1";

/// A row that another one is writing gets a state from that one.
const MARK_ALL: &str = "WITH free AS (SELECT subject FROM sidebearer.grants WHERE provider = $1 AND state = $2
        FOR UPDATE SKIP LOCKED)
    UPDATE sidebearer.grants SET state = $3, reason = $4
        WHERE provider = $1 AND state = $2 AND subject IN (SELECT subject FROM free)";

/// The grant is locked before its lease, as by whoever writes one. From now on what is left open is this owner's.
const INTEND: &str = "WITH there AS (SELECT FROM sidebearer.grants WHERE provider = $1 AND subject = $2 FOR UPDATE),
    held AS (UPDATE sidebearer.leases
        SET expires_at = clock_timestamp() + make_interval(secs => $4), inherited = false
        WHERE provider = $1 AND subject = $2 AND owner = $3 AND expires_at > clock_timestamp()
            AND EXISTS (SELECT FROM there) RETURNING 1),
    written AS (UPDATE sidebearer.grants SET intent_hash = $6, intent_at = $7
        WHERE provider = $1 AND subject = $2 AND generation = $5 AND EXISTS (SELECT FROM held) RETURNING 1)
    SELECT (SELECT count(*) FROM held) AS held, (SELECT count(*) FROM written) AS written";

/// One that was inherited, and never used for an intent, is inherited by the next one, too.
const RELEASE: &str = "WITH left_as_it_was AS (UPDATE sidebearer.leases SET expires_at = clock_timestamp()
        WHERE provider = $1 AND subject = $2 AND owner = $3 AND inherited)
    DELETE FROM sidebearer.leases WHERE provider = $1 AND subject = $2 AND owner = $3 AND NOT inherited";

const PUT_FLOW: &str = "WITH beyond AS (SELECT id FROM sidebearer.flows
        WHERE expires_at > $6 AND provider = $4 AND subject = $5 ORDER BY expires_at DESC OFFSET $7),
    kept AS (SELECT id FROM sidebearer.flows
        WHERE expires_at > $6 AND id NOT IN (SELECT id FROM beyond) ORDER BY expires_at DESC LIMIT $8),
    ended AS (DELETE FROM sidebearer.flows WHERE id NOT IN (SELECT id FROM kept))
    INSERT INTO sidebearer.flows (id, content, expires_at, taken, provider, subject) VALUES ($1, $2, $3, 0, $4, $5)";
