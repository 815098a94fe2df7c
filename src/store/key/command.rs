//! Runs the command of `store.key_command`, which prints the store's keys.

use std::fmt::Write;
use std::io::{self, IsTerminal};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::Key;
use crate::process;
use crate::secret::Secret;
use crate::systemd;

/// A program that prints keys, one a line in standard base64. It is run directly: no shell looks at its words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyCommand {
    /// What is run: a path, or a name that is looked for in `PATH`.
    pub program: String,
    /// What it is told.
    pub arguments: Vec<Secret>,
    /// Those arguments that came from the environment or from a file, and are shown to nobody.
    pub hidden: Vec<Secret>,
}

impl KeyCommand {
    /// The keys that it prints, at least one.
    pub(super) async fn keys(&self) -> Result<Vec<Key>, KeyCommandError> {
        // At a terminal it stays in our group, so that it can ask there for a passphrase and Ctrl-C reaches it.
        let printed = self.run(MOST, !io::stdin().is_terminal()).await?;
        let lines = printed.split(|byte| *byte == b'\n').enumerate();
        let written = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
        let key = |(index, line)| {
            let key = std::str::from_utf8(line).ok().and_then(Key::parse);
            key.ok_or_else(|| KeyCommandError::Garbled { program: self.program.clone(), line: index + 1 })
        };
        let keys: Vec<Key> = written.map(key).collect::<Result<_, _>>()?;
        if keys.is_empty() {
            return Err(KeyCommandError::Silent { program: self.program.clone() });
        }
        Ok(keys)
    }

    /// What it prints until it ends well, within `most`. `alone`: in a process group of its own, which is ended as a whole
    /// where it does not end by itself.
    async fn run(&self, most: Duration, alone: bool) -> Result<Zeroizing<Vec<u8>>, KeyCommandError> {
        let program = self.program.clone();
        let mut child = self.start(alone).map_err(|error| self.not_run(error))?;
        let (Some(stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
            unreachable!("both are pipes")
        };
        let mut said = Vec::new();
        let ended = timeout(most, listen(&mut child, stdout, &mut stderr, &mut said)).await;
        match ended {
            Ok(Ok(Some((printed, status)))) if status.success() => return Ok(printed),
            _ => end(&mut child, alone),
        }
        match ended {
            Err(_) => Err(KeyCommandError::Slow { program, most }),
            Ok(Err(error)) => Err(self.not_run(error)),
            Ok(Ok(None)) => Err(KeyCommandError::Long { program }),
            Ok(Ok(Some((_, status)))) => {
                // Its last words may still be in the pipe, which a process that it has left behind may keep open.
                let _ = timeout(LAST_WORDS, hear(&mut stderr, &mut said)).await;
                Err(KeyCommandError::Failed { program, status, said: self.shown(&said) })
            }
        }
    }

    fn start(&self, alone: bool) -> io::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(self.arguments.iter().map(Secret::expose)).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for name in systemd::VARIABLES {
            command.env_remove(name);
        }
        if alone {
            command.process_group(0);
        }
        process::as_before(|| command.spawn())
    }

    fn not_run(&self, error: io::Error) -> KeyCommandError {
        KeyCommandError::Run { program: self.program.clone(), error }
    }

    /// The last lines of what it said, as they may be shown: each begun anew, with no secret and nothing that a terminal
    /// would act on.
    fn shown(&self, said: &[u8]) -> String {
        let text = Zeroizing::new(String::from_utf8_lossy(said).into_owned());
        // What was cut off may be the first half of a key.
        let whole = if said.len() < HEARD { &text[..] } else { text.rsplit_once('\n').map_or("", |(whole, _)| whole) };
        let lines: Vec<&str> = whole.lines().filter(|line| !line.trim().is_empty()).collect();
        let mut shown = String::new();
        for line in &lines[lines.len().saturating_sub(SHOWN_LINES)..] {
            let line = without_keys(&self.without_hidden(line));
            let clean = line.chars().map(|char| if char.is_control() { ' ' } else { char });
            let _ = write!(shown, "\n  | {}", clean.take(SHOWN_CHARACTERS).collect::<String>());
        }
        shown
    }

    /// The line without what came from outside of `proxy.yaml`, nor the longer words in it: `--token=SECRET` is repeated
    /// as `SECRET`.
    fn without_hidden(&self, line: &str) -> Zeroizing<String> {
        let mut line = Zeroizing::new(line.to_owned());
        for hidden in &self.hidden {
            let whole = hidden.expose();
            for word in std::iter::once(whole).chain(whole.split([' ', '=', ':'])).filter(|word| word.len() >= SECRET) {
                line = Zeroizing::new(line.replace(word, MASK));
            }
        }
        line
    }
}

