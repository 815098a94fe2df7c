//! What every page and every admin call is guarded by: whom it is for, who may ask, and what a browser is told to do.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use askama::Template;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, COOKIE, HOST, LOCATION, ORIGIN,
    REFERRER_POLICY, SET_COOKIE, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tower_service::Service;
use url::Url;

use crate::drain::Drain;
use crate::host::Authority;
use crate::listen::{self, Listener};
use crate::secret::Secret;

/// For what a page may load and do. A page that sends its form elsewhere says so itself.
pub const CONTENT_POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
                                  img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";
const COOKIE_NAME: &str = "sidebearer_browser";
/// Over TLS: a name that no neighbouring host can set (RFC 6265bis section 4.1.3.2).
const HOST_COOKIE_NAME: &str = "__Host-sidebearer_browser";
const LARGEST_BODY: usize = 64 << 10;
/// How long a form or a call's body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Who may ask.
#[derive(Clone)]
pub struct Guard {
    inner: Arc<Inner>,
}

struct Inner {
    base: Url,
    hosts: Vec<Authority>,
    token: Option<Secret>,
}

/// Whether whoever asks has shown the admin token, or needs none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Authorized(pub bool);

impl Guard {
    /// For a listener on `port` that browsers reach as `base`; `token` is what its callers have to know, if anything.
    pub fn new(base: Url, port: u16, token: Option<Secret>) -> Self {
        let own = ["127.0.0.1", "localhost", "[::1]"].map(|name| format!("{name}:{port}"));
        let mut hosts: Vec<Authority> = own.iter().filter_map(|name| Authority::parse(name, None).ok()).collect();
        hosts.extend(authority(&base));
        Self { inner: Arc::new(Inner { base, hosts, token }) }
    }

    /// Puts the guard before every path of a router, and the style of all pages behind it.
    pub fn before(&self, router: Router) -> Router {
        let style = get(|| async { ([(CONTENT_TYPE, "text/css; charset=utf-8")], include_str!("pages/style.css")) });
        router
            .route("/style.css", style)
            .fallback(|| async {
                refusal(StatusCode::NOT_FOUND, "There is no such page", "", "Go to the dashboard: /")
            })
            .layer(middleware::from_fn_with_state(self.clone(), Self::check))
    }

    async fn check(State(guard): State<Self>, mut request: Request, next: Next) -> Response {
        let path = request.uri().path();
        let for_a_program = path.starts_with("/v1/") || path == "/quit";
        let mut response = match guard.verdict(&request) {
            Verdict::Refused(response) => *response,
            Verdict::Passed => {
                let authorized = guard.authorized(request.headers());
                request.extensions_mut().insert(authorized);
                match whole(request).await {
                    Ok(request) => next.run(request).await,
                    Err(refused) => *refused,
                }
            }
        };
        if for_a_program && let Some(No { detail, todo }) = response.extensions_mut().remove() {
            let told = problem(response.status(), no_code(response.status()), &detail, &todo);
            let asks = response.headers_mut().remove(WWW_AUTHENTICATE);
            response = told;
            response.headers_mut().extend(asks.map(|asks| (WWW_AUTHENTICATE, asks)));
        }
        secure(response.headers_mut());
        response
    }

    fn verdict(&self, request: &Request) -> Verdict {
        let headers = request.headers();
        let host = one(headers, HOST.as_str()).and_then(|host| Authority::parse(host, Some(self.default_port())).ok());
        let Some(host) = host.filter(|host| self.inner.hosts.contains(host)) else {
            return Verdict::refused("This name does not lead here", "A page of another site may be behind it.");
        };
        if !self.is_own_origin(headers) || !self.is_own_fetch(request) {
            return Verdict::refused("Another site asked for this", "Only pages from here may.");
        }
        let canonical = authority(&self.inner.base);
        let is_page = request.method() == Method::GET && !request.uri().path().starts_with("/v1/");
        if is_page && canonical.as_ref() != Some(&host) && request.uri().path() != "/events" {
            // The browser's cookie is for one name only, and the provider sends it back to this one.
            let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
            let to = format!("{}{path}", self.inner.base.as_str().trim_end_matches('/'));
            return match HeaderValue::try_from(to) {
                Ok(to) => {
                    Verdict::Refused(Box::new((StatusCode::TEMPORARY_REDIRECT, [(LOCATION, to)]).into_response()))
                }
                Err(_) => Verdict::refused("The address is none", ""),
            };
        }
        Verdict::Passed
    }

