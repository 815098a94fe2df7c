//! Tokens whose providers are configured anew while they are used.

use std::time::Duration;

use tokio::time::Instant;

use super::grants::consent;
use super::server::{Act, token};
use super::world::{Got, World, pass, provider};
use crate::oauth::Grant;
use crate::secret::Secret;

const INVALID_CLIENT: Act = Act::Say(401, &[], r#"{"error":"invalid_client"}"#);
const DOWN: Act = Act::Say(503, &[("retry-after", "60")], "");

#[tokio::test(start_paused = true)]
async fn a_provider_that_has_not_changed_keeps_its_tokens_and_its_rest() {
    let mut world = World::new().await;
    let (alice, bob) = (world.connect("alice").await, world.connect("bob").await);
    let before = world.bearer(&alice).await;
    world.server.book().acts.push_back(DOWN);
    world.tokens.bearer(&bob).await.unwrap_err();
    world.reconfigure(|_| {});
    assert_eq!(token(&world.bearer_at_once(&alice).await), token(&before));
    assert_eq!(world.tokens.bearer(&bob).await.unwrap_err().code(), "token_unavailable");
    assert_eq!(world.server.calls(), 2);
    pass(60.0).await;
    assert_eq!(world.request(&bob).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_was_refused_is_tried_again_as_soon_as_it_is_corrected() {
    // TOK-018, C15
    for grant in [Grant::ClientCredentials, Grant::RefreshToken] {
        let mut world = World::of(vec![provider("acme", grant)]).await;
        let key = if grant.is_for_users() { world.connect("alice").await } else { world.key("alice") };
        world.server.book().acts.push_back(INVALID_CLIENT);
        for _ in 0..10 {
            assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "fix_configuration");
            pass(30.0).await;
        }
        assert_eq!((world.server.calls(), world.tokens.troubles().await.len()), (1, 1));
        world.reconfigure(|provider| provider.client_secret = Some(Secret::new("corrected")));
        assert!(world.tokens.troubles().await.is_empty());
        assert_eq!(world.request(&key).await, Got::Fine);
        assert_eq!(world.server.calls(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_taken_again_is_refused_for_nobody() {
    // TOK-018, C15: also for those who do not come back, whether the one who comes was refused or not.
    for (refused, comes) in [(["alice", "bob"], "alice"), (["alice", "bob"], "carol")] {
        let mut world = World::new().await;
        let carol = world.connect("carol").await;
        world.bearer(&carol).await;
        world.server.book().always = INVALID_CLIENT;
        for user in refused {
            let key = world.connect(user).await;
            assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "fix_configuration");
        }
        assert_eq!((world.counted("connected").await, world.counted("fix_configuration").await), (1, 2));
        world.server.book().always = Act::Serve;
        world.reconfigure(|provider| provider.client_secret = Some(Secret::new("corrected")));
        pass(3600.0).await;
        assert_eq!(world.request(&world.key(comes)).await, Got::Fine);
        pass(1.0).await;
        assert_eq!((world.counted("connected").await, world.counted("fix_configuration").await), (3, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn what_fails_as_it_was_configured_before_says_nothing_of_the_new_configuration() {
    // TOK-018: the answer comes after the reload.
    let mut world = World::of_a_client().await;
    let key = world.key("alice");
    world.server.book().acts.push_back(INVALID_CLIENT);
    world.server.book().delay = Duration::from_secs(1);
    let (tokens, asked) = (world.tokens.clone(), key.clone());
    let waiting = tokio::spawn(async move { tokens.bearer(&asked).await });
    pass(0.5).await;
    world.reconfigure(|provider| provider.client_secret = Some(Secret::new("corrected")));
    assert_eq!(waiting.await.unwrap().unwrap_err().code(), "fix_configuration");
    assert_eq!(world.request(&key).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn another_way_to_a_provider_that_was_out_of_reach_is_tried_at_once() {
    let world = World::of_a_client().await;
    let key = world.key("alice");
    world.server.book().acts.push_back(DOWN);
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "token_unavailable");
    world.tokens.way_changed();
    assert_eq!(world.request(&key).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn what_fails_on_the_way_of_before_keeps_nobody_from_the_way_of_now() {
    let world = World::of_a_client().await;
    let key = world.key("alice");
    world.server.book().acts.push_back(DOWN);
    world.server.book().delay = Duration::from_secs(1);
    let (tokens, asked) = (world.tokens.clone(), key.clone());
    let waiting = tokio::spawn(async move { tokens.bearer(&asked).await });
    pass(0.5).await;
    world.tokens.way_changed();
    assert_eq!(waiting.await.unwrap().unwrap_err().code(), "token_unavailable");
    assert_eq!(world.request(&key).await, Got::Fine);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_under_way_goes_on_and_is_the_only_one() {
    // TOK-045
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    world.server.book().acts.push_back(Act::Hang);
    let ask = |world: &World| {
        let (tokens, key) = (world.tokens.clone(), key.clone());
        tokio::spawn(async move { tokens.bearer(&key).await })
    };
    let before = ask(&world);
    pass(0.1).await;
    world.reconfigure(|provider| provider.client_secret = Some(Secret::new("another")));
    let after = ask(&world);
    pass(0.1).await;
    world.server.release();
    let (before, after) = (before.await.unwrap().unwrap(), after.await.unwrap().unwrap());
    assert_eq!(token(&before), token(&after));
    assert_eq!(world.stored_refresh_token(&key).await, world.server.newest_refresh_token(&after));
    assert_eq!((world.server.calls(), world.server.book().reused), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_provider_with_other_scopes_redeems_no_refresh_token_twice() {
    // TOK-045: it is another token, of the same grant.
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    world.server.book().acts.push_back(Act::Hang);
    let (tokens, asked) = (world.tokens.clone(), key.clone());
    let before = tokio::spawn(async move { tokens.bearer(&asked).await });
    pass(0.1).await;
    world.reconfigure(|provider| provider.target.scopes = vec!["more".into()]);
    let (tokens, asked) = (world.tokens.clone(), world.key("alice"));
    let after = tokio::spawn(async move { tokens.bearer(&asked).await });
    pass(0.1).await;
    world.server.release();
    let (before, after) = (before.await.unwrap().unwrap(), after.await.unwrap().unwrap());
    assert_ne!(token(&before), token(&after));
    assert_eq!((world.server.calls(), world.server.book().reused), (2, 0));
    // The old one is not renewed against the new one, for ever.
    pass(3600.0).await;
    assert_eq!(world.server.book().calls[2..].iter().filter(|call| call.scope.as_deref() != Some("more")).count(), 0);
}

#[tokio::test(start_paused = true)]
async fn requests_of_a_provider_that_is_removed_end_in_peace_and_nothing_is_renewed() {
    // TOK-045
    let world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    let without = world.tokens.reconfigured(&[]);
    assert!(without.key(&key.provider, &"alice".parse().unwrap()).is_none());
    // A request that came before: its token is rejected, and it is sent again with another one.
    world.server.revoke(&first);
    assert_eq!(world.request(&key).await, Got::Fine);
    assert_eq!(world.server.calls(), 2);
    pass(3590.0).await;
    assert_eq!(world.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_comes_back_has_its_tokens() {
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    let first = world.bearer(&key).await;
    let _ = world.tokens.reconfigured(&[]);
    let asked = Instant::now();
    world.reconfigure(|_| {});
    assert_eq!(token(&world.bearer_at_once(&key).await), token(&first));
    assert_eq!((asked.elapsed(), world.server.calls()), (Duration::ZERO, 1));
}

#[tokio::test(start_paused = true)]
async fn who_disconnects_a_provider_that_is_not_configured_stays_disconnected_when_it_comes_back() {
    // TOK-038, TOK-045
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    let without = world.tokens.reconfigured(&[]);
    without.disconnect(&key.provider, &key.subject).await.unwrap();
    world.reconfigure(|_| {});
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "not_connected");
    // Nor where another process removes it, of which nobody tells.
    world.connect("alice").await;
    pass(1.0).await;
    world.bearer(&key).await;
    let _ = world.tokens.reconfigured(&[]);
    world.store.remove(&key.provider, &key.subject).await.unwrap();
    world.reconfigure(|_| {});
    assert_eq!(world.tokens.bearer(&key).await.unwrap_err().code(), "not_connected");
}

#[tokio::test(start_paused = true)]
async fn a_configuration_that_comes_back_brings_no_token_of_a_grant_that_is_gone() {
    // TOK-038, TOK-045: the tokens for its scopes have stayed in memory.
    for disconnects in [true, false] {
        let mut world = World::of(vec![provider("acme", Grant::AuthorizationCode)]).await;
        let key = world.connect("alice").await;
        world.bearer(&key).await;
        world.reconfigure(|provider| provider.target.scopes = vec!["more".into()]);
        if disconnects {
            world.tokens.disconnect(&key.provider, &key.subject).await.unwrap();
        } else {
            consent(&world, &world.tokens, &world.key("alice")).await.unwrap();
        }
        let slots = world.tokens.inner.slots_of(&key.provider, &key.subject);
        assert!(slots.iter().all(|slot| slot.key != key || slot.generation().is_none()));
        world.reconfigure(|provider| provider.target.scopes = vec![]);
        let error = world.tokens.bearer(&key).await.unwrap_err();
        // The server knows nothing of the refresh token that its answer to the code was made up with: that it was asked
        // shows that the new grant is used.
        assert_eq!(error.code(), if disconnects { "not_connected" } else { "reauthorize" });
    }
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_another_process_has_replaced_is_gone_for_every_configuration() {
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    world.bearer(&key).await;
    let follower = world.tokens.clone();
    let following = tokio::spawn(async move { follower.follow_changes().await });
    pass(1.0).await;
    world.reconfigure(|provider| provider.target.scopes = vec!["more".into()]);
    let sibling = world.sibling().await;
    assert!(sibling.disconnect(&key.provider, &key.subject).await.unwrap().is_some());
    pass(1.0).await;
    let slots = world.tokens.inner.slots_of(&key.provider, &key.subject);
    assert!(!slots.is_empty() && slots.iter().all(|slot| slot.generation().is_none()));
    following.abort();
}

#[tokio::test(start_paused = true)]
async fn another_server_or_client_gets_nothing_of_the_one_before_and_that_comes_back_with_all_it_had() {
    // TOK-042, TOK-045
    type Change = fn(&mut crate::oauth::Provider);
    let server: Change = |provider| provider.endpoints.token = "https://other.test/token".parse().ok();
    let client: Change = |provider| provider.client_id = "other".into();
    for change in [server, client] {
        let mut world = World::of(vec![provider("acme", Grant::RefreshToken)]).await;
        let key = world.connect("alice").await;
        let first = world.bearer(&key).await;
        let before = world.row(&key).await;
        let (was_at, was) = (provider("acme", Grant::RefreshToken).endpoints.token, "id".to_owned());
        world.reconfigure(change);
        for restarts in [false, true] {
            if restarts {
                world.restart().await;
            }
            let error = world.tokens.bearer(&world.key("alice")).await.unwrap_err();
            assert_eq!(error.to_string(), "`acme` no longer honours the grant of `alice`: provider_changed");
            pass(3.0).await;
        }
        assert_eq!((world.server.calls(), world.row(&key).await), (1, before));
        assert_eq!((world.counted("connected").await, world.counted("reauthorize").await), (0, 1));
        world.reconfigure(|provider| (provider.endpoints.token, provider.client_id) = (was_at.clone(), was.clone()));
        assert_eq!((world.counted("connected").await, world.counted("reauthorize").await), (1, 0));
        assert_eq!((token(&world.bearer(&key).await), world.server.calls()), (token(&first), 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_becomes_another_asks_for_a_token_of_its_own() {
    let mut world = World::of_a_client().await;
    let first = world.bearer(&world.key("alice")).await;
    world.reconfigure(|provider| provider.client_id = "other".into());
    let second = world.bearer(&world.key("alice")).await;
    assert_ne!(token(&first), token(&second));
    assert_eq!(world.server.calls(), 2);
    // Nobody has to grant anything.
    world.reconfigure(|provider| provider.client_id = "id".into());
    assert_eq!((world.counted("connected").await, world.counted("reauthorize").await), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn what_is_disconnected_is_given_back_to_nobody_but_its_server() {
    let mut acme = provider("acme", Grant::RefreshToken);
    acme.endpoints.revocation = "https://acme.test/revoke".parse().ok();
    let mut world = World::of(vec![acme]).await;
    let key = world.connect("alice").await;
    world.reconfigure(|provider| provider.client_id = "other".into());
    let left = world.tokens.disconnect(&key.provider, &key.subject).await.unwrap();
    assert!(matches!(left, Some(crate::tokens::Revocation::Failed(_))), "{left:?}");
    assert_eq!(world.server.calls(), 0);
}
