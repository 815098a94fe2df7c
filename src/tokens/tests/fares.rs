//! How tokens fare in the eyes of whoever looks after the sidecar: it must say what is wrong for as long as it is.

use std::time::Duration;

use super::server::Act;
use super::world::{World, pass};
use crate::tokens::Fare;

const DOWN: Act = Act::Say(503, &[], "");
const INVALID_CLIENT: Act = Act::Say(401, &[], r#"{"error":"invalid_client"}"#);

fn fare(world: &World) -> Fare {
    world.tokens.condition().providers.remove(0)
}

fn ends_in(world: &World) -> Option<u64> {
    fare(world).expires_in.map(|left| left.as_secs())
}

#[tokio::test(start_paused = true)]
async fn a_token_in_use_that_ends_in_an_outage_is_0_for_as_long_as_that_lasts() {
    // TOK-014
    let world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    world.server.book().always = DOWN;
    pass(3590.0).await;
    assert!(ends_in(&world).is_some_and(|left| left <= 10), "{:?}", ends_in(&world));
    for _ in 0..300 {
        pass(2.0).await;
        assert!(ends_in(&world).is_some_and(|left| left < 10), "{:?}", ends_in(&world));
        assert_eq!(fare(&world).trouble, Some("token_unavailable"));
        let _ = world.tokens.bearer(&key).await;
    }
    world.server.book().always = Act::Serve;
    pass(61.0).await;
    world.bearer(&key).await;
    assert!(ends_in(&world).is_some_and(|left| left > 3000) && fare(&world).trouble.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_token_that_nobody_uses_runs_out_unseen() {
    // TOK-001
    let world = World::new().await;
    let (used, unused) = (world.connect("alice").await, world.connect("bob").await);
    for key in [&used, &unused] {
        world.bearer(key).await;
    }
    for minute in 0..240 {
        pass(60.0).await;
        world.bearer(&used).await;
        // The first token of each was used by the request that brought it.
        assert!(ends_in(&world).is_some_and(|left| left > 200), "{minute}: {:?}", ends_in(&world));
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_of_scopes_that_were_configured_before_counts_no_more() {
    let mut world = World::of_a_client().await;
    world.server.book().always = INVALID_CLIENT;
    world.tokens.bearer(&world.key("alice")).await.unwrap_err();
    let before = world.tokens.clone();
    let old = world.key("alice");
    world.reconfigure(|provider| provider.target.scopes = vec!["more".into()]);
    before.bearer(&old).await.unwrap_err();
    assert_eq!((fare(&world).trouble, ends_in(&world)), (None, None));
    world.server.book().always = Act::Serve;
    world.reconfigure(|provider| provider.target.scopes = vec!["read".into()]);
    world.bearer(&world.key("alice")).await;
    assert!(ends_in(&world).is_some());
    world.reconfigure(|provider| provider.target.scopes = vec!["more".into()]);
    assert_eq!((fare(&world).tokens, ends_in(&world)), (0, None));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_refused_is_a_trouble_until_a_token_comes() {
    // C15
    let world = World::of_a_client().await;
    let key = world.key("alice");
    world.server.book().always = INVALID_CLIENT;
    for _ in 0..60 {
        world.tokens.bearer(&key).await.unwrap_err();
        assert_eq!(fare(&world).trouble, Some("fix_configuration"));
        pass(30.0).await;
    }
    assert_eq!(fare(&world).expires_in, Some(Duration::ZERO));
    world.server.book().always = Act::Serve;
    pass(601.0).await;
    world.bearer(&key).await;
    assert_eq!(fare(&world).trouble, None);
}
