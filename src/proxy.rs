//! The agent's side: takes its connections, reads its requests, and gives each to the file that answers it.

mod admit;
mod bare;
mod body;
pub mod caller;
mod forward;
#[cfg(fuzzing)]
pub mod fuzzing;
mod half;
mod headers;
mod intercept;
mod linger;
#[doc(hidden)]
pub mod measured;
mod missing;
mod opening;
mod pace;
mod patience;
mod places;
mod pump;
mod redact;
mod reject;
mod rest;
mod stalls;
mod target;
mod traced;
mod transparent;
mod tunnel;
mod websocket;
mod wire;

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use dashmap::DashSet;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::Instant;

use crate::audit::Audit;
use crate::ca::Ca;
use crate::clock::Clock;
use crate::drain::Drain;
use crate::events::{self, Events};
use crate::host::Authority;
use crate::limits::Limits;
use crate::links::Links;
use crate::listen::{Connection, Listener};
use crate::metrics::Metrics;
use crate::names::{ProviderName, UserName};
use crate::routes::{Routes, Unmatched};
use crate::seldom::seldom;
use crate::tokens::Tokens;
use crate::traces::{self, Trace, Traces};
use crate::upstream::{Origin, Upstream};
use body::{Budget, ResponseBody};
use caller::{Agent, Caller, Door, Entrance};
use forward::Forward;
use missing::Missing;
use pace::Paced;
use patience::Patience;
use places::Places;
use reject::{Reject, TurnedAway};
use rest::{Between, Resting};
use stalls::Stalls;
use target::Target;

/// At most so many hosts are told of.
const TOLD: usize = 1024;
const H2_STREAMS: u32 = 1024;
const H2_WINDOW: u32 = 1 << 20;
/// So many uploads may stall on their upstreams before they stop an agent's others.
const H2_CONNECTION_WINDOW: u32 = 64 * H2_WINDOW;
/// For each stream, when an agent opens its windows and does not read.
const H2_SEND_BUFFER: usize = 64 << 10;
/// Who does not answer 20 s later is gone.
const H2_PING_EVERY: Duration = Duration::from_secs(60);
/// How long the answers under way may take on the connection of an agent that is turned away.
const TURNED_AWAY: Duration = Duration::from_secs(5);
const WRITTEN: Duration = Duration::from_millis(50);

/// The agents' side for as long as the sidecar runs: what listeners and connections hold. A clone is the same one.
#[derive(Clone)]
pub struct Front {
    lasting: Arc<Lasting>,
}

/// The proxy as it is configured at one moment. A request sees one from its head to its end, whatever is configured
/// meanwhile.
#[derive(Clone)]
struct Proxy {
    inner: Arc<Inner>,
    lasting: Arc<Lasting>,
}

/// What a proxy works with.
pub struct Parts {
    /// Which request takes which route.
    pub routes: Routes,
    /// What happens to other hosts.
    pub unmatched: Unmatched,
    /// Answers TLS for routed hosts.
    pub ca: Ca,
    /// Where tokens come from.
    pub tokens: Tokens,
    /// Where requests go.
    pub upstream: Upstream,
    /// What time it is.
    pub clock: Clock,
    /// Who is told.
    pub events: Events,
    /// What ends the connections.
    pub drain: Drain,
    /// Who may send requests; any caller when there are none.
    pub agents: Vec<Arc<Agent>>,
    /// Who comes in at each listener, and then at each for redirected connections.
    pub entrances: Vec<Entrance>,
    /// For whom callers act, where there are no agents.
    pub user: UserName,
    /// Where users are sent to connect, if they can.
    pub links: Option<Links>,
    /// Where each use of a token is written down, if it is.
    pub audit: Option<Audit>,
    /// Where traces begin, if requests are traced.
    pub traces: Option<Traces>,
    /// How many bytes of a body are kept for a second try.
    pub replay_limit: usize,
    /// How long, how large and how many.
    pub limits: Limits,
}

struct Inner {
    parts: Parts,
    door: Door,
    /// No other has it.
    number: u64,
}

