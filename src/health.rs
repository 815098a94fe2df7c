//! The health listener: what probes and Prometheus ask of a sidecar, answered to anyone and during the drain too.
//!
//! It is the one listener that other machines may reach. So it changes nothing, and shows no secret and no user.

mod glance;

use std::collections::{BTreeSet, VecDeque};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::drain::Drain;
use crate::listen::{Connection, Listener};
use crate::metrics::{AtHand, Grants, Metrics};
use crate::tokens::{Condition, Fare, TROUBLES, Tokens, Trouble};
use crate::web::{self, json_response};
use glance::Glance;

/// How long one question and its answer may take.
const LONGEST: Duration = Duration::from_secs(10);
/// So many are answered at once. For a further one the oldest is cut: whoever holds connections keeps no probe out.
const MOST: usize = 64;
/// The largest head of a question, in bytes.
const LARGEST_HEAD: usize = 16 << 10;
/// How old a condition may be: whoever asks often does not have all tokens looked through each time.
const FRESH: Duration = Duration::from_secs(1);
/// How old the count of grants may be, which is one statement of the store.
const CENSUS: Duration = Duration::from_secs(15);
/// How long an answer waits for what it looks at. A kubelet gives a probe one second, and a store that is away takes longer.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is known for probes. A clone is the same one.
#[derive(Clone)]
pub struct Health {
    inner: Arc<Inner>,
}

struct Inner {
    drain: Drain,
    metrics: Metrics,
    /// Known when everything is bound and ready.
    tokens: OnceLock<Tokens>,
    condition: Glance<Condition>,
    /// What is wrong with the store.
    store: Glance<Option<Trouble>>,
    /// How many grants of each provider are in which state; none when the store cannot be asked.
    census: Glance<Option<Vec<Grants>>>,
}

impl Health {
    /// Of a sidecar that is starting; `drain` says when it stops.
    pub fn new(metrics: Metrics, drain: Drain) -> Self {
        let (condition, store, census) = (Glance::sparing(FRESH), Glance::every(FRESH), Glance::every(CENSUS));
        Self { inner: Arc::new(Inner { drain, metrics, tokens: OnceLock::new(), condition, store, census }) }
    }

    /// The sidecar has started.
    pub fn started(&self, tokens: Tokens) {
        let _ = self.inner.tokens.set(tokens);
    }

    /// Answers until the handle goes: before the start, and through the drain.
    pub fn serve(&self, listener: Listener) -> AbortOnDropHandle<()> {
        AbortOnDropHandle::new(tokio::spawn(serve(listener, self.router())))
    }

    fn router(&self) -> Router {
        Router::new()
            .route("/", get(index))
            .route("/startupz", get(startup))
            .route("/livez", get(|| async { json_response(StatusCode::OK, &json!({ "status": "ok" })) }))
            .route("/readyz", get(ready))
            .route("/metrics", get(figures))
            .with_state(self.clone())
            .layer(middleware::map_response(async |mut response: Response| {
                web::secure(response.headers_mut());
                response
            }))
    }

    /// How the tokens fare, at most a little ago.
    async fn condition(&self, tokens: &Tokens) -> Option<Arc<Condition>> {
        let tokens = tokens.clone();
        self.inner.condition.look(PATIENCE, async move { tokens.condition() }).await
    }

    /// What was wrong with the store a little ago, if anything was and it is known.
    async fn store(&self, tokens: &Tokens) -> Option<Arc<Option<Trouble>>> {
        let tokens = tokens.clone();
        self.inner.store.look(PATIENCE, async move { tokens.store_trouble().await }).await
    }

    async fn census(&self, tokens: &Tokens) -> Option<Arc<Option<Vec<Grants>>>> {
        let tokens = tokens.clone();
        self.inner.census.look(PATIENCE, async move { tokens.census().await.ok() }).await
    }

    /// Brings the figures up to date that nobody counts as it happens.
    async fn look(&self, tokens: &Tokens) {
        let figures = &self.inner.metrics;
        let (condition, store, census) = tokio::join!(self.condition(tokens), self.store(tokens), self.census(tokens));
        if let Some(condition) = condition {
            figures.at_hand(condition.providers.iter().map(at_hand), condition.unsaved);
        }
        if let Some(store) = store {
            figures.store_is_up(store.is_none());
        }
        if let Some(grants) = census.as_deref().and_then(Option::as_ref) {
            figures.grants(grants);
        }
    }
}

