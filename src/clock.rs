//! What time it is, on the clock that only goes forward and on the one that people set.

use std::ops::Add;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// One moment on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Monotonic; stands still while the machine is suspended.
    pub instant: Instant,
    /// The wall clock; may be set back and forth.
    pub wall: SystemTime,
}

impl Now {
    /// Whether either clock is past this moment: the monotonic one stands still while the machine is suspended.
    pub fn is_past(self, now: Now) -> bool {
        now.instant > self.instant || now.wall > self.wall
    }
}

impl Add<Duration> for Now {
    type Output = Now;

    fn add(self, by: Duration) -> Now {
        Now { instant: self.instant + by, wall: self.wall + by }
    }
}

/// Where the time comes from. A clone shares the source.
#[derive(Clone)]
pub struct Clock(Source);

#[derive(Clone)]
enum Source {
    System,
    Test { start: Now, skew_ms: Arc<AtomicI64> },
}

impl Clock {
    /// The machine's clocks.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock for tests: both clocks follow tokio's, which a test may pause; the wall clock can be set apart.
    pub fn stepped() -> Self {
        let start = Now { instant: Instant::now(), wall: SystemTime::now() };
        Self(Source::Test { start, skew_ms: Arc::default() })
    }

    /// The moment now.
    pub fn now(&self) -> Now {
        let instant = Instant::now();
        let wall = match &self.0 {
            Source::System => SystemTime::now(),
            Source::Test { start, skew_ms } => {
                let skew = skew_ms.load(Ordering::SeqCst);
                let wall = start.wall + (instant - start.instant);
                let by = Duration::from_millis(skew.unsigned_abs());
                if skew < 0 { wall - by } else { wall + by }
            }
        };
        Now { instant, wall }
    }

    /// The clock of another machine in the same test: its wall clock is set for itself.
    #[cfg(test)]
    pub fn elsewhere(&self) -> Self {
        match &self.0 {
            Source::System => Self::system(),
            Source::Test { start, .. } => Self(Source::Test { start: *start, skew_ms: Arc::default() }),
        }
    }

    /// Sets a test's wall clock apart from its monotonic one; the machine's clocks are left alone.
    pub fn skew_wall(&self, milliseconds: i64) {
        if let Source::Test { skew_ms, .. } = &self.0 {
            skew_ms.store(milliseconds, Ordering::SeqCst);
        }
    }
}
