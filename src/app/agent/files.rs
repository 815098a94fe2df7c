//! The files that set up an agent's clients where no variable's own value can.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Variable, text};

/// Brings programs on a Node that ignores proxies under ours.
const NODE: &str = include_str!("node.cjs");
/// What it needs beside it.
const UNDICI: &str = include_str!("undici.cjs");

/// Writes them into an agent's own folder, and gives the variables that name them; `inherited` looks up what it has now.
///
/// # Errors
/// When the folder cannot be written to.
pub fn files(folder: &Path, bundle: &Path, inherited: &dyn Fn(&str) -> Option<String>) -> io::Result<Vec<Variable>> {
    let wgetrc = write(folder.join("wgetrc"), &wgetrc(bundle, inherited))?;
    let node = write(folder.join("node.cjs"), NODE)?;
    write(folder.join("undici.cjs"), UNDICI)?;
    Ok(vec![
        ("WGETRC".to_owned(), text(&wgetrc)),
        ("NODE_OPTIONS".to_owned(), node_options(&text(&node), inherited("NODE_OPTIONS"))),
    ])
}

/// wget built on GnuTLS takes its roots from its configuration only, so it gets one, with the user's own before.
fn wgetrc(bundle: &Path, inherited: &dyn Fn(&str) -> Option<String>) -> String {
    let theirs = inherited("WGETRC").map(PathBuf::from);
    let theirs = theirs.or_else(|| Some(Path::new(&inherited("HOME")?).join(".wgetrc")));
    let lines = theirs.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    format!("{lines}\nca_certificate={}\n", bundle.display())
}

/// Ours comes first, so that what a program loads by itself meets a Node that knows the proxy.
fn node_options(path: &str, inherited: Option<String>) -> String {
    // Node splits the variable at spaces outside of double quotes, in which a backslash takes the next character as it is.
    let quoted = match path.contains([' ', '"', '\\']) {
        true => format!("\"{}\"", path.replace('\\', r"\\").replace('"', "\\\"")),
        false => path.to_owned(),
    };
    match inherited.filter(|value| !value.trim().is_empty()) {
        Some(inherited) => format!("--require {quoted} {inherited}"),
        None => format!("--require {quoted}"),
    }
}

/// Readable to the agent's user alone: a wgetrc may hold passwords.
fn write(path: PathBuf, text: &str) -> io::Result<PathBuf> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
    file.write_all(text.as_bytes())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_options_keep_what_the_agent_had_and_any_folder() {
        assert_eq!(node_options("/tmp/a/node.cjs", None), "--require /tmp/a/node.cjs");
        assert_eq!(
            node_options(r#"/tmp/a "b" \c/node.cjs"#, Some("--no-warnings".into())),
            r#"--require "/tmp/a \"b\" \\c/node.cjs" --no-warnings"#
        );
    }

    #[test]
    fn the_users_own_wgetrc_stays_in_force_and_private() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".wgetrc"), "password=secret").unwrap();
        let agents = folder.path().join("agents");
        std::fs::create_dir(&agents).unwrap();
        let home = text(folder.path());
        files(&agents, Path::new("/ca/bundle.pem"), &|name| (name == "HOME").then(|| home.clone())).unwrap();
        let written = std::fs::read_to_string(agents.join("wgetrc")).unwrap();
        assert_eq!(written, "password=secret\nca_certificate=/ca/bundle.pem\n");
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(agents.join("wgetrc")).unwrap());
        assert_eq!(mode & 0o777, 0o600);
    }
}
