//! What an agent is told when the proxy itself answers: every word of it.

use bytes::Bytes;

use crate::world::answer::{Answer, Filler, answer};
use crate::world::provider::refused;
use crate::world::{Setup, World};

const GRPC: &str = "application/grpc";

/// A gRPC call over HTTP/2.
async fn grpc(world: &World) -> crate::world::agent::Reply {
    let call = world.call("POST", "/shop.Shop/Buy").with("content-type", GRPC).with("te", "trailers");
    call.over_h2().body(Filler::text(Bytes::from_static(b"\0\0\0\0\x02hi"))).send().await
}

#[tokio::test]
async fn who_has_not_connected_learns_how_to() {
    // C18
    let world = Setup::new().connected(&[]).acting_for("ada").start().await;
    let reply = world.get("/me").await;
    assert_eq!(
        reply.text(),
        r#"{
  "code": "not_connected",
  "detail": "`ada` has not connected `main`",
  "hint": "store a grant with `sidebearer import main --user ada --refresh-token-file FILE`, then try again",
  "status": 403,
  "title": "Forbidden",
  "type": "urn:sidebearer:not_connected"
}
"#
    );
    assert_eq!((reply.status, reply.header("content-type")), (403, Some("application/problem+json")));
    assert_eq!(reply.header("proxy-status"), Some("sidebearer; error=http_request_denied; details=\"not_connected\""));
    assert_eq!((reply.header("cache-control"), reply.header("www-authenticate")), (Some("no-store"), None));
    assert_eq!((world.api.seen().len(), world.token_calls()), (0, 0));
}

#[tokio::test]
async fn whose_grant_ended_learns_that_it_did() {
    // C15, C18
    let world = Setup::new().connected(&["default"]).start().await;
    world.issued.forget_grants();
    let reply = world.get("/me").await;
    assert_eq!(
        reply.text(),
        r#"{
  "code": "reauthorize",
  "detail": "`main` no longer honours the grant of `default`: invalid_grant",
  "hint": "the user must grant access again; then `sidebearer import main --user default --refresh-token-file FILE`",
  "status": 403,
  "title": "Forbidden",
  "type": "urn:sidebearer:reauthorize"
}
"#
    );
    assert_eq!((reply.status, world.api.seen().len()), (403, 0));
}

#[tokio::test]
async fn a_denied_request_names_its_route() {
    let routes = "- host: api.test\n  paths: [/v1/**]\n  provider: main\n- host: api.test\n  deny: true";
    let world = Setup::new().routes(routes).start().await;
    let reply = world.get("/v2/x").await;
    assert_eq!(
        reply.text(),
        r#"{
  "code": "denied",
  "detail": "the route `routes[1] api.test` denies it",
  "hint": "if it should be allowed, the operator adds a route for it to `proxy.yaml`",
  "status": 403,
  "title": "Forbidden",
  "type": "urn:sidebearer:denied"
}
"#
    );
    assert_eq!((reply.status, reply.header("content-type")), (403, Some("application/problem+json")));
    assert_eq!(reply.header("proxy-status"), Some("sidebearer; error=http_request_denied; details=\"denied\""));
    assert_eq!(world.get("/v1/x").await.status, 200);
    assert_eq!(world.api.seen().len(), 1);
}

#[tokio::test]
async fn a_request_for_another_host_learns_what_it_needs() {
    // SEC-001
    let world = World::start().await;
    let mut agent = world.api_connection().await;
    let reply = agent.says("GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n").await.hears().await;
    assert_eq!(
        reply.text(),
        r#"{
  "code": "authority_mismatch",
  "detail": "the request is for another host than its tunnel",
  "hint": "open a tunnel of its own for each host",
  "status": 421,
  "title": "Misdirected Request",
  "type": "urn:sidebearer:authority_mismatch"
}
"#
    );
    assert_eq!((reply.status, reply.header("connection")), (421, Some("close")));
    assert_eq!(
        reply.header("proxy-status"),
        Some("sidebearer; error=http_request_error; details=\"authority_mismatch\"")
    );
}

#[tokio::test]
async fn without_a_token_the_agent_learns_when_to_come_again() {
    // C17, LEK-008, TOK-013
    let world = World::start().await;
    world.provider_answers([answer(503).with("retry-after", "7").saying("stack trace")]);
    let reply = world.get("/me").await;
    assert_eq!(
        reply.text(),
        r#"{
  "code": "token_unavailable",
  "detail": "no token from `main` now: the token endpoint answered 503",
  "hint": "try again after `Retry-After`",
  "status": 503,
  "title": "Service Unavailable",
  "type": "urn:sidebearer:token_unavailable"
}
"#
    );
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("7")));
    assert_eq!(
        reply.header("proxy-status"),
        Some("sidebearer; error=destination_unavailable; details=\"token_unavailable\"")
    );
    assert_eq!(world.get("/me").await.status, 503);
    assert_eq!((world.token_calls(), world.api.seen().len()), (1, 0), "the provider is left alone for 7 s");
}

