//! Reads token answers (RFC 6749 sections 5.1 and 5.2), and sorts the failures.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use http::header::RETRY_AFTER;
use http::{HeaderMap, StatusCode};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;
use time::{Date, Month};

use super::Quirks;
use crate::secret::Secret;

/// The most that is read of an answer.
pub const BODY_LIMIT: usize = 64 * 1024;

/// A token, and what came with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The token: visible ASCII, safe in a header.
    pub access_token: Secret,
    /// How long it is good for, counted from when the request was sent; `None` when the answer does not say so
    /// credibly (SEMANTICS C16).
    pub lifetime: Option<Duration>,
    /// The refresh token that replaces the one sent; `None` keeps that one.
    pub refresh_token: Option<Secret>,
    /// What was granted, sorted; `None` when it is what was asked for (RFC 6749 section 5.1).
    pub scopes: Option<Vec<String>>,
    /// Whether the answer left out the `token_type` that it must have. Worth a warning.
    pub token_type_missing: bool,
}

impl Answer {
    /// What to give back when the answer is not to be used, and whether it is a refresh token.
    pub fn what_to_revoke(&self) -> (&Secret, bool) {
        self.refresh_token.as_ref().map_or((&self.access_token, false), |token| (token, true))
    }
}

/// Why there is no token, by who has to do something about it (SEMANTICS C15). Tells nothing of the answer but its `error`
/// code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The user, who has to connect again. Only a refresh token's failure means this.
    #[error("the provider no longer accepts the grant (`{error}`)")]
    Reauthorize {
        /// The provider's code.
        error: String,
    },
    /// The operator: the same request will fail in the same way.
    #[error("the provider refuses the token request (`{error}`)")]
    FixConfiguration {
        /// The provider's code, or what is wrong with its answer.
        error: String,
    },
    /// The operator, too; but the answer replaces the refresh token, and the one that was sent may be good no more.
    #[error("the provider refuses the token request (`{error}`)")]
    Unusable {
        /// What is wrong with the answer.
        error: String,
        /// The one that takes its place.
        refresh_token: Secret,
    },
    /// Nobody: it may pass.
    #[error("{why}")]
    Transient {
        /// What happened.
        why: String,
        /// How long the provider asks to be left alone.
        retry_after: Option<Duration>,
    },
}

/// Reads what a token endpoint answered, at `wall`.
///
/// # Errors
/// When there is no usable token in it; the failure says whose turn it is.
pub fn read(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    wall: SystemTime,
    quirks: &Quirks,
) -> Result<Answer, Failure> {
    let transient = |why| Failure::Transient { why, retry_after: retry_after(headers, wall) };
    let passing = matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS);
    if passing || !(status.is_success() || status.is_client_error()) {
        return Err(transient(format!("the token endpoint answered {}", status.as_u16())));
    }
    let parsed = parse(body).or_else(|why| if quirks.form_answers { parse_form(body).ok_or(why) } else { Err(why) });
    let mut members = match parsed.map(|members| inner(members, quirks)) {
        Ok(members) => members,
        // A proxy's or a login page in the provider's place.
        Err(why) if status.is_success() => return Err(transient(format!("the token endpoint's answer {why}"))),
        Err(_) => HashMap::new(),
    };
    match members.remove("access_token") {
        Some(token) if status.is_success() && !token.is_null() => answer(token, members, quirks),
        _ => match code(status, &members) {
            error if error == "invalid_grant" || quirks.dead_grant_errors.contains(&error) => {
                Err(Failure::Reauthorize { error })
            }
            error if matches!(&*error, "temporarily_unavailable" | "server_error") => {
                Err(transient(format!("the token endpoint answered `{error}`")))
            }
            error => {
                let granted = if status.is_success() { members.remove("refresh_token") } else { None };
                Err(refused(error, refresh_token(granted)))
            }
        },
    }
}

fn answer(access_token: Value, mut members: HashMap<String, Value>, quirks: &Quirks) -> Result<Answer, Failure> {
    let mut take = |name| members.remove(name).filter(|value| !value.is_null());
    let refresh_token = refresh_token(take("refresh_token"));
    let unusable = |error: &str| refused(error.to_owned(), refresh_token.clone());
    let access_token = text(access_token).filter(|t| is_token(t)).ok_or_else(|| unusable("access_token unusable"))?;
    let token_type = take("token_type");
    let bearer = |kind: &str| {
        kind.eq_ignore_ascii_case("bearer") || quirks.token_types.iter().any(|own| kind.eq_ignore_ascii_case(own))
    };
    if token_type.as_ref().is_some_and(|kind| !kind.as_str().is_some_and(bearer)) {
        return Err(unusable("token_type not bearer"));
    }
    Ok(Answer {
        access_token: Secret::new(access_token),
        lifetime: take("expires_in").as_ref().and_then(lifetime),
        refresh_token,
        scopes: take("scope").as_ref().and_then(scopes),
        token_type_missing: token_type.is_none(),
    })
}

