//! A 401 on its way: a new token, the same request once more, and nothing else.

use futures_util::future::join_all;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use crate::world::agent::Reply;
use crate::world::answer::{Answer, Filler, Gate, answer, usual};
use crate::world::frames::{self, DATA, END_HEADERS, END_STREAM, Frames, HEADERS, RST_STREAM, frame};
use crate::world::server::{Seen, raw};
use crate::world::{Setup, World, soon};

const KIBIBYTE: u64 = 1 << 10;
const MEBIBYTE: u64 = 1 << 20;

#[tokio::test]
async fn a_401_is_met_with_a_new_token_and_the_agent_does_not_notice() {
    // RTY-001
    let world = World::start().await;
    world.api_answers([401, 200]);
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.text()), (200, "scripted 200\n"));
    assert_eq!(world.api.tokens(), [world.issued.access(1), world.issued.access(2)]);
    assert_eq!(world.token_calls(), 2);
    let told = world.request_told();
    assert_eq!((told.status.unwrap().as_u16(), told.retried, told.passed), (200, true, None));
}

#[tokio::test]
async fn a_revoked_token_is_replaced_over_http2_too() {
    // RTY-001
    let world = World::start().await;
    assert_eq!(world.call("GET", "/me").over_h2().send().await.status, 200);
    world.issued.revoke();
    assert_eq!(world.call("GET", "/me").over_h2().send().await.text(), "welcome\n");
    assert_eq!(world.token_calls(), 2);
}

#[tokio::test]
async fn a_second_401_reaches_the_agent_as_it_is() {
    // RTY-002
    let world = World::start().await;
    let second = answer(401).with("www-authenticate", "Bearer realm=\"second\"").saying("second");
    world.api_answers([Answer::from(401), second]);
    let reply = world.get("/me").await;
    assert_eq!((reply.status, reply.text()), (401, "second"));
    assert_eq!(reply.header("www-authenticate"), Some("Bearer realm=\"second\""));
    assert_eq!((world.api.seen().len(), world.token_calls()), (2, 2));
}

#[tokio::test]
async fn a_grant_that_ended_leaves_the_agent_the_first_401_and_is_not_tried_again() {
    // RTY-003
    let world = Setup::new().connected(&["default"]).start().await;
    assert_eq!(world.get("/me").await.status, 200);
    world.issued.forget_grants();
    world.issued.revoke();
    for _ in 0..3 {
        let reply = world.get("/me").await;
        assert_eq!((reply.status, reply.text()), (401, "scripted 401\n"));
        assert_eq!(reply.header("www-authenticate"), Some("Bearer realm=\"api\", error=\"invalid_token\""));
    }
    assert_eq!((world.api.seen().len(), world.token_calls()), (4, 2));
    let passed: Vec<_> = world.requests_told().iter().map(|told| told.passed).collect();
    assert_eq!(passed, [None, Some("reauthorize"), Some("cooldown"), Some("cooldown")]);
}

#[tokio::test]
async fn a_provider_that_fails_leaves_the_agent_the_first_401() {
    // RTY-004
    let world = World::start().await;
    world.provider_answers([usual(), Answer::from(503)]);
    world.api_answers([401]);
    assert_eq!(world.get("/me").await.text(), "scripted 401\n");
    assert_eq!((world.api.seen().len(), world.token_calls()), (1, 2));
    assert_eq!(world.request_told().passed, Some("token_unavailable"));
    assert_eq!(world.get("/me").await.status, 200, "the old token is used on");
}

#[tokio::test]
async fn a_body_arrives_whole_both_times() {
    // RTY-005
    let known = Filler::of(100 * KIBIBYTE);
    let chunked = known.clone().of_unknown_length();
    for (body, over_h2) in [(&known, false), (&known, true), (&chunked, false), (&chunked, true)] {
        let world = World::start().await;
        world.api_answers([401, 200]);
        let call = world.call("POST", "/upload").body(body.clone());
        assert_eq!(if over_h2 { call.over_h2() } else { call }.send().await.status, 200);
        let seen = world.api.seen();
        assert_eq!((&seen[0].sha256, &seen[1].sha256), (&body.sha256(), &body.sha256()));
    }
}