    /// A browser names the page's origin in everything but plain navigation.
    fn is_own_origin(&self, headers: &HeaderMap) -> bool {
        if !headers.contains_key(ORIGIN) {
            return true;
        }
        let origin = one(headers, ORIGIN.as_str());
        if origin == Some("null") {
            // So says a browser of a page that was told to send no referrer, as ours are; no page can say the other.
            return one(headers, "sec-fetch-site") == Some("same-origin");
        }
        let origin = origin.and_then(|origin| Url::parse(origin).ok());
        origin.is_some_and(|origin| {
            let scheme = origin.scheme() == self.inner.base.scheme() || origin.scheme() == "http";
            scheme && authority(&origin).is_some_and(|authority| self.inner.hosts.contains(&authority))
        })
    }

    /// What other sites may do: lead a user here, and bring one back from a consent.
    fn is_own_fetch(&self, request: &Request) -> bool {
        let headers = request.headers();
        let navigates = request.method() == Method::GET && one(headers, "sec-fetch-mode") == Some("navigate");
        match one(headers, "sec-fetch-site") {
            Some("cross-site" | "same-site") => navigates && one(headers, "sec-fetch-dest") == Some("document"),
            _ => true,
        }
    }

    fn authorized(&self, headers: &HeaderMap) -> Authorized {
        let Some(token) = &self.inner.token else { return Authorized(true) };
        // At once, also when it is wrong: see the door of the proxy.
        Authorized(given_token(headers).is_some_and(|given| given == *token))
    }

    fn default_port(&self) -> u16 {
        if self.inner.base.scheme() == "https" { 443 } else { 80 }
    }
}

enum Verdict {
    Passed,
    Refused(Box<Response>),
}

impl Verdict {
    fn refused(heading: &str, said: &str) -> Self {
        Self::Refused(Box::new(refusal(StatusCode::FORBIDDEN, heading, said, "")))
    }
}

/// The other end of a connection, where it has an address.
#[derive(Debug, Clone, Copy)]
struct Peer(Option<SocketAddr>);

/// Whether a request came from this machine, by the address at the other end of its connection.
pub fn is_from_here(request: &Request) -> bool {
    let peer = request.extensions().get::<Peer>().and_then(|Peer(peer)| *peer);
    peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback())
}

/// Whether a page sent a request: browsers say so of everything that changes something, the guard's own pages too.
pub fn is_of_a_browser(headers: &HeaderMap) -> bool {
    headers.contains_key(ORIGIN) || headers.keys().any(|name| name.as_str().starts_with("sec-fetch-"))
}

/// Refuses whoever has not shown the admin token.
pub async fn authorized_only(request: Request, next: Next) -> Response {
    if request.extensions().get() == Some(&Authorized(true)) {
        return next.run(request).await;
    }
    unauthorized()
}

/// A request whose body, a small one on every page, has come.
async fn whole(request: Request) -> Result<Request, Box<Response>> {
    let (head, body) = request.into_parts();
    let refused = |status, title, todo| Err(Box::new(refusal(status, title, "", todo)));
    match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, LARGEST_BODY)).await {
        Ok(Ok(body)) => Ok(Request::from_parts(head, Body::from(body))),
        Ok(Err(_)) => refused(StatusCode::PAYLOAD_TOO_LARGE, "That is too much", "Send at most 64 KiB."),
        Err(_) => refused(StatusCode::REQUEST_TIMEOUT, "That took too long", "Send it again."),
    }
}

/// 401, with what a browser needs to ask its user for the token.
pub fn unauthorized() -> Response {
    let said = "The admin token is needed here.";
    let todo = "Give it as the password, with any user name; a program sends it as a bearer token.";
    let mut response = refusal(StatusCode::UNAUTHORIZED, "Who are you?", said, todo);
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"sidebearer\""));
    response
}

/// The token, as a browser or a program gives it.
fn given_token(headers: &HeaderMap) -> Option<Secret> {
    let (scheme, value) = one(headers, AUTHORIZATION.as_str())?.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(Secret::new(value.trim()));
    }
    let decoded = BASE64_STANDARD.decode(value.trim()).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    let (_, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    Some(Secret::new(password))
}

