//! Which route a request takes: host, then path, then method. The only look-up on the hot path.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use http::Method;

use crate::host::{Authority, Host, HostError, HostName};
use crate::names::ProviderName;

/// One entry of `routes:` in `proxy.yaml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// How logs and `check` name it: its place in the file and its host.
    pub name: Arc<str>,
    /// The hosts it covers.
    pub host: HostPattern,
    /// The one port it covers.
    pub port: u16,
    /// The paths it covers; empty for all.
    pub paths: Vec<PathPattern>,
    /// The methods it covers, compared exactly; empty for all.
    pub methods: Vec<Method>,
    /// What to do with a request that it covers.
    pub action: Action,
    /// Whether the upstream is spoken to without TLS.
    pub plaintext: bool,
    /// Whether a 401 is answered with a second try.
    pub retry: Retry,
    /// The protocol spoken to the upstream.
    pub upstream_http: UpstreamHttp,
    /// Whether a token is taken out of answers that repeat it.
    pub redact_reflections: bool,
}

/// What a route does with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send it with this provider's token.
    Authenticate(ProviderName),
    /// Refuse it.
    Deny,
}

/// What happens to a 401 (SEMANTICS C6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Retry {
    /// The token is renewed and the request is sent once more.
    #[default]
    Once,
    /// The token is renewed, and the 401 goes to the agent.
    Never,
}

/// The protocol spoken to an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum UpstreamHttp {
    /// Whatever ALPN chooses.
    #[default]
    Auto,
    /// HTTP/1.1 only.
    H1,
}

/// What happens to a request that no route covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unmatched {
    /// Its bytes are passed on, unseen and without a token.
    #[default]
    Tunnel,
    /// It is refused.
    Deny,
}

/// The host of a route: a name, or `*.` and a name for exactly one more label, as in a certificate.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostPattern {
    /// This host.
    Exact(HostName),
    /// Every host that is this name with one label before it.
    AnyLabelUnder(HostName),
}

impl HostPattern {
    /// The name in the pattern, without `*.`.
    pub fn base(&self) -> &HostName {
        match self {
            HostPattern::Exact(name) | HostPattern::AnyLabelUnder(name) => name,
        }
    }
}

impl FromStr for HostPattern {
    type Err = HostPatternError;

    fn from_str(text: &str) -> Result<Self, HostPatternError> {
        let Some(base) = text.strip_prefix("*.") else {
            if text.contains('*') {
                return Err(HostPatternError::Star);
            }
            return Ok(HostPattern::Exact(text.parse()?));
        };
        let base: HostName = base.parse()?;
        if !base.as_str().contains('.') {
            return Err(HostPatternError::TooWide);
        }
        Ok(HostPattern::AnyLabelUnder(base))
    }
}

/// Why the host of a route was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostPatternError {
    /// Not a host name.
    #[error(transparent)]
    Host(#[from] HostError),
    /// `*` somewhere else than as the whole first label.
    #[error("`*` can only be the whole first label, as in `*.example.com`")]
    Star,
    /// `*.com`.
    #[error("a wildcard must leave at least two labels, as in `*.example.com`")]
    TooWide,
}

/// A path of a route: literal text, `*` for anything within a segment, a final `/**` for everything below.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PathPattern {
    segments: Vec<String>,
    below: bool,
}

impl PathPattern {
    fn matches(&self, path: &CleanPath) -> bool {
        let given = &path.segments;
        let long_enough =
            if self.below { given.len() >= self.segments.len() } else { given.len() == self.segments.len() };
        long_enough && self.segments.iter().zip(given).all(|(pattern, segment)| glob(pattern, segment))
    }

    /// More literal segments first, then more literal text, then a closed end before an open one.
    fn specificity(&self) -> (usize, usize, bool) {
        let literal = self.segments.iter().map(|s| s.len() - s.matches('*').count()).sum();
        (self.segments.len(), literal, !self.below)
    }
}

impl FromStr for PathPattern {
    type Err = PathPatternError;

