//! Turns what was decoded into domain types, and finds the mistakes that need more than one value to see.

mod admin;
mod listen;
mod provider;
mod proxies;
mod route;
mod store;
mod traces;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::interpolate::Environment;
use super::leaf::{Argument, FilePath, Parsed, RouteHost, Size, StoreKey};
use super::locate::{Document, Spot};
use super::schema::{self, Ca, Entries, File, Store};
use super::{Mistake, Settings};
use crate::audit;
use crate::host::Authority;
use crate::routes::Unmatched;
use crate::secret::Secret;
use crate::store::key::KeyCommand;

/// What is known, and found, while a file is checked.
pub(super) struct Check<'a> {
    pub document: &'a Document,
    pub environment: Environment<'a>,
    /// Whether other users of this machine can read the file.
    pub exposed: bool,
    pub mistakes: Vec<Mistake>,
    pub warnings: Vec<Mistake>,
}

impl Check<'_> {
    /// The settings, still without warnings; they count only if no mistake was found.
    pub fn settings(&mut self, file: File) -> Settings {
        let top = self.document.top();
        let store = file.store.unwrap_or_default();
        let store_path = self.store_path(&top.key("store"), &store);
        let resolve = self.resolve(&top.key("resolve"), file.resolve);
        let store_url = self.store_url(&top.key("store"), &store, &resolve);
        let store_keys = self.store_keys(&top.key("store").key("keys"), store.keys);
        let key_command = self.key_command(&top.key("store"), store.key_command);
        let hosts = hosts(&file.providers);
        let agents = self.agents(&top, file.agents);
        let listen = self.listen(&top, file.listen, &agents);
        let transparent = self.transparent(&top, file.transparent, &agents, &listen);
        let admin = self.admin(&top, &file.admin, &file.admin_token, &file.public_url);
        let own = listen.iter().chain(&transparent).filter_map(|(place, _)| place.address()).chain(admin);
        let mut own: Vec<SocketAddr> = own.collect();
        let health = self.health(&top.key("health"), file.health, &own);
        own.extend(health);
        Settings {
            listen,
            transparent,
            admin,
            admin_token: self.long_secret(&top.key("admin_token"), file.admin_token),
            quit: self.quit(&top.key("quit"), file.quit, admin),
            public_url: self.public_url(&top.key("public_url"), file.public_url),
            return_to: self.return_to(&top.key("return_to"), file.return_to.unwrap_or_default()),
            health,
            agents,
            extra_ca_files: self.extra_ca_files(&top.key("extra_ca_files"), file.extra_ca_files.unwrap_or_default()),
            resolve,
            proxies: self.proxies(&top, file.upstream_proxy, file.no_proxy, &own),
            drain: file.drain.map_or(Duration::from_secs(20), |Parsed(drain)| drain),
            audit: self.audit(&top.key("audit"), file.audit),
            traces: self.traces(&top.key("traces"), file.traces),
            log_level: file.log_level.map(Into::into),
            limits: self.limits(&top.key("limits"), file.limits.unwrap_or_default()),
            replay_limit: file.replay_limit.map_or(1 << 20, |Parsed(Size(bytes))| bytes),
            ca_path: self.ca_path(&top.key("ca").key("path"), file.ca, &store_path, store_url.is_some()),
            key_path: self.key_path(&top.key("store"), &store_keys),
            store_path,
            store_url,
            store_keys,
            key_command,
            providers: self.providers(&top.key("providers"), file.providers),
            routes: self.routes(&top, file.routes.unwrap_or_default(), &hosts),
            unmatched: match file.unmatched {
                Some(schema::Unmatched::Deny) => Unmatched::Deny,
                Some(schema::Unmatched::Tunnel) | None => Unmatched::Tunnel,
            },
            warnings: Vec::new(),
            secret_variables: Vec::new(),
        }
    }

    fn refuse(&mut self, spot: &Spot<'_>, what: impl Into<String>, hint: impl Into<String>) {
        self.mistakes.push(self.document.mistake(spot, what, Some(hint.into())));
    }

    fn resolve(
        &mut self,
        spot: &Spot<'_>,
        entries: Option<Entries<Parsed<SocketAddr>>>,
    ) -> HashMap<Authority, SocketAddr> {
        let mut resolve = HashMap::new();
        let entries = entries.map(|entries| entries.0).unwrap_or_default();
        for (spot, (key, Parsed(address))) in spot.entries().zip(entries) {
            match Authority::parse(&key, None) {
                Err(error) => self.refuse(&spot, error.to_string(), "a key is a host and a port: `api.test:443`"),
                Ok(_) if address.port() == 0 => self.refuse(&spot, "port 0 cannot be dialled", "write the port"),
                Ok(authority) => {
                    if resolve.insert(authority, address).is_some() {
                        self.refuse(&spot, "this host and port is here twice", "leave out one of them");
                    }
                }
            }
        }
        resolve
    }

    fn extra_ca_files(&mut self, spot: &Spot<'_>, files: Vec<Parsed<FilePath>>) -> Vec<PathBuf> {
        spot.items().zip(files).filter_map(|(spot, file)| self.path(&spot, &file)).collect()
    }

    fn audit(&mut self, spot: &Spot<'_>, written: Option<schema::Audit>) -> Option<audit::Wanted> {
        let schema::Audit { file, required } = written?;
        if !spot.key("file").is_given() {
            self.refuse(spot, "`file` is missing", "write where to, or `-` for standard output");
        }
        let place = match file? {
            Parsed(FilePath(path)) if path == "-" => audit::Place::Stdout,
            path => audit::Place::File(self.path(&spot.key("file"), &path)?),
        };
        Some(audit::Wanted { place, required: required.unwrap_or(false) })
    }

    fn ca_path(&mut self, spot: &Spot<'_>, ca: Option<Ca>, store_path: &Path, shared: bool) -> PathBuf {
        let written = ca.and_then(|ca| ca.path).and_then(|path| self.path(spot, &path));
        if written.is_none() && shared && store_path == Path::new("") && !spot.is_broken() {
            let what = "there is no home directory to keep `ca.pem` in: neither `XDG_DATA_HOME` nor `HOME` is set";
            self.refuse(spot, what, "set `ca.path`");
        }
        written.unwrap_or_else(|| store_path.join("ca"))
    }

    fn store_path(&mut self, store: &Spot<'_>, written: &Store) -> PathBuf {
        let spot = store.key("path");
        if let Some(path) = &written.path {
            return self.path(&spot, path).unwrap_or_default();
        }
        let path = self.in_home("XDG_DATA_HOME", ".local/share").map(|base| base.join("sidebearer"));
        let needed = !spot.is_given() && !store.key("url").is_given();
        if path.is_none() && needed && !store.is_broken() {
            let what = "there is no home directory to keep the store in: neither `XDG_DATA_HOME` nor `HOME` is set";
            self.refuse(&spot, what, "set `store.path`");
        }
        path.unwrap_or_default()
    }

    fn store_keys(&mut self, spot: &Spot<'_>, keys: Option<Vec<Parsed<StoreKey>>>) -> Vec<Secret> {
        let mut secrets = Vec::new();
        for (spot, Parsed(StoreKey(key))) in spot.items().zip(keys.unwrap_or_default()) {
            self.warn_of_a_secret(&spot);
            secrets.push(key);
        }
        secrets
    }

    fn key_command(&mut self, store: &Spot<'_>, words: Option<Vec<Parsed<Argument>>>) -> Option<KeyCommand> {
        let spot = store.key("key_command");
        let words = words?;
        if store.key("keys").is_given() {
            let what = "the keys come from `store.keys` already";
            self.refuse(&spot, what, "leave out `store.keys` or `store.key_command`");
        }
        let mut words = spot.items().zip(words.into_iter().map(|Parsed(Argument(word))| word));
        let Some((place, program)) = words.next() else {
            if !spot.has_broken_items() {
                self.refuse(&spot, "an empty list runs nothing", "write a program and its arguments");
            }
            return None;
        };
        if program.expose().is_empty() || program.expose().contains(char::is_control) {
            self.refuse(&place, "expected a program", "write its path, or its name if it is in `PATH`");
        }
        let words: Vec<_> = words.collect();
        let hidden = words.iter().filter(|(place, _)| place.is_replaced()).map(|(_, word)| word.clone()).collect();
        let arguments = words.into_iter().map(|(_, word)| word).collect();
        Some(KeyCommand { program: program.expose().to_owned(), arguments, hidden })
    }

    /// Where a key is made when none is given; it does not matter, and may be empty, when one is.
    fn key_path(&mut self, store: &Spot<'_>, keys: &[Secret]) -> PathBuf {
        let spot = store.key("keys");
        let path = self.in_home("XDG_CONFIG_HOME", ".config").map(|base| base.join("sidebearer/key"));
        // Without a home directory one mistake says it all, as long as it is made.
        let known = store.is_broken() || self.mistakes.iter().any(|mistake| mistake.place == "store.path");
        let needed =
            keys.is_empty() && !(store.key("key_command").is_given() || spot.is_broken() || spot.has_broken_items());
        if path.is_none() && needed && !known {
            let what = "there is no home directory to make a key in: neither `XDG_CONFIG_HOME` nor `HOME` is set";
            self.refuse(&spot, what, "set `store.keys`");
        }
        path.unwrap_or_default()
    }

    /// A directory of the XDG Base Directory Specification, which has relative ones ignored.
    fn in_home(&self, variable: &str, below_home: &str) -> Option<PathBuf> {
        let named = self.directory(variable);
        named.or_else(|| self.directory("HOME").map(|home| home.join(below_home)))
    }

    fn directory(&self, variable: &str) -> Option<PathBuf> {
        (self.environment)(variable).map(PathBuf::from).filter(|path| path.is_absolute())
    }

    /// A path with its `~/` replaced.
    fn path(&mut self, spot: &Spot<'_>, Parsed(FilePath(text)): &Parsed<FilePath>) -> Option<PathBuf> {
        let Some(below_home) = text.strip_prefix("~/") else { return Some(PathBuf::from(text)) };
        let home = self.directory("HOME");
        if home.is_none() {
            self.refuse(spot, "`~/` needs `HOME`, which is not set", "write the whole path");
        }
        home.map(|home| home.join(below_home))
    }

    /// Warns of a secret that is written in the file, and not only named there.
    fn warn_of_a_secret(&mut self, spot: &Spot<'_>) {
        if spot.is_replaced() {
            return;
        }
        let what = match self.exposed {
            true => "the secret is in a file that other users of this machine can read",
            false => "the secret is in the file itself",
        };
        let what = format!("{what}; `${{file:PATH}}` or `${{VAR}}` keeps it out");
        self.warnings.push(self.document.mistake(spot, what, None));
    }
}

/// The hosts that each provider has by itself.
fn hosts(providers: &Option<Entries<schema::Provider>>) -> HashMap<String, Vec<RouteHost>> {
    let providers = providers.iter().flat_map(|entries| &entries.0);
    let with_hosts = providers.filter_map(|(name, provider)| Some((name, provider.hosts.as_ref()?)));
    with_hosts.map(|(name, hosts)| (name.clone(), hosts.iter().map(|Parsed(host)| host.clone()).collect())).collect()
}
