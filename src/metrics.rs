//! Counts what happens, in figures that Prometheus reads.
//!
//! What a label says comes from `proxy.yaml` or from this program's own lists of codes, and never from the wire: nobody
//! who sends requests can make a series.

mod figures;
mod process;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::events::{self, TokenChange};
use crate::names::ProviderName;
use figures::{
    Code, Ended, Figures, GONE, OUTCOMES, Of, Operation, Outcome, REFUSED, Renewed, Standing, State, Trouble,
};

/// All figures. A clone shares them.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    figures: Figures,
    /// One for each route and provider that a request has had: no request makes a label.
    routes: RwLock<HashMap<Arc<str>, Vec<Arc<Requests>>>>,
    /// Ask pools how many of their connections idle, for as long as there are these pools.
    idle: Mutex<Vec<Idle>>,
    audit: OnceLock<Box<dyn Fn() -> Trail + Send + Sync>>,
    /// Held while figures are looked up for a scrape, and written.
    scrape: Mutex<()>,
    ca_ends: Mutex<Option<SystemTime>>,
}

type Idle = Box<dyn Fn() -> Option<usize> + Send + Sync>;

/// What is asked of the audit trail.
#[derive(Debug, Clone, Copy)]
pub struct Trail {
    /// Lines that were written.
    pub written: u64,
    /// Lines that were lost.
    pub failed: u64,
    /// Lines that wait.
    pub waiting: usize,
    /// Whether it could be written when that was last tried.
    pub up: bool,
}

/// How the tokens of a provider fare.
#[derive(Debug, Clone)]
pub struct AtHand {
    /// The provider.
    pub provider: ProviderName,
    /// How many there are.
    pub tokens: usize,
    /// How long the first of those in use to end is still good for.
    pub expires_in: Option<Duration>,
    /// What keeps it from giving tokens: each code that can, and whether it does.
    pub troubles: Vec<(&'static str, bool)>,
}

/// The figures of one route and its provider.
struct Requests {
    provider: Option<ProviderName>,
    outcomes: [Counter; OUTCOMES.len()],
    taken: Option<Histogram>,
}

/// How many grants of a provider are in which state.
pub type Grants = (ProviderName, &'static str, usize);

/// Something that is counted as long as it is there.
#[derive(Debug)]
pub struct Open(Gauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let figures = Figures::registered(&mut registry);
        let (routes, idle, scrape, ca_ends) = Default::default();
        let audit = OnceLock::new();
        Self { inner: Arc::new(Inner { registry, figures, routes, idle, audit, scrape, ca_ends }) }
    }
}

/// What happens: each is called where it does.
impl Metrics {
    /// A request has ended.
    pub(crate) fn request(&self, event: &events::Request) {
        let figures = self.figures();
        let requests = self.requests(event.route.as_ref(), event.provider.as_ref());
        let outcome = match (event.status, event.code) {
            (None, _) => GONE,
            (Some(_), Some(code)) => {
                figures.refusals.get_or_create(&Code { code }).inc();
                REFUSED
            }
            (Some(status), None) => usize::from(status.as_u16() / 100).clamp(1, 5) - 1,
        };
        requests.outcomes[outcome].inc();
        if !event.token.is_zero() {
            figures.waited.observe(event.token.as_secs_f64());
        }
        let (Some(provider), Some(taken), Some(_)) = (&event.provider, &requests.taken, event.status) else { return };
        figures.added.observe(event.took.saturating_sub(event.token + event.upstream).as_secs_f64());
        taken.observe(event.took.as_secs_f64());
        figures.rejected(provider, event);
    }

    /// Something has happened to a token.
    pub(crate) fn token(&self, event: &events::Token) {
        let provider = event.provider.clone();
        let (cause, outcome) = match &event.what {
            TokenChange::Obtained { cause, took, .. } => {
                let of = Of { provider: provider.clone() };
                self.figures().renewal.get_or_create(&of).observe(took.as_secs_f64());
                (*cause, "obtained")
            }
            // Whoever renewed it knows why.
            TokenChange::Adopted { .. } => ("store", "adopted"),
            TokenChange::Failed { cause, code, .. } => (*cause, *code),
            TokenChange::Disconnected | TokenChange::Rejected { .. } => return,
        };
        self.figures().renewals.get_or_create(&Renewed { provider, cause, outcome }).inc();
    }

    /// So a renewal can end: counted from 0.
    pub(crate) fn renewals_begin(&self, provider: &ProviderName, cause: &'static str, outcome: &'static str) {
        let _ = self.figures().renewals.get_or_create(&Renewed { provider: provider.clone(), cause, outcome });
    }

