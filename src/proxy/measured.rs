//! What `benches/micro.rs` measures of a request's way. A module below `proxy` sees what is private to it, so that
//! nothing else becomes more visible for a measurement's sake.

use http::HeaderMap;

use super::headers::{self, Pseudonym};

/// A proxy that names itself in `Via`.
pub struct Hop(Pseudonym);

impl Hop {
    /// With a name that no other has.
    pub fn new() -> Self {
        Self(Pseudonym::random())
    }

    /// Makes an agent's header fields fit to go upstream.
    pub fn clean_request(&self, fields: &mut HeaderMap) {
        headers::clean_request(fields, &self.0);
        headers::remove_placeholders(fields);
    }

    /// Makes an upstream's header fields fit to go to the agent.
    pub fn clean_response(&self, fields: &mut HeaderMap) {
        headers::clean_response(fields, &self.0);
    }
}

impl Default for Hop {
    fn default() -> Self {
        Self::new()
    }
}
