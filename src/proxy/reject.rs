//! Every answer of our own: one list, with status, stable code and what to do, written in one place.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderName, PROXY_AUTHENTICATE, RETRY_AFTER};
use http::{HeaderValue, Request, Response, StatusCode};
use serde_json::json;

use super::body::ResponseBody;
use crate::host::HostError;
use crate::names::{ProviderName, UserName};
use crate::routes::AmbiguousPath;
use crate::tokens::TokenError;
use crate::upstream::{UpstreamError, UpstreamProxyError};

/// Marks the answer to somebody whom this connection brings nothing any more. HTTP/2 has no `Connection: close`.
#[derive(Clone, Copy)]
pub(super) struct TurnedAway;

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// Why a request is answered here.
#[derive(Debug, thiserror::Error)]
pub(super) enum Reject {
    #[error("this is a proxy, and the request is not for one")]
    NotForAProxy,
    #[error("an `https://` URL needs CONNECT")]
    NeedsConnect,
    #[error("{0}")]
    BadHost(String),
    #[error("the request has no Host")]
    NoHost,
    #[error("the request names its host twice")]
    TwoHosts,
    #[error("the Host of a CONNECT names another host than its target")]
    ConnectHostDiffers,
    #[error("a CONNECT inside a tunnel")]
    ConnectInTunnel,
    #[error("only `websocket` can be asked for with an extended CONNECT")]
    UnknownProtocol,
    #[error("the request is for another host than its tunnel")]
    Misdirected,
    #[error("the request's framing can be read in more than one way")]
    Framing,
    #[error("the request has too many header fields")]
    TooManyFields,
    #[error("the expectation is not `100-continue`")]
    Expectation,
    #[error("{0}")]
    Path(#[from] AmbiguousPath),
    #[error("the query has an `access_token`, and a request is sent with one token only")]
    TokenInQuery,
    #[error("TRACE would show the token to whoever asks")]
    Trace,
    #[error("the request came back to the proxy that sent it")]
    Loop,
    #[error("the route `{0}` denies it")]
    Denied(Arc<str>),
    #[error("no route covers the request, and `unmatched` is `deny`")]
    Unmatched,
    #[error("this host is routed with TLS, and the request is without")]
    Plaintext,
    #[error("the proxy wants to know who you are{}", if *.wrong { ", and these credentials are not right" } else { "" })]
    Unauthenticated { wrong: bool },
    #[error("the configuration has changed, and does not let you in here any more")]
    NoLongerAdmitted,
    #[error("the configuration has changed while the request waited for the user")]
    Reconfigured,
    #[error("the agent `{agent}` may not act for `{user}`")]
    UserNotAllowed { agent: String, user: UserName },
    #[error("the agent `{agent}` may not use the tokens of `{provider}`")]
    ProviderNotAllowed { agent: String, provider: ProviderName },
    /// Only the user can mend it; with the link where they do, if there is one.
    #[error("{}", for_the_user(.error, .connect_url.as_deref()))]
    Missing { error: TokenError, connect_url: Option<String>, by_consent: bool },
    #[error("{0}")]
    Token(#[from] TokenError),
    #[error("the use of the token could not be written to the audit trail, so it was not sent")]
    Unaudited,
    #[error("{0}")]
    Upstream(UpstreamError),
    #[error("the upstream changed the protocol without being asked")]
    Unasked,
    #[error("the upstream answered {0} to a WebSocket handshake")]
    NoWebSocket(StatusCode),
}

impl Reject {
    /// A stable name, for programs.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Reject::NotForAProxy => "not_for_a_proxy",
            Reject::NeedsConnect => "needs_connect",
            Reject::BadHost(_) | Reject::NoHost | Reject::TwoHosts | Reject::ConnectHostDiffers => "bad_host",
            Reject::ConnectInTunnel => "connect_in_tunnel",
            Reject::UnknownProtocol => "unknown_protocol",
            Reject::Misdirected => "authority_mismatch",
            Reject::Framing => "bad_framing",
            Reject::TooManyFields => "too_many_fields",
            Reject::Expectation => "unknown_expectation",
            Reject::Path(_) => "ambiguous_path",
            Reject::TokenInQuery => "token_in_query",
            Reject::Trace => "trace_refused",
            Reject::Loop | Reject::Upstream(UpstreamError::Loop) => "proxy_loop_detected",
            Reject::Denied(_) => "denied",
            Reject::Unmatched => "unmatched",
            Reject::Plaintext => "plaintext_refused",
            Reject::Unauthenticated { .. } => "proxy_authentication_required",
            Reject::NoLongerAdmitted => "no_longer_admitted",
            Reject::Reconfigured => "configuration_changed",
            Reject::UserNotAllowed { .. } => "user_not_allowed",
            Reject::ProviderNotAllowed { .. } => "provider_not_allowed",
            Reject::Missing { error, .. } | Reject::Token(error) => error.code(),
            Reject::Unaudited => "audit_unavailable",
            Reject::Upstream(error) => error.code(),
            Reject::Unasked | Reject::NoWebSocket(_) => "http_upgrade_failed",
        }
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            Reject::NotForAProxy
            | Reject::NeedsConnect
            | Reject::BadHost(_)
            | Reject::NoHost
            | Reject::TwoHosts
            | Reject::ConnectHostDiffers
            | Reject::ConnectInTunnel
            | Reject::Framing
            | Reject::TokenInQuery
            // The agent's doing, which RFC 9209's `http_request_error` means too.
            | Reject::Upstream(UpstreamError::RequestBody)
            | Reject::Path(_) => StatusCode::BAD_REQUEST,
            Reject::UnknownProtocol => StatusCode::NOT_IMPLEMENTED,
            Reject::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Reject::TooManyFields => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Reject::Expectation => StatusCode::EXPECTATION_FAILED,
            Reject::Trace => StatusCode::METHOD_NOT_ALLOWED,
            Reject::Loop | Reject::Upstream(UpstreamError::Loop | UpstreamError::Proxy(UpstreamProxyError::Own)) => {
                StatusCode::LOOP_DETECTED
            }
            // Not 407: inside a tunnel it would be the API's, and clients give up.
            Reject::Denied(_) | Reject::Unmatched | Reject::Plaintext | Reject::NoLongerAdmitted => StatusCode::FORBIDDEN,
            Reject::Unauthenticated { .. } => StatusCode::PROXY_AUTHENTICATION_REQUIRED,
            Reject::UserNotAllowed { .. } | Reject::ProviderNotAllowed { .. } | Reject::Missing { .. } => {
                StatusCode::FORBIDDEN
            }
            // Not 401: an MCP client would start an authorization of its own (SEMANTICS C18).
            Reject::Token(TokenError::NotConnected { .. } | TokenError::Reauthorize { .. }) => StatusCode::FORBIDDEN,
            Reject::Token(TokenError::FixConfiguration { .. } | TokenError::Unavailable { .. })
            | Reject::Reconfigured
            | Reject::Unaudited => StatusCode::SERVICE_UNAVAILABLE,
            Reject::Upstream(error) if error.is_timeout() => StatusCode::GATEWAY_TIMEOUT,
            Reject::Upstream(_) | Reject::Unasked | Reject::NoWebSocket(_) => StatusCode::BAD_GATEWAY,
        }
    }

    /// What to do about it.
    fn hint(&self) -> String {
        match self {
            Reject::NotForAProxy => "set HTTPS_PROXY to this address and call the API by its own URL".into(),
            Reject::NeedsConnect => {
                "use a client that opens a tunnel for `https://`, as all with HTTPS_PROXY do".into()
            }
            Reject::BadHost(_) | Reject::NoHost | Reject::TwoHosts | Reject::ConnectHostDiffers => {
                "send one Host, equal to the host of the URL".into()
            }
            Reject::ConnectInTunnel | Reject::UnknownProtocol => "send CONNECT to the proxy itself".into(),
            Reject::Misdirected => "open a tunnel of its own for each host".into(),
            Reject::Framing => "send either one Content-Length or `Transfer-Encoding: chunked`".into(),
            Reject::TooManyFields => "send fewer, or let the operator raise `limits.max_headers` in `proxy.yaml`".into(),
            Reject::Expectation => "send `Expect: 100-continue` or none".into(),
            Reject::Path(_) => {
                "send the path without `..`, `//`, `;` or encoded separators: a route depends on it".into()
            }
            Reject::TokenInQuery => {
                "leave it out: the proxy adds the token. Where it means something else to the API, the operator keeps that \
                 path out of the route's `paths`"
                    .into()
            }
            Reject::Trace => "use another method".into(),
            Reject::Loop | Reject::Upstream(UpstreamError::Loop) => {
                "do not send the proxy's own address through it".into()
            }
            Reject::Denied(_) | Reject::Unmatched => {
                "if it should be allowed, the operator adds a route for it to `proxy.yaml`".into()
            }
            Reject::Plaintext => "call it with `https://`, or set `plaintext: true` on its route".into(),
            Reject::Unauthenticated { .. } => {
                "set HTTPS_PROXY to `http://USER:SECRET@...`, with the user to act for and the agent's secret".into()
            }
            Reject::NoLongerAdmitted => {
                "connect anew, with credentials that are in `agents` of `proxy.yaml` now".into()
            }
            Reject::Reconfigured => "try again: the new configuration decides".into(),
            Reject::UserNotAllowed { .. } | Reject::ProviderNotAllowed { .. } => {
                "if it should be allowed, the operator adds it under `agents` in `proxy.yaml`".into()
            }
            Reject::Missing { connect_url: Some(url), .. } => format!("open {url}"),
            Reject::Missing { error, by_consent: true, .. } => consent_hint(error),
            Reject::Missing { error, .. } | Reject::Token(error) => token_hint(error),
            Reject::Upstream(UpstreamError::Certificate(_)) => {
                "if the host's certificate is signed by a company's root, add that root to `extra_ca_files`".into()
            }
            Reject::Unaudited => {
                "try again once the operator has made `audit.file` writable; the log says what is wrong".into()
            }
            Reject::NoWebSocket(_) => "check that the URL is one of a WebSocket".into(),
            Reject::Upstream(UpstreamError::RequestBody) => {
                "send the body whole: as long as its Content-Length, or in well-formed chunks".into()
            }
            Reject::Upstream(UpstreamError::TooManyFields) => {
                "the operator can allow more by `limits.max_headers` in `proxy.yaml`".into()
            }
            Reject::Upstream(UpstreamError::Proxy(error)) => error.hint().into(),
            Reject::Upstream(_) | Reject::Unasked => "try again; if it stays, ask whoever runs the upstream".into(),
        }
    }

    /// The answer, in the form that the caller reads.
    pub(super) fn into_response(self, form: Form) -> Response<ResponseBody> {
        let mut response = match form {
            Form::Grpc => self.grpc(),
            Form::Problem => self.problem(),
        };
        if matches!(self, Reject::NoLongerAdmitted) {
            response.extensions_mut().insert(TurnedAway);
        }
        response
    }

    /// RFC 9457, with `Proxy-Status` of RFC 9209.
    fn problem(&self) -> Response<ResponseBody> {
        let (status, code) = (self.status(), self.code());
        let mut problem = json!({
            "type": format!("urn:sidebearer:{code}"),
            "title": status.canonical_reason(),
            "status": status.as_u16(),
            "code": code,
            "detail": self.to_string(),
            "hint": self.hint(),
        });
        if let Reject::Missing { connect_url: Some(url), .. } = self {
            problem["connect_url"] = url.as_str().into();
        }
        let mut response = Response::new(ResponseBody::whole(Bytes::from(format!("{problem:#}\n"))));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(PROXY_STATUS, self.proxy_status());
        if let Reject::Token(TokenError::Unavailable { retry_after, .. }) = self {
            headers.insert(RETRY_AFTER, retry_after.as_secs_f64().ceil().max(1.0).to_string().parse().unwrap_or(ONE));
        }
        if matches!(self, Reject::Reconfigured) {
            headers.insert(RETRY_AFTER, ONE);
        }
        if matches!(self, Reject::Unauthenticated { .. }) {
            headers.insert(PROXY_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"sidebearer\""));
        }
        if matches!(self, Reject::Trace) {
            headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
        }
        if self.ends_the_connection() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Whether nothing good can follow on the same connection.
    fn ends_the_connection(&self) -> bool {
        let not_for_us = matches!(self, Reject::NotForAProxy | Reject::NeedsConnect | Reject::NoLongerAdmitted);
        not_for_us || matches!(self, Reject::Framing | Reject::Misdirected | Reject::TwoHosts | Reject::NoHost)
    }

    /// A Trailers-Only answer: a gRPC client reads neither the HTTP status nor JSON.
    fn grpc(&self) -> Response<ResponseBody> {
        let number = match self {
            Reject::Token(TokenError::Unavailable { .. } | TokenError::FixConfiguration { .. })
            | Reject::Upstream(_)
            | Reject::Unaudited
            | Reject::Reconfigured
            | Reject::Unasked
            | Reject::NoWebSocket(_) => 14,
            Reject::Token(_) | Reject::Missing { .. } | Reject::Unauthenticated { .. } => 16,
            Reject::Denied(_)
            | Reject::Unmatched
            | Reject::Plaintext
            | Reject::NoLongerAdmitted
            | Reject::UserNotAllowed { .. }
            | Reject::ProviderNotAllowed { .. } => 7,
            _ => 3,
        };
        let message = percent_encoded(&format!("{}: {} ({})", self.code(), self, self.hint()));
        let mut response = Response::new(ResponseBody::whole(Bytes::new()));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(number));
        headers.insert("grpc-message", HeaderValue::try_from(message).unwrap_or(HeaderValue::from_static("refused")));
        headers.insert(PROXY_STATUS, self.proxy_status());
        response
    }

    fn proxy_status(&self) -> HeaderValue {
        let error = match self {
            Reject::Upstream(error) => error.proxy_status(),
            Reject::Unasked | Reject::NoWebSocket(_) => "http_upgrade_failed",
            Reject::Loop => "proxy_loop_detected",
            Reject::Unaudited | Reject::Reconfigured => "proxy_internal_error",
            Reject::Denied(_)
            | Reject::Unmatched
            | Reject::Plaintext
            | Reject::Trace
            | Reject::Unauthenticated { .. }
            | Reject::NoLongerAdmitted
            | Reject::UserNotAllowed { .. }
            | Reject::ProviderNotAllowed { .. }
            | Reject::Missing { .. } => "http_request_denied",
            Reject::Token(TokenError::Unavailable { .. }) => "destination_unavailable",
            Reject::Token(_) => "http_request_denied",
            _ => "http_request_error",
        };
        let mut status = format!("sidebearer; error={error}; details=\"{}\"", self.code());
        if let Reject::Upstream(UpstreamError::Proxy(error)) = self
            && let Some(received) = error.received()
        {
            status.push_str(&format!("; received-status={}", received.as_u16()));
        }
        HeaderValue::try_from(status).unwrap_or(ONE)
    }
}

