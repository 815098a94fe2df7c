//! Settings become a running sidecar: what is opened in which order, and how it stops.

pub mod agent;
mod authority;
pub mod child;
mod notify;
pub mod reload;
mod traces;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::CryptoProvider;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::audit::{self, Audit};
use crate::ca::files::CaFiles;
use crate::ca::{self, Ca, CaError};
use crate::clock::Clock;
use crate::config::Settings;
use crate::consent::{self, Consent};
use crate::crypto;
use crate::drain::{Drain, Drained, Quit};
use crate::events::Events;
use crate::health::Health;
use crate::host;
use crate::limits::Limits;
use crate::links::Links;
use crate::listen::{Listener, Place};
use crate::metrics::{Metrics, Trail};
use crate::names::UserName;
use crate::proxy::caller::Entrance;
use crate::routes::Routes;
use crate::store::key::{KeyError, Keyring};
use crate::store::{Store, StoreError};
use crate::tokens::{self, Tokens};
use crate::upstream::{Calls, Dialer, Roots, RootsError};
use crate::web;
use reload::{Lasting, Made, Reloader};
use traces::Export;

/// How long a sidecar waits at its start for a store that is away, and how soon it asks again.
const STORE_WAIT: Duration = Duration::from_secs(15);
const STORE_AGAIN: Duration = Duration::from_millis(500);

pub use authority::last as last_ca;

/// What the settings do not say.
pub struct Options {
    /// For whom callers act.
    pub user: UserName,
    /// Where the local CA comes from.
    pub authority: Authority,
    /// What time it is.
    pub clock: Clock,
}

/// Where the local CA comes from.
pub enum Authority {
    /// The one kept in the store, its files in the settings' folder; made there if need be.
    Kept,
    /// One for this run only, its files in this folder.
    Fresh(PathBuf),
}

/// A sidecar that is bound and ready to run.
pub struct App {
    /// Where agents reach it, each in the settings' order.
    pub places: Vec<Place>,
    /// Where redirected connections reach it, likewise.
    pub transparent: Vec<Place>,
    /// What agents are to trust.
    pub ca_files: CaFiles,
    /// What happens in it.
    pub events: Events,
    /// Where people and their browsers reach it, if they can.
    pub admin: Option<SocketAddr>,
    /// Where probes reach it, if they can.
    pub health: Option<SocketAddr>,
    probes: Option<Probes>,
    quit: Quit,
    listeners: Vec<Listener>,
    redirected: Vec<Listener>,
    pages: Option<Listener>,
    tokens: Tokens,
    notifier: notify::Notifier,
    reloader: Reloader,
    drain: Drain,
    audit: Option<Audit>,
    export: Option<Export>,
    limits: Limits,
}

/// What probes reach.
struct Probes {
    health: Health,
    /// Answers until this goes.
    _serving: AbortOnDropHandle<()>,
}

