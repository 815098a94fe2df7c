//! What the present environment says for itself: exceptions that cover routed hosts, keys that an agent would hold.

use serde_json::{Value, json};

use crate::app::agent;
use crate::config::Settings;
use crate::routes::Action;
use crate::secret::PLACEHOLDER;

/// Something about the environment.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Finding {
    /// For scripts; stable.
    pub code: &'static str,
    /// Whether calls go wrong by it.
    pub problem: bool,
    pub what: String,
    pub fix: String,
}

impl Finding {
    pub fn json(&self) -> Value {
        json!({ "code": self.code, "problem": self.problem, "what": self.what, "fix": self.fix })
    }
}

/// What is to be said of the variables that the calls were tried with, and of those that an agent inherits.
pub(super) fn findings(
    settings: Option<&Settings>,
    no_proxy: &str,
    inherited: &dyn Fn(&str) -> Option<String>,
) -> Vec<Finding> {
    let keys = settings.map(|settings| keys(settings, inherited)).unwrap_or_default();
    everything(no_proxy).or_else(|| excluded(settings?, no_proxy)).into_iter().chain(keys).collect()
}

/// NO_PROXY keeps everything from the proxy.
fn everything(no_proxy: &str) -> Option<Finding> {
    no_proxy.split(',').any(|entry| entry.trim() == "*").then(|| Finding {
        code: "no_proxy",
        problem: true,
        what: "NO_PROXY is `*`, which keeps every call from the proxy".to_owned(),
        fix: "take `*` out of NO_PROXY and no_proxy".to_owned(),
    })
}

/// Routed hosts that NO_PROXY keeps from the proxy.
fn excluded(settings: &Settings, no_proxy: &str) -> Option<Finding> {
    let entries: Vec<_> = no_proxy.split(',').map(str::trim).filter(|entry| !entry.is_empty()).collect();
    let routed = settings.routes.iter().filter(|route| route.action != Action::Deny).map(|route| route.host.base());
    let mut excluded: Vec<(&str, &str)> = routed
        .filter_map(|host| Some((host.as_str(), *entries.iter().find(|entry| covers(entry, host.as_str()))?)))
        .collect();
    excluded.sort_unstable();
    excluded.dedup();
    let (_, entry) = excluded.first()?;
    let hosts: Vec<_> = excluded.iter().map(|(host, _)| format!("`{host}`")).collect();
    Some(Finding {
        code: "no_proxy",
        problem: true,
        what: format!("NO_PROXY keeps calls to {} from the proxy", hosts.join(", ")),
        fix: format!("take `{entry}` out of NO_PROXY and no_proxy"),
    })
}

/// Whether an entry of NO_PROXY covers a host, as most clients read it: the host itself and all below it.
fn covers(entry: &str, host: &str) -> bool {
    let name = entry.rsplit_once(':').map_or(entry, |(name, _)| name);
    let name = name.strip_prefix("*.").unwrap_or(name).trim_start_matches('.').to_ascii_lowercase();
    let below = host.strip_suffix(&name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    !name.is_empty() && below
}

/// Keys of routed providers that an agent would hold, where the proxy makes them needless.
fn keys(settings: &Settings, inherited: &dyn Fn(&str) -> Option<String>) -> Vec<Finding> {
    let names = agent::placeholders(settings, &|_| None).into_iter().map(|(name, _)| name);
    let held = names.filter(|name| inherited(name).is_some_and(|value| !value.is_empty() && value != PLACEHOLDER));
    let finding = |name: String| Finding {
        code: "own_key",
        problem: false,
        what: format!("`{name}` holds a key, which an agent would see and does not need"),
        fix: format!("unset {name}: `exec` then sets a placeholder"),
    };
    held.filter(|name| !settings.secret_variables.contains(name)).map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        let text = "providers:
  github:
    client_id: x
    client_secret: ${S}
    authorization_code: {scopes: [repo]}
routes:
  - host: api.github.com
    provider: github
  - host: '*.eu.example.org'
    provider: github
store: {path: /s, keys: ['${K}']}
";
        crate::config::parse("proxy.yaml", text, &|name| match name {
            "K" => Some("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".into()),
            "S" => Some("secret".into()),
            _ => None,
        })
        .unwrap()
    }

    #[test]
    fn an_exception_that_covers_a_routed_host_is_a_problem() {
        let nothing = |_: &str| None;
        let said =
            |no_proxy: &str| findings(Some(&settings()), no_proxy, &nothing).into_iter().next().map(|found| found.what);
        let github = Some("NO_PROXY keeps calls to `api.github.com` from the proxy".to_owned());
        for no_proxy in ["api.github.com", "x, .github.com", "*.github.com", "GitHub.com:443"] {
            assert_eq!(said(no_proxy), github, "{no_proxy}");
        }
        let both = "NO_PROXY keeps calls to `api.github.com`, `eu.example.org` from the proxy".to_owned();
        assert_eq!(said("com,org"), Some(both));
        let all = "NO_PROXY is `*`, which keeps every call from the proxy".to_owned();
        assert_eq!(said("localhost, *"), Some(all.clone()));
        assert_eq!(findings(None, "*", &nothing)[0].what, all);
        assert_eq!(said("localhost,127.0.0.1,::1,hub.com,example.net"), None);
        let found = findings(Some(&settings()), "a,.example.org", &nothing);
        assert_eq!(found[0].fix, "take `.example.org` out of NO_PROXY and no_proxy");
        assert!(found[0].problem);
    }

    #[test]
    fn a_key_that_the_proxy_makes_needless_is_noted_and_a_placeholder_is_not() {
        let found = |value: &str| {
            let value = value.to_owned();
            findings(Some(&settings()), "", &move |name| (name == "GH_TOKEN").then(|| value.clone()))
        };
        let noted = found("ghp_canary");
        assert_eq!((noted.len(), noted[0].code, noted[0].problem), (1, "own_key", false));
        assert!(!format!("{noted:?}").contains("canary"));
        assert_eq!(found(PLACEHOLDER), []);
    }
}
