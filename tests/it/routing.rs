//! Where a token goes: to the host that a route names, that CONNECT named, and that proves it; nowhere else.

use http::Request;

use crate::world::agent::Reply;
use crate::world::answer::{Filler, answer};
use crate::world::certificates::Proof;
use crate::world::log;
use crate::world::{Setup, To, World};

/// One request on a raw connection to the API.
async fn says(world: &World, request: &str) -> Reply {
    world.api_connection().await.says(request).await.hears().await
}

/// What CONNECT with this target is answered, as the status of the first line.
async fn connect(world: &World, target: &str) -> u16 {
    let mut connection = world.connection().await;
    connection.says(format!("CONNECT {target} HTTP/1.1\r\n\r\n")).await;
    connection.hears().await.status
}

fn saw_nothing(world: &World) {
    assert_eq!((world.api.seen().len(), world.evil.met().0), (0, 0));
}

#[tokio::test]
async fn a_host_that_is_not_the_tunnels_is_misdirected() {
    // SEC-001
    let world = World::start().await;
    let mut agent = world.api_connection().await;
    let reply = agent.says("GET /x HTTP/1.1\r\nHost: evil.test\r\n\r\n").await.hears().await;
    assert_eq!((reply.status, reply.code().as_str()), (421, "authority_mismatch"));
    assert_eq!(agent.hears_to_the_end().await, "");
    assert_eq!(world.request_told().code, Some("authority_mismatch"));
    saw_nothing(&world);
    assert_eq!(world.token_calls(), 0);
}

#[tokio::test]
async fn a_name_in_the_handshake_that_is_not_the_tunnels_gets_no_certificate() {
    // SEC-002
    let world = World::start().await;
    let refused = world.tunnel("api.test:443").await.tls("evil.test", &["h2"]).await.err().unwrap();
    assert!(refused.to_string().contains("AccessDenied") || refused.to_string().contains("alert"), "{refused}");
    assert!(log::lines_with("sni=\"evil.test\"").iter().any(|line| line.contains("authority_mismatch")));
    saw_nothing(&world);
}

#[tokio::test]
async fn an_unrouted_host_is_tunnelled_untouched_whatever_is_said_inside() {
    // SEC-003, SEC-004, TLS-001
    let world = World::start().await;
    for target in ["evil.test:443", &world.evil.address().to_string()] {
        let tls = world.tunnel(target).await.tls("api.test", &["http/1.1"]).await.unwrap();
        assert_eq!(tls.certificate, world.evil.certificate(), "{target}");
        let request = Request::get("/x").header("host", "api.test").body(Filler::text("")).unwrap();
        assert_eq!(tls.http1(request).await.unwrap().text(), "thank you\n");
    }
    let seen = world.evil.seen();
    assert_eq!(seen.iter().map(|seen| seen.names()).collect::<Vec<_>>(), [["host"], ["host"]]);
    assert_eq!(world.token_calls(), 0);
}

#[tokio::test]
async fn an_address_is_never_the_name_that_it_belongs_to() {
    // SEC-005
    let world = World::start().await;
    let address = world.api.address().to_string();
    let tls = world.tunnel(&address).await.tls("api.test", &["http/1.1"]).await.unwrap();
    assert_eq!(tls.certificate, world.api.certificate());
    let request = Request::get("/x").header("host", "api.test").body(Filler::text("")).unwrap();
    assert_eq!(tls.http1(request).await.unwrap().status, 401);
    assert_eq!(world.api.tokens(), ["none"]);
}

#[tokio::test]
async fn an_absolute_target_in_a_tunnel_is_for_the_tunnels_host_or_refused() {
    // SEC-006
    let world = World::start().await;
    for request in [
        "GET https://evil.test/x HTTP/1.1\r\nHost: api.test\r\n\r\n",
        "GET https://evil.test/x HTTP/1.1\r\nHost: evil.test\r\n\r\n",
        "GET http://api.test:80/x HTTP/1.1\r\nHost: api.test\r\n\r\n",
    ] {
        assert_eq!(says(&world, request).await.code(), "authority_mismatch", "{request}");
    }
    assert_eq!(says(&world, "CONNECT evil.test:443 HTTP/1.1\r\n\r\n").await.code(), "connect_in_tunnel");
    saw_nothing(&world);
    assert_eq!(says(&world, "GET https://api.test/x HTTP/1.1\r\nHost: api.test\r\n\r\n").await.status, 200);
}

