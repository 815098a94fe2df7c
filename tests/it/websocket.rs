//! WebSockets of agents that speak HTTP/2 (RFC 8441), to upstreams that do and to upstreams that do not.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use h2::RecvStream;
use h2::SendStream;
use h2::ext::Protocol;
use http::{HeaderMap, Method, Request, Response};
use sha1::{Digest, Sha1};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::raw::Bytestream;
use crate::world::server::{Seen, Server};
use crate::world::{Setup, World, soon};

const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A handshake as an agent says it in HTTP/2.
fn handshake(protocol: &'static str) -> Request<()> {
    let mut request = Request::connect("https://api.test/live?room=1").header("sec-websocket-version", "13");
    request.extensions_mut().unwrap().insert(Protocol::from_static(protocol));
    request.body(()).unwrap()
}

/// What an agent has once it is answered.
struct Socket {
    status: u16,
    headers: HeaderMap,
    to: SendStream<Bytes>,
    from: RecvStream,
}

impl Socket {
    async fn says(&mut self, text: &'static str) {
        self.to.send_data(Bytes::from_static(text.as_bytes()), false).unwrap();
    }

    fn says_end(&mut self) {
        self.to.send_data(Bytes::new(), true).unwrap();
    }

    async fn hears(&mut self) -> Option<String> {
        let data = soon(self.from.data()).await?.unwrap();
        self.from.flow_control().release_capacity(data.len()).unwrap();
        Some(String::from_utf8(data.to_vec()).unwrap()).filter(|text| !text.is_empty())
    }

    async fn hears_to_the_end(&mut self) -> String {
        let mut all = String::new();
        while let Some(text) = self.hears().await {
            all.push_str(&text);
        }
        all
    }
}

async fn opened(world: &World) -> Socket {
    asked(world, handshake("websocket")).await
}

async fn asked(world: &World, request: Request<()>) -> Socket {
    let mut sender = soon(world.api_h2().await.h2().await.ready()).await.unwrap();
    let (response, to) = sender.send_request(request, false).unwrap();
    let (head, from) = soon(response).await.unwrap().into_parts();
    Socket { status: head.status.as_u16(), headers: head.headers, to, from }
}

/// Reads one head of HTTP/1.1.
async fn head(io: &mut Box<dyn Bytestream>) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.ok()?);
    }
    Some(String::from_utf8(head).unwrap())
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// The API answers the handshake of each connection with the next of these heads, `ACCEPT` for the right answer to its
/// key, and after a 101 sends back all that it hears and, when it has heard the end, `goodbye`.
fn in_http1(server: &Server, answers: &'static [&'static str]) {
    let noted = server.clone();
    server.is_served_by(move |_, mut io| {
        let noted = noted.clone();
        async move {
            while let Some(head) = head(&mut io).await {
                let key = field(&head, "sec-websocket-key").unwrap_or_default();
                let accept = BASE64_STANDARD.encode(Sha1::digest(format!("{key}{GUID}")));
                let seen = Seen { body: head.clone().into_bytes(), ..Seen::default() };
                let answer = answers[noted.remember(seen).min(answers.len() - 1)].replace("ACCEPT", &accept);
                io.write_all(answer.as_bytes()).await.unwrap();
                io.flush().await.unwrap();
                if answer.starts_with("HTTP/1.1 101 ") {
                    echo(&mut io).await;
                    return;
                }
            }
        }
    });
}

async fn echo(io: &mut Box<dyn Bytestream>) {
    let mut buffer = [0; 1024];
    loop {
        match io.read(&mut buffer).await.unwrap_or(0) {
            0 => break,
            length => io.write_all(&buffer[..length]).await.unwrap(),
        }
        io.flush().await.unwrap();
    }
    let _ = io.write_all(b"goodbye").await;
    let _ = io.shutdown().await;
}