    /// So many agents' connections are taken at once.
    pub fn most_agents(&self, most: usize) {
        self.figures().most_agents.set(count(most));
    }

    /// An agent's connection, for as long as it is there.
    pub fn agent(&self) -> Open {
        open(&self.figures().agents)
    }

    /// A blind tunnel, for as long as it is there.
    pub fn tunnel(&self) -> Open {
        open(&self.figures().tunnels)
    }

    /// A connection to an upstream, for as long as it is there.
    pub fn upstream(&self) -> Open {
        open(&self.figures().upstreams)
    }

    /// How many of them idle is asked here at each scrape, until it gives nothing.
    pub fn idle_upstreams(&self, idle: impl Fn() -> Option<usize> + Send + Sync + 'static) {
        let mut all = self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // Where nobody scrapes, too, those of pools that are gone must not pile up.
        all.retain(|pool| pool().is_some());
        all.push(Box::new(idle));
    }

    /// A TLS handshake of an agent has ended so: `ok`, `failed` or `unused`.
    pub fn handshake(&self, outcome: &'static str) {
        self.figures().handshakes.get_or_create(&Outcome { outcome }).inc();
    }

    /// A connection to an upstream was opened, or not: `ok` or the code of the failure.
    pub fn connect(&self, outcome: &'static str) {
        self.figures().connects.get_or_create(&Outcome { outcome }).inc();
    }

    /// A TLS handshake with an upstream took so long.
    pub fn upstream_handshake(&self, took: Duration) {
        self.figures().upstream_handshake.observe(took.as_secs_f64());
    }

    /// The store has done something, or failed to.
    pub fn store(&self, operation: &'static str, took: Duration, failed: bool) {
        let operation = Operation { operation };
        self.figures().store.get_or_create(&operation).observe(took.as_secs_f64());
        let errors = self.figures().store_errors.get_or_create(&operation);
        if failed {
            errors.inc();
        }
    }

    /// The configuration was read again.
    pub(crate) fn reload(&self, reload: &events::Reload) {
        let figures = self.figures();
        let (good, outcome) = match reload {
            events::Reload::Done => (true, "reloaded"),
            events::Reload::Unchanged => (true, "unchanged"),
            events::Reload::Refused { .. } | events::Reload::StillRefused => (false, "refused"),
        };
        figures.reload_good.set(good.into());
        if good {
            figures.reloaded_at.set(since_1970(SystemTime::now()));
        }
        figures.reloads.get_or_create(&Outcome { outcome }).inc();
    }

    /// How the audit trail fares is asked here at each scrape. Only the first call counts.
    pub fn audit(&self, trail: impl Fn() -> Trail + Send + Sync + 'static) {
        let _ = self.inner.audit.set(Box::new(trail));
    }

    /// When the local CA ends.
    pub fn ca_ends(&self, at: SystemTime) {
        *self.inner.ca_ends.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    fn figures(&self) -> &Figures {
        &self.inner.figures
    }

    fn requests(&self, route: Option<&Arc<str>>, provider: Option<&ProviderName>) -> Arc<Requests> {
        let route = route.map_or("", |route| &**route);
        let find = |all: &HashMap<Arc<str>, Vec<Arc<Requests>>>| {
            all.get(route)?.iter().find(|requests| requests.provider.as_ref() == provider).cloned()
        };
        let known = find(&self.inner.routes.read().unwrap_or_else(PoisonError::into_inner));
        known.unwrap_or_else(|| {
            let mut routes = self.inner.routes.write().unwrap_or_else(PoisonError::into_inner);
            find(&routes).unwrap_or_else(|| {
                let new = Arc::new(Requests::new(self.figures(), route, provider));
                routes.entry(route.into()).or_default().push(new.clone());
                new
            })
        })
    }
}

/// What is looked up when somebody looks.
impl Metrics {
    /// How the tokens of each provider fare, and how many rotated refresh tokens are in memory only.
    pub fn at_hand(&self, fares: impl Iterator<Item = AtHand>, unsaved: usize) {
        let figures = self.figures();
        let _one = self.inner.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        figures.expiry.clear();
        figures.tokens.clear();
        figures.troubles.clear();
        for AtHand { provider, tokens, expires_in, troubles } in fares {
            for (code, stands) in troubles {
                figures.troubles.get_or_create(&Trouble { provider: provider.clone(), code }).set(stands.into());
            }
            let of = Of { provider };
            // There before it is needed: a rate is of use only from the second sample on.
            let _ = figures.recovered.get_or_create(&of);
            figures.tokens.get_or_create(&of).set(count(tokens));
            if let Some(left) = expires_in {
                figures.expiry.get_or_create(&of).set(left.as_secs_f64());
            }
        }
        figures.unsaved.set(count(unsaved));
    }

