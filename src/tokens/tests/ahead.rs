//! Expiry, and the renewal ahead of it (SEMANTICS C16).

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::server::{Rotation, token};
use super::world::{Got, World, failures, pass, provider};
use crate::oauth::Grant;

#[tokio::test(start_paused = true)]
async fn a_token_in_use_is_renewed_five_minutes_before_its_end_and_nobody_waits() {
    // TOK-001
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.server.book().delay = Duration::from_secs(2);
    let first = world.bearer(&key).await;
    let start = world.server.book().calls[0].at;
    world.bearer(&key).await;
    let mut latest = first.clone();
    while start.elapsed() < Duration::from_secs(3310) {
        pass(1.0).await;
        latest = world.bearer_at_once(&key).await;
    }
    assert_eq!((first.generation, latest.generation), (2, 3));
    let renewed = world.server.book().calls[1].at - start;
    assert!((3270..=3300).contains(&renewed.as_secs()), "{renewed:?}");
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_scheduler_renews_what_was_used_and_leaves_the_rest_alone() {
    // TOK-001, C16
    let world = World::new().await;
    let (used, unused) = (world.connect("alice").await, world.connect("bob").await);
    for key in [&used, &unused] {
        world.bearer(key).await;
    }
    pass(3310.0).await;
    // Each was used by the request that brought it, and so is renewed once; then nobody comes any more.
    assert_eq!(world.server.calls(), 4);
    world.bearer(&used).await;
    pass(3310.0).await;
    assert_eq!(world.server.calls(), 5);
    pass(24.0 * 3600.0).await;
    assert_eq!(world.server.calls(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_request_in_the_last_minutes_of_an_unused_token_renews_it_without_waiting() {
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    pass(3310.0).await;
    assert_eq!(world.server.calls(), 2);
    pass(3310.0).await;
    assert_eq!(world.server.calls(), 2, "unused since");
    world.server.book().delay = Duration::from_secs(3);
    let old = world.bearer_at_once(&key).await;
    let same = world.bearer_at_once(&key).await;
    pass(4.0).await;
    let new = world.bearer_at_once(&key).await;
    assert_eq!([old.generation, same.generation, new.generation], [3, 3, 4]);
    assert_eq!(world.server.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_was_waited_for_while_it_came_counts_as_used() {
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    world.server.book().delay = Duration::from_secs(5);
    pass(3302.0).await;
    world.server.revoke(&first);
    assert_eq!(world.tokens.renew(&key, &first).await.unwrap().generation, 3);
    pass(3310.0).await;
    assert_eq!(world.server.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_token_of_a_minute_is_renewed_at_two_thirds_and_not_by_each_request() {
    // TOK-002
    let world = World::new().await;
    world.server.book().expires_in = json!(60);
    let key = world.connect("alice").await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(600) {
        assert_eq!(world.request(&key).await, Got::Fine);
        pass(0.5).await;
    }
    let calls: Vec<_> = world.server.book().calls.iter().map(|call| call.at).collect();
    for pair in calls.windows(2) {
        let between = (pair[1] - pair[0]).as_secs_f64();
        assert!((38.0..=40.6).contains(&between), "{between}");
    }
    assert!((15..=16).contains(&calls.len()), "{}", calls.len());
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_gives_the_same_token_again_is_not_asked_again_and_again() {
    // TOK-003
    let world = World::new().await;
    world.server.book().same_until = Some(Duration::from_secs(30));
    let key = world.connect("alice").await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3700) {
        assert_eq!(world.request(&key).await, Got::Fine);
        pass(0.5).await;
    }
    let calls: Vec<_> = world.server.book().calls.iter().map(|call| (call.at - start).as_secs_f64()).collect();
    for pair in calls[1..].windows(2).filter(|pair| pair[1] < 3594.0) {
        let pace = ((3600.0 - pair[0]) / 2.0).max(10.0);
        assert!((pace - 0.1..=pace + 0.6).contains(&(pair[1] - pair[0])), "{calls:?}");
    }
    assert!((4..=9).contains(&calls.len()), "{calls:?}");
}

#[tokio::test(start_paused = true)]
async fn a_thousand_tokens_that_end_together_are_renewed_in_time_four_at_once() {
    // TOK-004, C15
    let world = World::new().await;
    let mut keys = Vec::new();
    for index in 0..1000 {
        keys.push(world.connect_with_token(&format!("user{index}")).await);
    }
    let start = Instant::now();
    for key in &keys {
        world.bearer(key).await;
    }
    assert_eq!(world.server.calls(), 0);
    world.server.book().delay = Duration::from_millis(700);
    pass(3320.0).await;
    // In the thick of it, a request that has to wait does not wait for all of them.
    let late = world.connect("late").await;
    let asked = Instant::now();
    world.bearer(&late).await;
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    pass(3595.0 - start.elapsed().as_secs_f64()).await;
    let book = world.server.book();
    assert_eq!(book.calls.len(), 1001);
    assert!((3..=4).contains(&book.most_at_once), "{}", book.most_at_once);
    assert!(book.calls.last().unwrap().at - start < Duration::from_secs(3590), "late");
    assert!(book.calls.iter().all(|call| call.at - start >= Duration::from_secs(3270)), "early");
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_somebody_comes_to_wait_for_leaves_the_queue() {
    // TOK-004
    let world = World::new().await;
    let mut keys = Vec::new();
    for index in 0..50 {
        let key = world.connect_with_token(&format!("user{index}")).await;
        // One of them joins the other: no reason to let the next renewal leave the queue, an hour later.
        tokio::join!(world.bearer(&key), world.bearer(&key));
        let refresh_token = world.stored_refresh_token(&key).await;
        keys.push((key, refresh_token));
    }
    let mut watch = world.events.watch();
    world.server.book().delay = Duration::from_secs(9);
    pass(3301.0).await;
    // All are under way, and most have minutes before it is their turn. Nothing is awaited here: time would go on.
    let called: Vec<_> = world.server.book().calls.iter().filter_map(|call| call.refresh_token.clone()).collect();
    let (key, _) = keys.iter().rfind(|(_, token)| !called.contains(token)).expect("all have called");
    let rejected = world.bearer_at_once(key).await;
    world.server.revoke(&rejected);
    let asked = Instant::now();
    assert_eq!(world.request(key).await, Got::Fine);
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    pass(200.0).await;
    assert_eq!((world.server.calls(), failures(&mut watch)), (50, vec![]));
}

#[tokio::test(start_paused = true)]
async fn a_token_without_a_credible_end_is_never_renewed_ahead() {
    // TOK-005, C16
    for expires_in in [json!(null), json!(0), json!(-1), json!(31_536_001), json!("soon")] {
        let world = World::new().await;
        world.server.book().expires_in = expires_in.clone();
        let key = world.connect("alice").await;
        let first = world.bearer(&key).await;
        pass(400.0 * 24.0 * 3600.0).await;
        assert_eq!(world.bearer_at_once(&key).await.generation, first.generation, "{expires_in}");
        assert_eq!(world.server.calls(), 1);
        assert_eq!(world.row(&key).await.access.unwrap().expires_at, None);
    }
}

#[tokio::test(start_paused = true)]
async fn the_configured_lifetime_is_for_answers_that_name_none() {
    // TOK-005, C16
    let mut acme = provider("acme", Grant::RefreshToken);
    acme.default_lifetime = Some(Duration::from_secs(60));
    let world = World::of(vec![acme]).await;
    let key = world.connect("alice").await;
    world.server.book().expires_in = Value::Null;
    world.bearer(&key).await;
    pass(41.0).await;
    assert_eq!(world.server.calls(), 2);
    world.server.book().expires_in = json!(3600);
    world.bearer(&key).await;
    pass(41.0).await;
    assert_eq!(world.server.calls(), 3);
    world.bearer(&key).await;
    pass(3200.0).await;
    assert_eq!(world.server.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_configured_lifetime_of_a_hundred_years_is_no_end_at_all() {
    // C16
    let mut acme = provider("acme", Grant::RefreshToken);
    acme.default_lifetime = Some(Duration::from_secs(100 * 365 * 24 * 3600));
    let world = World::of(vec![acme, provider("other", Grant::RefreshToken)]).await;
    let key = world.connect("alice").await;
    world.server.book().expires_in = Value::Null;
    world.bearer(&key).await;
    assert_eq!(world.row(&key).await.access.unwrap().expires_at, None);
    world.server.book().expires_in = json!(60);
    let other = world.connect("bob").await;
    world.bearer(&other).await;
    pass(41.0).await;
    assert_eq!(world.server.calls(), 3, "the scheduler still works");
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_a_refresh_token_keeps_the_old_one() {
    // TOK-007, C20
    for (rotation, kept) in
        [(Rotation::Omit, true), (Rotation::Empty, true), (Rotation::Same, true), (Rotation::New, false)]
    {
        let world = World::new().await;
        world.server.book().rotation = rotation;
        let key = world.connect("alice").await;
        let old = world.stored_refresh_token(&key).await;
        let bearer = world.bearer(&key).await;
        assert_eq!(world.stored_refresh_token(&key).await == old, kept);
        let row = world.row(&key).await;
        assert_eq!((row.generation, row.intent), (2, None));
        assert_eq!(row.access.unwrap().token.expose(), token(&bearer));
        world.server.revoke(&bearer);
        assert_eq!(world.request(&key).await, Got::Fine);
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_is_over_five_seconds_before_its_end() {
    // C16
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    let start = world.server.book().calls[0].at;
    world.server.book().always = super::server::Act::Refuse;
    tokio::time::sleep_until(start + Duration::from_millis(3_594_900)).await;
    world.bearer_at_once(&key).await;
    tokio::time::sleep_until(start + Duration::from_secs(3595)).await;
    world.tokens.bearer(&key).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn a_wall_clock_a_day_ahead_costs_one_renewal() {
    // TOK-034
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    world.clock.skew_wall(24 * 3600 * 1000);
    for _ in 0..60 {
        assert_eq!(world.request(&key).await, Got::Fine);
        pass(1.0).await;
    }
    world.clock.skew_wall(0);
    for _ in 0..60 {
        assert_eq!(world.request(&key).await, Got::Fine);
        pass(1.0).await;
    }
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_wall_clock_a_day_back_makes_no_token_live_longer() {
    // TOK-034
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    world.server.book().delay = Duration::from_secs(1);
    world.clock.skew_wall(-24 * 3600 * 1000);
    pass(30.0).await;
    world.bearer_at_once(&key).await;
    // Past its end by the clock that only goes forward. What the store says of it is not believed either.
    world.server.book().always = super::server::Act::Refuse;
    pass(3600.0).await;
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.code(), "token_unavailable");
    world.restart().await;
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.code(), "token_unavailable");
    world.server.book().always = super::server::Act::Serve;
    pass(61.0).await;
    assert_eq!(world.request(&key).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn a_wall_clock_that_runs_too_fast_or_too_slow_costs_no_request_and_hardly_a_renewal() {
    // TOK-034: 10 s in a minute.
    for drift in [10_000, -10_000] {
        let mut world = World::new().await;
        let key = world.connect("alice").await;
        for minute in 0..240 {
            world.clock.skew_wall(drift * minute);
            if minute == 120 {
                world.restart().await;
            }
            // Hands out no token past its end: the world looks.
            assert_eq!(world.request(&key).await, Got::Fine, "{drift}, minute {minute}");
            pass(60.0).await;
        }
        // One each hour by the faster of the two clocks, and one for the restart when what is stored is not believed.
        assert!((4..=6).contains(&world.server.calls()), "{drift}: {}", world.server.calls());
        world.server.book().always = super::server::Act::Refuse;
        for minute in 240..310 {
            world.clock.skew_wall(drift * minute);
            world.request(&key).await;
            pass(60.0).await;
        }
        assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "token_unavailable", "{drift}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stored_token_is_used_after_a_restart_and_ends_at_its_time() {
    // C16
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    let before = world.bearer(&key).await;
    pass(1000.0).await;
    world.restart().await;
    let after = world.bearer(&key).await;
    assert_eq!((token(&before), world.server.calls()), (token(&after), 1));
    pass(2200.0).await;
    world.bearer_at_once(&key).await;
    // Until its time, and a little for what is on its way.
    for seconds in [101.0, 1.0, 1.0, 1.0] {
        pass(seconds).await;
    }
    assert_eq!(world.server.calls(), 2, "renewed at its time, not an hour after the start");
    pass(3610.0).await;
    world.restart().await;
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.server.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_stored_end_that_no_clock_shows_is_no_end_at_all() {
    // C16: the times of a row are not sealed.
    let world = World::new().await;
    let key = world.connect_with_token("alice").await;
    world.sql("UPDATE grants SET expires_at = 9000000000000000000");
    world.bearer(&key).await;
    let other = world.connect("bob").await;
    world.bearer(&other).await;
    pass(3700.0).await;
    world.bearer_at_once(&key).await;
    assert_eq!(world.server.calls(), 2, "bob's, and the renewal of it: the scheduler still works");
}

#[tokio::test(start_paused = true)]
async fn a_token_that_ended_on_its_way_is_not_handed_out() {
    // C17
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.server.book().expires_in = json!(10);
    world.server.book().delay = Duration::from_secs(11);
    let error = world.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(error.to_string(), "no token from `acme` now: the token had ended before it came");
    assert_eq!(world.row(&key).await.generation, 2);
}
