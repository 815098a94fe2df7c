//! The WebSocket handshake of HTTP/1.1 (RFC 6455 section 4), for agents that said it in HTTP/2 (RFC 8441).

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::header::{SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY};
use http::{HeaderMap, HeaderValue};
use sha1::{Digest, Sha1};

/// Its name, in `Upgrade` and in `:protocol`.
pub const WEBSOCKET: &str = "websocket";
/// RFC 6455 section 1.3.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A key that was sent, by which the answer is known to be meant for it.
pub(super) struct Key(HeaderValue);

impl Key {
    /// A new key, which the handshake carries from now on.
    pub(super) fn give(headers: &mut HeaderMap) -> Option<Self> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).ok()?;
        let key = HeaderValue::try_from(BASE64_STANDARD.encode(random)).ok()?;
        headers.insert(SEC_WEBSOCKET_KEY, key.clone());
        Some(Self(key))
    }

    /// Whether the server that answered understood the handshake.
    pub(super) fn is_accepted(&self, headers: &HeaderMap) -> bool {
        let expected = BASE64_STANDARD.encode(Sha1::new().chain_update(&self.0).chain_update(GUID).finalize());
        headers.get(SEC_WEBSOCKET_ACCEPT).is_some_and(|accept| accept.as_bytes() == expected.as_bytes())
    }
}

/// HTTP/2 has no key, and no answer to it.
pub(super) fn remove_key(headers: &mut HeaderMap) {
    headers.remove(SEC_WEBSOCKET_KEY);
    headers.remove(SEC_WEBSOCKET_ACCEPT);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_accepted_by_its_key() {
        // RFC 6455 section 1.3
        let key = Key(HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ=="));
        let mut headers = HeaderMap::new();
        assert!(!key.is_accepted(&headers));
        headers.insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        assert!(key.is_accepted(&headers));
        assert!(!Key(HeaderValue::from_static("AAAAAAAAAAAAAAAAAAAAAA==")).is_accepted(&headers));
    }
}