impl From<HostError> for Reject {
    fn from(error: HostError) -> Self {
        Reject::BadHost(error.to_string())
    }
}

impl From<UpstreamError> for Reject {
    fn from(error: UpstreamError) -> Self {
        Reject::Upstream(error)
    }
}

/// The form in which a caller reads errors.
#[derive(Debug, Clone, Copy)]
pub(super) enum Form {
    /// problem+json.
    Problem,
    /// gRPC's own status.
    Grpc,
}

impl Form {
    pub(super) fn wanted<B>(request: &Request<B>) -> Self {
        let content_type = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
        if content_type.starts_with(b"application/grpc") { Form::Grpc } else { Form::Problem }
    }
}

/// The answer to an OPTIONS that was to go no further (RFC 9110 section 7.6.2).
pub(super) fn options_answer() -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::whole(Bytes::new()));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
    response
}

const ONE: HeaderValue = HeaderValue::from_static("1");

/// Written so that an agent that is a language model can hand it to its user.
fn for_the_user(error: &TokenError, connect_url: Option<&str>) -> String {
    let Some(url) = connect_url else { return error.to_string() };
    format!(
        "{error}, so the request was not sent. Ask the user to open {url} in a browser and to grant access there; then \
         send the same request again."
    )
}

/// Where users consent, and there is no page for it.
fn consent_hint(error: &TokenError) -> String {
    match error {
        TokenError::NotConnected { provider, subject } | TokenError::Reauthorize { provider, subject, .. } => {
            format!("the user grants access with `sidebearer connect {provider} --user {subject}`; then try again")
        }
        other => token_hint(other),
    }
}

fn token_hint(error: &TokenError) -> String {
    match error {
        TokenError::NotConnected { provider, subject } => format!(
            "store a grant with `sidebearer import {provider} --user {subject} --refresh-token-file FILE`, then try again"
        ),
        TokenError::Reauthorize { provider, subject, .. } => format!(
            "the user must grant access again; then `sidebearer import {provider} --user {subject} --refresh-token-file FILE`"
        ),
        TokenError::FixConfiguration { provider, .. } => {
            format!("the operator corrects `providers.{provider}` in `proxy.yaml`, or the file that its secret is in")
        }
        TokenError::Unavailable { .. } => "try again after `Retry-After`".into(),
    }
}

/// As grpc-message wants it: printable ASCII as it is, all else in percent escapes.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(byte as char),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}
