//! What a 401 brings about (SEMANTICS C3, C5, C11).

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use tokio::time::Instant;

use super::server::{Act, token};
use super::world::{Got, World, follows, pass, provider, user};
use crate::oauth::Grant;
use crate::tokens::{NoRenewal, TokenError};

#[tokio::test(start_paused = true)]
async fn a_renewal_goes_on_when_its_caller_is_gone() {
    // RTY-010, TOK-040, C11
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    world.server.book().delay = Duration::from_secs(5);
    let renewal = world.tokens.renew(&key, &first);
    tokio::time::timeout(Duration::from_secs(1), renewal).await.unwrap_err();
    pass(5.0).await;
    assert_eq!(world.row(&key).await.generation, 3);
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_gave_up_leaves_the_first_token_to_the_next() {
    // TOK-040, C11
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.server.book().delay = Duration::from_secs(5);
    tokio::time::timeout(Duration::from_secs(1), world.tokens.bearer(&key)).await.unwrap_err();
    pass(5.0).await;
    world.bearer_at_once(&key).await;
    assert_eq!(world.server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn five_hundred_rejected_requests_make_one_call() {
    // RTY-014, C3
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    world.server.book().delay = Duration::from_secs(1);
    let got = join_all((0..500).map(|_| world.request(&key))).await;
    assert!(got.iter().all(|got| *got == Got::Fine));
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn five_hundred_first_requests_make_one_call() {
    // C3
    let world = World::new().await;
    let key = world.connect("alice").await;
    let got = join_all((0..500).map(|_| world.request(&key))).await;
    assert!(got.iter().all(|got| *got == Got::Fine));
    assert_eq!(world.server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_is_stored_in_the_cool_down_is_used_at_once() {
    // C5
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    let second = world.tokens.renew(&key, &first).await.unwrap();
    world.server.revoke(&second);
    assert_eq!(world.tokens.renew(&key, &second).await.unwrap_err(), NoRenewal::CoolDown);

    world.connect("alice").await;
    assert_eq!(world.tokens.renew(&key, &second).await.unwrap_err(), NoRenewal::CoolDown, "asked within a second");
    pass(1.0).await;
    let third = world.tokens.renew(&key, &second).await.unwrap();
    assert!(third.generation > second.generation);
    assert_eq!(world.server.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_is_stored_in_the_cool_down_is_not_tried_while_its_provider_wants_to_be_spared() {
    // C5, C15
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    let second = world.tokens.renew(&key, &first).await.unwrap();
    world.connect("alice").await;
    world.server.book().always = Act::Say(503, &[("retry-after", "20")], "");
    for _ in 0..19 {
        match world.tokens.renew(&key, &second).await.unwrap_err() {
            NoRenewal::Failed(TokenError::Unavailable { .. }) | NoRenewal::CoolDown => {}
            other => panic!("{other:?}"),
        }
        pass(1.0).await;
    }
    assert_eq!(world.server.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn processes_with_different_scopes_do_not_renew_in_turn_what_is_always_rejected() {
    // C5
    for grant in [Grant::AuthorizationCode, Grant::ClientCredentials] {
        let world = World::of(vec![provider("acme", grant)]).await;
        let mut other = provider("acme", grant);
        other.target.scopes = vec!["gist".into()];
        let sibling = world.sibling_of(&[Arc::new(other)]).await;
        let ours = world.key("alice");
        if grant.is_for_users() {
            world.connect("alice").await;
        }
        let theirs = sibling.key(&ours.provider, &"alice".parse().unwrap()).unwrap();
        let both = [(&world.tokens, &ours), (&sibling, &theirs)];
        both.iter().for_each(|(tokens, _)| follows(tokens));
        pass(1.0).await;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(600) {
            for (tokens, key) in both {
                let bearer = tokens.bearer(key).await.unwrap();
                let _ = tokens.renew(key, &bearer).await;
            }
            pass(0.5).await;
        }
        // Each for itself: one that it needs, and those that are forced at 0, 60, 180 and 420 s.
        assert_eq!(world.server.calls(), 10, "{grant:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_straggler_s_401_is_answered_with_the_token_that_came_meanwhile() {
    // RTY-015, C3
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    let second = world.tokens.renew(&key, &first).await.unwrap();
    pass(100.0).await;
    let asked = Instant::now();
    let straggler = world.tokens.renew(&key, &first).await.unwrap();
    assert_eq!((straggler.generation, asked.elapsed()), (second.generation, Duration::ZERO));
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_always_says_401_is_asked_ever_less() {
    // RTY-017, RTY-021, C5
    let world = World::new().await;
    let key = world.connect("alice").await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1500) {
        let bearer = world.bearer(&key).await;
        let renewed = world.tokens.renew(&key, &bearer).await;
        assert!(matches!(renewed, Ok(_) | Err(NoRenewal::CoolDown)), "{renewed:?}");
        pass(0.5).await;
    }
    // The first brought the token. Each forced one was rejected too: the wait of 30 s doubles up to 5 min.
    let calls: Vec<_> = world.server.book().calls.iter().map(|call| (call.at - start).as_secs()).collect();
    assert_eq!(calls, [0, 0, 60, 180, 420, 720, 1020, 1320]);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_helped_is_repeated_after_thirty_seconds() {
    // C5
    let world = World::new().await;
    let key = world.connect("alice").await;
    for _ in 0..10 {
        let bearer = world.bearer(&key).await;
        world.server.revoke(&bearer);
        assert_eq!(world.request(&key).await, Got::Fine);
        let bearer = world.bearer(&key).await;
        world.server.revoke(&bearer);
        pass(29.9).await;
        assert_eq!(world.request(&key).await, Got::Unauthorized(Some(NoRenewal::CoolDown)));
        pass(0.1).await;
        assert_eq!(world.request(&key).await, Got::Fine);
        pass(30.0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn any_other_answer_to_a_forced_token_ends_the_doubling_even_after_a_401_to_it() {
    // C5: one path of an API is forbidden with 401, and the others are not.
    let world = World::new().await;
    let key = world.connect("alice").await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(150) {
        let bearer = world.bearer(&key).await;
        let _ = world.tokens.renew(&key, &bearer).await;
        let bearer = world.bearer(&key).await;
        world.tokens.renew(&key, &bearer).await.unwrap_err();
        world.tokens.accepted(&key, &bearer);
        pass(0.5).await;
    }
    let calls: Vec<_> = world.server.book().calls.iter().map(|call| (call.at - start).as_secs()).collect();
    assert_eq!(calls, [0, 0, 30, 60, 90, 120]);
}

#[tokio::test(start_paused = true)]
async fn one_user_s_renewal_does_not_touch_another_s_token() {
    // RTY-034, C4
    let world = World::new().await;
    let (alice, bob) = (world.connect("alice").await, world.connect("bob").await);
    let (alices, bobs) = (world.bearer(&alice).await, world.bearer(&bob).await);
    world.server.revoke(&alices);
    let new = world.tokens.renew(&alice, &alices).await.unwrap();
    assert_eq!(token(&world.bearer_at_once(&bob).await), token(&bobs));
    assert_eq!((world.server.owner(&new), world.server.owner(&bobs)), ("alice".into(), "bob".into()));
    assert_eq!(world.row(&bob).await.generation, 2);
    assert_eq!(
        world.tokens.bearer(&world.key("carol")).await.unwrap_err(),
        TokenError::NotConnected { provider: alice.provider.clone(), subject: user("carol") }
    );
}

#[tokio::test(start_paused = true)]
async fn the_same_token_again_brings_no_second_try() {
    // RTY-036
    let world = World::new().await;
    world.server.book().same_until = Some(Duration::ZERO);
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    assert_eq!(world.tokens.renew(&key, &first).await.unwrap_err(), NoRenewal::SameToken);
    // Nor for a straggler, whose token has another number by now.
    assert_eq!(world.tokens.renew(&key, &first).await.unwrap_err(), NoRenewal::SameToken);
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_401_while_the_token_is_renewed_ahead_waits_for_that_renewal() {
    // C3
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.book().delay = Duration::from_secs(5);
    pass(3301.0).await;
    assert_eq!(world.server.calls(), 2, "renewed ahead");
    world.server.revoke(&first);
    let got = join_all((0..10).map(|_| world.request(&key))).await;
    assert!(got.iter().all(|got| *got == Got::Fine));
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_failed_renewal_is_not_forced_again_while_it_rests() {
    // RTY-004, C5, C15
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.book().acts.push_back(Act::Say(503, &[("retry-after", "100")], ""));
    for _ in 0..95 {
        match world.tokens.renew(&key, &first).await.unwrap_err() {
            NoRenewal::Failed(TokenError::Unavailable { .. }) | NoRenewal::CoolDown => {}
            other => panic!("{other:?}"),
        }
        pass(1.0).await;
    }
    assert_eq!(world.server.calls(), 2);
    pass(10.0).await;
    assert_eq!(world.tokens.renew(&key, &first).await.unwrap().generation, 3);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_cannot_be_repeated_has_the_token_renewed_for_the_next() {
    // RTY-007, C7
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    world.tokens.renew_for_the_next(&key, &first);
    pass(0.1).await;
    assert_eq!(world.bearer_at_once(&key).await.generation, 3);
}

#[tokio::test(start_paused = true)]
async fn another_process_s_newer_token_is_taken_without_a_call() {
    // C12 step 1, C19
    let world = World::new().await;
    let key = world.connect("alice").await;
    let sibling = world.sibling().await;
    let (ours, theirs) = (world.bearer(&key).await, sibling.bearer(&key).await.unwrap());
    assert_eq!(token(&ours), token(&theirs));
    world.server.revoke(&ours);
    let renewed = sibling.renew(&key, &theirs).await.unwrap();
    assert_eq!(token(&world.tokens.renew(&key, &ours).await.unwrap()), token(&renewed));
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_client_s_token_is_asked_for_again_when_it_ends_or_is_rejected() {
    // TOK-046
    let world = World::of_a_client().await;
    let key = world.key("alice");
    assert_eq!(key, world.key("bob"), "one token serves every user");
    let got = join_all((0..100).map(|_| world.request(&key))).await;
    assert!(got.iter().all(|got| *got == Got::Fine));
    assert_eq!(world.server.calls(), 1);
    let bearer = world.bearer_at_once(&key).await;
    world.server.revoke(&bearer);
    let got = join_all((0..100).map(|_| world.request(&key))).await;
    assert!(got.iter().all(|got| *got == Got::Fine));
    assert_eq!(world.server.calls(), 2);
    pass(3305.0).await;
    assert_eq!(world.server.calls(), 3, "renewed ahead");
    pass(3605.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.server.calls(), 4);
    assert_eq!(world.row(&key).await.refresh_token, None);
}

#[tokio::test(start_paused = true)]
async fn two_processes_that_mint_at_once_each_renew_what_was_rejected() {
    // TOK-046: the second to store its token finds the number taken.
    let world = World::of_a_client().await;
    let key = world.key("alice");
    let sibling = world.sibling().await;
    world.server.book().delay = Duration::from_secs(1);
    let (ours, theirs) = tokio::join!(world.bearer(&key), sibling.bearer(&key));
    let theirs = theirs.unwrap();
    for (tokens, bearer) in [(&world.tokens, &ours), (&sibling, &theirs)] {
        world.server.revoke(bearer);
        let renewed = tokens.renew(&key, bearer).await.unwrap();
        assert_ne!(token(&renewed), token(bearer));
        assert!(world.server.accepts(&renewed));
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_s_token_is_used_though_the_store_fails() {
    // C19
    let world = World::of_a_client().await;
    let key = world.key("alice");
    world.break_rows();
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    assert_eq!(world.request(&key).await, Got::Fine);
    world.sql("ALTER TABLE grants RENAME TO gone");
    pass(31.0).await;
    let second = world.bearer_at_once(&key).await;
    world.server.revoke(&second);
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.server.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_refused_client_is_the_operator_s_to_mend() {
    // C15: without a refresh token there is nothing to reauthorize.
    let world = World::of_a_client().await;
    let key = world.key("alice");
    world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_grant"}"#));
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.to_string(), "`acme` refuses the client: invalid_grant");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_renewal_is_one_failed_renewal() {
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.server.book().acts.push_back(Act::Panic);
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.to_string(), "no token from `acme` now: the renewal broke off; this is a defect in Sidebearer");
    pass(2.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn a_token_of_three_seconds_serves_those_who_waited_for_it() {
    // C16
    let world = World::of(vec![provider("acme", Grant::RefreshToken)]).await;
    world.server.book().expires_in = json!(3);
    let key = world.connect("alice").await;
    assert_eq!(world.request(&key).await, Got::Fine);
}
