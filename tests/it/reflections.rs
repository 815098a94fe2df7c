//! APIs that repeat a request's headers in their answers, and routes on which the agent is not to see the token there.

use http::Request;
use http_body_util::BodyExt;

use crate::world::agent::Reply;
use crate::world::answer::{Answer, Filler, Gate, answer};
use crate::world::log;
use crate::world::server::raw;
use crate::world::{Setup, World, soon};

const ROUTE: &str = "- host: api.test\n  provider: main\n  redact_reflections: true";
const PROTOCOLS: [(&str, bool); 4] = [("http/1.1", false), ("http/1.1", true), ("h2", false), ("h2", true)];

/// A world whose route to the API has tokens taken out of answers.
fn redacting() -> Setup {
    Setup::new().routes(ROUTE)
}

/// As many fillers as the text has bytes.
fn stars(text: &str) -> String {
    "*".repeat(text.len())
}

/// What httpbin's `/headers` answers.
fn echo(token: &str) -> String {
    format!("{{\"headers\": {{\"Authorization\": \"Bearer {token}\", \"Via\": \"1.1 x\"}}}}\n")
}

fn json(body: Filler) -> Answer {
    answer(200).with("content-type", "application/json").streaming(body)
}

async fn get(world: &World, over_h2: bool) -> Reply {
    let call = world.call("GET", "/headers").with("te", "trailers");
    if over_h2 { call.over_h2() } else { call }.send().await
}

#[tokio::test]
async fn without_the_key_an_api_that_repeats_the_token_shows_it() {
    // SEC-040: the risk that the README names. Paths keep the token from the endpoints that would show it.
    let world = Setup::new().routes("- host: api.test\n  paths: [/v1/**]\n  provider: main").start().await;
    let token = world.issued.access(1);
    world.api_answers([json(Filler::text(echo(&token)))]);
    assert_eq!(world.call("GET", "/v1/headers").with("accept-encoding", "gzip").send().await.text(), echo(&token));
    world.forgives_what_was_told();
    assert_eq!(world.api.seen()[0].header("accept-encoding"), Some("gzip"));
    world.get("/headers").await;
    assert_eq!(world.api.tokens(), [token.as_str(), "none"]);
}

#[tokio::test]
async fn a_body_that_repeats_the_token_arrives_without_it_and_as_long() {
    // SEC-040
    for (protocol, over_h2) in PROTOCOLS {
        let world = redacting().api_speaks(&[protocol]).start().await;
        let token = world.issued.access(1);
        let text = format!("{}{}{token}", echo(&token), echo(&token[1..]));
        let expected = format!("{}{}{}", echo(&stars(&token)), echo(&token[1..]), stars(&token));
        let bodies = [text.len(), 64, 7, 1].map(|size| Filler::cut(&text, size));
        let chunked = bodies.clone().map(Filler::of_unknown_length);
        world.api_answers(bodies.into_iter().chain(chunked).map(json));
        for known in [true, true, true, true, false, false, false, false] {
            let reply = get(&world, over_h2).await;
            assert_eq!(reply.text(), expected, "{protocol} {over_h2}");
            let length = known.then(|| text.len().to_string());
            assert_eq!(reply.header("content-length"), length.as_deref(), "{protocol} {over_h2}");
        }
        world.forgives_what_was_told();
        assert!(world.api.seen().iter().all(|seen| seen.header("accept-encoding") == Some("identity")));
    }
}

#[tokio::test]
async fn an_event_does_not_wait_for_the_next_one() {
    // SEC-040
    let (first, second) = ("data: {\"n\": 1}\n\n", "data: {\"n\": 2}\n\n");
    for (protocol, over_h2) in PROTOCOLS {
        let world = redacting().api_speaks(&[protocol]).start().await;
        let token = world.issued.access(1);
        let (begins, goes_on) = (format!("data: Bearer {}", &token[..9]), format!("{}\n\n", &token[9..]));
        let [second_may_come, third_may_come, third_may_end] = [(); 3].map(|()| Gate::shut());
        let events = Filler::text(first).then_text(&second_may_come, second).of_unknown_length();
        let events = events.then_text(&third_may_come, begins).then_text(&third_may_end, goes_on);
        world.api_answers([answer(200).with("content-type", "text/event-stream").streaming(events)]);
        let mut agent = Events::open(&world, over_h2).await;
        agent.next_is(first).await;
        second_may_come.open();
        agent.next_is(second).await;
        third_may_come.open();
        agent.next_is("data: Bearer ").await;
        third_may_end.open();
        agent.next_is(&format!("{}\n\n", stars(&token))).await;
    }
}

