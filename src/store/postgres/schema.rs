//! The schema of the shared store: made and brought up to date by the first sidecar that needs it.

use tokio_postgres::types::Type;

use super::super::engine::Result;
use super::{DEADLINE, Object, Postgres, StoreError};

impl Postgres {
    /// Brings the schema up to date; makes it, with this key check, where there is none. Whoever comes second at the same
    /// time waits, and finds it done.
    pub(super) async fn migrate(&self, create: Option<Vec<u8>>) -> Result<()> {
        if self.version().await? == Some(SCHEMA) {
            return Ok(());
        }
        let mut connection = self.connection().await?;
        // Others may be at it, and wait for us in turn.
        let work = tokio::time::timeout(DEADLINE * 4, self.step_by_step(&mut connection, create));
        match work.await {
            Ok(done) => done,
            Err(_) => {
                drop(Object::take(connection));
                Err(self.away("the schema could not be made in time".into()))
            }
        }
    }

    async fn step_by_step(&self, connection: &mut Object, create: Option<Vec<u8>>) -> Result<()> {
        let failed = |error| self.failed(&error);
        let transaction = connection.transaction().await.map_err(failed)?;
        transaction.batch_execute(LOCK).await.map_err(failed)?;
        // Only now: another one may have done it while we waited for the lock.
        let done = match self.version().await? {
            Some(newer) if newer > SCHEMA => {
                return Err(StoreError::NewerSchema { at: self.inner.at.clone(), found: newer, known: SCHEMA });
            }
            Some(done) => done,
            None => 0,
        };
        if done == 0 && create.is_none() {
            return Err(StoreError::Missing { at: self.inner.at.clone(), log_left: false });
        }
        if done == 0 && !self.has_namespace().await? {
            transaction.batch_execute("CREATE SCHEMA sidebearer").await.map_err(failed)?;
        }
        for step in MIGRATIONS.iter().skip(usize::try_from(done).unwrap_or_default()) {
            transaction.batch_execute(step).await.map_err(failed)?;
        }
        if let (0, Some(check)) = (done, create) {
            let meta = "INSERT INTO sidebearer.meta (version, key_check) VALUES ($1, $2)";
            transaction.query_typed(meta, &[(&SCHEMA, Type::INT8), (&check, Type::BYTEA)]).await.map_err(failed)?;
        }
        let version = "UPDATE sidebearer.meta SET version = $1";
        transaction.query_typed(version, &[(&SCHEMA, Type::INT8)]).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    /// Which schema is there, if there is one.
    async fn version(&self) -> Result<Option<i64>> {
        let there = self.read("SELECT to_regclass('sidebearer.meta') IS NOT NULL AS there", &[]).await?;
        if !there.first().map(|row| self.get::<bool>(row, "there")).transpose()?.unwrap_or_default() {
            return Ok(None);
        }
        let rows = self.read("SELECT version FROM sidebearer.meta", &[]).await?;
        rows.first().map(|row| self.get(row, "version")).transpose()
    }

    /// Whether an administrator has made the namespace for us, who may not.
    async fn has_namespace(&self) -> Result<bool> {
        let rows = self.read("SELECT to_regnamespace('sidebearer') IS NOT NULL AS there", &[]).await?;
        rows.first().map(|row| self.get(row, "there")).transpose().map(Option::unwrap_or_default)
    }
}

/// One migration at a time, among all who use this database. `SdBr`, as in the embedded store's header.
const LOCK: &str =
    "SET LOCAL lock_timeout = '15s'; SET LOCAL statement_timeout = '15s'; SELECT pg_advisory_xact_lock(1396851314)";

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
