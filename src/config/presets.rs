//! Fills in what a provider leaves out from what is known of well-known ones: `presets.yaml`, beside this file.
//!
//! It happens in the document, before anything is decoded: a key of a preset is then as if it had been written, checked
//! like any other, and its mistakes are told at the provider that it was filled in for.

use super::Mistake;
use super::decode::{did_you_mean, list};
use super::locate::{Document, Entry, Node, Position, Value, join};
use crate::host::Host;
use crate::routes::Routes;

const PRESETS: &str = include_str!("presets.yaml");
/// What `preset` says to have none.
const NONE: &str = "none";
/// Keys by which a provider is found. Whoever names an issuer means that issuer's endpoints, not the preset's.
const ENDPOINTS: [&str; 5] = [
    "token_endpoint",
    "authorization_endpoint",
    "device_authorization_endpoint",
    "revocation_endpoint",
    "refresh_endpoint",
];
/// The names that the article has for two of them.
const OTHER_NAMES: [(&str, &str); 2] = [("token_endpoint", "token_url"), ("authorization_endpoint", "auth_url")];

/// What is known of one provider, for a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preset {
    /// The name that brings it.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// The hosts of its API.
    pub hosts: Vec<String>,
    /// Whether it can be connected without a browser on the machine (RFC 8628).
    pub device: bool,
    /// Whether a disconnect tells the provider (RFC 7009).
    pub revocation: bool,
    /// The values that `variables` has to give.
    pub needs: Vec<String>,
    /// The variables that its programs insist on.
    pub placeholders: Vec<String>,
}

/// All of them, by name.
pub fn presets() -> Vec<Preset> {
    let document = document();
    entries(&document.root).iter().map(|entry| Preset::of(&entry.key, &entry.node)).collect()
}

/// The variables that programs for these hosts insist on.
pub fn placeholders(routes: &Routes) -> Vec<String> {
    let routed = |host: &String| host.parse::<Host>().is_ok_and(|host| routes.names(&host));
    let used = presets().into_iter().filter(|preset| preset.hosts.iter().any(routed));
    used.flat_map(|preset| preset.placeholders).collect()
}

impl Preset {
    fn of(name: &str, node: &Node) -> Self {
        let texts = |key| find(node, key).map(strings).unwrap_or_default();
        let given = find(node, "variables").map(entries).unwrap_or_default();
        let mut needs = Vec::new();
        for text in all_texts(node) {
            needs.extend(
                references(text).filter(|name| given.iter().all(|entry| entry.key != *name)).map(str::to_owned),
            );
        }
        needs.sort();
        needs.dedup();
        Self {
            name: name.to_owned(),
            title: find(node, "title").and_then(text).unwrap_or(name).to_owned(),
            hosts: texts("hosts"),
            device: find(node, "device_authorization_endpoint").is_some(),
            revocation: find(node, "revocation_endpoint").is_some(),
            needs,
            placeholders: texts("placeholders"),
        }
    }
}

/// Fills in every provider of a document that has a preset; gives what is wrong with that.
pub(super) fn fill_in(document: &mut Document) -> Vec<Mistake> {
    let file = document.file.clone();
    let mut mistakes = Vec::new();
    let Some(providers) = entry_mut(&mut document.root, "providers") else { return mistakes };
    let Value::Mapping(providers) = &mut providers.value else { return mistakes };
    let known = self::document();
    let names: Vec<&str> = entries(&known.root).iter().map(|entry| entry.key.as_str()).collect();
    for provider in providers.iter_mut().filter(|provider| provider.decodes()) {
        let written = find(&provider.node, "preset");
        let wanted = written.and_then(text).unwrap_or(&provider.key);
        let place = join("providers", &provider.key);
        let at = |node: &Node| (node.at.line, node.at.column);
        let mistake =
            |(line, column), place, what, hint| Mistake { file: file.clone(), line, column, place, what, hint };
        match (find(&known.root, wanted), written) {
            (Some(preset), _) => {
                let whole = at(&provider.node);
                for missing in provider_from(&mut provider.node, preset) {
                    let what = format!("`variables.{missing}` is missing");
                    let hint = format!("the preset's URLs and hosts have a `{{{missing}}}` to be replaced");
                    mistakes.push(mistake(whole, place.clone(), what, Some(hint)));
                }
            }
            (None, Some(written)) if wanted != NONE && !written.replaced => {
                let what = format!("no preset is named `{wanted}`");
                let hint = did_you_mean(wanted, &names).unwrap_or_else(|| format!("presets are {}", list(&names)));
                mistakes.push(mistake(at(written), join(&place, "preset"), what, Some(hint)));
            }
            _ => {}
        }
    }
    mistakes
}