#[tokio::test]
async fn the_second_request_differs_in_its_token_only() {
    // C7
    let world = World::start().await;
    world.api_answers([401, 200]);
    world.call("PATCH", "/a/b?c=%2F").with("x-trace", "1").with("accept", "*/*").body(Filler::of(9)).send().await;
    let mut seen = world.api.seen();
    assert_ne!(seen[0].headers.remove("authorization"), seen[1].headers.remove("authorization"));
    assert_eq!(format!("{:?}", seen[0]), format!("{:?}", seen[1]));
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_not_sent_twice_but_the_token_is_renewed() {
    // RTY-007
    let world = World::start().await;
    world.api_answers([401]);
    let body = Filler::of(MEBIBYTE + 1);
    let reply = world.call("POST", "/upload").body(body.clone()).send().await;
    assert_eq!((reply.status, world.api.seen()[0].sha256.clone()), (401, body.sha256()));
    assert_eq!(world.request_told().passed, Some("body_too_long"));
    world.obtained_tokens(2).await;
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.api.tokens(), [world.issued.access(1), world.issued.access(2)]);
}

#[tokio::test]
async fn a_body_of_just_the_limit_is_sent_twice() {
    // RTY-007
    let world = World::start().await;
    world.api_answers([401, 200]);
    assert_eq!(world.call("POST", "/upload").body(Filler::of(MEBIBYTE)).send().await.status, 200);
    assert_eq!(world.api.seen().iter().map(|seen| seen.length).collect::<Vec<_>>(), [MEBIBYTE, MEBIBYTE]);
}