#[tokio::test]
async fn a_provider_that_refuses_the_client_is_the_operators_to_fix() {
    // C15
    let world = World::start().await;
    world.provider_answers([refused(401, "invalid_client")]);
    let reply = world.get("/me").await;
    assert_eq!(
        reply.text(),
        r#"{
  "code": "fix_configuration",
  "detail": "`main` refuses the client: invalid_client",
  "hint": "the operator corrects `providers.main` in `proxy.yaml`, or the file that its secret is in",
  "status": 503,
  "title": "Service Unavailable",
  "type": "urn:sidebearer:fix_configuration"
}
"#
    );
    assert_eq!((world.get("/me").await.status, world.token_calls()), (503, 1));
}

#[tokio::test]
async fn an_upstream_that_is_not_there_is_a_bad_gateway() {
    let world = Setup::new().resolve("api.test:443", crate::world::To::Nobody).start().await;
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "connection_refused"));
    assert_eq!(
        reply.header("proxy-status"),
        Some("sidebearer; error=connection_refused; details=\"connection_refused\"")
    );
}

#[tokio::test]
async fn an_unknown_expectation_is_refused() {
    // C8
    let world = World::start().await;
    let reply = world.call("POST", "/x").with("expect", "200-maybe").body(Filler::of(1)).send().await;
    assert_eq!((reply.status, reply.code().as_str()), (417, "unknown_expectation"));
}

#[tokio::test]
async fn a_grpc_call_that_is_not_authenticated_is_made_again() {
    // RTY-026
    let world = Setup::new().api_speaks(&["h2"]).start().await;
    let unauthenticated = answer(200).with("content-type", GRPC).with("grpc-status", "16");
    let good = answer(200).with("content-type", GRPC).saying("reply").then(&[("grpc-status", "0")]);
    world.api_answers([unauthenticated, good]);
    let reply = grpc(&world).await;
    assert_eq!((reply.status, reply.text(), reply.header("grpc-status")), (200, "reply", None));
    assert_eq!(reply.trailers["grpc-status"], "0");
    let seen = world.api.seen();
    assert_eq!((seen.len(), world.token_calls()), (2, 2));
    assert_eq!((seen[0].header("te"), &seen[0].body), (Some("trailers"), &seen[1].body));
}

#[tokio::test]
async fn a_grpc_rejection_behind_the_reply_is_passed_on_and_renews_for_the_next_call() {
    // RTY-027, C1
    let world = Setup::new().api_speaks(&["h2"]).start().await;
    let partial = answer(200).with("content-type", GRPC).saying("part").then(&[("grpc-status", "16")]);
    let good = answer(200).with("content-type", GRPC).saying("reply").then(&[("grpc-status", "0")]);
    world.api_answers([partial, good]);
    assert_eq!(grpc(&world).await.text(), "part");
    world.obtained_tokens(2).await;
    assert_eq!(grpc(&world).await.text(), "reply");
    assert_eq!(world.api.tokens(), [world.issued.access(1), world.issued.access(2)]);
}

#[tokio::test]
async fn another_grpc_status_is_passed_on() {
    // RTY-026
    let world = Setup::new().api_speaks(&["h2"]).start().await;
    world.api_answers([answer(200).with("content-type", GRPC).with("grpc-status", "7")]);
    assert_eq!(grpc(&world).await.header("grpc-status"), Some("7"));
    assert_eq!((world.api.seen().len(), world.token_calls()), (1, 1));
}

#[tokio::test]
async fn a_grpc_caller_is_told_in_its_own_terms() {
    // RTY-029
    let not_connected = Setup::new().connected(&[]).start().await;
    let unavailable = World::start().await;
    unavailable.provider_answers([Answer::from(503)]);
    let denied = Setup::new().routes("- host: api.test\n  deny: true").start().await;
    for (world, status, message) in [
        (
            &not_connected,
            "16",
            "not_connected: `default` has not connected `main` (store a grant with `sidebearer import main --user \
             default --refresh-token-file FILE`, then try again)",
        ),
        (
            &unavailable,
            "14",
            "token_unavailable: no token from `main` now: the token endpoint answered 503 (try again after `Retry-After`)",
        ),
        (
            &denied,
            "7",
            "denied: the route `routes[0] api.test` denies it (if it should be allowed, the operator adds a route for \
             it to `proxy.yaml`)",
        ),
    ] {
        let reply = grpc(world).await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some(GRPC)));
        assert_eq!((reply.header("grpc-status"), reply.header("grpc-message")), (Some(status), Some(message)));
        assert!(reply.ended_with_its_head, "Trailers-Only");
        assert_eq!(world.api.seen().len(), 0);
    }
}
