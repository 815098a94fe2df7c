//! Calls to authorization servers and webhooks: one deadline, no redirects, at most 64 KiB of answer.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, request};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use tokio::time::{Instant, timeout, timeout_at};
use url::{Position, Url};

use super::via::UpstreamProxyError;
use super::{Dialer, OURSELVES, Origin, RequestBody, Upstream, UpstreamError};
use crate::clock::{Clock, Now};
use crate::host::Authority;
use crate::oauth::TokenRequestFormat;
use crate::oauth::grant::TokenRequest;
use crate::routes::UpstreamHttp;
use crate::secret::Secret;

/// For the whole call, name resolution to last byte.
const DEADLINE: Duration = Duration::from_secs(20);
/// Who notices the deadline so much later has stood still, as a stopped process does.
const STOOD_STILL: Duration = Duration::from_secs(1);
/// How long it then takes to read what has come meanwhile.
const UNREAD: Duration = Duration::from_secs(1);

/// The client for token endpoints and discovery.
#[derive(Clone)]
pub struct Calls {
    /// With connections of its own: no agent's request ever shares one with a secret.
    upstream: Arc<ArcSwap<Upstream>>,
}

/// An authorization server's answer.
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its header fields.
    pub headers: HeaderMap,
    /// Its body, whole.
    pub body: Vec<u8>,
}

impl Calls {
    /// A client that finds its way as `dialer` does. Must be called within a tokio runtime.
    pub fn new(dialer: Dialer) -> Self {
        Self { upstream: Arc::new(ArcSwap::from_pointee(Upstream::new(dialer))) }
    }

    /// From now on it finds its way as this one does; what is under way goes on as it began.
    pub fn redirect(&self, dialer: Dialer) {
        self.upstream.store(Arc::new(Upstream::new(dialer)));
    }

    /// Sends a request to a provider (RFC 6749 section 4.4.2). Its body, and with it the grant, does not go out after the
    /// moment `by`, whatever held it up.
    ///
    /// # Errors
    /// No answer, or more than `limit` bytes of it.
    pub async fn post(&self, request: &TokenRequest, limit: usize, by: Option<Now>) -> Result<Reply, CallError> {
        let content_type = match request.format {
            TokenRequestFormat::Form => "application/x-www-form-urlencoded",
            TokenRequestFormat::Json => "application/json",
        };
        let mut post = to(Method::POST, &request.url).header(CONTENT_TYPE, content_type);
        if let Some(authorization) = &request.authorization {
            let mut value = HeaderValue::from_str(authorization.expose()).map_err(|_| CallError::Request)?;
            value.set_sensitive(true);
            post = post.header(AUTHORIZATION, value);
        }
        self.send(&request.url, post, request.body.expose().to_owned(), limit, by).await
    }

    /// Posts a JSON document, such as a message to a webhook.
    ///
    /// # Errors
    /// No answer, or more than `limit` bytes of it.
    pub async fn post_json(&self, url: &Url, body: &Secret, limit: usize) -> Result<Reply, CallError> {
        let post = to(Method::POST, url).header(CONTENT_TYPE, "application/json");
        self.send(url, post, body.expose().to_owned(), limit, None).await
    }

    /// Posts bytes of another type, with these fields besides.
    ///
    /// # Errors
    /// No answer, or more than `limit` bytes of it.
    pub async fn post_bytes(
        &self,
        url: &Url,
        content_type: &'static str,
        fields: &HeaderMap,
        body: Vec<u8>,
        limit: usize,
    ) -> Result<Reply, CallError> {
        let post = to(Method::POST, url).header(CONTENT_TYPE, content_type);
        let post = fields.iter().fold(post, |post, (name, value)| post.header(name, value));
        self.send(url, post, body, limit, None).await
    }

    /// Gets a document.
    ///
    /// # Errors
    /// No answer, or more than `limit` bytes of it.
    pub async fn get(&self, url: &Url, limit: usize) -> Result<Reply, CallError> {
        self.send(url, to(Method::GET, url), String::new(), limit, None).await
    }

