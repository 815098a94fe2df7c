//! A company's proxy on the way out: what goes through it, what does not, and what is said when it does not lead there.

use http::Version;
use tokio::net::TcpListener;

use crate::world::agent::Reply;
use crate::world::answer::answer;
use crate::world::certificates::Proof;
use crate::world::corporate::{Corporate, URL, USER};
use crate::world::log::CANARY;
use crate::world::program::{Home, Running, ended};
use crate::world::server::{Seen, Server, raw};
use crate::world::{Setup, To, World, nobody, soon};

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
const PLAIN: &str = "- host: plain.test\n  provider: main\n  plaintext: true\n- host: api.test\n  provider: main";

async fn behind() -> World {
    Setup::new().behind(URL).start().await
}

/// A request in the clear, on a connection of its own.
async fn plainly(world: &World, request: &str) -> Reply {
    let host = request.split('/').nth(2).unwrap();
    world.connection().await.says(format!("{request} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await.hears().await
}

/// Nothing of what is for the proxy alone came along.
fn nothing_for_the_proxy(seen: &[Seen]) {
    for seen in seen {
        let left: Vec<_> = seen.names().into_iter().filter(|name| name.starts_with("proxy-")).collect();
        assert_eq!(left, [""; 0]);
    }
}

#[tokio::test]
async fn a_blind_tunnel_leads_through_it() {
    let world = behind().await;
    let tunnel = world.tunnel("evil.test:443").await;
    let tls = tunnel.tls("evil.test", &["http/1.1"]).await.unwrap();
    assert_eq!(tls.certificate, world.evil.certificate());
    let request = http::Request::get("/").header("host", "evil.test").body(crate::world::answer::Filler::text(""));
    assert_eq!(tls.http1(request.unwrap()).await.unwrap().text(), "thank you\n");
    assert_eq!(world.corporate.lines(), ["CONNECT evil.test:443"]);
    assert_eq!(world.corporate.asked()[0].headers["host"], "evil.test:443");
    nothing_for_the_proxy(&world.evil.seen());
}

#[tokio::test]
async fn a_tunnel_whose_server_speaks_first_loses_nothing() {
    let world = Setup::new().behind(URL).resolve("mail.test:25", To::Plain).start().await;
    world.corporate.greets(b"220 mail.test ESMTP\r\n");
    let mut tunnel = world.tunnel("mail.test:25").await;
    assert_eq!(tunnel.take(21).await, b"220 mail.test ESMTP\r\n");
}

#[tokio::test]
async fn requests_to_a_routed_host_and_their_token_calls_lead_through_it() {
    for (h2, version) in [(false, Version::HTTP_11), (true, Version::HTTP_2)] {
        let world = Setup::new().behind(URL).api_speaks(if h2 { &["h2"] } else { &["http/1.1"] }).start().await;
        for _ in 0..2 {
            let call = world.call("GET", "/me");
            let reply = if h2 { call.over_h2() } else { call }.send().await;
            assert_eq!(reply.text(), "welcome\n");
        }
        // RTY-001, and through the connections that are there.
        world.issued.revoke();
        assert_eq!(world.get("/me").await.text(), "welcome\n");
        assert_eq!(world.corporate.lines(), ["CONNECT auth.test:443", "CONNECT api.test:443"]);
        assert_eq!((world.token_calls(), world.api.seen()[0].version), (2, version));
        nothing_for_the_proxy(&[world.api.seen(), world.auth.seen()].concat());
    }
}

#[tokio::test]
async fn the_destination_proves_its_name_whoever_leads_there() {
    // SEC-025
    for proof in [Proof::OtherName, Proof::SelfSigned] {
        let world = Setup::new().behind(URL).api_proves_itself(proof).start().await;
        assert_eq!(world.get("/me").await.code(), "tls_certificate_error");
        assert_eq!(world.api.seen().len(), 0);
    }
}

#[tokio::test]
async fn a_request_in_the_clear_is_sent_to_it_as_it_is() {
    let world = Setup::new().behind(URL).routes(PLAIN).resolve("other.test:80", To::Plain).start().await;
    let mut agent = world.connection().await;
    for path in ["/a?q=1%2F2", "/b"] {
        let reply = agent.says(format!("GET http://plain.test{path} HTTP/1.1\r\nHost: x\r\n\r\n")).await.hears().await;
        assert_eq!(reply.text(), "welcome\n");
    }
    let other = agent.says("POST http://other.test:80/c HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi").await;
    assert_eq!(other.hears().await.status, 401);

    let asked = ["CONNECT auth.test:443", "GET http://plain.test/a?q=1%2F2", "GET http://plain.test/b"];
    assert_eq!(world.corporate.lines(), [&asked[..], &["POST http://other.test/c"]].concat());
    let seen = world.plain.seen();
    let hosts: Vec<_> = seen.iter().map(|seen| seen.header("host").unwrap()).collect();
    assert_eq!(hosts, ["plain.test", "plain.test", "other.test"]);
    // One for each origin: nobody's request goes where another's token went.
    assert_eq!(world.corporate.connections(), 3);
    assert_eq!(world.plain.tokens(), [world.issued.access(1), world.issued.access(1), "none".into()]);
    nothing_for_the_proxy(&seen);
}

#[tokio::test]
async fn a_request_about_the_server_as_a_whole_is_one_through_it_too() {
    let world = Setup::new().behind(URL).routes(PLAIN).start().await;
    let mut tunnel = world.tunnel("plain.test:80").await;
    let reply = tunnel.says("OPTIONS * HTTP/1.1\r\nHost: plain.test\r\n\r\n").await.hears().await;
    assert_eq!((reply.text(), world.plain.seen()[0].target.as_str()), ("welcome\n", "*"));
    assert_eq!(world.corporate.lines(), ["CONNECT auth.test:443", "CONNECT plain.test:80"]);
}

#[tokio::test]
async fn a_websocket_leads_through_a_tunnel_of_its_own_with_tls_or_without() {
    let world = Setup::new().behind(URL).routes(PLAIN).start().await;
    for (mut agent, server, host, target) in [
        (world.api_connection().await, &world.api, "api.test", "/ws"),
        (world.connection().await, &world.plain, "plain.test", "http://plain.test/ws"),
    ] {
        server.answers_raw([raw(SWITCHED).and_echo()]);
        let asks =
            format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n");
        assert_eq!(agent.says(asks).await.hears().await.status, 101);
        assert_eq!(agent.says("frame").await.take(5).await, b"frame");
        assert_eq!(server.seen()[0].token(), Some(world.issued.access(1).as_str()));
        nothing_for_the_proxy(&server.seen());
    }
    let asked = ["CONNECT auth.test:443", "CONNECT api.test:443", "CONNECT plain.test:80"];
    assert_eq!(world.corporate.lines(), asked);
}

#[tokio::test]
async fn discovery_and_a_consent_lead_through_it() {
    let world = Setup::consenting_as_discovered("https://auth.test").behind(URL).start().await;
    let mut browser = world.browser();
    let asked = browser.goes_to_the_provider("/connect/main").await;
    assert!(world.auth.seen().iter().all(|seen| seen.path().starts_with("/.well-known/")), "nothing else was asked");
    let mut back = world.issued.says_yes(&asked);
    back.query_pairs_mut().append_pair("iss", "https://auth.test");
    assert_eq!(browser.comes_back(&back).await.heading(), "Main is connected");
    assert_eq!(world.corporate.lines(), ["CONNECT auth.test:443"], "one connection, kept");
    assert_eq!(world.get("/me").await.text(), "welcome\n");
}

#[tokio::test]
async fn a_webhook_leads_through_it() {
    let on_missing = "on_missing: {webhook: 'https://evil.test/told'}";
    let world = Setup::consenting().provider(on_missing).behind(URL).start().await;
    assert_eq!(world.get("/me").await.code(), "not_connected");
    world.evil.has_seen(1).await;
    assert_eq!((world.evil.seen()[0].path(), world.corporate.lines()), ("/told", vec!["CONNECT evil.test:443".into()]));
}

#[tokio::test]
async fn a_proxy_can_be_spoken_to_with_tls() {
    let url = URL.replace("http:", "https:");
    let world = Setup::new().behind(&url).corporate_speaks_tls().routes(PLAIN).start().await;
    assert_eq!(world.call("GET", "/me").over_h2().send().await.text(), "welcome\n");
    assert_eq!(plainly(&world, "GET http://plain.test/").await.text(), "welcome\n");
    let asked = ["CONNECT auth.test:443", "CONNECT api.test:443", "GET http://plain.test/"];
    assert_eq!(world.corporate.lines(), asked);

    let world = Setup::new().behind(&url).start().await;
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.code().as_str()), (503, "token_unavailable"));
    let mut agent = world.connection().await;
    let reply = agent.says("CONNECT evil.test:443 HTTP/1.1\r\n\r\n").await.hears().await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_proxy_unreachable"));
}

