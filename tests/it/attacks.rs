//! Agents that speak HTTP/2 as no client does: it is their connection that ends, and nobody else's.

use crate::world::answer::{Answer, Filler, Gate};
use crate::world::frames::{
    self, CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Frame, Frames, GOAWAY, HEADERS, PING,
    PROTOCOL_ERROR, REFUSED_STREAM, RST_STREAM, SETTINGS, WINDOW_UPDATE, frame,
};
use crate::world::{Setup, World, soon};

/// A request without a body.
fn get(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, frames::request("GET", "/x", &[]))
}

/// A request whose body is still to come.
fn post(stream: u32, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, frames::request("POST", "/x", fields))
}

async fn attacker(world: &World) -> Frames {
    world.api_h2().await.frames().await
}

/// What the connection ends with, if it does after these bytes.
async fn ends_after(world: &World, bytes: Vec<u8>) -> u32 {
    let mut agent = attacker(world).await;
    let _ = agent.tries_to_say(bytes).await;
    agent.hears_a(GOAWAY).await.number(4)
}

/// Streams that the agent opens: odd numbers.
fn streams(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|number| 2 * number + 1)
}

async fn others_are_served(world: &World) {
    assert_eq!(world.call("GET", "/me").over_h2().send().await.status, 200);
}

#[tokio::test]
async fn streams_that_are_reset_as_they_are_opened_end_their_connection() {
    // LST-017: rapid reset.
    let world = World::start().await;
    let flood =
        streams(1000).flat_map(|stream| [get(stream), frames::reset(stream, frames::CANCEL)].concat()).collect();
    assert_eq!(ends_after(&world, flood).await, ENHANCE_YOUR_CALM);
    others_are_served(&world).await;
}

#[tokio::test]
async fn requests_that_are_only_begun_end_their_connection() {
    // LST-017: rapid reset of streams that have been taken, which reaches the upstream.
    let world = World::start().await;
    let gate = Gate::shut();
    world.api_answers((0..1000).map(|_| Answer::from(200).once(&gate)));
    let mut agent = attacker(&world).await;
    let mut begun = 0;
    for stream in streams(1000) {
        if agent.tries_to_say(get(stream)).await.is_err() {
            break;
        }
        let arrived = tokio::select! {
            () = world.api.has_seen(begun + 1) => true,
            () = async { while agent.hears().await.is_some() {} } => false,
        };
        if !arrived || agent.tries_to_say(frames::reset(stream, frames::CANCEL)).await.is_err() {
            break;
        }
        begun += 1;
    }
    assert!((257..300).contains(&begun), "{begun}");
    world.api_answers(std::iter::empty::<Answer>());
    gate.open();
    others_are_served(&world).await;
}

#[tokio::test]
async fn streams_that_the_agent_makes_us_reset_end_their_connection() {
    // LST-017: MadeYouReset.
    let world = World::start().await;
    let nothing = 0u32.to_be_bytes();
    let flood = streams(2000).flat_map(|stream| [post(stream, &[]), frame(WINDOW_UPDATE, 0, stream, nothing)].concat());
    let mut agent = attacker(&world).await;
    let _ = agent.tries_to_say(flood.collect::<Vec<_>>()).await;
    let resets = agent.hears_to_the_end().await.iter().filter(|frame| frame.kind == RST_STREAM).count();
    assert!(resets <= 1024, "{resets}");
    others_are_served(&world).await;
}

#[tokio::test]
async fn a_head_without_end_ends_its_connection() {
    // LST-017: CONTINUATION flood.
    let world = World::start().await;
    let mut flood = frame(HEADERS, END_STREAM, 1, frames::request("GET", "/x", &[]));
    for _ in 0..2000 {
        flood.extend(frame(CONTINUATION, 0, 1, frames::block(&[("x-more", "and more")])));
    }
    assert_eq!(ends_after(&world, flood).await, ENHANCE_YOUR_CALM);
    others_are_served(&world).await;
    assert_eq!(world.api.seen().len(), 1);
}

#[tokio::test]
async fn a_body_of_empty_frames_ends_its_connection() {
    // LST-017
    let world = World::start().await;
    let flood = std::iter::once(post(1, &[])).chain((0..1000).map(|_| frame(DATA, 0, 1, [])));
    assert_eq!(ends_after(&world, flood.flatten().collect()).await, ENHANCE_YOUR_CALM);
    others_are_served(&world).await;
}

#[tokio::test]
async fn pings_and_settings_are_answered_one_by_one_however_many_come() {
    // LST-017: nothing is kept of them, and what is not read is not written.
    let world = World::start().await;
    for flood in [frame(PING, 0, 0, [7; 8]), frames::settings(&[(3, 100)])] {
        let kind = flood[3];
        let mut agent = attacker(&world).await;
        agent.says(flood.repeat(5000)).await;
        for _ in 0..5000 {
            while agent.hears_a(kind).await.flags & frames::ACK == 0 {}
        }
        others_are_served(&world).await;
        agent.says(get(1)).await;
        assert_eq!(agent.hears_a(HEADERS).await.stream, 1);
    }
}