/// Binds, opens the store, makes the CA ready, and writes its files. No network call is needed for it.
///
/// # Errors
/// See [`AppError`].
pub async fn build(settings: &Settings, options: Options) -> Result<App, AppError> {
    let Options { user, authority, clock } = options;
    // For the demo's reqwest, which asks for the process's default; a second start in one process finds it installed.
    let _ = CryptoProvider::clone(&crypto::provider()).install_default();
    // First: a sidecar that cannot listen must not have replaced the CA of the one that does.
    let bound = Bound::bind(settings).await?;
    let (events, drain, quit) = (Events::default(), Drain::default(), Quit::default());
    let audit = settings.audit.as_ref().map(|wanted| open_audit(wanted, events.metrics())).transpose()?;
    // Before the store is waited for: a sidecar that starts slowly lives.
    let (health, probes) = match settings.health {
        Some(at) => Some(probes(at, &events, &drain).await?).unzip(),
        None => (None, None),
    };

    tokio::task::spawn_blocking(crypto::warm_up);
    let roots = load_roots(settings);
    let store = await_store(settings).await?.measured_by(events.metrics());
    let roots = roots.await.expect("loading roots does not panic")?;
    let (keeps_ca, now) = (matches!(authority, Authority::Kept), clock.now().wall);
    let (ca, ca_files) = ready_ca(settings, &store, authority, now).await?;
    ca_files.write(&ca, roots.certificates(), keeps_ca)?;
    events.metrics().ca_ends(ca.not_after());

    let (places, transparent, own) = (bound.places(), bound.transparent(), bound.own(health));
    let Bound { listeners, redirected, admin } = bound;
    let (pages, admin) = admin.unzip();
    let dialer = dialer(settings, &roots, own.clone(), events.metrics())?;
    let calls = Arc::new(Calls::new(dialer.clone()));
    let traces = settings.traces.clone().map(|collector| Export::start(collector, calls.clone()));
    let (traces, export) = traces.unzip();
    let parts = tokens::Parts {
        store: store.clone(),
        servers: calls.clone(),
        clock: clock.clone(),
        events: events.clone(),
        drain: drain.clone(),
    };
    let tokens = Tokens::new(&settings.providers, parts);
    let lasting = Lasting {
        store,
        calls: calls.clone(),
        clock,
        events: events.clone(),
        drain: drain.clone(),
        quit: quit.clone(),
        user,
        audit: audit.clone(),
        traces,
        places: places.clone(),
        admin,
        own,
        ca_files: ca_files.clone(),
        keeps_ca,
    };
    let (reloader, told) = Reloader::new(lasting, settings.clone(), Made { roots, ca, tokens: tokens.clone(), dialer });
    let notifier = notify::Notifier::new(told, calls, &events, &drain);
    let limits = settings.limits.clone();
    Ok(App {
        places,
        transparent,
        ca_files,
        events,
        admin,
        health,
        probes,
        quit,
        listeners,
        redirected,
        pages,
        tokens,
        notifier,
        reloader,
        drain,
        audit,
        export,
        limits,
    })
}

/// What is listened at.
struct Bound {
    listeners: Vec<Listener>,
    redirected: Vec<Listener>,
    admin: Option<(Listener, SocketAddr)>,
}

impl Bound {
    async fn bind(settings: &Settings) -> Result<Self, AppError> {
        let listeners = bind_all("listen", &settings.listen).await?;
        let redirected = bind_all("transparent", &settings.transparent).await?;
        let admin = match settings.admin {
            Some(at) => Some(bind_at("admin", at).await?),
            None => None,
        };
        Ok(Self { listeners, redirected, admin })
    }

    fn places(&self) -> Vec<Place> {
        bound(&self.listeners)
    }

    fn transparent(&self) -> Vec<Place> {
        bound(&self.redirected)
    }

    /// Our own addresses, to which nothing is sent.
    fn own(&self, health: Option<SocketAddr>) -> Vec<SocketAddr> {
        let listeners = self.listeners.iter().chain(&self.redirected);
        let admin = self.admin.as_ref().map(|(_, at)| *at);
        listeners.filter_map(|listener| listener.place().address()).chain(admin).chain(health).collect()
    }
}

/// A CA that speaks for all routed hosts, and where its files are to be.
async fn ready_ca(
    settings: &Settings,
    store: &Store,
    authority: Authority,
    now: SystemTime,
) -> Result<(Ca, CaFiles), AppError> {
    let routes = Routes::new(settings.routes.iter().cloned());
    match authority {
        Authority::Kept => {
            let ca = authority::kept(store, settings, routes.hosts(), now, None).await?;
            Ok((ca, CaFiles::within(&settings.ca_path)))
        }
        Authority::Fresh(folder) => Ok((Ca::generate(routes.hosts(), now)?, CaFiles::within(&folder))),
    }
}

/// Begins to load the roots, which can be hundreds of files, beside what else is to be made ready.
fn load_roots(settings: &Settings) -> JoinHandle<Result<Roots, RootsError>> {
    let extra = settings.extra_ca_files.clone();
    tokio::task::spawn_blocking(move || Roots::load(&extra, ca::ORGANIZATION))
}

