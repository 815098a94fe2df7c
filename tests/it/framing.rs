//! Where one message ends and the next begins: the same for the agent, the proxy and the upstream, or an error.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::world::answer::answer;
use crate::world::frames::{self, DATA, END_HEADERS, END_STREAM, Frames, HEADERS, RST_STREAM, frame};
use crate::world::server::raw;
use crate::world::{Setup, World, soon};

const WEBSOCKET: &str = "GET /ws HTTP/1.1\r\nHost: api.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
const FRAME: &[u8] = b"\x81\x05hello";

/// An API that speaks HTTP/1.1 only.
async fn http1() -> World {
    Setup::new().api_speaks(&["http/1.1"]).start().await
}

#[tokio::test]
async fn a_request_that_can_be_split_in_two_ways_is_refused_and_its_connection_closed() {
    // SEC-051, SEC-052, SEC-053, SEC-054, SEC-056
    let world = World::start().await;
    for head in [
        "POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: +4\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: xchunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n identity\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\nHost: api.test\nContent-Length: 4\n\n",
        "POST / HTTP/1.1\r\nHost: api.test\n\r\nContent-Length: 4\r\n\r\n",
    ] {
        let smuggled = "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: api.test\r\n\r\n";
        for mut agent in [world.api_connection().await, world.connection().await] {
            agent.says(format!("{head}{smuggled}")).await;
            let heard = agent.hears_to_the_end().await;
            assert!(heard.starts_with("HTTP/1.1 400 "), "{head:?}: {heard}");
            assert_eq!(heard.matches("HTTP/1.1 ").count(), 1, "{head:?}: {heard}");
        }
    }
    assert_eq!((world.api.seen().len(), world.token_calls()), (0, 0));
}

