//! What a file may say of the audit trail and of traces.

use super::{mistakes, settings};
use crate::audit::{Place, Wanted};
use crate::traces::Share;

#[test]
fn the_trail_goes_to_a_file_or_to_standard_output_and_nowhere_else() {
    assert_eq!(settings("").audit, None);
    let file = |path: &str| Place::File(path.into());
    for (written, wanted) in [
        ("audit: {file: ~/audit}", Wanted { place: file("/home/ada/audit"), required: false }),
        ("audit: {file: /var/log/audit, required: true}", Wanted { place: file("/var/log/audit"), required: true }),
        ("audit: {file: '-', required: false}", Wanted { place: Place::Stdout, required: false }),
    ] {
        assert_eq!(settings(written).audit, Some(wanted), "{written}");
    }
    assert_eq!(
        mistakes("audit: {required: yes}"),
        "proxy.yaml:1:1: audit: `file` is missing\nhint: write where to, or `-` for standard output\n\
         proxy.yaml:1:19: audit.required: expected a boolean, found a string\nhint: write `true` or `false`"
    );
}

#[test]
fn spans_go_to_a_collector_with_what_it_has_to_know() {
    assert!(settings("").traces.is_none());
    let traces = |keys: &str| settings(&format!("traces: {{{keys}}}")).traces.unwrap();
    let usual = traces("endpoint: 'http://127.0.0.1:4318'");
    assert_eq!((usual.endpoint.as_str(), usual.share), ("http://127.0.0.1:4318/v1/traces", Share::ALL));
    let shown: Vec<_> = usual.resource.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(shown, [("service.name", "sidebearer"), ("service.version", env!("CARGO_PKG_VERSION"))]);
    for endpoint in ["https://otel.test/otlp/", "https://otel.test/otlp/v1/traces"] {
        assert_eq!(traces(&format!("endpoint: '{endpoint}'")).endpoint.as_str(), "https://otel.test/otlp/v1/traces");
    }
    let keys = "endpoint: 'https://otel.test', sample: 2.5%, headers: {authorization: '${SECRET}'}, resource: {service.name: mine}";
    let given = traces(keys);
    assert_eq!((given.share, given.resource[1].1.as_str()), (Share::new(0.025).unwrap(), "mine"));
    assert_eq!(given.headers["authorization"], "hunter2");
    assert!(!format!("{given:?}").contains("hunter2"));
}

#[test]
fn a_collector_that_is_told_a_secret_in_the_clear_or_what_it_cannot_take_is_refused() {
    assert_eq!(
        mistakes("traces:\n  endpoint: http://otel.test\n  sample: 0.5\n  headers: {a b: x, c: y}"),
        "proxy.yaml:2:13: traces.endpoint: with `http`, the `headers` can be read on the way\nhint: use `https`\n\
         proxy.yaml:3:11: traces.sample: expected a percentage from 0 to 100, as in `10%` or `0.5%`, found a number\n\
         proxy.yaml:4:18: traces.headers.(..): this is no name of a header\nhint: write it as in `authorization`"
    );
    assert_eq!(
        mistakes("traces: {sample: 101%}"),
        "proxy.yaml:1:1: traces: `endpoint` is missing\n\
         hint: write where the collector is, as in `http://127.0.0.1:4318`\n\
         proxy.yaml:1:18: traces.sample: expected a percentage from 0 to 100, as in `10%` or `0.5%`"
    );
}