#[tokio::test]
async fn a_second_try_that_was_possible_stays_so_while_it_waits_for_its_audit_line() {
    // C7, C9
    const BEYOND: usize = MEBIBYTE as usize + 1;
    let folder = tempfile::tempdir().unwrap();
    let trail = folder.path().join("audit");
    mknodat(CWD, &trail, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let mut reader = pipe::OpenOptions::new().read_write(true).open_receiver(&trail).unwrap();
    let filler = pipe::OpenOptions::new().read_write(true).open_sender(&trail).unwrap();
    let trail = format!("audit: {{file: '{}', required: true}}", trail.display());
    let world = Setup::new().api_speaks(&["http/1.1"]).top(&trail).start().await;
    let (renewal, first_is_over) = (Gate::shut(), Gate::shut());
    world.provider_answers([usual(), usual().once(&renewal)]);
    let over = first_is_over.clone();
    world.api.is_served_by(move |number, mut io| {
        let over = over.clone();
        async move {
            let mut heard = Vec::new();
            if number == 1 {
                while !heard.ends_with(b"2\r\nok\r\n") {
                    io.read_buf(&mut heard).await.unwrap();
                }
                io.write_all(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n").await.unwrap();
                // It reads what it is sent, and that must not be more.
                while heard.len() < BEYOND && io.read_buf(&mut heard).await.is_ok_and(|read| read > 0) {}
                return over.open();
            }
            while !heard.ends_with(b"\r\n0\r\n\r\n") {
                io.read_buf(&mut heard).await.unwrap();
            }
            io.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        }
    });
    let mut agent = world.api_connection().await;
    agent.says("POST /x HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n").await;
    world.auth.has_seen(2).await;
    while filler.try_write(&[b'x'; 4096]).is_ok() {}
    renewal.open();
    world.obtained_tokens(2).await;
    // Whoever answers this has also begun to wait for the line.
    world.tunnel("api.test:443").await;
    let rest = format!("{BEYOND:x}\r\n{}\r\n0\r\n\r\n", "x".repeat(BEYOND));
    let reads_the_trail = async {
        soon(first_is_over.pass()).await;
        while reader.read(&mut [0; 4096]).await.is_ok() {}
    };
    let replied = async {
        agent.says(rest).await;
        agent.hears().await.status
    };
    let status = tokio::select! {
        () = reads_the_trail => unreachable!(),
        status = replied => status,
    };
    assert_eq!(status, 200);
}

#[tokio::test]
async fn all_kept_bodies_together_stay_within_64_mib_and_every_one_is_delivered() {
    // RTY-008
    const BODIES: usize = 80;
    let world = World::start().await;
    world.get("/me").await;
    let gate = Gate::shut();
    world.api_answers((0..BODIES).map(|_| Answer::from(401).once(&gate)));
    let body = Filler::of(900 * KIBIBYTE);
    let calls = join_all((0..BODIES).map(|_| world.call("POST", "/upload").body(body.clone()).send()));
    let all_arrived = async {
        world.api.until(|seen| seen.iter().filter(|seen| seen.complete).count() == 1 + BODIES).await;
        gate.open();
    };
    let (replies, ()) = tokio::join!(calls, all_arrived);
    let retried = replies.iter().filter(|reply| reply.status == 200).count();
    let passed = replies.iter().filter(|reply| reply.status == 401).count();
    assert_eq!(retried + passed, BODIES);
    assert!((40..=72).contains(&retried), "{retried} of {BODIES} bodies of 900 KiB were kept");
    let seen = world.api.seen();
    assert_eq!(seen.iter().filter(|seen| seen.sha256 == body.sha256()).count(), BODIES + retried);
}

#[tokio::test]
async fn an_early_401_during_a_large_upload_is_met_with_what_was_sent_and_the_live_rest() {
    // RTY-009
    for (protocol, over_h2, size) in
        [("http/1.1", false, 64), ("h2", false, 4), ("http/1.1", true, 4), ("h2", true, 64)]
    {
        let size = size * MEBIBYTE;
        let world = Setup::new().api_speaks(&[protocol]).start().await;
        world.api_answers([Answer::from(401).early(), Answer::from(200)]);
        let rest = Gate::shut();
        let body = Filler::of(size).held_at(size - 512 * KIBIBYTE, &rest);
        let call = world.call("PUT", "/upload").body(body);
        let call = if over_h2 { call.over_h2() } else { call };
        let second_try = async {
            world.api.has_seen(2).await;
            rest.open();
        };
        let (reply, ()) = tokio::join!(call.send(), second_try);
        assert_eq!(reply.status, 200, "{protocol} {over_h2}");
        let seen = world.api.seen();
        assert_eq!((seen.len(), seen[0].complete, seen[1].complete), (2, false, true));
        assert_eq!(seen[1].sha256, Filler::of(size).sha256());
    }
}

#[tokio::test]
async fn an_agent_that_hangs_up_cancels_its_retry_but_not_the_renewal() {
    // RTY-010, TOK-040
    let world = Setup::new().connected(&["default"]).start().await;
    let gate = Gate::shut();
    world.provider_answers([usual(), usual().once(&gate)]);
    world.api_answers([401]);
    let mut agent = world.api_connection().await;
    agent.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    world.auth.has_seen(2).await;
    // Without TLS's goodbye, behind which an answer could still be waited for.
    drop(agent);
    // Whoever answers this has been told of the hang-up, which came before.
    world.tunnel("api.test:443").await;
    gate.open();
    world.obtained_tokens(2).await;
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.api.tokens(), [world.issued.access(1), world.issued.access(2)]);
}

#[tokio::test]
async fn an_agent_that_cancels_its_stream_cancels_its_retry_but_not_the_renewal() {
    // RTY-010, TOK-040
    let world = Setup::new().connected(&["default"]).start().await;
    let gate = Gate::shut();
    world.provider_answers([usual(), usual().once(&gate)]);
    world.api_answers([401]);
    {
        let call = std::pin::pin!(world.call("GET", "/me").over_h2().send());
        tokio::select! {
            _ = call => panic!("it was answered"),
            () = world.auth.has_seen(2) => {}
        }
    }
    world.tunnel("api.test:443").await;
    gate.open();
    world.obtained_tokens(2).await;
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.api.tokens(), [world.issued.access(1), world.issued.access(2)]);
}

