//! Loads a proxy and measures what that costs it: the generator, and the upstream, behind the tables of `benches/README.md`.
//!
//! Every command prints one line of JSON, and fails if a single answer was not the right one.

mod bulk;
mod certificates;
mod client;
mod dial;
mod fill;
mod handshakes;
mod http1;
mod http2;
mod idle;
mod latency;
mod pace;
mod process;
mod report;
mod run;
mod shape;
mod start;
mod upstream;

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

#[derive(Parser)]
#[command(name = "load", about = "Loads a proxy, and measures what that costs it")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves what is asked for through the proxies: TLS, plain, and a token endpoint
    Upstream(upstream::Options),
    /// Sends requests on kept connections, as fast as answers come or at a fixed rate
    Run(run::Options),
    /// Makes a new connection for each request
    Handshakes(handshakes::Options),
    /// Opens connections, and holds them
    Idle(idle::Options),
    /// Reads long bodies
    Bulk(bulk::Options),
    /// Puts users with tokens into a store
    Fill(fill::Options),
    /// Starts a proxy, and waits for its first answer
    Start(start::Options),
}

fn main() -> ExitCode {
    let given: Vec<OsString> = std::env::args_os().filter(|argument| argument != "--bench").collect();
    // `cargo bench` and `cargo test --all-targets` run every bench target: nothing is measured unless it is asked for.
    if given.len() == 1 {
        let _ = Cli::command().print_help();
        return ExitCode::SUCCESS;
    }
    match run_command(Cli::parse_from(given).command) {
        Ok(right) => ExitCode::from(u8::from(!right)),
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One thread: the generator has a core to itself or shares it with the upstream, and never takes the proxy's.
fn run_command(command: Command) -> io::Result<bool> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    process::wake_on_time();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            Command::Upstream(options) => upstream::serve(options).await.map(|()| true),
            Command::Run(options) => run::run(options).await?.print(),
            Command::Handshakes(options) => handshakes::run(options).await?.print(),
            Command::Idle(options) => idle::run(options).await?.print(),
            Command::Bulk(options) => bulk::run(options).await?.print(),
            Command::Fill(options) => fill::run(options).await.map(|()| true),
            Command::Start(options) => start::run(options).await?.print(),
        }
    })
}
