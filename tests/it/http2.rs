//! HTTP/2 upstreams: connections that go away, streams that are refused or canceled, and more requests than streams.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response};
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};

use crate::world::answer::{Filler, Gate, answer, hex};
use crate::world::frames::{
    self, DATA, END_HEADERS, END_STREAM, Frames, HEADERS, INITIAL_WINDOW_SIZE, MAX_CONCURRENT_STREAMS, frame,
    window_update,
};
use crate::world::log::unread;
use crate::world::server::{Seen, Server};
use crate::world::{Setup, World, soon};

const INTERNAL_ERROR: u32 = 2;

async fn speaking_h2() -> World {
    Setup::new().api_speaks(&["h2"]).start().await
}

/// Notes a request on its connection.
fn note(server: &Server, connection: usize) -> usize {
    server.remember(Seen { target: connection.to_string(), ..Seen::default() })
}

/// On which connections requests arrived.
fn connections(world: &World) -> Vec<String> {
    world.api.seen().into_iter().map(|seen| seen.target).collect()
}

/// The API's first connection goes away after stream `last`, with this code, when it has heard one request; the others
/// answer.
fn goes_away(world: &World, last: u32, code: u32) {
    let noted = world.api.clone();
    world.api.is_served_by(move |number, io| {
        let noted = noted.clone();
        async move {
            let mut frames = Frames::server(io, &[]).await;
            while let Some(stream) = frames.hears_a_request().await {
                note(&noted, number);
                if number == 1 {
                    frames.says(frames::goaway(last, code)).await;
                    return frames.ends().await;
                }
                frames.answers(stream, "done").await;
            }
        }
    });
}

#[tokio::test]
async fn a_request_above_the_last_stream_of_a_goaway_is_sent_again() {
    // RTY-030, C6
    for code in [0, frames::ENHANCE_YOUR_CALM, INTERNAL_ERROR] {
        let world = speaking_h2().await;
        goes_away(&world, 0, code);
        let reply = world.call("POST", "/x").body(Filler::of(10_000)).send().await;
        assert_eq!((reply.status, reply.text()), (200, "done"), "{code}");
        assert_eq!((connections(&world), world.token_calls()), (vec!["1".into(), "2".into()], 1));
    }
}

#[tokio::test]
async fn a_request_that_the_upstream_may_have_seen_is_sent_again_only_when_that_does_no_harm() {
    // RTY-030, C6
    for (method, status, tries) in [("POST", 502, 1), ("GET", 200, 2)] {
        let world = speaking_h2().await;
        goes_away(&world, 1, INTERNAL_ERROR);
        let reply = world.call(method, "/x").send().await;
        assert_eq!((reply.status, connections(&world).len()), (status, tries), "{method}");
    }
}

#[tokio::test]
async fn requests_up_to_a_goaway_finish_and_new_ones_take_another_connection() {
    // RTY-030
    let world = speaking_h2().await;
    let gate = Gate::shut();
    let (noted, held) = (world.api.clone(), gate.clone());
    world.api.is_served_by(move |number, io| {
        let (noted, held) = (noted.clone(), held.clone());
        async move {
            let mut frames = Frames::server(io, &[]).await;
            while let Some(stream) = frames.hears_a_request().await {
                note(&noted, number);
                if number == 1 {
                    frames.says(frames::goaway(stream, 0)).await;
                    held.pass().await;
                }
                frames.answers(stream, "done").await;
            }
        }
    });
    let slow = world.call("POST", "/slow").body(Filler::of(10)).send();
    let others = async {
        world.api.has_seen(1).await;
        for _ in 0..3 {
            assert_eq!(world.call("POST", "/x").body(Filler::of(10)).send().await.status, 200);
        }
        gate.open();
    };
    let (slow, ()) = tokio::join!(slow, others);
    assert_eq!((slow.status, slow.text()), (200, "done"));
    assert_eq!(connections(&world), ["1", "2", "2", "2"]);
}