/// Fills in one provider; gives the variables that nobody has given a value.
fn provider_from(provider: &mut Node, preset: &Node) -> Vec<String> {
    let own = find(provider, "variables").map(entries).unwrap_or_default();
    let usual = find(preset, "variables").map(entries).unwrap_or_default();
    let values: Vec<(String, String)> =
        own.iter().chain(usual).filter_map(|entry| Some((entry.key.clone(), text(&entry.node)?.to_owned()))).collect();
    let another_issuer = find(provider, "issuer").is_some();
    // How a client proves itself with its secret is of no use to one that has none.
    let public = find(provider, "client_secret").is_none();
    let at = provider.at;
    let mut missing = Vec::new();
    let Value::Mapping(written) = &mut provider.value else { return missing };
    for entry in entries(preset).iter().filter(|entry| entry.key != "variables") {
        let other = OTHER_NAMES.iter().find(|(name, _)| *name == entry.key).map(|(_, other)| *other);
        let given = written.iter().any(|own| own.key == entry.key || Some(own.key.as_str()) == other);
        let other_issuers = another_issuer && ENDPOINTS.contains(&entry.key.as_str());
        if given || other_issuers || (public && entry.key == "client_auth") {
            continue;
        }
        let node = copy(&entry.node, at, &values, &mut missing);
        written.push(Entry { key: entry.key.clone(), at, repeats: None, node });
    }
    missing.sort();
    missing.dedup();
    missing
}

/// A copy that stands where the provider stands, with its `{name}`s replaced.
fn copy(node: &Node, at: Position, values: &[(String, String)], missing: &mut Vec<String>) -> Node {
    let mut broken = false;
    let value = match &node.value {
        Value::Nothing => Value::Nothing,
        Value::Bool(value) => Value::Bool(*value),
        Value::Number(number) => Value::Number(*number),
        Value::Text(text) => {
            let mut replaced = text.to_string();
            for name in references(text) {
                match values.iter().find(|(known, _)| known == name) {
                    Some((_, value)) => replaced = replaced.replace(&format!("{{{name}}}"), value),
                    None => {
                        missing.push(name.to_owned());
                        broken = true;
                    }
                }
            }
            Value::Text(replaced.into())
        }
        Value::List(list) => Value::List(list.iter().map(|item| copy(item, at, values, missing)).collect()),
        Value::Mapping(entries) => Value::Mapping(
            entries
                .iter()
                .map(|entry| Entry {
                    key: entry.key.clone(),
                    at,
                    repeats: None,
                    node: copy(&entry.node, at, values, missing),
                })
                .collect(),
        ),
    };
    Node { at, value, replaced: false, broken }
}

/// The names in the `{name}`s of a text.
fn references(text: &str) -> impl Iterator<Item = &str> {
    text.split('{').skip(1).filter_map(|rest| rest.split_once('}').map(|(name, _)| name))
}

fn document() -> Document {
    Document::read("presets.yaml", PRESETS).expect("the presets are YAML: a test reads them")
}

fn entries(node: &Node) -> &[Entry] {
    if let Value::Mapping(entries) = &node.value { entries } else { &[] }
}

fn find<'a>(node: &'a Node, key: &str) -> Option<&'a Node> {
    entries(node).iter().find(|entry| entry.key == key).map(|entry| &entry.node)
}

fn entry_mut<'a>(node: &'a mut Node, key: &str) -> Option<&'a mut Node> {
    let Value::Mapping(entries) = &mut node.value else { return None };
    entries.iter_mut().find(|entry| entry.key == key).map(|entry| &mut entry.node)
}

fn text(node: &Node) -> Option<&str> {
    if let Value::Text(text) = &node.value { Some(text) } else { None }
}

fn strings(node: &Node) -> Vec<String> {
    let Value::List(list) = &node.value else { return Vec::new() };
    list.iter().filter_map(text).map(str::to_owned).collect()
}

fn all_texts(node: &Node) -> Vec<&str> {
    match &node.value {
        Value::Text(text) => vec![text],
        Value::List(list) => list.iter().flat_map(all_texts).collect(),
        Value::Mapping(entries) => entries.iter().flat_map(|entry| all_texts(&entry.node)).collect(),
        _ => Vec::new(),
    }
}