/// A browser, as it is known by its cookie. Nothing about its user is in it.
#[derive(Debug, Clone)]
pub struct Browser {
    id: Secret,
    is_new: bool,
}

impl Browser {
    /// The browser that sent a request; one that comes for the first time gets a name.
    ///
    /// # Errors
    /// Where the machine has no randomness.
    pub fn of(headers: &HeaderMap, base: &Url) -> Result<Self, getrandom::Error> {
        match Self::known(headers, base) {
            Some(browser) => Ok(browser),
            None => Ok(Self { id: Secret::random()?, is_new: true }),
        }
    }

    /// The browser that sent a request, if it has been here before.
    pub fn known(headers: &HeaderMap, base: &Url) -> Option<Self> {
        let cookies = headers.get_all(COOKIE).iter().filter_map(|cookies| cookies.to_str().ok());
        let mut own = cookies.flat_map(|cookies| cookies.split(';')).filter_map(|cookie| {
            let (name, value) = cookie.trim().split_once('=')?;
            (name == cookie_name(base) && value.len() == 43).then_some(value)
        });
        own.next().map(|id| Self { id: Secret::new(id), is_new: false })
    }

    /// What is kept of it in a flow. Whoever reads it cannot be the browser.
    pub fn binding(&self) -> String {
        self.hash("flow")
    }

    /// What a form of ours carries, and a form of another site cannot.
    pub fn csrf(&self) -> String {
        self.hash("csrf")
    }

    /// Whether a form came from a page that this browser got from us.
    pub fn sent(&self, csrf: &str) -> bool {
        Secret::new(self.csrf()) == Secret::new(csrf)
    }

    fn hash(&self, purpose: &str) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(format!("{purpose}:{}", self.id.expose())))
    }

    /// Has the browser remember its name: for this site only, out of reach of scripts, and for links that lead here.
    pub fn remember(&self, response: &mut Response, base: &Url) {
        if !self.is_new {
            return;
        }
        let secure = if base.scheme() == "https" { "; Secure" } else { "" };
        let cookie = format!("{}={}; Path=/; HttpOnly; SameSite=Lax{secure}", cookie_name(base), self.id.expose());
        if let Ok(mut cookie) = HeaderValue::try_from(cookie) {
            cookie.set_sensitive(true);
            response.headers_mut().append(SET_COOKIE, cookie);
        }
    }
}

fn cookie_name(base: &Url) -> &'static str {
    if base.scheme() == "https" { HOST_COOKIE_NAME } else { COOKIE_NAME }
}

/// A page that says no.
#[derive(Template)]
#[template(path = "refusal.html", config = "src/pages/askama.toml")]
struct Refusal<'a> {
    status: u16,
    heading: &'a str,
    said: &'a str,
    todo: &'a str,
}

/// What a page that says no says, for a program that can read no page.
#[derive(Clone)]
struct No {
    detail: String,
    todo: String,
}

/// A page that says no, why, and what to do. At a path of the admin API, the guard makes a problem of it.
pub fn refusal(status: StatusCode, heading: &str, said: &str, todo: &str) -> Response {
    let mut response = page(status, &Refusal { status: status.as_u16(), heading, said, todo });
    let detail = if said.is_empty() { heading } else { said };
    response.extensions_mut().insert(No { detail: detail.to_owned(), todo: todo.to_owned() });
    response
}

fn no_code(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "admin_token_required",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::PAYLOAD_TOO_LARGE => "too_large",
        StatusCode::REQUEST_TIMEOUT => "took_too_long",
        _ => "forbidden",
    }
}