fn at_hand(fare: &Fare) -> AtHand {
    let Fare { provider, tokens, expires_in, trouble } = fare.clone();
    AtHand { provider, tokens, expires_in, troubles: TROUBLES.map(|code| (code, trouble == Some(code))).to_vec() }
}

async fn index() -> impl IntoResponse {
    concat!(
        "Sidebearer ",
        env!("CARGO_PKG_VERSION"),
        "\n\n/startupz  200 once it has started\n/livez     200 while it runs\n/readyz    200 until it stops, and how its \
         tokens fare\n/metrics   figures for Prometheus\n"
    )
}

async fn startup(State(health): State<Health>) -> Response {
    match health.inner.tokens.get() {
        Some(_) => json_response(StatusCode::OK, &json!({ "status": "started" })),
        None => json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({ "status": "starting" })),
    }
}

/// Ready from the start to the stop: a provider that is down is told in the body, and takes no agent out of service.
async fn ready(State(health): State<Health>) -> Response {
    let unready = |status: &str| json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({ "status": status }));
    let Some(tokens) = health.inner.tokens.get() else { return unready("starting") };
    if health.inner.drain.is_started() {
        return unready("stopping");
    }
    match tokio::join!(health.condition(tokens), health.store(tokens)) {
        (Some(condition), Some(store)) => json_response(StatusCode::OK, &told(&condition, store.as_ref().as_ref())),
        _ => json_response(StatusCode::OK, &json!({ "status": "unknown", "troubles": [], "providers": [] })),
    }
}

/// In the form that Prometheus asks for; to anyone else, in the older one, which all tools read.
async fn figures(State(health): State<Health>, headers: HeaderMap) -> Response {
    if let Some(tokens) = health.inner.tokens.get() {
        health.look(tokens).await;
    }
    let accepts = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let openmetrics = accepts.contains("application/openmetrics-text");
    let form = match openmetrics {
        true => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        false => "text/plain; version=0.0.4; charset=utf-8",
    };
    ([(CONTENT_TYPE, form)], health.inner.metrics.text(openmetrics)).into_response()
}

/// What may be told to anyone: codes, and not the words around them, in which a path or a host may stand.
fn told(condition: &Condition, store: Option<&Trouble>) -> Value {
    let troubles: BTreeSet<_> = condition.troubles.iter().chain(store).collect();
    let status = if troubles.is_empty() { "ok" } else { "degraded" };
    let troubles = troubles.into_iter().map(|trouble| {
        let provider = trouble.provider.as_ref().map(|provider| provider.as_str());
        json!({ "code": trouble.code, "provider": provider })
    });
    let providers = condition.providers.iter().map(|fare| {
        json!({
            "provider": fare.provider.as_str(),
            "state": fare.state(),
            "tokens": fare.tokens,
            "expires_in": fare.expires_in.map(|left| left.as_secs()),
        })
    });
    json!({
        "status": status,
        "troubles": troubles.collect::<Vec<_>>(),
        "providers": providers.collect::<Vec<_>>(),
    })
}

async fn serve(mut listener: Listener, router: Router) {
    let mut answered: VecDeque<AbortOnDropHandle<()>> = VecDeque::new();
    loop {
        let stream = listener.accept().await;
        answered.retain(|one| !one.is_finished());
        if answered.len() == MOST {
            answered.pop_front();
        }
        answered.push_back(AbortOnDropHandle::new(tokio::spawn(answer(stream, router.clone()))));
    }
}

/// Answers one question. No second one comes on its connection: those who ask do so seldom, and nothing is kept for them.
async fn answer(stream: Connection, router: Router) {
    let service = TowerToHyperService::new(router.into_service::<hyper::body::Incoming>());
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(LONGEST)
        .keep_alive(false)
        .max_buf_size(LARGEST_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    let connection = pin!(connection);
    if let Ok(Err(error)) = timeout(LONGEST, connection).await {
        tracing::debug!(%error, "a probe's connection ended");
    }
}
