//! The command line: what can be typed, and which file does it.

mod ask;
mod ca;
mod check;
mod completions;
mod connect;
mod demo;
mod disconnect;
mod doctor;
mod env;
mod exec;
mod healthcheck;
mod import;
mod quit;
mod run;
mod status;
mod store;

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::app::AppError;
use crate::config::{self, ConfigError, Settings};
use crate::names::{ProviderName, UserName};
use crate::oauth::Provider;
use crate::process;
use crate::telemetry::{self, LogFormat};

/// What the environment does not say is what a stranger types first.
const AFTER_HELP: &str = "\
Try it, with nothing to configure:   sidebearer demo
Connect an account:                  sidebearer connect github
Run an agent behind it:              sidebearer exec -- python agent.py
As a sidecar of its own:             sidebearer run --config proxy.yaml

Exit codes: 0 done, 1 failed, 2 bad usage, 64 bad configuration. `exec` gives its command's.";

/// A sidecar proxy that gives an agent's calls OAuth2 bearer tokens, keeps them fresh, and survives a 401.
#[derive(Parser)]
#[command(version, about, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    common: Common,
}

#[derive(Args, Clone)]
struct Common {
    /// The configuration.
    #[arg(long, short, global = true, env = "SIDEBEARER_CONFIG", default_value = "proxy.yaml", value_name = "FILE")]
    config: PathBuf,

    /// The form of log lines on stderr.
    #[arg(long, global = true, value_enum, default_value_t, env = "SIDEBEARER_LOG")]
    log: LogFormat,
}

#[derive(Subcommand)]
enum Command {
    /// Run the sidecar until SIGTERM or Ctrl-C (the default).
    Run,
    /// Run a command behind a private sidecar on a free port; its exit code is ours.
    Exec {
        /// For whom the command acts.
        #[arg(long, default_value_t, value_name = "NAME")]
        user: UserName,
        /// Have an NSS database trust the CA, for a browser whose HOME or XDG_DATA_HOME is set to where it is.
        #[arg(long, value_name = "DIR")]
        nss: Option<PathBuf>,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
        command: Vec<std::ffi::OsString>,
    },
    /// The whole product with a provider of its own on loopback, nothing to configure.
    Demo {
        /// A command to run against it; without one it stays up until Ctrl-C.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
        command: Vec<std::ffi::OsString>,
    },
    /// Connect an account: a user consents in their browser.
    Connect(connect::Options),
    /// Forget a user's grant, and revoke it at the provider.
    Disconnect {
        /// A provider of proxy.yaml.
        provider: ProviderName,
        /// Whose grant.
        #[arg(long, default_value_t, value_name = "NAME")]
        user: UserName,
    },
    /// Store a refresh token that was obtained elsewhere.
    Import {
        /// A provider of proxy.yaml.
        provider: ProviderName,
        /// Whose it is.
        #[arg(long, default_value_t, value_name = "NAME")]
        user: UserName,
        /// The file that holds it, or `-` for standard input. Never an argument: those are visible to all.
        #[arg(long, value_name = "FILE")]
        refresh_token_file: PathBuf,
    },
    /// Who is connected, until when, and what to do.
    Status {
        /// For scripts.
        #[arg(long)]
        json: bool,
    },
    /// Check proxy.yaml; with a URL, say which route and which credential it gets, and why.
    Check {
        /// The URL of a call.
        url: Option<String>,
        /// List the providers that are known by name.
        #[arg(long, conflicts_with = "url")]
        presets: bool,
        /// The method of the call.
        #[arg(long, default_value = "GET")]
        method: http::Method,
        /// Whose call it is.
        #[arg(long, default_value_t, value_name = "NAME")]
        user: UserName,
        /// For scripts.
        #[arg(long)]
        json: bool,
    },
    /// Does each runtime here use the proxy and trust the CA? Tried, not guessed; and what helps where one does not.
    Doctor(doctor::Options),
    /// The variables that an agent needs: eval "$(sidebearer env)".
    Env(env::Options),
    /// The local CA that agents trust.
    Ca(ca::Options),
    /// Look after the store.
    Store {
        #[command(subcommand)]
        command: store::Command,
    },
    /// Ask a sidecar that runs whether it lives; exits 0 if so. For probes: the image has no shell.
    Healthcheck(healthcheck::Options),
    /// Have a sidecar that runs stop, as SIGTERM would; it needs `quit: true`.
    Quit(quit::Options),
    /// Print the JSON Schema of proxy.yaml.
    Schema,
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
}

