//! Builds token requests (RFC 6749 sections 4.4 and 6).

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use url::Url;
use url::form_urlencoded::{self, Serializer};
use zeroize::Zeroizing;

use super::{ClientAuth, Provider};
use crate::secret::Secret;

/// What a token is asked for with.
#[derive(Debug, Clone, Copy)]
pub enum Ask<'a> {
    /// The client's own credentials (RFC 6749 section 4.4).
    ClientCredentials,
    /// A refresh token (RFC 6749 section 6).
    Refresh(&'a Secret),
}

/// A POST to a token endpoint, ready to be sent.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// Where to.
    pub url: Url,
    /// The whole Authorization value, when the client proves itself there.
    pub authorization: Option<Secret>,
    /// The body, an `application/x-www-form-urlencoded` one.
    pub body: Secret,
}

/// Asks `provider` for a token at `token_endpoint`.
///
/// A refresh names the configured scopes too, if there are any: several providers require it, and to name what was
/// granted is always allowed (RFC 6749 section 6).
pub fn request(provider: &Provider, token_endpoint: &Url, ask: Ask<'_>) -> TokenRequest {
    let scope = provider.target.scopes.join(" ");
    let mut fields = match ask {
        Ask::ClientCredentials => vec![("grant_type", "client_credentials")],
        Ask::Refresh(token) => vec![("grant_type", "refresh_token"), ("refresh_token", token.expose())],
    };
    if !scope.is_empty() {
        fields.push(("scope", &scope));
    }
    fields.extend(provider.target.audience.iter().map(|audience| ("audience", audience.as_str())));
    fields.extend(provider.target.resource.iter().map(|resource| ("resource", resource.as_str())));
    fields.extend(provider.params.iter().map(|(name, value)| (name.as_str(), value.expose())));

    let secret = provider.client_secret.as_ref().map(Secret::expose);
    let authorization = match provider.client_auth {
        ClientAuth::Basic => Some(basic(&provider.client_id, secret.unwrap_or_default())),
        ClientAuth::Post => {
            fields.push(("client_id", &provider.client_id));
            fields.extend(secret.map(|secret| ("client_secret", secret)));
            None
        }
        ClientAuth::None => {
            fields.push(("client_id", &provider.client_id));
            None
        }
    };
    TokenRequest { url: token_endpoint.clone(), authorization, body: form(&fields) }
}

/// `client_secret_basic`: each part is form-urlencoded before they are joined, so that a colon, a `%` or a non-ASCII
/// letter in one of them arrives as itself (RFC 6749 section 2.3.1).
fn basic(id: &str, secret: &str) -> Secret {
    let mut pair = Zeroizing::new(String::with_capacity(3 * (id.len() + secret.len()) + 1));
    pair.extend(form_urlencoded::byte_serialize(id.as_bytes()));
    pair.push(':');
    pair.extend(form_urlencoded::byte_serialize(secret.as_bytes()));
    let encoded = Zeroizing::new(BASE64_STANDARD.encode(pair.as_bytes()));
    Secret::new(format!("Basic {}", *encoded))
}

fn form(fields: &[(&str, &str)]) -> Secret {
    // Large enough for all of it: a string that grows leaves copies of what it held in freed memory.
    let capacity = fields.iter().map(|(name, value)| 3 * (name.len() + value.len()) + 2).sum();
    Secret::new(Serializer::new(String::with_capacity(capacity)).extend_pairs(fields).finish())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Endpoint, Grant, Target};
    use super::*;

    fn endpoint() -> Url {
        "https://login.test/token".parse().unwrap()
    }

    fn provider(client_auth: ClientAuth) -> Provider {
        Provider {
            name: "acme".parse().unwrap(),
            endpoint: Endpoint::Token(endpoint()),
            client_id: "id:1".into(),
            client_secret: Some(Secret::new("p%w é")),
            client_auth,
            grant: Grant::ClientCredentials,
            target: Target::default(),
            params: Vec::new(),
            refresh_on: Vec::new(),
            refresh_before: Duration::from_secs(300),
            default_lifetime: None,
        }
    }

    fn sent(provider: &Provider, ask: Ask<'_>) -> String {
        request(provider, &endpoint(), ask).body.expose().to_owned()
    }

    #[test]
    fn basic_urlencodes_both_parts_before_it_joins_them() {
        let request = request(&provider(ClientAuth::Basic), &endpoint(), Ask::ClientCredentials);
        let expected = format!("Basic {}", BASE64_STANDARD.encode("id%3A1:p%25w+%C3%A9"));
        assert_eq!(request.authorization.unwrap().expose(), expected);
        assert_eq!(request.body.expose(), "grant_type=client_credentials");
        assert_eq!(request.url, endpoint());
    }

    #[test]
    fn post_and_none_name_the_client_in_the_body() {
        let post = request(&provider(ClientAuth::Post), &endpoint(), Ask::ClientCredentials);
        assert_eq!(post.authorization, None);
        let fields = "grant_type=client_credentials&client_id=id%3A1";
        assert_eq!(post.body.expose(), format!("{fields}&client_secret=p%25w+%C3%A9"));
        assert_eq!(sent(&provider(ClientAuth::None), Ask::ClientCredentials), fields);
    }

    #[test]
    fn a_refresh_sends_the_token_and_the_configured_scopes() {
        // TOK-036
        let mut acme = provider(ClientAuth::Basic);
        let token = Secret::new("r&t=1");
        assert_eq!(sent(&acme, Ask::Refresh(&token)), "grant_type=refresh_token&refresh_token=r%26t%3D1");
        acme.target.scopes = vec!["a".into(), "b:c".into()];
        let fields = "grant_type=refresh_token&refresh_token=r%26t%3D1&scope=a+b%3Ac";
        assert_eq!(sent(&acme, Ask::Refresh(&token)), fields);
    }

    #[test]
    fn audience_resources_and_parameters_are_sent_each() {
        let mut acme = provider(ClientAuth::Basic);
        acme.target.audience = Some("https://api.test".into());
        acme.target.resource = vec!["https://a.test/".into(), "https://b.test/".into()];
        acme.params = vec![("tenant".into(), Secret::new("1 2"))];
        let fields = "grant_type=client_credentials&audience=https%3A%2F%2Fapi.test\
                      &resource=https%3A%2F%2Fa.test%2F&resource=https%3A%2F%2Fb.test%2F&tenant=1+2";
        assert_eq!(sent(&acme, Ask::ClientCredentials), fields);
    }

    #[test]
    fn a_printed_request_holds_no_secret() {
        // LEK-003
        let token = Secret::new("canary");
        let request = request(&provider(ClientAuth::Post), &endpoint(), Ask::Refresh(&token));
        let shown = format!("{request:?}");
        assert!(!shown.contains("canary") && !shown.contains("p%25w"), "{shown}");
    }
}