/// What leads out, and never to our `own` listeners.
fn dialer(settings: &Settings, roots: &Roots, own: Vec<SocketAddr>, metrics: &Metrics) -> Result<Dialer, AppError> {
    for proxy in settings.proxies.all() {
        if proxy.is_one_of(&own) {
            return Err(AppError::OwnProxy(proxy.authority.clone()));
        }
        tracing::info!(proxy = %proxy.authority, "requests go out through the upstream proxy");
    }
    let dialer = Dialer::new(roots, settings.resolve.clone(), settings.proxies.clone(), &settings.limits, metrics)?;
    dialer.refuse(own);
    Ok(dialer)
}

async fn bind_all(key: &'static str, places: &[(Place, Entrance)]) -> Result<Vec<Listener>, AppError> {
    let mut listeners = Vec::new();
    for (place, _) in places {
        listeners.push(bind(key, place).await?);
    }
    Ok(listeners)
}

fn bound(listeners: &[Listener]) -> Vec<Place> {
    listeners.iter().map(|listener| listener.place().clone()).collect()
}

async fn bind(key: &'static str, place: &Place) -> Result<Listener, AppError> {
    Listener::bind(place).await.map_err(|error| AppError::Bind { key, place: place.to_string(), error })
}

fn open_audit(wanted: &audit::Wanted, metrics: &Metrics) -> Result<Audit, AppError> {
    let place = match &wanted.place {
        audit::Place::Stdout => "standard output".to_owned(),
        audit::Place::File(path) => path.display().to_string(),
    };
    let audit = Audit::open(wanted).map_err(|error| AppError::Audit { place, error })?;
    let counted = audit.clone();
    metrics.audit(move || {
        let audit::Lines { written, failed, waiting, up } = counted.lines();
        Trail { written, failed, waiting, up }
    });
    Ok(audit)
}

async fn bind_at(key: &'static str, at: SocketAddr) -> Result<(Listener, SocketAddr), AppError> {
    let listener = bind(key, &Place::Tcp(at)).await?;
    let bound = listener.place().address().unwrap_or(at);
    Ok((listener, bound))
}

async fn probes(at: SocketAddr, events: &Events, drain: &Drain) -> Result<(SocketAddr, Probes), AppError> {
    let (listener, bound) = bind_at("health", at).await?;
    let health = Health::new(events.metrics().clone(), drain.clone());
    Ok((bound, Probes { _serving: health.serve(listener), health }))
}

/// The links to the admin listener, as browsers reach it. Where others than this machine's users can reach it, or have to
/// show who they are, a link carries a ticket.
fn links(settings: &Settings, at: SocketAddr, store: &Store) -> Links {
    let base = settings.public_url.clone().unwrap_or_else(|| {
        let here = if at.ip().is_unspecified() { SocketAddr::from(([127, 0, 0, 1], at.port())) } else { at };
        format!("http://{here}/").parse().expect("an address is a URL's host")
    });
    Links::new(base, store.clone(), settings.admin_token.is_some())
}

fn consents(settings: &Settings, (tokens, store, links): (&Tokens, &Store, &Links), clock: &Clock) -> consent::Parts {
    consent::Parts {
        tokens: tokens.clone(),
        store: store.clone(),
        links: links.clone(),
        clock: clock.clone(),
        providers: settings.providers.clone(),
        return_to: settings.return_to.clone(),
    }
}

/// What a command needs to connect and disconnect users without a sidecar.
pub struct Desk {
    /// Who gives grants, and where they are kept.
    pub tokens: Tokens,
    /// Consents that end in this process.
    pub consent: Consent,
    /// What is under way when the command ends.
    pub drain: Drain,
}

