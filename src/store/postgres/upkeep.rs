//! Looks after the shared store: all of it at once, for rotating keys and for moving to another engine.

use std::time::Duration;

use deadpool_postgres::{ClientWrapper, Transaction};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{IsolationLevel, Row};

use super::super::engine::{Names, Plan, Resealed, Result, Slot, Snapshot};
use super::{Done, PUT_FIRST, PUT_NEXT, PUT_SEALED, Parameters, Postgres, REPLACE_SEALED, Values, signed};

impl Postgres {
    pub(super) async fn all_of_it(&self) -> Result<Snapshot> {
        let [meta, grants, removed, own, flows] = self.work(ALL, everything).await?;
        let grant = |row| {
            let cells = self.cells(row)?;
            Ok((cells.names.clone(), cells.record()))
        };
        let removed_one = |row| {
            let cells = self.cells(row)?;
            Ok((cells.names.clone(), cells.generation()?))
        };
        let secret = |row| Ok((self.get(row, "name")?, self.get(row, "value")?));
        let flow = |row| Ok((self.get(row, "id")?, self.get(row, "content")?));
        Ok(Snapshot {
            key_check: meta.first().map(|row| self.get(row, "key_check")).transpose()?,
            grants: grants.iter().map(grant).collect::<Result<_>>()?,
            removed: removed.iter().map(removed_one).collect::<Result<_>>()?,
            own: own.iter().map(secret).collect::<Result<_>>()?,
            flows: flows.iter().map(flow).collect::<Result<_>>()?,
        })
    }

    pub(super) async fn replace_seals(&self, batch: &[Resealed]) -> Result<usize> {
        self.work(BATCH, async |connection| {
            let transaction = connection.transaction().await?;
            let mut replaced = 0;
            for value in batch {
                replaced += replace(&transaction, value).await?;
            }
            transaction.commit().await.map(|()| replaced)
        })
        .await
    }

    pub(super) async fn write_all(&self, plan: &Plan) -> Result<bool> {
        self.work(ALL, async |connection| {
            let transaction = connection.transaction().await?;
            if !self.write_grants(&transaction, plan).await? || !write_secrets(&transaction, plan).await? {
                return transaction.rollback().await.map(|()| false);
            }
            for (names, generation) in &plan.removed {
                let (provider, subject) = (names.provider.as_str(), names.subject.as_str());
                let generation = signed(*generation);
                let parameters: Parameters<'_> =
                    &[(&provider, Type::TEXT), (&subject, Type::TEXT), (&generation, Type::INT8)];
                transaction.query_typed(REMEMBER, parameters).await?;
            }
            transaction.commit().await.map(|()| true)
        })
        .await
    }

    async fn write_grants(&self, transaction: &Transaction<'_>, plan: &Plan) -> Done<bool> {
        for (record, previous) in &plan.grants {
            let values = Values::of(record, self.news(&record.names));
            let mut parameters = values.parameters();
            let previous = previous.map(signed);
            if let Some(previous) = &previous {
                parameters.push((previous, Type::INT8));
            }
            let sql = if previous.is_some() { PUT_NEXT } else { PUT_FIRST };
            if transaction.query_typed(sql, &parameters).await?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The rows of each table, all as of one moment.
async fn everything(connection: &mut ClientWrapper) -> Done<[Vec<Row>; 5]> {
    let begin = connection.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
    let transaction = begin.start().await?;
    transaction.batch_execute("SET LOCAL statement_timeout = '60s'").await?;
    let mut all = [const { Vec::new() }; 5];
    for (rows, sql) in all.iter_mut().zip(EVERYTHING) {
        *rows = transaction.query_typed(sql, &[]).await?;
    }
    transaction.commit().await.map(|()| all)
}

async fn write_secrets(transaction: &Transaction<'_>, plan: &Plan) -> Done<bool> {
    for (name, value, previous) in &plan.own {
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> = vec![(name, Type::TEXT), (value, Type::BYTEA)];
        if let Some(previous) = previous {
            parameters.push((previous, Type::BYTEA));
        }
        let sql = if previous.is_some() { REPLACE_SEALED } else { PUT_SEALED };
        if transaction.query_typed(sql, &parameters).await?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn replace(transaction: &Transaction<'_>, Resealed { slot, from, to }: &Resealed) -> Done<usize> {
    let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> = vec![(from, Type::BYTEA), (to, Type::BYTEA)];
    let (provider, subject) = match slot {
        Slot::RefreshToken(Names { provider, subject }) | Slot::AccessToken(Names { provider, subject }) => {
            (provider.as_str(), subject.as_str())
        }
        _ => ("", ""),
    };
    let sql = match slot {
        Slot::KeyCheck => "UPDATE sidebearer.meta SET key_check = $2 WHERE key_check = $1 RETURNING 1",
        Slot::Own(name) => {
            parameters.push((name, Type::TEXT));
            "UPDATE sidebearer.sealed SET value = $2 WHERE name = $3 AND value = $1 RETURNING 1"
        }
        Slot::Flow(id) => {
            parameters.push((id, Type::BYTEA));
            "UPDATE sidebearer.flows SET content = $2 WHERE id = $3 AND content = $1 RETURNING 1"
        }
        Slot::RefreshToken(_) | Slot::AccessToken(_) => {
            parameters.extend([(&provider as &(dyn ToSql + Sync), Type::TEXT), (&subject, Type::TEXT)]);
            if matches!(slot, Slot::RefreshToken(_)) { RESEAL_REFRESH_TOKEN } else { RESEAL_ACCESS_TOKEN }
        }
    };
    transaction.query_typed(sql, &parameters).await.map(|rows| rows.len())
}

/// How long reading or writing a whole store may take.
const ALL: Duration = Duration::from_secs(600);
/// How long a batch may take: others wait for its rows.
const BATCH: Duration = Duration::from_secs(10);

const EVERYTHING: [&str; 5] = [
    "SELECT key_check FROM sidebearer.meta",
    r#"SELECT * FROM sidebearer.grants ORDER BY provider COLLATE "C", subject COLLATE "C""#,
    r#"SELECT * FROM sidebearer.removed ORDER BY provider COLLATE "C", subject COLLATE "C""#,
    r#"SELECT name, value FROM sidebearer.sealed ORDER BY name COLLATE "C""#,
    "SELECT id, content FROM sidebearer.flows ORDER BY id",
];
const RESEAL_REFRESH_TOKEN: &str = "UPDATE sidebearer.grants SET refresh_token = $2
    WHERE provider = $3 AND subject = $4 AND refresh_token = $1 RETURNING 1";
const RESEAL_ACCESS_TOKEN: &str = "UPDATE sidebearer.grants SET access_token = $2
    WHERE provider = $3 AND subject = $4 AND access_token = $1 RETURNING 1";
const REMEMBER: &str = "INSERT INTO sidebearer.removed AS there (provider, subject, generation) VALUES ($1, $2, $3)
    ON CONFLICT (provider, subject) DO UPDATE SET generation = greatest(there.generation, excluded.generation)";
