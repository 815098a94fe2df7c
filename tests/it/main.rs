//! The product from outside: whole sidecars in this process, and the program itself.

mod floors;
mod headers;
mod retry;
mod routing;
mod world;
