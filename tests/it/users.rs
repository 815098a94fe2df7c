//! Several agents and several users behind one sidecar: nobody gets another's token.

use futures_util::future::join_all;

use crate::world::raw::Raw;
use crate::world::{Setup, World, secret_of};

const AGENTS: &str = "agents:
  - name: researcher
    secret: ${RESEARCHER_SECRET}
    users: [alice, bob]
  - name: secretary
    secret: ${SECRETARY_SECRET}
    users: [carol]
    providers: [other]";
const ROUTES: &str = "- host: api.test
  provider: main
- host: plain.test
  provider: main
  plaintext: true";

/// Two agents, and users who have connected.
async fn world() -> World {
    let setup = Setup::new().connected(&["alice", "bob", "carol"]).top(AGENTS).routes(ROUTES);
    setup.and_another_provider().start().await
}

/// The line in which an agent says who it is and for whom it acts.
fn credentials(user: &str, agent: &str) -> String {
    format!("Proxy-Authorization: Basic {}\r\n", encoded(&format!("{user}:{}", secret_of(agent))))
}

fn encoded(pair: &str) -> String {
    base64::Engine::encode(&base64::prelude::BASE64_STANDARD, pair)
}

/// A request to a routed host, in the clear.
async fn get_plain(agent: &mut Raw, lines: &str) -> u16 {
    agent.says(format!("GET http://plain.test/me HTTP/1.1\r\nHost: plain.test\r\n{lines}\r\n")).await;
    agent.hears().await.status
}

#[tokio::test]
async fn on_one_connection_each_request_gets_the_token_of_the_user_that_it_names() {
    // LST-009, LST-013, RTY-034
    let world = world().await;
    let mut agent = world.connection().await;
    let users = ["alice", "bob", "alice", "alice", "bob"];
    for user in users {
        assert_eq!(get_plain(&mut agent, &credentials(user, "researcher")).await, 200);
    }
    assert_eq!(world.issued.owners(&world.plain.tokens()), users);
    let told: Vec<_> = world.requests_told().iter().map(|told| told.user.clone().unwrap().to_string()).collect();
    assert_eq!(told, users);
}

#[tokio::test]
async fn a_request_without_credentials_gets_no_token_of_the_one_before() {
    // LST-009
    let world = world().await;
    let mut agent = world.connection().await;
    assert_eq!(get_plain(&mut agent, &credentials("alice", "researcher")).await, 200);
    for lines in ["", "X-User: alice\r\nX-Subject: alice\r\n", "Authorization: Basic YWxpY2U6eA==\r\n"] {
        assert_eq!(get_plain(&mut agent, lines).await, 407, "{lines}");
    }
    assert_eq!(get_plain(&mut agent, &credentials("bob", "researcher")).await, 200);
    assert_eq!(world.issued.owners(&world.plain.tokens()), ["alice", "bob"]);
}

#[tokio::test]
async fn whoever_opens_a_tunnel_is_whom_all_of_it_is_for() {
    // LST-010
    let world = world().await;
    let bobs = credentials("bob", "researcher");
    let tunnel = world.tunnel_with("api.test:443", &credentials("alice", "researcher")).await;
    let mut agent = tunnel.tls("api.test", &["http/1.1"]).await.unwrap();
    for lines in
        ["", &bobs, "X-User: bob\r\nX-Subject: bob\r\nForwarded: for=bob\r\n", "Proxy-Authorization: Basic\r\n"]
    {
        agent.says(format!("GET /me HTTP/1.1\r\nHost: api.test\r\n{lines}\r\n")).await;
        assert_eq!(agent.hears().await.status, 200, "{lines}");
    }
    assert_eq!(world.issued.owners(&world.api.tokens()), ["alice"; 4]);

    let tunnel = world.tunnel_with("api.test:443", &bobs).await;
    let streams = tunnel.tls("api.test", &["h2"]).await.unwrap().http2().await;
    let alices = format!("Basic {}", encoded(&format!("alice:{}", secret_of("researcher"))));
    let request = http::Request::get("https://api.test/me").header("proxy-authorization", alices);
    let request = request.body(crate::world::answer::Filler::text("")).unwrap();
    assert_eq!(streams.send(request).await.unwrap().status, 200);
    assert_eq!(world.issued.owners(&world.api.tokens()[4..]), ["bob"]);
}

