//! `sidebearer env`: the variables that bring an agent under the running sidecar.

use std::path::Path;

use serde_json::{Map, Value};

use super::CliError;
use crate::app::agent::{self, Variable};
use crate::ca::files::CaFiles;
use crate::config::Settings;

/// The shell that reads them.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
pub(super) enum Syntax {
    /// POSIX shells: sh, bash, zsh.
    #[default]
    Sh,
    /// fish.
    Fish,
    /// One JSON object.
    Json,
}

/// Prints them.
pub(super) fn env(settings: &Settings, syntax: Syntax) -> Result<u8, CliError> {
    let folder = std::path::absolute(&settings.ca_path).unwrap_or_else(|_| settings.ca_path.clone());
    let files = CaFiles::within(&folder);
    if settings.listen.port() == 0 {
        return Err(CliError::failed(
            "`listen` has port 0, so nobody knows the port in advance",
            "give `listen` a port",
        ));
    }
    if !Path::new(&files.ca).exists() {
        anstream::eprintln!("note: {} is not there yet; `sidebearer run` writes it at its start", files.ca.display());
    }
    let variables = agent::variables(settings.listen, &files, &|name| std::env::var(name).ok());
    anstream::println!("{}", written(&variables, syntax));
    Ok(0)
}

fn written(variables: &[Variable], syntax: Syntax) -> String {
    let lines = |line: fn(&str, &str) -> String| {
        variables.iter().map(|(name, value)| line(name, value)).collect::<Vec<_>>().join("\n")
    };
    match syntax {
        Syntax::Sh => lines(|name, value| format!("export {name}='{}'", value.replace('\'', r"'\''"))),
        Syntax::Fish => {
            lines(|name, value| format!("set -gx {name} '{}'", value.replace('\\', r"\\").replace('\'', r"\'")))
        }
        Syntax::Json => {
            let all: Map<String, Value> =
                variables.iter().map(|(name, value)| (name.clone(), Value::String(value.clone()))).collect();
            format!("{:#}", Value::Object(all))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_never_leaves_its_quotes() {
        let odd = [("A".to_owned(), r"it's $(x) \'".to_owned())];
        assert_eq!(written(&odd, Syntax::Sh), r"export A='it'\''s $(x) \'\'''");
        assert_eq!(written(&odd, Syntax::Fish), r"set -gx A 'it\'s $(x) \\\''");
    }
}