fn refused(error: String, refresh_token: Option<Secret>) -> Failure {
    match refresh_token {
        Some(refresh_token) => Failure::Unusable { error, refresh_token },
        None => Failure::FixConfiguration { error },
    }
}

fn refresh_token(value: Option<Value>) -> Option<Secret> {
    value.and_then(text).filter(|token| !token.is_empty()).map(Secret::new)
}

/// Whether `token` may go into a header (SEMANTICS C20).
fn is_token(token: &str) -> bool {
    (1..=ACCESS_TOKEN_LIMIT).contains(&token.len()) && token.bytes().all(|b| b.is_ascii_graphic())
}

fn text(value: Value) -> Option<String> {
    if let Value::String(text) = value { Some(text) } else { None }
}

fn lifetime(expires_in: &Value) -> Option<Duration> {
    let seconds = match expires_in {
        Value::Number(number) => number.as_f64()?,
        Value::String(text) => text.trim().parse().ok()?,
        _ => return None,
    };
    // The range leaves out NaN and infinity too; a denormal passes it and rounds to nothing.
    let credible = seconds > 0.0 && seconds <= LONGEST_LIFETIME;
    credible.then(|| Duration::from_secs_f64(seconds)).filter(|lifetime| !lifetime.is_zero())
}

/// Sorted scopes: a list in a string (RFC 6749 section 3.3), with GitHub's commas, or Twitch's array.
fn scopes(value: &Value) -> Option<Vec<String>> {
    let listed: Vec<&str> = match value {
        Value::String(list) => list.split([' ', ',']).collect(),
        Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
        _ => return None,
    };
    let is_scope = |scope: &&str| !scope.is_empty() && scope.chars().all(|c| c != ' ' && is_code_character(c));
    let mut scopes: Vec<String> = listed.into_iter().filter(is_scope).map(str::to_owned).collect();
    scopes.sort();
    scopes.dedup();
    (!scopes.is_empty()).then_some(scopes)
}

/// The `error` code, without what does not belong into one; else one of our own.
fn code(status: StatusCode, members: &HashMap<String, Value>) -> String {
    let error = members.get("error").and_then(Value::as_str).unwrap_or_default();
    let code: String = error.chars().filter(|c| is_code_character(*c)).take(ERROR_LIMIT).collect();
    match code {
        code if !code.trim().is_empty() => code,
        _ if status.is_success() => "access_token missing".into(),
        _ => format!("http_{}", status.as_u16()),
    }
}

/// The characters of an `error` (RFC 6749 section 5.2); without the space, those of a scope too.
fn is_code_character(c: char) -> bool {
    matches!(c, ' '..='~') && !matches!(c, '"' | '\\')
}

/// How long to wait (RFC 9110 section 10.2.3); nothing that reads as neither seconds nor a date.
fn retry_after(headers: &HeaderMap, wall: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        value.parse().map_or(Duration::MAX, Duration::from_secs)
    } else {
        http_date(value)?.duration_since(wall).ok()?
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

/// An IMF-fixdate, the one form of date that is still sent (RFC 9110 section 5.6.7): `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (_weekday, rest) = text.split_once(", ")?;
    let parts: Vec<&str> = rest.split([' ', ':']).collect();
    let [day, month, year, hour, minute, second, "GMT"] = parts[..] else { return None };
    let month = MONTHS.iter().zip(1..).find(|(name, _)| **name == month)?.1;
    let date =
        Date::from_calendar_date(year.parse::<u16>().ok()?.into(), Month::try_from(month).ok()?, day.parse().ok()?);
    let time = date.ok()?.with_hms(hour.parse().ok()?, minute.parse().ok()?, second.parse().ok()?);
    Some(time.ok()?.assume_utc().into())
}