#[tokio::test]
async fn a_connection_that_closed_while_nobody_used_it_is_replaced_unnoticed_in_http2_too() {
    // RTY-032
    let world = speaking_h2().await;
    let noted = world.api.clone();
    let closed = Arc::new(tokio::sync::Notify::new());
    let closing = closed.clone();
    world.api.is_served_by(move |number, io| {
        let (noted, closing) = (noted.clone(), closing.clone());
        async move {
            let mut frames = Frames::server(io, &[]).await;
            let stream = frames.hears_a_request().await.unwrap();
            note(&noted, number);
            frames.answers(stream, "done").await;
            frames.ends().await;
            closing.notify_one();
        }
    });
    for _ in 0..5 {
        let reply = world.call("POST", "/x").body(Filler::of(3)).send().await;
        assert_eq!((reply.status, reply.text()), (200, "done"));
        soon(closed.notified()).await;
        // Whoever answers this has been told of the end, which came before.
        world.tunnel("api.test:443").await;
    }
    assert_eq!(connections(&world), ["1", "2", "3", "4", "5"]);
}

#[tokio::test]
async fn an_answer_that_the_upstream_canceled_halfway_is_seen_to_break_off() {
    // H7
    for (over_h2, code) in [(true, 0), (true, frames::CANCEL), (false, 0), (false, frames::CANCEL)] {
        let world = speaking_h2().await;
        world.api.is_served_by(move |_, io| async move {
            let mut frames = Frames::server(io, &[]).await;
            while let Some(stream) = frames.hears_a_request().await {
                frames.says(frame(HEADERS, END_HEADERS, stream, [0x88])).await;
                frames.says(frame(DATA, 0, stream, "half")).await;
                frames.says(frames::reset(stream, code)).await;
            }
        });
        let call = world.call("GET", "/x");
        let heard = if over_h2 { call.over_h2() } else { call }.try_send().await;
        assert!(heard.is_err(), "{over_h2} {code}: {heard:?}");
    }
}

#[tokio::test]
async fn an_upload_goes_on_behind_an_early_answer() {
    for early in [answer(202).early(), answer(202).saying("noted").early()] {
        let world = speaking_h2().await;
        world.api_answers([early]);
        let rest = Gate::shut();
        let body = Filler::of(1 << 20).held_at(512 << 10, &rest);
        let agent = world.api_h2().await.http2().await;
        let reply = agent.send(Request::post("https://api.test/x").body(body).unwrap()).await.unwrap();
        assert_eq!(reply.status, 202);
        rest.open();
        world.api.until(|seen| seen[0].complete && seen[0].length == 1 << 20).await;
    }
}

/// An answer's head, with so many bytes to come.
fn head_of(stream: u32, length: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, frames::block(&[(":status", "200"), ("content-length", length)]))
}

#[tokio::test]
async fn an_upload_goes_on_behind_an_answer_that_only_its_length_has_ended() {
    const LENGTH: usize = 200_000;
    let world = speaking_h2().await;
    let (noted, ended) = (Arc::new(Mutex::new((0, false))), Gate::shut());
    let (notes, ends) = (noted.clone(), ended.clone());
    world.api.is_served_by(move |_, io| {
        let (notes, ends) = (notes.clone(), ends.clone());
        async move {
            let mut frames = Frames::server(io, &[(INITIAL_WINDOW_SIZE, 1 << 20)]).await;
            frames.says(window_update(0, 1 << 20)).await;
            let stream = frames.hears_a(HEADERS).await.stream;
            frames.says([head_of(stream, "5"), frame(DATA, 0, stream, "noted")].concat()).await;
            loop {
                let heard = frames.hears().await.expect("the connection ended");
                assert_ne!(heard.kind, frames::RST_STREAM);
                let length = if heard.kind == DATA { heard.payload.len() } else { 0 };
                notes.lock().unwrap().0 += length;
                if heard.ends_stream() {
                    break;
                }
            }
            frames.says(frame(frames::PING, 0, 0, [0; 8])).await;
            // Whoever is here has not canceled what the API still does.
            notes.lock().unwrap().1 = frames.hears_a(frames::PING).await.flags == frames::ACK;
            frames.says(frame(DATA, END_STREAM, stream, "")).await;
            ends.open();
            assert!(frames.hears_to_the_end().await.iter().all(|heard| heard.kind != frames::RST_STREAM));
        }
    });
    let rest = Gate::shut();
    let body = Filler::of(LENGTH as u64).held_at(100_000, &rest);
    let request = Request::post("/x").header("host", "api.test").body(body).unwrap();
    let answer = world.api_connection().await.http1_streaming(request).await.unwrap();
    assert_eq!(soon(answer.into_body().collect()).await.unwrap().to_bytes(), "noted");
    rest.open();
    soon(ended.pass()).await;
    assert_eq!(*noted.lock().unwrap(), (LENGTH, true));
}

