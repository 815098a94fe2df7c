//! Makes the admin listener's settings, and the agents, of what was decoded.

use std::net::SocketAddr;
use std::sync::Arc;

use url::Url;

use super::Check;
use crate::config::decode::{did_you_mean, list};
use crate::config::leaf::{AdminAddress, Parsed, ProviderUrl, Text};
use crate::config::locate::{Spot, is_plain};
use crate::config::schema;
use crate::host::is_local;
use crate::names::{ProviderName, UserName};
use crate::proxy::caller::{Agent, Users};
use crate::secret::Secret;

/// Secrets that anybody may try have at least so many characters.
const SHORTEST: usize = 16;
const MAKE_ONE: &str = "make one with `openssl rand -hex 24`";

impl Check<'_> {
    /// Where the admin listener is; one that others can reach asks who they are.
    pub(in crate::config) fn admin(
        &mut self,
        top: &Spot<'_>,
        written: &Option<Parsed<AdminAddress>>,
        token: &Option<Parsed<Secret>>,
        public_url: &Option<Parsed<ProviderUrl>>,
    ) -> Option<SocketAddr> {
        let spot = top.key("admin");
        let open = token.is_none() && !top.key("admin_token").is_given();
        let off = matches!(written, Some(Parsed(AdminAddress(None))));
        // Whatever it listens on: something leads there from outside.
        if let Some(Parsed(ProviderUrl(url))) = public_url
            && open
            && !off
            && !is_local(url)
        {
            let what = "whoever finds this address could connect and disconnect accounts";
            self.refuse(&top.key("public_url"), what, "add `admin_token`");
        }
        let Some(Parsed(AdminAddress(address))) = written else {
            return (!spot.is_given()).then(|| SocketAddr::from(([127, 0, 0, 1], 3129)));
        };
        let local = address.is_none_or(|address| address.ip().to_canonical().is_loopback());
        if !local && open {
            let hint = "add `admin_token`, or let it listen on `127.0.0.1`";
            self.refuse(&spot, "other machines could reach this address, and connect and disconnect accounts", hint);
        }
        *address
    }

    /// Whether whoever is on this machine may have it stop.
    pub(super) fn quit(&mut self, spot: &Spot<'_>, written: Option<bool>, admin: Option<SocketAddr>) -> bool {
        let wanted = written.unwrap_or_default();
        if wanted && admin.is_none() {
            self.refuse(spot, "it is asked for at the admin listener, which is off", "leave out `admin: off`");
        }
        wanted
    }

    /// A secret that cannot be guessed.
    pub(in crate::config) fn long_secret(
        &mut self,
        spot: &Spot<'_>,
        written: Option<Parsed<Secret>>,
    ) -> Option<Secret> {
        let Parsed(secret) = written?;
        self.warn_of_a_secret(spot);
        if secret.expose().len() < SHORTEST {
            self.refuse(spot, format!("a secret of fewer than {SHORTEST} characters can be guessed"), MAKE_ONE);
        }
        Some(secret)
    }

    /// How browsers reach the admin listener: scheme, host and port.
    pub(super) fn public_url(&mut self, spot: &Spot<'_>, written: Option<Parsed<ProviderUrl>>) -> Option<Url> {
        let Parsed(ProviderUrl(url)) = written?;
        self.page(spot, &url);
        if url.path() != "/" {
            self.refuse(spot, "it has a path, and the pages have theirs", "write `https://connect.example.com` alone");
        }
        Some(url)
    }

    /// The pages that a consent may end at.
    pub(super) fn return_to(&mut self, spot: &Spot<'_>, written: Vec<Parsed<ProviderUrl>>) -> Vec<Url> {
        let mut pages = Vec::new();
        for (spot, Parsed(ProviderUrl(url))) in spot.items().zip(written) {
            self.page(&spot, &url);
            pages.push(url);
        }
        pages
    }

    /// A page that browsers are sent to.
    fn page(&mut self, spot: &Spot<'_>, url: &Url) {
        if url.scheme() != "https" && !is_local(url) {
            self.refuse(spot, "with `http`, what browsers send there can be read on the way", "use `https`");
        }
        if url.query().is_some() {
            self.refuse(spot, "it has a query", "leave out everything from `?` on");
        }
    }

    /// The agents, in file order.
    pub(super) fn agents(&mut self, top: &Spot<'_>, written: Option<Vec<schema::Agent>>) -> Vec<Arc<Agent>> {
        let spot = top.key("agents");
        let mut agents: Vec<Arc<Agent>> = Vec::new();
        let Some(written) = written else { return agents };
        if written.is_empty() && spot.items().next().is_none() && !spot.has_broken_items() {
            self.refuse(
                &spot,
                "an empty list lets nobody in",
                "leave out `agents` to let every caller of this machine in",
            );
        }
        for (spot, agent) in spot.items().zip(written) {
            let Some(agent) = self.agent(&spot, &top.key("providers"), agent) else { continue };
            if agents.iter().any(|other| other.name == agent.name) {
                self.refuse(&spot.key("name"), "another agent has this name", "give each its own");
            }
            if agents.iter().any(|other| other.secret == agent.secret) {
                self.refuse(
                    &spot.key("secret"),
                    "another agent has this secret",
                    "it says which agent it is: give each its own",
                );
            }
            agents.push(Arc::new(agent));
        }
        agents
    }

    fn agent(&mut self, spot: &Spot<'_>, providers: &Spot<'_>, written: schema::Agent) -> Option<Agent> {
        for (key, hint) in [
            ("name", "logs say it"),
            ("secret", MAKE_ONE),
            ("users", "write `[default]`, the names of those it acts for, or `[\"*\"]` for everyone"),
        ] {
            if !spot.key(key).is_given() {
                self.refuse(spot, format!("`{key}` is missing"), hint);
            }
        }
        let secret = self.long_secret(&spot.key("secret"), written.secret);
        let users = written.users.map(|users| self.users(&spot.key("users"), users));
        let allowed = written.providers.map(|names| self.allowed(&spot.key("providers"), providers, names));
        let Parsed(Text(name)) = written.name?;
        Some(Agent { name, secret: secret?, users: users?, providers: allowed })
    }

    fn users(&mut self, spot: &Spot<'_>, written: Vec<Parsed<Text>>) -> Users {
        if matches!(written.as_slice(), [Parsed(Text(star))] if star == "*") {
            return Users::All;
        }
        let mut users: Vec<UserName> = Vec::new();
        for (spot, Parsed(Text(name))) in spot.items().zip(written) {
            match name.parse() {
                Ok(_) if name == "*" => {
                    self.refuse(&spot, "`*` beside other names", "write `[\"*\"]` alone for everyone");
                }
                Ok(user) => users.push(user),
                Err(error) => self.refuse(&spot, error.to_string(), "write the name that the agent sends"),
            }
        }
        Users::These(users)
    }

    fn allowed(&mut self, spot: &Spot<'_>, providers: &Spot<'_>, written: Vec<Parsed<Text>>) -> Vec<ProviderName> {
        let known: Vec<&str> = providers.keys().filter(|name| is_plain(name)).collect();
        let mut allowed = Vec::new();
        for (spot, Parsed(Text(name))) in spot.items().zip(written) {
            if !known.contains(&name.as_str()) && !providers.is_broken() && !spot.is_replaced() {
                let hint = did_you_mean(&name, &known).unwrap_or_else(|| format!("providers are {}", list(&known)));
                self.refuse(&spot, format!("no provider is named `{name}`"), hint);
            }
            allowed.extend(name.parse());
        }
        allowed
    }
}
