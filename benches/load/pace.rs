//! When each request is sent: as soon as the last was answered, or at a fixed rate whatever the answers do.

use std::sync::Mutex as Lock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// One that is due: which it is, and since when.
pub struct Due {
    pub number: u64,
    pub since: Instant,
}

/// Hands out requests to whoever is free to send one.
pub enum Pace {
    Closed {
        sent: AtomicU64,
        last: u64,
        end: Instant,
    },
    /// A request that finds all connections busy waits for one, and its time runs from when it was due: a proxy that
    /// stands still is charged for all that would have been sent meanwhile.
    Open(Mutex<UnboundedReceiver<Due>>),
}

impl Pace {
    /// So many requests, or for so long.
    pub fn closed(requests: u64, long: Duration) -> Self {
        Self::Closed { sent: AtomicU64::new(0), last: requests, end: Instant::now() + long }
    }

    /// So many a second, for so long.
    pub fn open(rate: f64, long: Duration) -> Self {
        let (due, receiver) = unbounded_channel();
        let start = Instant::now();
        // A thread of its own: the runtime's timers are a millisecond coarse.
        thread::spawn(move || {
            for (number, after) in schedule(rate, long).enumerate() {
                let since = start + after;
                thread::sleep(since.saturating_duration_since(Instant::now()));
                if due.send(Due { number: number as u64, since }).is_err() {
                    return;
                }
            }
        });
        Self::Open(Mutex::new(receiver))
    }

    /// The next one, when it is due; nothing at the end.
    pub async fn next(&self) -> Option<Due> {
        match self {
            Self::Closed { sent, last, end } => {
                let number = sent.fetch_add(1, Ordering::Relaxed);
                let since = Instant::now();
                (number < *last && since < *end).then_some(Due { number, since })
            }
            Self::Open(due) => due.lock().await.recv().await,
        }
    }
}

/// How long after the start each request is due. Each is reckoned from the start, so that no error adds up.
pub fn schedule(rate: f64, long: Duration) -> impl Iterator<Item = Duration> {
    let count = (rate * long.as_secs_f64()).round() as u64;
    (0..count).map(move |number| Duration::from_secs_f64(number as f64 / rate))
}

/// What went wrong, and how often.
#[derive(Default)]
pub struct Errors {
    inner: Lock<(u64, Option<String>)>,
}

impl Errors {
    pub fn add(&self, error: impl ToString) {
        let mut errors = self.inner.lock().expect("no panic while it is held");
        errors.0 += 1;
        errors.1.get_or_insert_with(|| error.to_string());
    }

    /// Their number, and the first of them.
    pub fn told(&self) -> (u64, Option<String>) {
        self.inner.lock().expect("no panic while it is held").clone()
    }
}
