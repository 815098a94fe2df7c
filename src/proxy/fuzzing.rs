//! What `tests/fuzz` needs of a request's way in. It is compiled for fuzzing only: a module below `proxy` sees what is
//! private to it, so that nothing becomes more visible for a fuzzer's sake.

use std::sync::Arc;

use http::{HeaderMap, Request};
use tokio::io::{AsyncRead, AsyncWrite};

use super::caller::{Agent, Door, Entrance};
use super::target::{self, Target};
use super::wire::{Framing, Place, Strict};
use crate::host::Authority;
use crate::limits::Limits;
use crate::names::UserName;

/// What a request on the proxy port is for, and whether it is a CONNECT.
///
/// # Errors
/// The code of the refusal.
pub fn target<B>(request: &Request<B>) -> Result<(Authority, bool), &'static str> {
    match Target::of(request) {
        Ok(Target::Connect(authority)) => Ok((authority, true)),
        Ok(Target::Plain(authority)) => Ok((authority, false)),
        Err(reject) => Err(reject.code()),
    }
}

/// Whether a request in a tunnel is for the tunnel's host.
///
/// # Errors
/// The code of the refusal.
pub fn agrees<B>(request: &Request<B>, tunnel: &Authority) -> Result<(), &'static str> {
    target::agrees(request, tunnel).map_err(|reject| reject.code())
}

/// Whether these pieces of a connection can be read in one way only, one after the other.
pub fn is_clear<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> bool {
    let mut framing = Framing::default();
    pieces.into_iter().all(|piece| framing.follow(piece).is_ok())
}

/// The length of the body of each request whose head ends before what is ambiguous.
pub fn bodies(stream: &[u8]) -> Vec<u64> {
    let mut framing = Framing::default();
    let mut bodies = Vec::new();
    for byte in stream.chunks(1) {
        let (before, lines) = (framing.place, framing.head.lines);
        if framing.follow(byte).is_err() {
            break;
        }
        if matches!(before, Place::Head) && lines > 0 && framing.head.lines == 0 {
            bodies.push(0);
        }
        let added = match (before, framing.place) {
            (Place::Head, Place::Length(length)) => length,
            (Place::ChunkSize, Place::Chunk(size)) => size - 2,
            _ => 0,
        };
        if let Some(body) = bodies.last_mut() {
            *body += added;
        }
    }
    bodies
}

/// A connection as hyper gets it.
pub fn strict<IO: AsyncRead + AsyncWrite + Unpin>(io: IO) -> impl AsyncRead + AsyncWrite + Unpin {
    Strict::new(io, &Limits::default())
}

/// The door of these agents.
pub struct Gate(Door);

impl Gate {
    /// Knows these agents.
    pub fn new(agents: Vec<Arc<Agent>>) -> Self {
        Self(Door::new(agents, UserName::default()))
    }

    /// The agent that sends a request with these fields, and its user.
    ///
    /// # Errors
    /// The code of the refusal.
    pub fn admit(&self, headers: &HeaderMap) -> Result<(String, String), &'static str> {
        let caller = self.0.admit(&Entrance::default(), headers).map_err(|reject| reject.code())?;
        Ok((caller.agent().unwrap_or_default().to_owned(), caller.user.to_string()))
    }
}