    fn from_str(text: &str) -> Result<Self, PathPatternError> {
        let rest = text.strip_prefix('/').ok_or(PathPatternError::NoSlash)?;
        if text.contains(['?', '#', '%', '\\', ';']) {
            return Err(PathPatternError::Character);
        }
        let (rest, below) = match rest.strip_suffix("**") {
            Some("") => ("", true),
            Some(head) => (head.strip_suffix('/').ok_or(PathPatternError::Stars)?, true),
            None => (rest, false),
        };
        if rest.contains("**") {
            return Err(PathPatternError::Stars);
        }
        let segments: Vec<String> =
            if below && rest.is_empty() { Vec::new() } else { rest.split('/').map(str::to_owned).collect() };
        // A last empty segment is a final slash, which is a path of its own.
        let closed = if below { &segments[..] } else { &segments[..segments.len() - 1] };
        if closed.iter().any(String::is_empty) || segments.iter().any(|s| s == "." || s == "..") {
            return Err(PathPatternError::Segment);
        }
        Ok(Self { segments, below })
    }
}

/// Why the path of a route was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathPatternError {
    /// It does not begin with `/`.
    #[error("a path begins with `/`")]
    NoSlash,
    /// It has a query, a fragment, an escape or a parameter.
    #[error("a path is matched decoded and without its query: it cannot have `?`, `#`, `%`, `\\` or `;`")]
    Character,
    /// `**` that is not a whole last segment.
    #[error("`**` can only be the whole last segment, as in `/v1/**`")]
    Stars,
    /// `//`, `/./` or `/../`.
    #[error("a path cannot have empty, `.` or `..` segments")]
    Segment,
}

/// A request's path that every server reads the same way: decoded, without dot segments.
struct CleanPath {
    segments: Vec<String>,
}

impl FromStr for CleanPath {
    type Err = AmbiguousPath;

    /// Refuses, rather than guesses: dot segments, empty segments, encoded separators, parameters, bad escapes.
    fn from_str(path: &str) -> Result<Self, AmbiguousPath> {
        let rest = path.strip_prefix('/').ok_or(AmbiguousPath)?;
        let raw: Vec<&str> = rest.split('/').collect();
        let last = raw.len() - 1;
        let mut segments = Vec::with_capacity(raw.len());
        for (place, segment) in raw.into_iter().enumerate() {
            let segment = decode(segment)?;
            let odd = |c: char| c.is_control() || matches!(c, '/' | '\\' | ';' | '%' | '?' | '#');
            if segment == "." || segment == ".." || segment.contains(odd) || (segment.is_empty() && place != last) {
                return Err(AmbiguousPath);
            }
            segments.push(segment);
        }
        Ok(Self { segments })
    }
}

/// A path that two servers could read differently, on a host whose routes depend on the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the path can be read in more than one way")]
pub struct AmbiguousPath;

/// All routes, ready to be asked.
#[derive(Debug, Default)]
pub struct Routes {
    /// Those of one host, on whatever port, in their order.
    exact: HashMap<HostName, Vec<Arc<Route>>>,
    /// By the name behind `*.`.
    wildcard: HashMap<HostName, Vec<Arc<Route>>>,
    hosts: Vec<HostPattern>,
}

impl Routes {
    /// Files the routes by host; among equals the one that comes first wins.
    pub fn new(routes: impl IntoIterator<Item = Route>) -> Self {
        let mut all = Self::default();
        for route in routes {
            let route = Arc::new(route);
            all.hosts.push(route.host.clone());
            match &route.host {
                HostPattern::Exact(name) => all.exact.entry(name.clone()).or_default().push(route),
                HostPattern::AnyLabelUnder(base) => all.wildcard.entry(base.clone()).or_default().push(route),
            }
        }
        all.hosts.sort();
        all.hosts.dedup();
        all
    }

    /// Every host pattern that some route names, sorted, each once.
    pub fn hosts(&self) -> &[HostPattern] {
        &self.hosts
    }

    /// Whether any route names this host and port.
    pub fn claims(&self, authority: &Authority) -> bool {
        self.candidates(authority).next().is_some()
    }

    /// Whether any route names this host, on whatever port.
    pub fn names(&self, host: &Host) -> bool {
        self.of_host(host).next().is_some()
    }

