//! Where log lines go: to people on a terminal, to machines as JSON.

use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use tracing_subscriber::fmt::{FormatEvent, FormatFields, MakeWriter, SubscriberBuilder};
use tracing_subscriber::{EnvFilter, Registry};

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

/// How much of what the sidecar does is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// What somebody has to mend.
    Error,
    /// What somebody should look at.
    Warn,
    /// Each request, and what happens to tokens.
    Info,
    /// How connections end, too.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    fn name(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

/// Changes what is logged.
type Change = Box<dyn Fn(EnvFilter) + Send + Sync>;

/// The log of this process, once it has begun.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    /// None where `RUST_LOG` says what is logged.
    change: Option<Change>,
    /// The level where nothing else is said.
    usual: &'static str,
}

/// Starts logging to stderr. `RUST_LOG` wins over `level`.
///
/// Dependencies stay at `warn` unless `RUST_LOG` names them: some of them write whole header maps at `trace`.
pub fn start(format: LogFormat, level: &'static str) {
    let wished = EnvFilter::try_from_default_env().ok();
    let by_variable = wished.is_some();
    let terminal = io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_env_filter(wished.unwrap_or_else(|| filter(level)));
    let lines = lines.with_writer(io::stderr);
    let json = format == LogFormat::Json || format == LogFormat::Auto && !terminal;
    let change = match json {
        true => begin(lines.json().flatten_event(true).with_current_span(false)),
        false => begin(lines.with_ansi(terminal).with_target(false)),
    };
    // A second start, as tests in one process make, keeps the first one's form.
    if let Some(change) = change {
        let _ = LOG.set(Log { change: Some(change).filter(|_| !by_variable), usual: level });
    }
}

/// Logs so much from now on; as at the start where there is none.
pub fn set_level(level: Option<LogLevel>) {
    let Some(log) = LOG.get() else { return };
    match (&log.change, level) {
        (Some(change), level) => change(filter(level.map_or(log.usual, LogLevel::name))),
        (None, Some(_)) => tracing::warn!("`log_level` has no effect: the variable RUST_LOG is set, and wins"),
        (None, None) => {}
    }
}

fn filter(level: &str) -> EnvFilter {
    EnvFilter::new(format!("warn,sidebearer={level}"))
}

/// Begins to log; none where something else has begun before.
fn begin<N, E, W>(lines: SubscriberBuilder<N, E, EnvFilter, W>) -> Option<Change>
where
    N: for<'w> FormatFields<'w> + Send + Sync + 'static,
    E: FormatEvent<Registry, N> + Send + Sync + 'static,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = lines.with_filter_reloading();
    let filter = lines.reload_handle();
    lines.try_init().ok()?;
    // The only error is that nothing is logged any more.
    Some(Box::new(move |wished| drop(filter.reload(wished))))
}
