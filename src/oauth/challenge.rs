//! Reads WWW-Authenticate (RFC 9110 section 11.6.1, RFC 6750 section 3).

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

use super::is_scope;

/// What a resource server says is wrong with the token that it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// `invalid_token`: expired, revoked or malformed; another one may do (RFC 6750 section 3.1).
    InvalidToken,
    /// `insufficient_scope`: a fresh token of the same grant fares no better (RFC 6750 section 3.1).
    InsufficientScope,
    /// `use_dpop_nonce`: the proof is at fault, not the token (RFC 9449 section 9).
    UseDpopNonce,
}

impl Verdict {
    fn from_code(code: &[u8]) -> Option<Self> {
        match code {
            b"invalid_token" => Some(Verdict::InvalidToken),
            b"insufficient_scope" => Some(Verdict::InsufficientScope),
            b"use_dpop_nonce" => Some(Verdict::UseDpopNonce),
            _ => None,
        }
    }
}

/// What the first Bearer challenge says; where that says nothing, what a DPoP challenge says about its nonce.
///
/// `None` when no challenge gives one of the three reasons, which is the usual 401.
pub fn verdict(headers: &HeaderMap) -> Option<Verdict> {
    let challenges = challenges(headers);
    let first = |scheme: &str| challenges.iter().find(|c| c.scheme.eq_ignore_ascii_case(scheme.as_bytes()));
    let bearer = first("Bearer").and_then(Challenge::verdict);
    // A DPoP challenge's other errors speak of a token type that is not sent from here.
    bearer.or_else(|| first("DPoP").and_then(Challenge::verdict).filter(|v| *v == Verdict::UseDpopNonce))
}

/// The scopes that the first Bearer challenge asks for (RFC 6750 section 3), without what is none.
pub fn scopes(headers: &HeaderMap) -> Vec<String> {
    let challenges = challenges(headers);
    let bearer = challenges.iter().find(|c| c.scheme.eq_ignore_ascii_case(b"Bearer"));
    let listed = bearer.and_then(|bearer| String::from_utf8(bearer.scope.clone()?).ok()).unwrap_or_default();
    let mut scopes: Vec<String> =
        listed.split_ascii_whitespace().filter(|scope| is_scope(scope)).take(50).map(str::to_owned).collect();
    scopes.sort();
    scopes.dedup();
    scopes
}

/// One challenge: all that matters of it.
struct Challenge<'a> {
    scheme: &'a [u8],
    error: Option<Vec<u8>>,
    scope: Option<Vec<u8>>,
}

impl Challenge<'_> {
    fn verdict(&self) -> Option<Verdict> {
        Verdict::from_code(self.error.as_deref()?)
    }
}

/// All challenges of all header lines, in order. What cannot be read is passed over.
fn challenges(headers: &HeaderMap) -> Vec<Challenge<'_>> {
    let mut found: Vec<Challenge<'_>> = Vec::new();
    for element in headers.get_all(WWW_AUTHENTICATE).iter().flat_map(|line| elements(line.as_bytes())) {
        // An element is `name=value`, or a scheme with or without a first parameter behind it.
        let parameter = if is_parameter(element) {
            element
        } else {
            let (scheme, parameter) = split_token(element);
            found.push(Challenge { scheme, error: None, scope: None });
            parameter.trim_ascii()
        };
        if let Some(challenge) = found.last_mut() {
            challenge.error = challenge.error.take().or_else(|| value_of(parameter, b"error"));
            challenge.scope = challenge.scope.take().or_else(|| value_of(parameter, b"scope"));
        }
    }
    found
}

/// The elements of a list: split at commas, but not at those inside quotes.
fn elements(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (mut quoted, mut escaped) = (false, false);
    let separator = move |byte: &u8| {
        let literal = std::mem::take(&mut escaped);
        match byte {
            b'\\' if quoted && !literal => escaped = true,
            b'"' if !literal => quoted = !quoted,
            b',' => return !quoted,
            _ => {}
        }
        false
    };
    line.split(separator).map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}

/// Whether a `=` follows the first token. A token68's `=` comes behind a scheme and a space.
fn is_parameter(element: &[u8]) -> bool {
    split_token(element).1.trim_ascii_start().starts_with(b"=")
}

fn split_token(element: &[u8]) -> (&[u8], &[u8]) {
    let end = element.iter().position(|b| b.is_ascii_whitespace() || *b == b'=').unwrap_or(element.len());
    element.split_at(end)
}

/// The value of `parameter`, if this is its name.
fn value_of(parameter: &[u8], wanted: &[u8]) -> Option<Vec<u8>> {
    let (name, rest) = split_token(parameter);
    if !name.eq_ignore_ascii_case(wanted) {
        return None;
    }
    let value = rest.trim_ascii_start().strip_prefix(b"=")?.trim_ascii();
    Some(value.strip_prefix(b"\"").map_or_else(|| value.to_vec(), unquote))
}

