//! Reads authorization server metadata (RFC 8414, OpenID Connect Discovery 1.0).

use serde::Deserialize;
use url::Url;

use super::Endpoint;
use crate::host::is_local;

/// What an authorization server says of itself, as far as it is used here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Its name, to the letter.
    pub issuer: String,
    /// Where tokens come from.
    pub token_endpoint: Url,
    /// Where users consent.
    pub authorization_endpoint: Option<Url>,
    /// Where a device flow begins (RFC 8628 section 4).
    pub device_authorization_endpoint: Option<Url>,
    /// Where tokens are given back (RFC 7009).
    pub revocation_endpoint: Option<Url>,
    /// Whether every authorization response names the issuer (RFC 9207 section 3).
    pub names_itself: bool,
}

impl Metadata {
    /// One of the endpoints, if there is such a one.
    pub fn endpoint(&self, which: Endpoint) -> Option<&Url> {
        match which {
            Endpoint::Token | Endpoint::Refresh => Some(&self.token_endpoint),
            Endpoint::Authorization => self.authorization_endpoint.as_ref(),
            Endpoint::DeviceAuthorization => self.device_authorization_endpoint.as_ref(),
            Endpoint::Revocation => self.revocation_endpoint.as_ref(),
        }
    }
}

/// Why a metadata document was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// Not a JSON object with an `issuer` and a `token_endpoint`.
    #[error("the metadata is not a JSON object with `issuer` and `token_endpoint`")]
    Unreadable,
    /// Somebody else's document, which anyone can publish (RFC 8414 section 6.2).
    #[error("the metadata names another issuer than `{expected}`")]
    OtherIssuer {
        /// The issuer that was asked.
        expected: Url,
    },
    /// An endpoint that would give secrets away.
    #[error("the metadata's `{member}` is not an https URL without user and fragment")]
    BadEndpoint {
        /// Which one.
        member: &'static str,
    },
}

/// Where the metadata of `issuer` may be, likeliest first.
///
/// RFC 8414 section 3.1 puts the well-known part before the issuer's path; OpenID Connect Discovery section 4 puts it
/// behind; some servers follow the one with the other's name.
pub fn candidates(issuer: &Url) -> Vec<Url> {
    let path = issuer.path().trim_end_matches('/');
    let at = |path: String| {
        let mut url = issuer.clone();
        url.set_path(&path);
        url.set_query(None);
        url.set_fragment(None);
        url
    };
    let mut candidates = vec![
        at(format!("/.well-known/oauth-authorization-server{path}")),
        at(format!("/.well-known/openid-configuration{path}")),
        at(format!("{path}/.well-known/openid-configuration")),
    ];
    candidates.dedup();
    candidates
}

/// Reads the metadata document that one of the [`candidates`] of `issuer` answered with.
///
/// # Errors
/// When it is not a metadata document, when its `issuer` is not `issuer` to the letter (RFC 8414 section 3.3), and
/// when an endpoint is neither https nor, for an issuer that is itself http on this machine, on this machine too.
pub fn read(issuer: &Url, body: &[u8]) -> Result<Metadata, MetadataError> {
    let document: Document = serde_json::from_slice(body).map_err(|_| MetadataError::Unreadable)?;
    if !same_issuer(issuer, &document.issuer) {
        return Err(MetadataError::OtherIssuer { expected: issuer.clone() });
    }
    let optional = |which: Endpoint, url: &Option<String>| {
        url.as_deref().map(|url| endpoint(issuer, which.name(), url)).transpose()
    };
    Ok(Metadata {
        token_endpoint: endpoint(issuer, "token_endpoint", &document.token_endpoint)?,
        authorization_endpoint: optional(Endpoint::Authorization, &document.authorization_endpoint)?,
        device_authorization_endpoint: optional(
            Endpoint::DeviceAuthorization,
            &document.device_authorization_endpoint,
        )?,
        revocation_endpoint: optional(Endpoint::Revocation, &document.revocation_endpoint)?,
        names_itself: document.authorization_response_iss_parameter_supported.unwrap_or(false),
        issuer: document.issuer,
    })
}

#[derive(Deserialize)]
struct Document {
    issuer: String,
    token_endpoint: String,
    authorization_endpoint: Option<String>,
    device_authorization_endpoint: Option<String>,
    revocation_endpoint: Option<String>,
    authorization_response_iss_parameter_supported: Option<bool>,
}

/// Whether an issuer calls itself by the name that it is known by: simple string comparison, except that `Url` writes a `/` for an empty path, which nobody wrote in the document.
fn same_issuer(expected: &Url, found: &str) -> bool {
    let expected_text = expected.as_str();
    found == expected_text || (expected.path() == "/" && expected_text.strip_suffix('/') == Some(found))
}