#[tokio::test]
async fn no_credential_of_an_agent_goes_upstream_or_into_a_log() {
    // LST-012, SEC-035
    let world = world().await;
    let (alices, mine) = (credentials("alice", "researcher"), encoded(&format!("alice:{}", secret_of("researcher"))));
    let mut agent = world.connection().await;
    assert_eq!(get_plain(&mut agent, &alices).await, 200);
    agent.says(format!("GET http://evil.test/ HTTP/1.1\r\nHost: evil.test\r\n{alices}\r\n")).await;
    agent.hears().await;
    let tunnel = world.tunnel_with("api.test:443", &alices).await;
    let mut agent = tunnel.tls("api.test", &["http/1.1"]).await.unwrap();
    agent.says(format!("GET /me HTTP/1.1\r\nHost: api.test\r\n{alices}\r\n")).await;
    assert_eq!(agent.hears().await.status, 200);
    for seen in world.plain.seen().iter().chain(&world.api.seen()) {
        assert!(!seen.names().contains(&"proxy-authorization"), "{seen:?}");
        assert!(!format!("{seen:?}").contains(&mine), "{seen:?}");
    }
    assert!(crate::world::log::lines_with(&mine).is_empty());
}

#[tokio::test]
async fn an_agent_without_the_right_secret_is_told_what_to_show() {
    // LST-008, LST-013
    let world = world().await;
    let line = |value: &str| format!("Proxy-Authorization: {value}\r\n");
    let right = encoded(&format!("alice:{}", secret_of("researcher")));
    let shown = [
        String::new(),
        line(&format!("Basic {}", encoded("alice:guess"))),
        line(&format!("Bearer {}", secret_of("researcher"))),
        line(&format!("Digest {right}")),
        line(&right),
        line("Basic %%%"),
        line("Basic"),
        line(""),
        // Two would be two users to two readers.
        credentials("alice", "researcher").repeat(2),
        credentials("alice", "researcher") + &credentials("bob", "researcher"),
    ];
    let starts = [
        "CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n",
        "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n",
        "GET http://plain.test/me HTTP/1.1\r\nHost: plain.test\r\n",
        "GET http://evil.test/me HTTP/1.1\r\nHost: evil.test\r\n",
    ];
    // All at once: a wrong answer takes its time.
    let all = shown.iter().flat_map(|lines| starts.map(|start| (lines, start)));
    join_all(all.map(|(lines, start)| refused(&world, start, lines))).await;
    let told = world.requests_told();
    assert!(told.iter().all(|told| told.code == Some("proxy_authentication_required")), "{told:?}");
    assert_eq!(told.len(), shown.len() * starts.len());
    assert_eq!(
        (world.api.met(), world.evil.met(), world.plain.met(), world.token_calls()),
        ((0, 0), (0, 0), (0, 0), 0)
    );
}

async fn refused(world: &World, start: &str, lines: &str) {
    let mut agent = world.connection().await;
    agent.says(format!("{start}{lines}\r\n")).await;
    let reply = agent.hears().await;
    assert_eq!(reply.header("proxy-authenticate"), Some("Basic realm=\"sidebearer\""), "{start}{lines}");
    let wrong = if lines.is_empty() { "" } else { ", and these credentials are not right" };
    let expected = serde_json::json!({
        "type": "urn:sidebearer:proxy_authentication_required",
        "title": "Proxy Authentication Required",
        "status": 407,
        "code": "proxy_authentication_required",
        "detail": format!("the proxy wants to know who you are{wrong}"),
        "hint": "set HTTPS_PROXY to `http://USER:SECRET@...`, with the user to act for and the agent's secret",
    });
    assert_eq!((reply.status, reply.json()), (407, expected), "{start}{lines}");
}

