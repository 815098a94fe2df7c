//! The audit trail: a line for each use of a credential, written beside the requests and not by them.
//!
//! A use is a request that was sent, or may have been, with a token. Its line is queued when its answer's head is there
//! or will not come any more, and a thread writes it. When nothing can be written, lines wait, then are lost and
//! counted, and no request notices. Where the trail is required it is written ahead: before a token is sent, a line says
//! so on the disk, or the request is refused. So a token is never sent without a trace, whatever happens afterwards.

mod line;
mod sink;
mod writer;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use http::{Method, StatusCode};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::host::Authority;
use crate::names::{ProviderName, Subject, UserName};
use line::{End, Line};
use sink::Sink;
use writer::{Entry, Queue};

/// How long a use waits for its line on a disk that does not answer.
const INTENT_WAIT: Duration = Duration::from_secs(5);
/// How long the end waits for the uses that were cut off, and then for the disk.
const CUT_OFF_WAIT: Duration = Duration::from_secs(1);
const LAST_WAIT: Duration = Duration::from_secs(5);

/// Where the trail goes, and what happens when it cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Where to.
    pub place: Place,
    /// Whether no token is sent without it.
    pub required: bool,
}

/// Where the trail goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Standard output; the log is on standard error.
    Stdout,
    /// The end of this file.
    File(PathBuf),
}

/// The audit trail. A clone writes the same one.
#[derive(Clone)]
pub struct Audit {
    inner: Arc<Inner>,
}

struct Inner {
    required: bool,
    queue: Arc<Queue>,
    requests: AtomicU64,
    /// The uses under way.
    uses: TaskTracker,
    /// Tells that the last line was written.
    ended: Mutex<Option<oneshot::Receiver<()>>>,
}

/// How many lines there were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lines {
    /// That were written.
    pub written: u64,
    /// That were not, and will not be.
    pub failed: u64,
    /// That wait.
    pub waiting: usize,
    /// Whether they could be written when that was last tried.
    pub up: bool,
}

/// What is known of a use before it begins.
#[derive(Debug)]
pub struct Facts {
    /// When.
    pub at: SystemTime,
    /// The request's number in this run; its second try has the same.
    pub request: u64,
    /// Whether it is the first try or the second, which a 401 brings.
    pub attempt: u8,
    /// The agent that sent the request, where agents have names.
    pub agent: Option<String>,
    /// For whom.
    pub user: UserName,
    /// Whose token.
    pub provider: ProviderName,
    /// The token's own subject: the client, or the user.
    pub subject: Subject,
    /// The token's number in the history of its grant.
    pub generation: u64,
    /// The route that said so.
    pub route: Arc<str>,
    /// The request's method.
    pub method: Method,
    /// Where it went.
    pub host: Authority,
    /// Its path, without the query.
    pub path: String,
}

/// The trail cannot be written, and it is required.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the audit trail cannot be written")]
pub struct Unavailable;

/// A use of a credential. Its line is queued when this ends: also when the agent hangs up.
pub struct Use {
    audit: Audit,
    facts: Arc<Facts>,
    began: Instant,
    /// Whether the token went out, or may have.
    sent: bool,
    status: Option<StatusCode>,
    outcome: &'static str,
    _under_way: TaskTrackerToken,
}

/// What became of an intent's line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intent {
    /// It is on the disk.
    Durable,
    /// Nothing of it is in the file.
    Absent,
    /// It may be in the file.
    Unknown,
}

impl Audit {
    /// Opens the trail, and starts the thread that writes it.
    ///
    /// # Errors
    /// When the file cannot be opened, or the thread not started.
    pub fn open(wanted: &Wanted) -> std::io::Result<Self> {
        let sink = Sink::open(wanted.place.clone())?;
        let queue = Arc::new(Queue::default());
        let ended = writer::start(sink, queue.clone(), wanted.required)?;
        let (uses, requests, ended) = (TaskTracker::new(), AtomicU64::new(0), Mutex::new(Some(ended)));
        Ok(Self { inner: Arc::new(Inner { required: wanted.required, queue, requests, uses, ended }) })
    }

    /// A number for a request.
    pub fn request(&self) -> u64 {
        self.inner.requests.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Begins a use. Where the trail is required, its intent is on the disk before this is done.
    ///
    /// # Errors
    /// The trail is required, and could not be written: then the token must not be sent.
    pub async fn begin(&self, facts: Facts) -> Result<Use, Unavailable> {
        let mut used = Use {
            audit: self.clone(),
            facts: Arc::new(facts),
            began: Instant::now(),
            sent: false,
            status: None,
            outcome: "agent_gone",
            _under_way: self.inner.uses.token(),
        };
        if self.inner.required {
            used.intend().await?;
        }
        used.sent = true;
        Ok(used)
    }

    /// Opens the file anew: it was moved away. Lines that wait go into the new one.
    pub fn reopen(&self) {
        self.inner.queue.reopen();
    }

    /// How many lines there were.
    pub fn lines(&self) -> Lines {
        self.inner.queue.lines()
    }

    /// Writes what waits, once nothing is under way any more.
    pub async fn finish(&self) {
        let Inner { uses, queue, ended, .. } = &*self.inner;
        uses.close();
        // What was cut at the end of a drain is dropped a moment later.
        let _ = timeout(CUT_OFF_WAIT, uses.wait()).await;
        queue.close();
        let ended = ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ended) = ended
            && timeout(LAST_WAIT, ended).await.is_err()
        {
            tracing::error!(lines = queue.waiting(), "the last audit lines could not be written in time");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl Use {
    /// The upstream answered.
    pub fn answered(&mut self, status: StatusCode) {
        (self.status, self.outcome) = (Some(status), "answered");
    }

    /// The request ended without an answer that can be passed on. `sent`: whether the token may have gone out.
    pub fn failed(&mut self, code: &'static str, status: Option<StatusCode>, sent: bool) {
        (self.status, self.outcome, self.sent) = (status, code, sent);
    }

    async fn intend(&mut self) -> Result<(), Unavailable> {
        let (tell, told) = oneshot::channel();
        let queued = self.audit.inner.queue.push(Entry { line: self.line(None), told: Some(tell) });
        let intent = if queued { timeout(INTENT_WAIT, told).await } else { Ok(Ok(Intent::Absent)) };
        match intent {
            Ok(Ok(Intent::Durable)) => return Ok(()),
            Ok(Ok(Intent::Absent)) => self.outcome = "",
            _ => self.outcome = "audit_unavailable",
        }
        Err(Unavailable)
    }

    fn line(&self, end: Option<End>) -> Line {
        Line { facts: self.facts.clone(), end }
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        // An intent that may be in the file is completed, so that nobody takes it for a use.
        let told = self.audit.inner.required && !self.outcome.is_empty();
        if !self.sent && !told {
            return;
        }
        let (sent, status, outcome) = (self.sent, self.status, self.outcome);
        let end = End { sent, status, outcome, took: self.began.elapsed() };
        self.audit.inner.queue.push(Entry { line: self.line(Some(end)), told: None });
    }
}

#[cfg(test)]
mod tests;