#[tokio::test]
async fn an_answer_that_its_agent_has_whole_is_not_canceled() {
    // Whether its end comes with it, or later.
    for late in [false, true] {
        let world = speaking_h2().await;
        let (read, noted) = (Gate::shut(), Arc::new(Mutex::new(Vec::new())));
        let (reads, notes) = (read.clone(), noted.clone());
        world.api.is_served_by(move |_, io| {
            let (reads, notes) = (reads.clone(), notes.clone());
            async move {
                let mut frames = Frames::server(io, &[]).await;
                let stream = frames.hears_a_request().await.unwrap();
                let (begin, end) = (frame(DATA, 0, stream, "whole"), frame(DATA, END_STREAM, stream, ""));
                if late {
                    frames.says([head_of(stream, "5"), begin].concat()).await;
                    reads.pass().await;
                    frames.says(end).await;
                } else {
                    frames.says([head_of(stream, "5"), begin, end].concat()).await;
                }
                loop {
                    let heard = frames.hears().await.expect("the connection ended");
                    notes.lock().unwrap().push(heard.kind);
                    if heard.kind == HEADERS {
                        break frames.answers(heard.stream, "next").await;
                    }
                }
            }
        });
        let mut agent = world.api_connection().await;
        for body in ["whole", "next"] {
            assert_eq!(agent.says("GET /x HTTP/1.1\r\nHost: api.test\r\n\r\n").await.hears().await.text(), body);
            read.open();
        }
        let noted = noted.lock().unwrap();
        assert!(!noted.contains(&frames::RST_STREAM), "late: {late}, {noted:?}");
    }
}

/// Takes the head of a request that has a long body, and no more of it than its first window.
async fn takes_little(frames: &mut Frames) -> u32 {
    let stream = frames.hears_a(HEADERS).await.stream;
    frames.hears_a(DATA).await;
    stream
}

#[tokio::test]
async fn an_upload_that_goes_on_is_still_one_of_the_streams_that_the_api_allows() {
    let world = speaking_h2().await;
    let noted = world.api.clone();
    world.api.is_served_by(move |number, io| {
        let noted = noted.clone();
        async move {
            let mut frames = Frames::server(io, &[(MAX_CONCURRENT_STREAMS, 1), (INITIAL_WINDOW_SIZE, 1000)]).await;
            if number == 1 {
                let stream = takes_little(&mut frames).await;
                note(&noted, number);
                frames.says(frame(HEADERS, END_HEADERS | END_STREAM, stream, [0x88])).await;
            }
            while let Some(stream) = frames.hears_a_request().await {
                note(&noted, number);
                frames.answers(stream, "done").await;
            }
        }
    });
    assert_eq!(world.call("POST", "/x").body(Filler::of(100_000)).over_h2().send().await.status, 200);
    assert_eq!(world.get("/y").await.text(), "done");
    assert_eq!(connections(&world), ["1", "2"]);
}

