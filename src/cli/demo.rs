//! `sidebearer demo`: the whole product with a provider of its own, told line by line.

mod consent;
pub(super) mod servers;

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use reqwest::{Certificate, Client, Proxy};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast::Receiver;
use tokio::sync::oneshot;

use self::servers::{API, AUTH, CLIENT_ID, LIFETIME, Servers};
use super::CliError;
use crate::app::agent::{self, Variable};
use crate::app::{self, App, Authority, Options, child};
use crate::clock::Clock;
use crate::config::{self, Settings};
use crate::events::{self, Event, TokenChange};
use crate::names::UserName;

/// Of the variables, those that the most clients read.
const SHOWN: [&str; 6] = [
    "HTTPS_PROXY",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "NODE_USE_ENV_PROXY",
];

/// Runs the demo: its story and then whatever is tried by hand, or one command.
pub(super) async fn demo(command: &[OsString]) -> Result<u8, CliError> {
    let folder = tempfile::Builder::new().prefix("sidebearer-demo-").tempdir().map_err(cannot)?;
    let servers = Servers::start(API).await.map_err(cannot)?;
    let settings = settings(&servers, folder.path())?;
    let authority = Authority::Fresh(folder.path().join("ca"));
    let app = app::build(&settings, Options { user: UserName::default(), authority, clock: Clock::system() }).await?;
    let inherited = |name: &str| std::env::var(name).ok();
    let proxy = app.address().expect("the demo listens at an address");
    let mut variables = agent::variables(proxy, &app.ca_files, &inherited);
    variables.extend(agent::files(folder.path(), &app.ca_files.bundle, &inherited).map_err(cannot)?);
    variables.push(("SIDEBEARER_DEMO_URL".to_owned(), format!("https://{API}/me")));

    // Before anything is said: a signal that nobody listens for would leave the folder behind.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    let story = Story::new(&servers, &app, proxy)?;
    let (ended, stop) = oneshot::channel::<()>();
    let sidecar = tokio::spawn(app.run(async {
        let _ = stop.await;
    }));
    let code = if command.is_empty() {
        tokio::select! {
            told = story.tell(&variables) => told,
            _ = interrupt.recv() => Ok(0),
        }
    } else {
        child::run(command, variables, &[]).await.map_err(CliError::from)
    };
    let _ = ended.send(());
    let _ = sidecar.await;
    code
}

/// The demo's configuration, read as anyone's would be.
fn settings(servers: &Servers, folder: &Path) -> Result<Settings, CliError> {
    let root = folder.join("provider.pem");
    std::fs::write(&root, servers.root_pem()).map_err(cannot)?;
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|error| cannot(io::Error::other(error)))?;
    let key = BASE64_STANDARD.encode(key);
    let (root, store, at, issuer) = (root.display(), folder.join("store"), servers.address(), servers.issuer());
    let text = format!(
        "listen: 127.0.0.1:0
admin: 127.0.0.1:0
health: off
extra_ca_files: ['{root}']
resolve:
  {AUTH}:443: {at}
  {API}:443: {at}
providers:
  demo:
    token_endpoint: https://{AUTH}/token
    client_id: {CLIENT_ID}
    client_secret: ${{CLIENT_SECRET}}
    client_credentials: {{}}
  calendar:
    title: Demo Calendar
    issuer: {issuer}
    authorization_endpoint: {issuer}/authorize
    token_endpoint: https://{AUTH}/token
    revocation_endpoint: https://{AUTH}/revoke
    allow_http: true
    client_id: {CLIENT_ID}
    client_secret: ${{CLIENT_SECRET}}
    authorization_code:
      scopes: [events.read, events.write]
routes:
  - host: {API}
    paths: [/calendar]
    provider: calendar
  - host: {API}
    provider: demo
store:
  path: '{}'
  keys: ['${{STORE_KEY}}']
",
        store.display()
    );
    let secrets = |name: &str| match name {
        "CLIENT_SECRET" => Some(servers.client_secret().to_owned()),
        "STORE_KEY" => Some(key.clone()),
        _ => None,
    };
    Ok(config::parse("demo.yaml", &text, &secrets)?)
}

/// What is told, and by whom it is done.
struct Story {
    servers: Servers,
    /// An agent that goes to the API itself.
    direct: Client,
    /// The same agent with HTTPS_PROXY and the CA.
    agent: Client,
    proxy: String,
    dashboard: String,
    ca: String,
    events: Receiver<Event>,
    /// Whether the last event was a request.
    at_hand: bool,
}

impl Story {
    fn new(servers: &Servers, app: &App, proxy: SocketAddr) -> Result<Self, CliError> {
        let trusting = |pem: &[u8]| Ok::<_, reqwest::Error>(vec![Certificate::from_pem(pem)?]);
        let proxy = format!("http://{proxy}");
        let direct = trusting(servers.root_pem().as_bytes()).and_then(|roots| {
            Client::builder().tls_certs_only(roots).resolve(API, servers.address()).no_proxy().build()
        });
        let ca = std::fs::read(&app.ca_files.ca).map_err(cannot)?;
        let agent =
            trusting(&ca).and_then(|roots| Client::builder().tls_certs_only(roots).proxy(Proxy::all(&proxy)?).build());
        Ok(Self {
            servers: servers.clone(),
            direct: direct.map_err(failed)?,
            agent: agent.map_err(failed)?,
            proxy,
            dashboard: app.admin.map(|admin| format!("http://{admin}/")).unwrap_or_default(),
            ca: app.ca_files.ca.display().to_string(),
            events: app.events.watch(),
            at_hand: false,
        })
    }

