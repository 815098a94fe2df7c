//! The health listener, what asks it, and how a sidecar is told to stop.

use std::net::SocketAddr;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::world::answer::{Gate, usual};
use crate::world::log::CANARY;
use crate::world::program::{Ended, Home, Running, ended};
use crate::world::{Setup, World, soon};

/// What comes to a question at a listener: the status, the fields, and the text.
async fn asked(at: SocketAddr, method: &str, path: &str, fields: &str) -> (u16, String, String) {
    let mut stream = soon(TcpStream::connect(at)).await.unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}\r\n");
    soon(stream.write_all(head.as_bytes())).await.unwrap();
    let mut heard = String::new();
    soon(stream.read_to_string(&mut heard)).await.unwrap();
    let (head, body) = heard.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), head.to_owned(), body.to_owned())
}

async fn probe(at: SocketAddr, path: &str) -> (u16, Value) {
    let (status, _, body) = asked(at, "GET", path, "").await;
    (status, serde_json::from_str(&body).unwrap())
}

/// What readiness says, once it says this of its status.
async fn readiness(world: &World, status: &str) -> Value {
    loop {
        let (code, told) = probe(world.health, "/readyz").await;
        assert_eq!(code, 200);
        if told["status"] == status {
            return told;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn probes_are_answered_under_any_name_and_nothing_else_is_done() {
    let world = World::start().await;
    assert_eq!(probe(world.health, "/startupz").await, (200, json!({ "status": "started" })));
    assert_eq!(probe(world.health, "/livez").await, (200, json!({ "status": "ok" })));
    assert_eq!(asked(world.health, "HEAD", "/livez", "").await.2, "");
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let (status, head, _) = asked(world.health, method, "/livez", "Content-Length: 0\r\n").await;
        assert!(status == 405 && head.contains("allow: GET,HEAD"), "{method}: {head}");
    }
    for path in ["/quit", "/v1/connections", "/connect/main", "/livez/", "/livez/../quit", "//livez"] {
        assert_eq!(asked(world.health, "GET", path, "").await.0, 404, "{path}");
    }
    let (status, head, index) = asked(world.health, "GET", "/", "").await;
    assert!(status == 200 && index.contains("/readyz") && head.contains("x-content-type-options: nosniff"), "{head}");
}

#[tokio::test]
async fn readiness_tells_how_tokens_fare_and_names_no_user() {
    // LST-020
    let world = Setup::consenting().and_another_provider().start().await;
    let idle = |name: &str| json!({ "provider": name, "state": "idle", "tokens": 0, "expires_in": null });
    let told = readiness(&world, "ok").await;
    assert_eq!(told, json!({ "status": "ok", "troubles": [], "providers": [idle("main"), idle("other")] }));

    world.connects("default").await;
    world.get("/me").await;
    world.sql("ALTER TABLE meta RENAME TO gone");
    let told = readiness(&world, "degraded").await;
    assert_eq!(told["troubles"], json!([{ "code": "store_io", "provider": null }]));
    let main = &told["providers"][0];
    assert_eq!((&main["state"], &main["tokens"]), (&json!("ok"), &json!(1)));
    assert!((3000..=3600).contains(&main["expires_in"].as_u64().unwrap()), "{main}");
    assert!(!told.to_string().contains("default") && !told.to_string().contains(".test"), "{told}");
    assert_eq!(probe(world.health, "/livez").await.0, 200);
    world.sql("ALTER TABLE gone RENAME TO meta");
    readiness(&world, "ok").await;
}

#[tokio::test]
async fn it_answers_through_the_drain_that_it_is_not_ready() {
    let mut world = World::start().await;
    let gate = Gate::shut();
    world.api_answers([usual().once(&gate)]);
    let mut agent = world.api_connection().await;
    agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    world.api.has_seen(1).await;
    world.begins_to_stop();
    loop {
        let (status, told) = probe(world.health, "/readyz").await;
        if status == 503 {
            assert_eq!(told, json!({ "status": "stopping" }));
            break;
        }
    }
    assert_eq!((probe(world.health, "/livez").await.0, probe(world.health, "/startupz").await.0), (200, 200));
    gate.open();
    assert_eq!(agent.hears().await.status, 200);
}

#[tokio::test]
async fn whoever_holds_connections_keeps_no_probe_out() {
    // LST-016
    let world = World::start().await;
    let mut held = Vec::new();
    for _ in 0..200 {
        held.push(soon(TcpStream::connect(world.health)).await.unwrap());
    }
    assert_eq!(probe(world.health, "/livez").await.0, 200);
}

/// A sidecar that runs, and the line in which it says where.
async fn sidecar(home: &Home) -> (Running, Value) {
    of(Running::of(home.command(["run"]))).await
}

async fn of(mut sidecar: Running) -> (Running, Value) {
    let line = serde_json::from_str(&sidecar.logs("\"listening\"").await).unwrap();
    (sidecar, line)
}

fn at(line: &Value, listener: &str) -> SocketAddr {
    line[listener].as_str().unwrap().parse().unwrap()
}

/// Two ports that were free a moment ago.
fn free() -> [u16; 2] {
    let one = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    [one, other].map(|listener| listener.local_addr().unwrap().port())
}

/// A home whose sidecar others can find, with these lines more; `secret` is one that only the sidecar has.
fn findable(more: &str) -> Home {
    let [admin, health] = free();
    Home::with(&format!(
        "listen: 127.0.0.1:0
admin: 127.0.0.1:{admin}
health: 0.0.0.0:{health}
{more}providers:
  main:
    token_endpoint: https://auth.test/token
    client_id: agent
    client_secret: ${{SECRET}}
    refresh_token: {{}}
routes:
  - host: api.test
    provider: main
"
    ))
}

/// A command of somebody who has neither the sidecar's secrets nor a home directory.
async fn without_secrets(home: &Home, arguments: &[&str]) -> Ended {
    let mut command = home.command(arguments);
    command.env_remove("SECRET").env_remove("HOME");
    ended(command).await
}

#[tokio::test]
async fn healthcheck_finds_the_listener_and_needs_no_secret() {
    let home = findable("");
    let check = async |arguments: &[&str]| {
        let all: Vec<&str> = ["healthcheck"].iter().chain(arguments).copied().collect();
        without_secrets(&home, &all).await
    };
    let down = check(&[]).await;
    assert!(down.code == 1 && down.stderr.contains("Connection refused"), "{down:?}");
    let (mut sidecar, line) = sidecar(&home).await;
    for arguments in [&[][..], &["--ready"], &["--startup"]] {
        let up = check(arguments).await;
        assert_eq!((up.code, up.stderr.as_str()), (0, ""), "{arguments:?}");
    }
    let address = format!("127.0.0.1:{}", at(&line, "health").port());
    assert_eq!(check(&["--config", "nowhere.yaml", "--address", &address]).await.code, 0);
    let other = check(&["--url", &format!("http://{address}/nothing")]).await;
    assert!(other.code == 1 && other.stderr.contains("/nothing was answered with 404"), "{other:?}");
    sidecar.gets(Signal::TERM);
    assert_eq!(sidecar.ends().await, 0);
}

#[tokio::test]
async fn healthcheck_says_why_it_has_nobody_to_ask() {
    let off = without_secrets(&Home::with("health: off\n"), &["healthcheck"]).await;
    let said = "error: `health` is off in proxy.yaml: there is nothing to ask\nhint: leave out `health: off`\n";
    assert_eq!((off.code, off.stderr.as_str()), (1, said));
    let wrong = without_secrets(&Home::with("health: here\n"), &["healthcheck"]).await;
    let said = "proxy.yaml:1:9: health: expected an address and a port, as in `127.0.0.1:3130`, or `off`\n";
    assert!(wrong.code == 64 && wrong.stderr.starts_with(said), "{wrong:?}");
}

#[tokio::test]
async fn it_lives_while_it_waits_for_its_store_and_has_not_started() {
    // Nobody answers at the store's address, and nobody refuses.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let [admin, health] = free();
    let store = silent.local_addr().unwrap();
    let home = Home::with(&format!(
        "listen: 127.0.0.1:0\nadmin: 127.0.0.1:{admin}\nhealth: 127.0.0.1:{health}\nroutes: []\nstore:\n  url: \
         postgres://sidebearer@{store}/db?sslmode=disable\n  keys: ['AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=']\n\
         ca:\n  path: ca\n"
    ));
    let _waiting = home.start(["run"]);
    let lives = async || home.run(["healthcheck"]).await.code == 0;
    soon(async {
        while !lives().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let started = home.run(["healthcheck", "--startup"]).await;
    assert!(started.code == 1 && started.stderr.contains("was answered with 503"), "{started:?}");
    assert_eq!(home.run(["healthcheck", "--ready"]).await.code, 1);
}

#[tokio::test]
async fn quit_stops_a_sidecar_that_allows_it_and_live_requests_finish() {
    let home = findable("quit: true\nadmin_token: '${TOKEN}'\n");
    let token = format!("{CANARY}admin-token-of-the-program");
    let command = |arguments: &[&str]| {
        let mut command = home.command(arguments);
        command.env("TOKEN", &token);
        command
    };
    let (mut sidecar, line) = of(Running::of(command(&["run"]))).await;
    let admin = at(&line, "admin");
    let own = format!("Host: {admin}\r\n");
    let bearer = format!("Authorization: Bearer {token}\r\n");
    // Not by reading it, not without the token, and not for a page, be it one of its own.
    for (method, fields, status) in [
        ("GET", bearer.clone(), 405),
        ("POST", String::new(), 401),
        ("POST", format!("{bearer}Origin: http://{admin}\r\n"), 403),
        ("POST", format!("{bearer}Sec-Fetch-Site: same-origin\r\n"), 403),
        ("POST", format!("{bearer}Origin: https://evil.test\r\n"), 403),
    ] {
        let mut stream = TcpStream::connect(admin).await.unwrap();
        let head = format!("{method} /quit HTTP/1.1\r\n{own}Connection: close\r\nContent-Length: 0\r\n{fields}\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut heard = String::new();
        soon(stream.read_to_string(&mut heard)).await.unwrap();
        assert!(heard.starts_with(&format!("HTTP/1.1 {status}")), "{method} {fields}: {heard}");
    }
    let done = ended(command(&["quit"])).await;
    assert_eq!((done.code, done.stdout.as_str()), (0, "it stops as soon as live requests have finished\n"));
    let said = sidecar.logs("a second signal stops at once").await;
    assert!(said.contains("\"why\":\"quit\""), "{said}");
    assert_eq!(sidecar.ends().await, 0);
}

#[tokio::test]
async fn quit_is_for_whoever_is_on_the_same_machine_by_the_address_that_they_come_from() {
    // The machine's other addresses stand for other machines: the kernel gives a connection to one the same at both ends.
    let Some(other) = std::fs::read_to_string("/proc/net/fib_trie").ok().and_then(|table| own_address(&table)) else {
        eprintln!("nothing is tried: this machine has no address but loopback");
        return;
    };
    let [admin, health] = free();
    let home = Home::with(&format!(
        "listen: 127.0.0.1:0\nadmin: 0.0.0.0:{admin}\nhealth: 127.0.0.1:{health}\nquit: true\nadmin_token: '${{TOKEN}}'\n\
         public_url: http://localhost:{admin}\nroutes: []\n"
    ));
    let token = format!("{CANARY}admin-token-of-the-program");
    let mut command = home.command(["run"]);
    command.env("TOKEN", &token);
    let (_sidecar, _) = of(Running::of(command)).await;
    let mut stream = TcpStream::connect((other, admin)).await.unwrap();
    let head = format!("POST /quit HTTP/1.1\r\nHost: localhost:{admin}\r\nAuthorization: Bearer {token}\r\n");
    stream.write_all(format!("{head}Connection: close\r\nContent-Length: 0\r\n\r\n").as_bytes()).await.unwrap();
    let mut heard = String::new();
    soon(stream.read_to_string(&mut heard)).await.unwrap();
    assert!(heard.starts_with("HTTP/1.1 403") && heard.contains("own machine"), "{heard}");
}

/// An address of this machine that is not loopback.
fn own_address(table: &str) -> Option<std::net::Ipv4Addr> {
    let lines: Vec<&str> = table.lines().collect();
    let local = lines.windows(2).filter(|pair| pair[1].contains("/32 host LOCAL"));
    let addresses = local.filter_map(|pair| pair[0].trim().strip_prefix("|-- ")?.parse::<std::net::Ipv4Addr>().ok());
    addresses.into_iter().find(|address| !address.is_loopback())
}

#[tokio::test]
async fn without_the_key_nobody_can_have_it_quit() {
    let home = findable("");
    let (mut sidecar, _) = sidecar(&home).await;
    let refused = home.run(["quit"]).await;
    let said = "error: it takes no such request\nhint: write `quit: true` into its proxy.yaml\n";
    assert_eq!((refused.code, refused.stderr.as_str()), (1, said));
    sidecar.gets(Signal::TERM);
    assert_eq!(sidecar.ends().await, 0);
}

#[tokio::test]
async fn systemd_is_told_when_it_has_started_lives_and_stops_and_what_it_runs_is_not_asked_to() {
    let home = findable("store:\n  key_command: [sh, printer]\n");
    let script = "echo \"$NOTIFY_SOCKET$WATCHDOG_USEC$WATCHDOG_PID\" >seen\n\
                  echo AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n";
    std::fs::write(home.path("printer"), script).unwrap();
    let socket = UnixDatagram::bind(home.path("notify.sock")).unwrap();
    socket.set_read_timeout(Some(crate::world::DEADLINE)).unwrap();
    let mut command = home.command(["run"]);
    command.env("NOTIFY_SOCKET", home.path("notify.sock")).env("WATCHDOG_USEC", "200000");
    let (mut sidecar, line) = of(Running::of(command)).await;
    let told = move || {
        let mut buffer = [0; 1024];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    let told = std::sync::Arc::new(told);
    let next = async |wanted: &'static str| {
        let told = told.clone();
        let found = tokio::task::spawn_blocking(move || {
            std::iter::repeat_with(|| told()).find(|message| message.starts_with(wanted)).unwrap()
        });
        soon(found).await.unwrap()
    };
    let address = line["address"].as_str().unwrap();
    assert_eq!(next("READY=1\n").await, format!("READY=1\nSTATUS=listening on {address}\n"));
    assert_eq!(next("WATCHDOG=1\n").await, "WATCHDOG=1\n");
    assert_eq!(next("WATCHDOG=1\n").await, "WATCHDOG=1\n");
    sidecar.gets(Signal::TERM);
    assert_eq!(next("STOPPING=1\n").await, "STOPPING=1\nSTATUS=live requests finish\n");
    assert_eq!(sidecar.ends().await, 0);
    assert_eq!(std::fs::read_to_string(home.path("seen")).unwrap(), "\n");
}
