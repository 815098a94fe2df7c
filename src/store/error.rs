//! Why the store does not do what it was asked, and what to do about it.

use std::io;
use std::path::Path;

use super::key::KeyId;
use crate::names::{ProviderName, Subject};

/// Why the store does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is none.
    #[error("there is no store at `{at}`{}", if *.log_left { ", only its write-ahead log" } else { "" })]
    Missing {
        /// The store: a path, or a server's address.
        at: String,
        /// Whether the log is there without the file: that is a loss, not a first start.
        log_left: bool,
    },
    /// The file is not a whole store.
    #[error("the store `{at}` is damaged: {what}")]
    Corrupt {
        /// The store: a path, or a server's address.
        at: String,
        /// What is wrong.
        what: String,
    },
    /// One value was changed, cut off, or moved from another place. Others are not affected.
    #[error("`{column}` of user `{subject}` at `{provider}` is damaged in the store `{at}`")]
    CorruptValue {
        /// The store: a path, or a server's address.
        at: String,
        /// The row's provider; empty for a secret of the sidecar's own.
        provider: String,
        /// The row's subject; empty for the client, and for a secret of the sidecar's own.
        subject: String,
        /// The column, or the secret's name.
        column: String,
    },
    /// Sealed with a key that is not at hand.
    #[error("the store `{at}` is sealed with key `{sealed_with}`, and the keys at hand are {keys:?}")]
    WrongKey {
        /// The store: a path, or a server's address.
        at: String,
        /// The key that is missing.
        sealed_with: KeyId,
        /// The keys that are there.
        keys: Vec<KeyId>,
    },
    /// Written by a later release.
    #[error("the store `{at}` was made by a newer version: its schema is {found}, and {known} is the newest known")]
    NewerSchema {
        /// The store: a path, or a server's address.
        at: String,
        /// Its schema.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// Open to others, closed to us, or no file at all.
    #[error("the store `{at}` {why}")]
    Permissions {
        /// The file or the server.
        at: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No room left.
    #[error("no room is left to write the store `{at}`")]
    Full {
        /// The store: a path, or a server's address.
        at: String,
    },
    /// The machine failed us.
    #[error("the store `{at}`: {error}")]
    Io {
        /// The file or the server.
        at: String,
        /// What it said.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Another process has held it for too long.
    #[error("another process keeps the store `{at}` locked")]
    Busy {
        /// The store: a path, or a server's address.
        at: String,
    },
    /// Its server cannot be reached, or does not answer in time.
    #[error("the store `{at}` is away: {why}")]
    Away {
        /// The server's address.
        at: String,
        /// What happened.
        why: String,
    },
    /// Its server does not let us do what we must.
    #[error("the store `{at}` refuses us: {why}")]
    Denied {
        /// The server's address.
        at: String,
        /// What it said.
        why: String,
    },
    /// Somebody else wrote the row, or removed it.
    #[error("the grant of user `{subject}` at `{provider}` was changed in between")]
    Moved {
        /// The row's provider.
        provider: ProviderName,
        /// The row's subject.
        subject: Subject,
    },
    /// The lease was held for too long, and another process may have it now.
    #[error("the right to renew the grant of user `{subject}` at `{provider}` has run out")]
    LeaseLost {
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
            StoreError::Away { .. } => "store_away",
            StoreError::Denied { .. } => "store_denied",
            StoreError::Moved { .. } => "store_moved",
            StoreError::LeaseLost { .. } => "store_lease_lost",
        }
    }

    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            StoreError::Missing { log_left: false, .. } => {
                "`sidebearer run`, `connect` and `import` make one; if there should be one, check `store` in `proxy.yaml`".into()
            }
            StoreError::Missing { at, .. } => {
                format!("put `{}` back from a backup, or move its `-wal` away to start anew", at)
            }
            StoreError::Corrupt { at, .. } => {
                format!("put `{}` back from a backup, or move it away to start anew", at)
            }
            StoreError::CorruptValue { provider, .. } if provider.is_empty() => {
                "put the store back from a backup".into()
            }
            StoreError::CorruptValue { .. } => "connect this user again".into(),
            StoreError::WrongKey { .. } => "put the key it was sealed with into `store.keys`".into(),
            StoreError::NewerSchema { .. } => "run the version that made it, or a later one".into(),
            StoreError::Permissions { at, .. } => {
                format!("make `{}` readable and writable for this user, and for nobody else", at)
            }
            StoreError::Full { .. } => "free some space on its disk".into(),
            StoreError::Io { .. } => "check the disk that it is on".into(),
            StoreError::Busy { .. } => "end the process that holds it, if it hangs".into(),
            StoreError::Away { .. } => "start the server, or correct `store.url`".into(),
            StoreError::Denied { .. } => {
                "correct the user, the password or the database in `store.url`, or what the server grants".into()
            }
            StoreError::Moved { .. } | StoreError::LeaseLost { .. } => "try again".into(),
        }
    }

    pub(super) fn io(path: &Path, error: io::Error) -> Self {
        let at = path.display().to_string();
        match error.kind() {
            io::ErrorKind::PermissionDenied => StoreError::Permissions { at, why: "is closed to this user" },
            io::ErrorKind::ReadOnlyFilesystem => StoreError::Permissions { at, why: "cannot be written" },
            io::ErrorKind::NotADirectory => StoreError::Permissions { at, why: "is not a directory" },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full { at },
            _ => StoreError::Io { at, error: error.into() },
        }
    }
}
