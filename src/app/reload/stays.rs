//! What of a new configuration waits for the next start: a running sidecar keeps its listeners and its files.

use std::sync::Arc;

use crate::config::Settings;
use crate::listen::Place;
use crate::proxy::caller::{Agent, Entrance};

/// Gives back what cannot change to what it was, and tells by which keys that was.
pub(super) fn keep(new: &mut Settings, old: &Settings) -> Vec<&'static str> {
    let mut waiting = Vec::new();
    if keep_listeners(&mut new.listen, &old.listen, &new.agents) {
        waiting.push("listen");
    }
    if keep_listeners(&mut new.transparent, &old.transparent, &new.agents) {
        waiting.push("transparent");
    }
    if new.admin != old.admin {
        // All three: the token is for those who reach the old address.
        (new.admin, new.admin_token, new.public_url) = (old.admin, old.admin_token.clone(), old.public_url.clone());
        waiting.push("admin");
    }
    if new.health != old.health {
        new.health = old.health;
        waiting.push("health");
    }
    if new.audit != old.audit {
        new.audit.clone_from(&old.audit);
        waiting.push("audit");
    }
    if new.traces != old.traces {
        new.traces.clone_from(&old.traces);
        waiting.push("traces");
    }
    if new.ca_path != old.ca_path {
        new.ca_path.clone_from(&old.ca_path);
        waiting.push("ca.path");
    }
    if keep_store(new, old) {
        waiting.push("store");
    }
    waiting
}

/// Each listener, in the order in which they were bound, with who comes in there now; whether others are wanted.
fn keep_listeners(new: &mut Vec<(Place, Entrance)>, old: &[(Place, Entrance)], agents: &[Arc<Agent>]) -> bool {
    let mut named = std::mem::take(new);
    let mut changed = false;
    for (place, entrance) in old {
        let same = named.iter().position(|(other, _)| is_same(other, place)).map(|index| named.remove(index));
        changed |= same.as_ref().is_none_or(|(named, _)| named != place);
        let entrance = same.map_or_else(|| left_over(place, entrance, agents), |(_, entrance)| entrance);
        new.push((place.clone(), entrance));
    }
    changed || !named.is_empty()
}

fn is_same(one: &Place, other: &Place) -> bool {
    match (one, other) {
        (Place::Unix { path: one, .. }, Place::Unix { path: other, .. }) => one == other,
        _ => one == other,
    }
}

/// A listener that is named no more is there until the next start. It is shut where that was a permission: it said for whom
/// its callers act, or other machines reach it and need not show who they are.
fn left_over(place: &Place, entrance: &Entrance, agents: &[Arc<Agent>]) -> Entrance {
    let here = place.address().is_none_or(|address| address.ip().to_canonical().is_loopback());
    let speaks = entrance.user.is_some() || entrance.agent.is_some();
    let open = !here && agents.is_empty();
    let shut = entrance.shut || speaks || open;
    Entrance { shut, ..entrance.clone() }
}

fn keep_store(new: &mut Settings, old: &Settings) -> bool {
    let store = |settings: &Settings| {
        let Settings { store_path, store_url, store_keys, key_command, key_path, .. } = settings.clone();
        (store_path, store_url, store_keys, key_command, key_path)
    };
    let (before, changed) = (store(old), store(new) != store(old));
    (new.store_path, new.store_url, new.store_keys, new.key_command, new.key_path) = before;
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn settings(text: &str) -> Settings {
        let environment = |name: &str| (name == "HOME").then(|| "/home/ada".to_owned());
        config::parse("proxy.yaml", text, &environment).unwrap_or_else(|error| panic!("{error}"))
    }

    const AGENTS: &str = "agents:\n  - {name: r, secret: 0123456789abcdef, users: [alice]}\n";

    /// Who comes in at each listener after a change, and what waits.
    fn kept(old: &str, new: &str) -> (Vec<String>, Vec<&'static str>) {
        let (old, mut new) = (settings(old), settings(new));
        let waiting = keep(&mut new, &old);
        let spoken = |(place, entrance): &(Place, Entrance)| {
            let user = entrance.user.as_ref().map_or("-", |user| user.as_str());
            let agent = entrance.agent.as_ref().map_or("-", |agent| agent.name.as_str());
            format!("{place} {user} {agent}{}", if entrance.shut { " shut" } else { "" })
        };
        (new.listen.iter().map(spoken).collect(), waiting)
    }

    #[test]
    fn who_comes_in_at_a_listener_changes_and_where_it_is_does_not() {
        let (listen, waiting) = kept(
            "listen: [127.0.0.1:1, {address: 127.0.0.1:2, user: alice}]",
            "listen: [{address: 127.0.0.1:2, user: bob}, 127.0.0.1:1]",
        );
        assert_eq!((listen, waiting), (vec!["127.0.0.1:1 - -".to_owned(), "127.0.0.1:2 bob -".into()], vec![]));
        let (listen, waiting) = kept("listen: 127.0.0.1:1", "listen: 127.0.0.1:2");
        assert_eq!((listen, waiting), (vec!["127.0.0.1:1 - -".to_owned()], vec!["listen"]));
    }

    #[test]
    fn a_listener_that_the_new_configuration_would_refuse_is_shut() {
        let open = format!("listen: 0.0.0.0:1\n{AGENTS}");
        assert_eq!(kept(&open, "listen: 127.0.0.1:1").0, ["0.0.0.0:1 - - shut"]);
        assert_eq!(kept(&open, &format!("listen: 127.0.0.1:1\n{AGENTS}")).0, ["0.0.0.0:1 - -"]);
        let of_agent = format!("listen: {{address: 127.0.0.1:1, agent: r}}\n{AGENTS}");
        assert_eq!(kept(&of_agent, &format!("listen: 127.0.0.1:2\n{AGENTS}")).0, ["127.0.0.1:1 alice r shut"]);
        let of_user = "listen: [127.0.0.1:1, {address: 127.0.0.1:2, user: alice}]";
        assert_eq!(kept(of_user, "listen: 127.0.0.1:1").0, ["127.0.0.1:1 - -", "127.0.0.1:2 alice - shut"]);
    }

    #[test]
    fn what_is_open_waits_for_the_next_start() {
        let old = settings("admin: 127.0.0.1:1\nadmin_token: 0123456789abcdef\nstore: {path: /a}");
        let mut new = settings("admin: 127.0.0.1:2\nhealth: 127.0.0.1:3\nstore: {path: /b}\nreplay_limit: 1KiB");
        assert_eq!(keep(&mut new, &old), ["admin", "health", "ca.path", "store"]);
        assert_eq!(new, Settings { replay_limit: 1024, warnings: new.warnings.clone(), ..old.clone() });
        let mut token = settings("admin: 127.0.0.1:1\nadmin_token: another-one-of-16\nstore: {path: /a}");
        assert!(keep(&mut token, &old).is_empty());
        assert_ne!(token, old, "the token changes at once");
    }
}
