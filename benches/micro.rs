//! The pieces that a request passes, one by one, and how they grow: `cargo bench --bench micro`.
//!
//! Seconds are this machine's; allocations are the same everywhere.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use divan::{AllocProfiler, Bencher};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use sidebearer::ca::{self, Ca};
use sidebearer::clock::{Clock, Now};
use sidebearer::drain::Drain;
use sidebearer::events::Events;
use sidebearer::host::{Authority, HostName};
use sidebearer::names::{Subject, UserName};
use sidebearer::oauth::grant::TokenRequest;
use sidebearer::oauth::{Grant, Provider};
use sidebearer::proxy::measured::Hop;
use sidebearer::routes::{Action, Retry, Route, Routes, UpstreamHttp};
use sidebearer::secret::Secret;
use sidebearer::store::key::Keyring;
use sidebearer::store::{self, Store};
use sidebearer::tokens::{self, Key, Parts, Servers, Tokens};
use sidebearer::upstream::{CallError, Reply};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use url::Url;

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

fn main() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    divan::main();
}

/// Routes of as many hosts, every tenth a wildcard.
fn routes(count: usize) -> Routes {
    let pattern = |index: usize| {
        if index % 10 == 9 { format!("*.host{index}.example") } else { format!("api.host{index}.example") }
    };
    Routes::new((0..count).map(|index| Route {
        name: format!("routes[{index}]").into(),
        host: pattern(index).parse().unwrap(),
        port: 443,
        paths: vec!["/v1/**".parse().unwrap()],
        methods: Vec::new(),
        action: Action::Authenticate("acme".parse().unwrap()),
        plaintext: false,
        retry: Retry::Once,
        upstream_http: UpstreamHttp::Auto,
        redact_reflections: false,
    }))
}

const ROUTES: [usize; 3] = [1, 100, 10_000];

#[divan::bench(args = ROUTES)]
fn route_of_a_request(bencher: Bencher, count: usize) {
    let (routes, to) = (routes(count), Authority::parse("api.host0.example", Some(443)).unwrap());
    bencher.bench(|| routes.find(black_box(&to), &Method::GET, "/v1/items").unwrap().is_some());
}

#[divan::bench(args = ROUTES)]
fn host_without_a_route(bencher: Bencher, count: usize) {
    let (routes, to) = (routes(count), Authority::parse("www.elsewhere.example", Some(443)).unwrap());
    bencher.bench(|| routes.claims(black_box(&to)) || routes.names(&to.host));
}

/// Of `cargo test --benches` none needs long.
fn counts() -> &'static [usize] {
    if std::env::args().any(|argument| argument == "--bench") { &[1, 1_000, 1_000_000] } else { &[1, 1_000] }
}

#[divan::bench(args = counts(), threads = [1, 16])]
fn token_at_hand(bencher: Bencher, count: usize) {
    let cache = Cache::of(count);
    let next = AtomicUsize::new(0);
    bencher
        .with_inputs(|| &cache.keys[next.fetch_add(7919, Ordering::Relaxed) % count])
        .bench_refs(|key| cache.tokens.bearer(key).now_or_never().unwrap().unwrap().generation);
}

/// Tokens of many users, all of them fresh.
struct Cache {
    tokens: Tokens,
    keys: Vec<Key>,
    _runtime: Runtime,
    _folder: TempDir,
}

impl Cache {
    /// The same for all benches, for a million is not made in no time.
    fn of(count: usize) -> &'static Self {
        static MADE: OnceLock<Mutex<HashMap<usize, &'static Cache>>> = OnceLock::new();
        let mut made = MADE.get_or_init(Mutex::default).lock().unwrap();
        made.entry(count).or_insert_with(|| Box::leak(Box::new(Self::new(count))))
    }

    fn new(count: usize) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let entered = runtime.enter();
        let folder = tempfile::tempdir().unwrap();
        let store = runtime.block_on(Store::open(folder.path(), keyring(), true)).unwrap();
        let provider = Arc::new(Provider::new("acme".parse().unwrap(), "agent", Grant::RefreshToken));
        let (clock, events, drain) = (Clock::system(), Events::default(), Drain::default());
        let parts = Parts { store, servers: Arc::new(Nobody), clock, events, drain };
        let tokens = Tokens::new(std::slice::from_ref(&provider), parts);
        let key = |index: usize| {
            let user: UserName = format!("user-{index:08}@example.com").parse().unwrap();
            let key = tokens.key(&provider.name, &user).unwrap();
            assert_eq!(key.subject, Subject::User(user));
            key
        };
        let keys: Vec<Key> = (0..count).map(key).collect();
        let before = resident();
        for (index, key) in keys.iter().enumerate() {
            tokens::measured::hold(&tokens, key, Secret::new(format!("gho_{index:036}")));
        }
        if count == 1_000_000 {
            // The plan of each renewal is in memory too, once the task that keeps them has taken it.
            let mut last = 0;
            while std::mem::replace(&mut last, resident()) != last {
                std::thread::sleep(Duration::from_millis(300));
            }
            println!("a million tokens: {} bytes each", (last - before) / count);
        }
        drop(entered);
        Self { tokens, keys, _runtime: runtime, _folder: folder }
    }
}

