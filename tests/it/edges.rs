//! Where two rules meet: each of these was once answered wrongly.

use crate::world::answer::{Answer, Filler, Gate, answer, usual};
use crate::world::server::raw;
use crate::world::{Setup, World};

#[tokio::test]
async fn what_no_route_covers_is_refused_in_plain_http_too() {
    let world = Setup::new().top("unmatched: deny").start().await;
    let mut agent = world.connection().await;
    agent.says("GET http://evil.test/x HTTP/1.1\r\nHost: evil.test\r\n\r\n").await;
    let reply = agent.hears().await;
    assert_eq!((reply.status, reply.code()), (403, "unmatched".to_owned()));
    assert_eq!(world.evil.met(), (0, 0));
}

#[tokio::test]
async fn a_wide_path_takes_no_request_from_a_narrower_deny() {
    let routes = "- host: api.test\n  provider: main\n  paths: [/v1/a/b/c, /**]\n\
                  - host: api.test\n  deny: true\n  paths: [/admin/**]";
    let world = Setup::new().routes(routes).start().await;
    let reply = world.call("GET", "/admin/users").send().await;
    assert_eq!((reply.status, reply.code()), (403, "denied".to_owned()));
    assert!(world.api.seen().is_empty());
}

#[tokio::test]
async fn nothing_behind_a_refused_change_of_protocol_is_read_as_a_request() {
    // H2: what follows has not been looked at as HTTP.
    let world = Setup::new().top("unmatched: deny").start().await;
    let mut agent = world.connection().await;
    agent.says("CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n").await;
    assert!(agent.hears_to_the_end().await.starts_with("HTTP/1.1 403 "));

    let mut agent = world.api_connection().await;
    agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").await;
    assert!(agent.hears_to_the_end().await.contains("connection: close"));
    assert_eq!(world.api.seen().len(), 1);
}

#[tokio::test]
async fn a_length_hidden_behind_zeros_is_not_read_in_two_ways() {
    // SEC-052
    let world = World::start().await;
    let mut agent = world.api_connection().await;
    let zeros = "0".repeat(130);
    agent.says(format!("POST /me HTTP/1.1\r\nHost: api.test\r\nContent-Length: {zeros}14\r\n\r\n")).await;
    assert!(agent.hears_to_the_end().await.starts_with("HTTP/1.1 400 "));
    assert!(world.api.seen().is_empty());
}

#[tokio::test]
async fn a_body_of_unknown_length_arrives_whatever_the_method() {
    // SEC-061
    let world = Setup::new().api_speaks(&["http/1.1"]).start().await;
    let body = Filler::of(3000).of_unknown_length();
    assert_eq!(world.call("GET", "/search").body(body).over_h2().send().await.status, 200);
    let mut agent = world.api_connection().await;
    agent.says("GET /search HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    agent.says("3\r\nabc\r\n0\r\n\r\n").await;
    assert_eq!(agent.hears().await.status, 200);
    let lengths: Vec<u64> = world.api.seen().iter().map(|seen| seen.length).collect();
    assert_eq!(lengths, [3000, 3]);
}

#[tokio::test]
async fn an_answer_of_our_own_to_head_has_no_body_on_http_2() {
    // SEC-069
    let world = Setup::new().routes("- host: api.test\n  deny: true").start().await;
    let reply = world.call("HEAD", "/me").over_h2().send().await;
    assert_eq!((reply.status, reply.text()), (403, ""));
}

#[tokio::test]
async fn a_truncated_401_stays_truncated_after_a_failed_renewal() {
    // H7, C9
    let world = Setup::new().api_speaks(&["http/1.1"]).start().await;
    let broken = "HTTP/1.1 401 Unauthorized\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
    world.api.answers_raw([raw(broken).and_close()]);
    let gate = Gate::shut();
    world.provider_answers([usual(), answer(503).once(&gate)]);
    let mut agent = world.api_connection().await;
    agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n").await;
    // The broken end has been read ahead by the time the renewal fails.
    world.auth.has_seen(2).await;
    gate.open();
    let heard = agent.hears_to_the_end().await;
    assert!(!heard.ends_with("0\r\n\r\n"), "{heard}");
}

#[tokio::test]
async fn an_agent_that_hangs_up_is_told_of() {
    let world = World::start().await;
    let gate = Gate::shut();
    world.api_answers([Answer::from(200).once(&gate)]);
    let mut agent = world.api_connection().await;
    agent.says("GET /slow HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    world.api.has_seen(1).await;
    drop(agent);
    let told = loop {
        if let Some(told) = world.requests_told().pop() {
            break told;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!((told.status, told.code, told.path.as_str()), (None, Some("agent_gone"), "/slow"));
}
