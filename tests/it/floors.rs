//! Holds the floors: a module imports only from floors below its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// From the highest floor to the lowest, as the table of `src/lib.rs` has them.
const FLOORS: [&[&str]; 10] = [
    &["main"],
    &["cli"],
    &["app"],
    &["config"],
    &["proxy", "consent", "admin", "health"],
    &["tokens", "connections", "links", "web"],
    &["ca", "upstream", "store"],
    &["oauth"],
    &["routes"],
    &[
        "crypto",
        "host",
        "names",
        "secret",
        "clock",
        "drain",
        "listen",
        "limits",
        "process",
        "seldom",
        "systemd",
        "metrics",
        "files",
        "events",
        "telemetry",
        "audit",
        "traces",
    ],
];
/// Its modules are small and plain, and may use each other.
const GROUND: usize = 10;

#[test]
fn imports_go_down() {
    let mistakes: Vec<String> = sources().iter().flat_map(|(path, text)| upward(path, text)).collect();
    assert!(mistakes.is_empty(), "\n{}\n", mistakes.join("\n"));
}

#[test]
fn an_import_that_goes_up_or_sideways_is_told_with_its_place() {
    let planted = "//! crate::cli\nuse std::io;\n\nuse crate::proxy::{self, Proxy};\nuse crate::{\n    ca::Ca,\n    host,\n};\n\
                   fn f() { crate::app::build(); } // crate::main\n";
    assert_eq!(
        upward(Path::new("store/sqlite.rs"), planted),
        [
            "src/store/sqlite.rs:4: `store` (floor 7) imports `proxy` (floor 5): move the type that it needs down",
            "src/store/sqlite.rs:5: `store` (floor 7) imports `ca` (floor 7): move the type that it needs down",
            "src/store/sqlite.rs:9: `store` (floor 7) imports `app` (floor 3): move the type that it needs down",
        ]
    );
    assert_eq!(upward(Path::new("events.rs"), "use crate::names::Subject;"), [""; 0]);
    assert_eq!(
        upward(Path::new("new.rs"), "")[..],
        ["src/new.rs: `new` has no floor: give it one in tests/it/floors.rs"]
    );
}

#[test]
fn the_architecture_page_names_the_same_floors() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    for (index, modules) in FLOORS.iter().enumerate() {
        let start = format!("//! | {} | ", index + 1);
        let row = page.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_else(|| panic!("no row {start}"));
        let named = row.split(':').next().unwrap_or(row).split('`').skip(1).step_by(2);
        assert_eq!(named.collect::<Vec<_>>(), **modules, "floor {}", index + 1);
    }
}

/// Every source file but the page itself, by its path under `src`.
fn sources() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut found = BTreeMap::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.insert(path.strip_prefix(&root).unwrap().to_owned(), text);
            }
        }
    }
    found.remove(Path::new("lib.rs"));
    found
}

/// The imports of a file that go up or to another module of its floor, each as a sentence.
fn upward(path: &Path, text: &str) -> Vec<String> {
    let own = path.iter().next().and_then(|first| Path::new(first).file_stem()).unwrap().to_str().unwrap();
    let place = format!("src/{}", path.display());
    let Some(own_floor) = floor(own) else {
        return vec![format!("{place}: `{own}` has no floor: give it one in tests/it/floors.rs")];
    };
    let mut mistakes = Vec::new();
    for (line, module) in imports(text) {
        let allowed = |floor| floor > own_floor || floor == GROUND && own_floor == GROUND;
        match floor(&module) {
            _ if module == own => {}
            Some(floor) if allowed(floor) => {}
            Some(floor) => mistakes.push(format!(
                "{place}:{line}: `{own}` (floor {own_floor}) imports `{module}` (floor {floor}): move the type that it needs down"
            )),
            None => mistakes.push(format!("{place}:{line}: `{module}` has no floor: give it one in tests/it/floors.rs")),
        }
    }
    mistakes
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|modules| modules.contains(&module)).map(|index| index + 1)
}

/// The modules behind `crate::`, and behind `sidebearer::` in `main.rs`, each with its line. Comments do not count.
fn imports(text: &str) -> Vec<(usize, String)> {
    let lines = text.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code));
    let code = lines.collect::<Vec<_>>().join("\n");
    let mut found = Vec::new();
    for start in ["crate::", "sidebearer::"] {
        for (at, _) in code.match_indices(start).filter(|(at, _)| stands_alone(&code[..*at])) {
            let line = code[..at].lines().count().max(1);
            found.extend(first_segments(&code[at + start.len()..]).into_iter().map(|module| (line, module)));
        }
    }
    found.sort();
    found
}

fn stands_alone(before: &str) -> bool {
    !before.ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | ':' | '$' | '"'))
}

/// `a` of `a::b`, and `a` and `c` of `{a::{x, y}, c}`.
fn first_segments(path: &str) -> Vec<String> {
    let Some(group) = path.strip_prefix('{') else {
        return vec![path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()];
    };
    let (mut depth, mut members) = (0, vec![String::new()]);
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => members.push(String::new()),
            _ if depth == 0 => members.last_mut().unwrap().push(c),
            _ => {}
        }
    }
    members.iter().map(|member| first_segments(member.trim()).remove(0)).filter(|name| !name.is_empty()).collect()
}