#[tokio::test]
async fn a_first_try_that_the_api_takes_no_more_of_ends_when_there_is_a_second() {
    // C7
    let world = speaking_h2().await;
    let canceled = Gate::shut();
    let ends = canceled.clone();
    world.api.is_served_by(move |_, io| {
        let ends = ends.clone();
        async move {
            let mut frames = Frames::server(io, &[(INITIAL_WINDOW_SIZE, 1000)]).await;
            let first = takes_little(&mut frames).await;
            let refusal = frames::block(&[(":status", "401"), ("www-authenticate", "Bearer")]);
            frames.says(frame(HEADERS, END_HEADERS | END_STREAM, first, refusal)).await;
            let reset = frames.hears_a(frames::RST_STREAM).await;
            assert_eq!((reset.stream, reset.number(0)), (first, frames::CANCEL));
            ends.open();
            // It may have begun before.
            let second = first + 2;
            frames.says([window_update(0, 1 << 20), window_update(second, 1 << 20)].concat()).await;
            frames.hears_a_request().await;
            frames.answers(second, "done").await;
        }
    });
    let reply = world.call("POST", "/x").body(Filler::of(100_000)).over_h2().send().await;
    soon(canceled.pass()).await;
    assert_eq!((reply.status, reply.text()), (200, "done"));
}

#[tokio::test]
async fn a_second_try_whose_answer_comes_before_all_of_it_was_sent_arrives_whole() {
    // RTY-009, C7
    let body = Filler::of(600 << 10);
    for over_h2 in [false, true] {
        let world = speaking_h2().await;
        let head_is_heard = Gate::shut();
        let (heard, received) = (head_is_heard.clone(), Arc::new(Mutex::new(Vec::new())));
        let receives = received.clone();
        world.api.is_served_by(move |_, io| {
            let (heard, receives) = (heard.clone(), receives.clone());
            async move {
                // Room for all of the first try, and for little of the second.
                let mut frames = Frames::server(io, &[(INITIAL_WINDOW_SIZE, 1 << 20)]).await;
                frames.says(window_update(0, 1 << 24)).await;
                let first = frames.hears_a_request().await.unwrap();
                frames.says(frames::settings(&[(INITIAL_WINDOW_SIZE, 20_000)])).await;
                let refusal = frames::block(&[(":status", "401"), ("www-authenticate", "Bearer")]);
                frames.says(frame(HEADERS, END_HEADERS | END_STREAM, first, refusal)).await;
                let second = frames.hears_a(HEADERS).await.stream;
                frames.says(frame(HEADERS, END_HEADERS, second, [0x88])).await;
                heard.pass().await;
                frames.says(window_update(second, 1 << 20)).await;
                loop {
                    let data = frames.hears_a(DATA).await;
                    receives.lock().unwrap().extend_from_slice(&data.payload);
                    if data.ends_stream() {
                        return frames.says(frame(DATA, END_STREAM, second, "done")).await;
                    }
                }
            }
        });
        let request = Request::post("https://api.test/x").header("host", "api.test").body(body.clone()).unwrap();
        let answer = if over_h2 {
            world.api_h2().await.http2().await.streaming(request).await.unwrap()
        } else {
            world.api_connection().await.http1_streaming(request).await.unwrap()
        };
        assert_eq!(answer.status(), 200);
        head_is_heard.open();
        assert_eq!(soon(answer.into_body().collect()).await.unwrap().to_bytes(), "done");
        let digest = hex(&Sha256::digest(&*received.lock().unwrap()));
        assert_eq!(digest, body.sha256(), "over HTTP/2: {over_h2}");
    }
}

