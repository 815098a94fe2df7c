//! Requests bent in every way that a generator finds: each is refused, or means one thing to everybody behind the proxy.

use crate::world::frames::{END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, SETTINGS, frame};
use crate::world::raw::Raw;
use crate::world::{Setup, World};

/// What a server sees that takes the request's end for another's.
const SMUGGLED: &str = "GET http://plain.test/smuggled HTTP/1.1\r\nHost: plain.test\r\n\r\n";
/// Comes behind every bent request: it is answered if that one was taken, and ends the connection.
const END: &str = "GET http://plain.test/end HTTP/1.1\r\nHost: plain.test\r\nConnection: close\r\n\r\n";

/// An API that is routed without TLS: the proxy reads the same requests, and a test sends a thousand of them.
async fn world() -> World {
    Setup::new().routes("- host: plain.test\n  provider: main\n  plaintext: true").start().await
}

/// What the agent hears of a head and what follows it; the API's part of it is checked.
async fn taken(world: &World, head: &str, body: &[u8], length: u64) -> bool {
    let before = world.plain.seen().len();
    let mut agent = world.connection().await;
    let start = "POST http://plain.test/first HTTP/1.1\r\nHost: plain.test\r\n";
    agent.says_if_open([start.as_bytes(), head.as_bytes(), b"\r\n\r\n", body, END.as_bytes()].concat()).await;
    let heard = agent.hears_to_the_end().await;
    let what =
        format!("{:?} {:?}: {heard}", head.as_bytes().escape_ascii().to_string(), body.escape_ascii().to_string());
    let seen = &world.plain.seen()[before..];
    let whole: Vec<_> = seen.iter().filter(|seen| seen.complete).map(|seen| seen.path()).collect();
    let taken = heard.starts_with("HTTP/1.1 200 ");
    if taken {
        assert_eq!(whole, ["/first", "/end"], "{what}");
        assert_eq!(seen[0].length, length, "{what}");
        let framed = [seen[0].header("content-length"), seen[0].header("transfer-encoding")];
        assert!(matches!(framed, [Some(_), None] | [None, Some("chunked")]), "{framed:?} {what}");
    } else {
        assert!(heard.is_empty() || heard.starts_with("HTTP/1.1 400 "), "{what}");
        assert_eq!(heard.matches("HTTP/1.1 ").count().max(1), 1, "{what}");
        assert_eq!(whole, [""; 0], "{what}");
    }
    taken
}

/// The text with each byte put in at each of the places, but not those that are left out.
fn with_each_byte(text: &str, places: &[usize], but: impl Fn(u8) -> bool) -> Vec<Vec<u8>> {
    let bytes = || (0..=u8::MAX).filter(|byte| !but(*byte));
    let put = |place: usize, byte| [&text.as_bytes()[..place], &[byte], &text.as_bytes()[place..]].concat();
    places
        .iter()
        .flat_map(|place| bytes().map(move |byte| (*place, byte)))
        .map(|(place, byte)| put(place, byte))
        .collect()
}

