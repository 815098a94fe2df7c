//! Makes providers of what was decoded.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use url::Url;

use super::Check;
use crate::config::leaf::{IssuerUrl, Parameter, Parsed, ProviderUrl, Resource, Scope, Status, Text, Variable};
use crate::config::locate::Spot;
use crate::config::schema::{self, Entries};
use crate::host::is_local;
use crate::names::ProviderName;
use crate::oauth::{
    ClientAuth, Consent, Endpoints, Grant, OnMissing, Provider, Quirks, Target, TokenRequestFormat, authorization,
};
use crate::secret::Secret;

/// The parameters of a token request that are made from other keys, or from none.
const OUR_PARAMETERS: [&str; 13] = [
    "device_code",
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
    fn provider(&mut self, spot: &Spot<'_>, name: &str, mut provider: schema::Provider) -> Option<Provider> {
        let parsed = name.parse::<ProviderName>();
        if let Err(error) = &parsed {
            self.refuse(spot, error.to_string(), "choose another name, here and in the routes");
        }
        let endpoints = self.endpoints(spot, &provider);
        if !spot.key("client_id").is_given() {
            self.refuse(spot, "`client_id` is missing", "the provider gave it to you when you registered the client");
        }
        let client_auth = self.client_auth(spot, &provider);
        let asked = self.grant(spot, name, &mut provider);
        let default_lifetime = provider.default_lifetime.take().map(|Parsed(lifetime)| lifetime);
        if default_lifetime.is_some_and(|lifetime| lifetime.is_zero()) {
            let hint = "leave it out if only a 401 ends a token";
            self.refuse(&spot.key("default_lifetime"), "no token lives for no time", hint);
        }
        let on_missing = self.on_missing(spot, provider.on_missing.take().unwrap_or_default());
        let consent_params = self.authorization_params(spot, provider.authorization_params.take());
        let Asked { grant, target, params, redirect_uri } = asked?;
        let name = parsed.ok()?;
        Some(Provider {
            title: provider.title.take().map_or_else(|| name.to_string(), |Parsed(Text(title))| title),
            name,
            endpoints,
            client_id: provider.client_id.take().map(|Parsed(Text(text))| text)?,
            client_secret: provider.client_secret.take().map(|Parsed(secret)| secret),
            client_auth,
            grant,
            target,
            params,
            consent: Consent { redirect_uri, params: consent_params },
            refresh_on: statuses(provider.refresh_on.take().unwrap_or_default()),
            refresh_before: provider.refresh_before.take().map_or(Duration::from_secs(300), |Parsed(before)| before),
            default_lifetime,
            on_missing,
            manage_url: url(provider.manage_url.take()),
            placeholders: placeholders(provider.placeholders.take()),
            quirks: quirks(provider),
        })
    }

    /// Where it is spoken to. Whatever is left out is discovered from the issuer, if there is one.
    fn endpoints(&mut self, spot: &Spot<'_>, provider: &schema::Provider) -> Endpoints {
        let other_name = |name: &str, other: &str| {
            let other = spot.key(other);
            if other.is_given() { other } else { spot.key(name) }
        };
        let token = other_name("token_endpoint", "token_url");
        let authorization = other_name("authorization_endpoint", "auth_url");
        let issuer = spot.key("issuer");
        if !token.is_given() && !issuer.is_given() {
            self.refuse(spot, "`token_endpoint` is missing", "write it, or `issuer` to have it discovered");
        }
        if spot.key("authorization_code").is_given() && !authorization.is_given() && !issuer.is_given() {
            let hint = "write it, or `issuer` to have it discovered: it is where users consent";
            self.refuse(spot, "`authorization_endpoint` is missing", hint);
        }
        let insecure = provider.allow_http == Some(true) || spot.key("allow_http").is_broken();
        if let Some(Parsed(IssuerUrl(written))) = &provider.issuer {
            self.scheme(&issuer, &written.url, insecure);
            if written.url.query().is_some() {
                self.refuse(&issuer, "an issuer has no query", "leave out everything from `?` on");
            }
        }
        let mut checked = |spot: &Spot<'_>, url: &Option<Parsed<ProviderUrl>>| {
            let Parsed(ProviderUrl(url)) = url.as_ref()?;
            self.scheme(spot, url, insecure);
            Some(url.clone())
        };
        Endpoints {
            issuer: provider.issuer.as_ref().map(|Parsed(IssuerUrl(issuer))| issuer.clone()),
            token: checked(&token, &provider.token_endpoint),
            refresh: checked(&spot.key("refresh_endpoint"), &provider.refresh_endpoint),
            authorization: checked(&authorization, &provider.authorization_endpoint),
            device_authorization: checked(
                &spot.key("device_authorization_endpoint"),
                &provider.device_authorization_endpoint,
            ),
            revocation: checked(&spot.key("revocation_endpoint"), &provider.revocation_endpoint),
        }
    }

    /// Secrets go there: only over TLS, or nowhere beyond this machine.
    fn scheme(&mut self, spot: &Spot<'_>, url: &Url, allow_http: bool) {
        let local = is_local(url);
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
    fn grant(&mut self, spot: &Spot<'_>, name: &str, provider: &mut schema::Provider) -> Option<Asked> {
        let mut given: Vec<Spot<'_>> = ["client_credentials", "refresh_token", "authorization_code"]
            .iter()
            .map(|name| spot.key(name))
            .filter(Spot::is_given)
            .collect();
        given.sort_by_key(|grant| grant.at);
        if given.is_empty() {
            let hint = "add `client_credentials: {}` for the client's own tokens, `authorization_code: {}` to have users \
                        consent, or `refresh_token: {}` to act for users whose refresh tokens you have";
            self.refuse(spot, "the grant is missing", hint);
        }
        for further in given.iter().skip(1) {
            let hint = "leave out one of them, or make two providers";
            self.refuse(further, "a provider has one grant, and this is its second", hint);
        }
        let required = provider.required_scopes.take().unwrap_or_default();
        let client = provider.client_credentials.take();
        let client =
            client.map(|written| self.asked(&spot.key("client_credentials"), Grant::ClientCredentials, written));
        let user = provider.refresh_token.take();
        let user = user.map(|written| self.asked(&spot.key("refresh_token"), Grant::RefreshToken, written));
        let consent = provider.authorization_code.take().map(|written| {
            let spot = spot.key("authorization_code");
            let (mut written, redirect_uri) = written.split();
            written.scopes.get_or_insert_default().extend(required);
            let redirect_uri = redirect_uri.and_then(|uri| self.redirect_uri(&spot.key("redirect_uri"), name, uri));
            Asked { redirect_uri, ..self.asked(&spot, Grant::AuthorizationCode, written) }
        });
        client.or(user).or(consent)
    }

    /// Where a browser comes back to: a page of ours, which nobody on the way can read (RFC 8252 section 7.3), and no other
    /// provider's.
    fn redirect_uri(
        &mut self,
        spot: &Spot<'_>,
        name: &str,
        Parsed(ProviderUrl(uri)): Parsed<ProviderUrl>,
    ) -> Option<Url> {
        if uri.scheme() != "https" && !is_local(&uri) {
            self.refuse(spot, "with `http`, the code that comes there can be read on the way", "use `https`");
            return None;
        }
        let ours = uri.path() == "/callback" || uri.path().strip_prefix("/callback/") == Some(name);
        if !ours || uri.query().is_some() {
            let what = "this is not a page that Sidebearer has for this provider";
            self.refuse(spot, what, format!("its path is `/callback` or `/callback/{name}`, and it has no query"));
            return None;
        }
        Some(uri)
    }

    fn on_missing(&mut self, spot: &Spot<'_>, written: schema::OnMissing) -> OnMissing {
        let spot = spot.key("on_missing");
        let webhook = url(written.webhook);
        if let Some(url) = &webhook {
            // It carries a link that lets whoever has it connect an account.
            self.scheme(&spot.key("webhook"), url, true);
        }
        let command = written.command.unwrap_or_default().into_iter().map(|Parsed(Text(word))| word).collect();
        OnMissing { wait: written.wait.map_or(Duration::ZERO, |Parsed(wait)| wait), webhook, command }
    }

    fn authorization_params(
        &mut self,
        spot: &Spot<'_>,
        written: Option<Entries<Parsed<Parameter>>>,
    ) -> Vec<(String, String)> {
        let params = written.map(|entries| entries.0).unwrap_or_default();
        for (spot, (name, _)) in spot.key("authorization_params").entries().zip(&params) {
            if authorization::OUR_PARAMETERS.contains(&name.as_str()) {
                let hint = "`scopes`, `resource`, `redirect_uri` and `client_id` are for that";
                self.refuse(&spot, "this parameter is set by other keys", hint);
            }
        }
        params.into_iter().map(|(name, Parsed(Parameter(value)))| (name, value)).collect()
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
        Asked { grant, target, params, redirect_uri: None }
    }
}