/// As [`in_http1`], for a server that takes WebSockets in HTTP/2; by status.
fn in_http2(server: &Server, answers: &'static [u16]) {
    let noted = server.clone();
    server.is_served_by(move |_, io| {
        let noted = noted.clone();
        async move {
            let mut builder = h2::server::Builder::new();
            let mut connection = builder.enable_connect_protocol().handshake::<_, Bytes>(io).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let protocol = request.extensions().get::<Protocol>().map(|protocol| protocol.as_str().to_owned());
                let seen = Seen {
                    method: format!("{} {}", request.method(), protocol.unwrap_or_default()),
                    target: request.uri().to_string(),
                    headers: request.headers().clone(),
                    ..Seen::default()
                };
                let status = answers[noted.remember(seen).min(answers.len() - 1)];
                let response = Response::builder().status(status).body(()).unwrap();
                let Ok(mut to) = respond.send_response(response, status != 200) else { continue };
                let mut from = request.into_body();
                tokio::spawn(async move {
                    while let Some(Ok(data)) = from.data().await {
                        let _ = from.flow_control().release_capacity(data.len());
                        let _ = to.send_data(data, false);
                    }
                    let _ = to.send_data(Bytes::from_static(b"goodbye"), true);
                });
            }
        }
    });
}

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: ACCEPT\r\n\r\n";
const UNAUTHORIZED: &str = "HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Bearer\r\ncontent-length: 0\r\n\r\n";

async fn http1() -> World {
    Setup::new().api_speaks(&["http/1.1"]).start().await
}

#[tokio::test]
async fn a_websocket_in_http2_opens_on_an_upstream_that_speaks_http1() {
    // RTY-023, RFC 8441 section 5
    let world = http1().await;
    in_http1(&world.api, &[SWITCHED]);
    let mut socket = opened(&world).await;
    assert_eq!((socket.status, socket.headers.get("sec-websocket-accept")), (200, None));
    assert_eq!((socket.headers.get("upgrade"), socket.headers.get("connection")), (None, None));
    socket.says("hello").await;
    assert_eq!(socket.hears().await.as_deref(), Some("hello"));
    let head = String::from_utf8(world.api.seen()[0].body.clone()).unwrap();
    assert!(head.starts_with("GET /live?room=1 HTTP/1.1\r\n"), "{head}");
    assert_eq!((field(&head, "upgrade"), field(&head, "connection")), (Some("websocket"), Some("upgrade")));
    assert_eq!((field(&head, "host"), field(&head, "sec-websocket-version")), (Some("api.test"), Some("13")));
    assert_eq!(field(&head, "authorization"), Some(&*format!("Bearer {}", world.issued.access(1))));
    let told = world.request_told();
    assert_eq!((told.method, told.path.as_str(), told.status.unwrap().as_u16()), (Method::GET, "/live", 200));
}

#[tokio::test]
async fn a_websocket_in_http2_stays_in_http2_where_the_upstream_takes_it_so() {
    // RFC 8441 section 4
    let world = Setup::new().api_speaks(&["h2"]).start().await;
    in_http2(&world.api, &[200]);
    let mut socket = opened(&world).await;
    socket.says("hello").await;
    assert_eq!((socket.status, socket.hears().await.as_deref()), (200, Some("hello")));
    let seen = &world.api.seen()[0];
    assert_eq!((seen.method.as_str(), seen.target.as_str()), ("CONNECT websocket", "https://api.test/live?room=1"));
    assert_eq!((seen.header("sec-websocket-key"), seen.header("upgrade")), (None, None));
    assert_eq!(seen.token(), Some(&*world.issued.access(1)));
}

#[tokio::test]
async fn a_websocket_that_met_a_401_in_either_protocol_is_open_after_one_200() {
    // RTY-023, C1, C10
    for protocol in ["h2", "http/1.1"] {
        let world = Setup::new().api_speaks(&[protocol]).start().await;
        match protocol {
            "h2" => in_http2(&world.api, &[401, 200]),
            _ => in_http1(&world.api, &[UNAUTHORIZED, SWITCHED]),
        }
        let mut socket = opened(&world).await;
        socket.says("hello").await;
        assert_eq!((socket.status, socket.hears().await.as_deref()), (200, Some("hello")), "{protocol}");
        assert_eq!((world.api.seen().len(), world.token_calls()), (2, 2), "{protocol}");
        assert!(world.request_told().retried);
    }
}

#[tokio::test]
async fn one_side_of_a_websocket_may_end_before_the_other() {
    for protocol in ["h2", "http/1.1"] {
        let world = Setup::new().api_speaks(&[protocol]).start().await;
        match protocol {
            "h2" => in_http2(&world.api, &[200]),
            _ => in_http1(&world.api, &[SWITCHED]),
        }
        let mut socket = opened(&world).await;
        socket.says("hello").await;
        assert_eq!(socket.hears().await.as_deref(), Some("hello"), "{protocol}");
        socket.says_end();
        assert_eq!(socket.hears_to_the_end().await, "goodbye", "{protocol}");
    }
}

