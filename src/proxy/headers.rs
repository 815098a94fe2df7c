//! Header fields that must not pass, and those that must.

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderName, MAX_FORWARDS, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::{HeaderMap, HeaderValue, Method, Request, Version};

use crate::secret::PLACEHOLDER;

const ALT_SVC: HeaderName = HeaderName::from_static("alt-svc");
/// Where a user grants the scopes that an answer says are missing. Ours alone: an upstream's own is taken out.
pub(super) const CONNECT_URL: HeaderName = HeaderName::from_static("sidebearer-connect-url");
/// Fields for one connection only (RFC 9110 section 7.6.1), whether Connection names them or not. The framing is
/// hyper's to write anew; 100-continue is answered towards the agent when its body is asked for.
const HOP_BY_HOP: [HeaderName; 10] = [
    CONNECTION,
    TRANSFER_ENCODING,
    UPGRADE,
    EXPECT,
    PROXY_AUTHORIZATION,
    PROXY_AUTHENTICATE,
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("http2-settings"),
    TE,
];
/// Connection cannot nominate these away: they frame the message or say whom it is for.
const KEPT: [HeaderName; 3] = [CONTENT_LENGTH, HOST, TRANSFER_ENCODING];

/// How a proxy names itself in `Via` (RFC 9110 section 7.6.3).
pub(super) struct Pseudonym {
    name: String,
    value: HeaderValue,
}

impl Pseudonym {
    /// A name that no other process has.
    pub(super) fn random() -> Self {
        let name = format!("sidebearer-{:08x}", getrandom::u32().unwrap_or_else(|_| std::process::id()));
        let value = HeaderValue::try_from(format!("1.1 {name}")).unwrap_or(HeaderValue::from_static("1.1 sidebearer"));
        Self { name, value }
    }

    /// Whether a message has been here before.
    pub(super) fn is_in(&self, headers: &HeaderMap) -> bool {
        headers.get_all(VIA).iter().any(|via| contains(via.as_bytes(), self.name.as_bytes()))
    }
}

/// Whether an OPTIONS was to be answered here; otherwise takes one hop off it (RFC 9110 section 7.6.2).
pub(super) fn is_last_hop<B>(request: &mut Request<B>) -> bool {
    if *request.method() != Method::OPTIONS {
        return false;
    }
    let left = request.headers().get(MAX_FORWARDS).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    match left {
        Some(0) => true,
        Some(left) => {
            request.headers_mut().insert(MAX_FORWARDS, HeaderValue::from(left - 1));
            false
        }
        None => false,
    }
}

/// How many fields there are. Cookies are one, in however many crumbs an HTTP/2 agent sends them.
pub(super) fn fields(headers: &HeaderMap) -> usize {
    let crumbs = headers.get_all(COOKIE).iter().count();
    headers.len() - crumbs.saturating_sub(1)
}

/// The protocol that a request asks to change to, if it asks. Never HTTP/2 in the clear: requests inside it would go
/// past the routes, and an h1 answer is always allowed.
pub(super) fn upgrade(headers: &HeaderMap, version: Version) -> Option<HeaderValue> {
    let asked = version == Version::HTTP_11 && nominated(headers).any(|name| name == UPGRADE);
    let h2 = |protocol: &HeaderValue| contains(&protocol.as_bytes().to_ascii_lowercase(), b"h2c");
    headers.get(UPGRADE).filter(|protocol| asked && !h2(protocol)).cloned()
}

/// Makes an agent's header fields fit to go upstream.
pub(super) fn clean_request(headers: &mut HeaderMap, own: &Pseudonym) {
    let trailers = headers.get(TE).is_some_and(|te| contains(&te.as_bytes().to_ascii_lowercase(), b"trailers"));
    clean(headers);
    // Nobody steers a Sidebearer by a field, neither this one nor one further on. `Forwarded` and its like say nothing
    // here either: they go on as what they are, the agent's own word to the API.
    let ours: Vec<HeaderName> = headers.keys().filter(|name| is_ours(name)).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    join_cookies(headers);
    headers.append(VIA, own.value.clone());
}

