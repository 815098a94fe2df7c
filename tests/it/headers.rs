//! Header fields, trailers, paths and methods: what is passed on, what is not, and what confuses nobody.

use http::{HeaderMap, Request};

use crate::world::answer::{Filler, answer};
use crate::world::server::raw;
use crate::world::{Setup, World};

#[tokio::test]
async fn the_agents_own_authorization_is_replaced_however_it_is_written() {
    // SEC-031, SEC-033
    let world = World::start().await;
    let lines = [
        "Authorization: Bearer mine\r\n",
        "authorization: Bearer mine\r\nAUTHORIZATION: Basic bWluZQ==\r\n",
        "Connection: close, Authorization\r\n",
        "Connection: authorization\r\nAuthorization: Bearer mine\r\n",
        "",
    ];
    for lines in lines {
        let mut agent = world.api_connection().await;
        agent.says(format!("GET /me HTTP/1.1\r\nHost: api.test\r\n{lines}\r\n")).await;
        assert_eq!(agent.hears().await.status, 200, "{lines}");
    }
    let token = world.issued.access(1);
    assert_eq!(world.api.tokens(), vec![token; lines.len()]);
    assert!(!format!("{:?}", world.api.seen()).contains("mine"));
}

#[tokio::test]
async fn a_field_that_resembles_authorization_is_an_ordinary_field() {
    // SEC-032
    let world = World::start().await;
    let reply = world.call("GET", "/me").with("x-authorization", "1").with("authorization_", "2").send().await;
    assert_eq!(reply.status, 200);
    let seen = &world.api.seen()[0];
    assert_eq!((seen.header("x-authorization"), seen.header("authorization_")), (Some("1"), Some("2")));
    assert_eq!(seen.token(), Some(world.issued.access(1).as_str()));
    for odd in
        ["Authorization\t: 3", "Authorization : 3", " Authorization: 3", "Authorization: a\rb", "Authorization: a\0b"]
    {
        let mut agent = world.api_connection().await;
        agent.says(format!("GET /me HTTP/1.1\r\nHost: api.test\r\n{odd}\r\n\r\n")).await;
        assert!(agent.hears_to_the_end().await.starts_with("HTTP/1.1 400 "), "{odd:?}");
    }
    assert_eq!(world.api.seen().len(), 1);
}

#[tokio::test]
async fn nothing_that_was_said_to_the_proxy_reaches_the_upstream() {
    // SEC-035, LST-012
    let world = World::start().await;
    let call =
        world.call("GET", "/me").with("proxy-authorization", "Basic c2VjcmV0").with("proxy-connection", "keep-alive");
    let call = call.with("keep-alive", "timeout=5").with("te", "gzip").with("upgrade", "h2c").with("x-kept", "1");
    assert_eq!(call.with("connection", "x-private").with("x-private", "1").send().await.status, 200);
    let mut names = world.api.seen()[0].names().into_iter().map(str::to_owned).collect::<Vec<_>>();
    names.sort_unstable();
    assert_eq!(names, ["authorization", "via", "x-kept"]);
}

#[tokio::test]
async fn a_trailer_is_never_a_credential_or_a_host() {
    // SEC-037
    let trailers = || {
        let fields = [("authorization", "Bearer mine"), ("host", "evil.test"), ("x-sum", "1")];
        fields.into_iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect::<HeaderMap>()
    };
    for (protocol, over_h2) in [("h2", true), ("h2", false), ("http/1.1", true)] {
        let world = Setup::new().api_speaks(&[protocol]).start().await;
        let body = Filler::of(10).with_trailers(trailers());
        let call =
            world.call("POST", "/x").with("trailer", "authorization, host, x-sum").with("te", "trailers").body(body);
        let reply = if over_h2 { call.over_h2() } else { call }.send().await;
        assert_eq!(reply.status, 200, "{protocol} {over_h2}");
        let seen = &world.api.seen()[0];
        assert_eq!(seen.trailers.get("authorization"), None, "{protocol} {over_h2}");
        assert_eq!(seen.trailers.get("host"), None, "{protocol} {over_h2}");
        assert_eq!((seen.trailers.get("x-sum").is_some(), seen.length), (true, 10), "{protocol} {over_h2}");
        assert_eq!(seen.token(), Some(world.issued.access(1).as_str()));
    }
}