    async fn tell(mut self, variables: &[Variable]) -> Result<u8, CliError> {
        say("sidebearer demo: an agent, a proxy, and a provider, all on this machine");
        say(&format!("  provider  https://{AUTH}   its tokens live {} s", LIFETIME.as_secs()));
        say(&format!("  API       https://{API}    wants a bearer token"));
        say(&format!("  proxy     {}", self.proxy));

        say("\n1. The agent calls the API by itself. It has no credential.");
        self.call(&self.direct.clone()).await?;
        say("\n2. The same call through the proxy, still with no credential.");
        self.call(&self.agent.clone()).await?;
        say("\n3. Once more: the token is in memory.");
        self.call(&self.agent.clone()).await?;
        say("\n4. The provider revokes the token. Nobody tells the proxy.");
        self.servers.revoke_all();
        say("\n5. The next call meets a 401 on its way, and the agent does not notice.");
        self.call(&self.agent.clone()).await?;

        say("\n6. Another call acts for a user, who has not connected their calendar. The answer says how.");
        self.call_at(&self.agent.clone(), "calendar").await?;
        say("   you       open that link, press Continue and Allow, and repeat the call below");

        say(&format!("\nThe dashboard: {}", self.dashboard));
        say("\nIt stays up. Try it by hand from another terminal:");
        say(&format!("  curl --proxy {} --cacert {} https://{API}/me", self.proxy, self.ca));
        say(&format!("  curl --proxy {} --cacert {} https://{API}/calendar", self.proxy, self.ca));
        say(&format!("  curl --proxy {} --cacert {} -X POST https://{API}/revoke", self.proxy, self.ca));
        say("or give an agent these variables (`sidebearer env` prints all of them, for a sidecar of yours):");
        for (name, value) in variables.iter().filter(|(name, _)| SHOWN.contains(&name.as_str())) {
            say(&format!("  export {name}='{value}'"));
        }
        say("\nWhat happens is shown here. Ctrl-C ends it.");
        self.watch().await
    }

    async fn call(&mut self, client: &Client) -> Result<(), CliError> {
        self.call_at(client, "me").await
    }

    /// Makes a call, and tells what the agent saw after what happened on the way.
    async fn call_at(&mut self, client: &Client, path: &str) -> Result<(), CliError> {
        let url = format!("https://{API}/{path}");
        let response = client.get(&url).send().await.map_err(failed)?;
        let status = response.status();
        let body = response.text().await.map_err(failed)?;
        while let Ok(event) = self.events.try_recv() {
            self.show(&event);
        }
        say(&format!("   agent     GET {url} -> {status} {}", summary(&body)));
        Ok(())
    }

    async fn watch(mut self) -> ! {
        loop {
            if let Ok(event) = self.events.recv().await {
                self.show(&event);
            }
        }
    }

    fn show(&mut self, event: &Event) {
        match event {
            Event::Missing(missing) => say(&format!(
                "   user      `{}` has to connect {}: {}",
                missing.user, missing.title, missing.connect_url
            )),
            Event::Token(token) => say(&format!("   token     {}", told(&token.what))),
            Event::Request(request) => say(&format!("   proxy     {}", summed_up(request, self.at_hand))),
        }
        // Nothing happened to a token since the last request: it was in memory.
        self.at_hand = matches!(event, Event::Request(_));
    }
}

/// An API's answer as it is; of one of the proxy's own, what matters here.
fn summary(body: &str) -> String {
    let problem = serde_json::from_str::<serde_json::Value>(body).ok();
    let link = problem.as_ref().and_then(|problem| problem["connect_url"].as_str());
    link.map_or_else(
        || body.trim().to_owned(),
        |url| format!("{{\"code\":\"not_connected\",\"connect_url\":\"{url}\",...}}"),
    )
}

fn told(what: &TokenChange) -> String {
    match what {
        TokenChange::Obtained { cause, lifetime, generation, took } => {
            let lifetime = lifetime.map_or("an unknown time".to_owned(), |time| format!("{} s", time.as_secs()));
            let why = match *cause {
                "rejected" => "renewed, because the API rejected the last one",
                "ahead" => "renewed ahead of its end",
                "consent" => "given by the user",
                _ => "fetched from the provider",
            };
            format!("{why}: number {generation}, good for {lifetime}, in {:.1} ms", took.as_secs_f64() * 1000.0)
        }
        TokenChange::Adopted { generation } => format!("number {generation} found in the store"),
        TokenChange::Failed { error, .. } => format!("none: {error}"),
        TokenChange::Disconnected => "disconnected".to_owned(),
        TokenChange::Rejected { generation } => format!("number {generation} was answered with 401"),
    }
}

fn summed_up(request: &events::Request, at_hand: bool) -> String {
    let retried = if request.retried { ", sent twice" } else { "" };
    let token = if at_hand && request.provider.is_some() { ", token from memory" } else { "" };
    let took = request.took.as_secs_f64() * 1000.0;
    let status = request.status.map_or("nobody there".to_owned(), |status| status.as_u16().to_string());
    format!("{} {}{} -> {status}{retried}{token}, {took:.1} ms", request.method, request.authority, request.path)
}

fn say(line: &str) {
    anstream::println!("{line}");
}

fn cannot(error: io::Error) -> CliError {
    CliError::failed(format!("the demo cannot start: {error}"), "it needs loopback and a folder for temporary files")
}

fn failed(error: reqwest::Error) -> CliError {
    CliError::failed(format!("the demo's own call failed: {error}"), "report it with this message")
}
