//! Which proxy of a company leads where, and what is said of one that cannot.

use super::*;

/// A lookup in these variables and those of every test.
fn with_variables<'v>(variables: &'v [(&str, &str)]) -> impl Fn(&str) -> Option<String> + 'v {
    |name| match variables.iter().find(|(known, _)| *known == name) {
        Some((_, value)) => Some((*value).to_owned()),
        None => environment(name),
    }
}

/// What leads to `a.test`: with TLS, and in the clear.
fn leads_to_a_test(text: &str, variables: &[(&str, &str)]) -> (Option<String>, Option<String>) {
    let settings = parse("proxy.yaml", text, &with_variables(variables)).unwrap_or_else(|error| panic!("{error}"));
    let to = |plaintext| {
        let port = if plaintext { 80 } else { 443 };
        let proxy = settings.proxies.to(&Authority::parse("a.test", Some(port)).unwrap(), plaintext)?;
        Some(format!("{}{}", proxy.authority, if proxy.has_credentials() { " as somebody" } else { "" }))
    };
    (to(false), to(true))
}

#[test]
fn a_proxy_leads_out_where_the_file_names_one_and_never_otherwise() {
    // LST-003
    let all = [("HTTPS_PROXY", "http://env:1"), ("http_proxy", "http://env:2"), ("ALL_PROXY", "http://env:3")];
    assert_eq!(leads_to_a_test("", &all), (None, None));
    let both = |proxy: &str| (Some(proxy.to_owned()), Some(proxy.to_owned()));
    let written = "upstream_proxy: http://ada:${SECRET}@corp.test:3128\n";
    assert_eq!(leads_to_a_test(written, &all), both("corp.test:3128 as somebody"));
    assert_eq!(leads_to_a_test("upstream_proxy: http://corp.test:3128", &all), both("corp.test:3128"));
    for direct in ["a.test", ".test", "'*.test'", "'*'", "'a.test:443', 'a.test:80'"] {
        assert_eq!(leads_to_a_test(&format!("{written}no_proxy: [{direct}]"), &all), (None, None), "{direct}");
    }
    let direct = format!("{written}no_proxy: ['a.test:80', b.test, 10.0.0.0/8]");
    assert_eq!(leads_to_a_test(&direct, &[]), (both("corp.test:3128 as somebody").0, None));
}

#[test]
fn the_environments_proxies_are_those_that_curl_would_take() {
    let leads = |variables: &[(&str, &str)]| leads_to_a_test("upstream_proxy: environment", variables);
    let some = |tunnels: &str, plain: &str| {
        let named = |proxy: &str| Some(proxy.to_owned()).filter(|proxy| !proxy.is_empty());
        (named(tunnels), named(plain))
    };
    for (variables, expected) in [
        (&[][..], some("", "")),
        (&[("HTTPS_PROXY", "http://corp:1")], some("corp:1", "")),
        (&[("https_proxy", "corp:1"), ("HTTPS_PROXY", "http://corp:2")], some("corp:1", "")),
        (&[("https_proxy", ""), ("HTTPS_PROXY", "http://corp:2")], some("corp:2", "")),
        // A web server may have set it to what a request said.
        (&[("HTTP_PROXY", "http://corp:1")], some("", "")),
        (&[("http_proxy", "http://u:p@corp:1/")], some("", "corp:1 as somebody")),
        (&[("ALL_PROXY", "http://corp:3")], some("corp:3", "corp:3")),
        (
            &[("ALL_PROXY", "socks5://corp:3"), ("HTTPS_PROXY", "corp:1"), ("http_proxy", "corp:2")],
            some("corp:1", "corp:2"),
        ),
        (&[("all_proxy", "http://corp:3"), ("http_proxy", "http://corp:2")], some("corp:3", "corp:2")),
        (&[("ALL_PROXY", "http://corp:3"), ("no_proxy", "x, .test")], some("", "")),
        (&[("ALL_PROXY", "http://corp:3"), ("NO_PROXY", "*")], some("", "")),
        (&[("ALL_PROXY", "http://corp:3"), ("NO_PROXY", "a.test:80 b.test")], some("corp:3", "")),
    ] {
        assert_eq!(leads(variables), expected, "{variables:?}");
    }
    let also = "upstream_proxy: environment\nno_proxy: ['a.test:443']";
    assert_eq!(leads_to_a_test(also, &[("ALL_PROXY", "http://corp:3"), ("NO_PROXY", "b.test")]), some("", "corp:3"));
}

