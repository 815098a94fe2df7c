//! What Prometheus reads of a sidecar: what happened, and nothing that an agent can make up.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::answer::{Answer, Filler, answer, usual};
use crate::world::raw::Raw;
use crate::world::{Setup, World, secret_of, soon};

const ROUTE: &str = "routes[0] api.test";

/// The figures of a sidecar, by their names with their labels.
async fn scrape(world: &World) -> BTreeMap<String, f64> {
    let (_, text) = asked(world, "").await;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let figures = lines.map(|line| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        (series.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line}")))
    });
    figures.collect()
}

/// The head and the text of an answer.
async fn asked(world: &World, fields: &str) -> (String, String) {
    let mut stream = soon(TcpStream::connect(world.health)).await.unwrap();
    let head = format!("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}\r\n");
    soon(stream.write_all(head.as_bytes())).await.unwrap();
    let mut heard = String::new();
    soon(stream.read_to_string(&mut heard)).await.unwrap();
    let (head, body) = heard.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    (head.to_owned(), body.to_owned())
}

fn requests(route: &str, provider: &str, outcome: &str) -> String {
    format!("sidebearer_requests_total{{route=\"{route}\",provider=\"{provider}\",outcome=\"{outcome}\"}}")
}

#[tokio::test]
async fn a_rejected_token_that_was_renewed_shows_as_recovered() {
    let world = World::start().await;
    world.api_answers([Answer::from(401), usual(), Answer::from(404)]);
    assert_eq!((world.get("/me").await.status, world.get("/me").await.status), (200, 404));
    let figures = scrape(&world).await;
    let is = |series: &str, value: f64| assert_eq!(figures.get(series), Some(&value), "{series}: {figures:#?}");
    is(&requests(ROUTE, "main", "2xx"), 1.0);
    is(&requests(ROUTE, "main", "4xx"), 1.0);
    is(&requests(ROUTE, "main", "refused"), 0.0);
    is("sidebearer_unauthorized_recovered_total{provider=\"main\"}", 1.0);
    is("sidebearer_renewals_total{provider=\"main\",cause=\"needed\",outcome=\"obtained\"}", 1.0);
    is("sidebearer_renewals_total{provider=\"main\",cause=\"rejected\",outcome=\"obtained\"}", 1.0);
    is("sidebearer_renewal_seconds_count{provider=\"main\"}", 2.0);
    is("sidebearer_request_seconds_count{provider=\"main\"}", 2.0);
    is("sidebearer_added_latency_seconds_count", 2.0);
    is("sidebearer_token_wait_seconds_count", 1.0);
    is("sidebearer_tokens{provider=\"main\"}", 1.0);
    is("sidebearer_unsaved_grants", 0.0);
    is("sidebearer_store_up", 1.0);
    is("sidebearer_config_last_reload_successful", 1.0);
    is("sidebearer_agent_connections_max", 10_000.0);
    is(&format!("sidebearer_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION")), 1.0);
    let at_least = |series: &str, least: f64| assert!(figures[series] >= least, "{series}: {}", figures[series]);
    at_least("sidebearer_token_expiry_seconds{provider=\"main\"}", 3000.0);
    at_least("sidebearer_agent_handshakes_total{outcome=\"ok\"}", 1.0);
    at_least("sidebearer_upstream_connects_total{outcome=\"ok\"}", 2.0);
    at_least("sidebearer_upstream_handshake_seconds_count", 2.0);
    at_least("sidebearer_upstream_connections{state=\"idle\"}", 1.0);
    at_least("sidebearer_store_seconds_count{operation=\"key_check\"}", 1.0);
    at_least("sidebearer_ca_expiry_seconds", 24.0 * 3600.0);
    at_least("process_resident_memory_bytes", 1e6);
    at_least("process_open_fds", 3.0);
    // The upstream's time is not the proxy's.
    assert!(
        figures["sidebearer_added_latency_seconds_sum"] <= figures["sidebearer_request_seconds_sum{provider=\"main\"}"]
    );
}

#[tokio::test]
async fn the_upstreams_time_and_the_tokens_are_not_the_proxys() {
    let world = World::start().await;
    let slow = crate::world::answer::Gate::shut();
    world.provider_answers([answer(500), answer(500)]);
    world.api_answers([usual().once(&slow)]);
    let opened = async {
        world.api.has_seen(1).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        slow.open();
    };
    world.forgives_what_was_told();
    let (reply, ()) = tokio::join!(async { until_well(&world).await }, opened);
    assert_eq!(reply, 200);
    let figures = scrape(&world).await;
    let taken = figures["sidebearer_request_seconds_sum{provider=\"main\"}"];
    let added = figures["sidebearer_added_latency_seconds_sum"];
    assert!(taken > 0.3 && added < taken - 0.3, "{added} of {taken}");
}

/// A call until the provider gives a token.
async fn until_well(world: &World) -> u16 {
    loop {
        match world.get("/me").await.status {
            503 => tokio::time::sleep(Duration::from_millis(100)).await,
            status => return status,
        }
    }
}

#[tokio::test]
async fn a_401_that_goes_to_the_agent_shows_with_its_reason() {
    let never = "- host: api.test\n  provider: main\n  retry: never";
    let world = Setup::new().routes(never).start().await;
    world.api_answers([401]);
    assert_eq!(world.get("/me").await.status, 401);
    let figures = scrape(&world).await;
    for family in ["unauthorized_passed", "replays_skipped"] {
        let series = format!("sidebearer_{family}_total{{provider=\"main\",reason=\"retry_never\"}}");
        assert_eq!(figures.get(&series), Some(&1.0), "{figures:#?}");
    }

    let world = World::start().await;
    world.api_answers([401, 401]);
    assert_eq!(world.get("/me").await.status, 401);
    let figures = scrape(&world).await;
    assert_eq!(figures["sidebearer_unauthorized_passed_total{provider=\"main\",reason=\"rejected_again\"}"], 1.0);
    assert_eq!(figures["sidebearer_unauthorized_recovered_total{provider=\"main\"}"], 0.0);
    assert!(!figures.keys().any(|series| series.starts_with("sidebearer_replays_skipped_total{")));
}

