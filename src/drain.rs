//! How everything stops: one signal that all may watch, and a count of what still has to finish.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

use crate::seldom::seldom;

/// The stop signal and the tasks that a stop waits for. A clone shares both.
#[derive(Clone, Default)]
pub struct Drain {
    stopping: CancellationToken,
    forced: CancellationToken,
    tasks: TaskTracker,
}

/// A wish that the stop begins, from inside. A clone is the same one.
#[derive(Clone, Default)]
pub struct Quit(CancellationToken);

impl Quit {
    /// Wishes it.
    pub fn ask(&self) {
        self.0.cancel();
    }

    /// Resolves when it is wished.
    pub fn asked(&self) -> WaitForCancellationFutureOwned {
        self.0.clone().cancelled_owned()
    }
}

/// How a stop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Everything finished by itself.
    Clean,
    /// The deadline came first, and what was left was cut.
    Forced,
}

impl Drain {
    /// Runs a task that a stop waits for.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        self.tasks.spawn(task)
    }

    /// Runs a task that a stop waits for, and that is cut when the stop's deadline passes.
    pub fn spawn_until_forced<F>(&self, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        // Boxed: each future around a future holds it twice, where it was captured and where it is polled.
        let (mut forced, mut task) = (seldom(self.forced.clone().cancelled_owned()), Box::pin(task));
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = &mut task => {}
                () = &mut forced => {}
            }
        });
    }

    /// Resolves when the stop begins.
    pub fn started(&self) -> WaitForCancellationFutureOwned {
        self.stopping.clone().cancelled_owned()
    }

    /// Whether the stop has begun.
    pub fn is_started(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Begins the stop, and waits for what runs, up to `deadline`.
    pub async fn finish(&self, deadline: Duration) -> Drained {
        self.stopping.cancel();
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_ok() {
            return Drained::Clean;
        }
        self.forced.cancel();
        Drained::Forced
    }
}
