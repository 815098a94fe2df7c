//! What `benches/micro.rs` measures of sealed rows, as `proxy`'s own.

use super::key::Keyring;
use super::seal::{self, Place};
use crate::secret::Secret;

const PLACE: Place<'_> = Place { provider: "github", subject: "alice@example.com", column: "refresh_token" };

/// Seals a value for a user's place in the store.
pub fn seal(keys: &Keyring, secret: &Secret) -> Vec<u8> {
    seal::seal(keys, PLACE, secret).expect("the machine has randomness")
}

/// Opens it again.
pub fn open(keys: &Keyring, sealed: &[u8]) -> Option<Secret> {
    seal::open(keys, PLACE, sealed).ok()
}
