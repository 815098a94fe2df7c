//! A request whose user has not connected: what its agent is told, what waits, and who else is told.

use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::future::join_all;
use http::Request;
use serde_json::json;
use sidebearer::drain::Drained;

use crate::world::answer::{Filler, Gate, answer};
use crate::world::server::Server;
use crate::world::{Setup, World, secret_of, soon};

fn link(world: &World) -> String {
    format!("http://{}/connect/main?user=default", world.admin)
}

#[tokio::test]
async fn an_agent_is_told_to_hand_a_link_to_its_user() {
    // C18
    let world = Setup::consenting().start().await;
    let reply = world.get("/me").await;
    let url = link(&world);
    assert_eq!(reply.header("content-type"), Some("application/problem+json"));
    assert_eq!(
        (reply.status, reply.json()),
        (
            403,
            json!({
                "type": "urn:sidebearer:not_connected",
                "title": "Forbidden",
                "status": 403,
                "code": "not_connected",
                "detail": format!(
                    "`default` has not connected `main`, so the request was not sent. Ask the user to open {url} in a \
                     browser and to grant access there; then send the same request again."
                ),
                "hint": format!("open {url}"),
                "connect_url": url,
            })
        )
    );
    assert_eq!((world.api.seen().len(), world.auth.seen().len()), (0, 0));
    // The link is one that opens.
    let mut browser = world.browser();
    let asked = browser.goes_to_the_provider(&url).await;
    browser.comes_back(&world.issued.says_yes(&asked)).await;
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn a_grant_that_has_ended_leads_to_the_same_link() {
    // C15, C18, TOK-017
    let world = Setup::consenting().with_grants_of(&["default"]).start().await;
    world.issued.forget_grants();
    for _ in 0..3 {
        let reply = world.get("/me").await;
        let (url, problem) = (link(&world), reply.json());
        assert_eq!(
            (reply.status, &problem["code"], &problem["connect_url"]),
            (403, &json!("reauthorize"), &json!(url))
        );
        let detail = format!(
            "`main` no longer honours the grant of `default`: invalid_grant, so the request was not sent. Ask the user to \
             open {url} in a browser and to grant access there; then send the same request again."
        );
        assert_eq!((&problem["detail"], &problem["hint"]), (&json!(detail), &json!(format!("open {url}"))));
    }
    assert_eq!((world.token_calls(), world.api.seen().len()), (1, 0));
    world.connects("default").await;
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn a_grpc_agent_reads_the_link_in_its_status() {
    // C18, RTY-029
    let world = Setup::consenting().start().await;
    let reply = world.call("POST", "/pkg.S/Call").with("content-type", "application/grpc").over_h2().send().await;
    let url = link(&world);
    let said = format!(
        "not_connected: `default` has not connected `main`, so the request was not sent. Ask the user to open {url} in a \
         browser and to grant access there; then send the same request again. (open {url})"
    );
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/grpc")));
    assert_eq!((reply.header("grpc-status"), reply.header("grpc-message")), (Some("16"), Some(said.as_str())));
    assert!(reply.ended_with_its_head);
}

#[tokio::test]
async fn where_nobody_consents_there_is_no_link() {
    // C18
    let world = Setup::new().connected(&[]).start().await;
    let problem = world.get("/me").await.json();
    assert_eq!(
        (&problem["code"], problem.get("connect_url")),
        (&json!("not_connected"), None),
        "nobody consents there"
    );
    assert!(world.missing_told().is_empty());
}

#[tokio::test]
async fn a_waiting_request_goes_on_when_its_user_has_connected() {
    let world = Setup::consenting().provider("on_missing: {wait: 120s}").start().await;
    let consent = async {
        let told = world.says_who_is_missing(1).await;
        assert_eq!(told[0].connect_url, link(&world));
        assert_eq!(told[0].wait, Some(std::time::Duration::from_secs(120)));
        world.connects("default").await;
    };
    let body = Filler::text("hello");
    let (reply, ()) = tokio::join!(world.call("POST", "/me").body(body.clone()).send(), consent);
    assert_eq!((reply.status, world.api.seen()[0].sha256.clone()), (200, body.sha256()));
    assert_eq!(world.api.seen().len(), 1);
}

#[tokio::test]
async fn a_waiting_request_goes_on_when_another_process_has_stored_the_grant() {
    let world = Setup::consenting().provider("on_missing: {wait: 120s}").start().await;
    let elsewhere = async {
        world.says_who_is_missing(1).await;
        world.connects_elsewhere("default").await;
    };
    let (reply, ()) = tokio::join!(world.get("/me"), elsewhere);
    assert_eq!((reply.status, world.issued.owners(&world.api.tokens())), (200, vec!["default".to_owned()]));
}

#[tokio::test]
async fn another_user_s_consent_frees_nobody() {
    // RTY-034
    let world = Setup::consenting().provider("on_missing: {wait: 300ms}").start().await;
    let consent = async {
        world.says_who_is_missing(1).await;
        world.connects("somebody-else").await;
    };
    let (reply, ()) = tokio::join!(world.get("/me"), consent);
    assert_eq!((reply.code(), world.api.seen().len()), ("not_connected".to_owned(), 0));
}

#[tokio::test]
async fn twenty_that_wait_in_vain_are_told_so_and_their_user_once() {
    let hook = Server::start(None, Box::new(|_| answer(200))).await;
    let on_missing = format!("on_missing: {{wait: 500ms, webhook: 'http://{}/told'}}", hook.address());
    let world = Arc::new(Setup::consenting().provider(&on_missing).start().await);
    let started = std::time::Instant::now();
    let replies = join_all((0..20).map(|_| world.get("/me"))).await;
    assert!(started.elapsed() >= std::time::Duration::from_millis(500), "nothing waited");
    for reply in replies {
        assert_eq!((reply.status, reply.json()["connect_url"].as_str()), (403, Some(link(&world).as_str())));
    }
    hook.has_seen(1).await;
    let told: Vec<serde_json::Value> =
        hook.seen().iter().map(|seen| serde_json::from_slice(&seen.body).unwrap()).collect();
    let message = json!({
        "event": "not_connected",
        "provider": "main",
        "title": "Main",
        "user": "default",
        "connect_url": link(&world),
        "waits_s": 0,
    });
    assert_eq!((told, world.missing_told().len()), (vec![message], 1));
    assert_eq!(hook.seen()[0].header("content-type"), Some("application/json"));
    // The next request is no news.
    world.get("/me").await;
    assert_eq!(world.missing_told().len(), 1);
}

#[tokio::test]
async fn whoever_connects_and_leaves_is_missed_anew() {
    let world = Setup::consenting().provider("on_missing: {wait: 120s}").start().await;
    for times in [1, 2] {
        let consent = async {
            world.says_who_is_missing(times).await;
            world.connects("default").await;
        };
        let (reply, ()) = tokio::join!(world.get("/me"), consent);
        assert_eq!(reply.status, 200);
        world.asks("DELETE", "/v1/connections/main/default", &[], "").await;
    }
}

#[tokio::test]
async fn a_command_is_run_with_the_link_as_its_last_word_and_no_shell_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("words");
    let script = r#"printf "%s\n" "$#" "$@" > "$0.new"; mv "$0.new" "$0""#;
    let command = format!("on_missing:\n  command: [sh, -c, '{script}', '{}', first]", out.display());
    let world = Setup::consenting().provider(&command).acting_for("o'hara $(id)").start().await;
    assert_eq!(world.get("/me").await.code(), "not_connected");
    let written = soon(async {
        loop {
            match std::fs::read_to_string(&out) {
                Ok(written) => return written,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            }
        }
    });
    let url = format!("http://{}/connect/main?user=o%27hara+%24%28id%29", world.admin);
    assert_eq!(written.await, format!("2\nfirst\n{url}\n"));
}

#[tokio::test]
async fn of_many_who_are_missing_a_few_are_told_at_once() {
    // OAU-019
    let gate = Gate::shut();
    let hook = Server::start(None, Box::new(|_| answer(200))).await;
    hook.answers((0..20).map(|_| answer(200).once(&gate)));
    let agents = "agents: [{name: one, secret: '${ONE_SECRET}', users: ['*']}]";
    let on_missing = format!("on_missing: {{webhook: 'http://{}/told'}}", hook.address());
    let world = Setup::consenting().provider(&on_missing).top(agents).start().await;
    for n in 0..20 {
        let pair = BASE64_STANDARD.encode(format!("user-{n}:{}", secret_of("one")));
        let line = format!("Proxy-Authorization: Basic {pair}\r\n");
        let tunnel = world.tunnel_with("api.test:443", &line).await;
        let mut agent = tunnel.tls("api.test", &["http/1.1"]).await.unwrap();
        agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
        assert_eq!(agent.hears().await.code(), "not_connected");
    }
    world.says_who_is_missing(20).await;
    hook.has_seen(8).await;
    // A ninth would be here by now.
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert_eq!(hook.seen().len(), 8);
    gate.open();
    hook.has_seen(20).await;
}

#[tokio::test]
async fn a_webhook_that_fails_harms_no_request() {
    let on_missing = "on_missing: {webhook: 'http://127.0.0.1:1/told', command: [/no/such/program]}";
    let world = Setup::consenting().provider(on_missing).start().await;
    assert_eq!(world.get("/me").await.code(), "not_connected");
    world.connects("default").await;
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn a_stop_does_not_wait_for_the_user() {
    // TOK-044
    let mut world = Setup::consenting().provider("on_missing: {wait: 10m}").start().await;
    let mut agent = world.api_connection().await;
    agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    world.says_who_is_missing(1).await;
    agent.hears_nothing_yet().await;
    world.begins_to_stop();
    let reply = agent.hears().await;
    assert_eq!((reply.status, reply.code()), (403, "not_connected".to_owned()));
    assert_eq!(agent.hears_to_the_end().await, "");
    assert_eq!(world.ends().await, Drained::Clean);
}

#[tokio::test]
async fn a_waiting_request_whose_agent_hangs_up_is_not_waited_for() {
    let world = Setup::consenting().provider("on_missing: {wait: 10m}").start().await;
    let mut agent = world.api_connection().await;
    agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    world.says_who_is_missing(1).await;
    let waits = |page: &str| page.contains("/connect/main?user=default\"") && page.contains("UTC");
    assert!(waits(world.asks("GET", "/", &[], "").await.text()), "the dashboard shows who waits");
    drop(agent);
    soon(async { while waits(world.asks("GET", "/", &[], "").await.text()) {} }).await;
}

#[tokio::test]
async fn an_answer_that_wants_more_scopes_leads_to_where_they_are_granted() {
    // RTY-019, OAU-016
    let world = Setup::consenting().start().await;
    world.connects("default").await;
    let challenge = r#"Bearer error="insufficient_scope", scope="admin read""#;
    let wants_more = || answer(403).with("www-authenticate", challenge).saying("not yours\n");
    world.api_answers([wants_more().with("sidebearer-connect-url", "https://evil.test/phish")]);
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.text()), (403, "not yours\n"));
    assert_eq!(reply.header("www-authenticate"), Some(challenge));
    let links: Vec<_> = reply.headers.get_all("sidebearer-connect-url").iter().collect();
    let expected = format!("http://{}/connect/main?user=default&scope=admin", world.admin);
    assert_eq!(links, [expected.as_str()]);
    assert_eq!(world.token_calls(), 1, "a new token would not change it");

    let mut browser = world.browser();
    let asked = browser.goes_to_the_provider(&expected).await;
    let scopes = asked.query_pairs().find(|(name, _)| name == "scope").unwrap().1.into_owned();
    assert_eq!(scopes, "admin read write");
    browser.comes_back(&world.issued.says_yes(&asked)).await;
    assert_eq!(world.stored("default").await.unwrap().further_scopes, ["admin"]);

    // The next step up asks for those of the last one, too; and so does a renewal.
    let more = r#"Bearer error="insufficient_scope", scope="billing""#;
    world.api_answers([answer(403).with("www-authenticate", more)]);
    let link = world.get("/me").await.header("sidebearer-connect-url").unwrap().to_owned();
    let asked = world.browser().goes_to_the_provider(&link).await;
    let scopes = asked.query_pairs().find(|(name, _)| name == "scope").unwrap().1.into_owned();
    assert_eq!(scopes, "admin billing read write");
    world.api_answers([401]);
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.token_requests().pop().unwrap()["scope"], "admin read write");
}

