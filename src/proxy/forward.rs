//! One request to its upstream: with a token, and once more with a new one when the answer is 401.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::Either;
use http::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HeaderMap, SEC_WEBSOCKET_ACCEPT, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode, Version, request};
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::body::{Replay, ResponseBody};
use super::caller::Caller;
use super::half::UnderWay;
use super::redact::{self, Redactor};
use super::reject::Reject;
use super::stalls::Reading;
use super::{Proxy, Record, admit, headers, is_first, missing, traced, websocket};
use crate::audit::{Audit, Facts, Unavailable};
use crate::names::Subject;
use crate::oauth::Grant;
use crate::oauth::challenge::{self, Verdict};
use crate::routes::{Action, Retry, Route, Unmatched};
use crate::tokens::{Bearer, Key, NoRenewal, TokenError};
use crate::upstream::{Origin, Pooled, RequestBody, Switched, Unwanted, UpstreamError};

/// Tries on other connections when one failed and no harm can come of it; apart from the one that a 401 brings.
const RESENDS: u32 = 2;

/// Makes a request ready to be sent on, with what its route says.
pub(super) fn forward<'a>(
    proxy: &'a Proxy,
    request: Request<Incoming>,
    origin: &Origin,
    (caller, entrance): (Caller, usize),
    record: &mut Record,
) -> Result<Forward<'a>, Reject> {
    let route = proxy.parts().routes.find(&origin.authority, request.method(), request.uri().path())?;
    record.route = route.map(|route| route.name.clone());
    let http = route.map(|route| route.upstream_http).unwrap_or_default();
    let origin = Origin { http, ..origin.clone() };
    let Some(route) = route else {
        if proxy.parts().unmatched == Unmatched::Deny {
            return Err(Reject::Unmatched);
        }
        return Ok(Forward::AsItIs(Outgoing::new(proxy, request, origin)));
    };
    let provider = match &route.action {
        Action::Deny => return Err(Reject::Denied(route.name.clone())),
        Action::Authenticate(provider) => provider,
    };
    record.provider = Some(provider.clone());
    caller.may_use(provider)?;
    admit::one_token(request.uri().query())?;
    let Some(key) = proxy.parts().tokens.key(provider, &caller.user) else {
        return Err(Reject::Denied(route.name.clone()));
    };
    let mut outgoing = Outgoing::new(proxy, request, origin);
    headers::remove_placeholders(&mut outgoing.head.headers);
    let redactor = route.redact_reflections.then(Redactor::default);
    if redactor.is_some() {
        redact::ask_for_plain(&mut outgoing.head.headers);
    }
    let waits = proxy.parts().tokens.provider(&key).is_some_and(|provider| !provider.on_missing.wait.is_zero());
    let came = waits.then(|| Box::new((caller, entrance)));
    let uses = Uses::default();
    Ok(Forward::Authenticated(Authenticated { proxy, route, key, outgoing, redactor, uses, came }))
}

/// A request that is ready to be sent on.
pub(super) enum Forward<'a> {
    /// With nothing added.
    AsItIs(Outgoing<'a>),
    /// With a token.
    Authenticated(Authenticated<'a>),
}

impl Forward<'_> {
    /// Sends it.
    pub(super) async fn answer(&mut self, record: &mut Record) -> Result<Response<ResponseBody>, Reject> {
        match self {
            // Boxed, since few do: their future is not part of every other's.
            Forward::AsItIs(outgoing) => Box::pin(outgoing.traced(None, record)).await?.into_response(outgoing.proxy),
            Forward::Authenticated(authenticated) => {
                let answer = authenticated.exchange(record).await;
                record.upstream = authenticated.outgoing.waited;
                authenticated.redacted(answer?).into_response(authenticated.proxy)
            }
        }
    }
}

/// A request that carries a token.
pub(super) struct Authenticated<'a> {
    proxy: &'a Proxy,
    route: &'a Arc<Route>,
    key: Key,
    outgoing: Outgoing<'a>,
    /// Knows every token that was sent, where the route has them taken out of the answer.
    redactor: Option<Redactor>,
    uses: Uses,
    /// Who sent it and at which listener, where it may wait for a user: they may be turned away meanwhile.
    came: Option<Box<(Caller, usize)>>,
}

