//! The thread that writes the trail, and the queue in front of it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::line::Line;
use super::sink::Sink;
use super::{Intent, Lines};

/// So many lines wait at most.
const MOST: usize = 8192;
/// So many are written at once.
const BATCH: usize = 128;
/// How soon a disk that failed is tried again.
const AGAIN: Duration = Duration::from_millis(500);
/// How often it is said that lines are lost to a slow disk.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// A line that waits, and who waits for it.
pub(super) struct Entry {
    pub line: Line,
    /// There where it is an intent.
    pub told: Option<oneshot::Sender<Intent>>,
}

/// The lines that wait.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Entry>,
    /// Since the thread last looked.
    lost: u64,
    written: u64,
    failed: u64,
    /// Whether nothing could be written when that was last tried.
    failing: bool,
    reopen: bool,
    closed: bool,
}

impl Queue {
    /// Queues a line; false when there is no place for it. It never waits for the disk.
    pub fn push(&self, entry: Entry) -> bool {
        let mut state = self.state();
        if state.waiting.len() >= MOST || state.closed {
            state.failed += 1;
            state.lost += u64::from(entry.told.is_none());
            return false;
        }
        state.waiting.push_back(entry);
        drop(state);
        self.changed.notify_one();
        true
    }

    pub fn reopen(&self) {
        self.state().reopen = true;
        self.changed.notify_one();
    }

    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_one();
    }

    pub fn waiting(&self) -> usize {
        self.state().waiting.len()
    }

    pub fn lines(&self) -> Lines {
        let state = self.state();
        Lines { written: state.written, failed: state.failed, waiting: state.waiting.len(), up: !state.failing }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is something to do, or until a disk that `failed` is to be tried again.
    fn next(&self, failed: bool) -> MutexGuard<'_, State> {
        let mut state = self.state();
        let until = Instant::now() + AGAIN;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // A failing disk is not tried anew for each line that nobody waits for.
            let intent = || state.waiting.iter().any(|entry| entry.told.is_some());
            let work = if failed { left.is_zero() || intent() } else { !state.waiting.is_empty() };
            if work || state.reopen || state.closed {
                return state;
            }
            state = match failed {
                true => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
                false => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl State {
    /// Whoever waits for a line to be written is told that it is not.
    fn refuse_intents(&mut self) {
        let before = self.waiting.len();
        self.waiting.retain_mut(|entry| match entry.told.take() {
            Some(told) => {
                let _ = told.send(Intent::Absent);
                false
            }
            None => true,
        });
        self.failed += (before - self.waiting.len()) as u64;
    }
}

/// Starts the thread. What it gives resolves when the last line is written.
pub(super) fn start(sink: Sink, queue: Arc<Queue>, required: bool) -> io::Result<oneshot::Receiver<()>> {
    let (ends, ended) = oneshot::channel();
    let run = format!("{:016x}", getrandom::u64().map_err(io::Error::other)?);
    let failing = None;
    let mut writer = Writer { sink, queue, required, run, seq: 0, failing, lost: 0, told: None, text: Vec::new() };
    std::thread::Builder::new().name("audit".into()).spawn(move || {
        while writer.step() {}
        let _ = ends.send(());
    })?;
    Ok(ended)
}

struct Writer {
    sink: Sink,
    queue: Arc<Queue>,
    required: bool,
    /// Tells this run's lines from those of others in the same file.
    run: String,
    /// The last line's number. A gap in the file is a line that was lost.
    seq: u64,
    /// Why nothing can be written.
    failing: Option<String>,
    /// Lost, and not yet told of.
    lost: u64,
    told: Option<Instant>,
    text: Vec<u8>,
}

impl Writer {
    /// Writes what waits; false when there will be no more.
    fn step(&mut self) -> bool {
        let queue = self.queue.clone();
        let mut state = queue.next(self.failing.is_some());
        if std::mem::take(&mut state.reopen) {
            self.sink.reopen();
        }
        let lost = std::mem::take(&mut state.lost);
        let many = state.waiting.len().min(BATCH);
        let batch: Vec<Entry> = state.waiting.drain(..many).collect();
        drop(state);

        let left = self.write(batch);
        // Lost lines came after these, as far as anybody knows.
        self.seq += lost;
        self.lost += lost;
        let mut state = queue.state();
        for entry in left.into_iter().rev() {
            state.waiting.push_front(entry);
        }
        state.failing = self.failing.is_some();
        if state.failing {
            state.refuse_intents();
        }
        let over = state.closed && (state.waiting.is_empty() || self.failing.is_some());
        if over {
            let left = std::mem::take(&mut state.waiting).len() as u64;
            state.failed += left;
            self.lost += left;
        }
        drop(state);
        self.tell(over);
        !over
    }

    /// Writes lines, and gives back those that are to be tried again.
    fn write(&mut self, mut batch: Vec<Entry>) -> Vec<Entry> {
        if batch.is_empty() {
            return batch;
        }
        let mut ends = Vec::with_capacity(batch.len());
        self.text.clear();
        for (entry, seq) in batch.iter().zip(self.seq + 1..) {
            entry.line.write(&self.run, seq, &mut self.text);
            ends.push(self.text.len());
        }
        let (written, mut result) = self.sink.append(&self.text, Instant::now());
        let whole = ends.iter().take_while(|end| **end <= written).count();
        self.seq += whole as u64;
        let left = batch.split_off(whole);

        let intents: Vec<_> = batch.into_iter().filter_map(|entry| entry.told).collect();
        let mut fate = Intent::Durable;
        if !intents.is_empty()
            && let Err(error) = self.sink.sync()
        {
            (fate, result) = (Intent::Unknown, Err(error));
        }
        for told in intents {
            let _ = told.send(fate);
        }
        self.queue.state().written += whole as u64;
        self.came_to(result);
        left
    }

    /// Says once when nothing can be written, and once when something can again.
    fn came_to(&mut self, result: io::Result<()>) {
        match (result, &self.failing) {
            (Err(error), None) => {
                let (required, hint) = (self.required, "make room on its disk, or its folder writable");
                tracing::error!(%error, required, hint, "the audit trail cannot be written; said once");
                self.failing = Some(error.to_string());
            }
            (Ok(()), Some(_)) => {
                self.failing = None;
                let lost = std::mem::take(&mut self.lost);
                tracing::warn!(lost, "the audit trail is written again");
            }
            _ => {}
        }
    }

    fn tell(&mut self, over: bool) {
        let due = self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY);
        if self.lost == 0 || !over && (self.failing.is_some() || !due) {
            return;
        }
        self.told = Some(Instant::now());
        let (lost, error) = (std::mem::take(&mut self.lost), self.failing.as_deref().unwrap_or("its disk is too slow"));
        tracing::error!(lost, error, "audit lines are lost");
    }
}
