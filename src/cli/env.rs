//! `sidebearer env`: the variables that bring an agent under the running sidecar.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Map, Value};

use super::CliError;
use crate::app::agent::{self, Variable};
use crate::ca::files::CaFiles;
use crate::config::Settings;
use crate::names::UserName;
use crate::proxy::caller::{Agent, Users};

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

/// Whose variables they are, and for which shell.
#[derive(clap::Args)]
pub(super) struct Options {
    /// The shell that is to read them.
    #[arg(long, value_enum, default_value_t)]
    shell: Syntax,
    /// The agent, where proxy.yaml has `agents`; its secret is then in what is printed.
    #[arg(long, value_name = "NAME")]
    agent: Option<String>,
    /// For whom the agent acts; its one user when left out.
    #[arg(long, value_name = "NAME")]
    user: Option<UserName>,
}

/// Prints them.
pub(super) fn env(settings: &Settings, options: &Options) -> Result<u8, CliError> {
    let folder = std::path::absolute(&settings.ca_path).unwrap_or_else(|_| settings.ca_path.clone());
    let files = CaFiles::within(&folder);
    let (proxy, for_them) = listener(settings, &options.user.clone().unwrap_or_default())?;
    if !Path::new(&files.ca).exists() {
        anstream::eprintln!("note: {} is not there yet; `sidebearer run` writes it at its start", files.ca.display());
    }
    let mut variables = agent::variables(proxy, &files, &|name| std::env::var(name).ok());
    // Where the listener itself says for whom, no secret is needed, and none is shown.
    if !for_them && let Some(agent) = chosen(settings, options.agent.as_deref())? {
        let user = acts_for(agent, options.user.as_ref())?;
        agent::name(&mut variables, proxy, user.as_str(), &agent.secret);
    }
    anstream::println!("{}", written(&variables, options.shell));
    Ok(0)
}

/// The address for an agent that acts for this user, and whether it is there for them alone.
fn listener(settings: &Settings, user: &UserName) -> Result<(SocketAddr, bool), CliError> {
    let at = |wanted: Option<&UserName>| {
        let mut listeners = settings.listen.iter().filter(|(_, entrance)| entrance.user.as_ref() == wanted);
        listeners.find_map(|(place, _)| place.address())
    };
    let (address, for_them) = match (at(Some(user)), at(None)) {
        (Some(address), _) => (address, true),
        (None, Some(address)) => (address, false),
        (None, None) => {
            let what = format!("no listener has an address for `{user}`: variables cannot name a Unix socket");
            return Err(CliError::failed(what, "add an address to `listen`, as `127.0.0.1:3128`"));
        }
    };
    if address.port() == 0 {
        let what = "`listen` has port 0, so nobody knows the port in advance";
        return Err(CliError::failed(what, "give `listen` a port"));
    }
    Ok((address, for_them))
}

/// The agent whose variables are wanted; none where agents have no names.
fn chosen<'a>(settings: &'a Settings, name: Option<&str>) -> Result<Option<&'a Agent>, CliError> {
    let names: Vec<_> = settings.agents.iter().map(|agent| format!("`{}`", agent.name)).collect();
    let hint = || match names.is_empty() {
        true => "proxy.yaml has no `agents`: leave out `--agent`".to_owned(),
        false => format!("agents are {}", names.join(", ")),
    };
    match (name, settings.agents.as_slice()) {
        (None, []) => Ok(None),
        (None, [only]) => Ok(Some(only)),
        (None, _) => Err(CliError::failed(
            "whose variables? proxy.yaml has more than one agent",
            format!("add `--agent`: {}", hint()),
        )),
        (Some(name), agents) => {
            let found = agents.iter().find(|agent| agent.name == name);
            found
                .map(|agent| Some(&**agent))
                .ok_or_else(|| CliError::failed(format!("no agent is named `{name}`"), hint()))
        }
    }
}

/// For whom an agent is to act: whoever is named, or else its one user. For others it would be refused.
fn acts_for(agent: &Agent, named: Option<&UserName>) -> Result<UserName, CliError> {
    let user = match (named, &agent.users) {
        (Some(user), _) => user.clone(),
        (None, Users::These(these)) if these.len() == 1 => these[0].clone(),
        (None, _) => UserName::default(),
    };
    match &agent.users {
        Users::These(these) if !these.contains(&user) => {
            let these: Vec<_> = these.iter().map(|user| format!("`{user}`")).collect();
            let what = format!("the agent `{}` does not act for `{user}`", agent.name);
            Err(CliError::failed(what, format!("add `--user`: its users are {}", these.join(", "))))
        }
        _ => Ok(user),
    }
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
