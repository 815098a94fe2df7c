//! Makes routes of what was decoded.

use std::collections::HashMap;

use super::Check;
use crate::config::decode::{did_you_mean, list};
use crate::config::leaf::{Parsed, RouteHost, Text};
use crate::config::locate::{Spot, is_plain};
use crate::config::schema;
use crate::routes::{Action, HostPattern, Retry, Route, UpstreamHttp};

impl Check<'_> {
    /// The routes, in file order.
    /// A route without a host is one for each of its provider's `hosts`.
    pub(super) fn routes(
        &mut self,
        top: &Spot<'_>,
        written: Vec<schema::Route>,
        hosts: &HashMap<String, Vec<RouteHost>>,
    ) -> Vec<Route> {
        let spot = top.key("routes");
        let providers = top.key("providers");
        let mut routes = Vec::new();
        for (spot, route) in spot.items().zip(written) {
            let made = self.route(&spot, &providers, route, hosts);
            routes.extend(made.into_iter().map(|route| (spot.clone(), route)));
        }
        self.refuse_same(&routes);
        self.refuse_half_plaintext(&routes);
        if !spot.is_given() || (routes.is_empty() && !spot.is_broken()) {
            let what = "there are no routes, so no request gets a token";
            self.warnings.push(self.document.mistake(&spot, what, None));
        }
        routes.into_iter().map(|(_, route)| route).collect()
    }

    fn route(
        &mut self,
        spot: &Spot<'_>,
        providers: &Spot<'_>,
        route: schema::Route,
        hosts: &HashMap<String, Vec<RouteHost>>,
    ) -> Vec<Route> {
        let usual = route.provider.as_ref().and_then(|Parsed(Text(provider))| hosts.get(provider));
        if !spot.key("host").is_given() && usual.is_none() {
            self.refuse(spot, "`host` is missing", "write the host that the route is for");
        }
        for (key, is_empty) in [
            ("paths", route.paths.as_ref().is_some_and(Vec::is_empty)),
            ("methods", route.methods.as_ref().is_some_and(Vec::is_empty)),
        ] {
            let spot = spot.key(key);
            if is_empty && spot.items().next().is_none() && !spot.has_broken_items() {
                self.refuse(&spot, "an empty list covers nothing", format!("leave out `{key}` to cover all"));
            }
        }
        let action = self.action(spot, providers, &route);
        let hosts = match (&route.host, usual) {
            (Some(Parsed(host)), _) => vec![host.clone()],
            (None, Some(usual)) if !spot.key("host").is_given() => usual.clone(),
            (None, _) => Vec::new(),
        };
        let Some(action) = action else { return Vec::new() };
        let plaintext = route.plaintext.unwrap_or(false);
        let made = |RouteHost { pattern, port }: RouteHost| {
            let written_port = port.map(|port| format!(":{port}")).unwrap_or_default();
            Route {
                name: format!("{} {pattern}{written_port}", spot.path).into(),
                host: pattern,
                port: port.unwrap_or(if plaintext { 80 } else { 443 }),
                paths: route.paths.iter().flatten().map(|Parsed(path)| path.clone()).collect(),
                methods: route.methods.iter().flatten().map(|Parsed(method)| method.clone()).collect(),
                action: action.clone(),
                plaintext,
                retry: match route.retry {
                    Some(schema::Retry::Never) => Retry::Never,
                    Some(schema::Retry::Once) | None => Retry::Once,
                },
                upstream_http: match route.upstream_http {
                    Some(schema::UpstreamHttp::H1) => UpstreamHttp::H1,
                    Some(schema::UpstreamHttp::Auto) | None => UpstreamHttp::Auto,
                },
                redact_reflections: route.redact_reflections.unwrap_or(false),
            }
        };
        hosts.into_iter().map(made).collect()
    }

    fn action(&mut self, spot: &Spot<'_>, providers: &Spot<'_>, route: &schema::Route) -> Option<Action> {
        let provider = spot.key("provider");
        let deny = spot.key("deny");
        match (&route.provider, route.deny) {
            (_, Some(true)) if provider.is_given() => {
                let hint = "leave out `deny` or `provider`";
                self.refuse(&deny, "the route cannot both use a provider and be denied", hint);
                None
            }
            (_, Some(true)) => Some(Action::Deny),
            (Some(Parsed(Text(name))), _) => {
                self.known_provider(&provider, providers, name);
                name.parse().ok().map(Action::Authenticate)
            }
            (None, _) => {
                if !provider.is_given() && !deny.is_broken() {
                    let hint = "write whose token the requests get, or `deny: true`";
                    self.refuse(spot, "`provider` is missing", hint);
                }
                None
            }
        }
    }

    fn known_provider(&mut self, spot: &Spot<'_>, providers: &Spot<'_>, name: &str) {
        let known: Vec<&str> = providers.keys().collect();
        if known.contains(&name) || providers.is_broken() {
            return;
        }
        let shown: Vec<&str> = known.into_iter().filter(|name| is_plain(name)).collect();
        let hint = match did_you_mean(name, &shown) {
            Some(hint) => hint,
            None if shown.is_empty() => "add it under `providers`".to_owned(),
            None => format!("providers are {}", list(&shown)),
        };
        // What was put in from outside may be a secret in the wrong place.
        let what = match spot.is_replaced() {
            true => "no provider has this name".to_owned(),
            false => format!("no provider is named `{name}`"),
        };
        self.refuse(spot, what, hint);
    }

    fn refuse_same(&mut self, routes: &[(Spot<'_>, Route)]) {
        let mut seen: HashMap<_, &str> = HashMap::new();
        for (spot, route) in routes {
            let mut paths: Vec<String> = route.paths.iter().map(ToString::to_string).collect();
            let mut methods: Vec<&str> = route.methods.iter().map(|method| method.as_str()).collect();
            paths.sort();
            paths.dedup();
            methods.sort();
            methods.dedup();
            let first = *seen.entry((&route.host, route.port, paths, methods)).or_insert(&spot.path);
            if first != spot.path {
                let what = format!("this covers the same requests as {first}");
                self.refuse(spot, what, "leave out one of them, or give them other `paths` or `methods`");
            }
        }
    }

    /// The proxy asks once per host and port whether to speak TLS, so no two routes may answer that differently.
    fn refuse_half_plaintext(&mut self, routes: &[(Spot<'_>, Route)]) {
        let mut seen: HashMap<(&HostPattern, u16), (&str, bool)> = HashMap::new();
        for (spot, route) in routes {
            seen.entry((&route.host, route.port)).or_insert((&spot.path, route.plaintext));
        }
        for (spot, route) in routes {
            let around = pattern_around(&route.host);
            let others = [Some(&route.host), around.as_ref()].into_iter().flatten();
            let other =
                others.filter_map(|host| seen.get(&(host, route.port))).find(|(_, plain)| *plain != route.plaintext);
            if let Some((first, _)) = other {
                let what = format!("{first} covers this host and port too, with another `plaintext`");
                self.refuse(spot, what, "a host and port is spoken to with TLS or without: give both the same");
            }
        }
    }
}

/// The wildcard that covers an exact host.
fn pattern_around(host: &HostPattern) -> Option<HostPattern> {
    match host {
        HostPattern::Exact(name) => {
            let (_, parent) = name.as_str().split_once('.')?;
            parent.parse().ok().map(HostPattern::AnyLabelUnder)
        }
        HostPattern::AnyLabelUnder(_) => None,
    }
}
