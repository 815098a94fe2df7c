//! Where log lines go: to people on a terminal, to machines as JSON.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// Human on a terminal, JSON otherwise.
    #[default]
    Auto,
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Starts logging to stderr. `RUST_LOG` wins over `level`.
///
/// Dependencies stay at `warn` unless `RUST_LOG` names them: some of them write whole header maps at `trace`.
pub fn start(format: LogFormat, level: &str) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("warn,sidebearer={level}")));
    let terminal = io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // A second start, as tests in one process make, keeps the first one's form.
    let _ = match format {
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).try_init(),
        LogFormat::Auto if !terminal => lines.json().flatten_event(true).with_current_span(false).try_init(),
        LogFormat::Auto | LogFormat::Human => lines.with_ansi(terminal).with_target(false).try_init(),
    };
}
