//! What a file may say, and what is said of its mistakes.

mod listen;
mod proxies;
mod trail;

use super::*;
use crate::oauth::{ClientAuth, Endpoints, Grant};
use crate::routes::{Action, Retry, UpstreamHttp};

/// The variables of every test.
fn environment(name: &str) -> Option<String> {
    let value = match name {
        "HOME" => "/home/ada",
        "SECRET" => "hunter2",
        "YAML" => "x\n    issuer: https://evil.test",
        "NESTED" => "${SECRET}",
        "SHORT_KEY" => "c2hvcnQ=",
        "KEY" => "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
        "EMPTY" => "",
        _ => return None,
    };
    Some(value.to_owned())
}

fn settings(text: &str) -> Settings {
    parse("proxy.yaml", text, &environment).unwrap_or_else(|error| panic!("{error}"))
}

fn mistakes(text: &str) -> String {
    parse("proxy.yaml", text, &environment).expect_err("it is valid").to_string()
}

/// A provider with these further lines.
fn provider(lines: &[&str]) -> String {
    let mut text = "providers:\n  a:\n    token_endpoint: https://a.test/token\n    client_id: a\n".to_owned();
    for line in lines {
        text += &format!("    {line}\n");
    }
    text
}

#[test]
fn every_mistake_is_told_in_one_run_each_with_its_place_and_what_to_do() {
    // CFG-001, CFG-002, CFG-005, CFG-008
    let text = "\
listen: 0.0.0.0:3128
drian: 20s
providers:
  github:
    token_endpoint: https://github.test/token
    client_id: 17
    client_secret: ${GITHUB_SECRET}
    client_credentials:
      scope: [repo]
  slack:
    token_url: https://slack.test/token
    refresh_token:
  github:
    client_id: x
routes:
  - host: https://api.test
    provider: nope
  - host: api.github.test
    provider: githb
    methods: [get]
  - paths: [/v1/**]
    deny: yes
  - host: slack.test
    provider: slack
    retry: twice
";
    assert_eq!(
        mistakes(text),
        "\
proxy.yaml:1:9: listen: other machines could reach this address
hint: they could use your accounts; write `127.0.0.1:3128`, or say with `agents` who may
proxy.yaml:2:1: drian: unknown key
hint: did you mean `drain`?
proxy.yaml:6:16: providers.github.client_id: expected a string, found a number
hint: put it in quotes
proxy.yaml:7:20: providers.github.client_secret: the environment variable `GITHUB_SECRET` is not set
hint: set `GITHUB_SECRET`, or keep the value in a file: `${file:PATH}`
proxy.yaml:9:7: providers.github.client_credentials.scope: unknown key
hint: did you mean `scopes`?
proxy.yaml:10:3: providers.slack: `client_id` is missing
hint: the provider gave it to you when you registered the client
proxy.yaml:13:3: providers.github: the key is here twice
hint: the first one is on line 4
proxy.yaml:16:11: routes[0].host: a host is not a URL
hint: leave out `https://`; a path goes into `paths`
proxy.yaml:17:15: routes[0].provider: no provider is named `nope`
hint: providers are `github`, `slack`
proxy.yaml:19:15: routes[1].provider: no provider is named `githb`
hint: did you mean `github`?
proxy.yaml:20:15: routes[1].methods[0]: methods are compared exactly
hint: write it in capitals, as in `GET`
proxy.yaml:21:5: routes[2]: `host` is missing
hint: write the host that the route is for
proxy.yaml:22:11: routes[2].deny: expected a boolean, found a string
hint: write `true` or `false`
proxy.yaml:25:12: routes[3].retry: expected one of `once`, `never`"
    );
}

#[test]
fn a_whole_file_becomes_settings() {
    let text = "\
listen: '[::1]:0'
extra_ca_files: [~/root.pem, company.pem]
resolve: { API.test:443: 127.0.0.1:8443 }
drain: 500ms
log_level: debug
replay_limit: 64KiB
ca: { path: /ca }
providers:
  one:
    issuer: https://one.test/realm
    client_id: id
    client_secret: ${SECRET}
    client_auth: client_secret_post
    client_credentials:
      scopes: [b, a, b]
      audience: aud
      resource: [https://r.test/1, 'urn:two']
      params: { tenant: t }
    refresh_before: 1m
    default_lifetime: 1h
    refresh_on: [401, 403]
  two: { token_url: 'https://two.test', client_id: two, refresh_token: {} }
routes:
  - { host: Api.Test:8443, provider: one, paths: [/v1/**], methods: [GET], retry: never, upstream_http: h1, redact_reflections: true }
  - { host: '*.plain.test', deny: true, plaintext: true }
unmatched: deny
store: { path: /store, keys: ['${KEY}'] }
";
    let settings = settings(text);
    assert_eq!(listen::shown(&settings), ["[::1]:0"]);
    assert_eq!(settings.extra_ca_files, [Path::new("/home/ada/root.pem"), Path::new("company.pem")]);
    let api = Authority::parse("api.test:443", None).unwrap();
    assert_eq!(settings.resolve[&api].to_string(), "127.0.0.1:8443");
    assert_eq!((settings.drain, settings.replay_limit), (Duration::from_millis(500), 65536));
    assert_eq!((settings.ca_path.as_path(), settings.store_path.as_path()), (Path::new("/ca"), Path::new("/store")));
    assert_eq!(settings.store_keys, [Secret::new(environment("KEY").unwrap())]);
    assert_eq!((settings.unmatched, settings.log_level), (Unmatched::Deny, Some(LogLevel::Debug)));
    assert_eq!(settings.warnings, [""; 0]);

    let [one, two] = settings.providers.as_slice() else { panic!("{:?}", settings.providers) };
    let issuer = "https://one.test/realm".parse().ok();
    assert_eq!(one.endpoints, Endpoints { issuer, ..Endpoints::default() });
    assert_eq!(one.client_secret, Some(Secret::new("hunter2")));
    assert_eq!((one.client_auth, one.grant), (ClientAuth::Post, Grant::ClientCredentials));
    assert_eq!(one.target.scopes, ["a", "b"]);
    assert_eq!(one.target.audience.as_deref(), Some("aud"));
    assert_eq!(one.target.resource, ["https://r.test/1", "urn:two"]);
    assert_eq!(one.params, [("tenant".to_owned(), Secret::new("t"))]);
    assert_eq!(one.refresh_on, [http::StatusCode::FORBIDDEN]);
    assert_eq!(one.refresh_before, Duration::from_secs(60));
    assert_eq!(one.default_lifetime, Some(Duration::from_secs(3600)));
    assert_eq!((two.client_auth, two.grant), (ClientAuth::None, Grant::RefreshToken));
    assert_eq!(two.refresh_before, Duration::from_secs(300));

    let [api, plain] = settings.routes.as_slice() else { panic!("{:?}", settings.routes) };
    assert_eq!((&*api.name, api.port), ("routes[0] api.test:8443", 8443));
    assert_eq!(api.action, Action::Authenticate("one".parse().unwrap()));
    assert_eq!((api.retry, api.upstream_http, api.redact_reflections), (Retry::Never, UpstreamHttp::H1, true));
    assert_eq!((&*plain.name, plain.port, plain.plaintext), ("routes[1] *.plain.test", 80, true));
    assert_eq!((&plain.action, plain.redact_reflections), (&Action::Deny, false));
}

#[test]
fn what_is_left_out_has_a_default() {
    let settings = settings("");
    assert_eq!(listen::shown(&settings), ["127.0.0.1:3128"]);
    assert_eq!(settings.limits, Limits::default());
    assert_eq!((settings.drain, settings.replay_limit), (Duration::from_secs(20), 1 << 20));
    assert_eq!(settings.store_path, Path::new("/home/ada/.local/share/sidebearer"));
    assert_eq!(settings.ca_path, Path::new("/home/ada/.local/share/sidebearer/ca"));
    assert_eq!(settings.key_path, Path::new("/home/ada/.config/sidebearer/key"));
    assert_eq!(settings.unmatched, Unmatched::Tunnel);
    assert_eq!(settings.warnings, ["proxy.yaml:1:1: routes: there are no routes, so no request gets a token"]);

    let in_xdg = |name: &str| Some(format!("/xdg/{name}"));
    let settings = parse("proxy.yaml", "", &in_xdg).unwrap();
    assert_eq!(settings.store_path, Path::new("/xdg/XDG_DATA_HOME/sidebearer"));
    assert_eq!(settings.key_path, Path::new("/xdg/XDG_CONFIG_HOME/sidebearer/key"));
}

#[test]
fn without_a_home_directory_the_store_has_to_be_placed_and_its_key_given() {
    let homeless = |text: &str| parse("proxy.yaml", text, &|_| None).map_err(|error| error.to_string());
    assert_eq!(
        homeless("drain: 1s").unwrap_err(),
        "proxy.yaml:1:1: store.path: there is no home directory to keep the store in: neither `XDG_DATA_HOME` nor \
             `HOME` is set\nhint: set `store.path`"
    );
    assert_eq!(
        homeless("store: {path: /s}").unwrap_err(),
        "proxy.yaml:1:1: store.keys: there is no home directory to make a key in: neither `XDG_CONFIG_HOME` nor \
             `HOME` is set\nhint: set `store.keys`"
    );
    assert_eq!(
        homeless("store: {path: ~/s}").unwrap_err().lines().next(),
        Some("proxy.yaml:1:15: store.path: `~/` needs `HOME`, which is not set")
    );
    let key = environment("KEY").unwrap();
    assert!(homeless(&format!("store: {{path: /s, keys: ['{key}']}}")).is_ok());
}

#[test]
fn what_is_no_one_host_is_refused_where_it_stands() {
    // CFG-002, SEC-018
    for (host, expected) in [
        ("", "9: routes[0].host: expected a host name"),
        ("''", "9: routes[0].host: the host is empty"),
        ("true", "9: routes[0].host: expected a host name"),
        ("443", "9: routes[0].host: expected a host name"),
        ("'*'", "9: routes[0].host: `*` can only be"),
        ("'*.com'", "9: routes[0].host: "),
        ("\"a\\0b\"", "9: routes[0].host: a host name has only"),
        ("https://a.test/", "9: routes[0].host: a host is not a URL"),
        ("a.test:0", "9: routes[0].host: the port is not a number from 1 to 65535"),
        ("a.test:99999", "9: routes[0].host: the port is not a number from 1 to 65535"),
        ("a.test:+80", "9: routes[0].host: the port is not a number from 1 to 65535"),
        ("bücher.test", "9: routes[0].host: a host name has only letters"),
        ("a\u{3002}test", "9: routes[0].host: a host name has only letters"),
        ("\u{ff41}.test", "9: routes[0].host: a host name has only letters"),
        ("xn--a.test", "9: routes[0].host: an `xn--` label"),
        ("a%2etest", "9: routes[0].host: a host name has only letters"),
        ("\u{212a}.test", "9: routes[0].host: a host name has only letters"),
        ("127.0.0.1", "9: routes[0].host: an IP address is not a host name"),
        ("127.0.0.1:80", "9: routes[0].host: an IP address is not a host name"),
        ("'[::1]'", "9: routes[0].host: an IP address is not a host name"),
        ("'[::1]:80'", "9: routes[0].host: an IP address is not a host name"),
    ] {
        let said = mistakes(&format!("routes:\n- host: {host}\n  deny: true\n"));
        let column = if host.is_empty() { "3" } else { "9" };
        let expected = expected.replacen('9', column, 1);
        assert!(said.starts_with(&format!("proxy.yaml:2:{expected}")), "{host}: {said}");
        assert_eq!(said.matches("proxy.yaml").count(), 1, "{said}");
    }
}

#[test]
fn a_token_endpoint_without_tls_is_only_for_this_machine_and_only_when_asked_for() {
    // CFG-004
    let with = |url: &str, allow: &str| {
        format!("providers: {{a: {{client_id: a, refresh_token: {{}}, token_url: '{url}'{allow}}}}}")
    };
    let allow = ", allow_http: true";
    for (url, further, hint) in [
        ("http://a.test/token", "", "use `https`"),
        ("http://a.test/token", allow, "use `https`"),
        ("http://127.0.0.1.a.test/token", allow, "use `https`"),
        ("http://10.0.0.1/token", allow, "use `https`"),
        ("http://127.0.0.1/token", "", "use `https`, or add `allow_http: true`"),
    ] {
        assert_eq!(
            mistakes(&with(url, further)),
            format!(
                "proxy.yaml:1:61: providers.a.token_url: with `http`, the secrets that go there can be read on the \
                     way\nhint: {hint}"
            ),
            "{url}"
        );
    }
    for url in ["http://127.0.0.1:9000/token", "http://127.9.9.9/", "http://[::1]:9000/token", "http://localhost/"] {
        settings(&with(url, allow));
    }
    for url in [
        "https://u@a.test/",
        "https://u:p@a.test/",
        "https://a.test/#x",
        "https:a.test",
        "ftp://a.test/",
        "https://a.test\\\\@b.test/",
        "https:// a.test",
        "/token",
        "",
    ] {
        assert!(mistakes(&with(url, allow)).contains("providers.a.token_url"), "{url}");
    }
    let issuer = with("x", "").replace("token_url: 'x'", "issuer: 'https://a.test/?x'");
    assert!(mistakes(&issuer).contains("providers.a.issuer: an issuer has no query"));
}

#[test]
fn what_would_overwhelm_a_reader_is_refused_at_once() {
    // CFG-006
    let bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n".to_owned()
        + &('b'..='z')
            .map(|key| {
                let before = (key as u8 - 1) as char;
                format!("{key}: &{key} [{}]\n", vec![format!("*{before}"); 9].join(", "))
            })
            .collect::<String>();
    let flat = |what: &str, count: usize| what.repeat(count);
    for (text, expected) in [
        (bomb, "1:8: an anchor and its aliases are not read here\nhint: write the value out wherever it is needed"),
        (
            "a: &a 1\nb: *a".into(),
            "1:4: an anchor and its aliases are not read here\nhint: write the value out wherever it is needed",
        ),
        (
            "a: *b".into(),
            "1:4: this is not YAML: unknown anchor\nhint: quote a value that begins with `*` or `&`, as in `\"*.example.com\"`",
        ),
        (flat("[", 100_000), "1:129: this is nested too deeply"),
        (flat("a: [\n", 100_000), "129:4: this is nested too deeply"),
        (flat("{a: ", 100_000), "1:513: this is nested too deeply"),
        (flat("a: [ #]\n", 100_000), "10001:4: the file has more than 10000 lists and mappings in brackets"),
        (flat("- ", 100_000), "1:257: this is nested too deeply"),
        (flat("x", 50 << 20), "1:1: the file is longer than 1 MiB"),
        (flat("- x\n", 200_000), "100001:3: the file has more than 100000 keys and values"),
        ("drain: 1s\n---\ndrain: 2s\n".into(), "2:1: the file holds more than one YAML document"),
        (
            "drain: 1s\nca:\n\tpath: x\n".into(),
            "3:1: this is not YAML: found character that cannot start any token\nhint: indent with spaces, not with tabs",
        ),
        (
            "\u{feff}drain: 1s\n".into(),
            "1:1: the file begins with a byte order mark\nhint: save it as UTF-8 without a byte order mark",
        ),
        ("drain: !x 1s".into(), "1:1: a YAML tag, `!`, is not read here\nhint: quote a value that begins with `!`"),
        (
            "listen: [::1]:1".into(),
            "1:10: this is not YAML: did not find expected node content\nhint: quote an IPv6 address, as in `\"[::1]:3128\"`",
        ),
        ("[a]: 1".into(), "1:1: after this, a key is neither a word nor a quoted string"),
        ("[1, 2]".into(), "1:1: expected a mapping, found a list"),
        ("drain".into(), "1:1: expected a mapping, found a string"),
        (flat("x: 1\n", 50_000), ""),
        ((0..40_000).map(|n| format!("x{n}: 1\n")).collect(), ""),
    ] {
        // Where it stopped reading is what bounds its time; a clock would judge the machine.
        let said = mistakes(&text);
        let shown = &text[..text.len().min(20)];
        if expected.is_empty() {
            assert!(said.starts_with("proxy.yaml:"), "{shown}: {said}");
        } else {
            assert_eq!(said, format!("proxy.yaml:{expected}"), "{shown}");
        }
    }
}

#[test]
fn no_message_ever_shows_a_secret() {
    // CFG-007
    for text in [
        provider(&["client_secret: [hunter2]", "client_credentials: {}"]),
        provider(&["client_secret: {hunter2: x}", "client_credentials: {}"]).replace("hunter2: x", "hunter: hunter2"),
        provider(&["client_secret: \"hunter2\\n\"", "client_credentials: {}"]),
        provider(&["client_secret: 'hunter2${'", "client_credentials: {}"]),
        provider(&["client_secret: '${hunter2!}'", "client_credentials: {}"]),
        provider(&["client_auth: ${SECRET}", "client_credentials: {}"]),
        provider(&["client_auth: hunter2", "client_credentials: {}"]),
        provider(&["refresh_token: hunter2"]),
        provider(&["refresh_token: {scopes: hunter2}"]),
        provider(&["refresh_token: {scopes: ['${SECRET} x']}"]),
        provider(&["refresh_before: ${SECRET}", "refresh_token: {}"]),
        provider(&["issuer: https://x:hunter2@a.test/", "refresh_token: {}"]),
        "providers: {a: {client_secret:hunter2}}".into(),
        "providers: {a: hunter2}".into(),
        "providers: {a:hunter2}".into(),
        "providers: {a:hunter2: 1}\nroutes: [{host: a.test, provider: b}, {host: b.test, provider: 'a:hunter'}]".into(),
        "routes: [{host: a.test, provider: '${SECRET}'}]".into(),
        "routes: [{host: 'https://${SECRET}', deny: true}]".into(),
        "listen: ${SECRET}".into(),
        "store: {keys: ['${SHORT_KEY}', hunter2]}".into(),
        "unmatched: ${SECRET}".into(),
        "drain: !!int hunter2".into(),
        "drain: !!null hunter2".into(),
        "drain: !hunter2 1s".into(),
        "drain: *hunter2".into(),
        "hunter2".into(),
        "${SECRET}".into(),
    ] {
        let said = parse("proxy.yaml", &text, &environment).expect_err(&text);
        for shown in [format!("{said}"), format!("{said:?}")] {
            assert!(!shown.contains("hunter2") && !shown.contains("c2hv"), "{shown}");
        }
    }
    let settings = settings(&provider(&["client_secret: hunter2", "client_credentials:"]));
    assert!(!format!("{settings:?}").contains("hunter2"));
}

#[test]
fn a_secret_in_the_file_itself_is_warned_of() {
    // CFG-007
    let text = provider(&["client_secret: hunter2", "client_credentials: {}"])
        + "routes: [{host: a.test, provider: a}]\nstore: {keys: [AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8]}";
    let out = "`${file:PATH}` or `${VAR}` keeps it out";
    assert_eq!(
        settings(&text).warnings,
        [
            format!("proxy.yaml:5:20: providers.a.client_secret: the secret is in the file itself; {out}"),
            format!("proxy.yaml:8:16: store.keys[0]: the secret is in the file itself; {out}"),
        ]
    );
    assert_eq!(settings(&text.replace("hunter2", "${SECRET}")).warnings.len(), 1);

    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("proxy.yaml");
        std::fs::write(&path, format!("{text}\n").replace("store: {", "store: {path: /s, ")).unwrap();
        for (mode, what) in [(0o600, "is in the file itself"), (0o640, "that other users of this machine can read")] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let warnings = load(&path).unwrap().warnings;
            assert!(warnings.iter().all(|warning| warning.contains(what)), "{mode:o}: {warnings:?}");
        }
    }
}

#[test]
fn a_value_from_outside_is_text_and_nothing_else() {
    // CFG-008
    let id = |written: &str| {
        let text = provider(&["client_credentials: {}"]).replace("client_id: a", &format!("client_id: {written}"));
        parse("proxy.yaml", &text, &environment).map(|settings| settings.providers[0].client_id.clone())
    };
    let said = |written: &str| id(written).unwrap_err().to_string();
    assert_eq!(id("a-${SECRET}-b").unwrap(), "a-hunter2-b");
    assert_eq!(id("${NESTED}").unwrap(), "${SECRET}");
    assert_eq!(id("'$${SECRET} $x $$'").unwrap(), "${SECRET} $x $$");
    assert_eq!(
        said("${YAML}"),
        "proxy.yaml:4:16: providers.a.client_id: the value has more than one line, or another control character"
    );
    assert_eq!(said("${EMPTY}"), "proxy.yaml:4:16: providers.a.client_id: the value is empty");
    assert_eq!(
        said("x${"),
        "proxy.yaml:4:16: providers.a.client_id: a `${` has no `}`\nhint: write `$${` for a `${` that is meant"
    );
    for name in ["${}", "${1A}", "${A-B}", "${ A }"] {
        assert!(said(name).contains("this is neither `${NAME}` nor `${file:PATH}`"), "{name}");
    }
    // A key is never replaced.
    assert!(mistakes("'${SECRET}': 1").contains("(..): unknown key"));
}

#[test]
fn a_secret_can_be_kept_in_a_file_that_not_everyone_can_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("secret");
    let text = provider(&[&format!("client_secret: ${{file:{}}}", path.display()), "client_credentials: {}"]);
    let read = || parse("proxy.yaml", &text, &environment);
    let what = read().unwrap_err().mistakes.remove(0).what;
    assert!(what.starts_with(&format!("cannot read `{}`: ", path.display())), "{what}");

    std::fs::write(&path, "hunter2\r\n").unwrap();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let allow = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        allow(0o644);
        let path = path.display();
        assert_eq!(
            read().unwrap_err().to_string(),
            format!(
                "proxy.yaml:5:20: providers.a.client_secret: every user of this machine can read `{path}`\n\
                     hint: `chmod 600 {path}`; for a Kubernetes secret, `defaultMode: 0440`"
            )
        );
        allow(0o640);
    }
    assert_eq!(read().unwrap().providers[0].client_secret, Some(Secret::new("hunter2")));

    let home = directory.path().display().to_string();
    let text = text.replace(&home, "~");
    let settings = parse("proxy.yaml", &text, &|name| (name == "HOME").then(|| home.clone())).unwrap();
    assert_eq!(settings.providers[0].client_secret, Some(Secret::new("hunter2")));
}

#[test]
fn a_client_proves_itself_with_what_it_has() {
    let auth = |lines: &[&str]| settings(&provider(lines)).providers[0].client_auth;
    assert_eq!(auth(&["client_secret: x", "refresh_token:"]), ClientAuth::Basic);
    assert_eq!(auth(&["client_secret: x", "client_auth: client_secret_post", "refresh_token:"]), ClientAuth::Post);
    assert_eq!(auth(&["client_auth: none", "client_credentials:"]), ClientAuth::None);
    assert_eq!(
        mistakes(&provider(&["client_auth: client_secret_post", "refresh_token:"])),
        "proxy.yaml:5:18: providers.a.client_auth: this needs a `client_secret`\n\
             hint: add it, or write `client_auth: none` for a public client"
    );
    assert_eq!(
        mistakes(&provider(&["client_secret: x", "client_auth: none", "refresh_token:"])),
        "proxy.yaml:6:18: providers.a.client_auth: with this, the `client_secret` is of no use\n\
             hint: leave out `client_secret`, or choose `client_secret_basic` or `client_secret_post`"
    );
}

#[test]
fn a_provider_has_one_grant() {
    for (lines, expected) in [
        (&[][..], "2:3: providers.a: the grant is missing"),
        (&["refresh_token:", "client_credentials:"], "6:5: providers.a.client_credentials: a provider has one grant"),
        (
            &["issuer: https://a.test", "refresh_token:", "authorization_code:"],
            "7:5: providers.a.authorization_code: a provider has one grant",
        ),
        (&["authorization_code:"], "2:3: providers.a: `authorization_endpoint` is missing"),
    ] {
        let said = mistakes(&provider(lines));
        assert!(said.starts_with(&format!("proxy.yaml:{expected}")), "{said}");
    }
    let twice = provider(&["token_url: https://b.test", "refresh_token:"]);
    assert_eq!(
        mistakes(&twice),
        "proxy.yaml:5:5: providers.a.token_url: this is `token_endpoint` again, under its other name\n\
             hint: leave out one of them"
    );
}

#[test]
fn what_a_token_request_says_is_said_once_and_in_its_own_words() {
    for (grant, expected) in [
        ("{scopes: [a b]}", "scopes[0]: a scope has no space\nhint: give each scope its own item of the list"),
        ("{scopes: ['a\"']}", "scopes[0]: a scope is printable ASCII without `\"` and `\\`"),
        ("{scopes: ['']}", "scopes[0]: a scope is printable ASCII without `\"` and `\\`"),
        ("{scopes: a}", "scopes: expected a list, found a string\nhint: put it in brackets, as in `[a, b]`"),
        ("{resource: /v1}", "resource: expected an absolute URI without a fragment"),
        ("{resource: [x:y, 'x:y#z']}", "resource[1]: expected an absolute URI without a fragment"),
        (
            "{params: {scope: a}}",
            "params.scope: this parameter is set by other keys\n\
                hint: `scopes`, `audience`, `resource` and the `client_` keys are for that",
        ),
    ] {
        let said = mistakes(&provider(&[&format!("client_credentials: {grant}")]));
        let (_, said) = said.split_once("providers.a.client_credentials.").unwrap();
        assert_eq!(said, expected);
    }
}

#[test]
fn a_number_needs_the_unit_that_it_is_in() {
    for (line, expected) in [
        (
            "drain: 20",
            "8: drain: expected a duration with its unit, as in `500ms`, `20s`, `5m` or `1h`, found a number",
        ),
        ("drain: 20d", "8: drain: expected a duration with its unit, as in `500ms`, `20s`, `5m` or `1h`"),
        ("drain: -1s", "8: drain: expected a duration with its unit, as in `500ms`, `20s`, `5m` or `1h`"),
        ("drain: 99999999999999999h", "8: drain: this is longer than ten years"),
        ("drain: 99999999h", "8: drain: this is longer than ten years"),
        ("replay_limit: 1MB", "15: replay_limit: expected a number of bytes, as in `1MiB`, `64KiB` or `65536`"),
        ("replay_limit: 18446744073709551615GiB", "15: replay_limit: this is more than there can be"),
    ] {
        assert_eq!(mistakes(line), format!("proxy.yaml:1:{expected}"));
    }
    assert_eq!(settings("replay_limit: 1000").replay_limit, 1000);
    assert_eq!(settings("replay_limit: '1000'").replay_limit, 1000);
    assert_eq!(settings("drain: 0s").drain, Duration::ZERO);
    for status in ["407", "500", "399", "-1", "'403'"] {
        let said = mistakes(&provider(&[&format!("refresh_on: [{status}]"), "refresh_token:"]));
        assert!(said.starts_with("proxy.yaml:5:18: providers.a.refresh_on[0]: "), "{said}");
    }
}

#[test]
fn an_address_that_other_machines_can_reach_is_refused() {
    // LST-014
    for listen in ["0.0.0.0:3128", "'[::]:3128'", "192.0.2.1:3128", "'[::ffff:192.0.2.1]:3128'"] {
        assert!(mistakes(&format!("listen: {listen}")).contains("listen: other machines could reach"), "{listen}");
    }
    for listen in ["127.0.0.1:0", "127.1.2.3:1", "'[::1]:3128'", "'[::ffff:127.0.0.1]:3128'"] {
        settings(&format!("listen: {listen}"));
    }
    for listen in ["3128", "localhost:3128", "127.0.0.1", "''"] {
        assert!(mistakes(&format!("listen: {listen}")).contains("listen: expected an address and a port"), "{listen}");
    }
}

#[test]
fn two_routes_never_answer_differently_for_one_request() {
    let routes = |routes: &str| mistakes(&format!("routes:\n{routes}"));
    assert_eq!(
        routes("- {host: a.test, paths: [/a, /b], deny: true}\n- {host: A.test.:443, paths: [/b, /a], deny: true}"),
        "proxy.yaml:3:4: routes[1]: this covers the same requests as routes[0]\n\
             hint: leave out one of them, or give them other `paths` or `methods`"
    );
    let plain = "proxy.yaml:2:4: routes[0]: routes[1] covers this host and port too, with another `plaintext`";
    for other in ["a.b.test", "'*.b.test'"] {
        let said = routes(&format!(
            "- {{host: a.b.test:80, paths: [/x], deny: true}}\n- {{host: {other}, plaintext: true, deny: true}}"
        ));
        let plain = if other == "a.b.test" {
            plain.replace("2:4: routes[0]: routes[1]", "3:4: routes[1]: routes[0]")
        } else {
            plain.into()
        };
        assert_eq!(said.lines().next(), Some(plain.as_str()));
    }
    settings("routes:\n- {host: a.test, deny: true}\n- {host: a.test, plaintext: true, deny: true}");
}

#[test]
fn a_route_does_one_thing_and_covers_something() {
    for (route, expected) in [
        ("{host: a.test}", "4: routes[0]: `provider` is missing"),
        ("{host: a.test, deny: false}", "4: routes[0]: `provider` is missing"),
        ("{host: a.test, provider: a, deny: true}", "37: routes[0].deny: the route cannot both"),
        ("{host: a.test, deny: true, paths: []}", "30: routes[0].paths: an empty list covers nothing"),
        ("{host: a.test, deny: true, methods: []}", "30: routes[0].methods: an empty list covers nothing"),
        ("{host: a.test, deny: true, methods: [G T]}", "40: routes[0].methods[0]: expected a method"),
        ("{host: a.test, deny: true, paths: [v1]}", "38: routes[0].paths[0]: a path begins with `/`"),
        ("a.test", "3: routes[0]: expected a mapping, found a string"),
    ] {
        let said = mistakes(&(provider(&["refresh_token:"]) + &format!("routes:\n- {route}")));
        assert!(said.starts_with(&format!("proxy.yaml:7:{expected}")), "{route}: {said}");
    }
    assert_eq!(
        mistakes("providers: 7\nroutes: [{host: a.test, provider: a}]"),
        "proxy.yaml:1:12: providers: expected a mapping, found a number"
    );
    // A mistake in a provider is not held against the routes that name it.
    let broken = "providers: {a: 7}\nroutes: [1, {host: a.test, provider: a}, {host: b.test, provider: b}]";
    let said = mistakes(broken);
    assert_eq!(said.matches("proxy.yaml").count(), 3, "{said}");
    assert!(said.contains("proxy.yaml:2:67: routes[2].provider: no provider is named `b`"), "{said}");
}

#[test]
fn a_shared_store_has_a_url_and_the_keys_of_all_who_share_it() {
    let store = |lines: &str| format!("store: {{{lines}}}\nresolve: {{'db.test:5432': 127.0.0.1:7777}}\n");
    let shared = settings(&store("url: postgres://me@db.test/x, password: '${KEY}', keys: ['${KEY}']"));
    assert_eq!(shared.store_url.unwrap().to_string(), "postgres://db.test:5432/x");
    assert_eq!(shared.secret_variables, ["KEY", "KEY"]);
    for (lines, what) in [
        ("url: postgres://me@db.test/x", "store.url: sidecars that share a store need the same key, and none is given"),
        (
            "url: postgres://me@db.test/x, keys: []",
            "store.url: sidecars that share a store need the same key, and none is given",
        ),
        ("url: postgres://me@db.test/x, keys: ['${KEY}'], path: /s", "store.url: the store is in two places"),
        (
            "url: mysql://me:canary@db/x, keys: ['${KEY}']",
            "store.url: not a URL of a PostgreSQL server: it begins with",
        ),
        (
            "url: 'postgres://me@db.test/x?sslmode=prefer', keys: ['${KEY}']",
            "store.url: its `sslmode` would let others",
        ),
        ("password: canary", "store.password: the embedded store has no password"),
    ] {
        let told = mistakes(&store(lines));
        assert!(told.contains(what) && !told.contains("canary"), "{told}");
    }
    let told = settings(&store("url: postgres://me:pw@db.test/x, keys: ['${KEY}']")).warnings;
    assert!(told.iter().any(|told| told.contains("store.url: the secret is in the file")), "{told:?}");
}

#[test]
fn a_key_of_the_store_is_32_bytes_however_it_is_written() {
    let keys = |key: &str| parse("proxy.yaml", &format!("store: {{keys: ['{key}']}}"), &environment);
    let kept = |key: &str| keys(key).map(|settings| settings.store_keys[0].expose().to_owned()).unwrap();
    let bytes = "+/+/+/+/+/+/+/+/+/+/+/+/+/+/+/+/+/+/+/+/+/8=";
    for key in [bytes, bytes.trim_end_matches('='), &bytes.replace('+', "-").replace('/', "_")] {
        assert_eq!(kept(key), bytes);
    }
    assert_eq!(kept(&"ff".repeat(32)), "//////////////////////////////////////////8=");
    assert_eq!(
        keys("c2hvcnQ=").unwrap_err().to_string(),
        "proxy.yaml:1:16: store.keys[0]: expected a key of 32 bytes as base64 or as 64 hexadecimal digits\n\
             hint: make one with `openssl rand -base64 32`"
    );
}

#[test]
fn the_store_s_keys_come_from_one_place() {
    let command = |written: &str| parse("proxy.yaml", &format!("store: {{path: /s, {written}}}"), &environment);
    let settings = command("key_command: ['${HOME}/keys', '--token=${SECRET}', '']").unwrap();
    let expected = KeyCommand {
        program: "/home/ada/keys".into(),
        arguments: vec![Secret::new("--token=hunter2"), Secret::new("")],
        hidden: vec![Secret::new("--token=hunter2")],
    };
    assert_eq!(settings.key_command, Some(expected));
    // LEK-005: what the program is told, an agent under `exec` is not.
    assert_eq!(settings.secret_variables, ["SECRET"]);
    assert!(!format!("{settings:?}").contains("hunter2"));
    assert_eq!(command("key_command: [keys, '${HOME}/x']").unwrap().secret_variables, [""; 0]);
    // No home directory is needed to keep a key in.
    assert!(parse("proxy.yaml", "store: {path: /s, key_command: [keys]}", &|_| None).is_ok());
    for (written, mistake) in [
        (
            "keys: ['${KEY}'], key_command: [keys]",
            "37: store.key_command: the keys come from `store.keys` already\n\
             hint: leave out `store.keys` or `store.key_command`",
        ),
        (
            "key_command: []",
            "19: store.key_command: an empty list runs nothing\nhint: write a program and its arguments",
        ),
        (
            "key_command: ['', x]",
            "33: store.key_command[0]: expected a program\nhint: write its path, or its name if it is in `PATH`",
        ),
        (
            "key_command: keys",
            "32: store.key_command: expected a list, found a string\nhint: put it in brackets, as in `[a, b]`",
        ),
    ] {
        assert_eq!(command(written).unwrap_err().to_string(), format!("proxy.yaml:1:{mistake}"), "{written}");
    }
    let missing = command("key_command: ['${NOWHERE}']").unwrap_err();
    assert_eq!(missing.mistakes.len(), 1, "{missing}");
}

#[test]
fn one_authority_is_resolved_one_way() {
    assert!(mistakes("resolve: {a.test: 127.0.0.1:1}").contains("resolve.a.test: the port is missing"));
    assert!(mistakes("resolve: {'a.test:1': 127.0.0.1}").contains("resolve.a.test:1: expected an address and a port"));
    assert!(mistakes("resolve: {'a.test:1': '127.0.0.1:0'}").contains("resolve.a.test:1: port 0 cannot be dialled"));
    let twice = "resolve:\n  a.test:1: 127.0.0.1:1\n  A.test:1: 127.0.0.1:2\n";
    assert!(mistakes(twice).contains("proxy.yaml:3:13: resolve.A.test:1: this host and port is here twice"));
}

#[test]
fn a_file_that_cannot_be_read_is_a_mistake_without_a_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("proxy.yaml");
    assert_eq!(
        load(&path).unwrap_err().to_string(),
        format!(
            "{}: cannot read the file: No such file or directory (os error 2)\n\
                 hint: write one, or name another with `--config`",
            path.display()
        )
    );
    std::fs::write(&path, b"drain: \xff\xfe").unwrap();
    assert_eq!(
        load(&path).unwrap_err().to_string(),
        format!("{}: cannot read the file: it is not UTF-8", path.display())
    );
}

const REFERENCE: &str = include_str!("../../proxy.yaml");

#[test]
fn the_reference_file_is_valid_as_it_stands() {
    let settings = parse("proxy.yaml", REFERENCE, &|name| (name == "HOME").then(|| "/home/ada".to_owned()));
    let settings = settings.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((settings.providers.len(), settings.routes.len()), (4, 7));
    assert_eq!(settings.warnings, [""; 0]);
}

#[test]
fn the_reference_file_shows_every_key_of_the_schema() {
    let schema = json_schema();
    let mut keys = Vec::new();
    collect_keys(&schema, &mut keys);
    assert!(keys.len() > 30, "{keys:?}");
    for key in keys {
        let shows = |line: &str| line.trim_start_matches([' ', '#', '-']).starts_with(&format!("{key}:"));
        assert!(REFERENCE.lines().any(shows), "{key} is not in proxy.yaml");
    }
}

fn collect_keys(schema: &serde_json::Value, keys: &mut Vec<String>) {
    match schema {
        serde_json::Value::Object(map) => {
            if let Some(serde_json::Value::Object(properties)) = map.get("properties") {
                keys.extend(properties.keys().cloned());
            }
            map.values().for_each(|value| collect_keys(value, keys));
        }
        serde_json::Value::Array(list) => list.iter().for_each(|value| collect_keys(value, keys)),
        _ => {}
    }
}

#[test]
fn the_schema_asks_for_what_the_reader_asks_for() {
    let schema = json_schema();
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(schema["properties"]["drain"]["type"], "string");
    assert_eq!(schema["$defs"]["Provider"]["required"], serde_json::json!(["client_id"]));
    assert_eq!(schema["$defs"]["Provider"]["properties"]["token_url"]["type"], "string");
    assert_eq!(schema["$defs"]["Agent"]["required"], serde_json::json!(["name", "secret", "users"]));
}

#[test]
fn a_provider_that_has_users_consent_says_where_and_for_what() {
    let text = provider(&[
        "auth_url: https://a.test/authorize",
        "issuer: https://a.test",
        "title: Acme & Sons",
        "authorization_code:",
        "  scopes: [read]",
        "  redirect_uri: http://127.0.0.1:8976/callback",
        "required_scopes: [offline_access]",
        "authorization_params: { prompt: consent }",
        "scope_separator: ','",
        "on_missing: { wait: 2m, webhook: 'https://chat.test/hook', command: [notify-send, Sidebearer] }",
    ]);
    let settings = settings(&text);
    let acme = &settings.providers[0];
    assert_eq!((acme.grant, acme.title.as_str()), (Grant::AuthorizationCode, "Acme & Sons"));
    assert_eq!(acme.endpoints.authorization.as_ref().unwrap().as_str(), "https://a.test/authorize");
    assert_eq!(acme.target.scopes, ["offline_access", "read"]);
    assert_eq!(acme.consent.redirect_uri.as_ref().unwrap().as_str(), "http://127.0.0.1:8976/callback");
    assert_eq!(acme.consent.params, [("prompt".to_owned(), "consent".to_owned())]);
    assert_eq!(acme.quirks.scope_separator, ",");
    assert_eq!((acme.on_missing.wait.as_secs(), acme.on_missing.command.len()), (120, 2));
    assert_eq!(settings.admin.unwrap().to_string(), "127.0.0.1:3129");
}

#[test]
fn a_consent_that_somebody_else_could_end_is_refused() {
    // OAU-008, OAU-012
    for (line, expected) in [
        ("  redirect_uri: http://agent.test/callback", "with `http`, the code that comes there can be read on the way"),
        ("  redirect_uri: https://agent.test/elsewhere", "this is not a page that Sidebearer has"),
        ("  redirect_uri: https://agent.test/callback?x=1", "this is not a page that Sidebearer has"),
        ("  redirect_uri: https://agent.test/callback/a/b", "this is not a page that Sidebearer has"),
        ("  redirect_uri: https://agent.test/callback/b", "this is not a page that Sidebearer has for this provider"),
        ("  redirect_uri: https://agent.test/callback/callback", "this is not a page that Sidebearer has"),
        ("  redirect_uri: https://agent.test/callback/callback/a", "this is not a page that Sidebearer has"),
        ("  redirect_uri: https://agent.test/callback/", "this is not a page that Sidebearer has"),
        ("  redirect_uri: https://agent.test/callbacka", "this is not a page that Sidebearer has"),
        ("  redirect_uri: https://agent.test/callback/:x", "this is not a page that Sidebearer has"),
        ("  redirect_uri: https://agent.test/callback/{x}", "this is not a page that Sidebearer has"),
        ("  redirect_uri: javascript:alert(1)", "expected a URL, as in `https://auth.example.com/token`"),
        ("authorization_params: { state: x }", "this parameter is set by other keys"),
        ("authorization_params: { code_challenge_method: plain }", "this parameter is set by other keys"),
        ("revocation_endpoint: http://a.test/revoke", "with `http`, the secrets that go there can be read on the way"),
        (
            "on_missing: { webhook: 'http://chat.test' }",
            "with `http`, the secrets that go there can be read on the way",
        ),
        ("scope_separator: ';'", "expected one of ` `, `,`"),
    ] {
        let text = provider(&["authorization_endpoint: https://a.test/authorize", "authorization_code:", line]);
        let said = mistakes(&text);
        assert!(said.contains(expected), "{line}: {said}");
    }
    for path in ["/callback", "/callback/a"] {
        let line = format!("  redirect_uri: https://agent.test{path}");
        settings(&provider(&["authorization_endpoint: https://a.test/authorize", "authorization_code:", &line]));
    }
}

#[test]
fn a_preset_fills_in_what_is_left_out() {
    let settings = settings(
        "providers:
  github: { client_id: id, client_secret: '${SECRET}', authorization_code: { scopes: [repo] } }
  work: { preset: gitlab, variables: { host: gitlab.work.test }, client_id: id, authorization_code: {} }
  google: { token_endpoint: 'https://own.test/token', client_id: id, authorization_code: {} }
  slack: { preset: none, token_endpoint: 'https://own.test/token', client_id: id, refresh_token: {} }
routes:
  - provider: github
  - provider: work
    paths: [/api/**]
",
    );
    let [github, work, google, slack] = &settings.providers[..] else { panic!("{:?}", settings.providers) };
    assert_eq!(github.title, "GitHub");
    assert_eq!(github.endpoints.token.as_ref().unwrap().as_str(), "https://github.com/login/oauth/access_token");
    assert!(github.quirks.form_answers && github.placeholders.contains(&"GH_TOKEN".to_owned()));
    assert_eq!(work.endpoints.token.as_ref().unwrap().host_str(), Some("gitlab.work.test"));
    assert_eq!(google.endpoints.token.as_ref().unwrap().as_str(), "https://own.test/token");
    assert_eq!(google.endpoints.authorization.as_ref().unwrap().host_str(), Some("accounts.google.com"));
    assert!(google.consent.params.contains(&("access_type".to_owned(), "offline".to_owned())));
    assert_eq!((slack.title.as_str(), slack.endpoints.authorization.as_ref()), ("slack", None));
    let routes: Vec<&str> = settings.routes.iter().map(|route| &*route.name).collect();
    assert_eq!(routes, ["routes[0] api.github.com", "routes[0] uploads.github.com", "routes[1] gitlab.work.test"]);
}

#[test]
fn another_issuer_gets_none_of_a_presets_endpoints() {
    let settings =
        settings("providers: { gitlab: { issuer: 'https://git.own.test', client_id: id, authorization_code: {} } }\n");
    let gitlab = &settings.providers[0];
    assert_eq!((&gitlab.endpoints.token, &gitlab.endpoints.authorization), (&None, &None));
    assert_eq!(gitlab.title, "GitLab");
}

#[test]
fn what_is_wrong_with_a_preset_is_told_at_its_provider() {
    let zendesk = "providers:\n  zendesk: { client_id: id, authorization_code: {} }\n";
    let said = mistakes(zendesk);
    assert!(said.starts_with("proxy.yaml:2:3: providers.zendesk: `variables.subdomain` is missing\nhint: "), "{said}");
    let unknown = "providers:\n  a: { preset: githb, client_id: id, authorization_code: {} }\n";
    let said = mistakes(unknown);
    assert!(
        said.contains("2:16: providers.a.preset: no preset is named `githb`\nhint: did you mean `github`?"),
        "{said}"
    );
    // A value cannot lead a preset's URL to another host.
    for value in ["evil.test/", "evil.test#", "a@evil.test", ""] {
        let text = zendesk.replace("client_id", &format!("variables: {{ subdomain: '{value}' }}, client_id"));
        assert!(mistakes(&text).contains("providers.zendesk.variables.subdomain: expected a word"), "{value}");
    }
}

#[test]
fn every_preset_makes_a_provider() {
    let presets = presets();
    assert!(presets.len() >= 25, "{}", presets.len());
    for preset in &presets {
        let values: String = preset.needs.iter().map(|name| format!("{name}: example.test, ")).collect();
        // Two are there for their placeholders only.
        let endpoints = match preset.name.as_str() {
            "openai" | "anthropic" => "issuer: 'https://own.test', ",
            _ => "",
        };
        let text = format!(
            "providers: {{ {}: {{ {endpoints}variables: {{ {values} }}, client_id: id, client_secret: '${{SECRET}}', \
             authorization_code: {{}} }} }}\nroutes: [{{ provider: {} }}]\n",
            preset.name, preset.name
        );
        let settings =
            parse("proxy.yaml", &text, &environment).unwrap_or_else(|error| panic!("{}: {error}", preset.name));
        let provider = &settings.providers[0];
        assert!(!settings.routes.is_empty() && provider.title == preset.title, "{}", preset.name);
        for url in [&provider.endpoints.token, &provider.endpoints.authorization, &provider.endpoints.revocation] {
            assert!(url.as_ref().is_none_or(|url| url.scheme() == "https"), "{}", preset.name);
        }
    }
}

#[test]
fn agents_say_who_they_are_and_for_whom() {
    let text = "\
listen: 0.0.0.0:3128
providers: { a: { token_endpoint: 'https://a.test/token', client_id: a, refresh_token: {} } }
agents:
  - { name: researcher, secret: '${LONG}', users: [alice, bob], providers: [a] }
  - { name: operator, secret: '${LONGER}', users: ['*'] }
";
    let long = |name: &str| match name {
        "LONG" => Some("0123456789abcdef".to_owned()),
        "LONGER" => Some("0123456789abcdef0".to_owned()),
        other => environment(other),
    };
    let settings = parse("proxy.yaml", text, &long).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(settings.agents.len(), 2);
    assert_eq!(settings.secret_variables, ["LONG", "LONGER"]);
    let said = mistakes(
        "\
providers: { a: { token_endpoint: 'https://a.test/token', client_id: a, refresh_token: {} } }
agents:
  - { name: x, secret: short, users: [alice] }
  - { name: x, secret: 0123456789abcdef, users: [alice, '*'], providers: [b] }
  - { secret: 0123456789abcdef }
  - { name: y, secret: 0123456789abcdef, users: [alice] }
",
    );
    for expected in [
        "3:24: agents[0].secret: a secret of fewer than 16 characters can be guessed",
        "4:57: agents[1].users[1]: `*` beside other names",
        "4:75: agents[1].providers[0]: no provider is named `b`",
        "4:13: agents[1].name: another agent has this name",
        "5:7: agents[2]: `name` is missing",
        "5:7: agents[2]: `users` is missing",
        "6:24: agents[3].secret: another agent has this secret",
    ] {
        assert!(said.contains(expected), "{expected}\n{said}");
    }
    assert!(!said.contains("0123456789abcdef"), "{said}");
    assert!(mistakes("agents: []").contains("agents: an empty list lets nobody in"));
}

#[test]
fn an_admin_listener_that_others_reach_asks_who_they_are() {
    // LST-014
    assert!(mistakes("admin: 0.0.0.0:3129").contains("1:8: admin: other machines could reach this address"));
    assert_eq!(settings("admin: 0.0.0.0:3129\nadmin_token: '${KEY}'\n").admin.unwrap().port(), 3129);
    assert_eq!(settings("admin: off").admin, None);
    for text in [
        "public_url: https://connect.test\nadmin_token: '${KEY}'\n",
        "public_url: http://localhost:8080\n",
        "public_url: https://connect.test\nadmin: off\n",
    ] {
        assert!(settings(text).public_url.is_some());
    }
    for (line, expected) in [
        ("admin_token: short", "admin_token: a secret of fewer than 16 characters can be guessed"),
        ("public_url: http://connect.test", "public_url: with `http`, what browsers send there can be read"),
        ("public_url: https://connect.test/path", "public_url: it has a path"),
        ("return_to: ['http://app.test/']", "return_to[0]: with `http`, what browsers send there can be read"),
        ("return_to: ['https://app.test/?a=b']", "return_to[0]: it has a query"),
        ("public_url: https://connect.test", "1:13: public_url: whoever finds this address could connect"),
        ("admin: here", "admin: expected an address and a port, as in `127.0.0.1:3129`, or `off`"),
    ] {
        assert!(mistakes(line).contains(expected), "{line}: {}", mistakes(line));
    }
}

#[test]
fn the_health_listener_may_be_anywhere_but_where_another_one_is() {
    assert_eq!(settings("").health.unwrap().to_string(), "127.0.0.1:3130");
    assert_eq!(settings("health: 0.0.0.0:3130").health.unwrap().to_string(), "0.0.0.0:3130");
    assert_eq!(settings("health: off").health, None);
    assert_eq!(settings("listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nhealth: 127.0.0.1:0\n").health.unwrap().port(), 0);
    for (text, said) in [
        ("health: here", "1:9: health: expected an address and a port, as in `127.0.0.1:3130`, or `off`"),
        ("health: 127.0.0.1:3129", "1:9: health: another listener is at this place"),
        ("health: 127.0.0.1:3128", "1:9: health: another listener is at this place"),
    ] {
        assert!(mistakes(text).contains(said), "{text}: {}", mistakes(text));
    }
}

#[test]
fn quit_is_off_until_it_is_written_and_needs_the_admin_listener() {
    assert!(!settings("").quit && settings("quit: true").quit);
    let said = "1:7: quit: it is asked for at the admin listener, which is off";
    assert!(mistakes("quit: true\nadmin: off\n").contains(said));
}