#[tokio::test]
async fn an_empty_line_before_a_request_is_forgiven() {
    // SEC-056
    let world = World::start().await;
    let mut agent = world.api_connection().await;
    for _ in 0..2 {
        agent.says("\r\nGET / HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
        assert_eq!(agent.hears().await.status, 200);
    }
}

#[tokio::test]
async fn equal_lengths_are_one_and_chunks_are_framed_anew() {
    // SEC-052, SEC-055
    let world = http1().await;
    let mut agent = world.api_connection().await;
    agent.says("POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok").await;
    assert_eq!(agent.hears().await.status, 200);
    agent.says("POST / HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: Chunked\r\n\r\n2;x=y\r\nok\r\n0\r\n\r\n").await;
    assert_eq!(agent.hears().await.status, 200);
    let seen = world.api.seen();
    assert_eq!((seen[0].header("content-length"), seen[0].body.as_slice()), (Some("2"), &b"ok"[..]));
    assert_eq!((seen[1].header("transfer-encoding"), seen[1].body.as_slice()), (Some("chunked"), &b"ok"[..]));
}

#[tokio::test]
async fn a_body_that_breaks_off_is_not_completed_upstream() {
    // SEC-055
    for (broken, over) in [("2\r\nok\r\n+1\r\nx\r\n0\r\n\r\n", "http/1.1"), ("2\r\nok\r\n0_2\r\nxx\r\n0\r\n\r\n", "h2")]
    {
        let world = Setup::new().api_speaks(&[over]).start().await;
        let mut agent = world.api_connection().await;
        agent.says(format!("POST / HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n{broken}")).await;
        let heard = agent.hears_to_the_end().await;
        assert!(!heard.contains(" 200 "), "{heard}");
        assert!(world.api.seen().iter().all(|seen| !seen.complete), "{broken:?}");
    }
}

/// An agent of which the API has said 202 before its upload was whole.
async fn answered_early(world: &World) -> Frames {
    let mut agent = world.api_h2().await.frames().await;
    let head = frame(HEADERS, END_HEADERS, 1, frames::request("POST", "/x", &[]));
    agent.says([head, frame(DATA, 0, 1, "half")].concat()).await;
    assert!(agent.hears_a(HEADERS).await.ends_stream());
    agent
}

#[tokio::test]
async fn an_upload_that_its_agent_resets_without_an_error_is_not_completed_upstream() {
    // H7
    let world = Setup::new().api_speaks(&["h2"]).start().await;
    let (hears, mut heard) = mpsc::unbounded_channel();
    world.api.is_served_by(move |_, io| {
        let hears = hears.clone();
        async move {
            let mut frames = Frames::server(io, &[]).await;
            let stream = frames.hears_a(DATA).await.stream;
            let accepted = frames::block(&[(":status", "202")]);
            frames.says(frame(HEADERS, END_HEADERS | END_STREAM, stream, accepted)).await;
            while let Some(frame) = frames.hears().await {
                if matches!(frame.kind, DATA | RST_STREAM) {
                    hears.send(frame.kind).unwrap();
                }
            }
        }
    });
    let mut agent = answered_early(&world).await;
    agent.says(frames::reset(1, frames::NO_ERROR)).await;
    assert_eq!(soon(heard.recv()).await, Some(RST_STREAM));
}

#[tokio::test]
async fn an_upload_that_its_agent_resets_without_an_error_is_not_completed_in_http1_either() {
    // H7
    let world = http1().await;
    let (hears, mut heard) = mpsc::unbounded_channel();
    world.api.is_served_by(move |_, mut io| {
        let hears = hears.clone();
        async move {
            let mut all = Vec::new();
            while !all.ends_with(b"4\r\nhalf\r\n") {
                io.read_buf(&mut all).await.unwrap();
            }
            io.write_all(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n").await.unwrap();
            let _ = io.read_buf(&mut all).await;
            hears.send(String::from_utf8(all).unwrap()).unwrap();
        }
    });
    let mut agent = answered_early(&world).await;
    agent.says(frames::reset(1, frames::NO_ERROR)).await;
    let heard = soon(heard.recv()).await.unwrap();
    assert!(heard.ends_with("4\r\nhalf\r\n"), "{heard}");
}

#[tokio::test]
async fn what_is_left_of_a_refused_requests_body_is_never_the_next_request() {
    // SEC-060
    let routes = "- host: api.test\n  deny: true";
    let world = Setup::new().routes(routes).start().await;
    let mut agent = world.api_connection().await;
    agent.says("POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 1048576\r\n\r\n").await;
    assert_eq!(agent.hears().await.code(), "denied");
    let request = "GET /smuggled HTTP/1.1\r\nHost: api.test\r\n\r\n";
    agent.says_if_open(request.repeat(100)).await;
    assert_eq!(agent.hears_to_the_end().await, "");
    assert_eq!(world.requests_told().len(), 1);
}

#[tokio::test]
async fn an_agent_that_is_still_sending_hears_why_nobody_reads_it() {
    // RFC 9112 section 9.6
    let routes = "- host: api.test\n  deny: true\n- host: plain.test:80\n  plaintext: true\n  deny: true";
    let world = Setup::new().routes(routes).start().await;
    let secure = "POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 67108864\r\n\r\n";
    let plain = "POST http://plain.test/ HTTP/1.1\r\nHost: plain.test\r\nContent-Length: 67108864\r\n\r\n";
    let chunked =
        "POST http://plain.test/ HTTP/1.1\r\nHost: plain.test\r\nTransfer-Encoding: chunked\r\n\r\n800000\r\n";
    for (head, mut agent) in
        [(secure, world.api_connection().await), (plain, world.connection().await), (chunked, world.connection().await)]
    {
        // It looks for an answer only then, and all that it sends has to be taken.
        agent.says([head.as_bytes(), &vec![b'x'; 8 << 20]].concat()).await;
        assert_eq!(agent.hears().await.code(), "denied");
    }
}

#[tokio::test]
async fn an_early_answer_of_the_api_leaves_no_request_behind() {
    // SEC-060
    let world = http1().await;
    world.api_answers([answer(413).early()]);
    let mut agent = world.api_connection().await;
    agent.says("POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 65536\r\n\r\n").await;
    assert_eq!(agent.hears().await.status, 413);
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n");
    let mut body = request("/smuggled");
    body.push_str(&"\n".repeat(65536 - body.len()));
    agent.says_if_open(body + &request("/next")).await;
    let heard = agent.hears_to_the_end().await;
    assert!(heard.matches("HTTP/1.1 ").count() <= 1, "{heard}");
    assert!(world.api.seen().iter().all(|seen| seen.target != "/smuggled"));
}

#[tokio::test]
async fn an_answer_with_both_lengths_is_delivered_by_its_chunks() {
    // SEC-064, H7
    let world = http1().await;
    let both = "HTTP/1.1 200 OK\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
    world.api.answers_raw([raw(both), raw(both)]);
    for _ in 0..2 {
        let reply = world.get("/x").await;
        assert_eq!((reply.text(), reply.header("content-length")), ("ok", None));
    }
    assert_eq!(world.api.met(), (2, 2), "its connection is not used again");
}

#[tokio::test]
async fn a_broken_answer_is_a_502_and_the_end_of_its_connection() {
    // SEC-064
    for broken in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
        "HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\nok",
        "SSH-2.0-OpenSSH_9.9\r\n\r\n",
    ] {
        let world = http1().await;
        world.api.answers_raw([raw(broken), raw(broken)]);
        for _ in 0..2 {
            let reply = world.get("/x").await;
            assert_eq!((reply.status, reply.code().as_str()), (502, "http_protocol_error"), "{broken:?}");
        }
        assert_eq!(world.api.met(), (2, 2), "{broken:?}");
    }
}

#[tokio::test]
async fn an_answer_of_too_many_fields_is_a_502_that_names_the_limit() {
    // LST-018
    let world = http1().await;
    let answer = |fields| format!("HTTP/1.1 200 OK\r\n{}Content-Length: 2\r\n\r\nok", "X: 1\r\n".repeat(fields));
    world.api.answers_raw([raw(answer(97)), raw(answer(128))]);
    assert_eq!(world.get("/x").await.status, 200);
    let reply = world.get("/x").await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "http_response_header_section_size"));
    assert!(reply.text().contains("limits.max_headers"), "{}", reply.text());
}