#[tokio::test]
async fn a_body_that_is_too_long_for_a_second_try_is_counted() {
    let world = Setup::new().top("replay_limit: 1KiB").start().await;
    world.api_answers([401]);
    let reply = world.call("POST", "/me").body(Filler::of(64 << 10)).send().await;
    assert_eq!(reply.status, 401);
    let figures = scrape(&world).await;
    assert_eq!(figures["sidebearer_replays_skipped_total{provider=\"main\",reason=\"body_too_long\"}"], 1.0);
}

#[tokio::test]
async fn grants_are_counted_by_their_state_also_where_nobody_has_connected() {
    let grants = |figures: &BTreeMap<String, f64>, provider: &str| {
        let of = |state| figures[&format!("sidebearer_grants{{provider=\"{provider}\",state=\"{state}\"}}")];
        ["connected", "reauthorize", "fix_configuration", "never_connected"].map(of)
    };
    let world = Setup::consenting().and_another_provider().with_grants_of(&["default", "alice"]).start().await;
    let figures = scrape(&world).await;
    assert_eq!(grants(&figures, "main"), [2.0, 0.0, 0.0, 0.0]);
    assert_eq!(grants(&figures, "other"), [0.0, 0.0, 0.0, 1.0]);

    let world = Setup::consenting().with_grants_of(&["default", "alice"]).start().await;
    world.issued.forget_grants();
    world.get("/me").await;
    let figures = scrape(&world).await;
    assert_eq!(grants(&figures, "main"), [1.0, 1.0, 0.0, 0.0]);
    let failed = "sidebearer_renewals_total{provider=\"main\",cause=\"needed\",outcome=\"reauthorize\"}";
    assert_eq!(figures.get(failed), Some(&1.0), "{figures:#?}");
    assert!(!figures.keys().any(|series| series.starts_with("sidebearer_token_expiry_seconds{")));
}

#[tokio::test]
async fn a_store_that_is_away_is_told_and_what_was_known_of_it_stays() {
    let world = Setup::consenting().with_grants_of(&["default"]).start().await;
    let connected = "sidebearer_grants{provider=\"main\",state=\"connected\"}";
    assert_eq!(scrape(&world).await[connected], 1.0);
    world.sql("ALTER TABLE meta RENAME TO gone");
    loop {
        let figures = scrape(&world).await;
        if figures["sidebearer_store_up"] == 0.0 {
            assert_eq!(figures[connected], 1.0);
            assert!(figures["sidebearer_store_errors_total{operation=\"key_check\"}"] >= 1.0);
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.sql("ALTER TABLE gone RENAME TO meta");
}

#[tokio::test]
async fn prometheus_gets_the_form_that_it_asks_for() {
    let world = World::start().await;
    world.get("/me").await;
    let (head, text) = asked(&world, "").await;
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    assert!(text.contains("# TYPE sidebearer_requests_total counter\nsidebearer_requests_total{"), "{text}");
    assert!(!text.contains("# EOF"), "{text}");
    let (head, text) = asked(&world, "Accept: application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1\r\n").await;
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{head}");
    assert!(text.contains("# TYPE sidebearer_requests counter\nsidebearer_requests_total{"), "{text}");
    assert!(text.ends_with("\n# EOF\n"), "{text}");
}

/// One request on a connection, whatever it is.
async fn sent(agent: &mut Raw, method: &str, url: &str, user: &str) -> u16 {
    let credentials = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, format!("{user}:{}", secret_of("all")));
    let host = url.split('/').nth(2).unwrap();
    let lines = format!("Host: {host}\r\nProxy-Authorization: Basic {credentials}\r\nContent-Length: 0\r\n");
    agent.says(format!("{method} {url} HTTP/1.1\r\n{lines}\r\n")).await;
    agent.hears().await.status
}

#[tokio::test]
async fn thousands_of_hosts_users_methods_and_paths_make_no_series() {
    // LST-020
    let agents = "agents:\n  - name: all\n    secret: ${ALL_SECRET}\n    users: ['*']\nunmatched: deny";
    let routes = "- host: plain.test\n  provider: main\n  plaintext: true";
    let world = Setup::new().top(agents).routes(routes).start().await;
    let mut agent = world.connection().await;
    assert_eq!(sent(&mut agent, "GET", "http://plain.test/me", "alice").await, 200);
    assert_eq!(sent(&mut agent, "GET", "http://other.test/me", "alice").await, 403);
    let series = async || scrape(&world).await.into_keys().collect::<Vec<_>>();
    let before = series().await;
    for number in 0..1000 {
        let (method, user) = (format!("M{number}"), format!("user-{number}"));
        assert_eq!(sent(&mut agent, &method, &format!("http://plain.test/{number}"), &user).await, 200);
        assert_eq!(sent(&mut agent, &method, &format!("http://host-{number}.test/{number}"), &user).await, 403);
    }
    assert_eq!(series().await, before);
    let (_, text) = asked(&world, "").await;
    for word in ["user-7", "alice", "host-7", "other.test", "M7"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
    assert_eq!(scrape(&world).await[&requests("", "", "refused")], 1001.0);
}
