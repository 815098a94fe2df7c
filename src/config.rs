//! `proxy.yaml`: reads it into domain types, or says every mistake in it, each with its line and column.
//!
//! In this order: the text becomes a tree that knows its places, `${..}` is replaced, presets fill in what is left out,
//! the tree is decoded into structs, and those become [`Settings`]. Each step goes on after a mistake, so that one run
//! finds them all.

mod check;
mod decode;
mod interpolate;
mod leaf;
mod locate;
mod presets;
mod schema;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::fs::Metadata;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use url::Url;
use zeroize::Zeroizing;

use crate::audit;
use crate::files;
use crate::host::Authority;
use crate::limits::Limits;
use crate::listen::Place;
use crate::oauth::Provider;
use crate::proxy::caller::{Agent, Entrance};
use crate::routes::{Route, Unmatched};
use crate::secret::Secret;
use crate::store::key::KeyCommand;
use crate::store::postgres::ServerUrl;
use crate::telemetry::LogLevel;
use crate::traces::Collector;
use crate::upstream::Proxies;

/// What `proxy.yaml` says, ready to be used.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where agents reach the proxy, and who comes in there. Never empty.
    pub listen: Vec<(Place, Entrance)>,
    /// Where redirected connections come in, if anywhere, and who comes in there. Never a Unix socket.
    pub transparent: Vec<(Place, Entrance)>,
    /// Where people and their browsers reach the sidecar, if they can.
    pub admin: Option<SocketAddr>,
    /// What whoever uses the admin listener has to know.
    pub admin_token: Option<Secret>,
    /// Whether a program of this machine may have it stop through the admin listener.
    pub quit: bool,
    /// How browsers reach the admin listener, if not by its address: scheme, host and port.
    pub public_url: Option<Url>,
    /// Where a consent may send a browser back to.
    pub return_to: Vec<Url>,
    /// Where probes and metrics are, if anywhere.
    pub health: Option<SocketAddr>,
    /// Who may use the proxy; any caller when empty.
    pub agents: Vec<Arc<Agent>>,
    /// PEM files with further roots to trust.
    pub extra_ca_files: Vec<PathBuf>,
    /// The address to dial for an authority, instead of asking DNS.
    pub resolve: HashMap<Authority, SocketAddr>,
    /// Which proxies lead out.
    pub proxies: Proxies,
    /// How long live requests may go on after SIGTERM.
    pub drain: Duration,
    /// Where each use of a token is written down, if it is.
    pub audit: Option<audit::Wanted>,
    /// Where the spans of requests are sent, if they are.
    pub traces: Option<Collector>,
    /// How much is logged, if it says so.
    pub log_level: Option<LogLevel>,
    /// How long, how large and how many.
    pub limits: Limits,
    /// The longest request body that can be sent a second time, in bytes.
    pub replay_limit: usize,
    /// The directory of the local certificate authority.
    pub ca_path: PathBuf,
    /// The directory of the embedded store.
    pub store_path: PathBuf,
    /// The shared store, which takes the place of the embedded one.
    pub store_url: Option<ServerUrl>,
    /// Keys of 32 bytes as standard base64: the first seals, all open. When there are none, and no `key_command`, one is
    /// kept in `key_path`.
    pub store_keys: Vec<Secret>,
    /// What prints the keys, instead of `store_keys`.
    pub key_command: Option<KeyCommand>,
    /// The file of the key that is made when no key is given; it may be empty itself when one is.
    pub key_path: PathBuf,
    /// In file order.
    pub providers: Vec<Arc<Provider>>,
    /// In file order, each named by its place and host.
    pub routes: Vec<Route>,
    /// What happens to a request that no route covers.
    pub unmatched: Unmatched,
    /// What is not wrong but should be known, each a line that begins with its place.
    pub warnings: Vec<String>,
    /// The environment variables that secrets came from; no agent may inherit them.
    pub secret_variables: Vec<String>,
}

/// What was read of a file, and which others it is made of.
pub struct Reading {
    /// What it says, or every mistake in it.
    pub settings: Result<Settings, ConfigError>,
    /// The files that its values name, as far as they are known, whether they could be read or not.
    pub files: Vec<PathBuf>,
}

/// Reads a file.
///
/// # Errors
/// Every mistake in it.
pub fn load(path: &Path) -> Result<Settings, ConfigError> {
    read(path).settings
}

/// As [`load`], and says which files are to be looked at to know when it would say something else.
pub fn read(path: &Path) -> Reading {
    let (name, mut files) = (path.display().to_string(), Vec::new());
    let read = text(path).map_err(|error| ConfigError::unreadable(&name, &error));
    let environment = |variable: &str| std::env::var(variable).ok();
    let settings = read.and_then(|(text, exposed)| settings(&name, &text, exposed, &environment, &mut files));
    files.extend(settings.iter().flat_map(|settings| settings.extra_ca_files.iter().cloned()));
    Reading { settings, files }
}

/// Where the health listener is, if anywhere. Nothing else of the file is looked at: whoever asks may not have its secrets.
///
/// # Errors
/// Mistakes in the file's shape, and in that key.
pub fn health(path: &Path) -> Result<Option<SocketAddr>, ConfigError> {
    some_keys(path, &["health"], |check, top, file| check.health(&top.key("health"), file.health, &[]))
}

