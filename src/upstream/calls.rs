//! Calls to authorization servers: one deadline, no redirects, no ambient proxy, at most 64 KiB of answer.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderValue, StatusCode};
use reqwest::Client;
use url::Url;

use super::{Roots, RootsError, causes};
use crate::host::Authority;
use crate::oauth::TokenRequestFormat;
use crate::oauth::grant::TokenRequest;
use crate::secret::Secret;

/// For the whole call, name resolution to last byte.
const DEADLINE: Duration = Duration::from_secs(20);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The client for token endpoints and discovery.
#[derive(Clone)]
pub struct Calls {
    client: Client,
    /// A client for each authority that `resolve:` sends elsewhere.
    resolved: HashMap<Authority, Client>,
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
    /// A client that trusts `roots` and follows `resolve`.
    ///
    /// # Errors
    /// When TLS cannot be set up, which means a broken build.
    pub fn new(roots: &Roots, resolve: &HashMap<Authority, SocketAddr>) -> Result<Self, RootsError> {
        let client = build(roots, None)?;
        let resolved = resolve
            .iter()
            .map(|(authority, address)| Ok((authority.clone(), build(roots, Some((authority, *address)))?)))
            .collect::<Result<_, _>>()?;
        Ok(Self { client, resolved })
    }

    /// Sends a request to a provider (RFC 6749 section 4.4.2).
    ///
    /// # Errors
    /// No answer, or more than `limit` bytes of it.
    pub async fn post(&self, request: &TokenRequest, limit: usize) -> Result<Reply, CallError> {
        let content_type = match request.format {
            TokenRequestFormat::Form => "application/x-www-form-urlencoded",
            TokenRequestFormat::Json => "application/json",
        };
        self.send(&request.url, request.authorization.as_ref(), content_type, &request.body, limit).await
    }

    /// Posts a JSON document, such as a message to a webhook.
    ///
    /// # Errors
    /// No answer, or more than `limit` bytes of it.
    pub async fn post_json(&self, url: &Url, body: &Secret, limit: usize) -> Result<Reply, CallError> {
        self.send(url, None, "application/json", body, limit).await
    }

    async fn send(
        &self,
        url: &Url,
        authorization: Option<&Secret>,
        content_type: &'static str,
        body: &Secret,
        limit: usize,
    ) -> Result<Reply, CallError> {
        let (client, url, host) = self.client_for(url);
        let mut request = client
            .post(url)
            .header(CONTENT_TYPE, content_type)
            .header(ACCEPT, "application/json")
            .body(body.expose().to_owned());
        if let Some(host) = host {
            request = request.header(HOST, host);
        }
        if let Some(authorization) = authorization {
            let mut value = HeaderValue::from_str(authorization.expose()).map_err(|_| CallError::Request)?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        read(request, limit).await
    }

    /// Gets a document.
    ///
    /// # Errors
    /// No answer, or more than `limit` bytes of it.
    pub async fn get(&self, url: &Url, limit: usize) -> Result<Reply, CallError> {
        let (client, url, host) = self.client_for(url);
        let mut request = client.get(url).header(ACCEPT, "application/json");
        if let Some(host) = host {
            request = request.header(HOST, host);
        }
        read(request, limit).await
    }

    /// The client, and the URL and `Host` for it. A port written in a URL overrules the one of a resolved address in
    /// reqwest, so it is taken out of the URL and named in `Host` instead.
    fn client_for(&self, url: &Url) -> (&Client, Url, Option<String>) {
        let resolved = authority_of(url).and_then(|authority| self.resolved.get(&authority));
        let Some(client) = resolved else { return (&self.client, url.clone(), None) };
        let host = url.port().and_then(|port| url.host_str().map(|host| format!("{host}:{port}")));
        let mut url = url.clone();
        let _ = url.set_port(None);
        (client, url, host)
    }
}

/// Why a call brought no answer. In our own words: the library's text can hold the URL.
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
    /// More than 20 s.
    #[error("the authorization server took longer than {} s", DEADLINE.as_secs())]
    Timeout,
    /// The connection broke.
    #[error("the authorization server's answer broke off")]
    Broken,
    /// More than the limit.
    #[error("the authorization server's answer is too long")]
    TooLong,
}

fn build(roots: &Roots, resolve: Option<(&Authority, SocketAddr)>) -> Result<Client, RootsError> {
    let mut client = Client::builder()
        .tls_backend_preconfigured(roots.client_config(&[b"http/1.1"])?)
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(DEADLINE)
        .pool_idle_timeout(Duration::from_secs(4))
        .user_agent(concat!("sidebearer/", env!("CARGO_PKG_VERSION")));
    if let Some((authority, address)) = resolve {
        client = client.resolve(&authority.host.to_string(), address);
    }
    client.build().map_err(RootsError::Client)
}

async fn read(request: reqwest::RequestBuilder, limit: usize) -> Result<Reply, CallError> {
    let mut response = request.send().await.map_err(|error| kind(&error))?;
    let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| kind(&error))? {
        if body.len() + chunk.len() > limit {
            return Err(CallError::TooLong);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Reply { status, headers, body })
}

fn kind(error: &reqwest::Error) -> CallError {
    match error {
        error if error.is_timeout() => CallError::Timeout,
        error if error.is_connect() => unconnected(error),
        error if error.is_builder() => CallError::Request,
        _ => CallError::Broken,
    }
}

fn unconnected(error: &reqwest::Error) -> CallError {
    if let Some(error) = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
        return match error {
            rustls::Error::InvalidCertificate(reason) => CallError::Certificate(reason.to_string()),
            other => CallError::Connect(other.to_string()),
        };
    }
    if causes(error).any(|cause| cause.to_string().starts_with("dns error")) {
        return CallError::Connect("its name does not resolve".into());
    }
    let io = causes(error).filter_map(|cause| cause.downcast_ref::<std::io::Error>()).last();
    CallError::Connect(io.map_or("no reason given".into(), |io| io.kind().to_string()))
}

fn authority_of(url: &Url) -> Option<Authority> {
    Some(Authority::new(url.host_str()?.parse().ok()?, url.port_or_known_default()?))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

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
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let resolve = resolve.iter().map(|(name, at)| (Authority::parse(name, None).unwrap(), *at)).collect();
        Calls::new(&Roots::load(&[], "x").unwrap(), &resolve).unwrap()
    }

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn a_redirect_is_an_answer_and_is_not_followed() {
        // C20: the secret would go wherever the answer points to.
        let (at, _) = server("HTTP/1.1 307 x\r\nlocation: http://evil.test/\r\ncontent-length: 0\r\n\r\n".into()).await;
        let request = TokenRequest {
            url: url(&format!("http://{at}/token")),
            authorization: None,
            format: TokenRequestFormat::Form,
            body: Secret::new("client_secret=x"),
        };
        let reply = calls(&[]).post(&request, 100).await.unwrap();
        assert_eq!(reply.status, 307);
    }

    #[tokio::test]
    async fn an_answer_longer_than_the_limit_is_not_read_on() {
        // TOK-010
        let (at, _) = server(format!("HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n{}", "x".repeat(200))).await;
        let answer = calls(&[]).get(&url(&format!("http://{at}/")), 199).await;
        assert_eq!(answer.err(), Some(CallError::TooLong));
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
