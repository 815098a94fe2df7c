//! Nobody comes in without an agent's secret, nor for a user that the agent may not act for (LST-008, LST-013).
//!
//! The input: each `Proxy-Authorization`, a line each. `=` at its start stands for credentials still to be encoded.
#![no_main]

use std::sync::{Arc, LazyLock};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::header::PROXY_AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use sidebearer::proxy::caller::{Agent, Users};
use sidebearer::proxy::fuzzing::Gate;
use sidebearer::secret::Secret;

static GATE: LazyLock<Gate> = LazyLock::new(|| {
    let agent =
        |name: &str, users| Agent { name: name.into(), secret: Secret::new(secret(name)), users, providers: None };
    let these = |names: &[&str]| Users::These(names.iter().map(|name| name.parse().expect("a name")).collect());
    let agents = [agent("one", these(&["alice"])), agent("two", these(&["alice", "bob"])), agent("all", Users::All)];
    Gate::new(agents.map(Arc::new).into())
});

fuzz_target!(|data: &[u8]| {
    let mut headers = HeaderMap::new();
    let lines: Vec<Vec<u8>> = data.split(|byte| *byte == b'\n').map(encoded).collect();
    for line in &lines {
        let Ok(value) = HeaderValue::from_bytes(line) else { return };
        headers.append(PROXY_AUTHORIZATION, value);
    }
    if let Ok((agent, user)) = GATE.admit(&headers) {
        assert_eq!(lines.len(), 1, "two fields were taken for one");
        let (scheme, rest) = lines[0].split_at(6);
        assert!(scheme.eq_ignore_ascii_case(b"basic "));
        let pair =
            String::from_utf8(BASE64_STANDARD.decode(rest.trim_ascii()).expect("it was read")).expect("it was read");
        let (name, given) = pair.split_once(':').expect("it was read");
        assert_eq!(given, secret(&agent));
        assert!(user == name || (name.is_empty() && agent == "one" && user == "alice"));
        assert!(match &*agent {
            "one" => user == "alice",
            "two" => user == "alice" || user == "bob",
            agent => agent == "all",
        });
    }
});

fn secret(agent: &str) -> String {
    format!("secret-{agent}")
}

fn encoded(line: &[u8]) -> Vec<u8> {
    match line.strip_prefix(b"=") {
        Some(pair) => format!("Basic {}", BASE64_STANDARD.encode(pair)).into_bytes(),
        None => line.to_vec(),
    }
}