/// Opens the store, made if need be, and what leads to the providers.
///
/// # Errors
/// See [`AppError`].
pub async fn desk(settings: &Settings) -> Result<Desk, AppError> {
    let roots = Roots::load(&settings.extra_ca_files, ca::ORGANIZATION)?;
    let store = open_store(settings, true).await?;
    let (clock, drain, events) = (Clock::system(), Drain::default(), Events::default());
    let own = settings.listen.iter().chain(&settings.transparent).filter_map(|(place, _)| place.address());
    let own = own.chain(settings.admin).chain(settings.health);
    let servers = Arc::new(Calls::new(dialer(settings, &roots, own.collect(), events.metrics())?));
    let shared = store.clone();
    let parts = tokens::Parts { store: shared, servers, clock: clock.clone(), events, drain: drain.clone() };
    let tokens = Tokens::new(&settings.providers, parts);
    let links = links(settings, settings.admin.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0))), &store);
    let consent = Consent::new(consents(settings, (&tokens, &store, &links), &clock));
    Ok(Desk { tokens, consent, drain })
}

impl App {
    /// The first address at which agents reach it, as their variables name it; none when it has Unix sockets only.
    pub fn address(&self) -> Option<SocketAddr> {
        self.places.iter().find_map(Place::address)
    }

    /// Resolves when a program of this machine has asked it to stop; never unless the settings allow it.
    pub fn quit(&self) -> impl Future<Output = ()> + Send + 'static {
        self.quit.asked()
    }

    /// What configures it anew while it runs.
    pub fn reloader(&self) -> Reloader {
        self.reloader.clone()
    }

    /// Serves until `stop` resolves, then lets live requests and renewals finish within the settings' `drain`.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Drained {
        let App {
            probes, listeners, redirected, tokens, pages, notifier, reloader, drain, audit, export, limits, ..
        } = self;
        if let Some(probes) = &probes {
            probes.health.started(tokens.clone());
        }
        let mut serving = JoinSet::new();
        let first_redirected = listeners.len();
        for (entrance, listener) in listeners.into_iter().enumerate() {
            let front = reloader.front().clone();
            serving.spawn(async move { front.serve(listener, entrance).await });
        }
        for (entrance, listener) in redirected.into_iter().enumerate() {
            let front = reloader.front().clone();
            serving.spawn(async move { front.serve_redirected(listener, first_redirected + entrance).await });
        }
        tokio::spawn(async move { tokens.follow_store().await });
        tokio::spawn(notifier.run());
        if let Some((listener, site)) = pages.zip(reloader.site()) {
            tokio::spawn(web::serve(listener, site.router(), drain.clone(), limits.head_timeout));
        }
        stop.await;
        let drained = drain.finish(reloader.deadline()).await;
        // It ends by itself when the stop begins; what is left to wait for is its last accept.
        serving.join_all().await;
        if let Some(audit) = audit {
            audit.finish().await;
        }
        if let Some(export) = export {
            export.finish().await;
        }
        drained
    }
}

/// Opens the settings' store with the settings' keys.
///
/// # Errors
/// See [`StoreError`] and [`KeyError`]; without `create`, a store that is not there is one of them.
pub async fn open_store(settings: &Settings, create: bool) -> Result<Store, AppError> {
    open_with(settings, keys(settings, create).await?, create).await
}

/// As [`open_store`], with keys that were fetched before.
///
/// # Errors
/// See [`StoreError`].
pub async fn open_with(settings: &Settings, keys: Keyring, create: bool) -> Result<Store, AppError> {
    let Some(server) = &settings.store_url else {
        return Ok(Store::open(&settings.store_path, keys, create).await?);
    };
    let tls = Roots::load(&settings.extra_ca_files, ca::ORGANIZATION)?.client_config(&[])?;
    Ok(Store::connect(server, tls, keys, create).await?)
}

/// As [`open_store`], for a sidecar: its server may be starting up beside it.
async fn await_store(settings: &Settings) -> Result<Store, AppError> {
    // Once: a program that prints the keys may take its time.
    let keys = keys(settings, true).await?;
    let until = Instant::now() + STORE_WAIT;
    let mut told = false;
    loop {
        match open_with(settings, keys.clone(), true).await {
            Err(AppError::Store(error @ StoreError::Away { .. })) if Instant::now() < until => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "the store is waited for");
                }
                tokio::time::sleep(STORE_AGAIN).await;
            }
            opened => return opened,
        }
    }
}

