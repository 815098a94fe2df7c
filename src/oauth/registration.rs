//! A client's registration at a server: what is obtained under one is worth nothing under another, and is not shown there.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};
use url::Url;

use super::Provider;

/// Which server is spoken to, and as which client: a digest of both, as they are configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Registration([u8; 16]);

impl Registration {
    /// That of a provider. Its secret, how it is proven and what is discovered may change.
    pub fn of(provider: &Provider) -> Self {
        let mut digest = Sha256::new();
        digest.update(server(provider).map_or("", Url::as_str));
        // No URL has one.
        digest.update("\n");
        digest.update(&provider.client_id);
        let mut registration = Self::default();
        registration.0.copy_from_slice(&digest.finalize()[..16]);
        registration
    }
}

/// Where a provider's tokens come from, as far as that is configured.
pub fn server(provider: &Provider) -> Option<&Url> {
    let endpoints = &provider.endpoints;
    endpoints.token.as_ref().or_else(|| Some(&endpoints.issuer.as_ref()?.url))
}

impl fmt::Display for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Registration {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oauth::{Endpoints, Grant};

    #[test]
    fn another_server_or_client_is_another_registration_and_another_secret_is_not() {
        let of = |token: &str, client: &str| Provider {
            endpoints: Endpoints { token: token.parse().ok(), ..Endpoints::default() },
            ..Provider::new("acme".parse().unwrap(), client, Grant::RefreshToken)
        };
        let acme = of("https://acme.test/token", "id");
        let secret = Provider { client_secret: Some(crate::secret::Secret::new("s")), ..acme.clone() };
        assert_eq!(Registration::of(&acme), Registration::of(&secret));
        for other in [of("https://acme.test/other", "id"), of("https://acme.test/token", "other")] {
            assert_ne!(Registration::of(&acme), Registration::of(&other));
        }
        let registration = Registration::of(&acme);
        assert_eq!(registration.to_string().parse(), Ok(registration));
    }
}
