//! Sees that the configuration has changed: by what its files contain, since a ConfigMap is updated by swapping a symlink,
//! which no watch of a file shows.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::signal::unix::Signal;
use tokio::time::Instant;

use super::Reloader;
use crate::config::{self, ConfigError, Reading, Settings};
use crate::events::Reload;
use crate::files;
use crate::systemd;

/// How often it is looked. What has changed takes effect at the second look.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// How long a change that fails for another reason than its files waits for its next try, at most.
const REST_MOST: Duration = Duration::from_secs(60);
/// As much of a file is looked at: no more is ever read.
const LONGEST: u64 = 16 << 20;
/// How often files are read again that change while they are read.
const TRIES: usize = 5;

/// What files contain, or why they cannot be read.
type Print = [u8; 32];

/// A configuration's file, and those that it names.
pub struct Files {
    config: PathBuf,
    all: BTreeSet<PathBuf>,
    /// What they contained when they were read for the last time.
    read: Option<Print>,
}

impl Files {
    /// Reads a configuration for the first time.
    ///
    /// # Errors
    /// Every mistake in it.
    pub async fn load(config: &Path) -> Result<(Self, Settings), ConfigError> {
        let mut files = Self { config: config.to_owned(), all: BTreeSet::new(), read: None };
        let first = files.reading().await;
        files.all = files.named(&first);
        if files.are_there_to_stay().await {
            if let Ok((print, reading)) = files.steady().await {
                files.read = Some(print);
                return reading.settings.map(|settings| (files, settings));
            }
        } else {
            // What comes through a pipe comes once.
            files.read = Some(files.print().await);
        }
        first.settings.map(|settings| (files, settings))
    }

    /// Reads the configuration until nothing has changed while it was read.
    async fn steady(&mut self) -> io::Result<(Print, Reading)> {
        for _ in 0..TRIES {
            let before = self.print().await;
            let reading = self.reading().await;
            let mut all = self.named(&reading);
            if reading.settings.is_err() {
                // Of a text with a mistake it may not be known what it names.
                all.append(&mut self.all.clone());
            }
            let known = std::mem::replace(&mut self.all, all) == self.all;
            if known && self.print().await == before {
                return Ok((before, reading));
            }
        }
        Err(io::Error::other("the configuration's files change while they are read"))
    }

    async fn reading(&self) -> Reading {
        let config = self.config.clone();
        blocking(move || config::read(&config)).await
    }

    fn named(&self, reading: &Reading) -> BTreeSet<PathBuf> {
        reading.files.iter().chain([&self.config]).cloned().collect()
    }

    async fn are_there_to_stay(&self) -> bool {
        let files = self.all.clone();
        blocking(move || !files.iter().any(|path| path.metadata().is_ok_and(|about| !about.is_file()))).await
    }

    /// What the files contain now, and who can read them.
    async fn print(&self) -> Print {
        let files = self.all.clone();
        blocking(move || print(&files)).await
    }
}

/// Watches a configuration's files for a running sidecar.
pub struct Watch {
    files: Files,
    reloader: Reloader,
    /// What they contained at the last look.
    seen: Option<Print>,
    /// Files that could not take effect, when they are tried again, and how long they rested.
    rests: Option<(Print, Instant, Duration)>,
    /// Why it was refused, if it was.
    refused: Option<String>,
}

impl Watch {
    /// For a sidecar that was started with these.
    pub fn new(files: Files, reloader: Reloader) -> Self {
        Self { files, reloader, seen: None, rests: None, refused: None }
    }

    /// Why the files are not in effect, where they are not.
    pub fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// Reloads when files have changed, and at once at each `hang_up`, until the stop begins. systemd, which waits for that,
    /// shows `status` again afterwards.
    pub async fn run(mut self, mut hang_up: Signal, status: String) {
        let stop = self.reloader.inner.lasting.drain.started();
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => return,
                Some(()) = hang_up.recv() => {
                    systemd::reloading();
                    // First: who has moved the trail away may do as they like with it once this is done.
                    if let Some(audit) = &self.reloader.inner.lasting.audit {
                        audit.reopen();
                    }
                    self.reload(true).await;
                    systemd::ready(&status);
                }
                () = tokio::time::sleep(LOOK_EVERY) => self.look().await,
            }
        }
    }

    /// Reloads what has changed and stays as it is: of a file that is being written there is only a part.
    pub async fn look(&mut self) {
        let now = self.files.print().await;
        let stays = self.seen.replace(now) == Some(now);
        let rests = self.rests.is_some_and(|(print, until, _)| print == now && Instant::now() < until);
        if stays && !rests && self.files.read != Some(now) {
            self.reload(false).await;
        }
    }

    /// Reads it all and has it take effect; `asked` when somebody wants to know what comes of it.
    pub async fn reload(&mut self, asked: bool) {
        let (print, reading) = match self.files.steady().await {
            Ok(steady) => steady,
            Err(error) => return self.tell(Err(error.to_string()), asked),
        };
        self.files.read = Some(print);
        let outcome = match reading.settings {
            Ok(settings) => self.reloader.reload(settings).await.map_err(|error| {
                // What failed may not be in the files: the store, a folder. It is tried again.
                self.files.read = None;
                self.rest(print);
                format!("{error}\nhint: {}", error.hint())
            }),
            Err(mistakes) => Err(mistakes.to_string()),
        };
        self.tell(outcome, asked);
    }

    /// Puts off the next try with the same files: soon at first, and then each minute.
    fn rest(&mut self, print: Print) {
        let before = self.rests.filter(|(other, ..)| *other == print).map(|(.., rest)| rest);
        let rest = before.map_or(LOOK_EVERY, |rest| (rest * 2).min(REST_MOST));
        self.rests = Some((print, Instant::now() + rest, rest));
    }

    fn tell(&mut self, outcome: Result<Reload, String>, asked: bool) {
        let events = &self.reloader.inner.lasting.events;
        match outcome {
            Ok(reload) => {
                self.refused = None;
                events.reloaded(&reload);
            }
            Err(error) if self.refused.as_ref() == Some(&error) => {
                if asked {
                    events.reloaded(&Reload::StillRefused);
                }
            }
            Err(error) => {
                self.refused = Some(error.clone());
                events.reloaded(&Reload::Refused { error });
            }
        }
    }
}

fn print(files: &BTreeSet<PathBuf>) -> Print {
    let mut print = Sha256::new();
    for path in files {
        print.update(path.as_os_str().as_encoded_bytes());
        match contents(path) {
            Ok(contents) => print.update(contents),
            Err(error) => print.update(error.to_string()),
        }
    }
    print.finalize().into()
}

/// The hash of what is in a file, as far as anybody would read it, and of whether others can: such a secret is refused.
fn contents(path: &Path) -> io::Result<Print> {
    let file = files::open(path)?;
    let about = file.metadata()?;
    if !about.is_file() {
        // A pipe would be empty the second time.
        return Err(io::Error::new(io::ErrorKind::Unsupported, "no file"));
    }
    let mut bytes = (about.permissions().mode() & 0o044).to_be_bytes().to_vec();
    file.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(Sha256::digest(bytes).into())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("reading files does not panic")
}
