//! What a file may say of the audit trail.

use super::{mistakes, settings};
use crate::audit::{Place, Wanted};

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
