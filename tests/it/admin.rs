//! The admin listener as programs use it: who is connected, who is to connect, who goes.

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::answer::{Answer, Gate, usual};
use crate::world::provider::json_answer;
use crate::world::{Setup, World, admin_token, soon};

const JSON: (&str, &str) = ("content-type", "application/json");

async fn start(world: &World, body: &str) -> (u16, Value) {
    let reply = world.asks("POST", "/v1/connections", &[JSON], body).await;
    (reply.status, reply.json())
}

async fn leave(world: &World, of: &str) -> (u16, Value) {
    let reply = world.asks("DELETE", &format!("/v1/connections/{of}"), &[], "").await;
    (reply.status, reply.json())
}

/// The list, without its times, which are told apart.
async fn list(world: &World) -> (Vec<Value>, Vec<Option<OffsetDateTime>>) {
    let reply = world.asks("GET", "/v1/connections", &[], "").await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    let mut all = reply.json()["connections"].as_array().unwrap().clone();
    let mut times = Vec::new();
    for one in &mut all {
        for name in ["renewed_at", "expires_at"] {
            let time = one.as_object_mut().unwrap().remove(name).expect(name);
            times.push(time.as_str().map(|time| OffsetDateTime::parse(time, &Rfc3339).unwrap()));
        }
    }
    (all, times)
}

#[tokio::test]
async fn the_list_says_who_is_connected_and_how_to_connect() {
    let world = Setup::consenting().and_another_provider().start().await;
    let url = |path: &str| format!("http://{}/connect/{path}", world.admin);
    let nobody = |provider: &str, title: &str| {
        json!({
            "provider": provider, "title": title, "user": "default", "state": "not_connected", "reason": null,
            "scopes": [], "connect_url": url(&format!("{provider}?user=default")),
        })
    };
    assert_eq!(list(&world).await, (vec![nobody("main", "Main"), nobody("other", "Other")], vec![None; 4]));
    world.connects("ada&x=y").await;
    let ada = json!({
        "provider": "main", "title": "Main", "user": "ada&x=y", "state": "connected", "reason": null,
        "scopes": ["read", "write"], "connect_url": url("main?user=ada%26x%3Dy"),
    });
    let (all, times) = list(&world).await;
    assert_eq!(all, [ada, nobody("other", "Other")]);
    assert_eq!(times[1].unwrap() - times[0].unwrap(), time::Duration::hours(1));
}

#[tokio::test]
async fn a_client_of_its_own_has_nobody_to_connect() {
    let (all, _) = list(&World::start().await).await;
    let client = json!({
        "provider": "main", "title": "main", "user": null, "state": "on_demand", "reason": null, "scopes": [],
        "connect_url": null,
    });
    assert_eq!(all, [client]);
}

#[tokio::test]
async fn a_grant_that_has_ended_is_listed_with_its_reason() {
    let world = Setup::consenting().with_grants_of(&["default"]).start().await;
    world.issued.forget_grants();
    world.get("/me").await;
    let (all, _) = list(&world).await;
    assert_eq!((&all[0]["state"], &all[0]["reason"]), (&json!("reauthorize"), &json!("invalid_grant")));
}

#[tokio::test]
async fn a_program_gets_a_link_for_its_user() {
    let world = Setup::consenting().top("return_to: [https://app.test/settings/]").start().await;
    let body = r#"{"provider": "main", "user": "ada", "scopes": ["admin"], "return_to": "https://app.test/settings/"}"#;
    let query = "user=ada&scope=admin&return_to=https%3A%2F%2Fapp.test%2Fsettings%2F";
    let url = format!("http://{}/connect/main?{query}", world.admin);
    assert_eq!(start(&world, body).await, (201, json!({ "connect_url": url, "expires_at": null })));
    let mut browser = world.browser();
    let asked = browser.goes_to_the_provider(&url).await;
    assert_eq!(browser.comes_back(&world.issued.says_yes(&asked)).await.reply.status, 303);
    let row = world.stored("ada").await.unwrap();
    assert_eq!(row.further_scopes, ["admin"]);
}