#[tokio::test]
async fn this_machine_and_what_is_named_are_reached_without_it() {
    let direct = "no_proxy: [.in.test, 192.0.2.0/24, 'plain.test:80']";
    let world = Setup::new().behind(URL).top(direct).dials("api.test:443", To::Api).start().await;
    // `resolve:` says where; who leads there is no question any more.
    let mut agent = world.tunnel("api.test:443").await.tls("api.test", &["http/1.1"]).await.unwrap();
    let reply = agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await.hears().await;
    assert_eq!((reply.text(), world.api.met().0), ("welcome\n", 1));

    let port = world.plain.address().port();
    for here in ["localhost", "127.0.0.1"] {
        let reply = plainly(&world, &format!("GET http://{here}:{port}/")).await;
        assert_eq!(reply.status, 401, "the API itself says so");
        world.tunnel(&format!("{here}:{port}")).await;
    }
    // Nobody but the proxy knows these names.
    for named in ["a.in.test:443", "in.test:8080"] {
        let mut agent = world.connection().await;
        let reply = agent.says(format!("CONNECT {named} HTTP/1.1\r\n\r\n")).await.hears().await;
        assert_eq!(reply.code(), "dns_error", "{named}");
    }
    assert_eq!(plainly(&world, "GET http://plain.test/").await.code(), "dns_error");
    assert_eq!(world.corporate.lines(), ["CONNECT auth.test:443"]);
    assert_eq!(plainly(&world, "GET http://plain.test:8080/").await.status, 502);
    assert_eq!(world.corporate.lines()[1], "GET http://plain.test:8080/");
}

