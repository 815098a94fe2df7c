//! What a provider's answers to token requests mean for agents: their tokens, refusals that repeat nothing, a stop's wait.

use serde_json::{Value, json};
use sidebearer::drain::Drained;

use crate::world::answer::{Gate, answer, usual};
use crate::world::{Setup, World};

#[tokio::test]
async fn an_answer_without_a_token_that_can_be_sent_has_nothing_sent_and_is_not_repeated() {
    // TOK-008, TOK-009, C20
    for (answered, what) in [
        (json!({ "access_token": "canary-a b", "token_type": "Bearer" }), "access_token unusable"),
        (json!({ "access_token": "canary-a\r\nX: y", "token_type": "Bearer" }), "access_token unusable"),
        (json!({ "access_token": "canary-\u{0}", "token_type": "Bearer" }), "access_token unusable"),
        (json!({ "access_token": ["canary-a"], "token_type": "Bearer" }), "access_token unusable"),
        (json!({ "access_token": "canary-a", "token_type": "DPoP" }), "token_type not bearer"),
    ] {
        let world = World::start().await;
        world.provider_answers([answer(200).saying(answered.to_string())]);
        let reply = world.get("/me").await;
        assert_eq!((reply.status, reply.code().as_str()), (503, "fix_configuration"));
        assert_eq!(reply.json()["detail"], format!("`main` refuses the client: {what}"));
        assert_eq!((world.api.seen().len(), world.token_calls()), (0, 1));
    }
}

#[tokio::test]
async fn an_answer_without_a_token_type_is_taken_as_bearer_and_told() {
    // TOK-008
    let world = World::start().await;
    world.provider_answers([answer(200).saying(json!({ "access_token": "canary-untyped" }).to_string())]);
    world.api_answers([200]);
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.api.tokens(), ["canary-untyped"]);
    world.logs("the answer has no token_type, taken as Bearer", "WARN", 1).await;
}

#[tokio::test]
async fn a_provider_that_grants_less_than_was_asked_for_is_told_of_in_the_log_and_in_status() {
    // TOK-037
    let world =
        Setup::consenting().provider("required_scopes: [narrowed-away]").with_grants_of(&["default"]).start().await;
    let less = json!({
        "access_token": world.issued.access(77), "token_type": "Bearer", "expires_in": 3600, "scope": "read",
    });
    world.provider_answers([answer(200).saying(less.to_string())]);
    world.api_answers([200]);
    assert_eq!(world.get("/me").await.status, 200);
    world
        .logs("the provider granted less than the scopes asked for provider=main missing=\"narrowed-away\"", "WARN", 1)
        .await;
    assert_eq!(world.stored("default").await.unwrap().granted_scopes.unwrap(), ["read"]);
    let status = world.program(&["status", "--json"]).output().await.unwrap();
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status[0]["scopes"], json!(["read"]), "{status}");
}

#[tokio::test]
async fn a_refresh_token_counts_as_sent_where_tls_fails_behind_it() {
    // C14: taken back, its intent could not tell a lost rotation from a grant that ended.
    let world = Setup::new().connected(&["default"]).start().await;
    world.auth.garbles_its_answers();
    assert_eq!(world.get("/me").await.code(), "token_unavailable");
    assert_eq!(world.token_calls(), 1);
    assert!(world.stored("default").await.unwrap().intent.is_some());
}

#[tokio::test]
async fn a_stop_during_a_hundred_requests_and_a_renewal_loses_none() {
    // TOK-044, C11
    let mut world = Setup::new().connected(&["default"]).start().await;
    assert_eq!(world.get("/me").await.status, 200);
    world.issued.revoke();
    let gate = Gate::shut();
    world.provider_answers([usual().once(&gate)]);
    let mut agents = Vec::new();
    for _ in 0..100 {
        let mut agent = world.api_connection().await;
        agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
        agents.push(agent);
    }
    world.api.has_seen(101).await;
    world.auth.until(|seen| seen.len() == 2).await;
    world.begins_to_stop();
    gate.open();
    for agent in &mut agents {
        assert_eq!(agent.hears().await.status, 200);
    }
    drop(agents);
    assert_eq!(world.ends().await, Drained::Clean);
    assert_eq!(world.token_calls(), 2);
    let stored = world.stored("default").await.unwrap().refresh_token.unwrap();
    assert_eq!(stored.expose(), world.issued.refresh(1002));
}