#[tokio::test]
async fn a_body_that_breaks_off_during_the_renewal_is_not_sent_again() {
    // RTY-010, C9
    let world = Setup::new().api_speaks(&["h2"]).start().await;
    let (renewal, broke_off) = (Gate::shut(), Gate::shut());
    world.provider_answers([usual(), usual().once(&renewal)]);
    let (told, noted) = (broke_off.clone(), world.api.clone());
    world.api.is_served_by(move |_, io| {
        let (told, noted) = (told.clone(), noted.clone());
        async move {
            let mut frames = Frames::server(io, &[]).await;
            let first = frames.hears_a(DATA).await.stream;
            let refusal = frames::block(&[(":status", "401"), ("www-authenticate", "Bearer")]);
            frames.says(frame(HEADERS, END_HEADERS | END_STREAM, first, refusal)).await;
            frames.hears_a(RST_STREAM).await;
            told.open();
            while let Some(stream) = frames.hears_a_request().await {
                noted.remember(Seen { complete: true, ..Seen::default() });
                frames.answers(stream, "done").await;
            }
        }
    });
    let mut agent = world.api_connection().await;
    agent.says("POST /x HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n").await;
    world.auth.has_seen(2).await;
    agent.says("+1\r\nx\r\n").await;
    soon(broke_off.pass()).await;
    renewal.open();
    assert_eq!(agent.hears().await.status, 401);
    assert_eq!((world.api.seen().len(), world.request_told().passed), (0, Some("body_broke_off")));
}