#[tokio::test]
async fn no_bent_transfer_encoding_hides_a_request_behind_a_length() {
    // SEC-051, SEC-053
    let world = world().await;
    let line = "Transfer-Encoding: chunked";
    let colon = line.find(':').unwrap();
    let mut lines: Vec<Vec<u8>> = with_each_byte(line, &[0, 8, colon, colon + 1, colon + 2, 20, line.len()], |_| false);
    for value in [
        "identity, chunked",
        "chunked, identity",
        ",chunked",
        "chunked,",
        "chunked, chunked",
        "chunked;a=b",
        "\"chunked\"",
        "gzip, chunked",
        "chun\r\n ked",
        "\r\n chunked",
        "chunked\r\n\tchunked",
        "chunked\r\nTransfer-Encoding: x",
        "x\r\nTransfer-Encoding: chunked",
        "CHUNKED",
        "chunKed",
        "",
        "identity",
        "xchunked",
        "chunkedx",
        "chunked\r\n :",
    ] {
        lines.push(format!("Transfer-Encoding: {value}").into_bytes());
        lines.push(format!("X: 1\r\nTRANSFER-ENCODING: {value}").into_bytes());
    }
    for name in
        ["Transfer_Encoding", "X-Transfer-Encoding", "Transfer Encoding", "Transfer-Encodin\u{11f}", "TE", "T-E"]
    {
        lines.push(format!("{name}: chunked").into_bytes());
    }
    let body = format!("0\r\n\r\n{SMUGGLED}");
    let mut taken_as_others = 0;
    for line in lines {
        // Bytes outside ASCII go as they are; the head is Latin-1 to everyone who reads it.
        let line: String = line.iter().map(|byte| char::from(*byte)).collect();
        let length = format!("Content-Length: {}", body.len());
        for head in [format!("{line}\r\n{length}"), format!("{length}\r\n{line}")] {
            taken_as_others += usize::from(taken(&world, &head, body.as_bytes(), body.len() as u64).await);
        }
    }
    assert!(taken_as_others > 100, "fields that are others are taken: {taken_as_others}");
}

#[tokio::test]
async fn a_bent_chunk_is_one_chunk_or_the_end_of_its_request() {
    // SEC-055
    let world = world().await;
    let chunked = "Transfer-Encoding: chunked";
    let body = "2\r\nok\r\n0\r\n\r\n";
    assert!(taken(&world, chunked, body.as_bytes(), 2).await);
    // A hexadecimal digit makes another size, which is not bent.
    let digit = |byte: u8| byte.is_ascii_hexdigit();
    let mut bent = with_each_byte(body, &[0, 1, 2, 5, 6, 7, 8, 9, 10], digit);
    for size in [
        "+2",
        "-2",
        "0x2",
        "0X2",
        "2_0",
        "2.",
        "2,",
        "2 ; a",
        "2;a=\"b\r\n\"",
        "2;\n",
        "2;a\rb",
        "2\n",
        "\r\n2",
        " 2",
        "10000000000000002",
        "fffffffffffffffe",
        "ffffffffffffffff",
        "\u{ff12}",
        "2h",
        "",
    ] {
        bent.push(format!("{size}\r\nok\r\n0\r\n\r\n").into_bytes());
    }
    for rest in
        ["ok0\r\n\r\n", "ok\n0\r\n\r\n", "ok\r0\r\n\r\n", "okk\r\n0\r\n\r\n", "o\r\n0\r\n\r\n", "ok\r\n0\r\nX\r\n\r\n"]
    {
        bent.push(format!("2\r\n{rest}").into_bytes());
    }
    for last in ["0\r\n\n", "0\n\r\n", "0\r\nX: 1\n\r\n", "-0\r\n\r\n", "0x0\r\n\r\n", "0\r\nContent-Length: 5\r\n\r\n"]
    {
        bent.push(format!("2\r\nok\r\n{last}").into_bytes());
    }
    bent.push(format!("2;{}\r\nok\r\n0\r\n\r\n", "x".repeat(1 << 20)).into_bytes());
    for body in bent {
        taken(&world, chunked, &body, 2).await;
    }
}

#[tokio::test]
async fn a_line_end_in_a_field_never_becomes_another_field() {
    // SEC-044
    let world = world().await;
    for field in
        ["X: a\rb", "X: a\0b", "X\r: a", "X\0: a", "X: a\r", "\rX: a", "X: a\r\r\nY: b", "X\r\n: a", "X: \u{b}\r"]
    {
        let head = format!("Content-Length: 0\r\n{field}");
        assert!(!taken(&world, &head, b"", 0).await, "{field:?}");
    }
    let over_h2 = Setup::new().start().await;
    for (name, value) in [
        ("x", "a\r\nx-smuggled: 1"),
        ("x", "a\rb"),
        ("x", "a\nb"),
        ("x", "a\0b"),
        ("x\r\ny", "a"),
        ("x\0", "a"),
        ("x: 1\r\ny", "a"),
        (":path", "/ HTTP/1.1\r\nx: 1"),
        (":path", "/\rx"),
        (":method", "GET\r\nX"),
        (":authority", "api.test\r\nx: 1"),
        ("X", "upper case"),
        ("transfer-encoding", "chunked"),
        ("connection", "close"),
        ("host", "api.test\r\nx: 1"),
        ("te", "gzip\r\nx: 1"),
    ] {
        let mut agent = over_h2.tunnel("api.test:443").await.tls("api.test", &["h2"]).await.unwrap();
        refuses_stream(&mut agent, name, value).await;
    }
    assert_eq!((over_h2.api.seen().len(), over_h2.get("/me").await.status), (0, 200));
}

