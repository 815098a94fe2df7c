//! The proxy's port: what may be said on it, how TLS begins in a tunnel, and that nothing goes in circles.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Version};
use sidebearer::drain::Drained;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::world::answer::{Answer, Filler, Gate};
use crate::world::log::unread;
use crate::world::raw::Bytestream;
use crate::world::{Setup, To, World, soon};

#[tokio::test]
async fn a_hello_that_comes_byte_by_byte_is_understood() {
    // TLS-007
    let world = World::start().await;
    let tunnel = world.tunnel("api.test:443").await;
    let tls = tunnel.tls_through("api.test", &["http/1.1"], |io| ByteByByte { io }).await.unwrap();
    let request = Request::get("/me").header("host", "api.test").body(Filler::text("")).unwrap();
    assert_eq!(tls.http1(request).await.unwrap().text(), "welcome\n");
}

#[tokio::test]
async fn what_is_not_tls_in_a_tunnel_to_a_routed_host_is_not_passed_on() {
    // TLS-008
    let world = World::start().await;
    for garbage in ["GET / HTTP/1.1\r\nHost: api.test\r\n\r\n", "SSH-2.0-OpenSSH_9.9\r\n", "\0\0\0\0\0\0\0\0", "\n"] {
        let mut tunnel = world.tunnel("api.test:443").await;
        tunnel.says(garbage).await.says_end().await;
        let heard = tunnel.hears_to_the_end().await;
        assert!(!heard.contains("HTTP"), "{garbage:?}: {heard}");
    }
    assert_eq!((world.api.met().0, world.token_calls()), (0, 0));
}

#[tokio::test]
async fn every_pair_of_protocols_works() {
    // TLS-010
    for upstream in [&["h2"][..], &["http/1.1"], &["h2", "http/1.1"], &[]] {
        let world = Setup::new().api_speaks(upstream).start().await;
        for (agent, spoken) in
            [(&["h2"][..], "h2"), (&["http/1.1"], "http/1.1"), (&["h2", "http/1.1"], "h2"), (&[], "")]
        {
            let tls = world.tunnel("api.test:443").await.tls("api.test", agent).await.unwrap();
            assert_eq!(tls.alpn.clone().unwrap_or_default(), spoken);
            let reply = if spoken == "h2" {
                let request = Request::get("https://api.test/").body(Filler::text("")).unwrap();
                tls.http2().await.send(request).await
            } else {
                let request = Request::get("/").header("host", "api.test").body(Filler::text("")).unwrap();
                tls.http1(request).await
            };
            assert_eq!(reply.unwrap().text(), "welcome\n", "{upstream:?} {agent:?}");
        }
        assert!(world.tunnel("api.test:443").await.tls("api.test", &["smtp"]).await.is_err());
    }
}

#[tokio::test]
async fn a_route_can_ask_for_the_older_protocol() {
    let world = Setup::new().routes("- host: api.test\n  provider: main\n  upstream_http: h1").start().await;
    assert_eq!(world.call("GET", "/me").over_h2().send().await.status, 200);
    assert_eq!(world.api.seen()[0].version, Version::HTTP_11);
}

#[tokio::test]
async fn a_usual_client_needs_the_proxys_address_and_its_ca() {
    let world = World::start().await;
    let ca = reqwest::Certificate::from_pem(&std::fs::read(&world.ca).unwrap()).unwrap();
    let proxy = reqwest::Proxy::all(format!("http://{}", world.proxy)).unwrap();
    let client = reqwest::Client::builder().tls_certs_only([ca]).proxy(proxy).build().unwrap();
    let post = || client.post("https://api.test/me").body("x".repeat(100_000)).send();
    assert_eq!(soon(unread(post())).await.unwrap().text().await.unwrap(), "welcome\n");
    world.issued.revoke();
    assert_eq!(soon(unread(post())).await.unwrap().text().await.unwrap(), "welcome\n");
    assert_eq!(world.api.seen().iter().map(|seen| seen.length).collect::<Vec<_>>(), [100_000; 3]);
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    // LST-018
    let world = World::start().await;
    for head in [
        format!("GET / HTTP/1.1\r\nHost: api.test\r\n{}\r\n", "X: 1\r\n".repeat(10_000)),
        format!("GET / HTTP/1.1\r\nHost: api.test\r\nX: {}\r\n\r\n", "x".repeat(1 << 20)),
        format!("GET /{} HTTP/1.1\r\nHost: api.test\r\n\r\n", "x".repeat(100 << 10)),
    ] {
        let mut agent = world.api_connection().await;
        agent.says_if_open(&head).await;
        let heard = agent.hears_to_the_end().await;
        assert!(heard.starts_with("HTTP/1.1 431 ") || heard.starts_with("HTTP/1.1 414 "), "{heard}");
    }
    assert_eq!((world.api.seen().len(), world.get("/me").await.status), (0, 200));
}

