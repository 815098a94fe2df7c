//! Builds the POSTs to a provider: token requests (RFC 6749, RFC 8628) and revocations (RFC 7009).

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use url::Url;
use url::form_urlencoded::{self, Serializer};
use zeroize::Zeroizing;

use super::{ClientAuth, Endpoint, Provider, TokenRequestFormat};
use crate::secret::Secret;

/// What a token is asked for with.
#[derive(Debug, Clone, Copy)]
pub enum Ask<'a> {
    /// The client's own credentials (RFC 6749 section 4.4).
    ClientCredentials,
    /// A refresh token (RFC 6749 section 6), and the scopes to ask for: none that was not granted.
    Refresh(&'a Secret, &'a [String]),
    /// The code that a user's consent has brought (RFC 6749 section 4.1.3, RFC 7636 section 4.5).
    Code {
        /// The code.
        code: &'a Secret,
        /// What the code was asked for with.
        verifier: &'a Secret,
        /// The redirect URI of the authorization request, to the letter.
        redirect_uri: &'a str,
    },
    /// A device code (RFC 8628 section 3.4).
    DeviceCode(&'a Secret),
}

impl Ask<'_> {
    /// Where it is asked.
    pub fn endpoint(&self) -> Endpoint {
        match self {
            Ask::Refresh(..) => Endpoint::Refresh,
            Ask::ClientCredentials | Ask::Code { .. } | Ask::DeviceCode(_) => Endpoint::Token,
        }
    }
}

/// A POST to a provider, ready to be sent.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// Where to.
    pub url: Url,
    /// The whole Authorization value, when the client proves itself there.
    pub authorization: Option<Secret>,
    /// How the body is written.
    pub format: TokenRequestFormat,
    /// The body.
    pub body: Secret,
}

/// Asks `provider` for a token at `token_endpoint`.
///
/// A refresh names its scopes too, if there are any: several providers require it, and to name what was granted is
/// always allowed (RFC 6749 section 6). The other two name them earlier, where the user is asked.
pub fn request(provider: &Provider, token_endpoint: &Url, ask: Ask<'_>) -> TokenRequest {
    let scope = scopes(provider, ask).join(" ");
    let mut fields = match ask {
        Ask::ClientCredentials => vec![("grant_type", "client_credentials")],
        Ask::Refresh(token, _) => vec![("grant_type", "refresh_token"), ("refresh_token", token.expose())],
        Ask::Code { code, verifier, redirect_uri } => vec![
            ("grant_type", "authorization_code"),
            ("code", code.expose()),
            ("redirect_uri", redirect_uri),
            ("code_verifier", verifier.expose()),
        ],
        Ask::DeviceCode(code) => vec![("grant_type", DEVICE_CODE), ("device_code", code.expose())],
    };
    if !scope.is_empty() {
        fields.push(("scope", &scope));
    }
    if matches!(ask, Ask::ClientCredentials | Ask::Refresh(..)) {
        fields.extend(provider.target.audience.iter().map(|audience| ("audience", audience.as_str())));
    }
    fields.extend(resources(provider));
    fields.extend(provider.params.iter().map(|(name, value)| (name.as_str(), value.expose())));
    signed(provider, token_endpoint, fields)
}

/// Begins a device flow (RFC 8628 section 3.1).
pub fn device_authorization(provider: &Provider, endpoint: &Url, scopes: &[String]) -> TokenRequest {
    let scope = scopes.join(&provider.quirks.scope_separator);
    let mut fields = Vec::new();
    if !scope.is_empty() {
        fields.push((provider.quirks.scope_parameter.as_str(), scope.as_str()));
    }
    fields.extend(provider.target.audience.iter().map(|audience| ("audience", audience.as_str())));
    fields.extend(resources(provider));
    if provider.client_auth == ClientAuth::Basic {
        // Named in the body as well: section 3.1 asks for it there.
        fields.push(("client_id", &provider.client_id));
    }
    signed(provider, endpoint, fields)
}

/// Gives a token back (RFC 7009 section 2.1). A refresh token takes its access tokens with it.
pub fn revocation(provider: &Provider, endpoint: &Url, token: &Secret, is_refresh_token: bool) -> TokenRequest {
    let hint = if is_refresh_token { "refresh_token" } else { "access_token" };
    signed(provider, endpoint, vec![("token", token.expose()), ("token_type_hint", hint)])
}

const DEVICE_CODE: &str = "urn:ietf:params:oauth:grant-type:device_code";

fn scopes<'a>(provider: &'a Provider, ask: Ask<'a>) -> Vec<&'a str> {
    match ask {
        Ask::ClientCredentials => provider.target.scopes.iter().map(String::as_str).collect(),
        Ask::Refresh(_, scopes) if provider.quirks.scopes_on_refresh => scopes.iter().map(String::as_str).collect(),
        Ask::Refresh(..) | Ask::Code { .. } | Ask::DeviceCode(_) => Vec::new(),
    }
}

