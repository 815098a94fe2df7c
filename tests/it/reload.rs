//! The configuration changes while the sidecar runs: what is under way goes on, what comes finds the new one, also on
//! connections that are old.

use std::path::Path;

use http::Request;
use rustix::process::Signal;
use sidebearer::app::reload::{Files, Watch};
use sidebearer::app::{self, App, Authority, Options};
use sidebearer::clock::Clock;
use sidebearer::events::Reload;
use sidebearer::names::UserName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::audit::ended;
use crate::world::agent::Reply;
use crate::world::answer::{Filler, Gate, usual};
use crate::world::program::{Home, Running};
use crate::world::raw::Raw;
use crate::world::{Setup, To, World, log, secret_of, soon};

const AGENTS: &str = "agents:
  - name: researcher
    secret: ${RESEARCHER_SECRET}
    users: [alice, bob]";
const PLAIN: &str = "- host: plain.test
  provider: main
  plaintext: true";
const ROUTE: (&str, &str) = ("host: api.test\n    provider: main", "host: api.test\n    deny: true");

fn researcher() -> String {
    let pair = format!("alice:{}", secret_of("researcher"));
    let pair = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, pair);
    format!("Proxy-Authorization: Basic {pair}\r\n")
}

async fn agents_tunnel(world: &World) -> Raw {
    world.tunnel_with("api.test:443", &researcher()).await.tls("api.test", &["http/1.1"]).await.unwrap()
}

