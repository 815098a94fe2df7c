//! A world for one test: an app on a free port, an API, a provider, and a server that must never see a token.
//!
//! When it ends it looks for its secrets where they must not be: in the log at trace level, in what agents were
//! answered, and in what the third server saw; and for panics.

pub mod agent;
pub mod answer;
pub mod browser;
pub mod certificates;
pub mod corporate;
pub mod frames;
pub mod log;
pub mod program;
pub mod provider;
pub mod raw;
pub mod server;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::client::EchMode;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};
use sidebearer::app::reload::Reloader;
use sidebearer::app::{self, AppError, Authority, Desk, Options};
use sidebearer::clock::Clock;
use sidebearer::config::{self, Settings};
use sidebearer::drain::Drained;
use sidebearer::events::{self, Event, TokenChange};
use sidebearer::listen::Place;
use sidebearer::names::{ProviderName, Subject, UserName};
use sidebearer::secret::Secret;
use sidebearer::store::{Row, Store};
use tempfile::TempDir;
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::process::Command;
use tokio::sync::{broadcast, oneshot};
use tokio::task::JoinHandle;

use self::agent::Heard;
use self::answer::Answer;
use self::certificates::{Proof, Root};
use self::corporate::Corporate;
use self::log::{CANARY, ENCODED};
use self::provider::{CLIENT_ID, Issued};
use self::raw::Raw;
use self::server::Server;

/// Nothing takes longer, not on a busy machine either; what does is a failure, not a slow test.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Waits for what must happen.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("it did not happen in time")
}

/// An address at which nobody listens while the socket is kept, and which nobody gets by chance.
pub fn nobody() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    // Who asks for this very address may have it, as a sidecar that is to find out later that it must not.
    socket.set_reuseaddr(true).unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// What is different in a world.
