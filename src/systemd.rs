//! What systemd is told: that the sidecar has started, reloads and stops, and that it lives (`sd_notify(3)`).
//!
//! Without `NOTIFY_SOCKET` nothing of it happens.

use sd_notify::NotifyState;
use tokio_util::task::AbortOnDropHandle;

/// The variables that are for the process that systemd started, and mean nothing to the programs that it runs.
pub const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// It has started, or has reloaded; `status` is what `systemctl status` shows.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// It begins to read its configuration anew; [`ready`] follows, whether or not that was good.
pub fn reloading() {
    // systemd takes a reload for done only if it knows when that began.
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        tell(&[NotifyState::Reloading, now]);
    }
}

/// It stops as soon as what is under way has ended.
pub fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Says that the runtime lives, twice in each `WatchdogSec`, until the handle goes. Must be called within a tokio runtime.
pub fn watchdog() -> Option<AbortOnDropHandle<()>> {
    let every = sd_notify::watchdog_enabled().filter(|most| !most.is_zero())? / 2;
    Some(AbortOnDropHandle::new(tokio::spawn(async move {
        let mut beat = tokio::time::interval(every);
        loop {
            beat.tick().await;
            tell(&[NotifyState::Watchdog]);
        }
    })))
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd cannot be told: NOTIFY_SOCKET leads nowhere");
    }
}