async fn get(agent: &mut Raw, host: &str) -> Reply {
    agent.says(format!("GET /me HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
    agent.hears().await
}

#[tokio::test]
async fn a_request_ends_as_it_began_and_the_next_on_its_connection_finds_the_new_configuration() {
    // TOK-045
    let mut world = World::start().await;
    let mut h1 = world.api_connection().await;
    assert_eq!(get(&mut h1, "api.test").await.status, 200);
    let h2 = world.api_h2().await.http2().await;
    let gate = Gate::shut();
    world.api_answers([usual().once(&gate)]);
    let ask = |path: &str| {
        let (h2, request) = (h2.clone(), Request::get(format!("https://api.test{path}")));
        let request = request.body(Filler::text("")).unwrap();
        async move { h2.send(request).await.unwrap() }
    };
    let under_way = tokio::spawn(ask("/long"));
    world.api.has_seen(2).await;
    world.reloads(&[ROUTE]).await;
    for reply in [ask("/next").await, get(&mut h1, "api.test").await, world.get("/new").await] {
        assert_eq!((reply.status, reply.code()), (403, "denied".into()));
    }
    gate.open();
    assert_eq!(soon(under_way).await.unwrap().status, 200);
    world.reloads(&[(ROUTE.1, ROUTE.0)]).await;
    assert_eq!((ask("/again").await.status, get(&mut h1, "api.test").await.status), (200, 200));
    assert_eq!(world.token_calls(), 1, "the provider has not changed");
}

#[tokio::test]
async fn a_request_of_a_provider_that_is_removed_gets_its_second_try() {
    // TOK-045
    let mut world = World::start().await;
    assert_eq!(world.get("/").await.status, 200);
    world.issued.revoke();
    let gate = Gate::shut();
    world.api_answers([crate::world::answer::answer(401).once(&gate)]);
    let h2 = world.api_h2().await.http2().await;
    let request = Request::get("https://api.test/me").body(Filler::text("")).unwrap();
    let under_way = tokio::spawn(async move { h2.send(request).await.unwrap() });
    world.api.has_seen(2).await;
    let another = ("  main:", "  another:");
    world.reloads(&[another, ("provider: main", "provider: another")]).await;
    gate.open();
    assert_eq!(soon(under_way).await.unwrap().status, 200);
    assert_eq!(world.token_calls(), 2);
    assert_eq!((world.get("/").await.status, world.token_calls()), (200, 3));
}

#[tokio::test]
async fn a_tunnel_outlives_no_permission_of_whoever_opened_it() {
    // LST-009, LST-010
    let mut world = Setup::new().top(AGENTS).start().await;
    let mut tunnel = agents_tunnel(&world).await;
    assert_eq!(get(&mut tunnel, "api.test").await.status, 200);
    world.reloads(&[("users: [alice, bob]", "users: [alice, bob]\n    providers: []")]).await;
    assert_eq!(get(&mut tunnel, "api.test").await.code(), "provider_not_allowed");
    world.reloads(&[("    providers: []", "    providers: [main]")]).await;
    assert_eq!(get(&mut tunnel, "api.test").await.status, 200);
    world.reloads(&[("users: [alice, bob]", "users: [bob]")]).await;
    assert_eq!(get(&mut tunnel, "api.test").await.code(), "user_not_allowed");
    world.reloads(&[("users: [bob]", "users: [alice]"), ("RESEARCHER_SECRET", "ANOTHER_SECRET")]).await;
    let reply = get(&mut tunnel, "api.test").await;
    assert_eq!(
        (reply.status, reply.code(), reply.header("connection")),
        (403, "no_longer_admitted".into(), Some("close"))
    );
    assert_eq!(world.api.seen().len(), 2);
}

#[tokio::test]
async fn whoever_came_before_there_were_agents_has_to_show_who_they_are() {
    // LST-009
    let mut world = World::start().await;
    let mut tunnel = world.api_connection().await;
    assert_eq!(get(&mut tunnel, "api.test").await.status, 200);
    world.reloads(&[("drain: 5s", &format!("drain: 5s\n{AGENTS}"))]).await;
    assert_eq!(get(&mut tunnel, "api.test").await.code(), "no_longer_admitted");
    assert_eq!(get(&mut agents_tunnel(&world).await, "api.test").await.status, 200);
}

#[tokio::test]
async fn whoever_is_turned_away_on_http2_comes_anew() {
    // LST-009: what says so is GOAWAY, since HTTP/2 has no `Connection: close`.
    let mut world = World::start().await;
    let h2 = world.api_h2().await.http2().await;
    let ask = || async { h2.send(Request::get("https://api.test/me").body(Filler::text("")).unwrap()).await };
    assert_eq!(ask().await.unwrap().status, 200);
    world.reloads(&[("drain: 5s", &format!("drain: 5s\n{AGENTS}"))]).await;
    assert_eq!(ask().await.unwrap().code(), "no_longer_admitted");
    soon(h2.connection.clone()).await;
    ask().await.unwrap_err();
}

#[tokio::test]
async fn what_is_written_down_names_whoever_a_tunnel_acts_for_now() {
    // LST-009
    let of = |user: &str| format!("[{{address: '127.0.0.1:0', user: {user}}}]");
    let mut world = Setup::new().listen(&of("alice")).top("audit: {file: 'FOLDER/audit'}").start().await;
    let mut tunnel = world.api_connection().await;
    for user in ["alice", "bob"] {
        if user == "bob" {
            world.reloads(&[(&of("alice"), &of(user))]).await;
        }
        assert_eq!(get(&mut tunnel, "api.test").await.status, 200);
        assert_eq!(world.request_told().user.unwrap().as_str(), user);
    }
    drop(tunnel);
    assert_eq!(ended(world, &["user"]).await, ["alice", "bob"]);
}

#[tokio::test]
async fn a_token_goes_in_the_clear_no_longer_than_the_route_says_so() {
    let mut world = Setup::new().routes(PLAIN).start().await;
    let mut tunnel = world.tunnel("plain.test:80").await;
    assert_eq!(get(&mut tunnel, "plain.test").await.status, 200);
    world.reloads(&[("host: plain.test", "host: plain.test:80"), ("    plaintext: true\n", "")]).await;
    assert_eq!(get(&mut tunnel, "plain.test").await.code(), "plaintext_refused");
    assert_eq!(world.plain.tokens().len(), 1);
}

#[tokio::test]
async fn a_host_that_is_routed_no_more_gets_no_token() {
    let mut world = World::start().await;
    let mut tunnel = world.api_connection().await;
    assert_eq!(get(&mut tunnel, "api.test").await.status, 200);
    world.reloads(&[("host: api.test", "host: other.api.test")]).await;
    get(&mut tunnel, "api.test").await;
    assert_eq!(world.api.seen()[1].token(), None);
    world.reloads(&[("drain: 5s", "drain: 5s\nunmatched: deny")]).await;
    assert_eq!(get(&mut tunnel, "api.test").await.code(), "unmatched");
    assert_eq!(world.api.seen().len(), 2);
}

#[tokio::test]
async fn a_new_host_is_answered_for_and_found_and_old_agents_go_on() {
    let mut world = Setup::new().resolve("new.api.test:443", To::Api).start().await;
    let mut old = world.api_connection().await;
    let before = world.client_config();
    world
        .reloads(&[
            ("host: api.test", "host: '*.api.test'"),
            ("routes:", "routes:\n  - host: api.test\n    provider: main"),
        ])
        .await;
    assert_eq!(world.call("GET", "/").to("new.api.test").send().await.status, 200);
    assert_eq!(get(&mut old, "api.test").await.status, 200);
    let tunnel = world.tunnel("api.test:443").await;
    assert!(tunnel.tls_with(before.into(), "api.test").await.is_ok(), "who trusts the old root goes on");
    world.reloads(&[("new.api.test:443:", "api.test:8443:")]).await;
    assert_eq!(world.call("GET", "/").to("new.api.test").send().await.status, 502, "it is dialled as it says now");
}

#[tokio::test]
async fn what_cannot_be_used_changes_nothing() {
    let mut world = World::start().await;
    assert_eq!(world.get("/").await.status, 200);
    let failed = world.tries_to_reload(&[ROUTE, ("root.pem", "nothing.pem")]).await.unwrap_err();
    assert!(failed.to_string().contains("nothing.pem"), "{failed}");
    assert_eq!((world.get("/").await.status, world.token_calls()), (200, 1));
    assert_eq!(world.tries_to_reload(&[]).await.unwrap(), Reload::Unchanged);
}

#[tokio::test]
async fn the_dashboard_has_the_providers_of_today() {
    let mut world = Setup::consenting().start().await;
    let page = |admin: std::net::SocketAddr| async move {
        let mut browser = TcpStream::connect(admin).await.unwrap();
        let request = format!("GET / HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
        browser.write_all(request.as_bytes()).await.unwrap();
        let mut page = String::new();
        browser.read_to_string(&mut page).await.unwrap();
        page
    };
    assert!(page(world.admin).await.contains("Main"));
    world.reloads(&[("title: Main", "title: Renamed")]).await;
    assert!(page(world.admin).await.contains("Renamed"));
}

/// A sidecar in a folder, and what watches its `proxy.yaml`. It does not run: the test looks.
async fn watched(folder: &Path, text: &str) -> (App, Watch) {
    log::watch();
    let path = folder.join("proxy.yaml");
    std::fs::write(&path, text).unwrap();
    let (files, settings) = Files::load(&path).await.unwrap();
    let authority = Authority::Fresh(folder.join("ca"));
    let options = Options { user: UserName::default(), authority, clock: Clock::system() };
    let app = app::build(&settings, options).await.unwrap();
    let watch = Watch::new(files, app.reloader());
    (app, watch)
}

/// A `proxy.yaml` with these lines.
fn text(folder: &Path, lines: &str) -> String {
    format!("listen: 127.0.0.1:0\nadmin: off\nhealth: off\nstore:\n  path: '{}/store'\n{lines}", folder.display())
}

fn refusals(folder: &Path) -> Vec<String> {
    let lines = log::lines_with("configuration refused");
    lines.into_iter().filter(|line| line.contains(&folder.display().to_string())).collect()
}

#[tokio::test]
async fn a_bad_file_is_told_of_once_with_all_its_mistakes() {
    let folder = tempfile::tempdir().unwrap();
    let (_app, mut watch) = watched(folder.path(), &text(folder.path(), "")).await;
    std::fs::write(folder.path().join("proxy.yaml"), text(folder.path(), "drian: 5s\nroutes: 5\n")).unwrap();
    for _ in 0..5 {
        watch.look().await;
    }
    watch.reload(true).await;
    let told = refusals(folder.path());
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("proxy.yaml:6:1: drian") && told[0].contains("proxy.yaml:7:9: routes"), "{told:?}");
}

#[tokio::test]
async fn a_file_that_is_being_written_is_left_until_it_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (_app, mut watch) = watched(folder.path(), &text(folder.path(), "")).await;
    for lines in ["dr", "drain", "drain: 5", "drain: 5s\n"] {
        std::fs::write(folder.path().join("proxy.yaml"), text(folder.path(), lines)).unwrap();
        watch.look().await;
    }
    watch.look().await;
    assert!(refusals(folder.path()).is_empty());
    std::fs::write(folder.path().join("proxy.yaml"), text(folder.path(), "drain: 5\n")).unwrap();
    watch.reload(true).await;
    assert_eq!(refusals(folder.path()).len(), 1, "who asks is told at once");
}

#[tokio::test]
async fn a_secret_that_comes_later_mends_the_configuration() {
    // DEPLOY 5: the file of a secret is looked at, also one that was not there.
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    let (_app, mut watch) = watched(folder.path(), &text(folder.path(), "")).await;
    let agents = format!("agents:\n  - {{name: a, users: [u], secret: '${{file:{}}}'}}\n", secret.display());
    std::fs::write(folder.path().join("proxy.yaml"), text(folder.path(), &agents)).unwrap();
    for content in [None, Some("short\n"), Some("a-secret-of-16-bytes\n"), Some("short\n")] {
        if let Some(content) = content {
            std::fs::write(&secret, content).unwrap();
            rustix::fs::chmod(&secret, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
        }
        for _ in 0..2 {
            watch.look().await;
        }
    }
    let told = refusals(folder.path());
    assert_eq!(told.len(), 3, "{told:?}");
}

#[tokio::test]
async fn what_is_no_file_is_refused_at_once_and_forgotten_when_it_is_corrected() {
    let folder = tempfile::tempdir().unwrap();
    let (_app, mut watch) = watched(folder.path(), &text(folder.path(), "")).await;
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let agents = format!("agents:\n  - {{name: a, users: [u], secret: '${{file:{}}}'}}\n", pipe.display());
    let roots = format!("extra_ca_files: ['{}']\n", folder.path().display());
    for (number, lines) in (1..).zip([agents, roots]) {
        std::fs::write(folder.path().join("proxy.yaml"), text(folder.path(), &lines)).unwrap();
        soon(watch.reload(true)).await;
        assert_eq!(refusals(folder.path()).len(), number, "{lines}");
        std::fs::write(folder.path().join("proxy.yaml"), text(folder.path(), "drain: 5s\n")).unwrap();
        for _ in 0..2 {
            soon(watch.look()).await;
        }
        assert_eq!(watch.refused(), None, "{lines}");
    }
}

#[tokio::test]
async fn a_secret_that_everybody_could_read_is_read_when_its_mode_says_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "a-secret-of-16-bytes\n").unwrap();
    let mode = |mode: u32| rustix::fs::chmod(&secret, mode.into()).unwrap();
    mode(0o644);
    let (_app, mut watch) = watched(folder.path(), &text(folder.path(), "")).await;
    let agents = format!("agents:\n  - {{name: a, users: [u], secret: '${{file:{}}}'}}\n", secret.display());
    std::fs::write(folder.path().join("proxy.yaml"), text(folder.path(), &agents)).unwrap();
    watch.reload(true).await;
    assert!(watch.refused().is_some_and(|why| why.contains("chmod 600")));
    mode(0o600);
    for _ in 0..2 {
        watch.look().await;
    }
    assert_eq!(watch.refused(), None);
}

