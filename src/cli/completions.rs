//! `sidebearer completions`: what a shell needs to complete our commands.

use std::io;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, CliError};

/// Prints the completions.
pub(super) fn completions(shell: Shell) -> Result<u8, CliError> {
    clap_complete::generate(shell, &mut Cli::command(), "sidebearer", &mut io::stdout());
    Ok(0)
}