async fn keys(settings: &Settings, create: bool) -> Result<Keyring, AppError> {
    match given_keys(settings).await? {
        Some(keys) => Ok(keys),
        None => own_key(settings, create),
    }
}

/// The keys at hand, whether or not there is a store. None is made.
///
/// # Errors
/// See [`KeyError`].
pub async fn keys_at_hand(settings: &Settings) -> Result<Keyring, AppError> {
    match given_keys(settings).await? {
        Some(keys) => Ok(keys),
        None => Ok(Keyring::load(&settings.key_path)?),
    }
}

async fn given_keys(settings: &Settings) -> Result<Option<Keyring>, AppError> {
    match &settings.key_command {
        Some(command) => Ok(Some(Keyring::from_command(command).await?)),
        None if settings.store_keys.is_empty() => Ok(None),
        None => Ok(Some(Keyring::from_secrets(&settings.store_keys)?)),
    }
}

/// The key file's key. It is made together with the store and never later: a store whose key is gone must not get
/// another one.
fn own_key(settings: &Settings, create: bool) -> Result<Keyring, AppError> {
    if Store::exists(&settings.store_path) {
        return Ok(Keyring::load(&settings.key_path)?);
    }
    if !create {
        return Err(StoreError::Missing { at: settings.store_path.display().to_string(), log_left: false }.into());
    }
    let (keys, made) = Keyring::load_or_create(&settings.key_path)?;
    if made {
        let path = settings.key_path.display();
        tracing::warn!(%path, "made a key for the store; without a copy of it a backup of the store is of no use");
    }
    Ok(keys)
}

/// Why a sidecar does not start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The place is taken, or not ours to take.
    #[error("cannot listen on {place}: {error}")]
    Bind {
        /// The key of `proxy.yaml` that says where.
        key: &'static str,
        /// Where.
        place: String,
        /// Why.
        error: io::Error,
    },
    /// The audit trail cannot be opened.
    #[error("audit.file: cannot open {place}: {error}")]
    Audit {
        /// Where it was to be.
        place: String,
        /// Why.
        error: io::Error,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store's key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The local CA cannot be made or written.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// There is no local CA yet.
    #[error("there is no local CA yet")]
    NoCa,
    /// The command's end cannot be waited for.
    #[error("cannot wait for the command: {0}")]
    Command(io::Error),
    /// The roots cannot be read.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// What leads out leads back in.
    #[error("the upstream proxy, {0}, is this proxy itself")]
    OwnProxy(host::Authority),
}

impl AppError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            AppError::Bind { key, error, .. } if error.kind() == io::ErrorKind::AddrInUse => {
                format!("another program, perhaps another sidecar, listens there: stop it, or change `{key}`")
            }
            AppError::Bind { key, place, .. } if place.starts_with("unix:") => {
                format!("change `{key}` to a path in a folder that is there and writable, or remove what is in the way")
            }
            AppError::Bind { key, .. } => format!("change `{key}` to an address of this machine"),
            AppError::Audit { error, .. } if error.kind() == io::ErrorKind::NotFound => {
                "make its folder, or change `audit.file`: the file is made, its folder is not".into()
            }
            AppError::Audit { .. } => "let `audit.file` be a file that this user may write".into(),
            AppError::Store(error) => error.hint(),
            AppError::Key(error) => error.hint(),
            AppError::Ca(CaError::File { .. }) => "make the folder writable, or set `ca.path` to one that is".into(),
            AppError::Ca(_) => "remove nothing; report it with this message".into(),
            AppError::NoCa => "`sidebearer run` makes one at its first start".into(),
            AppError::Command(_) => "report it with this message".into(),
            AppError::Roots(RootsError::Variable { variable }) => {
                format!("correct `{variable}`, or unset it to use the system's roots")
            }
            AppError::Roots(_) => "correct `extra_ca_files` in `proxy.yaml`".into(),
            AppError::OwnProxy(_) => {
                "name the company's proxy in `upstream_proxy`, or start the sidecar where `HTTPS_PROXY` does".into()
            }
        }
    }
}