#[tokio::test]
async fn a_continue_is_sent_only_when_a_token_is_at_hand_and_the_body_goes_out_with_the_200() {
    // RTY-012
    let world = World::start().await;
    let gate = Gate::shut();
    world.provider_answers([usual().once(&gate), usual()]);
    world.api_answers([401, 200]);
    let mut agent = world.api_connection().await;
    agent.says("POST /x HTTP/1.1\r\nHost: api.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await;
    world.auth.has_seen(1).await;
    agent.hears_nothing_yet().await;
    gate.open();
    assert_eq!(agent.hears().await.status, 100);
    agent.says("hello").await;
    assert_eq!(agent.hears().await.status, 200);
    let bodies: Vec<_> = world.api.seen().iter().map(|seen| seen.body.clone()).collect();
    assert_eq!(bodies, [b"hello", b"hello"]);
}

#[tokio::test]
async fn without_a_token_the_body_is_not_asked_for() {
    // RTY-013
    let world = World::start().await;
    world.provider_answers([503]);
    let mut agent = world.api_connection().await;
    agent.says("POST /x HTTP/1.1\r\nHost: api.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await;
    let reply = agent.hears().await;
    assert_eq!((reply.status, reply.code().as_str()), (503, "token_unavailable"));
    assert_eq!(agent.hears_to_the_end().await, "", "the body that never came is not waited for");
    assert_eq!(world.api.seen().len(), 0);
}

#[tokio::test]
async fn five_hundred_requests_with_a_revoked_token_cost_one_call_to_the_provider() {
    // RTY-014
    const EACH: usize = 250;
    let world = World::start().await;
    world.get("/me").await;
    world.issued.revoke();
    let h2 = world.tunnel("api.test:443").await.tls("api.test", &["h2"]).await.unwrap().http2().await;
    let get = || http::Request::get("https://api.test/me").body(Filler::text("")).unwrap();
    let started = std::time::Instant::now();
    let streams = join_all((0..EACH).map(|_| h2.send(get())));
    let tunnels = join_all((0..EACH).map(|_| world.get("/me")));
    let (streams, tunnels) = tokio::join!(streams, tunnels);
    let took = started.elapsed();
    let replies: Vec<Reply> = streams.into_iter().map(Result::unwrap).chain(tunnels).collect();
    assert_eq!(replies.iter().filter(|reply| reply.status == 200).count(), 2 * EACH);
    let tokens = world.api.tokens();
    let with = |number| tokens.iter().filter(|token| **token == world.issued.access(number)).count();
    println!(
        "{} requests in {took:?}: {} token calls, {} tries with the old token, {} with the new one",
        replies.len(),
        world.token_calls() - 1,
        with(1) - 1,
        with(2)
    );
    assert_eq!((world.token_calls(), with(2)), (2, 2 * EACH));
    assert!(with(1) <= 1 + 2 * EACH && with(1) + with(2) == tokens.len());
}

#[tokio::test]
async fn a_straggler_with_the_old_token_takes_the_new_one_without_a_call() {
    // RTY-015
    let world = World::start().await;
    let gate = Gate::shut();
    world.api_answers([Answer::from(401).once(&gate), Answer::from(401), usual(), usual()]);
    let overtaken = async {
        world.api.has_seen(1).await;
        let reply = world.get("/fast").await;
        gate.open();
        reply
    };
    let (slow, fast) = tokio::join!(world.get("/slow"), overtaken);
    assert_eq!((slow.status, fast.status, world.token_calls()), (200, 200, 2));
    assert_eq!(world.api.tokens()[3], world.issued.access(2));
}

#[tokio::test]
async fn an_api_that_always_says_401_does_not_become_a_storm_of_token_calls() {
    // RTY-017, RTY-021
    for challenge in ["Basic realm=\"api\"", "Bearer"] {
        let world = World::start().await;
        let says_no = || answer(401).with("www-authenticate", challenge);
        world.api_answers((0..40).map(|_| says_no()));
        for _ in 0..20 {
            assert_eq!(world.get("/me").await.header("www-authenticate"), Some(challenge));
        }
        assert_eq!((world.token_calls(), world.api.seen().len()), (2, 21));
        let told = world.requests_told();
        assert_eq!(told.iter().filter(|told| told.passed == Some("cooldown")).count(), 19);
    }
}

#[tokio::test]
async fn an_answer_that_a_new_token_would_not_change_is_passed_on() {
    // RTY-018, RTY-019
    let bearer = |error: &str| format!("Bearer error=\"{error}\"");
    for unchanged in [
        answer(401).with("www-authenticate", bearer("insufficient_scope")),
        answer(401).with("www-authenticate", "DPoP error=\"use_dpop_nonce\""),
        answer(403),
        answer(403).with("www-authenticate", bearer("insufficient_scope")),
        answer(407),
        answer(500),
    ] {
        let world = World::start().await;
        let status = unchanged.status;
        world.api_answers([unchanged]);
        assert_eq!(world.get("/me").await.status, status);
        assert_eq!((world.api.seen().len(), world.token_calls()), (1, 1), "{status}");
    }
}

#[tokio::test]
async fn a_403_that_blames_the_token_is_as_good_as_a_401() {
    // C1
    let world = World::start().await;
    world.api_answers([answer(403).with("www-authenticate", "Bearer error=\"invalid_token\""), answer(200)]);
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.token_calls(), 2);
}

#[tokio::test]
async fn a_401_to_a_request_that_carried_no_token_is_passed_on() {
    // RTY-020
    let world = Setup::new().routes("- host: api.test\n  paths: [/v1/**]\n  provider: main").start().await;
    world.api_answers([401]);
    assert_eq!(world.get("/public").await.status, 401);
    assert_eq!((world.api.tokens(), world.token_calls()), (vec!["none".to_owned()], 0));
}

#[tokio::test]
async fn a_401_is_not_waited_out_to_its_end() {
    // RTY-022
    for protocol in ["http/1.1", "h2"] {
        let world = Setup::new().api_speaks(&[protocol]).start().await;
        world.api_answers([Answer::from(401).saying_bytes(1 << 40), Answer::from(200)]);
        assert_eq!(world.get("/me").await.status, 200, "{protocol}");
    }
}

#[tokio::test]
async fn a_retry_that_the_route_forbids_is_not_made_but_the_next_request_fares_better() {
    // C6
    let world = Setup::new().routes("- host: api.test\n  provider: main\n  retry: never").start().await;
    world.api_answers([401]);
    assert_eq!(world.get("/me").await.status, 401);
    assert_eq!(world.request_told().passed, Some("retry_never"));
    world.obtained_tokens(2).await;
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.api.tokens(), [world.issued.access(1), world.issued.access(2)]);
}

