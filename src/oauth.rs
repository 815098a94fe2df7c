//! OAuth 2.0 as plain data: what a provider is, what is asked of it, what it answers. No I/O, no clock.

pub mod authorization;
pub mod challenge;
pub mod device;
pub mod grant;
pub mod metadata;
pub mod pkce;
pub mod registration;
pub mod wanted;
pub mod wire;

use std::str::FromStr;
use std::time::Duration;

use http::StatusCode;
use url::Url;

use crate::names::ProviderName;
use crate::secret::Secret;

/// An authorization server as one client sees it: one entry of `providers:` in `proxy.yaml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// Its name in `proxy.yaml`.
    pub name: ProviderName,
    /// What people call it.
    pub title: String,
    /// Where it is spoken to.
    pub endpoints: Endpoints,
    /// RFC 6749 section 2.2.
    pub client_id: String,
    /// RFC 6749 section 2.3.1; none for a public client.
    pub client_secret: Option<Secret>,
    /// How the client proves itself at the token endpoint.
    pub client_auth: ClientAuth,
    /// How tokens are come by.
    pub grant: Grant,
    /// What is asked for.
    pub target: Target,
    /// Further form parameters of a token request, as the provider wants them; some providers put secrets there.
    pub params: Vec<(String, Secret)>,
    /// What a consent needs besides.
    pub consent: Consent,
    /// Where it departs from the RFCs.
    pub quirks: Quirks,
    /// Which answers, besides 401, say that a token is no longer good (SEMANTICS C1).
    pub refresh_on: Vec<StatusCode>,
    /// How long before its end a token is renewed, at most.
    pub refresh_before: Duration,
    /// The lifetime of a token whose answer names none; without one, only a 401 ends it.
    pub default_lifetime: Option<Duration>,
    /// What happens to a request whose user has not connected.
    pub on_missing: OnMissing,
    /// Where a user takes access back by hand.
    pub manage_url: Option<Url>,
    /// Variables that programs insist on, although the token comes from here.
    pub placeholders: Vec<String>,
}

impl Provider {
    /// A provider with nothing unusual about it.
    pub fn new(name: ProviderName, client_id: impl Into<String>, grant: Grant) -> Self {
        Self {
            title: name.to_string(),
            name,
            endpoints: Endpoints::default(),
            client_id: client_id.into(),
            client_secret: None,
            client_auth: ClientAuth::None,
            grant,
            target: Target::default(),
            params: Vec::new(),
            consent: Consent::default(),
            quirks: Quirks::default(),
            refresh_on: Vec::new(),
            refresh_before: Duration::from_secs(300),
            default_lifetime: None,
            on_missing: OnMissing::default(),
            manage_url: None,
            placeholders: Vec::new(),
        }
    }
}

/// Where a provider is spoken to. What is left out is discovered from the issuer, if there is one (RFC 8414, then
/// OpenID Connect Discovery).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Endpoints {
    /// The issuer, which `iss` in an authorization response is compared with (RFC 9207).
    pub issuer: Option<Issuer>,
    /// Where tokens come from (RFC 6749 section 3.2).
    pub token: Option<Url>,
    /// Where refresh tokens go, at a provider that has another place for them.
    pub refresh: Option<Url>,
    /// Where users consent (RFC 6749 section 3.1).
    pub authorization: Option<Url>,
    /// Where a device flow begins (RFC 8628 section 3.1).
    pub device_authorization: Option<Url>,
    /// Where tokens are given back (RFC 7009).
    pub revocation: Option<Url>,
}

/// An issuer identifier (RFC 8414 section 2).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Issuer {
    /// Where it is.
    pub url: Url,
    /// What it calls itself, to the letter: `Url` writes a `/` for an empty path, and an issuer may not.
    pub name: String,
}

impl FromStr for Issuer {
    type Err = url::ParseError;

    fn from_str(name: &str) -> Result<Self, url::ParseError> {
        Ok(Self { url: name.parse()?, name: name.to_owned() })
    }
}

/// One of a provider's endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// Where tokens come from.
    Token,
    /// Where refresh tokens are redeemed.
    Refresh,
    /// Where users consent.
    Authorization,
    /// Where a device flow begins.
    DeviceAuthorization,
    /// Where tokens are given back.
    Revocation,
}