#[tokio::test]
async fn a_stream_for_another_host_is_misdirected_and_its_neighbours_are_not() {
    // SEC-008, SEC-009
    let world = World::start().await;
    let streams = world.tunnel("api.test:443").await.tls("api.test", &["h2"]).await.unwrap().http2().await;
    let get = |url: &str| Request::get(url).body(Filler::text("")).unwrap();
    let (misdirected, good) =
        tokio::join!(streams.send(get("https://evil.test/x")), streams.send(get("https://api.test/x")));
    let misdirected = misdirected.unwrap();
    assert_eq!((misdirected.status, misdirected.code().as_str()), (421, "authority_mismatch"));
    assert_eq!(good.unwrap().status, 200);

    let mut two_hosts = get("https://api.test/x");
    two_hosts.headers_mut().insert("host", "evil.test".parse().unwrap());
    let refused = streams.send(two_hosts).await.unwrap();
    assert_eq!((refused.status, refused.code().as_str()), (400, "bad_host"));
    assert_eq!(streams.send(get("https://api.test/y")).await.unwrap().status, 200);
    assert_eq!(world.api.seen().len(), 2);
}

#[tokio::test]
async fn a_host_that_can_be_read_in_two_ways_is_refused() {
    // SEC-011, SEC-016, SEC-018, SEC-019, SEC-057
    let world = World::start().await;
    for host in [
        "api.test:x@evil.test",
        "api.test@evil.test",
        "evil.test#@api.test",
        "[api.test]",
        "[[api.test]]",
        "api.test,evil.test",
        "",
        "api.test:",
        "api.test:0",
        "api%2etest",
        "xn--a.test",
        "api\u{3002}test",
        "\u{ff41}pi.test",
        "\u{212a}.test",
    ] {
        let reply = says(&world, &format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(reply.status, 400, "{host}");
        assert_eq!(connect(&world, &format!("{host}:443")).await, 400, "{host}");
    }
    for target in ["127.1:443", "0x7f.1:443", "2130706433:443", "[fe80::1%25eth0]:443", "api.test", "api.test:99999"] {
        assert_eq!(connect(&world, target).await, 400, "{target}");
    }
    assert_eq!(says(&world, "GET / HTTP/1.1\r\n\r\n").await.status, 400);
    assert_eq!(says(&world, "GET / HTTP/1.1\r\nHost: api.test\r\nHost: api.test\r\n\r\n").await.status, 400);
    saw_nothing(&world);
}

#[tokio::test]
async fn a_connect_with_a_host_of_its_own_is_refused() {
    let world = World::start().await;
    let mut connection = world.connection().await;
    connection.says("CONNECT api.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n").await;
    let reply = connection.hears().await;
    assert_eq!((reply.status, reply.code().as_str()), (400, "bad_host"));
}

#[tokio::test]
async fn one_host_in_many_spellings_is_one_host() {
    // SEC-015, SEC-017, SEC-020
    let world = World::start().await;
    for (target, host) in [
        ("api.test.:443", "api.test."),
        ("API.Test:443", "api.TEST"),
        ("api.test:443", "api.test:443"),
        ("api.test:443", "Api.Test.:443"),
    ] {
        let mut agent = world.tunnel(target).await.tls("api.test", &["http/1.1"]).await.unwrap();
        agent.says(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(agent.hears().await.text(), "welcome\n", "{target} {host}");
    }
    let streams = world.tunnel("api.test:443").await.tls("API.test", &["h2"]).await.unwrap().http2().await;
    let request = Request::get("https://API.Test./x").body(Filler::text("")).unwrap();
    assert_eq!(streams.send(request).await.unwrap().status, 200);
}

#[tokio::test]
async fn a_route_is_for_its_port_only() {
    // SEC-020
    let world = Setup::new().resolve("api.test:8443", To::Api).start().await;
    let tls = world.tunnel("api.test:8443").await.tls("api.test", &["http/1.1"]).await.unwrap();
    assert_eq!(tls.certificate, world.api.certificate());
    assert_eq!(says(&world, "GET / HTTP/1.1\r\nHost: api.test:8443\r\n\r\n").await.code(), "authority_mismatch");
}

#[tokio::test]
async fn a_wildcard_is_for_one_label_and_a_name_for_itself() {
    // SEC-021
    let routes = "- host: '*.api.test'\n  provider: main\n- host: other.test\n  provider: main";
    let world = Setup::new().top("unmatched: deny").routes(routes).start().await;
    for routed in ["www.api.test:443", "other.test:443"] {
        assert_eq!(connect(&world, routed).await, 200, "{routed}");
    }
    for unrouted in [
        "api.test:443",
        "a.b.api.test:443",
        "wwwapi.test:443",
        "www.api.test.evil.test:443",
        "evilother.test:443",
        "www.other.test:443",
        "other.test.evil.test:443",
        "www.api.test:8443",
    ] {
        assert_eq!(connect(&world, unrouted).await, 403, "{unrouted}");
    }
}

#[tokio::test]
async fn a_tunnel_does_not_change_its_host_on_the_way() {
    // SEC-022
    let world = World::start().await;
    let mut agent = world.api_connection().await;
    agent.says("GET /a HTTP/1.1\r\nHost: api.test\r\n\r\nGET /b HTTP/1.1\r\nHost: evil.test\r\n\r\n").await;
    assert_eq!(agent.hears().await.status, 200);
    assert_eq!(agent.hears().await.status, 421);
    assert_eq!(agent.hears_to_the_end().await, "");
    assert_eq!((world.api.seen().len(), world.evil.met().0), (1, 0));
}

#[tokio::test]
async fn a_name_that_leads_to_somebody_else_gets_no_token() {
    // SEC-024
    let setup = Setup::new().evil_proves_itself(Proof::SelfSigned).resolve("api.test:443", To::Evil);
    let world = setup.start().await;
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "tls_certificate_error"));
    assert_eq!(world.evil.met(), (1, 0), "it sees a ClientHello and nothing else");
}