#[tokio::test]
async fn an_agent_acts_for_its_users_and_uses_its_providers_and_no_others() {
    // LST-013
    let world = world().await;
    let mut agent = world.connection().await;
    for (user, name, status, code, detail) in [
        ("carol", "researcher", 403, "user_not_allowed", "the agent `researcher` may not act for `carol`"),
        ("alice", "secretary", 403, "user_not_allowed", "the agent `secretary` may not act for `alice`"),
        ("carol", "secretary", 403, "provider_not_allowed", "the agent `secretary` may not use the tokens of `main`"),
        // The one user it has is meant when it names none.
        ("", "secretary", 403, "provider_not_allowed", "the agent `secretary` may not use the tokens of `main`"),
    ] {
        let lines = credentials(user, name);
        agent.says(format!("GET http://plain.test/me HTTP/1.1\r\nHost: plain.test\r\n{lines}\r\n")).await;
        let reply = agent.hears().await;
        let problem = reply.json();
        let said = (reply.status, problem["code"].as_str().unwrap(), problem["detail"].as_str().unwrap());
        assert_eq!(said, (status, code, detail));
    }
    // Of a tunnel, its user is asked at once, and its provider with each request.
    let mut agent = world.connection().await;
    let lines = credentials("carol", "researcher");
    agent.says(format!("CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n{lines}\r\n")).await;
    assert_eq!(agent.hears().await.code(), "user_not_allowed");
    let tunnel = world.tunnel_with("api.test:443", &credentials("carol", "secretary")).await;
    let mut agent = tunnel.tls("api.test", &["http/1.1"]).await.unwrap();
    agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    assert_eq!(agent.hears().await.code(), "provider_not_allowed");
    assert_eq!((world.api.seen().len(), world.plain.seen().len(), world.token_calls()), (0, 0, 0));
}

#[tokio::test]
async fn a_grpc_agent_is_told_in_its_own_words() {
    // RTY-029
    let world = world().await;
    let tunnel = world.tunnel_with("api.test:443", &credentials("carol", "secretary")).await;
    let streams = tunnel.tls("api.test", &["h2"]).await.unwrap().http2().await;
    let request = http::Request::post("https://api.test/pkg.Service/Call").header("content-type", "application/grpc");
    let reply = streams.send(request.body(crate::world::answer::Filler::text("")).unwrap()).await.unwrap();
    assert_eq!((reply.status, reply.header("grpc-status")), (200, Some("7")));
    let said = "provider_not_allowed: the agent `secretary` may not use the tokens of `main` (if it should be allowed, the \
                operator adds it under `agents` in `proxy.yaml`)";
    assert_eq!(reply.header("grpc-message"), Some(said));
}

#[tokio::test]
async fn a_tunnel_that_no_route_covers_needs_credentials_too_and_then_is_blind() {
    // LST-008
    let world = world().await;
    let mut stranger = world.connection().await;
    stranger.says("CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n").await;
    assert_eq!((stranger.hears().await.status, world.evil.met()), (407, (0, 0)));
    let tunnel = world.tunnel_with("evil.test:443", &credentials("alice", "researcher")).await;
    let tls = tunnel.tls("evil.test", &["http/1.1"]).await.unwrap();
    assert_eq!(tls.certificate, world.evil.certificate());
}

#[tokio::test]
async fn a_renewal_of_one_user_touches_no_other() {
    // RTY-034
    let world = world().await;
    let mut agent = world.connection().await;
    for user in ["alice", "bob"] {
        get_plain(&mut agent, &credentials(user, "researcher")).await;
    }
    world.plain.answers([401]);
    assert_eq!(get_plain(&mut agent, &credentials("alice", "researcher")).await, 200);
    assert_eq!(get_plain(&mut agent, &credentials("bob", "researcher")).await, 200);
    let tokens = world.plain.tokens();
    assert_eq!(world.issued.owners(&tokens), ["alice", "bob", "alice", "alice", "bob"]);
    assert_eq!((tokens[1] == tokens[4], tokens[0] == tokens[3], world.token_calls()), (true, false, 3));
}
