//! Grants that come by consent and go by disconnect, while renewals are under way and other processes write.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::server::Act;
use super::world::{Got, World, figure, follows, pass, provider, soon, user};
use crate::drain::Drained;
use crate::oauth::Grant;
use crate::secret::Secret;
use crate::store::{Row, State};
use crate::tokens::{Bearer, GrantError, Granted, Key, NoRenewal, Proof, Revocation, TokenError, Tokens};

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
pub(super) async fn consent(world: &World, tokens: &Tokens, key: &Key) -> Result<(), GrantError> {
    consent_to(world, tokens, key, &[], CONSENTED).await.map(|_| ())
}

/// A user consents to these scopes besides, and the provider answers so.
async fn consent_to(
    world: &World,
    tokens: &Tokens,
    key: &Key,
    further: &[&str],
    answer: Act,
) -> Result<Granted, GrantError> {
    world.server.book().acts.push_back(answer);
    let code = Proof::Code {
        code: Secret::new("code"),
        verifier: Secret::new("verifier"),
        redirect_uri: "http://127.0.0.1:1/callback".into(),
    };
    let further = further.iter().map(|scope| (*scope).to_owned()).collect();
    tokens.grant(&key.provider, &"alice".parse().unwrap(), code, further).await
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
    assert_eq!(value(&renewal.await.unwrap().unwrap()), "Bearer consented", "nor is it handed out");
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
    follows(&world.tokens);
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
    assert!(matches!(world.row(&key).await.state, State::Reauthorize { reason, .. } if reason == "invalid_scope"));
}