/// A grant, and what is asked for with it.
struct Asked {
    grant: Grant,
    target: Target,
    params: Vec<(String, Secret)>,
    redirect_uri: Option<Url>,
}

fn quirks(written: schema::Provider) -> Quirks {
    let usual = Quirks::default();
    let texts = |list: Option<Vec<Parsed<Text>>>| list.unwrap_or_default().into_iter().map(|Parsed(Text(text))| text);
    Quirks {
        scope_separator: match written.scope_separator {
            Some(schema::ScopeSeparator::Comma) => ",".into(),
            Some(schema::ScopeSeparator::Space) | None => usual.scope_separator,
        },
        scope_parameter: written.scope_parameter.map_or(usual.scope_parameter, |Parsed(Text(name))| name),
        scopes_on_refresh: written.scopes_on_refresh.unwrap_or(usual.scopes_on_refresh),
        token_request: match written.token_request {
            Some(schema::TokenRequest::Json) => TokenRequestFormat::Json,
            Some(schema::TokenRequest::Form) | None => TokenRequestFormat::Form,
        },
        form_answers: written.form_answers.unwrap_or(false),
        token_member: written.token_member.map(|Parsed(Text(name))| name),
        token_types: texts(written.token_types).collect(),
        dead_grant_errors: texts(written.dead_grant_errors).collect(),
    }
}

fn url(written: Option<Parsed<ProviderUrl>>) -> Option<Url> {
    written.map(|Parsed(ProviderUrl(url))| url)
}

fn placeholders(written: Option<Vec<Parsed<Variable>>>) -> Vec<String> {
    written.unwrap_or_default().into_iter().map(|Parsed(Variable(name))| name).collect()
}

/// The further ones: 401 says it in any case.
fn statuses(written: Vec<Parsed<Status>>) -> Vec<StatusCode> {
    let mut statuses: Vec<StatusCode> = written.into_iter().map(|Parsed(Status(status))| status).collect();
    statuses.retain(|status| *status != StatusCode::UNAUTHORIZED);
    statuses.sort();
    statuses.dedup();
    statuses
}
