//! What is looked at seldom, by one for all who ask, and not waited for long.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout};

/// A look may take up a fiftieth of the time: where there is very much to see, it is seen less often.
const SHARE: u32 = 50;

pub(super) struct Glance<T> {
    inner: Arc<Inner<T>>,
}

struct Inner<T> {
    every: Duration,
    /// How many times as long as a look there is none, at least.
    spared: u32,
    last: Mutex<Last<T>>,
    /// Held while somebody looks.
    looks: tokio::sync::Mutex<()>,
}

struct Last<T> {
    seen: Option<Arc<T>>,
    /// When it is to be looked at again.
    next: Option<Instant>,
}

impl<T: Send + Sync + 'static> Glance<T> {
    /// That is looked at so often at most.
    pub(super) fn every(every: Duration) -> Self {
        Self::new(every, 0)
    }

    /// That is looked at so often at most, and less where a look takes the processor for long.
    pub(super) fn sparing(every: Duration) -> Self {
        Self::new(every, SHARE)
    }

    fn new(every: Duration, spared: u32) -> Self {
        let last = Mutex::new(Last { seen: None, next: None });
        Self { inner: Arc::new(Inner { every, spared, last, looks: tokio::sync::Mutex::default() }) }
    }

    /// What was seen last, after a look if it is time for one; but none that takes longer than `patience`.
    pub(super) async fn look(
        &self,
        patience: Duration,
        look: impl Future<Output = T> + Send + 'static,
    ) -> Option<Arc<T>> {
        if self.inner.is_due() {
            let inner = self.inner.clone();
            // In a task of its own: whoever comes next has what a hasty one did not wait for.
            let _ = timeout(patience, tokio::spawn(async move { inner.look(look).await })).await;
        }
        self.inner.lock().seen.clone()
    }
}

impl<T> Inner<T> {
    async fn look(&self, look: impl Future<Output = T>) {
        let _turn = self.looks.lock().await;
        if !self.is_due() {
            return;
        }
        let began = Instant::now();
        let seen = Arc::new(look.await);
        let now = Instant::now();
        let next = now + self.every.max((now - began) * self.spared);
        *self.lock() = Last { seen: Some(seen), next: Some(next) };
    }

    fn is_due(&self) -> bool {
        self.lock().next.is_none_or(|next| next <= Instant::now())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Last<T>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(500);

    async fn after<T>(milliseconds: u64, seen: T) -> T {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        seen
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_looks_twice_in_its_time_or_waits_for_long() {
        let glance = Glance::sparing(Duration::from_secs(1));
        let began = Instant::now();
        // Whoever does not wait has nothing, and the next one what came of it.
        assert_eq!(glance.look(PATIENCE, after(700, 1)).await, None);
        assert_eq!(began.elapsed(), PATIENCE);
        tokio::time::sleep(PATIENCE).await;
        assert_eq!(*glance.look(PATIENCE, after(0, 2)).await.unwrap(), 1);
        // It took 700 ms, so that it is not looked at again for 35 s.
        tokio::time::sleep(Duration::from_secs(34)).await;
        assert_eq!(*glance.look(PATIENCE, after(0, 3)).await.unwrap(), 1);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(*glance.look(PATIENCE, after(0, 4)).await.unwrap(), 4);
        tokio::time::sleep(Duration::from_millis(900)).await;
        assert_eq!(*glance.look(PATIENCE, after(0, 5)).await.unwrap(), 4);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(*glance.look(PATIENCE, after(0, 6)).await.unwrap(), 6);
    }

    #[tokio::test(start_paused = true)]
    async fn what_only_waits_is_looked_at_again_in_its_time_however_long_it_took() {
        let glance = Glance::every(Duration::from_secs(1));
        assert_eq!(glance.look(PATIENCE, after(2000, 1)).await, None);
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(*glance.look(PATIENCE, after(0, 2)).await.unwrap(), 2);
    }
}