/// A head whose few bytes stand for one field of this size, so many times (RFC 7541 section 6.1).
fn bomb(value: usize, times: usize) -> Vec<u8> {
    let field = [vec![0x40], frames::text("x-bomb"), frames::text(&"x".repeat(value))].concat();
    [frames::request("GET", "/x", &[]), field, vec![0xbe; times]].concat()
}

#[tokio::test]
async fn a_head_that_unpacks_to_too_much_is_refused() {
    // LST-017: HPACK bomb.
    let world = World::start().await;
    for (value, times) in [(3000, 10_000), (1, 5000), (1, 140)] {
        let mut agent = attacker(&world).await;
        agent.says(frame(HEADERS, END_HEADERS | END_STREAM, 1, bomb(value, times))).await;
        let refused = loop {
            match agent.hears().await {
                None => break true,
                Some(Frame { kind: GOAWAY | RST_STREAM, .. }) => break true,
                // `:status: 431`, which has no short form.
                Some(Frame { kind: HEADERS, payload, .. }) => break payload[0] != 0x88,
                Some(_) => {}
            }
        };
        assert!(refused, "{value} {times}");
    }
    assert_eq!(world.api.seen().len(), 0);
    let mut agent = attacker(&world).await;
    agent.says(frame(HEADERS, END_HEADERS | END_STREAM, 1, bomb(1, 90))).await;
    assert_eq!(agent.hears_a(HEADERS).await.payload[0], 0x88);
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_those_below_it_are_answered() {
    let world = World::start().await;
    let gate = Gate::shut();
    world.api_answers((0..1024).map(|_| Answer::from(200).once(&gate)));
    let mut agent = attacker(&world).await;
    agent.says(streams(1124).flat_map(get).collect::<Vec<_>>()).await;
    for _ in 0..100 {
        assert_eq!(agent.hears_a(RST_STREAM).await.number(0), REFUSED_STREAM);
    }
    gate.open();
    for _ in 0..1024 {
        agent.hears_a(HEADERS).await;
    }
}

#[tokio::test]
async fn an_agent_that_never_opens_its_windows_stops_nobody_else() {
    // LST-017: window 0.
    let world = Setup::new().api_speaks(&["h2"]).start().await;
    world.api_answers((0..50).map(|_| Answer::from(200).saying_bytes(1 << 30)));
    let mut agent = attacker(&world).await;
    agent.says(frames::settings(&[(frames::INITIAL_WINDOW_SIZE, 0)])).await;
    agent.says(streams(50).flat_map(get).collect::<Vec<_>>()).await;
    for _ in 0..50 {
        agent.hears_a(HEADERS).await;
    }
    for _ in 0..3 {
        let reply = world.call("POST", "/me").body(Filler::of(3 << 20)).over_h2().send().await;
        assert_eq!((reply.status, reply.text()), (200, "welcome\n"));
    }
}

#[tokio::test]
async fn an_answer_that_its_agent_does_not_read_is_given_up() {
    // LST-017: window 0.
    let world = Setup::new().top("limits: {write_timeout: 1s}").api_speaks(&["h2"]).start().await;
    let canceled = Gate::shut();
    let noticed = canceled.clone();
    world.api.is_served_by(move |_, io| {
        let noticed = noticed.clone();
        async move {
            let mut frames = Frames::server(io, &[]).await;
            let stream = frames.hears_a_request().await.unwrap();
            frames.says(frame(HEADERS, END_HEADERS, stream, [0x88])).await;
            frames.says(frame(DATA, 0, stream, [0; 10_000]).repeat(20)).await;
            assert_eq!(frames.hears_a(RST_STREAM).await.number(0), frames::CANCEL);
            noticed.open();
        }
    });
    let mut agent = attacker(&world).await;
    agent.says([frames::settings(&[(frames::INITIAL_WINDOW_SIZE, 0)]), get(1)].concat()).await;
    agent.hears_a(HEADERS).await;
    soon(canceled.pass()).await;
    agent.says(frames::settings(&[(frames::INITIAL_WINDOW_SIZE, 1 << 20)])).await;
    agent.hears_a(RST_STREAM).await;
}

#[tokio::test]
async fn what_http1_could_misread_is_refused_in_http2() {
    // SEC-008, SEC-009, SEC-044, SEC-063
    let world = Setup::new().api_speaks(&["http/1.1"]).start().await;
    let with = |fields: &[(&str, &str)]| frames::request("GET", "/x", fields);
    let heads = [
        ("CR LF in a value", with(&[("x-a", "1\r\nx-b: 2")])),
        ("LF in a value", with(&[("x-a", "1\nx-b: 2")])),
        ("NUL in a value", with(&[("x-a", "1\0")])),
        ("CR LF in a name", with(&[("x-a\r\nx-b", "1")])),
        ("a colon in a name", with(&[("x-a:", "1")])),
        ("a space in a name", with(&[("x a", "1")])),
        ("an uppercase name", with(&[("X-A", "1")])),
        ("transfer-encoding", with(&[("transfer-encoding", "chunked")])),
        ("connection", with(&[("connection", "x-a")])),
        ("keep-alive", with(&[("keep-alive", "timeout=5")])),
        ("proxy-connection", with(&[("proxy-connection", "keep-alive")])),
        ("upgrade", with(&[("upgrade", "websocket")])),
        ("te", with(&[("te", "gzip")])),
        ("two lengths", with(&[("content-length", "1"), ("content-length", "2")])),
        ("a length that is none", with(&[("content-length", "+0")])),
        ("a length and no body", with(&[("content-length", "5")])),
        ("a space in the path", frames::request("GET", "/x y", &[])),
        ("a request in the path", frames::request("GET", "/x HTTP/1.1\r\nHost: evil.test\r\n\r\n", &[])),
        ("an empty path", frames::request("GET", "", &[])),
        ("a path without a slash", frames::request("GET", "x", &[])),
        ("a space in the method", frames::request("GET /x", "/x", &[])),
        ("another host", with(&[("host", "evil.test")])),
        ("two hosts", with(&[("host", "api.test"), ("host", "api.test")])),
        ("two paths", with(&[(":path", "/y")])),
        ("two authorities", with(&[(":authority", "evil.test")])),
        ("a pseudo field behind others", with(&[("x-a", "1"), (":authority", "api.test")])),
        ("an unknown pseudo field", with(&[(":x", "1")])),
        ("a protocol for a GET", with(&[(":protocol", "websocket")])),
        ("a status", with(&[(":status", "200")])),
        ("no path", frames::block(&[(":method", "GET"), (":scheme", "https"), (":authority", "api.test")])),
        ("no method", frames::block(&[(":path", "/x"), (":scheme", "https"), (":authority", "api.test")])),
        ("no authority", frames::block(&[(":method", "GET"), (":scheme", "https"), (":path", "/x")])),
        (
            "userinfo",
            frames::block(&[
                (":method", "GET"),
                (":scheme", "https"),
                (":authority", "api.test@evil.test"),
                (":path", "/x"),
            ]),
        ),
    ];
    for (what, head) in heads {
        let mut agent = attacker(&world).await;
        agent.says(frame(HEADERS, END_HEADERS | END_STREAM, 1, head)).await;
        let refused = loop {
            match agent.hears().await {
                None => break "closed",
                Some(Frame { kind: RST_STREAM, .. }) => break "reset",
                Some(Frame { kind: GOAWAY, .. }) => break "goaway",
                Some(Frame { kind: HEADERS, payload, .. }) if payload[0] == 0x8c => break "400",
                Some(Frame { kind: HEADERS, payload, .. }) => break if payload[0] == 0x88 { "200" } else { "other" },
                Some(_) => {}
            }
        };
        assert_ne!(refused, "200", "{what}");
        assert_eq!(world.api.seen().len(), 0, "{what}: {:?}", world.api.seen());
    }
    others_are_served(&world).await;
}

#[tokio::test]
async fn a_body_that_is_not_as_long_as_it_says_is_not_completed_upstream() {
    // SEC-063
    for (length, body) in [("3", "four"), ("5", "four"), ("4", "")] {
        for protocol in ["http/1.1", "h2"] {
            let world = Setup::new().api_speaks(&[protocol]).start().await;
            let mut agent = attacker(&world).await;
            agent.says([post(1, &[("content-length", length)]), frame(DATA, END_STREAM, 1, body)].concat()).await;
            let ended = loop {
                match agent.hears().await {
                    Some(Frame { kind: RST_STREAM | GOAWAY, .. }) | None => break true,
                    Some(Frame { kind: HEADERS, payload, .. }) => break payload[0] != 0x88,
                    Some(_) => {}
                }
            };
            assert!(ended, "{length} {body:?}");
            others_are_served(&world).await;
            assert!(
                world.api.seen().iter().all(|seen| !seen.complete || seen.method == "GET"),
                "{:?}",
                world.api.seen()
            );
        }
    }
}

#[tokio::test]
async fn a_broken_frame_ends_only_its_connection() {
    let world = World::start().await;
    for (what, bytes) in [
        ("DATA on no stream", frame(DATA, 0, 0, "x")),
        ("DATA on an idle stream", frame(DATA, 0, 9, "x")),
        ("HEADERS on an even stream", frame(HEADERS, END_HEADERS | END_STREAM, 2, frames::request("GET", "/x", &[]))),
        ("SETTINGS of a wrong length", frame(SETTINGS, 0, 0, [0; 5])),
        ("PING of a wrong length", frame(PING, 0, 0, [0; 7])),
        ("an unfinished head between others", [frame(HEADERS, 0, 1, []), frame(PING, 0, 0, [0; 8])].concat()),
        ("not HPACK", frame(HEADERS, END_HEADERS | END_STREAM, 1, [0xff; 20])),
        ("an update of the window by nothing", frame(WINDOW_UPDATE, 0, 0, [0; 4])),
    ] {
        let code = ends_after(&world, bytes).await;
        assert!(code >= PROTOCOL_ERROR, "{what}");
    }
    others_are_served(&world).await;
}
