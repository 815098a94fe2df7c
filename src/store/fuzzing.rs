//! What `tests/fuzz` needs of sealed rows. It is compiled for fuzzing only, as `proxy`'s own.

use super::key::Keyring;
use super::seal::{self, Place};
use crate::secret::Secret;

/// Seals a value for a user's place in the store.
pub fn seal(keys: &Keyring, subject: &str, secret: &Secret) -> Vec<u8> {
    seal::seal(keys, place(subject), secret).expect("the machine has randomness")
}

/// Opens a value at a user's place in the store.
pub fn open(keys: &Keyring, subject: &str, sealed: &[u8]) -> Option<Secret> {
    seal::open(keys, place(subject), sealed).ok()
}

fn place(subject: &str) -> Place<'_> {
    Place { provider: "github", subject, column: "refresh_token" }
}