#[tokio::test]
async fn a_grant_that_dies_at_a_401_leads_to_where_it_is_granted_again() {
    // RTY-003, C18
    let world = Setup::consenting().start().await;
    world.connects("default").await;
    assert_eq!(world.get("/me").await.header("sidebearer-connect-url"), None);
    world.issued.forget_grants();
    world.issued.revoke();
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.text()), (401, "scripted 401\n"));
    assert_eq!(reply.header("sidebearer-connect-url"), Some(link(&world).as_str()));
}

#[tokio::test]
async fn an_upstream_cannot_send_a_user_to_a_link_of_its_own() {
    for setup in [Setup::consenting().with_grants_of(&["default"]), Setup::new()] {
        let world = setup.start().await;
        let url = "https://evil.test/phish";
        let challenge = r#"Bearer error="insufficient_scope""#;
        world.api_answers([200, 403, 404].map(|status| answer(status).with("sidebearer-connect-url", url)));
        for _ in 0..3 {
            assert_eq!(world.get("/me").await.header("sidebearer-connect-url"), None);
        }
        let forbidden = answer(403).with("www-authenticate", challenge).with("sidebearer-connect-url", url);
        world.api_answers([forbidden]);
        assert_ne!(world.get("/me").await.header("sidebearer-connect-url"), Some(url));
    }
}