/// Where the admin listener is, if anywhere, and its token. Nothing else of the file is looked at.
///
/// # Errors
/// Mistakes in the file's shape, and in those keys.
pub fn admin(path: &Path) -> Result<(Option<SocketAddr>, Option<Secret>), ConfigError> {
    some_keys(path, &["admin", "admin_token"], |check, top, file| {
        let admin = check.admin(top, &file.admin, &file.admin_token, &None);
        (admin, check.long_secret(&top.key("admin_token"), file.admin_token))
    })
}

/// Reads a text as if it were the file of this name; `environment` looks variables up.
///
/// # Errors
/// Every mistake in it.
pub fn parse(
    file_name: &str,
    text: &str,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Settings, ConfigError> {
    settings(file_name, text, false, environment, &mut Vec::new())
}

pub use presets::{Preset, placeholders, presets};

/// The JSON Schema of `proxy.yaml`, for editors.
pub fn json_schema() -> serde_json::Value {
    schema::json_schema()
}

fn settings(
    file_name: &str,
    text: &str,
    exposed: bool,
    environment: &dyn Fn(&str) -> Option<String>,
    files: &mut Vec<PathBuf>,
) -> Result<Settings, ConfigError> {
    let mut document = locate::Document::read(file_name, text).map_err(|mistake| ConfigError::new(vec![mistake]))?;
    let mut mistakes = document.repeated_keys();
    let replaced = interpolate::interpolate(&mut document, environment);
    let secret_variables = replaced.secrets;
    files.extend(replaced.files);
    mistakes.extend(replaced.mistakes);
    mistakes.extend(presets::fill_in(&mut document));
    let (file, undecoded) = decode::decode(&mut document);
    mistakes.extend(undecoded);
    let Some(file) = file else { return Err(ConfigError::new(mistakes)) };

    let mut check = check::Check { document: &document, environment, exposed, mistakes, warnings: Vec::new() };
    let settings = check.settings(file);
    if !check.mistakes.is_empty() {
        return Err(ConfigError::new(check.mistakes));
    }
    let warnings = ConfigError::new(check.warnings).mistakes;
    Ok(Settings { warnings: warnings.iter().map(Mistake::to_string).collect(), secret_variables, ..settings })
}

/// What some of the keys at the top of a file say, as if there were no others.
fn some_keys<T>(
    path: &Path,
    keys: &[&str],
    read_keys: impl FnOnce(&mut check::Check<'_>, &locate::Spot<'_>, schema::File) -> T,
) -> Result<T, ConfigError> {
    let name = path.display().to_string();
    let (text, exposed) = text(path).map_err(|error| ConfigError::unreadable(&name, &error))?;
    let mut document = locate::Document::read(&name, &text).map_err(|mistake| ConfigError::new(vec![mistake]))?;
    document.keep(keys);
    let environment: interpolate::Environment<'_> = &|variable| std::env::var(variable).ok();
    let mut mistakes = interpolate::interpolate(&mut document, environment).mistakes;
    let (file, undecoded) = decode::decode(&mut document);
    mistakes.extend(undecoded);
    let mut check = check::Check { document: &document, environment, exposed, mistakes, warnings: Vec::new() };
    let said = file.map(|file| read_keys(&mut check, &document.top(), file));
    match said {
        Some(said) if check.mistakes.is_empty() => Ok(said),
        _ => Err(ConfigError::new(check.mistakes)),
    }
}

/// The text of a file, cut off where it is too long in any case, and whether other users can read it.
fn text(path: &Path) -> io::Result<(Zeroizing<String>, bool)> {
    let file = files::open(path)?;
    let exposed = readable_by(&file.metadata()?, 0o044);
    let mut text = Zeroizing::new(Vec::new());
    file.take(locate::LONGEST as u64 + 4).read_to_end(&mut text)?;
    let valid = std::str::from_utf8(&text).map(|text| Zeroizing::new(text.to_owned()));
    valid.map(|text| (text, exposed)).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

/// Whether one of these permissions is given.
#[cfg(unix)]
fn readable_by(metadata: &Metadata, permissions: u32) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    metadata.permissions().mode() & permissions != 0
}

/// There are no such permissions.
#[cfg(not(unix))]
fn readable_by(_: &Metadata, _: u32) -> bool {
    false
}

/// Every mistake that was found, in file order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// At least one.
    pub mistakes: Vec<Mistake>,
}

impl ConfigError {
    fn new(mut mistakes: Vec<Mistake>) -> Self {
        mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
        Self { mistakes }
    }

    fn unreadable(file: &str, error: &io::Error) -> Self {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => Some("write one, or name another with `--config`".to_owned()),
            _ => None,
        };
        let what = format!("cannot read the file: {error}");
        let place = String::new();
        Self::new(vec![Mistake { file: file.to_owned(), line: 0, column: 0, place, what, hint }])
    }
}

/// One mistake: where, what, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The file, as it was named.
    pub file: String,
    /// From 1; 0 when the file could not be read.
    pub line: usize,
    /// From 1, in characters; 0 when the file could not be read.
    pub column: usize,
    /// As in `routes[1].provider`; empty for the whole file.
    pub place: String,
    /// What is wrong. It never holds a secret.
    pub what: String,
    /// What to do.
    pub hint: Option<String>,
}

impl fmt::Display for Mistake {
    /// As in `proxy.yaml:9:15: routes[1].provider: no provider is named ..`, with the hint on a line of its own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        if !self.place.is_empty() {
            write!(f, ": {}", self.place)?;
        }
        write!(f, ": {}", self.what)?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.mistakes.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{mistake}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}