#[tokio::test]
async fn a_proxy_that_does_not_take_our_credentials_is_the_operators_matter() {
    let world = Setup::new().behind("http://it:wrong@corp.test:3128").routes(PLAIN).dials("auth.test:443", To::Nobody);
    let world = world.start().await;
    let mut agent = world.connection().await;
    let reply = agent.says("CONNECT evil.test:443 HTTP/1.1\r\n\r\n").await.hears().await;
    assert_eq!(
        reply.text(),
        r#"{
  "code": "upstream_proxy_authentication",
  "detail": "the upstream proxy does not accept the credentials of `upstream_proxy`, or wants some (it names Basic)",
  "hint": "the operator corrects the user name and password in `upstream_proxy`; only Basic is spoken",
  "status": 502,
  "title": "Bad Gateway",
  "type": "urn:sidebearer:upstream_proxy_authentication"
}
"#
    );
    // RFC 9110 section 15.5.8: a 407 would ask the agent for what is not the agent's to know.
    assert_eq!((reply.status, reply.header("proxy-authenticate")), (502, None));
    assert_eq!(
        reply.header("proxy-status"),
        Some(
            "sidebearer; error=proxy_configuration_error; details=\"upstream_proxy_authentication\"; \
             received-status=407"
        )
    );
    let reply = plainly(&world, "GET http://other.test/").await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_proxy_authentication"));
    assert_eq!(reply.header("proxy-authenticate"), None);
    let told = world.requests_told();
    assert!(told.iter().all(|told| told.code == Some("upstream_proxy_authentication")), "{told:?}");
}