    /// How many grants of each provider are in which state.
    pub fn grants(&self, grants: &[Grants]) {
        let _one = self.inner.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.figures().grants.clear();
        for (provider, state, grants) in grants {
            self.figures().grants.get_or_create(&Standing { provider: provider.clone(), state }).set(count(*grants));
        }
    }

    /// Whether the store answers.
    pub fn store_is_up(&self, up: bool) {
        self.figures().store_up.set(up.into());
    }

    /// All figures, in the text of OpenMetrics or in the older one of Prometheus.
    pub fn text(&self, openmetrics: bool) -> String {
        let _one = self.inner.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.look_around();
        let mut written = String::with_capacity(16 << 10);
        // The only error is that of the writer, and a string has none.
        let _ = text::encode(&mut written, &self.inner.registry);
        if openmetrics { written } else { classic(&written) }
    }

    fn idle(&self) -> i64 {
        let mut idle = 0;
        self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner).retain(|pool| {
            let connections = pool();
            idle += count(connections.unwrap_or_default());
            connections.is_some()
        });
        idle
    }

    fn look_around(&self) {
        let figures = self.figures();
        // A connection that has just ended may still be in the pool.
        let (open, idle) = (figures.upstreams.get(), self.idle());
        let idle = idle.min(open);
        for (state, connections) in [("idle", idle), ("busy", open - idle)] {
            figures.upstream_states.get_or_create(&State { state }).set(connections);
        }
        if let Some(ends) = *self.inner.ca_ends.lock().unwrap_or_else(PoisonError::into_inner) {
            figures.ca.set(since_1970(ends) - since_1970(SystemTime::now()));
        }
        if let Some(trail) = self.inner.audit.get() {
            let Trail { written, failed, waiting, up } = trail();
            figures.audit_waiting.set(count(waiting));
            figures.audit_up.set(up.into());
            for (outcome, lines) in [("written", written), ("failed", failed)] {
                figures.audited.get_or_create(&Outcome { outcome }).inner().store(lines, Ordering::Relaxed);
            }
        }
        let process = process::look();
        figures.memory.set(process.memory);
        figures.open_files.set(process.open_files);
        figures.most_files.set(process.most_files);
        figures.cpu.inner().store(process.cpu.to_bits(), Ordering::Relaxed);
    }
}

impl Requests {
    fn new(figures: &Figures, route: &str, provider: Option<&ProviderName>) -> Self {
        let outcomes = OUTCOMES.map(|outcome| {
            let (route, provider) = (route.to_owned(), provider.map_or("", |provider| provider.as_str()).to_owned());
            figures.requests.get_or_create_owned(&Ended { route, provider, outcome })
        });
        let taken = provider.map(|provider| figures.taken.get_or_create_owned(&Of { provider: provider.clone() }));
        Self { provider: provider.cloned(), outcomes, taken }
    }
}

fn open(gauge: &Gauge) -> Open {
    gauge.inc();
    Open(gauge.clone())
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn since_1970(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The older text: a counter is known by the whole of its name, and nothing stands at the end.
fn classic(openmetrics: &str) -> String {
    let mut written = String::with_capacity(openmetrics.len());
    let mut help = "";
    for line in openmetrics.lines() {
        if line.starts_with("# HELP ") {
            // It stands before the type, which says what its name is.
            help = line;
            continue;
        }
        if let Some(of) = line.strip_prefix("# TYPE ") {
            let (name, kind) = of.split_once(' ').unwrap_or((of, ""));
            let total = if kind == "counter" { "_total" } else { "" };
            let said = help.splitn(4, ' ').nth(3).unwrap_or_default();
            written.push_str(&format!("# HELP {name}{total} {said}\n# TYPE {name}{total} {kind}\n"));
        } else if line != "# EOF" {
            written.push_str(line);
            written.push('\n');
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_that_are_gone_pile_up_nowhere_where_nobody_scrapes() {
        let (metrics, gone) = (Metrics::default(), Arc::new(()));
        for _ in 0..100 {
            let held = gone.clone();
            metrics.idle_upstreams(move || {
                let _held = &held;
                None
            });
        }
        assert_eq!(Arc::strong_count(&gone), 2);
    }

    #[test]
    fn nothing_is_said_of_a_store_that_nobody_has_looked_at() {
        let metrics = Metrics::default();
        assert!(!metrics.text(false).contains("\nsidebearer_store_up"));
        metrics.store_is_up(false);
        assert!(metrics.text(false).contains("\nsidebearer_store_up 0\n"));
    }
}
