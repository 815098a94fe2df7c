//! `sidebearer doctor`: does each runtime here use the proxy and trust the CA? Tried, not guessed.

mod advice;
mod attempt;
mod bench;
mod command;
mod environment;
mod present;
mod probes;
mod report;
mod verdict;
mod watch;

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use tokio::signal::unix::{SignalKind, signal};

use self::attempt::How;
use self::bench::Bench;
use self::command::{Search, Subject};
use self::environment::Finding;
use self::probes::{Client, Runtime};
use self::report::{Report, Row};
use self::verdict::Verdict;
use super::{CliError, load};
use crate::app::AppError;
use crate::app::agent::Variable;
use crate::config::Settings;

/// How long a program may take.
const LIMIT: Duration = Duration::from_secs(10);
/// So many are tried at once: enough that waiting costs little, and few enough that a small machine is not swamped.
const AT_ONCE: usize = 4;

/// What is tried, and how it is told.
#[derive(clap::Args)]
pub(super) struct Options {
    /// For scripts.
    #[arg(long)]
    json: bool,
    /// Try the present variables as they are, in place of those that `exec` sets.
    #[arg(long)]
    as_is: bool,
    /// Run the command behind a sidecar of its own, and tell what came to it.
    #[arg(long, requires = "command", conflicts_with = "as_is")]
    run: bool,
    /// Try what this command would use, without running it; every runtime on PATH when left out.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Tries, prints what came of it, and gives 0 where all is well.
pub(super) async fn doctor(config: &Path, options: &Options) -> Result<u8, CliError> {
    let settings = settings(config)?;
    if options.run {
        return watch::run(settings, &options.command, options.json).await;
    }
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let report = tokio::select! {
        report = examine(settings.as_ref(), options) => report?,
        // Whatever runs ends with the examination.
        _ = interrupt.recv() => return Ok(130),
        _ = terminate.recv() => return Ok(143),
    };
    match options.json {
        true => anstream::println!("{:#}", report.json()),
        false => anstream::println!("{}", report.table()),
    }
    Ok(u8::from(!report.is_ok()))
}

/// It works without a configuration. One that was named and is not there is a mistake all the same.
fn settings(config: &Path) -> Result<Option<Settings>, CliError> {
    match config == Path::new("proxy.yaml") && !config.exists() {
        true => Ok(None),
        false => load(config).map(Some),
    }
}

fn listen(kind: SignalKind) -> Result<tokio::signal::unix::Signal, CliError> {
    signal(kind).map_err(|error| CliError::failed(format!("cannot listen for signals: {error}"), "report it"))
}

async fn examine(settings: Option<&Settings>, options: &Options) -> Result<Report, CliError> {
    let here = std::env::current_dir().unwrap_or_default();
    let search = Search { path: std::env::var_os("PATH").unwrap_or_default(), here: here.clone() };
    let subjects = match options.command.is_empty() {
        true => search.all(),
        false => search.used_by(&options.command),
    };
    let hidden = settings.map(|settings| settings.secret_variables.clone()).unwrap_or_default();
    let stocks = stream::iter(subjects).map(|subject| Stock::of(subject, &hidden)).buffered(AT_ONCE);
    let stocks: Vec<Stock> = stocks.collect().await;
    let calls: Vec<Call<'_>> = stocks.iter().flat_map(Stock::calls).collect();

    let bench = match Bench::start(calls.len()).await {
        Ok(bench) => bench,
        Err(CliError::App(AppError::Roots(error))) => return Ok(no_roots(error.into())),
        Err(error) => return Err(error),
    };
    let whole = !options.command.is_empty();
    let (variables, findings) = variables(settings, options, &bench).await;
    let home = std::env::home_dir();
    let explained = options.as_is && findings.iter().any(|found| found.problem);
    let place = Place { bench: &bench, variables, hidden: &hidden, home, here, whole, explained };
    let tried = stream::iter(calls.iter().enumerate()).map(|(number, call)| place.make(number, call));
    let tried: Vec<Row> = tried.buffered(AT_ONCE).collect().await;
    let untried = stocks.iter().filter_map(|stock| stock.untried(whole));
    let report = Report { rows: tried.into_iter().chain(untried).collect(), findings };
    bench.end().await;
    Ok(report)
}

/// No sidecar starts in an environment that leads to no roots; `exec` would not either.
fn no_roots(error: AppError) -> Report {
    let finding = Finding { code: "no_roots", problem: true, what: error.to_string(), fix: error.hint() };
    Report { rows: Vec::new(), findings: vec![finding] }
}

/// The variables to try with, and what is to be said of them.
async fn variables(settings: Option<&Settings>, options: &Options, bench: &Bench) -> (Vec<Variable>, Vec<Finding>) {
    let inherited = |name: &str| std::env::var(name).ok();
    if !options.as_is {
        let no_proxy = bench.variables.iter().find(|(name, _)| name == "NO_PROXY").map_or("", |(_, value)| value);
        return (bench.variables.clone(), environment::findings(settings, no_proxy, &inherited));
    }
    let proxy = present::Proxy::named(&inherited).await;
    let no_proxy = ["NO_PROXY", "no_proxy"].iter().filter_map(|name| inherited(name)).collect::<Vec<_>>().join(",");
    let mut findings: Vec<_> = proxy.finding().into_iter().chain(present::ca(&inherited)).collect();
    findings.extend(environment::findings(settings, &no_proxy, &inherited));
    (present::exchanged(&proxy, &bench.variables, &inherited), findings)
}

/// A runtime, and what is in it.
struct Stock {
    subject: Subject,
    version: String,
    /// Their versions.
    modules: HashMap<String, String>,
    /// Why it cannot be asked for its version.
    broken: Option<Verdict>,
}

/// A client of a runtime, which makes one call.
struct Call<'a> {
    runtime: &'static Runtime,
    client: &'static Client,
    start: &'a [OsString],
    stock: &'a Stock,
}