    /// Whether a route for this host and port speaks to the upstream without TLS.
    pub fn plaintext(&self, authority: &Authority) -> bool {
        self.candidates(authority).any(|route| route.plaintext)
    }

    /// The most specific route that covers a request; `path` is the request's, without its query.
    ///
    /// # Errors
    /// When a route of this host depends on the path, and the path can be read in more than one way.
    pub fn find(&self, to: &Authority, method: &Method, path: &str) -> Result<Option<&Arc<Route>>, AmbiguousPath> {
        let mut clean = None;
        if self.candidates(to).any(|route| !route.paths.is_empty()) {
            // Not on the asterisk-form of OPTIONS, which has no path.
            clean = if path == "*" { None } else { Some(path.parse::<CleanPath>()?) };
        }
        // Each by the path that covers this request: another path of the same route lends it no weight.
        let ranked = self.candidates(to).filter(|route| route.methods.is_empty() || route.methods.contains(method));
        let ranked = ranked.filter_map(|route| Some((rank(route, clean.as_ref())?, route)));
        let best = ranked.reduce(|best, other| if other.0 > best.0 { other } else { best });
        Ok(best.map(|(_, route)| route))
    }

    fn candidates(&self, authority: &Authority) -> impl Iterator<Item = &Arc<Route>> {
        self.of_host(&authority.host).filter(|route| route.port == authority.port)
    }

    fn of_host(&self, host: &Host) -> impl Iterator<Item = &Arc<Route>> {
        // Routes are by name only: an address in a request is never the name that it may belong to (SEC-005).
        let name = match host {
            Host::Name(name) => Some(name.as_str()),
            Host::Ip(_) => None,
        };
        let exact = name.and_then(|name| self.exact.get(name));
        let parent = name.and_then(|name| name.split_once('.')).map(|(_, parent)| parent);
        let wildcard = parent.and_then(|parent| self.wildcard.get(parent));
        exact.into_iter().chain(wildcard).flatten()
    }
}

/// How closely a route fits: an exact host, then the closest of its paths that covers the request, then a method.
type Rank = (bool, Option<(usize, usize, bool)>, bool);

/// A route's rank for a path, if it covers it at all.
fn rank(route: &Route, path: Option<&CleanPath>) -> Option<Rank> {
    let exact = matches!(route.host, HostPattern::Exact(_));
    let methods = !route.methods.is_empty();
    if route.paths.is_empty() {
        return Some((exact, None, methods));
    }
    let covering = route.paths.iter().filter(|pattern| path.is_some_and(|path| pattern.matches(path)));
    let closest = covering.map(PathPattern::specificity).max()?;
    Some((exact, Some(closest), methods))
}

/// `*` stands for any text within one segment.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

fn decode(segment: &str) -> Result<String, AmbiguousPath> {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| (b as char).to_digit(16)).ok_or(AmbiguousPath);
        bytes.push((digit()? * 16 + digit()?) as u8);
    }
    String::from_utf8(bytes).map_err(|_| AmbiguousPath)
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostPattern::Exact(name) => name.fmt(f),
            HostPattern::AnyLabelUnder(base) => write!(f, "*.{base}"),
        }
    }
}

impl fmt::Debug for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.segments.join("/"))?;
        match (self.below, self.segments.is_empty()) {
            (true, true) => f.write_str("**"),
            (true, false) => f.write_str("/**"),
            (false, _) => Ok(()),
        }
    }
}

