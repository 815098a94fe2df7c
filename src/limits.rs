//! How long, how large and how many: every limit of a sidecar, each a setting with a default.

use std::time::Duration;

/// The limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// How long an agent may take over a request's head, from its first byte to its last.
    pub head_timeout: Duration,
    /// How long an agent's connection may be open with no request on it.
    pub idle_timeout: Duration,
    /// How long an agent may pause within a body whose length it has named. A body of chunks is a stream, and may pause.
    pub body_timeout: Duration,
    /// How long an agent may take none of the bytes that are there for it.
    pub write_timeout: Duration,
    /// How long an agent's TLS handshake may take.
    pub handshake_timeout: Duration,
    /// How long a TCP connection to an upstream may take.
    pub connect_timeout: Duration,
    /// How long an upstream's TLS handshake may take.
    pub upstream_handshake_timeout: Duration,
    /// The largest head of a request, in bytes.
    pub max_head: usize,
    /// The most fields in a head, an agent's or, over HTTP/1, an upstream's.
    pub max_headers: usize,
    /// The most connections of agents at once, tunnels too; further ones wait to be accepted.
    pub max_connections: usize,
}

impl Limits {
    /// The smallest `max_head`, which is what hyper needs to work.
    pub const LEAST_HEAD: usize = 8 << 10;
    /// The largest `max_head`: it is what each connection may hold.
    pub const MOST_HEAD: usize = 16 << 20;
    /// The `max_headers` for which hyper needs no memory from the heap.
    pub const FREE_HEADERS: usize = 100;
    /// The largest `max_headers`.
    pub const MOST_HEADERS: usize = 10_000;
    /// The largest `max_connections`.
    pub const MOST_CONNECTIONS: usize = 1_000_000;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(5 * 60),
            body_timeout: Duration::from_secs(5 * 60),
            write_timeout: Duration::from_secs(5 * 60),
            handshake_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            upstream_handshake_timeout: Duration::from_secs(10),
            max_head: 256 << 10,
            max_headers: 128,
            max_connections: 10_000,
        }
    }
}