/// What stays when the configuration changes.
struct Lasting {
    current: ArcSwap<Inner>,
    drain: Drain,
    missing: Missing,
    budget: Budget,
    stalls: Stalls,
    /// How this process names itself in `Via`; another Sidebearer has another name.
    pseudonym: headers::Pseudonym,
    /// Routed hosts whose tunnels failed, each told of once.
    failing: DashSet<Authority>,
    /// Requests that wait for a user are held against each new configuration.
    replaced: Notify,
    /// A place for each connection of an agent.
    places: Places,
    metrics: Metrics,
    /// Hosts whose text could not be searched for tokens, each told of once.
    coded: DashSet<Authority>,
}

/// Where a request came in.
#[derive(Clone)]
enum Arrival {
    /// At the listener of this number, on a connection that can become a tunnel.
    Proxy(usize, Next),
    /// Inside a CONNECT that is answered here.
    Tunnel(Arc<Tunnel>),
}

/// What goes on on a connection that is no longer HTTP/1. It does so in the same task: another one would be begun by
/// another thread, and waited for.
#[derive(Clone, Default)]
struct Next(Arc<Mutex<Option<BoxFuture<'static, ()>>>>);

impl Next {
    fn set(&self, next: impl Future<Output = ()> + Send + 'static) {
        *self.lock() = Some(Box::pin(next));
    }

    async fn run(self) {
        let next = self.lock().take();
        if let Some(next) = next {
            next.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<BoxFuture<'static, ()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A CONNECT that is answered here.
struct Tunnel {
    origin: Arc<Origin>,
    /// Its authority as logs say it.
    name: Arc<str>,
    /// Who opened it: nothing inside says who sends it, whatever it says.
    caller: Caller,
    /// At which listener.
    entrance: usize,
    /// The number of the configuration that let it in.
    admitted_by: u64,
}

/// What is to be done with a request.
#[expect(clippy::large_enum_variant, reason = "the large one is the usual one, and costs no allocation")]
enum Admitted<'a> {
    /// Nothing more.
    Answered(Response<ResponseBody>),
    Connect(Box<Connect>),
    Forward(Forward<'a>),
}

/// A CONNECT.
struct Connect {
    request: Request<Incoming>,
    authority: Authority,
    caller: Caller,
    entrance: usize,
    next: Next,
}

impl Front {
    /// Puts the parts together. Must be called within a tokio runtime.
    pub fn new(parts: Parts) -> Self {
        parts.events.metrics().most_agents(parts.limits.max_connections);
        let lasting = Lasting {
            drain: parts.drain.clone(),
            missing: Missing::default(),
            budget: Budget::default(),
            stalls: Stalls::start(parts.limits.write_timeout),
            pseudonym: headers::Pseudonym::random(),
            failing: DashSet::new(),
            replaced: Notify::new(),
            places: Places::new(parts.limits.max_connections),
            metrics: parts.events.metrics().clone(),
            coded: DashSet::new(),
            current: ArcSwap::from_pointee(Inner::new(parts, 0)),
        };
        Self { lasting: Arc::new(lasting) }
    }

    /// From now on requests find this configuration, on connections that are open as well; those under way keep theirs.
    pub fn replace(&self, parts: Parts) {
        self.lasting.stalls.limit(parts.limits.write_timeout);
        self.lasting.places.allow(parts.limits.max_connections);
        self.lasting.metrics.most_agents(parts.limits.max_connections);
        let number = self.lasting.current.load().number + 1;
        self.lasting.current.store(Arc::new(Inner::new(parts, number)));
        self.lasting.replaced.notify_waiters();
    }

    /// Takes connections until the stop begins; `entrance` is the listener's number.
    pub async fn serve(&self, mut listener: Listener, entrance: usize) {
        let stop = self.drain().started();
        let mut stop = pin!(stop);
        loop {
            let (agent, place) = tokio::select! {
                () = &mut stop => return,
                next = self.next(&mut listener) => next,
            };
            let (front, next) = (self.clone(), Next::default());
            let arrival = Arrival::Proxy(entrance, next.clone());
            let agent = Paced::new(agent, self.current().limits().write_timeout, place);
            let open = self.lasting.metrics.agent();
            self.drain().spawn_until_forced(async move {
                let _open = open;
                front.serve_h1(agent, arrival).await;
                next.run().await;
            });
        }
    }

    /// The next connection, once there is a place for it.
    async fn next(&self, listener: &mut Listener) -> (Connection, OwnedSemaphorePermit) {
        let connection = listener.accept().await;
        (connection, self.lasting.places.take().await)
    }

    /// The configuration of this moment.
    fn current(&self) -> Proxy {
        Proxy { inner: self.lasting.current.load_full(), lasting: self.lasting.clone() }
    }

    fn drain(&self) -> &Drain {
        &self.lasting.drain
    }

    /// Reads HTTP/1 requests from a connection until it ends.
    fn serve_h1<IO>(&self, io: IO, arrival: Arrival) -> impl Future<Output = ()> + Send + use<IO>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (front, answers, current) = (self.clone(), half::Answers::default(), self.current());
        let limits = current.limits();
        let io = wire::Strict::new(half::HeldEnd::new(io, answers.clone()), limits);
        // A head that has begun has a limit of its own, which it may use up.
        let (idle, drain, counted) = (limits.idle_timeout + limits.head_timeout, self.drain().clone(), answers.clone());
        rest::serve(io, answers, idle, drain, move |io| front.read_h1(io, &arrival, &counted)).map(told)
    }

    fn read_h1<IO>(
        &self,
        io: Resting<IO>,
        arrival: &Arrival,
        answers: &half::Answers,
    ) -> rest::Reader<IO, impl rest::Answering<ResponseBody> + use<IO>>
    where
        IO: AsyncRead + AsyncWrite + Between + Unpin + Send + 'static,
    {
        let (front, arrival, answers, current) = (self.clone(), arrival.clone(), answers.clone(), self.current());
        let limits = current.limits();
        let service = service_fn(move |request| {
            let (proxy, arrival, answer) = (front.current(), arrival.clone(), answers.begin());
            async move { proxy.handle(request, arrival).await.map(|response| response.map(|body| answer.with(body))) }
        });
        let mut http1 = http1::Builder::new();
        if limits.max_headers != Limits::FREE_HEADERS {
            http1.max_headers(limits.max_headers);
        }
        let http1 = http1.max_buf_size(limits.max_head).auto_date_header(false);
        Box::pin(http1.serve_connection(TokioIo::new(io), service).with_upgrades())
    }

    /// Reads HTTP/2 requests from a connection until it ends.
    async fn serve_h2<IO>(&self, io: IO, arrival: Arrival)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (patience, answers) = (Patience::default(), half::Answers::default());
        let (asked, turned_away) = (AtomicBool::new(false), Arc::new(Notify::new()));
        let (limit, max_head) = self.h2_limits();
        let service = service_fn(|mut request: Request<Incoming>| {
            asked.store(true, Ordering::Relaxed);
            if *request.method() == Method::CONNECT {
                // A WebSocket goes on when its answer has ended.
                request.extensions_mut().insert(Arc::new(answers.begin()));
            }
            let (proxy, arrival) = (self.current(), arrival.clone());
            let (begun, answer, turned_away) = (patience.begin(), answers.begin(), turned_away.clone());
            async move {
                let handled = proxy.handle(request, arrival).await;
                begun.answered();
                if handled.as_ref().is_ok_and(|response| response.extensions().get::<TurnedAway>().is_some()) {
                    turned_away.notify_one();
                }
                handled.map(|response| response.map(|body| answer.with(body)))
            }
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .auto_date_header(false)
            .max_concurrent_streams(H2_STREAMS)
            .initial_stream_window_size(H2_WINDOW)
            .initial_connection_window_size(H2_CONNECTION_WINDOW)
            .max_header_list_size(max_head)
            .max_send_buf_size(H2_SEND_BUFFER)
            .keep_alive_interval(H2_PING_EVERY)
            .enable_connect_protocol()
            .serve_connection(TokioIo::new(io), service);
        let mut connection = Box::pin(connection);
        // Not under an answer that lasts: python-h2 takes nothing more of it after GOAWAY.
        let quiet = async {
            tokio::select! {
                () = answers.rest(limit) => return,
                () = turned_away.notified() => {}
            }
            // So that the agent comes anew, and is not refused on this connection for ever.
            let _ = tokio::time::timeout(TURNED_AWAY, answers.rest(WRITTEN)).await;
        };
        // hyper winds nothing down whose preface has not come.
        let silent = async {
            tokio::time::sleep(limit).await;
            if asked.load(Ordering::Relaxed) {
                std::future::pending().await
            }
        };
        tokio::select! {
            biased;
            () = self.until_stopped(connection.as_mut(), |connection| connection.graceful_shutdown(), quiet) => {}
            () = seldom(silent) => {}
            () = seldom(patience.lost()) => tracing::warn!("agent connection ended: it only begins requests and gives them up"),
        }
    }

    /// How long a connection may be quiet, and how large a head may be. By themselves: a configuration is not held for as
    /// long as a connection lives.
    fn h2_limits(&self) -> (Duration, u32) {
        let current = self.current();
        (current.limits().idle_timeout, current.limits().max_head as u32)
    }

    /// Serves a connection to its end; when the stop begins or it is quiet, only what is under way on it.
    async fn until_stopped<C>(
        &self,
        mut connection: Pin<&mut C>,
        wind_down: fn(Pin<&mut C>),
        quiet: impl Future<Output = ()>,
    ) where
        C: Future<Output = hyper::Result<()>>,
    {
        let over = async {
            tokio::select! {
                () = self.drain().started() => {}
                () = quiet => {}
            }
        };
        tokio::select! {
            biased;
            ended = connection.as_mut() => return told(ended),
            () = seldom(over) => {}
        }
        wind_down(connection.as_mut());
        told(connection.await);
    }
}

impl Inner {
    fn new(parts: Parts, number: u64) -> Self {
        Self { door: Door::new(parts.agents.clone(), parts.user.clone()), parts, number }
    }
}

impl Proxy {
    /// Answers one request, and says once what happened to it.
    // Not an `async fn`, which would hold the request twice for as long as it is answered.
    fn handle(
        self,
        mut request: Request<Incoming>,
        arrival: Arrival,
    ) -> impl Future<Output = Result<Response<ResponseBody>, Infallible>> + Send {
        websocket::read_as_get(&mut request);
        let mut record = Record::of(&request, &arrival, self.parts());
        let form = reject::Form::wanted(&request);
        let last = Last::of(&request);
        async move {
            let answered = match self.admit(request, arrival, &mut record) {
                Ok(Admitted::Answered(response)) => Ok(response),
                Ok(Admitted::Connect(connect)) => self.connect(*connect, &mut record).await,
                Ok(Admitted::Forward(mut forward)) => forward.answer(&mut record).await,
                Err(reject) => Err(reject),
            };
            let mut response = answered.unwrap_or_else(|reject| {
                record.code = Some(reject.code());
                if matches!(reject, Reject::Misdirected | Reject::TwoHosts) {
                    tracing::warn!(authority = %record.authority, code = reject.code(), "a request in a tunnel for another host");
                }
                reject.into_response(form)
            });
            last.finish(&mut response);
            record.finish(response.status());
            Ok(response)
        }
    }

    /// Decides what is to be done with a request.
    fn admit(
        &self,
        mut request: Request<Incoming>,
        arrival: Arrival,
        record: &mut Record,
    ) -> Result<Admitted<'_>, Reject> {
        // In HTTP/2 a byte can stand for a field of any size.
        if headers::fields(request.headers()) > self.limits().max_headers {
            return Err(Reject::TooManyFields);
        }
        admit::check(&request, &self.lasting.pseudonym)?;
        let (origin, caller, entrance) = match arrival {
            Arrival::Tunnel(tunnel) => {
                record.caller(&tunnel.caller);
                target::agrees(&request, &tunnel.origin.authority)?;
                self.in_the_clear(&tunnel.origin)?;
                let caller = self.admit_again(&tunnel)?;
                record.caller(&caller);
                (tunnel.origin.clone(), caller, tunnel.entrance)
            }
            Arrival::Proxy(entrance, next) => {
                let target = Target::of(&request)?;
                let caller = self.inner.door.admit(self.entrance(entrance), request.headers())?;
                record.caller(&caller);
                match target {
                    Target::Connect(authority) => {
                        return Ok(Admitted::Connect(Box::new(Connect { request, authority, caller, entrance, next })));
                    }
                    Target::Plain(authority) => (Arc::new(self.plain(authority)?), caller, entrance),
                }
            }
        };
        if *request.method() == Method::TRACE {
            return Err(Reject::Trace);
        }
        if headers::is_last_hop(&mut request) {
            return Ok(Admitted::Answered(reject::options_answer()));
        }
        forward::forward(self, request, &origin, (caller, entrance), record).map(Admitted::Forward)
    }

    /// Whoever opened a tunnel may do in it what they may do now, and not what they might then.
    fn admit_again(&self, tunnel: &Tunnel) -> Result<Caller, Reject> {
        if tunnel.admitted_by == self.inner.number {
            return Ok(tunnel.caller.clone());
        }
        self.inner.door.admit_again(self.entrance(tunnel.entrance), &tunnel.caller)
    }

    /// Who comes in at the listener of this number.
    fn entrance(&self, number: usize) -> &Entrance {
        &self.parts().entrances[number]
    }

    /// A routed host is answered here; any other is tunnelled or refused.
    async fn connect(&self, connect: Connect, record: &mut Record) -> Result<Response<ResponseBody>, Reject> {
        let Connect { request, authority, caller, entrance, next } = connect;
        if self.parts().routes.claims(&authority) {
            // The requests inside are what is logged.
            record.quiet = true;
            let tunnel = self.tunnel(authority, caller, entrance);
            return Ok(intercept::open(self, request, tunnel, &next));
        }
        match self.parts().unmatched {
            Unmatched::Deny => Err(Reject::Unmatched),
            Unmatched::Tunnel => Box::pin(tunnel::open(self, request, &authority, &next)).await,
        }
    }

    /// What is answered here in the place of a host.
    fn tunnel(&self, authority: Authority, caller: Caller, entrance: usize) -> Tunnel {
        let (plaintext, name) = (self.parts().routes.plaintext(&authority), authority.to_string().into());
        let origin = Arc::new(Origin { authority, plaintext, http: Default::default() });
        Tunnel { origin, name, caller, entrance, admitted_by: self.inner.number }
    }

    /// Where an absolute-form `http://` request goes.
    fn plain(&self, authority: Authority) -> Result<Origin, Reject> {
        let origin = Origin { authority, plaintext: true, http: Default::default() };
        self.in_the_clear(&origin).map(|()| origin)
    }

    /// Refuses what would go in the clear to a host whose routes say TLS.
    fn in_the_clear(&self, origin: &Origin) -> Result<(), Reject> {
        let (routes, to) = (&self.parts().routes, &origin.authority);
        if origin.plaintext && routes.names(&to.host) && !routes.plaintext(to) {
            return Err(Reject::Plaintext);
        }
        Ok(())
    }

    fn parts(&self) -> &Parts {
        &self.inner.parts
    }

    fn front(&self) -> Front {
        Front { lasting: self.lasting.clone() }
    }

    fn drain(&self) -> &Drain {
        &self.parts().drain
    }

    fn limits(&self) -> &Limits {
        &self.parts().limits
    }
}

fn told(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "agent connection ended");
    }
}

/// Whether something is to be told of a host, which is done once. A wildcard route can meet any number of hosts.
fn is_first(told_of: &DashSet<Authority>, host: &Authority) -> bool {
    told_of.len() < TOLD && told_of.insert(host.clone())
}

/// What the request says about the end of its answer, whoever gives it.
struct Last {
    head: bool,
    /// It asked for the connection to become something else than HTTP/1.
    connection: bool,
    connect: bool,
}

impl Last {
    fn of(request: &Request<Incoming>) -> Self {
        let connect = *request.method() == Method::CONNECT;
        let h1 = request.version() != Version::HTTP_2;
        let connection = h1 && (connect || request.headers().contains_key(UPGRADE));
        Self { head: *request.method() == Method::HEAD, connection, connect }
    }

    fn finish(&self, response: &mut Response<ResponseBody>) {
        let status = response.status();
        if self.head || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED {
            // On HTTP/2 nothing else drops it, and clients take it for an attack (RFC 9110 section 6.4.1).
            *response.body_mut() = ResponseBody::whole(Bytes::new());
        }
        let changed = status == StatusCode::SWITCHING_PROTOCOLS || (self.connect && status.is_success());
        if self.connection && !changed {
            // What the agent sent behind such a request has not been looked at as HTTP.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// What is to be said of a request, filled in on its way. Said in any case: also when the agent hangs up before.
struct Record {
    events: Events,
    started: Instant,
    method: Method,
    authority: Arc<str>,
    path: String,
    route: Option<Arc<str>>,
    provider: Option<ProviderName>,
    agent: Option<String>,
    user: Option<UserName>,
    status: Option<StatusCode>,
    code: Option<&'static str>,
    retried: bool,
    recovered: bool,
    passed: Option<&'static str>,
    token: Duration,
    upstream: Duration,
    quiet: bool,
    trace: Option<Box<Trace>>,
}

impl Record {
    fn of(request: &Request<Incoming>, arrival: &Arrival, parts: &Parts) -> Self {
        let authority = match arrival {
            Arrival::Tunnel(tunnel) => tunnel.name.clone(),
            // Whatever stands before an `@` may be a password.
            Arrival::Proxy(..) => {
                let authority = request.uri().authority().map_or("", |authority| authority.as_str());
                authority.rsplit('@').next().unwrap_or_default().into()
            }
        };
        let mut record = Self::connect(authority, &parts.events);
        record.method = request.method().clone();
        record.path = request.uri().path().to_owned();
        let traces = parts.traces.as_ref();
        record.trace = traces.and_then(|traces| traced::begin(traces, request, arrival, &record.authority));
        record
    }

    fn connect(authority: Arc<str>, events: &Events) -> Self {
        Self {
            events: events.clone(),
            started: Instant::now(),
            method: Method::CONNECT,
            authority,
            path: String::new(),
            route: None,
            provider: None,
            agent: None,
            user: None,
            status: None,
            code: None,
            retried: false,
            recovered: false,
            passed: None,
            token: Duration::ZERO,
            upstream: Duration::ZERO,
            quiet: false,
            trace: None,
        }
    }

    fn caller(&mut self, caller: &Caller) {
        self.agent = caller.agent().map(str::to_owned);
        self.user = Some(caller.user.clone());
    }

    /// Says that a token was waited for since then, and why there was none, if so.
    fn waited(&mut self, since: Instant, cause: &'static str, failure: Option<&'static str>) {
        self.token += since.elapsed();
        if let Some(trace) = &mut self.trace {
            let outcome = ("sidebearer.token.outcome", failure.unwrap_or("obtained").into());
            let attributes = vec![("sidebearer.token.cause", traces::Value::from(cause)), outcome];
            trace.took("token", since, attributes, failure.is_some());
        }
    }

    fn finish(mut self, status: StatusCode) {
        self.status = Some(status);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.quiet {
            return;
        }
        let gone = self.status.is_none().then_some("agent_gone");
        let event = events::Request {
            method: std::mem::take(&mut self.method),
            authority: self.authority.clone(),
            path: std::mem::take(&mut self.path),
            route: self.route.take(),
            provider: self.provider.take(),
            agent: self.agent.take(),
            user: self.user.take(),
            status: self.status,
            code: self.code.or(gone),
            retried: self.retried,
            recovered: self.recovered,
            passed: self.passed,
            took: self.started.elapsed(),
            token: self.token,
            upstream: self.upstream,
        };
        if let Some(trace) = self.trace.take() {
            traced::finish(*trace, &event);
        }
        self.events.request(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, C, F: Future>(_: impl FnOnce(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn what_a_connection_and_a_request_carry_along_stays_small() {
        // Of an idle connection its task is there all the time; a request's future is moved and wiped with each of them.
        let tunnel = size(|front: &'static Front, agent: Paced<Connection>, tunnel: &'static Arc<Tunnel>| {
            intercept::serve(front, agent, tunnel)
        });
        assert!(tunnel <= 1024, "{tunnel} bytes");
        let request = size(|proxy: Proxy, request, arrival| proxy.handle(request, arrival));
        assert!(request <= 4096, "{request} bytes");
    }
}
