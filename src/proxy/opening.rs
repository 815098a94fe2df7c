//! What an agent opens a redirected connection with, as far as it says where it is to go.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::host::{Authority, HostName};
use crate::limits::Limits;

/// The largest ClientHello, and a little more.
const LONGEST_HELLO: usize = 72 << 10;
/// The longest method of a request.
const LONGEST_METHOD: usize = 24;
/// As much is read at once.
const CHUNK: usize = 4 << 10;
/// The first byte of a TLS handshake (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 22;

/// What a connection opens with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Opening {
    /// TLS, and the name that its ClientHello asks for, if it is one (RFC 6066 section 3).
    Tls(Option<HostName>),
    /// HTTP/1 in the clear, and what its Host says, if there is one that says it clearly.
    Http(Option<Authority>),
    /// Neither.
    Unknown,
}

/// Reads until it is clear what this is, or the agent ends. What was read stays in `said`, where the first of it is.
///
/// # Errors
/// The connection breaks, or it takes too long.
pub(super) async fn read<IO>(agent: &mut IO, said: &mut BytesMut, port: u16, limits: &Limits) -> io::Result<Opening>
where
    IO: AsyncRead + Unpin,
{
    let mut ear = Ear { port, max_head: limits.max_head, known: 0, hello: Acceptor::default() };
    let limit = if said.first() == Some(&HANDSHAKE) { limits.handshake_timeout } else { limits.head_timeout };
    let reading = async {
        loop {
            if let Some(opening) = ear.hear(said) {
                return Ok(opening);
            }
            if more(agent, said).await? == 0 {
                return Ok(Opening::Unknown);
            }
        }
    };
    within(limit, reading).await
}

/// Reads what is there, and gives how much that was; nothing at the end.
pub(super) async fn more<IO>(agent: &mut IO, said: &mut BytesMut) -> io::Result<usize>
where
    IO: AsyncRead + Unpin,
{
    said.reserve(CHUNK);
    agent.read_buf(said).await
}

async fn within<T>(limit: Duration, reading: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the agent does not say what it wants");
    tokio::time::timeout(limit, reading).await.map_err(late)?
}

/// Understands what is said, once it is enough.
struct Ear {
    /// Where a Host without a port leads to.
    port: u16,
    max_head: usize,
    /// How much of it has been looked at.
    known: usize,
    hello: Acceptor,
}

impl Ear {
    fn hear(&mut self, said: &[u8]) -> Option<Opening> {
        match said.first()? {
            &HANDSHAKE => self.hello(said),
            b'A'..=b'Z' => self.request(said),
            _ => Some(Opening::Unknown),
        }
    }

    fn hello(&mut self, said: &[u8]) -> Option<Opening> {
        if said.len() > LONGEST_HELLO {
            return Some(Opening::Unknown);
        }
        let mut new = &said[self.known..];
        self.known = said.len();
        while !new.is_empty() {
            if self.hello.read_tls(&mut new).is_err() {
                return Some(Opening::Unknown);
            }
            match self.hello.accept() {
                Ok(None) => {}
                Ok(Some(hello)) => {
                    let name = hello.client_hello().server_name().and_then(|name| name.parse().ok());
                    return Some(Opening::Tls(name));
                }
                Err(_) => return Some(Opening::Unknown),
            }
        }
        None
    }

    fn request(&mut self, said: &[u8]) -> Option<Opening> {
        match is_request(said) {
            Some(true) => {}
            Some(false) => return Some(Opening::Unknown),
            None => return None,
        }
        if let Some(end) = end_of_head(said, self.known.saturating_sub(2)) {
            return Some(Opening::Http(host(&said[..end], self.port)));
        }
        self.known = said.len();
        // Whoever reads it for good says that it is too long.
        (said.len() > self.max_head).then_some(Opening::Http(None))
    }
}

/// Whether this begins an HTTP/1 request: many protocols begin with a word in capitals.
fn is_request(said: &[u8]) -> Option<bool> {
    let word = said.iter().take_while(|byte| byte.is_ascii_uppercase() || **byte == b'-').count();
    if word > LONGEST_METHOD {
        return Some(false);
    }
    match said.get(word..)? {
        [] | [b' '] => None,
        // The preface of HTTP/2, which is not spoken in the clear.
        [b' ', ..] if said.starts_with(b"PRI ") => Some(false),
        [b' ', b'/' | b'*', ..] => Some(true),
        [b' ', target @ ..] => begins(target, b"http://"),
        _ => Some(false),
    }
}

/// Whether it begins so, in capitals or not, once it is long enough to tell.
fn begins(text: &[u8], with: &[u8]) -> Option<bool> {
    let length = text.len().min(with.len());
    let same = text[..length].eq_ignore_ascii_case(&with[..length]);
    if same && length < with.len() { None } else { Some(same) }
}

fn end_of_head(said: &[u8], from: usize) -> Option<usize> {
    memchr::memchr_iter(b'\n', &said[from..])
        .map(|at| from + at + 1)
        .find(|next| matches!(&said[*next..], [b'\n', ..] | [b'\r', b'\n', ..]))
}