/// An answer's body, read as it comes.
struct Events {
    body: hyper::body::Incoming,
    read: String,
}

impl Events {
    async fn open(world: &World, over_h2: bool) -> Self {
        let protocol = if over_h2 { "h2" } else { "http/1.1" };
        let tls = world.tunnel("api.test:443").await.tls("api.test", &[protocol]).await.unwrap();
        let request = Request::get("https://api.test/events").header("host", "api.test");
        let request = request.body(Filler::text("")).unwrap();
        let response = if over_h2 {
            let mut sender = tls.http2().await.sender;
            soon(log::unread(sender.send_request(request))).await
        } else {
            tls.http1_streaming(request).await
        };
        Self { body: response.unwrap().into_body(), read: String::new() }
    }

    /// Exactly this comes, and before anything else has to happen.
    async fn next_is(&mut self, text: &str) {
        while self.read.len() < text.len() {
            let frame = soon(self.body.frame()).await.expect("it ended").unwrap();
            self.read.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
        assert_eq!(self.read, text);
        self.read.clear();
    }
}

#[tokio::test]
async fn fields_and_trailers_that_repeat_the_token_arrive_without_it() {
    // SEC-041
    for (protocol, over_h2) in PROTOCOLS {
        let world = redacting().api_speaks(&[protocol]).start().await;
        let token = world.issued.access(1);
        for kind in ["text/plain", "application/octet-stream"] {
            let said = answer(302)
                .with("content-type", kind)
                .with("location", format!("https://api.test/login?access_token={token}&x=1"))
                .with("set-cookie", format!("session={token}; HttpOnly"))
                .with("x-twice", format!("{token},{token}"))
                .with("trailer", "x-echo")
                .saying("see there");
            world.api_answers([said.then(&[("x-echo", &format!("Bearer {token}"))])]);
            let (reply, hidden) = (get(&world, over_h2).await, stars(&token));
            for (name, value) in [
                ("location", format!("https://api.test/login?access_token={hidden}&x=1")),
                ("set-cookie", format!("session={hidden}; HttpOnly")),
                ("x-twice", format!("{hidden},{hidden}")),
            ] {
                assert_eq!(reply.header(name), Some(value.as_str()), "{protocol} {over_h2}");
            }
            assert_eq!(reply.text(), "see there");
            if over_h2 {
                assert_eq!(reply.trailers["x-echo"], format!("Bearer {hidden}"));
            }
        }
    }
}

#[tokio::test]
async fn a_token_in_another_spelling_or_in_the_reason_is_taken_out_too() {
    // SEC-040, SEC-041
    let world = redacting().api_speaks(&["http/1.1"]).start().await;
    let token = "canary-a/b+c==";
    world.issued.repeats(token);
    let (encoded, escaped) = ("canary-a%2Fb%2Bc%3D%3D", "canary-a\\/b+c\\u003d\\u003D");
    let body = format!("{{\"token\": \"{escaped}\"}}");
    let head = format!("HTTP/1.1 200 {token}\r\nLocation: /?t={encoded}\r\nContent-Length: {}\r\n\r\n", body.len());
    world.api.answers_raw([raw(format!("{head}{body}"))]);
    let mut agent = world.api_connection().await;
    agent.says("GET / HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n").await;
    let heard = agent.hears_to_the_end().await;
    assert!(heard.starts_with("HTTP/1.1 200 OK\r\n"), "{heard}");
    assert!(heard.contains(&format!("\r\nlocation: /?t={}\r\n", stars(encoded))), "{heard}");
    assert!(heard.ends_with(&format!("{{\"token\": \"{}\"}}", stars(escaped))), "{heard}");
}

#[tokio::test]
async fn both_tokens_of_a_request_that_was_sent_twice_are_taken_out() {
    // SEC-040
    for over_h2 in [false, true] {
        let world = redacting().start().await;
        let [old, new] = [1, 2].map(|number| world.issued.access(number));
        let says = |text: &str| answer(200).with("x-tokens", text).saying(text.to_owned());
        world.api_answers([Answer::from(401), says(&format!("was {old}, is {new}"))]);
        let (reply, expected) = (get(&world, over_h2).await, format!("was {}, is {}", stars(&old), stars(&new)));
        assert_eq!((reply.text(), reply.header("x-tokens")), (expected.as_str(), Some(expected.as_str())));
    }
}

#[tokio::test]
async fn a_401_that_is_passed_on_does_not_show_its_token_either() {
    // SEC-040
    let world = redacting().start().await;
    let token = world.issued.access(1);
    world.issued.repeats(&token);
    let no = answer(401).with("www-authenticate", format!("Bearer error=\"invalid_token\", token=\"{token}\""));
    world.api_answers([no.with("content-type", "text/html").saying(format!("<b>{token}</b> is no good"))]);
    let reply = world.get("/me").await;
    assert_eq!((reply.status, world.request_told().passed), (401, Some("same_token")));
    assert_eq!(reply.text(), format!("<b>{}</b> is no good", stars(&token)));
    let challenge = format!("Bearer error=\"invalid_token\", token=\"{}\"", stars(&token));
    assert_eq!(reply.header("www-authenticate"), Some(challenge.as_str()));
}

#[tokio::test]
async fn what_is_not_text_passes_as_it_is() {
    // SEC-040: what the README says is not searched.
    let world = redacting().start().await;
    let text = echo(&world.issued.access(1));
    for kind in ["application/octet-stream", "application/grpc", "application/json; charset=utf-16"] {
        world.api_answers([answer(200).with("content-type", kind).streaming(Filler::cut(&text, 7))]);
        assert_eq!(world.get("/headers").await.text(), text, "{kind}");
    }
    world.forgives_what_was_told();
}

#[tokio::test]
async fn text_that_is_compressed_all_the_same_passes_and_is_told_of_once() {
    // SEC-040: what the README says is not searched.
    let routes = "- host: coded.api.test\n  provider: main\n  redact_reflections: true";
    let setup = Setup::new().routes(routes).resolve("coded.api.test:443", crate::world::To::Api);
    let world = setup.start().await;
    let coded = || json(Filler::text("not gzip")).with("content-encoding", "gzip");
    world.api_answers([json(Filler::text("{}")).with("content-encoding", "identity"), coded(), coded()]);
    let told = || log::lines_with("coded.api.test:443").iter().filter(|line| line.contains(" WARN ")).count();
    for (text, times) in [("{}", 0), ("not gzip", 1), ("not gzip", 1)] {
        let call = world.call("GET", "/x").to("coded.api.test").with("accept-encoding", "gzip, br");
        assert_eq!(call.send().await.text(), text);
        assert_eq!(told(), times);
    }
    assert_eq!(world.api.seen()[1].header("accept-encoding"), Some("identity"));
}

#[tokio::test]
async fn a_part_of_a_body_and_an_answer_to_head_keep_their_lengths() {
    // SEC-040
    for (protocol, over_h2) in PROTOCOLS {
        let world = redacting().api_speaks(&[protocol]).start().await;
        let token = world.issued.access(1);
        let text = echo(&token);
        let part = || answer(206).with("content-type", "text/plain").with("content-range", "bytes 5-99/1000");
        world.api_answers([part().saying(text.clone()), part().saying(text.clone())]);
        let reply = get(&world, over_h2).await;
        assert_eq!((reply.status, reply.text()), (206, echo(&stars(&token)).as_str()));
        assert_eq!(reply.header("content-range"), Some("bytes 5-99/1000"));
        let head = world.call("HEAD", "/headers");
        let reply = if over_h2 { head.over_h2() } else { head }.send().await;
        assert!(reply.ended_with_its_head, "{protocol} {over_h2}");
        assert_eq!(reply.header("content-length"), Some(text.len().to_string().as_str()));
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_breaks_off_for_the_agent_too() {
    // SEC-040, H7
    let world = redacting().api_speaks(&["http/1.1"]).start().await;
    let begun = world.issued.access(1)[..9].to_owned();
    let cut = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{begun}\r\n");
    world.api.answers_raw([raw(cut).and_close()]);
    let mut agent = world.api_connection().await;
    agent.says("GET /x HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    let heard = agent.hears_to_the_end().await;
    assert!(heard.starts_with("HTTP/1.1 200 OK\r\n") && !heard.ends_with("0\r\n\r\n"), "{heard}");
    world.forgives_what_was_told();
}

#[tokio::test]
async fn a_websocket_opens_without_showing_the_token_and_is_not_searched() {
    // SEC-041: what the README says is not searched.
    let world = redacting().api_speaks(&["http/1.1"]).start().await;
    let token = world.issued.access(1);
    let switched = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\nX-Echo: {token}\r\n\r\n"
    );
    world.api.answers_raw([raw(switched).and_echo()]);
    let mut agent = world.api_connection().await;
    agent.says("GET /ws HTTP/1.1\r\nHost: api.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
    let reply = agent.hears().await;
    assert_eq!((reply.status, reply.header("x-echo")), (101, Some(stars(&token).as_str())));
    assert_eq!(agent.says(&token).await.take(token.len()).await, token.as_bytes());
    world.forgives_what_was_told();
}