#[tokio::test]
async fn three_thousand_requests_at_once_all_go_through_an_upstream_of_a_hundred_streams() {
    const REQUESTS: usize = 3000;
    let world = speaking_h2().await;
    let (gate, open, most) = (Gate::shut(), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (held, opened, peak) = (gate.clone(), open.clone(), most.clone());
    world.api.is_served_by(move |_, io| {
        let (held, opened, peak) = (held.clone(), opened.clone(), peak.clone());
        async move {
            let mut builder = h2::server::Builder::new();
            let mut connection = builder.max_concurrent_streams(100).handshake::<_, Bytes>(io).await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                let (held, opened, peak) = (held.clone(), opened.clone(), peak.clone());
                tokio::spawn(unread(async move {
                    let now = opened.fetch_add(1, Ordering::SeqCst) + 1;
                    peak.fetch_max(now, Ordering::SeqCst);
                    // Eight connections, all full.
                    if now == 800 {
                        held.open();
                    }
                    held.pass().await;
                    opened.fetch_sub(1, Ordering::SeqCst);
                    let mut to = respond.send_response(Response::new(()), false).unwrap();
                    let _ = to.send_data(Bytes::from_static(b"done"), true);
                }));
            }
        }
    });
    let agent = world.api_h2().await.http2().await;
    let get = || Request::get("https://api.test/x").body(Filler::text("")).unwrap();
    let replies = join_all((0..REQUESTS).map(|_| agent.send(get()))).await;
    assert_eq!(
        replies.iter().filter(|reply| reply.as_ref().is_ok_and(|reply| reply.text() == "done")).count(),
        REQUESTS
    );
    assert_eq!((most.load(Ordering::SeqCst), world.api.met().0), (800, 8));
}

/// The API answers `/words` with so many small frames, as language models do, and `/pauses` with empty ones between.
fn speaks_in_words(world: &World, words: usize) {
    world.api.is_served_by(move |_, io| async move {
        let mut connection = h2::server::handshake(io).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            tokio::spawn(unread(async move {
                let mut to = respond.send_response(Response::new(()), false).unwrap();
                match request.uri().path() {
                    "/words" => {
                        for _ in 0..words {
                            let _ = to.send_data(Bytes::from_static(&[b'w'; 50]), false);
                        }
                    }
                    "/pauses" => {
                        for _ in 0..200 {
                            let _ = to.send_data(Bytes::new(), false);
                        }
                    }
                    _ => {}
                }
                let _ = to.send_data(Bytes::from_static(b"done"), true);
            }));
        }
    });
}

#[tokio::test]
async fn answers_in_small_frames_may_wait_for_their_agents_while_others_are_read() {
    // trap 5 of the h2 crate: it closes the connection over unread small frames.
    const WORDS: usize = 6000;
    const STREAMS: [u32; 4] = [1, 3, 5, 7];
    let world = speaking_h2().await;
    speaks_in_words(&world, WORDS);
    let mut slow = world.api_h2().await.frames().await;
    slow.says(frames::settings(&[(INITIAL_WINDOW_SIZE, 0)])).await;
    for stream in STREAMS {
        slow.says(frame(HEADERS, END_HEADERS | END_STREAM, stream, frames::request("GET", "/words", &[]))).await;
        slow.hears_a(HEADERS).await;
    }
    for _ in 0..10 {
        assert_eq!(world.call("GET", "/x").over_h2().send().await.text(), "done");
    }
    slow.says(window_update(0, 1 << 24)).await;
    slow.says(frames::settings(&[(INITIAL_WINDOW_SIZE, 1 << 20)])).await;
    let (mut length, mut ended) = (0, 0);
    while ended < STREAMS.len() {
        let heard = slow.hears().await.unwrap();
        assert_ne!(heard.kind, frames::RST_STREAM, "an answer breaks off");
        ended += usize::from(heard.ends_stream());
        length += if heard.kind == DATA { heard.payload.len() } else { 0 };
    }
    assert_eq!((length, world.api.met().0), (STREAMS.len() * (50 * WORDS + 4), 1));
}

#[tokio::test]
async fn an_upstream_may_send_as_many_empty_frames_as_it_likes() {
    // trap 5 of the h2 crate: it closes the connection after a hundred.
    let world = speaking_h2().await;
    speaks_in_words(&world, 0);
    for _ in 0..3 {
        assert_eq!(world.call("GET", "/pauses").over_h2().send().await.text(), "done");
    }
    assert_eq!(world.api.met().0, 1);
}
