//! An agent's command as a child: it gets the variables and the signals, and its exit code is ours.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use super::AppError;
use super::agent::Variable;

/// Runs a command with more variables, passes signals on to it, and gives its exit code: 127 when there is no such
/// program, 126 when it does not start, 128 and the signal's number when one ended it.
///
/// # Errors
/// When signals or the command's end cannot be waited for.
pub async fn run(command: &[OsString], variables: Vec<Variable>) -> Result<u8, AppError> {
    let Some((program, arguments)) = command.split_first() else {
        return Ok(0);
    };
    let child = Command::new(program).args(arguments).envs(variables).spawn();
    let child = match child {
        Ok(child) => child,
        Err(error) => {
            // As a shell tells the two apart.
            let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            anstream::eprintln!("error: cannot run `{}`: {error}", program.to_string_lossy());
            return Ok(code);
        }
    };
    wait(child).await.map(exit_code).map_err(AppError::Command)
}

async fn wait(mut child: Child) -> io::Result<ExitStatus> {
    let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut user1 = signal(SignalKind::user_defined1())?;
    let mut user2 = signal(SignalKind::user_defined2())?;
    loop {
        let (signal, of_terminal) = tokio::select! {
            status = child.wait() => return status,
            _ = interrupt.recv() => (Signal::INT, true),
            _ = quit.recv() => (Signal::QUIT, true),
            _ = terminate.recv() => (Signal::TERM, false),
            _ = hang_up.recv() => (Signal::HUP, false),
            _ = user1.recv() => (Signal::USR1, false),
            _ = user2.recv() => (Signal::USR2, false),
        };
        // A terminal sends Ctrl-C to the whole foreground group: the command has had it already.
        if of_terminal && in_foreground() {
            continue;
        }
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}

fn in_foreground() -> bool {
    rustix::termios::tcgetpgrp(io::stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

/// The command's own code, or 128 and the signal that ended it, as shells have it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
