//! Providers that are down, slow, or refuse (SEMANTICS C15, C17).

use std::time::Duration;

use tokio::time::Instant;

use super::server::{Act, token};
use super::world::{Got, World, failures, figure, pass, provider, user};
use crate::oauth::{Endpoints, Grant};
use crate::store::State;
use crate::tokens::{NoRenewal, TokenError};

const INVALID_GRANT: Act = Act::Say(400, &[], r#"{"error":"invalid_grant"}"#);
const INVALID_CLIENT: Act = Act::Say(401, &[], r#"{"error":"invalid_client"}"#);
const DOWN: Act = Act::Say(503, &[], "");

fn retry_after(error: &TokenError) -> Duration {
    match error {
        TokenError::Unavailable { retry_after, .. } => *retry_after,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_honoured_up_to_ten_minutes() {
    // TOK-013, C15
    for (asked, waited) in [("200", 200), ("99999", 600)] {
        let world = World::new().await;
        let key = world.connect("alice").await;
        let headers: &'static [_] =
            if asked == "200" { &[("retry-after", "200")] } else { &[("retry-after", "99999")] };
        world.server.book().acts.push_back(Act::Say(429, headers, ""));
        let start = Instant::now();
        let error = world.tokens.bearer(&key).await.unwrap_err();
        assert_eq!(retry_after(&error), Duration::from_secs(waited));
        pass(50.0).await;
        let error = world.tokens.bearer(&key).await.unwrap_err();
        assert_eq!(retry_after(&error).as_secs(), waited - 50, "counted down");
        while world.tokens.bearer(&key).await.is_err() {
            pass(0.5).await;
        }
        assert_eq!(start.elapsed().as_secs(), waited);
        assert_eq!(world.server.calls(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_is_down_is_asked_ever_less_and_nobody_notices_while_the_token_lives() {
    // TOK-014, C15, C17
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    let start = world.server.book().calls[0].at;
    world.server.book().always = DOWN;
    while start.elapsed() < Duration::from_secs(3594) {
        world.bearer_at_once(&key).await;
        pass(0.25).await;
    }
    let calls: Vec<_> = world.server.book().calls[1..].iter().map(|call| call.at).collect();
    let waits: Vec<_> = calls.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    assert!((6..=60).contains(&calls.len()), "{waits:?}");
    for (attempt, wait) in waits.iter().enumerate() {
        let most = f64::from(1 << attempt.min(6)).min(60.0);
        assert!((1.0..=most + 0.3).contains(wait), "{attempt}: {waits:?}");
    }
    // It comes back, and so do tokens, by themselves.
    world.server.book().always = Act::Serve;
    pass(61.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn the_scheduler_keeps_trying_for_a_token_that_was_used() {
    // TOK-014
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    world.server.book().acts.extend([DOWN, Act::Refuse, Act::Lose, DOWN]);
    world.server.book().grace = true;
    pass(3500.0).await;
    assert_eq!(world.server.calls(), 6, "nobody came since, and it was renewed");
    assert_eq!(world.bearer_at_once(&key).await.generation, 3);
}

#[tokio::test(start_paused = true)]
async fn past_its_end_no_token_is_better_than_an_expired_one() {
    // TOK-015, C17
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    world.server.book().always = DOWN;
    pass(3595.0).await;
    for _ in 0..600 {
        let error = world.tokens.bearer(&key).await.unwrap_err();
        let wait = retry_after(&error);
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(60), "{wait:?}");
        pass(1.0).await;
    }
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.to_string(), "no token from `acme` now: the token endpoint answered 503");
    assert_eq!(error.code(), "token_unavailable");
    world.server.book().always = Act::Serve;
    pass(61.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_token_answer_may_pass() {
    // TOK-010, C15
    for act in [Act::Say(200, &[], ""), Act::Say(200, &[], "<html>"), Act::Say(302, &[], ""), Act::Lose, Act::Refuse] {
        let world = World::new().await;
        world.server.book().grace = true;
        let key = world.connect("alice").await;
        world.server.book().acts.push_back(act);
        assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "token_unavailable");
        assert_eq!(world.row(&key).await.state, State::Connected);
        pass(1.0).await;
        assert_eq!(world.request(&key).await, Got::Fine);
    }
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_hangs_holds_up_no_other() {
    // TOK-016
    let world =
        World::of(vec![provider("acme", Grant::RefreshToken), provider("globex", Grant::ClientCredentials)]).await;
    world.server.book().hanging_hosts.push("acme.test".into());
    let mut waiting = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        let (tokens, key) = (world.tokens.clone(), world.connect(name).await);
        waiting.push(tokio::spawn(async move { tokens.bearer(&key).await }));
    }
    pass(1.0).await;
    assert_eq!(world.server.calls(), 4, "four at once");
    let globex = world.tokens.key(&"globex".parse().unwrap(), &"a".parse().unwrap()).unwrap();
    let asked = Instant::now();
    world.bearer(&globex).await;
    assert!(asked.elapsed() < Duration::from_secs(1));
    // The fifth, whichever it is, does not wait for its turn for ever.
    let (fifth, _, waiting) = futures_util::future::select_all(waiting).await;
    assert_eq!(fifth.unwrap().unwrap_err().to_string(), "no token from `acme` now: the provider is too slow");
    assert_eq!(asked.elapsed().as_secs(), 9);
    world.server.book().hanging_hosts.clear();
    world.server.release();
    for bearer in waiting {
        bearer.await.unwrap().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_grant_is_asked_for_once_and_its_token_serves_to_its_end() {
    // TOK-017, RTY-003, C15
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    let mut watch = world.events.watch();
    world.server.book().always = INVALID_GRANT;
    let start = world.server.book().calls[0].at;
    while start.elapsed() < Duration::from_secs(3594) {
        assert_eq!(token(&world.bearer_at_once(&key).await), token(&first));
        pass(1.0).await;
    }
    assert_eq!(world.server.calls(), 2);
    pass(1.0).await;
    for _ in 0..3600 {
        assert_eq!(world.request(&key).await, Got::Nothing(dead("invalid_grant")));
        pass(1.0).await;
    }
    assert_eq!(failures(&mut watch), ["reauthorize"], "told once");
    world.restart().await;
    assert_eq!(world.request(&key).await, Got::Nothing(dead("invalid_grant")));
    assert_eq!(world.server.calls(), 2);
    let row = world.row(&key).await;
    assert_eq!(row.state, State::reauthorize("invalid_grant"));
    assert!(row.refresh_token.is_some() && row.intent.is_none());
}

fn dead(reason: &str) -> TokenError {
    let provider = "acme".parse().unwrap();
    TokenError::Reauthorize { provider, subject: user("alice"), reason: reason.into() }
}

#[tokio::test(start_paused = true)]
async fn a_401_to_a_dead_grant_s_token_is_passed_on() {
    // RTY-003, C9
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    world.server.book().always = INVALID_GRANT;
    let failed = Got::Unauthorized(Some(NoRenewal::Failed(dead("invalid_grant"))));
    assert_eq!(world.request(&key).await, failed);
    for _ in 0..80 {
        pass(40.0).await;
        assert_eq!(world.request(&key).await, failed);
    }
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_new_grant_in_a_dead_one_s_place_is_used_within_a_second() {
    // C15, C18
    let world = World::new().await;
    let (key, missing) = (world.connect("alice").await, world.key("bob"));
    world.server.book().acts.push_back(INVALID_GRANT);
    world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(world.tokens.bearer(&missing).await.unwrap_err().code(), "not_connected");
    world.import(&key, world.server.grant("alice"), None).await;
    world.connect("bob").await;
    pass(1.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.request(&missing).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn a_refused_client_is_tried_again_every_ten_minutes() {
    // TOK-018, C15
    let mut world = World::new().await;
    let (key, other) = (world.connect("alice").await, world.connect("bob").await);
    let token_before = world.bearer(&other).await;
    world.server.book().always = INVALID_CLIENT;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1801) {
        let error = world.tokens.bearer(&key).await.unwrap_err();
        assert_eq!(error.to_string(), "`acme` refuses the client: invalid_client");
        pass(1.0).await;
    }
    assert_eq!(world.server.calls(), 1 + 4);
    assert_eq!(world.row(&key).await.state, State::FixConfiguration { reason: "invalid_client".into() });
    assert_eq!(token(&world.bearer_at_once(&other).await), token(&token_before));
    // The operator mends it, and has it read again.
    world.server.book().always = Act::Serve;
    world.restart().await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.row(&key).await.state, State::Connected);
}

#[tokio::test(start_paused = true)]
async fn a_provider_s_own_word_for_a_dead_grant_is_believed_and_either_way_it_is_asked_little() {
    // TOK-019, C15
    for (word, code, calls) in [("invalid_request", "reauthorize", 1), ("another", "fix_configuration", 6)] {
        let mut acme = provider("acme", Grant::RefreshToken);
        acme.quirks.dead_grant_errors = vec![word.into()];
        let world = World::of(vec![acme]).await;
        let key = world.connect("alice").await;
        world.server.book().always = Act::Say(400, &[], r#"{"error":"invalid_request"}"#);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(3599) {
            assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), code);
            pass(1.0).await;
        }
        assert_eq!(world.server.calls(), calls, "in an hour");
    }
}

#[tokio::test(start_paused = true)]
async fn a_user_who_never_connected_is_told_so_while_the_provider_is_down() {
    // C18
    let mut acme = provider("acme", Grant::RefreshToken);
    acme.endpoints = Endpoints { issuer: "https://acme.test".parse().ok(), ..Endpoints::default() };
    let world = World::of(vec![acme]).await;
    assert_eq!(world.tokens.bearer(&world.key("alice")).await.unwrap_err().code(), "not_connected");
    assert!(world.server.book().asked_for_metadata.is_empty());
}

#[tokio::test(start_paused = true)]
async fn with_the_store_down_a_valid_token_is_served_and_nothing_is_redeemed() {
    // TOK-032, C19
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    world.sql("ALTER TABLE grants RENAME TO gone");
    pass(3500.0).await;
    world.bearer_at_once(&key).await;
    pass(100.0).await;
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert!(error.to_string().starts_with("no token from `acme` now: the store fails: "), "{error}");
    assert_eq!(world.server.calls(), 1);
    world.sql("ALTER TABLE gone RENAME TO grants");
    pass(61.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_is_wrong_can_be_asked_for_while_all_goes_on() {
    // TOK-014, TOK-032, C13
    let world = World::new().await;
    let key = world.connect("alice").await;
    let codes = async || world.tokens.troubles().await.iter().map(|trouble| trouble.code).collect::<Vec<_>>();
    assert_eq!(codes().await, [""; 0]);
    world.break_rows();
    world.bearer(&key).await;
    assert_eq!(codes().await, ["unsaved"]);
    world.repair();
    pass(10.0).await;
    assert_eq!(codes().await, [""; 0]);
    world.sql("ALTER TABLE meta RENAME TO gone");
    assert_eq!(codes().await, ["store_io"]);
    world.sql("ALTER TABLE gone RENAME TO meta");
    let other = world.connect("bob").await;
    world.server.book().acts.push_back(Act::Say(503, &[], ""));
    world.tokens.bearer(&other).await.unwrap_err();
    world.bearer_at_once(&key).await;
    assert_eq!(codes().await, ["token_unavailable"]);
    pass(61.0).await;
    world.bearer(&other).await;
    assert_eq!(codes().await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn each_failure_is_counted_from_zero_and_the_same_one_told_once() {
    // TOK-018, C15
    let world = World::new().await;
    let key = world.connect("alice").await;
    let counted = || figure(&world, "renewals_total{provider=\"acme\",cause=\"needed\",outcome=\"fix_configuration\"}");
    assert_eq!(counted(), Some(0.0));
    let mut watch = world.events.watch();
    world.server.book().always = INVALID_CLIENT;
    for tries in 1..=5 {
        assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "fix_configuration");
        assert_eq!(counted(), Some(f64::from(tries)));
        pass(601.0).await;
    }
    assert_eq!(failures(&mut watch), ["fix_configuration"]);
}
