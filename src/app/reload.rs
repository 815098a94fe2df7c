//! What the settings make of a sidecar, and how it is made anew while it runs: first all that can fail, then the change.

mod stays;
mod watch;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use tokio::sync::watch::{Receiver, Sender};

use super::notify::{self, Told};
use super::{AppError, agent, authority, consents, dialer, links, load_roots};
use crate::admin::{self, Admin};
use crate::audit::Audit;
use crate::ca::Ca;
use crate::ca::files::CaFiles;
use crate::clock::Clock;
use crate::config::Settings;
use crate::consent::Consent;
use crate::drain::{Drain, Quit};
use crate::events::{Events, Reload};
use crate::links::Links;
use crate::listen::Place;
use crate::names::UserName;
use crate::proxy::{self, Front};
use crate::routes::Routes;
use crate::store::Store;
use crate::telemetry;
use crate::tokens::Tokens;
use crate::traces::Traces;
use crate::upstream::{Calls, Dialer, Roots, Upstream};
use crate::web::{Guard, Site};

pub use watch::{Files, Watch};

/// What stays for as long as a sidecar runs.
pub(super) struct Lasting {
    pub store: Store,
    pub calls: Arc<Calls>,
    pub clock: Clock,
    pub events: Events,
    pub drain: Drain,
    pub quit: Quit,
    pub user: UserName,
    pub audit: Option<Audit>,
    pub traces: Option<Traces>,
    pub places: Vec<Place>,
    pub admin: Option<SocketAddr>,
    /// Our own listeners, to which nothing is sent.
    pub own: Vec<SocketAddr>,
    pub ca_files: CaFiles,
    /// Whether the CA is the store's.
    pub keeps_ca: bool,
}

/// What is made of the settings at the start.
pub(super) struct Made {
    pub roots: Roots,
    pub ca: Ca,
    pub tokens: Tokens,
    pub dialer: Dialer,
}

/// Configures a running sidecar anew. A clone is for the same one.
#[derive(Clone)]
pub struct Reloader {
    inner: Arc<Inner>,
}

struct Inner {
    lasting: Lasting,
    front: Front,
    site: Option<Site>,
    told: Sender<Told>,
    /// How long a stop may take.
    deadline: Mutex<Duration>,
    /// Locked for as long as a reload takes: there is one at a time.
    effect: tokio::sync::Mutex<Effect>,
}

/// What is in effect.
struct Effect {
    settings: Settings,
    roots: Roots,
    ca: Ca,
    tokens: Tokens,
    upstream: Upstream,
    consent: Option<Consent>,
    /// The keys that wait for the next start, as they were told.
    waiting: Vec<&'static str>,
}

impl Reloader {
    /// Has the settings take effect for the first time. Gives what tells who is told of users who have to connect.
    pub(super) fn new(lasting: Lasting, settings: Settings, made: Made) -> (Self, Receiver<Told>) {
        let Made { roots, ca, tokens, dialer } = made;
        let consent = lasting.consents(&settings, &tokens).map(Consent::new);
        let (told, watched) = tokio::sync::watch::channel(notify::told(&settings.providers));
        let (upstream, deadline) = (Upstream::new(dialer), Mutex::new(settings.drain));
        let effect = Effect { settings, roots, ca, tokens, upstream, consent, waiting: Vec::new() };
        let (front, site) = (Front::new(lasting.parts(&effect)), lasting.router(&effect).map(Site::new));
        let inner = Inner { lasting, front, site, told, deadline, effect: tokio::sync::Mutex::new(effect) };
        (Self { inner: Arc::new(inner) }, watched)
    }

    /// The agents' side.
    pub(super) fn front(&self) -> &Front {
        &self.inner.front
    }

    /// The pages, where there are any.
    pub(super) fn site(&self) -> Option<&Site> {
        self.inner.site.as_ref()
    }

    /// How long a stop may take.
    pub(super) fn deadline(&self) -> Duration {
        *self.inner.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has these settings take effect for whatever comes from now on; what is under way ends under those before. What cannot
    /// change while it runs is as it was, and told.
    ///
    /// # Errors
    /// See [`AppError`]. All is then as it was before.
    pub async fn reload(&self, mut settings: Settings) -> Result<Reload, AppError> {
        let mut effect = self.inner.effect.lock().await;
        let waiting = stays::keep(&mut settings, &effect.settings);
        let roots = load_roots(&settings).await.expect("loading roots does not panic")?;
        if settings == effect.settings && roots == effect.roots {
            effect.wait(waiting);
            return Ok(Reload::Unchanged);
        }
        let next = self.inner.lasting.prepare(&effect, settings, roots).await?;
        for warning in next.settings.warnings.iter().filter(|warning| !effect.settings.warnings.contains(warning)) {
            tracing::warn!("{warning}");
        }
        self.inner.take_effect(&mut effect, next);
        effect.wait(waiting);
        Ok(Reload::Done)
    }
}

impl Effect {
    /// Tells which keys wait for the next start, where it has not been told.
    fn wait(&mut self, waiting: Vec<&'static str>) {
        if waiting != self.waiting && !waiting.is_empty() {
            tracing::warn!(keys = waiting.join(", "), "these have changed, and take effect at the next start");
        }
        self.waiting = waiting;
    }