    async fn send(
        &self,
        url: &Url,
        request: request::Builder,
        body: impl Into<Bytes>,
        limit: usize,
        by: Option<Now>,
    ) -> Result<Reply, CallError> {
        let origin = origin(url).ok_or(CallError::Request)?;
        let body = InTime { body: Full::new(body.into()), by }.boxed_unsync();
        let request = request.body(body).map_err(|_| CallError::Request)?;
        let mut exchange = pin!(self.exchange(&origin, request, limit));
        let deadline = Instant::now() + DEADLINE;
        let reply = match timeout_at(deadline, &mut exchange).await {
            // An answer that nobody has read may hold the one refresh token that is good.
            Err(_) if deadline.elapsed() > STOOD_STILL => timeout(UNREAD, exchange).await,
            reply => reply,
        };
        reply.map_err(|_| CallError::Timeout)?
    }

    async fn exchange(&self, origin: &Origin, request: Request<RequestBody>, limit: usize) -> Result<Reply, CallError> {
        let upstream = self.upstream.load_full();
        let (head, mut rest) = upstream.send(origin, request, None).await?.into_parts();
        let mut body = Vec::new();
        while let Some(frame) = rest.frame().await {
            let frame = frame.map_err(|_| CallError::Broken)?;
            let data = frame.data_ref().map(Bytes::as_ref).unwrap_or_default();
            if body.len() + data.len() > limit {
                return Err(CallError::TooLong);
            }
            body.extend_from_slice(data);
        }
        Ok(Reply { status: head.status, headers: head.headers, body })
    }
}

/// A body that goes out in time or not at all. It is asked for when the connection is there: that is as late as it can be
/// looked.
struct InTime {
    body: Full<Bytes>,
    by: Option<Now>,
}

impl Body for InTime {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.by.is_some_and(|by| by.is_past(Clock::system().now())) {
            return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
        }
        Pin::new(&mut self.body).poll_frame(context).map_err(|never| match never {})
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn to(method: Method, url: &Url) -> request::Builder {
    let request = Request::builder().method(method).uri(&url[Position::BeforePath..Position::AfterQuery]);
    request.header(ACCEPT, "application/json").header(USER_AGENT, OURSELVES)
}

fn origin(url: &Url) -> Option<Origin> {
    let authority = Authority::new(url.host_str()?.parse().ok()?, url.port_or_known_default()?);
    Some(Origin { authority, plaintext: url.scheme() == "http", http: UpstreamHttp::H1 })
}

/// Why a call brought no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The request could not be built.
    #[error("the request cannot be written as HTTP")]
    Request,
    /// No address, or nobody there.
    #[error("cannot connect to the authorization server: {0}")]
    Connect(String),
    /// It could not prove that it is that host.
    #[error(
        "the authorization server's certificate is not valid for it: {0}; a company's root goes into `extra_ca_files`"
    )]
    Certificate(String),
    /// A proxy on the way did not lead there.
    #[error(transparent)]
    Proxy(UpstreamProxyError),
    /// More than 20 s.
    #[error("the authorization server took longer than {} s", DEADLINE.as_secs())]
    Timeout,
    /// It would have been sent too late, and was not.
    #[error("it took too long to reach the authorization server; nothing was sent")]
    Late,
    /// The connection broke.
    #[error("the authorization server's answer broke off")]
    Broken,
    /// More than the limit.
    #[error("the authorization server's answer is too long")]
    TooLong,
}