#[test]
fn what_is_wrong_with_a_proxy_is_told_without_its_password() {
    // CFG-007, LST-002
    for (written, said) in [
        (
            "socks5://ada:hunter2@corp:1080",
            "1:17: upstream_proxy: a SOCKS proxy cannot be used\n\
             hint: name an HTTP proxy, as in `http://proxy.example.com:3128`",
        ),
        (
            "http://ada:${SECRET}/1@corp:3128",
            "1:17: upstream_proxy: this is not the URL of a proxy, as in `http://proxy.example.com:3128`\n\
             hint: in a user name or a password, write `/` as `%2F`, `#` as `%23`, `?` as `%3F`, `%` as `%25`",
        ),
        (
            "http://ada:hunter2@corp:3128/x",
            "1:17: upstream_proxy: the URL of a proxy ends with its port\n\
             hint: in a user name or a password, write `/` as `%2F`, `#` as `%23`, `?` as `%3F`, `%` as `%25`",
        ),
        (
            "hunter2",
            "1:17: upstream_proxy: this is not the URL of a proxy, as in `http://proxy.example.com:3128`\n\
             hint: in a user name or a password, write `/` as `%2F`, `#` as `%23`, `?` as `%3F`, `%` as `%25`",
        ),
        (
            "[http://corp]",
            "1:1: upstream_proxy: expected the URL of a proxy, as in `http://proxy.example.com:3128`, or `environment`, \
             found a list",
        ),
        ("http://127.0.0.1:3128", "1:17: upstream_proxy: this is the sidecar itself\nhint: name the company's proxy"),
        ("http://localhost:3129", "1:17: upstream_proxy: this is the sidecar itself\nhint: name the company's proxy"),
        (
            "http://corp\nno_proxy: [http://a.test, 10.0.0.0/33]",
            "2:12: no_proxy[0]: expected a host name, an address or a network, as in `internal.example`, \
             `10.1.2.3:8080` or `10.0.0.0/8`\n\
             proxy.yaml:2:27: no_proxy[1]: expected a host name, an address or a network, as in `internal.example`, \
             `10.1.2.3:8080` or `10.0.0.0/8`",
        ),
        (
            "http://corp\nno_proxy: a.test",
            "2:11: no_proxy: expected a list, found a string\nhint: put it in brackets, as in `[a, b]`",
        ),
    ] {
        assert_eq!(mistakes(&format!("upstream_proxy: {written}")), format!("proxy.yaml:{said}"));
    }
    let variables = [("ALL_PROXY", "socks5://ada:hunter2@corp:1080")];
    let said = parse("proxy.yaml", "upstream_proxy: environment", &with_variables(&variables)).unwrap_err().to_string();
    assert_eq!(
        said,
        "proxy.yaml:1:17: upstream_proxy: the variable `ALL_PROXY`: a SOCKS proxy cannot be used\n\
         hint: name an HTTP proxy, as in `http://proxy.example.com:3128`"
    );
}

#[test]
fn what_is_odd_about_a_proxy_is_warned_of() {
    // CFG-007
    let warnings = |text: &str, variables: &[(&str, &str)]| {
        let settings = parse("proxy.yaml", text, &with_variables(variables)).unwrap();
        assert!(!format!("{settings:?}").contains("hunter2") && !format!("{settings:?}").contains("aHVudGVy"));
        (settings.warnings[..settings.warnings.len() - 1].to_vec(), settings.secret_variables)
    };
    let none =
        |secret: &str| (Vec::new(), [secret].into_iter().filter(|name| !name.is_empty()).map(str::to_owned).collect());
    let said = |what: &str| (vec![format!("proxy.yaml:1:17: upstream_proxy: {what}")], Vec::new());
    let in_file = "the secret is in the file itself; `${file:PATH}` or `${VAR}` keeps it out";
    assert_eq!(warnings("upstream_proxy: http://a:hunter2@corp\nroutes: []", &[]), said(in_file));
    assert_eq!(warnings("upstream_proxy: http://a:${SECRET}@corp\nroutes: []", &[]), none("SECRET"));
    assert_eq!(warnings("upstream_proxy: http://corp\nroutes: []", &[]), none(""));
    let environment = "upstream_proxy: environment\nroutes: []";
    assert_eq!(warnings(environment, &[("ALL_PROXY", "http://a:hunter2@corp")]), none(""));
    let odd = "the variable `NO_PROXY`: `<local>` is passed over: this is no host name, address or network";
    assert_eq!(warnings(environment, &[("NO_PROXY", "a.test,<local>")]), said(odd));
    let own = "the environment's proxy, 127.0.0.1:3128, is this sidecar itself";
    assert_eq!(warnings(environment, &[("HTTPS_PROXY", "http://127.0.0.1:3128")]), said(own));
    let nothing = "proxy.yaml:1:1: no_proxy: it says nothing without `upstream_proxy`".to_owned();
    assert_eq!(warnings("no_proxy: [a.test]\nroutes: []", &[]), (vec![nothing], Vec::new()));
}
