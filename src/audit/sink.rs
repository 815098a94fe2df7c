//! The trail's file: whole lines at its end, also when it is moved away or its disk is full.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use super::Place;

/// How often it is looked whether the file is still where it was.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where lines are written to.
pub(super) struct Sink {
    place: Place,
    /// None where it has to be opened first.
    file: Option<File>,
    /// The last line in it has no end.
    torn: bool,
    looked: Instant,
}

impl Sink {
    /// Opens it. The file is made, for its owner only, but no folder is.
    pub fn open(place: Place) -> io::Result<Self> {
        let mut sink = Self { place, file: None, torn: false, looked: Instant::now() };
        sink.open_if_closed()?;
        Ok(sink)
    }

    /// Has it opened anew for the next lines.
    pub fn reopen(&mut self) {
        if self.place != Place::Stdout {
            self.file = None;
        }
    }

    /// Appends whole lines in one write: other processes may append to the same file. Gives how many bytes were written,
    /// and why no more.
    pub fn append(&mut self, lines: &[u8], looked_at: Instant) -> (usize, io::Result<()>) {
        if let Err(error) = self.reopen_if_moved(looked_at).and_then(|()| self.open_if_closed()) {
            return (0, Err(error));
        }
        let Some(file) = &mut self.file else { return (0, Err(io::ErrorKind::NotFound.into())) };
        // What a full disk cut off is a line of its own; the whole one follows.
        if self.torn {
            match file.write_all(b"\n") {
                Ok(()) => self.torn = false,
                Err(error) => return (0, Err(error)),
            }
        }
        let (written, result) = write(file, lines);
        self.torn = written > 0 && lines[written - 1] != b'\n';
        (written, result)
    }

    /// Returns when what was appended survives a crash of the machine.
    pub fn sync(&self) -> io::Result<()> {
        match &self.file {
            Some(file) if file.metadata()?.is_file() => file.sync_data(),
            // A pipe and a terminal keep nothing.
            _ => Ok(()),
        }
    }

    fn open_if_closed(&mut self) -> io::Result<()> {
        if self.file.is_some() {
            return Ok(());
        }
        let file = match &self.place {
            Place::Stdout => File::from(io::stdout().as_fd().try_clone_to_owned()?),
            Place::File(path) => OpenOptions::new().append(true).create(true).mode(0o600).open(path)?,
        };
        if let Place::File(path) = &self.place {
            self.torn = file.metadata()?.is_file() && ends_within_a_line(path);
        }
        self.file = Some(file);
        Ok(())
    }

    /// Who moves the file away need not tell; it is noticed.
    fn reopen_if_moved(&mut self, now: Instant) -> io::Result<()> {
        let (Place::File(path), Some(file)) = (&self.place, &self.file) else { return Ok(()) };
        if now.saturating_duration_since(self.looked) < LOOK_EVERY {
            return Ok(());
        }
        self.looked = now;
        let id = |of: &Metadata| (of.dev(), of.ino());
        let ours = id(&file.metadata()?);
        if path.metadata().is_ok_and(|there| id(&there) == ours) {
            return Ok(());
        }
        self.file = None;
        Ok(())
    }
}

/// Whether a process died, or the disk was full, within the last line.
fn ends_within_a_line(path: &Path) -> bool {
    let mut last = [0];
    let read = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)
    });
    read.is_ok() && last != *b"\n"
}

fn write(file: &mut File, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}