/// Runs a command and gives its exit code.
///
/// # Errors
/// See [`CliError`].
pub async fn run(cli: Cli) -> Result<u8, CliError> {
    let Common { config, log } = cli.common;
    // A one-off command speaks for itself; only a sidecar tells what it does.
    let level = match cli.command {
        None | Some(Command::Run) => "info",
        // Its calls fail on purpose, and it says itself which.
        Some(Command::Doctor(_)) => "error",
        _ => "warn",
    };
    telemetry::start(log, level);
    process::prepare();
    let settings = || load(&config);
    match cli.command.unwrap_or(Command::Run) {
        Command::Run => run::run(&config).await,
        Command::Exec { user, nss, command } => exec::exec(settings()?, user, nss.as_deref(), &command).await,
        Command::Demo { command } => demo::demo(&command).await,
        Command::Import { provider, user, refresh_token_file } => {
            import::import(&settings()?, &provider, user, &refresh_token_file).await
        }
        Command::Status { json } => status::status(&settings()?, json).await,
        Command::Connect(options) => connect::connect(&settings()?, &options).await,
        Command::Disconnect { provider, user } => disconnect::disconnect(&settings()?, &provider, user).await,
        Command::Check { presets: true, json, .. } => check::presets(json),
        Command::Check { url: None, .. } => check::file(&config, &settings()?),
        Command::Check { url: Some(url), method, user, json, .. } => {
            check::call(&settings()?, &check::Call { url, method, user }, json).await
        }
        Command::Doctor(options) => doctor::doctor(&config, &options).await,
        Command::Env(options) => env::env(&settings()?, &options),
        Command::Ca(options) => ca::ca(&settings()?, &options).await,
        Command::Store { command } => store::store(&settings()?, &command).await,
        Command::Healthcheck(options) => healthcheck::healthcheck(&config, options).await,
        Command::Quit(options) => quit::quit(&config, options).await,
        Command::Schema => {
            anstream::println!("{:#}", config::json_schema());
            Ok(0)
        }
        Command::Completions { shell } => completions::completions(shell),
    }
}

/// A provider by its name.
fn provider<'a>(settings: &'a Settings, name: &ProviderName) -> Result<&'a Arc<Provider>, CliError> {
    let found = settings.providers.iter().find(|provider| provider.name == *name);
    found.ok_or_else(|| {
        let known: Vec<_> = settings.providers.iter().map(|provider| format!("`{}`", provider.name)).collect();
        let hint = match known.is_empty() {
            true => {
                "add it under `providers` in proxy.yaml; `sidebearer check --presets` lists those known by name".into()
            }
            false => format!("providers are {}", known.join(", ")),
        };
        CliError::failed(format!("no provider is named `{name}`"), hint)
    })
}

fn load(path: &std::path::Path) -> Result<Settings, CliError> {
    let settings = config::load(path)?;
    warn(&settings);
    Ok(settings)
}

fn warn(settings: &Settings) {
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// `proxy.yaml` has mistakes.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The sidecar does not start.
    #[error("{0}")]
    App(#[from] AppError),
    /// Something else, with what to do about it.
    #[error("{what}")]
    Failed {
        /// What is wrong.
        what: String,
        /// What to do next.
        hint: String,
    },
}

impl CliError {
    /// An error with its hint.
    pub fn failed(what: impl Into<String>, hint: impl Into<String>) -> Self {
        CliError::Failed { what: what.into(), hint: hint.into() }
    }

    /// The error as it is shown, with its hint on a line of its own.
    pub fn report(&self) -> String {
        match self {
            // Each mistake brings its own hint.
            CliError::Config(error) => error.to_string().trim_end().to_owned(),
            CliError::App(error) => format!("error: {error}\nhint: {}", error.hint()),
            CliError::Failed { what, hint } => format!("error: {what}\nhint: {hint}"),
        }
    }

    /// 64 for a bad configuration, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Config(_) => 64,
            CliError::App(_) | CliError::Failed { .. } => 1,
        }
    }
}

impl From<crate::app::agent::NssError> for CliError {
    fn from(error: crate::app::agent::NssError) -> Self {
        CliError::failed(error.to_string(), error.hint())
    }
}

impl From<crate::store::StoreError> for CliError {
    fn from(error: crate::store::StoreError) -> Self {
        CliError::App(error.into())
    }
}