#[tokio::test]
async fn an_answers_trailers_arrive() {
    // H3
    for over_h2 in [true, false] {
        let world = World::start().await;
        world.api_answers([answer(200).saying("x").then(&[("x-sum", "1"), ("proxy-authenticate", "Basic")])]);
        let call = world.call("GET", "/x").with("te", "trailers");
        let reply = if over_h2 { call.over_h2() } else { call }.send().await;
        assert_eq!(reply.trailers.get("proxy-authenticate"), None);
        if over_h2 {
            assert_eq!(reply.trailers["x-sum"], "1");
        }
    }
}

#[tokio::test]
async fn trace_is_refused_because_it_would_show_the_token() {
    // SEC-038
    let world = World::start().await;
    for over_h2 in [false, true] {
        let call = world.call("TRACE", "/me");
        let reply = if over_h2 { call.over_h2() } else { call }.send().await;
        assert_eq!((reply.status, reply.code().as_str()), (405, "trace_refused"));
    }
    assert_eq!((world.api.seen().len(), world.token_calls()), (0, 0));
}

#[tokio::test]
async fn an_options_request_goes_as_far_as_it_is_to_go() {
    // SEC-039
    let world = World::start().await;
    let here = world.call("OPTIONS", "/x").with("max-forwards", "0").send().await;
    assert_eq!((here.status, world.api.seen().len()), (200, 0));
    assert!(here.header("allow").is_some());
    world.call("OPTIONS", "/x").with("max-forwards", "1").send().await;
    assert_eq!(world.api.seen()[0].header("max-forwards"), Some("0"));
    let mut agent = world.api_connection().await;
    agent.says("OPTIONS * HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    assert_eq!(agent.hears().await.status, 200);
    assert_eq!(world.api.seen()[1].target.trim_start_matches("https://api.test"), "*");
}

#[tokio::test]
async fn what_the_api_says_of_cookies_and_challenges_is_the_agents() {
    // SEC-042, SEC-043, H9
    let world = World::start().await;
    let said = [
        ("set-cookie", "a=1; HttpOnly"),
        ("authentication-info", "nextnonce=\"1\""),
        ("www-authenticate", "Bearer realm=\"x\", error=\"insufficient_scope\", Basic"),
    ];
    world.api_answers([said.iter().fold(answer(401), |answer, (name, value)| answer.with(name, *value))]);
    let reply = world.get("/me").await;
    for (name, value) in said {
        assert_eq!(reply.header(name), Some(value));
    }
}

#[tokio::test]
async fn a_path_that_two_readers_could_resolve_differently_is_refused_where_a_route_depends_on_it() {
    // SEC-047, SEC-048
    let routes = "- host: api.test\n  paths: [/allowed/**]\n  provider: main";
    let world = Setup::new().routes(routes).start().await;
    for path in [
        "/allowed/../admin",
        "/allowed/./x",
        "/allowed/%2e%2e/admin",
        "/allowed/%2E./admin",
        "//allowed/x",
        "/allowed//x",
        "/allowed/x;y",
        "/allowed%2fx",
        "/allowed/%5c",
        "/allowed/\\x",
        "/allowed/%00",
        "/allowed/%zz",
        "/allowed/%",
    ] {
        let mut agent = world.api_connection().await;
        agent.says(format!("GET {path} HTTP/1.1\r\nHost: api.test\r\n\r\n")).await;
        let reply = agent.hears().await;
        assert_eq!(reply.status, 400, "{path}");
    }
    assert_eq!((world.api.seen().len(), world.token_calls()), (0, 0));
    for (path, token) in [
        ("/allowed/x?/../y", world.issued.access(1)),
        ("/%61llowed/x", world.issued.access(1)),
        ("/x?/allowed/y", "none".into()),
        ("/x?p=/allowed", "none".into()),
        ("/Allowed/x", "none".into()),
        ("/allowedx", "none".into()),
    ] {
        world.get(path).await;
        assert_eq!(world.api.tokens().last(), Some(&token), "{path}");
    }
    let mut agent = world.api_connection().await;
    agent.says("GET /x#/allowed/y HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    agent.hears().await;
    assert!(world.api.tokens().last().is_none_or(|token| token == "none"), "SEC-048");
}

#[tokio::test]
async fn path_and_query_arrive_byte_for_byte() {
    // SEC-072, H8
    for protocol in ["http/1.1", "h2"] {
        let world = Setup::new().api_speaks(&[protocol]).start().await;
        let target = "/a/../b//c;d/%2f%2E/~x?X-Amz-Credential=A%2F20260101%2Fus&sig=a+b%20c&e=&f";
        let reply = world.get(target).await;
        assert_eq!(reply.status, 200);
        let seen = &world.api.seen()[0];
        assert_eq!(seen.target.trim_start_matches("https://api.test"), target);
        assert!(protocol == "h2" || seen.header("host") == Some("api.test"), "no `:443`");
    }
}

#[tokio::test]
async fn a_request_that_brings_a_token_in_its_query_is_not_sent_with_another() {
    // SEC-036
    let world = Setup::new().routes("- host: api.test\n  paths: [/v1/**]\n  provider: main").start().await;
    for over_h2 in [false, true] {
        let call = world.call("GET", "/v1/me?fields=id&access_token=mine");
        let reply = if over_h2 { call.over_h2() } else { call }.send().await;
        assert_eq!((reply.status, reply.code().as_str()), (400, "token_in_query"));
    }
    assert_eq!((world.api.seen().len(), world.token_calls()), (0, 0));
    // Where ours does not go, and where the name is another.
    for path in ["/tokeninfo?access_token=mine", "/v1/me?private_token=mine"] {
        assert_eq!(world.get(path).await.status, if path.starts_with("/v1") { 200 } else { 401 }, "{path}");
    }
    assert_eq!(world.api.tokens(), ["none".into(), world.issued.access(1)]);
    assert!(world.api.seen()[0].target.ends_with("/tokeninfo?access_token=mine"));
}

#[tokio::test]
async fn no_field_of_the_agents_steers_the_proxy_or_one_behind_it() {
    // SEC-046
    let world = World::start().await;
    let mut call = world.call("GET", "/me").with("forwarded", "for=10.0.0.1").with("x-forwarded-for", "10.0.0.1");
    for name in ["x-sidebearer-user", "x-sidebearer-provider", "sidebearer-user", "sidebearer-connect-url"] {
        call = call.with(name, "somebody else");
    }
    assert_eq!(call.with("x-sidebearers", "1").send().await.status, 200);
    let mut names = world.api.seen()[0].names().into_iter().map(str::to_owned).collect::<Vec<_>>();
    names.sort_unstable();
    assert_eq!(names, ["authorization", "forwarded", "via", "x-forwarded-for", "x-sidebearers"]);
    assert_eq!(world.request_told().user.unwrap().to_string(), "default");
}

#[tokio::test]
async fn methods_are_compared_exactly() {
    // SEC-049
    let routes = "- host: api.test\n  methods: [POST]\n  provider: main";
    let world = Setup::new().routes(routes).start().await;
    for (method, token) in [("POST", world.issued.access(1)), ("post", "none".into()), ("POSTS", "none".into())] {
        world.call(method, "/x").with("x-http-method-override", "GET").send().await;
        assert_eq!(world.api.tokens().last(), Some(&token), "{method}");
    }
}

#[tokio::test]
async fn cookies_that_came_in_crumbs_arrive_as_one() {
    // SEC-063, H6
    let world = Setup::new().api_speaks(&["http/1.1"]).start().await;
    let streams = world.tunnel("api.test:443").await.tls("api.test", &["h2"]).await.unwrap().http2().await;
    let request = Request::get("https://api.test/").header("cookie", "a=1").header("cookie", "b=2");
    assert_eq!(streams.send(request.body(Filler::text("")).unwrap()).await.unwrap().status, 200);
    assert_eq!(world.api.seen()[0].header("cookie"), Some("a=1; b=2"));
}

#[tokio::test]
async fn a_get_with_a_body_is_passed_on() {
    // SEC-061
    for method in ["GET", "DELETE"] {
        let world = World::start().await;
        assert_eq!(world.call(method, "/x").body(Filler::of(100)).send().await.status, 200);
        assert_eq!((world.api.seen()[0].length, world.api.seen()[0].method.as_str()), (100, method));
    }
}

#[tokio::test]
async fn an_answer_to_head_has_no_body() {
    // SEC-069
    let world = Setup::new().api_speaks(&["http/1.1"]).start().await;
    world.api.answers_raw([raw("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").and_close()]);
    let mut agent = world.api_connection().await;
    agent.says("HEAD /x HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n").await;
    let heard = agent.hears_to_the_end().await;
    assert!(heard.starts_with("HTTP/1.1 200 OK\r\n") && heard.ends_with("\r\n\r\n"), "{heard}");
}
