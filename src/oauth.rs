//! OAuth 2.0 as plain data: what a provider is, what is asked of it, what it answers. No I/O, no clock.

pub mod challenge;
pub mod grant;
pub mod metadata;
pub mod wire;

use std::time::Duration;

use http::StatusCode;
use url::Url;

use crate::names::ProviderName;
use crate::secret::Secret;

/// An authorization server as one client sees it: one entry of `providers:` in `proxy.yaml`.
#[derive(Debug, Clone)]
pub struct Provider {
    /// Its name in `proxy.yaml`.
    pub name: ProviderName,
    /// Where tokens come from.
    pub endpoint: Endpoint,
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
    /// Which answers, besides 401, say that a token is no longer good (SEMANTICS C1).
    pub refresh_on: Vec<StatusCode>,
    /// How long before its end a token is renewed, at most.
    pub refresh_before: Duration,
    /// The lifetime of a token whose answer names none; without one, only a 401 ends it.
    pub default_lifetime: Option<Duration>,
}

/// Where a provider's token endpoint is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// The token endpoint itself.
    Token(Url),
    /// The issuer identifier, from which it is discovered (RFC 8414, then OpenID Connect Discovery).
    Issuer(Url),
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
    /// RFC 6749 section 6, with a refresh token from the store.
    RefreshToken,
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