/// Waits for its end, and gives what it printed; nothing where that was too much.
async fn listen(
    child: &mut Child,
    stdout: ChildStdout,
    stderr: &mut ChildStderr,
    said: &mut Vec<u8>,
) -> io::Result<Option<(Zeroizing<Vec<u8>>, ExitStatus)>> {
    let ended = async {
        // All its room at once: a vector that grows leaves copies of what it held.
        let mut printed = Zeroizing::new(Vec::with_capacity(PRINTED + 1));
        stdout.take(PRINTED as u64 + 1).read_to_end(&mut printed).await?;
        // Whoever prints too much is not waited for: it may go on for ever.
        if printed.len() > PRINTED {
            return Ok(None);
        }
        child.wait().await.map(|status| Some((printed, status)))
    };
    tokio::select! {
        ended = ended => ended,
        // It ends only with the other.
        failed = async { hear(stderr, said).await?; std::future::pending().await } => failed,
    }
}

/// Listens until its end, and keeps the beginning.
async fn hear(from: &mut (impl AsyncRead + Unpin), said: &mut Vec<u8>) -> io::Result<()> {
    let room = HEARD.saturating_sub(said.len()) as u64;
    (&mut *from).take(room).read_to_end(said).await?;
    tokio::io::copy(from, &mut tokio::io::sink()).await.map(|_| ())
}

/// Ends it, with all that it has started where they have a group of their own.
fn end(child: &mut Child, alone: bool) {
    let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    if let Some(group) = group.filter(|_| alone) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.start_kill();
}

/// The line without what could be a key: 32 bytes in base64 or in hexadecimal digits.
fn without_keys(line: &str) -> String {
    let of_key = |char: char| char.is_ascii_alphanumeric() || matches!(char, '+' | '/' | '-' | '_');
    let is_key = |word: &str| match word.len() {
        43 => true,
        64 => word.bytes().all(|byte| byte.is_ascii_hexdigit()),
        _ => false,
    };
    let words = line.split_inclusive(|char| !of_key(char));
    let masked = words.map(|piece| {
        let word = piece.trim_end_matches(|char| !of_key(char));
        if is_key(word) { format!("{MASK}{}", &piece[word.len()..]) } else { piece.to_owned() }
    });
    masked.collect()
}

/// Why the command delivers no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyCommandError {
    /// There is no such program, or it may not be run.
    #[error("`store.key_command`: cannot run `{program}`: {error}")]
    Run {
        /// What was to be run.
        program: String,
        /// Why it was not.
        error: io::Error,
    },
    /// It says itself that it failed.
    #[error("`store.key_command`: `{program}` failed, {status}{said}")]
    Failed {
        /// What was run.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// Its last lines on standard error, each on a line of its own, without secrets.
        said: String,
    },
    /// It did not end.
    #[error("`store.key_command`: `{program}` took longer than {}, and was ended", shown_time(*.most))]
    Slow {
        /// What was run.
        program: String,
        /// How long it had.
        most: Duration,
    },
    /// It printed more than keys.
    #[error("`store.key_command`: `{program}` printed more than 64 KiB")]
    Long {
        /// What was run.
        program: String,
    },
    /// It ended well and printed nothing.
    #[error("`store.key_command`: `{program}` printed no key")]
    Silent {
        /// What was run.
        program: String,
    },
    /// It printed something else.
    #[error(
        "`store.key_command`: line {line} of what `{program}` printed is not a key: not 32 bytes in standard base64"
    )]
    Garbled {
        /// What was run.
        program: String,
        /// Which line, from 1.
        line: usize,
    },
}

impl KeyCommandError {
    /// A stable name for machines.
    pub fn code(&self) -> &'static str {
        match self {
            KeyCommandError::Run { .. } => "key_command_not_run",
            KeyCommandError::Failed { .. } => "key_command_failed",
            KeyCommandError::Slow { .. } => "key_command_timed_out",
            KeyCommandError::Long { .. } | KeyCommandError::Garbled { .. } => "key_garbled",
            KeyCommandError::Silent { .. } => "key_missing",
        }
    }

    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            KeyCommandError::Run { error, .. } if error.kind() == io::ErrorKind::NotFound => {
                "install it where the sidecar runs, or write its whole path".into()
            }
            KeyCommandError::Run { .. } => "name a program that this user may run".into(),
            KeyCommandError::Failed { program, .. } | KeyCommandError::Silent { program } => {
                format!("run `{program}` by hand with the same arguments, as the sidecar's user")
            }
            KeyCommandError::Slow { .. } => {
                "check that it reaches its key service; nobody is there to answer what it asks".into()
            }
            KeyCommandError::Long { .. } | KeyCommandError::Garbled { .. } => {
                "it must print keys alone, one a line; what else it has to say goes to standard error".into()
            }
        }
    }
}

