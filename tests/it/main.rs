//! The product from outside: whole sidecars in this process, and the program itself.

mod admin;
mod answers;
mod attacks;
mod bent;
mod cases;
mod connect;
mod consent;
mod doctor;
mod edges;
mod floors;
mod framing;
mod headers;
mod http2;
mod listen;
mod missing;
mod program;
mod reflections;
mod retry;
mod routing;
mod tls;
mod tokens;
mod tunnels;
mod upstream_proxy;
mod users;
mod websocket;
mod world;