    /// Whether these settings lead out another way than those in effect.
    fn leads_elsewhere(&self, settings: &Settings, roots: &Roots) -> bool {
        let way = |settings: &Settings| {
            let limits = &settings.limits;
            let times = (limits.connect_timeout, limits.upstream_handshake_timeout, limits.max_headers);
            (settings.resolve.clone(), settings.proxies.clone(), times)
        };
        *roots != self.roots || way(settings) != way(&self.settings)
    }
}

impl Lasting {
    /// Everything that can fail. Of what it does, only the CA's new root is left behind when it fails.
    async fn prepare(&self, before: &Effect, settings: Settings, roots: Roots) -> Result<Effect, AppError> {
        let upstream = match before.leads_elsewhere(&settings, &roots) {
            true => Upstream::new(dialer(&settings, &roots, self.own.clone(), self.events.metrics())?),
            false => before.upstream.clone(),
        };
        let ca = self.ca(before, &settings).await?;
        if ca.roots_pem() != before.ca.roots_pem() || roots != before.roots {
            self.ca_files.write(&ca, roots.certificates(), self.keeps_ca)?;
        }
        let (tokens, consent) = (before.tokens.clone(), before.consent.clone());
        Ok(Effect { settings, roots, ca, tokens, upstream, consent, waiting: before.waiting.clone() })
    }

    /// The CA in use, which then speaks for all routed hosts.
    async fn ca(&self, before: &Effect, settings: &Settings) -> Result<Ca, AppError> {
        let routes = Routes::new(settings.routes.iter().cloned());
        let (running, hosts, now) = (&before.ca, routes.hosts(), self.clock.now().wall);
        // With other hosts it may be kept under another name, by which the next start asks for it.
        let renamed = self.keeps_ca && authority::name(settings) != authority::name(&before.settings);
        if running.lacks(hosts).is_empty() && !renamed {
            return Ok(running.clone());
        }
        if self.keeps_ca {
            return authority::kept(&self.store, settings, hosts, now, Some(running)).await;
        }
        Ok(running.extended(hosts, now)?.or_else(|_| Ca::generate(hosts, now).map(|new| running.with(&new)))?)
    }

    fn links(&self, settings: &Settings) -> Option<Links> {
        self.admin.map(|at| links(settings, at, &self.store))
    }

    fn consents(&self, settings: &Settings, tokens: &Tokens) -> Option<crate::consent::Parts> {
        let links = self.links(settings)?;
        Some(consents(settings, (tokens, &self.store, &links), &self.clock))
    }

    /// What the proxy works with.
    fn parts(&self, effect: &Effect) -> proxy::Parts {
        let settings = &effect.settings;
        proxy::Parts {
            routes: Routes::new(settings.routes.iter().cloned()),
            unmatched: settings.unmatched,
            ca: effect.ca.clone(),
            tokens: effect.tokens.clone(),
            upstream: effect.upstream.clone(),
            clock: self.clock.clone(),
            events: self.events.clone(),
            drain: self.drain.clone(),
            agents: settings.agents.clone(),
            entrances: settings
                .listen
                .iter()
                .chain(&settings.transparent)
                .map(|(_, entrance)| entrance.clone())
                .collect(),
            user: self.user.clone(),
            links: self.links(settings),
            audit: self.audit.clone(),
            traces: self.traces.clone(),
            replay_limit: settings.replay_limit,
            limits: settings.limits.clone(),
        }
    }

    /// The dashboard, its API and the pages of a consent, behind what guards them.
    fn router(&self, effect: &Effect) -> Option<Router> {
        let settings = &effect.settings;
        let (at, links, consent) = (self.admin?, self.links(settings)?, effect.consent.as_ref()?);
        let guard = Guard::new(links.base().clone(), at.port(), settings.admin_token.clone());
        let parts = admin::Parts {
            tokens: effect.tokens.clone(),
            store: self.store.clone(),
            links,
            clock: self.clock.clone(),
            events: self.events.clone(),
            drain: self.drain.clone(),
            quit: settings.quit.then(|| self.quit.clone()),
            providers: settings.providers.clone(),
            proxies: self.places.clone(),
            variables: agent::shown(settings, &self.places, &self.ca_files),
        };
        Some(guard.before(Admin::new(parts).router().merge(consent.router())))
    }
}

impl Inner {
    /// Nothing here fails or waits. Tokens come first: what the new configuration sends is renewed as it says.
    fn take_effect(&self, effect: &mut Effect, mut next: Effect) {
        let lasting = &self.lasting;
        let elsewhere = effect.leads_elsewhere(&next.settings, &next.roots);
        if elsewhere {
            lasting.calls.redirect(next.upstream.dialer().clone());
        }
        next.tokens = effect.tokens.reconfigured(&next.settings.providers);
        if elsewhere {
            next.tokens.way_changed();
        }
        let consents = lasting.consents(&next.settings, &next.tokens);
        next.consent = effect.consent.as_ref().zip(consents).map(|(consent, parts)| consent.reconfigured(parts));
        lasting.events.metrics().ca_ends(next.ca.not_after());
        self.front.replace(lasting.parts(&next));
        if let Some((site, router)) = self.site.as_ref().zip(lasting.router(&next)) {
            site.replace(router);
        }
        if next.settings.log_level != effect.settings.log_level {
            telemetry::set_level(next.settings.log_level);
        }
        self.told.send_replace(notify::told(&next.settings.providers));
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = next.settings.drain;
        *effect = next;
    }
}
