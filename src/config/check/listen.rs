//! Makes the listeners and their limits of what was decoded.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Check;
use crate::config::decode::{did_you_mean, list};
use crate::config::leaf::{Count, FileMode, HealthAddress, ListenPlace, Parsed, Size, Text};
use crate::config::locate::Spot;
use crate::config::schema::{self, Listener, ListenerKeys, OneOrMore};
use crate::limits::Limits;
use crate::listen::Place;
use crate::names::UserName;
use crate::proxy::caller::{Agent, Entrance, Users};

/// As many bytes as the path of a socket can have.
const LONGEST_SOCKET: usize = 107;

impl Check<'_> {
    /// The listeners, in file order.
    pub(super) fn listen(
        &mut self,
        top: &Spot<'_>,
        written: Option<OneOrMore<Listener>>,
        agents: &[Arc<Agent>],
    ) -> Vec<(Place, Entrance)> {
        let spot = top.key("listen");
        let Some(OneOrMore(written)) = written else {
            return vec![(Place::Tcp(SocketAddr::from(([127, 0, 0, 1], 3128))), Entrance::default())];
        };
        if written.is_empty() && !spot.has_broken_items() {
            self.refuse(&spot, "an empty list lets nobody in", "leave out `listen` for `127.0.0.1:3128`");
        }
        let has_agents = top.key("agents").is_given();
        let mut listeners = Vec::new();
        for (spot, Listener(keys)) in each(spot).zip(written) {
            let Some((place, entrance)) = self.listener(&spot, keys, agents, has_agents) else { continue };
            self.refuse_taken(&spot, &place, &listeners);
            listeners.push((place, entrance));
        }
        listeners
    }

    /// Where the health listener is. What it shows is for everybody, so that it may be anywhere; but in a place of its own.
    pub(in crate::config) fn health(
        &mut self,
        spot: &Spot<'_>,
        written: Option<Parsed<HealthAddress>>,
        others: &[SocketAddr],
    ) -> Option<SocketAddr> {
        let Some(Parsed(HealthAddress(address))) = written else {
            return (!spot.is_given()).then_some(schema::HEALTH);
        };
        if address.is_some_and(|address| address.port() != 0 && others.contains(&address)) {
            self.refuse(spot, "another listener is at this place", "give each its own port");
        }
        address
    }

    /// The listeners for redirected connections, in file order.
    pub(super) fn transparent(
        &mut self,
        top: &Spot<'_>,
        written: Option<OneOrMore<Listener>>,
        agents: &[Arc<Agent>],
        others: &[(Place, Entrance)],
    ) -> Vec<(Place, Entrance)> {
        let Some(OneOrMore(written)) = written else { return Vec::new() };
        let has_agents = top.key("agents").is_given();
        let mut listeners = Vec::new();
        for (spot, Listener(keys)) in each(top.key("transparent")).zip(written) {
            if !self.can_be_led_to(&spot, &keys) {
                continue;
            }
            if has_agents && !spot.key("user").is_given() && !spot.key("agent").is_given() {
                let what = "a redirected connection cannot show whose it is, and `agent` is missing";
                self.refuse(&spot, what, "write which of `agents` comes in here, and for which `user`");
            }
            let Some((place, entrance)) = self.listener(&spot, keys, agents, has_agents) else { continue };
            self.refuse_taken(&spot, &place, others);
            self.refuse_taken(&spot, &place, &listeners);
            listeners.push((place, entrance));
        }
        listeners
    }

    /// Refuses a place to which no packet filter leads what this machine's own programs send.
    fn can_be_led_to(&mut self, spot: &Spot<'_>, keys: &ListenerKeys) -> bool {
        let at = if spot.key("address").is_given() { spot.key("address") } else { spot.clone() };
        let what = match &keys.address {
            Some(Parsed(ListenPlace::Tcp(address))) if !address.ip().is_loopback() => {
                "connections are redirected to an address of this machine that no other reaches"
            }
            Some(Parsed(ListenPlace::Unix(_))) => "no connection is redirected to a Unix socket",
            _ => return true,
        };
        self.refuse(&at, what, "write `127.0.0.1:3131`; and `[::1]:3131` beside it, for IPv6");
        false
    }

    fn refuse_taken(&mut self, spot: &Spot<'_>, place: &Place, others: &[(Place, Entrance)]) {
        let open = place.address().is_some_and(|address| address.port() == 0);
        if !open && others.iter().any(|(other, _)| is_same(other, place)) {
            self.refuse(spot, "another listener is at this place", "give each its own port or path");
        }
    }

    fn listener(
        &mut self,
        spot: &Spot<'_>,
        keys: ListenerKeys,
        agents: &[Arc<Agent>],
        has_agents: bool,
    ) -> Option<(Place, Entrance)> {
        let at = if spot.key("address").is_given() { spot.key("address") } else { spot.clone() };
        if keys.address.is_none() && !spot.key("address").is_given() {
            self.refuse(spot, "`address` is missing", "write where it listens, as in `127.0.0.1:3138`");
        }
        let agent = self.its_agent(spot, keys.agent, agents);
        let user = self.its_user(spot, keys.user, agent.as_deref());
        let Parsed(address) = keys.address?;
        let place = match address {
            ListenPlace::Tcp(address) => {
                self.refuse_open(&at, address, has_agents, user.is_some());
                if keys.mode.is_some() {
                    self.refuse(&spot.key("mode"), "only the file of a Unix socket has a mode", "leave it out");
                }
                Place::Tcp(address)
            }
            ListenPlace::Unix(path) => {
                let path = self.path(&at, &Parsed(path))?;
                if path.as_os_str().len() > LONGEST_SOCKET {
                    let what = format!("the path of a socket has at most {LONGEST_SOCKET} bytes");
                    self.refuse(&at, what, "choose a shorter folder, as `/run/sidebearer`");
                }
                Place::Unix { path, mode: keys.mode.map_or(0o600, |Parsed(FileMode(mode))| mode) }
            }
        };
        Some((place, Entrance { user, agent, shut: false }))
    }

    /// An address that other machines reach is for agents that show who they are.
    fn refuse_open(&mut self, spot: &Spot<'_>, address: SocketAddr, has_agents: bool, names_its_user: bool) {
        if address.ip().to_canonical().is_loopback() {
            return;
        }
        let what = "other machines could reach this address";
        if names_its_user {
            let hint = "a listener with a `user` asks nobody who they are; let it listen on `127.0.0.1`";
            self.refuse(spot, what, hint);
        } else if !has_agents {
            let hint = format!(
                "they could use your accounts; write `127.0.0.1:{}`, or say with `agents` who may",
                address.port()
            );
            self.refuse(spot, what, hint);
        }
    }

    fn its_agent(
        &mut self,
        spot: &Spot<'_>,
        written: Option<Parsed<Text>>,
        agents: &[Arc<Agent>],
    ) -> Option<Arc<Agent>> {
        let Parsed(Text(name)) = written?;
        let found = agents.iter().find(|agent| agent.name == name).cloned();
        if found.is_none() {
            let known: Vec<&str> = agents.iter().map(|agent| agent.name.as_str()).collect();
            let hint = match did_you_mean(&name, &known) {
                Some(hint) => hint,
                None if known.is_empty() => "there are none: add it under `agents`, or leave this out".to_owned(),
                None => format!("agents are {}", list(&known)),
            };
            self.refuse(&spot.key("agent"), format!("no agent is named `{name}`"), hint);
        }
        found
    }

    /// For whom a listener's callers act, if it says so.
    fn its_user(&mut self, spot: &Spot<'_>, written: Option<Parsed<Text>>, agent: Option<&Agent>) -> Option<UserName> {
        let at = spot.key("user");
        let Some(Parsed(Text(name))) = written else {
            return match agent.map(|agent| &agent.users)? {
                Users::These(these) if these.len() == 1 => Some(these[0].clone()),
                _ => {
                    let what = "its agent acts for more than one user, and `user` is missing";
                    self.refuse(spot, what, "write for whom its callers act");
                    None
                }
            };
        };
        let user: UserName = match name.parse() {
            Ok(user) => user,
            Err(error) => {
                self.refuse(&at, format!("{error}"), "write the name of a user");
                return None;
            }
        };
        if let Some(agent) = agent.filter(|agent| !agent.users.allow(&user)) {
            let what = format!("the agent `{}` may not act for `{user}`", agent.name);
            self.refuse(&at, what, "add the user to the agent's `users`");
        }
        Some(user)
    }

    /// The limits; those that are left out have their defaults.
    pub(super) fn limits(&mut self, spot: &Spot<'_>, written: schema::Limits) -> Limits {
        let usual = Limits::default();
        let mut time = |key, written: Option<Parsed<Duration>>, usual| match written {
            Some(Parsed(Duration::ZERO)) => {
                self.refuse(&spot.key(key), "nothing is done in no time", "write a longer one, as `10s`");
                usual
            }
            Some(Parsed(time)) => time,
            None => usual,
        };
        let limits = Limits {
            head_timeout: time("head_timeout", written.head_timeout, usual.head_timeout),
            idle_timeout: time("idle_timeout", written.idle_timeout, usual.idle_timeout),
            body_timeout: time("body_timeout", written.body_timeout, usual.body_timeout),
            write_timeout: time("write_timeout", written.write_timeout, usual.write_timeout),
            handshake_timeout: time("handshake_timeout", written.handshake_timeout, usual.handshake_timeout),
            connect_timeout: time("connect_timeout", written.connect_timeout, usual.connect_timeout),
            upstream_handshake_timeout: time(
                "upstream_handshake_timeout",
                written.upstream_handshake_timeout,
                usual.upstream_handshake_timeout,
            ),
            max_head: written.max_head.map_or(usual.max_head, |Parsed(Size(bytes))| bytes),
            max_headers: written.max_headers.map_or(usual.max_headers, |Parsed(Count(count))| count),
            max_connections: written.max_connections.map_or(usual.max_connections, |Parsed(Count(count))| count),
        };
        if !(Limits::LEAST_HEAD..=Limits::MOST_HEAD).contains(&limits.max_head) {
            self.refuse(&spot.key("max_head"), "a head has at least 8KiB and at most 16MiB", "write `256KiB`");
        }
        for (key, count, most) in [
            ("max_headers", limits.max_headers, Limits::MOST_HEADERS),
            ("max_connections", limits.max_connections, Limits::MOST_CONNECTIONS),
        ] {
            if count > most {
                self.refuse(&spot.key(key), format!("this is more than {most}"), "write a smaller number");
            }
        }
        limits
    }
}

/// The places of one value, or of each in a list.
fn each(spot: Spot<'_>) -> impl Iterator<Item = Spot<'_>> {
    let items: Vec<_> = spot.items().collect();
    if items.is_empty() { vec![spot] } else { items }.into_iter()
}

fn is_same(one: &Place, other: &Place) -> bool {
    match (one, other) {
        (Place::Tcp(one), Place::Tcp(other)) => one == other,
        (Place::Unix { path: one, .. }, Place::Unix { path: other, .. }) => one == other,
        _ => false,
    }
}
