//! `sidebearer exec -- CMD`: a command behind a sidecar of its own.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use tempfile::TempDir;

use super::CliError;
use crate::app::agent::{self, Variable};
use crate::app::{self, App, Authority, Options, child};
use crate::audit;
use crate::clock::Clock;
use crate::config::Settings;
use crate::listen::Place;
use crate::names::UserName;
use crate::proxy::caller::Entrance;

/// A port of this machine that nobody else has.
const FREE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Runs a command with the variables that bring it under the proxy, and gives its exit code.
pub(super) async fn exec(
    settings: Settings,
    user: UserName,
    nss: Option<&Path>,
    command: &[OsString],
) -> Result<u8, CliError> {
    if settings.audit.as_ref().is_some_and(|audit| audit.place == audit::Place::Stdout) {
        let what = "`audit.file` is standard output, and that is the command's";
        return Err(CliError::failed(what, "name a file there"));
    }
    let settings = private(settings);
    let Prepared { app, variables, folder: _folder } = prepare(&settings, user).await?;
    if let Some(database) = nss {
        agent::trust(database, &app.ca_files.ca)?;
    }
    let (ended, stop) = tokio::sync::oneshot::channel::<()>();
    let sidecar = tokio::spawn(app.run(async {
        let _ = stop.await;
    }));
    let code = child::run(command, variables, &settings.secret_variables).await;
    let _ = ended.send(());
    // A renewal that is under way must still become durable.
    let _ = sidecar.await;
    Ok(code?)
}

/// A sidecar for one command.
pub(super) struct Prepared {
    pub app: App,
    /// What brings the command under it.
    pub variables: Vec<Variable>,
    /// Holds the CA's files, and is removed with this.
    pub folder: TempDir,
}

/// Makes a sidecar ready, and what its command needs.
pub(super) async fn prepare(settings: &Settings, user: UserName) -> Result<Prepared, CliError> {
    let folder = tempfile::Builder::new().prefix("sidebearer-").tempdir();
    let cannot = |error| {
        let hint = "set TMPDIR to a folder that is writable";
        CliError::failed(format!("cannot make a folder for the agent's files: {error}"), hint)
    };
    let folder = folder.map_err(cannot)?;
    let authority = Authority::Fresh(folder.path().to_owned());
    let app = app::build(settings, Options { user, authority, clock: Clock::system() }).await?;

    let inherited = |name: &str| std::env::var(name).ok();
    let mut variables = agent::variables(app.address().expect("it listens at an address"), &app.ca_files, &inherited);
    variables.extend(agent::placeholders(settings, &inherited));
    variables.extend(agent::files(folder.path(), &app.ca_files.bundle, &inherited).map_err(cannot)?);
    Ok(Prepared { app, variables, folder })
}

/// As one command needs it: on free ports of this machine, and for whoever has started it. Its pages are there for the
/// links that a missing grant brings.
pub(super) fn private(settings: Settings) -> Settings {
    let listen = vec![(Place::Tcp(FREE), Entrance::default())];
    let admin = settings.admin.map(|_| FREE);
    Settings {
        listen,
        transparent: Vec::new(),
        admin,
        admin_token: None,
        public_url: None,
        quit: false,
        health: None,
        agents: Vec::new(),
        ..settings
    }
}