#[tokio::test]
async fn an_upstream_that_cannot_prove_its_name_gets_no_token() {
    // SEC-025
    for proof in [Proof::Expired, Proof::OtherName, Proof::SelfSigned, Proof::OtherRoot] {
        let world = Setup::new().api_proves_itself(proof).start().await;
        for reply in [world.get("/me").await, world.call("GET", "/me").over_h2().send().await] {
            assert_eq!((reply.status, reply.code().as_str()), (502, "tls_certificate_error"), "{proof:?}");
            let status = reply.header("proxy-status");
            assert_eq!(
                status,
                Some("sidebearer; error=tls_certificate_error; details=\"tls_certificate_error\""),
                "{proof:?}"
            );
        }
        assert_eq!((world.api.met().1, world.api.seen().len()), (0, 0), "{proof:?}");
    }
}

#[tokio::test]
async fn a_redirect_is_the_agents_to_follow_and_takes_no_token_along() {
    // SEC-026
    let world = World::start().await;
    world.api_answers([answer(302).with("location", "https://evil.test/take")]);
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.header("location")), (302, Some("https://evil.test/take")));
    world.call("GET", "/take").to("evil.test").send().await;
    assert_eq!(world.evil.seen()[0].names(), ["host"]);
    assert_eq!(world.api.seen().len(), 1);
}

#[tokio::test]
async fn the_token_endpoint_is_a_host_like_any_other() {
    // SEC-029
    let world = World::start().await;
    let reply = world.call("POST", "/token").to("auth.test").send().await;
    assert_eq!((reply.status, reply.text()), (401, "{\"error\":\"invalid_client\"}"));
    assert_eq!(world.auth.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn an_invitation_around_the_proxy_is_taken_out() {
    // SEC-030
    let world = World::start().await;
    world.api_answers([answer(200).with("alt-svc", "h3=\":443\"").with("x-kept", "1")]);
    let reply = world.get("/me").await;
    assert_eq!((reply.header("alt-svc"), reply.header("x-kept")), (None, Some("1")));
}

#[tokio::test]
async fn a_host_that_is_routed_with_tls_is_never_called_without() {
    // SEC-013, SEC-014
    let world = World::start().await;
    for (target, status, code) in [
        ("http://api.test/", 403, "plaintext_refused"),
        ("http://api.test:443/", 403, "plaintext_refused"),
        ("https://api.test/", 400, "needs_connect"),
    ] {
        let mut agent = world.connection().await;
        agent.says(format!("GET {target} HTTP/1.1\r\nHost: api.test\r\n\r\n")).await;
        let reply = agent.hears().await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code), "{target}");
    }
    assert_eq!((world.api.met().0, world.token_calls()), (0, 0));
}

#[tokio::test]
async fn a_plain_request_is_for_its_targets_host_and_carries_no_token() {
    // SEC-012
    let world = World::start().await;
    let mut agent = world.connection().await;
    agent.says("GET http://plain.test/x HTTP/1.1\r\nHost: evil.test\r\n\r\n").await;
    assert_eq!(agent.hears().await.status, 401);
    assert_eq!(world.plain.seen()[0].header("host"), Some("plain.test"));
    assert_eq!((world.plain.tokens(), world.token_calls()), (vec!["none".to_owned()], 0));
}

#[tokio::test]
async fn a_route_that_says_plaintext_gets_its_token_in_clear() {
    // SEC-012
    let routes = "- host: plain.test\n  provider: main\n  plaintext: true";
    let world = Setup::new().routes(routes).start().await;
    let mut agent = world.connection().await;
    agent.says("GET http://plain.test/x HTTP/1.1\r\nHost: plain.test\r\n\r\n").await;
    assert_eq!(agent.hears().await.text(), "welcome\n");
    let mut tunnelled = world.tunnel("plain.test:80").await;
    assert_eq!(tunnelled.says("GET /y HTTP/1.1\r\nHost: plain.test\r\n\r\n").await.hears().await.text(), "welcome\n");
}