#[tokio::test(start_paused = true)]
async fn scopes_that_are_refused_end_no_grant_that_is_asked_for_others() {
    // C15: nothing was rotated, and the refresh token is good.
    for restarts in [false, true] {
        let mut world = world().await;
        let key = world.connect("alice").await;
        world.bearer(&key).await;
        world.reconfigure(|provider| provider.target.scopes = vec!["typo".into()]);
        world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_scope"}"#));
        for times in 0..3 {
            if restarts && times == 1 {
                world.restart().await;
            }
            let error = world.tokens.bearer(&world.key("alice")).await.unwrap_err();
            assert_eq!(error.to_string(), "`acme` no longer honours the grant of `alice`: invalid_scope");
            pass(601.0).await;
        }
        assert_eq!(world.server.calls(), 2, "the same scopes are refused again");
        assert_eq!((world.counted("connected").await, world.counted("reauthorize").await), (0, 1));
        world.reconfigure(|provider| provider.target.scopes = vec![]);
        assert_eq!((world.counted("connected").await, world.counted("reauthorize").await), (1, 0));
        pass(3600.0).await;
        assert_eq!(world.request(&world.key("alice")).await, Got::Fine);
        assert_eq!((world.row(&key).await.state, world.server.book().reused), (State::Connected, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn scopes_that_are_named_no_more_are_not_refused_for_having_been_named() {
    // C15: the refusal could not be stored, and is remembered.
    let mut world = world().await;
    let key = world.connect("alice").await;
    world
        .sql("CREATE TRIGGER broken BEFORE UPDATE OF state ON grants BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END");
    world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_scope"}"#));
    for _ in 0..3 {
        assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "reauthorize");
        pass(2.0).await;
    }
    assert_eq!(world.server.calls(), 1);
    world.repair();
    world.reconfigure(|provider| provider.quirks.scopes_on_refresh = false);
    assert_eq!(world.request(&key).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn a_consent_goes_on_when_its_browser_is_gone() {
    // TOK-040, C11
    let world = world().await;
    let key = world.key("alice");
    world.server.book().delay = Duration::from_secs(5);
    let tokens = world.tokens.clone();
    let gone = tokio::time::timeout(Duration::from_secs(1), consent(&world, &tokens, &key));
    gone.await.unwrap_err();
    pass(5.0).await;
    assert_eq!(value(&world.bearer_at_once(&key).await), "Bearer consented");
    assert_eq!(world.stored_refresh_token(&key).await, "consented-rt");
}

#[tokio::test(start_paused = true)]
async fn a_stop_waits_for_a_code_that_is_being_redeemed() {
    // TOK-044
    let world = world().await;
    let (key, tokens) = (world.key("alice"), world.tokens.clone());
    world.server.book().delay = Duration::from_secs(5);
    let (granted, drained) = tokio::join!(consent(&world, &tokens, &key), async {
        pass(1.0).await;
        world.drain.finish(Duration::from_secs(20)).await
    });
    granted.unwrap();
    assert_eq!((drained, world.stored_refresh_token(&key).await.as_str()), (Drained::Clean, "consented-rt"));
}

#[tokio::test(start_paused = true)]
async fn a_consent_ends_a_dead_grant_s_rest_at_once() {
    // C15
    let world = world().await;
    let key = world.connect("alice").await;
    world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_grant"}"#));
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "reauthorize");
    consent(&world, &world.tokens.clone(), &key).await.unwrap();
    assert_eq!(value(&world.bearer_at_once(&key).await), "Bearer consented");
    assert_eq!(world.row(&key).await.state, State::Connected);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_for_the_grant_before_harms_the_new_one_in_nothing() {
    // C3, C15
    let world = world().await;
    let key = world.connect("alice").await;
    world.server.book().delay = Duration::from_secs(2);
    world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_grant"}"#));
    let (tokens, old) = (world.tokens.clone(), key.clone());
    let renewal = tokio::spawn(async move { tokens.bearer(&old).await });
    pass(1.0).await;
    world.server.book().delay = Duration::ZERO;
    consent_to(&world, &world.tokens.clone(), &key, &[], Act::TakeCode).await.unwrap();
    let consented = world.bearer_at_once(&key).await;
    let renewed = renewal.await.unwrap().unwrap();
    assert!(world.server.accepts(&renewed) && world.server.owner(&renewed) == "consent");
    assert_eq!(world.row(&key).await.state, State::Connected);
    assert_eq!(value(&renewed), value(&consented), "what came this moment was renewed at once");
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_waits_for_its_turn_finds_what_a_consent_has_brought() {
    // C3, C19
    let world = world().await;
    let key = world.connect("alice").await;
    let other = world.store.lease(&key.provider, &key.subject).await.unwrap().unwrap();
    let (tokens, old) = (world.tokens.clone(), key.clone());
    let renewal = tokio::spawn(async move { tokens.bearer(&old).await });
    pass(1.0).await;
    consent_to(&world, &world.tokens.clone(), &key, &[], Act::TakeCode).await.unwrap();
    let consented = world.bearer_at_once(&key).await;
    drop(other);
    assert_eq!(value(&renewal.await.unwrap().unwrap()), value(&consented));
    assert_eq!((world.server.calls(), world.row(&key).await.generation), (1, consented.generation));
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_stored_of_a_renewal_is_not_stored_over_a_new_grant() {
    // C13
    let world = world().await;
    let key = world.connect("alice").await;
    world.break_rows();
    world.bearer(&key).await;
    world.repair();
    consent(&world, &world.tokens.clone(), &key).await.unwrap();
    pass(60.0).await;
    assert_eq!(world.stored_refresh_token(&key).await, "consented-rt");
    assert_eq!(value(&world.bearer_at_once(&key).await), "Bearer consented");
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_stored_of_a_renewal_is_given_back_with_its_grant() {
    // TOK-038, C13: the stored refresh token has been replaced at the provider, by one that only this process knows.
    let world = world().await;
    let key = world.connect("alice").await;
    world.break_rows();
    let bearer = world.bearer(&key).await;
    let rotated = world.server.newest_refresh_token(&bearer);
    assert_ne!(world.stored_refresh_token(&key).await, rotated);
    world.tokens.disconnect(&key.provider, &user("alice")).await.unwrap().unwrap();
    world.repair();
    pass(60.0).await;
    assert_eq!(world.store.grant(&key.provider, &user("alice")).await.unwrap(), None);
    let given_back = world.server.book().given_back.clone();
    assert!(given_back.contains(&rotated), "{rotated} lives on: {given_back:?}");
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_stored_of_a_renewal_is_given_back_when_another_process_removes_its_grant() {
    // TOK-038, C13
    let world = world().await;
    let (key, sibling) = (world.connect("alice").await, world.sibling().await);
    world.break_rows();
    let bearer = world.bearer(&key).await;
    let rotated = world.server.newest_refresh_token(&bearer);
    sibling.disconnect(&key.provider, &user("alice")).await.unwrap().unwrap();
    world.repair();
    pass(60.0).await;
    let given_back = world.server.book().given_back.clone();
    assert!(given_back.contains(&rotated), "{rotated} lives on: {given_back:?}");
}

#[tokio::test(start_paused = true)]
async fn a_token_that_another_process_has_renewed_is_taken_over_without_a_call() {
    // TOK-029, C19
    let world = world().await;
    let (key, sibling) = (world.connect("alice").await, world.sibling().await);
    follows(&world.tokens);
    let first = world.bearer(&key).await;
    let theirs = sibling.bearer(&key).await.unwrap();
    let renewed = sibling.renew(&key, &theirs).await.unwrap();
    assert_ne!(value(&renewed), value(&first));
    pass(1.0).await;
    assert_eq!(value(&world.bearer_at_once(&key).await), value(&renewed));
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_consent_in_another_process_takes_the_place_of_a_token_that_is_still_good() {
    // TOK-029
    let world = world().await;
    let (key, sibling) = (world.connect("alice").await, world.sibling().await);
    follows(&world.tokens);
    world.bearer(&key).await;
    consent(&world, &sibling, &key).await.unwrap();
    pass(1.0).await;
    assert_eq!(value(&world.bearer_at_once(&key).await), "Bearer consented");
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_cannot_be_looked_at_for_a_while_is_looked_at_again() {
    // TOK-032
    let world = world().await;
    let (key, sibling) = (world.connect("alice").await, world.sibling().await);
    follows(&world.tokens);
    world.bearer(&key).await;
    world.sql("ALTER TABLE grants RENAME TO gone");
    pass(5.0).await;
    world.bearer_at_once(&key).await;
    world.sql("ALTER TABLE gone RENAME TO grants");
    sibling.disconnect(&key.provider, &user("alice")).await.unwrap().unwrap();
    pass(1.0).await;
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "not_connected");
}

#[tokio::test(start_paused = true)]
async fn a_renewal_names_what_the_user_has_consented_to_besides() {
    // TOK-036
    for named in [true, false] {
        let mut acme = provider("acme", Grant::AuthorizationCode);
        acme.target.scopes = vec!["read".into()];
        acme.quirks.scopes_on_refresh = named;
        let world = World::of(vec![acme]).await;
        let key = world.key("alice");
        let granted = consent_to(&world, &world.tokens.clone(), &key, &["admin"], CONSENTED).await.unwrap();
        let expected = Granted {
            scopes: vec!["admin".into(), "read".into()],
            lifetime: Some(Duration::from_secs(3600)),
            renewable: true,
        };
        assert_eq!(granted, expected);
        assert_eq!(world.server.book().calls[0].scope, None, "a code has its scopes");
        world.server.book().acts.push_back(CONSENTED);
        pass(3600.0).await;
        world.bearer(&key).await;
        assert_eq!(world.server.book().calls[1].scope.as_deref(), named.then_some("admin read"));
        assert_eq!(world.row(&key).await.further_scopes, ["admin"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_consent_that_brings_nothing_to_renew_it_with_ends_with_its_token() {
    let world = world().await;
    let key = world.key("alice");
    let once = Act::Say(200, &[], r#"{"access_token":"once","token_type":"Bearer","expires_in":600}"#);
    assert!(!consent_to(&world, &world.tokens.clone(), &key, &[], once).await.unwrap().renewable);
    pass(590.0).await;
    assert_eq!(value(&world.bearer_at_once(&key).await), "Bearer once");
    pass(10.0).await;
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.to_string(), "`acme` no longer honours the grant of `alice`: no_refresh_token");
    assert_eq!(world.server.calls(), 1);
    // The access token is what can be given back.
    world.tokens.disconnect(&key.provider, &user("alice")).await.unwrap();
    assert_eq!(world.server.book().given_back, ["once"]);
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_the_user_takes_as_long_as_it_may_and_ends_with_their_consent() {
    let world = world().await;
    let key = world.key("alice");
    let asked = Instant::now();
    let error = world.tokens.bearer_within(&key, Duration::from_secs(7)).await.unwrap_err();
    assert_eq!((error.code(), asked.elapsed()), ("not_connected", Duration::from_secs(7)));
    let waiting: Vec<_> = (0..20).map(|_| waits(&world, &key)).collect();
    pass(90.0).await;
    let (parked, since) = world.tokens.waiting().remove(0);
    assert_eq!((parked, since.elapsed()), (key.clone(), Duration::from_secs(90)));
    consent(&world, &world.tokens.clone(), &key).await.unwrap();
    let asked = Instant::now();
    for waited in waiting {
        assert_eq!(value(&waited.await.unwrap().unwrap()), "Bearer consented");
    }
    assert_eq!((asked.elapsed(), world.server.calls()), (Duration::ZERO, 1));
    assert!(world.tokens.waiting().is_empty());
}

#[tokio::test(start_paused = true)]
async fn only_what_the_user_can_mend_is_waited_for() {
    let world = world().await;
    let key = world.connect("alice").await;
    world.server.book().always = Act::Say(503, &[], "");
    let asked = Instant::now();
    let error = world.tokens.bearer_within(&key, Duration::from_secs(120)).await.unwrap_err();
    assert_eq!((error.code(), asked.elapsed()), ("token_unavailable", Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_does_not_open_is_forgotten_and_said_not_to_be_revoked() {
    // TOK-025
    let world = world().await;
    let key = world.connect("alice").await;
    world.sql("UPDATE grants SET refresh_token = x'01'");
    let left = world.tokens.disconnect(&key.provider, &user("alice")).await.unwrap();
    assert_eq!(left, Some(Revocation::Failed("what is stored of it does not open".into())));
    assert!(world.server.book().given_back.is_empty());
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "not_connected");
}

#[tokio::test(start_paused = true)]
async fn a_renewal_names_no_scope_that_the_user_has_left_out() {
    // TOK-036, RFC 6749 section 6: more than was granted is `invalid_scope`, which would end the grant.
    let mut acme = provider("acme", Grant::AuthorizationCode);
    acme.target.scopes = vec!["offline_access".into(), "read".into(), "write".into()];
    let world = World::of(vec![acme]).await;
    let key = world.key("alice");
    let partly =
        r#"{"access_token":"a","token_type":"Bearer","expires_in":3600,"refresh_token":"b","scope":"read admin"}"#;
    let granted =
        consent_to(&world, &world.tokens.clone(), &key, &["admin", "billing"], Act::Say(200, &[], partly)).await;
    assert_eq!(granted.unwrap().scopes, ["admin", "read"]);
    for times in [1, 2] {
        world.server.book().acts.push_back(CONSENTED);
        pass(3600.0).await;
        world.bearer(&key).await;
        // Few providers name `offline_access` among what they grant, and some give no refresh token without it.
        let scope = world.server.book().calls[times].scope.clone();
        assert_eq!(scope.as_deref(), Some("admin offline_access read"), "{times}");
    }
    assert_eq!(world.row(&key).await.further_scopes, ["admin", "billing"]);
}

#[tokio::test(start_paused = true)]
async fn what_was_granted_for_other_scopes_says_nothing_of_those_configured_now() {
    // TOK-036
    let mut acme = provider("acme", Grant::AuthorizationCode);
    acme.target.scopes = vec!["read".into(), "write".into()];
    let world = World::of(vec![acme]).await;
    let key = world.connect("alice").await;
    let mut row = Row { generation: 2, granted_scopes: Some(vec!["gist".into()]), ..world.row(&key).await };
    row.target.scopes = vec!["gist".into()];
    world.store.put(row, Some(1)).await.unwrap();
    world.bearer(&key).await;
    assert_eq!(world.server.book().calls[0].scope.as_deref(), Some("read write"));
    assert_eq!(
        world.row(&key).await.granted_scopes,
        None,
        "what is asked for is granted where the answer names nothing"
    );
}

#[tokio::test(start_paused = true)]
async fn two_sidecars_with_different_scopes_do_not_take_turns_at_a_grant() {
    // TOK-029
    let world = world().await;
    let key = world.connect("alice").await;
    let mut acme = provider("acme", Grant::AuthorizationCode);
    acme.target.scopes = vec!["gist".into()];
    let sibling = world.sibling_of(&[Arc::new(acme)]).await;
    let theirs = sibling.key(&key.provider, &"alice".parse().unwrap()).unwrap();
    follows(&world.tokens);
    follows(&sibling);
    let first = world.bearer(&key).await;
    let second = sibling.bearer(&theirs).await.unwrap();
    pass(60.0).await;
    assert_eq!(world.server.calls(), 2);
    assert_eq!(value(&world.bearer_at_once(&key).await), value(&first));
    assert_eq!(value(&sibling.bearer(&theirs).await.unwrap()), value(&second));
    // Nor when one of them is used no more.
    pass(8000.0).await;
    let before = world.server.calls();
    sibling.bearer(&theirs).await.unwrap();
    pass(60.0).await;
    assert_eq!(world.server.calls(), before + 1);
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_another_process_imports_takes_the_place_of_a_token_that_is_still_good() {
    // TOK-029
    let world = world().await;
    let key = world.connect("alice").await;
    follows(&world.tokens);
    let first = world.bearer(&key).await;
    world.sql(
        "UPDATE grants SET generation = generation + 1, access_token = NULL, obtained_at = NULL, expires_at = NULL",
    );
    pass(1.0).await;
    assert_ne!(value(&world.bearer_at_once(&key).await), value(&first));
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_another_process_imports_is_tried_again_when_its_renewal_fails() {
    // TOK-029, C15
    for used in [true, false] {
        let world = world().await;
        let key = world.connect("alice").await;
        follows(&world.tokens);
        world.bearer(&key).await;
        if !used {
            // Renewed ahead, and nobody has come since.
            pass(3310.0).await;
        }
        let before = world.server.calls();
        world.server.book().acts.push_back(Act::Say(503, &[], ""));
        let theirs = world.server.grant("alice");
        world.import(&key, theirs.clone(), None).await;
        pass(60.0).await;
        assert_eq!(world.server.calls(), before + 2, "used: {used}");
        let bearer = world.bearer_at_once(&key).await;
        assert!(world.server.is_of(&bearer, theirs.expose()), "used: {used}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_another_process_imports_and_that_is_refused_is_left_to_the_user() {
    // TOK-029, C15
    let world = world().await;
    let key = world.connect("alice").await;
    follows(&world.tokens);
    let first = world.bearer(&key).await;
    world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_grant"}"#));
    world.import(&key, world.server.grant("alice"), None).await;
    for _ in 0..60 {
        pass(1.0).await;
        assert_eq!(value(&world.bearer_at_once(&key).await), value(&first));
    }
    let tries = figure(&world, "renewals_total{provider=\"acme\",cause=\"ahead\",outcome=\"reauthorize\"}");
    assert_eq!((world.server.calls(), tries), (2, Some(1.0)));
}

#[tokio::test(start_paused = true)]
async fn a_waiting_request_goes_on_when_another_process_mends_a_grant_that_had_a_token() {
    // TOK-029, C15
    let world = world().await;
    let (key, sibling) = (world.connect("alice").await, world.sibling().await);
    follows(&world.tokens);
    world.bearer(&key).await;
    world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_grant"}"#));
    pass(3600.0).await;
    let waiting = waits(&world, &key);
    pass(2.0).await;
    assert_eq!(world.tokens.waiting().len(), 1);
    consent(&world, &sibling, &key).await.unwrap();
    assert_eq!(value(&soon(waiting).await), "Bearer consented");
}

#[tokio::test(start_paused = true)]
async fn a_waiting_request_goes_on_when_a_user_leaves_and_connects_again_elsewhere_during_a_renewal() {
    // TOK-029, TOK-038
    let world = world().await;
    let (key, sibling) = (world.connect("alice").await, world.sibling().await);
    follows(&world.tokens);
    world.bearer(&key).await;
    world.server.book().acts.push_back(Act::Hang);
    pass(3600.0).await;
    let waiting = waits(&world, &key);
    pass(1.0).await;
    sibling.disconnect(&key.provider, &user("alice")).await.unwrap().unwrap();
    pass(1.0).await;
    consent(&world, &sibling, &key).await.unwrap();
    pass(1.0).await;
    let (tokens, another) = (world.tokens.clone(), key.clone());
    let without_a_wait = tokio::spawn(async move { tokens.bearer(&another).await });
    tokio::task::yield_now().await;
    world.server.release();
    assert_eq!(value(&soon(waiting).await), "Bearer consented");
    assert_eq!(value(&soon(without_a_wait).await), "Bearer consented");
}

#[tokio::test(start_paused = true)]
async fn a_waiting_request_is_told_when_what_another_process_brings_fails() {
    // C15, C17
    let world = world().await;
    let key = world.connect("alice").await;
    follows(&world.tokens);
    world.bearer(&key).await;
    world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_grant"}"#));
    pass(3600.0).await;
    let waiting = waits(&world, &key);
    pass(2.0).await;
    world.server.book().always = Act::Say(503, &[], "");
    world.sql("UPDATE grants SET generation = generation + 1, access_token = NULL, state = 'connected', reason = NULL");
    let told = tokio::time::timeout(Duration::from_secs(1), waiting).await.expect("it waits on").unwrap();
    assert_eq!(told.unwrap_err().code(), "token_unavailable");
}

#[tokio::test(start_paused = true)]
async fn the_token_of_a_consent_is_renewed_ahead_of_its_end() {
    // C16
    let world = world().await;
    let key = world.key("alice");
    consent_to(&world, &world.tokens.clone(), &key, &[], Act::TakeCode).await.unwrap();
    world.bearer_at_once(&key).await;
    pass(3400.0).await;
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_another_process_writes_for_somebody_else_ends_no_rest() {
    // C15, C17
    let world = world().await;
    let (key, sibling) = (world.connect("alice").await, world.sibling().await);
    follows(&world.tokens);
    pass(1.0).await;
    world.sql("INSERT OR REPLACE INTO sealed VALUES ('other', randomblob(8))");
    pass(1.0).await;
    world.server.book().acts.push_back(Act::Say(503, &[("retry-after", "60")], ""));
    world.tokens.bearer(&key).await.unwrap_err();
    for _ in 0..20 {
        world.sql("INSERT OR REPLACE INTO sealed VALUES ('other', randomblob(8))");
        pass(1.0).await;
        assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "token_unavailable");
    }
    assert_eq!(world.server.calls(), 1);
    // What it writes for this user does.
    consent(&world, &sibling, &key).await.unwrap();
    pass(1.0).await;
    assert_eq!(value(&world.bearer_at_once(&key).await), "Bearer consented");
}

#[tokio::test(start_paused = true)]
async fn names_that_an_agent_makes_up_are_forgotten() {
    // OAU-019
    let world = world().await;
    let (key, connected) = (world.key("alice"), world.connect("bob").await);
    follows(&world.tokens);
    world.bearer(&connected).await;
    let waiting = waits(&world, &key);
    world.server.book().always = Act::Say(503, &[], "");
    let failing = world.connect("carol").await;
    world.tokens.bearer(&failing).await.unwrap_err();
    for n in 0..100 {
        world.tokens.bearer(&world.key(&format!("nobody-{n}"))).await.unwrap_err();
    }
    let remembered = || {
        let slots = world.tokens.inner.slots.iter();
        let mut users: Vec<String> = slots.map(|slot| slot.key().subject.to_string()).collect();
        users.sort();
        users
    };
    assert_eq!(remembered().len(), 103);
    pass(30.0).await;
    assert_eq!(remembered(), ["alice", "bob", "carol"], "a token, a request that waits, a provider that fails");
    pass(60.0).await;
    assert_eq!(remembered(), ["alice", "bob"]);
    consent(&world, &world.tokens.clone(), &key).await.unwrap();
    assert_eq!(value(&soon(waiting).await), "Bearer consented");
}

#[tokio::test(start_paused = true)]
async fn a_user_whose_token_ended_unused_is_forgotten_until_the_next_request() {
    let world = world().await;
    follows(&world.tokens);
    let (gone, busy) = (world.connect("alice").await, world.connect("bob").await);
    world.bearer(&gone).await;
    for _ in 0..30 {
        world.bearer(&busy).await;
        pass(300.0).await;
    }
    let remembered: Vec<String> = world.tokens.inner.slots.iter().map(|slot| slot.key().subject.to_string()).collect();
    assert_eq!(remembered, ["bob"]);
    assert!(world.tokens.inner.waning.lock().unwrap().is_empty(), "a good token is not looked at");
    assert_eq!(world.request(&gone).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn a_forced_renewal_is_remembered_beyond_the_end_of_its_token() {
    // C5
    let world = world().await;
    follows(&world.tokens);
    world.server.book().expires_in = json!(15);
    let key = world.connect("alice").await;
    let rejected = world.bearer(&key).await;
    world.tokens.renew(&key, &rejected).await.unwrap();
    // Renewed once ahead, for it was used, and then no more.
    pass(27.0).await;
    let rejected = world.bearer(&key).await;
    assert_eq!(world.tokens.renew(&key, &rejected).await.unwrap_err(), NoRenewal::CoolDown);
}

#[tokio::test(start_paused = true)]
async fn codes_take_their_turn_at_a_token_endpoint() {
    // C15
    let world = world().await;
    let (key, tokens) = (world.key("alice"), world.tokens.clone());
    world.server.book().delay = Duration::from_secs(1);
    let consents = (0..10).map(|_| consent(&world, &tokens, &key));
    for consented in futures_util::future::join_all(consents).await {
        consented.unwrap();
    }
    assert_eq!((world.server.calls(), world.server.book().most_at_once), (10, 4));
}