impl Stock {
    async fn of(subject: Subject, hidden: &[String]) -> Self {
        let Subject::Runtime { runtime, start } = &subject else {
            return Self { subject, version: String::new(), modules: HashMap::new(), broken: None };
        };
        let command: Vec<OsString> = start.iter().cloned().chain(runtime.version.iter().map(OsString::from)).collect();
        let ended = attempt::run(&command, &[], hidden, LIMIT).await;
        let broken = match ended.how {
            How::Exited(Some(0)) => None,
            How::Exited(code) => Some(Verdict::not_started(code.unwrap_or(-1), &ended.said)),
            How::TimedOut => Some(Verdict::NotStarted { why: "it does not tell its version in 10 s".to_owned() }),
            How::NotStarted(why) => Some(Verdict::NotStarted { why }),
        };
        let known = |module: &str| !module.is_empty() && runtime.clients.iter().any(|client| client.module == module);
        let modules = ended.said.lines().skip(1).filter_map(|line| line.split_once(' '));
        let modules = modules.filter(|(module, _)| known(module));
        let modules = modules.map(|(module, version)| (module.to_owned(), version.trim().to_owned())).collect();
        Self { version: version(&ended.said), modules, broken, subject }
    }

    /// What is to be tried.
    fn calls(&self) -> Vec<Call<'_>> {
        let (Subject::Runtime { runtime, start }, None) = (&self.subject, &self.broken) else { return Vec::new() };
        let there = |client: &&Client| client.module.is_empty() || self.modules.contains_key(client.module);
        let clients = runtime.clients.iter().filter(there);
        clients.map(|client| Call { runtime, client, start, stock: self }).collect()
    }

    /// What is to be said where nothing can be tried.
    fn untried(&self, whole: bool) -> Option<Row> {
        let (shown, runtime, verdict, fix) = match (&self.subject, &self.broken) {
            (Subject::Runtime { runtime, start }, Some(verdict)) => {
                let fix = "run it by hand: it does not even tell its version".to_owned();
                let shown = if whole { words(start) } else { runtime.name().to_owned() };
                (shown, Some(runtime.name()), verdict.clone(), Some(fix))
            }
            (Subject::Unknown { name, why }, _) => (name.clone(), None, Verdict::NotTried { why: why.clone() }, None),
            (Subject::Runtime { .. }, None) => return None,
        };
        let (version, client_version) = (String::new(), String::new());
        Some(Row { shown, runtime, version, client: "", client_version, verdict, fix })
    }
}

/// Where calls are made.
struct Place<'a> {
    bench: &'a Bench,
    variables: Vec<Variable>,
    hidden: &'a [String],
    home: Option<PathBuf>,
    here: PathBuf,
    /// Whether programs are shown with their whole path: a command's Python is one of several.
    whole: bool,
    /// Whether the variables themselves are wrong, so that no client needs a fix of its own.
    explained: bool,
}

impl Place<'_> {
    async fn make(&self, number: usize, call: &Call<'_>) -> Row {
        let (url, folder) = (Bench::url(number), self.bench.folder().display().to_string());
        let filled_in =
            call.client.arguments.iter().map(|text| text.replace("{url}", &url).replace("{folder}", &folder));
        let command: Vec<OsString> = call.start.iter().cloned().chain(filled_in.map(OsString::from)).collect();
        let own = call.runtime.environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let variables: Vec<Variable> = self.variables.iter().cloned().chain(own).collect();
        let ended = attempt::run(&command, &variables, self.hidden, LIMIT).await;
        let verdict = Verdict::of(self.bench.seen(number).await, &ended);
        let causes = advice::causes(call.client, self.home.as_deref(), &self.here);
        Row {
            shown: if self.whole { words(call.start) } else { call.runtime.name().to_owned() },
            runtime: Some(call.runtime.name()),
            version: call.stock.version.clone(),
            client: call.client.name,
            client_version: call.stock.modules.get(call.client.module).cloned().unwrap_or_default(),
            fix: advice::fix(&verdict, call.client, &causes).filter(|_| !(self.explained && causes.is_empty())),
            verdict,
        }
    }
}

/// The first thing that looks like a version: `curl 7.88.1 (x86_64..)`, `v22.21.0`, `openjdk version "17.0.15"`.
fn version(said: &str) -> String {
    // Every JVM tells so of a variable first.
    let lines = said.lines().filter(|line| !line.starts_with("Picked up "));
    let words = lines.flat_map(str::split_whitespace).map(|word| word.trim_matches(['v', '"', '(', ')', ',']));
    let is_version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
    words.into_iter().find(is_version).unwrap_or_default().to_owned()
}

fn words(command: &[OsString]) -> String {
    command.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_whatever_a_program_says_of_itself() {
        for (said, found) in [
            ("curl 7.88.1 (x86_64-pc-linux-gnu) libcurl/7.88.1", "7.88.1"),
            ("v22.21.0\n", "22.21.0"),
            ("Picked up JAVA_TOOL_OPTIONS: -Dx=127.0.0.1\nopenjdk version \"17.0.15\" 2025-04-15", "17.0.15"),
            ("gh version 2.23.0 (2023-02-27)", "2.23.0"),
            ("no number", ""),
        ] {
            assert_eq!(version(said), found);
        }
    }
}
