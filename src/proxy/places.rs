//! The places for agents' connections: how many there may be, which can change while there are some.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub(super) struct Places {
    free: Arc<Semaphore>,
    /// How many there are, taken ones and those to be given up among them.
    all: Mutex<usize>,
    /// Whether it was told that there was none.
    full: AtomicBool,
}

impl Places {
    pub(super) fn new(count: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(count)), all: Mutex::new(count), full: AtomicBool::new(false) }
    }

    /// A place, once there is one.
    pub(super) async fn take(&self) -> OwnedSemaphorePermit {
        if let Ok(place) = self.free.clone().try_acquire_owned() {
            return place;
        }
        if !self.full.swap(true, Ordering::Relaxed) {
            let (max_connections, hint) = (*self.all(), "`limits.max_connections` can be more");
            tracing::warn!(max_connections, hint, "full: new connections wait until one ends; said once");
        }
        self.free.clone().acquire_owned().await.expect("the places are never closed")
    }

    /// So many from now on. No connection is cut: where there are more, new ones wait until enough have ended.
    pub(super) fn allow(&self, count: usize) {
        let mut all = self.all();
        let before = std::mem::replace(&mut *all, count);
        if before == count {
            return;
        }
        self.full.store(false, Ordering::Relaxed);
        self.free.add_permits(count.saturating_sub(before));
        let owed = before.saturating_sub(count);
        let owed = owed - self.free.forget_permits(owed);
        if owed > 0 {
            let free = self.free.clone();
            tokio::spawn(async move {
                let owed = u32::try_from(owed).unwrap_or(u32::MAX);
                free.acquire_many_owned(owed).await.expect("the places are never closed").forget();
            });
        }
    }

    fn all(&self) -> std::sync::MutexGuard<'_, usize> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn fewer_places_wait_for_connections_to_end_and_more_are_there_at_once() {
        let places = Places::new(3);
        let mut taken = vec![places.take().await, places.take().await, places.take().await];
        places.allow(1);
        tokio::task::yield_now().await;
        for left in [2, 1] {
            taken.pop();
            tokio::task::yield_now().await;
            assert!(places.take().now_or_never().is_none(), "{left} are taken, and one is allowed");
        }
        taken.pop();
        taken.push(places.take().now_or_never().expect("the last one has ended"));
        places.allow(2);
        taken.push(places.take().now_or_never().expect("another one is allowed"));
        assert!(places.take().now_or_never().is_none());
    }
}
