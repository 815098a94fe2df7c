//! Replaces `${VAR}` and `${file:PATH}` inside the values of a document that is already read.
//!
//! Already read: so a value can never add YAML. What was put in is not looked at again, and `$${` stands for a `${`
//! that is meant.

use std::cell::RefCell;
use std::io::Read;
use std::path::PathBuf;

use zeroize::Zeroizing;

use super::Mistake;
use super::locate::{Document, Node, Value, join};
use crate::files;

/// Looks a variable up.
pub(super) type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Looks a variable up for a value at a path.
type Placed<'a> = &'a dyn Fn(&str, &str) -> Option<String>;

/// The longest file that is put into a value, in bytes.
const LONGEST: u64 = 1 << 16;

/// What came of it.
pub(super) struct Replaced {
    /// What could not be replaced.
    pub mistakes: Vec<Mistake>,
    /// The variables that hold secrets.
    pub secrets: Vec<String>,
    /// The files that are named.
    pub files: Vec<PathBuf>,
}

/// Notes the files that are named.
type Files<'a> = &'a RefCell<Vec<PathBuf>>;

/// Replaces in every value of the document.
pub(super) fn interpolate(document: &mut Document, environment: Environment<'_>) -> Replaced {
    let mut mistakes = Vec::new();
    let file = document.file.clone();
    let (secrets, files) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
    let environment = &|path: &str, name: &str| {
        // A path in the home directory is no secret, and no agent does without that.
        if is_secret(path) && name != "HOME" {
            secrets.borrow_mut().push(name.to_owned());
        }
        environment(name)
    };
    in_node(&mut document.root, String::new(), (environment, &files), &mut |node, place, Wrong { what, hint }| {
        let (line, column) = (node.at.line, node.at.column);
        mistakes.push(Mistake { file: file.clone(), line, column, place, what, hint });
    });
    Replaced { mistakes, secrets: secrets.into_inner(), files: files.into_inner() }
}

/// Whether what stands there is for nobody else to see.
fn is_secret(path: &str) -> bool {
    let agents = path.starts_with("agents[") && path.ends_with(".secret");
    matches!(path, "admin_token" | "upstream_proxy" | "store.url" | "store.password")
        || agents
        || path.starts_with("store.keys")
        || path.starts_with("store.key_command[") && path != "store.key_command[0]"
        || path.ends_with(".client_secret")
        || path.starts_with("traces.headers.")
        || path.contains(".params.")
}

fn in_node(
    node: &mut Node,
    path: String,
    sources: (Placed<'_>, Files<'_>),
    refuse: &mut dyn FnMut(&Node, String, Wrong),
) {
    let (environment, files) = sources;
    match &mut node.value {
        Value::List(list) => {
            for (index, item) in list.iter_mut().enumerate() {
                in_node(item, format!("{path}[{index}]"), sources, refuse);
            }
        }
        Value::Mapping(entries) => {
            for entry in entries.iter_mut().filter(|entry| entry.repeats.is_none()) {
                in_node(&mut entry.node, join(&path, &entry.key), sources, refuse);
            }
        }
        Value::Text(text) if text.contains("${") => match replace(text, &|name| environment(&path, name), files) {
            Ok((replaced, from_outside)) => {
                node.value = Value::Text(replaced);
                node.replaced = from_outside;
            }
            Err(wrong) => {
                node.broken = true;
                refuse(node, path, wrong);
            }
        },
        _ => {}
    }
}

/// Why a value was not replaced.
struct Wrong {
    what: String,
    hint: Option<String>,
}

fn wrong(what: impl Into<String>, hint: impl Into<String>) -> Wrong {
    Wrong { what: what.into(), hint: Some(hint.into()) }
}

/// The text with everything put in, and whether anything was.
fn replace(text: &str, environment: Environment<'_>, files: Files<'_>) -> Result<(Zeroizing<String>, bool), Wrong> {
    const MEANT: &str = "write `$${` for a `${` that is meant";
    let mut done = Zeroizing::new(String::new());
    let mut from_outside = false;
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, reference) = (&rest[..at], &rest[at + 2..]);
        if let Some(before) = before.strip_suffix('$') {
            done.push_str(before);
            done.push_str("${");
            rest = reference;
            continue;
        }
        let (name, after) = reference.split_once('}').ok_or_else(|| wrong("a `${` has no `}`", MEANT))?;
        let value = match name.strip_prefix("file:") {
            Some(path) => file(path, environment, files)?,
            None if is_variable(name) => variable(name, environment)?,
            None => return Err(wrong("this is neither `${NAME}` nor `${file:PATH}`", MEANT)),
        };
        done.push_str(before);
        done.push_str(&value);
        from_outside = true;
        rest = after;
    }
    done.push_str(rest);
    Ok((done, from_outside))
}

fn is_variable(name: &str) -> bool {
    let word = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    word && name.bytes().next().is_some_and(|first| !first.is_ascii_digit())
}

fn variable(name: &str, environment: Environment<'_>) -> Result<Zeroizing<String>, Wrong> {
    let value = environment(name).map(Zeroizing::new);
    value.ok_or_else(|| {
        let hint = format!("set `{name}`, or keep the value in a file: `${{file:PATH}}`");
        wrong(format!("the environment variable `{name}` is not set"), hint)
    })
}

/// The text of a file, without its last line's end.
fn file(path: &str, environment: Environment<'_>, named: Files<'_>) -> Result<Zeroizing<String>, Wrong> {
    let unreadable = |error: std::io::Error| Wrong { what: format!("cannot read `{path}`: {error}"), hint: None };
    let in_home = path.strip_prefix("~/").zip(environment("HOME"));
    let place = in_home.map_or_else(|| PathBuf::from(path), |(below, home)| PathBuf::from(home).join(below));
    named.borrow_mut().push(place.clone());
    let file = files::open(&place).map_err(unreadable)?;
    if super::readable_by(&file.metadata().map_err(unreadable)?, 0o004) {
        let hint = format!("`chmod 600 {path}`; for a Kubernetes secret, `defaultMode: 0440`");
        return Err(wrong(format!("every user of this machine can read `{path}`"), hint));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(LONGEST + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > LONGEST {
        return Err(Wrong { what: format!("`{path}` is longer than 64 KiB"), hint: None });
    }
    let end = text.trim_end_matches(['\n', '\r']).len();
    text.truncate(end);
    Ok(text)
}