fn shown_time(time: Duration) -> String {
    if time.subsec_millis() == 0 { format!("{} s", time.as_secs()) } else { format!("{} ms", time.as_millis()) }
}

const MOST: Duration = Duration::from_secs(30);
const LAST_WORDS: Duration = Duration::from_secs(1);
/// A thousand keys; whatever prints more is no key command.
const PRINTED: usize = 64 << 10;
const HEARD: usize = 64 << 10;
const SHOWN_LINES: usize = 5;
const SHOWN_CHARACTERS: usize = 200;
/// A shorter word is no secret, and masking it would garble the message.
const SECRET: usize = 6;
const MASK: &str = "***";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use rustix::process::{kill_process, test_kill_process};
    use tempfile::TempDir;

    use super::super::{KeyError, Keyring};
    use super::*;

    const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    const OTHER: &str = "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=";

    /// A shell script as the command, with arguments that came from outside.
    fn script(text: &str, arguments: &[&str]) -> (TempDir, KeyCommand) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.sh");
        std::fs::write(&path, text).unwrap();
        let hidden: Vec<_> = arguments.iter().map(|word| Secret::new(*word)).collect();
        let arguments = std::iter::once(Secret::new(path.to_str().unwrap())).chain(hidden.clone()).collect();
        (directory, KeyCommand { program: "sh".into(), arguments, hidden })
    }

    async fn refused(text: &str) -> (String, &'static str, String) {
        let (_directory, command) = script(text, &[]);
        let error = Keyring::from_command(&command).await.unwrap_err();
        (error.to_string(), error.code(), error.hint())
    }

    fn ids(secrets: &[&str]) -> Vec<super::super::KeyId> {
        Keyring::from_secrets(&secrets.iter().map(|secret| Secret::new(*secret)).collect::<Vec<_>>()).unwrap().ids()
    }

    #[tokio::test]
    async fn the_first_line_seals_and_all_open() {
        let (_directory, command) = script(&format!("printf '\\n {KEY} \\r\\n\\n{OTHER}'"), &[]);
        assert_eq!(Keyring::from_command(&command).await.unwrap().ids(), ids(&[KEY, OTHER]));
    }

    #[tokio::test]
    async fn its_words_reach_it_as_they_are() {
        let (_directory, command) =
            script(r#"[ "$1" = '$(id) *' ] && [ -z "$2" ] && echo "$3""#, &["$(id) *", "", KEY]);
        assert_eq!(Keyring::from_command(&command).await.unwrap().ids(), ids(&[KEY]));
    }

    #[tokio::test]
    async fn what_it_leaves_behind_is_not_waited_for() {
        // As `ssh` with ControlPersist does, which keeps standard error open.
        let (directory, command) = script(&format!("sleep 1000 >/dev/null & echo $! >$0.pid; echo {KEY}"), &[]);
        assert!(Keyring::from_command(&command).await.is_ok());
        kill_process(pid(&directory, "keys.sh.pid"), Signal::KILL).unwrap();
    }

    fn pid(directory: &TempDir, file: &str) -> Pid {
        let text = std::fs::read_to_string(directory.path().join(file)).unwrap();
        Pid::from_raw(text.trim().parse().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_command_that_fails_says_why_in_its_own_last_lines() {
        let (said, code, hint) = refused("for i in 1 2 3 4 5 6 7; do echo line $i >&2; done; exit 3").await;
        let lines = "\n  | line 3\n  | line 4\n  | line 5\n  | line 6\n  | line 7";
        assert_eq!(said, format!("`store.key_command`: `sh` failed, exit status: 3{lines}"));
        assert_eq!(code, "key_command_failed");
        assert_eq!(hint, "run `sh` by hand with the same arguments, as the sidecar's user");
        assert_eq!(refused("kill -9 $$").await.0, "`store.key_command`: `sh` failed, signal: 9 (SIGKILL)");
    }

    #[tokio::test]
    async fn a_key_that_a_failing_command_prints_is_shown_nowhere() {
        // LEK-003
        let hexadecimal = "0123456789abcdef".repeat(4);
        let text = format!(
            "echo {KEY}; echo {OTHER} >&2; echo key={hexadecimal}, >&2; echo bad $1: {KEY} >&2; \
             echo unknown ${{1#*=}} >&2; printf '\\033[2Jx' >&2; exit 1"
        );
        let (_directory, command) = script(&text, &["--token=hunter2"]);
        let error = Keyring::from_command(&command).await.unwrap_err();
        let lines = "\n  | ***=\n  | key=***,\n  | bad ***: ***=\n  | unknown ***\n  |  [2Jx";
        assert_eq!(error.to_string(), format!("`store.key_command`: `sh` failed, exit status: 1{lines}"));
        let shown = format!("{error:?} {command:?}");
        assert!(![KEY, OTHER, "hunter2", &hexadecimal].iter().any(|secret| shown.contains(*secret)), "{shown}");
    }

    #[tokio::test]
    async fn much_on_standard_error_neither_stops_it_nor_is_shown() {
        let much = "i=0; while [ $i -lt 3000 ]; do echo 'a line of no use, one of very very many of them' >&2; i=$((i+1)); done";
        let (_directory, command) = script(&format!("{much}; echo {KEY}"), &[]);
        assert!(Keyring::from_command(&command).await.is_ok());
        let (said, ..) = refused(&format!("{much}; exit 1")).await;
        assert_eq!(said.lines().count(), 1 + SHOWN_LINES);
        // The pieces of one long line may be pieces of a key.
        let (said, ..) = refused("head -c 70000 /dev/zero | tr '\\0' A >&2; exit 1").await;
        assert_eq!(said, "`store.key_command`: `sh` failed, exit status: 1");
        let (said, ..) = refused("head -c 60000 /dev/zero | tr '\\0' A >&2; exit 1").await;
        assert_eq!(said.lines().nth(1).unwrap().len(), "  | ".len() + SHOWN_CHARACTERS);
    }

    #[tokio::test]
    async fn a_command_that_prints_no_key_is_refused_by_what_it_printed() {
        let (said, code, hint) = refused("echo; echo warning >&2").await;
        assert_eq!((&*said, code), ("`store.key_command`: `sh` printed no key", "key_missing"));
        assert_eq!(hint, "run `sh` by hand with the same arguments, as the sidecar's user");
        let is_not_a_key = "is not a key: not 32 bytes in standard base64";
        for (second, line) in [("hunter2", 3), ("Y2FuYXJ5", 3), ("\\377", 3)] {
            let (said, code, hint) = refused(&format!("printf '{KEY}\\n\\n{second}\\n'")).await;
            let expected = format!("`store.key_command`: line {line} of what `sh` printed {is_not_a_key}");
            assert_eq!((said, code), (expected, "key_garbled"));
            assert_eq!(hint, "it must print keys alone, one a line; what else it has to say goes to standard error");
        }
        let (said, code, _) = refused("trap '' PIPE; while echo hunter2 || true; do :; done 2>/dev/null").await;
        assert_eq!((&*said, code), ("`store.key_command`: `sh` printed more than 64 KiB", "key_garbled"));
    }

    #[tokio::test]
    async fn a_command_that_cannot_be_run_is_told_by_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        std::fs::write(&data, "").unwrap();
        std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o600)).unwrap();
        let run = async |program: &str| {
            let command = KeyCommand { program: program.into(), arguments: Vec::new(), hidden: Vec::new() };
            let error: KeyError = Keyring::from_command(&command).await.unwrap_err();
            (error.to_string(), error.code(), error.hint())
        };
        let (said, code, hint) = run("no-such-program").await;
        let why = "No such file or directory (os error 2)";
        assert_eq!(said, format!("`store.key_command`: cannot run `no-such-program`: {why}"));
        assert_eq!(
            (code, &*hint),
            ("key_command_not_run", "install it where the sidecar runs, or write its whole path")
        );
        let (said, code, hint) = run(data.to_str().unwrap()).await;
        let why = "Permission denied (os error 13)";
        assert_eq!(said, format!("`store.key_command`: cannot run `{}`: {why}", data.display()));
        assert_eq!((code, &*hint), ("key_command_not_run", "name a program that this user may run"));
    }

    async fn is_gone(pid: Pid) -> bool {
        let state = |stat: String| stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('Z'));
        for _ in 0..500 {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
            if test_kill_process(pid).is_err() || stat.is_ok_and(state) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }

    #[tokio::test]
    async fn a_command_that_does_not_end_is_ended_with_all_that_it_started() {
        let (directory, command) = script("echo $$ >$0.one; sleep 1000 & echo $! >$0.two; wait", &[]);
        let started = Instant::now();
        let error = command.run(Duration::from_secs(1), true).await.unwrap_err();
        assert_eq!(error.to_string(), "`store.key_command`: `sh` took longer than 1 s, and was ended");
        assert_eq!(error.code(), "key_command_timed_out");
        assert_eq!(error.hint(), "check that it reaches its key service; nobody is there to answer what it asks");
        assert!(started.elapsed() < Duration::from_secs(30));
        for name in ["keys.sh.one", "keys.sh.two"] {
            assert!(is_gone(pid(&directory, name)).await, "{name}");
        }
    }
}