#[tokio::test]
async fn an_answer_nobody_asked_for_is_nobodys() {
    // SEC-065
    let world = http1().await;
    let split = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    let good = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood";
    world.api.answers_raw([raw(split), raw(good), raw(good)]);
    let mut agent = world.api_connection().await;
    for body in ["ok", "good", "good"] {
        agent.says("GET / HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
        assert_eq!(agent.hears().await.text(), body);
    }
}

#[tokio::test]
async fn an_old_upstreams_answer_ends_where_its_connection_does() {
    // SEC-071
    let world = http1().await;
    let old = || raw("HTTP/1.0 200 OK\r\n\r\nold but gold").and_close();
    world.api.answers_raw([old(), old()]);
    let mut agent = world.api_connection().await;
    for _ in 0..2 {
        agent.says("GET / HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
        let reply = agent.hears().await;
        assert_eq!((reply.text(), reply.header("transfer-encoding")), ("old but gold", Some("chunked")));
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_seen_to_break_off() {
    // H7
    let world = http1().await;
    world.api.answers_raw([raw("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf").and_close()]);
    assert!(world.call("GET", "/x").try_send().await.is_err());
    world.api.answers_raw([raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").and_close()]);
    assert!(world.call("GET", "/x").over_h2().try_send().await.is_err());
}

#[tokio::test]
async fn a_websocket_that_met_a_401_is_open_after_one_101() {
    // RTY-023, C10
    let world = World::start().await;
    world.api.answers_raw([
        raw("HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\nContent-Length: 0\r\n\r\n"),
        raw(SWITCHED).and_echo(),
    ]);
    let mut agent = world.api_connection().await;
    let reply = agent.says(WEBSOCKET).await.hears().await;
    assert_eq!((reply.status, reply.header("upgrade")), (101, Some("websocket")));
    assert_eq!(agent.says(FRAME).await.take(FRAME.len()).await, FRAME);
    assert_eq!(world.api.tokens(), [world.issued.access(1), world.issued.access(2)]);
    assert_eq!(world.request_told().status.unwrap(), 101);
}

#[tokio::test]
async fn what_follows_the_body_of_a_request_to_change_the_protocol_is_not_read_as_http() {
    // SEC-067, C10: as Docker's client begins what it attaches to.
    let head = "POST /exec HTTP/1.1\r\nHost: api.test\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n";
    let switched = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n";
    let refused = "HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\n\r\n";
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: api.test\r\n\r\n";
    for body in ["Content-Length: 2\r\n\r\n{}", "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"] {
        let world = http1().await;
        world.api.answers_raw([raw(switched).and_echo()]);
        let mut agent = world.api_connection().await;
        assert_eq!(agent.says(format!("{head}{body}")).await.hears().await.status, 101, "{body:?}");
        for said in ["ls\n", "no end of a line", smuggled] {
            assert_eq!(agent.says(said).await.take(said.len()).await, said.as_bytes(), "{body:?}");
        }

        let world = http1().await;
        world.api.answers_raw([raw(refused), raw(refused)]);
        let mut agent = world.api_connection().await;
        let heard = agent.says(format!("{head}{body}{smuggled}")).await.hears_to_the_end().await;
        assert_eq!((heard.matches("HTTP/1.1 ").count(), world.api.seen().len()), (1, 1), "{heard}");
        assert!(heard.starts_with("HTTP/1.1 409 "), "{heard}");
    }
}

#[tokio::test]
async fn a_change_of_protocol_that_was_not_asked_for_is_a_502() {
    // SEC-066
    let other = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n";
    for (asked, answered) in [
        ("GET / HTTP/1.1\r\nHost: api.test\r\n\r\n", SWITCHED),
        (WEBSOCKET, other),
        (WEBSOCKET, "HTTP/1.1 101 Switching Protocols\r\n\r\n"),
    ] {
        let world = http1().await;
        world.api.answers_raw([raw(answered).and_echo()]);
        let reply = world.api_connection().await.says(asked).await.hears().await;
        assert_eq!(reply.status, 502, "{asked:?} {answered:?}");
    }
}

#[tokio::test]
async fn bytes_sent_before_a_101_wait_for_it() {
    // SEC-067
    let world = http1().await;
    world.api.answers_raw([raw(SWITCHED).and_echo()]);
    let mut agent = world.api_connection().await;
    agent.says([WEBSOCKET.as_bytes(), FRAME].concat()).await;
    assert_eq!(agent.hears().await.status, 101);
    assert_eq!(agent.take(FRAME.len()).await, FRAME);

    let world = http1().await;
    world.api.answers_raw([raw("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").and_close()]);
    let mut agent = world.api_connection().await;
    agent.says([WEBSOCKET.as_bytes(), FRAME].concat()).await;
    assert_eq!(agent.hears().await.status, 403);
    agent.hears_to_the_end().await;
    assert_eq!((world.api.seen().len(), world.api.leftover()), (1, Vec::new()));
}
