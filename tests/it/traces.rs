//! Spans of requests: they go to the collector, and what the agent says of its trace goes on as it came.

use crate::world::{Setup, To, World};

const CONTEXT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
/// As no two implementations would write it.
const STATE: &str = "rojo=00f067aa0ba902b7,  congo=t61rcWkgMzE ,,x@y=1";

/// A world whose collector is its server without TLS.
fn traced() -> Setup {
    let collector = "traces: {endpoint: 'http://localhost:80', headers: {x-tenant: mine}}";
    Setup::new().top(collector).resolve("localhost:80", To::Plain)
}

#[tokio::test]
async fn the_agents_trace_context_reaches_the_api_as_it_came_and_none_is_added() {
    for world in [traced().start().await, World::start().await] {
        for over_h2 in [false, true] {
            let call = |path: &str| if over_h2 { world.call("GET", path).over_h2() } else { world.call("GET", path) };
            call("/with").with("traceparent", CONTEXT).with("tracestate", STATE).send().await;
            call("/without").send().await;
            let seen = world.api.seen();
            let [.., with, without] = seen.as_slice() else { panic!("{seen:?}") };
            assert_eq!((with.header("traceparent"), with.header("tracestate")), (Some(CONTEXT), Some(STATE)));
            assert_eq!((without.header("traceparent"), without.header("tracestate")), (None, None));
        }
    }
}

#[tokio::test]
async fn spans_are_posted_to_the_collector_before_the_end() {
    let mut world = traced().start().await;
    world.get("/me?q=in-a-query").await;
    world.begins_to_stop();
    world.ends().await;
    let seen = world.plain.seen();
    let [posted] = seen.as_slice() else { panic!("{seen:?}") };
    assert_eq!((posted.path(), posted.header("content-type")), ("/v1/traces", Some("application/x-protobuf")));
    assert_eq!((posted.header("x-tenant"), posted.token()), (Some("mine"), None));
    let text = String::from_utf8_lossy(&posted.body);
    for said in ["GET routes[0] api.test", "https://api.test:443/me", "sidebearer.token.cause", "service.name"] {
        assert!(text.contains(said), "{said} is not in {text:?}");
    }
    assert!(!text.contains("in-a-query") && !text.contains("default"));
}

#[tokio::test]
async fn without_its_collector_requests_go_on_and_it_is_said_once() {
    let mut world = Setup::new().top("traces: {endpoint: 'http://127.0.0.1:1'}").start().await;
    assert_eq!(world.get("/me").await.status, 200);
    world.begins_to_stop();
    world.ends().await;
    world.logs("spans cannot be sent; said once", "WARN", 1).await;
    world.logs("spans were lost", "WARN", 1).await;
}
