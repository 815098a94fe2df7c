//! The program itself, in a home directory of its own.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use super::log::CANARY;
use super::soon;

/// A home directory with a `proxy.yaml` in it.
pub struct Home {
    pub folder: TempDir,
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Home {
    pub fn with(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("proxy.yaml"), config).unwrap();
        Self { folder }
    }

    /// With a provider for users, whose secrets come from the environment.
    pub fn with_provider() -> Self {
        Self::with(
            "listen: 127.0.0.1:0
admin: 127.0.0.1:0
health: 127.0.0.1:0
providers:
  main:
    token_endpoint: https://auth.test/token
    client_id: agent
    client_secret: ${SECRET}
    refresh_token: {}
routes:
  - host: api.test
    provider: main
",
        )
    }

    pub fn secret(&self) -> String {
        format!("{CANARY}secret-of-the-program")
    }

    /// The program with these arguments, in this home and nothing around it.
    pub fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sidebearer"));
        command.args(arguments).current_dir(self.folder.path()).env_clear();
        command.env("HOME", self.folder.path()).env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("SECRET", self.secret());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Runs it to its end.
    pub async fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Ended {
        ended(self.command(arguments)).await
    }

    /// Runs it to its end with this on standard input.
    pub async fn run_reading<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>, input: &str) -> Ended {
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
        Ended::of(soon(child.wait_with_output()).await.unwrap())
    }

    /// Starts it.
    pub fn start<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Running {
        Running::of(self.command(arguments))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Runs a command to its end.
pub async fn ended(mut command: Command) -> Ended {
    Ended::of(soon(command.output()).await.unwrap())
}

impl Ended {
    fn of(output: std::process::Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let ended = Self { code: code(output.status), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!format!("{ended:?}").contains(CANARY), "it told a secret: {ended:?}");
        ended
    }
}

/// A program that runs; it is killed when this goes.
pub struct Running {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    stderr: Lines<BufReader<ChildStderr>>,
}

impl Running {
    pub fn of(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, stdout, stderr }
    }

    /// The first line of its log that holds this.
    pub async fn logs(&mut self, text: &str) -> String {
        loop {
            let line = soon(self.stderr.next_line()).await.unwrap();
            let line = line.unwrap_or_else(|| panic!("it ended without logging {text:?}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    /// The lines of its output up to the one that holds this.
    pub async fn says(&mut self, text: &str) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let line = soon(self.stdout.next_line()).await.unwrap();
            lines.push(line.unwrap_or_else(|| panic!("it ended without saying {text:?}: {lines:?}")));
            if lines.last().is_some_and(|line| line.contains(text)) {
                return lines;
            }
        }
    }

    pub fn gets(&self, signal: Signal) {
        let id = i32::try_from(self.id()).ok().and_then(Pid::from_raw);
        kill_process(id.unwrap(), signal).unwrap();
    }

    pub fn id(&self) -> u32 {
        self.child.id().expect("it ended")
    }

    /// Its exit code, when it has ended.
    pub async fn ends(&mut self) -> i32 {
        code(soon(self.child.wait()).await.unwrap())
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| panic!("it was killed: {status}"))
}