/// How often a token was sent, for the audit trail.
#[derive(Default)]
struct Uses {
    /// The request's number there.
    request: u64,
    made: u8,
}

impl Authenticated<'_> {
    async fn exchange(&mut self, record: &mut Record) -> Result<Answer, Reject> {
        let mut bearer = self.timed_bearer(record).await?;
        let sent = match self.send(&bearer, record).await {
            Err(Reject::Upstream(UpstreamError::Late)) => {
                // The token ended while the connection was made, or while this process stood still.
                bearer = self.timed_bearer(record).await?;
                Box::pin(self.send(&bearer, record)).await
            }
            sent => sent,
        };
        let first = sent?;
        if self.rejected(&first) {
            Box::pin(self.again(first, bearer, record)).await
        } else {
            Ok(self.taken(first, bearer))
        }
    }

    /// What the agent gets when its first answer rejects the token.
    async fn again(&mut self, mut first: Answer, bearer: Bearer, record: &mut Record) -> Result<Answer, Reject> {
        let asked = Instant::now();
        let renewed = self.another(&bearer, &mut first).await;
        record.waited(asked, "rejected", renewed.as_ref().err().copied());
        match renewed {
            Ok(renewed) => {
                record.retried = true;
                first.give_up();
                self.second(renewed, record).await
            }
            Err(why) => {
                record.passed = Some(why);
                if why == "reauthorize" || why == "not_connected" {
                    first.step_up = self.connect_link(&[]);
                }
                Ok(first)
            }
        }
    }

    async fn timed_bearer(&self, record: &mut Record) -> Result<Bearer, Reject> {
        let mut bearer = pin!(self.bearer());
        if let Some(at_hand) = bearer.as_mut().now_or_never() {
            return at_hand;
        }
        let asked = Instant::now();
        let bearer = bearer.await;
        record.waited(asked, "needed", bearer.as_ref().err().map(Reject::code));
        bearer
    }

    /// A token; where only the user can bring one, what they have to do, after as long as the provider lets them take.
    async fn bearer(&self) -> Result<Bearer, Reject> {
        let tokens = &self.proxy.parts().tokens;
        let error = match tokens.bearer(&self.key).await {
            Err(error) if error.is_for_the_user() => error,
            other => return other.map_err(Reject::Token),
        };
        let connect_url = missing::tell(self.proxy, &self.key);
        let provider = tokens.provider(&self.key);
        let by_consent = provider.is_some_and(|provider| provider.grant == Grant::AuthorizationCode);
        let wait = provider.map_or(Duration::ZERO, |provider| provider.on_missing.wait);
        if connect_url.is_none() || wait.is_zero() {
            return Err(Reject::Missing { error, connect_url, by_consent });
        }
        match Box::pin(self.parked(wait)).await? {
            Err(error) if error.is_for_the_user() => Err(Reject::Missing { error, connect_url, by_consent }),
            waited => {
                self.proxy.lasting.missing.settled(&self.key);
                waited.map_err(Reject::Token)
            }
        }
    }

    /// Waits for the user, for as long as the configuration would still have it sent as it is.
    async fn parked(&self, wait: Duration) -> Result<Result<Bearer, TokenError>, Reject> {
        let mut token = pin!(self.proxy.parts().tokens.bearer_within(&self.key, wait));
        loop {
            let mut replaced = pin!(self.proxy.lasting.replaced.notified());
            // Before looking: what comes in between is not missed.
            replaced.as_mut().enable();
            self.judge_again()?;
            tokio::select! {
                () = replaced => {}
                token = &mut token => return self.judge_again().map(|()| token),
            }
        }
    }

    /// Whether the configuration of this moment has it sent with the token that it waits for.
    fn judge_again(&self) -> Result<(), Reject> {
        let now = self.proxy.front().current();
        let Some((caller, entrance)) = self.came.as_deref().filter(|_| now.inner.number != self.proxy.inner.number)
        else {
            return Ok(());
        };
        let caller = now.inner.door.admit_again(now.entrance(*entrance), caller)?;
        let Outgoing { origin, head, .. } = &self.outgoing;
        now.in_the_clear(origin)?;
        let route = now.parts().routes.find(&origin.authority, &head.method, head.uri.path())?;
        let Some(Action::Authenticate(provider)) = route.map(|route| &route.action) else {
            return Err(Reject::Reconfigured);
        };
        caller.may_use(provider)?;
        let same = now.parts().tokens.key(provider, &caller.user).is_some_and(|key| key == self.key);
        if same { Ok(()) } else { Err(Reject::Reconfigured) }
    }

    async fn send(&mut self, bearer: &Bearer, record: &mut Record) -> Result<Answer, Reject> {
        if let Some(redactor) = &mut self.redactor {
            redactor.add(bearer.token());
        }
        // Boxed, since few do: their futures are not part of every other's.
        match &self.proxy.parts().audit {
            Some(audit) => Box::pin(self.audited(audit, bearer, record)).await,
            None if record.trace.is_some() => Box::pin(self.outgoing.traced(Some(bearer), record)).await,
            None => self.outgoing.send(Some(bearer)).await,
        }
    }

    /// Sends it, and has the trail say so: before, where it must, and in any case when this ends.
    async fn audited(&mut self, audit: &Audit, bearer: &Bearer, record: &mut Record) -> Result<Answer, Reject> {
        let mut used = audit.begin(self.facts(audit, bearer, record)).await.map_err(|Unavailable| Reject::Unaudited)?;
        let sent = self.outgoing.traced(Some(bearer), record).await;
        let Came { reached, status } = self.outgoing.came;
        self.uses.made += u8::from(reached);
        match (&sent, status) {
            (Ok(_), Some(status)) => used.answered(status),
            (Ok(_), None) => {}
            (Err(reject), status) => used.failed(reject.code(), status, reached),
        }
        sent
    }

    fn facts(&mut self, audit: &Audit, bearer: &Bearer, record: &Record) -> Facts {
        if self.uses.request == 0 {
            self.uses.request = audit.request();
        }
        Facts {
            at: self.proxy.parts().clock.now().wall,
            request: self.uses.request,
            attempt: self.uses.made + 1,
            agent: record.agent.clone(),
            user: record.user.clone().unwrap_or_default(),
            provider: self.key.provider.clone(),
            subject: self.key.subject.clone(),
            generation: bearer.generation,
            route: self.route.name.clone(),
            method: self.outgoing.head.method.clone(),
            host: self.outgoing.origin.authority.clone(),
            path: self.outgoing.head.uri.path().to_owned(),
        }
    }

    /// Takes the tokens out of the answer, where the route says so.
    fn redacted(&mut self, answer: Answer) -> Answer {
        let Some(redactor) = self.redactor.take() else { return answer };
        let authority = &self.outgoing.origin.authority;
        // It passes: the request was carried out, and an agent that is refused the answer would make it again.
        if redact::is_coded_text(&answer.response) && is_first(&self.proxy.lasting.coded, authority) {
            tracing::warn!(%authority, "a compressed answer was not searched for the token");
        }
        Answer { response: redactor.redact(answer.response), ..answer }
    }

    /// The second answer is the agent's, whatever it is.
    async fn second(&mut self, bearer: Bearer, record: &mut Record) -> Result<Answer, Reject> {
        let answer = self.send(&bearer, record).await?;
        record.recovered = !self.rejected(&answer);
        Ok(if record.recovered { self.taken(answer, bearer) } else { answer })
    }

    /// An answer whose head takes the token; a gRPC answer may still reject it at its end, too late for another try.
    fn taken(&self, mut answer: Answer, bearer: Bearer) -> Answer {
        let (tokens, key) = (self.proxy.parts().tokens.clone(), self.key.clone());
        tokens.accepted(&key, &bearer);
        answer.step_up = self.step_up(answer.response.headers());
        if is_grpc(answer.response.headers()) {
            answer.response.body_mut().watch(move |trailers| {
                if unauthenticated(trailers) {
                    tokens.renew_for_the_next(&key, &bearer);
                }
            });
        }
        answer
    }

    /// The link where a user grants what the API says is missing.
    fn step_up(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        if challenge::verdict(headers) != Some(Verdict::InsufficientScope) {
            return None;
        }
        let mut scopes = challenge::scopes(headers);
        scopes.retain(|scope| !self.key.target.scopes.contains(scope));
        self.connect_link(&scopes)
    }

    /// The link where a user connects again, for these scopes besides the configured ones.
    fn connect_link(&self, scopes: &[String]) -> Option<HeaderValue> {
        let parts = self.proxy.parts();
        let provider =
            parts.tokens.provider(&self.key).filter(|provider| provider.grant == Grant::AuthorizationCode)?;
        let Subject::User(user) = &self.key.subject else { return None };
        let url = parts.links.as_ref()?.for_user(&provider.name, user, scopes, parts.clock.now().wall)?;
        HeaderValue::try_from(url.as_str()).ok()
    }

    /// Another token for a second try, or why there is to be none.
    async fn another(&self, rejected: &Bearer, held: &mut Answer) -> Result<Bearer, &'static str> {
        let tokens = &self.proxy.parts().tokens;
        if self.route.retry == Retry::Never {
            tokens.renew_for_the_next(&self.key, rejected);
            return Err("retry_never");
        }
        if let Some(why) = self.outgoing.body.dropped() {
            tokens.renew_for_the_next(&self.key, rejected);
            return Err(why);
        }
        let renewal = tokens.renew(&self.key, rejected);
        tokio::pin!(renewal);
        let early = tokio::select! {
            biased;
            renewed = &mut renewal => Some(renewed),
            () = held.read_ahead() => None,
        };
        let renewed = match early {
            Some(renewed) => renewed,
            None => renewal.await,
        };
        let renewed = renewed.map_err(|why: NoRenewal| why.code())?;
        // More of a body that is still arriving may have been read meanwhile; from here on it is not.
        self.outgoing.body.promise()?;
        Ok(renewed)
    }

    /// Whether an answer says that its token is no longer good (SEMANTICS C1, C2).
    fn rejected(&self, answer: &Answer) -> bool {
        let (status, headers) = (answer.response.status(), answer.response.headers());
        let verdict = || challenge::verdict(headers);
        let other_reason = || matches!(verdict(), Some(Verdict::InsufficientScope | Verdict::UseDpopNonce));
        match status {
            StatusCode::UNAUTHORIZED => !other_reason(),
            StatusCode::FORBIDDEN if verdict() == Some(Verdict::InvalidToken) => true,
            // A gRPC answer without a body says it in its head.
            StatusCode::OK => is_grpc(headers) && unauthenticated(headers),
            status => {
                let provider = self.proxy.parts().tokens.provider(&self.key);
                provider.is_some_and(|provider| provider.refresh_on.contains(&status)) && !other_reason()
            }
        }
    }
}