fn resources(provider: &Provider) -> impl Iterator<Item = (&str, &str)> {
    provider.target.resource.iter().map(|resource| ("resource", resource.as_str()))
}

/// With the client's proof of who it is (RFC 6749 section 2.3).
fn signed<'a>(provider: &'a Provider, url: &Url, mut fields: Vec<(&'a str, &'a str)>) -> TokenRequest {
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
    let format = provider.quirks.token_request;
    let body = match format {
        TokenRequestFormat::Form => form(&fields),
        TokenRequestFormat::Json => json(&fields),
    };
    TokenRequest { url: url.clone(), authorization, format, body }
}

/// A field that comes twice, as `resource` may, becomes a list.
fn json(fields: &[(&str, &str)]) -> Secret {
    let mut object = serde_json::Map::new();
    for (name, value) in fields {
        let value = serde_json::Value::from(*value);
        match object.get_mut(*name) {
            Some(serde_json::Value::Array(all)) => all.push(value),
            Some(first) => *first = serde_json::Value::Array(vec![first.take(), value]),
            None => {
                object.insert((*name).to_owned(), value);
            }
        }
    }
    Secret::new(serde_json::Value::Object(object).to_string())
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
    use super::super::Grant;
    use super::*;

    fn endpoint() -> Url {
        "https://login.test/token".parse().unwrap()
    }

    fn provider(client_auth: ClientAuth) -> Provider {
        Provider {
            client_secret: Some(Secret::new("p%w é")),
            client_auth,
            ..Provider::new("acme".parse().unwrap(), "id:1", Grant::ClientCredentials)
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
    fn a_refresh_sends_the_token_and_its_scopes() {
        // TOK-036
        let mut acme = provider(ClientAuth::Basic);
        let token = Secret::new("r&t=1");
        assert_eq!(sent(&acme, Ask::Refresh(&token, &[])), "grant_type=refresh_token&refresh_token=r%26t%3D1");
        acme.target.scopes = vec!["not granted".into()];
        let scopes = ["a".to_owned(), "b:c".to_owned()];
        let fields = "grant_type=refresh_token&refresh_token=r%26t%3D1&scope=a+b%3Ac";
        assert_eq!(sent(&acme, Ask::Refresh(&token, &scopes)), fields);
        acme.quirks.scopes_on_refresh = false;
        assert_eq!(sent(&acme, Ask::Refresh(&token, &scopes)), "grant_type=refresh_token&refresh_token=r%26t%3D1");
    }

    #[test]
    fn a_code_is_redeemed_with_its_verifier_and_its_redirect_uri() {
        let mut acme = provider(ClientAuth::None);
        acme.grant = Grant::AuthorizationCode;
        acme.target.scopes = vec!["a".into()];
        acme.target.audience = Some("aud".into());
        acme.target.resource = vec!["urn:r".into()];
        let (code, verifier) = (Secret::new("c/1"), Secret::new("v"));
        let ask = Ask::Code { code: &code, verifier: &verifier, redirect_uri: "http://127.0.0.1:1/callback" };
        let fields = "grant_type=authorization_code&code=c%2F1&redirect_uri=http%3A%2F%2F127.0.0.1%3A1%2Fcallback\
                      &code_verifier=v&resource=urn%3Ar&client_id=id%3A1";
        assert_eq!(sent(&acme, ask), fields);
        let device = "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Adevice_code&device_code=c%2F1\
                      &resource=urn%3Ar&client_id=id%3A1";
        assert_eq!(sent(&acme, Ask::DeviceCode(&code)), device);
        let start = device_authorization(&acme, &endpoint(), &acme.target.scopes);
        assert_eq!(start.body.expose(), "scope=a&audience=aud&resource=urn%3Ar&client_id=id%3A1");
    }

    #[test]
    fn a_provider_that_wants_json_gets_json() {
        let mut acme = provider(ClientAuth::Basic);
        acme.quirks.token_request = TokenRequestFormat::Json;
        acme.target.resource = vec!["urn:a".into(), "urn:b".into(), "urn:c".into()];
        let sent = sent(&acme, Ask::ClientCredentials);
        let sent: serde_json::Value = serde_json::from_str(&sent).unwrap();
        let expected =
            serde_json::json!({ "grant_type": "client_credentials", "resource": ["urn:a", "urn:b", "urn:c"] });
        assert_eq!(sent, expected);
    }

    #[test]
    fn a_token_is_given_back_with_the_clients_proof() {
        let request = revocation(&provider(ClientAuth::Post), &endpoint(), &Secret::new("rt"), true);
        let fields = "token=rt&token_type_hint=refresh_token&client_id=id%3A1&client_secret=p%25w+%C3%A9";
        assert_eq!(request.body.expose(), fields);
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
        let request = request(&provider(ClientAuth::Post), &endpoint(), Ask::Refresh(&token, &[]));
        let shown = format!("{request:?}");
        assert!(!shown.contains("canary") && !shown.contains("p%25w"), "{shown}");
    }
}
