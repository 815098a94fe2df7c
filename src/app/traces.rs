//! Sends finished spans to a collector (OTLP over HTTP): in batches, again where that helps, and never for long.

mod otlp;

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::traces::{Collector, Span, Traces};
use crate::upstream::{Calls, Reply};

/// So many spans are sent at once, and so long the first one waits for others.
const BATCH: usize = 512;
const BATCH_WAIT: Duration = Duration::from_secs(2);
/// A batch that the collector could not take is tried so often, at first so much later.
const TRIES: u32 = 6;
const AGAIN: Duration = Duration::from_secs(1);
/// How long the end of the sidecar waits for its last spans.
const LAST_WAIT: Duration = Duration::from_secs(2);
/// Of a collector's answer.
const ANSWER_LIMIT: usize = 64 << 10;

/// The task that sends spans on.
pub(super) struct Export {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Export {
    /// Begins it. What it gives is where traces begin.
    pub fn start(collector: Collector, calls: Arc<Calls>) -> (Traces, Self) {
        let (traces, finished) = Traces::new(collector.share);
        let (stop, stopped) = oneshot::channel();
        let exporter =
            Exporter { collector, calls, traces: traces.clone(), finished, stopped, failing: false, lost: 0 };
        (traces, Self { stop, task: tokio::spawn(exporter.run()) })
    }

    /// Sends what is left, within a short time.
    pub async fn finish(self) {
        let _ = self.stop.send(());
        let mut task = self.task;
        if timeout(LAST_WAIT, &mut task).await.is_err() {
            task.abort();
            tracing::warn!("the last spans could not be sent in time");
        }
    }
}

struct Exporter {
    collector: Collector,
    calls: Arc<Calls>,
    traces: Traces,
    finished: mpsc::Receiver<Vec<Span>>,
    stopped: oneshot::Receiver<()>,
    /// It was said that spans cannot be sent.
    failing: bool,
    lost: u64,
}

/// Why a collector did not take a batch.
struct Refused {
    why: String,
    /// When it may be asked again; none where that would not help.
    again: Option<Duration>,
}

impl Exporter {
    async fn run(mut self) {
        let mut over = false;
        while !over {
            let (spans, stopped) = self.batch().await;
            over = stopped;
            if !spans.is_empty() {
                over |= self.deliver(spans, over).await;
            }
        }
        while let Ok(spans) = self.finished.try_recv() {
            self.deliver(spans, true).await;
        }
        self.tell_lost();
    }

    /// Spans to be sent, and whether there will be no more.
    async fn batch(&mut self) -> (Vec<Span>, bool) {
        let mut spans = tokio::select! {
            biased;
            _ = &mut self.stopped => return (Vec::new(), true),
            spans = self.finished.recv() => spans.unwrap_or_default(),
        };
        let until = Instant::now() + BATCH_WAIT;
        while spans.len() < BATCH {
            tokio::select! {
                biased;
                _ = &mut self.stopped => return (spans, true),
                more = timeout_at(until, self.finished.recv()) => match more {
                    Ok(Some(more)) => spans.extend(more),
                    Ok(None) => return (spans, true),
                    Err(_) => break,
                },
            }
        }
        (spans, false)
    }

    /// Sends a batch, and again for a while, but only once when it is the last. Gives whether the stop has come.
    async fn deliver(&mut self, spans: Vec<Span>, last: bool) -> bool {
        let body = otlp::request(&self.collector.resource, &spans).encode_to_vec();
        let mut last = last;
        for attempt in 0..TRIES {
            let Err(Refused { why, again }) = self.send(body.clone()).await else {
                self.delivered();
                return last;
            };
            if !std::mem::replace(&mut self.failing, true) {
                let (collector, hint) =
                    (self.collector.endpoint.as_str(), "see that it runs, and that `traces` names it");
                tracing::warn!(collector, error = why, hint, "spans cannot be sent; said once");
            }
            let Some(again) = again.filter(|_| !last && attempt + 1 < TRIES) else { break };
            tokio::select! {
                biased;
                _ = &mut self.stopped => last = true,
                () = sleep(again.max(AGAIN * 2_u32.pow(attempt))) => {}
            }
        }
        self.lost += spans.len() as u64;
        last
    }

    async fn send(&self, body: Vec<u8>) -> Result<(), Refused> {
        let Collector { endpoint, headers, .. } = &self.collector;
        let sent = self.calls.post_bytes(endpoint, "application/x-protobuf", headers, body, ANSWER_LIMIT).await;
        let Reply { status, headers, body } =
            sent.map_err(|error| Refused { why: error.to_string(), again: Some(Duration::ZERO) })?;
        if status.is_success() {
            return otlp::rejected(&body).map_or(Ok(()), |why| Err(Refused { why, again: None }));
        }
        let later = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT
        );
        let after = headers.get("retry-after").and_then(|after| after.to_str().ok()?.parse().ok());
        let after = Duration::from_secs(after.unwrap_or(0).min(60));
        Err(Refused { why: format!("status {}", status.as_u16()), again: later.then_some(after) })
    }

    fn delivered(&mut self) {
        if std::mem::take(&mut self.failing) {
            tracing::info!("spans are sent again");
        }
        self.tell_lost();
    }

    fn tell_lost(&mut self) {
        let lost = std::mem::take(&mut self.lost) + self.traces.dropped();
        if lost > 0 {
            tracing::warn!(spans = lost, "spans were lost");
        }
    }
}
