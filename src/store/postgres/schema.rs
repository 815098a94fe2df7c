//! The schema of the shared store: made and brought up to date by the first sidecar that needs it.

use deadpool_postgres::ClientWrapper;
use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

use super::super::engine::Result;
use super::{DEADLINE, Done, Postgres, StoreError};

/// Where bringing the schema up to date ends.
enum Found {
    /// It is as it should be.
    UpToDate,
    /// There is none, and none was to be made.
    Nothing,
    /// It was made by a later release.
    Newer(i64),
    /// The database could not hold every name.
    Encoding(String),
}

impl Postgres {
    /// Brings the schema up to date; makes it, with this key check, where there is none. Whoever comes second at the same
    /// time waits, and finds it done.
    pub(super) async fn migrate(&self, create: Option<Vec<u8>>) -> Result<()> {
        // Others may be at it, and wait for us in turn.
        let found = self.work(DEADLINE * 4, async |connection| bring_up_to_date(connection, create.as_deref()).await);
        let at = self.inner.at.clone();
        match found.await? {
            Found::UpToDate => Ok(()),
            Found::Nothing => Err(StoreError::Missing { at, log_left: false }),
            Found::Newer(found) => Err(StoreError::NewerSchema { at, found, known: SCHEMA }),
            Found::Encoding(encoding) => {
                Err(StoreError::Denied { at, why: format!("the database is in {encoding}, and has to be in UTF8") })
            }
        }
    }
}

async fn bring_up_to_date(connection: &mut ClientWrapper, create: Option<&[u8]>) -> Done<Found> {
    let transaction = connection.transaction().await?;
    if version(&*transaction).await? == Some(SCHEMA) {
        return Ok(Found::UpToDate);
    }
    transaction.batch_execute(LOCK).await?;
    // Again: another one may have done it while we waited for the lock.
    let done = match version(&*transaction).await? {
        Some(newer) if newer > SCHEMA => return Ok(Found::Newer(newer)),
        Some(done) => done,
        None if create.is_none() => return Ok(Found::Nothing),
        None => 0,
    };
    let encoding: String =
        transaction.query_one("SELECT pg_catalog.current_setting('server_encoding')", &[]).await?.try_get(0)?;
    if encoding != "UTF8" {
        return Ok(Found::Encoding(encoding));
    }
    // An administrator may have made it for us, who may not.
    if done == 0 && !is_there(&*transaction, NAMESPACE).await? {
        transaction.batch_execute("CREATE SCHEMA sidebearer").await?;
    }
    for step in MIGRATIONS.iter().skip(usize::try_from(done).unwrap_or_default()) {
        transaction.batch_execute(step).await?;
    }
    if let (0, Some(check)) = (done, create) {
        let meta = "INSERT INTO sidebearer.meta (version, key_check) VALUES ($1, $2)";
        transaction.query_typed(meta, &[(&SCHEMA, Type::INT8), (&check, Type::BYTEA)]).await?;
    }
    transaction.query_typed("UPDATE sidebearer.meta SET version = $1", &[(&SCHEMA, Type::INT8)]).await?;
    transaction.commit().await.map(|()| Found::UpToDate)
}

/// Which schema is there, if there is one.
async fn version(client: &(impl GenericClient + Sync)) -> Done<Option<i64>> {
    if !is_there(client, TABLE).await? {
        return Ok(None);
    }
    let row = client.query_opt("SELECT version FROM sidebearer.meta", &[]).await?;
    row.map(|row| row.try_get(0)).transpose()
}

/// Asked of the catalogue's tables: what `to_regclass` says may be as old as the transaction.
async fn is_there(client: &(impl GenericClient + Sync), what: &str) -> Done<bool> {
    client.query_one(what, &[]).await?.try_get(0)
}

const NAMESPACE: &str = "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'sidebearer')";
const TABLE: &str = "SELECT EXISTS (SELECT FROM pg_catalog.pg_class AS table_ JOIN pg_catalog.pg_namespace AS namespace
    ON namespace.oid = table_.relnamespace WHERE nspname = 'sidebearer' AND relname = 'meta')";

/// One migration at a time, among all who use this database. `SdBr`, as in the embedded store's header.
const LOCK: &str = "SET LOCAL lock_timeout = '15s'; SET LOCAL statement_timeout = '15s';
    SELECT pg_catalog.pg_advisory_xact_lock(1396851314::bigint)";

/// What leads from each schema to the next. Released ones never change, and what is new must leave a sidecar of the release
/// before working.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE sidebearer.meta (version bigint NOT NULL, key_check bytea NOT NULL);
    CREATE UNIQUE INDEX meta_has_one_row ON sidebearer.meta ((true));
    CREATE TABLE sidebearer.sealed (name text PRIMARY KEY, value bytea NOT NULL);
    CREATE TABLE sidebearer.grants (
        provider text NOT NULL,
        subject text NOT NULL,
        generation bigint NOT NULL,
        target text NOT NULL,           -- JSON
        refresh_token bytea,            -- sealed
        access_token bytea,             -- sealed
        obtained_at bigint,             -- this and the other times: milliseconds since 1970
        expires_at bigint,
        granted_scopes text,            -- JSON
        further_scopes text,            -- JSON
        state text NOT NULL,
        reason text,
        intent_hash bytea,
        intent_at bigint,
        renewed_at bigint,
        stored_at bigint NOT NULL,
        PRIMARY KEY (provider, subject)
    );
    CREATE TABLE sidebearer.removed (
        provider text NOT NULL,
        subject text NOT NULL,
        generation bigint NOT NULL,     -- the last one that was there
        PRIMARY KEY (provider, subject)
    );
    CREATE TABLE sidebearer.leases (
        provider text NOT NULL,
        subject text NOT NULL,
        owner bytea NOT NULL,
        expires_at timestamptz NOT NULL,
        inherited boolean NOT NULL,     -- taken from one who let its time pass
        PRIMARY KEY (provider, subject)
    );
    CREATE TABLE sidebearer.flows (
        id bytea PRIMARY KEY,           -- SHA-256 of the state
        content bytea NOT NULL,         -- sealed
        expires_at bigint NOT NULL,
        taken bigint NOT NULL,          -- how often
        provider text NOT NULL,
        subject text NOT NULL
    );
    CREATE INDEX flows_by_end ON sidebearer.flows (expires_at);
    CREATE INDEX flows_by_user ON sidebearer.flows (provider, subject);
"];
const SCHEMA: i64 = MIGRATIONS.len() as i64;
