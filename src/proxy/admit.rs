//! Refuses, before anything else, the requests that hyper lets through and should not.

use http::header::{CONTENT_LENGTH, EXPECT, TRANSFER_ENCODING};
use http::{Request, Version};

use super::headers::Pseudonym;
use super::reject::Reject;

/// Refuses what hyper lets through and two readers could understand in two ways (SEMANTICS H2, H4, C8).
pub(super) fn check<B>(request: &Request<B>, own: &Pseudonym) -> Result<(), Reject> {
    let headers = request.headers();
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(encoding) = encodings.next() {
        let clean = encoding.as_bytes().eq_ignore_ascii_case(b"chunked") && encodings.next().is_none();
        let allowed = request.version() == Version::HTTP_11 && !headers.contains_key(CONTENT_LENGTH);
        if !clean || !allowed {
            return Err(Reject::Framing);
        }
    }
    if own.is_in(headers) {
        return Err(Reject::Loop);
    }
    match headers.get(EXPECT) {
        Some(expect) if !expect.as_bytes().eq_ignore_ascii_case(b"100-continue") => Err(Reject::Expectation),
        _ => Ok(()),
    }
}

/// Refuses a second token beside ours (RFC 6750 section 2): the API may take the one for the other, and act for somebody
/// whom the agent chose. In a form's body, which streams by, it is not looked for.
pub(super) fn one_token(query: Option<&str>) -> Result<(), Reject> {
    // Some servers still part a query at `;` too.
    let fields = query.unwrap_or_default().split(['&', ';']);
    let named = |field: &str| url::form_urlencoded::parse(field.as_bytes()).any(|(name, _)| name == "access_token");
    if fields.into_iter().any(named) { Err(Reject::TokenInQuery) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use http::header::HeaderName;

    use super::super::headers;
    use super::*;

    fn map(fields: &[(&'static str, &str)]) -> HeaderMap {
        fields.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    #[test]
    fn framing_that_can_be_read_two_ways_is_refused() {
        // SEC-051, SEC-053
        let own = Pseudonym::random();
        let verdict = |fields: &[(&'static str, &str)], version| {
            let mut request = Request::builder().version(version).body(()).unwrap();
            *request.headers_mut() = map(fields);
            check(&request, &own).is_ok()
        };
        assert!(verdict(&[("transfer-encoding", "chunked")], Version::HTTP_11));
        assert!(verdict(&[("transfer-encoding", "Chunked")], Version::HTTP_11));
        assert!(!verdict(&[("transfer-encoding", "chunked")], Version::HTTP_10));
        assert!(!verdict(&[("transfer-encoding", "chunked"), ("content-length", "3")], Version::HTTP_11));
        for odd in ["identity, chunked", "chunked, chunked", ",chunked", "xchunked", "chunked;a=b", "\"chunked\""] {
            assert!(!verdict(&[("transfer-encoding", odd)], Version::HTTP_11), "{odd}");
        }
        assert!(!verdict(&[("expect", "200-ok")], Version::HTTP_11));
    }

    #[test]
    fn a_token_in_the_query_is_found_in_any_spelling_and_nothing_else_is() {
        // SEC-036
        for query in ["access_token=x", "a=1&access_token", "a=1;access_token=x", "%61ccess%5Ftoken=x", "access_token="]
        {
            assert!(one_token(Some(query)).is_err(), "{query}");
        }
        for query in ["", "token=x", "private_token=x", "access_tokens=x", "q=access_token", "input_access_token=x"] {
            assert!(one_token(Some(query)).is_ok(), "{query}");
        }
        assert!(one_token(None).is_ok());
    }

    #[test]
    fn a_request_that_we_sent_ourselves_is_a_loop() {
        // LST-002
        let own = Pseudonym::random();
        let mut headers = HeaderMap::new();
        headers::clean_request(&mut headers, &own);
        let mut request = Request::new(());
        *request.headers_mut() = headers;
        assert!(matches!(check(&request, &own), Err(Reject::Loop)));
        assert!(check(&request, &Pseudonym::random()).is_ok());
    }
}