/// A request ready to be sent, as often as need be.
pub(super) struct Outgoing<'a> {
    proxy: &'a Proxy,
    origin: Origin,
    head: request::Parts,
    body: Replay,
    upgrade: Option<Upgrade>,
    came: Came,
    /// How long it was the upstream's turn, in all.
    waited: Duration,
}

/// How far it came when it was last sent.
#[derive(Clone, Copy, Default)]
struct Came {
    /// The upstream may have read it.
    reached: bool,
    /// What it answered.
    status: Option<StatusCode>,
}

/// A change of protocol that the agent asks for.
struct Upgrade {
    protocol: HeaderValue,
    agent: OnUpgrade,
    /// Said in HTTP/2, where the answer is 200 (RFC 8441 section 5).
    extended: bool,
    /// Its connection is not quiet as long as this is there.
    under_way: Option<Arc<UnderWay>>,
}

impl<'a> Outgoing<'a> {
    fn new(proxy: &'a Proxy, mut request: Request<Incoming>, origin: Origin) -> Self {
        let extended = websocket::asked(&request);
        let (protocol, extended) = match extended {
            Some(protocol) => (Some(protocol), true),
            None => (headers::upgrade(request.headers(), request.version()), false),
        };
        let under_way = request.extensions_mut().remove();
        let agent = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
        let upgrade = protocol.zip(agent);
        let upgrade = upgrade.map(|(protocol, agent)| Upgrade { protocol, agent, extended, under_way });
        let (mut head, body) = request.into_parts();
        headers::clean_request(&mut head.headers, &proxy.lasting.pseudonym);
        let path = head.uri.path_and_query().cloned();
        head.uri = path.map(http::Uri::from).unwrap_or_default();
        let limits = (proxy.parts().replay_limit, proxy.limits().body_timeout);
        let body = Replay::new(body, head.version, limits, proxy.lasting.budget.clone());
        Self { proxy, origin, head, body, upgrade, came: Came::default(), waited: Duration::ZERO }
    }