fn parse(body: &[u8]) -> Result<HashMap<String, Value>, &'static str> {
    if body.len() > BODY_LIMIT {
        return Err("is longer than 64 KiB");
    }
    // serde's own message may quote the body, and with it a token.
    serde_json::from_slice(body).map(|Members(members)| members).map_err(|_| "is not a JSON object")
}

/// A form that says everything once (RFC 6749 has JSON only, but some providers answer as they are asked).
fn parse_form(body: &[u8]) -> Option<HashMap<String, Value>> {
    let mut members = HashMap::new();
    for (name, value) in url::form_urlencoded::parse(body) {
        if members.insert(name.into_owned(), Value::String(value.into_owned())).is_some() {
            return None;
        }
    }
    ["access_token", "error"].iter().any(|name| members.contains_key(*name)).then_some(members)
}

/// The members that speak of the token, where a provider keeps them in one of their own; its other members stay.
fn inner(mut members: HashMap<String, Value>, quirks: &Quirks) -> HashMap<String, Value> {
    let inner = quirks.token_member.as_ref().and_then(|member| members.remove(member));
    if let Some(Value::Object(inner)) = inner
        && inner.contains_key("access_token")
    {
        // Of what stands around it, a token and its times are somebody else's.
        for name in ["access_token", "refresh_token", "expires_in", "scope", "token_type"] {
            members.remove(name);
        }
        members.extend(inner);
    }
    members
}

/// A JSON object that says everything once: where two readers may see two tokens, neither is taken.
struct Members(HashMap<String, Value>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
        let mut members = HashMap::new();
        while let Some((name, value)) = map.next_entry()? {
            if members.insert(name, value).is_some() {
                return Err(A::Error::custom("a member comes twice"));
            }
        }
        Ok(Members(members))
    }
}

