//! Connections that a packet filter has redirected here, from agents that know of no proxy.
//!
//! Where one was meant to go, and the name that it opens with, decide what a CONNECT to that name would be answered. A name
//! is never dialled for bytes that are passed on unseen: they go to the address that they were meant for.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use http::{HeaderMap, StatusCode};
use tokio::io::AsyncWriteExt;

use super::caller::Caller;
use super::opening::{self, Opening};
use super::pace::Paced;
use super::reject::Reject;
use super::{Arrival, Front, Record, Tunnel, intercept, tunnel};
use crate::events::TunnelStep;
use crate::host::{Authority, Host};
use crate::listen::{Connection, Listener, redirected};
use crate::routes::{Routes, Unmatched};
use crate::upstream::{Leg, Origin, UpstreamError, Way};

/// An agent that says nothing for so long may wait for its server to speak first.
const SILENCE: Duration = Duration::from_millis(500);
/// The fatal alert `access_denied` (RFC 8446 section 6.2).
const ACCESS_DENIED: [u8; 7] = [21, 3, 3, 0, 2, 2, 49];

impl Front {
    /// Takes redirected connections until the stop begins; `entrance` is the listener's number.
    pub async fn serve_redirected(&self, mut listener: Listener, entrance: usize) {
        let mut stop = pin!(self.drain().started());
        // From the start: a connection of our own may come in before there is any other.
        self.current().parts().upstream.dialer().ways();
        let mut told = [false; 2];
        loop {
            let (agent, place) = tokio::select! {
                () = &mut stop => return,
                next = self.next(&mut listener) => next,
            };
            let Some((from, to)) = redirected(&agent) else {
                let hint = "only a packet filter's REDIRECT leads here; HTTPS_PROXY names an address of `listen`";
                tell(&mut told[0], &listener, hint, "a connection that was not redirected is closed; said once");
                continue;
            };
            let Some(way) = self.current().parts().upstream.dialer().ways().enter(from, to) else {
                let hint =
                    "the packet filter has to let this process's own uid out: `-m owner --uid-owner UID -j RETURN`";
                tell(
                    &mut told[1],
                    &listener,
                    hint,
                    "a connection of our own was redirected here and is closed; said once",
                );
                continue;
            };
            let agent = Paced::new(agent, self.current().limits().write_timeout, place);
            let redirected = Redirected { front: self.clone(), agent, said: BytesMut::new(), to, entrance, _way: way };
            let open = self.lasting.metrics.agent();
            self.drain().spawn_until_forced(async move {
                let _open = open;
                if let Err(error) = redirected.open().await {
                    tracing::debug!(%error, %to, "redirected connection ended");
                }
            });
        }
    }
}

fn tell(told: &mut bool, listener: &Listener, hint: &str, what: &str) {
    if !std::mem::replace(told, true) {
        let at = listener.place();
        tracing::warn!(%at, hint, "{what}");
    }
}

/// A redirected connection.
struct Redirected {
    front: Front,
    agent: Paced<Connection>,
    /// What of it has been read.
    said: BytesMut,
    /// Where it was meant to go.
    to: SocketAddr,
    /// The number of the listener that it came in at.
    entrance: usize,
    /// Noted until it ends: one that comes back is known.
    _way: Way,
}

/// What is to be done with a redirected connection.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Its TLS is answered here.
    Intercept(Authority),
    /// Its requests, in the clear, are answered here.
    Answer(Authority),
    /// Its bytes go where they were meant to go.
    Pass,
}

/// What a connection to an address, with this opening, comes to. No route names an address, so what has no name has none.
fn verdict(routes: &Routes, unmatched: Unmatched, opening: &Opening, to: SocketAddr) -> Result<Verdict, Reject> {
    let authority = named(opening, to);
    match (opening, unmatched) {
        (Opening::Tls(_), _) if routes.claims(&authority) => Ok(Verdict::Intercept(authority)),
        // A routed host is answered also where it is not to be spoken to in the clear, and what is refused learns why.
        (Opening::Http(_), _) if routes.names(&authority.host) => Ok(Verdict::Answer(authority)),
        (Opening::Http(_), Unmatched::Deny) => Ok(Verdict::Answer(authority)),
        (_, Unmatched::Tunnel) => Ok(Verdict::Pass),
        (_, Unmatched::Deny) => Err(Reject::Unmatched),
    }
}