/// What the one Host of a head says. Every request is looked at once more, by whoever answers it.
fn host(head: &[u8], port: u16) -> Option<Authority> {
    let fields = head.split(|byte| *byte == b'\n').skip(1).filter_map(|line| {
        let colon = memchr::memchr(b':', line)?;
        line[..colon].eq_ignore_ascii_case(b"host").then_some(&line[colon + 1..])
    });
    let mut hosts = fields.map(|value| Authority::parse(std::str::from_utf8(value).ok()?.trim(), Some(port)).ok());
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};
    use tokio::io::AsyncWriteExt;
    use tokio::time::Instant;

    use super::*;
    use crate::crypto;

    fn hello(name: &str) -> Vec<u8> {
        let config =
            ClientConfig::builder_with_provider(crypto::provider()).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut said = Vec::new();
        ClientConnection::new(Arc::new(config), name).unwrap().write_tls(&mut said).unwrap();
        said
    }

    /// What is heard when it comes in pieces of this size.
    async fn heard(said: &[u8], piece: usize) -> Opening {
        let (mut agent, mut here) = tokio::io::duplex(piece);
        let speaking = async {
            agent.write_all(said).await.unwrap();
            agent.shutdown().await.unwrap();
        };
        let mut kept = BytesMut::new();
        let hearing = async {
            more(&mut here, &mut kept).await.unwrap();
            let opening = read(&mut here, &mut kept, 443, &Limits::default()).await.unwrap();
            // What was not needed is not waited for.
            drop(here);
            opening
        };
        let opening = tokio::select! {
            opening = hearing => opening,
            () = async { speaking.await; std::future::pending().await } => unreachable!(),
        };
        assert!(said.starts_with(&kept), "every byte is kept, in its order");
        opening
    }

    #[tokio::test]
    async fn a_hello_says_its_name_however_it_is_cut_up() {
        // TLS-007
        let named = Opening::Tls(Some("api.test".parse().unwrap()));
        let whole = hello("API.test");
        // A record for each 100 bytes (RFC 8446 section 5.1).
        let mut records = Vec::new();
        for piece in whole[5..].chunks(100) {
            records.extend([22, 3, 1, 0, piece.len() as u8]);
            records.extend(piece);
        }
        for said in [&whole, &records] {
            for piece in [1, 7, 64 << 10] {
                assert_eq!(heard(said, piece).await, named, "{piece}");
            }
        }
        assert_eq!(heard(&hello("192.0.2.1"), 99).await, Opening::Tls(None));
    }

    #[tokio::test]
    async fn what_only_begins_as_a_hello_is_not_one() {
        // TLS-007
        let whole = hello("api.test");
        let mut bent = whole.clone();
        bent[5] = 99;
        // One that announces 16 MB, and says as much of it as it is let.
        let mut endless = vec![22, 3, 1, 64, 0, 1, 255, 255, 255];
        endless.resize(5 + (64 << 8), 0);
        let endless = endless.repeat(8);
        for said in [&whole[..whole.len() - 1], &bent, &endless, &[22], &[22, 3, 3, 0, 0]] {
            assert_eq!(heard(said, 4096).await, Opening::Unknown, "{:?}", &said[..said.len().min(16)]);
        }
    }

    #[tokio::test]
    async fn a_request_says_its_host_and_what_is_unclear_says_none() {
        // SEC-057
        let host = |host: &str| Opening::Http(Some(Authority::parse(host, None).unwrap()));
        for (said, opening) in [
            ("GET / HTTP/1.1\r\nHost: A.test\r\n\r\n", host("a.test:443")),
            ("GET / HTTP/1.1\r\nAccept: */*\r\nhOST:a.test:8080\r\n\r\nHost: b.test\r\n\r\n", host("a.test:8080")),
            ("OPTIONS * HTTP/1.1\nHost: a.test\n\n", host("a.test:443")),
            ("VERSION-CONTROL http://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n", host("a.test:443")),
            ("GET / HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n", Opening::Http(None)),
            ("GET / HTTP/1.1\r\nHost: a.test, b.test\r\n\r\n", Opening::Http(None)),
            ("GET / HTTP/1.0\r\n\r\n", Opening::Http(None)),
        ] {
            for piece in [1, 3, 4096] {
                assert_eq!(heard(said.as_bytes(), piece).await, opening, "{said:?}");
            }
        }
        let long = format!("GET /{} HTTP/1.1\r\nHost: a.test\r\n\r\n", "x".repeat(Limits::default().max_head + 8192));
        assert_eq!(heard(long.as_bytes(), 4096).await, Opening::Http(None));
    }

    #[tokio::test]
    async fn other_protocols_are_none_of_the_two() {
        for said in [
            "SSH-2.0-OpenSSH_9.2\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "EHLO agent.test\r\n",
            "CONNECT a.test:443 HTTP/1.1\r\n\r\n",
            "A LOGIN ada\r\n",
            "GET httq://a.test/ HTTP/1.1\r\n",
            "get / HTTP/1.1\r\n\r\n",
            "THIS-IS-NO-METHOD-OF-ANY-PROTOCOL / HTTP/1.1\r\n",
            "GET / HTTP/1.1\r\nHost: a.test\r\n",
            "GET",
            "\0\0\0",
        ] {
            assert_eq!(heard(said.as_bytes(), 5).await, Opening::Unknown, "{said:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_begins_and_does_not_go_on_is_let_go_in_the_time_that_it_has() {
        // LST-016, TLS-007
        let limits = Limits::default();
        for (said, limit) in [(&[22, 3][..], limits.handshake_timeout), (b"GET /", limits.head_timeout)] {
            let (_agent, mut here) = tokio::io::duplex(64);
            let began = Instant::now();
            let ended = read(&mut here, &mut BytesMut::from(said), 443, &limits).await;
            assert_eq!((ended.unwrap_err().kind(), began.elapsed()), (io::ErrorKind::TimedOut, limit));
        }
    }
}
