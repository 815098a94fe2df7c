//! Reads token answers (RFC 6749 sections 5.1 and 5.2), and sorts the failures.
