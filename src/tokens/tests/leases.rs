//! Sidecars that share a store, and leases whose holders stand still or die (SEMANTICS C14, C19).

use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::fleet::{Fleet, Sidecar, proof};
use super::server::{Act, token};
use super::world::{pass, soon};
use crate::secret::Secret;
use crate::store::memory::Fate;
use crate::store::{State, StoreError};
use crate::tokens::{Bearer, GrantError, Key, Proof, TokenError};

/// The messages of a first renewal to the store, there and back: row, lease, row, intent. Then comes the call.
const LOOK: u64 = 4;
const INTENT: u64 = 6;
const CALL: u64 = 8;
/// Those of one that is refused: the row again, then what is to be noted in it.
const NOTE: u64 = 12;

const REFUSED: Act = Act::Say(400, &[], r#"{"error":"invalid_grant"}"#);

/// Two sidecars, and a user's grant.
async fn world() -> (Fleet, Sidecar, Sidecar, Key) {
    let fleet = Fleet::new().await;
    let (one, other) = (fleet.sidecar().await, fleet.sidecar().await);
    let key = one.key("alice");
    fleet.connect(&key).await;
    (fleet, one, other, key)
}

fn asks(sidecar: &Sidecar, key: &Key) -> JoinHandle<Result<Bearer, TokenError>> {
    let (tokens, key) = (sidecar.tokens.clone(), key.clone());
    tokio::spawn(async move { tokens.bearer(&key).await })
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// The sidecar's token request is answered while it stands still, or is dead.
async fn sends_and_then(fleet: &Fleet, sidecar: &Sidecar, keys: &[Key], fate: Fate) {
    fleet.server.book().delay = seconds(2);
    keys.iter().for_each(|key| drop(asks(sidecar, key)));
    pass(1.0).await;
    match fate {
        Fate::Die => sidecar.process.die(),
        Fate::Stop(time) => sidecar.process.stop(time),
        Fate::Break | Fate::Delay(_) => unreachable!(),
    }
    pass(2.0).await;
    fleet.server.book().delay = Duration::ZERO;
}

#[tokio::test(start_paused = true)]
async fn a_sidecar_that_stood_still_past_its_lease_stores_its_answer_before_the_old_token_is_tried() {
    // TOK-031, C14, C19
    let (fleet, one, other, key) = world().await;
    sends_and_then(&fleet, &one, std::slice::from_ref(&key), Fate::Stop(seconds(42))).await;
    pass(33.0).await;
    let asked = Instant::now();
    let theirs = other.tokens.bearer(&key).await.unwrap();
    assert!(asked.elapsed() > seconds(6), "it waited for the answer of the one that stood still");
    assert!(fleet.server.accepts(&theirs));
    assert_eq!(token(&one.tokens.bearer(&key).await.unwrap()), token(&theirs));
    assert_eq!((fleet.server.calls(), fleet.row(&key).await.unwrap().generation), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn after_the_death_of_its_holder_the_old_token_is_tried_once() {
    // TOK-024, C14: at a provider with a time of grace that brings another.
    for grace in [true, false] {
        let (fleet, one, other, key) = world().await;
        fleet.server.book().grace = grace;
        sends_and_then(&fleet, &one, std::slice::from_ref(&key), Fate::Die).await;
        let error = other.tokens.bearer(&key).await.unwrap_err();
        assert_eq!(error.to_string(), "no token from `acme` now: another process is renewing it");
        pass(31.0).await;
        let asked = Instant::now();
        let brought = other.tokens.bearer(&key).await;
        assert!(asked.elapsed() >= seconds(15), "it waited for an answer that the other one may have");
        if grace {
            assert!(fleet.server.accepts(&brought.unwrap()));
        } else {
            let told = "`acme` no longer honours the grant of `alice`: lost_rotation";
            assert_eq!(brought.unwrap_err().to_string(), told);
            pass(60.0).await;
            assert_eq!(other.tokens.bearer(&key).await.unwrap_err().to_string(), told);
            let lost = State::reauthorize("lost_rotation");
            assert_eq!(fleet.row(&key).await.unwrap().state, lost);
        }
        assert_eq!(fleet.server.calls(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn no_token_is_handed_out_of_a_grant_that_was_replaced_during_its_renewal() {
    // TOK-031, TOK-038: nor does anybody have to come again, though the lease went with the grant.
    let (fleet, one, _, key) = world().await;
    fleet.server.book().delay = seconds(2);
    let waiting = asks(&one, &key);
    pass(1.0).await;
    let theirs = fleet.server.grant("alice");
    fleet.import(&key, theirs.clone()).await.unwrap();
    let bearer = waiting.await.unwrap().unwrap();
    assert!(fleet.server.is_of(&bearer, theirs.expose()));
    assert_eq!((fleet.server.calls(), fleet.server.book().reused), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_token_that_could_not_be_stored_gives_way_to_a_grant_that_was_stored_meanwhile() {
    // TOK-038, C13
    let (fleet, one, _, key) = world().await;
    fleet.server.book().delay = seconds(2);
    let waiting = asks(&one, &key);
    pass(1.0).await;
    one.process.cut_off(true);
    waiting.await.unwrap().unwrap();
    let theirs = fleet.server.grant("alice");
    fleet.import(&key, theirs.clone()).await.unwrap();
    one.process.cut_off(false);
    pass(30.0).await;
    let bearer = one.tokens.bearer(&key).await.unwrap();
    assert!(fleet.server.is_of(&bearer, theirs.expose()));
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_dead_holder_s_answer_holds_up_no_other_user() {
    // C15: at most four calls at once to one token endpoint.
    let (fleet, one, other, key) = world().await;
    let users = ["bob", "carol", "dave", "erin"].map(|user| one.key(user));
    join_all(users.iter().map(|key| fleet.connect(key))).await;
    sends_and_then(&fleet, &one, &users, Fate::Die).await;
    pass(33.0).await;
    let waiting: Vec<_> = users.iter().map(|key| asks(&other, key)).collect();
    pass(2.0).await;
    assert!(waiting.iter().all(|waiting| !waiting.is_finished()));
    let asked = Instant::now();
    other.tokens.bearer(&key).await.unwrap();
    assert_eq!(asked.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_waiting_request_goes_on_when_its_user_connects_elsewhere_while_a_refusal_is_noted() {
    // TOK-029, C15
    let (fleet, one, other, key) = world().await;
    fleet.server.book().acts.push_back(REFUSED);
    one.process.meets(NOTE, Fate::Delay(seconds(3)));
    let (tokens, of) = (one.tokens.clone(), key.clone());
    let waiting = tokio::spawn(async move { tokens.bearer_within(&of, seconds(120)).await });
    pass(1.0).await;
    other.tokens.grant(&key.provider, &"alice".parse().unwrap(), proof("alice"), Vec::new()).await.unwrap();
    pass(2.0).await;
    let bearer = soon(waiting).await;
    assert!(fleet.server.accepts(&bearer));
    assert_eq!(token(&bearer), token(&other.tokens.bearer(&key).await.unwrap()));
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_is_imported_while_a_refusal_of_the_one_before_is_noted_takes_its_place() {
    // TOK-029, C15
    let (fleet, one, _, key) = world().await;
    let first = one.tokens.bearer(&key).await.unwrap();
    fleet.server.book().acts.push_back(REFUSED);
    one.process.meets(NOTE, Fate::Delay(seconds(3)));
    one.tokens.renew_for_the_next(&key, &first);
    pass(1.0).await;
    let theirs = fleet.server.grant("alice");
    fleet.import(&key, theirs.clone()).await.unwrap();
    pass(4.0).await;
    let bearer = one.tokens.bearer(&key).await.unwrap();
    assert!(fleet.server.is_of(&bearer, theirs.expose()));
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_sent_in_the_lease_s_time_is_not_sent() {
    // C19: nobody may send it while another one takes the lease for its own.
    let (fleet, one, _, key) = world().await;
    one.process.meets(CALL, Fate::Stop(seconds(20)));
    let error = one.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "no token from `acme` now: it took too long to reach the authorization server; nothing was sent"
    );
    assert_eq!((fleet.server.calls(), fleet.row(&key).await.unwrap().intent), (0, None));
    pass(1.0).await;
    assert!(fleet.server.accepts(&one.tokens.bearer(&key).await.unwrap()));
    assert_eq!(fleet.server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_has_run_out_lets_nobody_send() {
    // TOK-031, C19
    for taken in [true, false] {
        let (fleet, one, other, key) = world().await;
        one.process.meets(INTENT, Fate::Stop(seconds(10)));
        let late = asks(&one, &key);
        pass(6.0).await;
        if taken {
            other.tokens.bearer(&key).await.unwrap();
        }
        let error = late.await.unwrap().unwrap_err();
        assert_eq!(
            error.to_string(),
            "no token from `acme` now: the store fails: the right to renew the grant of user `alice` at `acme` has run out"
        );
        assert_eq!(fleet.server.calls(), usize::from(taken));
        pass(1.5).await;
        let bearer = one.tokens.bearer(&key).await.unwrap();
        assert_eq!((fleet.server.calls(), bearer.generation), (1, 2));
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_has_lost_the_lease_takes_back_no_intent_of_the_next_holder() {
    // TOK-031, C14
    let (fleet, one, other, key) = world().await;
    one.process.meets(CALL, Fate::Stop(seconds(66)));
    let late = asks(&one, &key);
    pass(36.0).await;
    fleet.server.book().delay = seconds(15);
    let theirs = asks(&other, &key);
    pass(31.0).await;
    assert!(late.is_finished(), "it goes on, and finds that it cannot send any more");
    assert_eq!(fleet.server.calls(), 1, "the other one's");
    assert!(fleet.row(&key).await.unwrap().intent.is_some());
    assert!(fleet.server.accepts(&theirs.await.unwrap().unwrap()));
    assert_eq!(fleet.server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn whoever_gives_up_waiting_for_a_late_answer_leaves_that_to_the_next() {
    // TOK-031, C14, C19
    let (fleet, one, other, key) = world().await;
    sends_and_then(&fleet, &one, std::slice::from_ref(&key), Fate::Stop(seconds(44))).await;
    pass(33.0).await;
    other.process.meets(LOOK, Fate::Break);
    assert!(other.tokens.bearer(&key).await.unwrap_err().to_string().contains("nothing was sent"));
    pass(1.5).await;
    assert!(fleet.server.accepts(&other.tokens.bearer(&key).await.unwrap()));
    assert_eq!(fleet.server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_could_not_be_stored_is_not_asked_for_again() {
    // C14, C15, TOK-017: after the call, the row is read once more, and then marked.
    let (fleet, one, _, key) = world().await;
    fleet.server.book().always = REFUSED;
    one.process.meets(CALL + 4, Fate::Break);
    for _ in 0..2 {
        let error = one.tokens.bearer(&key).await.unwrap_err();
        assert_eq!(error.to_string(), "`acme` no longer honours the grant of `alice`: invalid_grant");
        assert_eq!(fleet.server.calls(), 1);
        pass(2.0).await;
    }
    assert_eq!(fleet.row(&key).await.unwrap().state, State::reauthorize("invalid_grant"));
}

#[tokio::test(start_paused = true)]
async fn while_the_store_is_away_tokens_are_used_and_none_is_redeemed() {
    // TOK-032, C19
    let (fleet, one, _, key) = world().await;
    let first = one.tokens.bearer(&key).await.unwrap();
    fleet.shared.away(true);
    pass(3590.0).await;
    assert_eq!(token(&one.tokens.bearer(&key).await.unwrap()), token(&first));
    pass(10.0).await;
    let error = one.tokens.bearer(&key).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "no token from `acme` now: the store fails: the store `memory` is away: nobody is there"
    );
    assert_eq!(fleet.server.calls(), 1);
    fleet.shared.away(false);
    pass(61.0).await;
    assert!(fleet.server.accepts(&one.tokens.bearer(&key).await.unwrap()));
    assert_eq!(fleet.server.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_the_store_cannot_take_is_stored_when_it_is_back_whoever_has_the_lease_by_then() {
    // TOK-022, TOK-032, C13
    let (fleet, one, other, key) = world().await;
    fleet.server.book().delay = seconds(2);
    let brought = asks(&one, &key);
    pass(1.0).await;
    fleet.shared.away(true);
    let first = brought.await.unwrap().unwrap();
    pass(120.0).await;
    fleet.shared.away(false);
    let theirs = other.tokens.bearer(&key).await.unwrap();
    assert_eq!((token(&theirs), fleet.server.calls()), (token(&first), 1));
}

#[tokio::test(start_paused = true)]
async fn what_is_written_for_one_user_ends_no_rest_of_another() {
    let (fleet, one, other, alice) = world().await;
    let bob = one.key("bob");
    fleet.connect(&bob).await;
    fleet.server.book().acts.push_back(Act::Say(401, &[], r#"{"error":"invalid_client"}"#));
    one.tokens.bearer(&bob).await.unwrap_err();
    let rests = || async {
        pass(2.0).await;
        let before = fleet.server.calls();
        let error = one.tokens.bearer(&bob).await.unwrap_err();
        assert_eq!((error.code(), fleet.server.calls()), ("fix_configuration", before));
    };
    // A renewal of another user, and, after a time without news, perhaps anything.
    other.tokens.bearer(&alice).await.unwrap();
    rests().await;
    one.process.cut_off(true);
    fleet.connect(&alice).await;
    pass(1.0).await;
    one.process.cut_off(false);
    rests().await;
    // A grant of his own.
    fleet.connect(&bob).await;
    pass(1.0).await;
    assert!(fleet.server.accepts(&one.tokens.bearer(&bob).await.unwrap()));
}

#[tokio::test(start_paused = true)]
async fn sidecars_whose_clocks_are_a_day_apart_do_not_renew_for_each_other_for_ever() {
    // TOK-034
    let (fleet, one, other, key) = world().await;
    one.clock.skew_wall(24 * 3600 * 1000);
    let (first, second) = (other.tokens.bearer(&key).await.unwrap(), one.tokens.bearer(&key).await.unwrap());
    pass(600.0).await;
    assert_eq!(fleet.server.calls(), 2);
    assert_eq!(token(&other.tokens.bearer(&key).await.unwrap()), token(&first));
    assert_eq!(token(&one.tokens.bearer(&key).await.unwrap()), token(&second));
}

#[tokio::test(start_paused = true)]
async fn sidecars_whose_clocks_are_a_day_apart_do_not_renew_in_turn_what_is_always_rejected() {
    // TOK-034, C5
    let (fleet, one, other, key) = world().await;
    one.clock.skew_wall(24 * 3600 * 1000);
    pass(1.0).await;
    let start = Instant::now();
    while start.elapsed() < seconds(600) {
        for Sidecar { tokens, .. } in [&one, &other] {
            let bearer = tokens.bearer(&key).await.unwrap();
            let _ = tokens.renew(&key, &bearer).await;
        }
        pass(0.5).await;
    }
    assert_eq!(fleet.server.calls(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_consent_is_given_back_only_when_it_is_known_not_to_be_stored() {
    // C13: the call, then what is stored of it, in four tries.
    for (lost, kept) in [(vec![3, 4, 5, 6], true), (vec![2, 3, 4, 5], false)] {
        let (fleet, one, _, key) = world().await;
        lost.iter().for_each(|step| one.process.meets(*step, Fate::Break));
        let (code, verifier) = (Secret::new("code"), Secret::new("verifier"));
        let proof = Proof::Code { code, verifier, redirect_uri: "http://localhost/callback".into() };
        let granted = one.tokens.grant(&key.provider, &"alice".parse().unwrap(), proof, Vec::new()).await;
        assert!(matches!(granted, Err(GrantError::Store(StoreError::Away { .. }))), "{granted:?}");
        assert_eq!(fleet.server.book().given_back, [""; 0]);
        pass(10.0).await;
        assert_eq!(fleet.server.book().given_back.is_empty(), kept);
        assert_eq!(fleet.row(&key).await.unwrap().generation, if kept { 2 } else { 1 });
    }
}

#[tokio::test(start_paused = true)]
async fn who_inherits_a_lease_and_fails_leaves_it_to_the_next_to_inherit() {
    // C14, C19: the store that keeps the owner from storing its answer is the one that fails here, too.
    let (fleet, one, other, key) = world().await;
    sends_and_then(&fleet, &one, std::slice::from_ref(&key), Fate::Stop(seconds(60))).await;
    pass(35.0).await;
    let waiting = asks(&other, &key);
    pass(3.0).await;
    other.process.meets(0, Fate::Break);
    pass(2.0).await;
    assert!(waiting.await.unwrap().is_err());
    drop(asks(&other, &key));
    pass(60.0).await;
    assert_eq!(
        fleet.server.book().reused,
        0,
        "the old token went out while its owner stood still for less than it may"
    );
    other.tokens.bearer(&key).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_consent_whose_answer_from_the_store_is_lost_brings_no_spent_token_back() {
    // TOK-029
    let (fleet, one, other, key) = world().await;
    // There and back to the provider, and to the store.
    one.process.meets(3, Fate::Break);
    let consenting = tokio::spawn({
        let (tokens, key) = (one.tokens.clone(), key.clone());
        async move { tokens.grant(&key.provider, &"alice".parse().unwrap(), proof("alice"), Vec::new()).await }
    });
    pass(0.05).await;
    let first = other.tokens.bearer(&key).await.unwrap();
    fleet.server.revoke(&first);
    let second = other.tokens.renew(&key, &first).await.unwrap();
    assert!(consenting.await.unwrap().is_ok());
    pass(5.0).await;
    assert_eq!(token(&one.tokens.renew(&key, &first).await.unwrap()), token(&second));
    fleet.server.revoke(&second);
    pass(61.0).await;
    assert!(fleet.server.accepts(&other.tokens.renew(&key, &second).await.unwrap()));
    assert_eq!(fleet.server.book().reused, 0);
}

#[tokio::test(start_paused = true)]
async fn a_disconnect_whose_answer_is_lost_is_found_out() {
    // TOK-038
    for again in [true, false] {
        let (fleet, one, _, key) = world().await;
        one.tokens.bearer(&key).await.unwrap();
        one.process.meets(1, Fate::Break);
        let error = one.tokens.disconnect(&key.provider, &key.subject).await.unwrap_err();
        assert_eq!(error.to_string(), "the store `memory` is away: its answer was lost");
        assert_eq!(fleet.row(&key).await, None);
        if again {
            assert_eq!(one.tokens.disconnect(&key.provider, &key.subject).await.unwrap(), None);
        } else {
            pass(1.0).await;
        }
        assert_eq!(one.tokens.bearer(&key).await.unwrap_err().code(), "not_connected");
    }
}

#[tokio::test(start_paused = true)]
async fn what_one_sidecar_brings_the_others_have_without_a_call() {
    // C19
    let (fleet, one, other, key) = world().await;
    let (first, same) = (one.tokens.bearer(&key).await.unwrap(), other.tokens.bearer(&key).await.unwrap());
    assert_eq!(token(&first), token(&same));
    fleet.server.revoke(&first);
    let second = one.tokens.renew(&key, &first).await.unwrap();
    pass(1.0).await;
    fleet.shared.away(true);
    assert_eq!(token(&other.tokens.bearer(&key).await.unwrap()), token(&second));
    assert_eq!(fleet.server.calls(), 2);
}