/// A page.
pub fn page(status: StatusCode, template: &impl Template) -> Response {
    match template.render() {
        Ok(html) => (status, Html(html)).into_response(),
        Err(error) => {
            tracing::error!(%error, "a page cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// An answer of the admin API that says no (RFC 9457).
pub fn problem(status: StatusCode, code: &str, detail: &str, hint: &str) -> Response {
    let body = json!({
        "type": format!("urn:sidebearer:{code}"),
        "title": status.canonical_reason(),
        "status": status.as_u16(),
        "code": code,
        "detail": detail,
        "hint": Some(hint).filter(|hint| !hint.is_empty()),
    });
    (status, [(CONTENT_TYPE, "application/problem+json")], format!("{body:#}\n")).into_response()
}

/// An answer of the admin API.
pub fn json_response(status: StatusCode, body: &Value) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], format!("{body:#}\n")).into_response()
}

/// A time as the admin API has it: RFC 3339, in whole seconds.
pub fn written(time: SystemTime) -> Option<String> {
    OffsetDateTime::from(time).replace_nanosecond(0).ok()?.format(&Rfc3339).ok()
}

/// What a browser is told with every answer (OAU-018).
pub fn secure(headers: &mut HeaderMap) {
    headers.entry(CONTENT_SECURITY_POLICY).or_insert(HeaderValue::from_static(CONTENT_POLICY));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
}

/// The one value of a field; none when it comes twice, and two readers would see two.
fn one<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut all = headers.get_all(name).iter();
    let first = all.next()?.to_str().ok()?;
    all.next().is_none().then_some(first)
}

fn authority(url: &Url) -> Option<Authority> {
    Some(Authority::new(url.host_str()?.parse().ok()?, url.port_or_known_default()?))
}

/// Pages that can be replaced while they are served. A clone is the same ones.
#[derive(Clone)]
pub struct Site {
    current: Arc<ArcSwap<Router>>,
}

impl Site {
    /// These pages.
    pub fn new(router: Router) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(router)) }
    }

    /// From now on requests find these, on connections that are open as well.
    pub fn replace(&self, router: Router) {
        self.current.store(Arc::new(router));
    }

    /// To be served.
    pub fn router(&self) -> Router {
        let current = self.current.clone();
        Router::new().fallback(move |request: Request| {
            let mut router = Router::clone(&current.load());
            async move { router.call(request).await }
        })
    }
}

/// Takes connections until the stop begins, and lets what is under way on them finish.
pub async fn serve(mut listener: Listener, router: Router, drain: Drain, head_timeout: Duration) {
    let mut stop = pin!(drain.started());
    loop {
        let stream = tokio::select! {
            () = &mut stop => return,
            accepted = listener.accept() => accepted,
        };
        let peer = Peer(listen::peer(&stream));
        let (router, started) = (router.clone().layer(Extension(peer)), drain.started());
        drain.spawn_until_forced(async move {
            let service = TowerToHyperService::new(router.into_service::<hyper::body::Incoming>());
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(head_timeout)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = started => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a browser's connection ended");
            }
        });
    }
}

/// A body that is sent piece by piece as it comes.
pub fn streamed(pieces: impl futures_util::Stream<Item = String> + Send + 'static) -> Body {
    use futures_util::StreamExt as _;
    Body::from_stream(pieces.map(Ok::<_, Infallible>))
}

#[cfg(test)]
mod tests {
    use axum::routing::post;

    use super::*;

    fn router(token: Option<&str>) -> Router {
        let guard = Guard::new("http://127.0.0.1:3129/".parse().unwrap(), 3129, token.map(Secret::new));
        let only = Router::new().route("/", get(|| async { "page" })).route("/change", post(|| async { "changed" }));
        guard.before(only.layer(middleware::from_fn(authorized_only)).route("/open", get(|| async { "open" })))
    }

