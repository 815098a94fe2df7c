//! An agent's command as a child: it gets the variables and the signals, and its exit code is ours.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};
use tokio::signal::unix::{self, SignalKind, signal};

use super::AppError;
use super::agent::Variable;
use crate::process;

/// Runs a command with more variables and without the `hidden` ones, passes signals on to it, and gives its exit code:
/// 127 when there is no such program, 126 when it does not start, 128 and the signal's number when one ended it.
///
/// # Errors
/// When signals or the command's end cannot be waited for.
pub async fn run(command: &[OsString], variables: Vec<Variable>, hidden: &[String]) -> Result<u8, AppError> {
    let Some((program, arguments)) = command.split_first() else {
        return Ok(0);
    };
    // Before the command starts: a signal that came in between would end us and not it.
    let signals = Signals::listen().map_err(AppError::Command)?;
    let mut command = Command::new(program);
    command.args(arguments);
    for name in hidden {
        command.env_remove(name);
    }
    // After that: `upstream_proxy` may come from the HTTPS_PROXY that the command gets anew.
    command.envs(variables);
    let child = match process::as_before(|| command.spawn()) {
        Ok(child) => child,
        Err(error) => {
            // As a shell tells the two apart.
            let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            anstream::eprintln!("error: cannot run `{}`: {error}", program.to_string_lossy());
            return Ok(code);
        }
    };
    signals.pass_on_to(child).await.map(exit_code).map_err(AppError::Command)
}

/// The signals that a command gets when they are sent to us.
struct Signals {
    interrupt: unix::Signal,
    quit: unix::Signal,
    terminate: unix::Signal,
    hang_up: unix::Signal,
    user1: unix::Signal,
    user2: unix::Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }

    async fn pass_on_to(mut self, mut child: Child) -> io::Result<ExitStatus> {
        let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        loop {
            let (signal, of_terminal) = tokio::select! {
                status = child.wait() => return status,
                _ = self.interrupt.recv() => (Signal::INT, true),
                _ = self.quit.recv() => (Signal::QUIT, true),
                _ = self.terminate.recv() => (Signal::TERM, false),
                _ = self.hang_up.recv() => (Signal::HUP, false),
                _ = self.user1.recv() => (Signal::USR1, false),
                _ = self.user2.recv() => (Signal::USR2, false),
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
}

fn in_foreground() -> bool {
    rustix::termios::tcgetpgrp(io::stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

/// The command's own code, or 128 and the signal that ended it, as shells have it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