#[tokio::test]
async fn a_407_of_the_destinations_own_is_the_agents() {
    // RTY-019
    let world = behind().await;
    world.api_answers([answer(407).with("proxy-authenticate", "Basic")]);
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.header("proxy-authenticate")), (407, None));
    assert_eq!((world.api.seen().len(), world.token_calls()), (1, 1));
}

#[tokio::test]
async fn a_proxy_that_refuses_is_told_of_with_its_status() {
    let world = behind().await;
    world.corporate.refuses(403);
    let mut agent = world.connection().await;
    let reply = agent.says("CONNECT evil.test:443 HTTP/1.1\r\n\r\n").await.hears().await;
    assert_eq!(
        reply.text(),
        r#"{
  "code": "upstream_proxy_refused",
  "detail": "the upstream proxy answered CONNECT with 403 Forbidden",
  "hint": "ask whoever runs that proxy to allow the host; the operator lists one that needs no proxy in `no_proxy`",
  "status": 502,
  "title": "Bad Gateway",
  "type": "urn:sidebearer:upstream_proxy_refused"
}
"#
    );
    let status = "sidebearer; error=destination_unavailable; details=\"upstream_proxy_refused\"; received-status=403";
    assert_eq!(reply.header("proxy-status"), Some(status));
    // For a token there was no way either.
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.code().as_str()), (503, "token_unavailable"));
    assert!(reply.json()["detail"].as_str().unwrap().contains("answered CONNECT with 403"), "{}", reply.text());
    // In the clear, its answers are as good as the destination's.
    assert_eq!(plainly(&world, "GET http://plain.test/").await.status, 403);
    assert_eq!((world.evil.met().0, world.api.met().0, world.plain.met().0), (0, 0, 0));
}

#[tokio::test]
async fn a_proxy_that_talks_nonsense_or_is_not_there_is_told_of() {
    for (says, code) in [
        ("SSH-2.0-OpenSSH_9.9\r\n".to_owned(), "upstream_proxy_broken"),
        (String::new(), "upstream_proxy_broken"),
        (format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(70_000)), "upstream_proxy_broken"),
    ] {
        let world = behind().await;
        world.corporate.says(says.clone());
        let mut agent = world.connection().await;
        let reply = agent.says("CONNECT evil.test:443 HTTP/1.1\r\n\r\n").await.hears().await;
        assert_eq!((reply.status, reply.code().as_str()), (502, code), "{says:.30}");
    }
    let (_held, nobody) = nobody();
    let world = Setup::new().top(&format!("upstream_proxy: http://{nobody}")).start().await;
    let mut agent = world.connection().await;
    let reply = agent.says("CONNECT gone.test:443 HTTP/1.1\r\n\r\n").await.hears().await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_proxy_unreachable"));
    let detail = "the upstream proxy cannot be reached: cannot connect: connection refused";
    assert_eq!(reply.json()["detail"], detail);
    assert_eq!(plainly(&world, "GET http://gone.test/").await.code(), "upstream_proxy_unreachable");
}

#[tokio::test]
async fn a_proxy_that_hangs_is_waited_for_no_longer_than_anybody() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let top = format!("upstream_proxy: http://{}\nlimits: {{connect_timeout: 500ms}}", silent.local_addr().unwrap());
    let world = Setup::new().top(&top).start().await;
    let mut agent = world.connection().await;
    let reply = agent.says("CONNECT gone.test:443 HTTP/1.1\r\n\r\n").await.hears().await;
    assert_eq!((reply.status, reply.code().as_str()), (504, "connection_timeout"));
    assert_eq!(reply.json()["detail"], "the upstream proxy did not connect within 0.5 s");
}