/// The memory of this process.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// An authorization server that is not asked.
struct Nobody;

impl Servers for Nobody {
    fn post(&self, _: TokenRequest, _: Option<Now>) -> BoxFuture<'_, Result<Reply, CallError>> {
        async { Err(CallError::Request) }.boxed()
    }

    fn metadata(&self, _: Url) -> BoxFuture<'_, Result<Reply, CallError>> {
        async { Err(CallError::Request) }.boxed()
    }
}

fn fields(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    let field =
        |(name, value): &(&'static str, &'static str)| (HeaderName::from_static(name), HeaderValue::from_static(value));
    fields.iter().map(field).collect()
}

#[divan::bench]
fn header_of_a_request(bencher: Bencher) {
    let hop = Hop::new();
    let request = fields(&[
        ("host", "api.github.com"),
        ("user-agent", "python-httpx/0.28.1"),
        ("accept", "application/json"),
        ("accept-encoding", "gzip, deflate, br"),
        ("connection", "keep-alive"),
        ("content-type", "application/json"),
        ("authorization", "Bearer sidebearer-placeholder"),
    ]);
    bencher.with_inputs(|| request.clone()).bench_refs(|fields| hop.clean_request(fields));
}

#[divan::bench]
fn header_of_an_answer(bencher: Bencher) {
    let hop = Hop::new();
    let answer = fields(&[
        ("date", "Wed, 25 Nov 2026 20:00:00 GMT"),
        ("content-type", "application/json"),
        ("cache-control", "private, max-age=60"),
        ("etag", "\"0123456789abcdef\""),
        ("server", "nginx"),
        ("x-ratelimit-remaining", "4999"),
        ("alt-svc", "h3=\":443\""),
    ]);
    bencher.with_inputs(|| answer.clone()).bench_refs(|fields| hop.clean_response(fields));
}

/// An authority for every host of an example.
fn authority() -> Ca {
    Ca::generate(&["*.leaves.example".parse().unwrap()], SystemTime::now()).unwrap()
}

#[divan::bench]
fn leaf_minted(bencher: Bencher) {
    let ca = authority();
    let mut index = 0;
    let next = move || -> HostName {
        index += 1;
        format!("host{index}.leaves.example").parse().unwrap()
    };
    bencher.with_inputs(next).bench_local_refs(|host| ca::measured::leaf(&ca, host, SystemTime::now()).unwrap());
}

#[divan::bench(threads = [1, 16])]
fn leaf_at_hand(bencher: Bencher) {
    let (ca, host) = (authority(), "host.leaves.example".parse().unwrap());
    ca::measured::leaf(&ca, &host, SystemTime::now()).unwrap();
    bencher.bench(|| ca::measured::leaf(&ca, black_box(&host), SystemTime::now()).unwrap());
}

fn keyring() -> Keyring {
    Keyring::from_secrets(&[Secret::new("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")]).unwrap()
}

#[divan::bench]
fn row_sealed(bencher: Bencher) {
    let (keys, secret) = (keyring(), Secret::new("a".repeat(200)));
    bencher.bench(|| store::measured::seal(&keys, black_box(&secret)));
}

#[divan::bench]
fn row_opened(bencher: Bencher) {
    let keys = keyring();
    let sealed = store::measured::seal(&keys, &Secret::new("a".repeat(200)));
    bencher.bench(|| store::measured::open(&keys, black_box(&sealed)).unwrap());
}
