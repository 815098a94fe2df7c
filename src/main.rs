//! Parses the command line, runs the command, prints an error with its hint, and gives the exit code.

use std::alloc::System;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use sidebearer::cli::{self, Cli};
use zeroizing_alloc::ZeroAlloc;

/// Wipes what it frees: a token also passes through buffers of TLS, HTTP and JSON, which are not ours to wipe.
#[global_allocator]
static WIPED: ZeroAlloc<System> = ZeroAlloc(System);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            anstream::eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(cli::run(cli));
    // Whatever had to finish has; what still reads a file that does not end is not waited for.
    runtime.shutdown_timeout(Duration::from_secs(5));
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            anstream::eprintln!("{}", error.report());
            ExitCode::from(error.exit_code())
        }
    }
}
