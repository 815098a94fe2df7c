//! The product from outside: whole sidecars in this process, and the program itself.

mod answers;
mod edges;
mod floors;
mod framing;
mod headers;
mod program;
mod retry;
mod routing;
mod tunnels;
mod world;
