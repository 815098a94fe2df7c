//! Runs a program for a moment, and sees to it that nothing of it stays behind.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::process::Command;

use crate::app::agent::Variable;

/// As much of what a program says is looked at.
const LISTENED: u64 = 64 << 10;

/// How a program ended, and what it said.
#[derive(Debug)]
pub(super) struct Ended {
    pub how: How,
    pub said: String,
}

/// How a program ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum How {
    /// By itself; without a code a signal ended it.
    Exited(Option<i32>),
    /// We ended it.
    TimedOut,
    /// It did not begin.
    NotStarted(String),
}

/// Runs a program with more variables and without the `hidden` ones, and ends it when its time is over or when nobody waits
/// any more.
pub(super) async fn run(command: &[OsString], variables: &[Variable], hidden: &[String], limit: Duration) -> Ended {
    match start(command, variables, hidden, limit).await {
        Ok(ended) => ended,
        Err(error) => Ended { how: How::NotStarted(error.to_string()), said: String::new() },
    }
}

async fn start(command: &[OsString], variables: &[Variable], hidden: &[String], limit: Duration) -> io::Result<Ended> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    // A file and no pipe: what the program leaves running would keep a pipe open.
    let mut output = tempfile::tempfile()?;
    let mut command = Command::new(program);
    command.args(arguments).envs(variables.iter().map(|(name, value)| (name, value)));
    for name in hidden {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output.try_clone()?);
    let mut child = command.process_group(0).kill_on_drop(true).spawn()?;
    let group = Group(child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)));
    let how = match tokio::time::timeout(limit, child.wait()).await {
        Ok(status) => How::Exited(status?.code()),
        Err(_) => How::TimedOut,
    };
    drop(group);
    Ok(Ended { how, said: heard(&mut output)? })
}

/// A program and what it has started; they end with this.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        }
    }
}

fn heard(output: &mut File) -> io::Result<String> {
    output.rewind()?;
    let mut said = Vec::new();
    output.take(LISTENED).read_to_end(&mut said)?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}
