//! Makes providers of what was decoded.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use url::{Host, Url};

use super::Check;
use crate::config::leaf::{Parameter, Parsed, ProviderUrl, Resource, Scope, Status, Text};
use crate::config::locate::Spot;
use crate::config::schema::{self, Entries};
use crate::names::ProviderName;
use crate::oauth::{ClientAuth, Endpoint, Grant, Provider, Target};
use crate::secret::Secret;

/// The parameters of a token request that are made from other keys, or from none.
const OUR_PARAMETERS: [&str; 12] = [
    "grant_type",
    "client_id",
    "client_secret",
    "client_assertion",
    "client_assertion_type",
    "refresh_token",
    "scope",
    "audience",
    "resource",
    "code",
    "code_verifier",
    "redirect_uri",
];

impl Check<'_> {
    /// The providers, in file order.
    pub(super) fn providers(
        &mut self,
        spot: &Spot<'_>,
        entries: Option<Entries<schema::Provider>>,
    ) -> Vec<Arc<Provider>> {
        let entries = entries.map(|entries| entries.0).unwrap_or_default();
        let mut providers = Vec::new();
        for (spot, (name, provider)) in spot.entries().zip(entries) {
            providers.extend(self.provider(&spot, &name, provider).map(Arc::new));
        }
        providers
    }

    /// Every part is looked at before any is given up, so that all mistakes are found.
    fn provider(&mut self, spot: &Spot<'_>, name: &str, provider: schema::Provider) -> Option<Provider> {
        let parsed = name.parse::<ProviderName>();
        if let Err(error) = &parsed {
            self.refuse(spot, error.to_string(), "choose another name, here and in the routes");
        }
        let endpoint = self.endpoint(spot, &provider);
        if !spot.key("client_id").is_given() {
            self.refuse(spot, "`client_id` is missing", "the provider gave it to you when you registered the client");
        }
        let client_auth = self.client_auth(spot, &provider);
        let asked = self.grant(spot, provider.client_credentials, provider.refresh_token);
        let default_lifetime = provider.default_lifetime.map(|Parsed(lifetime)| lifetime);
        if default_lifetime.is_some_and(|lifetime| lifetime.is_zero()) {
            let hint = "leave it out if only a 401 ends a token";
            self.refuse(&spot.key("default_lifetime"), "no token lives for no time", hint);
        }
        let Asked { grant, target, params } = asked?;
        Some(Provider {
            name: parsed.ok()?,
            endpoint: endpoint?,
            client_id: provider.client_id.map(|Parsed(Text(text))| text)?,
            client_secret: provider.client_secret.map(|Parsed(secret)| secret),
            client_auth,
            grant,
            target,
            params,
            refresh_on: statuses(provider.refresh_on.unwrap_or_default()),
            refresh_before: provider.refresh_before.map_or(Duration::from_secs(300), |Parsed(before)| before),
            default_lifetime,
        })
    }

    fn endpoint(&mut self, spot: &Spot<'_>, provider: &schema::Provider) -> Option<Endpoint> {
        let article = spot.key("token_url");
        let token = if article.is_given() { article } else { spot.key("token_endpoint") };
        let issuer = spot.key("issuer");
        if token.is_given() && issuer.is_given() {
            let what = "`issuer` and `token_endpoint` both say where tokens come from";
            self.refuse(&issuer, what, "leave out one of them");
        }
        if !token.is_given() && !issuer.is_given() {
            self.refuse(spot, "`token_endpoint` is missing", "write it, or `issuer` to have it discovered");
        }
        let insecure = provider.allow_http == Some(true) || spot.key("allow_http").is_broken();
        if let Some(Parsed(ProviderUrl(url))) = &provider.token_endpoint {
            self.scheme(&token, url, insecure);
            return Some(Endpoint::Token(url.clone()));
        }
        let Parsed(ProviderUrl(url)) = provider.issuer.as_ref()?;
        self.scheme(&issuer, url, insecure);
        if url.query().is_some() {
            self.refuse(&issuer, "an issuer has no query", "leave out everything from `?` on");
        }
        Some(Endpoint::Issuer(url.clone()))
    }

    /// Secrets go there: only over TLS, or nowhere beyond this machine.
    fn scheme(&mut self, spot: &Spot<'_>, url: &Url, allow_http: bool) {
        let local = match url.host() {
            Some(Host::Domain(name)) => name == "localhost",
            Some(Host::Ipv4(ip)) => ip.is_loopback(),
            Some(Host::Ipv6(ip)) => ip.is_loopback(),
            None => false,
        };
        if url.scheme() == "https" || (local && allow_http) {
            return;
        }
        let hint = if local { "use `https`, or add `allow_http: true`" } else { "use `https`" };
        self.refuse(spot, "with `http`, the secrets that go there can be read on the way", hint);
    }

    fn client_auth(&mut self, provider: &Spot<'_>, written: &schema::Provider) -> ClientAuth {
        let spot = provider.key("client_auth");
        let has_secret = provider.key("client_secret").is_given();
        if has_secret && written.client_secret.is_some() {
            self.warn_of_a_secret(&provider.key("client_secret"));
        }
        let chosen = match written.client_auth {
            Some(schema::ClientAuth::ClientSecretBasic) => ClientAuth::Basic,
            Some(schema::ClientAuth::ClientSecretPost) => ClientAuth::Post,
            Some(schema::ClientAuth::None) => ClientAuth::None,
            None if has_secret => ClientAuth::Basic,
            None => ClientAuth::None,
        };
        match (chosen, has_secret) {
            (ClientAuth::Basic | ClientAuth::Post, false) => {
                let hint = "add it, or write `client_auth: none` for a public client";
                self.refuse(&spot, "this needs a `client_secret`", hint);
            }
            (ClientAuth::None, true) => {
                let hint = "leave out `client_secret`, or choose `client_secret_basic` or `client_secret_post`";
                self.refuse(&spot, "with this, the `client_secret` is of no use", hint);
            }
            _ => {}
        }
        chosen
    }

    /// The one grant of a provider, and what is asked for with it.
    fn grant(
        &mut self,
        spot: &Spot<'_>,
        client_credentials: Option<schema::Grant>,
        refresh_token: Option<schema::Grant>,
    ) -> Option<Asked> {
        let client = spot.key("client_credentials");
        let user = spot.key("refresh_token");
        match (client.is_given(), user.is_given()) {
            (true, true) => {
                let later = if client.at > user.at { &client } else { &user };
                let hint = "leave out one of them, or make two providers";
                self.refuse(later, "a provider has one grant, and this is its second", hint);
            }
            (false, false) => {
                let hint =
                    "add `client_credentials: {}` for the client's own tokens, or `refresh_token: {}` for users'";
                self.refuse(spot, "the grant is missing", hint);
            }
            _ => {}
        }
        let client = client_credentials.map(|written| self.asked(&client, Grant::ClientCredentials, written));
        let user = refresh_token.map(|written| self.asked(&user, Grant::RefreshToken, written));
        client.or(user)
    }

    fn asked(&mut self, spot: &Spot<'_>, grant: Grant, written: schema::Grant) -> Asked {
        let mut scopes: Vec<String> =
            written.scopes.unwrap_or_default().into_iter().map(|Parsed(Scope(scope))| scope).collect();
        scopes.sort();
        scopes.dedup();
        let resource = written.resource.map(|list| list.0).unwrap_or_default();
        let target = Target {
            scopes,
            audience: written.audience.map(|Parsed(Text(audience))| audience),
            resource: resource.into_iter().map(|Parsed(Resource(resource))| resource).collect(),
        };
        let params = written.params.map(|entries| entries.0).unwrap_or_default();
        for (spot, (name, _)) in spot.key("params").entries().zip(&params) {
            if OUR_PARAMETERS.contains(&name.as_str()) {
                let hint = "`scopes`, `audience`, `resource` and the `client_` keys are for that";
                self.refuse(&spot, "this parameter is set by other keys", hint);
            }
        }
        let params = params.into_iter().map(|(name, Parsed(Parameter(value)))| (name, Secret::new(value))).collect();
        Asked { grant, target, params }
    }
}

/// A grant, and what is asked for with it.
struct Asked {
    grant: Grant,
    target: Target,
    params: Vec<(String, Secret)>,
}

/// The further ones: 401 says it in any case.
fn statuses(written: Vec<Parsed<Status>>) -> Vec<StatusCode> {
    let mut statuses: Vec<StatusCode> = written.into_iter().map(|Parsed(Status(status))| status).collect();
    statuses.retain(|status| *status != StatusCode::UNAUTHORIZED);
    statuses.sort();
    statuses.dedup();
    statuses
}