/// A quoted-string's content (RFC 9110 section 5.6.4), from behind its first quote.
fn unquote(quoted: &[u8]) -> Vec<u8> {
    let mut content = Vec::new();
    let mut bytes = quoted.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => break,
            b'\\' => content.extend(bytes.next()),
            _ => content.push(*byte),
        }
    }
    content
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn said(lines: &[&[u8]]) -> Option<Verdict> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_bytes(line).unwrap());
        }
        verdict(&headers)
    }

    #[test]
    fn the_first_bearer_challenge_decides() {
        // OAU-013
        let table: &[(&[&[u8]], Option<Verdict>)] = &[
            (&[], None),
            (&[b"Bearer"], None),
            (&[b"Bearer realm=\"x\""], None),
            (&[b"Bearer error=\"invalid_token\""], Some(Verdict::InvalidToken)),
            (&[b"bEARER  ERROR = \"invalid_token\""], Some(Verdict::InvalidToken)),
            (&[b"Bearer error=invalid_token"], Some(Verdict::InvalidToken)),
            (&[b"Bearer realm=\"a\", error=\"insufficient_scope\", scope=\"b\""], Some(Verdict::InsufficientScope)),
            (&[b"Bearer realm=\"a, error=\\\"x\", error=\"invalid_token\""], Some(Verdict::InvalidToken)),
            (&[b"Bearer realm=\"Bearer error=invalid_token, error=invalid_token\""], None),
            (&[b"Basic realm=\"a, b\", Bearer error=\"invalid_token\""], Some(Verdict::InvalidToken)),
            (&[b"Negotiate abc==, Bearer error=\"invalid_token\""], Some(Verdict::InvalidToken)),
            (&[b"Basic error=\"invalid_token\""], None),
            (&[b"Basic realm=\"a\"", b"Bearer error=\"invalid_token\""], Some(Verdict::InvalidToken)),
            (&[b"Bearer realm=\"a\"", b"Bearer error=\"invalid_token\""], None),
            (&[b"Bearer error=\"other\", error=\"invalid_token\""], None),
            (&[b"Bearererror=\"invalid_token\""], None),
            (&[b"Bearer,error=\"invalid_token\""], Some(Verdict::InvalidToken)),
            (&[b"Bearer error=\"invalid\\_token\""], Some(Verdict::InvalidToken)),
            (&[b"Bearer error=\"invalid_token"], Some(Verdict::InvalidToken)),
            (&[b"Bearer error_description=\"error=invalid_token\""], None),
            (&[b"Bearer error=\"\xff\xfe\""], None),
            (&[b", ,,Bearer error=\"invalid_token\",,"], Some(Verdict::InvalidToken)),
            (&[b"= , Bearer error=\"invalid_token\""], Some(Verdict::InvalidToken)),
        ];
        for (lines, expected) in table {
            let shown: Vec<_> = lines.iter().map(|line| String::from_utf8_lossy(line)).collect();
            assert_eq!(said(lines), *expected, "{shown:?}");
        }
    }

    #[test]
    fn a_nonce_is_asked_for_by_either_scheme() {
        assert_eq!(said(&[b"DPoP error=\"use_dpop_nonce\""]), Some(Verdict::UseDpopNonce));
        assert_eq!(said(&[b"Bearer error=\"use_dpop_nonce\""]), Some(Verdict::UseDpopNonce));
        assert_eq!(said(&[b"Bearer, DPoP error=\"use_dpop_nonce\""]), Some(Verdict::UseDpopNonce));
        assert_eq!(said(&[b"DPoP error=\"invalid_token\""]), None);
    }

    #[test]
    fn a_huge_header_is_read_in_one_pass() {
        // OAU-013
        for filler in ["\"", ",", "\\\"", "a=", "Bearer ", "a=\"b\","] {
            let mut line = filler.repeat(64 * 1024 / filler.len());
            line.push_str(", Bearer error=\"invalid_token\"");
            said(&[line.as_bytes()]);
        }
    }

    #[test]
    fn the_scopes_that_are_missing_are_read() {
        let asked = |line: &'static str| {
            let mut headers = HeaderMap::new();
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(line));
            scopes(&headers).join(",")
        };
        assert_eq!(asked("Bearer error=\"insufficient_scope\", scope=\"repo admin:org repo\""), "admin:org,repo");
        assert_eq!(asked("Basic scope=\"a\", Bearer scope=b"), "b");
        assert_eq!(asked("Bearer error=\"insufficient_scope\""), "");
        assert_eq!(asked("Bearer scope=\"a \\\" \\\\ b\""), "a,b");
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(lines in prop::collection::vec("[\"\\\\,= \taBbearer]{0,40}|\\PC{0,60}", 0..4)) {
            let lines: Vec<&[u8]> = lines.iter().map(String::as_bytes).collect();
            said(&lines);
        }

        #[test]
        fn a_quoted_realm_never_hides_or_feigns_an_error(realm in "[ -~]{0,40}") {
            let realm = realm.replace('\\', "\\\\").replace('"', "\\\"");
            let (silent, telling) =
                (format!("Bearer realm=\"{realm}\""), format!("Bearer realm=\"{realm}\", error=\"invalid_token\""));
            prop_assert_eq!(said(&[silent.as_bytes()]), None);
            prop_assert_eq!(said(&[telling.as_bytes()]), Some(Verdict::InvalidToken));
        }
    }
}