    /// As [`Outgoing::send`], as a span of the request's trace if it has one.
    async fn traced(&mut self, bearer: Option<&Bearer>, record: &mut Record) -> Result<Answer, Reject> {
        if let Some(trace) = &mut record.trace {
            let generation = bearer.map(|bearer| bearer.generation);
            traced::begin_try(trace, &self.origin, &self.head, generation, record.retried);
        }
        self.came = Came::default();
        let sent = self.send(bearer).await;
        if let Some(trace) = &mut record.trace {
            traced::end_try(trace, self.came.status, sent.as_ref().err().map(Reject::code));
        }
        sent
    }

    /// Sends it, again on another connection where that does no harm (SEMANTICS C6).
    async fn send(&mut self, bearer: Option<&Bearer>) -> Result<Answer, Reject> {
        let mut left = RESENDS;
        loop {
            let began = Instant::now();
            let sent = self.send_once(bearer, left).await;
            self.waited += began.elapsed();
            match sent {
                Ok(response) => {
                    self.came = Came { reached: true, status: Some(response.status()) };
                    return self.answered(response);
                }
                Err(error) => {
                    self.came.reached |= error.was_read(self.origin.plaintext);
                    if left == 0 || !self.may_resend(&error) {
                        return Err(error.into());
                    }
                    left -= 1;
                }
            }
        }
    }