#[tokio::test]
async fn an_upstream_that_only_speaks_http2_without_websockets_is_asked_in_http1() {
    // It may still be the same server that offers HTTP/1.1 to who asks for it.
    let world = World::start().await;
    let mut socket = opened(&world).await;
    assert_eq!((socket.status, world.api.seen()[0].version), (502, http::Version::HTTP_11));
    assert!(socket.hears_to_the_end().await.contains("http_upgrade_failed"));
}

#[tokio::test]
async fn a_handshake_that_is_refused_is_refused_to_the_agent() {
    let world = http1().await;
    in_http1(&world.api, &["HTTP/1.1 403 Forbidden\r\ncontent-length: 4\r\n\r\nnope"]);
    let mut socket = opened(&world).await;
    assert_eq!((socket.status, socket.hears_to_the_end().await.as_str()), (403, "nope"));
}

#[tokio::test]
async fn a_handshake_that_the_upstream_did_not_understand_opens_nothing() {
    // SEC-066, RFC 6455 section 4.1
    let no_accept = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let another = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    let page = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    for (answers, code) in [
        (&[no_accept][..], "http_protocol_error"),
        (&[another], "http_protocol_error"),
        (&[page], "http_upgrade_failed"),
    ] {
        let world = http1().await;
        in_http1(&world.api, Box::leak(answers.to_vec().into_boxed_slice()));
        let mut socket = opened(&world).await;
        let body = socket.hears_to_the_end().await;
        assert_eq!((socket.status, body.contains(code)), (502, true), "{answers:?}: {body}");
    }
}

#[tokio::test]
async fn a_connect_in_a_tunnel_is_for_a_websocket_or_refused() {
    let world = World::start().await;
    for protocol in ["connect-udp", "connect-ip", "WebSocket", "webtransport"] {
        let mut socket = asked(&world, handshake(protocol)).await;
        let body = socket.hears_to_the_end().await;
        assert_eq!((socket.status, body.contains("unknown_protocol")), (501, true), "{protocol}: {body}");
    }
    let mut socket = asked(&world, Request::connect("api.test:443").body(()).unwrap()).await;
    let body = socket.hears_to_the_end().await;
    assert_eq!((socket.status, body.contains("connect_in_tunnel")), (400, true), "{body}");
    assert_eq!((world.api.met().0, world.token_calls()), (0, 0));
}

#[tokio::test]
async fn routes_take_a_websocket_for_the_get_that_it_is() {
    let routes =
        "- host: api.test\n  paths: [/live]\n  methods: [GET]\n  provider: main\n- host: api.test\n  deny: true";
    let world = Setup::new().routes(routes).api_speaks(&["http/1.1"]).start().await;
    in_http1(&world.api, &[SWITCHED]);
    assert_eq!(opened(&world).await.status, 200);
    assert_eq!(world.request_told().route.as_deref(), Some("routes[0] api.test"));
}

#[tokio::test]
async fn a_websocket_for_another_host_is_misdirected() {
    // SEC-008
    let world = World::start().await;
    let mut request = handshake("websocket");
    *request.uri_mut() = "https://evil.test/live".parse().unwrap();
    assert_eq!(asked(&world, request).await.status, 421);
    assert_eq!((world.api.met().0, world.evil.met().0), (0, 0));
}

#[tokio::test]
async fn agents_are_told_that_websockets_are_taken_in_http2() {
    // RFC 8441 section 3
    let world = World::start().await;
    let sender = soon(world.api_h2().await.h2().await.ready()).await.unwrap();
    let (response, _) = sender.clone().send_request(Request::get("https://api.test/").body(()).unwrap(), true).unwrap();
    soon(response).await.unwrap();
    assert!(sender.is_extended_connect_protocol_enabled());
}

#[tokio::test]
async fn a_websocket_that_says_nothing_keeps_its_connection_from_being_wound_down() {
    // RTY-025
    let world = Setup::new().api_speaks(&["http/1.1"]).top("limits: {idle_timeout: 500ms}").start().await;
    in_http1(&world.api, &[SWITCHED]);
    let mut agent = soon(world.api_h2().await.h2().await.ready()).await.unwrap();
    let (response, _to) = agent.send_request(handshake("websocket"), false).unwrap();
    let _open = soon(response).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    let mut agent = soon(agent.ready()).await.unwrap();
    let (response, _to) = agent.send_request(handshake("websocket"), false).unwrap();
    assert_eq!(soon(response).await.unwrap().status(), 200);
}
