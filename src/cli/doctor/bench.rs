//! The place where calls are tried: a proxy as `exec` has it, and an API behind it whose names are known here alone.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tempfile::TempDir;
use tokio::sync::broadcast::Receiver;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::super::demo::servers::{AUTH, CLIENT_ID, Servers};
use super::super::exec::{self, Prepared};
use super::probes::{JAVA, JAVA_FILE};
use super::verdict::{Answer, Seen};
use crate::app::agent::Variable;
use crate::cli::CliError;
use crate::config::{self, Settings};
use crate::drain::Drained;
use crate::events::{self, Event, Tunnel, TunnelStep};
use crate::names::UserName;

/// No resolver answers for a name below it (RFC 6761 section 6.4): who does not ask the proxy finds nobody.
const DOMAIN: &str = "doctor.invalid";
/// How long the proxy may take to see what became of a program that has ended.
const SETTLE: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A proxy of its own, with a new CA.
pub(super) struct Bench {
    /// What `exec` would give its command.
    pub variables: Vec<Variable>,
    prepared: TempDir,
    /// Of the store and the API.
    _folder: TempDir,
    _servers: Servers,
    watched: Mutex<Watched>,
    stop: oneshot::Sender<()>,
    sidecar: JoinHandle<Drained>,
}

struct Watched {
    tunnels: Receiver<Tunnel>,
    requests: Receiver<Event>,
    seen: HashMap<String, Seen>,
}

impl Bench {
    /// Starts it, for so many calls.
    pub async fn start(calls: usize) -> Result<Self, CliError> {
        let folder = folder()?;
        let servers = Servers::start(&format!("*.{DOMAIN}")).await.map_err(cannot)?;
        let settings = settings(&servers, folder.path(), calls)?;
        let Prepared { app, variables, folder: prepared } = exec::prepare(&settings, UserName::default()).await?;
        std::fs::write(prepared.path().join(JAVA_FILE), JAVA).map_err(cannot)?;
        let (tunnels, requests) = (app.events.watch_tunnels(), app.events.watch());
        let watched = Mutex::new(Watched { tunnels, requests, seen: HashMap::new() });
        let (stop, stopped) = oneshot::channel::<()>();
        let sidecar = tokio::spawn(app.run(async {
            let _ = stopped.await;
        }));
        Ok(Self { variables, prepared, _folder: folder, _servers: servers, watched, stop, sidecar })
    }

    /// Where temporary files may be.
    pub fn folder(&self) -> &Path {
        self.prepared.path()
    }

    /// The URL of one call.
    pub fn url(call: usize) -> String {
        format!("https://{}/me", host(call))
    }

    /// What came of one call, when its program has ended.
    pub async fn seen(&self, call: usize) -> Seen {
        let deadline = tokio::time::Instant::now() + SETTLE;
        loop {
            let seen = self.look(call);
            if seen.is_settled() || tokio::time::Instant::now() > deadline {
                return seen;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn look(&self, call: usize) -> Seen {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.catch_up();
        watched.seen.get(&host(call)).cloned().unwrap_or_default()
    }

    /// Stops it.
    pub async fn end(self) {
        let _ = self.stop.send(());
        let _ = self.sidecar.await;
    }
}

impl Watched {
    fn catch_up(&mut self) {
        while let Ok(tunnel) = self.tunnels.try_recv() {
            let seen = self.seen.entry(without_port(&tunnel.authority)).or_default();
            match tunnel.step {
                TunnelStep::Open => seen.connect = true,
                TunnelStep::Tls { h2 } => seen.tls = Some(h2),
                TunnelStep::Failed { error } => seen.failed = Some(error),
            }
        }
        while let Ok(event) = self.requests.try_recv() {
            if let Event::Request(request) = event {
                let seen = self.seen.entry(without_port(&request.authority)).or_default();
                seen.request = Some(answer(&request));
            }
        }
    }
}

fn answer(request: &events::Request) -> Answer {
    match (&request.provider, request.code) {
        (Some(_), None) => Answer::Authenticated,
        // The answer did not interest it any more, but a token was there.
        (Some(_), Some("agent_gone")) => Answer::Authenticated,
        (_, code) => Answer::Refused(code.unwrap_or("no token for it").to_owned()),
    }
}

fn host(call: usize) -> String {
    format!("call{call}.{DOMAIN}")
}

fn without_port(authority: &str) -> String {
    authority.rsplit_once(':').map_or(authority, |(host, _)| host).to_owned()
}

/// A folder for a store that nobody keeps.
pub(super) fn folder() -> Result<TempDir, CliError> {
    tempfile::Builder::new().prefix("sidebearer-doctor-").tempdir().map_err(cannot)
}

/// The settings where there is no proxy.yaml: everything is passed on.
pub(super) fn no_routes(folder: &Path) -> Result<Settings, CliError> {
    parse(&format!("listen: 127.0.0.1:0\nroutes: []\n{}", store(folder)), &|_| None)
}

fn settings(servers: &Servers, folder: &Path, calls: usize) -> Result<Settings, CliError> {
    let root = folder.join("provider.pem");
    std::fs::write(&root, servers.root_pem()).map_err(cannot)?;
    let at = servers.address();
    let names: String = (0..calls).map(|call| format!("  {}:443: {at}\n", host(call))).collect();
    let (root, store) = (root.display(), store(folder));
    let text = format!(
        "listen: 127.0.0.1:0
extra_ca_files: ['{root}']
unmatched: deny
resolve:
  {AUTH}:443: {at}
{names}
providers:
  doctor:
    token_endpoint: https://{AUTH}/token
    client_id: {CLIENT_ID}
    client_secret: ${{CLIENT_SECRET}}
    client_credentials: {{}}
routes:
  - host: '*.{DOMAIN}'
    provider: doctor
{store}"
    );
    parse(&text, &|name| (name == "CLIENT_SECRET").then(|| servers.client_secret().to_owned()))
}

fn store(folder: &Path) -> String {
    format!("store:\n  path: '{}'\n  keys: ['${{STORE_KEY}}']\n", folder.join("store").display())
}

/// Reads settings as anyone's would be; the store's key is a new one.
fn parse(text: &str, secrets: &dyn Fn(&str) -> Option<String>) -> Result<Settings, CliError> {
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|error| cannot(std::io::Error::other(error)))?;
    let key = BASE64_STANDARD.encode(key);
    let environment = |name: &str| match name {
        "STORE_KEY" => Some(key.clone()),
        name => secrets(name).or_else(|| std::env::var(name).ok()),
    };
    let settings = config::parse("doctor.yaml", text, &environment)?;
    Ok(Settings { admin: None, health: None, ..settings })
}

fn cannot(error: std::io::Error) -> CliError {
    CliError::failed(format!("doctor cannot start: {error}"), "it needs loopback and a folder for temporary files")
}
