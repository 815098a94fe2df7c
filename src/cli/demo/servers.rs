//! The demo's other side: an authorization server and an API, over TLS on loopback; the page where users consent without
//! it, since no browser here trusts the certificate.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use super::consent::{self, Consents};

/// The name of the authorization server.
pub(in crate::cli) const AUTH: &str = "auth.test";
/// The name of the API.
pub(super) const API: &str = "api.test";
/// The one client that the authorization server knows.
pub(in crate::cli) const CLIENT_ID: &str = "demo-agent";
/// How long a token lives.
pub(super) const LIFETIME: Duration = Duration::from_secs(60);
/// A form is not longer.
const LONGEST_FORM: usize = 16 << 10;

/// Both servers, on one port.
#[derive(Clone)]
pub(in crate::cli) struct Servers {
    inner: Arc<Inner>,
}

struct Inner {
    address: SocketAddr,
    /// Where users consent, without TLS.
    page: SocketAddr,
    root_pem: String,
    client_secret: String,
    tokens: Mutex<HashMap<String, Issued>>,
    consents: Consents,
}

/// A token that was given out.
struct Issued {
    end: Instant,
    /// Whether it speaks for a user.
    of_user: bool,
}

impl Servers {
    /// Starts them, the API by this name, which may be a wildcard.
    pub(in crate::cli) async fn start(api: &str) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let (tls, root_pem) = tls(api).map_err(io::Error::other)?;
        let page = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let inner = Inner {
            address: listener.local_addr()?,
            page: page.local_addr()?,
            root_pem,
            client_secret: random()?,
            tokens: Mutex::default(),
            consents: Consents::default(),
        };
        let servers = Self { inner: Arc::new(inner) };
        let showing = servers.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = page.accept().await {
                let servers = showing.clone();
                let service = service_fn(move |request| {
                    let servers = servers.clone();
                    async move { Ok::<_, Infallible>(servers.page(request).await) }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        let accepting = servers.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(accepting.clone().serve(TlsAcceptor::from(tls.clone()), stream));
            }
        });
        Ok(servers)
    }

    /// Where both are.
    pub(in crate::cli) fn address(&self) -> SocketAddr {
        self.inner.address
    }

    /// The authorization server's name, by which users' browsers reach it too.
    pub(super) fn issuer(&self) -> String {
        format!("http://{}", self.inner.page)
    }

    /// The root that their certificate is signed by.
    pub(in crate::cli) fn root_pem(&self) -> &str {
        &self.inner.root_pem
    }

    /// The client's secret, made for this run.
    pub(in crate::cli) fn client_secret(&self) -> &str {
        &self.inner.client_secret
    }

    /// Ends every token before its time.
    pub(super) fn revoke_all(&self) {
        self.tokens().clear();
    }

    async fn serve(self, tls: TlsAcceptor, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let Ok(stream) = tls.accept(stream).await else { return };
        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let service = service_fn(move |request| {
            let servers = self.clone();
            async move { Ok::<_, Infallible>(servers.answer(request).await) }
        });
        let stream = TokioIo::new(stream);
        // A client that goes away ends its connection, and that is all.
        let _ = match h2 {
            true => http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await,
            false => http1::Builder::new().serve_connection(stream, service).await,
        };
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let host = request.uri().authority().map(|authority| authority.host().to_owned());
        let host = host.or_else(|| Some(request.headers().get(HOST)?.to_str().ok()?.to_owned())).unwrap_or_default();
        let answer = match (host.as_str(), request.uri().path()) {
            (AUTH, "/token") if *request.method() == Method::POST => return self.token(request).await,
            (AUTH, "/revoke") if *request.method() == Method::POST => return self.revoke(request).await,
            (AUTH, _) => answer(StatusCode::NOT_FOUND, &json!({ "error": "not_found" })),
            (_, path) => self.api(&request, path),
        };
        // hyper leaves that to the service on HTTP/2.
        if *request.method() == Method::HEAD { answer.map(|_| Full::default()) } else { answer }
    }

    /// The page where a user consents.
    async fn page(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let path = (request.method().clone(), request.uri().path().to_owned());
        match (path.0, path.1.as_str()) {
            (Method::GET, "/authorize") => consent::ask(request.uri().query().unwrap_or_default()),
            (Method::POST, "/authorize") => self.inner.consents.decide(&form(request).await, &self.issuer()),
            _ => answer(StatusCode::NOT_FOUND, &json!({ "error": "not_found" })),
        }
    }

    /// RFC 6749 sections 4.1.3, 4.4 and 6.
    async fn token(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if !self.is_client(&request) {
            return answer(StatusCode::UNAUTHORIZED, &json!({ "error": "invalid_client" }));
        }
        let form = form(request).await;
        let grant = form.get("grant_type").map(String::as_str).unwrap_or_default();
        let refresh_token = match grant {
            "client_credentials" => None,
            "authorization_code" | "refresh_token" => match self.inner.consents.redeem(&form) {
                Some(refresh_token) => Some(refresh_token),
                None => return answer(StatusCode::BAD_REQUEST, &json!({ "error": "invalid_grant" })),
            },
            _ => return answer(StatusCode::BAD_REQUEST, &json!({ "error": "unsupported_grant_type" })),
        };
        let Ok(token) = random() else {
            return answer(StatusCode::SERVICE_UNAVAILABLE, &json!({ "error": "temporarily_unavailable" }));
        };
        let of_user = refresh_token.is_some();
        self.tokens().insert(token.clone(), Issued { end: Instant::now() + LIFETIME, of_user });
        let mut body = json!({ "access_token": token, "token_type": "Bearer", "expires_in": LIFETIME.as_secs() });
        if let Some(refresh_token) = refresh_token {
            body["refresh_token"] = refresh_token.into();
        }
        answer(StatusCode::OK, &body)
    }

    /// RFC 7009.
    async fn revoke(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if !self.is_client(&request) {
            return answer(StatusCode::UNAUTHORIZED, &json!({ "error": "invalid_client" }));
        }
        if let Some(token) = form(request).await.get("token") {
            self.inner.consents.forget(token);
            self.tokens().retain(|known, issued| known != token && !issued.of_user);
        }
        answer(StatusCode::OK, &json!({}))
    }

    fn is_client(&self, request: &Request<Incoming>) -> bool {
        let expected = BASE64_STANDARD.encode(format!("{CLIENT_ID}:{}", self.client_secret()));
        let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        given.strip_prefix("Basic ") == Some(&expected)
    }

    /// RFC 6750 section 3.
    fn api(&self, request: &Request<Incoming>, path: &str) -> Response<Full<Bytes>> {
        let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = given.and_then(|value| value.strip_prefix("Bearer "));
        let of_user = token.and_then(|token| self.active(token));
        if of_user != Some(path == "/calendar") && !(of_user.is_some() && path == "/revoke") {
            let error = if given.is_some() { "invalid_token" } else { "missing_token" };
            let mut refused = answer(StatusCode::UNAUTHORIZED, &json!({ "error": error }));
            let challenge = match given {
                Some(_) => HeaderValue::from_static("Bearer realm=\"demo\", error=\"invalid_token\""),
                None => HeaderValue::from_static("Bearer realm=\"demo\""),
            };
            refused.headers_mut().insert(WWW_AUTHENTICATE, challenge);
            return refused;
        }
        match path {
            "/me" => answer(StatusCode::OK, &json!({ "hello": CLIENT_ID, "via": format!("{:?}", request.version()) })),
            "/calendar" => answer(StatusCode::OK, &json!({ "today": ["10:00 stand-up", "13:00 lunch with Ada"] })),
            "/revoke" if *request.method() == Method::POST => {
                self.revoke_all();
                answer(StatusCode::OK, &json!({ "revoked": "every token, this one too" }))
            }
            _ => answer(
                StatusCode::NOT_FOUND,
                &json!({ "error": "not_found", "try": ["GET /me", "GET /calendar", "POST /revoke"] }),
            ),
        }
    }

    /// Whether a token is good, and if so, whether it speaks for a user.
    fn active(&self, token: &str) -> Option<bool> {
        let now = Instant::now();
        self.tokens().get(token).filter(|issued| now < issued.end).map(|issued| issued.of_user)
    }

    fn tokens(&self) -> MutexGuard<'_, HashMap<String, Issued>> {
        self.inner.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A form's fields; none of one that is no form.
async fn form(request: Request<Incoming>) -> HashMap<String, String> {
    let body = Limited::new(request.into_body(), LONGEST_FORM).collect().await;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    url::form_urlencoded::parse(&body).into_owned().collect()
}

fn answer(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{body}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A certificate for both names, from a root that lives for this run.
fn tls(api: &str) -> Result<(Arc<ServerConfig>, String), Box<dyn std::error::Error + Send + Sync>> {
    let root_key = KeyPair::generate()?;
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let root_certificate = root.self_signed(&root_key)?;
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(vec![AUTH.to_owned(), api.to_owned()])?;
    leaf.use_authority_key_identifier_extension = true;
    let leaf = leaf.signed_by(&key, &Issuer::new(root, root_key))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((Arc::new(config), root_certificate.pem()))
}

pub(super) fn random() -> io::Result<String> {
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