#[tokio::test]
async fn what_is_wrong_with_a_wish_is_told_before_a_link_is_given_out() {
    let world = Setup::consenting().start().await;
    for (body, status, code) in [
        (r#"{"provider": "nope"}"#, 404, "unknown_provider"),
        (r#"{"provider": "main", "user": "a\u0000b"}"#, 400, "bad_user"),
        (r#"{"provider": "main", "scopes": ["a b"]}"#, 400, "bad_scope"),
        (r#"{"provider": "main", "scopes": [""]}"#, 400, "bad_scope"),
        (r#"{"provider": "main", "return_to": "https://evil.test/"}"#, 400, "return_to_not_allowed"),
        (r#"{"provider": "main", "returnTo": "x"}"#, 400, "bad_request"),
        (r#"{"user": "ada"}"#, 400, "bad_request"),
        (r#"["main"]"#, 400, "bad_request"),
        ("{", 400, "bad_request"),
        ("", 400, "bad_request"),
    ] {
        let (said, problem) = start(&world, body).await;
        assert_eq!((said, problem["code"].as_str()), (status, Some(code)), "{body}");
        assert_eq!(problem["type"], format!("urn:sidebearer:{code}"));
    }
    let (_, problem) = start(&world, r#"{"provider": "nope"}"#).await;
    let expected = json!({
        "type": "urn:sidebearer:unknown_provider",
        "title": "Not Found",
        "status": 404,
        "code": "unknown_provider",
        "detail": "no provider named `nope` has users consent",
        "hint": "providers with `authorization_code:` in `proxy.yaml` can be connected",
    });
    assert_eq!(problem, expected);
}

#[tokio::test]
async fn a_body_that_a_form_of_another_site_could_send_is_refused() {
    // LST-021
    let world = Setup::consenting().start().await;
    let body = r#"{"provider": "main"}"#;
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", ""] {
        let reply = world.asks("POST", "/v1/connections", &[("content-type", kind)], body).await;
        assert_eq!((reply.status, reply.code()), (415, "not_json".to_owned()), "{kind}");
    }
    assert_eq!(world.asks("POST", "/v1/connections", &[], body).await.code(), "not_json");
    let kind = ("content-type", "application/json; charset=utf-8");
    assert_eq!(world.asks("POST", "/v1/connections", &[kind], body).await.status, 201);
    for foreign in [("origin", "https://evil.test"), ("sec-fetch-site", "cross-site"), ("origin", "null")] {
        let reply = world.asks("POST", "/v1/connections", &[JSON, foreign], body).await;
        assert_eq!(reply.status, 403, "{foreign:?}");
        let reply = world.asks("DELETE", "/v1/connections/main/default", &[foreign], "").await;
        assert_eq!(reply.status, 403, "{foreign:?}");
    }
}

#[tokio::test]
async fn a_user_who_is_disconnected_is_forgotten_here_and_at_the_provider() {
    let world = Setup::consenting().start().await;
    world.connects("default").await;
    assert_eq!(world.get("/me").await.status, 200);
    let refresh_token = world.stored("default").await.unwrap().refresh_token.unwrap().expose().to_owned();
    let gone = json!({ "disconnected": true, "revoked": true, "why": null });
    assert_eq!(leave(&world, "main/default").await, (200, gone));
    assert_eq!(world.given_back(), [refresh_token]);
    assert_eq!((world.get("/me").await.code(), world.api.seen().len()), ("not_connected".to_owned(), 1));
    assert_eq!(world.stored("default").await, None);
    let none = json!({
        "type": "urn:sidebearer:not_connected", "title": "Not Found", "status": 404, "code": "not_connected",
        "detail": "there is no such connection", "hint": "`GET /v1/connections` lists them",
    });
    for of in ["main/default", "main/nobody", "nope/default", "main/%00"] {
        assert_eq!(leave(&world, of).await, (404, none.clone()), "{of}");
    }
    // To connect again is possible.
    world.connects("default").await;
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn only_the_user_who_is_named_is_disconnected() {
    // RTY-034, TOK-042
    let users = ["a/b", "a", "b", "a%2Fb"];
    let world = Setup::consenting().with_grants_of(&users).start().await;
    assert_eq!(leave(&world, "main/a%2Fb").await.0, 200);
    let mut left = Vec::new();
    for user in users {
        left.push(world.stored(user).await.is_some());
    }
    assert_eq!(left, [false, true, true, true]);
}

#[tokio::test]
async fn a_provider_that_does_not_take_a_token_back_is_told_of() {
    // TOK-038
    let at = "https://auth.test/settings";
    let by_hand = format!("; take the access back at {at}");
    for (answer, why) in [
        (Answer::from(503), "it could not be revoked at the provider: its revocation endpoint answered 503"),
        (Answer::from(400), "it could not be revoked at the provider: its revocation endpoint answered 400"),
    ] {
        let setup = Setup::consenting().provider(&format!("manage_url: {at}"));
        let world = setup.with_grants_of(&["default"]).start().await;
        world.provider_answers([answer]);
        let gone = json!({ "disconnected": true, "revoked": false, "why": format!("{why}{by_hand}") });
        assert_eq!(leave(&world, "main/default").await, (200, gone));
        assert_eq!(world.get("/me").await.code(), "not_connected");
    }
    let world = Setup::new().connected(&["default"]).start().await;
    let why = "the provider offers no way to revoke it from here";
    let gone = json!({ "disconnected": true, "revoked": false, "why": why });
    assert_eq!(leave(&world, "main/default").await, (200, gone));
}

#[tokio::test]
async fn what_a_renewal_brings_after_a_disconnect_is_given_back_and_not_kept() {
    // TOK-038
    let world = Setup::consenting().with_grants_of(&["default"]).start().await;
    assert_eq!(world.get("/me").await.status, 200);
    let held = world.stored("default").await.unwrap().refresh_token.unwrap().expose().to_owned();
    let (gate, late) = (Gate::shut(), world.issued.refresh(77));
    let renewed = json!({ "access_token": world.issued.access(77), "token_type": "Bearer", "refresh_token": late });
    world.provider_answers([json_answer(&renewed).once(&gate)]);
    world.api_answers([401]);
    let calls = world.auth.seen().len();
    let disconnect = async {
        world.auth.has_seen(calls + 1).await;
        let gone = json!({ "disconnected": true, "revoked": true, "why": null });
        assert_eq!(leave(&world, "main/default").await, (200, gone));
        gate.open();
    };
    let (reply, ()) = tokio::join!(world.get("/me"), disconnect);
    assert_eq!(reply.status, 401, "the first answer");
    world.auth.has_seen(calls + 3).await;
    assert_eq!(world.given_back(), [held, late]);
    assert_eq!(world.stored("default").await, None);
    assert_eq!(world.get("/me").await.code(), "not_connected");
    assert_eq!(world.api.tokens(), vec![world.issued.access(1); 2]);
}

#[tokio::test]
async fn a_disconnect_by_another_process_is_noticed() {
    let world = Setup::consenting().start().await;
    world.connects("default").await;
    assert_eq!(world.get("/me").await.status, 200);
    let store = world.store_elsewhere().await;
    store.remove(&crate::world::main(), &crate::world::subject("default")).await.unwrap();
    crate::world::soon(async { while world.get("/me").await.status == 200 {} }).await;
    assert_eq!(world.get("/me").await.code(), "not_connected");
}

fn bearer() -> String {
    format!("Bearer {}", admin_token())
}

#[tokio::test]
async fn with_an_admin_token_nothing_is_told_or_changed_without_it() {
    // LST-021
    let setup = Setup::consenting().top("admin_token: ${ADMIN_TOKEN}").with_grants_of(&["default"]);
    let world = setup.start().await;
    let body = r#"{"provider": "main"}"#;
    for (method, path) in [
        ("GET", "/"),
        ("GET", "/events"),
        ("GET", "/connect/main"),
        ("GET", "/connect/main?user=default"),
        ("GET", "/v1/connections"),
        ("POST", "/v1/connections"),
        ("DELETE", "/v1/connections/main/default"),
        ("GET", "//v1/connections"),
        ("GET", "/callback/../v1/connections"),
        ("GET", "/callback/%2e%2e/v1/connections"),
        ("GET", "/v1/connections?ticket=x"),
    ] {
        let reply = world.asks(method, path, &[JSON], body).await;
        assert!([401, 404].contains(&reply.status), "{method} {path}: {}", reply.status);
        assert!(!reply.text().contains("connect_url"), "{}", reply.text());
    }
    assert!(world.stored("default").await.is_some());
    let authorization = bearer();
    let fields = [JSON, ("authorization", authorization.as_str())];
    assert_eq!(world.asks("GET", "/v1/connections", &fields, "").await.status, 200);
    assert_eq!(world.asks("POST", "/v1/connections", &fields, body).await.status, 201);
    assert_eq!(world.asks("DELETE", "/v1/connections/main/default", &fields, "").await.status, 200);
}

#[tokio::test]
async fn a_ticket_lets_its_user_in_and_nobody_else() {
    // LST-021, OAU-002
    let setup = Setup::consenting().top("admin_token: ${ADMIN_TOKEN}").and_another_provider();
    let world = setup.acting_for("alice").start().await;
    let link = world.get("/me").await.json()["connect_url"].as_str().unwrap().to_owned();
    let ticket = link.split_once("/connect/main?ticket=").expect("a link with a ticket").1.to_owned();
    assert!(!link.contains("alice"), "{link}");

    let mut browser = world.browser();
    let shut = |page: crate::world::browser::Page| (page.reply.status, page.heading());
    let not_good = (403, "This link is not good any more".to_owned());
    let changed = format!("{}{}", &ticket[..ticket.len() - 2], if ticket.ends_with("AA") { "BB" } else { "AA" });
    for wrong in [&changed, &ticket[1..], "", "x"] {
        assert_eq!(shut(browser.opens(&format!("/connect/main?ticket={wrong}")).await), not_good, "{wrong}");
    }
    assert_eq!(shut(browser.opens(&format!("/connect/other?ticket={ticket}")).await), not_good);
    world.clock.skew_wall(3_601_000);
    assert_eq!(shut(browser.opens(&link).await), not_good, "an hour later");
    world.clock.skew_wall(0);

    // The ticket says for whom it is, whatever stands beside it.
    let page = browser.opens(&format!("{link}&user=mallory&scope=admin")).await;
    let mut form = page.form();
    form.iter_mut().for_each(|(name, value)| match name.as_str() {
        "user" => *value = "mallory".into(),
        "scope" => *value = "admin".into(),
        _ => {}
    });
    let asked = browser.sends(&page.action(), &form).await.leads_to();
    assert!(asked.as_str().contains("scope=read+write&"), "{asked}");
    assert_eq!(browser.comes_back(&world.issued.says_yes(&asked)).await.heading(), "Main is connected");
    assert_eq!((world.stored("mallory").await, world.get("/me").await.status), (None, 200));

    // Without it, the form needs the token.
    let without: Vec<_> = form.iter().filter(|(name, _)| name != "ticket").cloned().collect();
    assert_eq!(browser.sends("/connect/main", &without).await.reply.status, 401);
    assert_eq!(browser.opens("/").await.reply.status, 401);
}

#[tokio::test]
async fn nobody_comes_through_the_proxy_to_the_admin_listener() {
    // LST-007
    let world = Setup::consenting().start().await;
    let port = world.admin.port();
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
        let mut agent = world.connection().await;
        agent.says(format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n")).await;
        let reply = agent.hears().await;
        assert_eq!((reply.status, reply.code()), (508, "proxy_loop_detected".to_owned()), "{host}");
        let mut agent = world.connection().await;
        let line = format!("GET http://{host}:{port}/v1/connections HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n");
        agent.says(line).await;
        let reply = agent.hears().await;
        assert_eq!((reply.status, reply.code()), (508, "proxy_loop_detected".to_owned()), "{host}");
    }
}

#[tokio::test]
async fn a_renewal_shows_in_the_list() {
    let world = Setup::consenting().start().await;
    world.connects("default").await;
    world.api_answers([Answer::from(401), usual()]);
    assert_eq!(world.get("/me").await.status, 200);
    let (all, times) = list(&world).await;
    assert_eq!((all[0]["state"].as_str(), all[0]["scopes"].clone()), (Some("connected"), json!(["read", "write"])));
    assert!(times.iter().all(Option::is_some), "{times:?}");
}

#[tokio::test]
async fn a_browser_that_does_not_finish_its_head_is_not_waited_for() {
    // LST-016
    let world = Setup::new().top("limits: {head_timeout: 500ms}").start().await;
    for begun in ["", "GET / HTTP/1.1\r\nHost: "] {
        let mut browser = soon(TcpStream::connect(world.admin)).await.unwrap();
        soon(browser.write_all(begun.as_bytes())).await.unwrap();
        let mut heard = Vec::new();
        let _ = soon(browser.read_to_end(&mut heard)).await;
        assert!(!String::from_utf8_lossy(&heard).contains(" 200 "), "{begun:?}");
    }
    assert_eq!(world.asks("GET", "/v1/connections", &[], "").await.status, 200);
}

#[tokio::test]
async fn readiness_tells_what_is_wrong_and_stays_ready() {
    // TOK-014
    let world = Setup::consenting().start().await;
    let ready = async || {
        let reply = world.asks("GET", "/readyz", &[], "").await;
        (reply.status, reply.json())
    };
    assert_eq!(ready().await, (200, json!({ "status": "ok", "troubles": [] })));
    world.sql("ALTER TABLE meta RENAME TO gone");
    let (status, told) = ready().await;
    assert_eq!((status, &told["status"], &told["troubles"][0]["code"]), (200, &json!("degraded"), &json!("store_io")));
    world.sql("ALTER TABLE gone RENAME TO meta");
    assert_eq!(ready().await.1["status"], "ok");
}