    async fn ask(router: &Router, method: &str, path: &str, fields: &[(&'static str, &str)]) -> Response {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        router.clone().call(request.body(Body::empty()).unwrap()).await.unwrap()
    }

    const HERE: (&str, &str) = ("host", "127.0.0.1:3129");

    #[tokio::test]
    async fn only_its_own_names_lead_to_it() {
        // LST-004
        let router = router(None);
        for path in ["/", "/open", "/style.css", "/nothing", "/change"] {
            for host in ["evil.test", "evil.test:3129", "127.0.0.1", "127.0.0.1:80", "127.0.0.1:3129.evil.test", ""] {
                let answer = ask(&router, "GET", path, &[("host", host)]).await;
                assert_eq!(answer.status(), 403, "{path} {host}");
            }
            assert_eq!(ask(&router, "GET", path, &[]).await.status(), 403, "{path}");
            assert_eq!(ask(&router, "GET", path, &[HERE, HERE]).await.status(), 403, "{path}");
        }
        assert_eq!(ask(&router, "GET", "/", &[HERE]).await.status(), 200);
    }

    #[tokio::test]
    async fn another_of_its_names_leads_a_page_to_the_one_that_its_cookie_is_for() {
        let answer = ask(&router(None), "GET", "/open?a=1", &[("host", "localhost:3129")]).await;
        assert_eq!(
            (answer.status().as_u16(), answer.headers()[LOCATION].to_str().unwrap()),
            (307, "http://127.0.0.1:3129/open?a=1")
        );
        let change = ask(&router(None), "POST", "/change", &[("host", "[::1]:3129")]).await;
        assert_eq!(change.status(), 200);
    }

    #[tokio::test]
    async fn another_site_can_lead_a_user_here_and_nothing_else() {
        // LST-005, LST-021
        let router = router(None);
        for origin in
            ["https://evil.test", "null", "http://127.0.0.1:3130", "http://evil.test:3129", "https://127.0.0.1"]
        {
            for (method, path) in [("GET", "/"), ("POST", "/change"), ("GET", "/style.css"), ("OPTIONS", "/change")] {
                let answer = ask(&router, method, path, &[HERE, ("origin", origin)]).await;
                assert_eq!(answer.status(), 403, "{method} {path} {origin}");
                assert!(answer.headers().keys().all(|name| !name.as_str().starts_with("access-control")));
            }
        }
        let from_elsewhere =
            |mode, dest| [HERE, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", mode), ("sec-fetch-dest", dest)];
        assert_eq!(ask(&router, "GET", "/", &from_elsewhere("navigate", "document")).await.status(), 200);
        assert_eq!(ask(&router, "GET", "/", &from_elsewhere("navigate", "iframe")).await.status(), 403);
        assert_eq!(ask(&router, "GET", "/", &from_elsewhere("no-cors", "image")).await.status(), 403);
        assert_eq!(ask(&router, "POST", "/change", &from_elsewhere("navigate", "document")).await.status(), 403);
        let own = [HERE, ("origin", "http://127.0.0.1:3129"), ("sec-fetch-site", "same-origin")];
        assert_eq!(ask(&router, "POST", "/change", &own).await.status(), 200);
        let unnamed = [HERE, ("origin", "null"), ("sec-fetch-site", "same-origin")];
        assert_eq!(ask(&router, "POST", "/change", &unnamed).await.status(), 200);
        let elsewhere = [HERE, ("origin", "null"), ("sec-fetch-site", "cross-site")];
        assert_eq!(ask(&router, "POST", "/change", &elsewhere).await.status(), 403);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_end_or_is_too_long_is_not_waited_for() {
        // LST-016
        let post = async |body: Body| {
            let request = Request::post("/change").header("host", HERE.1).body(body).unwrap();
            router(None).call(request).await.unwrap().status().as_u16()
        };
        assert_eq!(post(Body::from_stream(futures_util::stream::pending::<Result<&str, Infallible>>())).await, 408);
        assert_eq!(post(Body::from(vec![b'x'; LARGEST_BODY + 1])).await, 413);
        assert_eq!(post(Body::from(vec![b'x'; LARGEST_BODY])).await, 200);
    }

    #[tokio::test]
    async fn a_token_is_asked_for_where_there_is_one() {
        // LST-021
        let router = router(Some("the-admin-token-of-tests"));
        let status = async |value: &str| {
            let fields = [HERE, ("authorization", value)];
            let fields = if value.is_empty() { &fields[..1] } else { &fields[..] };
            ask(&router, "GET", "/", fields).await.status().as_u16()
        };
        let basic = |pair: &str| format!("Basic {}", BASE64_STANDARD.encode(pair));
        assert_eq!(status("").await, 401);
        assert_eq!(status("Bearer the-admin-token-of-tests").await, 200);
        assert_eq!(status(&basic("anyone:the-admin-token-of-tests")).await, 200);
        for wrong in
            ["Bearer the-admin-token-of-test", "Bearer ", "Digest x", &basic("the-admin-token-of-tests:"), "Basic %"]
        {
            assert_eq!(status(wrong).await, 401, "{wrong}");
        }
        assert_eq!(ask(&router, "GET", "/open", &[HERE]).await.status(), 200);
        assert_eq!(ask(&router, "POST", "/change", &[HERE]).await.status(), 401);
    }

    #[tokio::test]
    async fn a_program_is_told_no_in_its_own_words() {
        // LST-021
        let guard = Guard::new("http://127.0.0.1:3129/".parse().unwrap(), 3129, Some(Secret::new("the-admin-token")));
        let only = Router::new().route("/v1/only", get(|| async { "only" }));
        let router = guard.before(only.layer(middleware::from_fn(authorized_only)));
        for (path, host, status, code) in [
            ("/v1/only", "127.0.0.1:3129", 401, "admin_token_required"),
            ("/v1/nothing", "127.0.0.1:3129", 404, "not_found"),
            ("/v1/only", "evil.test", 403, "forbidden"),
        ] {
            let answer = ask(&router, "GET", path, &[("host", host)]).await;
            assert_eq!(
                (answer.status().as_u16(), answer.headers()[CONTENT_TYPE].to_str().unwrap()),
                (status, "application/problem+json")
            );
            assert_eq!(answer.headers().contains_key(WWW_AUTHENTICATE), status == 401);
            assert_eq!(answer.headers()[CACHE_CONTROL], "no-store");
            let body = axum::body::to_bytes(answer.into_body(), 4096).await.unwrap();
            assert_eq!(serde_json::from_slice::<Value>(&body).unwrap()["code"], code);
        }
        let page = ask(&router, "GET", "/nothing", &[HERE]).await;
        assert_eq!(page.headers()[CONTENT_TYPE], "text/html; charset=utf-8");
    }

    #[tokio::test]
    async fn every_answer_tells_the_browser_what_not_to_do() {
        // OAU-018
        let router = router(None);
        for path in ["/", "/nothing", "/style.css"] {
            for host in ["127.0.0.1:3129", "evil.test"] {
                let answer = ask(&router, "GET", path, &[("host", host)]).await;
                let field = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
                assert!(field("content-security-policy").contains("frame-ancestors 'none'"));
                assert_eq!(
                    (field("cache-control"), field("referrer-policy")),
                    ("no-store".into(), "no-referrer".into())
                );
                assert_eq!(
                    (field("x-content-type-options"), field("x-frame-options")),
                    ("nosniff".into(), "DENY".into())
                );
            }
        }
    }

    #[test]
    fn a_browser_is_known_by_its_cookie_and_by_nothing_that_others_see() {
        // OAU-002
        let mut headers = HeaderMap::new();
        let base: Url = "http://127.0.0.1:3129/".parse().unwrap();
        let browser = Browser::of(&headers, &base).unwrap();
        let mut response = Response::default();
        browser.remember(&mut response, &base);
        let cookie = response.headers()[SET_COOKIE].to_str().unwrap().to_owned();
        assert!(cookie.ends_with("; Path=/; HttpOnly; SameSite=Lax"), "{cookie}");
        let pair = cookie.split(';').next().unwrap();
        headers.insert(COOKIE, HeaderValue::try_from(format!("a=b; {pair}")).unwrap());
        let again = Browser::of(&headers, &base).unwrap();
        assert_eq!((again.binding(), again.csrf()), (browser.binding(), browser.csrf()));
        assert!(again.sent(&browser.csrf()) && !again.sent(&browser.binding()) && !again.sent(""));
        assert!(!cookie.contains(&browser.csrf()) && !cookie.contains(&browser.binding()));
        assert_ne!(Browser::of(&HeaderMap::new(), &base).unwrap().csrf(), browser.csrf());
        // Over TLS, a cookie that a neighbouring host may have set is nobody's.
        let public: Url = "https://connect.test/".parse().unwrap();
        assert!(Browser::known(&headers, &public).is_none());
        let mut response = Response::default();
        Browser::of(&headers, &public).unwrap().remember(&mut response, &public);
        let cookie = response.headers()[SET_COOKIE].to_str().unwrap();
        assert!(
            cookie.starts_with("__Host-") && cookie.ends_with("; Path=/; HttpOnly; SameSite=Lax; Secure"),
            "{cookie}"
        );
        assert!(!format!("{browser:?}").contains(&pair[COOKIE_NAME.len() + 1..]));
    }
}
