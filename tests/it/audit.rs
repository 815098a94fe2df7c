//! The audit trail: every use of a token has its line, and a required one has it before the token is sent.

use serde_json::Value;
use sidebearer::drain::Drained;

use crate::world::answer::{Gate, answer};
use crate::world::program::Home;
use crate::world::server::raw;
use crate::world::{Setup, To, World};

/// The lines, once the world has ended: field by field, as one text each.
pub(crate) async fn ended(mut world: World, fields: &[&str]) -> Vec<String> {
    world.begins_to_stop();
    assert_eq!(world.ends().await, Drained::Clean);
    told(&world, fields)
}

fn told(world: &World, fields: &[&str]) -> Vec<String> {
    let text = std::fs::read_to_string(world.folder.path().join("audit")).unwrap();
    assert!(!text.contains("secret") && !text.contains('?'), "{text}");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let shown = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    lines.map(|line| fields.iter().map(|field| shown(&line[field])).collect::<Vec<_>>().join(" ")).collect()
}

fn audited() -> Setup {
    Setup::new().top("audit: {file: 'FOLDER/audit'}")
}

#[tokio::test]
async fn each_token_that_was_sent_has_a_line_and_a_second_try_has_its_own() {
    let world = audited().resolve("gone.api.test:443", To::Nobody).start().await;
    world.api_answers([answer(401), answer(204)]);
    world.get("/me?q=secret").await;
    world.get("/you").await;
    let tunnelled = world.call("GET", "/").to("evil.test").send().await;
    assert_eq!(tunnelled.status, 200);
    let lines = ended(
        world,
        &[
            "seq",
            "request",
            "try",
            "user",
            "provider",
            "credential",
            "route",
            "method",
            "host",
            "path",
            "status",
            "outcome",
            "generation",
        ],
    )
    .await;
    let common = "default main client routes[0] api.test GET api.test:443";
    assert_eq!(
        lines,
        [
            format!("1 1 1 {common} /me 401 answered 1"),
            format!("2 1 2 {common} /me 204 answered 2"),
            format!("3 2 1 {common} /you 200 answered 2"),
        ]
    );
}

#[tokio::test]
async fn who_hangs_up_leaves_a_line_and_an_upstream_that_cannot_be_reached_leaves_none() {
    let world = audited()
        .routes("- {host: api.test, provider: main}\n- {host: nobody.test, provider: main}")
        .resolve("nobody.test:443", To::Nobody)
        .start()
        .await;
    let gate = Gate::shut();
    world.api_answers([answer(200).once(&gate)]);
    let mut connection = world.api_connection().await;
    connection.says("GET /slow HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    world.api.has_seen(1).await;
    drop(connection);
    assert_eq!(world.call("GET", "/").to("nobody.test").send().await.code(), "connection_refused");
    let lines = ended(world, &["path", "status", "outcome"]).await;
    assert_eq!(lines, ["/slow null agent_gone"]);
}

#[tokio::test]
async fn a_required_trail_says_it_before_the_token_is_sent_and_when_it_was() {
    let world = Setup::new().top("audit: {file: 'FOLDER/audit', required: true}").start().await;
    world.api_answers([answer(401), answer(200)]);
    world.get("/me").await;
    let lines = ended(world, &["event", "try", "path", "status"]).await;
    assert_eq!(lines, ["intent 1 /me null", "use 1 /me 401", "intent 2 /me null", "use 2 /me 200"]);
}

#[tokio::test]
async fn a_token_was_sent_also_where_tls_fails_behind_the_request() {
    for protocol in ["http/1.1", "h2"] {
        let top = "audit: {file: 'FOLDER/audit', required: true}";
        let world = Setup::new().api_speaks(&[protocol]).top(top).start().await;
        world.api.garbles_its_answers();
        let reply = world.call("POST", "/me").send().await;
        assert_eq!((reply.status, reply.code().as_str()), (502, "http_protocol_error"), "{}", reply.text());
        assert_eq!(world.api.seen().len(), 1);
        let lines = ended(world, &["event", "path", "sent", "outcome"]).await;
        assert_eq!(lines, ["intent /me null null", "use /me true http_protocol_error"], "{protocol}");
    }
}

#[tokio::test]
async fn without_room_for_a_required_trail_no_token_is_sent_and_with_it_again_it_is() {
    let world = Setup::new().top("audit: {file: /dev/full, required: true}").start().await;
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.code().as_str()), (503, "audit_unavailable"));
    assert_eq!(world.api.seen().len(), 0);
    assert_eq!(world.request_told().code, Some("audit_unavailable"));
    let open = world.call("GET", "/").to("evil.test").send().await;
    assert_eq!(open.status, 200, "what needs no token goes on");
}

#[tokio::test]
async fn without_room_for_another_trail_requests_go_on() {
    let world = Setup::new().top("audit: {file: /dev/full}").start().await;
    assert_eq!(world.get("/me").await.status, 200);
    world.logs("the audit trail cannot be written", "ERROR", 1).await;
}

#[tokio::test]
async fn a_trail_without_its_folder_does_not_start() {
    let home = Home::with("audit: {file: nowhere/audit}\nlisten: 127.0.0.1:0\nadmin: off\nhealth: off\n");
    let ended = home.run(["run"]).await;
    assert_eq!(ended.code, 1);
    let said = "error: audit.file: cannot open nowhere/audit: No such file or directory (os error 2)\n\
                hint: make its folder, or change `audit.file`: the file is made, its folder is not\n";
    assert!(ended.stderr.ends_with(said), "{}", ended.stderr);
}

#[tokio::test]
async fn a_websocket_is_a_use_when_it_opens_and_a_refused_one_was_a_use_too() {
    const ASKED: &str =
        "GET /live?q=secret HTTP/1.1\r\nHost: api.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    let world = audited().start().await;
    world.api.answers_raw([
        raw("HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\nContent-Length: 0\r\n\r\n"),
        raw("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").and_echo(),
    ]);
    let mut agent = world.api_connection().await;
    assert_eq!(agent.says(ASKED).await.hears().await.status, 101);
    drop(agent);
    let lines = ended(world, &["try", "path", "status", "outcome", "generation"]).await;
    assert_eq!(lines, ["1 /live 401 answered 1", "2 /live 101 answered 2"]);
}

#[tokio::test]
async fn exec_leaves_standard_output_to_its_command() {
    let home = Home::with("audit: {file: '-'}\nlisten: 127.0.0.1:0\nadmin: off\nhealth: off\n");
    let ended = home.run(["exec", "--", "true"]).await;
    let said = "error: `audit.file` is standard output, and that is the command's\nhint: name a file there\n";
    assert!(ended.code == 1 && ended.stderr.ends_with(said), "{}", ended.stderr);
}
