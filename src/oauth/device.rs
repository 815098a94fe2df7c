//! The device authorization grant (RFC 8628): a user consents on another device, with a code that they type there.

use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;
use url::Url;

use super::wire::Failure;
use crate::secret::Secret;

/// What a device authorization endpoint answered (RFC 8628 section 3.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    /// What is polled with. Never shown.
    pub device_code: Secret,
    /// What the user types: made to be shown.
    pub user_code: String,
    /// Where.
    pub verification_uri: Url,
    /// The same with the code in it, for a QR code.
    pub verification_uri_complete: Option<Url>,
    /// How long both are good for.
    pub expires_in: Duration,
    /// How long to wait between two polls.
    pub interval: Duration,
}

/// Reads the answer of a device authorization endpoint.
///
/// # Errors
/// When it refuses the client, or what it says is not usable: in words for the operator.
pub fn read(status: StatusCode, body: &[u8]) -> Result<Authorization, String> {
    if !status.is_success() {
        let code = serde_json::from_slice::<Refused>(body).ok().and_then(|refused| refused.error);
        let plain = |code: String| code.chars().filter(char::is_ascii_graphic).take(64).collect::<String>();
        let code = code.map_or_else(|| format!("http_{}", status.as_u16()), plain);
        return Err(format!("the provider refuses to start a device flow (`{code}`)"));
    }
    // serde's own message may quote the body, and with it the code.
    let answer: Answer = serde_json::from_slice(body).map_err(|_| unusable("is not what RFC 8628 says"))?;
    let verification_uri = answer.verification_uri.or(answer.verification_url);
    let verification_uri = verification_uri.ok_or_else(|| unusable("names no `verification_uri`"))?;
    let user_code = answer.user_code;
    if user_code.is_empty() || user_code.len() > 64 || user_code.chars().any(|c| c.is_control()) {
        return Err(unusable("has no `user_code` that can be typed"));
    }
    Ok(Authorization {
        device_code: Secret::new(answer.device_code),
        user_code,
        verification_uri: page(&verification_uri)?,
        verification_uri_complete: answer.verification_uri_complete.as_deref().map(page).transpose()?,
        expires_in: seconds(answer.expires_in, 1..=3600).unwrap_or(Duration::from_secs(600)),
        interval: seconds(answer.interval, 1..=300).unwrap_or(Duration::from_secs(5)),
    })
}

/// What to do after a poll that brought no token (RFC 8628 section 3.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poll {
    /// Again after the interval: the user has not decided yet.
    Again,
    /// Again, and from now on 5 s later each time.
    Slower,
    /// The server could not be asked: again after twice the interval.
    Backoff,
    /// Not again: the user refused.
    Denied,
    /// Not again: the code has ended.
    Expired,
    /// Not again: the failure says why.
    Failed,
}

/// Sorts a failed poll.
pub fn poll(failure: &Failure) -> Poll {
    match failure {
        Failure::FixConfiguration { error } | Failure::Reauthorize { error } => match error.as_str() {
            "authorization_pending" => Poll::Again,
            "slow_down" => Poll::Slower,
            "access_denied" => Poll::Denied,
            "expired_token" => Poll::Expired,
            _ => Poll::Failed,
        },
        Failure::Unusable { .. } => Poll::Failed,
        Failure::Transient { .. } => Poll::Backoff,
    }
}

/// The pause before the next poll, after one that ended so; `None` when there is to be none.
pub fn next_interval(interval: Duration, poll: Poll) -> Option<Duration> {
    match poll {
        Poll::Again => Some(interval),
        Poll::Slower => Some(interval + Duration::from_secs(5)),
        Poll::Backoff => Some((interval * 2).min(Duration::from_secs(60)).max(interval)),
        Poll::Denied | Poll::Expired | Poll::Failed => None,
    }
}

#[derive(Deserialize)]
struct Answer {
    device_code: String,
    user_code: String,
    verification_uri: Option<String>,
    /// Google's name for it.
    verification_url: Option<String>,
    verification_uri_complete: Option<String>,
    expires_in: Option<f64>,
    interval: Option<f64>,
}

