//! Why a client may not come through, and what helps.

use std::path::{Path, PathBuf};

use super::probes::{Client, Settings};
use super::verdict::Verdict;

/// A setting that can say otherwise than the variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cause {
    /// As it was named: `~/.curlrc`.
    pub file: String,
    /// From 1.
    pub line: usize,
    pub key: String,
}

/// What a client's files of settings say of proxies and roots. Their values are not looked at: they may hold a password.
pub(super) fn causes(client: &Client, home: Option<&Path>, here: &Path) -> Vec<Cause> {
    client.settings.iter().flat_map(|settings| in_file(settings, home, here)).collect()
}

fn in_file(settings: &Settings, home: Option<&Path>, here: &Path) -> Vec<Cause> {
    let Some(path) = path(settings.file, home, here) else { return Vec::new() };
    let text = std::fs::read(path).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default();
    let lines = text.lines().enumerate();
    lines
        .filter_map(|(index, line)| Some((index + 1, key(line)?)))
        .filter(|(_, key)| settings.keys.contains(&key.as_str()))
        .map(|(line, key)| Cause { file: settings.file.to_owned(), line, key })
        .collect()
}

fn path(file: &str, home: Option<&Path>, here: &Path) -> Option<PathBuf> {
    match (file.strip_prefix("~/"), file.strip_prefix("./")) {
        (Some(below), _) => Some(home?.join(below)),
        (_, Some(below)) => Some(here.join(below)),
        _ => Some(PathBuf::from(file)),
    }
}

/// The key of a line, in the forms that these files have: `key = value`, `key value`, `--key value`, `key: value`.
fn key(line: &str) -> Option<String> {
    let line = line.trim_start().trim_start_matches('-');
    let end = line.find(|c: char| c.is_whitespace() || c == '=' || c == ':').unwrap_or(line.len());
    (end > 0 && !line.starts_with(['#', ';', '['])).then(|| line[..end].to_ascii_lowercase())
}

/// What helps; nothing where nothing is wrong.
pub(super) fn fix(verdict: &Verdict, client: &Client, causes: &[Cause]) -> Option<String> {
    let usual = match verdict {
        Verdict::Direct { .. } => client.direct,
        Verdict::Untrusted { .. } => client.untrusted,
        Verdict::Refused { .. } => "report it, with the version of the program",
        Verdict::NotStarted { .. } => "run it by hand: it does not get as far as a call",
        Verdict::Ok { .. } | Verdict::NotTried { .. } => return None,
    };
    let blamed = matches!(verdict, Verdict::Direct { .. } | Verdict::Untrusted { .. });
    match causes {
        [] => Some(usual.to_owned()),
        causes if blamed => Some(causes.iter().map(Cause::removal).collect::<Vec<_>>().join("; ")),
        _ => Some(usual.to_owned()),
    }
}

impl Cause {
    fn removal(&self) -> String {
        format!("remove `{}` from {}, line {}: it wins over the variables", self.key, self.file, self.line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::probes::Runtime;

    const DIRECT: Verdict = Verdict::Direct { timed_out: false };

    fn client(runtime: &str, name: &str) -> &'static Client {
        let clients = Runtime::of(runtime).unwrap().clients;
        clients.iter().find(|client| client.name == name).unwrap()
    }

    #[test]
    fn a_setting_that_wins_over_the_variables_is_named_with_its_line_and_never_with_its_value() {
        let home = tempfile::tempdir().unwrap();
        let here = tempfile::tempdir().unwrap();
        let found = |runtime| {
            let client = client(runtime, "");
            fix(&DIRECT, client, &causes(client, Some(home.path()), here.path())).unwrap()
        };
        std::fs::write(home.path().join(".curlrc"), "# proxy = x\nsilent\n--proxy http://u:hunter2@corp:8080\n")
            .unwrap();
        std::fs::write(home.path().join(".npmrc"), "https-proxy=http://u:hunter2@corp\nproxyish=1\n").unwrap();
        std::fs::write(home.path().join(".gitconfig"), "[http \"https://x\"]\n\tsslCAInfo = /x\n").unwrap();
        assert_eq!(found("curl"), "remove `proxy` from ~/.curlrc, line 3: it wins over the variables");
        assert_eq!(found("npm"), "remove `https-proxy` from ~/.npmrc, line 1: it wins over the variables");
        assert_eq!(found("git"), "remove `sslcainfo` from ~/.gitconfig, line 2: it wins over the variables");
    }

    #[test]
    fn without_such_a_setting_the_fix_is_the_clients_own() {
        let nowhere = tempfile::tempdir().unwrap();
        let aiohttp = client("python3", "aiohttp");
        let causes = causes(aiohttp, None, nowhere.path());
        let fixed = fix(&DIRECT, aiohttp, &causes).unwrap();
        assert!(fixed.contains("trust_env=True"), "{fixed}");
        assert_eq!(fix(&Verdict::Ok { protocol: "HTTP/2" }, aiohttp, &causes), None);
    }
}
