//! The token endpoint of an issuer (RFC 8414, OpenID Connect Discovery).

use futures_util::future::join_all;
use serde_json::json;

use super::world::{Got, World, pass, provider};
use crate::oauth::{Endpoints, Grant};

const RFC_8414: &str = "https://acme.test/.well-known/oauth-authorization-server/tenant";
const OPENID_BEFORE: &str = "https://acme.test/.well-known/openid-configuration/tenant";
const OPENID_BEHIND: &str = "https://acme.test/tenant/.well-known/openid-configuration";

async fn world() -> World {
    let mut acme = provider("acme", Grant::RefreshToken);
    acme.endpoints = Endpoints { issuer: "https://acme.test/tenant".parse().ok(), ..Endpoints::default() };
    World::of(vec![acme]).await
}

fn publish(world: &World, url: &str, issuer: &str, host: &str) {
    let document = json!({ "issuer": issuer, "token_endpoint": format!("https://{host}/token") });
    world.server.book().metadata.insert(url.into(), document);
}

#[tokio::test(start_paused = true)]
async fn rfc_8414_is_asked_first_and_once() {
    let world = world().await;
    publish(&world, RFC_8414, "https://acme.test/tenant", "login.test");
    publish(&world, OPENID_BEHIND, "https://acme.test/tenant", "other.test");
    let mut keys = Vec::new();
    for name in ["a", "b", "c"] {
        keys.push(world.connect(name).await);
    }
    let got = join_all(keys.iter().map(|key| world.request(key))).await;
    assert!(got.iter().all(|got| *got == Got::Fine));
    assert_eq!(world.server.book().asked_for_metadata, [RFC_8414]);
    assert!(world.server.book().calls.iter().all(|call| call.host == "login.test"));
}

#[tokio::test(start_paused = true)]
async fn openid_discovery_is_asked_next_and_another_issuer_s_document_is_passed_over() {
    // OAU-011
    let world = world().await;
    publish(&world, RFC_8414, "https://evil.test", "evil.test");
    publish(&world, OPENID_BEFORE, "https://acme.test", "evil.test");
    publish(&world, OPENID_BEHIND, "https://acme.test/tenant", "login.test");
    let key = world.connect("alice").await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.server.book().asked_for_metadata, [RFC_8414, OPENID_BEFORE, OPENID_BEHIND]);
    assert_eq!(world.server.book().calls[0].host, "login.test");
}

#[tokio::test(start_paused = true)]
async fn a_failed_discovery_sends_no_refresh_token_anywhere_and_is_tried_again() {
    // OAU-011
    let world = world().await;
    publish(&world, OPENID_BEHIND, "https://evil.test", "evil.test");
    let key = world.connect("alice").await;
    let error = world.tokens.bearer(&key).await.unwrap_err();
    let said = "discovery failed: the metadata names another issuer than `https://acme.test/tenant`";
    assert_eq!(error.to_string(), format!("no token from `acme` now: {said}"));
    assert_eq!((world.server.calls(), world.row(&key).await.intent), (0, None));
    publish(&world, OPENID_BEHIND, "https://acme.test/tenant", "login.test");
    pass(1.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
}