const ACCESS_TOKEN_LIMIT: usize = 16 * 1024;
const ERROR_LIMIT: usize = 64;
const LONGEST_LIFETIME: f64 = 365.0 * 24.0 * 3600.0;
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// 6 November 1994, 08:49:37, in seconds since 1970.
    const RFC_9110_EXAMPLE: u64 = 784_111_777;

    fn read_at(status: u16, headers: &HeaderMap, body: &[u8]) -> Result<Answer, Failure> {
        read_with(&Quirks::default(), status, headers, body)
    }

    fn read_with(quirks: &Quirks, status: u16, headers: &HeaderMap, body: &[u8]) -> Result<Answer, Failure> {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(RFC_9110_EXAMPLE);
        read(StatusCode::from_u16(status).unwrap(), headers, body, wall, quirks)
    }

    fn ok(body: &[u8]) -> Result<Answer, Failure> {
        read_at(200, &HeaderMap::new(), body)
    }

    fn ok_json(body: &Value) -> Result<Answer, Failure> {
        ok(body.to_string().as_bytes())
    }

    fn with(member: &str, value: Value) -> Result<Answer, Failure> {
        let mut body = json!({ "access_token": "at", "token_type": "Bearer" });
        body[member] = value;
        ok_json(&body)
    }

    fn refused(result: Result<Answer, Failure>) -> String {
        match result {
            Err(Failure::FixConfiguration { error }) => error,
            other => panic!("not `fix_configuration`: {other:?}"),
        }
    }

    fn transient(result: Result<Answer, Failure>) -> String {
        match result {
            Err(Failure::Transient { why, .. }) => why,
            other => panic!("not transient: {other:?}"),
        }
    }

    #[test]
    fn a_whole_answer_is_read() {
        let answer = ok_json(&json!({
            "access_token": "at", "token_type": "bEARER", "expires_in": 3600, "refresh_token": "rt", "scope": "b a b",
            "ext": { "x": [1] },
        }));
        let expected = Answer {
            access_token: Secret::new("at"),
            lifetime: Some(Duration::from_secs(3600)),
            refresh_token: Some(Secret::new("rt")),
            scopes: Some(vec!["a".into(), "b".into()]),
            token_type_missing: false,
        };
        assert_eq!(answer, Ok(expected));
    }

    #[test]
    fn a_lifetime_is_believed_when_it_is_credible() {
        // TOK-005
        let lifetime = |value| with("expires_in", value).unwrap().lifetime;
        let hour = Some(Duration::from_secs(3600));
        assert_eq!([lifetime(json!(3600)), lifetime(json!("3600")), lifetime(json!(" 3600 "))], [hour; 3]);
        assert_eq!(lifetime(json!(3599.5)), Some(Duration::from_millis(3_599_500)));
        assert_eq!(lifetime(json!(31_536_000)), Some(Duration::from_secs(31_536_000)));
        for incredible in [
            json!(0),
            json!(-1),
            json!(-0.0),
            json!(1e30),
            json!(5e-324),
            json!(31_536_001),
            json!(u64::MAX),
            json!(i64::MIN),
            json!(null),
            json!(true),
            json!([3600]),
            json!({}),
            json!(""),
            json!("soon"),
            json!("NaN"),
            json!("inf"),
            json!("1e999"),
        ] {
            assert_eq!(lifetime(incredible.clone()), None, "{incredible}");
        }
        assert_eq!(ok(br#"{"access_token":"at"}"#).unwrap().lifetime, None);
    }

    #[test]
    fn a_refresh_token_that_says_nothing_is_absent() {
        // TOK-007
        let refresh_token = |value| with("refresh_token", value).unwrap().refresh_token;
        for absent in [json!(""), json!(null), json!(7)] {
            assert_eq!(refresh_token(absent), None);
        }
        assert_eq!(refresh_token(json!("new")), Some(Secret::new("new")));
    }

    #[test]
    fn only_bearer_tokens_are_taken() {
        // TOK-008
        for bearer in ["Bearer", "bearer", "BEARER"] {
            assert!(!with("token_type", json!(bearer)).unwrap().token_type_missing);
        }
        assert!(with("token_type", json!(null)).unwrap().token_type_missing);
        assert!(ok(br#"{"access_token":"at"}"#).unwrap().token_type_missing);
        for other in [json!("mac"), json!("N_A"), json!("DPoP"), json!(""), json!(1)] {
            assert_eq!(refused(with("token_type", other)), "token_type not bearer");
        }
    }

    #[test]
    fn a_token_that_cannot_go_into_a_header_is_refused_and_not_repeated() {
        // TOK-009, C20
        for bad in ["canary\r\nX: y", "canary\0", "can ary", "canary\t", "canäry", "canary\u{7f}", ""] {
            assert_eq!(refused(with("access_token", json!(bad))), "access_token unusable");
        }
        assert_eq!(refused(with("access_token", json!("x".repeat(ACCESS_TOKEN_LIMIT + 1)))), "access_token unusable");
        assert!(with("access_token", json!("x".repeat(ACCESS_TOKEN_LIMIT))).is_ok());
        for bad in [json!(7), json!(["a"]), json!({ "a": 1 }), json!(true)] {
            assert_eq!(refused(with("access_token", bad)), "access_token unusable");
        }
        assert_eq!(refused(with("access_token", json!(null))), "access_token missing");
        assert_eq!(refused(ok(b"{}")), "access_token missing");
    }

    #[test]
    fn an_answer_that_is_no_json_object_may_pass() {
        // TOK-010, TOK-011
        let nested = "[".repeat(30_000);
        for body in [
            "",
            " ",
            "<html>503</html>",
            r#"{"access_token":"canary"#,
            "[]",
            r#"["canary"]"#,
            "null",
            "\"canary\"",
            &nested,
            &format!(r#"{{"access_token":"canary","x":{nested}"#),
            "\u{feff}{\"access_token\":\"canary\"}",
            r#"{"access_token":"canary","access_token":"b"}"#,
            r#"{"access_token":"canary","x":1,"x":2}"#,
            "access_token=canary&token_type=bearer",
        ] {
            assert_eq!(transient(ok(body.as_bytes())), "the token endpoint's answer is not a JSON object");
        }
        assert_eq!(transient(ok(b"\x1f\x8b\x08\0")), "the token endpoint's answer is not a JSON object");
        for long in [" ".repeat(BODY_LIMIT + 1), "[".repeat(100_000), format!("{{\"a\":\"{}\"}}", "x".repeat(10 << 20))]
        {
            assert_eq!(transient(ok(long.as_bytes())), "the token endpoint's answer is longer than 64 KiB");
        }
    }

    #[test]
    fn a_form_is_taken_from_a_provider_that_answers_with_forms() {
        // TOK-011
        let forms = Quirks { form_answers: true, ..Quirks::default() };
        let form = |body: &str| read_with(&forms, 200, &HeaderMap::new(), body.as_bytes());
        let answer = form("access_token=a%2Bt&scope=repo%2Cuser&token_type=bearer&expires_in=28800").unwrap();
        assert_eq!(answer.access_token, Secret::new("a+t"));
        assert_eq!(answer.lifetime, Some(Duration::from_secs(28_800)));
        assert_eq!(answer.scopes.unwrap(), ["repo", "user"]);
        assert_eq!(refused(form("error=bad_verification_code&error_description=x")), "bad_verification_code");
        assert_eq!(form(r#"{"access_token":"at"}"#).unwrap().access_token, Secret::new("at"));
        for neither in ["<html>503</html>", "", "access_token=a&access_token=b"] {
            assert_eq!(transient(form(neither)), "the token endpoint's answer is not a JSON object");
        }
    }

    #[test]
    fn a_token_in_a_member_of_its_own_is_found_there() {
        let slack =
            Quirks { token_member: Some("authed_user".into()), token_types: vec!["user".into()], ..Quirks::default() };
        let read = |body: Value| read_with(&slack, 200, &HeaderMap::new(), body.to_string().as_bytes());
        let user = json!({ "access_token": "user", "token_type": "user", "scope": "chat:write" });
        let answer = read(json!({ "ok": true, "access_token": "bot", "expires_in": 60, "authed_user": user })).unwrap();
        assert_eq!((answer.access_token, answer.lifetime), (Secret::new("user"), None));
        // A renewal has it at the top.
        let answer = read(json!({ "ok": true, "access_token": "top", "token_type": "user" })).unwrap();
        assert_eq!(answer.access_token, Secret::new("top"));
        assert_eq!(refused(read(json!({ "ok": false, "error": "invalid_code" }))), "invalid_code");
        assert_eq!(refused(ok_json(&json!({ "access_token": "at", "token_type": "user" }))), "token_type not bearer");
    }

    #[test]
    fn a_refresh_token_beside_a_token_of_no_use_is_not_lost() {
        // TOK-007, TOK-008, TOK-009
        for (member, value, error) in [
            ("token_type", json!("mac"), "token_type not bearer"),
            ("access_token", json!("a\nb"), "access_token unusable"),
            ("access_token", json!(null), "access_token missing"),
        ] {
            let mut body = json!({ "access_token": "at", "token_type": "Bearer", "refresh_token": "canary" });
            body[member] = value;
            let failure = ok_json(&body).unwrap_err();
            assert!(!format!("{failure:?} {failure}").contains("canary"));
            assert_eq!(failure, Failure::Unusable { error: error.into(), refresh_token: Secret::new("canary") });
            body["refresh_token"] = json!("");
            assert_eq!(refused(ok_json(&body)), error);
        }
        let said = read_at(400, &HeaderMap::new(), br#"{"error":"invalid_scope","refresh_token":"canary"}"#);
        assert_eq!(refused(said), "invalid_scope");
    }

    #[test]
    fn json_under_another_name_is_taken() {
        // TOK-010
        let mut headers = HeaderMap::new();
        headers.insert("content-type", "text/html".parse().unwrap());
        assert!(read_at(200, &headers, br#"{"access_token":"at"}"#).is_ok());
    }

    #[test]
    fn a_dead_grant_is_told_from_a_wrong_configuration() {
        // TOK-017, TOK-018, TOK-019, C15
        let said = |status, error: &str| {
            read_at(status, &HeaderMap::new(), json!({ "error": error }).to_string().as_bytes()).unwrap_err()
        };
        for (status, error) in [(400, "invalid_grant"), (401, "invalid_grant"), (200, "invalid_grant")] {
            assert_eq!(said(status, error), Failure::Reauthorize { error: error.into() });
        }
        let own = Quirks { dead_grant_errors: vec!["bad_refresh_token".into()], ..Quirks::default() };
        let dead = read_with(&own, 200, &HeaderMap::new(), br#"{"error":"bad_refresh_token"}"#).unwrap_err();
        assert_eq!(dead, Failure::Reauthorize { error: "bad_refresh_token".into() });
        assert_eq!(said(200, "bad_refresh_token"), Failure::FixConfiguration { error: "bad_refresh_token".into() });
        for error in ["invalid_client", "unauthorized_client", "invalid_scope", "invalid_request", "invalid_target"] {
            assert_eq!(said(400, error), Failure::FixConfiguration { error: error.into() });
            assert_eq!(said(200, error), Failure::FixConfiguration { error: error.into() });
        }
        assert_eq!(refused(read_at(404, &HeaderMap::new(), b"<html>")), "http_404");
        assert_eq!(refused(read_at(400, &HeaderMap::new(), br#"{"error":{"a":1}}"#)), "http_400");
        assert_eq!(refused(read_at(400, &HeaderMap::new(), br#"{"access_token":"at"}"#)), "http_400");
        assert_eq!(
            transient(Err(said(400, "temporarily_unavailable"))),
            "the token endpoint answered `temporarily_unavailable`"
        );
    }

    #[test]
    fn a_status_that_may_pass_passes_whatever_the_body_says() {
        for status in [408, 425, 429, 500, 502, 503, 301, 307, 101] {
            let why = transient(read_at(status, &HeaderMap::new(), br#"{"error":"invalid_grant"}"#));
            assert_eq!(why, format!("the token endpoint answered {status}"));
        }
    }

    #[test]
    fn an_error_code_is_cleaned_before_it_is_repeated() {
        // LEK-002, LEK-008
        let code = |error: &str| refused(ok_json(&json!({ "error": error, "error_description": "canary" })));
        assert_eq!(code("bad\r\n\u{1b}[31m\u{2028}\"code\\"), "bad[31mcode");
        assert_eq!(code(&"x".repeat(1000)), "x".repeat(64));
        assert_eq!(code("\n\n"), "access_token missing");
        let shown = ok_json(&json!({ "error": "invalid_client", "error_description": "canary" })).unwrap_err();
        assert_eq!(shown.to_string(), "the provider refuses the token request (`invalid_client`)");
        assert!(!format!("{shown:?}").contains("canary"));
    }

    #[test]
    fn retry_after_is_honoured_up_to_ten_minutes() {
        // TOK-013
        let asked = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            match read_at(429, &headers, b"") {
                Err(Failure::Transient { retry_after, .. }) => retry_after.map(|wait| wait.as_secs()),
                other => panic!("not transient: {other:?}"),
            }
        };
        assert_eq!([asked("7"), asked(" 7 "), asked("0")], [Some(7), Some(7), Some(0)]);
        assert_eq!([asked("601"), asked("99999999999999999999999")], [Some(600); 2]);
        assert_eq!(asked("Sun, 06 Nov 1994 08:50:07 GMT"), Some(30));
        assert_eq!(asked("Fri, 31 Dec 9999 23:59:59 GMT"), Some(600));
        for junk in [
            "",
            "soon",
            "-1",
            "1.5",
            "Sun, 06 Nov 1994 08:49:07 GMT",
            "Sun, 31 Feb 1995 08:49:37 GMT",
            "Sun, 06 Nov 1994",
            "Sun, 06 Nov 1994 25:49:37 GMT",
            "Sun, 06 Nov 99999 08:49:37 GMT",
            "Sun, 06 Nov 1995 08:49:37 CET",
            ", ",
            "é",
        ] {
            assert_eq!(asked(junk), None, "{junk}");
        }
    }

    #[test]
    fn scopes_come_in_every_provider_s_spelling() {
        // TOK-037
        let scopes = |value| with("scope", value).unwrap().scopes;
        let both = Some(vec!["a".to_owned(), "b:c".to_owned()]);
        assert_eq!(
            [scopes(json!("b:c a")), scopes(json!("a,b:c")), scopes(json!(["b:c", "a"]))],
            [(); 3].map(|()| both.clone())
        );
        for unsaid in [json!(""), json!(null), json!([]), json!(1), json!("\u{1b}[31m")] {
            assert_eq!(scopes(unsaid), None);
        }
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(status in 100u16..1000, body in prop::collection::vec(any::<u8>(), 0..200), wait in "\\PC{0,40}") {
            let mut headers = HeaderMap::new();
            headers.extend(wait.parse().ok().map(|wait| (RETRY_AFTER, wait)));
            let _ = read_at(status, &headers, &body);
        }

        #[test]
        fn no_member_makes_it_panic(
            token in "\\PC{0,20}",
            expires_in in prop_oneof![any::<f64>().prop_map(|n| json!(n)), any::<i64>().prop_map(|n| json!(n)), "\\PC{0,12}".prop_map(|s| json!(s))],
            scope in "\\PC{0,40}",
        ) {
            let body = json!({ "access_token": token, "expires_in": expires_in, "scope": scope });
            if let Ok(answer) = ok_json(&body) {
                prop_assert!(answer.access_token.expose().bytes().all(|b| b.is_ascii_graphic()));
                prop_assert!(answer.lifetime.is_none_or(|l| l <= Duration::from_secs(31_536_000)));
            }
        }
    }
}