    fn answered(&mut self, response: Pooled) -> Result<Answer, Reject> {
        let status = response.status();
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return self.switched(response);
        }
        if status.is_success() && self.upgrade.as_ref().is_some_and(|upgrade| upgrade.extended) {
            // As it is, it would tell the agent that its WebSocket is open.
            return Err(Reject::NoWebSocket(status));
        }
        Ok(Answer { response: self.on_its_way(response), switched: None, step_up: None })
    }

    fn on_its_way(&self, response: Pooled) -> Response<ResponseBody> {
        let stalls = &self.proxy.lasting.stalls;
        // Of HTTP/1 it is the connection that is looked after.
        let h2 = self.head.version == Version::HTTP_2;
        response.map(|body| ResponseBody::from(if h2 { stalls.watch(body) } else { Reading::Unwatched(body) }))
    }

    /// Whether a failed request can be sent again, and do no harm by that (RFC 9110 section 9.2.2). If so, it has to be.
    fn may_resend(&self, error: &UpstreamError) -> bool {
        let closed = *error == UpstreamError::Closed && self.head.method.is_idempotent();
        (error.unprocessed() || closed) && self.body.promise().is_ok()
    }

    fn send_once(
        &self,
        bearer: Option<&Bearer>,
        left: u32,
    ) -> impl Future<Output = Result<Pooled, UpstreamError>> + Send {
        let (upstream, origin) = (&self.proxy.parts().upstream, &self.origin);
        let by = bearer.and_then(|bearer| bearer.ends);
        let request = self.body.next_try().ok_or(UpstreamError::RequestBody).map(|body| self.request(bearer, body));
        match (request, &self.upgrade) {
            (Ok(request), None) if left > 0 => Either::Left(upstream.send(origin, request, by)),
            (request, upgrade) => Either::Right(Box::pin(async move {
                match upgrade {
                    Some(Upgrade { extended: true, .. }) => upstream.send_websocket(origin, request?, by).await,
                    Some(_) => upstream.send_upgrade(origin, request?, by).await,
                    // Those in the pool may all be about to close; a new one is not.
                    None => upstream.send_anew(origin, request?, by).await,
                }
            })),
        }
    }

    fn request(&self, bearer: Option<&Bearer>, body: RequestBody) -> Request<RequestBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = self.head.uri.clone();
        *request.headers_mut() = self.head.headers.clone();
        if let Some(bearer) = bearer {
            request.headers_mut().insert(AUTHORIZATION, bearer.header.clone());
        }
        if let Some(upgrade) = &self.upgrade {
            request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
            request.headers_mut().insert(UPGRADE, upgrade.protocol.clone());
        }
        request
    }

    /// Accepts a change of protocol that was asked for, and no other (SEMANTICS C10).
    fn switched(&mut self, mut response: Pooled) -> Result<Answer, Reject> {
        let protocol = response.headers().get(UPGRADE).cloned();
        let asked = self.upgrade.take().filter(|asked| {
            protocol.as_ref().is_some_and(|got| got.as_bytes().eq_ignore_ascii_case(asked.protocol.as_bytes()))
        });
        let asked = asked.ok_or(Reject::Unasked)?;
        let upstream = Switched::by(&mut response);
        Ok(Answer { response: self.on_its_way(response), switched: Some((asked, upstream)), step_up: None })
    }
}

