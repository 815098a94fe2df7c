//! What happened to a request or to a token, said once: to the log, to the figures, and to whoever watches live.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use http::{Method, StatusCode};
use tokio::sync::broadcast;

use crate::host::Authority;
use crate::metrics::Metrics;
use crate::names::{ProviderName, Subject, UserName};

/// Takes events and hands them on. A clone feeds the same watchers.
#[derive(Clone)]
pub struct Events {
    metrics: Metrics,
    live: broadcast::Sender<Event>,
    /// On their own: who looks for users must not wake for each request.
    missing: broadcast::Sender<Missing>,
    /// On their own: who looks for requests must not miss one for the many tunnels around it.
    tunnels: broadcast::Sender<Tunnel>,
    recent: Arc<Recent>,
}

/// The last events, for whoever comes later. Kept where they happen: a request must not wake a task for it.
#[derive(Default)]
struct Recent {
    most: AtomicUsize,
    events: Mutex<VecDeque<(SystemTime, Event)>>,
}

/// One thing that happened. Holds no secret and no query.
#[derive(Debug, Clone)]
pub enum Event {
    /// A request was answered.
    Request(Request),
    /// A token came, went, or failed to come.
    Token(Token),
    /// A user has to connect.
    Missing(Missing),
}

/// A step of a tunnel to a routed host: a CONNECT, and the agent's TLS inside.
#[derive(Debug, Clone)]
pub struct Tunnel {
    /// The authority that its CONNECT named.
    pub authority: String,
    /// How far it has come.
    pub step: TunnelStep,
}

/// How far a tunnel has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TunnelStep {
    /// The CONNECT was answered with 200.
    Open,
    /// The agent finished its TLS handshake.
    Tls {
        /// Whether it chose HTTP/2.
        h2: bool,
    },
    /// No TLS came of it: the agent does not trust the CA, or hung up before.
    Failed {
        /// What happened.
        error: String,
    },
}

/// What came of reading the configuration again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reload {
    /// It is in effect.
    Done,
    /// It says what was in effect already.
    Unchanged,
    /// It cannot be used, and the one before stays in effect.
    Refused {
        /// Every mistake, without secrets.
        error: String,
    },
    /// The same that was refused before, and told then.
    StillRefused,
}

/// A user has to connect, and how they do.
#[derive(Debug, Clone)]
pub struct Missing {
    /// Whose provider.
    pub provider: ProviderName,
    /// What people call it.
    pub title: String,
    /// Who.
    pub user: UserName,
    /// Where.
    pub connect_url: String,
    /// How long a request waits for it, if one does.
    pub wait: Option<Duration>,
}

/// A request, when its answer's head went to the agent.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its method.
    pub method: Method,
    /// The authority it was for.
    pub authority: Arc<str>,
    /// Its path, without the query.
    pub path: String,
    /// The route that matched, by its place in `proxy.yaml`.
    pub route: Option<Arc<str>>,
    /// The provider whose token it carried.
    pub provider: Option<ProviderName>,
    /// The agent that sent it, where agents have names.
    pub agent: Option<String>,
    /// For whom.
    pub user: Option<UserName>,
    /// The status that the agent saw; none when it hung up before.
    pub status: Option<StatusCode>,
    /// The stable code of an answer of our own.
    pub code: Option<&'static str>,
    /// Whether it was sent a second time.
    pub retried: bool,
    /// Whether the second try's token was accepted.
    pub recovered: bool,
    /// Why a 401 was passed on without a second try.
    pub passed: Option<&'static str>,
    /// From its head's arrival to its answer's head.
    pub took: Duration,
    /// Of that, the time spent waiting for a token.
    pub token: Duration,
    /// Of that, the time spent waiting for the upstream.
    pub upstream: Duration,
}

/// Something that happened to one token.
#[derive(Debug, Clone)]
pub struct Token {
    /// Whose provider.
    pub provider: ProviderName,
    /// For whom.
    pub subject: Subject,
    /// What happened.
    pub what: TokenChange,
}

/// What happened to a token.
#[derive(Debug, Clone)]
pub enum TokenChange {
    /// The provider gave a new one.
    Obtained {
        /// Why it was asked for.
        cause: &'static str,
        /// How long it lives.
        lifetime: Option<Duration>,
        /// Its number in the row's history.
        generation: u64,
        /// How long the provider took.
        took: Duration,
    },
    /// A newer one was found in the store: another process had renewed it.
    Adopted {
        /// Its number in the row's history.
        generation: u64,
    },
    /// The provider, or the way to it, failed.
    Failed {
        /// Why it was asked for.
        cause: &'static str,
        /// The stable code of the failure.
        code: &'static str,
        /// What happened, without secrets.
        error: String,
        /// Whether an unexpired token goes on being used.
        serving_old: bool,
        /// Whether the try before it failed with the very same: it is counted, and not told again.
        repeated: bool,
    },
    /// The user's grant was removed.
    Disconnected,
    /// The provider rejected it with a 401 before its time.
    Rejected {
        /// Its number in the row's history.
        generation: u64,
    },
}

