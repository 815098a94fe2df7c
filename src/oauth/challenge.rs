//! Reads WWW-Authenticate (RFC 9110 section 11.6.1, RFC 6750 section 3).
