//! The agent's side: takes its connections, reads its requests, and gives each to the file that answers it.

mod admit;
mod body;
mod forward;
mod headers;
mod intercept;
mod reject;
mod target;
mod tunnel;
mod wire;

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::ca::Ca;
use crate::clock::Clock;
use crate::drain::Drain;
use crate::events::{self, Events};
use crate::host::Authority;
use crate::names::{ProviderName, UserName};
use crate::routes::{Routes, Unmatched};
use crate::tokens::Tokens;
use crate::upstream::{Origin, Upstream};
use body::{Budget, ResponseBody};
use reject::Reject;
use target::Target;

const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_HEADERS: usize = 256;
const MAX_HEAD: usize = 256 << 10;
const H2_STREAMS: u32 = 1024;
const H2_WINDOW: u32 = 1 << 20;
const H2_CONNECTION_WINDOW: u32 = 8 << 20;
/// How long accepting rests when the process has no descriptors left.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// The proxy. A clone is the same one.
#[derive(Clone)]
pub struct Proxy {
    inner: Arc<Inner>,
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
    /// For whom callers act.
    pub user: UserName,
    /// How many bytes of a body are kept for a second try.
    pub replay_limit: usize,
}

struct Inner {
    parts: Parts,
    budget: Budget,
    /// How this process names itself in `Via`; another Sidebearer has another name.
    pseudonym: headers::Pseudonym,
    /// Routed hosts whose tunnels failed, each told of once.
    failing: dashmap::DashSet<Authority>,
}

/// Where a request came in.
#[derive(Clone)]
enum Arrival {
    /// On the proxy port.
    Proxy,
    /// Inside a CONNECT that is answered here.
    Tunnel(Arc<Origin>),
}

impl Proxy {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> Self {
        let inner = Inner {
            parts,
            budget: Budget::default(),
            pseudonym: headers::Pseudonym::random(),
            failing: dashmap::DashSet::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Takes connections until the stop begins.
    pub async fn serve(&self, listener: TcpListener) {
        let stop = self.drain().started();
        let mut stop = pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((agent, _)) => self.agent(agent),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_REST).await;
                }
            }
        }
    }

    fn agent(&self, agent: TcpStream) {
        let _ = agent.set_nodelay(true);
        let proxy = self.clone();
        self.drain().spawn_until_forced(async move { proxy.serve_h1(agent, Arrival::Proxy).await });
    }

    /// Reads HTTP/1 requests from a connection until it ends.
    async fn serve_h1<IO>(&self, io: IO, arrival: Arrival)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let service = service_fn(|request| self.clone().handle(request, arrival.clone()));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD)
            .auto_date_header(false)
            .serve_connection(TokioIo::new(wire::Strict::new(io)), service)
            .with_upgrades();
        self.until_stopped(connection, |connection| connection.graceful_shutdown()).await;
    }

    /// Reads HTTP/2 requests from a connection until it ends.
    async fn serve_h2<IO>(&self, io: IO, arrival: Arrival)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let service = service_fn(|request| self.clone().handle(request, arrival.clone()));
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .auto_date_header(false)
            .max_concurrent_streams(H2_STREAMS)
            .initial_stream_window_size(H2_WINDOW)
            .initial_connection_window_size(H2_CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEAD as u32)
            .serve_connection(TokioIo::new(io), service);
        self.until_stopped(connection, |connection| connection.graceful_shutdown()).await;
    }

    /// Serves a connection to its end; when the stop begins, only what is under way on it.
    async fn until_stopped<C>(&self, connection: C, wind_down: fn(Pin<&mut C>))
    where
        C: Future<Output = hyper::Result<()>>,
    {
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.drain().started() => {
                wind_down(connection.as_mut());
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "agent connection ended");
        }
    }

    /// Answers one request, and says once what happened to it.
    async fn handle(self, request: Request<Incoming>, arrival: Arrival) -> Result<Response<ResponseBody>, Infallible> {
        let mut record = Record::of(&request, &arrival);
        let form = reject::Form::wanted(&request);
        let answered = self.answer(request, arrival, &mut record).await;
        let response = answered.unwrap_or_else(|reject| {
            record.code = Some(reject.code());
            reject.into_response(form)
        });
        if !record.quiet {
            self.parts().events.request(record.finish(&response));
        }
        Ok(response)
    }

    async fn answer(
        &self,
        mut request: Request<Incoming>,
        arrival: Arrival,
        record: &mut Record,
    ) -> Result<Response<ResponseBody>, Reject> {
        admit::check(&request, &self.inner.pseudonym)?;
        let origin = match arrival {
            Arrival::Tunnel(origin) => {
                target::agrees(&request, &origin.authority)?;
                origin
            }
            Arrival::Proxy => match Target::of(&request)? {
                Target::Connect(authority) => return self.connect(request, authority, record).await,
                Target::Plain(authority) => Arc::new(self.plain(authority)?),
            },
        };
        if *request.method() == Method::TRACE {
            return Err(Reject::Trace);
        }
        if headers::is_last_hop(&mut request) {
            return Ok(reject::options_answer());
        }
        forward::forward(self, request, &origin, record).await
    }

    /// A routed host is answered here; any other is tunnelled or refused.
    async fn connect(
        &self,
        request: Request<Incoming>,
        authority: Authority,
        record: &mut Record,
    ) -> Result<Response<ResponseBody>, Reject> {
        if self.parts().routes.claims(&authority) {
            // The requests inside are what is logged.
            record.quiet = true;
            return Ok(intercept::open(self, request, authority));
        }
        match self.parts().unmatched {
            Unmatched::Deny => Err(Reject::Unmatched),
            Unmatched::Tunnel => tunnel::open(self, request, &authority).await,
        }
    }

    /// Where an absolute-form `http://` request goes: never in the clear to a host whose routes say TLS.
    fn plain(&self, authority: Authority) -> Result<Origin, Reject> {
        let routes = &self.parts().routes;
        if routes.names(&authority.host) && !routes.plaintext(&authority) {
            return Err(Reject::Plaintext);
        }
        Ok(Origin { authority, plaintext: true, http: Default::default() })
    }

    fn parts(&self) -> &Parts {
        &self.inner.parts
    }

    fn drain(&self) -> &Drain {
        &self.parts().drain
    }
}

/// What is to be said of a request, filled in on its way.
struct Record {
    started: Instant,
    method: Method,
    authority: String,
    path: String,
    route: Option<String>,
    provider: Option<ProviderName>,
    code: Option<&'static str>,
    retried: bool,
    passed: Option<&'static str>,
    token: Duration,
    quiet: bool,
}

impl Record {
    fn of(request: &Request<Incoming>, arrival: &Arrival) -> Self {
        let authority = match arrival {
            Arrival::Tunnel(origin) => origin.authority.to_string(),
            Arrival::Proxy => request.uri().authority().map(ToString::to_string).unwrap_or_default(),
        };
        Self {
            started: Instant::now(),
            method: request.method().clone(),
            authority,
            path: request.uri().path().to_owned(),
            route: None,
            provider: None,
            code: None,
            retried: false,
            passed: None,
            token: Duration::ZERO,
            quiet: false,
        }
    }

    fn finish(self, response: &Response<ResponseBody>) -> events::Request {
        events::Request {
            method: self.method,
            authority: self.authority,
            path: self.path,
            route: self.route,
            provider: self.provider,
            status: response.status(),
            code: self.code,
            retried: self.retried,
            passed: self.passed,
            took: self.started.elapsed(),
            token: self.token,
        }
    }
}
