//! Builds token requests (RFC 6749 sections 4.4 and 6).