/// Sends a request over HTTP/2 with one field that may be anything, and waits for its refusal.
async fn refuses_stream(agent: &mut Raw, name: &str, value: &str) {
    let usual = [(":method", "GET"), (":scheme", "https"), (":authority", "api.test"), (":path", "/")];
    let mut fields: Vec<_> = usual.into_iter().filter(|(usual, _)| *usual != name).collect();
    fields.insert(if name.starts_with(':') { 0 } else { fields.len() }, (name, value));
    let block: Vec<u8> = fields.iter().flat_map(|(name, value)| literal(name, value)).collect();
    agent.says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    agent.says([frame(SETTINGS, 0, 0, []), frame(HEADERS, END_HEADERS | END_STREAM, 1, block)].concat()).await;
    loop {
        let head = agent.take(9).await;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let payload = agent.take(length).await;
        match head[3] {
            RST_STREAM | GOAWAY => return,
            // A whole answer: `:status: 400` has a number of its own in HPACK's table.
            HEADERS => return assert_eq!(payload[0], 0x8c, "{name:?} {value:?} was taken"),
            _ => {}
        }
    }
}

/// A field that is neither compressed nor remembered (RFC 7541 section 6.2.2).
fn literal(name: &str, value: &str) -> Vec<u8> {
    [&[0, name.len() as u8], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
}

#[tokio::test]
async fn what_is_no_request_of_http_1_1_is_refused() {
    // SEC-058
    let world = world().await;
    for line in [
        "GET /",
        "GET http://plain.test/",
        "GET http://plain.test/ HTTP/0.9",
        "GET http://plain.test/ HTTP/1.2",
        "GET http://plain.test/ HTTP/2.0",
        "PRI * HTTP/2.0",
        "GET http://plain.test/ HTTP/1.1x",
        "GET http://plain.test/ http/1.1",
        "GET http://plain.test/ HTTP/11",
        "GET a HTTP/1.1",
        "GET a",
        "GET",
        "",
        "GET http://plain.test/ x HTTP/1.1",
        "GET  http://plain.test/ HTTP/1.1",
        " GET http://plain.test/ HTTP/1.1",
        "G\x08T http://plain.test/ HTTP/1.1",
        "G(ET) http://plain.test/ HTTP/1.1",
        "\"GET\" http://plain.test/ HTTP/1.1",
        "GET: http://plain.test/ HTTP/1.1",
        "GET\thttp://plain.test/ HTTP/1.1",
        "GET\x0bhttp://plain.test/ HTTP/1.1",
        "GET http://plain.test/\x00 HTTP/1.1",
        "GET http://plain.test/\r HTTP/1.1",
        "\u{c9}T http://plain.test/ HTTP/1.1",
    ] {
        let mut agent = world.connection().await;
        agent.says_if_open(format!("{line}\r\nHost: plain.test\r\n\r\n{SMUGGLED}")).await;
        agent.says_end().await;
        let heard = agent.hears_to_the_end().await;
        assert!(heard.starts_with("HTTP/1.1 400 ") || heard.is_empty(), "{line:?}: {heard}");
        assert_eq!(heard.matches("HTTP/1.1 ").count().max(1), 1, "{line:?}: {heard}");
    }
    assert_eq!(world.plain.seen().len(), 0);
}