#[tokio::test]
async fn a_waiting_request_is_sent_only_as_the_configuration_of_the_moment_says() {
    // TOK-045, LST-009
    let agents = "drain: 5s\nagents: [{name: a, users: [u], secret: '${RESEARCHER_SECRET}'}]";
    let changes = [
        ("drain: 5s", "drain: 6s", (200, "")),
        ("    provider: main", "    deny: true", (503, "configuration_changed")),
        ("scopes: [read, write]", "scopes: [read]", (503, "configuration_changed")),
        ("drain: 5s", agents, (403, "no_longer_admitted")),
    ];
    for (old, new, told) in changes {
        let mut world = Setup::consenting().provider("on_missing: {wait: 120s}").start().await;
        let h2 = world.api_h2().await.http2().await;
        let request = Request::get("https://api.test/me").body(Filler::text("")).unwrap();
        let waiting = tokio::spawn(async move { h2.send(request).await.unwrap() });
        world.says_who_is_missing(1).await;
        world.reloads(&[(old, new)]).await;
        if told.0 == 200 {
            world.connects("default").await;
        }
        let reply = soon(waiting).await.unwrap();
        let code = if reply.status == 200 { String::new() } else { reply.code() };
        assert_eq!((reply.status, code.as_str()), told);
        assert_eq!(world.api.seen().len(), usize::from(told.0 == 200));
    }
}
