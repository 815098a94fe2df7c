//! The shared store: its URL, and what it needs beside it.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::Check;
use crate::config::leaf::Parsed;
use crate::config::locate::Spot;
use crate::config::schema;
use crate::host::Authority;
use crate::store::postgres::ServerUrl;

impl Check<'_> {
    /// The shared store, if there is one. It stands instead of the embedded one, and all who share it share its keys.
    pub(super) fn store_url(
        &mut self,
        store: &Spot<'_>,
        written: &schema::Store,
        resolve: &HashMap<Authority, SocketAddr>,
    ) -> Option<ServerUrl> {
        let (spot, password) = (store.key("url"), written.password.as_ref().map(|Parsed(password)| password));
        if password.is_some() {
            self.warn_of_a_secret(&store.key("password"));
        }
        let Some(Parsed(url)) = &written.url else {
            if password.is_some() && !spot.is_given() {
                self.refuse(
                    &store.key("password"),
                    "the embedded store has no password",
                    "leave it out, or set `store.url`",
                );
            }
            return None;
        };
        let server = match ServerUrl::parse(url, password, resolve) {
            Ok(server) => server,
            Err(error) => {
                self.refuse(&spot, error.to_string(), error.hint());
                return None;
            }
        };
        if server.has_password() && password.is_none() {
            self.warn_of_a_secret(&spot);
        }
        if store.key("path").is_given() {
            self.refuse(&spot, "the store is in two places", "leave out `store.path`, or `store.url`");
        }
        let keys_are_empty = written.keys.as_ref().is_some_and(Vec::is_empty);
        if (!store.key("keys").is_given() || keys_are_empty) && !store.key("key_command").is_given() {
            let what = "sidecars that share a store need the same key, and none is given";
            self.refuse(&spot, what, "set `store.keys`: make one with `openssl rand -base64 32`");
        }
        Some(server)
    }
}