#[tokio::test]
async fn a_sidecar_that_would_lead_out_through_itself_does_not_start() {
    // LST-002
    let (_held, own) = nobody();
    let written = Home::with(&format!(
        "listen: {own}\nadmin: off\nhealth: off\nupstream_proxy: http://localhost:{}\n",
        own.port()
    ));
    let said = "proxy.yaml:4:17: upstream_proxy: this is the sidecar itself\nhint: name the company's proxy\n";
    assert_eq!((written.run(["run"]).await.stderr.as_str(), written.run(["check"]).await.code), (said, 64));

    let home =
        Home::with(&format!("listen: {own}\nadmin: off\nhealth: off\nupstream_proxy: environment\nroutes: []\n"));
    let command = |argument| {
        let mut command = home.command([argument]);
        command.env("HTTPS_PROXY", format!("http://{own}"));
        command
    };
    let run = ended(command("run")).await;
    let said = format!(
        "error: the upstream proxy, {own}, is this proxy itself\n\
         hint: name the company's proxy in `upstream_proxy`, or start the sidecar where `HTTPS_PROXY` does\n"
    );
    assert!(run.code == 1 && run.stderr.ends_with(&said), "{run:?}");
    // Where nothing goes out, nothing is wrong.
    assert_eq!(ended(command("status")).await.code, 0);
}

/// A home whose provider is on this machine by another name, which only a company's proxy knows; and that proxy.
async fn company() -> (Home, Corporate, Server) {
    let corporate = Corporate::start(None).await;
    let api = Server::start(None, Box::new(|_| answer(200).saying("hello\n"))).await;
    corporate.knows("api.test:80", api.address());
    let home = Home::with("listen: 127.0.0.1:0\nadmin: off\nhealth: off\nupstream_proxy: environment\nroutes: []\n");
    (home, corporate, api)
}

#[tokio::test]
async fn the_environments_proxy_is_asked_where_the_file_says_so_and_its_password_stays_here() {
    // LST-003, LEK-005
    let (home, corporate, api) = company().await;
    let url = format!("http://{USER}:{CANARY}secret-of-corporate@{}", corporate.address());
    for (name, asked) in [("http_proxy", 1), ("all_proxy", 1), ("HTTP_PROXY", 0), ("https_proxy", 0)] {
        let before = corporate.lines().len();
        let mut command = home.command(["run"]);
        command.env(name, &url).env("RUST_LOG", "trace");
        let mut sidecar = Running::of(command);
        let line: serde_json::Value = serde_json::from_str(&sidecar.logs("\"listening\"").await).unwrap();
        let proxy: std::net::SocketAddr = line["address"].as_str().unwrap().parse().unwrap();
        let client = reqwest::Client::builder().proxy(reqwest::Proxy::all(format!("http://{proxy}")).unwrap());
        let reply = soon(client.build().unwrap().get("http://api.test/").send()).await.unwrap();
        assert_eq!(
            (reply.status().as_u16(), corporate.lines().len() - before),
            (if asked == 1 { 200 } else { 502 }, asked),
            "{name}"
        );
    }
    assert_eq!(api.seen().len(), 2);
    let mut command = home.command(["exec", "--", "env"]);
    command.env("HTTPS_PROXY", &url).env("ALL_PROXY", &url).env("http_proxy", &url).env_remove("SECRET");
    // `Ended` looks for the canary.
    let environment = ended(command).await.stdout;
    assert!(environment.contains("ALL_PROXY=http://127.0.0.1:"), "{environment}");
}

#[tokio::test]
async fn a_command_gets_the_variable_anew_that_the_proxy_came_from() {
    let home = Home::with("listen: 127.0.0.1:0\nadmin: off\nhealth: off\nupstream_proxy: ${HTTPS_PROXY}\nroutes: []\n");
    let mut command = home.command(["exec", "--", "sh", "-c", "echo $HTTPS_PROXY"]);
    command.env("HTTPS_PROXY", format!("http://it:{CANARY}@corp.test:3128"));
    let ended = ended(command).await;
    assert!(ended.stdout.starts_with("http://127.0.0.1:"), "{ended:?}");
}
