//! Finds out which proxies lead out: the one that the file names, or those of the environment.

use std::net::SocketAddr;

use super::Check;
use crate::config::leaf::{Parsed, ProxyChoice};
use crate::config::locate::Spot;
use crate::upstream::{NoProxy, Proxies, UpstreamProxy};

/// In the order in which curl looks at them. Not HTTP_PROXY: a web server may set it to what a request said.
const TUNNELS: [&str; 4] = ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
const PLAIN: [&str; 3] = ["http_proxy", "all_proxy", "ALL_PROXY"];
const NO_PROXY: [&str; 2] = ["no_proxy", "NO_PROXY"];

impl Check<'_> {
    /// Which proxies lead out. Without the key none does, whatever the environment says: it may name ourselves.
    pub(super) fn proxies(
        &mut self,
        top: &Spot<'_>,
        written: Option<Parsed<ProxyChoice>>,
        direct: Option<Vec<Parsed<NoProxy>>>,
        own: &[SocketAddr],
    ) -> Proxies {
        let (spot, exceptions) = (top.key("upstream_proxy"), top.key("no_proxy"));
        if !spot.is_given() && direct.as_ref().is_some_and(|direct| !direct.is_empty()) {
            let what = "it says nothing without `upstream_proxy`";
            self.warnings.push(self.document.mistake(&exceptions, what, None));
        }
        let direct = direct.into_iter().flatten().map(|Parsed(direct)| direct);
        match written {
            None => Proxies::default(),
            Some(Parsed(ProxyChoice::One(proxy))) => {
                self.one_proxy(&spot, &proxy, own);
                Proxies { plain: Some(proxy.clone()), tunnels: Some(proxy), direct: direct.collect() }
            }
            Some(Parsed(ProxyChoice::Environment)) => {
                let (tunnels, plain) = (self.named_proxy(&spot, &TUNNELS), self.named_proxy(&spot, &PLAIN));
                let direct = direct.chain(self.named_exceptions(&spot)).collect();
                let proxies = Proxies { tunnels, plain, direct };
                // No mistake, for `env` and `status` are asked in the very shells whose variables lead here. Nor is it
                // passed over: what is to go out through a proxy must not go out without one. So `run` does not start.
                if let Some(own) = proxies.all().find(|proxy| proxy.is_one_of(own)) {
                    let what = format!("the environment's proxy, {}, is this sidecar itself", own.authority);
                    self.warnings.push(self.document.mistake(&spot, what, None));
                }
                proxies
            }
        }
    }

    fn one_proxy(&mut self, spot: &Spot<'_>, proxy: &UpstreamProxy, own: &[SocketAddr]) {
        if proxy.has_credentials() {
            self.warn_of_a_secret(spot);
        }
        if proxy.is_one_of(own) {
            self.refuse(spot, "this is the sidecar itself", "name the company's proxy");
        }
    }

    /// The proxy of the first of these variables that is not empty.
    fn named_proxy(&mut self, spot: &Spot<'_>, names: &[&str]) -> Option<UpstreamProxy> {
        let (name, value) = self.first(names)?;
        // As others do, this takes `host:port`, too.
        let url = if value.contains("://") { value } else { format!("http://{value}") };
        match url.parse::<UpstreamProxy>() {
            Ok(proxy) => Some(proxy),
            Err(error) => {
                let what = format!("the variable `{name}`: {error}");
                let mistake = self.document.mistake(spot, what, error.hint().map(str::to_owned));
                // One variable may be asked for both.
                if !self.mistakes.contains(&mistake) {
                    self.mistakes.push(mistake);
                }
                None
            }
        }
    }

    /// What the environment has reached directly. Other programs know words that mean nothing here.
    fn named_exceptions(&mut self, spot: &Spot<'_>) -> Vec<NoProxy> {
        let Some((name, value)) = self.first(&NO_PROXY) else { return Vec::new() };
        let mut exceptions = Vec::new();
        for word in value.split([',', ' ']).filter(|word| !word.is_empty()) {
            match word.parse() {
                Ok(exception) => exceptions.push(exception),
                Err(error) => {
                    let what = format!("the variable `{name}`: `{word}` is passed over: {error}");
                    self.warnings.push(self.document.mistake(spot, what, None));
                }
            }
        }
        exceptions
    }

    fn first<'n>(&self, names: &[&'n str]) -> Option<(&'n str, String)> {
        names.iter().find_map(|name| {
            let value = (self.environment)(name).filter(|value| !value.is_empty())?;
            Some((*name, value))
        })
    }
}
