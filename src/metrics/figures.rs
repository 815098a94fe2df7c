//! The figures themselves: their names, their labels, and what each one says.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::since_1970;
use crate::events;
use crate::names::ProviderName;

/// How a request can end, in the order that their counters are kept in.
pub(super) const OUTCOMES: [&str; 7] = ["1xx", "2xx", "3xx", "4xx", "5xx", "refused", "gone"];
/// The place of an answer of our own.
pub(super) const REFUSED: usize = 5;
/// The place of an agent that hung up before its answer.
pub(super) const GONE: usize = 6;
/// Of the reasons for which a rejection goes to the agent, those for which there could be no second try.
const UNREPLAYED: [&str; 4] = ["retry_never", "body_too_long", "replay_memory_full", "body_broke_off"];
/// In seconds: what a proxy may add, and what an API may take.
const ADDED: [f64; 10] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0];
const TAKEN: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];
/// In seconds: what a disk may take, and a database.
const STORED: [f64; 10] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0];

pub(super) type Timed<S> = Family<S, Histogram, fn() -> Histogram>;
type Seconds = Gauge<f64, AtomicU64>;

/// A figure that is not there before somebody has looked: 0 would say something.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(Arc<OnceLock<Gauge>>);

impl Seen {
    pub(super) fn set(&self, value: i64) {
        self.0.get_or_init(Gauge::default).set(value);
    }
}

impl EncodeMetric for Seen {
    fn encode(&self, encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.get().map_or(Ok(()), |gauge| gauge.encode(encoder))
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }

    fn is_empty(&self) -> bool {
        self.0.get().is_none()
    }
}

