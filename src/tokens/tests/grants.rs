//! Grants that come by consent and go by disconnect, while renewals are under way and other processes write.

use std::time::Duration;

use tokio::time::Instant;

use super::server::Act;
use super::world::{World, pass, provider, user};
use crate::oauth::Grant;
use crate::secret::Secret;
use crate::store::State;
use crate::tokens::{Bearer, GrantError, Key, Proof, Revocation, TokenError, Tokens};

/// What the provider answers to a code.
const CONSENTED: Act = Act::Say(
    200,
    &[],
    r#"{"access_token":"consented","token_type":"Bearer","expires_in":3600,"refresh_token":"consented-rt"}"#,
);

async fn world() -> World {
    let mut acme = provider("acme", Grant::AuthorizationCode);
    acme.endpoints.revocation = "https://acme.test/revoke".parse().ok();
    World::of(vec![acme]).await
}

/// A user consents, in a sidecar of this or of another process.
async fn consent(world: &World, tokens: &Tokens, key: &Key) -> Result<(), GrantError> {
    world.server.book().acts.push_back(CONSENTED);
    let code = Proof::Code {
        code: Secret::new("code"),
        verifier: Secret::new("verifier"),
        redirect_uri: "http://127.0.0.1:1/callback".into(),
    };
    let alice = "alice".parse().unwrap();
    tokens.grant(&key.provider, &alice, code, Vec::new()).await.map(|_| ())
}

fn value(bearer: &Bearer) -> &str {
    bearer.header.to_str().unwrap()
}

fn waits(world: &World, key: &Key) -> tokio::task::JoinHandle<Result<Bearer, TokenError>> {
    let (tokens, key) = (world.tokens.clone(), key.clone());
    tokio::spawn(async move { tokens.bearer_within(&key, Duration::from_secs(120)).await })
}

#[tokio::test(start_paused = true)]
async fn a_consent_is_used_at_once_and_is_durable() {
    let mut world = world().await;
    let key = world.key("alice");
    let tokens = world.tokens.clone();
    let waiting = waits(&world, &key);
    pass(5.0).await;
    consent(&world, &tokens, &key).await.unwrap();
    assert_eq!(value(&waiting.await.unwrap().unwrap()), "Bearer consented");
    world.restart().await;
    assert_eq!(value(&world.bearer(&key).await), "Bearer consented");
    assert_eq!(world.server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_of_the_grant_before_does_not_take_its_place() {
    // TOK-038
    let world = world().await;
    let key = world.connect("alice").await;
    world.server.book().acts.push_back(Act::Hang);
    let (tokens, old) = (world.tokens.clone(), key.clone());
    let renewal = tokio::spawn(async move { tokens.bearer(&old).await });
    pass(1.0).await;
    consent(&world, &world.tokens.clone(), &key).await.unwrap();
    world.server.release();
    renewal.await.unwrap().unwrap();
    assert_eq!(value(&world.bearer_at_once(&key).await), "Bearer consented");
    assert_eq!(world.stored_refresh_token(&key).await, "consented-rt");
}

#[tokio::test(start_paused = true)]
async fn a_disconnect_ends_a_renewal_and_gives_back_what_it_brings() {
    // TOK-038
    let world = world().await;
    let key = world.connect("alice").await;
    let first = world.stored_refresh_token(&key).await;
    world.server.book().acts.push_back(Act::Hang);
    let (tokens, old) = (world.tokens.clone(), key.clone());
    let renewal = tokio::spawn(async move { tokens.bearer(&old).await });
    pass(1.0).await;
    let left = world.tokens.disconnect(&key.provider, &user("alice")).await.unwrap();
    assert_eq!(left, Some(Revocation::Done));
    world.server.release();
    assert_eq!(renewal.await.unwrap().unwrap_err().code(), "not_connected");
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "not_connected");
    assert_eq!(world.store.grant(&key.provider, &user("alice")).await.unwrap(), None);
    let given_back = world.server.book().given_back.clone();
    assert!(given_back.len() == 2 && given_back[0] == first && given_back[1] != first, "{given_back:?}");
    assert_eq!(world.tokens.disconnect(&key.provider, &user("alice")).await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_cannot_be_stored_is_given_back() {
    let world = world().await;
    let key = world.key("alice");
    world.tokens.bearer(&key).await.unwrap_err();
    world.break_rows();
    let error = consent(&world, &world.tokens.clone(), &key).await.unwrap_err();
    assert!(matches!(error, GrantError::Store(_)), "{error}");
    assert_eq!(world.server.book().given_back, ["consented-rt"]);
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "not_connected");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_for_a_moment_costs_nobody_their_consent() {
    let world = world().await;
    let key = world.key("alice");
    world.break_rows();
    let tokens = world.tokens.clone();
    let (granted, ()) = tokio::join!(consent(&world, &tokens, &key), async {
        pass(0.3).await;
        world.repair();
    });
    granted.unwrap();
    assert_eq!(value(&world.bearer_at_once(&key).await), "Bearer consented");
    assert!(world.server.book().given_back.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_another_process_stores_is_noticed_within_a_second() {
    // TOK-029
    let world = world().await;
    let (key, sibling) = (world.key("alice"), world.sibling().await);
    let tokens = world.tokens.clone();
    tokio::spawn(async move { tokens.follow_store().await });
    let waiting = waits(&world, &key);
    pass(2.0).await;
    assert_eq!(world.tokens.waiting().len(), 1);
    consent(&world, &sibling, &key).await.unwrap();
    let asked = Instant::now();
    assert_eq!(value(&waiting.await.unwrap().unwrap()), "Bearer consented");
    assert!(asked.elapsed() <= Duration::from_secs(1), "{:?}", asked.elapsed());
    assert!(world.tokens.waiting().is_empty());
    sibling.disconnect(&key.provider, &user("alice")).await.unwrap();
    pass(1.0).await;
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "not_connected");
    assert_eq!(world.server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_the_user_ends_with_the_stop() {
    // TOK-044
    let world = world().await;
    let waiting = waits(&world, &world.key("alice"));
    pass(1.0).await;
    let asked = Instant::now();
    world.drain.finish(Duration::from_secs(20)).await;
    assert_eq!(waiting.await.unwrap().unwrap_err().code(), "not_connected");
    assert!(asked.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn scopes_that_the_user_did_not_grant_are_the_users_to_grant() {
    // C15
    let world = world().await;
    let key = world.connect("alice").await;
    world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_scope"}"#));
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "reauthorize");
    assert_eq!(world.row(&key).await.state, State::Reauthorize { reason: "invalid_scope".into() });
}