#[tokio::test]
async fn the_same_token_again_is_not_sent_again() {
    // RTY-036
    let world = World::start().await;
    world.issued.repeats(&world.issued.access(1));
    world.api_answers([401]);
    assert_eq!(world.get("/me").await.status, 401);
    assert_eq!((world.api.seen().len(), world.token_calls()), (1, 2));
    assert_eq!(world.request_told().passed, Some("same_token"));
}

#[tokio::test]
async fn a_connection_that_the_upstream_closed_is_replaced_unnoticed() {
    // RTY-032
    let world = Setup::new().api_speaks(&["http/1.1"]).start().await;
    let ok = || raw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").and_close();
    world.api.answers_raw((0..5).map(|_| ok()));
    for _ in 0..5 {
        assert_eq!(world.call("POST", "/x").body(Filler::of(3)).send().await.text(), "ok");
    }
    assert_eq!((world.api.seen().len(), world.api.met()), (5, (5, 5)));
}

#[tokio::test]
async fn a_stream_that_the_upstream_refused_unread_is_sent_again() {
    // RTY-030
    let world = Setup::new().api_speaks(&["h2"]).start().await;
    world.api.refuses_streams(2);
    let body = Filler::of(10 * KIBIBYTE);
    let reply = world.call("POST", "/x").body(body.clone()).send().await;
    assert_eq!((reply.status, world.api.seen()[0].sha256.clone()), (200, body.sha256()));
    assert_eq!((world.api.seen().len(), world.token_calls()), (1, 1));
}

#[tokio::test]
async fn renewals_that_take_long_are_waited_for() {
    // C3: a hundred waiters, one flight.
    let world = World::start().await;
    let gate = Gate::shut();
    world.provider_answers([usual().once(&gate)]);
    let calls = join_all((0..100).map(|_| world.get("/me")));
    let released = async {
        world.auth.has_seen(1).await;
        gate.open();
    };
    let (replies, ()) = soon(async { tokio::join!(calls, released) }).await;
    assert!(replies.iter().all(|reply| reply.status == 200));
    assert_eq!(world.token_calls(), 1);
}

#[tokio::test]
async fn a_token_of_unknown_lifetime_is_used_until_it_is_refused() {
    // C16
    let world = Setup::new().tokens_live(None).start().await;
    for _ in 0..3 {
        assert_eq!(world.get("/me").await.status, 200);
    }
    world.issued.revoke();
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.token_calls(), 2);
}

#[tokio::test]
async fn an_expired_token_is_never_sent_and_nor_is_a_request_without_one() {
    // TOK-015, C16, C17: a token is not used in its last 5 s.
    let world = Setup::new().tokens_live(Some(5)).start().await;
    world.provider_answers([usual(), usual(), Answer::from(503)]);
    assert_eq!((world.get("/1").await.status, world.get("/2").await.status), (200, 200));
    let reply = world.get("/3").await;
    assert_eq!((reply.status, reply.code().as_str()), (503, "token_unavailable"));
    assert_eq!(world.api.tokens(), [world.issued.access(1), world.issued.access(2)]);
}