#[tokio::test]
async fn a_request_that_is_not_for_a_proxy_is_told_so() {
    // LST-001
    let world = World::start().await;
    let mut agent = world.connection().await;
    agent.says(format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", world.proxy)).await;
    let reply = agent.hears().await;
    assert_eq!((reply.status, reply.code().as_str()), (400, "not_for_a_proxy"));
    assert_eq!(world.requests_told().len(), 1);
}

#[tokio::test]
async fn the_proxy_is_never_sent_to_itself() {
    // LST-002
    let world = World::start().await;
    let port = world.proxy.port();
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
        let mut agent = world.connection().await;
        agent.says(format!("CONNECT {host}:{port} HTTP/1.1\r\n\r\n")).await;
        let reply = agent.hears().await;
        assert_eq!((reply.status, reply.code().as_str()), (508, "proxy_loop_detected"), "{host}");
        let mut agent = world.connection().await;
        agent.says(format!("GET http://{host}:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        assert_eq!(agent.hears().await.code(), "proxy_loop_detected", "{host}");
    }
}

#[tokio::test]
async fn a_request_that_comes_back_is_known_by_its_via() {
    // LST-002
    let world = World::start().await;
    world.get("/me").await;
    let via = world.api.seen()[0].header("via").unwrap().to_owned();
    let back = world.call("GET", "/me").with("via", &format!("1.1 other, {via}")).send().await;
    assert_eq!((back.status, back.code().as_str()), (508, "proxy_loop_detected"));
    assert_eq!(world.call("GET", "/me").with("via", "1.1 other").send().await.status, 200);
    assert_eq!(world.api.seen().len(), 2);
}

#[tokio::test]
async fn a_blind_tunnel_says_200_only_once_it_is_connected() {
    let world = Setup::new().resolve("gone.test:443", To::Nobody).start().await;
    let mut agent = world.connection().await;
    agent.says("CONNECT gone.test:443 HTTP/1.1\r\n\r\n").await;
    let reply = agent.hears().await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "connection_refused"));
}

#[tokio::test]
async fn a_stop_lets_live_requests_finish() {
    let mut world = World::start().await;
    let gate = Gate::shut();
    world.api_answers([Answer::from(200).once(&gate)]);
    let mut agent = world.api_connection().await;
    agent.says("GET / HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    world.api.has_seen(1).await;
    world.begins_to_stop();
    gate.open();
    assert_eq!(agent.hears().await.status, 200);
    assert_eq!(agent.hears_to_the_end().await, "");
    assert_eq!(world.ends().await, Drained::Clean);
}

#[tokio::test]
async fn an_agent_that_ends_its_side_after_the_request_hears_the_whole_answer() {
    for protocol in ["http/1.1", "h2"] {
        let world = Setup::new().api_speaks(&[protocol]).start().await;
        let gate = Gate::shut();
        world.api_answers([Answer::from(200).saying_bytes(3 << 20).once(&gate)]);
        let mut agent = world.api_connection().await;
        agent.says("POST /x HTTP/1.1\r\nHost: api.test\r\nContent-Length: 5\r\n\r\nhello").await.says_end().await;
        world.api.has_seen(1).await;
        agent.hears_nothing_yet().await;
        gate.open();
        let reply = agent.hears().await;
        assert_eq!((reply.status, reply.body.len()), (200, 3 << 20));
        assert_eq!(agent.hears_to_the_end().await, "", "and then the connection ends");
    }
}

#[tokio::test]
async fn an_agent_without_tls_may_end_its_side_too() {
    let world = World::start().await;
    let gate = Gate::shut();
    world.plain.answers([Answer::from(200).once(&gate)]);
    let mut agent = world.connection().await;
    agent.says("GET http://plain.test/x HTTP/1.1\r\nHost: plain.test\r\n\r\n").await.says_end().await;
    world.plain.has_seen(1).await;
    agent.hears_nothing_yet().await;
    gate.open();
    assert_eq!(agent.hears().await.text(), "scripted 200\n");
    assert_eq!(agent.hears_to_the_end().await, "");
}

#[tokio::test]
async fn a_connection_on_which_nothing_is_under_way_ends_when_the_agent_ends_it() {
    let world = World::start().await;
    let mut agent = world.api_connection().await;
    agent.says("GET /x HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    assert_eq!(agent.hears().await.status, 200);
    agent.says_end().await;
    let started = std::time::Instant::now();
    assert_eq!(agent.hears_to_the_end().await, "");
    assert!(started.elapsed() < std::time::Duration::from_secs(20), "it is waited out");
}

#[tokio::test]
async fn either_side_of_a_tunnel_may_end_before_the_other() {
    let world = World::start().await;
    for server_first in [false, true] {
        world.plain.is_served_by(move |_, mut io| async move {
            let mut heard = [0; 5];
            if server_first {
                io.write_all(b"first").await.unwrap();
                io.shutdown().await.unwrap();
                io.read_exact(&mut heard).await.unwrap();
                assert_eq!((&heard, io.read(&mut [0]).await.unwrap()), (b"later", 0));
                return;
            }
            io.read_exact(&mut heard).await.unwrap();
            assert_eq!((&heard, io.read(&mut [0]).await.unwrap()), (b"first", 0));
            io.write_all(b"later").await.unwrap();
        });
        let mut agent = world.tunnel("plain.test:80").await;
        if server_first {
            assert_eq!(agent.hears_to_the_end().await, "first");
            agent.says("later").await.says_end().await;
        } else {
            agent.says("first").await.says_end().await;
            assert_eq!(agent.hears_to_the_end().await, "later");
        }
    }
}

/// Writes one byte at a time.
struct ByteByByte {
    io: Box<dyn Bytestream>,
}

impl AsyncRead for ByteByByte {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for ByteByByte {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, &bytes[..bytes.len().min(1)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