impl Endpoint {
    /// Its name in `proxy.yaml` and in metadata.
    pub fn name(self) -> &'static str {
        match self {
            Endpoint::Token | Endpoint::Refresh => "token_endpoint",
            Endpoint::Authorization => "authorization_endpoint",
            Endpoint::DeviceAuthorization => "device_authorization_endpoint",
            Endpoint::Revocation => "revocation_endpoint",
        }
    }
}

impl Endpoints {
    /// An endpoint that was written down.
    pub fn written(&self, which: Endpoint) -> Option<&Url> {
        match which {
            Endpoint::Token => self.token.as_ref(),
            Endpoint::Refresh => self.refresh.as_ref().or(self.token.as_ref()),
            Endpoint::Authorization => self.authorization.as_ref(),
            Endpoint::DeviceAuthorization => self.device_authorization.as_ref(),
            Endpoint::Revocation => self.revocation.as_ref(),
        }
    }
}

/// The client authentication methods of RFC 7591 section 2 that are spoken here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientAuth {
    /// `client_secret_basic`: in the Authorization header, each part form-urlencoded first.
    #[default]
    Basic,
    /// `client_secret_post`: in the body.
    Post,
    /// `none`: a public client, which only names itself.
    None,
}

/// The grant that a provider's tokens come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant {
    /// RFC 6749 section 4.4.
    ClientCredentials,
    /// RFC 6749 section 6, with a refresh token that was put into the store.
    RefreshToken,
    /// RFC 6749 section 4.1, with PKCE: users consent.
    AuthorizationCode,
}

impl Grant {
    /// Whether each user has a grant of their own.
    pub fn is_for_users(self) -> bool {
        !matches!(self, Grant::ClientCredentials)
    }
}

/// What a token is to be good for. Two requests with another target never share a token (SEMANTICS C4).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Target {
    /// Scope tokens, sorted (RFC 6749 section 3.3).
    pub scopes: Vec<String>,
    /// The `audience` parameter, which several providers define.
    pub audience: Option<String>,
    /// RFC 8707.
    pub resource: Vec<String>,
}

/// Whether this is a scope (RFC 6749 section 3.3), and no longer than anybody's.
pub fn is_scope(scope: &str) -> bool {
    (1..=256).contains(&scope.len()) && scope.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\'))
}

/// All scopes of both, sorted.
pub fn union(some: &[String], others: &[String]) -> Vec<String> {
    let mut all: Vec<String> = some.iter().chain(others).cloned().collect();
    all.sort();
    all.dedup();
    all
}

/// What a consent needs besides the target.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Consent {
    /// The one redirect URI that the provider allows, if it allows no other.
    pub redirect_uri: Option<Url>,
    /// Further parameters of the authorization request.
    pub params: Vec<(String, String)>,
}

/// Where a provider departs from the RFCs. The default is that it does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quirks {
    /// What stands between two scopes in an authorization request; a space in RFC 6749.
    pub scope_separator: String,
    /// The authorization request's parameter for them; `scope` in RFC 6749.
    pub scope_parameter: String,
    /// Whether a refresh names the scopes again.
    pub scopes_on_refresh: bool,
    /// How token requests are written.
    pub token_request: TokenRequestFormat,
    /// Whether token answers may be form-encoded.
    pub form_answers: bool,
    /// The member of a token answer that holds the tokens, if they are not at its top.
    pub token_member: Option<String>,
    /// Values of `token_type` that mean Bearer here, besides `Bearer` itself.
    pub token_types: Vec<String>,
    /// `error` codes that say, as `invalid_grant` does, that a grant is dead.
    pub dead_grant_errors: Vec<String>,
}

impl Default for Quirks {
    fn default() -> Self {
        Self {
            scope_separator: " ".into(),
            scope_parameter: "scope".into(),
            scopes_on_refresh: true,
            token_request: TokenRequestFormat::Form,
            form_answers: false,
            token_member: None,
            token_types: Vec::new(),
            dead_grant_errors: Vec::new(),
        }
    }
}

/// How token requests are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenRequestFormat {
    /// `application/x-www-form-urlencoded`, as RFC 6749 has it.
    #[default]
    Form,
    /// `application/json`.
    Json,
}

/// What happens to a request whose user has not connected.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OnMissing {
    /// How long it waits for the user; not at all when zero.
    pub wait: Duration,
    /// Where a message with the link is posted.
    pub webhook: Option<Url>,
    /// The program that gets the link as its last argument; empty for none.
    pub command: Vec<String>,
}
