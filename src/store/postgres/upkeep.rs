//! Looks after the shared store: all of it at once, for rotating keys and for moving to another engine.

use std::time::Duration;

use deadpool_postgres::{ClientWrapper, Object, Transaction};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{IsolationLevel, Row};

use super::super::engine::{Names, Resealed, Result, Slot, Snapshot};
use super::Postgres;

type Done<T> = std::result::Result<T, tokio_postgres::Error>;

impl Postgres {
    pub(super) async fn all_of_it(&self) -> Result<Snapshot> {
        let mut connection = self.own_connection().await?;
        let [meta, grants, own, flows] = self.in_time(ALL, everything(&mut connection)).await?;
        let grant = |row| {
            let cells = self.cells(row)?;
            Ok((cells.names.clone(), cells.record()))
        };
        let secret = |row| Ok((self.get(row, "name")?, self.get(row, "value")?));
        let flow = |row| Ok((self.get(row, "id")?, self.get(row, "content")?));
        Ok(Snapshot {
            key_check: meta.first().map(|row| self.get(row, "key_check")).transpose()?,
            grants: grants.iter().map(grant).collect::<Result<_>>()?,
            own: own.iter().map(secret).collect::<Result<_>>()?,
            flows: flows.iter().map(flow).collect::<Result<_>>()?,
        })
    }

    pub(super) async fn replace_seals(&self, batch: &[Resealed]) -> Result<usize> {
        let mut connection = self.own_connection().await?;
        let work = async {
            let transaction = connection.transaction().await?;
            let mut replaced = 0;
            for value in batch {
                replaced += replace(&transaction, value).await?;
            }
            transaction.commit().await.map(|()| replaced)
        };
        self.in_time(BATCH, work).await
    }

    /// A connection that goes with its user: whatever becomes of the work, nobody gets it in the middle of something.
    async fn own_connection(&self) -> Result<ClientWrapper> {
        self.connection().await.map(Object::take)
    }

    async fn in_time<T>(&self, most: Duration, work: impl Future<Output = Done<T>>) -> Result<T> {
        match tokio::time::timeout(most, work).await {
            Ok(done) => done.map_err(|error| self.failed(&error)),
            Err(_) => Err(self.away(format!("no answer within {} s", most.as_secs()))),
        }
    }
}

/// The rows of each table, all as of one moment.
async fn everything(connection: &mut ClientWrapper) -> Done<[Vec<Row>; 4]> {
    let begin = connection.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
    let transaction = begin.start().await?;
    transaction.batch_execute("SET LOCAL statement_timeout = '60s'").await?;
    let mut all = [const { Vec::new() }; 4];
    for (rows, sql) in all.iter_mut().zip(EVERYTHING) {
        *rows = transaction.query_typed(sql, &[]).await?;
    }
    transaction.commit().await.map(|()| all)
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

const EVERYTHING: [&str; 4] = [
    "SELECT key_check FROM sidebearer.meta",
    r#"SELECT * FROM sidebearer.grants ORDER BY provider COLLATE "C", subject COLLATE "C""#,
    r#"SELECT name, value FROM sidebearer.sealed ORDER BY name COLLATE "C""#,
    "SELECT id, content FROM sidebearer.flows ORDER BY id",
];
const RESEAL_REFRESH_TOKEN: &str = "UPDATE sidebearer.grants SET refresh_token = $2
    WHERE provider = $3 AND subject = $4 AND refresh_token = $1 RETURNING 1";
const RESEAL_ACCESS_TOKEN: &str = "UPDATE sidebearer.grants SET access_token = $2
    WHERE provider = $3 AND subject = $4 AND access_token = $1 RETURNING 1";