/// An upstream's answer, before it goes to the agent.
struct Answer {
    response: Response<ResponseBody>,
    switched: Option<(Upgrade, Switched)>,
    /// Where its user grants the scopes that it asks for.
    step_up: Option<HeaderValue>,
}

impl Answer {
    async fn read_ahead(&mut self) {
        self.response.body_mut().read_ahead().await;
    }

    /// Ends it, and what is still sent of its request: the server shall have all of it in another.
    fn give_up(mut self) {
        if let Some(unwanted) = self.response.extensions_mut().remove::<Unwanted>() {
            unwanted.say();
        }
    }

    fn into_response(self, proxy: &Proxy) -> Result<Response<ResponseBody>, Reject> {
        let mut response = self.response;
        headers::clean_response(response.headers_mut(), &proxy.lasting.pseudonym);
        if let Some(url) = self.step_up {
            response.headers_mut().insert(headers::CONNECT_URL, url);
        }
        if let Some((asked, upstream)) = self.switched {
            if asked.extended {
                *response.status_mut() = StatusCode::OK;
                response.headers_mut().remove(SEC_WEBSOCKET_ACCEPT);
            } else {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
                response.headers_mut().insert(UPGRADE, asked.protocol.clone());
            }
            splice(proxy, asked, upstream);
        }
        Ok(response)
    }
}

/// From here on the bytes are the agent's and the upstream's own; no expiry cuts them.
fn splice(proxy: &Proxy, asked: Upgrade, upstream: Switched) {
    proxy.drain().spawn_until_forced(async move {
        let _under_way = asked.under_way;
        let Ok(agent) = asked.agent.await else { return };
        let spliced = match upstream {
            Switched::H1(upstream) => match upstream.await {
                Ok(upstream) => copy(agent, TokioIo::new(upstream)).await,
                Err(_) => return,
            },
            Switched::H2(upstream) => copy(agent, *upstream).await,
        };
        if let Err(error) = spliced {
            tracing::debug!(%error, "upgraded connection ended");
        }
    });
}

async fn copy(agent: Upgraded, mut upstream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut agent = TokioIo::new(agent);
    tokio::io::copy_bidirectional(&mut agent, &mut upstream).await.map(drop)
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// gRPC's status 16, in the head or in the trailers.
fn unauthenticated(fields: &HeaderMap) -> bool {
    fields.get("grpc-status").is_some_and(|status| status == "16")
}