/// What a CONNECT would have named.
fn named(opening: &Opening, to: SocketAddr) -> Authority {
    match opening {
        Opening::Tls(Some(name)) => Authority::new(Host::Name(name.clone()), to.port()),
        Opening::Http(Some(authority)) => authority.clone(),
        Opening::Tls(None) | Opening::Http(None) | Opening::Unknown => address(to),
    }
}

fn address(to: SocketAddr) -> Authority {
    Authority::new(Host::Ip(to.ip().to_canonical()), to.port())
}

impl Redirected {
    async fn open(mut self) -> io::Result<()> {
        let Some((opening, upstream)) = self.hear().await? else { return Ok(()) };
        // It is logged as the CONNECT that it stands for.
        let name = named(&opening, self.to).to_string();
        let mut record = Record::connect(name.into(), &self.front.current().parts().events);
        match self.admit(&opening, &mut record) {
            Ok((Verdict::Pass, _)) => self.pass(&opening, upstream, record).await,
            Ok((verdict, caller)) => {
                // The requests inside are what is logged.
                record.quiet = true;
                drop(record);
                self.answer(verdict, caller).await;
                Ok(())
            }
            Err(reject) => self.refuse(&opening, &reject, record).await,
        }
    }

    /// What it opens with, and the connection on which its server spoke first, where it did. Nothing when it ended, or the
    /// stop began, before anything was said.
    async fn hear(&mut self) -> io::Result<Option<(Opening, Option<Leg>)>> {
        let limits = self.front.current().limits().clone();
        tokio::select! {
            biased;
            first = opening::more(&mut self.agent, &mut self.said) => if first? == 0 { return Ok(None) },
            upstream = spoken_first(&self.front, self.to) => return Ok(Some((Opening::Unknown, Some(upstream)))),
            () = self.front.drain().started() => return Ok(None),
            () = tokio::time::sleep(limits.idle_timeout) => return Ok(None),
        }
        let opening = opening::read(&mut self.agent, &mut self.said, self.to.port(), &limits).await?;
        Ok(Some((opening, None)))
    }

    /// What it comes to by the configuration of this moment, which also says whose it is: nothing on the connection could.
    fn admit(&self, opening: &Opening, record: &mut Record) -> Result<(Verdict, Caller), Reject> {
        let proxy = self.front.current();
        let caller = proxy.inner.door.admit(proxy.entrance(self.entrance), &HeaderMap::new())?;
        record.caller(&caller);
        let parts = proxy.parts();
        verdict(&parts.routes, parts.unmatched, opening, self.to).map(|verdict| (verdict, caller))
    }

    /// Answers its requests. Each is looked at: none is for another host than the first.
    async fn answer(self, verdict: Verdict, caller: Caller) {
        let agent = self.agent.after(self.said.freeze());
        let proxy = self.front.current();
        match verdict {
            Verdict::Intercept(authority) => {
                proxy.parts().events.tunnel(&authority, TunnelStep::Open);
                let tunnel = Arc::new(proxy.tunnel(authority, caller, self.entrance));
                drop(proxy);
                Box::pin(intercept::answer(&self.front, agent, &tunnel)).await;
            }
            Verdict::Answer(authority) => {
                let origin = Origin { authority: authority.clone(), plaintext: true, http: Default::default() }.into();
                let tunnel = Tunnel { origin, ..proxy.tunnel(authority, caller, self.entrance) };
                drop(proxy);
                Box::pin(self.front.serve_h1(agent, Arrival::Tunnel(tunnel.into()))).await;
            }
            Verdict::Pass => {}
        }
    }

