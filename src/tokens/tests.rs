//! The life of tokens against a strict authorization server in memory, a real store, and a clock that the tests move.

mod ahead;
mod discovery;
mod fleet;
mod grants;
mod leases;
mod model;
mod outage;
mod rejected;
mod rotation;
mod server;
mod world;
