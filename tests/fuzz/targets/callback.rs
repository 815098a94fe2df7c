//! What a browser brings back from a consent answers one request of ours, in whole, or none; what is said of it steers no
//! terminal (OAU-001, OAU-003).
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidebearer::oauth::authorization::{self, Outcome};

fuzz_target!(|data: &[u8]| {
    let Ok(query) = std::str::from_utf8(data) else { return };
    let Some(response) = authorization::read(query) else { return };
    assert!(!response.state.expose().is_empty());
    let times = |wanted: &str| url::form_urlencoded::parse(data).filter(|(name, _)| name == wanted).count();
    assert_eq!(times("state"), 1);
    assert!(times("code") <= 1 && times("iss") <= 1 && times("error") <= 1);
    match response.outcome {
        Outcome::Code(code) => assert!(!code.expose().is_empty() && times("code") == 1),
        Outcome::Refused { error, description } => {
            for text in [Some(error), description].into_iter().flatten() {
                assert!(text.chars().count() <= 500 && !text.contains(char::is_control), "{text:?}");
            }
        }
    }
});
