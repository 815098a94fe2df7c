//! `sidebearer run`: the sidecar, until it is told to stop.

use std::path::Path;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{CliError, warn};
use crate::app::reload::{Files, Watch};
use crate::app::{self, Authority, Options};
use crate::clock::Clock;
use crate::drain::Drained;
use crate::listen::Place;
use crate::names::UserName;
use crate::systemd;
use crate::telemetry;

/// Runs the sidecar; 0 when it drained, 1 when it was forced.
pub(super) async fn run(config: &Path) -> Result<u8, CliError> {
    // First: they end a program that does not listen for them, or, as a container's first process, never reach it.
    let (hang_up, mut signals) = (listen(SignalKind::hangup())?, Signals::listen()?);
    let (files, settings) = Files::load(config).await?;
    warn(&settings);
    if settings.log_level.is_some() {
        telemetry::set_level(settings.log_level);
    }
    let options = Options { user: UserName::default(), authority: Authority::Kept, clock: Clock::system() };
    let app = tokio::select! {
        app = app::build(&settings, options) => app?,
        () = signals.next() => {
            tracing::info!("stopped before it had started");
            return Ok(0);
        }
    };
    let quit = app.quit();
    let shown = |places: &[Place]| places.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let address = shown(&app.places);
    let transparent = (!app.transparent.is_empty()).then(|| shown(&app.transparent));
    let ca = app.ca_files.ca.display().to_string();
    let admin = app.admin.map(|admin| admin.to_string());
    let health = app.health.map(|health| health.to_string());
    tracing::info!(address, transparent, admin, health, ca, routes = settings.routes.len(), "listening");
    let status = format!("listening on {address}");
    tokio::spawn(Watch::new(files, app.reloader()).run(hang_up, status.clone()));
    let stop = async move {
        // Polled first when everything is served.
        systemd::ready(&status);
        let why = tokio::select! {
            () = signals.next() => "signal",
            () = quit => "quit",
        };
        tracing::info!(why, "stopping; a second signal stops at once");
        systemd::stopping("live requests finish");
        tokio::spawn(async move {
            signals.next().await;
            // What must be durable is durable before anyone sees it, so there is nothing to save here.
            std::process::exit(1);
        });
    };
    let _alive = systemd::watchdog();
    let drained = app.run(stop).await;
    tracing::info!(clean = drained == Drained::Clean, "stopped");
    Ok(if drained == Drained::Clean { 0 } else { 1 })
}

/// The signals that ask for a stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Self, CliError> {
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn listen(kind: SignalKind) -> Result<Signal, CliError> {
    signal(kind).map_err(|error| CliError::failed(format!("cannot listen for signals: {error}"), "report it"))
}
