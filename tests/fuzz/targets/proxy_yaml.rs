//! Any proxy.yaml is read or refused in bounded time; every mistake has a place in it, and none repeats a secret
//! (CFG-001 to CFG-008, LEK-003).
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidebearer::config;

const CANARY: &str = "canary-of-the-environment";

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // What files hold is not the matter here, and some of them block whoever reads them.
    if text.contains("${file:") {
        return;
    }
    let environment = |name: &str| match name {
        "SECRET" => Some(CANARY.to_owned()),
        "KEY" => Some("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".to_owned()),
        "PORT" => Some("3128".to_owned()),
        "HOME" => Some("/home/agent".to_owned()),
        _ => None,
    };
    match config::parse("proxy.yaml", text, &environment) {
        Ok(settings) => {
            assert!(!format!("{settings:?}").contains(CANARY) || !is_secret(text), "a secret is printed");
            assert!(settings.warnings.iter().all(|warning| !warning.contains(CANARY)));
        }
        Err(error) => {
            assert!(!error.mistakes.is_empty());
            for mistake in &error.mistakes {
                // YAML's line breaks, of which there are more than an editor shows (YAML 1.1 section 4.2).
                let lines = text.split(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).count();
                assert!((1..=lines + 1).contains(&mistake.line), "line {} of {lines}: {mistake}", mistake.line);
                assert!(mistake.column >= 1, "{mistake}");
                assert!(!mistake.to_string().contains(CANARY), "a secret is told: {mistake}");
            }
        }
    }
});

/// A variable's value is a secret where secrets go; whoever writes it into a name wants it printed.
fn is_secret(text: &str) -> bool {
    text.lines().filter(|line| line.contains("${SECRET}")).all(|line| line.contains("secret:"))
}