fn endpoint(issuer: &Url, member: &'static str, text: &str) -> Result<Url, MetadataError> {
    let bad = MetadataError::BadEndpoint { member };
    let Ok(url) = Url::parse(text) else { return Err(bad) };
    let private = url.scheme() == "https" || (is_local_http(issuer) && is_local_http(&url));
    let plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
    if private && plain { Ok(url) } else { Err(bad) }
}

fn is_local_http(url: &Url) -> bool {
    is_local(url) && url.scheme() == "http"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    fn read_json(issuer: &str, document: &serde_json::Value) -> Result<Metadata, MetadataError> {
        read(&url(issuer), document.to_string().as_bytes())
    }

    #[test]
    fn the_well_known_part_goes_before_the_path_and_behind_it() {
        let at = |issuer| candidates(&url(issuer)).iter().map(Url::to_string).collect::<Vec<_>>();
        let with_path = [
            "https://as.test/.well-known/oauth-authorization-server/tenant/1",
            "https://as.test/.well-known/openid-configuration/tenant/1",
            "https://as.test/tenant/1/.well-known/openid-configuration",
        ];
        assert_eq!(at("https://as.test/tenant/1"), with_path);
        assert_eq!(at("https://as.test/tenant/1/"), with_path);
        let without_path = [
            "https://as.test:8443/.well-known/oauth-authorization-server",
            "https://as.test:8443/.well-known/openid-configuration",
        ];
        assert_eq!(at("https://as.test:8443"), without_path);
    }

    #[test]
    fn a_document_is_read() {
        let document = json!({
            "issuer": "https://as.test",
            "token_endpoint": "https://as.test/token",
            "revocation_endpoint": "https://as.test/revoke",
            "authorization_endpoint": "https://as.test/authorize",
            "authorization_response_iss_parameter_supported": true,
        });
        let expected = Metadata {
            issuer: "https://as.test".into(),
            token_endpoint: url("https://as.test/token"),
            authorization_endpoint: Some(url("https://as.test/authorize")),
            device_authorization_endpoint: None,
            revocation_endpoint: Some(url("https://as.test/revoke")),
            names_itself: true,
        };
        assert_eq!(read_json("https://as.test", &document), Ok(expected));
    }

    #[test]
    fn an_issuer_is_the_same_to_the_letter_or_not_at_all() {
        // OAU-011
        let read_as = |issuer, found| {
            read_json(issuer, &json!({ "issuer": found, "token_endpoint": "https://as.test/token" })).is_ok()
        };
        assert!(read_as("https://as.test", "https://as.test"));
        assert!(read_as("https://as.test", "https://as.test/"));
        assert!(read_as("https://as.test/a", "https://as.test/a"));
        for other in [
            "https://as.test/a/",
            "https://as.test/A",
            "https://AS.test/a",
            "https://as.test:443/a",
            "https://as.test",
            "",
        ] {
            assert!(!read_as("https://as.test/a", other), "{other}");
        }
        assert!(!read_as("https://as.test/a/", "https://as.test/a"));
    }

    #[test]
    fn an_endpoint_that_gives_secrets_away_is_refused() {
        // OAU-011, OAU-012
        let taken = |issuer: &str, endpoint: &str| {
            read_json(issuer, &json!({ "issuer": issuer, "token_endpoint": endpoint })).is_ok()
        };
        for bad in [
            "http://as.test/token",
            "http://127.0.0.1/token",
            "https://user@as.test/token",
            "https://:pw@as.test/token",
            "https://as.test/token#part",
            "javascript:alert(1)",
            "file:///etc/passwd",
            "/token",
            "",
        ] {
            assert!(!taken("https://as.test", bad), "{bad}");
        }
        assert!(taken("http://127.0.0.1:8080/", "http://127.0.0.1:8080/token"));
        assert!(taken("http://localhost:8080/", "http://[::1]:8080/token"));
        assert!(!taken("http://127.0.0.1:8080/", "http://as.test/token"));
        let document = json!({
            "issuer": "https://as.test",
            "token_endpoint": "https://as.test/token",
            "revocation_endpoint": "http://as.test/revoke",
        });
        let error = read_json("https://as.test", &document).unwrap_err();
        let said = "the metadata's `revocation_endpoint` is not an https URL without user and fragment";
        assert_eq!(error.to_string(), said);
    }

    #[test]
    fn what_is_no_metadata_is_said_to_be_none() {
        for body in
            ["", "<html>", "{}", "null", r#"{"issuer":"https://as.test"}"#, r#"{"issuer":1,"token_endpoint":2}"#]
        {
            assert_eq!(read(&url("https://as.test"), body.as_bytes()), Err(MetadataError::Unreadable), "{body}");
        }
    }
}
