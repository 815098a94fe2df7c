//! A route that depends on the path covers what every server takes for that path, and nothing else (SEC-047, SEC-048).
#![no_main]

use std::sync::LazyLock;

use http::Method;
use libfuzzer_sys::fuzz_target;
use sidebearer::config;
use sidebearer::host::Authority;
use sidebearer::routes::{Action, Routes};
use url::Url;

static ROUTES: LazyLock<Routes> = LazyLock::new(|| {
    let text = "
listen: 127.0.0.1:0
providers:
  main: {token_endpoint: https://auth.test/token, client_id: a, client_auth: none, refresh_token: {}}
routes:
  - {host: api.test, paths: [/allowed/**], provider: main}
  - {host: api.test, deny: true}
store: {path: /nowhere, keys: [AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=]}
";
    let settings = config::parse("proxy.yaml", text, &|_| None);
    Routes::new(settings.unwrap_or_else(|error| panic!("{error}")).routes)
});

fuzz_target!(|data: &[u8]| {
    let Ok(uri) = http::Uri::try_from(data) else { return };
    let to = Authority::parse("api.test:443", None).expect("an authority");
    let Ok(route) = ROUTES.find(&to, &Method::GET, uri.path()) else { return };
    let route = route.expect("there is one for every path");
    let Some(path) = uri.path_and_query().map(|path| path.as_str()).filter(|path| path.starts_with('/')) else {
        return;
    };
    // Another reader, who takes dots, empty segments and backslashes as browsers do.
    let Ok(url) = Url::parse("https://api.test").and_then(|base| base.join(&format!("/.{path}"))) else { return };
    let decoded = decode(url.path());
    let allowed = decoded == b"/allowed" || decoded.starts_with(b"/allowed/");
    assert_eq!(route.action != Action::Deny, allowed, "{path} is {} to others", url.path());
});

fn decode(path: &str) -> Vec<u8> {
    let mut bytes = path.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        let hex = |bytes: &mut std::str::Bytes<'_>| Some(char::from(bytes.next()?).to_digit(16)? as u8);
        decoded.push(match byte {
            b'%' => match (hex(&mut bytes), hex(&mut bytes)) {
                (Some(high), Some(low)) => high << 4 | low,
                _ => b'%',
            },
            byte => byte,
        });
    }
    decoded
}
