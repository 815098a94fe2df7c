//! Whatever a token endpoint answers, a token that is taken fits into a header, and a failure repeats nothing but a code
//! (TOK-005 to TOK-013).
//!
//! The input: a byte each for the status and the provider's quirks, `Retry-After` on a line, and the body.
#![no_main]

use std::time::{Duration, UNIX_EPOCH};

use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue, StatusCode};
use libfuzzer_sys::fuzz_target;
use sidebearer::oauth::Quirks;
use sidebearer::oauth::wire::{self, Failure};

const STATUS: [u16; 8] = [200, 201, 301, 400, 401, 404, 429, 503];

fuzz_target!(|data: &[u8]| {
    let [status, quirks, rest @ ..] = data else { return };
    let at = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
    let (wait, body) = (&rest[..at], rest.get(at + 1..).unwrap_or_default());
    let mut headers = HeaderMap::new();
    headers.extend(HeaderValue::from_bytes(wait).ok().map(|wait| (RETRY_AFTER, wait)));
    let quirks = Quirks {
        form_answers: quirks & 1 != 0,
        token_member: (quirks & 2 != 0).then(|| "authed_user".to_owned()),
        token_types: if quirks & 4 != 0 { vec!["user".to_owned()] } else { Vec::new() },
        ..Quirks::default()
    };
    let status = StatusCode::from_u16(STATUS[usize::from(*status) % STATUS.len()]).expect("a status");
    let wall = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    match wire::read(status, &headers, body, wall, &quirks) {
        Ok(answer) => {
            let token = answer.access_token.expose();
            assert!((1..=16 << 10).contains(&token.len()) && token.bytes().all(|byte| byte.is_ascii_graphic()));
            assert!(answer.lifetime.is_none_or(|life| !life.is_zero() && life <= Duration::from_secs(31_536_000)));
            assert!(answer.refresh_token.as_ref().is_none_or(|token| !token.expose().is_empty()));
            assert!(answer.scopes.as_ref().is_none_or(|scopes| !scopes.is_empty() && scopes.is_sorted()));
            assert!(status.is_success());
        }
        Err(Failure::Transient { why, retry_after }) => {
            assert!(retry_after.is_none_or(|wait| wait <= Duration::from_secs(600)));
            assert!(why.len() < 200, "{why}");
        }
        Err(failure @ Failure::Unusable { .. }) => assert!(status.is_success(), "{failure}"),
        Err(Failure::Reauthorize { error } | Failure::FixConfiguration { error }) => {
            assert!((1..=64).contains(&error.len()) && error.bytes().all(|byte| matches!(byte, b' '..=b'~')));
        }
    }
});
