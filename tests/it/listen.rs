//! Where agents come in, for whom, and how long they may dawdle.

use std::time::Duration;

use crate::world::answer::{Answer, Filler, Gate};
use crate::world::raw::Raw;
use crate::world::{Setup, World, secret_of};

const AGENTS: &str = "agents:
  - {name: researcher, secret: '${RESEARCHER_SECRET}', users: [alice, bob], providers: [main]}
  - {name: secretary, secret: '${SECRETARY_SECRET}', users: [alice, bob], providers: [other]}";
const PLACES: &str = "
  - 127.0.0.1:0
  - {address: 127.0.0.1:0, user: alice}
  - {address: 'unix:FOLDER/bob.sock', user: bob, agent: researcher}
  - {address: 'unix:FOLDER/secretary.sock', user: bob, agent: secretary}
  - '[::1]:0'";

async fn get(agent: &mut Raw, lines: &str) -> (u16, String) {
    agent.says(format!("GET http://plain.test/me HTTP/1.1\r\nHost: plain.test\r\n{lines}\r\n")).await;
    let reply = agent.hears().await;
    (reply.status, if reply.status == 200 { String::new() } else { reply.code() })
}

fn plain() -> Setup {
    Setup::new().routes("- host: api.test\n  provider: main\n- {host: plain.test, provider: main, plaintext: true}")
}

#[tokio::test]
async fn a_listener_can_say_for_whom_its_callers_act() {
    // LST-008, LST-013: for clients that never send a proxy's credentials.
    let setup = plain().connected(&["alice", "bob"]).and_another_provider().top(AGENTS).listen(PLACES);
    let world = setup.start().await;
    let pair = format!("bob:{}", secret_of("researcher"));
    let bobs = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, pair);
    let bobs = format!("Proxy-Authorization: Basic {bobs}\r\n");
    let mut said = Vec::new();
    for (place, lines) in [(0, ""), (0, &*bobs), (1, ""), (1, &bobs), (2, ""), (3, ""), (4, ""), (4, &bobs)] {
        let mut agent = world.connection_at(&world.places[place]).await;
        said.push(get(&mut agent, lines).await);
    }
    let refused = |status, code: &str| (status, code.to_owned());
    let (ok, who) = (refused(200, ""), refused(407, "proxy_authentication_required"));
    let other = refused(403, "provider_not_allowed");
    assert_eq!(said, [who.clone(), ok.clone(), ok.clone(), ok.clone(), ok.clone(), other, who, ok]);
    assert_eq!(world.issued.owners(&world.plain.tokens()), ["bob", "alice", "alice", "bob", "bob"]);
    let agents: Vec<_> = world.requests_told().into_iter().map(|told| told.agent).collect();
    let (researcher, secretary) = (Some("researcher".to_owned()), Some("secretary".to_owned()));
    assert_eq!(agents, [None, researcher.clone(), None, None, researcher.clone(), secretary, None, researcher]);
}

#[tokio::test]
async fn a_tunnel_through_a_unix_socket_is_as_any_other() {
    let world = plain().listen("[127.0.0.1:0, 'unix:FOLDER/agent.sock']").start().await;
    let mut agent = world.connection_at(&world.places[1]).await;
    agent.says("CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n").await;
    assert_eq!(agent.hears().await.status, 200);
    let mut agent = agent.tls("api.test", &["http/1.1"]).await.unwrap();
    agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    assert_eq!(agent.hears().await.status, 200);
}

/// A world whose limit of this name is so short that it is met.
async fn with(limit: &str) -> World {
    plain().top(&format!("limits: {{{limit}}}")).start().await
}

const HEAD: &str = "GET http://plain.test/me HTTP/1.1\r\nHost: plain.test\r\n";

#[tokio::test]
async fn a_head_that_does_not_end_is_not_waited_for() {
    // LST-016
    for begun in ["G", HEAD, "\r\nGET"] {
        let world = with("head_timeout: 500ms").await;
        let mut agent = world.connection().await;
        agent.says(begun).await;
        assert_eq!(agent.hears_to_the_end().await, "", "{begun:?}");
        assert_eq!(get(&mut world.connection().await, "").await.0, 200);
    }
    // Within a tunnel too.
    let world = with("head_timeout: 500ms").await;
    let mut agent = world.api_connection().await;
    agent.says("GET /me HTTP/1.1\r\nHost: ").await;
    assert_eq!(agent.hears_to_the_end().await, "");
}