#[tokio::test]
async fn the_program_reloads_at_a_signal_and_when_a_link_is_swapped() {
    // TOK-045
    let home = Home::with_provider();
    let written = std::fs::read_to_string(home.path("proxy.yaml")).unwrap();
    // As a ConfigMap is mounted: a file that is a link to a link to a folder.
    for (name, lines) in [("one", ""), ("two", "drain: 5s\n"), ("bad", "drian: 5s\n")] {
        std::fs::create_dir(home.path(name)).unwrap();
        std::fs::write(home.path(name).join("proxy.yaml"), format!("{lines}{written}")).unwrap();
    }
    std::fs::remove_file(home.path("proxy.yaml")).unwrap();
    let swap = |to: &str| {
        std::os::unix::fs::symlink(to, home.path("next")).unwrap();
        std::fs::rename(home.path("next"), home.path("..data")).unwrap();
    };
    swap("one");
    std::os::unix::fs::symlink("..data/proxy.yaml", home.path("proxy.yaml")).unwrap();
    let mut running = home.start(["run"]);
    running.logs("listening").await;
    swap("bad");
    running.gets(Signal::HUP);
    assert!(running.logs("configuration refused").await.contains("proxy.yaml:1:1: drian: unknown key"));
    running.gets(Signal::HUP);
    running.logs("configuration still refused").await;
    swap("two");
    running.logs("configuration reloaded").await;
    running.gets(Signal::TERM);
    assert_eq!(running.ends().await, 0);
}

#[tokio::test]
async fn what_is_logged_changes_while_it_runs_unless_a_variable_says_it() {
    // DEPLOY 9
    let home = Home::with_provider();
    let written = std::fs::read_to_string(home.path("proxy.yaml")).unwrap();
    let write =
        |level: &str| std::fs::write(home.path("proxy.yaml"), format!("log_level: {level}\n{written}")).unwrap();
    write("warn");
    let mut running = home.start(["run"]);
    running.logs("made a key").await;
    write("info");
    running.gets(Signal::HUP);
    let next = running.logs("\"level\":\"INFO\"").await;
    assert!(next.contains("configuration reloaded"), "nothing was logged at info before: {next}");

    let mut command = home.command(["run"]);
    let mut other = Running::of({
        command.env("RUST_LOG", "sidebearer=info");
        command
    });
    other.logs("`log_level` has no effect: the variable RUST_LOG is set, and wins").await;
    other.logs("listening").await;
}
