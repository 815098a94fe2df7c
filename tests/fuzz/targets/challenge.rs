//! A WWW-Authenticate of any kind is read without harm, and says the same on one line as on many (OAU-013).
//!
//! The input: the field's lines.
#![no_main]

use http::header::WWW_AUTHENTICATE;
use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use sidebearer::oauth::challenge;

fuzz_target!(|data: &[u8]| {
    let lines: Vec<&[u8]> = data.split(|byte| *byte == b'\n').collect();
    let Some(headers) = headers(&lines) else { return };
    let (verdict, scopes) = (challenge::verdict(&headers), challenge::scopes(&headers));
    assert!(scopes.len() <= 50 && scopes.is_sorted());
    for scope in &scopes {
        assert!((1..=256).contains(&scope.len()) && scope.bytes().all(|byte| byte.is_ascii_graphic()), "{scope:?}");
    }
    // A quote that nobody closes reaches to the end of its line, so it must be read with that line.
    if !data.contains(&b'"')
        && let Some(joined) = self::headers(&[&lines.join(&b", "[..])])
    {
        assert_eq!((challenge::verdict(&joined), challenge::scopes(&joined)), (verdict, scopes));
    }
});

fn headers(lines: &[&[u8]]) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    for line in lines {
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_bytes(line).ok()?);
    }
    Some(headers)
}
