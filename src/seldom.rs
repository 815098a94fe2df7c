//! Polls a future when it was woken itself, and not each time that its task is.
//!
//! A connection's task is woken for every byte, and watches for much that comes once in a connection's life: the stop, the
//! end of its time. Asked each time, these cost more than the bytes.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// A future that comes seldom.
pub struct Seldom<F> {
    future: Pin<Box<F>>,
    woken: Arc<Woken>,
    /// Of the future itself.
    waker: Waker,
    /// The task, as `woken` knows it.
    task: Option<Waker>,
}

struct Woken {
    flag: AtomicBool,
    /// It stays here: a wake that took it along could take the one that was put here for the next wake.
    task: Mutex<Option<Waker>>,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.flag.store(true, Ordering::Release);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

/// Makes it one.
pub fn seldom<F: Future>(future: F) -> Seldom<F> {
    let woken = Arc::new(Woken { flag: AtomicBool::new(true), task: Mutex::default() });
    Seldom { future: Box::pin(future), waker: woken.clone().into(), woken, task: None }
}

impl<F: Future> Future for Seldom<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        if !this.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            this.task = Some(cx.waker().clone());
            *this.woken.task.lock().unwrap_or_else(PoisonError::into_inner) = this.task.clone();
        }
        // After that: whoever wakes it sets the flag first, and then looks for the task.
        if !this.woken.flag.load(Ordering::Acquire) || !this.woken.flag.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        this.future.as_mut().poll(&mut Context::from_waker(&this.waker))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::time::Duration;

    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_polled_when_it_is_woken_and_not_with_its_task() {
        let (began, mut polled, mut rounds) = (Instant::now(), 0, 0);
        {
            let mut inner = pin!(async {
                sleep(Duration::from_secs(20)).await;
                sleep(Duration::from_secs(40)).await;
            });
            let mut waits = seldom(poll_fn(|cx| {
                polled += 1;
                inner.as_mut().poll(cx)
            }));
            loop {
                rounds += 1;
                tokio::select! {
                    biased;
                    () = &mut waits => break,
                    () = sleep(Duration::from_secs(1)) => {}
                }
            }
        }
        assert_eq!((began.elapsed().as_secs(), polled), (60, 3));
        assert!(rounds >= 60, "{rounds}");
    }

    #[tokio::test]
    async fn it_wakes_whichever_task_waits_for_it_now() {
        let (says, hears) = tokio::sync::oneshot::channel();
        let mut waits = seldom(hears);
        assert!(futures_util::FutureExt::now_or_never(&mut waits).is_none());
        let elsewhere = tokio::spawn(waits);
        tokio::task::yield_now().await;
        says.send(7).unwrap();
        assert_eq!(elsewhere.await.unwrap(), Ok(7));
    }
}