#[tokio::test]
async fn a_connection_with_nothing_on_it_is_not_kept_for_ever() {
    // LST-016
    let world = with("idle_timeout: 500ms, head_timeout: 500ms").await;
    assert_eq!(world.connection().await.hears_to_the_end().await, "");
    let mut agent = world.connection().await;
    assert_eq!(get(&mut agent, "").await.0, 200);
    assert_eq!(agent.hears_to_the_end().await, "");
}

#[tokio::test]
async fn a_quiet_http2_connection_finishes_what_is_under_way_and_ends() {
    // LST-016
    let world = with("idle_timeout: 500ms").await;
    let gate = Gate::shut();
    world.api_answers([Answer::from(200).once(&gate)]);
    let agent = world.tunnel("api.test:443").await.tls("api.test", &["h2"]).await.unwrap().http2().await;
    let request = http::Request::get("https://api.test/me").body(Filler::text("")).unwrap();
    let (reply, ()) = tokio::join!(agent.send(request), async {
        world.api.has_seen(1).await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        gate.open();
    });
    assert_eq!(reply.unwrap().status, 200);
    agent.ends().await;
}

#[tokio::test]
async fn a_connection_that_was_to_be_http2_and_says_nothing_is_not_kept() {
    // LST-016
    let world = with("idle_timeout: 500ms").await;
    let mut agent = world.tunnel("api.test:443").await.tls("api.test", &["h2"]).await.unwrap();
    agent.hears_to_the_end().await;
    let mut agent = world.tunnel("api.test:443").await.tls("api.test", &["h2"]).await.unwrap();
    agent.says("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    agent.hears_to_the_end().await;
}

#[tokio::test]
async fn a_body_that_stops_coming_ends_its_request_in_http2_too() {
    // LST-016
    let world = with("body_timeout: 500ms").await;
    let agent = world.tunnel("api.test:443").await.tls("api.test", &["h2"]).await.unwrap().h2().await;
    let request = http::Request::post("https://api.test/me").header("content-length", "10").body(()).unwrap();
    let (answer, mut body) = agent.ready().await.unwrap().send_request(request, false).unwrap();
    body.send_data("12345".into(), false).unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(30), answer).await.expect("it is waited for");
    assert!(answer.is_err() || answer.unwrap().status().as_u16() >= 400);
}

#[tokio::test]
async fn a_body_that_stops_coming_ends_its_request() {
    // LST-016
    let world = with("body_timeout: 500ms").await;
    let mut agent = world.connection().await;
    agent.says(format!("{}Content-Length: 10\r\n\r\n12345", HEAD.replace("GET", "POST"))).await;
    let heard = agent.hears_to_the_end().await;
    assert!(heard.is_empty() || heard.starts_with("HTTP/1.1 4") || heard.starts_with("HTTP/1.1 5"), "{heard}");
    assert_eq!(get(&mut world.connection().await, "").await.0, 200);
}

#[tokio::test]
async fn a_handshake_that_does_not_end_is_not_waited_for() {
    // TLS-007
    let world = with("handshake_timeout: 500ms").await;
    let mut agent = world.tunnel("api.test:443").await;
    agent.says(b"\x16\x03\x01\x02\x00\x01").await;
    agent.hears_to_the_end().await;
    assert_eq!(get(&mut world.connection().await, "").await.0, 200);
}

#[tokio::test]
async fn beyond_the_most_connections_the_next_one_waits_for_a_place() {
    // LST-016
    let world = with("max_connections: 2").await;
    let mut kept = world.connection().await;
    assert_eq!(get(&mut kept, "").await.0, 200);
    // A tunnel keeps its place also when the protocol on it is another one.
    let tunnel = world.api_connection().await;
    let mut waits = world.connection().await;
    waits.says(format!("{HEAD}\r\n")).await;
    waits.hears_nothing_yet().await;
    assert_eq!(get(&mut kept, "").await.0, 200);
    drop(tunnel);
    assert_eq!(waits.hears().await.status, 200);
}

#[tokio::test]
async fn a_head_has_as_many_fields_as_it_may() {
    // LST-018
    let world = with("max_headers: 20").await;
    for (fields, status) in [(18, 200), (40, 431)] {
        let mut agent = world.connection().await;
        agent.says(format!("{HEAD}{}\r\n", "X: 1\r\n".repeat(fields))).await;
        assert_eq!(agent.hears().await.status, status, "{fields}");
    }
}

#[tokio::test]
async fn many_idle_connections_keep_nobody_out() {
    // LST-016
    let world = World::start().await;
    let mut idle = Vec::new();
    for _ in 0..400 {
        idle.push(world.connection().await);
    }
    let asked = tokio::time::timeout(Duration::from_secs(10), world.get("/me")).await;
    assert_eq!(asked.unwrap().status, 200);
}
