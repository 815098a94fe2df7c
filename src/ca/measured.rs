//! What `benches/micro.rs` measures of leaves, as `proxy`'s own.

use std::time::SystemTime;

use super::{Ca, CaError};
use crate::host::HostName;

/// Whatever an agent's handshake for a host needs: minted for a new one, looked up for a known one.
///
/// # Errors
/// When the cryptography fails, which means a broken machine.
pub fn leaf(ca: &Ca, host: &HostName, now: SystemTime) -> Result<(), CaError> {
    ca.server_config(host, now).map(drop)
}