/// Takes out the stand-ins for keys, in whatever field a client's own scheme puts them.
pub(super) fn remove_placeholders(headers: &mut HeaderMap) {
    let placeholder = |value: &HeaderValue| value.as_bytes().ends_with(PLACEHOLDER.as_bytes());
    let named: Vec<HeaderName> =
        headers.iter().filter(|(_, value)| placeholder(value)).map(|(name, _)| name.clone()).collect();
    for name in named {
        headers.remove(name);
    }
}

/// Makes an upstream's header fields fit to go to the agent.
pub(super) fn clean_response(headers: &mut HeaderMap, own: &Pseudonym) {
    clean(headers);
    // It would lead the agent around the proxy.
    headers.remove(ALT_SVC);
    headers.remove(CONNECT_URL);
    headers.append(VIA, own.value.clone());
}

/// Takes out of trailers what must never arrive as one (RFC 9110 section 6.5.1).
pub(super) fn clean_trailers(trailers: &mut HeaderMap) {
    clean(trailers);
    for name in [AUTHORIZATION, HOST, CONTENT_LENGTH, COOKIE, TE, TRAILER] {
        trailers.remove(name);
    }
}

fn is_ours(name: &HeaderName) -> bool {
    let name = name.as_str();
    name.strip_prefix("x-").unwrap_or(name).starts_with("sidebearer-")
}

fn clean(headers: &mut HeaderMap) {
    let nominated: Vec<HeaderName> = nominated(headers).filter(|name| !KEPT.contains(name)).collect();
    // Looked for before they are taken out: most messages have none, and each removal is a look-up.
    let of_one_hop: Vec<HeaderName> = headers.keys().filter(|name| HOP_BY_HOP.contains(name)).cloned().collect();
    for name in nominated.iter().chain(&of_one_hop) {
        headers.remove(name);
    }
}

/// The fields that Connection names.
fn nominated(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok())
}

/// HTTP/2 agents may send cookies in crumbs, which HTTP/1 servers do not put together (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(COOKIE, whole);
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&'static str, &str)]) -> HeaderMap {
        fields.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    #[test]
    fn nothing_for_one_connection_goes_further() {
        // SEC-033, SEC-035, LST-012
        let own = Pseudonym::random();
        let mut headers = map(&[
            ("connection", "close, X-Private, Content-Length, Host"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-authorization", "Basic c2VjcmV0"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip, trailers"),
            ("upgrade", "h2c"),
            ("transfer-encoding", "chunked"),
            ("content-length", "3"),
            ("host", "api.test"),
            ("accept", "*/*"),
        ]);
        clean_request(&mut headers, &own);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["accept", "content-length", "host", "te", "via"]);
        assert_eq!(headers[TE], "trailers");
    }

    #[test]
    fn a_stand_in_for_a_key_goes_nowhere() {
        let mut headers =
            map(&[("x-api-key", PLACEHOLDER), ("authorization", "token sidebearer-placeholder"), ("x-other", "a key")]);
        remove_placeholders(&mut headers);
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["x-other"]);
    }

    #[test]
    fn http_2_in_the_clear_is_not_asked_for() {
        let asking = |protocol| map(&[("connection", "upgrade, http2-settings"), ("upgrade", protocol)]);
        assert_eq!(upgrade(&asking("websocket"), Version::HTTP_11), Some(HeaderValue::from_static("websocket")));
        assert_eq!(upgrade(&asking("H2C"), Version::HTTP_11), None);
        assert_eq!(upgrade(&map(&[("upgrade", "websocket")]), Version::HTTP_11), None);
    }

    #[test]
    fn cookie_crumbs_arrive_as_one_cookie() {
        // SEC-063
        let mut headers = map(&[("cookie", "a=1"), ("accept", "*/*")]);
        headers.append(COOKIE, "b=2".parse().unwrap());
        assert_eq!(fields(&headers), 2);
        clean_request(&mut headers, &Pseudonym::random());
        assert_eq!(headers.get_all(COOKIE).iter().collect::<Vec<_>>(), ["a=1; b=2"]);
    }

    #[test]
    fn a_trailer_never_becomes_a_credential() {
        // SEC-037
        let mut trailers = map(&[("authorization", "Bearer x"), ("host", "evil.test"), ("grpc-status", "0")]);
        clean_trailers(&mut trailers);
        assert_eq!(trailers.keys().collect::<Vec<_>>(), ["grpc-status"]);
    }
}
