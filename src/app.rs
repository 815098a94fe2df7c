//! Settings become a running sidecar: what is opened in which order, and how it stops.

pub mod agent;
pub mod child;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;

use crate::ca::files::CaFiles;
use crate::ca::{self, Ca, CaError, Outdated};
use crate::clock::Clock;
use crate::config::Settings;
use crate::drain::{Drain, Drained};
use crate::events::Events;
use crate::names::UserName;
use crate::proxy::{self, Proxy};
use crate::routes::{HostPattern, Routes};
use crate::store::key::{KeyError, Keyring};
use crate::store::{Store, StoreError};
use crate::tokens::{self, Tokens};
use crate::upstream::{Calls, Dialer, Roots, RootsError, Upstream};

/// The name of the local CA in the store.
const KEPT_CA: &str = "ca";

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
    /// Where agents reach it.
    pub address: SocketAddr,
    /// What agents are to trust.
    pub ca_files: CaFiles,
    /// What happens in it.
    pub events: Events,
    listener: TcpListener,
    proxy: Proxy,
    drain: Drain,
    deadline: Duration,
}

/// Binds, opens the store, makes the CA ready, and writes its files. No network call is needed for it.
///
/// # Errors
/// See [`AppError`].
pub async fn build(settings: &Settings, options: Options) -> Result<App, AppError> {
    let Options { user, authority, clock } = options;
    // For reqwest, which asks for the process's default; a second start in one process finds it installed.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    // First: a sidecar that cannot listen must not have replaced the CA of the one that does.
    let listener = TcpListener::bind(settings.listen).await;
    let listener = listener.map_err(|error| AppError::Bind { address: settings.listen, error })?;
    let address = listener.local_addr().map_err(|error| AppError::Bind { address: settings.listen, error })?;

    let roots = Roots::load(&settings.extra_ca_files, ca::ORGANIZATION)?;
    let store = open_store(settings, true).await?;
    let routes = Routes::new(settings.routes.iter().cloned());
    let (ca, ca_files) = match authority {
        Authority::Kept => {
            let ca = kept_ca(&store, routes.hosts(), clock.now().wall).await?;
            (ca, CaFiles::within(&settings.ca_path))
        }
        Authority::Fresh(folder) => (Ca::generate(routes.hosts(), clock.now().wall)?, CaFiles::within(&folder)),
    };
    ca_files.write(&ca, roots.certificates())?;

    let (events, drain) = (Events::default(), Drain::default());
    let dialer = Dialer::new(&roots, settings.resolve.clone())?;
    dialer.refuse(vec![address]);
    let servers = Arc::new(Calls::new(&roots, &settings.resolve)?);
    let parts = tokens::Parts { store, servers, clock: clock.clone(), events: events.clone(), drain: drain.clone() };
    let proxy = Proxy::new(proxy::Parts {
        routes,
        unmatched: settings.unmatched,
        ca,
        tokens: Tokens::new(&settings.providers, parts),
        upstream: Upstream::new(dialer),
        clock,
        events: events.clone(),
        drain: drain.clone(),
        user,
        replay_limit: settings.replay_limit,
    });
    Ok(App { address, ca_files, events, listener, proxy, drain, deadline: settings.drain })
}

impl App {
    /// Serves until `stop` resolves, then lets live requests and renewals finish within the settings' `drain`.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Drained {
        let App { listener, proxy, drain, deadline, .. } = self;
        let serving = tokio::spawn(async move { proxy.serve(listener).await });
        stop.await;
        let drained = drain.finish(deadline).await;
        // It ends by itself when the stop begins; what is left to wait for is its last accept.
        let _ = serving.await;
        drained
    }
}

/// Opens the settings' store with the settings' keys.
///
/// # Errors
/// See [`StoreError`] and [`KeyError`]; without `create`, a store that is not there is one of them.
pub async fn open_store(settings: &Settings, create: bool) -> Result<Store, AppError> {
    let keys = if settings.store_keys.is_empty() {
        own_key(settings, create)?
    } else {
        Keyring::from_secrets(&settings.store_keys)?
    };
    Ok(Store::open(&settings.store_path, keys, create).await?)
}

/// The key file's key. It is made together with the store and never later: a store whose key is gone must not get
/// another one.
fn own_key(settings: &Settings, create: bool) -> Result<Keyring, AppError> {
    if Store::exists(&settings.store_path) {
        return Ok(Keyring::load(&settings.key_path)?);
    }
    if !create {
        return Err(StoreError::Missing { path: settings.store_path.clone(), log_left: false }.into());
    }
    let (keys, made) = Keyring::load_or_create(&settings.key_path)?;
    if made {
        let path = settings.key_path.display();
        tracing::warn!(%path, "made a key for the store; without a copy of it a backup of the store is of no use");
    }
    Ok(keys)
}

/// The CA of the last run, or a new one where that cannot speak for all routed hosts.
async fn kept_ca(store: &Store, hosts: &[HostPattern], now: SystemTime) -> Result<Ca, AppError> {
    if let Some(kept) = store.sealed(KEPT_CA).await? {
        match Ca::restore(&kept, hosts, now)? {
            Ok(ca) => return Ok(ca),
            Err(Outdated::NewHosts(hosts)) => {
                let hosts = hosts.join(", ");
                tracing::warn!(hosts, "the local CA is made anew for new hosts; running agents need the new `ca.pem`");
            }
            Err(Outdated::Ending) => {
                tracing::warn!("the local CA is made anew, the old one ends; running agents need the new `ca.pem`");
            }
        }
    }
    let ca = Ca::generate(hosts, now)?;
    store.put_sealed(KEPT_CA, &ca.export()).await?;
    Ok(ca)
}

/// The CA of the last run, without making one.
///
/// # Errors
/// When the store cannot be read, or holds none.
pub async fn last_ca(settings: &Settings) -> Result<Ca, AppError> {
    let store = open_store(settings, false).await?;
    let kept = store.sealed(KEPT_CA).await?.ok_or(AppError::NoCa)?;
    Ca::restore(&kept, &[], SystemTime::UNIX_EPOCH)?.map_err(|_| AppError::NoCa)
}

/// Why a sidecar does not start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The port is taken, or not ours to take.
    #[error("cannot listen on {address}: {error}")]
    Bind {
        /// Where.
        address: SocketAddr,
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
}

impl AppError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            AppError::Bind { error, .. } if error.kind() == io::ErrorKind::AddrInUse => {
                "another program, perhaps another sidecar, listens there: stop it, or change `listen`".into()
            }
            AppError::Bind { .. } => "change `listen` to an address of this machine".into(),
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
        }
    }
}