pub struct Setup {
    listen: String,
    top: String,
    provider: String,
    routes: String,
    api_alpn: Vec<&'static str>,
    api_proof: Proof,
    evil_proof: Proof,
    resolve: Vec<(&'static str, To)>,
    lifetime: Option<u64>,
    users: Vec<&'static str>,
    user: &'static str,
    more_providers: String,
    keeps_authority: bool,
    /// Nobody but the company's proxy knows the way to the servers.
    behind: bool,
    corporate_speaks_tls: bool,
    /// What is dialled all the same.
    dialled: Vec<(&'static str, To)>,
}

/// A server of the world.
#[derive(Clone, Copy)]
pub enum To {
    Api,
    Evil,
    Plain,
    /// A port on which nobody listens.
    Nobody,
}

/// The fields of a form.
pub type Form = std::collections::HashMap<String, String>;

/// A running world.
pub struct World {
    pub api: Server,
    pub auth: Server,
    pub evil: Server,
    /// `plain.test`, an API without TLS.
    pub plain: Server,
    /// What leads out, if the world has it so.
    pub corporate: Corporate,
    pub issued: Issued,
    /// Where agents reach it.
    pub places: Vec<Place>,
    pub proxy: SocketAddr,
    /// Where browsers and programs reach it.
    pub admin: SocketAddr,
    /// Where probes reach it.
    pub health: SocketAddr,
    pub ca: PathBuf,
    /// What time it is; its wall clock can be set apart.
    pub clock: Clock,
    settings: Settings,
    reloader: Reloader,
    /// Where the CA of one run is, if it is not the store's.
    authority: Option<PathBuf>,
    environment: Environment,
    user: UserName,
    root: String,
    roots: Arc<RootCertStore>,
    told: Mutex<Told>,
    heard: Heard,
    stop: Option<oneshot::Sender<()>>,
    running: Option<JoinHandle<Drained>>,
    pub folder: TempDir,
}

/// The usual world: client credentials, one route to `api.test`.
impl Default for Setup {
    fn default() -> Self {
        Self {
            top: String::new(),
            listen: "127.0.0.1:0".into(),
            provider: "client_credentials: {}".into(),
            routes: "  - host: api.test\n    provider: main\n".into(),
            api_alpn: vec!["h2", "http/1.1"],
            api_proof: Proof::Good,
            evil_proof: Proof::Good,
            resolve: vec![("api.test:443", To::Api), ("evil.test:443", To::Evil), ("plain.test:80", To::Plain)],
            lifetime: Some(3600),
            users: Vec::new(),
            user: "default",
            more_providers: String::new(),
            keeps_authority: false,
            behind: false,
            corporate_speaks_tls: false,
            dialled: Vec::new(),
        }
    }
}

impl Setup {
    pub fn new() -> Self {
        Self::default()
    }

    /// Further lines of `proxy.yaml`; `FOLDER` is the world's own.
    pub fn top(mut self, lines: &str) -> Self {
        self.top.push_str(&format!("{lines}\n"));
        self
    }

    /// Where it listens, in the place of one free port; `FOLDER` is the world's own.
    pub fn listen(self, places: &str) -> Self {
        Self { listen: places.into(), ..self }
    }

    /// The routes, in the place of the one to `api.test`.
    pub fn routes(self, routes: &str) -> Self {
        Self { routes: routes.lines().map(|line| format!("  {line}\n")).collect(), ..self }
    }

    pub fn api_speaks(self, alpn: &[&'static str]) -> Self {
        Self { api_alpn: alpn.to_vec(), ..self }
    }

    pub fn api_proves_itself(self, proof: Proof) -> Self {
        Self { api_proof: proof, ..self }
    }

    pub fn evil_proves_itself(self, proof: Proof) -> Self {
        Self { evil_proof: proof, ..self }
    }

    /// Who answers for an authority.
    pub fn resolve(mut self, authority: &'static str, to: To) -> Self {
        self.resolve.retain(|(known, _)| *known != authority);
        self.resolve.push((authority, to));
        self
    }

    /// Out leads only the company's proxy, as it is named here.
    pub fn behind(self, url: &str) -> Self {
        Self { behind: true, ..self }.top(&format!("upstream_proxy: '{url}'"))
    }

    pub fn corporate_speaks_tls(self) -> Self {
        Self { corporate_speaks_tls: true, ..self }
    }

    /// What `resolve:` names even so.
    pub fn dials(mut self, authority: &'static str, to: To) -> Self {
        self.dialled.push((authority, to));
        self
    }

    /// `None`: the provider does not say.
    pub fn tokens_live(self, seconds: Option<u64>) -> Self {
        Self { lifetime: seconds, ..self }
    }

    /// The provider works for users; these have connected.
    pub fn connected(mut self, users: &[&'static str]) -> Self {
        self.provider = "refresh_token: {}".into();
        self.users = users.to_vec();
        self
    }

    /// Users of the provider consent with their browsers.
    pub fn consenting() -> Self {
        let provider = "title: Main
issuer: https://auth.test
authorization_endpoint: https://auth.test/authorize
device_authorization_endpoint: https://auth.test/device
revocation_endpoint: https://auth.test/revoke
authorization_code:
  scopes: [read, write]";
        Self { provider: indented(provider, 4), ..Self::default() }
    }

    /// As [`Setup::consenting`], where the provider's metadata says the rest: that it names itself in every answer.
    pub fn consenting_as_discovered(issuer: &str) -> Self {
        let provider = format!("title: Main\nissuer: {issuer}\nauthorization_code:\n  scopes: [read, write]");
        Self { provider: indented(&provider, 4), ..Self::default() }
    }

    /// Further lines of the provider.
    pub fn provider(mut self, lines: &str) -> Self {
        self.provider.push_str(&format!("\n    {}", indented(lines, 4)));
        self
    }

    /// Another provider whose users consent, at another server.
    pub fn and_another_provider(self) -> Self {
        let other = "other:
  title: Other
  issuer: https://other.test
  authorization_endpoint: https://other.test/authorize
  token_endpoint: https://other.test/token
  client_id: another
  authorization_code: {}";
        Self { more_providers: format!("  {}\n", indented(other, 2)), ..self }
    }

    /// These have connected before the world begins.
    pub fn with_grants_of(self, users: &[&'static str]) -> Self {
        Self { users: users.to_vec(), ..self }
    }

    /// Its CA is the one in its store, as that of `sidebearer run` is.
    pub fn keeping_its_authority(self) -> Self {
        Self { keeps_authority: true, ..self }
    }

    /// For whom the agent acts.
    pub fn acting_for(self, user: &'static str) -> Self {
        Self { user, ..self }
    }

    pub async fn start(self) -> World {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        log::watch();
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let issued = Issued::new(COUNT.fetch_add(1, Ordering::SeqCst), self.lifetime);
        let root = Root::new();
        let (for_api, for_auth) = (issued.clone(), issued.clone());
        let api = root.server(&["api.test", "*.api.test"], self.api_proof, &self.api_alpn);
        let api = Server::start(Some(api), Box::new(move |seen| for_api.api(seen))).await;
        let auth = root.server(&["auth.test"], Proof::Good, &["h2", "http/1.1"]);
        let auth = Server::start(Some(auth), Box::new(move |seen| for_auth.answer(seen))).await;
        let evil = root.server(&["evil.test", "api.test"], self.evil_proof, &["h2", "http/1.1"]);
        let evil = Server::start(Some(evil), Box::new(|_| answer::answer(200).saying("thank you\n"))).await;
        let for_plain = issued.clone();
        let plain = Server::start(None, Box::new(move |seen| for_plain.api(seen))).await;

        let corporate = self.corporate_speaks_tls.then(|| root.server(&["corp.test"], Proof::Good, &["http/1.1"]));
        let corporate = Corporate::start(corporate).await;

        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("root.pem"), &root.pem).unwrap();
        let key = BASE64_STANDARD.encode(random());
        let text = self.text(&folder, &[&api, &auth, &evil, &plain], &corporate);
        let environment = Environment { client_secret: issued.client_secret(), store_key: key };
        let settings = config::parse("proxy.yaml", &text, &|name| environment.get(name));
        let settings = settings.unwrap_or_else(|error| panic!("{error}\n{text}"));
        std::fs::write(folder.path().join("proxy.yaml"), &text).unwrap();
        for (index, user) in self.users.iter().enumerate() {
            connect(&settings, user, &issued.grant_to(user, index + 1)).await;
        }
        let (user, clock) = (self.user.parse().unwrap(), Clock::stepped());
        let authority = if self.keeps_authority { None } else { Some(folder.path().join("ca")) };
        let Launched { places, proxy, admin, health, ca, roots, told, reloader, stop, running } =
            Launched::new(&settings, authority.clone(), &user, &clock, &root.pem).await;
        World {
            api,
            auth,
            evil,
            plain,
            corporate,
            issued,
            places,
            proxy,
            admin,
            health,
            ca,
            clock,
            settings,
            reloader,
            authority,
            environment,
            user,
            root: root.pem,
            roots,
            told: Mutex::new(told),
            heard: Heard::default(),
            stop: Some(stop),
            running: Some(running),
            folder,
        }
    }

    /// A `proxy.yaml`.
    fn text(&self, folder: &TempDir, servers: &[&Server; 4], corporate: &Corporate) -> String {
        let [api, auth, evil, plain] = servers;
        let address = |to: &To| match to {
            To::Api => api.address(),
            To::Evil => evil.address(),
            To::Plain => plain.address(),
            To::Nobody => SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
        };
        let ways = self.resolve.iter().map(|(authority, to)| (*authority, address(to)));
        let ways = ways.chain([("auth.test:443", auth.address())]);
        let dialled = self.dialled.iter().map(|(authority, to)| (*authority, address(to)));
        let dialled: Vec<_> = if self.behind {
            ways.for_each(|(authority, address)| corporate.knows(authority, address));
            dialled.chain([("corp.test:3128", corporate.address())]).collect()
        } else {
            ways.collect()
        };
        let resolve: String =
            dialled.iter().map(|(authority, address)| format!("  {authority}: {address}\n")).collect();
        let (path, provider, routes) = (folder.path().display(), &self.provider, &self.routes);
        let within = |text: &str| text.replace("FOLDER", &path.to_string());
        let (more, listen, top) = (&self.more_providers, within(&self.listen), within(&self.top));
        format!(
            "listen: {listen}
admin: 127.0.0.1:0
health: 127.0.0.1:0
extra_ca_files: ['{path}/root.pem']
drain: 5s
{top}resolve:
{resolve}providers:
  main:
    token_endpoint: https://auth.test/token
    client_id: {CLIENT_ID}
    client_secret: ${{CLIENT_SECRET}}
    {provider}
{more}routes:
{routes}store:
  path: '{path}/store'
  keys: ['${{STORE_KEY}}']
"
        )
    }
}

/// Where secrets of a `proxy.yaml` come from.
struct Environment {
    client_secret: String,
    store_key: String,
}

impl Environment {
    fn get(&self, name: &str) -> Option<String> {
        match name {
            "CLIENT_SECRET" => Some(self.client_secret.clone()),
            "STORE_KEY" => Some(self.store_key.clone()),
            "ADMIN_TOKEN" => Some(admin_token()),
            name => Some(secret_of(name.strip_suffix("_SECRET")?)),
        }
    }
}

/// The admin token of every world that has one.
pub fn admin_token() -> String {
    format!("{CANARY}admin-token")
}

/// The secret of an agent.
pub fn secret_of(agent: &str) -> String {
    format!("{CANARY}secret-of-{}", agent.to_lowercase())
}

/// An app that runs, and what leads to it.
struct Launched {
    places: Vec<Place>,
    proxy: SocketAddr,
    admin: SocketAddr,
    health: SocketAddr,
    ca: PathBuf,
    roots: Arc<RootCertStore>,
    told: Told,
    reloader: Reloader,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Drained>,
}

impl Launched {
    async fn new(settings: &Settings, authority: Option<PathBuf>, user: &UserName, clock: &Clock, root: &str) -> Self {
        let authority = authority.map_or(Authority::Kept, Authority::Fresh);
        let options = Options { user: user.clone(), authority, clock: clock.clone() };
        let app = app::build(settings, options).await.unwrap();
        let roots = Arc::new(roots(&[&std::fs::read_to_string(&app.ca_files.ca).unwrap(), root]));
        let (places, proxy) = (app.places.clone(), app.address().unwrap());
        let (admin, health, ca) = (app.admin.unwrap(), app.health.unwrap(), app.ca_files.ca.clone());
        let told = Told::by(app.events.watch());
        let (reloader, (stop, stopped)) = (app.reloader(), oneshot::channel::<()>());
        let running = tokio::spawn(app.run(async {
            let _ = stopped.await;
        }));
        Self { places, proxy, admin, health, ca, roots, told, reloader, stop, running }
    }
}

impl World {
    pub async fn start() -> Self {
        Setup::new().start().await
    }

    pub fn api_answers<A: Into<Answer>>(&self, answers: impl IntoIterator<Item = A>) {
        self.api.answers(answers);
    }

    pub fn provider_answers<A: Into<Answer>>(&self, answers: impl IntoIterator<Item = A>) {
        self.auth.answers(answers);
    }

    /// How often the provider was asked for a token.
    pub fn token_calls(&self) -> usize {
        self.token_requests().len()
    }

    /// The forms that came to the token endpoint.
    pub fn token_requests(&self) -> Vec<Form> {
        self.forms_at("/token")
    }

    /// The tokens that were given back to the provider (RFC 7009).
    pub fn given_back(&self) -> Vec<String> {
        self.forms_at("/revoke").iter().map(|form| form["token"].clone()).collect()
    }

    fn forms_at(&self, path: &str) -> Vec<Form> {
        let seen = self.auth.seen().into_iter().filter(|seen| seen.path() == path);
        seen.map(|seen| url::form_urlencoded::parse(&seen.body).into_owned().collect()).collect()
    }

    /// Changes the store behind everybody's back.
    pub fn sql(&self, sql: &str) {
        let path = self.settings.store_path.join("sidebearer.db");
        rusqlite::Connection::open(path).unwrap().execute_batch(sql).unwrap();
    }

    /// The store, as another process has it.
    pub async fn store_elsewhere(&self) -> Store {
        app::open_store(&self.settings, false).await.unwrap()
    }

    /// What is stored of a user's grant.
    pub async fn stored(&self, user: &str) -> Option<Row> {
        self.store_elsewhere().await.grant(&main(), &subject(user)).await.unwrap()
    }

    /// Another process stores the grant of a user.
    pub async fn connects_elsewhere(&self, user: &str) {
        connect(&self.settings, user, &self.issued.grant_to(user, 500)).await;
    }

    /// What `sidebearer connect` works with, in this process.
    pub async fn desk(&self) -> Desk {
        app::desk(&self.settings).await.unwrap()
    }

    /// The program beside the sidecar, with its `proxy.yaml`.
    pub fn program(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sidebearer"));
        command.args(arguments).current_dir(self.folder.path()).env_clear().env("HOME", self.folder.path());
        for name in ["CLIENT_SECRET", "STORE_KEY"] {
            command.env(name, self.environment.get(name).unwrap());
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// The process ends and starts again.
    pub async fn restarts(&mut self) {
        self.begins_to_stop();
        self.ends().await;
        let Launched { places, proxy, admin, health, ca, roots, told, reloader, stop, running } =
            Launched::new(&self.settings, self.authority.clone(), &self.user, &self.clock, &self.root).await;
        (self.places, self.proxy, self.admin, self.health) = (places, proxy, admin, health);
        (self.ca, self.roots) = (ca, roots);
        (self.told, self.stop, self.running) = (Mutex::new(told), Some(stop), Some(running));
        self.reloader = reloader;
    }

    /// Its `proxy.yaml` changes, in each place that holds the first text of a pair, and it is reloaded.
    pub async fn reloads(&mut self, changes: &[(&str, &str)]) {
        self.tries_to_reload(changes).await.unwrap();
        let ca = std::fs::read_to_string(&self.ca).unwrap();
        self.roots = Arc::new(roots(&[&ca, &self.root]));
    }

    /// As [`World::reloads`], where that may fail.
    pub async fn tries_to_reload(&mut self, changes: &[(&str, &str)]) -> Result<events::Reload, AppError> {
        let path = self.folder.path().join("proxy.yaml");
        let mut text = std::fs::read_to_string(&path).unwrap();
        for (old, new) in changes {
            assert!(text.contains(old), "{old} is not in {text}");
            text = text.replace(old, new);
        }
        let settings = config::parse("proxy.yaml", &text, &|name| self.environment.get(name));
        let settings = settings.unwrap_or_else(|error| panic!("{error}\n{text}"));
        let outcome = self.reloader.reload(settings.clone()).await?;
        std::fs::write(path, text).unwrap();
        self.settings = settings;
        Ok(outcome)
    }

    /// A connection to the proxy's port.
    /// Another host, routed as the first is, from the next start on.
    pub fn routes_also(&mut self, host: &str) {
        let mut route = self.settings.routes[0].clone();
        route.host = host.parse().unwrap();
        self.settings.routes.push(route);
    }

    pub async fn connection(&self) -> Raw {
        self.connection_at(&self.places[0]).await
    }

    /// A connection to one of its listeners.
    pub async fn connection_at(&self, place: &Place) -> Raw {
        match place {
            Place::Tcp(address) => {
                let stream = soon(TcpStream::connect(address)).await.unwrap();
                stream.set_nodelay(true).unwrap();
                Raw::new(stream, self.roots.clone(), self.heard.clone())
            }
            Place::Unix { path, .. } => {
                let stream = soon(UnixStream::connect(path)).await.unwrap();
                Raw::new(stream, self.roots.clone(), self.heard.clone())
            }
        }
    }

    /// A connection on which CONNECT was answered with 200.
    pub async fn tunnel(&self, to: &str) -> Raw {
        self.tunnel_with(to, "").await
    }

    /// As [`World::tunnel`], with further lines in the head.
    pub async fn tunnel_with(&self, to: &str, lines: &str) -> Raw {
        let mut connection = self.connection().await;
        connection.says(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n{lines}\r\n")).await;
        let reply = connection.hears().await;
        assert_eq!(reply.status, 200, "CONNECT {to}: {}", reply.text());
        connection
    }

    /// HTTP/1.1 with the API, byte by byte.
    pub async fn api_connection(&self) -> Raw {
        self.tunnel("api.test:443").await.tls("api.test", &["http/1.1"]).await.unwrap()
    }

    /// As [`World::api_connection`], in HTTP/2.
    pub async fn api_h2(&self) -> Raw {
        self.tunnel("api.test:443").await.tls("api.test", &["h2"]).await.unwrap()
    }

    /// A client that trusts the sidecar's CA.
    pub fn client_config(&self) -> ClientConfig {
        raw::client(self.roots.clone())
    }

    /// As [`World::client_config`], with Encrypted Client Hello.
    pub fn client_config_with(&self, hello: EchMode) -> Arc<ClientConfig> {
        let builder = raw::client_by(|builder| builder.with_ech(hello));
        Arc::new(builder.with_root_certificates(self.roots.clone()).with_no_client_auth())
    }

    /// Waits until its log has so many lines with this text at this level.
    pub async fn logs(&self, text: &str, level: &str, lines: usize) -> Vec<String> {
        let of_level = |line: &String| line.contains(&format!(" {level} "));
        soon(async {
            loop {
                let found: Vec<String> = log::lines_with(text).into_iter().filter(of_level).collect();
                if found.len() >= lines {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    }

    /// The requests that were told of since this was last asked.
    pub fn requests_told(&self) -> Vec<events::Request> {
        let mut told = self.told.lock().unwrap();
        told.catch_up();
        let new = told.requests_asked..told.requests.len();
        told.requests_asked = told.requests.len();
        told.requests[new].to_vec()
    }

    /// The one request that was told of since this was last asked.
    pub fn request_told(&self) -> events::Request {
        let mut told = self.requests_told();
        assert_eq!(told.len(), 1, "{told:?}");
        told.remove(0)
    }

    /// Waits until the sidecar has obtained so many tokens.
    pub async fn obtained_tokens(&self, tokens: usize) {
        self.tells(|told| told.obtained >= tokens).await;
    }

    /// Waits until it has said so often that a user has to connect.
    pub async fn says_who_is_missing(&self, times: usize) -> Vec<events::Missing> {
        self.tells(|told| told.missing.len() >= times).await;
        self.missing_told()
    }

    /// How often it has said that a user has to connect.
    pub fn missing_told(&self) -> Vec<events::Missing> {
        self.told.lock().unwrap().catch_up().missing.clone()
    }

    async fn tells(&self, enough: impl Fn(&Told) -> bool) {
        soon(async {
            loop {
                let mut live = self.told.lock().unwrap().live.resubscribe();
                if enough(self.told.lock().unwrap().catch_up()) {
                    return;
                }
                let _ = live.recv().await;
            }
        })
        .await;
    }

    /// What agents have been told so far may have held a secret.
    pub fn forgives_what_was_told(&self) {
        self.heard.forget();
    }

    /// Says stop.
    pub fn begins_to_stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    /// Waits until it has stopped.
    pub async fn ends(&mut self) -> Drained {
        soon(self.running.take().unwrap()).await.unwrap()
    }
}

/// What the sidecar told of itself.
struct Told {
    live: broadcast::Receiver<Event>,
    requests: Vec<events::Request>,
    requests_asked: usize,
    /// How many tokens came from the provider.
    obtained: usize,
    missing: Vec<events::Missing>,
}

impl Told {
    fn by(live: broadcast::Receiver<Event>) -> Self {
        Self { live, requests: Vec::new(), requests_asked: 0, obtained: 0, missing: Vec::new() }
    }

    fn catch_up(&mut self) -> &Self {
        use broadcast::error::TryRecvError;
        loop {
            match self.live.try_recv() {
                Ok(Event::Request(request)) => self.requests.push(request),
                Ok(Event::Missing(missing)) => self.missing.push(missing),
                Ok(Event::Token(token)) => {
                    self.obtained += usize::from(matches!(token.what, TokenChange::Obtained { .. }));
                }
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => return self,
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let offences = log::offences();
        assert!(offences.is_empty(), "{}", offences.join("\n"));
        let heard = self.heard.text();
        let told = [CANARY, ENCODED].iter().any(|secret| heard.contains(secret));
        assert!(!told, "an agent was told a secret: {heard}");
        let captured = format!("{:?}", self.evil.seen());
        let got = [CANARY, ENCODED].iter().any(|secret| captured.contains(secret));
        assert!(!got, "the wrong server got a secret: {captured}");
        let in_clear: Vec<_> =
            self.evil.seen().iter().filter_map(|seen| String::from_utf8(seen.body.clone()).ok()).collect();
        assert!(!in_clear.concat().contains(CANARY), "the wrong server got a secret: {in_clear:?}");
    }
}

async fn connect(settings: &Settings, user: &str, refresh_token: &str) {
    let store = app::open_store(settings, true).await.unwrap();
    let row = Row::new(main(), subject(user), settings.providers[0].target.clone(), SystemTime::now());
    store.replace(Row { refresh_token: Some(Secret::new(refresh_token)), ..row }).await.unwrap();
}

/// The provider of every world.
pub fn main() -> ProviderName {
    "main".parse().unwrap()
}

pub fn subject(user: &str) -> Subject {
    Subject::User(user.parse().unwrap())
}

/// The lines, each but the first further in.
fn indented(lines: &str, by: usize) -> String {
    lines.trim_end().lines().collect::<Vec<_>>().join(&format!("\n{}", " ".repeat(by)))
}

fn roots(pems: &[&str]) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    for pem in pems {
        roots.add(CertificateDer::from(pem::parse(pem).unwrap().into_contents())).unwrap();
    }
    roots
}

fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}