impl Default for Events {
    fn default() -> Self {
        Self {
            metrics: Metrics::default(),
            live: broadcast::channel(256).0,
            missing: broadcast::channel(256).0,
            tunnels: broadcast::channel(256).0,
            recent: Arc::default(),
        }
    }
}

impl Events {
    /// The figures that it counts in, for what is not an event.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Every event from now on. A slow watcher misses some, and never holds a request up.
    pub fn watch(&self) -> broadcast::Receiver<Event> {
        self.live.subscribe()
    }

    /// Keeps the last events from now on, at most so many.
    pub fn keep(&self, most: usize) {
        self.recent.most.store(most, Ordering::Relaxed);
    }

    /// The last events that were kept, newest first, each with its time.
    pub fn recent(&self) -> Vec<(SystemTime, Event)> {
        self.recent.events.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().cloned().collect()
    }

    /// Logs a request, counts it, and shows it to the watchers.
    pub fn request(&self, event: Request) {
        tracing::info!(
            method = %event.method,
            authority = %event.authority,
            path = ?Escaped(&event.path),
            route = event.route.as_deref(),
            provider = event.provider.as_ref().map(ProviderName::as_str),
            agent = event.agent.as_deref(),
            user = event.user.as_ref().map(tracing::field::debug),
            status = event.status.map(|status| status.as_u16()),
            code = event.code,
            retried = event.retried,
            passed = event.passed,
            took_ms = milliseconds(event.took),
            token_ms = milliseconds(event.token),
            "request"
        );
        self.metrics.request(&event);
        self.show(Event::Request(event));
    }

    /// Logs what happened to a token, counts it, and shows it to the watchers.
    pub fn token(&self, event: Token) {
        let (provider, subject) = (&event.provider, &event.subject);
        self.metrics.token(&event);
        match &event.what {
            // A dead grant is looked at again every second; once is enough to tell.
            TokenChange::Failed { repeated: true, .. } => return,
            TokenChange::Obtained { cause, lifetime, generation, took } => tracing::info!(
                %provider, %subject, cause, generation,
                lifetime_s = lifetime.map(|l| l.as_secs()),
                took_ms = milliseconds(*took),
                "token obtained"
            ),
            TokenChange::Adopted { generation } => {
                tracing::info!(%provider, %subject, generation, "token adopted from the store")
            }
            TokenChange::Failed { cause, code, error, serving_old, .. } => {
                tracing::warn!(%provider, %subject, cause, code, error, serving_old, "no new token")
            }
            TokenChange::Disconnected => tracing::info!(%provider, %subject, "disconnected"),
            TokenChange::Rejected { generation } => {
                tracing::info!(%provider, %subject, generation, "token rejected with 401")
            }
        }
        self.show(Event::Token(event));
    }

    /// Logs that a user has to connect, and shows it to the watchers.
    pub fn missing(&self, event: Missing) {
        tracing::warn!(
            provider = %event.provider,
            user = ?event.user,
            connect_url = event.connect_url,
            waits_s = event.wait.map(|wait| wait.as_secs()),
            "a user has to connect"
        );
        if self.missing.receiver_count() > 0 {
            let _ = self.missing.send(event.clone());
        }
        self.show(Event::Missing(event));
    }

    /// Logs that the configuration was read again, and counts it.
    pub fn reloaded(&self, reload: &Reload) {
        self.metrics.reload(reload);
        match reload {
            Reload::Done => tracing::info!("configuration reloaded"),
            Reload::Unchanged => tracing::info!("configuration unchanged"),
            Reload::Refused { error } => {
                tracing::error!(error, "configuration refused, the one before stays in effect");
            }
            Reload::StillRefused => tracing::warn!("configuration still refused, for the same reasons"),
        }
    }

    /// Every user who has to connect from now on.
    pub fn watch_missing(&self) -> broadcast::Receiver<Missing> {
        self.missing.subscribe()
    }

    /// Every step of a tunnel from now on.
    pub fn watch_tunnels(&self) -> broadcast::Receiver<Tunnel> {
        self.tunnels.subscribe()
    }

    /// Shows a step of a tunnel to the watchers; whoever takes the step logs what is worth it.
    pub fn tunnel(&self, authority: &Authority, step: TunnelStep) {
        if self.tunnels.receiver_count() > 0 {
            let _ = self.tunnels.send(Tunnel { authority: authority.to_string(), step });
        }
    }

    fn show(&self, event: Event) {
        if self.live.receiver_count() > 0 {
            // The only error is that nobody watches any more.
            let _ = self.live.send(event.clone());
        }
        self.recent.push(event);
    }
}

impl Recent {
    fn push(&self, event: Event) {
        let most = self.most.load(Ordering::Relaxed);
        if most == 0 {
            return;
        }
        let now = SystemTime::now();
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = if events.len() < most { None } else { events.pop_front() };
        events.push_back((now, event));
        drop(events);
        // Freed when nobody waits for the lock.
        drop(oldest);
    }
}

/// Text from an agent or a provider, with control characters escaped, so that a log line stays one line.
struct Escaped<'a>(&'a str);

impl std::fmt::Debug for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(&self.0.escape_debug(), f)
    }
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 10_000.0).round() / 10.0
}
