//! Holds `tests/CASES.md` to the truth: what it calls tested is named by a test, and what it excuses is not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

#[test]
fn the_page_of_cases_says_what_is_tested() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/CASES.md")).unwrap();
    let mistakes = mistakes(&cases(&page), &named());
    assert!(mistakes.is_empty(), "\n{}\n", mistakes.join("\n"));
}

#[test]
fn a_case_that_is_not_as_the_page_says_is_told() {
    let page = "| AAA-001 | x | tests |\n| AAA-002 | x | tests |\n| AAA-003 | x | no need |\n| AAA-004 | x | soon |\n| AAA-005 | x | |";
    let named = ["AAA-001", "AAA-003", "AAA-004", "AAA-006", "TOK-001"].map(str::to_owned).into();
    assert_eq!(
        mistakes(&cases(page), &named),
        [
            "AAA-002: no test names it",
            "AAA-003: a test names it, and tests/CASES.md says why there is none",
            "AAA-005: neither tests nor a reason",
            "AAA-006: a test names it, and tests/CASES.md does not know it",
        ]
    );
}

/// What the page says of each case.
fn cases(page: &str) -> BTreeMap<&str, &str> {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix('|')?.split_once(" | "));
    let rows = rows.filter(|(id, _)| is_case(id));
    rows.map(|(id, rest)| (id, rest.rsplit('|').next().unwrap_or_default().trim())).collect()
}

fn mistakes(cases: &BTreeMap<&str, &str>, named: &BTreeSet<String>) -> Vec<String> {
    let mut mistakes = Vec::new();
    for (id, said) in cases {
        match (*said, named.contains(*id)) {
            ("", _) => mistakes.push(format!("{id}: neither tests nor a reason")),
            ("tests", false) => mistakes.push(format!("{id}: no test names it")),
            ("tests", true) | ("soon", _) | (_, false) => {}
            (_, true) => mistakes.push(format!("{id}: a test names it, and tests/CASES.md says why there is none")),
        }
    }
    // The page is of these kinds; others are elsewhere.
    let kinds: BTreeSet<&str> = cases.keys().map(|id| &id[..4]).collect();
    let unknown = named.iter().filter(|id| kinds.contains(&id[..4]) && !cases.contains_key(id.as_str()));
    mistakes.extend(unknown.map(|id| format!("{id}: a test names it, and tests/CASES.md does not know it")));
    mistakes
}

/// Every case that a file of `src` or `tests` names, but for this one and the page.
fn named() -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("src"), root.join("tests")];
    let mut named = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            if path.is_dir() && !matches!(name, "target" | "node_modules") && !name.starts_with('.') {
                folders.push(path);
            } else if name != "cases.rs" && matches!(extension, "rs" | "py" | "mjs" | "js") {
                named.extend(ids(&fs::read_to_string(&path).unwrap_or_default()));
            }
        }
    }
    named
}

/// Three letters, a hyphen and three digits, wherever they stand.
fn ids(text: &str) -> impl Iterator<Item = String> {
    text.as_bytes()
        .windows(7)
        .filter_map(|window| str::from_utf8(window).ok())
        .filter(|id| is_case(id))
        .map(str::to_owned)
}

fn is_case(id: &str) -> bool {
    let (letters, digits) = id.split_once('-').unwrap_or_default();
    let letters = letters.len() == 3 && letters.bytes().all(|byte| byte.is_ascii_uppercase());
    letters && digits.len() == 3 && digits.bytes().all(|byte| byte.is_ascii_digit())
}
