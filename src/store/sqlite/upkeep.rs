//! Looks after the embedded store: all of it at once, for rotating keys and for moving to another engine.

use rusqlite::types::FromSql;
use rusqlite::{Connection, TransactionBehavior, params};

use super::super::engine::{Names, Plan, Resealed, Result, Slot, Snapshot};
use super::{Database, classify, put_sealed, write_after};

impl Database {
    pub(super) fn snapshot(&self) -> Result<Snapshot> {
        // Readers of one transaction see one moment, and keep no writer waiting.
        let reading = self.sql(self.connection.unchecked_transaction())?;
        let removed =
            self.sql(rows(&reading, "SELECT provider || '/' || subject, generation FROM removed ORDER BY 1"))?;
        Ok(Snapshot {
            key_check: self.key_check()?,
            grants: self.grants()?,
            removed: removed
                .into_iter()
                .map(|(names, generation)| self.removed(names, generation))
                .collect::<Result<_>>()?,
            own: self.sql(rows(&reading, "SELECT name, value FROM sealed ORDER BY name"))?,
            flows: self.sql(rows(&reading, "SELECT id, content FROM flows ORDER BY id"))?,
        })
    }

    /// No provider's name has a slash.
    fn removed(&self, names: String, generation: u64) -> Result<(Names, u64)> {
        let names = names.split_once('/').and_then(|(provider, subject)| Names::parse(provider, subject));
        let named = names.map(|names| (names, generation));
        named.ok_or_else(|| self.corrupt("a row has a name that is none".into()))
    }

    pub(super) fn reseal(&mut self, batch: &[Resealed]) -> Result<usize> {
        let path = self.path.clone();
        let mut reseal = || {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let replaced = batch.iter().map(|value| replace(&transaction, value)).sum::<rusqlite::Result<usize>>()?;
            transaction.commit().map(|()| replaced)
        };
        reseal().map_err(|error| classify(&path, error))
    }

    pub(super) fn carry_out(&mut self, plan: &Plan) -> Result<bool> {
        let path = self.path.clone();
        let mut carry_out = || {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for (record, previous) in &plan.grants {
                if !write_after(&transaction, record, *previous)? {
                    return Ok(false);
                }
            }
            for (name, value, previous) in &plan.own {
                if !put_sealed(&transaction, name, value, previous.as_deref())? {
                    return Ok(false);
                }
            }
            for (names, generation) in &plan.removed {
                transaction.execute(REMEMBER, params![names.provider.as_str(), names.subject.as_str(), generation])?;
            }
            transaction.commit().map(|()| true)
        };
        carry_out().map_err(|error| classify(&path, error))
    }
}

/// The rows of a table of two columns.
fn rows<A: FromSql, B: FromSql>(connection: &Connection, sql: &str) -> rusqlite::Result<Vec<(A, B)>> {
    let mut statement = connection.prepare(sql)?;
    statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

fn replace(connection: &Connection, Resealed { slot, from, to }: &Resealed) -> rusqlite::Result<usize> {
    let of_grant = |column: &str, names: &Names| {
        let sql = format!("UPDATE grants SET {column} = ? WHERE provider = ? AND subject = ? AND {column} = ?");
        connection.execute(&sql, params![to, names.provider.as_str(), names.subject.as_str(), from])
    };
    match slot {
        Slot::KeyCheck => connection.execute("UPDATE meta SET key_check = ? WHERE key_check = ?", params![to, from]),
        Slot::Own(name) => put_sealed(connection, name, to, Some(from)).map(usize::from),
        Slot::RefreshToken(names) => of_grant("refresh_token", names),
        Slot::AccessToken(names) => of_grant("access_token", names),
        Slot::Flow(id) => {
            connection.execute("UPDATE flows SET content = ? WHERE id = ? AND content = ?", params![to, id, from])
        }
    }
}

const REMEMBER: &str = "INSERT INTO removed (provider, subject, generation) VALUES (?, ?, ?)
    ON CONFLICT DO UPDATE SET generation = max(generation, excluded.generation)";