    async fn pass(mut self, opening: &Opening, upstream: Option<Leg>, record: Record) -> io::Result<()> {
        let upstream = match upstream {
            Some(upstream) => Ok(upstream),
            None => dialled(&self.front, self.to).await,
        };
        match upstream {
            Ok(upstream) => {
                tracing::debug!(to = %self.to, name = %record.authority, "redirected connection passed on");
                record.finish(StatusCode::OK);
                let _open = self.front.lasting.metrics.tunnel();
                Box::pin(tunnel::carry(self.agent.after(self.said.freeze()), upstream)).await
            }
            Err(error) => self.refuse(opening, &error.into(), record).await,
        }
    }

    async fn refuse(&mut self, opening: &Opening, reject: &Reject, mut record: Record) -> io::Result<()> {
        record.code = Some(reject.code());
        record.finish(reject.status());
        if matches!((opening, reject), (Opening::Tls(_), Reject::Unmatched)) {
            self.agent.write_all(&ACCESS_DENIED).await?;
        }
        self.agent.shutdown().await
    }
}

/// The connection to an address, once its server has said something there; never, where bytes are not passed on unseen.
async fn spoken_first(front: &Front, to: SocketAddr) -> Leg {
    tokio::time::sleep(SILENCE).await;
    if front.current().parts().unmatched == Unmatched::Tunnel
        && let Ok(mut upstream) = dialled(front, to).await
        && upstream.has_spoken().await
    {
        return upstream;
    }
    // Its agent has its time to say something, as under `deny`.
    std::future::pending().await
}

async fn dialled(front: &Front, to: SocketAddr) -> Result<Leg, UpstreamError> {
    let dialer = front.current().parts().upstream.dialer().clone();
    dialer.tcp(&address(to)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::{Action, Retry, Route, UpstreamHttp};

    fn routes() -> Routes {
        let route = |host: &str, port, plaintext| Route {
            name: host.into(),
            host: host.parse().unwrap(),
            port,
            paths: Vec::new(),
            methods: Vec::new(),
            action: Action::Authenticate("main".parse().unwrap()),
            plaintext,
            retry: Retry::Once,
            upstream_http: UpstreamHttp::Auto,
            redact_reflections: false,
        };
        Routes::new([route("api.test", 443, false), route("*.wild.test", 443, false), route("plain.test", 80, true)])
    }

    fn tls(name: &str) -> Opening {
        Opening::Tls(Some(name.parse().unwrap()))
    }

    fn http(host: &str) -> Opening {
        Opening::Http(Some(Authority::parse(host, Some(80)).unwrap()))
    }

    #[test]
    fn the_name_and_the_port_decide_and_nothing_else_is_trusted() {
        // SEC-002, SEC-005, SEC-020, CLR-001, CLR-002, CLR-005
        let at = |authority: &str| Authority::parse(authority, None).unwrap();
        let unclear = [Opening::Tls(None), Opening::Http(None), Opening::Unknown];
        let names = [
            (tls("api.test"), 443, Verdict::Intercept(at("api.test:443"))),
            (tls("eu.wild.test"), 443, Verdict::Intercept(at("eu.wild.test:443"))),
            // As CONNECT api.test:8443 would be.
            (tls("api.test"), 8443, Verdict::Pass),
            (tls("other.test"), 443, Verdict::Pass),
            (http("plain.test"), 80, Verdict::Answer(at("plain.test:80"))),
            (http("api.test"), 80, Verdict::Answer(at("api.test:80"))),
            (http("other.test"), 80, Verdict::Pass),
        ];
        let unclear = unclear.map(|opening| (opening, 443, Verdict::Pass));
        for (opening, port, expected) in names.into_iter().chain(unclear) {
            let to = SocketAddr::from(([192, 0, 2, 1], port));
            let found = |unmatched| verdict(&routes(), unmatched, &opening, to).map_err(|reject| reject.code());
            // Under `deny` nothing is passed on; who speaks HTTP is told so.
            let denied = match (&expected, &opening) {
                (Verdict::Pass, Opening::Http(_)) => Ok(Verdict::Answer(named(&opening, to))),
                (Verdict::Pass, _) => Err("unmatched"),
                _ => found(Unmatched::Tunnel),
            };
            assert_eq!(found(Unmatched::Tunnel), Ok(expected), "{opening:?} {port}");
            assert_eq!(found(Unmatched::Deny), denied, "{opening:?} {port}");
        }
    }
}
