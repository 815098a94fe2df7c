//! Sidebearer: a sidecar forward proxy that gives an agent's calls OAuth2 bearer tokens and keeps them fresh.
//!
//! The floors, highest first. A module imports only from floors below its own; `tests/it/floors.rs` checks it.
//!
//! | floor | modules |
//! |---|---|
//! | 1 | `main`: parse, run, print error and hint, exit code |
//! | 2 | [`cli`] with a file per subcommand |
//! | 3 | [`app`]: settings to bound sockets to running; the order of start and stop |
//! | 4 | [`config`]: YAML to domain types |
//! | 5 | [`proxy`], [`consent`], [`admin`], [`health`]: one request, from the agent's bytes to the upstream and back; a user's consent; the dashboard and its API; probes |
//! | 6 | [`tokens`], [`connections`], [`links`], [`web`]: `bearer(key)`, `renew(key, rejected)`; who is connected; the links to a consent; what guards every page |
//! | 7 | [`ca`], [`upstream`], [`store`] over an engine: SQLite, PostgreSQL |
//! | 8 | [`oauth`]: OAuth as plain data |
//! | 9 | [`routes`]: host, path, method to route |
//! | 10 | [`crypto`], [`host`], [`names`], [`secret`], [`clock`], [`drain`], [`listen`], [`limits`], [`process`], [`seldom`], [`systemd`], [`metrics`], [`files`], [`events`], [`telemetry`], [`audit`], [`traces`] |
//!
//! One request:
//!
//! ```text
//! accept -> serve -> handle: target? -> routes.find
//!   no route:  tunnel (connect first, then 200) | forward as it is | deny
//!   route:     CONNECT: 200 -> upgrade -> ca.accept(host) -> serve inner requests -> forward
//! forward:     headers::clean -> tokens.bearer? -> upstream.send -> 401? tokens.renew? -> upstream.send -> response
//! any `?`:     Reject -> status + code + hint, logged once
//! tokens.bearer: fresh -> done | own task: turn -> recheck -> store -> oauth::grant -> upstream -> oauth::wire -> store
//! ```

pub mod admin;
pub mod app;
pub mod audit;
pub mod ca;
pub mod cli;
pub mod clock;
pub mod config;
pub mod connections;
pub mod consent;
pub mod crypto;
pub mod drain;
pub mod events;
pub mod files;
pub mod health;
pub mod host;
pub mod limits;
pub mod links;
pub mod listen;
pub mod metrics;
pub mod names;
pub mod oauth;
pub mod process;
pub mod proxy;
pub mod routes;
pub mod secret;
pub mod seldom;
pub mod store;
pub mod systemd;
pub mod telemetry;
pub mod tokens;
pub mod traces;
pub mod upstream;
pub mod web;
