//! What `benches/micro.rs` needs of tokens: a million of them, without a million calls.

use std::time::Duration;

use super::slot::Token;
use super::{Key, Tokens};
use crate::secret::Secret;

/// Keeps a token as if its user had granted access now, for an hour.
pub fn hold(tokens: &Tokens, key: &Key, token: Secret) {
    let (inner, hour) = (&tokens.inner, Duration::from_secs(3600));
    let now = inner.clock.now();
    let slot = inner.slot(key);
    slot.granted(Token::new(token, 1, now, Some(hour), Duration::from_secs(300)));
    let next = slot.lock().next_renewal(now);
    if let Some(at) = next {
        inner.schedule.at(&slot, at);
    }
}