impl From<UpstreamError> for CallError {
    fn from(error: UpstreamError) -> Self {
        match error {
            UpstreamError::Resolve => CallError::Connect("its name does not resolve".into()),
            UpstreamError::Connect(why) => CallError::Connect(why),
            UpstreamError::Certificate(why) => CallError::Certificate(why),
            UpstreamError::Proxy(error) => CallError::Proxy(error),
            UpstreamError::ConnectTimeout(_)
            | UpstreamError::TlsTimeout(_)
            | UpstreamError::Tls(_)
            | UpstreamError::Loop => CallError::Connect(error.to_string()),
            // There is no other way for a body of ours to break off.
            UpstreamError::RequestBody | UpstreamError::Late => CallError::Late,
            UpstreamError::Unprocessed
            | UpstreamError::Closed
            | UpstreamError::TooManyFields
            | UpstreamError::Protocol(_) => CallError::Broken,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::super::{Proxies, Roots};
    use super::*;
    use crate::limits::Limits;

    /// A server that reads a request's head and answers with these bytes; gives what it read.
    async fn server(answer: String) -> (SocketAddr, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let read = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.windows(4).any(|end| end == b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            // A client that has seen enough may be gone by then.
            let _ = stream.write_all(answer.as_bytes()).await;
            String::from_utf8(head).unwrap()
        });
        (address, read)
    }

    fn calls(resolve: &[(&str, SocketAddr)]) -> Calls {
        let resolve = resolve.iter().map(|(name, at)| (Authority::parse(name, None).unwrap(), *at)).collect();
        let proxies = Proxies::default();
        Calls::new(
            Dialer::new(
                &Roots::load(&[], "x").unwrap(),
                resolve,
                proxies,
                &Limits::default(),
                &crate::metrics::Metrics::default(),
            )
            .unwrap(),
        )
    }

    fn token_request(at: SocketAddr) -> TokenRequest {
        TokenRequest {
            url: url(&format!("http://{at}/token")),
            authorization: None,
            format: TokenRequestFormat::Form,
            body: Secret::new("client_secret=x"),
        }
    }

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn a_redirect_is_an_answer_and_is_not_followed() {
        // C20: the secret would go wherever the answer points to.
        let (at, _) = server("HTTP/1.1 307 x\r\nlocation: http://evil.test/\r\ncontent-length: 0\r\n\r\n".into()).await;
        let reply = calls(&[]).post(&token_request(at), 100, None).await.unwrap();
        assert_eq!(reply.status, 307);
    }

    #[tokio::test]
    async fn a_grant_does_not_go_out_after_its_time() {
        // TOK-031: the process may have stood still between the lease and the connection.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let request = token_request(listener.local_addr().unwrap());
        let received = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut received = Vec::new();
            let _ = stream.read_to_end(&mut received).await;
            String::from_utf8(received).unwrap()
        });
        let a_moment_ago = Clock::system().now();
        let late = calls(&[]).post(&request, 100, Some(a_moment_ago)).await;
        assert_eq!(late.err(), Some(CallError::Late));
        assert!(!received.await.unwrap().contains("client_secret"));
    }

    #[tokio::test]
    async fn an_answer_is_still_read_by_a_process_that_stood_still_past_the_deadline() {
        // TOK-031
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let request = token_request(listener.local_addr().unwrap());
        let call = tokio::spawn(async move { calls(&[]).post(&request, 100, None).await });
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = Vec::new();
        while !asked.ends_with(b"client_secret=x") {
            asked.push(stream.read_u8().await.unwrap());
        }
        tokio::time::pause();
        tokio::time::advance(DEADLINE * 2).await;
        tokio::time::resume();
        // The deadline is noticed first, as it is when both are there at once.
        tokio::time::sleep(Duration::from_millis(1)).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
        assert_eq!(call.await.unwrap().unwrap().body, b"{}");
    }

    #[tokio::test]
    async fn an_answer_longer_than_the_limit_is_not_read_on() {
        // TOK-010
        let (at, _) = server(format!("HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n{}", "x".repeat(200))).await;
        let answer = calls(&[]).get(&url(&format!("http://{at}/")), 199).await;
        assert_eq!(answer.err(), Some(CallError::TooLong));
    }

    #[tokio::test]
    async fn an_answer_that_never_comes_or_never_ends_is_waited_for_twenty_seconds() {
        // TOK-016
        for says in ["", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"access_token\""] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let at = listener.local_addr().unwrap();
            tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.read_u8().await.unwrap();
                // Only now: before, the clock would run ahead of the connection.
                tokio::time::pause();
                for byte in says.bytes() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    let _ = stream.write_u8(byte).await;
                }
                std::future::pending::<()>().await;
            });
            let asked = tokio::time::Instant::now();
            assert_eq!(calls(&[]).get(&url(&format!("http://{at}/")), 100).await.err(), Some(CallError::Timeout));
            assert_eq!(asked.elapsed().as_secs(), 20, "{says}");
            tokio::time::resume();
        }
    }

    #[tokio::test]
    async fn a_port_that_a_url_names_can_be_resolved_to_another_one() {
        let (at, read) = server("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".into()).await;
        calls(&[("auth.test:8080", at)]).get(&url("http://auth.test:8080/x"), 10).await.unwrap();
        let head = read.await.unwrap();
        assert!(head.starts_with("GET /x HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("\r\nhost: auth.test:8080\r\n"), "{head}");
    }

    #[tokio::test]
    async fn nobody_there_is_said_in_our_own_words() {
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let refused = calls(&[("auth.test:443", gone)]).get(&url("https://auth.test/"), 10).await.err();
        assert_eq!(refused, Some(CallError::Connect("connection refused".into())));
    }
}