impl fmt::Debug for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::{select, subsequence};

    use super::*;

    fn route(host: &str, paths: &[&str], methods: &[&str]) -> Route {
        Route {
            name: format!("{host} {paths:?} {methods:?}").into(),
            host: host.parse().unwrap(),
            port: 443,
            paths: paths.iter().map(|p| p.parse().unwrap()).collect(),
            methods: methods.iter().map(|m| m.parse().unwrap()).collect(),
            action: Action::Deny,
            plaintext: false,
            retry: Retry::Once,
            upstream_http: UpstreamHttp::Auto,
            redact_reflections: false,
        }
    }

    fn found(routes: &Routes, authority: &str, method: &str, path: &str) -> Result<Option<Arc<str>>, AmbiguousPath> {
        let authority = Authority::parse(authority, Some(443)).unwrap();
        let found = routes.find(&authority, &method.parse().unwrap(), path)?;
        Ok(found.map(|route| route.name.clone()))
    }

    #[test]
    fn the_most_specific_route_wins_host_then_path_then_method() {
        let any = route("*.api.test", &[], &[]);
        let exact = route("eu.api.test", &[], &[]);
        let below = route("eu.api.test", &["/v1/**"], &[]);
        let post = route("eu.api.test", &["/v1/**"], &["POST"]);
        let deep = route("eu.api.test", &["/v1/items/*"], &[]);
        let routes = Routes::new([any.clone(), exact.clone(), below.clone(), post.clone(), deep.clone()]);
        for (authority, method, path, expected) in [
            ("us.api.test", "GET", "/", &any),
            ("eu.api.test", "GET", "/", &exact),
            ("eu.api.test", "GET", "/v1/x", &below),
            ("eu.api.test", "POST", "/v1/x", &post),
            ("eu.api.test", "POST", "/v1/items/7", &deep),
        ] {
            assert_eq!(found(&routes, authority, method, path), Ok(Some(expected.name.clone())), "{authority} {path}");
        }
    }

    #[test]
    fn a_route_weighs_as_much_as_the_path_that_covers_the_request() {
        let open = route("api.test.example", &["/v1/a/b/c", "/**"], &[]);
        let closed = route("api.test.example", &["/admin/**"], &[]);
        let routes = Routes::new([open.clone(), closed.clone()]);
        assert_eq!(found(&routes, "api.test.example", "GET", "/admin/users"), Ok(Some(closed.name)));
        assert_eq!(found(&routes, "api.test.example", "GET", "/v1/a/b/c"), Ok(Some(open.name)));
    }

    #[test]
    fn a_host_that_only_looks_like_a_routed_one_is_not_it() {
        // SEC-020, SEC-021, SEC-005
        let routes = Routes::new([route("api.test.example", &[], &[]), route("*.wild.example", &[], &[])]);
        for authority in [
            "evilapi.test.example",
            "api.test.example.evil.example",
            "api.test.example:8443",
            "test.example",
            "wild.example",
            "a.b.wild.example",
            "192.0.2.1",
        ] {
            assert_eq!(found(&routes, authority, "GET", "/"), Ok(None), "{authority}");
        }
        assert!(found(&routes, "a.wild.example", "GET", "/").unwrap().is_some());
    }

    /// What the index answers, without one: every route is looked at.
    fn covers(route: &Route, host: &Host) -> bool {
        let Host::Name(name) = host else { return false };
        match &route.host {
            HostPattern::Exact(own) => own == name,
            HostPattern::AnyLabelUnder(base) => {
                name.as_str().split_once('.').is_some_and(|(_, parent)| parent == base.as_str())
            }
        }
    }

    fn any_route() -> impl Strategy<Value = Route> {
        let hosts = select(vec!["a.test", "*.a.test", "b.a.test", "*.b.a.test", "c.test"]);
        let paths = subsequence(vec!["/**", "/x", "/x/*", "/*/y"], 0..3);
        (hosts, select(vec![443, 8443]), paths, subsequence(vec!["GET", "POST"], 0..2))
            .prop_map(|(host, port, paths, methods)| Route { port, ..route(host, &paths, &methods) })
    }

    proptest! {
        #[test]
        fn the_index_finds_what_looking_at_every_route_finds(
            mut all in vec(any_route(), 0..12),
            host in select(vec!["a.test", "b.a.test", "c.b.a.test", "x.c.b.a.test", "c.test", "test", "192.0.2.1"]),
            port in select(vec![443, 8443, 80]),
            path in select(vec!["/", "/x", "/x/y", "/x/../y"]),
        ) {
            // Equals are told apart, so that the first of them has to win.
            for (place, route) in all.iter_mut().enumerate() {
                route.name = format!("routes[{place}]").into();
            }
            let to = Authority::parse(&format!("{host}:{port}"), None).unwrap();
            let candidates: Vec<_> = all.iter().filter(|route| route.port == port && covers(route, &to.host)).collect();
            let clean = path.parse::<CleanPath>();
            let expected = if clean.is_err() && candidates.iter().any(|route| !route.paths.is_empty()) {
                Err(AmbiguousPath)
            } else {
                let allowed = |route: &&&Route| route.methods.is_empty() || route.methods.contains(&Method::GET);
                let ranked = candidates.iter().rev().filter(allowed);
                // The last of the greatest, in reverse, is the first one.
                let best = ranked.filter_map(|route| Some((rank(route, clean.as_ref().ok())?, route)));
                Ok(best.max_by_key(|(rank, _)| *rank).map(|(_, route)| route.name.clone()))
            };
            let routes = Routes::new(all.clone());
            prop_assert_eq!(found(&routes, &format!("{host}:{port}"), "GET", path), expected);
            prop_assert_eq!(routes.claims(&to), !candidates.is_empty());
            prop_assert_eq!(routes.plaintext(&to), candidates.iter().any(|route| route.plaintext));
            prop_assert_eq!(routes.names(&to.host), all.iter().any(|route| covers(route, &to.host)));
        }
    }

    #[test]
    fn a_path_that_can_be_read_two_ways_is_refused_where_a_route_depends_on_it() {
        // SEC-047, SEC-048
        let strict = Routes::new([route("api.test", &["/allowed/**"], &[])]);
        for path in [
            "/allowed/../admin",
            "/allowed/%2e%2e/admin",
            "/allowed/%2E./admin",
            "/allowed/./x",
            "//allowed/x",
            "/allowed//x",
            "/allowed/x;y",
            "/allowed%2fx",
            "/allowed%5cx",
            "/allowed/\\x",
            "/allowed/%",
            "/allowed/%zz",
            "/allowed/%252e%252e/x",
            "/allowed/%00",
            "/allowed/%ff",
            "/x%3F/allowed/y",
            "/x%23/allowed/y",
        ] {
            assert_eq!(found(&strict, "api.test", "GET", path), Err(AmbiguousPath), "{path}");
        }
        assert!(found(&strict, "api.test", "GET", "/%61llowed/x").unwrap().is_some());
        assert_eq!(found(&strict, "api.test", "GET", "/admin"), Ok(None));
        assert_eq!(found(&strict, "api.test", "GET", "/allowedx"), Ok(None));

        let open = Routes::new([route("api.test", &[], &[])]);
        assert!(found(&open, "api.test", "GET", "/a/../b%2f").unwrap().is_some());
    }

    #[test]
    fn methods_are_compared_exactly() {
        // SEC-049
        let routes = Routes::new([route("api.test", &[], &["POST"])]);
        assert!(found(&routes, "api.test", "POST", "/").unwrap().is_some());
        assert_eq!(found(&routes, "api.test", "post", "/"), Ok(None));
    }

    #[test]
    fn a_star_stays_within_its_segment() {
        for (pattern, path, fits) in [
            ("/a/*", "/a/b", true),
            ("/a/*", "/a/b/c", false),
            ("/a/*", "/a", false),
            ("/a/**", "/a/b/c", true),
            ("/a/**", "/a", true),
            ("/**", "/", true),
            ("/", "/", true),
            ("/", "/a", false),
            ("/a/", "/a/", true),
            ("/a/", "/a", false),
            ("/r*s/x-*-y", "/repos/x-1-y", true),
            ("/r*s", "/rs", true),
            ("/ab*ba", "/aba", false),
        ] {
            let pattern: PathPattern = pattern.parse().unwrap();
            assert_eq!(pattern.matches(&path.parse().unwrap()), fits, "{pattern} {path}");
        }
    }

    #[test]
    fn a_pattern_that_covers_too_much_or_nothing_is_refused() {
        // CFG-002
        for host in ["*", "*.com", "a.*.com", "*x.example.com", "", "https://api.test", "api.test/x", "127.0.0.1", "*."]
        {
            assert!(host.parse::<HostPattern>().is_err(), "{host}");
        }
        for path in ["v1", "/v1/**/x", "/a**", "/a//b", "/a/../b", "/a?b", "/a#b", "/%61", ""] {
            assert!(path.parse::<PathPattern>().is_err(), "{path}");
        }
    }
}