pub(super) struct Figures {
    pub(super) memory: Gauge,
    pub(super) open_files: Gauge,
    pub(super) most_files: Gauge,
    pub(super) cpu: Counter<f64, AtomicU64>,
    pub(super) requests: Family<Ended, Counter>,
    pub(super) refusals: Family<Code, Counter>,
    pub(super) added: Histogram,
    pub(super) taken: Timed<Of>,
    pub(super) waited: Histogram,
    pub(super) recovered: Family<Of, Counter>,
    pub(super) passed: Family<OfWhy, Counter>,
    pub(super) unreplayed: Family<OfWhy, Counter>,
    pub(super) expiry: Family<Of, Seconds>,
    pub(super) tokens: Family<Of, Gauge>,
    pub(super) troubles: Family<Trouble, Gauge>,
    pub(super) renewals: Family<Renewed, Counter>,
    pub(super) renewal: Timed<Of>,
    pub(super) grants: Family<Standing, Gauge>,
    pub(super) unsaved: Gauge,
    pub(super) agents: Gauge,
    pub(super) most_agents: Gauge,
    pub(super) handshakes: Family<Outcome, Counter>,
    pub(super) tunnels: Gauge,
    pub(super) upstreams: Gauge,
    pub(super) upstream_states: Family<State, Gauge>,
    pub(super) connects: Family<Outcome, Counter>,
    pub(super) upstream_handshake: Histogram,
    pub(super) store: Timed<Operation>,
    pub(super) store_errors: Family<Operation, Counter>,
    pub(super) store_up: Seen,
    pub(super) reload_good: Gauge,
    pub(super) reloaded_at: Seconds,
    pub(super) reloads: Family<Outcome, Counter>,
    pub(super) audited: Family<Outcome, Counter>,
    pub(super) audit_waiting: Gauge,
    pub(super) audit_up: Gauge,
    pub(super) ca: Seconds,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Ended {
    pub(super) route: String,
    pub(super) provider: String,
    pub(super) outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Of {
    pub(super) provider: ProviderName,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct OfWhy {
    pub(super) provider: ProviderName,
    pub(super) reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Renewed {
    pub(super) provider: ProviderName,
    pub(super) cause: &'static str,
    pub(super) outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Trouble {
    pub(super) provider: ProviderName,
    pub(super) code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Standing {
    pub(super) provider: ProviderName,
    pub(super) state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Code {
    pub(super) code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Outcome {
    pub(super) outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct State {
    pub(super) state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Operation {
    pub(super) operation: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Version {
    pub(super) version: &'static str,
}

impl EncodeLabelValue for ProviderName {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        EncodeLabelValue::encode(&self.as_str(), encoder)
    }
}

impl Figures {
    pub(super) fn registered(registry: &mut Registry) -> Self {
        let version = Family::<Version, Gauge>::default();
        version.get_or_create(&Version { version: env!("CARGO_PKG_VERSION") }).set(1);
        registry.register("sidebearer_build_info", "The version that runs", version);
        let started: Seconds = Gauge::default();
        started.set(since_1970(SystemTime::now()));
        registry.register("sidebearer_start_time_seconds", "When it started, since 1970", started);
        let figures = Self::new();
        figures.of_the_process(registry);
        figures.of_requests(registry);
        figures.of_tokens(registry);
        figures.of_connections(registry);
        figures.of_the_rest(registry);
        figures
    }

    fn new() -> Self {
        let added = || Histogram::new(ADDED);
        let taken = || Histogram::new(TAKEN);
        let figures = Self {
            memory: Gauge::default(),
            open_files: Gauge::default(),
            most_files: Gauge::default(),
            cpu: Counter::default(),
            requests: Family::default(),
            refusals: Family::default(),
            added: added(),
            taken: Family::new_with_constructor(taken),
            waited: taken(),
            recovered: Family::default(),
            passed: Family::default(),
            unreplayed: Family::default(),
            expiry: Family::default(),
            tokens: Family::default(),
            troubles: Family::default(),
            renewals: Family::default(),
            renewal: Family::new_with_constructor(taken),
            grants: Family::default(),
            unsaved: Gauge::default(),
            agents: Gauge::default(),
            most_agents: Gauge::default(),
            handshakes: Family::default(),
            tunnels: Gauge::default(),
            upstreams: Gauge::default(),
            upstream_states: Family::default(),
            connects: Family::default(),
            upstream_handshake: taken(),
            store: Family::new_with_constructor(|| Histogram::new(STORED)),
            store_errors: Family::default(),
            store_up: Seen::default(),
            reload_good: Gauge::default(),
            reloaded_at: Gauge::default(),
            reloads: Family::default(),
            audited: Family::default(),
            audit_waiting: Gauge::default(),
            audit_up: Gauge::default(),
            ca: Gauge::default(),
        };
        figures.begin();
        figures
    }

    /// What is known before anything has happened: a rate is of use only from the second sample on.
    fn begin(&self) {
        self.reload_good.set(1);
        // Where there is no trail, nothing is wrong with it.
        self.audit_up.set(1);
        for code in ["token_unavailable", "fix_configuration"] {
            let _ = self.refusals.get_or_create(&Code { code });
        }
        self.reloaded_at.set(since_1970(SystemTime::now()));
        let outcomes = |family: &Family<Outcome, Counter>, outcomes: &[&'static str]| {
            for outcome in outcomes {
                let _ = family.get_or_create(&Outcome { outcome });
            }
        };
        outcomes(&self.handshakes, &["ok", "failed", "unused"]);
        outcomes(&self.connects, &["ok"]);
        outcomes(&self.reloads, &["reloaded", "unchanged", "refused"]);
        outcomes(&self.audited, &["written", "failed"]);
    }

    fn of_the_process(&self, registry: &mut Registry) {
        let memory = "Memory of the process that is resident, in bytes";
        registry.register("process_resident_memory_bytes", memory, self.memory.clone());
        registry.register("process_open_fds", "Descriptors that the process has open", self.open_files.clone());
        registry.register("process_max_fds", "Descriptors that the process may open", self.most_files.clone());
        registry.register("process_cpu_seconds", "Time that the process spent on processors", self.cpu.clone());
    }

    fn of_requests(&self, registry: &mut Registry) {
        let counts = registry.sub_registry_with_prefix("sidebearer");
        let requests = "Requests: an upstream's answer by its class, refused here, or gone with their agent";
        counts.register("requests", requests, self.requests.clone());
        counts.register("refusals", "Answers of the proxy's own, by their code", self.refusals.clone());
        let added = "Time of a routed request in the proxy, without that of the upstream and of its token";
        counts.register("added_latency_seconds", added, self.added.clone());
        let taken = "Time of a routed request to its answer's head";
        counts.register("request_seconds", taken, self.taken.clone());
        let waited = "Time that requests waited for a token, of those that did";
        counts.register("token_wait_seconds", waited, self.waited.clone());
        let recovered = "Requests that were rejected, sent once more with a new token, and accepted";
        counts.register("unauthorized_recovered", recovered, self.recovered.clone());
        let passed = "Rejections that went to the agent, and why";
        counts.register("unauthorized_passed", passed, self.passed.clone());
        let unreplayed = "Rejected requests that could not be sent once more, and why";
        counts.register("replays_skipped", unreplayed, self.unreplayed.clone());
    }

    fn of_tokens(&self, registry: &mut Registry) {
        let tokens = registry.sub_registry_with_prefix("sidebearer");
        let expiry = "Time until the first token in use ends, of all users; 0 when it has and no other came";
        tokens.register("token_expiry_seconds", expiry, self.expiry.clone());
        tokens.register("tokens", "Tokens in memory that can be sent", self.tokens.clone());
        let troubles = "Whether the last try for a token, somebody's, failed so";
        tokens.register("provider_trouble", troubles, self.troubles.clone());
        let renewals = "Tokens that were asked for: obtained, adopted from the store, or the code of the failure";
        tokens.register("renewals", renewals, self.renewals.clone());
        let renewal = "Time that providers took to give a token";
        tokens.register("renewal_seconds", renewal, self.renewal.clone());
        tokens.register("grants", "Grants by their state", self.grants.clone());
        let unsaved = "Rotated refresh tokens that are in memory only, and are lost with the process";
        tokens.register("unsaved_grants", unsaved, self.unsaved.clone());
    }

    fn of_connections(&self, registry: &mut Registry) {
        let open = registry.sub_registry_with_prefix("sidebearer");
        open.register("agent_connections", "Connections of agents", self.agents.clone());
        let most = "Connections of agents that are taken at once";
        open.register("agent_connections_max", most, self.most_agents.clone());
        let handshakes = "TLS handshakes of agents: ok, failed, or unused when the agent only hung up";
        open.register("agent_handshakes", handshakes, self.handshakes.clone());
        open.register("tunnels", "Tunnels to hosts that no route names", self.tunnels.clone());
        let upstreams = "Connections to upstreams and providers";
        open.register("upstream_connections", upstreams, self.upstream_states.clone());
        let connects = "Connections to upstreams that were opened, or the code of the failure";
        open.register("upstream_connects", connects, self.connects.clone());
        let handshake = "Time of TLS handshakes with upstreams";
        open.register("upstream_handshake_seconds", handshake, self.upstream_handshake.clone());
    }

    fn of_the_rest(&self, registry: &mut Registry) {
        let rest = registry.sub_registry_with_prefix("sidebearer");
        rest.register("store_seconds", "Time of the store's operations", self.store.clone());
        rest.register("store_errors", "Operations of the store that failed", self.store_errors.clone());
        rest.register("store_up", "Whether the store answers", self.store_up.clone());
        let good = "Whether the configuration was taken when it was last read";
        rest.register("config_last_reload_successful", good, self.reload_good.clone());
        let at = "When a configuration was last taken, since 1970";
        rest.register("config_last_reload_success_timestamp_seconds", at, self.reloaded_at.clone());
        rest.register("reloads", "Times that the configuration was read anew", self.reloads.clone());
        rest.register("audit_lines", "Lines of the audit trail", self.audited.clone());
        let waiting = "Lines of the audit trail that wait to be written";
        rest.register("audit_lines_waiting", waiting, self.audit_waiting.clone());
        rest.register(
            "audit_up",
            "Whether the audit trail could be written when that was last tried",
            self.audit_up.clone(),
        );
        rest.register("ca_expiry_seconds", "Time until the local CA ends", self.ca.clone());
    }

    /// What came of a rejection of the token, if there was one.
    pub(super) fn rejected(&self, provider: &ProviderName, event: &events::Request) {
        let of = || provider.clone();
        if event.recovered {
            self.recovered.get_or_create(&Of { provider: of() }).inc();
        } else if let Some(reason) = event.passed {
            self.passed.get_or_create(&OfWhy { provider: of(), reason }).inc();
            if UNREPLAYED.contains(&reason) {
                self.unreplayed.get_or_create(&OfWhy { provider: of(), reason }).inc();
            }
        } else if event.retried && event.code.is_none() {
            self.passed.get_or_create(&OfWhy { provider: of(), reason: "rejected_again" }).inc();
        }
    }
}
