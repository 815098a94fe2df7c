//! Refresh tokens that rotate: none is lost, and none is sent twice (SEMANTICS C12, C13, C14).

use std::time::Duration;

use futures_util::future::join_all;
use rusqlite::Connection;
use serde_json::json;

use super::server::{Act, token};
use super::world::{Got, World, pass};
use crate::drain::Drained;
use crate::secret::Secret;
use crate::store::State;
use crate::tokens::{NoRenewal, TokenError};

#[tokio::test(start_paused = true)]
async fn a_refresh_token_is_not_sent_when_that_cannot_be_noted() {
    // TOK-021, C12 step 2
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    let kept = world.stored_refresh_token(&key).await;
    world.break_intents();
    pass(3400.0).await;
    assert_eq!(token(&world.bearer_at_once(&key).await), token(&first));
    pass(200.0).await;
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert!(error.to_string().starts_with("no token from `acme` now: the store fails: "), "{error}");
    assert_eq!(world.server.calls(), 1);
    world.repair();
    pass(61.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.server.book().calls[1].refresh_token, Some(kept));
}

#[tokio::test(start_paused = true)]
async fn a_refresh_token_is_not_sent_while_another_process_keeps_the_store_locked() {
    // TOK-021, C12 step 2
    let world = World::new().await;
    let key = world.connect("alice").await;
    let other = Connection::open(world.directory.path().join("sidebearer.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.code(), "token_unavailable");
    assert_eq!(world.server.calls(), 0);
    other.execute_batch("ROLLBACK").unwrap();
    pass(2.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn the_intent_is_stored_before_the_call_and_gone_with_its_answer() {
    // C12 steps 2, 4 and 5
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.server.book().acts.push_back(Act::Hang);
    let waiting = tokio::spawn({
        let (tokens, key) = (world.tokens.clone(), key.clone());
        async move { tokens.bearer(&key).await }
    });
    pass(1.0).await;
    assert!(world.row(&key).await.intent.is_some());
    world.server.release();
    let bearer = waiting.await.unwrap().unwrap();
    let row = world.row(&key).await;
    assert_eq!((row.intent, row.generation), (None, bearer.generation));
}

#[tokio::test(start_paused = true)]
async fn an_unsent_or_refused_request_leaves_no_intent() {
    // C14: or the next refusal would be told as a lost rotation.
    let world = World::new().await;
    let key = world.connect("alice").await;
    for act in [Act::Refuse, Act::Say(400, &[], r#"{"error":"invalid_client"}"#)] {
        world.server.book().acts.push_back(act);
        world.tokens.bearer(&key).await.unwrap_err();
        assert_eq!(world.row(&key).await.intent, None);
        pass(601.0).await;
    }
    world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_grant"}"#));
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.to_string(), "`acme` no longer honours the grant of `alice`: invalid_grant");
}

#[tokio::test(start_paused = true)]
async fn a_rotated_token_that_cannot_be_stored_is_used_and_stored_later() {
    // TOK-022, C13
    let world = World::new().await;
    let key = world.connect("alice").await;
    let old = world.stored_refresh_token(&key).await;
    world.break_rows();
    let first = world.bearer(&key).await;
    assert!(world.server.accepts(&first));
    // Nothing is redeemed while it is not stored: neither the old one nor the new one.
    world.server.revoke(&first);
    match world.request(&key).await {
        Got::Unauthorized(Some(NoRenewal::Failed(TokenError::Unavailable { why, .. }))) => {
            assert!(why.starts_with("the store fails: "), "{why}");
        }
        other => panic!("{other:?}"),
    }
    for _ in 0..10 {
        assert!(matches!(world.request(&key).await, Got::Unauthorized(Some(_))));
        pass(10.0).await;
    }
    assert_eq!(world.server.calls(), 1);
    assert_eq!(world.stored_refresh_token(&key).await, old);
    world.repair();
    pass(10.0).await;
    let row = world.row(&key).await;
    assert_eq!((row.generation, row.intent), (2, None));
    assert_eq!(row.access.unwrap().token.expose(), token(&first));
    pass(61.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!((world.server.calls(), world.server.book().reused), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn another_process_does_not_send_the_old_token_before_the_new_one_is_stored() {
    // TOK-022, C13
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.break_rows();
    world.bearer(&key).await;
    let sibling = world.sibling().await;
    let error = sibling.bearer(&key).await.unwrap_err();
    assert_eq!(error.to_string(), "no token from `acme` now: another process is renewing it");
    world.repair();
    pass(10.0).await;
    assert_eq!(token(&sibling.bearer(&key).await.unwrap()), token(&world.bearer_at_once(&key).await));
    assert_eq!(world.server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_graceful_stop_waits_for_a_token_that_is_not_stored() {
    // TOK-022, TOK-044, C13
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    world.break_rows();
    world.bearer(&key).await;
    let stop = tokio::spawn({
        let drain = world.drain.clone();
        async move { drain.finish(Duration::from_secs(60)).await }
    });
    pass(20.0).await;
    assert!(!stop.is_finished());
    world.repair();
    assert_eq!(stop.await.unwrap(), Drained::Clean);
    world.restart().await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!((world.server.calls(), world.server.book().reused), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_graceful_stop_waits_for_a_call_and_begins_no_renewal_ahead() {
    // TOK-044, C11
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    world.server.book().delay = Duration::from_secs(5);
    world.tokens.renew_for_the_next(&key, &first);
    pass(1.0).await;
    assert_eq!(world.drain.finish(Duration::from_secs(30)).await, Drained::Clean);
    assert_eq!(world.row(&key).await.generation, 3);
    pass(3500.0).await;
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_graceful_stop_does_not_wait_for_renewals_in_the_queue() {
    // TOK-044
    let world = World::new().await;
    for index in 0..100 {
        let key = world.connect_with_token(&format!("user{index}")).await;
        world.bearer(&key).await;
    }
    world.server.book().delay = Duration::from_secs(10);
    pass(3301.0).await;
    assert_eq!(world.drain.finish(Duration::from_secs(11)).await, Drained::Clean);
}

#[tokio::test(start_paused = true)]
async fn after_a_lost_answer_a_strict_provider_ends_the_grant_and_that_is_told() {
    // TOK-024, C14
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    world.server.book().acts.push_back(Act::Lose);
    world.tokens.bearer(&key).await.unwrap_err();
    assert!(world.row(&key).await.intent.is_some());
    world.restart().await;
    for _ in 0..100 {
        let error = world.tokens.bearer(&key).await.unwrap_err();
        assert_eq!(error.to_string(), "`acme` no longer honours the grant of `alice`: lost_rotation");
        pass(10.0).await;
    }
    assert_eq!(world.server.calls(), 2, "the old one is tried once");
    let row = world.row(&key).await;
    assert_eq!((row.state, row.intent), (State::reauthorize("lost_rotation"), None));
}

#[tokio::test(start_paused = true)]
async fn after_a_lost_answer_a_provider_with_grace_gives_another() {
    // TOK-024, C14
    let mut world = World::new().await;
    world.server.book().grace = true;
    let key = world.connect("alice").await;
    world.server.book().acts.push_back(Act::Lose);
    world.tokens.bearer(&key).await.unwrap_err();
    world.restart().await;
    assert_eq!(world.request(&key).await, Got::Fine);
    let row = world.row(&key).await;
    assert_eq!((row.state, row.intent, row.generation), (State::Connected, None, 2));
    assert_eq!(world.server.calls(), 2);
}

/// An answer that replaces the refresh token, with an access token that is none of ours.
const OF_ITS_OWN_TYPE: Act =
    Act::Say(200, &[], r#"{"access_token":"a","token_type":"mac","refresh_token":"r2","expires_in":3600}"#);
const OF_THAT_TYPE_AGAIN: Act =
    Act::Say(200, &[], r#"{"access_token":"b","token_type":"mac","refresh_token":"r3","expires_in":3600}"#);

#[tokio::test(start_paused = true)]
async fn a_refresh_token_that_comes_with_a_token_of_no_use_takes_the_place_of_the_spent_one() {
    // TOK-007, TOK-008, C12, C15
    for store_fails in [false, true] {
        let mut world = World::new().await;
        let key = world.connect("alice").await;
        world.server.book().acts.extend([OF_ITS_OWN_TYPE, OF_THAT_TYPE_AGAIN]);
        if store_fails {
            world.break_rows();
        }
        for _ in 0..60 {
            let error = world.tokens.bearer(&key).await.unwrap_err();
            assert_eq!(error.to_string(), "`acme` refuses the client: token_type not bearer");
            pass(1.0).await;
        }
        if store_fails {
            world.repair();
            pass(10.0).await;
        }
        let row = world.row(&key).await;
        assert_eq!(row.state, State::FixConfiguration { reason: "token_type not bearer".into() });
        assert_eq!((row.refresh_token, row.access, row.generation), (Some(Secret::new("r2")), None, 2));
        world.reconfigure(|provider| provider.quirks.token_types = vec!["mac".into()]);
        assert_eq!(token(&world.bearer(&key).await), "b");
        assert_eq!(world.server.book().calls[1].refresh_token.as_deref(), Some("r2"));
        assert_eq!((world.row(&key).await.state, world.server.calls()), (State::Connected, 2));
    }
}

#[tokio::test(start_paused = true)]
async fn processes_that_get_tokens_of_no_use_do_not_wake_each_other() {
    // C15, C19
    let world = World::new().await;
    let (key, sibling) = (world.connect_with_token("alice").await, world.sibling().await);
    let both = [world.tokens.clone(), sibling];
    for tokens in &both {
        let tokens = tokens.clone();
        tokio::spawn(async move { tokens.follow_store().await });
    }
    for tokens in &both {
        tokens.bearer(&key).await.unwrap();
    }
    world.server.book().acts.extend([OF_ITS_OWN_TYPE, OF_THAT_TYPE_AGAIN].into_iter().cycle().take(2000));
    pass(3600.0).await;
    let before = world.server.calls();
    assert!(before <= 4, "{before} calls before the token has ended");
    for _ in 0..590 {
        for tokens in &both {
            assert_eq!(tokens.bearer(&key).await.unwrap_err().code(), "fix_configuration");
        }
        pass(1.0).await;
    }
    let calls = world.server.calls() - before;
    assert!(calls <= 4, "{calls} calls in ten minutes");
}

#[tokio::test(start_paused = true)]
async fn two_processes_redeem_each_refresh_token_once() {
    // TOK-029, C12, C19
    let world = World::new().await;
    let key = world.connect("alice").await;
    let sibling = world.sibling().await;
    world.server.book().delay = Duration::from_secs(1);
    world.server.book().expires_in = json!(60);
    for generation in 2..10 {
        let ours = join_all((0..50).map(|_| world.tokens.bearer(&key)));
        let theirs = join_all((0..50).map(|_| sibling.bearer(&key)));
        let (ours, theirs) = tokio::join!(ours, theirs);
        for bearer in ours.into_iter().chain(theirs) {
            assert_eq!(bearer.unwrap().generation, generation);
        }
        assert_eq!(world.server.calls() as u64, generation - 1);
        // Both have used it, so both would renew it ahead; one does.
        pass(43.0).await;
    }
    assert_eq!(world.server.book().reused, 0);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_a_sibling_is_fetching_is_waited_for_five_seconds() {
    // C19
    let world = World::new().await;
    let key = world.connect("alice").await;
    let sibling = world.sibling().await;
    world.server.book().acts.push_back(Act::Hang);
    let theirs = tokio::spawn({
        let key = key.clone();
        async move { sibling.bearer(&key).await }
    });
    pass(1.0).await;
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.to_string(), "no token from `acme` now: another process is renewing it");
    world.server.release();
    let theirs = theirs.await.unwrap().unwrap();
    pass(1.5).await;
    assert_eq!(token(&world.bearer(&key).await), token(&theirs));
    assert_eq!(world.server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_refused_refresh_token_gives_way_to_a_sibling_s_newer_one() {
    // TOK-033, C15
    for with_token in [true, false] {
        let world = World::new().await;
        let key = world.connect("alice").await;
        let old = world.row(&key).await;
        world.server.book().delay = Duration::from_secs(2);
        world.server.book().acts.push_back(Act::Say(400, &[], r#"{"error":"invalid_grant"}"#));
        let sibling_s = world.server.grant("alice");
        let access = with_token.then(|| world.server.issue(&sibling_s));
        let (got, ()) = tokio::join!(world.request(&key), async {
            pass(1.0).await;
            world.import(&key, sibling_s, access).await;
        });
        assert_eq!(got, Got::Fine);
        assert_eq!(world.server.calls(), if with_token { 1 } else { 2 });
        let row = world.row(&key).await;
        assert_eq!(row.state, State::Connected);
        assert!(row.generation > old.generation);
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_writer_takes_over_what_was_stored_meanwhile() {
    // TOK-031, C12
    for with_token in [true, false] {
        let world = World::new().await;
        let key = world.connect("alice").await;
        world.server.book().delay = Duration::from_secs(2);
        let theirs = world.server.grant("alice");
        let access = with_token.then(|| world.server.issue(&theirs));
        let (bearer, ()) = tokio::join!(world.bearer(&key), async {
            pass(1.0).await;
            world.import(&key, theirs.clone(), access.clone()).await;
        });
        assert!(world.server.is_of(&bearer, theirs.expose()), "with a token: {with_token}");
        assert_eq!(access.is_some_and(|access| access.expose() == token(&bearer)), with_token);
        assert_eq!(world.server.calls(), if with_token { 1 } else { 2 });
        let row = world.row(&key).await;
        assert_eq!((row.generation, row.generation), (bearer.generation, if with_token { 2 } else { 3 }));
        if with_token {
            // The next renewal is with their refresh token.
            world.server.revoke(&bearer);
            assert_eq!(world.request(&key).await, Got::Fine);
        }
        assert_eq!(world.server.book().calls[1].refresh_token.as_deref(), Some(theirs.expose()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_was_stored_during_a_renewal_is_tried_until_it_is_renewed() {
    // TOK-031, C15
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.book().acts.extend([Act::Hang, Act::Say(503, &[], "")]);
    world.tokens.renew_for_the_next(&key, &first);
    pass(1.0).await;
    let theirs = world.server.grant("alice");
    world.import(&key, theirs.clone(), None).await;
    world.server.release();
    pass(5.0).await;
    assert!(world.server.is_of(&world.bearer_at_once(&key).await, theirs.expose()));
    assert_eq!(world.server.calls(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_was_removed_during_its_renewal_stays_removed() {
    // TOK-038
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.server.book().delay = Duration::from_secs(2);
    let (got, ()) = tokio::join!(world.request(&key), async {
        pass(1.0).await;
        world.store.remove(&key.provider, &key.subject).await.unwrap();
    });
    let provider = key.provider.clone();
    assert_eq!(got, Got::Nothing(TokenError::NotConnected { provider, subject: key.subject.clone() }));
    assert!(world.store.grant(&key.provider, &key.subject).await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_forced_renewal_takes_no_token_for_a_new_one_because_its_row_is() {
    // RTY-036: a sibling stored the rejected token under a later number.
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    let row = world.row(&key).await;
    let (refresh_token, access) = (row.refresh_token.unwrap(), row.access.unwrap().token);
    world.import(&key, refresh_token, Some(access)).await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_grant_without_a_refresh_token_asks_for_consent_when_its_token_ends() {
    let world = World::new().await;
    let key = world.connect_with_token("alice").await;
    world.sql("UPDATE grants SET refresh_token = NULL");
    let first = world.bearer(&key).await;
    world.server.revoke(&first);
    match world.tokens.renew(&key, &first).await.unwrap_err() {
        NoRenewal::Failed(TokenError::Reauthorize { reason, .. }) => assert_eq!(reason, "no_refresh_token"),
        other => panic!("{other:?}"),
    }
    assert_eq!(world.server.calls(), 0);
}
