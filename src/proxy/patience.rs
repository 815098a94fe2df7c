//! Ends an HTTP/2 connection whose requests are begun only to be given up (rapid reset: CVE-2023-44487, CVE-2025-8671).
//!
//! `h2` counts the streams that are reset before they are taken, and those that it resets itself. A stream that is reset
//! just after costs the agent two frames, and us a request to the upstream, on a connection that others share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// So many may be given up in any case: an agent that is interrupted cancels all that it has under way.
const GIVEN_UP: usize = 256;
/// Whoever waited longer had a reason not to wait on.
const AT_ONCE: Duration = Duration::from_secs(1);
/// It is a matter of how many in so long: an agent that cancels now and then does so for hours.
const WINDOW: Duration = Duration::from_secs(10);

/// How the requests of one connection end. A clone counts the same ones.
#[derive(Clone, Default)]
pub(super) struct Patience {
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    window: Mutex<Window>,
    lost: CancellationToken,
}

struct Window {
    since: Instant,
    begun: usize,
    given_up: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self { since: Instant::now(), begun: 0, given_up: 0 }
    }
}

impl Counts {
    fn window(&self) -> MutexGuard<'_, Window> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.since.elapsed() >= WINDOW {
            *window = Window::default();
        }
        window
    }
}

impl Patience {
    /// A request comes.
    pub(super) fn begin(&self) -> Begun {
        self.counts.window().begun += 1;
        Begun { counts: Some(self.counts.clone()), since: Instant::now() }
    }

    /// Resolves when most of the requests are given up at once.
    pub(super) async fn lost(&self) {
        self.counts.lost.cancelled().await;
    }
}

/// A request that has no answer yet.
pub(super) struct Begun {
    counts: Option<Arc<Counts>>,
    since: Instant,
}

impl Begun {
    pub(super) fn answered(mut self) {
        self.counts = None;
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        let Some(counts) = self.counts.take().filter(|_| self.since.elapsed() < AT_ONCE) else { return };
        let mut window = counts.window();
        window.given_up += 1;
        if window.given_up > GIVEN_UP && window.given_up * 2 > window.begun {
            counts.lost.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn is_lost(patience: &Patience) -> bool {
        patience.lost().now_or_never().is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_lost_when_most_requests_are_given_up_at_once() {
        // LST-017
        let patience = Patience::default();
        for _ in 0..GIVEN_UP {
            drop(patience.begin());
        }
        assert!(!is_lost(&patience));
        drop(patience.begin());
        assert!(is_lost(&patience));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_not_lost_with_who_cancels_all_day() {
        let patience = Patience::default();
        for _ in 0..10 * GIVEN_UP {
            drop(patience.begin());
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        assert!(!is_lost(&patience));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_not_lost_with_who_cancels_now_and_then_or_waits_in_vain() {
        let patience = Patience::default();
        for _ in 0..10 * GIVEN_UP {
            patience.begin().answered();
            drop(patience.begin());
            let slow = patience.begin();
            tokio::time::advance(AT_ONCE).await;
            drop(slow);
        }
        assert!(!is_lost(&patience));
    }
}