#[derive(Deserialize)]
struct Refused {
    error: Option<String>,
}

fn unusable(what: &str) -> String {
    format!("the provider's answer {what}")
}

/// A page that a person is sent to: nothing but the web (OAU-012).
fn page(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "https" | "http"));
    url.ok_or_else(|| unusable("names a `verification_uri` that is no web address"))
}

fn seconds(value: Option<f64>, range: std::ops::RangeInclusive<u64>) -> Option<Duration> {
    let value = value.filter(|value| value.is_finite() && *value >= 0.0)?;
    Some(Duration::from_secs((value.ceil() as u64).clamp(*range.start(), *range.end())))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ok(answer: serde_json::Value) -> Result<Authorization, String> {
        read(StatusCode::OK, answer.to_string().as_bytes())
    }

    fn usual() -> serde_json::Value {
        json!({ "device_code": "canary", "user_code": "ABCD-EFGH", "verification_uri": "https://as.test/device" })
    }

    #[test]
    fn an_answer_is_read_with_the_intervals_of_the_rfc() {
        // TOK-048
        let authorization = ok(usual()).unwrap();
        assert_eq!(
            (authorization.interval, authorization.expires_in),
            (Duration::from_secs(5), Duration::from_secs(600))
        );
        assert_eq!(authorization.user_code, "ABCD-EFGH");
        assert!(!format!("{authorization:?}").contains("canary"));
        let mut told = usual();
        (told["interval"], told["expires_in"]) = (json!(0), json!(1e300));
        told["verification_uri_complete"] = json!("https://as.test/device?user_code=ABCD-EFGH");
        let authorization = ok(told).unwrap();
        assert_eq!(
            (authorization.interval, authorization.expires_in),
            (Duration::from_secs(1), Duration::from_secs(3600))
        );
        assert!(authorization.verification_uri_complete.is_some());
        let google =
            json!({ "device_code": "d", "user_code": "u", "verification_url": "https://www.google.test/device" });
        assert_eq!(ok(google).unwrap().verification_uri.as_str(), "https://www.google.test/device");
    }

    #[test]
    fn an_answer_that_no_user_could_follow_is_refused() {
        // OAU-012
        for (member, value) in [
            ("verification_uri", json!("javascript:alert(1)")),
            ("verification_uri", json!("file:///etc/passwd")),
            ("verification_uri", json!("--version")),
            ("verification_uri", json!(null)),
            ("user_code", json!("")),
            ("user_code", json!("\u{1b}[2J")),
            ("device_code", json!(7)),
        ] {
            let mut answer = usual();
            answer[member] = value.clone();
            assert!(ok(answer).is_err(), "{member}: {value}");
        }
        assert!(read(StatusCode::OK, b"<html>").is_err());
        let refused = read(StatusCode::BAD_REQUEST, br#"{"error":"unauthorized_client"}"#).unwrap_err();
        assert_eq!(refused, "the provider refuses to start a device flow (`unauthorized_client`)");
        assert!(read(StatusCode::NOT_FOUND, b"").unwrap_err().contains("http_404"));
    }

    #[test]
    fn polling_follows_the_rfc() {
        // TOK-048
        let five = Duration::from_secs(5);
        let after = |error: &str| {
            let poll = poll(&Failure::FixConfiguration { error: error.into() });
            (poll, next_interval(five, poll))
        };
        assert_eq!(after("authorization_pending"), (Poll::Again, Some(five)));
        assert_eq!(after("slow_down"), (Poll::Slower, Some(Duration::from_secs(10))));
        assert_eq!(after("access_denied"), (Poll::Denied, None));
        assert_eq!(after("expired_token"), (Poll::Expired, None));
        assert_eq!(after("invalid_client"), (Poll::Failed, None));
        let down = poll(&Failure::Transient { why: "down".into(), retry_after: None });
        assert_eq!(next_interval(five, down), Some(Duration::from_secs(10)));
        assert_eq!(next_interval(Duration::from_secs(300), down), Some(Duration::from_secs(300)));
    }
}
